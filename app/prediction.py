"""What a model answers: arrays whose first axis is the row; how JSON carries them, and whether two answers are the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from app import inspection
from app.errors import GoldenMismatch, RequestTooLarge
from app.names import ModelRef
from app.signature import Array

Prediction = Array | tuple[Array, ...]
"""One array whose first axis is the row, or one such array for each output of a multi-output classifier."""

GOLDEN_RELATIVE_TOLERANCE = 1e-6  # another BLAS, or another CPU, may round the last digits differently
GOLDEN_ABSOLUTE_TOLERANCE = 1e-9

MAX_DENSE_VALUES = 5_000_000  # of a sparse answer, which JSON can only write out in full


def normalised(result: Any, count: int) -> Prediction:
    """Return what a runtime answered for `count` rows as a prediction: dense, contiguous, floats in float64.

    Raises `ValueError` where it has not an entry for each row, `RequestTooLarge` where it is too large to be written out.
    """
    if isinstance(result, (list, tuple)) and result and all(getattr(output, "ndim", 0) for output in result):
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
