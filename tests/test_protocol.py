"""The server's own part: how it listens, and how connections end, with applications that answer when they are told to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import select
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from app import protocol
from app.limits import Limits
from app.listening import listen
from app.protocol import DrainingServer, configuration
from app.registry import Registry
from app.settings import Settings
from tests.service import connected

LIMITS = Limits(header_timeout_seconds=60, body_timeout_seconds=60, keep_alive_seconds=95, max_connections=1000)
GET = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"


class Application:
    """Answers a request with its path and body once it is told to; everything at once unless `held`."""

    def __init__(self, *, held: bool = False) -> None:
        self.begun: list[str] = []
        self.go = asyncio.Event()
        self.between = asyncio.Event()  # headers are sent, the body waits for this
        self.between.set()
        if not held:
            self.go.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = scope["path"].encode()
        more = True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.begun.append(scope["path"])
        await self.go.wait()
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await self.between.wait()
        await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def served(
    app: Application, host: str = "127.0.0.1", drain_seconds: float = 30
) -> AsyncIterator[tuple[DrainingServer, socket.socket]]:
    """Serve without signals; `await server.shutdown([sock])` is for the test."""
    config = configuration(app)
    config.load()
    server = DrainingServer(config, Registry(), limits=LIMITS, drain_seconds=drain_seconds)
    server.lifespan = config.lifespan_class(config)
    with listen(host, 0) as sock:
        await server.startup([sock])
        async with asyncio.timeout(60):
            yield server, sock


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def all_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def answers(received: bytes) -> list[tuple[str, bool]]:
    """Return the path that each answer repeats, and whether the answer says that the connection closes."""
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        found.append((rest[:length].decode(), b"\r\nconnection: close" in head))
        received = rest[length:]
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.2)


@pytest.fixture
def patient(monkeypatch):
    """For clients that send something more after the signal to stop: they need not be quick."""
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 60)


def test_by_default_idle_connections_are_kept_longer_than_the_router_keeps_them(monkeypatch):
    monkeypatch.setenv("WEB_CONCURRENCY", "2")

    assert Settings.model_fields["keep_alive_seconds"].default == 95
    assert configuration(Application).workers == 1


async def test_what_waits_to_be_accepted_is_answered():
    app = Application()
    async with served(app) as (server, sock):
        with socket.create_connection(sock.getsockname()) as connection:  # the kernel has it, the event loop has not
            connection.sendall(GET % b"early")
            await server.shutdown([sock])

            assert answers(all_of(connection)) == [("/early", True)]


async def test_whatever_waits_to_be_accepted_is_answered_however_many_that_is():
    async with served(Application()) as (server, sock), contextlib.AsyncExitStack() as stack:
        server.connections.most = 1
        waiting = [stack.enter_context(socket.create_connection(sock.getsockname())) for _ in range(5)]
        for connection in waiting:
            connection.sendall(GET % b"early")
        await server.shutdown([sock])

        assert [answers(all_of(connection))[0][0] for connection in waiting] == ["/early"] * 5


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part in it is Linux's")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_who_comes_when_nobody_is_accepted_any_more_is_refused_and_not_cut_off(monkeypatch, host):
    late = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    accept_all = protocol._accept_all

    def accept_and_lose_the_processor(sock: socket.socket, *arguments: Any, **named: Any) -> list[socket.socket]:
        accepted = accept_all(sock, *arguments, **named)
        late.connect_ex(sock.getsockname())
        return accepted

    monkeypatch.setattr(protocol, "_accept_all", accept_and_lose_the_processor)
    with late:
        late.setblocking(False)
        async with served(Application(), host) as (server, sock):
            with socket.create_connection(sock.getsockname()[:2]) as early:
                early.sendall(GET % b"early")
                await server.shutdown([sock])
                assert answers(all_of(early)) == [("/early", True)]
        poll = select.poll()
        poll.register(late, select.POLLOUT)
        assert poll.poll(60_000)  # it tries again after a second
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


@pytest.mark.usefixtures("patient")
async def test_what_arrives_after_the_signal_is_answered_once_more():
    async with served(Application()) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(GET % b"one")
        first = await reader.readuntil(b"/one")
        stopping = asyncio.create_task(server.shutdown([sock]))
        await until(lambda: not server.servers[0].sockets)
        writer.write(GET % b"two")
        rest = await reader.read()
        await stopping

    assert answers(first) == [("/one", False)]
    assert answers(rest) == [("/two", True)]


async def test_a_silent_connection_is_closed():
    async with served(Application()) as (server, sock), connected(*sock.getsockname()) as (reader, _):
        await until(lambda: server.server_state.connections)
        await server.shutdown([sock])

        assert await reader.read() == b""


async def test_a_request_that_is_half_here_is_waited_for():
    async with served(Application()) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write((GET % b"slow")[:20])
        await until(lambda: any(it.scope for it in server.server_state.connections))
        stopping = asyncio.create_task(server.shutdown([sock]))
        connection = next(iter(server.server_state.connections))
        await until(lambda: connection._stopping)
        connection._close_if_silent()
        writer.write((GET % b"slow")[20:])

        assert answers(await reader.read()) == [("/slow", True)]
        await stopping


async def test_bytes_that_nobody_has_read_yet_are_not_silence():
    async with served(Application()) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        await until(lambda: server.server_state.connections)
        (connection,) = server.server_state.connections
        connection.shutdown()
        with socket.socket(fileno=socket.dup(writer.get_extra_info("socket").fileno())) as raw:
            raw.setblocking(False)
            raw.send(GET % b"late")  # in the kernel's buffer: the event loop has had no turn since
            connection._close_if_silent()

        assert answers(await reader.read()) == [("/late", True)]
        await server.shutdown([sock])


async def test_of_requests_sent_without_waiting_the_last_one_closes():
    app = Application(held=True)
    async with served(app) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(GET % b"1" + GET % b"2")
        await until(lambda: app.begun)
        stopping = asyncio.create_task(server.shutdown([sock]))
        (connection,) = server.server_state.connections
        await until(lambda: connection._stopping)
        connection.flow.resume_reading()  # as it is whenever one of them has been answered
        writer.write(GET % b"3")
        await until(lambda: len(connection.pipeline) == 2)
        app.go.set()

        assert answers(await reader.read()) == [("/1", False), ("/2", False), ("/3", True)]
        await stopping


async def test_nothing_more_is_read_while_requests_wait_for_their_turn():
    app = Application(held=True)
    async with served(app) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(GET % b"1" + GET % b"2" + GET % b"3")
        await until(lambda: app.begun)
        (connection,) = server.server_state.connections
        connection.flow.resume_reading()  # as an application does that asks whether its caller is there
        writer.write(GET % b"4" * 1000)
        await asyncio.sleep(0.05)
        assert len(connection.pipeline) == 2
        app.go.set()
        received = await reader.readexactly(len(b"HTTP/1.1 200 OK"))
        while received.count(b"/4") < 1000:
            received += await reader.read(65536)

        assert [path for path, _ in answers(received)] == ["/1", "/2", "/3", *1000 * ["/4"]]
        await server.shutdown([sock])


@pytest.mark.parametrize("stopping", [False, True])
async def test_of_many_requests_at_once_only_some_are_read_before_others_are_answered(stopping):
    app = Application(held=True)
    async with served(app) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(b"".join(GET % b"%d" % number for number in range(2000)))
        await until(lambda: app.begun)
        (connection,) = server.server_state.connections
        assert 0 < len(connection.pipeline) <= protocol.MAX_PIPELINED
        end = asyncio.create_task(server.shutdown([sock])) if stopping else None
        app.go.set()
        received = b""
        while b"/1999" not in received[-100:]:
            received += await reader.read(65536)
            assert len(connection.pipeline) <= protocol.MAX_PIPELINED

        assert [path for path, _ in answers(received)] == [f"/{number}" for number in range(2000)]
        await (end or server.shutdown([sock]))
        assert [number for number, (_, closes) in enumerate(answers(received)) if closes] == [1999] * stopping


@pytest.mark.usefixtures("patient")
async def test_an_answer_that_has_begun_keeps_the_promise_of_its_headers():
    app = Application()
    app.between.clear()
    async with served(app) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(GET % b"begun")
        head = await reader.readuntil(b"\r\n\r\n")
        stopping = asyncio.create_task(server.shutdown([sock]))
        (connection,) = server.server_state.connections
        await until(lambda: connection._stopping)
        app.between.set()
        first = head + await reader.readexactly(6)
        writer.write(GET % b"next")
        rest = await reader.read()
        await stopping

    assert answers(first) == [("/begun", False)]
    assert answers(rest) == [("/next", True)]


async def test_after_an_answer_that_had_begun_a_silent_connection_is_closed():
    app = Application()
    app.between.clear()
    async with served(app) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(GET % b"begun")
        await reader.readuntil(b"\r\n\r\n")
        stopping = asyncio.create_task(server.shutdown([sock]))
        (connection,) = server.server_state.connections
        await until(lambda: connection._stopping)
        app.between.set()

        assert await reader.read() == b"/begun"
        await stopping


async def test_a_client_that_waits_for_100_continue_gets_it_while_stopping():
    app = Application()
    async with served(app) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n")
        await until(lambda: any(it.scope for it in server.server_state.connections))
        stopping = asyncio.create_task(server.shutdown([sock]))
        await until(lambda: not server.servers[0].sockets)
        writer.write(b"\r\n")

        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"body")
        assert answers(await reader.read()) == [("/pbody", True)]
        await stopping


async def test_what_is_given_up_is_told_so():
    app = Application(held=True)
    async with served(app, drain_seconds=0.1) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(GET % b"never")
        await until(lambda: app.begun)
        await server.shutdown([sock])
        answer = await reader.read()

    assert answer.startswith(b"HTTP/1.1 503 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "model_not_ready"


async def test_an_answer_that_is_given_up_in_the_middle_is_cut():
    app = Application()
    app.between.clear()
    async with served(app, drain_seconds=0.1) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(GET % b"never")
        await reader.readuntil(b"\r\n\r\n")
        await server.shutdown([sock])

        assert await reader.read() == b""


async def test_a_request_before_garbage_is_answered_before_the_garbage():
    app = Application(held=True)
    async with served(app) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(GET % b"1" + GET % b"2" + b"\x00garbage\r\n\r\n")
        await until(lambda: app.begun)
        writer.write(b"more of it")
        app.go.set()
        received = await reader.read()
        good, _, bad = received.partition(b"HTTP/1.1 400 ")

        assert answers(good) == [("/1", False), ("/2", False)]
        assert json.loads(bad.partition(b"\r\n\r\n")[2]) == {"error": "invalid_request", "detail": protocol.GARBAGE}
        assert b"\r\nx-request-id: " in bad
        await server.shutdown([sock])


OFFER = b"POST /p HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        OFFER + b"Content-Length: 4\r\n\r\nbody",
        OFFER + b"Transfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n",
    ],
    ids=["length", "chunked"],
)
@pytest.mark.parametrize("piece_bytes", [1, 1000])
async def test_a_request_that_offers_http2_keeps_its_body(request_bytes, piece_bytes):
    async with served(Application()) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        sent = request_bytes + GET % b"next" + OFFER.replace(b"Upgrade, ", b"Upgrade, close, ") + b"\r\n"
        for at in range(0, len(sent), piece_bytes):
            writer.write(sent[at : at + piece_bytes])
            await writer.drain()
            await asyncio.sleep(0)

        assert answers(await reader.read()) == [("/pbody", False), ("/next", False), ("/p", True)]
        await server.shutdown([sock])


async def test_connect_is_refused_like_garbage():
    async with served(Application()) as (server, sock), connected(*sock.getsockname()) as (reader, writer):
        writer.write(b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n")

        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        await server.shutdown([sock])


def test_without_a_host_it_listens_on_both_kinds_of_addresses():
    for host in ("", "::"):
        with listen(host, 0) as sock:
            port = sock.getsockname()[1]
            for address in ("127.0.0.1", "::1"):
                socket.create_connection((address, port)).close()


def test_a_port_that_is_taken_for_one_kind_of_address_is_taken():
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(("::1", 0))
        taken.listen()

        with pytest.raises(OSError, match="in use"):
            listen("", taken.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_with_a_host_it_listens_there(host):
    with listen(host, 0) as sock:
        socket.create_connection((host, sock.getsockname()[1])).close()
