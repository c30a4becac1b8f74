"""Read a model's signature off its fitted estimators, and examples off whatever a person has them in.

Only publishing and the loading of bare models come here. What cannot be known is assumed to be a number, and examples
always know better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from app.errors import UnusableExamples, UnusableModel
from app.signature import MAX_COLUMNS, Array, Datatype, Layout, Signature, TensorSpec, is_dtype

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "transform", "score_samples")
BY_CLASS = ("predict_proba", "predict_log_proba", "decision_function")
TARGET_ENCODERS = ("LabelEncoder", "LabelBinarizer", "MultiLabelBinarizer")

# Where an estimator that hands its input on as it comes keeps the fitted ones that it hands it to.
DELEGATES = {
    "CalibratedClassifierCV": "calibrated_classifiers_",
    "FeatureUnion": "transformer_list",
    "FixedThresholdClassifier": "estimator_",
    "FrozenEstimator": "estimator",
    "GridSearchCV": "best_estimator_",
    "HalvingGridSearchCV": "best_estimator_",
    "HalvingRandomSearchCV": "best_estimator_",
    "MultiOutputClassifier": "estimators_",
    "MultiOutputRegressor": "estimators_",
    "OneVsRestClassifier": "estimators_",
    "RandomizedSearchCV": "best_estimator_",
    "SelfTrainingClassifier": "estimator_",
    "StackingClassifier": "estimators_",
    "StackingRegressor": "estimators_",
    "TransformedTargetRegressor": "regressor_",
    "TunedThresholdClassifierCV": "estimator_",
    "VotingClassifier": "estimators_",
    "VotingRegressor": "estimators_",
}


def infer(
    companions: Sequence[Any], model: Any, examples: Any = None, *, extra_columns_ignored: bool = False
) -> Signature:
    """Return the signature of `model` behind its `companions`, from what fitting left in them and from `examples`.

    `examples` is what `prepare` returned; None where there are none. Raises `UnusableModel` when the object has no
    method that can be served, `UnusableExamples` when they do not fit.
    """
    methods = tuple(method for method in METHODS if _has(model, method))
    if not methods:
        raise UnusableModel(
            f"a {type(model).__name__} has none of the methods that can be served ({', '.join(METHODS)})"
        )
    chain = _chain(companions, model)
    target = next((stage for stage in companions if is_target_encoder(stage)), None)
    items = _item_layout(chain[0])
    ignored: tuple[str, ...] = ()
    layout: Layout
    if items is not None:
        inputs: tuple[TensorSpec, ...] = (TensorSpec(name=items, datatype="BYTES", dtype="object", nullable=False),)
        layout = items
    else:
        inputs, ignored, layout = _inputs(chain, examples)
    return Signature(
        layout=layout,
        inputs=inputs,
        outputs=(),
        methods=methods,
        classes=_classes(model, target),
        by_class=tuple(method for method in methods if method in BY_CLASS and not _is_by_pair(model, method)),
        extra_columns="ignore" if extra_columns_ignored else "forbid",
        ignored=ignored,
    )


def _is_by_pair(model: Any, method: str) -> bool:
    """Whether the columns are pairs of classes: a one-against-one decision, which looks the same with three classes."""
    if method != "decision_function":
        return False
    last = _steps(model)[-1]
    if getattr(last, "decision_function_shape", None) == "ovo":
        return True
    return any(_is_by_pair(inner, method) for inner in (_delegates(last) or ()) if inner is not last)


def prepare(companions: Sequence[Any], model: Any, examples: Any) -> Any:
    """Return examples as the first estimator of the chain takes them: a DataFrame, a dense array, or a list of items.

    A list of objects becomes a DataFrame, one of lists an array. Columns that the model never saw, such as the target
    that most tables have along, are left out. Raises `UnusableExamples`.
    """
    entry = next((stage for stage in companions if not is_target_encoder(stage)), model)
    items = _item_layout(entry)
    examples = _items(examples, items) if items else _columns_of_training(entry, _table(examples))
    if not items and hasattr(examples, "columns"):
        examples = _objects_as_trained(_chain(companions, model), examples)
    if len(examples) == 0:
        raise UnusableExamples("the examples have no rows")
    return examples


def _items(examples: Any, layout: str) -> list[Any]:
    """Return texts or records as a list: of a Series, of an array, of a DataFrame's only column of strings."""
    if hasattr(examples, "columns"):
        if layout == "records":
            return [dict(row) for row in examples.to_dict("records")]
        texts = [name for name in examples.columns if examples[name].map(lambda value: isinstance(value, str)).all()]
        if len(texts) != 1:
            raise UnusableExamples(
                f"this model takes one text a row; the examples have {len(texts)} columns of strings, expected one"
            )
        examples = examples[texts[0]]
    if isinstance(examples, list) and layout == "text":
        examples = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in examples]
    return examples.tolist() if hasattr(examples, "tolist") else list(examples)


