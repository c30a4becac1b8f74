"""A storage that lets somebody see what is asked of it: what storages that count or write down have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from app.service_counters import Operation
from app.storage.base import ObjectInfo, Storage, StoredObject


@dataclass(slots=True)
class Seen:
    """What an operation has moved: bytes of objects, and for a listing how many objects there are."""

    read: int = 0
    written: int = 0
    objects: int | None = None


class ObservedStorage:
    """`inner`, with each operation inside of what `_observe` returns. What `inner` tries again by itself is one operation."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner

    def _observe(self, operation: Operation, key: str, *, written: int = 0) -> AbstractContextManager[Seen]:
        """Return what surrounds an operation on a key, or on a prefix; what it gives is complete when the operation went well."""
        raise NotImplementedError

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
        with self._observe("get", key) as seen:
            found = await self._inner.get(key, span=span, if_match=if_match, if_none_match=if_none_match)
            seen.read = len(found.body)
        return found

    async def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> ObjectInfo:
        """Write the object whole: see `Storage.put`."""
        with self._observe("put", key, written=len(body)):
            return await self._inner.put(key, body, if_match=if_match, if_absent=if_absent)

    async def head(self, key: str) -> ObjectInfo:
        """Return the object's size and ETag. Raises `ObjectNotFound`."""
        with self._observe("head", key):
            return await self._inner.head(key)

    async def list(self, prefix: str, *, recursive: bool = True) -> list[ObjectInfo]:
        """Return the objects below `prefix` in the order of their keys: see `Storage.list`."""
        with self._observe("list", prefix) as seen:
            found = await self._inner.list(prefix, recursive=recursive)
            seen.objects = len(found)
        return found

    async def delete(self, key: str) -> None:
        """Remove the object. That there is none is no error."""
        with self._observe("delete", key):
            await self._inner.delete(key)
