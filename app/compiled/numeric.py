"""Operations on matrices of numbers, number by number and column by column, in scikit-learn's order of operations."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, override

import numpy as np

from app.compiled.op import Op, expect
from app.compiled.steps import MAX_DENSE_WIDTH, MAX_WIDTH, Part
from app.compiled.values import Sparse, Table, check_room
from app.signature import Array


class Elementwise(Op):
    """An operation that gives a matrix of the same shape."""

    def apply(self, matrix: Array) -> Array:
        """Compute in place, or return another matrix."""
        raise NotImplementedError

    @override
    def run(self, value: Any) -> Array:
        return self.apply(np.array(value, dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Numbers(Part, kind="numbers"):
    """Some columns of a table or of a matrix, all without `columns`, as float64, and then number by number.

    They lie in memory by columns if they come from a table, or if `by_columns`.
    """

    columns: tuple[int, ...] | None
    steps: tuple[Op, ...]
    by_columns: bool = False

    @override
    def check(self) -> None:
        expect(self.columns is None or all(0 <= column < MAX_WIDTH for column in self.columns), "a column is none")
        expect(all(isinstance(step, Elementwise) for step in self.steps), "a step changes the shape")

    @functools.cached_property
    def _pick(self) -> Callable[[tuple[Array, ...]], tuple[Array, ...]]:
        if self.columns is None:
            return lambda columns: columns
        if len(self.columns) == 1:
            (only,) = self.columns
            return lambda columns: (columns[only],)
        return operator.itemgetter(*self.columns)

    @functools.cached_property
    def _index(self) -> slice | Array:
        columns = self.columns
        if columns is None:
            return slice(None)
        if columns and columns == tuple(range(columns[0], columns[0] + len(columns))):
            return slice(columns[0], columns[0] + len(columns))
        return np.array(columns, dtype=np.intp)

    @functools.cached_property
    def _applies(self) -> tuple[Callable[[Array], Array], ...]:
        return tuple(step.apply for step in self.steps if isinstance(step, Elementwise))

    @override
    def run(self, value: Any) -> Array:
        if isinstance(value, Table):
            picked = self._pick(value.columns)
            matrix = np.concatenate(picked)
            if matrix.dtype != np.float64:
                matrix = matrix.astype(np.float64)
            matrix = matrix.reshape(len(picked), value.count).T
        elif isinstance(value, Sparse):
            expect(self.columns is None, "it picks columns where most are zero")
            for step in self.steps:
                value = step.run(value)
            return value  # type: ignore[no-any-return]
        elif self.columns is None and self._first is not None and self._takes_as_it_is(value):
            matrix = self._first(value)  # which makes another matrix itself
            for apply in self._applies[1:]:
                matrix = apply(matrix)
            return matrix
        else:
            index = self._index
            if isinstance(index, slice):
                if index.stop is not None and index.stop > value.shape[1]:
                    raise IndexError("a column is none")
                matrix = np.array(value[:, index], dtype=np.float64, order="F" if self.by_columns else "K")
            else:
                matrix = value[:, index]
                if matrix.dtype != np.float64:
                    matrix = matrix.astype(np.float64)
        for apply in self._applies:
            matrix = apply(matrix)
        return matrix

    @functools.cached_property
    def _first(self) -> Callable[[Array], Array] | None:
        return self.steps[0].run if self.steps and isinstance(self.steps[0], Arithmetic) else None

    def _takes_as_it_is(self, value: Array) -> bool:
        return value.dtype == np.float64 and (not self.by_columns or len(value) == 1)

    @override
    def fill(self, value: Any, out: Array, flat: Array, start: int) -> None:
        matrix = self.run(value)
        out[:, start : start + matrix.shape[1]] = matrix


@dataclass(frozen=True, eq=False)
class Finite(Elementwise, kind="finite"):
    """Refuse infinities, and NaN unless it is allowed, as scikit-learn checks its input."""

    allow_nan: bool
    named: str = "Input X"

    @override
    def check(self) -> None:
        expect(len(self.named) < 100, "a name is too long")

    @override
    def apply(self, matrix: Array) -> Array:
        check_finite(matrix, self.allow_nan, self.named)
        return matrix

    @override
    def run(self, value: Any) -> Any:
        check_finite(value.data if isinstance(value, Sparse) else value, self.allow_nan, self.named)
        return value


def check_finite(matrix: Array, allow_nan: bool = False, named: str = "Input X") -> None:
    """Raise `ValueError` in scikit-learn's words for an infinity, or for NaN unless it is allowed."""
    if math.isfinite(np.add.reduce(matrix, axis=None)):
        return
    if not allow_nan and bool(np.isnan(matrix).any()):
        raise ValueError(f"{named} contains NaN.")
    if bool(np.isinf(matrix).any()):
        raise ValueError(f"{named} contains infinity or a value too large for dtype({str(matrix.dtype)!r}).")