def _table(examples: Any) -> Any:
    import pandas as pd

    if hasattr(examples, "toarray"):  # a sparse matrix
        return examples.toarray()
    if isinstance(examples, list) and all(isinstance(row, dict) for row in examples):
        frame = pd.DataFrame(examples)
        whole = [name for name in frame.columns if frame[name].dtype == np.int64]
        return frame.astype(dict.fromkeys(whole, np.float64))  # 41 is how most of the world writes 41.0
    if isinstance(examples, list) and all(isinstance(row, (list, tuple)) for row in examples):
        if len({len(row) for row in examples}) > 1:
            raise UnusableExamples("the examples are rows of different lengths")
        kinds = {type(value) for row in examples for value in row}
        return np.array(examples, dtype=np.float64 if kinds <= {int, float, type(None)} else object)
    if getattr(examples, "ndim", 0) != 2:
        raise UnusableExamples(
            "expected a DataFrame, an array of shape (rows, columns), or a list of rows as examples, "
            f"got {'shape ' + str(examples.shape) if hasattr(examples, 'shape') else 'a ' + type(examples).__name__}"
        )
    return examples


def _columns_of_training(entry: Any, examples: Any) -> Any:
    names, width = _feature_names(entry), _width(entry)
    if names is not None and hasattr(examples, "columns"):
        missing = [name for name in names if name not in examples.columns]
        if missing:
            have = ", ".join(map(str, examples.columns))
            raise UnusableExamples(f"the examples have no column {missing[0]!r}; they have {have}")
        # A column without a value has the dtype of its file's reader, which says nothing and may be refused.
        empty = [name for name in names if examples[name].isna().all()]
        return examples[names].astype(dict.fromkeys(empty, object))
    if width is not None and examples.shape[1] != width:
        raise UnusableExamples(
            f"the examples have {examples.shape[1]} columns, the model was trained with {width}"
            + (f": {', '.join(names)}" if names else "")
        )
    return examples


def _objects_as_trained(chain: Sequence[Any], examples: Any) -> Any:
    """Make objects again of numbers that were objects in training: an encoder of objects takes no others."""
    names = _feature_names(chain[0])
    known = _column_kinds(chain, names)[1] if names else {}
    for name, spec in known.items():
        column = examples[name] if name in examples.columns else None
        if column is not None and _is_of_numeric_objects(spec) and column.dtype.kind in "iuf":
            blank = None if spec.missing == "none" else np.nan
            examples = examples.assign(**{name: column.astype(object).where(column.notna(), blank)})
    return examples


def _chain(companions: Sequence[Any], model: Any) -> list[Any]:
    return [*(stage for stage in companions if not is_target_encoder(stage)), model]


def is_target_encoder(estimator: Any) -> bool:
    """Whether this encodes labels: such a companion is applied to what the model says, not to what it is asked."""
    return type(estimator).__name__ in TARGET_ENCODERS


def _has(estimator: Any, method: str) -> bool:
    try:
        return callable(getattr(estimator, method, None))
    except Exception:  # a property of somebody's class may raise anything; then the method is not there
        return False


def _steps(estimator: Any) -> list[Any]:
    """Return a pipeline's steps in order, without the ones that pass through, or the estimator itself."""
    if type(estimator).__name__ != "Pipeline" or not hasattr(estimator, "steps"):
        return [estimator]
    return [deep for _, step in estimator.steps if step is not None and step != "passthrough" for deep in _steps(step)]


