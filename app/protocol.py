"""The uvicorn server as Diskless runs it: how it listens, and how it stops without losing a request.

uvicorn closes a connection that it takes for idle when it is told to stop, even while a request is on its way in it.
Here such a connection is answered once more, with `Connection: close`, or closed when it stays silent. What is not
answered when the time for that is over gets a 503 that says so.

Nor does uvicorn limit what a connection may cost. Here it has limits in time (`connections.py`), in what its heads may be,
and in how many requests it may send without waiting for their answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import logging
import os
import select
import signal
import socket
import sys
import termios
import threading
from collections.abc import Generator, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, override

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.api.headers import SAFE_JSON, lines_of
from app.api.routes import HEALTH
from app.connections import SWEEP_SECONDS, UNREAD_BYTES, Connections, Stage, State, Watch
from app.errors import HeadersTooLarge, InvalidRequest, RequestError
from app.limits import Limits, files_allowed
from app.listening import drop_newcomers

if TYPE_CHECKING:
    from app.registry import Registry

logger = logging.getLogger("diskless.server")
LINGER_SECONDS = 1.0  # how long a silent connection is kept open after the signal to stop
POLL_SECONDS = 0.02
LAST_WORDS_SECONDS = 0.5  # for the answers to what was given up
ACCEPTED_AT_ONCE = 128  # of those that wait when the connections are looked after
SPARE_FILES = 4  # with fewer left that the process could open, it accepts no connection
EXIT_SECONDS = 3.0  # beyond the drain; then the process ends whatever a model's thread is still computing
FUSE_SECONDS = 1.0  # beyond that, if the process cannot end itself
MAX_HEAD_BYTES = 64 * 1024  # of a head that comes in pieces; what comes at once is bounded by what is read at once
MAX_HEADERS = 128
MAX_PIPELINED = 32  # requests that are read before the first of them is answered
MANY_BYTES = 1024  # of less it is not looked how many requests they are
GARBAGE = "expected a request of HTTP/1.1, got bytes that are none"
JSON_OF_BYTES = lines_of(SAFE_JSON) + b"content-length: "
CLOSE = b"connection: close\r\n"
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
        if protocol._later:
            return
        if not protocol.pipeline or protocol._stopping or protocol._broken:
            super().resume_reading()


class DrainingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with limits, and with an orderly end for connections that are kept alive."""

    server_state: Connections

    for_health = False
    _stopping = False
    _broken: RequestError | None = None  # why nothing is read any more; to be told when what came before is answered
    _offer: bytes | None = None  # the head of a request that offers another protocol, without the offer
    _last: RequestResponseCycle | None = None  # the request whose answer is to say that the connection closes
    _later = b""  # what has arrived, and is not read before what came before it is answered
    _running: RequestResponseCycle | None = None  # the latest that the application was given
    _between = True  # the parser is between two requests
    _idle_bytes = 0  # of a head, or of a body's framing since there was a piece of it; -1: there was one just now

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin with a connection."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self)
        self.watch = Watch()
        if len(self.connections) > self.server_state.most:
            self.server_state.make_room(self)
        if self.server_state.are_ending:  # it was accepted before
            self.shutdown()

    @override
    def shutdown(self) -> None:
        """Begin to stop: answer what is under way and at most what comes next, then close."""
        self._stopping = True
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER_SECONDS, self._close_if_silent)
        elif self.cycle.response_started or self._later:
            return  # its headers have promised that the connection goes on, or another request is here already
        else:
            self._close_after(self.cycle)

    @override
    def data_received(self, data: bytes) -> None:
        """Take what has arrived. An offer to change to HTTP/2, as Java's client makes it, is passed over.

        The parser drops the body of a request with such an offer, so the request is parsed once more without it.
        """
        if self._broken is not None:
            return
        if len(data) > MANY_BYTES and (end := _end_of_first(data)) < len(data):
            data, self._later = data[:end], data[end:] + self._later
            self.flow.pause_reading()
            self.loop.call_soon(self._go_on)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if self._offer is not None:
                head, self._offer = self._offer, None
                self.parser = httptools.HttpRequestParser(self)
                self.data_received(head + data[offer.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__  # what a callback has raised
            self._refuse_rest(cause if isinstance(cause, RequestError) else InvalidRequest(GARBAGE))
        else:
            if not self._between:
                self._count(len(data))

    def _go_on(self) -> None:
        """Read what was left for later, if that is now."""
        cycle = self.cycle
        is_free = not self.pipeline and (cycle is None or cycle.response_complete or cycle.more_body)
        if self._later and is_free and not self.transport.is_closing():
            data, self._later = self._later, b""
            self.flow.resume_reading()
            self.data_received(data)

    def _count(self, size: int) -> None:
        """Count what has arrived of a head, or between the pieces of a body: that much is kept of it, and more."""
        if self._idle_bytes < 0:
            self._idle_bytes = 0
            return
        self._idle_bytes += size
        if self._idle_bytes > MAX_HEAD_BYTES:
            self._refuse_rest(HeadersTooLarge(f"expected headers of at most {MAX_HEAD_BYTES} bytes, got more"))
        elif len(self.headers) > MAX_HEADERS:
            self._refuse_rest(_too_many_headers())

    def _refuse_rest(self, error: RequestError) -> None:
        """Refuse what is at hand, and read nothing behind it. What came whole before it is answered first."""
        if not self.pipeline and (self.cycle is None or self.cycle.response_complete or self.cycle.more_body):
            self.reject(error)
        else:
            self._broken = error
            self._later = b""
            self.flow.resume_reading()  # to drop what comes behind: closed before, the connection would take answers along

    @override
    def on_message_begin(self) -> None:
        """Begin with a head."""
        super().on_message_begin()
        self._between = False
        self._idle_bytes = 0

    @override
    def on_headers_complete(self) -> None:
        """Start a request; once stopping, its answer says that the connection closes."""
        if len(self.headers) > MAX_HEADERS:
            raise _too_many_headers()
        if self.for_health and self.url.partition(b"?")[0].decode("latin-1") not in HEALTH:
            raise self.server_state.all_taken()
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._offer = self._head_without_offer()
            return
        self._idle_bytes = -1
        before = self.cycle
        super().on_headers_complete()
        self.headers = []  # what comes behind the body is no part of the head, which proxies have looked at
        if self.for_health:
            self._close_after(self.cycle)
        elif self._stopping and self.cycle is not before and not self._later:
            if before is not None and before is self._last and not before.response_started:
                before.keep_alive = True  # this one was sent behind it without waiting: it is owed an answer, too
            self._close_after(self.cycle)

    @override
    def on_body(self, body: bytes) -> None:
        """Take a piece of a body. One whose request is being answered already is not read any more by our application."""
        self._idle_bytes = -1
        if not self.cycle.response_started:
            super().on_body(body)

    @override
    def on_response_complete(self) -> None:
        """Go on with the connection; once stopping, see to it that it ends even if nothing more comes.

        Unlike uvicorn's it sets no alarm: `Connections.sweep` closes what stays idle.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            if self._broken is not None and cycle.more_body:  # its rest was refused, and all before it is answered
                self.reject(self._broken)
            else:
                self._start_asgi_task(cycle, app)
        elif self._broken is not None:
            self.reject(self._broken)
        if self._later:
            self.loop.call_soon(self._go_on)
        if self._stopping:
            self.loop.call_later(LINGER_SECONDS, self._close_if_silent)

    @override
    def on_message_complete(self) -> None:
        """End a request's body, unless the request is to be parsed once more."""
        self._between = True
        if self._offer is None:
            super().on_message_complete()

    # What `Connections` asks

    def state(self) -> State:
        """Return what the connection is at."""
        cycle = self.cycle
        unread = self.transport.get_write_buffer_size()
        if unread:
            unread += _in_kernel(self.transport)
        if self.transport.is_closing():
            return Stage.CLOSING, None, unread // UNREAD_BYTES
        if unread:
            return Stage.UNREAD, cycle, unread // UNREAD_BYTES
        if self.pipeline or (cycle is not None and not cycle.response_complete and not cycle.more_body):
            return Stage.ANSWERING, cycle, 0
        if self._between:
            return (Stage.NEW if cycle is None else Stage.IDLE), cycle, 0
        if cycle is None or cycle.scope is not self.scope:
            return Stage.HEAD, self.scope, 0
        return Stage.BODY, cycle, 0

    def keep_for_health(self) -> None:
        """Answer one request for the service's health, and refuse anything else."""
        self.for_health = True

    def is_held_up(self) -> bool:
        """Whether the application has not asked for what has not arrived of a body."""
        return self.flow.read_paused or getattr(self.cycle, "waiting_for_100_continue", False)

    def has_arrived(self) -> bool:
        """Whether the kernel has something that was not read yet."""
        return _readable(self.transport)

    def reject(self, error: RequestError) -> None:
        """Answer the request of which a part is here with an error, if it is not answered already, and close."""
        from app.api import errors  # with everything that answers, which need not be here to listen

        self._broken = error
        cycle = self.cycle
        is_begun = cycle is not None and not self._between and cycle.scope is self.scope
        if is_begun and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if not (is_begun and cycle.response_started):
            status, body, headers = errors.encode(error)
            identity = self._identity()
            self.transport.write(self._error(status, body, headers, identity, keep_alive=False))
            self._tell(error, status, identity)
        self.transport.close()

    def _tell(self, error: RequestError, status: int, identity: str) -> None:
        """Take note of an error that was sent."""

    def _identity(self) -> str:
        """Return the id of the request of which a part is here: the caller's, if that part has it."""
        from app.api.predict import new_request_id, request_id

        scope: Any = self.scope
        return new_request_id() if self._between else request_id(scope)

    def _error(self, status: int, body: bytes, headers: dict[str, str], request_id: str, keep_alive: bool) -> bytes:
        """Return an answer that is an error, as it is sent."""
        own = [(b"x-request-id", request_id.encode())]
        own += [(name.encode(), value.encode()) for name, value in headers.items()]
        start = STATUS_LINE[status] + lines_of(self.server_state.default_headers) + JSON_OF_BYTES
        close = b"" if keep_alive else CLOSE
        return b"%b%d\r\n%b%b\r\n%b" % (start, len(body), lines_of(own), close, body)

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
        if self._later or (self.cycle is not None and not self.cycle.response_complete):
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
    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application whose answer nobody takes any more. uvicorn tells the one of the latest request."""
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, partial(_answered, cycle, app))


def _end_of_first(data: bytes) -> int:
    """Return a place in the data before which no more than `MAX_PIPELINED` requests are. Each has an empty line, and another."""
    if data.count(b"\n") <= 2 * MAX_PIPELINED:
        return len(data)
    end = 0
    for _ in range(MAX_PIPELINED):
        end = data.find(b"\n\r\n", end) + 3
        if end < 3:
            return len(data)
    return end


def _too_many_headers() -> RequestError:
    return HeadersTooLarge(f"expected at most {MAX_HEADERS} headers, got more")


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


def _in_kernel(transport: asyncio.BaseTransport) -> int:
    """Return how many bytes the kernel has taken and the other side has not: it may be some MB, and it takes more by the MB."""
    with contextlib.suppress(OSError):  # closed meanwhile, or a system that does not tell
        return int.from_bytes(
            fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder
        )
    return 0


def _readable(transport: asyncio.BaseTransport) -> bool:
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))


class DrainingServer(uvicorn.Server):
    """uvicorn's server: not ready from the first signal on, any number of signals, exit code 0."""

    def __init__(self, config: uvicorn.Config, registry: Registry, *, limits: Limits, drain_seconds: float) -> None:
        super().__init__(config)
        self.connections = self.server_state = Connections(limits)
        self._registry = registry
        self._drain_seconds = drain_seconds
        self._listening: list[
            tuple[socket.socket, socket.socket]
        ] = []  # each, and its duplicate, which is the event loop's
        self._accepting = asyncio.Lock()

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
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and to look after the connections."""
        self._listening = [(sock, sock.dup()) for sock in sockets or ()]
        await super().startup([duplicate for _, duplicate in self._listening])
        self._caretaker = asyncio.create_task(self._look_after_connections())

    async def _look_after_connections(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                self.connections.sweep()
                await self._mind_the_files()
                await self._accept_waiting()
            except Exception:
                logger.exception("the connections could not be looked after")

    async def _mind_the_files(self) -> None:
        """Accept connections as long as files can be opened for them; without one, the event loop would try without a pause."""
        for place, (sock, duplicate) in enumerate(self._listening):
            is_accepting = duplicate.fileno() >= 0
            if self.should_exit or is_accepting == _can_open(SPARE_FILES if is_accepting else 2 * SPARE_FILES):
                continue
            self.servers[place].close()  # callers wait: the socket itself stays open
            if is_accepting:
                logger.error("no more files can be opened: no connection is accepted until some are closed")
                continue
            again = sock.dup()
            self._listening[place] = sock, again
            self.servers[place] = await asyncio.get_running_loop().create_server(
                self._protocol, sock=again, backlog=self.config.backlog
            )
            logger.warning("connections are accepted again")

    async def _accept_waiting(self) -> None:
        """Accept several connections at once. The event loop accepts one in a turn, and may be busy for long in each."""
        async with self._accepting:
            for sock, duplicate in self._listening:
                if duplicate.fileno() >= 0 and not self.should_exit:
                    # Of each that is too many one goes, but a little later: until then both have their files.
                    await self._take(_accept_all(sock, ACCEPTED_AT_ONCE, spare_files=2 * SPARE_FILES))

    async def _take(self, accepted: Sequence[socket.socket]) -> None:
        """Begin with connections. One that cannot be begun with is closed."""
        loop = asyncio.get_running_loop()
        begun = await asyncio.gather(
            *(loop.connect_accepted_socket(self._protocol, connection) for connection in accepted),
            return_exceptions=True,
        )
        for connection, outcome in zip(accepted, begun, strict=True):
            if isinstance(outcome, BaseException):
                logger.error("a connection could not be begun", exc_info=outcome)
                connection.close()

    @property
    def _is_last(self) -> bool:
        """Whether nobody goes on to accept connections of the same socket."""
        return True

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to listen, answer everything that was accepted, and end the application."""
        logger.info("stopping", extra={"fields": {"pid": os.getpid()}})
        self.connections.are_ending = True
        async with self._accepting:  # what was being accepted has all come
            # Closing the listeners would reset those that the event loop has not seen yet, and who comes in between.
            if self._is_last:
                for sock in sockets or ():
                    drop_newcomers(sock)
            waiting = [connection for sock in sockets or () for connection in _accept_all(sock)]
            for server in self.servers:
                server.close()
            for sock, _ in self._listening:
                sock.close()
            self.connections.most = sys.maxsize  # no others will come, and these were accepted
            await self._take(waiting)
        for protocol in list(self.server_state.connections):
            protocol.shutdown()
        if not await self._idle_within(self._drain_seconds):
            logger.warning("gave up requests", extra={"fields": {"count": len(self.server_state.connections)}})
            for task in self.server_state.tasks:
                task.cancel()
            for protocol in list(self.server_state.connections):
                protocol.give_up()  # type: ignore[union-attr]  # ours, as `configuration` says
            await self._idle_within(LAST_WORDS_SECONDS)
        self._caretaker.cancel()
        await self.lifespan.shutdown()
        logger.info("stopped", extra={"fields": {"pid": os.getpid()}})

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


def _can_open(count: int) -> bool:
    """Whether the process may open so many files more."""
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    finally:
        for file in opened:
            os.close(file)
    return True


def _accept_all(sock: socket.socket, most: int = sys.maxsize, spare_files: int = 0) -> list[socket.socket]:
    """Take what the kernel has accepted and the event loop has not seen; leave so many files to open."""
    sock.setblocking(False)
    connections: list[socket.socket] = []
    last = files_allowed() - spare_files - 1
    with contextlib.suppress(OSError):  # BlockingIOError at the end; a connection may also have gone meanwhile
        while len(connections) < most:
            connection, _ = sock.accept()
            connection.setblocking(False)
            connections.append(connection)
            if connection.fileno() >= last:  # the kernel gives the lowest number that is free
                break
    return connections


def _end_process_after(seconds: float) -> None:
    """End this process, well, even if a thread that cannot be interrupted goes on: a platform would kill it."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()
    # A thread that never lets go of the interpreter keeps the timer from it. This one does not need it.
    faulthandler.dump_traceback_later(seconds + FUSE_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115


def configuration(app: Any, http: Any = DrainingProtocol) -> uvicorn.Config:
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
    )


def serve(
    app: Any,
    registry: Registry,
    sock: socket.socket,
    *,
    limits: Limits,
    drain_seconds: int,
    http: Any = DrainingProtocol,
) -> None:
    """Serve `app` on a listening socket until SIGTERM or SIGINT, then finish what was accepted.

    `http` makes the protocols of connections.
    """
    config = configuration(app, http)
    server = DrainingServer(config, registry, limits=limits, drain_seconds=drain_seconds)
    asyncio.run(server.serve(sockets=[sock]), loop_factory=config.get_loop_factory())
