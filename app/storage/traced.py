"""A storage whose operations are written down in the journal of the look that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, override

from app.service_counters import Operation
from app.spans import Journal
from app.storage.base import Storage
from app.storage.observed import ObservedStorage, Seen


class TracedStorage(ObservedStorage):
    """`inner`, with each operation written down as one of `kind`."""

    def __init__(self, inner: Storage, kind: Literal["r2", "local"], journal: Journal) -> None:
        super().__init__(inner)
        self._kind = kind
        self._journal = journal

    @override
    @contextmanager
    def _observe(self, operation: Operation, key: str, *, written: int = 0) -> Iterator[Seen]:
        known = {"bytes": written} if operation == "put" else {}
        with self._journal.operation(f"storage {operation}", storage=self._kind, object=key, **known) as step:
            seen = Seen(written=written)
            yield seen
            if operation == "get":
                step.attributes["diskless.bytes"] = seen.read
            if seen.objects is not None:
                step.attributes["diskless.objects"] = seen.objects
