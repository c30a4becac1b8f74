"""A real HTTP server between a client and an S3 server that spoils answers on demand.

    with FaultyProxy(s3.endpoint_url) as proxy:
        proxy.inject(cut(after_bytes=10), method="GET", times=2)
        ...  # a client of proxy.url; then proxy.seen is what it asked for

Signatures stay valid: the server takes the host for granted that the client named, and that is this proxy.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

FOR_EVER = 1_000_000


@dataclass(frozen=True)
class Seen:
    """One request that reached the proxy."""

    method: str
    target: str
    headers: Mapping[str, str]


@dataclass
class Answer:
    """What the server answered; faults change it."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Fault:
    """What to do with one request: answer without asking the server, or spoil what the server answered.

    `sent_bytes` limits how much of the body goes out before the connection is closed, or before nothing more comes if
    it `hangs`; 0 sends no headers either.
    """

    instead: Answer | None = None
    spoil: Callable[[Answer], Answer] = lambda answer: answer
    sent_bytes: int | None = None
    hangs: bool = False
    asks: bool = True
    delay_seconds: float = 0.0


def status(code: int, error: str = "", message: str = "") -> Fault:
    """Answer with an S3 error and do not ask the server."""
    text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{error}</Code><Message>{message}</Message></Error>"
    return Fault(instead=Answer(code, {"Content-Type": "application/xml"}, text.encode() if error else b""))


def page(text: str) -> Fault:
    """Answer 200 with a web page, as a captive portal does."""
    return Fault(instead=Answer(200, {"Content-Type": "text/html"}, text.encode()))


def redirect(code: int, error: str) -> Fault:
    """Answer as S3 does for a bucket of another region."""
    text = f"<Error><Code>{error}</Code><Endpoint>elsewhere.invalid</Endpoint></Error>"
    return Fault(instead=Answer(code, {"x-amz-bucket-region": "elsewhere"}, text.encode()))


def cut(after_bytes: int) -> Fault:
    """Send the headers and the first bytes of the body, then close the connection."""
    return Fault(sent_bytes=max(after_bytes, 1))


def drop() -> Fault:
    """Close the connection without asking the server."""
    return Fault(sent_bytes=0, asks=False)


def lose_answer(code: int | None = None) -> Fault:
    """Let the server do it, then close the connection, or answer with the status `code`."""
    if code is None:
        return Fault(sent_bytes=0)
    return Fault(spoil=lambda answer: Answer(code, {}, b""))


def hang(after_bytes: int = 0) -> Fault:
    """Send the first bytes of the body, then nothing more; with 0 do not even ask the server."""
    return Fault(sent_bytes=after_bytes, hangs=True, asks=after_bytes > 0)


def truncate(to_bytes: int) -> Fault:
    """Shorten the body, and Content-Length with it: a well-formed answer that is too short."""
    return Fault(spoil=lambda answer: Answer(answer.status, answer.headers, answer.body[:to_bytes]))


def corrupt(at_byte: int) -> Fault:
    """Flip one byte of the body."""

    def flip(answer: Answer) -> Answer:
        body = bytearray(answer.body)
        if body:  # that of an error to a HEAD, or of a 304, has none
            body[at_byte] ^= 0xFF
        return Answer(answer.status, answer.headers, bytes(body))

    return Fault(spoil=flip)


def delay(seconds: float) -> Fault:
    """Answer as the server does, but later."""
    return Fault(delay_seconds=seconds)


def replay(answer: Answer) -> Fault:
    """Answer as the server did earlier, as a replica does that lags behind: 304 to who has that very state."""
    return Fault(instead=answer)


def resize(by_bytes: int) -> Fault:
    """Say another Content-Length than the object has; for HEAD, which sends no body."""

    def change(answer: Answer) -> Answer:
        lengths = {name: int(value) + by_bytes for name, value in answer.headers.items() if _is(name, "content-length")}
        return Answer(answer.status, answer.headers | {name: str(size) for name, size in lengths.items()}, b"")

    return Fault(spoil=change)


def after(event: Callable[[], object], fault: Fault) -> Fault:
    """Do `fault`, and let something happen on the server between its answer and what the client sees of it."""

    def spoil(answer: Answer) -> Answer:
        event()
        return fault.spoil(answer)

    return replace(fault, spoil=spoil)


def _is(name: str, lower: str) -> bool:
    return name.lower() == lower


def _header(headers: Mapping[str, str], lower: str) -> str:
    return next((value for name, value in headers.items() if _is(name, lower)), "")


