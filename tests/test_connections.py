"""Clients that are slow, silent, greedy or many: what each of them gets, and that nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline

from app import inspection
from app.api.predict import Predictor
from app.auth import Access
from app.connections import GRACE_SECONDS, HEALTH_PLACES, SWEEP_SECONDS
from app.limits import FILES_BESIDE, Claim, PendingBytes
from app.model import Model
from app.model_storage import ModelStorageManager
from app.names import ModelRef
from app.observer import Observer, Record
from app.protocol import MAX_HEAD_BYTES, MAX_HEADERS
from app.registry import Entry, Registry, Slot, Snapshot, State
from app.runner import Runner
from app.service_counters import Route
from app.storage.local import LocalStorage
from tests import toys
from tests.service import AS_ASGI, COMMAND, Service, connected, running
from tests.trusted import TRUST

MB = 1024 * 1024
POINTS = np.arange(24.0).reshape(8, 3)
SUM = json.dumps({"model": "sum", "instances": [[1, 2, 3.5]]}).encode()
PADDED = SUM + b" " * (15_000_000 - len(SUM))  # valid, and large
LONG = json.dumps({"model": "sum", "instances": [[0.1, 0.2, 0]] * 9000}).encode()  # its answer is longer still
SPEC = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENCE_SECONDS = 120.0
TRICKLE_PIECES = int(PATIENCE_SECONDS / 0.05)  # each 0.05 s after the one before: more than anybody waits for
NAP = json.dumps({"model": "naps", "instances": [[15, 0, 0]]}).encode()
QUICK = {"ML_HEADER_TIMEOUT_SECONDS": "1", "ML_BODY_TIMEOUT_SECONDS": "1", "ML_KEEP_ALIVE_SECONDS": "5"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bucket")
    manager = ModelStorageManager(LocalStorage(folder), trust=TRUST)
    manager.save("sum", toys.Sum(), examples=POINTS, compile=False)
    manager.save("wide", toys.Wide(), examples=POINTS, compile=False)
    manager.save("naps", toys.Naps(), examples=np.zeros((2, 3)), compile=False)
    letters = make_pipeline(CountVectorizer(analyzer="char", vocabulary=list('[{\\"')), LinearRegression())
    letters.fit([letter * count for letter in '[{\\"' for count in (1, 2)], [1, 2] * 4)  # it counts them
    manager.save("letters", letters, examples=["[", "{["], compile=False)
    return {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder)}


@pytest.fixture(scope="module", params=[COMMAND, AS_ASGI], ids=["direct", "asgi"])
def impatient(environment, request) -> Iterator[Service]:
    """A service that waits for no request longer than a second, with each of the two layers that may answer."""
    with running(environment | QUICK, command=request.param) as service:
        yield service.wait_ready()


@pytest.fixture(scope="module", autouse=True)
def _many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard < 8192 else max(soft, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def post(content: bytes, *headers: bytes, length: int | None = None) -> bytes:
    announced = b"Content-Length: %d" % (len(content) if length is None else length)
    return b"\r\n".join((b"POST /predict HTTP/1.1", b"Host: x", announced, *headers)) + b"\r\n\r\n" + content


async def talk(service: Service, pieces: Iterable[bytes], pause: float = 0.0, *, apart: bool = False) -> bytes:
    """Send pieces, with pauses between them, and return all that comes until the service ends the connection.

    `apart`: each when the service has read the one before, so that no two of them come to it together.
    """
    async with asyncio.timeout(PATIENCE_SECONDS), connected("127.0.0.1", service.port) as (reader, writer):

        async def send() -> None:
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    if apart:
                        await until(lambda: not in_kernel(service), "read")
                    await asyncio.sleep(pause)

        sending = asyncio.create_task(send())
        received = bytearray()
        with contextlib.suppress(ConnectionError):  # it was closed while we were sending
            while more := await reader.read(65536):
                received += more
        sending.cancel()
        return bytes(received)


def told(answer: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Return status, headers and body of the last answer in what was received."""
    answer = answer[answer.rindex(b"HTTP/1.1 ") :]
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), json.loads(body)


def refused(answer: bytes, status: int, error: str) -> dict[str, str]:
    """Check that the last answer is this error, in the form of all errors, and the end of the connection; return its headers."""
    found, headers, body = told(answer)
    assert (found, body["error"]) == (status, error), answer
    assert set(body) == {"error", "detail"}
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    return headers


def sockets(service: Service) -> int:
    """How many sockets the process has open."""
    count = 0
    for file in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += os.readlink(file).startswith("socket:")
    return count


