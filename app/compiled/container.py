"""Named arrays and one JSON document in a single object, in the layout of safetensors.

Eight bytes say how long the header is; the header is JSON and says of every array its dtype, its shape and where its bytes
lie; the bytes follow. Nothing in it can be run. The layout is that of https://github.com/huggingface/safetensors, so any
tool that reads those files can look into these.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from app.errors import LoadFailed
from app.signature import Array

MAX_HEADER_BYTES = 64 << 20
MAX_DIMENSIONS = 4
MAX_EMPTY = 1 << 16  # of any dimension of an array that has no bytes: those would bear out nothing
_BYTES_PER_VALUE = 160  # of JSON, at most, as Python has it: a term of a vocabulary and its column
DOCUMENT = "diskless"  # the key of our document in the header's `__metadata__`

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH = struct.Struct("<Q")


class Readable(Protocol):
    """A binary stream, as `ObjectReader` and `io.BytesIO` are."""

    def readinto(self, buffer: Any, /) -> int | None:
        """Read into `buffer`, and return how many bytes; 0 at the end."""
        ...


def write(document: Any, arrays: Mapping[str, Array]) -> bytes:
    """Return the bytes of a container. The arrays must be of numbers or booleans."""
    entries: dict[str, Any] = {"__metadata__": {DOCUMENT: json.dumps(document, separators=(",", ":"))}}
    offset = 0
    stored = []
    # The widest first, so that every array is aligned where it lies.
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        entries[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        stored.append(array)
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((_LENGTH.pack(len(header)), header, *(array.tobytes() for array in stored)))


def _no_look(_: int) -> None:
    return


def read(stream: Readable, size: int, look: Callable[[int], None] = _no_look) -> tuple[Any, dict[str, Array]]:
    """Read a container of `size` bytes: the document, and the arrays by name, which are read-only.

    Each array is read into its own place, so the peak is the size of the container, and what its JSON becomes: `look` is called
    with the bytes that this may be, before it is made. Raises `LoadFailed` when the bytes are not a container; whatever the
    stream or `look` raises reaches the caller.
    """
    if size < _LENGTH.size:
        raise LoadFailed(f"is not a compiled model: it has {size} bytes")
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if length > min(size - _LENGTH.size, MAX_HEADER_BYTES):
        raise LoadFailed(f"is not a compiled model: its header would have {length} bytes")
    header = bytes(_exactly(stream, length))
    look(3 * length + _BYTES_PER_VALUE * header.count(b","))
    try:
        entries = json.loads(header)
        document = json.loads(entries.pop("__metadata__")[DOCUMENT])
        listed = [(name, *_entry(entry)) for name, entry in entries.items()]
        del header, entries
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadFailed(f"is not a compiled model: its header cannot be read ({type(error).__name__})") from error
    arrays: dict[str, Array] = {}
    offset = 0
    # An array begins where the one before it ends, and the last one ends where the object does: none is made on the word
    # of a header that the object's size does not bear out.
    for name, dtype, shape, start, stop in sorted(listed, key=lambda item: item[3:]):
        if start != offset or stop - start != dtype.itemsize * math.prod(shape):
            raise LoadFailed(f"is not a compiled model: array {name!r:.100} does not lie where its header says")
        offset = stop
    if offset != size - _LENGTH.size - length:
        raise LoadFailed("is not a compiled model: its arrays are not as long as the file")
    for name, dtype, shape, start, _ in sorted(listed, key=lambda item: item[3:]):
        array = np.empty(shape, dtype)
        _fill(stream, memoryview(array.reshape(-1).view(np.uint8)))
        if dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
            raise LoadFailed(f"is not a compiled model: array {name!r:.100} at {start} is not one of booleans")
        array.flags.writeable = False
        arrays[name] = array
    return document, arrays


def _entry(entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, start, stop)):
        raise ValueError("a shape or an offset is no number")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError("too many dimensions")
    if 0 in shape and max(shape) > MAX_EMPTY:
        raise ValueError("a large array of nothing")
    return dtype, shape, start, stop


def _exactly(stream: Readable, count: int) -> bytearray:
    buffer = bytearray(count)
    _fill(stream, memoryview(buffer))
    return buffer


def _fill(stream: Readable, view: memoryview) -> None:
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise LoadFailed("is not a compiled model: it ends too early")
        view = view[count:]