@dataclass
class _Rule:
    fault: Fault
    method: str | None
    containing: str
    span: str
    times: int

    def is_for(self, method: str, target: str, span: str) -> bool:
        return bool(
            self.times and self.method in (None, method) and self.containing in target and span.startswith(self.span)
        )


@dataclass
class FaultyProxy:
    """Passes requests to the server at `target`, and spoils those that a rule of `inject` is for."""

    target: str
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0  # how many were made
    tls: ssl.SSLContext | None = None  # what it speaks with

    def __enter__(self) -> Self:
        self._rules: list[_Rule] = []
        self._recorded: tuple[str, list[Answer]] | None = None
        self._guard = threading.Lock()
        self._over = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler, self)
        if self.tls is not None:  # before the thread asks for the socket's number
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The endpoint to give to the client."""
        return f"http://127.0.0.1:{self._server.server_port}{urlsplit(self.target).path}"

    def inject(
        self, fault: Fault, *, method: str | None = None, containing: str = "", span: str = "", times: int = 1
    ) -> None:
        """Do `fault` to the next `times` requests with this method and this in their path and query.

        With `span`, only to those whose Range begins so: `bytes=0-` is the beginning of an object.
        """
        with self._guard:
            self._rules.append(_Rule(fault, method, containing, span, times))

    def heal(self) -> None:
        """Forget all faults, and let go what hangs or is delayed."""
        with self._guard:
            self._rules.clear()
        self._over.set()
        self._over = threading.Event()

    def hangs(self, method: str, target: str, span: str = "") -> bool:
        """Whether the next request like this will not be answered, or not to its end."""
        with self._guard:
            rule = self._rule(method, target, span)
            return rule is not None and rule.fault.hangs

    def methods(self) -> list[str]:
        """Return the methods of all requests so far."""
        return [seen.method for seen in self.seen]

    @contextlib.contextmanager
    def recording(self, containing: str) -> Iterator[list[Answer]]:
        """Collect the answers with a body to reads of targets with this in them, for `replay`."""
        answers: list[Answer] = []
        self._recorded = (containing, answers)
        try:
            yield answers
        finally:
            self._recorded = None

    def _record(self, method: str, target: str, answer: Answer) -> None:
        recorded = self._recorded
        if recorded is not None and recorded[0] in target and method == "GET" and answer.status in (200, 206):
            recorded[1].append(answer)

    def _fault(self, method: str, target: str, span: str) -> Fault:
        with self._guard:
            rule = self._rule(method, target, span)
            if rule is None:
                return Fault()
            rule.times -= 1
            return rule.fault

    def _rule(self, method: str, target: str, span: str) -> _Rule | None:
        """The first rule that is for such a request. The guard must be held."""
        return next((rule for rule in self._rules if rule.is_for(method, target, span)), None)

    def _ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        url = urlsplit(self.target)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, target, body=body, headers=dict(headers))
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # who does not fit into it waits for a second
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], proxy: FaultyProxy) -> None:
        self.proxy = proxy
        self._connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        self.proxy.connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that hangs up is no error of the proxy's
            super().handle_error(request, client_address)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet
    server: _Server

    def _answer(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        over = proxy._over  # before the fault: who heals in between forgets that, and lets go of this
        fault = proxy._fault(self.command, self.path, _header(headers, "range"))
        proxy.seen.append(Seen(self.command, self.path, headers))  # whoever sees it may heal: it has its fault
        answer = fault.instead or Answer(204, {}, b"")
        if (etag := _header(answer.headers, "etag")) and etag == _header(headers, "if-none-match"):
            answer = Answer(304, answer.headers, b"")
        if fault.asks and not fault.instead:
            answer = proxy._ask(self.command, self.path, headers, body)
            proxy._record(self.command, self.path, answer)
            answer = fault.spoil(answer)
        if fault.delay_seconds:
            over.wait(fault.delay_seconds)
        if fault.sent_bytes != 0:
            self._send(answer, answer.body if fault.sent_bytes is None else answer.body[: fault.sent_bytes])
        if fault.hangs:
            over.wait(60)
        if fault.sent_bytes is not None:
            self.close_connection = True

    def _send(self, answer: Answer, body: bytes) -> None:
        self.send_response_only(answer.status)
        own = {"content-length", "connection", "transfer-encoding"}
        for name, value in answer.headers.items():
            if name.lower() not in own:
                self.send_header(name, value)
        promised = _header(answer.headers, "content-length") if self.command == "HEAD" else ""
        length = promised or str(len(answer.body))
        if answer.status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.command != "HEAD":
                self.wfile.write(body)
            self.wfile.flush()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """The tests say what goes wrong."""