def _delegates(estimator: Any) -> list[Any] | None:
    """Return the fitted estimators to which this one hands its input as it comes, None for one that looks at it itself."""
    attribute = DELEGATES.get(type(estimator).__name__)
    if attribute is None:
        return None
    found = getattr(estimator, attribute, None)
    found = found if isinstance(found, list) else [found]
    found = (
        [item[1] if isinstance(item, tuple) else getattr(item, "estimator", item) for item in found]
        if (attribute in ("transformer_list", "calibrated_classifiers_"))
        else found
    )
    return [item for item in found if item is not None and not isinstance(item, str)] or None


def entries(estimator: Any) -> list[Any]:
    """Return the estimators that look at the input first, however deep in pipelines, searches and ensembles they are."""
    steps = _steps(estimator)
    if not steps:
        return []
    delegates = _delegates(steps[0])
    return [steps[0]] if delegates is None else [deep for inner in delegates for deep in entries(inner)]


def _tags(estimator: Any) -> Any:
    from sklearn.utils import get_tags

    try:
        return get_tags(estimator)
    except Exception:  # not a scikit-learn estimator, or one of another age: nothing is known about it
        return None


def _item_layout(entry: Any) -> Literal["text", "records"] | None:
    """Return `text` or `records` for an estimator that is handed items instead of a table, else None."""
    for estimator in entries(entry):
        layout = _own_item_layout(estimator)
        if layout is not None:
            return layout
    steps = _steps(entry)
    if len(steps) > 1 and _looks_at_nothing(steps[0]) and _width(steps[0]) is None:
        return _item_layout(steps[1])  # a function cleans the texts before they are counted
    return None


def _own_item_layout(estimator: Any) -> Literal["text", "records"] | None:
    tags = _tags(estimator)
    if tags is None or tags.input_tags.two_d_array:
        return None
    if tags.input_tags.string:
        return "text"
    return "records" if tags.input_tags.dict else None


def _looks_at_nothing(estimator: Any) -> bool:
    tags = _tags(estimator)
    return tags is not None and bool(tags.no_validation)


def _inputs(
    chain: Sequence[Any], examples: Any
) -> tuple[tuple[TensorSpec, ...], tuple[str, ...], Literal["frame", "matrix"]]:
    entry = chain[0]
    names, width, columns = _feature_names(entry), _width(entry), _frame_columns(examples)
    layout: Literal["frame", "matrix"] = (
        "frame" if names is not None or (columns is not None and width is None) else "matrix"
    )
    if names is None:
        width = _array_width(examples) if width is None else width
        _check_width(width)
        names = columns or [f"x{position}" for position in range(width or 0)]
    _check_width(len(names))
    used, known, unknown = _column_kinds(chain, names)
    refusing, _ = _refusing(chain, set(range(len(names))))
    ignored = tuple(name for name in names if name not in used) if layout == "frame" else ()
    specs = []
    for position, name in enumerate(names):
        if layout == "frame" and name not in used:
            continue
        column = _column(examples, name, position)
        spec = _spec(name, column, known.get(name))
        if spec.assumed and name in unknown:
            specs.append(_anything(name))
            continue
        nullable = position not in refusing or (column is not None and _count_missing(column) > 0)
        specs.append(spec.model_copy(update={"nullable": nullable}))
    return tuple(specs), ignored, layout


def _check_width(width: int | None) -> None:
    if width is not None and width > MAX_COLUMNS:
        raise UnusableModel(
            f"it takes {width:,} columns, and at most {MAX_COLUMNS:,} can be served: if they are made of fewer, or of "
            "texts, put what makes them into one pipeline with the model"
        )


def _spec(name: str, column: Any, known: TensorSpec | None) -> TensorSpec:
    """Describe a column by its examples, unless there are none, and by what fitting left where the two differ."""
    if column is None or _count_missing(column) == len(column):
        return known or _number(name)
    spec = (
        _frame_spec(name, column) if hasattr(column, "dtype") and hasattr(column, "iloc") else _array_spec(name, column)
    )
    if known is None:
        return spec
    if "BYTES" in (spec.datatype, known.datatype) and spec.datatype != known.datatype:
        raise UnusableExamples(
            f"column {name!r} was {_WORDS[known.datatype]} in training and is {_WORDS[spec.datatype]} in the examples: "
            "give them with the dtypes of training (a parquet file or a DataFrame keeps them, csv does not)"
        )
    if known.is_datetime and not spec.is_datetime:
        raise UnusableExamples(
            f"column {name!r} was date-times in training and is strings in the examples: "
            "use parquet, or save() with a DataFrame"
        )
    if _is_of_numeric_objects(known) and spec.datatype in ("FP64", "INT64"):
        return known
    if spec.datatype == "FP64" and known.datatype == "INT64" and spec.dtype == "float64":
        return known  # whole numbers that became floats on their way, as they do in JSON or beside a missing value
    missing = "none" if "none" in (spec.missing, known.missing) else "nan"
    return spec.model_copy(update={"missing": missing})


