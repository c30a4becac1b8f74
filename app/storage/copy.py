"""A bucket with a copy in a local directory: what is read is copied, and the copy answers when the bucket does not.

Beside each copied object, `.diskless/copies/` has a record of which bucket and ETag it came from and of its SHA-256, or
that the bucket had no such object; `.diskless/listings/` has the latest listings. A copy whose bytes differ from its
record is as good as none. The record is written before the bytes, so that a process
that stops between the two leaves a copy that is not used, never one that is wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from app.errors import (
    NotModified,
    ObjectNotFound,
    PreconditionFailed,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from app.service_counters import ServiceCounters, outcome_of
from app.storage.base import ObjectInfo, Storage, StoredObject
from app.storage.counted import CountedStorage
from app.storage.local import OWN, LocalStorage, move_into_place, write_atomically

ABANDONED_SECONDS = 24 * 3600

_NO_COPY = (ObjectNotFound, PreconditionFailed, StorageDenied, StorageUnavailable)
_logger = logging.getLogger("diskless.storage")


@dataclass(frozen=True, slots=True)
class _Record:
    """Where a copy came from, and what its bytes must be. Without an ETag: the remote had no such object."""

    key: str
    source: str
    etag: str
    sha256: str
    size: int

    @property
    def absent(self) -> bool:
        return not self.etag


@dataclass(slots=True)
class _Partial:
    """A copy that arrives in pieces; `arrived` are the spans that are there, none touching another."""

    etag: str
    path: Path
    arrived: list[range] = field(default_factory=list)


class _Absent(ObjectNotFound):
    """The remote had no such object when it was asked last."""


class CopyingStorage:
    """`remote`, with a copy of what was read or written through it in `local`.

    With `read_copy`, the copy answers when the remote is unavailable, and a span of an object whose ETag the caller
    knows comes from the copy without a request. Without, the copy is only written. Copying never makes a read fail.

    `counters` are told what is read from the copy and written to it; what is asked of the remote, that may count itself.
    """

    def __init__(
        self, remote: Storage, local: LocalStorage, *, read_copy: bool, counters: ServiceCounters | None = None
    ) -> None:
        self._remote = remote
        self._local = local
        self._counters = counters
        self._copies: Storage = local if counters is None else CountedStorage(local, "copy", counters)
        self._read_copy = read_copy
        self._own = local.root / OWN
        self._source = remote.describe()
        self._partials: dict[str, _Partial] = {}
        self._writing = asyncio.Lock()
        self._warned = False
        self._fallback_reason: str | None = None
        self._opened = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._opened.enter_async_context(self._remote)
        await self._opened.enter_async_context(self._local)
        await asyncio.to_thread(self._remove_abandoned)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for partial in self._partials.values():
            partial.path.unlink(missing_ok=True)
        self._partials.clear()
        await self._opened.aclose()

    @property
    def fallback_reason(self) -> str | None:
        """Since when (UTC) and why the copy answers; None when the remote answered last."""
        return self._fallback_reason

    def describe(self) -> str:
        """Return where the objects are, and where their copies."""
        return f"{self._source}, copied to {self._local.root}"

    async def get(
        self, key: str, *, span: range | None = None, if_match: str | None = None, if_none_match: str | None = None
    ) -> StoredObject:
        """Return the object, or the bytes of it in `span`: see `Storage.get`. ETags are the remote's, copied or not."""
        if self._read_copy and span is not None and if_match is not None:
            with suppress(*_NO_COPY):
                return await self._get_copy(key, span, if_match)
        try:
            found = await self._ask(self._remote.get(key, span=span, if_match=if_match, if_none_match=if_none_match))
        except ObjectNotFound:
            await self._keep(lambda: self._note_absence(key))
            raise
        except StorageUnavailable as unavailable:
            if not self._read_copy:
                raise
            try:
                found = await self._get_copy(key, span, if_match)
            except _Absent as absent:
                raise ObjectNotFound(str(absent)) from unavailable
            except _NO_COPY:
                raise unavailable from None
            if found.info.etag == if_none_match:
                raise NotModified(f"the copy of {key} still has ETag {if_none_match}") from unavailable
            return found
        if span is None:
            await self._keep(lambda: self._write(found.info, found.body))
        else:
            await self._keep(lambda: self._gather(found, span.start))
        return found

    async def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> ObjectInfo:
        """Write the object to the remote, then to the copy: see `Storage.put`."""
        info = await self._ask(self._remote.put(key, body, if_match=if_match, if_absent=if_absent))
        await self._keep(lambda: self._write(info, body))
        return info

    async def head(self, key: str) -> ObjectInfo:
        """Return the object's size and ETag. Raises `ObjectNotFound`."""
        try:
            return await self._ask(self._remote.head(key))
        except StorageUnavailable as unavailable:
            if self._read_copy and (copied := await asyncio.to_thread(self._copied, [key])):
                return copied[0]
            raise unavailable

    async def list(self, prefix: str, *, recursive: bool = True) -> list[ObjectInfo]:
        """Return the objects below `prefix`: see `Storage.list`.

        Without the remote: what it listed last, copied or not, so that nobody takes what has no copy for gone. Where it
        was never asked, those whose copy is intact.
        """
        try:
            found = await self._ask(self._remote.list(prefix, recursive=recursive))
        except StorageUnavailable:
            if not self._read_copy:
                raise
            listed = await asyncio.to_thread(self._read_listing, prefix, recursive)
            if listed is not None:
                return [*listed]
            there = await self._copies.list(prefix, recursive=recursive)
            return [*await asyncio.to_thread(self._copied, [info.key for info in there])]
        await self._keep(lambda: self._write_listing(prefix, recursive, found))
        return found

    async def delete(self, key: str) -> None:
        """Remove the object, then its copy. That there is none is no error."""
        await self._ask(self._remote.delete(key))
        await self._keep(lambda: self._remove(key))

    async def _ask[T](self, call: Awaitable[T]) -> T:
        try:
            answer = await call
        except StorageUnavailable as error:
            if self._read_copy and self._fallback_reason is None:
                self._fallback_reason = f"since {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}: {error}"
            raise
        except StorageError:
            self._fallback_reason = None  # a refusal is an answer too
            raise
        self._fallback_reason = None
        return answer

    async def _get_copy(self, key: str, span: range | None, etag: str | None) -> StoredObject:
        record = await asyncio.to_thread(self._record, key)
        if record is not None and record.absent:
            raise _Absent(f"{self._source} had no {key} when it was asked last")
        if record is None or etag not in (None, record.etag):
            raise ObjectNotFound(f"{self._local.root} has no copy of {key} with that ETag")
        found = await self._copies.get(key, span=span, if_match=record.sha256)
        return StoredObject(replace(found.info, etag=record.etag), found.body)

    async def _keep(self, write: Callable[[], int]) -> None:
        """Run `write` in a thread, one at a time; it returns how many bytes of the object it has written, if any.

        What goes wrong is logged once, and no more than that.
        """
        try:
            async with self._writing:
                written = await asyncio.to_thread(write)
            if self._counters is not None and written:  # here: a thread must not count beside the event loop
                self._counters.stored("copy", "put", written=written)
        except (OSError, StorageError) as error:
            if self._counters is not None:
                self._counters.stored("copy", "put", outcome_of(error))
            if not self._warned:
                self._warned = True
                _logger.warning("the local copy in %s is not complete: %s", self._local.root, error)

    # What follows runs in threads.

    def _copied(self, keys: Iterable[str]) -> Sequence[ObjectInfo]:
        copied = []
        for key in keys:
            record = self._record(key)
            if record and not record.absent and self._digest_of(key) == record.sha256:
                copied.append(ObjectInfo(key, record.size, record.etag))
        return copied

    def _listing_path(self, prefix: str, recursive: bool) -> Path:
        name = json.dumps([self._source, prefix, recursive])
        return self._own / "listings" / f"{hashlib.sha256(name.encode()).hexdigest()}.json"

    def _read_listing(self, prefix: str, recursive: bool) -> Sequence[ObjectInfo] | None:
        try:
            return [ObjectInfo(**item) for item in json.loads(self._listing_path(prefix, recursive).read_bytes())]
        except (OSError, ValueError, TypeError):
            return None

    def _write_listing(self, prefix: str, recursive: bool, found: Sequence[ObjectInfo]) -> int:
        if self._read_listing(prefix, recursive) != found:
            body = json.dumps([asdict(info) for info in found]).encode()
            write_atomically(self._listing_path(prefix, recursive), body)
        return 0

    def _note_absence(self, key: str) -> int:
        record = _Record(key, self._source, "", "", 0)
        if self._record(key) != record:
            self._remove(key)
            write_atomically(self._record_path(key), json.dumps(asdict(record)).encode())
        return 0

    def _record_path(self, key: str) -> Path:
        return self._own / "copies" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _record(self, key: str) -> _Record | None:
        """Return the record of a copy of this remote's object, if there is one."""
        try:
            record = _Record(**json.loads(self._record_path(key).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return record if (record.key, record.source) == (key, self._source) else None

    def _is_ours(self, key: str) -> bool:
        """Whether a file was put there as a copy, of whichever remote, and not by somebody else."""
        try:
            return bool(json.loads(self._record_path(key).read_bytes()).get("etag"))
        except OSError:
            return False
        except (ValueError, AttributeError):  # a record that was damaged is a record
            return True

    def _digest_of(self, key: str) -> str | None:
        try:
            return self._local.look(key).etag
        except StorageError:
            return None

    def _write(self, info: ObjectInfo, body: bytes) -> int:
        md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
        placed = self._place(info, hashlib.sha256(body).hexdigest(), md5, lambda path: write_atomically(path, body))
        return len(body) if placed else 0

    def _place(self, info: ObjectInfo, sha256: str, md5: str, place: Callable[[Path], None]) -> bool:
        """Record the copy, then let `place` put its bytes where they belong; return whether that was needed."""
        if {32: md5, 64: sha256}.get(len(info.etag), info.etag) != info.etag:
            raise StorageUnavailable(f"the bytes of {info.key} that came do not have its ETag {info.etag}")
        path = self._local.path(info.key)
        record = _Record(info.key, self._source, info.etag, sha256, info.size)
        there = self._digest_of(info.key)
        if there == sha256 and self._record(info.key) == record:
            return False
        if there not in (None, sha256) and not self._is_ours(info.key):
            raise StorageDenied(f"{path} was not copied by Diskless, so it is left as it is")
        write_atomically(self._record_path(info.key), json.dumps(asdict(record)).encode())
        if there != sha256:
            place(path)
        return there != sha256

    def _gather(self, piece: StoredObject, start: int) -> int:
        """Write one piece of an object; when it was the last one missing, the file becomes the copy."""
        info = piece.info
        partial = self._partials.get(info.key)
        if partial is None or partial.etag != info.etag:
            if partial:
                partial.path.unlink(missing_ok=True)
            partial = _Partial(info.etag, self._own / "partial" / secrets.token_hex(8))
            self._partials[info.key] = partial
        try:
            partial.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial.path, os.O_RDWR | os.O_CREAT, 0o666)
            with open(descriptor, "r+b") as file:
                file.seek(start)
                file.write(piece.body)
                partial.arrived = _joined(partial.arrived, range(start, start + len(piece.body)))
                if partial.arrived != [range(info.size)]:
                    return len(piece.body)
                file.flush()
                os.fsync(file.fileno())
                sha256, md5 = _digest(file, "sha256"), _digest(file, "md5")
            self._place(info, sha256, md5, lambda path: _move(partial.path, path))
        except (OSError, StorageError):
            self._forget(info.key)
            raise
        self._forget(info.key)
        return len(piece.body)

    def _forget(self, key: str) -> None:
        self._partials.pop(key).path.unlink(missing_ok=True)

    def _remove(self, key: str) -> int:
        if self._is_ours(key):
            self._local.path(key).unlink(missing_ok=True)
            self._record_path(key).unlink(missing_ok=True)
        return 0

    def _remove_abandoned(self) -> None:
        with suppress(OSError):  # of processes that were killed
            for path in (self._own / "partial").iterdir():
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)


def _joined(spans: list[range], new: range) -> list[range]:
    apart = [span for span in spans if span.stop < new.start or new.stop < span.start]
    touching = [span for span in spans if span not in apart]
    start = min([new.start, *(span.start for span in touching)])
    return [*apart, range(start, max([new.stop, *(span.stop for span in touching)]))]


def _digest(file: io.BufferedRandom, algorithm: str) -> str:
    file.seek(0)
    return hashlib.file_digest(file, algorithm).hexdigest()


def _move(temporary: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    move_into_place(temporary, path)
