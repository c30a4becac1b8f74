"""What is counted of a storage: operations by how they ended, and the bytes of objects that they moved."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from app.errors import (
    InvalidRange,
    NotModified,
    ObjectNotFound,
    PreconditionFailed,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from app.service_counters import ServiceCounters
from app.storage.copy import CopyingStorage
from app.storage.counted import CountedStorage
from app.storage.local import LocalStorage
from app.storage.reader import ObjectReader
from tests.repository import Watched

BODY = bytes(range(256)) * 40


@pytest.fixture
def counters():
    return ServiceCounters()


@pytest.fixture
def inner(tmp_path):
    return Watched(LocalStorage(tmp_path / "bucket"))


@pytest.fixture
def storage(inner, counters):
    return CountedStorage(inner, "r2", counters)


def done(counters: ServiceCounters) -> dict[tuple[str, ...], int]:
    return {labels: count for labels, count in counters.operations.items() if count}


def moved(counters: ServiceCounters) -> dict[tuple[str, ...], int]:
    return {labels: count for labels, count in counters.bytes_moved.items() if count}


async def test_operations_are_counted_with_the_bytes_that_they_move(storage, counters):
    info = await storage.put("a", BODY)
    await storage.put("b", b"12345")
    await storage.get("a")
    await storage.get("a", span=range(100, 150))
    await storage.get("a", span=range(len(BODY) - 3, len(BODY) + 100), if_match=info.etag)
    await storage.head("a")
    await storage.list("")
    await storage.delete("b")

    assert done(counters) == {
        ("r2", "put", "ok"): 2,
        ("r2", "get", "ok"): 3,
        ("r2", "head", "ok"): 1,
        ("r2", "list", "ok"): 1,
        ("r2", "delete", "ok"): 1,
    }
    assert moved(counters) == {("r2", "written"): len(BODY) + 5, ("r2", "read"): len(BODY) + 50 + 3}


async def test_what_does_not_end_well_is_counted_by_how_it_ended_and_moves_nothing(storage, inner, counters):
    info = await storage.put("a", BODY)
    for raised, call in [
        (NotModified, storage.get("a", if_none_match=info.etag)),
        (ObjectNotFound, storage.get("b")),
        (ObjectNotFound, storage.head("b")),
        (PreconditionFailed, storage.get("a", if_match="other")),
        (PreconditionFailed, storage.put("a", b"", if_absent=True)),
        (InvalidRange, storage.get("a", span=range(100_000, 100_001))),
    ]:
        with pytest.raises(raised):
            await call
    for error in (StorageDenied("no"), StorageUnavailable("later"), RuntimeError("a fault of ours")):
        inner.fail(error, "list")
        with pytest.raises(type(error)):
            await storage.list("")

    assert done(counters) == {
        ("r2", "put", "ok"): 1,
        ("r2", "get", "not_modified"): 1,
        ("r2", "get", "not_found"): 1,
        ("r2", "head", "not_found"): 1,
        ("r2", "get", "precondition_failed"): 1,
        ("r2", "put", "precondition_failed"): 1,
        ("r2", "get", "invalid_range"): 1,
        ("r2", "list", "denied"): 1,
        ("r2", "list", "unavailable"): 1,
        ("r2", "list", "other"): 1,
    }
    assert moved(counters) == {("r2", "written"): len(BODY)}


async def test_what_is_given_up_is_counted_too(storage, inner, counters):
    arrived, _ = inner.hold("get", "a")
    reading = asyncio.create_task(storage.get("a"))
    await arrived.wait()
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading

    assert done(counters) == {("r2", "get", "cancelled"): 1}


async def test_a_stream_of_an_object_is_counted_chunk_by_chunk(storage, counters):
    info = await storage.put("a", BODY)
    reader = ObjectReader(storage, info, loop=asyncio.get_running_loop(), chunk_bytes=1000, label="a")

    def read() -> bytes:
        with reader:
            body = reader.read()
            reader.finish()
            return body

    assert await asyncio.to_thread(read) == BODY
    assert done(counters)["r2", "get", "ok"] == -(-len(BODY) // 1000)
    assert moved(counters)["r2", "read"] == len(BODY)


@pytest.mark.parametrize("read_copy", [True, False])
async def test_a_copy_is_counted_apart_from_what_it_is_a_copy_of(storage, inner, counters, tmp_path, read_copy):
    local = LocalStorage(tmp_path / "copy")
    info = await storage.put("a", BODY)
    await storage.put("b", b"12345")
    async with CopyingStorage(storage, local, read_copy=read_copy, counters=counters) as copying:
        await copying.get("a")
        await copying.get("a")  # it is there already: nothing is written
        await copying.get("b", span=range(3))  # a part of it is kept aside
        await copying.get("a", span=range(10), if_match=info.etag)
        inner.fail(StorageUnavailable("later"))
        for _ in range(3):
            with suppress(StorageError):
                await copying.get("a")

    from_copy, gathered = (1 + 3, 3) if read_copy else (0, 3 + 10)
    found = done(counters)
    assert found["r2", "get", "ok"] == (3 if read_copy else 4)
    assert found["r2", "get", "unavailable"] == 3
    assert found["copy", "put", "ok"] == (2 if read_copy else 3)
    assert found.get(("copy", "get", "ok"), 0) == from_copy
    assert moved(counters) == {
        ("r2", "written"): len(BODY) + 5,
        ("r2", "read"): 2 * len(BODY) + gathered,
        ("copy", "written"): len(BODY) + gathered,
        **({("copy", "read"): 3 * len(BODY) + 10} if read_copy else {}),
    }


async def test_a_copy_that_cannot_be_written_is_counted_as_such(storage, counters, tmp_path):
    await storage.put("a", BODY)
    (tmp_path / "copy").write_text("a file where the directory should be")
    async with CopyingStorage(storage, LocalStorage(tmp_path / "copy"), read_copy=True, counters=counters) as copying:
        assert (await copying.get("a")).body == BODY

    assert done(counters)["r2", "get", "ok"] == 1
    assert sum(count for labels, count in done(counters).items() if labels[:2] == ("copy", "put")) == 1
    assert moved(counters) == {("r2", "written"): len(BODY), ("r2", "read"): len(BODY)}