def resident(service: Service, which: str = "VmRSS") -> int:
    """Bytes of memory that the process has; with `VmHWM`, the most that it ever had."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) * 1024


async def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"not {what}"
        await asyncio.sleep(0.02)


async def serves(service: Service) -> None:
    """Check that a stranger gets answers on a new connection."""
    answer = await talk(service, [LIVE + post(SUM, b"Connection: close")])

    assert answer.count(b"HTTP/1.1 200 ") == 2, answer
    assert b'"predictions":[6.5]' in answer


# Heads and bodies that do not arrive

TRICKLE = [b"X-Slow: "] + [b"z"] * TRICKLE_PIECES
HEADS = {
    "of a get": [b"GET /health/li"],
    "after an answer": [post(SUM), b"POST /predict HTTP/1.1\r\nHost: x\r\n"],
    "behind another": [LIVE + b"G"],
    "with an id": [b"POST /predict HTTP/1.1\r\nX-Request-ID: mine\r\nHost: x\r\n"],
    "that trickles in": [b"POST /predict HTTP/1.1\r\nHost: x\r\n", *TRICKLE],
}


async def talks(service: Service, kinds: dict[str, list[bytes]]) -> list[tuple[str, bytes]]:
    """Have all of these conversations at once; return what came of each."""
    answers = await asyncio.gather(*(talk(service, pieces, pause=0.05) for pieces in kinds.values()))
    return list(zip(kinds, answers, strict=True))


async def test_a_head_that_does_not_arrive_is_refused(impatient):
    for name, answer in await talks(impatient, HEADS):
        headers = refused(answer, 408, "request_timeout")

        assert told(answer)[2]["detail"] == "the head of the request did not arrive within 1 s", name
        assert (headers["x-request-id"] == "mine") == (name == "with an id")


BODIES = {
    "of a length": [post(b"{", length=100)],
    "of a known head": [post(SUM), post(SUM)[:-1]],
    "that is large": [post(PADDED[:300_000], length=15_000_000)],
    "with an id": [post(b"{", b"X-Request-ID: mine", length=100)],
    "in chunks": [post(b"", b"Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"") + b"5\r\n{"],
    "that is to be asked for": [post(b"", b"Expect: 100-continue", length=100)],
    "for another route": [b"POST /models/status HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n{"],
    "that trickles in": [post(b"", length=10_000), *[b" "] * TRICKLE_PIECES],
    "that trickles in behind a known head": [post(SUM), post(SUM)[:-5], *[b" "] * 4],
    "that trickles in in chunks": [
        post(b"", b"Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b""),
        *[b"1\r\n \r\n"] * TRICKLE_PIECES,
    ],
}


async def test_a_body_that_does_not_arrive_is_refused(impatient):
    assert (await talk(impatient, [post(SUM) + post(SUM, b"Connection: close")])).count(
        b" 200 "
    ) == 2  # now it is known
    for name, answer in await talks(impatient, BODIES):
        if name == "for another route":  # it was answered before, and is not answered twice
            assert told(answer)[0] == 405
            continue
        headers = refused(answer, 408, "request_timeout")

        assert told(answer)[2]["detail"] == "the body did not arrive within 1 s of its head", name
        assert (headers["x-request-id"] == "mine") == (name == "with an id")


async def test_a_refused_body_that_does_not_arrive_is_not_waited_for(impatient):
    answer = await talk(impatient, [post(b"{", length=100 * MB)])

    refused(answer, 413, "request_too_large")


async def test_a_connection_without_a_request_is_closed_without_a_word(impatient):
    sent = {
        "nothing": [],
        "empty lines": [b"\r\n"] * TRICKLE_PIECES,
        "nothing after an answer": [post(SUM)],
        "empty lines after an answer": [post(SUM), *[b"\r\n"] * TRICKLE_PIECES],
    }
    for name, answer in await talks(impatient, sent):
        assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200 ") == ("answer" in name)


async def test_a_client_that_is_slow_again_and_again_is_served(impatient):
    request = post(SUM)
    pieces = [piece for _ in range(8) for piece in (request[:20], request[20:-5], request[-5:])]
    pieces.append(LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    pauses: list[float] = []

    def slowly() -> Iterator[bytes]:
        for piece in pieces:
            sent = time.monotonic()
            yield piece
            pauses.append(time.monotonic() - sent)

    for _ in range(10):
        pauses.clear()
        answer = await talk(impatient, slowly(), pause=0.15)
        if answer.count(b"HTTP/1.1 200 ") == 9:
            break
        assert max(pauses) > 0.9, answer  # only who was late, as this machine had stopped us, is turned away
    assert answer.count(b"HTTP/1.1 200 ") == 9


async def test_an_answer_that_takes_longer_than_any_time_out_is_waited_for(impatient):
    nap = json.dumps({"model": "naps", "instances": [[2.5, 0, 0]]}).encode()
    answer = await talk(impatient, [post(nap, b"Connection: close")])

    assert told(answer)[2]["predictions"] == [2.5]


async def test_while_the_service_does_not_read_nobody_is_late(impatient):
    request = post(SUM, b"Connection: close")
    for _ in range(10):
        async with connected("127.0.0.1", impatient.port) as (reader, writer):
            begun = time.monotonic()
            writer.write(request[:20])
            await serves(impatient)
            impatient.process.send_signal(signal.SIGSTOP)
            try:
                was_late = time.monotonic() - begun > 0.9  # before the service was stopped
                writer.write(request[20:])
                await writer.drain()
                await asyncio.sleep(3)  # longer than a head may take
            finally:
                impatient.process.send_signal(signal.SIGCONT)
            answer = await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)
        if not was_late:
            break
    assert told(answer)[2]["predictions"] == [6.5]


@pytest.mark.parametrize(
    "sent",
    [
        [b"GET / HTTP/1.1\r\nX: " + b"x" * (MAX_HEAD_BYTES // 2), b"x" * (MAX_HEAD_BYTES // 2), b"x" * 100],
        [b"GET /" + b"x" * (MAX_HEAD_BYTES // 2), b"x" * (MAX_HEAD_BYTES // 2), b"x" * 100],
        [b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * (MAX_HEADERS + 1) + b"\r\n"],
        [post(SUM, *[b"X: y"] * MAX_HEADERS)],
        [b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * (MAX_HEADERS + 2)],
        [
            post(b"", b"Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"") + b"1\r\n{\r\n0\r\n",
            *[b"X: y\r\n" * 100] * 2,
        ],
    ],
    ids=["a header", "a path", "headers", "headers of a prediction", "headers without an end", "trailers"],
)
async def test_a_head_that_is_too_large_is_refused(narrow, sent):
    refused(await talk(narrow, sent, apart=True), 431, "headers_too_large")


@pytest.mark.parametrize(
    ("sent", "identity"),
    [
        (b"\x16\x03\x01\x02", None),
        (b"GET / HTTP/1.1\r\nX-Request-ID: mine\r\nHost: x\r\nbroken\x00: x\r\n\r\n", "mine"),
    ],
    ids=["tls", "a broken header"],
)
@pytest.mark.parametrize("before", [b"", post(SUM, b"X-Request-ID: before")], ids=["at first", "after a request"])
async def test_what_is_no_http_is_refused_like_everything_else(impatient, before, sent, identity):
    answer = await talk(impatient, [before + sent])
    headers = refused(answer, 400, "invalid_request")

    assert answer.count(b"HTTP/1.1 200 ") == bool(before)
    assert headers["x-request-id"] != "before"
    assert identity in (None, headers["x-request-id"])


# Clients that do not read


def closed_for(service: Service, reason: str) -> int:
    """How many connections the service says that it has closed for a reason."""
    lines = [json.loads(line) for line in service.log().rpartition("\n")[0].splitlines()]  # the last may be half there
    return sum(line.get(reason, 0) for line in lines if line["event"] == "closed connections")


@pytest.mark.parametrize("sent", [post(LONG) * 300, SPEC * 3000], ids=["predictions", "documents"])
async def test_a_client_that_does_not_read_is_let_go(impatient, sent):
    await serves(impatient)
    await until(lambda: sockets(impatient) <= 8, "down to the listener and what the event loop needs")
    before, closed = sockets(impatient), closed_for(impatient, "unread_answers")
    async with connected("127.0.0.1", impatient.port) as (reader, writer):
        writer.transport.pause_reading()
        writer.write(sent)
        await until(lambda: closed_for(impatient, "unread_answers") == closed + 1, "let go")
        await until(lambda: sockets(impatient) <= before, "closed")
        del reader
    await serves(impatient)


async def test_a_client_that_reads_slowly_gets_its_answers(impatient):
    count = 60
    for _ in range(10):
        found, pause = await read_slowly(impatient, count)
        if found == count:
            break
        assert pause > 0.9  # only who did not read, as this machine had stopped us, is let go
    assert found == count


async def read_slowly(service: Service, count: int) -> tuple[int, float]:
    """Ask for so many long answers; return how many of them came, and for how long the client did not read at most."""
    found, tail, longest = 0, b"", 0.0
    async with asyncio.timeout(PATIENCE_SECONDS), connected("127.0.0.1", service.port) as (reader, writer):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        writer.write(post(LONG) * count)
        at = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while found < count and (more := await reader.read(131_072)):
                found += (tail + more).count(b"HTTP/1.1 200 ")
                tail = more[-12:]
                await asyncio.sleep(0.1)  # the kernel alone has enough for it for longer than the service has patience
                longest, at = max(longest, time.monotonic() - at), time.monotonic()
        return found, max(longest, time.monotonic() - at)


# Too many


@contextlib.contextmanager
def crowd(service: Service, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections, each of which has sent this and does nothing more."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            connection.setblocking(False)
            if sent:
                with contextlib.suppress(ConnectionError):
                    connection.send(sent)
            connections.append(connection)
        yield connections


def received(connection: socket.socket) -> bytes | None:
    """What has come on a connection; None as long as nothing has, b"" when it was closed."""
    try:
        return connection.recv(65536)
    except BlockingIOError:
        return None
    except ConnectionError:
        return b""


@pytest.fixture(scope="module")
def patient(environment) -> Iterator[Service]:
    """A service with the settings that it has by itself."""
    with running(environment) as service:
        yield service.wait_ready()


@pytest.mark.parametrize(
    "sent",
    [b"", LIVE, b"GET / HTTP/1.1\r\nX: " + b"x" * 60_000, post(b" " * 60_000, length=65_000)],
    ids=["silent", "idle", "half a head", "half a body"],
)
async def test_a_flood_of_connections_leaves_the_service_answering(patient, sent):
    await serves(patient)
    before = resident(patient)
    nap = json.dumps({"model": "naps", "instances": [[3, 0, 0]]}).encode()
    async with connected("127.0.0.1", patient.port) as (reader, writer):
        writer.write(post(nap, b"Connection: close"))
        with crowd(patient, 2000, sent) as connections:
            await serves(patient)
            await until(lambda: sockets(patient) <= 1000 + 16, "closed")  # with the listener, and what is closing
            await serves(patient)
            closed = sum(received(connection) in (b"",) for connection in connections if sent == b"")
            assert closed >= 900 * (sent == b"")
            # a connection is worth what its half request is, and 40 kB for the objects around it
            assert resident(patient) - before < 1000 * (len(sent) + 40_000)

        assert told(await asyncio.wait_for(reader.read(), PATIENCE_SECONDS))[2]["predictions"] == [3.0]
    await serves(patient)


@pytest.fixture(scope="module")
def small(environment) -> Iterator[Service]:
    """A service that takes eight connections."""
    unhurried = {"ML_HEADER_TIMEOUT_SECONDS": "60", "ML_BODY_TIMEOUT_SECONDS": "60"}
    with running(environment | unhurried | {"ML_MAX_CONNECTIONS": "8"}) as service:
        service.wait_ready().client.close()
        yield service


async def test_those_go_first_that_have_been_idle_longest(small):
    with contextlib.ExitStack() as stack:
        (busy,) = stack.enter_context(crowd(small, 1, post(NAP)))
        silent = stack.enter_context(crowd(small, 2))
        idle = stack.enter_context(crowd(small, 2, LIVE))
        half = stack.enter_context(crowd(small, 2, b"GET /"))
        await serves(small)
        for connection in idle:
            assert received(connection).startswith(b"HTTP/1.1 200 ")
        await asyncio.sleep(2)  # now they are idle, and not about to send something
        in_order = [*silent, *idle]
        stack.enter_context(crowd(small, 1))
        for number, connection in enumerate(in_order):
            stack.enter_context(crowd(small, 1))
            await until(lambda connection=connection: received(connection) == b"", "closed")

            assert [received(other) for other in [*in_order[number + 1 :], *half, busy]] == [None] * (6 - number)


async def test_who_fills_the_service_pays_first(small):
    for _ in range(10):
        await until(lambda: sockets(small) <= 8, "rid of who was there before")
        with contextlib.ExitStack() as stack:
            (busy,) = stack.enter_context(crowd(small, 1, post(NAP)))
            heads = stack.enter_context(crowd(small, 3, b"GET /"))
            bodies = stack.enter_context(crowd(small, 3, post(b"{", length=100)))
            await serves(small)
            idle_since = time.monotonic()
            stack.enter_context(crowd(small, 1))
            told_of: list[tuple[bytes | None, list[bytes | None]]] = []
            for number, connection in enumerate(heads):
                stack.enter_context(crowd(small, 1, LIVE))
                while not (answer := received(connection)) and time.monotonic() - idle_since <= 0.9 * GRACE_SECONDS:
                    await asyncio.sleep(0.02)
                told_of.append((answer, [received(other) for other in [*heads, *bodies][number + 1 :]]))
            still_busy = received(busy) is None
            if time.monotonic() - idle_since <= 0.9 * GRACE_SECONDS:
                break  # else some had been idle for so long that they went instead
    assert [others for _, others in told_of] == [[None] * 5, [None] * 4, [None] * 3]
    for answer, _ in told_of:
        headers = refused(answer, 429, "overloaded")
        assert headers["retry-after"] == "1"
    assert still_busy


async def test_when_all_are_being_answered_there_is_a_place_for_health_checks_only(small):
    with crowd(small, 8, post(NAP)) as busy:
        for _ in range(3):
            for path in ("/health", "/health/live", "/health/ready?x=1"):
                status, headers, _ = told(await talk(small, [LIVE.replace(b"/health/live", path.encode())]))
                assert (status, headers["connection"]) == (200, "close")
            headers = refused(await talk(small, [post(SUM)]), 429, "overloaded")
            assert headers["retry-after"] == "1"
            refused(await talk(small, [SPEC]), 429, "overloaded")
            refused(await talk(small, [LIVE.replace(b"/health", b"/healthy")]), 429, "overloaded")
            assert (await talk(small, [LIVE + post(SUM)])).count(b"HTTP/1.1 ") == 1  # and no place behind it

        with crowd(small, 3 * HEALTH_PLACES) as silent:  # nor do they keep it from who asks
            assert told(await talk(small, [LIVE]))[0] == 200
            assert sum(received(connection) == b"" for connection in silent) >= 2 * HEALTH_PLACES
            await until(lambda: sockets(small) <= 8 + HEALTH_PLACES + 8, "closed")  # with what it needs itself

        assert [received(connection) for connection in busy] == [None] * 8
    await until(lambda: sockets(small) <= 8, "rid of them")
    await serves(small)


async def test_many_that_do_not_wait_for_answers_leave_the_service_answering(patient):
    with crowd(patient, 200, post(SUM) * 3000):
        assert told(await talk(patient, [LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")]))[0] == 200
    await serves(patient)


def chunked(*pieces: bytes) -> list[bytes]:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)]


MEGABYTE = b" " * 1_000_000


# Bytes that are held: three bodies of 15 MB fit into 48 MB, four do not


NARROW = {"ML_MAX_PENDING_BYTES": str(48 * MB)}


@pytest.fixture(scope="module", params=[COMMAND, AS_ASGI], ids=["direct", "asgi"])
def narrow(environment, request) -> Iterator[Service]:
    with running(environment | NARROW | {"ML_BODY_TIMEOUT_SECONDS": "60"}, command=request.param) as service:
        yield service.wait_ready()


@pytest.fixture(scope="module", params=[COMMAND, AS_ASGI], ids=["direct", "asgi"])
def hasty(environment, request) -> Iterator[Service]:
    """The same, for what waits until a body is late. What is to arrive there must do so in that time."""
    with running(environment | NARROW | {"ML_BODY_TIMEOUT_SECONDS": "8"}, command=request.param) as service:
        yield service.wait_ready()


@contextlib.asynccontextmanager
async def held(service: Service, count: int) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """So many connections, on each of which a body of 15 MB has arrived but for its last byte."""
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(await stack.enter_async_context(connected("127.0.0.1", service.port)))
            found[-1][1].write(post(PADDED[:-1], b"Connection: close", length=len(PADDED)))
            await found[-1][1].drain()
        for _, writer in found:
            await until(lambda writer=writer: not writer.transport.get_write_buffer_size(), "sent")
        await until(lambda: not in_kernel(service), "read")
        yield found


def in_kernel(service: Service) -> int:
    """Bytes on their way to and from the service that the kernel has, but for answers that it keeps for a client."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    address, count = f"0100007F:{service.port:04X}", 0
    for _, local, remote, state, queues, *_ in lines:
        sent, received = (int(size, 16) for size in queues.split(":"))
        if state == "01" and address in (local, remote):
            count += sent + (received if local == address else 0)
    return count


