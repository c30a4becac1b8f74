import io
import json
import struct

import numpy as np
import pytest

from app.compiled import container
from app.errors import LoadFailed

ARRAYS = {
    "a": np.arange(6.0).reshape(2, 3),
    "b": np.array([True, False, True]),
    "c": np.array([], dtype=np.int32),
    "d": np.arange(5, dtype=np.float32),
    "e": np.array(7, dtype=np.int64),
}


def read(body):
    return container.read(io.BytesIO(body), len(body))


def test_what_is_written_is_read():
    document, arrays = read(container.write({"x": ["ü", None, 1.5]}, ARRAYS))

    assert document == {"x": ["ü", None, 1.5]}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert np.array_equal(arrays[name], array)
        assert arrays[name].shape == array.shape
        assert not arrays[name].flags.writeable


@pytest.mark.parametrize("length", [0, 5, 8, 20, 200, -1])
def test_what_is_cut_short_is_refused(length):
    body = container.write({}, ARRAYS)[:length]

    with pytest.raises(LoadFailed):
        read(body)


def with_header(change):
    body = container.write({}, ARRAYS)
    (length,) = struct.unpack("<Q", body[:8])
    header = json.loads(body[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + body[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(shape=[1 << 40, 3]),
        lambda header: header["a"].update(shape=[-2, -3]),
        lambda header: header["a"].update(shape=[2, 3.0]),
        lambda header: header["a"].update(shape=[1, 1, 2, 3, 1]),
        lambda header: header["a"].update(dtype="O"),
        lambda header: header["a"].update(data_offsets=[0, 1 << 45]),
        lambda header: header["a"].update(data_offsets=[8, 56]),
        lambda header: header["a"].update(data_offsets="ab"),
        lambda header: header.pop("a"),
        lambda header: header.pop("__metadata__"),
        lambda header: header.update(__metadata__={"diskless": "{"}),
        lambda header: header.update(f=header["a"]),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(change):
    with pytest.raises(LoadFailed, match="is not a compiled model"):
        read(with_header(change))


def test_a_byte_that_is_no_boolean_is_refused():
    body = bytearray(container.write({}, {"b": np.array([True])}))
    body[-1] = 2

    with pytest.raises(LoadFailed, match="booleans"):
        read(bytes(body))
