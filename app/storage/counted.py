"""A storage whose operations are counted: how they ended, and how many bytes of objects they moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import override

from app.service_counters import Operation, ServiceCounters, StorageKind, outcome_of
from app.storage.base import Storage
from app.storage.observed import ObservedStorage, Seen


class CountedStorage(ObservedStorage):
    """`inner`, with each operation counted as one of `kind`."""

    def __init__(self, inner: Storage, kind: StorageKind, counters: ServiceCounters) -> None:
        super().__init__(inner)
        self._kind = kind
        self._counters = counters

    @override
    @contextmanager
    def _observe(self, operation: Operation, key: str, *, written: int = 0) -> Iterator[Seen]:
        seen = Seen(written=written)
        try:
            yield seen
        except BaseException as error:
            self._counters.stored(self._kind, operation, outcome_of(error))
            raise
        self._counters.stored(self._kind, operation, read=seen.read, written=seen.written)
