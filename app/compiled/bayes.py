"""Models that add up the logarithms of probabilities."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, override

import numpy as np

from app.compiled.numeric import check_finite
from app.compiled.op import Op, expect
from app.signature import Array

_CHUNK_VALUES = 1 << 18  # of a product of rows, classes and columns that is held at a time


def logsumexp(values: Array) -> Array:
    """Return the logarithms of the sums of exponentials of each row, of shape (rows,)."""
    # As scipy.special.logsumexp: the largest apart, so that what is little beside it is not lost.
    largest = values.max(axis=1)
    is_largest = values == largest[:, None]
    count = is_largest.sum(axis=1)
    is_finite = np.isfinite(largest)
    rest = np.exp(np.where(is_largest, -np.inf, values) - np.where(is_finite, largest, 0.0)[:, None]).sum(axis=1)
    found_: Array = np.log1p(rest / count) + np.log(count) + largest
    return found_ if is_finite.all() else np.where(is_finite, found_, largest)


@dataclass(frozen=True, eq=False)
class LogNormalize(Op, kind="log_normalize"):
    """Logarithms of probabilities from logarithms of what is in proportion to them."""

    scores: Op

    @override
    def run(self, value: Any) -> Array:
        scores = self.scores.run(value)
        found_: Array = scores - logsumexp(scores)[:, None]
        return found_


@dataclass(frozen=True, eq=False)
class LogSumExp(Op, kind="log_sum_exp"):
    """The logarithm of the sum of the exponentials of each row."""

    scores: Op

    @override
    def run(self, value: Any) -> Array:
        return logsumexp(self.scores.run(value))


@dataclass(frozen=True, eq=False)
class Gaussians(Op, kind="gaussians"):
    """The logarithm of each class's probability and of independent normal distributions, of shape (rows, classes)."""

    means: Array
    variances: Array
    priors: Array

    @override
    def check(self) -> None:
        expect(self.means.ndim == 2 and self.means.shape == self.variances.shape, "its means do not fit its variances")
        expect(self.priors.shape == (len(self.means),), "its classes are not as many as their probabilities")

    @functools.cached_property
    def _constants(self) -> tuple[Array, Array]:
        logs = [-0.5 * np.sum(np.log(2.0 * np.pi * variances)) for variances in self.variances]
        return np.log(self.priors), np.array(logs)

    @override
    def run(self, value: Any) -> Array:
        priors, constants = self._constants
        if len(value) * self.means.size <= _CHUNK_VALUES:
            squares = ((value[:, None, :] - self.means) ** 2 / self.variances).sum(axis=2)
        else:
            squares = np.stack(
                [
                    ((value - mean) ** 2 / variance).sum(axis=1)
                    for mean, variance in zip(self.means, self.variances, strict=True)
                ],
                axis=1,
            )
        found_: Array = priors + (constants - 0.5 * squares)
        return found_


@dataclass(frozen=True, eq=False)
class Categories(Op, kind="categories"):
    """The logarithm of each class's probability and of those of whole numbers, looked up in a table for each column."""

    tables: tuple[Array, ...]
    priors: Array

    @override
    def check(self) -> None:
        expect(self.priors.ndim == 1, "its probabilities are none")
        expect(all(table.ndim == 2 and len(table) == len(self.priors) for table in self.tables), "a table does not fit")

    @override
    def run(self, value: Any) -> Array:
        check_finite(value)
        numbers = value.astype(np.int64)
        if numbers.size and numbers.min() < 0:
            raise ValueError("Negative values in data passed to CategoricalNB (input X).")
        scores = np.zeros((len(value), len(self.priors)))
        for index, table in enumerate(self.tables):
            scores += table[:, numbers[:, index]].T
        return scores + self.priors