_WORDS = {"BYTES": "strings", "FP64": "numbers", "INT64": "whole numbers", "BOOL": "true or false"}


def _number(name: str) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP64", dtype="float64", assumed=True)


def _anything(name: str) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP64", dtype="object", assumed=True)


def _is_of_numeric_objects(spec: TensorSpec) -> bool:
    return spec.dtype == "object" and spec.datatype in ("FP64", "INT64")


def _feature_names(entry: Any) -> list[str] | None:
    for estimator in (entry, *entries(entry)):
        names = _attribute(estimator, "feature_names_in_")
        if names is not None:
            return [str(name) for name in names]
        if not _delegates(estimator) and _attribute(estimator, "n_features_in_") is not None:
            return None
    return None


def _width(entry: Any) -> int | None:
    for estimator in (entry, *entries(entry)):
        width = _attribute(estimator, "n_features_in_")
        if width is not None:
            return int(width)
    return None


def _attribute(estimator: Any, name: str) -> Any:
    try:
        return getattr(estimator, name, None)
    except Exception:  # a pipeline asks its first step, which may know nothing
        return None


def _frame_columns(examples: Any) -> list[str] | None:
    return [str(name) for name in examples.columns] if hasattr(examples, "columns") else None


def _array_width(examples: Any) -> int | None:
    shape = getattr(examples, "shape", None)
    return int(shape[1]) if shape is not None and len(shape) == 2 else None


def _column_kinds(chain: Sequence[Any], names: list[str]) -> tuple[set[str], dict[str, TensorSpec], set[str]]:
    """Return the names that the model reads at all, what its fitted encoders and imputers tell of them, and the rest.

    Of these nothing is known, not even that they are numbers: only functions and other people's classes read them.
    """
    used: set[str] = set()
    known: dict[str, TensorSpec] = {}
    numbers: set[str] = set()
    steps = [deep for stage in chain for deep in _steps(stage)]
    for reader, positions, moved in _readers(steps, list(range(len(names)))):
        mine = [names[position] for position in positions]
        used.update(mine)
        if _takes_numbers(reader, moved=moved):
            numbers.update(mine)
        if not moved:
            for position, spec in _own_kinds(reader, mine).items():
                known.setdefault(mine[position], spec)
    return used, known, used - numbers - known.keys()


def _readers(
    steps: Sequence[Any], positions: list[int], behind: Sequence[Any] = (), *, moved: bool = False
) -> list[tuple[Any, list[int], bool]]:
    """Return the estimators that look at the columns first, each with those that it is handed, however deep they are.

    None looks at what passes through everything. `behind` follows where `steps` end; whether the reader is one of these,
    for which the columns may have moved, is the third of each.
    """
    if not steps:
        return _readers(behind, positions, moved=True) if behind else [(None, positions, moved)]
    first, *rest = steps
    if isinstance(first, str) or (type(first).__name__ == "FunctionTransformer" and first.func is None):
        return _readers(rest, positions, behind, moved=moved)
    following = [*rest, *behind]
    delegates, branches = _delegates(first), _branches(first)
    if delegates is not None:
        ways = [_readers(_steps(inner), positions, following, moved=moved) for inner in delegates]
    elif branches is not None and not moved:
        ways = [
            _readers(_steps(fitted), [positions[place] for place in where], following) for fitted, where in branches
        ]
    else:
        return [(first, positions, moved)]
    return [reader for way in ways for reader in way]


