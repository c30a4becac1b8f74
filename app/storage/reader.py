"""One stored object as a stream for the thread that loads it, while the event loop in another thread fetches ahead."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections import deque
from collections.abc import Buffer, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import override

from app.errors import ArtifactMissing, DigestMismatch, ObjectNotFound, PreconditionFailed, StorageUnavailable
from app.storage.base import ObjectInfo, Storage

CHUNK_BYTES = 4 * 1024 * 1024
MAX_UNDIGESTED = 2  # chunks that wait for a digest of the whole
KEPT_CHUNKS = 2  # the one being read, and the one before: readers step back a little more often than far


class ObjectReader(io.RawIOBase):
    """The bytes of the object `info`, read-only and seekable; `label` names it in messages.

    The object is fetched in chunks of `chunk_bytes`, up to `in_flight` at a time when it is read forward, each pinned
    to the ETag in `info`. With `chunk_digests` (one SHA-256 per chunk) no byte is handed out before its whole chunk is
    checked. Without them `finish` checks the whole: by `sha256`, or else by the MD5 that the storage has of it, if it has
    one. At most `in_flight + 4` chunks are in memory.

    Belongs to one thread, never that of `loop`; only `close` may be called from another. Reading raises what the
    storage raises, `ArtifactMissing` when the object is replaced or removed meanwhile, and `DigestMismatch`.
    """

    def __init__(
        self,
        storage: Storage,
        info: ObjectInfo,
        *,
        loop: asyncio.AbstractEventLoop,
        chunk_bytes: int = CHUNK_BYTES,
        chunk_digests: Sequence[str] = (),
        sha256: str | None = None,
        label: str,
        in_flight: int = 3,
    ) -> None:
        self._storage = storage
        self._info = info
        self._loop = loop
        self._chunk_bytes = chunk_bytes
        self._chunk_digests = chunk_digests
        self._sha256 = sha256
        self._label = label
        self._in_flight = in_flight
        self._chunk_count = -(-info.size // chunk_bytes)
        self._position = 0
        self._latest = -1  # the chunk that was read last
        self._kept: dict[int, bytes] = {}
        self._fetching: dict[int, Future[bytes]] = {}
        self._guard = threading.Lock()  # `close` in another thread against a fetch that is just being started
        self._stopped = False
        self._stored_md5: str | None = None
        self._read_chunks = 0  # those that were read in order, so far
        # What every chunk was checked by need not be digested once more as a whole.
        self._whole = None if chunk_digests and sha256 is not None else _Whole(md5=sha256 is None)
        if chunk_digests and len(chunk_digests) != self._chunk_count:
            raise DigestMismatch(
                f"{label}: {info.size} bytes are {self._chunk_count} chunks, but {len(chunk_digests)} are recorded"
            )

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._position

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to `offset` bytes from the start, the position or the end; beyond the end there is nothing to read."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        if origin + offset < 0:
            raise ValueError(f"{self._label}: cannot seek to {origin + offset}")
        self._position = origin + offset
        return self._position

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        """Fill `buffer` up to the end of the present chunk; return how many bytes that were, 0 at the end."""
        if self._position >= self._info.size:
            return 0
        index, start = divmod(self._position, self._chunk_bytes)
        target = memoryview(buffer).cast("B")
        source = memoryview(self._chunk(index))[start : start + len(target)]
        target[: len(source)] = source
        self._position += len(source)
        return len(source)

    def finish(self) -> str:
        """Read whatever was not read yet, and return the SHA-256 of the whole, in hexadecimal.

        Raises `DigestMismatch` when it is not the `sha256` that was expected; `StorageUnavailable` when there was none, and
        the bytes are not those that the storage has.
        """
        while self._read_chunks < self._chunk_count:
            self._chunk(self._read_chunks)
        if self._whole is None:
            assert self._sha256 is not None
            return self._sha256
        found, md5 = self._whole.digests()
        if self._sha256 is not None and found != self._sha256:
            raise DigestMismatch(f"{self._label}: sha256 is {found}, expected {self._sha256}")
        if md5 is not None and self._stored_md5 not in (None, md5):
            raise StorageUnavailable(
                f"{self._label}: the bytes were altered on their way: their MD5 is {md5}, "
                f"the object's is {self._stored_md5}"
            )
        return found

    @override
    def close(self) -> None:
        """Cancel what is being fetched. A thread that waits for it gets `StorageUnavailable`."""
        with self._guard:
            self._stopped = True
            fetching = list(self._fetching.values())
        for future in fetching:
            future.cancel()
        if self._whole is not None:
            self._whole.close()
        super().close()

    def _chunk(self, index: int) -> bytes:
        """Return one chunk, checked; start fetching those that follow it when they are likely to be read."""
        body = self._kept.get(index)
        if body is None:
            forward = index == self._latest + 1
            self._fetch(range(index, index + (self._in_flight if forward else 1)))
            body = self._wait(index)
            if len(self._kept) == KEPT_CHUNKS:
                del self._kept[next(iter(self._kept))]
            self._kept[index] = body
            if forward:
                self._fetch(range(index + 1, index + 1 + self._in_flight))
        self._latest = index
        if index == self._read_chunks:
            if self._whole is not None:
                try:
                    self._whole.add(body)
                except RuntimeError as error:  # its thread has been let go
                    raise StorageUnavailable(f"{self._label}: closed while it was read") from error
            self._read_chunks += 1
        return body

    def _fetch(self, wanted: Iterable[int]) -> None:
        """Have exactly the `wanted` chunks on their way, apart from those that are here."""
        wanted = [index for index in wanted if index < self._chunk_count and index not in self._kept]
        with self._guard:
            if self._stopped:
                raise StorageUnavailable(f"{self._label}: closed while it was read")
            for index in [index for index in self._fetching if index not in wanted]:
                self._fetching.pop(index).cancel()
            for index in wanted:
                if index not in self._fetching:
                    self._fetching[index] = asyncio.run_coroutine_threadsafe(self._fetch_chunk(index), self._loop)

    def _wait(self, index: int) -> bytes:
        try:
            return self._fetching[index].result()
        except CancelledError as error:
            raise StorageUnavailable(f"{self._label}: closed while it was read") from error
        except (PreconditionFailed, ObjectNotFound) as error:
            raise ArtifactMissing(f"{self._label}: the object changed while it was read") from error
        finally:
            del self._fetching[index]

    async def _fetch_chunk(self, index: int) -> bytes:
        start = index * self._chunk_bytes
        span = range(start, min(start + self._chunk_bytes, self._info.size))
        stored = await self._storage.get(self._info.key, span=span, if_match=self._info.etag)
        body, self._stored_md5 = stored.body, stored.md5
        where = f"{self._label}: bytes {span.start} to {span.stop - 1}"
        if len(body) != len(span):
            raise DigestMismatch(f"{where}: expected {len(span)} bytes, got {len(body)}")
        if self._chunk_digests:
            found = await asyncio.to_thread(_sha256, body)  # neither the loop nor the reading thread waits for it
            if found != self._chunk_digests[index]:
                raise DigestMismatch(f"{where}: sha256 is {found}, expected {self._chunk_digests[index]}")
        return body


class _Whole:
    """The digests of a whole, computed in a thread of their own: whoever reads does not wait for them, but for the last."""

    def __init__(self, *, md5: bool) -> None:
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False) if md5 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._waiting: deque[Future[None]] = deque()

    def add(self, body: bytes) -> None:
        """Digest these bytes next. At most two pieces wait to be: each is kept in memory meanwhile."""
        while len(self._waiting) >= MAX_UNDIGESTED:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._update, body))

    def digests(self) -> tuple[str, str | None]:
        """Return SHA-256 and MD5 of all that was added, in hexadecimal."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._sha256.hexdigest(), self._md5.hexdigest() if self._md5 is not None else None

    def close(self) -> None:
        """Let the thread go, when it has digested what was added."""
        self._thread.shutdown(wait=False)

    def _update(self, body: bytes) -> None:
        self._sha256.update(body)
        if self._md5 is not None:
            self._md5.update(body)


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
