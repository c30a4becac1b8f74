"""What a model takes and gives, and the one door through which input reaches it.

`inspection.infer` reads it off a fitted estimator, `Signature.validate` turns the instances of a request into `Rows`. Only it and `intake.py`, for plain requests, make `Rows`, so nothing unvalidated reaches a model. Datatypes are those of the Open
Inference Protocol: `FP64 INT64 BOOL BYTES`. Neither scikit-learn nor pandas is imported to validate.
"""

from __future__ import annotations

import difflib
import functools
import heapq
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, field_validator

from app import marks
from app.errors import InvalidInput, RequestTooLarge, Violation
from app.names import shortened

if TYPE_CHECKING:
    import pandas as pd

Datatype = Literal["BOOL", "INT64", "FP64", "BYTES"]
Layout = Literal["matrix", "frame", "text", "records"]
Array = npt.NDArray[Any]
MAX_VIOLATIONS = 20
MAX_SHOWN = 60  # characters of a value that a violation shows
MAX_COLUMNS = (
    30_000  # of a model: each is described in 1.5 KB, and a small file, or request, can say that there are so many
)
MAX_COMPARED = 1200  # characters of names that an unknown column's is compared with: of those that are about as long


class TensorSpec(BaseModel):
    """One input column, or one method's output.

    `datatype` is what the wire carries. `dtype` is the numpy or pandas dtype that the model was trained with, and that
    its input is built with. `missing` is what `null` becomes in a column of strings: NaN, or None where it was trained so.
    `assumed` is a column of which nothing is known: a number, or true and false, which count as 1 and 0; with dtype
    `object` not even that, and it may be a string as well.
    `categories` are those of a column of pandas' dtype `category`, in training's order, which `ordered` says to matter.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    datatype: Datatype
    shape: tuple[int, ...] = (-1,)
    dtype: str = "float64"
    nullable: bool = True
    missing: Literal["nan", "none"] = "nan"
    assumed: bool = False
    categories: tuple[Any, ...] | None = None
    ordered: bool = False

    @field_validator("dtype")
    @classmethod
    def _is_known(cls, dtype: str) -> str:
        if not is_dtype(dtype):
            raise ValueError(f"{dtype[:MAX_SHOWN]!r} is no dtype that a column of a model can have")
        return dtype

    @property
    def is_datetime(self) -> bool:
        """Whether the wire's strings are ISO 8601 date-times."""
        return self.dtype.startswith("datetime64")

    @property
    def is_anything(self) -> bool:
        """Whether only somebody's own code reads the column, so that its values are handed on as they came."""
        return self.assumed and self.dtype == "object"

    @property
    def expected(self) -> str:
        """What a violation says was expected."""
        kind: str = self.datatype
        if self.is_anything:
            kind = "a number, a string, true, false"
        elif self.is_datetime:
            kind = "BYTES (an ISO 8601 date-time)"
        elif kind == "INT64" and storage_of("INT64", self.dtype) != np.int64:
            kind = "INT64 from {} to {}".format(*bounds_of(self.dtype))
        return f"{kind} or null" if self.nullable else kind


