"""Every storage keeps the contract of `app.storage.base`: the same tests for the bucket, the directory, and both."""

import asyncio
import hashlib

import pytest

from app.errors import InvalidRange, NotModified, ObjectNotFound, PreconditionFailed
from app.service_counters import ServiceCounters
from app.spans import Journal
from app.storage.base import ObjectInfo
from app.storage.copy import CopyingStorage
from app.storage.counted import CountedStorage
from app.storage.local import LocalStorage
from app.storage.r2 import R2Storage
from app.storage.traced import TracedStorage

BODY = bytes(range(256)) * 4


@pytest.fixture(scope="module")
async def remote(r2_arguments):
    """One for all tests here: botocore takes a tenth of a second to make a client."""
    async with R2Storage(**r2_arguments) as storage:
        yield storage


@pytest.fixture(params=["r2", "local", "local, counted", "local, traced", "copying", "copying-forced"])
def storage(request, tmp_path):
    local = LocalStorage(tmp_path / "models")
    if request.param == "local":
        return local
    if request.param == "local, counted":
        return CountedStorage(local, "local", ServiceCounters())
    if request.param == "local, traced":
        return TracedStorage(local, "local", Journal())
    request.getfixturevalue("bucket")
    remote = request.getfixturevalue("remote")
    if request.param == "r2":
        return remote
    return CopyingStorage(remote, local, read_copy=request.param == "copying")


async def test_what_was_put_is_got(storage):
    put = await storage.put("models/churn/7/model.joblib", BODY)
    got = await storage.get("models/churn/7/model.joblib")

    assert put == ObjectInfo("models/churn/7/model.joblib", len(BODY), put.etag)
    assert got.info == put
    assert got.body == BODY


async def test_an_empty_object_is_an_object(storage):
    put = await storage.put("empty", b"")

    assert (await storage.get("empty")).body == b""
    assert await storage.head("empty") == put
    assert await storage.list("") == [put]
    with pytest.raises(InvalidRange):
        await storage.get("empty", span=range(0, 1))


async def test_a_large_object_comes_back_whole(storage):
    body = hashlib.shake_256(b"model").digest(9 * 1024 * 1024 + 1)

    put = await storage.put("large", body)

    assert put.size == len(body)
    assert (await storage.get("large")).body == body
    assert (await storage.get("large", span=range(5_000_000, 9_000_000))).body == body[5_000_000:9_000_000]


async def test_head_tells_size_and_etag(storage):
    put = await storage.put("a", BODY)

    assert await storage.head("a") == put


async def test_an_etag_has_no_quotes_and_follows_the_content(storage):
    first = await storage.put("a", b"one")
    second = await storage.put("a", b"two")
    again = await storage.put("a", b"one")

    assert '"' not in first.etag
    assert first.etag != second.etag
    assert first.etag == again.etag


async def test_an_object_that_is_not_there_is_not_found(storage):
    for call in (storage.get("none"), storage.head("none"), storage.get("none", span=range(0, 4))):
        with pytest.raises(ObjectNotFound, match="none"):
            await call


async def test_a_folder_is_no_object(storage):
    await storage.put("models/a", BODY)

    for call in (storage.get("models"), storage.head("models"), storage.get("models/a/b")):
        with pytest.raises(ObjectNotFound):
            await call


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (range(0, 1), BODY[:1]),
        (range(0, 1024), BODY),
        (range(100, 300), BODY[100:300]),
        (range(1023, 1024), BODY[-1:]),
        (range(1000, 5000), BODY[1000:]),
    ],
)
async def test_a_span_is_those_bytes_and_the_info_is_of_the_whole(storage, span, expected):
    put = await storage.put("a", BODY)

    got = await storage.get("a", span=span)

    assert got.body == expected
    assert got.info == put


@pytest.mark.parametrize("start", [1024, 5000])
async def test_a_span_beyond_the_end_is_invalid(storage, start):
    await storage.put("a", BODY)

    with pytest.raises(InvalidRange):
        await storage.get("a", span=range(start, start + 10))


@pytest.mark.parametrize("span", [range(5, 5), range(5, 2), range(0, 10, 2)])
async def test_a_span_without_bytes_or_with_gaps_is_a_mistake(storage, span):
    with pytest.raises(ValueError, match="span"):
        await storage.get("a", span=span)


