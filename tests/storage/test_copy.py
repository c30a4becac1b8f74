"""The bucket with a local copy: what answers when, and what a damaged, stale or foreign copy does not do."""

import asyncio
import hashlib
import json
import logging
import os

import pytest

import app.storage.r2 as r2
from app.errors import (
    InvalidRange,
    NotModified,
    ObjectNotFound,
    PreconditionFailed,
    StorageDenied,
    StorageUnavailable,
)
from app.storage.copy import CopyingStorage
from app.storage.local import LocalStorage
from app.storage.r2 import R2Storage
from tests import faults
from tests.faults import FaultyProxy

BODY = hashlib.shake_256(b"model").digest(100_000)
KEY = "models/churn/7/model.joblib"


@pytest.fixture(scope="module")
def module_proxy(s3):
    with FaultyProxy(s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
async def module_remote(module_proxy, r2_arguments):
    async with R2Storage(**r2_arguments | {"endpoint_url": module_proxy.url}, max_attempts=1) as storage:
        yield storage


@pytest.fixture
def proxy(module_proxy, bucket):
    module_proxy.heal()
    module_proxy.seen.clear()
    return module_proxy


@pytest.fixture
def remote(module_remote, proxy):
    return module_remote


@pytest.fixture
def root(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def copying(remote, root):
    """Make one more, as after a restart."""
    return lambda read_copy=True: CopyingStorage(remote, LocalStorage(root), read_copy=read_copy)


@pytest.fixture
def storage(copying):
    return copying()


def break_remote(proxy):
    proxy.inject(faults.status(503), times=faults.FOR_EVER)


async def test_what_is_read_is_copied_and_answers_when_the_remote_does_not(remote, copying, proxy, root):
    put = await remote.put(KEY, BODY)
    await copying().get(KEY)
    assert (root / KEY).read_bytes() == BODY

    break_remote(proxy)

    got = await copying().get(KEY)
    assert (got.body, got.info) == (BODY, put)


async def test_what_is_written_is_copied(storage, copying, proxy):
    put = await storage.put(KEY, BODY)
    break_remote(proxy)

    assert (await copying().get(KEY)).info == put


async def test_what_is_deleted_is_deleted_from_the_copy(storage, copying, proxy, root):
    await storage.put(KEY, BODY)
    await storage.delete(KEY)
    break_remote(proxy)

    assert not (root / KEY).exists()
    with pytest.raises(StorageUnavailable):
        await copying().get(KEY)
    assert await copying().list("") == []


async def test_nothing_is_written_when_the_remote_refuses(storage, remote, root, proxy):
    await remote.put(KEY, BODY)
    with pytest.raises(PreconditionFailed):
        await storage.put(KEY, b"new", if_absent=True)
    break_remote(proxy)
    with pytest.raises(StorageUnavailable):
        await storage.put(KEY, b"new")
    with pytest.raises(StorageUnavailable):
        await storage.delete(KEY)

    assert not (root / KEY).exists()


async def test_while_the_remote_answers_the_copy_does_not(storage, remote):
    await storage.put(KEY, BODY)
    await remote.put(KEY, b"newer")

    assert (await storage.get(KEY)).body == b"newer"
    await remote.delete(KEY)
    with pytest.raises(ObjectNotFound):
        await storage.get(KEY)


async def test_a_refusal_is_not_hidden_by_the_copy(storage, proxy):
    await storage.put(KEY, BODY)
    proxy.inject(faults.status(403, "AccessDenied"), times=3)

    for call in (storage.get(KEY), storage.list("")):
        with pytest.raises(StorageDenied):
            await call


async def test_without_a_copy_the_remotes_error_is_raised(storage, proxy):
    break_remote(proxy)

    for call in (storage.get(KEY), storage.get(KEY, span=range(0, 5), if_match="e"), storage.head(KEY)):
        with pytest.raises(StorageUnavailable, match="503"):
            await call
    assert await storage.list("") == []


async def test_conditions_hold_for_the_copy(storage, proxy):
    put = await storage.put(KEY, BODY)
    break_remote(proxy)

    with pytest.raises(NotModified):
        await storage.get(KEY, if_none_match=put.etag)
    assert (await storage.get(KEY, if_none_match="other")).body == BODY
    assert (await storage.get(KEY, if_match=put.etag)).body == BODY
    assert (await storage.get(KEY, span=range(10, 20))).body == BODY[10:20]
    for span in (None, range(0, 5)):
        with pytest.raises(StorageUnavailable):  # it has not that ETag, and who knows what the remote has
            await storage.get(KEY, span=span, if_match="other")
    for etag in (None, put.etag):
        with pytest.raises(InvalidRange):
            await storage.get(KEY, span=range(len(BODY), len(BODY) + 1), if_match=etag)


async def test_head_and_list_answer_from_the_copy_with_the_remotes_etags(storage, copying, remote, proxy):
    kept = [await storage.put(key, key.encode()) for key in ("models/a", "models/b/1", "models/c")]
    await remote.put("models/never-read", BODY)
    break_remote(proxy)
    storage = copying()

    assert await storage.list("models/") == kept
    assert await storage.list("models/", recursive=False) == [kept[0], kept[2]]
    assert await storage.head("models/b/1") == kept[1]
    with pytest.raises(StorageUnavailable):
        await storage.head("models/never-read")


# Damaged, stale and foreign copies


async def test_a_damaged_copy_is_not_used(storage, copying, proxy, root):
    put = await storage.put(KEY, BODY)
    (root / KEY).write_bytes(BODY[:-1] + b"x")

    got = await copying().get(KEY, span=range(0, 100), if_match=put.etag)  # the remote answers
    assert got.body == BODY[:100]

    break_remote(proxy)
    with pytest.raises(StorageUnavailable):
        await copying().get(KEY)
    with pytest.raises(StorageUnavailable):
        await copying().head(KEY)
    assert await copying().list("") == []


async def test_a_damaged_copy_is_replaced_by_the_next_read(storage, copying, root):
    await storage.put(KEY, BODY)
    (root / KEY).write_bytes(b"damaged")

    await copying().get(KEY)

    assert (root / KEY).read_bytes() == BODY


async def test_a_damaged_record_is_as_good_as_none(storage, copying, proxy, root):
    await storage.put(KEY, BODY)
    (record,) = (root / ".diskless" / "copies").iterdir()
    fields = json.loads(record.read_bytes())
    break_remote(proxy)

    for damaged in (b"", b"{", b"[]", b"{}", b"\xff", json.dumps(fields | {"key": "other"}).encode()):
        record.write_bytes(damaged)
        with pytest.raises(StorageUnavailable):
            await copying().get(KEY)


async def test_a_record_without_its_bytes_is_not_used(storage, copying, proxy, root):
    await storage.put(KEY, BODY)
    (root / KEY).unlink()
    break_remote(proxy)

    with pytest.raises(StorageUnavailable):
        await copying().get(KEY)


async def test_the_copy_of_another_bucket_is_not_used(storage, r2_arguments, root):
    await storage.put(KEY, BODY)

    async with R2Storage(**r2_arguments | {"endpoint_url": "http://127.0.0.1:9"}, max_attempts=1) as other:
        with pytest.raises(StorageUnavailable):
            await CopyingStorage(other, LocalStorage(root), read_copy=True).get(KEY)


async def test_bytes_that_came_damaged_are_not_kept(storage, copying, remote, proxy, root):
    put = await remote.put(KEY, BODY)
    half = len(BODY) // 2
    proxy.inject(faults.corrupt(500), method="GET", span="bytes=0-")
    first = await storage.get(KEY, span=range(half), if_match=put.etag)
    assert first.body != BODY[:half]  # who asks has digests to find out
    await storage.get(KEY, span=range(half, len(BODY)), if_match=put.etag)
    assert not (root / KEY).exists()

    await copying().get(KEY)

    assert (root / KEY).read_bytes() == BODY


async def test_a_file_of_the_users_is_left_alone(storage, remote, root, caplog):
    (root / "models").mkdir(parents=True)
    (root / "models" / "churn.joblib").write_bytes(b"trained a minute ago")
    await remote.put("models/churn.joblib", BODY)

    assert (await storage.get("models/churn.joblib")).body == BODY
    await storage.delete("models/churn.joblib")

    assert (root / "models" / "churn.joblib").read_bytes() == b"trained a minute ago"
    assert "left as it is" in caplog.text


async def test_a_file_that_is_the_same_anyway_becomes_a_copy(storage, copying, remote, proxy, root):
    put = await remote.put(KEY, BODY)
    (root / KEY).parent.mkdir(parents=True)
    (root / KEY).write_bytes(BODY)
    await storage.get(KEY)
    break_remote(proxy)

    assert (await copying().get(KEY)).info == put


# Spans


async def test_pieces_become_a_copy_when_the_last_has_arrived(storage, copying, remote, proxy, root):
    put = await remote.put(KEY, BODY)
    spans = [range(start, min(start + 30_000, len(BODY))) for start in (60_000, 0, 90_000, 30_000)]
    for span in spans[:-1]:
        assert (await storage.get(KEY, span=span, if_match=put.etag)).body == BODY[span.start : span.stop]
        assert not (root / KEY).exists()
    await storage.get(KEY, span=spans[0], if_match=put.etag)  # twice is as good as once
    await storage.get(KEY, span=spans[-1], if_match=put.etag)

    assert (root / KEY).read_bytes() == BODY
    assert list((root / ".diskless" / "partial").iterdir()) == []
    break_remote(proxy)
    assert (await copying().get(KEY)).body == BODY


async def test_pieces_that_arrive_together_become_a_copy(storage, remote, root):
    put = await remote.put(KEY, BODY)
    spans = [range(start, min(start + 7_000, len(BODY))) for start in range(0, len(BODY), 7_000)]

    await asyncio.gather(*(storage.get(KEY, span=span, if_match=put.etag) for span in spans))

    assert (root / KEY).read_bytes() == BODY


async def test_pieces_of_different_versions_are_not_mixed(storage, remote, root):
    half = len(BODY) // 2
    first = await remote.put(KEY, BODY)
    await storage.get(KEY, span=range(0, half), if_match=first.etag)
    other = BODY[::-1]
    second = await remote.put(KEY, other)
    await storage.get(KEY, span=range(half, len(BODY)), if_match=second.etag)
    assert not (root / KEY).exists()

    await storage.get(KEY, span=range(0, half), if_match=second.etag)

    assert (root / KEY).read_bytes() == other


async def test_a_span_of_a_known_etag_comes_from_the_copy_without_a_request(storage, copying, proxy):
    put = await storage.put(KEY, BODY)
    proxy.seen.clear()

    got = await copying().get(KEY, span=range(5, 50_000), if_match=put.etag)

    assert (got.body, got.info) == (BODY[5:50_000], put)
    assert proxy.seen == []


async def test_a_span_of_another_etag_comes_from_the_remote(storage, copying, remote, proxy):
    await storage.put(KEY, BODY)
    newer = await remote.put(KEY, BODY[::-1])

    got = await copying().get(KEY, span=range(0, 10), if_match=newer.etag)

    assert (got.body, got.info) == (BODY[::-1][:10], newer)


async def test_partial_copies_go_when_the_storage_is_closed(r2_arguments, remote, root):
    put = await remote.put(KEY, BODY)
    async with CopyingStorage(R2Storage(**r2_arguments), LocalStorage(root), read_copy=True) as storage:
        await storage.get(KEY, span=range(0, 10), if_match=put.etag)
        abandoned = root / ".diskless" / "partial" / "of-a-killed-process"
        abandoned.write_bytes(b"x")
        (recent := abandoned.with_name("of-another-process")).write_bytes(b"x")
        os.utime(abandoned, (0, 0))
        assert len(list(abandoned.parent.iterdir())) == 3
    async with CopyingStorage(R2Storage(**r2_arguments), LocalStorage(root), read_copy=True):
        pass

    assert list(abandoned.parent.iterdir()) == [recent]


# Written, never read


async def test_forced_remote_writes_the_copy_and_never_reads_it(storage, copying, proxy, root):
    put = await copying(read_copy=False).put(KEY, BODY)
    assert (root / KEY).read_bytes() == BODY
    forced = copying(read_copy=False)
    proxy.seen.clear()
    await forced.get(KEY, span=range(0, 10), if_match=put.etag)
    assert len(proxy.seen) == 1

    break_remote(proxy)

    for call in (
        forced.get(KEY),
        forced.head(KEY),
        forced.list(""),
        forced.get(KEY, span=range(0, 9), if_match=put.etag),
    ):
        with pytest.raises(StorageUnavailable):
            await call
    assert forced.fallback_reason is None


# What is told


async def test_the_fallback_is_told_until_the_remote_answers_again(storage, proxy):
    await storage.put(KEY, BODY)
    assert storage.fallback_reason is None

    break_remote(proxy)
    await storage.get(KEY)
    told = storage.fallback_reason
    await storage.list("")

    assert told.startswith("since 2")
    assert "503" in told
    assert storage.fallback_reason == told
    proxy.heal()
    with pytest.raises(ObjectNotFound):
        await storage.get("none")
    assert storage.fallback_reason is None


@pytest.mark.parametrize("spans", [[None, None], [range(0, 50_000), range(50_000, 100_000)]])
async def test_a_copy_that_cannot_be_written_costs_one_warning_and_no_read(remote, tmp_path, caplog, spans):
    put = await remote.put(KEY, BODY)
    (tmp_path / "file").write_bytes(b"not a directory")
    storage = CopyingStorage(remote, LocalStorage(tmp_path / "file"), read_copy=True)

    with caplog.at_level(logging.WARNING, "diskless.storage"):
        pieces = [(await storage.get(KEY, span=span, if_match=put.etag)).body for span in spans]

    assert b"".join(pieces) in (BODY, BODY + BODY)
    assert len(caplog.records) == 1
    assert str(tmp_path / "file") in caplog.text


async def test_it_says_where_the_objects_and_the_copies_are(storage, remote, root):
    assert storage.describe() == f"{remote.describe()}, copied to {root}"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(r2, "FIRST_PAUSE_SECONDS", 0.001)


async def test_a_listing_without_the_remote_is_the_remotes_last_one_copied_or_not(remote, copying, proxy):
    put = [await remote.put(f"models/{name}.joblib", BODY) for name in ("fraud", "fraud_scaler")]
    await copying().list("models/", recursive=False)
    await copying().get("models/fraud.joblib")
    break_remote(proxy)

    restarted = copying()

    assert await restarted.list("models/", recursive=False) == put
    assert (await restarted.get("models/fraud.joblib")).body == BODY
    with pytest.raises(StorageUnavailable):
        await restarted.get("models/fraud_scaler.joblib")


async def test_that_the_remote_had_no_such_object_is_known_without_it(remote, copying, proxy):
    with pytest.raises(ObjectNotFound):
        await copying().get("models/index.json")
    break_remote(proxy)

    with pytest.raises(ObjectNotFound):
        await copying().get("models/index.json")


async def test_an_object_that_came_later_replaces_the_note_of_its_absence(remote, copying, proxy):
    with pytest.raises(ObjectNotFound):
        await copying().get(KEY)
    await remote.put(KEY, BODY)
    await copying().get(KEY)
    break_remote(proxy)

    assert (await copying().get(KEY)).body == BODY


async def test_a_file_of_the_users_outlives_the_note_that_the_remote_had_none(remote, copying, root):
    with pytest.raises(ObjectNotFound):
        await copying().get(KEY)
    path = root / KEY
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    await remote.put(KEY, BODY)

    await copying().get(KEY)

    assert path.read_bytes() == b"mine"
