"""Models that multiply by a matrix, and what turns their scores into labels and probabilities."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, override

import numpy as np

from app.compiled.categories import Key
from app.compiled.op import Op, expect
from app.compiled.values import Sparse, check_room
from app.signature import Array

MAX_LABEL_CHARACTERS = 1 << 24
_CHUNK_VALUES = 1 << 20  # of a product with rows that are mostly zero that is held at a time


@dataclass(frozen=True, eq=False)
class ClassLabels(Op, kind="class_labels"):
    """What the classes of a model are called, given their numbers: an array, strings, or any values of Python's."""

    values: Array | tuple[Key, ...]
    strings: bool

    @override
    def check(self) -> None:
        if isinstance(self.values, tuple):
            expect(not self.strings or all(type(value) is str for value in self.values), "a label is no string")
            # Each takes as much room as the longest.
            longest = max((len(value) for value in self.values if type(value) is str), default=0)
            expect(longest * len(self.values) <= MAX_LABEL_CHARACTERS, "its labels are too long")
        else:
            expect(self.values.ndim == 1, "its labels are none")
        expect(len(self.values) > 0, "it has no labels")

    @functools.cached_property
    def _array(self) -> Array:
        if not isinstance(self.values, tuple):
            return self.values
        if self.strings:
            return np.array(self.values, dtype=str)
        labels = np.empty(len(self.values), dtype=object)
        labels[:] = self.values
        return labels

    @override
    def run(self, value: Any) -> Array:
        named: Array = self._array[value]
        return named


@dataclass(frozen=True, eq=False)
class Linear(Op, kind="linear"):
    """The product with a matrix of shape (outputs, columns), or with a vector, and what is added to it.

    Gives shape (rows, outputs), or (rows,) for a vector and for a matrix with `flat`.
    """

    coefficients: Array
    intercept: Array | None
    flat: bool = False

    @override
    def check(self) -> None:
        expect(self.coefficients.ndim in (1, 2) and self.coefficients.dtype.kind == "f", "its coefficients are none")
        expect(not self.flat or len(self.coefficients) == 1, "it has several outputs")
        outputs = self.coefficients.shape[:-1]
        if self.intercept is not None:
            expect(self.intercept.shape in ((), (1,), outputs), "its intercepts do not fit")

    @functools.cached_property
    def _transposed(self) -> Array:
        return self.coefficients.T

    @override
    def run(self, value: Any) -> Array:
        scores = sparse_product(value, self.coefficients) if isinstance(value, Sparse) else value @ self._transposed
        if self.intercept is not None:
            scores = scores + self.intercept
        return scores.reshape(-1) if self.flat else scores


def sparse_product(value: Sparse, coefficients: Array) -> Array:
    """Return the product, each sum in the order of its row's values."""
    if coefficients.shape[-1] != value.width:
        raise ValueError(f"X has {value.width} features, but {coefficients.shape[-1]} are expected")
    if coefficients.ndim == 1:
        return value.row_sums(value.data * coefficients[value.columns])
    if len(coefficients) <= 64:
        products = [value.row_sums(value.data * row[value.columns]) for row in coefficients]
        return np.stack(products, axis=1)
    check_room(value.count, len(coefficients))
    scores = np.zeros((value.count, len(coefficients)))
    for start in range(0, len(value.data), height := max(1, _CHUNK_VALUES // len(coefficients))):
        part = slice(start, start + height)
        terms = coefficients.T[value.columns[part]] * value.data[part, None]
        np.add.at(scores, value.rows[part], terms)
    return scores


@dataclass(frozen=True, eq=False)
class Shift(Op, kind="shift"):
    """Add or take away a vector, or a number, after a product; then divide by one."""

    offset: Array | None
    divisor: Array | None

    @override
    def check(self) -> None:
        for operand in (self.offset, self.divisor):
            expect(operand is None or (operand.ndim <= 2 and operand.dtype.kind == "f"), "its operands are none")

    @override
    def run(self, value: Any) -> Array:
        if self.offset is not None:
            value = value - self.offset
        return value if self.divisor is None else value / self.divisor  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Classify(Op, kind="classify"):
    """The label of the largest score, or of two by the sign of the only one, which is above `threshold` (or, `inclusive`, at it) for the second."""

    scores: Op
    labels: ClassLabels
    threshold: float = 0.0
    inclusive: bool = False

    @override
    def run(self, value: Any) -> Array:
        scores = self.scores.run(value)
        if scores.ndim > 1:
            numbers = scores.argmax(axis=1)
        else:
            numbers = (scores >= self.threshold if self.inclusive else scores > self.threshold).astype(np.intp)
        return self.labels.run(numbers)


@dataclass(frozen=True, eq=False)
class Sigmoid(Op, kind="sigmoid"):
    """Probabilities of one or two classes from the score of the second, or of each class against the rest."""

    scores: Op

    @override
    def run(self, value: Any) -> Array:
        found = expit(self.scores.run(value))
        if found.ndim == 1:
            return two_columns(found)
        total = found.sum(axis=1)
        nothing = total == 0
        if nothing.any():
            found[nothing] = 1
            total[nothing] = found.shape[1]
        found /= total[:, None]
        return found


def two_columns(second: Array) -> Array:
    """Return the probabilities of two classes, given those of the second."""
    both = np.empty((len(second), 2))
    both[:, 1] = second
    np.subtract(1, second, both[:, 0])
    return both


def expit(x: Array) -> Array:
    """Return the logistic function."""
    result: Array = np.negative(x)
    np.exp(result, result)
    result += 1.0
    return np.divide(1.0, result, result)


@dataclass(frozen=True, eq=False)
class Softmax(Op, kind="softmax"):
    """Probabilities that add up to 1 from a score for each class."""

    scores: Op

    @override
    def run(self, value: Any) -> Array:
        return softmax(self.scores.run(value))


def softmax(scores: Array) -> Array:
    """Return the exponentials of scores of shape (rows, classes), divided by their sums."""
    scores = scores - scores.max(axis=1)[:, None]
    np.exp(scores, scores)
    scores /= scores.sum(axis=1)[:, None]
    return scores


@dataclass(frozen=True, eq=False)
class Mapped(Op, kind="mapped"):
    """One of numpy's functions of what another operation gives."""

    values: Op
    how: Literal["log", "exp", "expit", "absolute", "negative"]

    @override
    def run(self, value: Any) -> Array:
        found = self.values.run(value)
        return expit(found) if self.how == "expit" else _MAPS[self.how](found)


_MAPS = {"log": np.log, "exp": np.exp, "absolute": np.absolute, "negative": np.negative}