async def large(service: Service) -> int:
    """Send a complete body of 15 MB, and return its answer's status."""
    return told(await talk(service, [post(PADDED, b"Connection: close")]))[0]


async def test_what_does_not_fit_beside_what_is_held_is_refused_before_it_is_read(narrow):
    async with held(narrow, 3) as connections:
        for answer in await asyncio.gather(
            *(talk(narrow, [post(b"", length=size)]) for size in (15_000_000, 6_000_000))
        ):
            headers = refused(answer, 429, "overloaded")
            assert headers["retry-after"] == "1"
            assert "would be above the limit of 50331648" in told(answer)[2]["detail"]
        refused(await talk(narrow, chunked(*[MEGABYTE] * 15)), 429, "overloaded")
        assert (
            told(await talk(narrow, [post(SUM + b" " * 65_000, b"Connection: close")]))[0] == 200
        )  # it is not counted

        for reader, writer in connections:
            writer.write(b" ")
            assert told(await reader.read())[2]["predictions"] == [6.5]
    assert await large(narrow) == 200


@pytest.mark.parametrize("end", ["answered", "invalid", "broken off", "refused", "computed meanwhile", "compressed"])
async def test_what_was_held_is_free_however_a_request_ends(narrow, end):
    match end:
        case "answered":
            for _ in range(4):
                assert await large(narrow) == 200
        case "invalid":
            for sent in (b"{" * 15_000_000, b"[" + b" " * 15_000_000, SUM.replace(b"sum", b"none") + b" " * 15_000_000):
                assert told(await talk(narrow, [post(sent, b"Connection: close")]))[0] in (400, 404, 413)
        case "broken off":
            async with held(narrow, 3):
                pass
        case "refused":
            async with held(narrow, 2):
                for answer in await asyncio.gather(*(talk(narrow, chunked(*[MEGABYTE] * 30)) for _ in range(4))):
                    refused(answer, 413 if b" 413 " in answer else 429, told(answer)[2]["error"])
                    assert told(answer)[0] in (413, 429)
        case "computed meanwhile":
            nap = NAP.replace(b"15", b"1 ")
            naps = [post(nap + b" " * 15_000_000, b"Connection: close") for _ in range(3)]
            assert [told(one)[0] for one in await asyncio.gather(*(talk(narrow, [nap]) for nap in naps))] == [200] * 3
        case "compressed":
            small = gzip.compress(NAP.replace(b"15", b"1 ") + b" " * 15_000_000)
            sent = post(small, b"Content-Encoding: gzip", b"Connection: close")
            statuses = [told(answer)[0] for answer in await asyncio.gather(*(talk(narrow, [sent]) for _ in range(5)))]
            assert statuses == [200] * 5  # what is held while they wait is a row of each

    await has_room_for_three(narrow)


