"""Operations for tests: a small compiled form of linear models, and ways in which a compiled form can be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from app.compiled.op import Op
from app.compiled.program import Program
from app.signature import Array


@dataclass(frozen=True, eq=False)
class Line(Op, kind="toy_line"):
    """Scores of shape (rows, scores), or (rows,) for a single one."""

    weights: Array
    offsets: Array

    def run(self, value: Any) -> Any:
        if np.isnan(value).any():
            raise ValueError("Input X contains NaN.")
        scores = value @ self.weights.T + self.offsets
        return scores[:, 0] if scores.shape[1] == 1 else scores


@dataclass(frozen=True, eq=False)
class Chosen(Op, kind="toy_chosen"):
    """The class of the greatest score."""

    scores: Op
    classes: tuple[str, ...]

    def run(self, value: Any) -> Any:
        scores = self.scores.run(value)
        places = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        return np.array(self.classes)[places]


@dataclass(frozen=True, eq=False)
class Off(Op, kind="toy_off"):
    """Another operation's numbers, but for rows that begin with a number above `beyond`: there they are off by `by`."""

    inner: Op
    by: float
    beyond: float

    def run(self, value: Any) -> Any:
        result = np.array(self.inner.run(value))
        result[value[:, 0] > self.beyond] *= 1 + self.by
        return result


@dataclass(frozen=True, eq=False)
class Mistaken(Op, kind="toy_mistaken"):
    """Another operation's labels, but for rows that begin with exactly this number."""

    inner: Op
    number: float
    label: str

    def run(self, value: Any) -> Any:
        return np.where(value[:, 0] == self.number, self.label, self.inner.run(value))


@dataclass(frozen=True, eq=False)
class Careless(Op, kind="toy_careless"):
    """Takes missing values for zeros, which its counterpart refuses."""

    inner: Op

    def run(self, value: Any) -> Any:
        return self.inner.run(np.nan_to_num(value))


@dataclass(frozen=True, eq=False)
class Fussy(Op, kind="toy_fussy"):
    """Refuses negative numbers, which its counterpart takes."""

    inner: Op

    def run(self, value: Any) -> Any:
        if (value < -3).any():
            raise ValueError("Negative values in data passed to X")
        return self.inner.run(value)


@dataclass(frozen=True, eq=False)
class Crowded(Op, kind="toy_crowded"):
    """Computes in float32 from so many rows on."""

    inner: Op
    rows: int

    def run(self, value: Any) -> Any:
        return self.inner.run(value.astype(np.float32) if len(value) >= self.rows else value)


@dataclass(frozen=True, eq=False)
class Either(Op, kind="toy_either"):
    """The same in two ways: straight, or over and over for nothing."""

    inner: Op
    repeats: int

    def variants(self) -> tuple[Either, ...]:
        return tuple(Either(self.inner, repeats) for repeats in (400, 1))

    def run(self, value: Any) -> Any:
        for _ in range(self.repeats - 1):
            self.inner.run(value)
        return self.inner.run(value)


def line(estimator: Any) -> Line:
    return Line(np.atleast_2d(estimator.coef_).astype(float), np.atleast_1d(estimator.intercept_).astype(float))


def program(**heads: Op) -> Program:
    return Program(None, heads)
