"""OpenTelemetry: which requests are traced, and the thread that sends what is told of them to a collector (OTLP over HTTP).

Nothing ever waits for that thread, and it keeps no more than `MAX_WAITING`. It is started in the process that answers, behind
every fork. The event loop only queues a tuple for each trace: spans are made of it, encoded and sent over there, a little at a time.

The only module that knows the library, which is an extra: it is imported where traces are wanted, and nowhere else.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, override

from app import __version__
from app.errors import SettingsError
from app.observer import PHASES, Observer, Record, gap
from app.service_counters import Route, ServiceCounters
from app.spans import Headers, Parent, Span, Trace, new_id, read_parent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from app.settings import Settings

logger = logging.getLogger("diskless.tracing")
EXPORT_SECONDS = 0.5  # between two exports
MAX_WAITING = 100  # traces; so many are exported in `EXPORT_SECONDS` at most, whatever share is wanted
FULL_REQUESTS = 64  # that go by before it is looked again whether there is room for another
TIMEOUT_SECONDS = 10.0  # for one of those, with what is tried again
FLUSH_SECONDS = 2.0  # at the end, for what still waits
# The event loop wants the interpreter, too, and would wait up to 5 ms for a thread that does not let go of it by itself.
SPELL_SECONDS = 0.001  # of work
BREATHER_SECONDS = 0.001  # after each spell
COMPLAIN_SECONDS = 60.0  # between two lines about traces that were lost
# The last is the exporter's, which imports it late.
LIBRARY = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter", "requests")
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
MISSING = (
    "OTEL_EXPORTER_OTLP_ENDPOINT is set, but what sends traces is not installed ({why}): "
    "run `python -m pip install -r otel-requirements.txt`, or unset it"
)


class _Told(NamedTuple):
    """A request that is over, as it was at that moment. No status: its caller has gone without an answer."""

    trace: Trace
    status: int | None
    fields: tuple[str | None, str | None, int | None, str, str | None, str | None]
    moments: tuple[float, float, float, float, float]


_FIELDS = (
    *("diskless.model", "diskless.version", "diskless.rows"),
    *("diskless.request_id", "diskless.caller", "diskless.error"),
)


class TracingObserver(Observer):
    """Tells of answers in the log and as traces.

    Which: of requests that belong to a caller's span those which that says, all of them and no others; of the rest a share
    of `trace_sample`. Where more are to be told of than can be, the rest is left out whole.
    """

    follows: ClassVar[bool] = True

    def __init__(
        self, exporter: Exporter, *, sample: float, trace_sample: float, service: ServiceCounters | None = None
    ) -> None:
        super().__init__(sample=sample, service=service)
        self._exporter = exporter
        self._trace_sample = trace_sample
        self._until_log = self.countdown
        self._until_trace = gap(trace_sample)
        self._count()

    @override
    def begin(self, route: Route, request_id: str, parent: Parent | None = None) -> Record:
        record = super().begin(route, request_id, parent)
        self._follow(record, parent)
        return record

    @override
    def has_room(self) -> bool:
        return self._exporter.has_room()

    @override
    def follow(self, route: Route, request_id: str, parent: Parent) -> Record | None:
        if not self._exporter.has_room():
            return None
        record = Record(route, request_id)
        record.trace = Trace(parent)
        return record

    @override
    def choose(self, record: Record, headers: Headers) -> None:
        parent = read_parent(headers)
        self.countdown -= 1
        if self.countdown <= 0:
            self._elect(record, parent)
        self._follow(record, parent)

    @override
    def give_back(self, record: Record) -> None:
        has_begun = record.trace is not None and record.trace.parent is None
        if record.is_sampled:
            self._until_log = 1
        if has_begun:
            self._until_trace = 1
        if record.is_sampled or has_begun:  # else it was no one's turn
            self._count()

    @override
    def _elect(self, record: Record, parent: Parent | None) -> None:
        passed = self._passing
        self._until_log -= passed
        self._until_trace -= passed
        if self._until_log <= 0:
            record.is_sampled = True
            self._until_log = gap(self._sample)
        if self._until_trace <= 0:
            if parent is not None or record.route is Route.HEALTH:
                self._until_trace = 1  # it is the next one's turn
            elif self._exporter.has_room():
                record.trace = Trace()
                self._until_trace = gap(self._trace_sample)
            else:
                self._until_trace = FULL_REQUESTS
        self._count()

    def _follow(self, record: Record, parent: Parent | None) -> None:
        if parent is not None and parent.is_sampled and record.route is not Route.HEALTH and self._exporter.has_room():
            record.trace = Trace(parent)

    def _count(self) -> None:
        """Count from here to the next turn, whichever that is."""
        self.countdown = self._passing = min(self._until_log, self._until_trace)

    @override
    def tell(self, record: Record, status: int) -> None:
        super().tell(record, status)
        self._trace(record, status)

    @override
    def lose(self, record: Record) -> None:
        super().lose(record)
        self._trace(record, None)

    def _trace(self, record: Record, status: int | None) -> None:
        trace = record.trace
        if trace is not None and not self.is_muted:
            fields = (record.model, record.version, record.rows, record.request_id, record.caller, record.code)
            moments = (record.began, record.submitted, record.computing, record.computed, perf_counter())
            self._exporter.add(_Told(trace, status, fields, moments))


class Exporter:
    """What waits to be sent, and the thread that sends it. Belongs to the event loop. Raises `SettingsError`."""

    def __init__(self, endpoint: str, *, service: str, headers: Mapping[str, str]) -> None:
        _import()  # here, so that processes which are forked later share it
        self._endpoint = endpoint
        self._service = service
        self._headers = dict(headers)
        self._waiting: deque[_Told | list[Span]] = deque()
        self._awake = threading.Event()
        self._is_ending = False
        self._thread: threading.Thread | None = None
        self._turned_away = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> Exporter | None:
        """Return what the settings call for, None where no traces are wanted. Raises `SettingsError`."""
        if settings.otlp_endpoint is None:
            return None
        return cls(settings.otlp_endpoint, service=settings.otlp_service, headers=settings.otlp_headers)

    def start(self) -> None:
        """Begin to send. A process that is going to fork must not."""
        self._is_ending = False
        self._awake.clear()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Send what waits, for `FLUSH_SECONDS` at most. A collector that does not answer keeps nobody from ending."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._is_ending = True
        self._awake.set()
        deadline = perf_counter() + FLUSH_SECONDS
        while thread.is_alive() and perf_counter() < deadline:
            await asyncio.sleep(0.005)

    def has_room(self) -> bool:
        """Whether another trace can wait."""
        if len(self._waiting) < MAX_WAITING:
            return True
        self._turned_away += 1
        return False

    def add(self, told: _Told | list[Span]) -> None:
        """Queue a trace, if there is room."""
        if self.has_room():
            self._waiting.append(told)

    # In the thread

    def _run(self) -> None:
        try:
            sender = _Sender(self._endpoint, self._service, self._headers)
        except Exception:  # of a standard variable that it does not like
            logger.exception("traces cannot be sent")
            return
        lost = known = 0
        complained_at = -math.inf
        is_last = False
        while not is_last:
            self._awake.wait(EXPORT_SECONDS)
            is_last = self._is_ending
            reason = f"more than {MAX_WAITING} in {EXPORT_SECONDS:g} s"
            told = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if told and not sender.send(told):
                lost += len(told)
                reason = sender.reason
            lost, known = lost + self._turned_away - known, self._turned_away
            if lost and (is_last or perf_counter() - complained_at > COMPLAIN_SECONDS):
                logger.warning("traces were lost", extra={"fields": {"count": lost, "reason": reason}})
                lost, complained_at = 0, perf_counter()


def _import() -> None:
    try:
        for module in LIBRARY:
            importlib.import_module(module)
    except ImportError as error:
        raise SettingsError([MISSING.format(why=str(error))]) from error


class _Unhurried(list[Any]):
    """A list whose reader takes a breather now and then."""

    @override
    def __iter__(self) -> Iterator[Any]:
        stop = perf_counter() + SPELL_SECONDS
        for item in super().__iter__():
            yield item
            if perf_counter() > stop:
                time.sleep(BREATHER_SECONDS)
                stop = perf_counter() + SPELL_SECONDS


class _Reason(logging.Handler):
    """Keeps the first thing that the library says of a request to the collector.

    In the log, a collector that is down would have a line for each attempt, and callers one for each odd header of theirs.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        library = logging.getLogger("opentelemetry")
        library.handlers[:], library.propagate = [self], False

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