async def test_what_was_held_is_free_when_a_request_is_too_late(hasty):
    async with held(hasty, 3) as connections:
        for reader, _ in connections:
            refused(await reader.read(), 408, "request_timeout")

    await has_room_for_three(hasty)


async def has_room_for_three(service: Service) -> None:
    async with held(service, 3) as connections:
        for reader, writer in connections:
            writer.write(b" ")
            assert told(await reader.read())[0] == 200


async def test_what_a_caller_sends_that_is_over_its_rate_is_not_held(environment):
    ann, bob = b"X-API-Key: " + b"a" * 32, b"X-API-Key: " + b"b" * 32
    keys = f"ann:{'a' * 32},bob:{'b' * 32}"
    settings = {"ML_API_KEYS": keys, "ML_RATE_LIMIT": "1/m", "ML_MAX_PENDING_BYTES": str(16 * MB)}
    with running(environment | settings) as service:
        service.wait_ready()
        async with connected("127.0.0.1", service.port) as (reader, writer):
            for sent, status in ((SUM, 200), *[(PADDED, 429)] * 3):
                writer.write(post(sent, ann))
                await writer.drain()
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_SECONDS)
                body = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
                assert (int(head.split()[1]), b"rate_limited" in body) == (status, status == 429)

            assert told(await talk(service, [post(PADDED, bob, b"Connection: close")]))[0] == 200