@dataclass(frozen=True, slots=True)
class Rows:
    """Validated input of `count` rows. Made by `Signature.validate`, `Intake.rows` and `Rows.concatenate` only.

    `matrix` is set where every column is of one numeric dtype: shape (count, columns). Otherwise `columns` has an array
    of shape (count,) for each input, or the single list of texts or records that the layout calls for.
    """

    signature: Signature
    count: int
    matrix: Array | None
    columns: tuple[Array, ...] = ()

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        """Put rows of one signature behind each other."""
        first = parts[0]
        if len(parts) == 1:
            return first
        count = sum(part.count for part in parts)
        if all(part.matrix is not None for part in parts):
            return cls(
                first.signature, count, np.concatenate([part.matrix for part in parts if part.matrix is not None])
            )
        columns = tuple(np.concatenate(column) for column in zip(*(part.columns for part in parts), strict=True))
        return cls(first.signature, count, None, columns)

    @property
    def kinds(self) -> tuple[object, ...]:
        """The dtypes of the arrays, and the width: only rows of the same kinds are computed together, so that no caller changes another's."""
        if self.matrix is not None:
            return (self.matrix.dtype, self.matrix.shape[1])
        return tuple(column.dtype for column in self.columns)

    @property
    def guessed(self) -> bool:
        """Whether they have more than numbers in a column of which nothing is known: the model may not be made for it."""
        if self.matrix is not None or self.signature.layout not in ("matrix", "frame"):
            return False
        specs = self.signature.inputs
        return any(
            column.dtype.kind == "O" and (not specs or specs[position].is_anything)
            for position, column in enumerate(self.columns)
        )

    def array(self) -> Array:
        """Return the rows as an array of shape (count, columns); of dtype object where columns differ in kind."""
        if self.matrix is not None:
            return self.matrix
        result = np.empty((self.count, len(self.columns)), dtype=object)
        for position, column in enumerate(self.columns):
            result[:, position] = column
        return result

    def frame(self) -> pd.DataFrame:
        """Return the rows as a DataFrame with the names and dtypes that the model was trained with."""
        import pandas as pd

        names = [spec.name for spec in self.signature.inputs]
        if self.matrix is not None:
            # By columns, as frames are made: by rows, a product of matrices would differ in its last digit.
            return pd.DataFrame(np.asfortranarray(self.matrix), columns=pd.Index(names), copy=False)
        series = {
            name: _series(column, spec)
            for name, column, spec in zip(names, self.columns, self.signature.inputs, strict=True)
        }
        return pd.DataFrame(series)

    def items(self) -> list[Any]:
        """Return the texts or records themselves, for the layouts `text` and `records`."""
        return list(self.columns[0])


def _series(column: Array, spec: TensorSpec) -> pd.Series[Any]:
    """Return a column with the dtype that it had in training; no value is lost to a dtype that cannot hold it."""
    import pandas as pd

    if spec.categories is not None:
        return _categorical(column, spec)
    if spec.is_datetime:
        zone = spec.dtype.partition(", ")[2].rstrip("]")
        series = pd.Series(column)
        return series.dt.tz_localize("UTC").astype(spec.dtype) if zone else series.astype(spec.dtype)
    if _is_numpy(spec.dtype):
        # Integers with a missing value among them are floats, booleans are objects: as they were in training.
        return pd.Series(column, dtype=column.dtype)
    return pd.Series(column, dtype=spec.dtype)


def _categorical(column: Array, spec: TensorSpec) -> pd.Series[Any]:
    import pandas as pd

    values = pd.Series(column, dtype=column.dtype)
    known = set(spec.categories or ())
    # What training never saw gets a category of its own: what to do about it is for the estimator to say.
    unknown = [value for value in dict.fromkeys(values[values.notna()].tolist()) if value not in known]
    index = pd.Index([*(spec.categories or ()), *unknown])
    codes = np.where(values.notna(), index.get_indexer(pd.Index(values)), -1)
    return pd.Series(pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(index, spec.ordered)))


