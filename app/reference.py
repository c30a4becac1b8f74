"""The reference runtime: scikit-learn itself, a fitted estimator behind its companions.

It owns how an estimator is handed its input, which companions belong together, and that one thread computes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from app import inspection
from app.errors import CompanionFailed, UnusableModel
from app.prediction import Prediction, normalised
from app.signature import Rows, Signature

MAX_NAMES = 100_000  # that a transformer is asked to make up, when the model is put together


class Reference:
    """A fitted estimator behind its companions. Safe to share: nothing changes after it is made."""

    def __init__(self, signature: Signature, estimator: Any, companions: Sequence[Any] = ()) -> None:
        self.estimator = estimator
        self.companions = tuple(companions)
        self._layout = signature.layout
        self._stages = [stage for stage in companions if not inspection.is_target_encoder(stage)]
        self._target = next((stage for stage in companions if inspection.is_target_encoder(stage)), None)
        for part in (*companions, estimator):
            _check_fitted(part)
            use_one_thread(part)
        _check_chain([*self._stages, estimator])
        _check_target(self._target, estimator)
        self._orders = [order_between(*pair) for pair in itertools.pairwise([*self._stages, estimator])]

    def run(self, rows: Rows, method: str) -> Prediction:
        """Compute `method` for the rows. Raises whatever the estimator raises."""
        return self.compute(self._input(rows), rows.count, method)

    def compute(self, value: Any, count: int, method: str) -> Prediction:
        """Compute `method` for `count` rows of what the first estimator takes. Raises whatever an estimator raises."""
        with np.errstate(all="ignore"):  # the logarithm of an impossible class is minus infinity, and no surprise
            for stage, order in zip(self._stages, self._orders, strict=True):
                value = stage.transform(_as_trained(value, stage))
                if order is not None:
                    value = value.iloc[:, order] if hasattr(value, "iloc") else value[:, order]
            result = getattr(self.estimator, method)(_as_trained(value, self.estimator))
        if self._target is not None and method == "predict":
            result = _decoded(self._target.inverse_transform(result))
        return normalised(result, count)

    def _input(self, rows: Rows) -> Any:
        if self._layout == "frame":
            return rows.frame()
        return rows.array() if self._layout == "matrix" else rows.items()


def _as_trained(value: Any, estimator: Any) -> Any:
    """Give a stage its input with the column names that it was fitted with, or without any if it had none."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is not None and isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[1] == len(names):
        import pandas as pd

        return pd.DataFrame(value, columns=pd.Index(names), copy=False)
    if names is None and hasattr(value, "columns") and _fitted_on_array(estimator):
        return value.to_numpy()
    return value


def _fitted_on_array(estimator: Any) -> bool:
    return type(estimator).__name__ != "Pipeline" and isinstance(getattr(estimator, "n_features_in_", None), int)


def _check_fitted(part: Any) -> None:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    if not type(part).__module__.startswith("sklearn."):
        return  # others need not follow its conventions
    try:
        check_is_fitted(part)
    except NotFittedError as error:
        raise UnusableModel(f"its {type(part).__name__} was saved before it was fitted") from error
    except Exception:  # it asks parts that may be anybody's, who may answer anything
        return


def _check_chain(stages: Sequence[Any]) -> None:
    """Refuse companions that cannot belong together: what one gives must be as wide as what the next one takes."""
    for stage, following in itertools.pairwise(stages):
        name = type(stage).__name__
        if not callable(getattr(stage, "transform", None)):
            raise CompanionFailed(f"a {name} has no transform and cannot stand before the model")
        takes = getattr(following, "n_features_in_", None)
        gives = _width_given(stage)
        if gives is not None and takes is not None and gives != takes:
            raise CompanionFailed(
                f"its {name} gives {gives} columns, the {type(following).__name__} behind it takes {takes}: "
                "they do not belong together"
            )


def _width_given(transformer: Any) -> int | None:
    """Return how many columns come out, by what most transformers have as a number; none is made to count them."""
    from sklearn.base import ClassNamePrefixFeaturesOutMixin, OneToOneFeatureMixin

    told_by: dict[Any, str] = {
        OneToOneFeatureMixin.get_feature_names_out: "n_features_in_",
        ClassNamePrefixFeaturesOutMixin.get_feature_names_out: "_n_features_out",
    }
    try:
        attribute = told_by.get(type(transformer).get_feature_names_out, _WIDTHS.get(type(transformer).__name__))
        if attribute is not None:
            return int(getattr(transformer, attribute))
        return len(transformer.get_feature_names_out()) if _count_names(transformer) <= MAX_NAMES else None
    except Exception:  # many transformers cannot say; then only trying tells
        return None


_WIDTHS = {"PolynomialFeatures": "n_output_features_", "SplineTransformer": "n_features_out_"}


def _count_names(transformer: Any) -> int:
    """Return about how many names would be written, or one more than `MAX_NAMES`.

    A number in a file of a few hundred bytes says how many a transformer gives, and many may be the same one.
    """
    kind = type(transformer).__name__
    if kind in (
        "AdditiveChi2Sampler",
        "SplineTransformer",
        "StackingClassifier",
        "StackingRegressor",
        "VotingClassifier",
    ):
        return MAX_NAMES + 1  # the product of two numbers
    names = getattr(transformer, "feature_names_in_", None)
    count = 1 if names is not None else _number(transformer, "n_features_in_")
    count += _number(transformer, "_n_features_out")
    if kind == "PolynomialFeatures":
        width, degree = _number(transformer, "n_features_in_"), _number(transformer, "_max_degree")
        count += math.comb(width + degree, degree) if max(width, degree) <= _MAX_BINOMIAL else MAX_NAMES
    steps = getattr(transformer, _STEPS[kind]) if kind in _STEPS else ()
    for step in steps:
        if count > MAX_NAMES:
            return MAX_NAMES + 1
        count += _count_names(step[1])
    return count