@dataclass(frozen=True, eq=False)
class Fill(Elementwise, kind="fill"):
    """Put a value of its column in the place of each that is missing: NaN, or a certain number."""

    values: Array
    missing: float | None

    @override
    def check(self) -> None:
        expect(self.values.ndim == 1 and self.values.dtype == np.float64, "its values are none")

    @override
    def apply(self, matrix: Array) -> Array:
        mask = np.isnan(matrix) if self.missing is None else matrix == self.missing
        np.copyto(matrix, self.values, where=mask)
        return matrix


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
}


@dataclass(frozen=True, eq=False)
class Arithmetic(Elementwise, kind="arithmetic"):
    """Add, subtract, multiply or divide by a number for each column, or by one for all."""

    how: Literal["add", "subtract", "multiply", "divide"]
    operand: Array

    @override
    def check(self) -> None:
        expect(self.operand.ndim <= 1 and self.operand.dtype == np.float64, "its operand is none")

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        return _ARITHMETIC[self.how]

    @override
    def apply(self, matrix: Array) -> Array:
        self._function(matrix, self.operand, matrix)
        return matrix

    @override
    def run(self, value: Any) -> Any:
        if isinstance(value, Sparse):
            operand = self.operand if self.operand.ndim == 0 else self.operand[value.columns]
            return value.with_data(self._function(value.data, operand))
        return self._function(value, self.operand)


@dataclass(frozen=True, eq=False)
class Clip(Elementwise, kind="clip"):
    """Keep numbers between two others; NaN stays."""

    low: float
    high: float

    @override
    def apply(self, matrix: Array) -> Array:
        return np.clip(matrix, self.low, self.high, out=matrix)


@dataclass(frozen=True, eq=False)
class Binarize(Elementwise, kind="binarize"):
    """1 for what is above a threshold, 0 for the rest."""

    threshold: float

    @override
    def apply(self, matrix: Array) -> Array:
        return (matrix > self.threshold).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Normalize(Elementwise, kind="normalize"):
    """Divide each row by its norm, unless that is zero."""

    norm: Literal["l1", "l2", "max"]

    @override
    def apply(self, matrix: Array) -> Array:
        if self.norm == "l1":
            norms = np.abs(matrix).sum(axis=1)
        elif self.norm == "l2":
            norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
        else:
            norms = np.abs(matrix).max(axis=1)
        norms[norms < 10 * np.finfo(np.float64).eps] = 1.0  # so near to zero counts as zero
        matrix /= norms[:, None]
        return matrix

    @override
    def run(self, value: Any) -> Any:
        return normalized(value, self.norm) if isinstance(value, Sparse) else super().run(value)