class Signature(BaseModel):
    """Recorded inputs, outputs and methods of a model.

    `layout` says what the estimator is handed: `matrix` an array of shape (n, inputs), `frame` a DataFrame, `text` a list
    of n strings, `records` a list of n dictionaries. With layout `matrix` and no `inputs`, any width is taken.
    `ignored` are columns that training data had and the model never reads. `classes` is a list, or one per output;
    `by_class` are the methods with a column for each class. Unless `rowwise`, a row's answer may depend on the rows beside it,
    so requests are not computed together.
    """

    model_config = ConfigDict(frozen=True)

    layout: Layout
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    methods: tuple[str, ...]
    classes: list[Any] | None = None
    by_class: tuple[str, ...] = ("predict_proba", "predict_log_proba", "decision_function")
    rowwise: bool = True
    extra_columns: Literal["forbid", "ignore"] = "forbid"
    ignored: tuple[str, ...] = ()

    @property
    def default_method(self) -> str:
        """`predict`, or the first method of a model that has none."""
        return "predict" if "predict" in self.methods else self.methods[0]

    @cached_property
    def _names(self) -> list[str]:
        return [spec.name for spec in self.inputs]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self._names)}

    @cached_property
    def _known(self) -> frozenset[str]:
        """Columns that a row may have."""
        return frozenset((*self._names, *self.ignored))

    @cached_property
    def uniform(self) -> np.dtype[Any] | None:
        """The one numeric dtype of all inputs, if there is one: then rows are one array."""
        kinds = {(spec.datatype, "float64" if spec.is_anything else spec.dtype) for spec in self.inputs}
        if len(kinds) != 1 or self.layout not in ("matrix", "frame"):
            return None if self.inputs or self.layout != "matrix" else np.dtype(np.float64)
        ((datatype, dtype),) = kinds
        return np.dtype(dtype) if datatype == "FP64" and dtype in ("float64", "float32") else None

    def validate(self, instances: Any, *, max_rows: int | None = None) -> Rows:  # type: ignore[override]
        """Turn the instances of a request (a list of rows, as JSON decodes them) into `Rows`.

        Raises `InvalidInput` with every violation, 20 at most; `RequestTooLarge` for more than `max_rows` rows.
        """
        if not isinstance(instances, list):
            raise InvalidInput(
                "instances must be a list of rows", [Violation("instances", "a list of rows", show(instances))]
            )
        if not instances:
            raise InvalidInput("instances has no rows", [Violation("instances", "at least one row", "[]")])
        if max_rows is not None and len(instances) > max_rows:
            raise RequestTooLarge(f"expected at most {max_rows} rows in one request, got {len(instances)}")
        if self.layout in ("text", "records"):
            return self._validate_items(instances)
        if self.uniform is not None:
            rows = self._fast(instances, self.uniform)
            if rows is not None:
                return rows
        return self._validate_columns(instances)

    def _fast(self, instances: list[Any], dtype: np.dtype[Any]) -> Rows | None:
        """Return the rows of a well-formed numeric request, or None: then the careful way finds out what is wrong."""
        if type(instances[0]) is dict:
            names = self._positions.keys()
            if not all(type(row) is dict and row.keys() == names for row in instances):
                return None
            if len(names) == 0:
                return None
            ordered = self._names
            instances = [[row[name] for name in ordered] for row in instances]
        width = len(self.inputs) or (len(instances[0]) if type(instances[0]) is list else -1)
        if width < 1 or (width > MAX_COLUMNS and not self.inputs):
            return None
        if not all(type(row) is list and len(row) == width for row in instances):
            return None
        types = set(map(type, chain.from_iterable(instances)))
        if not types <= _NUMERIC_OR_NULL:
            return None
        if type(None) in types and not all(spec.nullable for spec in self.inputs):
            return None
        try:
            matrix = np.array(instances, dtype=np.float64)
        except OverflowError:  # an integer beyond the range of floats
            return None
        if dtype != matrix.dtype:
            with np.errstate(over="ignore"):
                matrix = matrix.astype(dtype)
        if np.isinf(matrix).any():
            return None
        return Rows(self, len(matrix), matrix)

    def _validate_items(self, instances: list[Any]) -> Rows:
        report = _Report()
        column = np.empty(len(instances), dtype=object)
        for index, item in enumerate(instances):
            path = f"instances[{index}]"
            if self.layout == "text":
                column[index] = text = self._unwrapped(item)
                if type(text) is not str:
                    report.add(path, "a string", text)
                elif marks.has_long_run(text):
                    report.add(path, marks.EXPECTED, marks.GOT, shown=True)
            elif type(item) is not dict:
                report.add(path, "an object", item)
            else:
                column[index] = item
                for key, value in item.items():
                    if type(value) not in _RECORD_VALUES and not _is_strings(value):
                        report.add(f"{path}{step_of(key)}", "a number, a string, a list of strings or null", value)
                    elif any(map(marks.has_long_run, _texts_in(value))):
                        report.add(f"{path}{step_of(key)}", marks.EXPECTED, marks.GOT, shown=True)
        report.raise_if_any()
        return Rows(self, len(instances), None, (column,))

    def _unwrapped(self, item: Any) -> Any:
        """Return the text of a row that was sent as a row of one column."""
        if type(item) is list and len(item) == 1:
            return item[0]
        if type(item) is dict and item.keys() == self._positions.keys():
            return item[self._names[0]]
        return item

    def _validate_columns(self, instances: list[Any]) -> Rows:
        report = _Report()
        specs: Sequence[TensorSpec] = self.inputs or self._any_width(instances, report)
        by_name = isinstance(instances[0], dict)
        table: list[list[Any]] = []
        for index, row in enumerate(instances):
            if isinstance(row, dict) and self.inputs:
                table.append(self._ordered(row, index, specs, report))
            elif isinstance(row, list):
                if len(row) != len(specs):
                    report.add(f"instances[{index}]", f"{len(specs)} values", f"{len(row)} values", shown=True)
                    row = [_ABSENT] * len(specs)
                table.append(row)
            else:
                wanted = "an object" if by_name else f"a list of {len(specs)} values"
                report.add(f"instances[{index}]", wanted, row)
                table.append([_ABSENT] * len(specs))
        columns = []
        for position, spec in enumerate(specs):
            values = [row[position] for row in table]

            def path(index: int, position: int = position, spec: TensorSpec = spec) -> str:
                step = step_of(spec.name) if isinstance(instances[index], dict) else f"[{position}]"
                return f"instances[{index}]{step}"

            columns.append(_CONVERTERS[spec.datatype](values, spec, path, report))
        report.raise_if_any()
        if self.uniform is not None and all(column.dtype.kind == "f" for column in columns):
            matrix = np.column_stack(columns).astype(self.uniform, copy=False)
            return Rows(self, len(instances), matrix)
        return self.assembled(columns, len(instances))

    def assembled(self, columns: Sequence[Array], count: int) -> Rows:
        """Return `count` validated rows of columns of several kinds, as the layout calls for. For whoever has validated them."""
        if self.layout == "matrix" and "O" not in {column.dtype.kind for column in columns}:
            return Rows(self, count, np.column_stack(columns))
        return Rows(self, count, None, tuple(columns))

    def _any_width(self, instances: list[Any], report: _Report) -> list[TensorSpec]:
        if not isinstance(instances[0], list) or not instances[0]:
            names = " (nothing tells this model's columns: publish it with --examples to send objects)"
            report.add("instances[0]", f"a list of values{names if instances[0] else ''}", instances[0])
        elif len(instances[0]) > MAX_COLUMNS:
            report.add("instances[0]", f"at most {MAX_COLUMNS:,} values", f"{len(instances[0]):,} values", shown=True)
        report.raise_if_any()
        return [TensorSpec(name="x", datatype="FP64", dtype="object", assumed=True)] * len(instances[0])

    def _ordered(self, row: dict[Any, Any], index: int, specs: Sequence[TensorSpec], report: _Report) -> list[Any]:
        missing = [spec for spec in specs if spec.name not in row]
        for spec in missing:
            report.add(
                f"instances[{index}]{step_of(spec.name)}", spec.expected, "nothing: the column is missing", shown=True
            )
        if self.extra_columns == "forbid" and len(row) > len(specs) - len(missing):
            for name in row:
                if name not in self._known:
                    report.add(
                        f"instances[{index}]{step_of(name)}",
                        "a known column",
                        f"an unknown column{report.hint(name, [spec.name for spec in missing] or self._names)}",
                        shown=True,
                    )
        return [row.get(spec.name, _ABSENT) for spec in specs]


