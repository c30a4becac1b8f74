"""What flows from operation to operation: a matrix, a table of columns, an array of texts or records, or rows that are mostly zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.errors import RequestTooLarge
from app.signature import Array

MAX_DENSE_VALUES = 50_000_000  # that an operation writes for rows that need not have as many themselves


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of `count` rows, each an array of shape (count,), where they are not all of one numeric dtype."""

    count: int
    columns: tuple[Array, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """A matrix of shape (count, width) by its values that are not zero, row after row: `data[i]` is at `rows[i]`, `columns[i]`.

    Within a row they are in the order in which scikit-learn adds them up, which is that of their columns.
    """

    count: int
    width: int
    rows: Array
    columns: Array
    data: Array

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns, as of an array."""
        return self.count, self.width

    def toarray(self) -> Array:
        """Return the matrix written out. Raises `ValueError` where that is too large."""
        check_room(self.count, self.width)
        matrix = np.zeros(self.shape, dtype=self.data.dtype)
        matrix[self.rows, self.columns] = self.data
        return matrix

    def row_sums(self, data: Array) -> Array:
        """Return the sums of `data`, which has a number for each place, over the rows: shape (count,), one after the other."""
        # Of nothing at all, numpy counts in whole numbers.
        return np.bincount(self.rows, data, minlength=self.count).astype(np.float64, copy=False)

    def with_data(self, data: Array) -> Sparse:
        """Return the same places with other values."""
        return Sparse(self.count, self.width, self.rows, self.columns, data)


def check_room(count: int, width: int) -> None:
    """Raise `RequestTooLarge` where so many rows of so many numbers are not to be written out."""
    if count * width > MAX_DENSE_VALUES:
        most = max(1, MAX_DENSE_VALUES // width)
        raise RequestTooLarge(f"each row becomes {width} numbers in this model: ask for at most {most} rows at a time")


def count_of(value: Any) -> int:
    """Return how many rows a value has."""
    return value.count if isinstance(value, (Table, Sparse)) else len(value)


def columns_of(value: Any) -> Sequence[Array]:
    """Return the columns of a table or a matrix, each of shape (rows,)."""
    return value.columns if isinstance(value, Table) else value.T


def dense(value: Any) -> Array:
    """Return a matrix or `Sparse` as an array of shape (rows, columns)."""
    return value.toarray() if isinstance(value, Sparse) else value