_STEPS = {"ColumnTransformer": "transformers_", "FeatureUnion": "transformer_list", "Pipeline": "steps"}
_MAX_BINOMIAL = 1000


def _number(transformer: Any, attribute: str) -> int:
    try:
        return max(0, int(getattr(transformer, attribute, 0)))
    except Exception:  # a property may ask for what is not there
        return 0


def _decoded(labels: Any) -> Any:
    """Return labels as an array with an entry per row: several labels a row come as tuples of any length."""
    if not isinstance(labels, list):
        return labels
    array = np.empty(len(labels), dtype=object)
    array[:] = [list(row) for row in labels]
    return array


def order_between(stage: Any, following: Any) -> list[int] | None:
    """Return the columns of what `stage` gives in the order in which `following` was fitted on them, None if they are.

    Names decide where both have the same ones. Where they share none, one of the two was fitted without names, and the
    position has to do. Raises `CompanionFailed` where they share some: then a column is missing, or is another.
    """
    wanted = getattr(following, "feature_names_in_", None)
    given = _names_given(stage)
    if wanted is None or given is None or given == list(wanted):
        return None
    if set(given) == set(wanted):
        places = {name: place for place, name in reversed(list(enumerate(given)))}
        return [places[name] for name in wanted]
    if shared := set(given) & set(wanted):
        strange = next(name for name in [*wanted, *given] if name not in shared)
        raise CompanionFailed(
            f"its {type(stage).__name__} and the {type(following).__name__} behind it share some columns, but not "
            f"{strange!r}: they do not belong together"
        )
    return None


def _names_given(transformer: Any) -> list[str] | None:
    if getattr(transformer, "feature_names_in_", None) is None:
        return None  # then it invents names, which mean nothing
    try:
        if _count_names(transformer) > MAX_NAMES:
            return None
        return [str(name) for name in transformer.get_feature_names_out()]
    except Exception:  # many transformers cannot say
        return None


def _check_target(target: Any, estimator: Any) -> None:
    """Refuse an encoder of labels that cannot decode what the model says."""
    if type(target).__name__ != "LabelEncoder":
        return
    kind = type(estimator).__name__
    labels, numbers = getattr(target, "classes_", ()), getattr(estimator, "classes_", None)
    if not isinstance(numbers, np.ndarray):
        raise CompanionFailed(
            f"its LabelEncoder decodes classes, and the {kind} has none: a LabelEncoder for a column of the input cannot "
            "be a companion, put an OrdinalEncoder into the pipeline instead"
        )
    if not set(numbers.tolist()) <= set(range(len(labels))):
        raise CompanionFailed(
            f"its LabelEncoder decodes the numbers 0 to {len(labels) - 1}, the {kind} says "
            f"{', '.join(map(str, numbers[:5].tolist()))}: they do not belong together"
        )
    if len(labels) != len(numbers):  # most likely it was fitted on another column
        raise CompanionFailed(
            f"its LabelEncoder knows {len(labels)} labels, the {kind} {len(numbers)} classes: if it is the encoder of the "
            "target, fit it on the same rows as the model"
        )


def use_one_thread(estimator: Any) -> None:
    """Set `n_jobs` to 1 wherever it stands in a fitted estimator.

    One row through a forest with `n_jobs=-1` costs more in threads than in trees, and requests are parallel already.
    """
    for part in parts_of(estimator):
        if getattr(part, "n_jobs", 1) != 1:
            part.n_jobs = 1


def parts_of(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield every estimator within a fitted object, itself among them, once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (list, tuple)):
        children: Sequence[Any] = value
    elif isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, np.ndarray):
        children = value.ravel().tolist() if value.dtype == object and value.size < 100_000 else ()
    elif hasattr(value, "get_params") and hasattr(value, "__dict__"):
        yield value
        children = list(vars(value).values())
    else:
        return
    for child in children:
        if not isinstance(child, (str, bytes, int, float, bool, type(None))):
            yield from parts_of(child, seen)


def holds_own_code(values: Sequence[Any]) -> bool:
    """Whether somebody's own class or function computes in these objects: it may look at all rows of a batch at once."""
    for part in [*values, *parts_of(list(values))]:
        if not _is_sklearn(part):
            return True
        for function in (getattr(part, "func", None), getattr(part, "inverse_func", None)):
            if function is not None and not isinstance(function, np.ufunc):
                return True
        for item in vars(part).values():
            if any(_computes(inner) and not _is_sklearn(inner) for inner in _flat(item)):
                return True
    return False


def _flat(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, (list, tuple)) else [value]:
        yield from item if isinstance(item, tuple) else [item]


def _computes(value: Any) -> bool:
    return not isinstance(value, type) and any(
        callable(getattr(value, name, None)) for name in ("transform", "predict")
    )


def _is_sklearn(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "sklearn"
