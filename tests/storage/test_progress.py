"""How far a transfer is: what the storage tells while bytes come and go, whatever the network does to them."""

import hashlib

import pytest

import app.storage.r2 as module
from app.errors import PreconditionFailed
from app.storage.r2 import SENT_BYTES, R2Storage
from tests import faults
from tests.faults import FaultyProxy

BODY = hashlib.shake_256(b"model").digest(5 * SENT_BYTES + 1)
KEY = "models/churn/1/model.joblib"


@pytest.fixture
def proxy(s3, bucket):
    with FaultyProxy(s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def told():
    """What was told: key, bytes more, bytes in all."""
    return []


@pytest.fixture
async def storage(proxy, r2_arguments, told, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.001)
    arguments = r2_arguments | {"endpoint_url": proxy.url}
    async with R2Storage(**arguments, moved=lambda *what: told.append(what)) as storage:
        yield storage


def moved(told):
    return [more for _, more, _ in told]


async def test_a_write_tells_of_each_piece_and_stores_every_byte(storage, proxy, told):
    info = await storage.put(KEY, BODY, if_absent=True)

    assert {(key, size) for key, _, size in told} == {(KEY, len(BODY))}
    assert moved(told) == [SENT_BYTES] * 5 + [1]
    assert info.etag == hashlib.md5(BODY, usedforsecurity=False).hexdigest()
    assert (await storage.get(KEY)).body == BODY
    headers = next(seen.headers for seen in proxy.seen if seen.method == "PUT")
    assert headers["Content-Length"] == str(len(BODY))
    assert not {"Transfer-Encoding", "Content-Encoding", "Expect"} & headers.keys()


@pytest.mark.parametrize("body", [b"", b"x"])
async def test_the_smallest_bodies_are_stored_too(storage, body, told):
    await storage.put(KEY, body)

    assert (await storage.get(KEY)).body == body
    assert sum(moved(told)) == 2 * len(body)


@pytest.mark.parametrize(
    "fault", [faults.status(503, "SlowDown"), faults.drop(), faults.lose_answer(), faults.lose_answer(500)]
)
async def test_a_write_that_begins_again_takes_back_what_it_told(storage, proxy, told, fault):
    proxy.inject(fault, method="PUT", times=2)
    await storage.put(KEY, BODY, if_absent=True)

    assert sum(moved(told)) == len(BODY)
    assert [more for more in moved(told) if more < 0] == [-len(BODY)] * 2
    assert (await storage.get(KEY)).body == BODY


async def test_a_write_that_is_refused_is_refused_while_it_is_watched(storage):
    await storage.put(KEY, BODY)

    with pytest.raises(PreconditionFailed):
        await storage.put(KEY, BODY[1:], if_absent=True)
    assert (await storage.get(KEY)).body == BODY


async def test_a_read_tells_of_the_bytes_that_came_and_of_all_there_are(storage, proxy, told):
    await storage.put(KEY, BODY)
    told.clear()
    proxy.inject(faults.cut(10), method="GET")
    await storage.get(KEY, span=range(10, 110))
    await storage.get(KEY)

    assert told == [(KEY, 100, len(BODY)), (KEY, len(BODY), len(BODY))]