LARGE = {
    "announced": ([post(b"", length=100_000_000), *[MEGABYTE] * 100], {413}),
    "in chunks": (chunked(*[MEGABYTE] * 100), {408, 413, 429}),
    "for another route": ([post(b"", length=100_000_000).replace(b"/predict", b"/x"), *[MEGABYTE] * 20], {404}),
    "not too large, and never complete": ([post(PADDED[:-1], length=len(PADDED))], {408, 429}),
}


@pytest.mark.parametrize("name", LARGE)
async def test_a_flood_of_large_bodies_leaves_the_service_answering(hasty, name):
    pieces, expected = LARGE[name]
    await serves(hasty)
    Path(f"/proc/{hasty.process.pid}/clear_refs").write_text("5")  # the peak is counted from here
    before = resident(hasty)
    flood = [asyncio.create_task(talk(hasty, pieces)) for _ in range(60)]
    while not all(one.done() for one in flood):
        await serves(hasty)
    answers = await asyncio.gather(*flood)

    # beside what may be pending: for each connection what the event loop reads at once (256 kB), and a copy of a body
    assert resident(hasty, "VmHWM") - before < 48 * MB + 60 * 300_000 + 2 * len(PADDED)
    statuses = {told(answer)[0] for answer in answers if answer}
    assert statuses <= expected
    assert statuses
    assert await large(hasty) == 200