def _takes_numbers(reader: Any, *, moved: bool) -> bool:
    """Whether what looks at a column is known, or by its kind most likely, to be made for numbers."""
    if type(reader).__name__ == "FunctionTransformer":
        function = getattr(reader.func, "func", reader.func)
        library = str(getattr(function, "__module__", "")).partition(".")[0]
        return bool(reader.validate) or library in ("numpy", "scipy", "sklearn")
    if reader is not None and type(reader).__module__.partition(".")[0] != "sklearn":
        return _has(reader, "predict") and _attribute(reader, "n_features_in_") is not None
    tells_of_others = type(reader).__name__ == "ColumnTransformer" or hasattr(reader, "categories_")
    statistics = getattr(reader, "statistics_", None)
    return not (moved and (tells_of_others or (isinstance(statistics, np.ndarray) and statistics.dtype.kind == "O")))


def columns_of_strings(companions: Sequence[Any], model: Any, columns: Sequence[str]) -> list[str]:
    """Return those of a table's columns that fitting knew as strings, whatever they look like: `01234` is no number."""
    chain = _chain(companions, model)
    if _item_layout(chain[0]) is not None:
        return []
    names, width = _feature_names(chain[0]), _width(chain[0])
    if names is None:
        names = list(columns) if width == len(columns) else []
    if not names:
        return []
    _, known, _ = _column_kinds(chain, names)
    return [
        name for name in columns if name in known and known[name].datatype == "BYTES" and not known[name].is_datetime
    ]


def _branches(estimator: Any) -> list[tuple[Any, list[int]]] | None:
    """Return what a fitted ColumnTransformer does with which columns, by position; what it drops is left out.

    Histogram boosting has one inside where some columns are categories. None for all others.
    """
    transformer = getattr(estimator, "_preprocessor", None) or estimator
    indices = getattr(transformer, "_transformer_to_input_indices", None)
    if type(transformer).__name__ != "ColumnTransformer" or indices is None:
        return None
    return [
        (fitted, [int(position) for position in indices.get(name, [])])
        for name, fitted, _ in transformer.transformers_
        if not (isinstance(fitted, str) and fitted == "drop")
    ]


def _own_kinds(estimator: Any, names: list[str]) -> dict[int, TensorSpec]:
    categories = getattr(estimator, "categories_", None)
    if isinstance(categories, list) and len(categories) == len(names):
        return {position: _spec_of_values(names[position], values) for position, values in enumerate(categories)}
    statistics = getattr(estimator, "statistics_", None)
    if isinstance(statistics, np.ndarray) and statistics.dtype == object and len(statistics) == len(names):
        specs = {
            position: _as_floats(_spec_of_values(names[position], np.array([value], dtype=object)))
            for position, value in enumerate(statistics)
        }
        none = getattr(estimator, "missing_values", np.nan) is None
        return {
            position: spec.model_copy(update={"missing": "none" if none else "nan"}) for position, spec in specs.items()
        }
    tags = _tags(estimator)
    if tags is not None and tags.input_tags.string and not tags.input_tags.two_d_array:
        return {
            position: TensorSpec(name=name, datatype="BYTES", dtype="object") for position, name in enumerate(names)
        }
    return {}


def _spec_of_values(name: str, values: Array) -> TensorSpec:
    """Tell from known values of a column (an encoder's categories) what it holds."""
    if values.dtype.kind in "OUST":
        unwrapped = [value.item() if isinstance(value, np.generic) else value for value in values.tolist()]
        present = [value for value in unwrapped if value is not None and value == value]
        missing: Literal["nan", "none"] = "none" if any(value is None for value in values.tolist()) else "nan"
        if present and all(isinstance(value, bool) for value in present):
            return TensorSpec(name=name, datatype="BOOL", dtype="bool", missing=missing)
        if present and all(isinstance(value, (int, float)) for value in present):
            datatype: Datatype = "INT64" if all(isinstance(value, int) for value in present) else "FP64"
            return TensorSpec(name=name, datatype=datatype, dtype="object", missing=missing)
        return TensorSpec(name=name, datatype="BYTES", dtype="object", missing=missing)
    if values.dtype.kind == "b":
        return TensorSpec(name=name, datatype="BOOL", dtype="bool")
    if values.dtype.kind in "iu":
        return TensorSpec(name=name, datatype="INT64", dtype="int64")
    if values.dtype.kind == "M":
        return TensorSpec(name=name, datatype="BYTES", dtype=str(values.dtype))
    return TensorSpec(name=name, datatype="FP64", dtype="float64")