def normalized(value: Sparse, norm: str) -> Sparse:
    """Return rows divided by their norms, added up value by value; a row of zeros stays."""
    data, rows = value.data, value.rows
    if norm == "max":
        norms = np.zeros(value.count)
        np.maximum.at(norms, rows, np.abs(data))
    else:
        norms = value.row_sums(np.abs(data) if norm == "l1" else data * data)
        if norm == "l2":
            norms = np.sqrt(norms)
    norms[norms == 0] = 1.0
    return value.with_data(data / norms[rows])


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    name: getattr(np, name)
    for name in (
        "abs", "absolute", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctanh", "cbrt", "ceil", "cos", "cosh",
        "deg2rad", "exp", "exp2", "expm1", "fabs", "floor", "log", "log10", "log1p", "log2", "negative", "positive",
        "rad2deg", "reciprocal", "rint", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh", "trunc",
    )
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Function(Elementwise, kind="function"):
    """One of numpy's functions of one number."""

    name: str

    @override
    def check(self) -> None:
        expect(self.name in _FUNCTIONS, "its function is none that is known")

    @override
    def apply(self, matrix: Array) -> Array:
        return _FUNCTIONS[self.name](matrix)

    @override
    def run(self, value: Any) -> Array:
        return self.apply(value)


def is_function(name: str) -> bool:
    """Whether `Function` knows this name."""
    return name in _FUNCTIONS


@dataclass(frozen=True, eq=False)
class Power(Elementwise, kind="power"):
    """The transformation of Yeo and Johnson or of Box and Cox, with an exponent for each column."""

    method: Literal["yeo-johnson", "box-cox"]
    exponents: Array

    @override
    def check(self) -> None:
        expect(self.exponents.ndim == 1 and self.exponents.dtype == np.float64, "its exponents are none")

    @override
    def apply(self, matrix: Array) -> Array:
        if matrix.shape[1] != len(self.exponents):
            raise ValueError(f"X has {matrix.shape[1]} features, but {len(self.exponents)} are expected")
        if self.method == "box-cox" and matrix.size and np.nanmin(matrix) <= 0:
            raise ValueError("The Box-Cox transformation can only be applied to strictly positive data")
        power = _yeo_johnson if self.method == "yeo-johnson" else _box_cox
        for index, exponent in enumerate(self.exponents.tolist()):
            matrix[:, index] = power(matrix[:, index], exponent)
        return matrix


def _box_cox(x: Array, exponent: float) -> Array:
    # As scipy.special.boxcox: near zero its limit, elsewhere without the loss of digits in x ** exponent - 1.
    if abs(exponent) < 1e-19:
        return np.log(x)
    exponents = exponent * np.log(x)
    return np.where(exponents < 709.78, np.expm1(exponents) / exponent, (np.power(x, exponent) - 1) / exponent)


def _yeo_johnson(x: Array, exponent: float) -> Array:
    out = np.full_like(x, np.nan)
    up = x >= 0
    down = x < 0
    if abs(exponent) < np.spacing(1.0):
        out[up] = np.log1p(x[up])
    else:
        out[up] = np.expm1(exponent * np.log1p(x[up])) / exponent
    if abs(exponent - 2) > np.spacing(1.0):
        out[down] = -np.expm1((2 - exponent) * np.log1p(-x[down])) / (2 - exponent)
    else:
        out[down] = -np.log1p(-x[down])
    return out


@dataclass(frozen=True, eq=False)
class Quantiles(Elementwise, kind="quantiles"):
    """The place of each number among the quantiles of its column, evenly between 0 and 1."""

    quantiles: Array
    references: Array

    @override
    def check(self) -> None:
        expect(self.quantiles.ndim == 2 and self.references.ndim == 1, "its quantiles are none")
        expect(self.quantiles.shape[0] == len(self.references) > 0, "its quantiles are not as many as their places")

    @override
    def apply(self, matrix: Array) -> Array:
        if matrix.shape[1] != self.quantiles.shape[1]:
            raise ValueError(f"X has {matrix.shape[1]} features, but {self.quantiles.shape[1]} are expected")
        references = self.references
        for index in range(matrix.shape[1]):
            column, quantiles = matrix[:, index], self.quantiles[:, index]
            low, high = column == quantiles[0], column == quantiles[-1]
            known = ~np.isnan(column)
            finite = column[known]
            column[known] = 0.5 * (
                np.interp(finite, quantiles, references) - np.interp(-finite, -quantiles[::-1], -references[::-1])
            )
            column[high] = 1
            column[low] = 0
        return matrix


