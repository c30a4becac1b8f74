"""A prediction: bytes in, bytes out. Decode, get, validate, run, encode; and the ASGI callable around it.

The callable stands in front of FastAPI, whose routing costs more than a prediction.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import itertools
import logging
import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from app import log
from app.api import compression, errors
from app.api.headers import SAFE_JSON, Hosts, completed
from app.api.routes import HEALTH, ROUTES
from app.auth import Access
from app.errors import (
    InvalidInput,
    InvalidJson,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PredictionTimeout,
    RequestError,
    RequestTooLarge,
)
from app.intake import Draft, has_more_parts, open_envelope
from app.limits import COUNTED_BYTES, WEIGHED_BYTES, Claim, PendingBytes
from app.observer import RECORD, Observer, Record
from app.registry import Registry
from app.runner import CallerGone, Runner, Target, until_gone
from app.service_counters import Route
from app.signature import Rows

logger = logging.getLogger("diskless.api")
FIELDS = ("model", "instances", "method", "version", "alias")
PATH = re.compile(r"/models/([^/]+)/predict\Z")
TEMPLATES = ("/predict", "/models/{name}/predict")  # the second where the path names the model
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,200}\Z")
DISCARD_SECONDS = 2.0  # how long the rest of a refused body is read, so that its sender gets to see the refusal
SMALL_BODY_BYTES = 64 * 1024  # of a request that is refused unread: so much more is taken for the connection to go on
TIMEOUT = re.compile(rb"\d{1,6}(\.\d{1,6})?\Z")
# A list of nothing takes 2 bytes of a body and 64 of memory. So many lists and objects a row may have are more than any has.
PARTS_PER_ROW = 16
SCANNED_BYTES = 256 * 1024  # in smaller bodies there are too few of them to matter
MAX_DEPTH = 1024  # of lists and objects in each other: orjson's own limit, where every deeper one is refused
REFUSAL = "diskless.refusal"  # in a scope: the error that a server wants it to be answered with
MAX_LABEL = 100  # characters of a model name, a version, an alias; no method's name is longer

Scope = MutableMapping[str, Any]


class Answer(NamedTuple):
    """What goes back: status, body, headers beside the usual ones; `unread` when a part of the request was not read."""

    status: int
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})
    unread: bool = False


class Predictor:
    """Answers prediction requests from a registry, within limits on bytes and rows, and tells an observer of them.

    Most requests are plain: they have the usual fields, and rows that a decoder made for the model can check. `plain` takes
    those. All others go the careful way of `decode`, which finds out what is wrong with them, if anything is.
    """

    def __init__(
        self,
        registry: Registry,
        access: Access,
        observer: Observer,
        *,
        max_body_bytes: int,
        max_rows: int,
        max_pending_bytes: int,
        timeout_seconds: float = 20.0,
    ) -> None:
        self.access = access
        self.observer = observer
        self.pending = PendingBytes(max_pending_bytes)
        self.max_body_bytes = max_body_bytes
        self.max_rows = max_rows
        self._registry = registry
        self._timeout_seconds = timeout_seconds
        self._decompressor = compression.Decompressor(max_body_bytes)

    def plain(self, body: bytes, name: str | None = None) -> tuple[Runner, Target, Draft] | None:
        """Return who computes a plain request, what it asks for, and its validated rows; None for any other request, right or wrong."""
        if len(body) > SCANNED_BYTES and self._has_too_many_parts(body):
            return None
        try:
            envelope = open_envelope(body)
        except Exception:  # whatever it is, the careful way has a sentence for it
            return None
        model = envelope.model
        if name is not None:
            if model is not None and model != name:
                return None
            model = name
        if envelope.version is None and envelope.alias is None:
            runner = self._registry.plain(model)
        else:
            runner = self._registry.labelled(model, envelope.version, envelope.alias)
        if runner is None:
            return None
        target = runner.default if envelope.method is None else runner.targets.get(envelope.method)
        if target is None:
            return None
        draft = runner.intake.draft(envelope.instances)
        if draft is None or len(draft) > self.max_rows:
            return None
        return runner, target, draft

    def decode(self, body: bytes, name: str | None, record: Record) -> tuple[Runner, Target, Rows]:
        """Parse and validate any request; `record` learns whose it is. Raises the `RequestError` that says what is wrong with it."""
        if len(body) > SCANNED_BYTES and self._has_too_many_parts(body):
            most = PARTS_PER_ROW * self.max_rows
            raise RequestTooLarge(
                f"expected at most {self.max_rows} rows in one request, got a body of more than {most} lists and objects"
            )
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidJson(_not_json(body, error)) from error
        if type(request) is not dict:
            raise InvalidRequest(f"expected a JSON object with instances, got {_kind(request)}")
        for key in request:
            if key not in FIELDS:
                known = f"a request has {', '.join(FIELDS)}"
                close = difflib.get_close_matches(errors.shown(key), FIELDS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else known
                raise InvalidRequest(f"unknown field {errors.shown(key)!r}; {hint}")
        if "instances" not in request:
            raise InvalidRequest("instances is missing: expected a list of rows")
        model = _text(request, "model")
        if name is not None and model is not None and model != name:
            raise InvalidRequest(f"the path names model {name!r}, the body names {model!r}")
        if name is not None and len(name) > MAX_LABEL:
            raise ModelNotFound(f"model {errors.shown(name)!r} is not served: no name is that long")
        version, alias = _text(request, "version"), _text(request, "alias")
        if version is not None and alias is not None:
            raise InvalidRequest("give version or alias, not both")
        runner = self._registry.get(model if name is None else name, version=version, alias=alias)
        signature = runner.model.signature
        record.model, record.version = runner.model.ref
        method = _text(request, "method") or signature.default_method
        if method not in signature.methods:
            raise InvalidRequest(
                f"{runner.model.ref.name} has no method {method!r}; it has {', '.join(signature.methods)}"
            )
        try:
            rows = signature.validate(request["instances"], max_rows=self.max_rows)
        except InvalidInput:
            runner.counters.failed(InvalidInput.code)
            raise
        return runner, runner.targets[method], rows

    def _has_too_many_parts(self, body: bytes) -> bool:
        """Whether a body has more lists and objects than the rows that it may have: decoded, they take many times its memory."""
        most = PARTS_PER_ROW * self.max_rows
        return body.count(b"[") + body.count(b"{") > most and has_more_parts(body, most)

    def hold_rows(self, claim: Claim, runner: Runner, count: int, size: int) -> None:
        """Claim the memory that the rows of a body take until it is answered; `size` is the body's. Raises `Overloaded`."""
        weight = runner.intake.weight(count, size)
        if not claim.hold_rows(weight):
            runner.hurry()
            if not claim.hold_rows(weight):
                runner.counters.failed(Overloaded.code)
                raise Overloaded(self.pending.refusal(weight))

    async def handle(self, scope: Scope, receive: Any, name: str | None, record: Record) -> Answer | None:
        """Answer an ASGI request; `name` is the model that the path named, if it did. `record` learns what it came to.

        None when the caller has gone.
        """
        unread = True
        claim = Claim(self.pending)
        try:
            if REFUSAL in scope:
                raise scope[REFUSAL]
            caller = self.access.to_predict(scope["headers"])
            record.caller = caller.name
            if caller.place is not None:
                self.observer.service.called(caller.place)
            caller.spend(record.began)
            timeout, compressed = self._read_headers(scope["headers"])
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                body = message.get("body", b"")
                self._hold(claim, len(body), more=False)
            else:
                body = await self._rest_of_body(message, receive, claim)
            unread = False
            if compressed:
                body = await self._decompress(body, claim, receive, timeout)
            size = len(body)
            asked: Any = self.plain(body, name) or self.decode(body, name, record)
            runner, target, rows = asked
            count, form = (len(rows), "draft") if type(rows) is list else (rows.count, "rows")
            record.model, record.version, record.rows = target.name, target.version, count
            given = {form: rows, "size": size, "timeout": timeout, "record": record}
            if size > WEIGHED_BYTES:
                self.hold_rows(claim, runner, count, size)
                given["claim"] = claim
            promise = runner.promise(target, record.request_id, count, **given)
            if size > WEIGHED_BYTES:
                claim = Claim(self.pending)  # the other goes with the rows
            # Nothing but the rows is held while they wait, and those by the job alone.
            del message, body, asked, rows, given
            if promise.takes_time:
                promise.watch(receive)
            try:
                result, start, stop = await promise.future
            finally:
                promise.leave()
            return Answer(200, target.encode(result, start, stop))
        except RequestError as error:
            record.code = error.code
            return _refusal(error, scope, unread=unread)
        except CallerGone:
            return None
        except Exception:
            record.code = "internal_error"
            with log.about(record.request_id, record.trace_id):
                logger.exception("a prediction request failed")
                return Answer(*errors.internal())
        finally:
            claim.release()

    def _read_headers(self, headers: Any) -> tuple[float | None, bool]:
        """Return how many seconds the caller waits, if it says so, and whether the body is compressed.

        Raises `RequestTooLarge` and `Overloaded`: what announces itself as too large is not read at all. `InvalidRequest`,
        `UnsupportedEncoding`.
        """
        timeout, compressed = None, False
        for key, value in headers:
            if key == b"content-length":
                length = int(value[:19]) if value.isdigit() else 0
                if length > self.max_body_bytes:
                    raise self._too_large(f"{value[:19].decode()} bytes")
                if length > COUNTED_BYTES and not self.pending.fits(length):
                    raise Overloaded(self.pending.refusal(length))
            elif key == b"content-encoding":
                compressed = compression.check_encoding(value)
            elif key == b"x-request-timeout":
                known, timeout = timeout, read_timeout(value)
                if known is not None or timeout is None:
                    shown = errors.shown(value.decode("latin-1"))
                    raise InvalidRequest(f"X-Request-Timeout: expected seconds, once, as in 2.5, got {shown!r}")
        return timeout, compressed

    async def _rest_of_body(self, message: Any, receive: Any, claim: Claim) -> bytes:
        """Read a body that comes in pieces, and no more of it than the limits."""
        pieces: list[bytes] = []
        size = 0
        while True:
            if message["type"] == "http.disconnect":
                raise CallerGone
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            self._hold(claim, size, more=more)
            pieces.append(piece)
            if not more:
                return b"".join(pieces)
            message = await receive()

    async def _decompress(self, body: bytes, claim: Claim, receive: Any, timeout: float | None) -> bytes:
        """Return what a body becomes, when it is its turn, unless its caller has gone by then, or waits no longer.

        Raises what `Decompressor.run` raises, `Overloaded`, `CallerGone` and `PredictionTimeout`.
        """
        if not claim.hold(len(body)):
            raise Overloaded(self.pending.refusal(len(body)))
        seconds = self._timeout_seconds if timeout is None else min(timeout, self._timeout_seconds)
        work = asyncio.ensure_future(self._decompressor.run(body))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait((work, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise CallerGone
            if not work.done():
                raise PredictionTimeout(f"no answer within {seconds:.6g} s")
            body = work.result()
        finally:
            work.cancel()
            gone.cancel()
        self._hold(claim, len(body))
        return body

    def _hold(self, claim: Claim, size: int, *, more: bool = True) -> None:
        """Claim the `size` bytes of a body that are here. Raises where a limit does not allow it; what is complete is taken."""
        if size > self.max_body_bytes:
            raise self._too_large("more")
        if size > COUNTED_BYTES and not claim.hold(size, even_if_full=not more):
            raise Overloaded(self.pending.refusal(size - claim.held))

    def _too_large(self, got: str) -> RequestTooLarge:
        return RequestTooLarge(f"expected a body of at most {self.max_body_bytes} bytes, got {got}")


def read_length(value: bytes) -> int | None:
    """Return the bytes that a `Content-Length` says; None if it is none, or none that any body has."""
    return int(value) if value.isdigit() and len(value) <= 15 else None


def read_timeout(value: bytes) -> float | None:
    """Return the seconds that an `X-Request-Timeout` says; None if it is none."""
    return float(value) or None if TIMEOUT.match(value) else None


def _is_small(headers: Any) -> bool:
    """Whether a body that was not read is so small that the connection can go on behind it.

    A caller that asks before it sends the body (`Expect`) may not send it at all.
    """
    sizes = [value for key, value in headers if key == b"content-length"]
    if any(key in (b"transfer-encoding", b"expect") for key, _ in headers):
        return False
    return not sizes or (sizes[0].isdigit() and int(sizes[0][:19]) <= SMALL_BODY_BYTES)


def predicted_model(scope: Scope) -> tuple[bool, str | None]:
    """Return whether a request is for a prediction, and the model its path names. The path is decoded already."""
    if scope["method"] != "POST":
        return False, None
    path = _path(scope)
    if path == "/predict":
        return True, None
    match = PATH.match(path)
    return (True, match[1]) if match else (False, None)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    if root := scope.get("root_path"):  # where this application is mounted, or what a proxy in front has taken off
        path = path.removeprefix(root) if path.startswith(f"{root}/") else path
    return path


class Front:
    """The ASGI application: predictions answered here, everything else by `rest`; a request id and safe headers for all of it.

    `hosts` are those that requests may name, where that is looked at; health checks name an address, and may. `origins` makes
    what stands before the application for the pages of other origins, where some may read its answers.
    """

    def __init__(
        self,
        predictor: Predictor,
        rest: Any,
        registry: Registry,
        *,
        hosts: Hosts | None = None,
        origins: Callable[[Any], Any] | None = None,
    ) -> None:
        self.predictor = predictor
        self.rest = rest
        self.registry = registry
        self.hosts = hosts
        self.for_origins = None if origins is None else origins(self._answer)
        self._observer = predictor.observer

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http":
            await self.rest(scope, receive, send)
        elif self.hosts is not None and not self.hosts.named(scope["headers"]) and _path(scope) not in HEALTH:
            error = InvalidRequest("the request's Host header names no host that this service answers to")
            await self._refuse(error.code, _refusal(error, scope, unread=True), scope, receive, send)
        elif scope["path"].endswith("\n"):  # what Starlette's routes would take for the path without it
            await self._refuse("not_found", _NO_PATH, scope, receive, send)
        elif self.for_origins is not None and any(name == b"origin" for name, _ in scope["headers"]):
            await self._answer_origin(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Any, send: Any) -> None:
        identity = request_id(scope)
        ours, name = predicted_model(scope)
        if ours:
            record = Record(Route.PREDICT, identity)
            self._observer.choose(record, scope["headers"])
            if record.trace is not None:
                record.trace.template = TEMPLATES[name is not None]
            answer = await self.predictor.handle(scope, receive, name, record)
            if answer is None:
                self._observer.lose(record)
                return
            if len(answer.body) > COUNTED_BYTES:
                answer = await self._send_large(answer, scope, receive, send, record)
            else:
                await _send(answer, scope, identity, receive, send)
            self._observer.tell(record, answer.status)
            return
        path = scope["path"]
        record = Record(ROUTES.get(path, Route.OTHER), identity)
        self._observer.choose(record, scope["headers"])
        if record.trace is not None:
            record.trace.method, record.trace.template = scope["method"], path if path in ROUTES else None
        with log.about(identity, record.trace_id):
            await self._pass_on(scope, receive, send, record)

    async def _send_large(self, answer: Answer, scope: Scope, receive: Any, send: Any, record: Record) -> Answer:
        """Send an answer that is counted until its caller has taken it, or say that there is no room for it; return what was sent."""
        claim = Claim(self.predictor.pending)
        if not claim.hold_rows(len(answer.body)):
            error = Overloaded(self.predictor.pending.refusal(len(answer.body)))
            record.code = error.code
            answer = _refusal(error, scope, unread=False)
        try:
            await _send(answer, scope, record.request_id, receive, send)
        finally:
            claim.release()
        return answer

    async def _answer_origin(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer what a page of another origin asks: its preflights by what stands before the application, all else as ever."""
        assert self.for_origins is not None
        preflight: Record | None = None
        status = 200

        async def completing(message: MutableMapping[str, Any]) -> None:
            nonlocal preflight, status
            if message["type"] == "http.response.start" and all(
                name != b"x-request-id" for name, _ in message["headers"]
            ):
                preflight, status = Record(Route.OTHER, request_id(scope)), message["status"]
                headers = completed(message["headers"], (b"x-request-id", preflight.request_id.encode()))
                message = {**message, "headers": headers}
            await send(message)

        await self.for_origins(scope, receive, completing)
        if preflight is not None:
            preflight.code = None if status < 400 else InvalidRequest.code
            self._observer.choose(preflight, scope["headers"])
            if preflight.trace is not None:
                preflight.trace.method = scope["method"]
            self._observer.tell(preflight, status)

    async def _refuse(self, code: str, answer: Answer, scope: Scope, receive: Any, send: Any) -> None:
        """Refuse a request before anybody looks at what it asks for."""
        record = Record(Route.OTHER, request_id(scope))
        record.code = code
        await _send(answer, scope, record.request_id, receive, send)
        self._observer.tell(record, answer.status)

    async def _pass_on(self, scope: Scope, receive: Any, send: Any, record: Record) -> None:
        """Let `rest` answer, with request id and safe headers on it; HEAD is GET without a body; whatever it raises is answered."""
        started = complete = False
        identity = record.request_id
        status = 500
        bare = scope["method"] == "HEAD"

        async def tagged(message: MutableMapping[str, Any]) -> None:
            nonlocal started, complete, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                headers = completed(message.get("headers", ()), (b"x-request-id", identity.encode()))
                message = {**message, "headers": headers}
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
                if bare:
                    message = {**message, "body": b""}
            await send(message)

        scope = {**scope, RECORD: record}
        try:
            await self.rest({**scope, "method": "GET"} if bare else scope, receive, tagged)
        except Exception:
            if complete:
                return  # Starlette answers with the handler for all errors, then raises once more
            if started:
                raise  # nothing can be said any more; the server closes the connection
            logger.exception("a request failed", extra={"fields": {"path": errors.shown(scope["path"])}})
            record.code = "internal_error"
            await _send(Answer(*errors.internal()), scope, identity, receive, send)
        finally:
            self._observer.tell(record, status)


_NO_PATH = Answer(404, b'{"error":"not_found","detail":"no path ends with a line break"}')


def _refusal(error: RequestError, scope: Scope, *, unread: bool) -> Answer:
    """Return the answer to a request that is refused, `unread` if its body was not read to its end."""
    status, body, headers = errors.encode(error)
    unread = unread and not _is_small(scope["headers"])
    if unread and scope["http_version"].startswith("1"):
        headers["connection"] = "close"
    return Answer(status, body, headers, unread)


async def _send(answer: Answer, scope: Scope, identity: str, receive: Any, send: Any) -> None:
    body, compressed = answer.body, False
    if len(body) >= compression.MIN_BYTES and _accepts_gzip(scope["headers"]):
        compressed = True
        if len(body) > compression.THREAD_BYTES:
            body = await asyncio.to_thread(compression.compress, body)
        else:
            body = compression.compress(body)
    headers = [
        *SAFE_JSON,
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", identity.encode()),
    ]
    if compressed:
        headers += GZIPPED
    if answer.headers:
        headers += [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    sent = 0
    # Piece by piece, as the caller takes them: a server waits for that before each.
    while len(body) - sent > COUNTED_BYTES:
        await send({"type": "http.response.body", "body": body[sent : sent + COUNTED_BYTES], "more_body": True})
        sent += COUNTED_BYTES
    await send({"type": "http.response.body", "body": body[sent:] if sent else body, "more_body": answer.unread})
    if answer.unread:
        await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


GZIPPED = [(b"content-encoding", b"gzip"), (b"vary", b"Accept-Encoding")]


def _accepts_gzip(headers: Any) -> bool:
    return any(key == b"accept-encoding" and compression.is_accepted(value) for key, value in headers)


async def _discard(receive: Any) -> None:
    """Read what the caller is still sending, and keep nothing: closed before, the connection would take the answer along."""
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    except TimeoutError:
        return


def request_id(scope: Scope) -> str:
    """Return the request id that the caller sent, if it is one that may stand in a header and a log; else a new one."""
    for key, value in scope["headers"]:
        if key == b"x-request-id":
            text: str = value.decode("latin-1")
            if REQUEST_ID.match(text):
                return text
    return new_request_id()


def new_request_id() -> str:
    """Return an id that no other request has: random bytes of this process, and a count. Much faster than a UUID."""
    return f"{_own_id()}{next(_numbers):012x}"


@functools.cache
def _own_id() -> str:
    return os.urandom(10).hex()


_numbers = itertools.count()
os.register_at_fork(after_in_child=_own_id.cache_clear)


def _text(request: dict[str, Any], key: str) -> str | None:
    value = request.get(key)
    if type(value) is int and key == "version":  # labels are mostly numbers, and people write them so
        value = str(value)
    if value is None or (type(value) is str and 0 < len(value) <= MAX_LABEL):
        return value
    raise InvalidRequest(f"{key} must be a string of 1 to {MAX_LABEL} characters, got {_kind(value)}")


def _not_json(body: bytes, error: orjson.JSONDecodeError) -> str:
    """Say what keeps a body from being read as JSON, to somebody who has not written a parser."""
    if not body.strip():
        return "the body is empty: expected a JSON object"
    if error.msg.startswith("depth limit"):
        return f"the body is nested more than {MAX_DEPTH:,} levels deep, which is the limit"
    reason = str(error)
    if b"\0" in body[:4]:
        reason = "expected UTF-8, got what looks like UTF-16 or UTF-32"
    elif error.msg.startswith("str is not valid UTF-8"):
        try:
            body.decode()
        except UnicodeDecodeError as undecodable:
            reason = (
                f"expected UTF-8, but byte {undecodable.start} is {body[undecodable.start]:#04x}: {undecodable.reason}"
            )
    elif _NO_NUMBER.match(error.doc, max(0, error.pos - 1)):
        reason = f"{error}: JSON has no NaN and no Infinity, null is a missing value"
    return f"the body is not JSON: {reason}"


_NO_NUMBER = re.compile(r".?-?(NaN|Infinity|nan|inf)\b", re.DOTALL)


def _kind(value: Any) -> str:
    if type(value) is str:
        return f"a string of {len(value)} characters"
    return {dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
