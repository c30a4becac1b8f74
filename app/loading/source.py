"""The bytes that a model is read from: decompressed where they are compressed, and never more than may be.

joblib's own decompressors have no limit: a megabyte of zeros that is packed well becomes a gigabyte.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import Any, Protocol, override

from app import memory
from app.errors import LoadFailed, TooLarge

MAX_GROWTH = 8  # a model takes up to so many times the size of its file ...
MIN_GROWTH_BYTES = 256 * 1024 * 1024  # ... or this, where its file is small and its libraries are imported with it
CHUNK_BYTES = 256 * 1024  # of what is decompressed at once
LZMA_DICTIONARY_BYTES = 128 * 1024 * 1024  # twice what the highest preset asks for


def default_limit(size: int) -> int:
    """Return how many bytes a model may take that is stored in `size`, where the caller knows no better."""
    return max(MIN_GROWTH_BYTES, MAX_GROWTH * size)


class Budget:
    """What the process may grow by while it reads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._before = memory.resident_bytes()

    def check(self) -> None:
        """Refuse to go on when more is taken than may be."""
        if memory.resident_bytes() - self._before > self._max_bytes:
            raise TooLarge(f"takes more memory than the {self._max_bytes:,} bytes that it may")


class Source:
    """A stream, and how much can still come of it."""

    def __init__(self, stream: io.BufferedReader, end: int, *, packed: bool = False) -> None:
        self.stream = stream
        self._end = end
        self._packed = packed

    def require(self, count: int) -> None:
        """Refuse to make room for more bytes than can come."""
        left = self._end - self.stream.tell()
        if count > left:
            if self._packed:  # where it ends is not known, only where it has to
                raise _grown(self._end)
            raise LoadFailed(f"promises {count:,} bytes where {max(0, left):,} are left")

    def fill(self, view: memoryview) -> None:
        """Read as many bytes as the view has room for, straight into it."""
        while view:
            count = self.stream.readinto(view)
            if not count:
                raise EOFError(f"{len(view):,} bytes of an array are missing at the end")
            view = view[count:]

    def finish(self) -> None:
        """Read what is packed to its end, where there is a checksum of it."""
        while self._packed and self.stream.read(CHUNK_BYTES):
            pass


def _grown(max_bytes: int) -> TooLarge:
    return TooLarge(f"is compressed and becomes more than the {max_bytes:,} bytes that it may take here")


class _Decompressor(Protocol):
    """What bz2, lzma and lz4 have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Zlib:
    """zlib's decompressor in the manners of the others; `window_bits` says whether gzip's header is around it."""

    def __init__(self, window_bits: int) -> None:
        import zlib

        self._inner = zlib.decompressobj(window_bits)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def _lzma() -> _Decompressor:
    import lzma

    return lzma.LZMADecompressor(memlimit=LZMA_DICTIONARY_BYTES)


def _bz2() -> _Decompressor:
    import bz2

    return bz2.BZ2Decompressor()


def _lz4() -> _Decompressor:
    try:
        frame = importlib.import_module("lz4.frame")  # optional, as it is for joblib
    except ImportError as error:
        raise LoadFailed("is compressed with lz4, which is not installed here") from error
    decompressor: _Decompressor = frame.LZ4FrameDecompressor()
    return decompressor


# As joblib has them in joblib/compressor.py. No pickle begins like one of these.
_COMPRESSIONS: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": lambda: _Zlib(31),
    b"\x78": lambda: _Zlib(15),
    b"BZ": _bz2,
    b"\xfd7zXZ": _lzma,
    b"\x5d\x00": _lzma,
    b"\x04\x22\x4d\x18": _lz4,
}


def open_source(stream: io.BufferedReader, max_bytes: int) -> Source:
    """Return what a stream holds from where it is, decompressed if it is compressed, and then `max_bytes` at most."""
    head = stream.peek(8)[:8]
    if head.startswith(b"ZF"):
        raise LoadFailed(
            "was written by joblib before 0.10, in a format of its own: save it again with a joblib of today"
        )
    for prefix, make in _COMPRESSIONS.items():
        if head.startswith(prefix):
            return Source(io.BufferedReader(_Inflated(stream, make(), max_bytes), CHUNK_BYTES), max_bytes, packed=True)
    start = stream.tell()
    end = stream.seek(0, io.SEEK_END)
    stream.seek(start)
    return Source(stream, end)


class _Inflated(io.RawIOBase):
    """What is compressed in a stream, up to a limit."""

    def __init__(self, packed: io.BufferedReader, decompressor: _Decompressor, max_bytes: int) -> None:
        self._packed = packed
        self._decompressor = decompressor
        self._max_bytes = max_bytes
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._position

    @override
    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        most = min(len(view), CHUNK_BYTES)
        body = b""
        while most and not body and not self._decompressor.eof:
            packed = self._packed.read(io.DEFAULT_BUFFER_SIZE) if self._decompressor.needs_input else b""
            body = self._decompressor.decompress(packed, most)
            if not body and not packed and self._decompressor.needs_input and not self._decompressor.eof:
                raise EOFError("what is compressed ends in the middle")
        self._position += len(body)
        if self._position > self._max_bytes:
            raise _grown(self._max_bytes)
        view[: len(body)] = body
        return len(body)
