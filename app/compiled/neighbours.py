"""Models that compare rows with those of training: support vectors, neighbours, centres."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, override

import numpy as np

from app.compiled.linear import ClassLabels
from app.compiled.op import Op, expect
from app.compiled.steps import MAX_DENSE_WIDTH
from app.compiled.values import check_room, dense
from app.signature import Array

_CHUNK_VALUES = 1 << 20  # of what is computed for pairs of rows at a time
_SPARE = 8  # neighbours more than asked for, among which the nearest are found exactly


def _chunks(rows: Array, width: int) -> Iterator[Array]:
    size = max(1, _CHUNK_VALUES // max(1, width))
    return (rows[start : start + size] for start in range(0, len(rows), size))


@dataclass(frozen=True, eq=False)
class Kernel(Op, kind="kernel"):
    """Sums of what a kernel says of each row and the support vectors: shape (rows, sums), or (rows,) where there is one.

    `weights` has shape (sums, vectors).
    """

    how: Literal["linear", "poly", "rbf", "sigmoid"]
    vectors: Array
    weights: Array
    intercepts: Array
    gamma: float
    constant: float
    degree: int
    flat: bool

    @override
    def check(self) -> None:
        expect(self.vectors.ndim == 2 and self.weights.ndim == 2, "its vectors are none")
        expect(self.weights.shape[1] == len(self.vectors), "its weights do not fit its vectors")
        expect(self.intercepts.shape == (len(self.weights),), "its weights do not fit what is added")
        expect(not self.flat or len(self.weights) == 1, "it has several sums")
        expect(0 <= self.degree <= 1 << 20, "its degree is none")

    @functools.cached_property
    def _centred(self) -> tuple[Array, Array, Array]:
        # Distances by a product of matrices lose digits where the numbers are large beside their differences.
        centre = self.vectors.mean(axis=0) if len(self.vectors) else np.zeros(self.vectors.shape[1])
        vectors = self.vectors - centre
        return centre, vectors.T, squared_lengths(vectors)

    def _kernel(self, rows: Array) -> Array:
        if self.how == "rbf":
            centre, vectors, norms = self._centred
            rows = rows - centre
            squares = -2 * (rows @ vectors)
            squares += squared_lengths(rows)[:, None]
            squares += norms
            np.maximum(squares, 0, out=squares)
            squares *= -self.gamma
            return np.exp(squares, out=squares)
        products = rows @ self.vectors.T
        if self.how == "linear":
            return products
        products = self.gamma * products + self.constant
        return np.tanh(products) if self.how == "sigmoid" else products**self.degree

    @override
    def run(self, value: Any) -> Array:
        parts = [self._kernel(rows) @ self.weights.T for rows in _chunks(dense(value), len(self.vectors))]
        sums = (parts[0] if len(parts) == 1 else np.concatenate(parts)) + self.intercepts
        return sums.reshape(-1) if self.flat else sums


@dataclass(frozen=True, eq=False)
class Votes(Op, kind="votes"):
    """How many of the pairs of classes each class wins, from the scores of the pairs, and by how much if they tie.

    A score above zero is the first class's.
    """

    scores: Op
    classes: int
    confident: bool

    @override
    def check(self) -> None:
        expect(2 <= self.classes <= 10_000, "it has no classes")

    @override
    def run(self, value: Any) -> Array:
        scores = self.scores.run(value)
        scores = scores.reshape(len(scores), -1)
        check_room(len(scores), self.classes)
        votes = np.zeros((len(scores), self.classes))
        total = np.zeros_like(votes)
        for column, (first, second) in enumerate(itertools.combinations(range(self.classes), 2)):
            score = scores[:, column]
            # An even score is the second class's where votes alone decide, the first one's where confidence does.
            won = score >= 0 if self.confident else score > 0
            votes[:, first] += won
            votes[:, second] += ~won
            total[:, first] += score
            total[:, second] -= score
        return votes + total / (3 * (np.abs(total) + 1)) if self.confident else votes


@dataclass(frozen=True, eq=False)
class Side(Op, kind="side"):
    """1 for a score above zero (or, `inclusive`, at it), -1 for the rest."""

    scores: Op
    inclusive: bool = False

    @override
    def run(self, value: Any) -> Array:
        scores = self.scores.run(value)
        return np.where(scores >= 0 if self.inclusive else scores > 0, 1, -1)


@dataclass(frozen=True, eq=False)
class Nearest(Op, kind="nearest"):
    """The number of the nearest centre, in 32 bits."""

    centres: Array

    @override
    def check(self) -> None:
        expect(self.centres.ndim == 2 and len(self.centres) > 0, "it has no centres")

    @functools.cached_property
    def _norms(self) -> Array:
        return squared_lengths(self.centres)

    @override
    def run(self, value: Any) -> Array:
        return (-2 * (dense(value) @ self.centres.T) + self._norms).argmin(axis=1).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Distances(Op, kind="distances"):
    """The Euclidean distance to each centre."""

    centres: Array

    @override
    def check(self) -> None:
        expect(self.centres.ndim == 2, "it has no centres")

    @functools.cached_property
    def _norms(self) -> Array:
        return squared_lengths(self.centres)

    @override
    def run(self, value: Any) -> Array:
        rows = dense(value)
        found = -2 * (rows @ self.centres.T)
        found += squared_lengths(rows)[:, None]
        found += self._norms
        np.maximum(found, 0, out=found)
        return np.sqrt(found, out=found)


@dataclass(frozen=True, eq=False)
class Neighbours(Op, kind="neighbours"):
    """The rows of training that are nearest, by increasing distance: their distances and numbers, each of shape (rows, count)."""

    points: Array
    count: int
    metric: Literal["euclidean", "manhattan", "chebyshev"]

    @override
    def check(self) -> None:
        expect(self.points.ndim == 2 and 0 < self.count <= len(self.points), "it has too few points")

    @functools.cached_property
    def _centred(self) -> tuple[Array, Array, Array]:
        centre = self.points.mean(axis=0)
        points = self.points - centre
        return centre, points.T, squared_lengths(points)

    @override
    def run(self, value: Any) -> tuple[Array, Array]:
        rows = dense(value)
        points, columns = self.points.shape
        # Beside the distances to all points, the differences from those that may be nearest, or from all, column by column.
        width = max(points, (self.count + _SPARE) * columns) if self.metric == "euclidean" else points * columns
        found = [self._nearest(part) for part in _chunks(rows, width)]
        return np.concatenate([it[0] for it in found]), np.concatenate([it[1] for it in found])

    def _nearest(self, rows: Array) -> tuple[Array, Array]:
        some = min(len(self.points), self.count + _SPARE)
        if self.metric == "euclidean":
            centre, points, norms = self._centred
            roughly = norms - 2 * ((rows - centre) @ points)
        else:
            roughly = self._exactly(rows[:, None, :] - self.points)
        if some < len(self.points):
            numbers = np.sort(np.argpartition(roughly, some - 1, axis=1)[:, :some], axis=1)
        else:
            numbers = np.broadcast_to(np.arange(some), (len(rows), some))
        exact = self._exactly(rows[:, None, :] - self.points[numbers])
        order = np.argsort(exact, axis=1, kind="stable")[:, : self.count]
        return np.take_along_axis(exact, order, axis=1), np.take_along_axis(numbers, order, axis=1)

    def _exactly(self, differences: Array) -> Array:
        if self.metric == "euclidean":
            found_: Array = np.sqrt(np.einsum("ijk,ijk->ij", differences, differences))
            return found_
        differences = np.abs(differences)
        return differences.sum(axis=2) if self.metric == "manhattan" else differences.max(axis=2)


def _weights(distances: Array, by_distance: bool) -> Array:
    if not by_distance:
        return np.ones_like(distances)
    weights = 1.0 / distances
    infinite = np.isinf(weights)
    at_none = infinite.any(axis=1)
    weights[at_none] = infinite[at_none]
    return weights


@dataclass(frozen=True, eq=False)
class NeighbourClasses(Op, kind="neighbour_classes"):
    """How often each class is among the neighbours, weighed by nearness or not, as probabilities or as sums."""

    neighbours: Neighbours
    classes: Array
    count: int
    by_distance: bool
    normalized: bool

    @override
    def check(self) -> None:
        expect(
            self.classes.shape == (len(self.neighbours.points),) and self.classes.dtype.kind == "i",
            "a point has no class",
        )
        expect(0 < self.count <= MAX_DENSE_WIDTH, "it has no classes")
        expect(bool(((self.classes >= 0) & (self.classes < self.count)).all()), "a class is none")

    @override
    def run(self, value: Any) -> Array:
        distances, numbers = self.neighbours.run(value)
        weights = _weights(distances, self.by_distance)
        check_room(len(numbers), self.count)
        found = np.zeros((len(numbers), self.count))
        every, classes = np.arange(len(numbers)), self.classes[numbers]
        for position in range(numbers.shape[1]):
            found[every, classes[:, position]] += weights[:, position]
        return found / found.sum(axis=1)[:, None] if self.normalized else found


@dataclass(frozen=True, eq=False)
class NeighbourMean(Op, kind="neighbour_mean"):
    """The mean of what the neighbours have, weighed by nearness or not."""

    neighbours: Neighbours
    targets: Array
    by_distance: bool

    @override
    def check(self) -> None:
        expect(
            self.targets.ndim in (1, 2) and len(self.targets) == len(self.neighbours.points), "a point has no target"
        )

    @override
    def run(self, value: Any) -> Array:
        distances, numbers = self.neighbours.run(value)
        check_room(len(numbers), numbers.shape[1] * (self.targets.size // len(self.targets)))
        targets = self.targets.reshape(len(self.targets), -1)[numbers]
        if self.by_distance:
            weights = _weights(distances, True)
            total = weights.sum(axis=1)
            found = np.stack(
                [(targets[:, :, index] * weights).sum(axis=1) / total for index in range(targets.shape[2])], axis=1
            )
        else:
            found = targets.mean(axis=1)
        return found.reshape(-1) if self.targets.ndim == 1 else found


@dataclass(frozen=True, eq=False)
class ColumnsOf(Op, kind="columns_of"):
    """The labels of several outputs, each in its column."""

    outputs: tuple[Op, ...]
    labels: tuple[ClassLabels, ...]

    @override
    def check(self) -> None:
        expect(len(self.outputs) == len(self.labels) > 0, "an output has no labels")

    @override
    def run(self, value: Any) -> Array:
        found = [
            labels.run(output.run(value).argmax(axis=1))
            for output, labels in zip(self.outputs, self.labels, strict=True)
        ]
        return np.stack(found, axis=1)


def squared_lengths(rows: Array) -> Array:
    """Return the sum of squares of each row, shape (rows,), added up as scikit-learn does for distances."""
    found: Array = np.einsum("ij,ij->i", rows, rows)
    return found
