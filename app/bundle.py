"""One version of a model, found and ready to be read: where its parts lie, and the streams of their bytes.

A bundle is made on the event loop by `ModelStorageManager.fetch`; its streams are read by the thread that loads the model.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from app import memory
from app.errors import StorageUnavailable
from app.manifest import COMPILED, Artifact, Manifest
from app.names import ModelRef
from app.storage.base import ObjectInfo, Storage
from app.storage.reader import ObjectReader
from app.trust import Trust


@dataclass(frozen=True, slots=True)
class Part:
    """One object of a bundle; `artifact` has the digests that its bytes must have, None for a bare model.

    `head` is the first few of its bytes, where they are needed to tell how it is compressed.
    """

    role: str
    format: str
    info: ObjectInfo
    artifact: Artifact | None = None
    head: bytes = b""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The parts of one version, the companions first in the order in which they are applied, the model last.

    A compiled form is one of the parts, the very last, where it is to be read; where the model is not among them, it does
    without scikit-learn. `compiles`: it has none, and one may be made as it is loaded. `not_compiled` is why it has none.

    `sealed_by` is whose seal was found right; `warnings` is what is worth telling before it is loaded.

    Leaving its `with` block ends the reading: a thread that is still at it gets an error instead of waiting for ever.
    """

    ref: ModelRef
    parts: tuple[Part, ...]
    storage: Storage
    loop: asyncio.AbstractEventLoop
    manifest: Manifest | None = None
    manifest_sha256: str | None = None
    trust: Trust = field(default_factory=Trust)
    sealed_by: str | None = None
    warnings: tuple[str, ...] = ()
    compiles: bool = False
    not_compiled: str | None = None
    _streams: _Streams = field(default_factory=lambda: _Streams(), init=False, repr=False, compare=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._streams.close()

    @property
    def size(self) -> int:
        """All parts together, in bytes."""
        return sum(part.info.size for part in self.parts)

    @property
    def needs_sklearn(self) -> bool:
        """Whether a fitted object is among the parts."""
        return any(part.role == "model" for part in self.parts)

    @property
    def recorded(self) -> memory.Taken | None:
        """What its publisher measured a load of these parts to take; None unless all of it was measured."""
        if self.manifest is None:
            return None
        measured = [self.manifest.memory] if self.needs_sklearn else []
        if self.manifest.compiled is not None and any(part.role == COMPILED for part in self.parts):
            measured.append(self.manifest.compiled.memory)
        known = [taken for taken in measured if taken is not None]
        if len(known) < len(measured):
            return None
        resident, peak = 0, 0
        for taken in known:  # one after the other
            peak = max(peak, resident + taken.peak_bytes)
            resident += taken.resident_bytes
        return memory.Taken(resident, peak)

    @property
    def stored(self) -> list[memory.Stored]:
        """How the parts are stored, for an estimate of what loading them takes."""
        return [memory.Stored(part.format, part.info.size, part.head) for part in self.parts]

    def open(self, part: Part) -> ObjectReader:
        """Return the stream of a part's bytes, for a thread other than the event loop's. Close it after use.

        Raises `StorageUnavailable` when the bundle has been closed.
        """
        digests: dict[str, Any] = {}
        if part.artifact is not None:
            digests = {"sha256": part.artifact.sha256}
            if part.artifact.chunks:
                digests |= {"chunk_digests": part.artifact.chunks, "chunk_bytes": part.artifact.chunk_bytes}
        label = f"{self.ref} {part.info.key.rpartition('/')[2]}"
        return self._streams.add(ObjectReader(self.storage, part.info, loop=self.loop, label=label, **digests))


class _Streams:
    """The stream that was opened last (the others are done with), until everything is closed."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # the loading thread opens, the event loop's closes
        self._latest: ObjectReader | None = None
        self._closed = False

    def add(self, stream: ObjectReader) -> ObjectReader:
        with self._guard:
            if self._closed:
                stream.close()
                raise StorageUnavailable("closed while it was read")
            self._latest = stream
            return stream

    def close(self) -> None:
        with self._guard:
            self._closed = True
            if self._latest is not None:
                self._latest.close()
                self._latest = None