def _closest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most like `name`, if one is and looking for it takes no time worth speaking of."""
    if not 0 < len(name) <= MAX_SHOWN:
        return None
    near = heapq.nsmallest(MAX_COMPARED // len(name), known, key=lambda other: abs(len(other) - len(name)))
    return next(iter(difflib.get_close_matches(name, near, n=1)), None)


class _Absent:
    """Stands for a value whose absence has been reported already."""


_ABSENT = _Absent()
_NUMERIC_OR_NULL = {float, int, type(None)}
_RECORD_VALUES = {str, int, float, bool, type(None)}


class _Report:
    """Collects violations. The one that fills it raises, so that nobody looks at, or writes a path for, what it could not keep."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self._has_hinted = False

    def hint(self, name: str, known: Sequence[str]) -> str:
        """Return what an unknown column may have been meant to be, for the first one: the others mostly have the same cause."""
        if self._has_hinted:
            return ""
        self._has_hinted = True
        close = _closest(name, known)
        return f"; did you mean {close!r}?" if close else ""

    def add(self, path: str, expected: str, got: Any, *, shown: bool = False) -> None:
        """Keep a violation. Raises `InvalidInput` with all of them as soon as there are as many as are listed."""
        self.violations.append(Violation(path, expected, got if shown else show(got)))
        if len(self.violations) >= MAX_VIOLATIONS:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        if not self.violations:
            return
        first = self.violations[0]
        more = len(self.violations) - 1
        rest = "" if not more else f", and {more} more violation{'s' if more > 1 else ''}"
        rest += f" (only the first {MAX_VIOLATIONS} are listed)" if len(self.violations) >= MAX_VIOLATIONS else ""
        raise InvalidInput(f"{first.path}: expected {first.expected}, got {first.got}{rest}", self.violations)


