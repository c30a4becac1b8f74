"""Plain prediction requests, answered in the protocol itself: no ASGI task, no events, one write.

Plain is: `POST`, the exact path, HTTP/1.1 that is kept alive, one `Content-Length` within the limit, no `Transfer-Encoding`,
no `Expect`, no offer of another protocol, nothing pending before it on the connection, and a body that the model's decoder
takes. Everything else, errors included, goes uvicorn's own way to the ASGI application, which gives the same answers.

Clients that keep a connection send the same head again and again. The parser reads it once; the same bytes mean the same
request the next time, so then only the body is looked at. Where only lines differ that are another each time (a request id, the body's
length, what proxies add), the other lines still mean the same.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from typing import Any, ClassVar, NamedTuple, override

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from app import log
from app.api import compression, errors
from app.api.headers import Header, Hosts, lines_of
from app.api.predict import (
    GZIPPED,
    REFUSAL,
    REQUEST_ID,
    SMALL_BODY_BYTES,
    TEMPLATES,
    Front,
    Predictor,
    new_request_id,
    predicted_model,
    read_length,
    read_timeout,
)
from app.api.routes import ROUTES
from app.auth import ANYONE, Caller
from app.connections import Stage, State
from app.errors import Overloaded, RateLimited, RequestError, Unauthorized
from app.intake import Draft
from app.limits import COUNTED_BYTES, WEIGHED_BYTES, Claim
from app.observer import Record
from app.protocol import CLOSE, JSON_OF_BYTES, MAX_HEADERS, STOPPING, DrainingProtocol
from app.runner import Job, Result, Target
from app.service_counters import Route
from app.spans import NOT_SAMPLED, Headers, Parent, parse_parent, read_parent

PATH = re.compile(rb"/(?:predict|models/([A-Za-z0-9._-]{1,100})/predict)\Z")
MAX_HEADS = 512
MAX_LINES = 4096
MAX_HEAD_BYTES = 2048
_NEVER_PLAIN = frozenset((b"transfer-encoding", b"expect", b"upgrade", b"content-encoding"))
# Another in each request, or for each caller of a proxy. None of it decides whether a request is plain, or who calls.
_VARYING = frozenset(
    (
        *(b"content-length", b"x-request-id", b"x-forwarded-for", b"x-real-ip", b"cf-connecting-ip", b"cf-ray"),
        *(b"traceparent", b"tracestate", b"x-amzn-trace-id", b"x-cloud-trace-context", b"x-b3-traceid", b"x-b3-spanid"),
        *(b"x-request-start", b"connect-time", b"total-route-time"),
    )
)
_TRACEPARENT = b"\r\ntraceparent: "
_VISIBLE = bytes(range(32, 127)) + b"\t"
_BOUNDARY = b"\r\n\r\n"
_GZIPPED = lines_of(GZIPPED)


class Plan(NamedTuple):
    """What the head of a plain request says: the model that its path names, the body's length in bytes, its request id.

    Who calls, and for how many seconds it waits at most, where it says so; whether it takes gzip; where traces are wanted, the
    span of the caller's that it belongs to.
    """

    name: str | None
    length: int
    request_id: str | None
    caller: Caller = ANYONE
    timeout: float | None = None
    takes_gzip: bool = False
    parent: Parent | None = None


class Shared:
    """What the connections of a server have in common: who predicts, the heads that are known, how an answer begins.

    With `hosts`, plain is only what names one of them; unless `of_any_origin`, nothing is that comes of a page of another origin.
    """

    def __init__(self, predictor: Predictor, *, hosts: Hosts | None = None, of_any_origin: bool = True) -> None:
        self.predictor = predictor
        self.observer = predictor.observer
        self.hosts = hosts
        self.never_plain = _NEVER_PLAIN if of_any_origin else _NEVER_PLAIN | {b"origin"}
        # By Python's keyed hash (SipHash, 64 bits) instead of the bytes: keys of callers are not kept, nor compared byte by byte.
        self.heads: dict[int, Plan] = {}
        self.cut_heads: dict[int, Plan] = {}  # by what is left of them when the request id is cut out
        self.before_id = b""  # how the line of the request id begins, as clients write it here
        self.forms: dict[int, Plan] = {}  # of what is left of a head without its varying lines
        self._lines: set[int] = set()  # which are not varying
        self._headers: Any = None
        self._start = b""

    def remember(self, head: bytes, plan: Plan) -> None:
        """Take note that these bytes, and no fewer, are the head of such a request."""
        if head.count(b"\n") != head.count(b"\r\n") or not sys.flags.hash_randomization:
            return  # not as everyone would read it; or anyone could say what the hash of something else must be
        self._keep(head, plan)
        if b"\r\n " in head or b"\r\n\t" in head:
            return  # a line that goes on with the one before it
        if len(self._lines) >= MAX_LINES or len(self.forms) >= MAX_HEADS:
            self._lines.clear()
            self.forms.clear()
        fixed = [line for line in head.split(b"\r\n") if line.partition(b":")[0].lower() not in _VARYING]
        self._lines.update(map(hash, fixed))
        self.forms[hash(b"\r\n".join(fixed))] = plan

    def recognise(self, head: bytes) -> Plan | None:
        """Return what a head means that differs from a known one in nothing but varying lines; None if that cannot be said."""
        lines = self._lines
        fixed = []
        length = request_id = None
        comes_again = True
        parts = head.split(b"\r\n")
        if len(parts) > MAX_HEADERS:
            return None
        for line in parts:
            if hash(line) in lines:
                fixed.append(line)
                continue
            name, colon, value = line.partition(b": ")
            name = name.lower()
            if name == b"content-length":
                if length is not None or (length := read_length(value)) is None:
                    return None
            elif name == b"x-request-id":
                text = value.decode("latin-1")
                if request_id is not None or not REQUEST_ID.match(text):
                    return None
                request_id = text
            elif not colon or name not in _VARYING or value.translate(None, _VISIBLE):
                return None
            else:
                comes_again = False
        plan = self.forms.get(hash(b"\r\n".join(fixed)))
        if plan is None or length is None or length > self.predictor.max_body_bytes or length > COUNTED_BYTES:
            return None
        plan = Plan(plan.name, length, request_id, plan.caller, plan.timeout, plan.takes_gzip)
        if comes_again:
            self._keep(head, plan)
        return plan

    def _keep(self, head: bytes, plan: Plan) -> None:
        if plan.length > COUNTED_BYTES:
            return  # it is read piece by piece, and counted
        if len(self.heads) + len(self.cut_heads) >= MAX_HEADS:
            self.heads.clear()
            self.cut_heads.clear()
        if plan.request_id is None:
            self.heads[hash(head)] = plan
        elif (cut := self._cut(head, plan.request_id)) is not None:
            self.cut_heads[cut] = plan

    def _cut(self, head: bytes, request_id: str) -> int | None:
        """Return what a head is known by when its request id is cut out; None where it is not written as usual."""
        value = request_id.encode()
        at = head.find(b": " + value + b"\r\n")
        before = head[head.rfind(b"\r\n", 0, at) : at + 2]
        if at < 0 or before.lower() != b"\r\nx-request-id: ":
            return None
        self.before_id = before
        at = head.find(before)  # the first one, as who looks for it later will find it
        stop = head.find(b"\r\n", at + len(before))
        if head[at + len(before) : stop] != value:
            return None
        return hash(head[: at + len(before)] + head[stop:])

    def with_id(self, head: bytes) -> tuple[Plan, str] | None:
        """Return what a head means that differs from a known one in its request id at most, and that."""
        at = head.find(self.before_id) + len(self.before_id)
        stop = head.find(b"\r\n", at)
        plan = self.cut_heads.get(hash(head[:at] + head[stop:]))
        if plan is None:
            return None
        request_id = head[at:stop].decode("latin-1")
        return (plan, request_id) if REQUEST_ID.match(request_id) else None

    def parent_in(self, headers: Headers) -> Parent | None:
        """Return whose span a request belongs to, where that matters."""
        del headers
        return None

    def start(self, headers: list[Header]) -> bytes:
        """Return how an answer with status 200 begins. uvicorn makes its own headers anew every second."""
        if headers is not self._headers:
            self._start = STATUS_LINE[200] + lines_of(headers) + JSON_OF_BYTES
            self._headers = headers
        return self._start


class TracingShared(Shared):
    """The same where traces are wanted: whose span a request belongs to is a part of what its head means."""

    @override
    def parent_in(self, headers: Headers) -> Parent | None:
        return read_parent(headers)

    @override
    def recognise(self, head: bytes) -> Plan | None:
        plan = super().recognise(head)
        if plan is None:
            return None
        lower = head.lower()
        at = lower.find(_TRACEPARENT)
        if at < 0:
            return plan
        at += len(_TRACEPARENT)
        parent: Parent | None = NOT_SAMPLED
        if self.observer.has_room():  # else it does not matter what it says
            parent = None
            if lower.find(_TRACEPARENT, at) < 0:  # several are none
                parent = parse_parent(head[at : head.find(b"\r\n", at)])
            if parent is not None and parent.is_sampled and b"\r\ntracestate: " in lower:
                lines = (line.partition(b": ") for line in head.split(b"\r\n"))
                parent = read_parent([(name.lower(), value) for name, _, value in lines])
        return Plan(plan.name, plan.length, plan.request_id, plan.caller, plan.timeout, plan.takes_gzip, parent)


class _Unheard:
    """Stands for the event by which uvicorn tells an ASGI application that its caller has gone."""

    def set(self) -> None:
        """Do nothing: there is no application."""


class Exchange(Job):
    """A plain request and its answer. To uvicorn it is what a request and its ASGI application are otherwise."""

    __slots__ = ("disconnected", "keep_alive", "plan", "protocol", "response_complete", "response_started", "scope")

    message_event: ClassVar[_Unheard] = _Unheard()
    more_body: ClassVar[bool] = False
    comes_at_once: ClassVar[bool] = True

    def __init__(self, protocol: DirectProtocol, plan: Plan, target: Target, draft: Draft, size: int) -> None:
        super().__init__(target, len(draft), draft=draft, size=size)
        self.protocol = protocol
        self.plan = plan
        self.scope = protocol.scope
        self.keep_alive = True
        self.response_started = self.response_complete = self.disconnected = False

    @override
    def succeed(self, result: Result, start: int, stop: int) -> None:
        try:
            body = self.target.encode(result, start, stop)
        except Exception as error:
            self._broken(error)
        else:
            self.protocol.answer(self, body)

    @override
    def fail(self, error: RequestError) -> None:
        self.protocol.refuse(self, *errors.encode(error), code=error.code)

    def _broken(self, error: Exception) -> None:
        with log.about(self.request_id, None if self.record is None else self.record.trace_id):
            errors.logger.error("a prediction request failed", exc_info=error)
            answer = errors.internal()
        self.protocol.refuse(self, *answer, code="internal_error")


class DirectProtocol(DrainingProtocol):
    """uvicorn's HTTP protocol, answering plain predictions itself."""

    def __init__(self, shared: Shared, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._shared = shared
        self._ready = True  # nothing is pending on this connection, and the parser is between two requests
        self._may_be_plain = False  # the request that the parser is at
        self._plan: Plan | None = None  # of the request whose body the parser is at
        self._pieces: list[bytes] = []
        self._head: bytes | None = None  # of the request that the parser is about to read
        self._held: bytearray | None = None  # a request with a known head, whose body is still arriving
        self._exchange: Exchange | None = None
        self._claim: Claim | None = None  # of a large body, until its rows have it
        self._unread: Claim | None = None  # of large answers, until they are taken

    @override
    def data_received(self, data: bytes) -> None:
        if self._ready:
            end = data.find(_BOUNDARY) + 4
            if end >= 4 and not self.flow.write_paused:
                head = data[:end]
                shared = self._shared
                plan = shared.heads.get(hash(head))
                request_id = None
                if plan is None and data.startswith(b"POST /"):
                    if shared.cut_heads and (found := shared.with_id(head)) is not None:
                        plan, request_id = found
                    elif shared.forms and (plan := shared.recognise(head)) is not None:
                        request_id = plan.request_id
                if plan is None:
                    if end <= MAX_HEAD_BYTES and data.startswith(b"POST /"):
                        self._head = head
                elif len(data) - end == plan.length:
                    if self._begin(plan, data[end:], request_id):
                        return
                elif len(data) - end < plan.length:
                    self._ready = False
                    self._plan, self._held = plan._replace(request_id=request_id), bytearray(data)
                    return
        elif self._held is not None:
            held, plan = self._held, self._plan
            assert plan is not None
            held += data
            end = held.index(_BOUNDARY) + 4
            if len(held) - end < plan.length:
                return
            self._held = self._plan = None
            self._ready = not self._stopping
            data = bytes(held)
            if self._ready and len(data) - end == plan.length and self._begin(plan, data[end:], plan.request_id):
                return
        super().data_received(data)
        self._head = None

    @override
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._may_be_plain = self._ready and not self.flow.write_paused
        self._ready = False

    @override
    def on_headers_complete(self) -> None:
        head, self._head = self._head, None
        if self._may_be_plain:
            self._plan = self._read_plan(head)
            if self._plan is not None:
                return
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        if self._plan is not None:
            self._pieces.append(body)
            if self._plan.length > COUNTED_BYTES:
                self._hold(len(body))
        else:
            super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        plan = self._plan
        if plan is None:
            super().on_message_complete()
            self._settle()
            return
        self._between = True
        body = b"".join(self._pieces)
        self._pieces.clear()
        self._plan = None
        if not self._begin(plan, body, plan.request_id):
            self._release()
            super().on_headers_complete()
            self.cycle.body += body
            super().on_message_complete()

    def _read_plan(self, head: bytes | None) -> Plan | None:
        """Return what the headers that were just read say, if they are those of a plain request; `head` is all of them as it came."""
        parser, shared = self.parser, self._shared
        match = PATH.match(self.url)
        if match is None or parser.get_method() != b"POST" or parser.get_http_version() != "1.1":
            return None
        if len(self.headers) > MAX_HEADERS:
            return None
        if self._stopping or not parser.should_keep_alive() or parser.should_upgrade():
            return None
        predictor = shared.predictor
        length: int | None = None
        request_id: str | None = None
        timeout: float | None = None
        takes_gzip = False
        for name, value in self.headers:
            if name == b"content-length":
                if length is not None or (length := read_length(value)) is None:
                    return None
            elif name == b"x-request-id":
                text = value.decode("latin-1")
                if request_id is None and REQUEST_ID.match(text):
                    request_id = text
            elif name == b"x-request-timeout":
                if timeout is not None or (timeout := read_timeout(value)) is None:
                    return None
            elif name == b"accept-encoding":
                takes_gzip = takes_gzip or compression.is_accepted(value)
            elif name in shared.never_plain:
                return None
        if length is None or length > predictor.max_body_bytes:
            return None
        if shared.hosts is not None and not shared.hosts.named(self.headers):
            return None
        if length > COUNTED_BYTES and not predictor.pending.fits(length):
            return None  # the application has a sentence for it
        if takes_gzip and length > SMALL_BODY_BYTES:
            return None  # its answer may be large, too: that is compressed on a thread
        try:
            caller = predictor.access.to_predict(self.headers)
        except Unauthorized:
            return None
        name_in_path = match[1].decode() if match[1] is not None else None
        parent = self._shared.parent_in(self.headers)
        plan = Plan(name_in_path, length, request_id, caller, timeout, takes_gzip, parent)
        if head is not None:
            shared.remember(head, plan)
        return plan

    def _begin(self, plan: Plan, body: bytes, request_id: str | None, record: Record | None = None) -> bool:
        """Queue a plain request; return whether it is one. `record` is its own, if it has one already."""
        if self._stopping:
            return False
        observer = self._shared.observer
        observer.countdown -= 1
        if observer.countdown <= 0:
            record = observer.begin(Route.PREDICT, request_id or new_request_id(), plan.parent)
        asked = self._shared.predictor.plain(body, plan.name)
        if asked is None:
            if record is not None:
                observer.give_back(record)
            return False
        runner, target, draft = asked
        exchange = Exchange(self, plan, target, draft, len(body))
        if plan.caller.place is not None:
            observer.service.called(plan.caller.place)
        self._ready = False
        self._exchange = exchange
        self.cycle = exchange  # type: ignore[assignment]  # it has what uvicorn asks of one
        if record is None:
            exchange.request_id = request_id or new_request_id()
        else:
            exchange.request_id, exchange.record = record.request_id, record
            self._describe(record, exchange)
        if plan.timeout is not None:
            exchange.timeout = plan.timeout
        if exchange.size > WEIGHED_BYTES:  # what is held of the body goes with its rows, whatever becomes of them
            exchange.claim, self._claim = self._claim or Claim(self._shared.predictor.pending), None
        try:
            if plan.caller.bucket is not None:
                plan.caller.spend(exchange.started)
            if exchange.claim is not None:
                self._shared.predictor.hold_rows(exchange.claim, runner, exchange.count, exchange.size)
            runner.submit(exchange)
        except (Overloaded, RateLimited) as error:
            exchange.fail(error)
            exchange.drop_rows()
        return True

    def _hold(self, size: int) -> None:
        """Count so many bytes more of a large body; where there is no room for them, have the application refuse it."""
        pending = self._shared.predictor.pending
        if self._claim is None:
            self._claim = Claim(pending)
        if not self._claim.hold(self._claim.held + size):
            scope: Any = self.scope
            scope[REFUSAL] = Overloaded(pending.refusal(size))
            self._forget()
            super().on_headers_complete()

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def answer(self, exchange: Exchange, body: bytes) -> None:
        """Send an answer with status 200."""
        start = self._shared.start(self.server_state.default_headers)
        close = b"" if exchange.keep_alive else CLOSE
        identity = (exchange.request_id or "").encode()
        if len(body) >= compression.MIN_BYTES and exchange.plan.takes_gzip and len(body) <= compression.THREAD_BYTES:
            body = compression.compress(body)
            close += _GZIPPED
        if len(body) > COUNTED_BYTES and not self._hold_answer(len(body)):
            pending = self._shared.predictor.pending
            exchange.fail(Overloaded(pending.refusal(len(body))))
            return
        self._send(exchange, b"%b%d\r\nx-request-id: %b\r\n%b\r\n%b" % (start, len(body), identity, close, body))
        if exchange.record is not None:
            self._shared.observer.tell(exchange.record, 200)
        else:
            self._shared.observer.service.predicted()

    def _hold_answer(self, size: int) -> bool:
        """Count the bytes of a large answer until its client has taken them; return whether there is room for them."""
        self._unread = self._unread or Claim(self._shared.predictor.pending)
        return self._unread.hold_rows(self._unread.held + size)

    def _release_answer(self) -> None:
        if self._unread is not None:
            self._unread.release()
            self._unread = None

    @override
    def resume_writing(self) -> None:
        self._release_answer()
        super().resume_writing()

    def refuse(
        self, exchange: Exchange, status: int, body: bytes, headers: dict[str, str], code: str | None = None
    ) -> None:
        """Send an error."""
        self._send(exchange, self._error(status, body, headers, exchange.request_id or "", exchange.keep_alive))
        record = exchange.record
        if record is None:
            record = Record(Route.PREDICT, exchange.request_id or "", began=exchange.started)
            self._describe(record, exchange)
        record.code = code
        self._shared.observer.tell(record, status)

    def _describe(self, record: Record, exchange: Exchange) -> None:
        record.submitted = exchange.started
        record.caller = exchange.plan.caller.name
        record.model, record.version, record.rows = exchange.target.name, exchange.target.version, exchange.count
        if record.trace is not None:
            record.trace.template = TEMPLATES[exchange.plan.name is not None]

    def _send(self, exchange: Exchange, answer: bytes) -> None:
        exchange.response_started = exchange.response_complete = True
        self._exchange = None
        if exchange.disconnected:
            return
        self.transport.write(answer)
        if self._unread is not None and not self.flow.write_paused:  # the kernel has all of it, or nearly
            self._release_answer()
        if not exchange.keep_alive:
            self.transport.close()
        if self._stopping or self._broken is not None or self.pipeline or self.flow.read_paused:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self._ready = self._between

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._settle()

    def _settle(self) -> None:
        self._ready = (
            self._between
            and not self._stopping
            and self._broken is None
            and not self.pipeline
            and (self.cycle is None or self.cycle.response_complete)
        )

    @override
    def state(self) -> State:
        state = super().state()
        if self._plan is None or state[0] in (Stage.CLOSING, Stage.UNREAD):
            return state
        return Stage.BODY, self.scope if self._held is None else self._held, 0

    @override
    def keep_for_health(self) -> None:
        super().keep_for_health()
        self._ready = False  # nothing is plain

    @override
    def is_held_up(self) -> bool:
        return self._plan is None and super().is_held_up()

    @override
    def _count(self, size: int) -> None:
        if self._plan is None:
            super()._count(size)

    @override
    def reject(self, error: RequestError) -> None:
        super().reject(error)
        self._forget()

    @override
    def _identity(self) -> str:
        if self._plan is None:
            return super()._identity()
        return self._plan.request_id or new_request_id()

    @override
    def _tell(self, error: RequestError, status: int, identity: str) -> None:
        scope: Any = {} if self._between or self.scope is None else self.scope
        is_ours = self._plan is not None or ("path" in scope and predicted_model(scope)[0])
        record = Record(Route.PREDICT if is_ours else ROUTES.get(scope.get("path"), Route.OTHER), identity)
        record.code = error.code
        self._shared.observer.tell(record, status)

    def _forget(self) -> None:
        """Let go of a request whose body is still arriving."""
        self._held = self._plan = None
        self._pieces.clear()
        self._release()

    @override
    def shutdown(self) -> None:
        self._hand_over()
        super().shutdown()
        self._ready = False

    def _hand_over(self) -> None:
        """Let a request whose body is still arriving go uvicorn's own way: that refuses it if it never arrives."""
        self._ready = False
        if self._held is not None:
            held, self._held, self._plan = self._held, None, None
            super().data_received(bytes(held))
        elif self._plan is not None:
            body = b"".join(self._pieces)
            self._forget()
            super().on_headers_complete()
            super().on_body(body)

    @override
    def give_up(self) -> None:
        exchange, plan = self._exchange, self._plan
        if exchange is not None:
            exchange.keep_alive = False
            exchange.abandon()
            self.refuse(exchange, 503, STOPPING, {"retry-after": "5"}, "model_not_ready")
        elif plan is not None and not self.transport.is_closing():  # its body has not arrived
            identity = plan.request_id or new_request_id()
            self.transport.write(self._error(503, STOPPING, {"retry-after": "5"}, identity, keep_alive=False))
            self.transport.close()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._exchange is not None:
            self._exchange.abandon()  # nobody is there to read it: it takes no one's place in the queue
            self._exchange.disconnected = True
            self._exchange = None
        self._release()
        self._release_answer()
        super().connection_lost(exc)
        self._ready = False

    @override
    def _is_silent(self) -> bool:
        return self._held is None and self._plan is None and super()._is_silent()


class TracingProtocol(DirectProtocol):
    """The same where traces are wanted: a request that its caller traces has a record from the beginning."""

    @override
    def _begin(self, plan: Plan, body: bytes, request_id: str | None, record: Record | None = None) -> bool:
        parent = plan.parent
        if parent is not None and parent.is_sampled:
            request_id = request_id or new_request_id()
            record = self._shared.observer.follow(Route.PREDICT, request_id, parent)
        return super()._begin(plan, body, request_id, record)


def protocol_for(front: Front) -> Any:
    """Return what uvicorn is to make the connections of an application with."""
    is_tracing = front.predictor.observer.follows
    make = TracingShared if is_tracing else Shared
    shared = make(front.predictor, hosts=front.hosts, of_any_origin=front.for_origins is None)
    return partial(TracingProtocol if is_tracing else DirectProtocol, shared)
