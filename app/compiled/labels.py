"""From scores to classes, from sums to what scikit-learn's methods call them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, override

import numpy as np

from app.compiled.op import Op, expect
from app.signature import Array


@dataclass(frozen=True, eq=False)
class Labels(Op, kind="labels"):
    """A class for each row, from scores of shape (rows, classes), or (rows,) or (rows, 1) where there are two.

    `classes`: texts, or an array of booleans or numbers of shape (classes,). `rule`: the class of the greatest score, the first
    of equals (`greatest`); the second of two classes where the only score is `positive`, or is `not_negative`. The result is of
    shape (rows,), and of objects where classes are texts.
    """

    classes: tuple[str, ...] | Array
    rule: Literal["greatest", "positive", "not_negative"]

    @override
    def check(self) -> None:
        if isinstance(self.classes, np.ndarray):
            expect(self.classes.ndim == 1 and self.classes.dtype.kind in "biuf", "classes that are no numbers")
        expect(len(self.classes) >= 1, "no classes")
        expect(self.rule == "greatest" or len(self.classes) == 2, "not two classes for one score")

    @functools.cached_property
    def _classes(self) -> Array:
        if isinstance(self.classes, np.ndarray):
            return self.classes
        return np.array(self.classes, dtype=object)

    @override
    def run(self, value: Array) -> Array:
        if self.rule == "greatest":
            return self._classes.take(value.argmax(axis=1))
        if value.ndim == 2:
            value = value[:, 0]
        second = value > 0 if self.rule == "positive" else value >= 0
        return self._classes.take(second.view(np.int8))


@dataclass(frozen=True, eq=False)
class Parts(Op, kind="parts"):
    """The columns of a matrix in groups, as a tuple of matrices: what a classifier with several outputs computes for each."""

    widths: tuple[int, ...]

    @override
    def check(self) -> None:
        expect(len(self.widths) >= 1 and all(width >= 1 for width in self.widths), "a part without columns")

    @override
    def run(self, value: Array) -> tuple[Array, ...]:
        parts, start = [], 0
        for width in self.widths:
            parts.append(value[:, start : start + width])
            start += width
        return tuple(parts)


@dataclass(frozen=True, eq=False)
class Each(Op, kind="each"):
    """One operation for each item of a tuple: a tuple of as many; with `stacked`, one array of shape (rows, items)."""

    ops: tuple[Op, ...]
    stacked: bool

    @override
    def check(self) -> None:
        expect(len(self.ops) >= 1, "no operations")

    @override
    def run(self, value: tuple[Array, ...]) -> Any:
        if type(value) is not tuple:  # of a matrix, the items would be rows: each somebody else's
            raise TypeError("expected a tuple of arrays")
        results = tuple(op.run(item) for op, item in zip(self.ops, value, strict=True))
        return np.stack(results, axis=1) if self.stacked else results


@dataclass(frozen=True, eq=False)
class First(Op, kind="first"):
    """The only column of a matrix, as an array of shape (rows,)."""

    @override
    def run(self, value: Array) -> Array:
        return value[:, 0]


@dataclass(frozen=True, eq=False)
class Logarithm(Op, kind="logarithm"):
    """The natural logarithm."""

    @override
    def run(self, value: Array) -> Array:
        return np.log(value)


@dataclass(frozen=True, eq=False)
class Link(Op, kind="link"):
    """The inverse of a link function: from raw scores of shape (rows, columns) or (rows,) to what they stand for, of the same shape.

    The scores are first divided by `divisor`. `exponential`; `logistic`: 1 / (1 + exp(-x)); `softmax`, over each row.
    """

    function: Literal["exponential", "logistic", "softmax"]
    divisor: float

    @override
    def check(self) -> None:
        expect(math.isfinite(self.divisor) and self.divisor != 0, "a divisor that is none")

    @override
    def run(self, value: Array) -> Array:
        if self.divisor != 1:
            value = value / self.divisor
        if self.function == "exponential":
            return np.exp(value)
        if self.function == "logistic":
            return self._logistic(value)
        powers = np.exp(value - value.max(axis=1, keepdims=True))
        powers /= powers.sum(axis=1, keepdims=True)
        return powers

    @staticmethod
    def _logistic(value: Array) -> Array:
        # numpy has an exp of its own, which differs from the C library's in the last bit; scipy, and so scikit-learn, takes the latter.
        exp = math.exp
        try:
            return np.array([1 / (1 + exp(-raw)) for raw in value.reshape(-1).tolist()]).reshape(value.shape)
        except OverflowError:  # the result is 0 where numpy says infinity
            return 1 / (1 + np.exp(-value))


@dataclass(frozen=True, eq=False)
class BothClasses(Op, kind="both_classes"):
    """From the probability of the second of two classes, of shape (rows,) or (rows, 1), to those of both, of shape (rows, 2)."""

    @override
    def run(self, value: Array) -> Array:
        if value.ndim == 2:
            value = value[:, 0]
        both = np.empty((len(value), 2), value.dtype)
        both[:, 1] = value
        np.subtract(1, value, out=both[:, 0])
        return both


@dataclass(frozen=True, eq=False)
class Margin(Op, kind="margin"):
    """How far the score of the second of two classes is above that of the first: from (rows, 2) to (rows,)."""

    @override
    def run(self, value: Array) -> Array:
        return value[:, 1] - value[:, 0]


@dataclass(frozen=True, eq=False)
class Mirrored(Op, kind="mirrored"):
    """The negative of a score beside it: from (rows,) to (rows, 2)."""

    @override
    def run(self, value: Array) -> Array:
        return np.stack((-value, value), axis=1)


@dataclass(frozen=True, eq=False)
class WeightedMedian(Op, kind="weighted_median"):
    """The median of each row, its columns weighted: from (rows, columns) to (rows,). `weights`: float64, of shape (columns,)."""

    weights: Array

    @override
    def check(self) -> None:
        expect(self.weights.ndim == 1 and self.weights.dtype == np.float64 and len(self.weights) >= 1, "no weights")

    @override
    def run(self, value: Array) -> Array:
        order = np.argsort(value, axis=1)
        reached = np.cumsum(self.weights[order], axis=1)
        middle = (reached >= 0.5 * reached[:, -1:]).argmax(axis=1)
        rows = np.arange(len(value))
        return value[rows, order[rows, middle]]