class _Sender:
    """The library: makes its spans of ours, and sends them. `reason` is why the latest traces were not taken."""

    def __init__(self, endpoint: str, service: str, headers: Mapping[str, str]) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.trace.export import SpanExportResult
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._api = trace
        self._make = ReadableSpan
        self._success = SpanExportResult.SUCCESS
        self._sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self._ok, self._failed = trace.Status(), trace.Status(trace.StatusCode.ERROR)
        self._kinds = {kind.name.lower(): kind for kind in trace.SpanKind}
        self._heard = _Reason()
        self._exporter = OTLPSpanExporter(endpoint, headers=headers, timeout=TIMEOUT_SECONDS)
        self._resource = Resource.create({"service.name": service, "service.version": __version__})
        self._scope = InstrumentationScope("diskless", __version__)

    @property
    def reason(self) -> str:
        return self._heard.text

    def send(self, told: list[_Told | list[Span]]) -> bool:
        """Send traces to the collector; return whether it has taken them."""
        offset = time.time_ns() - time.perf_counter_ns()
        spans = _Unhurried()
        try:
            for one in _Unhurried(told):
                spans += [self._readable(span) for span in (_spans(one, offset) if isinstance(one, _Told) else one)]
            self._heard.text = ""
            return self._exporter.export(spans) is self._success
        except Exception as error:
            self._heard.text = f"{type(error).__name__}: {error}"
            return False

    def _readable(self, span: Span) -> ReadableSpan:
        # Made directly: the library's way to one takes ten times as long, and chooses ids that are chosen already.
        context, parent = self._api.SpanContext, None
        state = self._api.TraceState.from_header([span.state]) if span.state else None
        if span.parent_id is not None:
            parent = context(span.trace_id, span.parent_id, span.is_remote, self._sampled)
        return self._make(
            span.name,
            context(span.trace_id, span.span_id, False, self._sampled, state),
            parent,
            self._resource,
            span.attributes,
            kind=self._kinds[span.kind],
            status=self._failed if span.has_failed else self._ok,
            start_time=span.began,
            end_time=span.ended,
            instrumentation_scope=self._scope,
        )


