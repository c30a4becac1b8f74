"""Plain requests, decoded and validated in one step: by a decoder that is made for a model's signature when it is loaded.

What it takes is what `Signature.validate` takes, and it makes the same `Rows` of it. What it does not take, it does not explain:
`Signature.validate` then finds out whether anything is wrong with the request, and what. Between the two steps a request is a
`Draft`, so that the rows of a whole batch become arrays at once: numpy takes as long for one row as for sixty.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Annotated, Any

import msgspec
import numpy as np

from app.marks import LEAST_BYTES, MAX_MARKS, has_long_run
from app.signature import MAX_COLUMNS, Array, Rows, Signature, TensorSpec, bounds_of, objects_of, storage_of

Draft = list[Any]
"""Rows that have been validated: a list or tuple of values for each, in the signature's order, or a text or record."""

MAX_TYPED = 2000  # columns that a type of its own is made for
PARTS_BYTES = 1 << 18  # are looked at at a time
PACKED_VALUES = 1 << 16  # so many are handed over at a time
# Bytes of memory, in CPython: a list or a string, without what is in it; a dictionary; a number and the pointer to it.
ROW_WEIGHT, RECORD_WEIGHT, VALUE_WEIGHT = 72, 240, 32
TEXT_WEIGHT = 4  # of each byte: one character of many bytes makes all others of its string as wide

# Beyond 64 bits the careful way reads a float.
_INTEGER: Any = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_RECORD: Any = dict[str, str | float | _INTEGER | bool | list[str] | None]
_as_tuple = msgspec.structs.astuple


