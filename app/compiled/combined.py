"""Several models as one: by votes, means, stacks, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, override

import numpy as np

from app.compiled.linear import expit, softmax
from app.compiled.op import Op, expect
from app.compiled.steps import MAX_DENSE_WIDTH
from app.compiled.values import check_room, count_of
from app.signature import Array


@dataclass(frozen=True, eq=False)
class Mean(Op, kind="mean"):
    """The mean of what several operations give, weighed or not."""

    members: tuple[Op, ...]
    weights: Array | None

    @override
    def check(self) -> None:
        expect(len(self.members) > 0, "it has no members")
        expect(self.weights is None or self.weights.shape == (len(self.members),), "a member has no weight")

    @override
    def run(self, value: Any) -> Array:
        found = np.stack([member.run(value) for member in self.members])
        if self.weights is None:
            return found.sum(axis=0) / len(found)
        shape = (-1,) + (1,) * (found.ndim - 1)
        found_: Array = (found * self.weights.reshape(shape)).sum(axis=0) / self.weights.sum()
        return found_


@dataclass(frozen=True, eq=False)
class Ballot(Op, kind="ballot"):
    """How many votes each class has, from members that each say the number of a class."""

    members: tuple[Op, ...]
    weights: Array
    classes: int

    @override
    def check(self) -> None:
        expect(self.weights.shape == (len(self.members),) and len(self.members) > 0, "a member has no weight")
        expect(0 < self.classes <= MAX_DENSE_WIDTH, "it has no classes")

    @override
    def run(self, value: Any) -> Array:
        check_room(count_of(value), self.classes)
        votes = np.zeros((count_of(value), self.classes))
        every = np.arange(len(votes))
        for member, weight in zip(self.members, self.weights.tolist(), strict=True):
            votes[every, member.run(value)] += weight
        return votes


@dataclass(frozen=True, eq=False)
class AsColumns(Op, kind="as_columns"):
    """What an operation gives as columns of float64: a vector as one, or all columns from `skip` on."""

    values: Op
    skip: int

    @override
    def check(self) -> None:
        expect(0 <= self.skip <= 1, "it leaves out more than the first column")

    @override
    def run(self, value: Any) -> Array:
        found = np.asarray(self.values.run(value), dtype=np.float64)
        return found.reshape(-1, 1) if found.ndim == 1 else found[:, self.skip :]


@dataclass(frozen=True, eq=False)
class Pick(Op, kind="pick"):
    """One column of what an operation gives."""

    values: Op
    column: int

    @override
    def check(self) -> None:
        expect(0 <= self.column < 1 << 20, "its column is none")

    @override
    def run(self, value: Any) -> Array:
        return self.values.run(value)[:, self.column]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Several(Op, kind="several"):
    """What several operations give: an array for each, or vectors as the columns of one."""

    outputs: tuple[Op, ...]
    as_columns: bool

    @override
    def check(self) -> None:
        expect(len(self.outputs) > 0, "it has no outputs")

    @override
    def run(self, value: Any) -> Any:
        found = tuple(output.run(value) for output in self.outputs)
        return np.stack(found, axis=1) if self.as_columns else found


@dataclass(frozen=True, eq=False)
class Rest(Op, kind="rest"):
    """Probabilities by a model for each class against the rest: divided by their sum, unless that is zero."""

    members: tuple[Op, ...]

    @override
    def check(self) -> None:
        expect(len(self.members) > 0, "it has no members")

    @override
    def run(self, value: Any) -> Array:
        found = np.stack([member.run(value) for member in self.members], axis=1)
        if found.shape[1] == 1:
            found = np.concatenate([1 - found, found], axis=1)
        total = found.sum(axis=1)[:, None]
        np.divide(found, total, out=found, where=total != 0)
        return found


@dataclass(frozen=True, eq=False)
class Calibrated(Op, kind="calibrated"):
    """Probabilities of `classes` from scores: each of `columns` by a curve, then so that they add up to 1.

    A curve is `slope` and `offset` of a logistic function, or the points of a rising line.
    """

    scores: Op
    classes: int
    columns: tuple[int, ...]
    how: Literal["sigmoid", "isotonic"]
    curves: tuple[Array, ...]

    @override
    def check(self) -> None:
        expect(2 <= self.classes <= MAX_DENSE_WIDTH, "it has no classes")
        expect(len(self.curves) == len(self.columns), "a column has no curve")
        expect(all(0 <= column < self.classes for column in self.columns), "a column is none")
        for curve in self.curves:
            expect(curve.dtype == np.float64 and curve.ndim == (1 if self.how == "sigmoid" else 2), "a curve is none")
            expect(len(curve) == 2 and curve.size > 0, "a curve is none")

    @override
    def run(self, value: Any) -> Array:
        scores = self.scores.run(value)
        scores = scores.reshape(len(scores), -1)
        check_room(len(scores), self.classes)
        found = np.zeros((len(scores), self.classes))
        for index, (column, curve) in enumerate(zip(self.columns, self.curves, strict=True)):
            score = scores[:, index]
            if self.how == "sigmoid":
                slope, offset = curve.tolist()
                found[:, column] = expit(-(slope * score + offset))
            else:
                found[:, column] = np.interp(score, curve[0], curve[1])
        if self.classes == 2:
            found[:, 0] = 1.0 - found[:, 1]
        else:
            total = found.sum(axis=1)[:, None]
            found = np.divide(found, total, out=np.full_like(found, 1 / self.classes), where=total != 0)
        found[(found > 1.0) & (found <= 1.0 + 1e-5)] = 1.0
        return found


@dataclass(frozen=True, eq=False)
class Tempered(Op, kind="tempered"):
    """Probabilities from scores that are first multiplied by a number; a single score stands against its opposite."""

    scores: Op
    inverse_temperature: float
    of_probabilities: bool

    @override
    def run(self, value: Any) -> Array:
        scores = self.scores.run(value)
        if self.of_probabilities:
            if scores.ndim == 1:
                scores = np.stack([1 - scores, scores], axis=1)
            scores = np.log(scores + 1e-12)
        elif scores.ndim == 1:
            scores = np.stack([-scores, scores], axis=1)
        return softmax(self.inverse_temperature * scores)


@dataclass(frozen=True, eq=False)
class Constant(Op, kind="constant"):
    """The same for every row: of shape (rows,) for a number, else (rows, columns)."""

    value: Array

    @override
    def check(self) -> None:
        expect(self.value.ndim <= 1, "its value has too many dimensions")

    @override
    def run(self, value: Any) -> Array:
        check_room(count_of(value), self.value.size)
        return np.repeat(self.value[None], count_of(value), axis=0)


_INVERSES: dict[str, Callable[..., Any]] = {
    "multiply": np.multiply,
    "add": np.add,
    "divide": np.divide,
    "subtract": np.subtract,
}


@dataclass(frozen=True, eq=False)
class Rescaled(Op, kind="rescaled"):
    """Predictions with each step of arithmetic done, from the first to the last."""

    values: Op
    hows: tuple[Literal["multiply", "add", "divide", "subtract"], ...]
    operands: tuple[float, ...]

    @override
    def check(self) -> None:
        expect(len(self.hows) == len(self.operands), "a step has no number")

    @override
    def run(self, value: Any) -> Array:
        found = self.values.run(value)
        for how, operand in zip(self.hows, self.operands, strict=True):
            found = _INVERSES[how](found, operand)
        found_: Array = found
        return found_
