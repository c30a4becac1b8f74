"""Words and other categories, each looked up in a dictionary of its column."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, override

import numpy as np

from app.compiled.op import Op, expect
from app.compiled.steps import MAX_DENSE_WIDTH, MAX_WIDTH, Part, zeros
from app.compiled.values import Sparse, Table, columns_of, count_of
from app.signature import Array

Key = str | int | float | bool | None
"""A category as Python has it; NaN is one of the floats."""
_NOWHERE = 1 << 40  # beyond the end of any row: what is put there counts for nothing


def _is_nan(value: Any) -> bool:
    return bool(value != value)


class Lookup:
    """The number that belongs to each value of a column. NaN is one value, whichever object it is."""

    def __init__(self, keys: Iterable[Key], values: Iterable[int], other: int | None) -> None:
        self._known = {np.nan if _is_nan(key) else key: value for key, value in zip(keys, values, strict=True)}
        self._other = other
        self.get: Callable[[Any], int | None] = self._known.get

    def of(self, column: Array, position: int) -> list[int]:
        """Return what belongs to the values of `column`, the encoder's column number `position`.

        Raises `ValueError` as scikit-learn does for one that is unknown, unless there is something for these.
        """
        values = column.tolist()
        found: list[Any] = list(map(self.get, values))
        if None in found:
            for index, (value, it) in enumerate(zip(values, found, strict=True)):
                if it is None:
                    it = self._known.get(np.nan) if _is_nan(value) else None
                    found[index] = self._other if it is None else it
            if None in found:
                self._refuse(column, [value for value, it in zip(values, found, strict=True) if it is None], position)
        return found

    def array(self, column: Array, position: int) -> Array:
        """Return the same as an array of whole numbers."""
        try:
            return np.fromiter(map(self.get, column.tolist()), np.intp, len(column))
        except TypeError:  # there is none for one of them: NaN, or what is unknown
            return np.array(self.of(column, position), dtype=np.intp)

    def _refuse(self, column: Array, unknown: list[Any], position: int) -> None:
        some_nan = any(map(_is_nan, unknown))
        distinct = list(dict.fromkeys(value for value in unknown if not _is_nan(value)))
        if column.dtype.kind in "iuf":
            distinct = [column.dtype.type(value) for value in sorted(distinct)]
        if some_nan:
            distinct.append(column.dtype.type(np.nan) if column.dtype.kind == "f" else np.nan)
        raise ValueError(f"Found unknown categories {distinct} in column {position} during transform")


def _check_columns(columns: tuple[int, ...], *others: tuple[Any, ...] | None) -> None:
    expect(all(0 <= column < MAX_WIDTH for column in columns), "a column is none")
    expect(all(other is None or len(other) == len(columns) for other in others), "a column has no categories")


@dataclass(frozen=True, eq=False)
class OneHot(Part, kind="one_hot"):
    """A 1 in the place of each value, and zeros in those of all others.

    `places[i]` has the place in the row, of `width`, for each of `keys[i]`, the values that column `columns[i]` may have; -1 for
    none. `others[i]` is that of any other value; without `others` these are refused. `sparse` has only the ones.
    """

    columns: tuple[int, ...]
    width: int
    keys: tuple[tuple[Key, ...], ...]
    places: tuple[Array, ...]
    others: tuple[int, ...] | None
    sparse: bool = False

    @override
    def check(self) -> None:
        _check_columns(self.columns, self.keys, self.places, self.others)
        expect(0 <= self.width <= (MAX_WIDTH if self.sparse else MAX_DENSE_WIDTH), "its width is none")
        for keys, places in zip(self.keys, self.places, strict=True):
            expect(places.shape == (len(keys),) and places.dtype.kind == "i", "a category has no place")
            expect(bool(((places >= -1) & (places < self.width)).all()), "a place is none")
        expect(all(-1 <= place < self.width for place in self.others or ()), "a place is none")

    @functools.cached_property
    def _lookups(self) -> list[tuple[int, int, Lookup]]:
        found = []
        for position, column in enumerate(self.columns):
            places = [place if place >= 0 else _NOWHERE for place in self.places[position].tolist()]
            other = None if self.others is None else self.others[position]
            lookup = Lookup(self.keys[position], places, _NOWHERE if other == -1 else other)
            found.append((position, column, lookup))
        return found

    def _places(self, value: Any, count: int) -> Array:
        """Return the places of all values, of shape (columns, rows)."""
        columns = columns_of(value)
        found = np.empty((len(self.columns), count), dtype=np.intp)
        for position, column, lookup in self._lookups:
            found[position] = lookup.array(columns[column], position)
        return found

    @override
    def run(self, value: Any) -> Any:
        count = count_of(value)
        if self.sparse:
            places = self._places(value, count).T
            kept = places < _NOWHERE
            columns = places[kept]
            return Sparse(count, self.width, np.nonzero(kept)[0], columns, np.ones(len(columns)))
        out, flat = zeros(count, self.width)
        self.fill(value, out, flat, 0)
        return out

    @override
    def fill(self, value: Any, out: Array, flat: Array, start: int) -> None:
        count, width = out.shape
        if count == 1:
            columns = columns_of(value)
            for position, column, lookup in self._lookups:
                place = lookup.get(columns[column].item())
                if place is None:
                    (place,) = lookup.of(columns[column], position)
                if place != _NOWHERE:
                    flat[start + place] = 1.0
            return
        index = self._places(value, count)
        index += np.arange(start, start + count * width, width) if width else 0
        np.put(flat, index, 1.0, mode="clip")


@dataclass(frozen=True, eq=False)
class Codes(Part, kind="codes"):
    """A number for each value, or several.

    `numbers[i]` has shape (keys, numbers a value) and belongs to `keys[i]`, the values that column `columns[i]` may have.
    `others[i]` are those of any other value, of shape (numbers a value,); without `others` these are refused.
    """

    columns: tuple[int, ...]
    keys: tuple[tuple[Key, ...], ...]
    numbers: tuple[Array, ...]
    others: tuple[Array, ...] | None

    @override
    def check(self) -> None:
        _check_columns(self.columns, self.keys, self.numbers, self.others)
        for position, (keys, numbers) in enumerate(zip(self.keys, self.numbers, strict=True)):
            expect(numbers.ndim == 2 and len(numbers) == len(keys), "a category has no number")
            expect(numbers.dtype == np.float64, "a number is none")
            if self.others is not None:
                other = self.others[position]
                expect(other.shape == numbers.shape[1:] and other.dtype == np.float64, "its numbers differ in width")

    @functools.cached_property
    def _lookups(self) -> list[tuple[int, int, Lookup, Array]]:
        found = []
        for position, column in enumerate(self.columns):
            table, other = self.numbers[position], None
            if self.others is not None:
                other, table = len(table), np.vstack([table, self.others[position]])
            found.append((position, column, Lookup(self.keys[position], range(len(self.keys[position])), other), table))
        return found

    @functools.cached_property
    def width(self) -> int:
        """How many columns come out."""
        return sum(numbers.shape[1] for numbers in self.numbers)

    @override
    def run(self, value: Any) -> Array:
        out, flat = zeros(count_of(value), self.width)
        self.fill(value, out, flat, 0)
        return out

    @override
    def fill(self, value: Any, out: Array, flat: Array, start: int) -> None:
        columns = columns_of(value)
        for position, column, places, table in self._lookups:
            stop = start + table.shape[1]
            out[:, start:stop] = table[places.array(columns[column], position)]
            start = stop


@dataclass(frozen=True, eq=False)
class Replace(Op, kind="replace"):
    """Put a value of its column in the place of each that is missing: NaN, None, or a certain other."""

    columns: tuple[int, ...]
    missing: Key
    values: tuple[Key, ...]

    @override
    def check(self) -> None:
        _check_columns(self.columns, self.values)

    @override
    def run(self, value: Any) -> Table:
        columns = columns_of(value)
        missing, is_nan = self.missing, _is_nan(self.missing)
        result = []
        for column, value_of_column in zip(self.columns, self.values, strict=True):
            filled = np.empty(len(columns[column]), dtype=object)
            filled[:] = [
                value_of_column if (it != it if is_nan else it is None if missing is None else it == missing) else it
                for it in columns[column].tolist()
            ]
            result.append(filled)
        return Table(count_of(value), tuple(result))