class Envelope(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A request but for its rows, which only the signature of its model can read."""

    instances: msgspec.Raw
    model: str | None = None
    version: str | int | None = None
    alias: str | None = None
    method: str | None = None


open_envelope = msgspec.json.Decoder(Envelope).decode


def has_more_parts(body: bytes, most: int) -> bool:
    """Whether there are more than so many lists and objects in some JSON. It makes no object for any of them."""
    bare = body.replace(rb"\\", b"__").replace(
        rb"\"", b"__"
    )  # every quotation mark that is left begins or ends a string
    parts, inside = 0, 0
    for start in range(0, len(bare), PARTS_BYTES):
        text = np.frombuffer(bare[start : start + PARTS_BYTES], np.uint8)
        in_string = (np.cumsum(text == ord('"'), dtype=np.uint8) + np.uint8(inside)) & 1
        parts += int(np.count_nonzero(((text == ord("[")) | (text == ord("{"))) & (in_string == 0)))
        if parts > most:
            return True
        inside = int(in_string[-1])
    return False


class Intake:
    """Turns the JSON of instances into drafts, and drafts into `Rows`. Made once for each signature; safe to share.

    `draft` returns the validated rows of a plain request, and None for any other. `rows` makes one `Rows` of the drafts of
    several requests, laid behind each other; nothing that `draft` has let through makes it fail.
    """

    draft: Callable[[msgspec.Raw], Draft | None]
    rows: Callable[[Draft], Rows]

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._width = len(signature.inputs)
        self.draft = _nothing_is_plain
        if signature.layout in ("text", "records"):
            self.rows = self._items
            self._decode = _decoder(str if signature.layout == "text" else _RECORD)
            self.draft = self._draft_items
        elif signature.uniform is not None:
            self.rows = self._matrix
            self._decode = _decoder(self._row_of_numbers(signature.uniform))
            self.draft = self._draft_numbers
        else:
            self.rows = self._columns
            self._fillers = [_filler(spec) for spec in signature.inputs]
            types = [_type(spec) for spec in signature.inputs]
            if types and None not in types and len(types) <= MAX_TYPED:
                listed = tuple[tuple(types)]  # type: ignore[misc,valid-type]
                record = self._record(types)
                self._decode = _decoder(listed if record is None else listed | record)
                self.draft = self._draft_columns

    def weight(self, count: int, size: int) -> int:
        """Return about how many bytes of memory a draft of so many rows takes; `size` is that of the request's body."""
        if self._signature.layout == "text":
            return count * ROW_WEIGHT + TEXT_WEIGHT * size
        if self._signature.layout == "records" or not self._width:
            return count * RECORD_WEIGHT + 16 * size
        has_texts = any(spec.datatype == "BYTES" for spec in self._signature.inputs)
        return count * (ROW_WEIGHT + self._width * VALUE_WEIGHT) + (TEXT_WEIGHT * size if has_texts else 0)

    def _row_of_numbers(self, dtype: np.dtype[Any]) -> Any:
        number = _number(dtype)
        specs = self._signature.inputs
        listed = list[number | None if all(spec.nullable for spec in specs) else number]  # type: ignore[misc,valid-type]
        record = self._record([number | None if spec.nullable else number for spec in specs])
        return listed if record is None else listed | record

    def _record(self, types: Sequence[Any]) -> Any:
        """Return the type of a row that is an object; None where there is none: no names, too many, one twice or not plain text."""
        signature = self._signature
        names = [spec.name for spec in signature.inputs]
        extra = [name for name in dict.fromkeys(signature.ignored) if name not in set(names)]
        if not names or len(set(names)) != len(names) or len(names) + len(extra) > MAX_TYPED:
            return None
        fields: list[Any] = [(f"c{position}", kind) for position, kind in enumerate(types)]
        fields += [(f"x{position}", Any, None) for position in range(len(extra))]
        called = {field[0]: name for field, name in zip(fields, [*names, *extra], strict=True)}
        forbids = signature.extra_columns == "forbid"
        try:
            return msgspec.defstruct("Row", fields, rename=called, forbid_unknown_fields=forbids, gc=False)
        except ValueError:  # a name that JSON writes with an escape: a quotation mark, a backslash, a control character
            return None

    def _draft_items(self, instances: msgspec.Raw) -> Draft | None:
        try:
            rows = self._decode(instances)
        except Exception:  # not JSON, not of these types, nested too deeply: the careful way tells
            return None
        if len(instances) > LEAST_BYTES and self._has_long_run(instances, rows):
            return None
        return rows or None

    def _draft_numbers(self, instances: msgspec.Raw) -> Draft | None:
        try:
            rows = self._decode(instances)
        except Exception:
            return None
        width = self._width or (len(rows[0]) if rows else 0)
        if width > MAX_COLUMNS and not self._width:
            return None
        for position, row in enumerate(rows):
            if type(row) is not list:
                rows[position] = _as_tuple(row)[:width]
            elif len(row) != width:
                return None
        return rows if width and rows else None

    def _draft_columns(self, instances: msgspec.Raw) -> Draft | None:
        try:
            rows = self._decode(instances)
        except Exception:
            return None
        for position, row in enumerate(rows):
            if type(row) is not tuple:
                rows[position] = _as_tuple(row)[: self._width]
        if len(instances) > LEAST_BYTES and self._has_long_run(instances, rows):
            return None
        return rows or None

    def _has_long_run(self, instances: msgspec.Raw, rows: Draft) -> bool:
        """Whether a text in these rows would take too long to normalise."""
        json = bytes(instances)
        if json.isascii() and b"\\" not in json:  # nor an escape of another character
            return False
        if self._signature.layout == "text":
            return any(has_long_run(text) for text in rows if len(text) > MAX_MARKS)
        if self._signature.layout == "records":
            rows = [[value] if type(value) is str else value for row in rows for value in row.values()]
        return any(
            type(text) is str and has_long_run(text) for row in rows if type(row) in (list, tuple) for text in row
        )

    def _items(self, draft: Draft) -> Rows:
        column = np.empty(len(draft), dtype=object)
        column[:] = draft
        return Rows(self._signature, len(draft), None, (column,))

    def _matrix(self, draft: Draft) -> Rows:
        width = self._width or len(draft[0])
        matrix = _packed(draft, width)
        dtype = self._signature.uniform
        return Rows(self._signature, len(draft), matrix if dtype == np.float64 else matrix.astype(dtype))

    def _columns(self, draft: Draft) -> Rows:
        columns = [fill(values) for fill, values in zip(self._fillers, zip(*draft, strict=True), strict=True)]
        return self._signature.assembled(columns, len(draft))


def _nothing_is_plain(instances: msgspec.Raw) -> Draft | None:
    return None


def _decoder(row: Any) -> Callable[[msgspec.Raw], Draft]:
    """Return the decoder of a list of rows of this type."""
    return msgspec.json.Decoder(list[row]).decode


def _packed(draft: Draft, width: int) -> Array:
    """Return rows of numbers and None as a matrix of float64, shape (rows, width)."""
    count = len(draft)
    if count * width > PACKED_VALUES:
        step = max(1, PACKED_VALUES // width)
        return np.concatenate([_packed(draft[start : start + step], width) for start in range(0, count, step)])
    matrix = np.empty((count, width))
    try:
        _packer(count * width).pack_into(matrix, 0, *chain.from_iterable(draft))
    except struct.error:  # there is a None among them
        matrix[:] = draft
    return matrix


@functools.lru_cache(512)
def _packer(count: int) -> struct.Struct:
    return struct.Struct(f"{count}d")


def _number(dtype: np.dtype[Any]) -> Any:
    if dtype == np.float64:
        return float  # the decoder refuses what is beyond its range
    largest = float(np.finfo(dtype).max)
    return Annotated[float, msgspec.Meta(ge=-largest, le=largest)]


def _type(spec: TensorSpec) -> Any:
    """Return what a decoder takes for a column; None for columns that take more than one can say.

    A null among integers or booleans changes the dtype of its column, which would change it for the other rows of a batch.
    """
    if spec.is_datetime or spec.assumed or (spec.datatype == "FP64" and spec.dtype == "object"):
        return None
    if spec.datatype == "FP64":
        number = _number(storage_of("FP64", spec.dtype))
        return number | None if spec.nullable else number
    if spec.datatype == "INT64":
        low, high = bounds_of(spec.dtype)
        return Annotated[int, msgspec.Meta(ge=low, le=min(high, 2**63 - 1))]
    if spec.datatype == "BOOL":
        return bool
    return str | None if spec.nullable else str


def _filler(spec: TensorSpec) -> Callable[[Sequence[Any]], Array]:
    """Return what makes an array of a column's values, as `Signature.validate` would."""
    if spec.datatype == "BOOL":
        return lambda values: np.array(values, dtype=bool)
    if spec.datatype == "BYTES" or spec.dtype == "object":
        return functools.partial(objects_of, spec=spec)
    dtype = storage_of(spec.datatype, spec.dtype)
    if (
        spec.datatype == "FP64" and dtype != np.float64
    ):  # by way of float64, or the last digit might be rounded otherwise
        return lambda values: np.array(values, dtype=np.float64).astype(dtype)
    return lambda values: np.array(values, dtype=dtype)