def _column(examples: Any, name: str, position: int) -> Any:
    """Return one column of the examples, a Series or an array; None where they have no columns."""
    columns = _frame_columns(examples)
    if columns is not None:
        return examples.iloc[:, columns.index(name) if name in columns else position]
    if isinstance(examples, np.ndarray) and examples.ndim == 2 and position < examples.shape[1]:
        return examples[:, position]
    return None


def _count_missing(column: Any) -> int:
    import pandas as pd

    return int(pd.isna(column).sum())


def _array_spec(name: str, column: Array) -> TensorSpec:
    return _as_floats(_spec_of_values(name, column)) if column.dtype.kind == "O" else _dtype_spec(name, column.dtype)


def _as_floats(spec: TensorSpec) -> TensorSpec:
    """Take objects that are all numbers for floats, which is what nearly every estimator makes of them."""
    more = {"datatype": "FP64", "dtype": "float64", "missing": "nan"}
    return spec.model_copy(update=more) if _is_of_numeric_objects(spec) else spec


def _frame_spec(name: str, series: pd.Series[Any]) -> TensorSpec:
    dtype = series.dtype
    text = str(dtype)
    if not is_dtype(text):
        raise UnusableExamples(
            f"column {name!r} has dtype {text[:100]}, which no request can bring: convert it to one of numpy's, to strings, "
            "or to times in UTC or a zone with a name"
        )
    if text == "category":
        categories = np.asarray(series.cat.categories)
        spec = _spec_of_values(name, categories)
        values = tuple(_plain_column(name, categories))
        more = {"dtype": text, "categories": values, "ordered": bool(series.cat.ordered)}
        return spec.model_copy(update=more)
    if text == "object":
        spec = _spec_of_values(name, np.asarray(series))
        return spec if spec.missing == "none" else _as_floats(spec)
    kind = getattr(dtype, "kind", "O")
    if kind == "M":
        return TensorSpec(name=name, datatype="BYTES", dtype=text)
    if kind in "iufb":
        return _dtype_spec(name, dtype)  # pandas' Int64 and boolean and Arrow's dtypes, too
    return TensorSpec(name=name, datatype="BYTES", dtype=text)


def _dtype_spec(name: str, dtype: Any) -> TensorSpec:
    datatypes: dict[str, Datatype] = {"f": "FP64", "i": "INT64", "u": "INT64", "b": "BOOL"}
    if dtype.kind not in datatypes:
        return TensorSpec(name=name, datatype="BYTES", dtype="object")
    return TensorSpec(name=name, datatype=datatypes[dtype.kind], dtype=str(dtype))


def _refusing(steps: Sequence[Any], positions: set[int], *, moved: bool = False) -> tuple[set[int], set[int]]:
    """Return the columns whose missing values one of the steps refuses, and those whose missing values come out behind.

    Refused are only those that scikit-learn itself is known to refuse: what is let in here and refused by an estimator
    is the caller's error as well, only later. `moved` says that a step before these may have put columns elsewhere.
    """
    refused: set[int] = set()
    for step in (deep for stage in steps for deep in _steps(stage)):
        turned_away, positions = _met(step, positions, moved=moved)
        refused |= turned_away
        moved = moved or not _looks_at_nothing(step)
    return refused, positions


def _met(estimator: Any, positions: set[int], *, moved: bool) -> tuple[set[int], set[int]]:
    branches, delegates = _branches(estimator), _delegates(estimator)
    if branches is not None:
        if moved:
            return set(), set()
        ways = [_refusing([fitted], positions & set(where), moved=True) for fitted, where in branches]
    elif delegates is not None:
        ways = [_refusing([inner], positions, moved=moved) for inner in delegates]
    else:
        fate = _own_fate(estimator)
        return (positions if fate == "refused" else set()), (positions if fate == "passed" else set())
    return set().union(*(refused for refused, _ in ways)), set().union(*(passed for _, passed in ways))


def _own_fate(estimator: Any) -> Literal["passed", "settled", "refused"]:
    """Tell what becomes of a missing value: handed on, dealt with (or nobody knows), or not taken."""
    kind = type(estimator).__name__
    if kind.endswith("Imputer") or kind in ("OneHotEncoder", "TargetEncoder"):
        return "settled"
    tags = _tags(estimator)
    if tags is None or tags.no_validation:
        return "passed"
    wraps = {"estimator", "estimators"} & set(estimator.get_params(deep=False))
    if wraps or not type(estimator).__module__.startswith("sklearn."):  # their tags say little of what is inside
        return "settled"
    if kind != "OrdinalEncoder" and not tags.input_tags.allow_nan:
        return "refused"
    return "passed" if hasattr(estimator, "transform") and not hasattr(estimator, "predict") else "settled"


