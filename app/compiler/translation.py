"""Which fitted objects can be compiled, and how: two tables from the class of an estimator to its translation.

A translation reads a fitted object and returns operations that compute the same. What it cannot do it refuses with
`NotCompilable` and the reason: the reference computes then. Nothing here is trusted to be right: `proof.py` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.compiled.op import Op


class NotCompilable(Exception):
    """This object, or these settings of it, have no compiled form. The message is the end of a sentence: "its … "."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What is known at one point of the way from rows to prediction.

    `kind`: a `matrix` of floats (dtype `dtype`) and `width` columns; a `table` of `width` columns, which have `names` if they
    were a DataFrame's and are of pandas dtypes `dtypes`; `texts` or `records`, an array of objects; `sparse`, rows of which most
    values are zero, `width` columns. The values computed with are float64 unless `dtype` is float32 or float16; otherwise `dtype` is what
    scikit-learn has there. `whole` and `bounded` are known to be without NaN, and without an infinity.
    """

    kind: str
    width: int
    dtype: str = "float64"
    names: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    whole: bool = False
    bounded: bool = False


Transformer = Callable[[Any, Flow], tuple[Op, Flow]]
"""A fitted transformer and what comes in: its operation, and what comes out."""
Predictor = Callable[[Any, Flow], Mapping[str, Op]]
"""A fitted predictor and what comes in: an operation for each of its methods."""

TRANSFORMERS: dict[str, list[Transformer]] = {}
PREDICTORS: dict[str, list[Predictor]] = {}


def transforms[F: Transformer](*classes: str) -> Callable[[F], F]:
    """Register the translation of transformers by the full names of their classes, such as `sklearn.preprocessing._data.StandardScaler`.

    Of several for one class, the one that was registered last is tried first.
    """

    def register(function: F) -> F:
        for name in classes:
            TRANSFORMERS.setdefault(name, []).insert(0, function)
        return function

    return register


def predicts[F: Predictor](*classes: str) -> Callable[[F], F]:
    """Register the translation of predictors, likewise."""

    def register(function: F) -> F:
        for name in classes:
            PREDICTORS.setdefault(name, []).insert(0, function)
        return function

    return register


def transformer(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    """Translate a fitted transformer. Raises `NotCompilable`."""
    return _first(TRANSFORMERS, estimator, flow)


def predictor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate a fitted predictor, by method. Raises `NotCompilable`."""
    return _first(PREDICTORS, estimator, flow)


def _first[T](known: Mapping[str, list[Callable[[Any, Flow], T]]], estimator: Any, flow: Flow) -> T:
    """Return what the first translation makes of it that can."""
    cls = type(estimator)
    refused = NotCompilable(f"its {cls.__name__} has no compiled form")
    for translate in known.get(f"{cls.__module__}.{cls.__qualname__}", ()):  # the very class: a subclass may differ
        try:
            return translate(estimator, flow)
        except NotCompilable as error:
            refused = error
    raise refused
