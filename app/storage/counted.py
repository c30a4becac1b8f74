"""A storage whose operations are counted: how they ended, and how many bytes of objects they moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from app.service_counters import Operation, ServiceCounters, StorageKind, outcome_of
from app.storage.base import ObjectInfo, Storage, StoredObject


class CountedStorage:
    """`inner`, with each operation counted as one of `kind`. What `inner` tries again by itself is one operation."""

    def __init__(self, inner: Storage, kind: StorageKind, counters: ServiceCounters) -> None:
        self._inner = inner
        self._kind = kind
        self._counters = counters

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
        with self._failures("get"):
            found = await self._inner.get(key, span=span, if_match=if_match, if_none_match=if_none_match)
        self._counters.stored(self._kind, "get", read=len(found.body))
        return found

    async def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> ObjectInfo:
        """Write the object whole: see `Storage.put`."""
        with self._failures("put"):
            info = await self._inner.put(key, body, if_match=if_match, if_absent=if_absent)
        self._counters.stored(self._kind, "put", written=len(body))
        return info

    async def head(self, key: str) -> ObjectInfo:
        """Return the object's size and ETag. Raises `ObjectNotFound`."""
        with self._failures("head"):
            info = await self._inner.head(key)
        self._counters.stored(self._kind, "head")
        return info

    async def list(self, prefix: str, *, recursive: bool = True) -> list[ObjectInfo]:
        """Return the objects below `prefix` in the order of their keys: see `Storage.list`."""
        with self._failures("list"):
            found = await self._inner.list(prefix, recursive=recursive)
        self._counters.stored(self._kind, "list")
        return found

    async def delete(self, key: str) -> None:
        """Remove the object. That there is none is no error."""
        with self._failures("delete"):
            await self._inner.delete(key)
        self._counters.stored(self._kind, "delete")

    @contextmanager
    def _failures(self, operation: Operation) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._counters.stored(self._kind, operation, outcome_of(error))
            raise
