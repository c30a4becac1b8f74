"""The stream of an object is its bytes, whatever is read in whatever order; and never a byte that was not checked."""

import asyncio
import contextlib
import hashlib
import io
import pickle
import threading
import time
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import (
    ArtifactMissing,
    DigestMismatch,
    ObjectNotFound,
    StorageDenied,
    StorageUnavailable,
)
from app.storage.base import StoredObject
from app.storage.local import LocalStorage
from app.storage.r2 import R2Storage
from app.storage.reader import ObjectReader
from tests import faults
from tests.faults import FaultyProxy

KEY = "models/churn/7/model.joblib"
BODY = hashlib.shake_256(b"model").digest(1000)


@pytest.fixture(scope="module")
def loop():
    """An event loop in a thread of its own, as the service has one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return LocalStorage(tmp_path_factory.mktemp("reader"))


def run(loop, coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


def digests(body, chunk_bytes):
    return [hashlib.sha256(body[at : at + chunk_bytes]).hexdigest() for at in range(0, len(body), chunk_bytes)]


@pytest.fixture
def opened(loop, storage):
    """Store `body` and return a reader of it, with all digests."""
    with contextlib.ExitStack() as stack:

        def opened(body=BODY, *, chunk_bytes=64, storage=storage, **options):
            info = run(loop, storage.put(KEY, body))
            options = {
                "chunk_digests": digests(body, chunk_bytes),
                "sha256": hashlib.sha256(body).hexdigest(),
                "label": "churn/7 model.joblib",
            } | options
            return stack.enter_context(ObjectReader(storage, info, loop=loop, chunk_bytes=chunk_bytes, **options))

        yield opened


class Spoiled:
    """A storage whose objects read differently, from byte `start` on."""

    def __init__(self, storage, spoil):
        self._storage, self._spoil, self.spans = storage, spoil, []

    async def put(self, key, body):
        return await self._storage.put(key, body)

    async def get(self, key, *, span, if_match):
        self.spans.append(span)
        got = await self._storage.get(key, span=span, if_match=if_match)
        return StoredObject(got.info, await self._spoil(span, got.body))


def flipped(at):
    async def spoil(span, body):
        if at in span:
            index = at - span.start
            body = body[:index] + bytes([body[index] ^ 1]) + body[index + 1 :]
        return body

    return spoil


steps = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 300)),
        st.tuples(st.just("readinto"), st.integers(0, 300)),
        st.tuples(st.just("seek"), st.integers(0, 1200)),
        st.tuples(st.just("back"), st.integers(-1000, 0)),
        st.tuples(st.just("on"), st.integers(-50, 200)),
        st.tuples(st.just("finish"), st.none()),
    ),
    max_size=25,
)


def take(stream, step):
    kind, value = step
    match kind:
        case "read":
            return stream.read(value)
        case "readinto":
            buffer = bytearray(value)
            return bytes(buffer[: stream.readinto(buffer)])
        case "seek":
            return stream.seek(value)
        case "back":
            size = stream.seek(0, io.SEEK_END)
            return stream.seek(max(value, -size), io.SEEK_END)
        case "on":
            return stream.seek(max(stream.tell() + value, 0) - stream.tell(), io.SEEK_CUR)


@given(
    size=st.sampled_from([0, 1, 63, 64, 65, 128, 500, 1000]),
    chunk_bytes=st.sampled_from([1, 7, 64, 999, 1000, 5000]),
    in_flight=st.integers(1, 4),
    checked=st.booleans(),
    steps=steps,
)
@settings(max_examples=60)
def test_any_way_of_reading_gives_what_the_object_gives(loop, storage, size, chunk_bytes, in_flight, checked, steps):
    body = BODY[:size]
    info = run(loop, storage.put(f"{KEY}{size}", body))
    reader = ObjectReader(
        storage,
        info,
        loop=loop,
        chunk_bytes=chunk_bytes,
        chunk_digests=digests(body, chunk_bytes) if checked else (),
        label="churn",
        in_flight=in_flight,
    )
    expected = io.BytesIO(body)
    with io.BufferedReader(reader, 100) as stream:
        for step in steps:
            if step[0] == "finish":
                assert reader.finish() == hashlib.sha256(body).hexdigest()
            else:
                assert take(stream, step) == take(expected, step)
                assert stream.tell() == expected.tell()
        assert reader.finish() == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("chunk_bytes", [64, 4096])
def test_an_unbuffered_reader_is_a_stream_too(opened, chunk_bytes):
    reader = opened(chunk_bytes=chunk_bytes)

    assert reader.readable()
    assert reader.seekable()
    assert not reader.writable()
    assert reader.readall() == BODY
    assert reader.read(1) == b""
    reader.seek(-10, io.SEEK_END)
    assert reader.read(5) == BODY[-10:-5]
    with pytest.raises(ValueError, match="cannot seek to -1"):
        reader.seek(-1)


def test_a_pickle_is_read_from_it(opened):
    body = pickle.dumps({"weights": list(range(10_000))})

    assert pickle.load(io.BufferedReader(opened(body, chunk_bytes=1000))) == pickle.loads(body)


def test_a_zip_file_is_read_from_it(opened):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in "abcdef":
            file.writestr(name, name.encode() * 1000)
    reader = opened(archive.getvalue(), chunk_bytes=500)

    with zipfile.ZipFile(io.BufferedReader(reader)) as file:
        assert [file.read(name) for name in "fbadec"] == [name.encode() * 1000 for name in "fbadec"]
    reader = opened(archive.getvalue(), chunk_bytes=500)
    with zipfile.ZipFile(reader) as file:
        assert file.read("c") == b"c" * 1000
        assert reader.finish() == hashlib.sha256(archive.getvalue()).hexdigest()


@given(at=st.integers(0, 999), start=st.integers(0, 999), in_flight=st.integers(1, 4))
@settings(max_examples=40)
def test_no_byte_of_a_damaged_chunk_is_handed_out(loop, storage, at, start, in_flight):
    info = run(loop, storage.put(KEY, BODY))
    reader = ObjectReader(
        Spoiled(storage, flipped(at)),
        info,
        loop=loop,
        chunk_bytes=64,
        chunk_digests=digests(BODY, 64),
        label="churn/7 model.joblib",
        in_flight=in_flight,
    )
    first = at // 64 * 64
    got = []

    def read_everything():
        while piece := reader.read(50):
            got.append(piece)
        reader.finish()

    with reader:
        reader.seek(start)
        with pytest.raises(
            DigestMismatch, match=rf"^churn/7 model\.joblib: bytes {first} to {min(first + 63, 999)}: sha"
        ):
            read_everything()

    assert b"".join(got) == (BODY[start:first] if start < first + 64 else BODY[start:])


def test_the_message_has_what_was_expected_and_what_was_found(loop, storage, opened):
    reader = opened(storage=Spoiled(storage, flipped(100)))
    damaged = BODY[64:100] + bytes([BODY[100] ^ 1]) + BODY[101:128]

    with pytest.raises(DigestMismatch) as caught:
        reader.readall()
    assert hashlib.sha256(damaged).hexdigest() in str(caught.value)
    assert hashlib.sha256(BODY[64:128]).hexdigest() in str(caught.value)


def test_without_chunk_digests_the_whole_is_checked_at_the_end(loop, storage, opened):
    reader = opened(storage=Spoiled(storage, flipped(100)), chunk_digests=())
    assert len(reader.readall()) == len(BODY)

    with pytest.raises(
        DigestMismatch, match=f"churn/7 model.joblib: sha256 is .*, expected {hashlib.sha256(BODY).hexdigest()}"
    ):
        reader.finish()


def test_finish_reads_what_was_not_read(opened):
    reader = opened()
    reader.seek(500)
    reader.read(10)

    assert reader.finish() == hashlib.sha256(BODY).hexdigest()
    assert reader.tell() == 510


def test_nothing_is_fetched_twice_when_it_is_read_forward(loop, storage, opened):
    counting = Spoiled(storage, flipped(-1))
    reader = opened(storage=counting)

    while reader.read(37):
        pass
    reader.finish()

    assert sorted(span.start for span in counting.spans) == list(range(0, 1000, 64))


def test_a_short_answer_is_not_taken_for_the_chunk(loop, storage, opened):
    async def shorten(span, body):
        return body[:-1]

    reader = opened(storage=Spoiled(storage, shorten), chunk_digests=())

    with pytest.raises(DigestMismatch, match="bytes 0 to 63: expected 64 bytes, got 63"):
        reader.read(1)


@pytest.mark.parametrize("count", [1, 15, 17])
def test_a_wrong_number_of_chunk_digests_is_refused(opened, count):
    with pytest.raises(DigestMismatch, match=f"1000 bytes are 16 chunks, but {count} are recorded"):
        opened(chunk_digests=["0" * 64] * count)


def test_an_object_that_is_replaced_while_it_is_read_is_told(loop, storage, opened):
    reader = opened(in_flight=1)
    reader.read(10)
    run(loop, storage.put(KEY, BODY[::-1]))

    with pytest.raises(ArtifactMissing, match=r"churn/7 model\.joblib: the object changed while it was read"):
        reader.readall()


def test_an_object_that_is_removed_while_it_is_read_is_told(loop, storage, opened):
    reader = opened(in_flight=1)
    reader.read(10)
    run(loop, storage.delete(KEY))

    with pytest.raises(ArtifactMissing, match="the object changed while it was read"):
        reader.readall()


@pytest.mark.parametrize("error", [StorageUnavailable("no answer"), StorageDenied("no right"), RuntimeError("a bug")])
def test_an_error_of_the_storage_arrives_as_it_is(loop, storage, opened, error):
    async def fail(span, body):
        raise error

    reader = opened(storage=Spoiled(storage, fail))

    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            reader.read(1)
        assert caught.value is error


def test_a_fault_that_passed_does_not_spoil_the_reader(loop, storage, opened):
    failures = [StorageUnavailable("no answer")]

    async def fail_once(span, body):
        if span.start == 128 and failures:
            raise failures.pop()
        return body

    reader = opened(storage=Spoiled(storage, fail_once))
    assert reader.read(64) + reader.read(64) == BODY[:128]
    with pytest.raises(StorageUnavailable):
        reader.read(1)

    assert reader.readall() == BODY[128:]
    assert reader.finish() == hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize("in_flight", [1, 3])
def test_only_a_few_chunks_are_in_memory(loop, storage, opened, in_flight):
    chunk_bytes = 256 * 1024
    body = bytes(chunk_bytes) * 40
    reader = opened(body, chunk_bytes=chunk_bytes, in_flight=in_flight)
    buffer = bytearray(chunk_bytes)

    tracemalloc.start()
    try:
        while reader.readinto(buffer):
            pass
        reader.seek(0)
        reader.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    at_work = 3  # what threads of the loop may hold that are done, or were cancelled, a moment ago
    assert peak < (in_flight + 2 + at_work) * chunk_bytes


def test_so_many_are_fetched_ahead_and_no_more(loop, storage, opened):
    counting = Spoiled(storage, flipped(-1))
    reader = opened(storage=counting, in_flight=3)

    reader.read(1)
    deadline = time.monotonic() + 10
    while len(counting.spans) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)

    assert [span.start // 64 for span in counting.spans] == [0, 1, 2, 3]


def test_closing_lets_go_a_thread_that_waits(loop, storage, opened):
    waiting = threading.Event()
    cancelled = threading.Event()

    async def stuck(span, body):
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    reader = opened(storage=Spoiled(storage, stuck))
    errors = []

    def read():
        try:
            reader.read(1)
        except StorageUnavailable as error:
            errors.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    assert waiting.wait(10)
    reader.close()
    thread.join(10)

    assert errors == ["churn/7 model.joblib: closed while it was read"]
    assert cancelled.wait(10)
    with pytest.raises(StorageUnavailable):
        reader.readinto(bytearray(1))


def test_closing_twice_and_reading_nothing_is_fine(opened):
    reader = opened()
    reader.close()
    reader.close()

    assert reader.closed


def test_an_empty_object_needs_no_request(loop, storage, opened):
    async def fail(span, body):
        raise AssertionError

    reader = opened(b"", storage=Spoiled(storage, fail))

    assert reader.read() == b""
    assert reader.finish() == hashlib.sha256(b"").hexdigest()


def test_from_a_bucket_whose_answers_are_cut_every_byte_arrives_once(loop, s3, bucket, r2_arguments):
    body = hashlib.shake_256(b"large").digest(3_000_000)

    async def opened(url):
        return await R2Storage(**r2_arguments | {"endpoint_url": url}).__aenter__()

    with FaultyProxy(s3.endpoint_url) as proxy:
        storage = run(loop, opened(proxy.url))
        info = run(loop, storage.put(KEY, body))
        for fault in (faults.cut(100_000), faults.status(503), faults.drop()):
            proxy.inject(fault, method="GET")
        with ObjectReader(storage, info, loop=loop, chunk_bytes=500_000, label="churn") as reader:
            assert io.BufferedReader(reader, 1024 * 1024).read() == body
            assert reader.finish() == hashlib.sha256(body).hexdigest()
        with pytest.raises(ObjectNotFound):
            run(loop, storage.get("none"))
        run(loop, storage.__aexit__(None, None, None))
