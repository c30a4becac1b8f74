"""Objects as files in a directory: the same contract as a bucket, between processes too.

Names that begin with `.diskless` are the storage's own (a lock, files being written): no key has such a segment, and
no listing shows one. The lock is made by the first write, so a read-only directory can be read.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import io
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from app.errors import InvalidRange, NotModified, ObjectNotFound, PreconditionFailed, StorageDenied, StorageUnavailable
from app.storage.base import ObjectInfo, StoredObject

OWN = ".diskless"
SETTLED_NANOSECONDS = 2_000_000_000  # a file changed longer ago than this cannot change again within its own time stamp


class LocalStorage:
    """Objects in the directory `root`, which the first write creates. An ETag is the content's SHA-256."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._etags: dict[Path, tuple[tuple[int, int, int], str]] = {}  # by inode, mtime in ns, size in bytes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def describe(self) -> str:
        """Return where the directory is."""
        return f"directory {self.root}"

    async def get(
        self, key: str, *, span: range | None = None, if_match: str | None = None, if_none_match: str | None = None
    ) -> StoredObject:
        """Return the object, or the bytes of it in `span`: see `Storage.get`."""
        if span is not None and (not span or span.step != 1):
            raise ValueError(f"expected a span of at least one byte and of step 1, got {span}")
        return await asyncio.to_thread(self._get, key, span, if_match, if_none_match)

    async def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> ObjectInfo:
        """Write the object whole, and to the disk: see `Storage.put`."""
        return await asyncio.to_thread(self._put, key, body, if_match, if_absent)

    async def head(self, key: str) -> ObjectInfo:
        """Return the object's size and ETag. Raises `ObjectNotFound`."""
        return await asyncio.to_thread(self.look, key)

    async def list(self, prefix: str, *, recursive: bool = True) -> list[ObjectInfo]:
        """Return the objects below `prefix` in the order of their keys: see `Storage.list`.

        A link to a file inside the directory is an object; a link to a directory is not looked into.
        """
        return sorted(await asyncio.to_thread(self._list, prefix, recursive), key=lambda info: info.key)

    async def delete(self, key: str) -> None:
        """Remove the object. That there is none is no error."""
        await asyncio.to_thread(self._delete, key)

    def path(self, key: str) -> Path:
        """Return the file of `key`. Raises `StorageDenied` when it would lie outside `root`, or is the storage's own."""
        parts = key.split("/")
        if "\0" in key or any(part in ("", ".", "..") or part.startswith(OWN) for part in parts):
            raise StorageDenied(f"{key!r} is no key: expected names separated by '/', none of them '.', '..' or {OWN}*")
        path = self.root.joinpath(*parts)
        if not self._holds(path):
            raise StorageDenied(f"{key} leads out of {self.root} through a symbolic link")
        return path

    def _holds(self, path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError):  # links in a circle
            return False

    def _get(self, key: str, span: range | None, if_match: str | None, if_none_match: str | None) -> StoredObject:
        path = self.path(key)
        with _translated(f"read {path}"), path.open("rb") as file:
            info = self._describe(key, path, file)
            if if_match not in (None, info.etag):
                raise PreconditionFailed(f"{path} has changed: expected ETag {if_match}, found {info.etag}")
            if if_none_match == info.etag:
                raise NotModified(f"{path} still has ETag {info.etag}")
            wanted = range(info.size) if span is None else range(span.start, min(span.stop, info.size))
            if span is not None and span.start >= info.size:
                raise InvalidRange(f"{path} has {info.size} bytes, asked for those from {span.start}")
            file.seek(wanted.start)
            body = file.read(len(wanted))
        if len(body) != len(wanted):
            raise StorageUnavailable(f"{path} changed while it was read: expected {len(wanted)} bytes, got {len(body)}")
        return StoredObject(info, body)

    def look(self, key: str) -> ObjectInfo:
        """Return what `head` does. It blocks: for threads."""
        path = self.path(key)
        with _translated(f"read {path}"), path.open("rb") as file:
            return self._describe(key, path, file)

    def _describe(self, key: str, path: Path, file: io.BufferedReader) -> ObjectInfo:
        status = os.fstat(file.fileno())
        identity = (status.st_ino, status.st_mtime_ns, status.st_size)
        known, etag = self._etags.get(path, (None, ""))
        if known != identity:
            etag = hashlib.file_digest(file, "sha256").hexdigest()
            if time.time_ns() - status.st_mtime_ns > SETTLED_NANOSECONDS:
                self._etags[path] = (identity, etag)
        return ObjectInfo(key, status.st_size, etag)

    def _put(self, key: str, body: bytes, if_match: str | None, if_absent: bool) -> ObjectInfo:
        path = self.path(key)
        with _translated(f"write {path}", writing=True):
            temporary = _write_temporary(path, body)
            try:
                with self._locked():
                    self._require(key, path, if_match, if_absent)
                    move_into_place(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return ObjectInfo(key, len(body), hashlib.sha256(body).hexdigest())

    def _require(self, key: str, path: Path, if_match: str | None, if_absent: bool) -> None:
        if if_absent and path.exists():
            raise PreconditionFailed(f"{path} exists already")
        if if_match is None:
            return
        try:
            found = self.look(key).etag
        except ObjectNotFound as error:
            raise PreconditionFailed(f"{path} is not there, expected ETag {if_match}") from error
        if found != if_match:
            raise PreconditionFailed(f"{path} has changed: expected ETag {if_match}, found {found}")

    def _list(self, prefix: str, recursive: bool) -> Sequence[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        found = []
        with _translated(f"list {self.root}"):
            for key in self._keys(self.path(folder) if folder else self.root, folder, prefix, recursive):
                try:
                    found.append(self.look(key))
                except ObjectNotFound:  # removed since
                    continue
        return found

    def _keys(self, directory: Path, folder: str, prefix: str, recursive: bool) -> Iterator[str]:
        try:
            entries = list(os.scandir(directory))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(OWN) or not key.startswith(prefix):
                continue
            if entry.is_dir(follow_symlinks=False):
                if recursive:
                    yield from self._keys(Path(entry.path), key, prefix, recursive)
            elif (not entry.is_symlink() or self._holds(Path(entry.path))) and entry.is_file():
                yield key

    def _delete(self, key: str) -> None:
        path = self.path(key)
        with _translated(f"delete {path}", writing=True):
            if path.exists():  # or else a lock would be written for nothing
                with self._locked():
                    path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude every other writer of this directory, in this process and in others."""
        lock = self.root / OWN / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
            yield


def write_atomically(path: Path, body: bytes) -> None:
    """Write `body` to `path` and the disk: a reader, or a machine that stops, sees the old bytes or the new."""
    temporary = _write_temporary(path, body)
    try:
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a file whose bytes are on the disk to `path`, and see that the new name is on the disk too."""
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_temporary(path: Path, body: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{OWN}-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


@contextmanager
def _translated(what: str, *, writing: bool = False) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        if writing:
            raise StorageDenied(f"cannot {what}: a file and a directory would have the same name") from error
        raise ObjectNotFound(f"cannot {what}: there is no such file") from error
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        raise (StorageDenied if denied else StorageUnavailable)(f"cannot {what}: {error.strerror}") from error
