"""Gzip: bodies of requests that come compressed, and answers that are worth it. As RFC 9110 has the headers."""

from __future__ import annotations

import asyncio
import re
import zlib

from app.errors import InvalidRequest, RequestTooLarge, UnsupportedEncoding

MIN_BYTES = 4096  # of an answer: below, compressing takes longer than sending
THREAD_BYTES = 64 * 1024  # what is larger is not compressed in the event loop
MAX_MEMBERS = 64  # of one body: each costs time, however little is in it
LEVEL = 1  # the fastest: JSON of numbers gets little smaller by more
_GZIP = 16 + zlib.MAX_WBITS
_CODING = re.compile(rb"\s*(gzip|x-gzip|\*)\s*(?:;\s*q=([0-9.]+)\s*)?\Z", re.IGNORECASE)


def is_accepted(accept_encoding: bytes) -> bool:
    """Return whether the value of an `Accept-Encoding` has gzip in it."""
    named: dict[bytes, bool] = {}
    for part in accept_encoding.split(b","):
        if match := _CODING.match(part):
            coding = b"*" if match[1] == b"*" else b"gzip"
            named[coding] = match[2] is None or match[2].strip(b"0.") != b""
    return named.get(b"gzip", named.get(b"*", False))


def compress(body: bytes) -> bytes:
    """Return the body as gzip."""
    compressor = zlib.compressobj(LEVEL, wbits=_GZIP)
    return compressor.compress(body) + compressor.flush()


def check_encoding(content_encoding: bytes) -> bool:
    """Return whether a body with this `Content-Encoding` is to be decompressed. Raises `UnsupportedEncoding`."""
    codings = [coding for part in content_encoding.split(b",") if (coding := part.strip().lower())]
    if any(coding not in (b"gzip", b"x-gzip", b"identity") for coding in codings):
        shown = content_encoding[:40].decode("latin-1")
        raise UnsupportedEncoding(f"expected a body that is compressed with gzip, or not at all, got {shown!r}")
    found = sum(coding != b"identity" for coding in codings)
    if found > 1:
        raise UnsupportedEncoding(f"expected a body that is compressed once, got {found} times")
    return found == 1


class Decompressor:
    """Decompresses bodies, one at a time, so that however many come, one is in memory: up to `max_bytes`, and no byte more."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = asyncio.Lock()

    async def run(self, body: bytes) -> bytes:
        """Return what a gzip body becomes. Raises `RequestTooLarge` and `InvalidRequest`."""
        async with self._lock:
            # zlib lets go of the interpreter meanwhile, and a small body may become a large one
            work = asyncio.ensure_future(asyncio.to_thread(decompress, body, self._max_bytes))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait((work,))  # its thread goes on: the next one's turn comes when that has ended
                work.exception()  # nobody will ask for it
                raise


def decompress(body: bytes, max_bytes: int) -> bytes:
    """Return what a gzip body of one or several members becomes. Raises `RequestTooLarge` and `InvalidRequest`."""
    pieces: list[bytes] = []
    left = max_bytes + 1
    rest = body
    members = 0
    try:
        while rest:
            members += 1
            if members > MAX_MEMBERS:
                raise InvalidRequest(f"expected a gzip body of at most {MAX_MEMBERS} members, got more")
            member = zlib.decompressobj(wbits=_GZIP)
            pieces.append(member.decompress(rest, left))
            left -= len(pieces[-1])
            if left <= 0:
                raise RequestTooLarge(f"expected a body of at most {max_bytes} bytes, got more once decompressed")
            if not member.eof:
                raise InvalidRequest("the body is not gzip: it ends too early")
            rest = member.unused_data.lstrip(b"\0")  # padding, as gzip itself passes it over
    except zlib.error as error:
        raise InvalidRequest(
            "the body is not gzip, as its Content-Encoding says: its bytes are damaged, or none"
        ) from error
    return b"".join(pieces)