def _spans(told: _Told, offset: int) -> list[Span]:
    """Return the spans of a request: itself, and its phases. `offset` leads from perf_counter to nanoseconds since 1970."""
    trace, parent = told.trace, told.trace.parent
    span_id, state = new_id(64), "" if parent is None else parent.state
    began, *moments = (int(moment * 1e9) + offset if moment else 0 for moment in told.moments)
    ended = moments[-1]
    has_failed = told.status is not None and told.status >= 500
    method = trace.method if trace.method in METHODS else "_OTHER"
    attributes: dict[str, Any] = {"http.request.method": method, "url.scheme": "http"}
    if trace.template is not None:
        attributes["http.route"] = trace.template
        if "{" not in trace.template:
            attributes["url.path"] = trace.template
    if told.status is not None:
        attributes["http.response.status_code"] = told.status
    attributes |= {name: value for name, value in zip(_FIELDS, told.fields, strict=True) if value is not None}
    if has_failed:
        attributes["error.type"] = told.fields[-1] or str(told.status)
    spans = [
        Span(
            method if trace.template is None else f"{method} {trace.template}",
            trace.trace_id,
            span_id,
            None if parent is None else parent.span_id,
            *(began, ended, "server", attributes, has_failed),
            is_remote=parent is not None,
            state=state,
        )
    ]
    if moments[0]:
        before = began
        for phase, moment in zip(PHASES, moments, strict=True):
            stop = moment or ended  # in this one it has ended before its time
            cut_off = not moment and has_failed
            spans.append(
                Span(phase, trace.trace_id, new_id(64), span_id, before, stop, has_failed=cut_off, state=state)
            )
            if not moment:
                break
            before = moment
    return spans
