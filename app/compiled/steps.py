"""The operations that hold others together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, override

import numpy as np

from app.compiled.op import Op, expect
from app.compiled.values import Sparse, Table, check_room, columns_of, count_of, dense
from app.signature import Array

MAX_WIDTH = 1 << 24  # of rows that are mostly zero
MAX_DENSE_WIDTH = 1 << 16


@dataclass(frozen=True, eq=False)
class Chain(Op, kind="chain"):
    """One operation after the other."""

    steps: tuple[Op, ...]

    @override
    def run(self, value: Any) -> Any:
        for step in self.steps:
            value = step.run(value)
        return value


class Part(Op):
    """An operation that can write its columns beside those of others."""

    def fill(self, value: Any, out: Array, flat: Array, start: int) -> None:
        """Write into the columns of `out` from `start` on, which are zero.

        `out` has shape (rows, columns); `flat` has the same numbers in one row and one more, which counts for nothing.
        """
        raise NotImplementedError


def zeros(count: int, width: int) -> tuple[Array, Array]:
    """Return a matrix of zeros, and the same memory as one row with a number more at its end."""
    check_room(count, width)
    flat = np.zeros(count * width + 1)
    return flat[:-1].reshape(count, width), flat


@dataclass(frozen=True, eq=False)
class Assemble(Op, kind="assemble"):
    """Several operations on the same value, and what they give beside each other, in float64."""

    parts: tuple[Op, ...]
    widths: tuple[int, ...]

    @override
    def check(self) -> None:
        expect(len(self.parts) == len(self.widths), "a part has no width")
        expect(all(0 <= width <= MAX_WIDTH for width in self.widths), "a width is none")
        expect(sum(self.widths) <= MAX_DENSE_WIDTH, "it is too wide")
        for part, width in zip(self.parts, self.widths, strict=True):
            expect(getattr(part, "width", width) == width, "a part is not as wide as it should be")

    @functools.cached_property
    def _width(self) -> int:
        return sum(self.widths)

    @functools.cached_property
    def _fills(self) -> list[tuple[Callable[[Any, Array, Array, int], None], int]]:
        fills: list[tuple[Callable[[Any, Array, Array, int], None], int]] = []
        start = 0
        for part, width in zip(self.parts, self.widths, strict=True):
            fills.append((part.fill if isinstance(part, Part) else functools.partial(_fill, part, width), start))
            start += width
        return fills

    @override
    def run(self, value: Any) -> Array:
        out, flat = zeros(count_of(value), self._width)
        for fill, start in self._fills:
            fill(value, out, flat, start)
        return out


def _fill(part: Op, width: int, value: Any, out: Array, flat: Array, start: int) -> None:
    out[:, start : start + width] = dense(part.run(value))


@dataclass(frozen=True, eq=False)
class Stack(Op, kind="stack"):
    """As `Assemble`, but what comes out is `Sparse`, because one of the parts is very wide and mostly zero."""

    parts: tuple[Op, ...]
    widths: tuple[int, ...]

    @override
    def check(self) -> None:
        expect(len(self.parts) == len(self.widths) > 0, "a part has no width")
        expect(all(0 <= width <= MAX_WIDTH for width in self.widths), "a width is none")

    @override
    def run(self, value: Any) -> Sparse:
        count, start = count_of(value), 0
        rows, columns, data = [], [], []
        for part, width in zip(self.parts, self.widths, strict=True):
            result = part.run(value)
            if isinstance(result, Sparse):
                expect(result.width == width, "a part is not as wide as it should be")
                rows.append(result.rows)
                columns.append(result.columns + start)
                data.append(result.data)
            else:
                rows.append(np.repeat(np.arange(count), width))
                columns.append(np.tile(np.arange(start, start + width), count))
                data.append(result.ravel())
            start += width
        return Sparse(count, start, np.concatenate(rows), np.concatenate(columns), np.concatenate(data))


@dataclass(frozen=True, eq=False)
class Select(Op, kind="select"):
    """Some columns of a table, of a matrix or of `Sparse`, in any order."""

    columns: tuple[int, ...]

    @override
    def check(self) -> None:
        expect(all(0 <= column < MAX_WIDTH for column in self.columns), "a column is none")

    @functools.cached_property
    def _index(self) -> Array:
        return np.array(self.columns, dtype=np.intp)

    @override
    def run(self, value: Any) -> Any:
        if isinstance(value, Table):
            return Table(value.count, tuple(value.columns[column] for column in self.columns))
        if isinstance(value, Sparse):
            places = np.full(value.width, -1)
            places[self._index] = np.arange(len(self.columns))
            columns = places[value.columns]
            kept = columns >= 0
            return Sparse(value.count, len(self.columns), value.rows[kept], columns[kept], value.data[kept])
        return value[:, self._index]


@dataclass(frozen=True, eq=False)
class Column(Op, kind="column"):
    """One column as an array of shape (rows,), such as the texts in it."""

    column: int

    @override
    def check(self) -> None:
        expect(0 <= self.column < MAX_WIDTH, "a column is none")

    @override
    def run(self, value: Any) -> Array:
        return columns_of(value)[self.column]


@dataclass(frozen=True, eq=False)
class Dense(Op, kind="dense"):
    """Rows that are mostly zero, written out."""

    @override
    def run(self, value: Any) -> Array:
        return dense(value)


@dataclass(frozen=True, eq=False)
class Cast(Op, kind="cast"):
    """A matrix in the dtype that scikit-learn would give it."""

    dtype: str

    @override
    def check(self) -> None:
        expect(self.dtype in ("int64", "int32", "float32", "bool", "uint8", "int8"), "a dtype is none")

    @override
    def run(self, value: Any) -> Any:
        if isinstance(value, Sparse):
            return value.with_data(value.data.astype(self.dtype))
        return value.astype(self.dtype)