async def test_if_none_match_says_that_nothing_changed(storage):
    first = await storage.put("a", b"one")
    with pytest.raises(NotModified):
        await storage.get("a", if_none_match=first.etag)

    await storage.put("a", b"two")

    assert (await storage.get("a", if_none_match=first.etag)).body == b"two"


async def test_if_match_refuses_other_bytes(storage):
    first = await storage.put("a", BODY)
    assert (await storage.get("a", if_match=first.etag)).body == BODY
    assert (await storage.get("a", if_match=first.etag, span=range(1, 3))).body == BODY[1:3]

    other = await storage.put("a", b"other")

    for span in (None, range(0, 2)):
        with pytest.raises(PreconditionFailed):
            await storage.get("a", if_match=first.etag, span=span)
        assert (await storage.get("a", if_match=other.etag, span=span)).info == other


async def test_put_if_absent_does_not_replace(storage):
    await storage.put("a", b"one", if_absent=True)
    with pytest.raises(PreconditionFailed):
        await storage.put("a", b"two", if_absent=True)

    assert (await storage.get("a")).body == b"one"


async def test_put_if_match_replaces_only_what_the_caller_saw(storage):
    first = await storage.put("a", b"one")
    second = await storage.put("a", b"two", if_match=first.etag)
    with pytest.raises(PreconditionFailed):
        await storage.put("a", b"three", if_match=first.etag)

    assert (await storage.get("a")).info == second


async def test_put_if_match_needs_an_object(storage):
    with pytest.raises(PreconditionFailed):
        await storage.put("none", b"one", if_match="0" * 32)

    assert await storage.list("") == []


async def test_of_many_writers_that_saw_the_same_one_wins(storage, request):
    if request.node.callspec.params["storage"] != "local" and request.getfixturevalue("s3").kind == "moto":
        pytest.skip("moto looks and writes in two steps")
    seen = await storage.put("index.json", b"0")

    answers = await asyncio.gather(
        *(storage.put("index.json", b"%d" % number, if_match=seen.etag) for number in range(1, 9)),
        return_exceptions=True,
    )

    won = [answer for answer in answers if isinstance(answer, ObjectInfo)]
    assert len(won) == 1
    assert [type(answer) for answer in answers if answer not in won] == [PreconditionFailed] * 7
    assert (await storage.head("index.json")) == won[0]


async def test_list_tells_all_below_a_prefix_in_order(storage):
    keys = ["models/b/1/model", "models/a.joblib", "models/a/2/x", "models/a/10/x", "models/a-b", "models2", "other/x"]
    put = {key: await storage.put(key, key.encode()) for key in keys}

    async def keys_of(prefix, **options):
        return [info.key for info in await storage.list(prefix, **options)]

    assert await storage.list("") == [put[key] for key in sorted(keys)]
    assert await keys_of("models/") == sorted(key for key in keys if key.startswith("models/"))
    assert await keys_of("models/a") == ["models/a-b", "models/a.joblib", "models/a/10/x", "models/a/2/x"]
    assert await keys_of("models/", recursive=False) == ["models/a-b", "models/a.joblib"]
    assert await keys_of("models/a/1", recursive=False) == []
    assert await keys_of("mod", recursive=False) == ["models2"]
    assert await keys_of("none/") == []
    assert await keys_of("models/a.joblib/") == []


async def test_delete_removes_and_is_content_with_nothing(storage):
    await storage.put("folder/b", BODY)

    await storage.delete("folder/b")
    await storage.delete("folder/b")

    assert await storage.list("") == []
    with pytest.raises(ObjectNotFound):
        await storage.get("folder/b")


@pytest.mark.parametrize("key", ["with space", "plus+and%25", "ünïcödé/模型", "a=b&c", "quote'\"", "tilde~!*()", "..."])
async def test_a_key_may_have_any_characters(storage, key):
    put = await storage.put(key, BODY)

    assert (await storage.get(key)).info == put
    assert await storage.head(key) == put
    assert await storage.list(key) == [put]
    assert await storage.list("") == [put]


async def test_a_storage_says_where_it_is(storage):
    assert storage.describe()