@dataclass(frozen=True, eq=False)
class Quadratics(Op, kind="quadratics"):
    """The logarithm of each class's probability and of a normal distribution, but for a constant that all share."""

    means: Array
    rotations: tuple[Array, ...]
    scalings: tuple[Array, ...]
    priors: Array

    @override
    def check(self) -> None:
        expect(self.means.ndim == 2 and self.priors.shape == (len(self.means),), "its means do not fit")
        expect(len(self.rotations) == len(self.scalings) == len(self.means), "a class has no distribution")
        for rotation, scaling in zip(self.rotations, self.scalings, strict=True):
            expect(rotation.ndim == 2 and scaling.shape == rotation.shape[1:], "a distribution does not fit")

    @functools.cached_property
    def _scaled(self) -> tuple[list[Array], Array, Array]:
        scaled = [rotation * scaling**-0.5 for rotation, scaling in zip(self.rotations, self.scalings, strict=True)]
        sizes = np.array([np.sum(np.log(scaling)) for scaling in self.scalings])
        return scaled, sizes, np.log(self.priors)

    @override
    def run(self, value: Any) -> Array:
        scaled, sizes, priors = self._scaled
        squares = [((value - mean) @ matrix) ** 2 for mean, matrix in zip(self.means, scaled, strict=True)]
        norms = np.stack([square.sum(axis=1) for square in squares], axis=1)
        return -0.5 * (norms + sizes) + priors


@dataclass(frozen=True, eq=False)
class Difference(Op, kind="difference"):
    """The second of two columns less the first."""

    scores: Op

    @override
    def run(self, value: Any) -> Array:
        scores = self.scores.run(value)
        found_: Array = scores[:, 1] - scores[:, 0]
        return found_


@dataclass(frozen=True, eq=False)
class Likelihoods(Op, kind="likelihoods"):
    """Logarithms of probabilities by the largest score of each row, as discriminant analysis has them."""

    scores: Op

    @override
    def run(self, value: Any) -> Array:
        scores = self.scores.run(value)
        scores = scores - scores.max(axis=1)[:, None]
        found_: Array = scores - np.log(np.exp(scores).sum(axis=1)[:, None])
        return found_


@dataclass(frozen=True, eq=False)
class LogNonZero(Op, kind="log_non_zero"):
    """Logarithms of probabilities, of which none is zero."""

    values: Op

    @override
    def run(self, value: Any) -> Array:
        found = self.values.run(value)
        return np.log(np.where(found == 0.0, np.finfo(np.float64).smallest_normal, found))


@dataclass(frozen=True, eq=False)
class Mixture(Op, kind="mixture"):
    """The logarithm of the weighed density of each normal distribution of a mixture, of shape (rows, distributions).

    `precisions` are the Cholesky factors of the inverse covariances, each of shape (columns, columns), or one for all of them, or
    with shape (distributions, columns) those of each column. `constants` has what does not depend on the row.
    """

    means: Array
    precisions: Array
    constants: Array
    columns: int

    @override
    def check(self) -> None:
        expect(self.means.ndim == 2 and self.means.shape[1] == self.columns, "its means are none")
        expect(self.constants.shape == (len(self.means), 2), "a distribution has no constants")
        shared = self.precisions.shape == (1, self.columns, self.columns)
        each = self.precisions.shape == (*self.means.shape, self.columns)
        expect(shared or each or self.precisions.shape == self.means.shape, "its precisions do not fit")

    @override
    def run(self, value: Any) -> Array:
        means, precisions = self.means, self.precisions
        if precisions.ndim == 2:
            squared = precisions**2
            squares = (means**2 * squared).sum(axis=1) - 2.0 * (value @ (means * squared).T) + value**2 @ squared.T
        else:
            factors = np.broadcast_to(precisions, (len(means), *precisions.shape[1:]))
            squares = np.stack(
                [
                    np.square(value @ factor - mean @ factor).sum(axis=1)
                    for mean, factor in zip(means, factors, strict=True)
                ],
                axis=1,
            )
        determinants, weights = self.constants.T
        scores: Array = -0.5 * (self.columns * np.log(2 * np.pi) + squares) + determinants + weights
        return scores


@dataclass(frozen=True, eq=False)
class Largest(Op, kind="largest"):
    """The number of the largest score of each row."""

    scores: Op

    @override
    def run(self, value: Any) -> Array:
        found: Array = self.scores.run(value).argmax(axis=1)
        return found