def _classes(model: Any, target: Any) -> list[Any] | None:
    classes = _attribute(model, "classes_") if _has(model, "predict") else None
    if target is not None and classes is not None and not isinstance(classes, list):
        # In the order of the model's columns, which are not all that the encoder knows if it was fitted on more.
        classes = _decoded(target, classes)
    if classes is None:
        return None
    try:
        return [plain(item) for item in classes] if isinstance(classes, list) else plain(np.asarray(classes))
    except UnusableExamples as error:
        raise UnusableModel(f"its classes_ cannot be told to anybody: {error}") from error


def _decoded(target: Any, classes: Any) -> Any:
    if type(target).__name__ == "LabelEncoder":
        try:
            return target.inverse_transform(classes)
        except ValueError:  # it knows fewer: `Model` refuses the two of them, with a sentence
            return classes
    return _attribute(target, "classes_")


def plain(values: Any) -> list[Any]:
    """Return an array's values as JSON can carry them."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "M":
        values = [None if text == "NaT" else text for text in np.datetime_as_string(values).tolist()]
    return [plain_value(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def _plain_column(name: str, values: Any) -> list[Any]:
    try:
        return plain(values)
    except UnusableExamples as error:
        raise UnusableExamples(f"column {name!r}: {error}") from error


def _check_writable(value: str | int | None) -> None:
    """Raise `UnusableExamples` for text that is no Unicode, and for whole numbers that JSON is not read back with."""
    if isinstance(value, str):
        try:
            if not value.isascii():
                value.encode()
        except UnicodeEncodeError as error:
            raise UnusableExamples(
                f"the text {value!r:.100} has half a surrogate pair, which UTF-8 cannot carry"
            ) from error
    elif value is not None and not -(1 << 63) <= value < 1 << 64:
        raise UnusableExamples("a whole number beyond 64 bits cannot be written as JSON")


def plain_value(value: Any) -> Any:
    """Return one value as JSON can carry it: numpy and pandas scalars unwrapped, what is missing or infinite as None."""
    if value is None or isinstance(value, (str, bool, int)):
        _check_writable(value)
        return str(value) if type(value) not in (str, bool, int) and isinstance(value, str) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else str(value)
    if isinstance(value, datetime):  # pandas' Timestamp is one; NaT is one that differs from itself
        return value.isoformat() if value == value else None
    if isinstance(value, np.generic):
        return plain_value(value.item())
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    raise UnusableExamples(f"a value of type {type(value).__name__} cannot be written as JSON")


def likely_times(examples: Any) -> str | None:
    """Return the first column of strings that are all ISO 8601 date-times, None where there is none."""
    for name in _frame_columns(examples) or []:
        values = examples[name].dropna().tolist() if name in examples.columns else []
        if values and all(_is_time(value) for value in values):
            return name
    return None


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value) is not None
    except ValueError:
        return False


def instances_of(examples: Any, signature: Signature) -> list[Any]:
    """Return examples as the instances of a request: rows as lists in the signature's order, or the items themselves.

    Raises `UnusableExamples` when they do not have the model's columns.
    """
    if signature.layout in ("text", "records"):
        return [plain_value(item) for item in examples]
    if hasattr(examples, "columns"):
        columns = _frame_columns(examples) or []
        positions = [
            columns.index(spec.name) if spec.name in columns else position
            for position, spec in enumerate(signature.inputs)
        ]
        series = [_plain_column(columns[position], examples.iloc[:, position]) for position in positions]
        return [list(row) for row in zip(*series, strict=True)]
    rows = np.asarray(examples)
    if rows.ndim != 2 or (signature.inputs and rows.shape[1] != len(signature.inputs)):
        raise UnusableExamples(
            f"the examples have shape {rows.shape}, the model takes {len(signature.inputs)} columns a row"
        )
    return [[plain_value(value) for value in row] for row in rows.tolist()]
