"""What Diskless asks of a place that keeps bytes by key: the contract that every storage passes the same tests for."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object's key, its whole size in bytes, and its ETag (without quotes). An ETag is compared, never interpreted."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What one read returned: the whole object's `info`, and `body`, all of its bytes or the span asked for.

    `md5` is that of the whole object, where the place knows it.
    """

    info: ObjectInfo
    body: bytes
    md5: str | None = None


class Storage(Protocol):
    """Bytes by key. Keys are relative, `/`-separated, without `.` or `..` segments.

    Every call may raise `StorageDenied` and `StorageUnavailable` as well as what it names.
    An instance belongs to the event loop it was entered in.
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def describe(self) -> str:
        """Return where this is, for a person; no secret is in it."""
        ...

    async def get(
        self, key: str, *, span: range | None = None, if_match: str | None = None, if_none_match: str | None = None
    ) -> StoredObject:
        """Return the object, or the bytes `span.start` up to `span.stop` of it (fewer where the object ends before).

        Raises `ObjectNotFound`; `NotModified` when the object still has the ETag `if_none_match`; `PreconditionFailed`
        when it has not the ETag `if_match`; `InvalidRange` when `span` begins at or beyond its end.
        """
        ...

    async def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> ObjectInfo:
        """Write the object whole; a reader sees the old bytes or the new. Give at most one of the two conditions.

        Raises `PreconditionFailed` when it has not the ETag `if_match`, or exists although `if_absent`.
        """
        ...

    async def head(self, key: str) -> ObjectInfo:
        """Return the object's size and ETag. Raises `ObjectNotFound`."""
        ...

    async def list(self, prefix: str, *, recursive: bool = True) -> list[ObjectInfo]:
        """Return the objects whose keys begin with `prefix`, in the order of their keys.

        Without `recursive`, only those with no further `/` behind the prefix.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove the object. That there is none is no error."""
        ...
