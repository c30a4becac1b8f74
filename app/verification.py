"""Whether what a bucket holds would serve: every object there, the bytes as recorded, loaded, the golden rows come out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from app.errors import BundleError, InvalidIndex, StorageError
from app.memory import trim_heap
from app.model_storage import ModelStorageManager, Wanted, load_checked
from app.names import ModelRef


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one version (or of the index); `problem` is None when it would serve.

    `kind` is the name of the problem's class in `app.errors`, where it has one. `unread`: the storage failed, which says
    nothing of the version. `runtime` is what was loaded and ran the golden rows: `sklearn`, `compiled` or both.
    """

    ref: str
    problem: str | None
    golden_rows: int = 0
    parity: float | None = None
    bare: bool = False
    kind: str | None = None
    unread: bool = False
    runtime: str | None = None


async def verify(manager: ModelStorageManager, names: Sequence[str] = ()) -> AsyncIterator[Verdict]:
    """Load every version of `names` (of all models, without any), one after the other, and yield what was found.

    Raises `StorageError` when the bucket cannot be read: that says nothing of what is in it.
    """
    try:
        catalogue = await manager.catalogue()
    except InvalidIndex as error:
        yield Verdict("index.json", str(error))
        return
    wanted = [
        Wanted(ModelRef(name, version), (), manifest_sha256=entry.manifest_sha256)
        for name, model in catalogue.index.models.items()
        for version, entry in model.versions.items()
    ]
    wanted += [bare for bare in catalogue.wanted.values() if bare.bare]
    known = {item.ref.name for item in wanted}
    for name in names:
        if name not in known:
            yield Verdict(name, f"there is no such model; there is {', '.join(sorted(known)) or 'nothing'}")
    for item in wanted:
        if not names or item.ref.name in names:
            yield await _verdict(manager, item)
            await asyncio.to_thread(trim_heap)  # the next one needs the room


async def _verdict(manager: ModelStorageManager, wanted: Wanted) -> Verdict:
    try:
        with await manager.fetch(wanted, runtime="every") as bundle:
            checked = await asyncio.to_thread(load_checked, bundle)
    except (BundleError, StorageError) as error:  # one version must not keep the others from being looked at
        unread = isinstance(error, StorageError)
        return Verdict(str(wanted.ref), str(error), bare=wanted.bare, kind=type(error).__name__, unread=unread)
    golden = checked.model.golden
    rows = len(golden.instances) if golden else 0
    return Verdict(
        str(wanted.ref),
        None,
        golden_rows=rows,
        parity=checked.parity,
        bare=wanted.bare,
        runtime=checked.model.runtime,
    )
