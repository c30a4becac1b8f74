"""Every way in which people write a model into a file, and what a model answers."""

from __future__ import annotations

import functools
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import joblib
import numpy as np
import skops.io
from scipy import sparse


def dumped(value: Any, compress: Any = 0) -> bytes:
    """Return what `joblib.dump` writes."""
    buffer = io.BytesIO()
    joblib.dump(value, buffer, compress=compress)
    return buffer.getvalue()


FORMS: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "joblib": ("joblib", dumped),
    **{
        f"joblib, {method}": ("joblib", functools.partial(dumped, compress=(method, 3)))
        for method in ("zlib", "gzip", "bz2", "xz", "lzma")
    },
    **{
        f"pickle {protocol}": ("pickle", functools.partial(pickle.dumps, protocol=protocol))
        for protocol in (2, 3, 4, 5)
    },
    "skops": ("skops", skops.io.dumps),
}

METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "transform", "score_samples")


def answers(estimator: Any, data: Any) -> dict[str, Any]:
    """Return what every method answers, or the class of what it raises."""
    found: dict[str, Any] = {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for name in METHODS:
            try:
                found[name] = getattr(estimator, name)(data)
            except Exception as error:
                found[name] = type(error).__name__
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two answers are the same, bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if sparse.issparse(one):
        return same([*sparse.find(one), one.shape], [*sparse.find(other), other.shape])
    if hasattr(one, "to_numpy"):
        return list(one.columns) == list(other.columns) and same(one.to_numpy(), other.to_numpy())
    if isinstance(one, np.ndarray) and one.dtype not in (
        object,
        np.longdouble,
    ):  # in a longdouble, six bytes are padding
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return bool(np.array_equal(one, other))