@pytest.mark.parametrize("model", ["sum", "naps"])
async def test_rows_that_wait_are_counted_with_the_memory_that_they_take(narrow, model):
    rows = [[0, 0, 0]] * 7000  # 56 kB of JSON, which are not counted; 1.2 MB of objects
    sent = post(json.dumps({"model": model, "instances": rows}, separators=(",", ":")).encode(), b"Connection: close")
    await serves(narrow)
    Path(f"/proc/{narrow.process.pid}/clear_refs").write_text("5")  # the peak is counted from here
    before = resident(narrow)
    for seconds in (b"6 ", b"12", b"18"):  # as long as it takes that all of the others come meanwhile
        nap = asyncio.create_task(talk(narrow, [post(NAP.replace(b"15", seconds), b"Connection: close")]))
        await asyncio.sleep(0.2)
        answers = await asyncio.gather(*(talk(narrow, [sent]) for _ in range(300)))
        assert told(await nap)[0] == 200
        statuses = [told(answer)[0] for answer in answers]
        if model == "sum" or statuses.count(200) <= 200:
            break

    assert resident(narrow, "VmHWM") - before < 48 * MB + 300 * 100_000 + 20 * MB
    if model == "naps":  # its thread is busy, and most have to wait
        assert 30 <= statuses.count(200) <= 200
        for answer in answers:
            if told(answer)[0] != 200:
                assert refused(answer, 429, "overloaded")["retry-after"] == "1"
    elif (
        statuses.count(200) < 300
    ):  # a task for each of them; the protocol has them computed when there is no more room
        assert set(statuses) == {200, 429}
    assert {len(told(answer)[2]["predictions"]) for answer in answers if told(answer)[0] == 200} == {7000}
    assert await large(narrow) == 200