@dataclass(frozen=True, eq=False)
class Bins(Elementwise, kind="bins"):
    """The number of the interval that each value is in, of its column's inner edges."""

    edges: tuple[Array, ...]

    @override
    def check(self) -> None:
        expect(all(edges.ndim == 1 for edges in self.edges), "its edges are none")

    @override
    def apply(self, matrix: Array) -> Array:
        if matrix.shape[1] != len(self.edges):
            raise ValueError(f"X has {matrix.shape[1]} features, but {len(self.edges)} are expected")
        for index, edges in enumerate(self.edges):
            matrix[:, index] = np.searchsorted(edges, matrix[:, index], side="right")
        return matrix


@dataclass(frozen=True, eq=False)
class Missing(Part, kind="missing"):
    """1 where the value of a column is missing: NaN, or a certain number. `refusing` are columns where none may be."""

    columns: tuple[int, ...]
    missing: float | None
    refusing: tuple[int, ...] = ()

    @override
    def check(self) -> None:
        expect(all(0 <= column < MAX_WIDTH for column in (*self.columns, *self.refusing)), "a column is none")

    @functools.cached_property
    def _numbers(self) -> Numbers:
        return Numbers(self.columns, ())

    @functools.cached_property
    def _refused(self) -> Numbers:
        return Numbers(self.refusing, ())

    @override
    def run(self, value: Any) -> Array:
        if self.refusing and (new := np.flatnonzero(self._mask(self._refused.run(value)).any(axis=0))).size:
            features = np.sort(np.array(self.refusing)[new])
            raise ValueError(
                f"The features {features} have missing values in transform but have no missing values in fit."
            )
        return self._mask(self._numbers.run(value)).astype(np.float64)

    def _mask(self, matrix: Array) -> Array:
        return np.isnan(matrix) if self.missing is None else matrix == self.missing

    @override
    def fill(self, value: Any, out: Array, flat: Array, start: int) -> None:
        out[:, start : start + len(self.columns)] = self.run(value)


@dataclass(frozen=True, eq=False)
class Polynomials(Op, kind="polynomials"):
    """Products of columns: of each earlier one by a single column, all columns of a factor at a time.

    `blocks` has a row (from, to, factor, place): the columns [from, to) of the result times the input's column `factor` go to
    the result's columns from `place` on. `first` is where the input itself goes; `bias` a column of ones at 0. The result is
    the columns of `width` from `skip` on, with the bias before them.
    """

    inputs: int
    width: int
    bias: bool
    skip: int
    blocks: Array

    @override
    def check(self) -> None:
        expect(self.inputs > 0 and self._first + self.inputs <= self.width <= MAX_DENSE_WIDTH, "its widths do not fit")
        expect(0 <= self.skip <= self.width, "it leaves out more than there is")
        expect(
            self.blocks.ndim == 2 and self.blocks.shape[1] == 4 and self.blocks.dtype.kind == "i", "its blocks are none"
        )
        filled = self._first + self.inputs
        for start, stop, factor, place in self.blocks.tolist():
            expect(0 <= start < stop <= filled == place and 0 <= factor < self.inputs, "its blocks do not fit")
            filled += stop - start
        expect(filled == self.width, "its blocks do not fill it")

    @property
    def _first(self) -> int:
        return int(self.bias)

    @functools.cached_property
    def _blocks(self) -> list[tuple[slice, slice, slice]]:
        return [
            (slice(start, stop), slice(factor, factor + 1), slice(place, place + stop - start))
            for start, stop, factor, place in self.blocks.tolist()
        ]

    @override
    def run(self, value: Any) -> Array:
        check_room(len(value), self.width)
        out = np.empty((len(value), self.width))
        if self.bias:
            out[:, 0] = 1
        out[:, self._first : self._first + self.inputs] = value
        for source, factor, place in self._blocks:
            np.multiply(out[:, source], value[:, factor], out=out[:, place])
        if not self.skip:
            return out
        kept = out[:, self.skip :]
        return np.column_stack([out[:, :1], kept]) if self.bias else np.ascontiguousarray(kept)
