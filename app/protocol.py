"""The uvicorn server as Diskless runs it: how it listens, and how it stops without losing a request.

uvicorn closes a connection that it takes for idle when it is told to stop, even while a request is on its way in it.
Here such a connection is answered once more, with `Connection: close`, or closed when it stays silent. What is not
answered when the time for that is over gets a 503 that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Generator
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, override

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.api.headers import SAFE_JSON, lines_of

if TYPE_CHECKING:
    from app.registry import Registry

logger = logging.getLogger("diskless.server")
LINGER_SECONDS = 1.0  # how long a silent connection is kept open after the signal to stop
POLL_SECONDS = 0.02
LAST_WORDS_SECONDS = 0.5  # for the answers to what was given up
EXIT_SECONDS = 3.0  # beyond the drain; then the process ends whatever a model's thread is still computing
GARBAGE = "expected a request of HTTP/1.1, got bytes that are none"
STOPPING = b'{"error":"model_not_ready","detail":"the service stopped before it could answer: try again"}'


class _Flow(FlowControl):
    """uvicorn's flow control, but that nothing more is read while requests that were read already wait for their turn.

    An application that asks whether its caller is still there would let the caller send without end. Once stopping, what is
    there is read: a connection that is closed before would take answers along.
    """

    def __init__(self, transport: asyncio.Transport, protocol: DrainingProtocol) -> None:
        super().__init__(transport)
        self._protocol = protocol

    @override
    def resume_reading(self) -> None:
        protocol = self._protocol
        if not protocol.pipeline or protocol._stopping or protocol._broken:
            super().resume_reading()


class DrainingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with an orderly end for connections that are kept alive."""

    _stopping = False
    _broken = False  # what came behind the latest request was no HTTP
    _offer: bytes | None = None  # the head of a request that offers another protocol, without the offer
    _last: RequestResponseCycle | None = None  # the request whose answer is to say that the connection closes

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin with a connection."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self)

    @override
    def shutdown(self) -> None:
        """Begin to stop: answer what is under way and at most what comes next, then close."""
        self._stopping = True
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER_SECONDS, self._close_if_silent)
        elif not self.cycle.response_started:  # else its headers have promised that the connection goes on
            self._close_after(self.cycle)

    @override
    def data_received(self, data: bytes) -> None:
        """Take what has arrived. An offer to change to HTTP/2, as Java's client makes it, is passed over.

        The parser drops the body of a request with such an offer, so the request is parsed once more without it.
        """
        if self._broken:
            return
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if self._offer is not None:
                head, self._offer = self._offer, None
                self.parser = httptools.HttpRequestParser(self)
                self.data_received(head + data[offer.args[0] :])
        except httptools.HttpParserError:
            if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
                self.send_400_response(GARBAGE)
            else:  # what came whole before it is answered first
                self._broken = True
                self.flow.resume_reading()  # to drop what comes behind: closed before, the connection would take answers along

    @override
    def on_headers_complete(self) -> None:
        """Start a request; once stopping, its answer says that the connection closes."""
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._offer = self._head_without_offer()
            return
        before = self.cycle
        super().on_headers_complete()
        if self._stopping and self.cycle is not before:
            if before is not None and before is self._last and not before.response_started:
                before.keep_alive = True  # this one was sent behind it without waiting: it is owed an answer, too
            self._close_after(self.cycle)

    @override
    def on_response_complete(self) -> None:
        """Go on with the connection; once stopping, see to it that it ends even if nothing more comes."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._broken and self.cycle.response_complete:
            self.send_400_response(GARBAGE)
        elif self._stopping:
            self.loop.call_later(LINGER_SECONDS, self._close_if_silent)

    @override
    def on_message_complete(self) -> None:
        """End a request's body, unless the request is to be parsed once more."""
        if self._offer is None:
            super().on_message_complete()

    @override
    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with what came, in the form that every error has, and close."""
        from app.api.predict import new_request_id  # as below

        body = b'{"error":"invalid_request","detail":"%b"}' % msg.encode("ascii")
        identity = new_request_id().encode()
        own = ((b"content-length", b"%d" % len(body)), (b"connection", b"close"), (b"x-request-id", identity))
        head = lines_of((*self.server_state.default_headers, *SAFE_JSON, *own))
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[400], head, body))
        self.transport.close()

    def _head_without_offer(self) -> bytes:
        kept = [(name, value) for name, value in self.headers if name not in (b"connection", b"upgrade")]
        if any(name == b"connection" and b"close" in value.lower() for name, value in self.headers):
            kept.append((b"connection", b"close"))
        first = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return first + b"".join(b"%s: %s\r\n" % header for header in kept) + b"\r\n"

    def _close_after(self, cycle: RequestResponseCycle) -> None:
        if cycle.keep_alive:
            cycle.keep_alive = False
            self._last = cycle

    def give_up(self) -> None:
        """Say that what is not answered yet will not be. ASGI tasks are told otherwise."""

    def _is_silent(self) -> bool:
        """Whether no request is being answered, nor has begun to arrive: its own end would close the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        return self.scope is None or (self.cycle is not None and self.cycle.scope is self.scope)

    def _close_if_silent(self) -> None:
        if self.transport.is_closing() or not self._is_silent():
            return
        if _readable(self.transport):  # arrived, but not read yet: timers come before sockets in a turn of the loop
            self.loop.call_later(POLL_SECONDS, self._close_if_silent)
        else:
            self.transport.close()

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, partial(_answered, cycle, app))