async def test_rows_of_callers_that_have_left_are_not_kept(narrow):
    rows = [[0, 0, 0]] * 7000
    sent = post(json.dumps({"model": "naps", "instances": rows}, separators=(",", ":")).encode())
    await serves(narrow)
    Path(f"/proc/{narrow.process.pid}/clear_refs").write_text("5")
    before = resident(narrow)
    async with connected("127.0.0.1", narrow.port) as (reader, writer):
        writer.write(post(NAP.replace(b"15", b"6 "), b"Connection: close"))
        await asyncio.sleep(0.2)
        for _ in range(20):
            with crowd(narrow, 20, sent):
                await until(lambda: not in_kernel(narrow), "read")
        assert told(await asyncio.wait_for(reader.read(), PATIENCE_SECONDS))[0] == 200

    assert resident(narrow, "VmHWM") - before < 48 * MB + 20 * 300_000 + 20 * MB  # all together would be 400 MB
    assert await large(narrow) == 200


async def test_large_answers_that_nobody_reads_are_counted(narrow):
    body = json.dumps({"model": "wide", "instances": [[0.1, 0, 0]] * 10_000}, separators=(",", ":")).encode()
    small = post(SUM, b"Connection: close")
    size = len(await talk(narrow, [post(body, b"Connection: close")]))
    assert size > 13 * MB
    Path(f"/proc/{narrow.process.pid}/clear_refs").write_text("5")
    before = resident(narrow)
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(30):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", narrow.port))
            connection.sendall(post(body))
            connections.append(connection)
        beginnings = [await asyncio.to_thread(connection.recv, 12) for connection in connections]
        assert beginnings.count(b"HTTP/1.1 200") >= 2
        assert beginnings.count(b"HTTP/1.1 429") >= 20
        assert told(await talk(narrow, [small]))[0] == 200  # small ones are not counted

    # beside them what is computed before its turn to be written comes (8 MB each), and copies of what is being written
    assert resident(narrow, "VmHWM") - before < 48 * MB + 30 * 8 * MB + 3 * size < 30 * size
    await until(lambda: not in_kernel(narrow), "closed")
    assert b" 200 " in (await talk(narrow, [post(body, b"Connection: close")]))[:20]


def errors_of_sum(service: Service) -> int:
    (row,) = (row for row in service.status()["models"] if row["name"] == "sum")
    return row["errors"]


async def test_compressed_bodies_wait_as_long_as_somebody_waits_for_them(narrow):
    bomb = gzip.compress(b'{"model":"sum","instances":[[' + b"0," * 7_000_000 + b"0]]}")
    sent = post(bomb, b"Content-Encoding: gzip")
    honest = post(gzip.compress(SUM), b"Content-Encoding: gzip", b"Connection: close")
    count = errors_of_sum(narrow)
    async with connected("127.0.0.1", narrow.port) as (reader, writer):
        narrow.process.send_signal(signal.SIGSTOP)
        with crowd(narrow, 40, sent):
            pass
        writer.write(honest)
        await writer.drain()
        narrow.process.send_signal(signal.SIGCONT)
        answer = await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)

    assert told(answer)[2]["predictions"] == [6.5]
    assert errors_of_sum(narrow) - count < 10
    slow = post(bomb, b"Content-Encoding: gzip", b"X-Request-Timeout: 0.001", b"Connection: close")
    statuses = {told(one)[0] for one in await asyncio.gather(*(talk(narrow, [slow]) for _ in range(3)))}
    assert statuses == {504}


