"""A loaded model: immutable, synchronous, and the same answer for the same rows whoever asks.

This module has the reference runtime, scikit-learn itself. It owns how an estimator is handed its input and how what it
returns becomes an array with one entry per row; it knows nothing of requests, queues or storage.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app import inspection, loaders, memory, versions
from app.bundle import Bundle, Part
from app.errors import (
    BundleError,
    CompanionFailed,
    GoldenMismatch,
    InvalidInput,
    LoadFailed,
    NoRoom,
    PredictionFailed,
    RequestError,
    RequestTooLarge,
    TooLarge,
    UnusableModel,
    Violation,
)
from app.manifest import CHUNK_BYTES, Golden
from app.names import ModelRef
from app.signature import MAX_VIOLATIONS, Array, Rows, Signature, show, step_of

Prediction = Array | tuple[Array, ...]
"""One array whose first axis is the row, or one such array for each output of a multi-output classifier."""

GOLDEN_RELATIVE_TOLERANCE = 1e-6  # another BLAS, or another CPU, may round the last digits differently
GOLDEN_ABSOLUTE_TOLERANCE = 1e-9

# What scikit-learn says when a value, not the model, is at fault.
_MISSING_FAULT = re.compile(r"contains NaN|with NaN")
_SIZE_FAULT = re.compile(r"contains infinity|value too large")
_OTHER_FAULT = re.compile(
    r"[Ff]ound unknown categor|could not convert string to float|is an invalid document"
    r"|Negative values in data|must be non-negative|strictly positive data"
)
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)  # trees compute in float32

MAX_NAMES = 100_000  # that a transformer is asked to make up, when the model is put together
MAX_DENSE_VALUES = 5_000_000  # of a sparse answer, which JSON can only write out in full


@dataclass(frozen=True, slots=True)
class Source:
    """Where a part of a model came from.

    `sha256` was found in the bytes that were read, or, where each of their chunks was checked, is what the manifest says.
    """

    role: str
    key: str
    etag: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading took and told: seconds by phase, the memory it took (measured, so approximate), warnings.

    `sealed_by` is the name or id of the trusted key that sealed it.
    """

    sources: tuple[Source, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    taken: memory.Taken | None = None
    warnings: tuple[str, ...] = ()
    trained_with: dict[str, str] = field(default_factory=dict)
    sealed_by: str | None = None


class Model:
    """A fitted estimator behind its companions, with its signature. Safe to share: nothing changes after it is made."""

    runtime = "sklearn"

    def __init__(
        self,
        ref: ModelRef,
        signature: Signature,
        estimator: Any,
        companions: Sequence[Any] = (),
        *,
        golden: Golden | None = None,
        report: LoadReport | None = None,
    ) -> None:
        self.ref = ref
        self.signature = signature
        self.estimator = estimator
        self.golden = golden
        self.report = report or LoadReport()
        self._stages = [stage for stage in companions if not inspection.is_target_encoder(stage)]
        self._target = next((stage for stage in companions if inspection.is_target_encoder(stage)), None)
        for part in (*companions, estimator):
            _check_fitted(part)
            use_one_thread(part)
        _check_chain([*self._stages, estimator])
        _check_target(self._target, estimator)
        self._orders = [order_between(*pair) for pair in itertools.pairwise([*self._stages, estimator])]

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Model:
        """Read a bundle's parts and put them together. Runs in a thread of its own, not on the event loop.

        Raises `LoadFailed`, `NoRoom`, `DigestMismatch`, `CompanionFailed`, `VersionMismatch`, `UnusableModel`, or what the
        storage raises.
        """
        memory.map_chunks_apart(CHUNK_BYTES)
        counted_anew = memory.reset_peak()
        started, resident = time.perf_counter(), memory.resident_bytes()
        parts = [_read(bundle, part) for part in bundle.parts]
        values = [loaded.value for loaded, _ in parts]
        *companions, estimator = values
        manifest = bundle.manifest
        told = [*bundle.warnings, *(warning for loaded, _ in parts for warning in loaded.warnings)]
        written_by = next((loaded.trained_version for loaded, _ in parts if loaded.trained_version), None)
        trained_with = {"scikit-learn": written_by} if written_by else {}
        if manifest is None:
            told += versions.check(trained_with, str(bundle.ref), policy=bundle.trust.version_policy)
        signature = manifest.signature if manifest else inspection.infer(companions, estimator)
        if manifest is None and holds_own_code(values):  # no golden rows have shown that it may be batched
            signature = signature.model_copy(update={"rowwise": False})
        peak = memory.peak_bytes() - resident if counted_anew else 0
        memory.trim_heap()
        gained = max(0, memory.resident_bytes() - resident)
        report = LoadReport(
            sources=tuple(source for _, source in parts),
            seconds={"load": time.perf_counter() - started},
            taken=memory.Taken(gained, max(gained, peak)),
            warnings=tuple(dict.fromkeys(told)),
            trained_with=dict(manifest.trained_with) if manifest and manifest.trained_with else trained_with,
            sealed_by=bundle.sealed_by,
        )
        golden = manifest.golden if manifest else None
        return cls(bundle.ref, signature, estimator, companions, golden=golden, report=report)

    def predict(self, rows: Rows, method: str) -> Prediction:
        """Compute `method` (one of the signature's) for the rows; the first axis of what returns is the row.

        Raises `InvalidInput` where the estimator refuses a value, `PredictionFailed` for anything else that it raises.
        """
        try:
            return self._compute(self._input(rows), rows.count, method)
        except RequestError:
            raise
        except ValueError as error:
            message = " ".join(str(error).splitlines()[:1])
            if _MISSING_FAULT.search(message):
                violations = _cells(rows, _is_missing, "a value: this model takes no null")
            elif _SIZE_FAULT.search(message):
                violations = _cells(rows, _is_too_large, f"at most {_LARGEST_FLOAT32:.7g}, the largest float32")
            elif _OTHER_FAULT.search(message):
                violations = []
            else:
                raise _failure(rows, error) from error
            raise InvalidInput(f"the model cannot take this input: {loaders.reason(message)}", violations) from error
        except Exception as error:  # any class may come out of an estimator; the caller is told nothing of it
            raise _failure(rows, error) from error

    def check(self) -> float | None:
        """Run the golden rows, and return the largest relative difference from what was recorded; None without any.

        Raises `GoldenMismatch`. This is also the warm-up.
        """
        if self.golden is None:
            return None
        rows = self.signature.validate(self.golden.instances)
        worst = 0.0
        for method, recorded in self.golden.outputs.items():
            worst = max(worst, compare(self.ref, method, recorded, wire(self.predict(rows, method))))
        return worst

    def predict_directly(self, examples: Any, method: str) -> Prediction:
        """Compute `method` for examples as they are (a DataFrame, an array, a list), as their owner would.

        Raises `PredictionFailed` for whatever the estimator raises.
        """
        try:
            return self._compute(examples, len(examples), method)
        except Exception as error:
            raise PredictionFailed("the estimator cannot compute them") from error

    def _compute(self, value: Any, count: int, method: str) -> Prediction:
        with np.errstate(all="ignore"):  # the logarithm of an impossible class is minus infinity, and no surprise
            for stage, order in zip(self._stages, self._orders, strict=True):
                value = stage.transform(_as_trained(value, stage))
                if order is not None:
                    value = value.iloc[:, order] if hasattr(value, "iloc") else value[:, order]
            result = getattr(self.estimator, method)(_as_trained(value, self.estimator))
        if self._target is not None and method == "predict":
            result = _decoded(self._target.inverse_transform(result))
        return _normalised(result, count)

    def _input(self, rows: Rows) -> Any:
        if self.signature.layout == "frame":
            return rows.frame()
        return rows.array() if self.signature.layout == "matrix" else rows.items()


def _read(bundle: Bundle, part: Part) -> tuple[loaders.Loaded, Source]:
    """Read one part, to the last byte. Nothing of its stream is left in memory afterwards."""
    label = f"{bundle.ref} {part.info.key.rpartition('/')[2]}"
    trained_with = bundle.manifest.trained_with if bundle.manifest else {}
    trust = bundle.trust
    most = trust.bytes_for(part.info.size)
    with bundle.open(part) as stream:
        try:
            loaded = loaders.load(
                part.format,
                memory.Watched(stream, label, limit_bytes=trust.memory_limit_bytes),
                label,
                trusted=trust.types,
                max_bytes=most,
                trained_with=trained_with,
            )
            sha256 = stream.finish()
        except NoRoom:
            raise
        except BundleError as error:
            if isinstance(error, TooLarge) and most < trust.most_for(part.info.size):
                raise NoRoom(str(error)) from error  # it is the memory that is too small, not the file too large
            if part.role == "model":
                raise
            if isinstance(error, LoadFailed) and part.artifact is None:
                stream.finish()  # or were its bytes altered on their way? Then nothing is wrong with the companion
            raise CompanionFailed(f"{part.role} is broken: {error}") from error
    return loaded, Source(part.role, part.info.key, part.info.etag, sha256, part.info.size)


_GENERIC = "the model could not compute this input; the service's log says why"


def _failure(rows: Rows, error: Exception) -> RequestError:
    """Return whose fault it is: the caller's, where values of a kind that nothing tells to be right were not taken."""
    if rows.guessed and isinstance(error, (TypeError, ValueError, AttributeError)):
        return InvalidInput(
            "the model cannot take these values, and nothing tells what its columns hold: publish it with --examples"
        )
    return PredictionFailed(_GENERIC)


def wire(prediction: Prediction) -> list[Any]:
    """Return a prediction as JSON carries it: one element a row, NaN and the infinities as None."""
    if isinstance(prediction, tuple):
        return [list(row) for row in zip(*(wire(output) for output in prediction), strict=True)]
    if prediction.dtype.kind in "iubU":
        return prediction.tolist()  # type: ignore[no-any-return]
    if prediction.dtype.kind == "f" and bool(np.isfinite(prediction).all()):
        return prediction.tolist()  # type: ignore[no-any-return]
    return inspection.plain(prediction)


def compare(ref: ModelRef | str, method: str, recorded: list[Any], found: list[Any]) -> float:
    """Return the largest relative difference between two answers. Raises `GoldenMismatch` when they are not the same."""
    if len(recorded) != len(found):
        raise GoldenMismatch(f"{ref}: {method} gave {len(found)} rows, recorded are {len(recorded)}")
    worst = 0.0
    for index, (was, now) in enumerate(zip(recorded, found, strict=True)):
        difference = _difference(was, now)
        if difference is None:
            raise GoldenMismatch(f"{ref}: golden row {index}: {method} gave {now}, recorded is {was}")
        worst = max(worst, difference)
    return worst


def part_of(prediction: Prediction, start: int, stop: int) -> Prediction:
    """Return the rows `start` up to `stop` of a prediction."""
    if isinstance(prediction, tuple):
        return tuple(output[start:stop] for output in prediction)
    return prediction[start:stop]


def _normalised(result: Any, count: int) -> Prediction:
    if isinstance(result, list) and result and all(getattr(output, "ndim", 0) for output in result):
        return tuple(_array(output, count) for output in result)
    return _array(result, count)


def _array(result: Any, count: int) -> Array:
    if hasattr(result, "toarray"):  # a sparse matrix
        if result.shape[0] * result.shape[1] > MAX_DENSE_VALUES:
            rows = max(1, MAX_DENSE_VALUES // result.shape[1])
            raise RequestTooLarge(
                f"each row's answer has {result.shape[1]} numbers: ask for at most {rows} rows at a time"
            )
        result = result.toarray()
    array = result.to_numpy() if hasattr(result, "to_numpy") else np.asarray(result)
    if array.ndim == 0 or len(array) != count:
        raise ValueError(f"the model answered with shape {array.shape} for {count} rows")
    if array.dtype.kind == "f" and array.dtype != np.float64:
        return array.astype(np.float64)  # exact, and what JSON's numbers are
    return np.ascontiguousarray(array)


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


def _is_missing(value: Any) -> bool:
    return value is None or value != value


def _is_too_large(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) > _LARGEST_FLOAT32


def _cells(rows: Rows, is_at_fault: Callable[[Any], bool], expected: str) -> list[Violation]:
    """Return the values of the rows that are at fault."""
    if rows.signature.layout not in ("matrix", "frame"):
        return []
    specs = rows.signature.inputs
    found = []
    for index, row in enumerate(rows.array().tolist()):
        for position, value in enumerate(row):
            if is_at_fault(value):
                step = step_of(specs[position].name) if rows.signature.layout == "frame" else f"[{position}]"
                found.append(Violation(f"instances[{index}]{step}", expected, show(inspection.plain_value(value))))
                if len(found) == MAX_VIOLATIONS:
                    return found
    return found


def _difference(was: Any, now: Any) -> float | None:
    """Return how far two answers are apart, relative to the recorded one; None when they are not the same answer."""
    if isinstance(was, list) or isinstance(now, list):
        if not (isinstance(was, list) and isinstance(now, list) and len(was) == len(now)):
            return None
        worst = 0.0
        for left, right in zip(was, now, strict=True):
            difference = _difference(left, right)
            if difference is None:
                return None
            worst = max(worst, difference)
        return worst
    if isinstance(was, bool) or isinstance(now, bool) or not isinstance(was, (int, float)):
        return 0.0 if was == now and type(was) is type(now) else None
    if not isinstance(now, (int, float)):
        return None
    if not math.isclose(was, now, rel_tol=GOLDEN_RELATIVE_TOLERANCE, abs_tol=GOLDEN_ABSOLUTE_TOLERANCE):
        return None
    return float(abs(was - now) / max(abs(was), GOLDEN_ABSOLUTE_TOLERANCE))


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
