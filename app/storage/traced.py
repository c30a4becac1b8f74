"""A storage whose operations are written down in the journal of the look that they belong to."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, Self

from app.spans import Journal
from app.storage.base import ObjectInfo, Storage, StoredObject


class TracedStorage:
    """`inner`, with each operation written down as one of `kind`. What `inner` tries again by itself is one operation."""

    def __init__(self, inner: Storage, kind: Literal["r2", "local"], journal: Journal) -> None:
        self._inner = inner
        self._kind = kind
        self._journal = journal

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._inner.__aexit__(kind, error, trace)

    def describe(self) -> str:
        """Return where this is, for a person; no secret is in it."""
        return self._inner.describe()

    async def get(
        self, key: str, *, span: range | None = None, if_match: str | None = None, if_none_match: str | None = None
    ) -> StoredObject:
        """Return the object, or the bytes of it in `span`: see `Storage.get`."""
        with self._journal.operation("storage get", storage=self._kind, object=key) as step:
            found = await self._inner.get(key, span=span, if_match=if_match, if_none_match=if_none_match)
            step.attributes["diskless.bytes"] = len(found.body)
            return found

    async def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> ObjectInfo:
        """Write the object whole: see `Storage.put`."""
        with self._journal.operation("storage put", storage=self._kind, object=key, bytes=len(body)):
            return await self._inner.put(key, body, if_match=if_match, if_absent=if_absent)

    async def head(self, key: str) -> ObjectInfo:
        """Return the object's size and ETag. Raises `ObjectNotFound`."""
        with self._journal.operation("storage head", storage=self._kind, object=key):
            return await self._inner.head(key)

    async def list(self, prefix: str, *, recursive: bool = True) -> list[ObjectInfo]:
        """Return the objects below `prefix` in the order of their keys: see `Storage.list`."""
        with self._journal.operation("storage list", storage=self._kind, object=prefix) as step:
            found = await self._inner.list(prefix, recursive=recursive)
            step.attributes["diskless.objects"] = len(found)
            return found

    async def delete(self, key: str) -> None:
        """Remove the object. That there is none is no error."""
        with self._journal.operation("storage delete", storage=self._kind, object=key):
            await self._inner.delete(key)