async def _answered(cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Run the application; when it is given up, answer in its place."""
    try:
        await app(scope, receive, send)
    except asyncio.CancelledError:  # by `DrainingServer.shutdown` only: nobody else has this task
        if cycle.response_started:
            return
        from app.api.predict import request_id  # with everything that answers, which need not be here to listen

        headers = [
            *SAFE_JSON,
            (b"content-length", b"%d" % len(STOPPING)),
            (b"retry-after", b"5"),
            (b"connection", b"close"),
            (b"x-request-id", request_id(scope).encode()),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": STOPPING})


def _ignore(*numbers: signal.Signals) -> None:
    """Ignore signals from here on. Of one that comes in this very moment Python would print that it was ignored."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    sys.unraisablehook = hook


def _readable(transport: asyncio.BaseTransport) -> bool:
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))


class DrainingServer(uvicorn.Server):
    """uvicorn's server: not ready from the first signal on, any number of signals, exit code 0."""

    def __init__(self, config: uvicorn.Config, registry: Registry, *, drain_seconds: float) -> None:
        super().__init__(config)
        self._registry = registry
        self._drain_seconds = drain_seconds

    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Stop at SIGTERM or SIGINT. uvicorn would raise the signal again at the end, and die of it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            _ignore(signal.SIGTERM, signal.SIGINT)  # the process is about to end anyway, and to end well

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop. Platforms send SIGTERM more than once, and to every process: once is enough."""
        del sig, frame
        self._registry.draining = True
        self.leave()

    def leave(self) -> None:
        """Begin to end, while the service goes on: another process answers in the place of this one."""
        if not self.should_exit:
            _end_process_after(self._drain_seconds + EXIT_SECONDS)
        self.should_exit = True

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to listen, answer everything that was accepted, and end the application."""
        logger.info("stopping")
        waiting = [connection for sock in sockets or () for connection in _accept_all(sock)]
        for server in self.servers:
            server.close()
        for sock in sockets or ():
            sock.close()
        loop = asyncio.get_running_loop()
        for connection in waiting:
            await loop.connect_accepted_socket(self._protocol, connection)
        for protocol in list(self.server_state.connections):
            protocol.shutdown()
        if not await self._idle_within(self._drain_seconds):
            logger.warning("gave up requests", extra={"fields": {"count": len(self.server_state.connections)}})
            for task in self.server_state.tasks:
                task.cancel()
            for protocol in list(self.server_state.connections):
                protocol.give_up()  # type: ignore[union-attr]  # ours, as `configuration` says
            await self._idle_within(LAST_WORDS_SECONDS)
        await self.lifespan.shutdown()
        logger.info("stopped")

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    async def _idle_within(self, seconds: float) -> bool:
        """Wait until all connections are closed and all requests done; return whether they were in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.server_state.connections or self.server_state.tasks:
                    await asyncio.sleep(POLL_SECONDS)
        return not (self.server_state.connections or self.server_state.tasks)


def _accept_all(sock: socket.socket) -> list[socket.socket]:
    """Take what the kernel has accepted and the event loop has not seen: closing the listener would reset it."""
    sock.setblocking(False)
    connections = []
    with contextlib.suppress(OSError):  # BlockingIOError at the end; a connection may also have gone meanwhile
        while True:
            connection, _ = sock.accept()
            connection.setblocking(False)
            connections.append(connection)
    return connections


def _end_process_after(seconds: float) -> None:
    """End this process, well, even if a thread that cannot be interrupted goes on: a platform would kill it."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


def configuration(app: Any, *, keep_alive_seconds: int, http: Any = DrainingProtocol) -> uvicorn.Config:
    """Return uvicorn's configuration. Nothing of it is left to uvicorn's own variables."""
    return uvicorn.Config(
        app,
        http=http,
        loop="uvloop",
        ws="none",
        lifespan="on",
        workers=1,  # uvicorn would start WEB_CONCURRENCY full copies of the process
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=keep_alive_seconds,
    )


def serve(
    app: Any,
    registry: Registry,
    sock: socket.socket,
    *,
    keep_alive_seconds: int,
    drain_seconds: int,
    http: Any = DrainingProtocol,
) -> None:
    """Serve `app` on a listening socket until SIGTERM or SIGINT, then finish what was accepted.

    `http` makes the protocols of connections.
    """
    config = configuration(app, keep_alive_seconds=keep_alive_seconds, http=http)
    server = DrainingServer(config, registry, drain_seconds=drain_seconds)
    asyncio.run(server.serve(sockets=[sock]), loop_factory=config.get_loop_factory())