def body_of(part: bytes, text: bytes = b"") -> bytes:
    """A body of 15 MB of such parts."""
    return b'{"model":"sum","instances":[' + b",".join([part] * (15_000_000 // (len(part) + 1))) + b"]" + text + b"}"


@pytest.mark.parametrize("part", [b"[]", b"{}", b"[1]", b'{"":0}', b"[[]]", b'"[\\"",[]'], ids=bytes.decode)
async def test_a_body_of_nothing_but_tiny_rows_takes_no_memory(narrow, part):
    await serves(narrow)
    Path(f"/proc/{narrow.process.pid}/clear_refs").write_text("5")
    before = resident(narrow)
    answer = await talk(narrow, [post(body_of(part), b"Connection: close")])

    assert told(answer)[0] == 413
    assert (
        "expected at most 10000 rows in one request, got a body of more than 160000 lists" in told(answer)[2]["detail"]
    )
    assert resident(narrow, "VmHWM") - before < 5 * len(PADDED)
    await serves(narrow)


async def test_brackets_in_a_text_are_no_rows(narrow):
    body = json.dumps({"model": "letters", "instances": ['[{\\"' * 100_000]}).encode()
    status, _, found = told(await talk(narrow, [post(body, b"Connection: close")]))

    assert status == 200
    assert found["predictions"] == pytest.approx([400_000])


def test_a_claim_counts_what_it_holds_and_no_more():
    pending = PendingBytes(100)
    one, other = Claim(pending), Claim(pending)

    assert one.hold(60)
    assert not other.hold(50)
    assert other.hold(40)
    assert not other.hold(41)
    assert (pending.held, other.held) == (100, 40)
    one.release()
    one.release()
    assert pending.held == 40
    assert other.hold(100)
    assert not pending.fits(1)


# Open files


def limited(soft: int, hard: int) -> Sequence[str]:
    return ("prlimit", f"--nofile={soft}:{hard}", *COMMAND)


def files_allowed(service: Service) -> list[str]:
    limits = Path(f"/proc/{service.process.pid}/limits").read_text()
    return re.search(r"Max open files +(\S+) +(\S+)", limits).groups()


async def test_as_many_files_may_be_opened_as_connections_need(environment):
    with running(environment, command=limited(256, 4096)) as service:
        service.wait_ready()

        assert files_allowed(service) == (str(1000 + FILES_BESIDE), "4096")
        assert "fewer connections" not in service.log()


async def test_where_they_may_not_be_there_are_fewer_connections(environment):
    with running(environment, command=limited(64, 256)) as service:
        service.wait_ready()
        (line,) = [json.loads(line) for line in service.log().splitlines() if "fewer connections" in line]
        assert (files_allowed(service), line["connections"]) == (("256", "256"), 256 - FILES_BESIDE)
        with crowd(service, 400):
            await serves(service)
            assert sockets(service) <= 256 - FILES_BESIDE + 16
            service.process.send_signal(signal.SIGSTOP)
            with crowd(service, 400), crowd(service, 1, LIVE) as (stranger,):
                await asyncio.sleep(2 * SWEEP_SECONDS)  # all of them wait when it looks after its connections
                service.process.send_signal(signal.SIGCONT)
                answers: list[bytes | None] = []
                await until(lambda: answers.append(received(stranger)) or answers[-1] is not None, "told anything")
                assert answers[-1].startswith(b"HTTP/1.1 200 "), answers[-1]
        await serves(service)


async def test_without_a_file_left_it_waits_until_there_is_one(environment):
    with running(environment) as service:
        await serves(service.wait_ready())
        service.client.close()
        pid = service.process.pid
        await until(lambda: sockets(service) <= 5, "down to what it needs itself")
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        allowed = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        for times, left in enumerate((2, -10), start=1):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (files + left, allowed[1]))
            with crowd(service, 50, LIVE):
                await until(
                    lambda times=times: service.log().count("no connection is accepted") == times, "aware of it"
                )
                before = seconds_computed(pid)
                await asyncio.sleep(1)
                assert seconds_computed(pid) - before < 0.5  # it does not try again and again
                resource.prlimit(pid, resource.RLIMIT_NOFILE, allowed)
                await serves(service)
        assert service.log().count("connections are accepted again") == 2
        assert service.stop() == 0


def seconds_computed(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("padding", [0, 5000, 100_000])
@pytest.mark.parametrize("content", [SUM, SUM[:-1], SUM.replace(b"3.5", b'"x"')], ids=["right", "no JSON", "invalid"])
async def test_nothing_is_held_for_a_compressed_body_that_was_answered(content, padding):
    registry = Registry()
    estimator = LinearRegression().fit(POINTS, POINTS.sum(axis=1))
    model = Model(ModelRef("sum", "1"), inspection.infer((), estimator), estimator)
    runner = Runner(model, costs={1: 1e-6})
    entry = Entry({"1": Slot(model.ref, State.READY, runner=runner)}, {"production": "1"}, {"production": "1"})
    registry.swap(Snapshot({"sum": entry}))
    predictor = Predictor(registry, Access(), Observer(), max_body_bytes=MB, max_rows=10, max_pending_bytes=MB)
    body = gzip.compress(content + b" " * padding)
    arriving = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if arriving:
            return arriving.pop()
        return await asyncio.Future()

    scope = {"headers": [(b"content-encoding", b"gzip")], "http_version": "1.1"}
    answer = await predictor.handle(scope, receive, None, Record(Route.PREDICT, "it"))
    await runner.retire()

    assert answer.status in (200, 400, 422)
    assert predictor.pending.held == 0