def step_of(name: Any) -> str:
    """Write a column as the last step of a path: `.age`, or `["a b"]` where that is no identifier."""
    text = shortened(str(name), MAX_SHOWN)
    return f".{text}" if text.isidentifier() else f"[{json.dumps(text, ensure_ascii=False)}]"


def show(value: Any) -> str:
    """Write a value as short JSON. What is long or deep is described: a million rows are not serialised for sixty characters."""
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        if len(value) > MAX_SHOWN or any(isinstance(item, (list, dict)) for item in inner):
            return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} elements"
    if isinstance(value, str):
        value = value[:MAX_SHOWN]
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # nothing that JSON has; or an integer of thousands of digits
        text = f"a very long {type(value).__name__}" if isinstance(value, int) else f"a {type(value).__name__}"
    return shortened(text, MAX_SHOWN)


def _is_strings(value: Any) -> bool:
    return type(value) is list and all(type(item) is str for item in value)


def _texts_in(value: Any) -> Sequence[str]:
    """Return the texts in a value of a record."""
    if type(value) is str:
        return (value,)
    return value if type(value) is list else ()


@functools.cache
def storage_of(datatype: Literal["FP64", "INT64"], dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype that holds a column of a numpy, pandas (`Int64`) or Arrow (`int64[pyarrow]`) dtype."""
    pattern, otherwise = (_FLOAT, "float64") if datatype == "FP64" else (_INTEGER, "int64")
    match = pattern.match(dtype.lower())
    return np.dtype(match[0] if match else otherwise)


_FLOAT = re.compile(r"float(16|32|64)\b")
_INTEGER = re.compile(r"u?int(8|16|32|64)\b")


@functools.cache
def _is_numpy(dtype: str) -> bool:
    return dtype in ("object", "bool") or any(pattern.fullmatch(dtype) for pattern in (_FLOAT, _INTEGER))


def is_dtype(dtype: str) -> bool:
    """Whether this names a dtype of numpy, pandas or Arrow, and neither tells how much memory to take nor a file to read."""
    return len(dtype) <= 100 and _DTYPE.fullmatch(dtype) is not None


_UNIT = r"(\d{0,9}(Y|M|W|D|h|m|s|ms|us|μs|ns|ps|fs|as)|generic)"
_PLACE = r"[A-Za-z0-9_+-]+"  # of a time zone
_ZONE = rf"(UTC([+-][0-9:]{{1,8}})?|[+-][0-9:]{{1,8}}|pytz\.FixedOffset\(-?\d{{1,4}}\)|(?!dateutil){_PLACE}(/{_PLACE}){{0,3}})"
_NUMBER = r"([Uu]?[Ii]nt(8|16|32|64)|[Ff]loat(16|32|64|96|128)|complex(64|128|192|256)|bool|boolean)"
_TIME = rf"(datetime64|timedelta64)(\[{_UNIT}\])?|datetime64\[{_UNIT}, {_ZONE}\]"
_ARROW = (
    rf"(bool|u?int(8|16|32|64)|halffloat|float|double|null|(large_)?(string|binary)|date32\[day\]|date64\[ms\]"
    rf"|(time32|time64|duration)\[{_UNIT}\]|timestamp\[{_UNIT}(, tz={_ZONE})?\]|decimal(128|256)\(\d\d?, -?\d\d?\)"
    r"|dictionary<values=(large_)?string, indices=u?int(8|16|32|64), ordered=[01]>)\[pyarrow\]"
)
_DTYPE = re.compile(
    rf"{_NUMBER}|{_TIME}|{_ARROW}|[<>](([iufc]\d{{1,2}})|[mM]8(\[{_UNIT}\])?)|object|str|string|category"
    rf"|string\[(python|pyarrow|pyarrow_numpy)\]|Sparse\[{_NUMBER}, [A-Za-z0-9_.+-]{{1,30}}\]|period\[[A-Za-z-]{{1,10}}\]"
    rf"|interval(\[({_NUMBER}|{_TIME})(, (left|right|both|neither))?\])?"
)

Path = Callable[[int], str]


def _fp64(values: list[Any], spec: TensorSpec, path: Path, report: _Report) -> Array:
    if spec.is_anything:
        return _anything(values, spec, path, report)
    column = _numbers(values, spec, path, report)
    return objects_of(values, spec) if spec.dtype == "object" else column


def _anything(values: list[Any], spec: TensorSpec, path: Path, report: _Report) -> Array:
    """Return numbers as numbers, true and false as such, and what has anything else as objects."""
    types = set(map(type, values))
    if types == {bool}:
        return np.array(values, dtype=bool)
    if types <= _NUMERIC_OR_NULL | {bool} and types != {bool, type(None)}:
        return _numbers(values, spec, path, report)
    largest = float(np.finfo(np.float64).max)
    for index, value in enumerate(values):
        if type(value) in (int, float):
            taken = not abs(value) > largest
        else:
            taken = type(value) in (str, bool) or value is _ABSENT or (value is None and spec.nullable)
        if not taken:
            report.add(path(index), spec.expected, value)
        elif type(value) is str and marks.has_long_run(value):
            report.add(path(index), marks.EXPECTED, marks.GOT, shown=True)
    return objects_of(values, spec)


def _numbers(values: list[Any], spec: TensorSpec, path: Path, report: _Report) -> Array:
    allowed = {float, int} | ({type(None)} if spec.nullable else set()) | ({bool} if spec.assumed else set())
    storage = storage_of("FP64", spec.dtype)
    if set(map(type, values)) <= allowed:
        try:
            with np.errstate(over="ignore"):
                column = np.array(values, dtype=np.float64).astype(storage, copy=False)
            if not np.isinf(column).any():
                return column
        except OverflowError:  # an integer beyond the range of floats: found below
            pass
    largest = float(np.finfo(storage).max)
    for index, value in enumerate(values):
        if value is _ABSENT or (type(value) in allowed and (value is None or not abs(value) > largest)):
            continue
        report.add(path(index), spec.expected, value)
    return np.zeros(len(values))


def _int64(values: list[Any], spec: TensorSpec, path: Path, report: _Report) -> Array:
    low, high = bounds_of(spec.dtype)
    some_missing = False
    result: list[Any] = []
    for index, value in enumerate(values):
        if type(value) is int and low <= value <= high:
            result.append(value)
        elif type(value) is float and value.is_integer() and low <= value <= high and value != _ROUNDED:
            result.append(int(value))  # JavaScript and pandas write 3.0
        elif value is None and spec.nullable:
            some_missing = True
            result.append(None)
        elif value is not _ABSENT:
            report.add(path(index), spec.expected, value)
    if len(result) != len(values):
        return np.zeros(len(values))
    if spec.dtype == "object":
        return objects_of(result, spec)
    if some_missing:
        return np.array(result, dtype=np.float64 if _is_numpy(spec.dtype) else object)
    return np.array(result, dtype=storage_of("INT64", spec.dtype))


_ROUNDED = -(2.0**63)  # what the parser also makes of integers below the least that 64 bits hold


@functools.cache
def bounds_of(dtype: str) -> tuple[int, int]:
    """Return the least and the largest integer that a column of this dtype holds."""
    info = np.iinfo(storage_of("INT64", dtype))
    return int(info.min), int(info.max)


def _bool(values: list[Any], spec: TensorSpec, path: Path, report: _Report) -> Array:
    types = set(map(type, values))
    if types == {bool}:
        return np.array(values, dtype=bool)
    for index, value in enumerate(values):
        if type(value) is not bool and value is not _ABSENT and not (value is None and spec.nullable):
            report.add(path(index), spec.expected, value)
    return objects_of(values, spec)


def _bytes(values: list[Any], spec: TensorSpec, path: Path, report: _Report) -> Array:
    if spec.is_datetime:
        return _datetimes(values, spec, path, report)
    for index, value in enumerate(values):
        if type(value) is str:
            if marks.has_long_run(value):
                report.add(path(index), marks.EXPECTED, marks.GOT, shown=True)
        elif value is not _ABSENT and not (value is None and spec.nullable):
            report.add(path(index), spec.expected, value)
    return objects_of(values, spec)


def objects_of(values: Sequence[Any], spec: TensorSpec) -> Array:
    """Return values as an array of objects, None as what the column was trained to have for it."""
    column = np.empty(len(values), dtype=object)
    blank = None if spec.missing == "none" else np.nan
    column[:] = [blank if value is None else value for value in values]
    return column


def _datetimes(values: list[Any], spec: TensorSpec, path: Path, report: _Report) -> Array:
    zone = spec.dtype.partition(", ")[2].rstrip("]")
    unit: Literal["ns", "us"] = "ns" if spec.dtype.startswith("datetime64[ns") else "us"
    result: list[Any] = []
    for index, value in enumerate(values):
        if value is _ABSENT:
            continue
        if value is None and spec.nullable:
            result.append(np.datetime64("NaT", unit))
            continue
        try:
            moment = datetime.fromisoformat(value) if type(value) is str else None
            if moment is not None and zone:
                moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        except (ValueError, OverflowError):  # no date-time; or one at an end of time that its offset moves beyond
            moment = None
        if moment is None or (unit == "ns" and not 1678 <= moment.year <= 2261):
            report.add(path(index), spec.expected, value)
        elif moment.tzinfo is not None and not zone:  # which wall clock was meant cannot be known
            report.add(path(index), "BYTES (an ISO 8601 date-time without offset, as in training)", value)
        else:
            stamp: Any = np.datetime64(moment.replace(tzinfo=None), "us").astype(f"datetime64[{unit}]")
            if unit == "ns" and (finer := _BELOW_MICROSECONDS.search(value)):  # Python's own times end at microseconds
                stamp += np.timedelta64(int(finer[1].ljust(3, "0")[:3]), "ns")
            result.append(stamp)
    if len(result) != len(values):
        return np.zeros(len(values))
    return np.array(result, dtype=f"datetime64[{unit}]")


_BELOW_MICROSECONDS = re.compile(r"[.,]\d{6}(\d+)")
_CONVERTERS: dict[Datatype, Callable[[list[Any], TensorSpec, Path, _Report], Array]] = {
    "FP64": _fp64,
    "INT64": _int64,
    "BOOL": _bool,
    "BYTES": _bytes,
}
