"""An OpenTelemetry collector on loopback: takes traces by OTLP over HTTP, as the service's exporter sends them, and keeps them."""

from __future__ import annotations

import gzip
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2

KINDS = {1: "internal", 2: "server", 3: "client"}


@dataclass(frozen=True)
class Span:
    """A span as it came over the wire; ids in hexadecimal, times in nanoseconds since 1970."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    began: int
    ended: int
    attributes: dict[str, Any]
    has_failed: bool
    resource: dict[str, Any]


class Collector:
    """What was sent. `status` is answered; while `holding`, nothing is."""

    def __init__(self, port: int = 0) -> None:
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.asked.set()
                collector.released.wait()
                status = collector.status
                if status == 200:
                    collector.take(self.path, dict(self.headers), body)
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.status = 200
        self.asked = threading.Event()
        self.released = threading.Event()
        self.released.set()
        self.bodies: list[bytes] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.spans: list[Span] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        if headers.get("Content-Encoding", headers.get("content-encoding")) == "gzip":
            body = gzip.decompress(body)
        self.requests.append((path, {name.lower(): value for name, value in headers.items()}))
        self.bodies.append(body)
        for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = attributes(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                self.spans += [decoded(span, resource) for span in scope_spans.spans]

    def wait_for(self, condition: Callable[[list[Span]], Any], what: str, seconds: float = 30) -> list[Span]:
        """Wait until what has come fulfils a condition, and return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            spans = list(self.spans)
            if condition(spans):
                return spans
            time.sleep(0.02)
        raise AssertionError(f"no {what} in {seconds} s; what came: {[span.name for span in self.spans]}")

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def decoded(span: trace_pb2.Span, resource: dict[str, Any]) -> Span:
    return Span(
        span.name,
        KINDS[span.kind],
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        attributes(span.attributes),
        span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        resource,
    )


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: value_of(pair.value) for pair in pairs}


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(item) for item in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector for the length of a `with` block."""
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()
