"""Traces, from the real process to a real collector: whose request is traced, what a trace says, and that it costs nobody anything."""

from __future__ import annotations

import asyncio
import json
import random
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app import tracing
from app.model_storage import ModelStorageManager
from app.observer import PHASES
from app.storage.local import LocalStorage
from tests import toys
from tests.collector import Collector, Span, collecting
from tests.service import AS_ASGI, COMMAND, Service, clean_environment, connected, free_port, running, serving_after
from tests.trusted import TRUST

TWO = (*COMMAND, "--workers", "2")
WAYS = {"protocol": COMMAND, "asgi": AS_ASGI, "two workers": TWO}
POINTS = np.arange(24.0).reshape(8, 3)
SUM = {"model": "sum", "instances": [[1, 2, 3.5]]}
OWN_ID = "00f067aa0ba902b7"  # the span of the caller that a request belongs to
MODULES = ("opentelemetry.sdk", "opentelemetry.exporter", "requests")
# What serves as COMMAND does, and says at its end which of those it has imported.
TELLING = serving_after(
    "import atexit, json, sys;"
    f"atexit.register(lambda: print('imported', json.dumps([name for name in {MODULES} if name in sys.modules])))"
)
WITHOUT_LIBRARY = (
    sys.executable,
    "-c",
    "import sys; sys.modules['opentelemetry.sdk'] = None; from app.cli import main; sys.exit(main(sys.argv[1:]))",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("bucket")
    publish(path, "sum", toys.Sum())
    publish(path, "naps", toys.Naps(), examples=np.zeros((2, 3)))
    publish(path, "fails", toys.Fails(), examples=None)
    return path


def publish(path: Path, name: str, model: Any, examples: Any = POINTS) -> None:
    manager = ModelStorageManager(LocalStorage(path), trust=TRUST)
    manager.save(name, model, examples=examples, promote=True)


def environment(folder: Path, collector: Collector | None = None, **more: str) -> dict[str, str]:
    where = {} if collector is None else {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    return {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder), "ML_REFRESH_SECONDS": "3600"} | where | more


class Traced:
    """A service and its collector."""

    def __init__(self, service: Service, collector: Collector) -> None:
        self.service = service
        self.collector = collector

    def ask(self, path: str = "/predict", request: Any = SUM, flags: str = "01", **headers: str) -> httpx.Response:
        """Send a request that belongs to a trace of its own; the answer has that as `trace_id`."""
        trace_id = secrets.token_hex(16)
        headers = {"traceparent": f"00-{trace_id}-{OWN_ID}-{flags}"} | headers
        response = self.service.client.post(path, json=request, headers=headers)
        response.extensions["trace_id"] = trace_id.encode()
        return response

    def trace(self, response: httpx.Response) -> tuple[Span, list[Span]]:
        """Return the spans of a request, once they have come: its own, and its phases in their order."""
        trace_id = response.extensions["trace_id"].decode()
        found = self.collector.wait_for(
            lambda spans: any(span.kind == "server" and span.trace_id == trace_id for span in spans), "span"
        )
        mine = [span for span in found if span.trace_id == trace_id]
        (root,) = [span for span in mine if span.kind == "server"]
        return root, sorted((span for span in mine if span is not root), key=lambda span: span.began)

    def seen(self) -> set[str]:
        """Return the ids of all traces up to now: those that come before one that is asked for here, over the same connection."""
        self.trace(self.ask())
        return {span.trace_id for span in self.collector.spans}


@pytest.fixture(scope="module", params=WAYS)
def traced(folder, request) -> Iterator[Traced]:
    """A service that traces what its callers trace, and nothing else but looks."""
    more = {"ML_TRACE_SAMPLE": "0", "ML_ACCESS_LOG_SAMPLE": "1", "ML_PREDICT_TIMEOUT_SECONDS": "120"}
    with (
        collecting() as collector,
        running(environment(folder, collector, **more), command=WAYS[request.param]) as service,
    ):
        yield Traced(service.wait_ready(), collector)


@pytest.fixture(scope="module", params=WAYS)
def eager(folder, request) -> Iterator[Traced]:
    """A service that traces everything that it may."""
    more = {"ML_TRACE_SAMPLE": "1", "ML_ACCESS_LOG_SAMPLE": "1"}
    with (
        collecting() as collector,
        running(environment(folder, collector, **more), command=WAYS[request.param]) as service,
    ):
        yield Traced(service.wait_ready(), collector)


def lines(service: Service, **wanted: Any) -> list[dict[str, Any]]:
    """Return the lines of the log that say this."""
    every = [json.loads(line) for line in service.log().splitlines() if line.startswith("{")]
    return [line for line in every if wanted.items() <= line.items()]


# What a trace says


@pytest.mark.parametrize("path", ["/predict", "/models/sum/predict"])
def test_a_prediction_is_a_span_of_its_callers_trace_with_its_phases_within(traced, path):
    before = time.time_ns()
    response = traced.ask(path, **{"x-request-id": f"looked-for{path}"})
    root, phases = traced.trace(response)
    after = time.time_ns()

    assert response.status_code == 200
    assert (root.name, root.parent_id, root.has_failed) == (
        f"POST {path.replace('sum', '{name}')}",
        OWN_ID,
        False,
    )
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": path.replace("sum", "{name}"),
        "http.response.status_code": 200,
        "url.scheme": "http",
        "diskless.model": "sum",
        "diskless.version": root.attributes["diskless.version"],
        "diskless.rows": 1,
        "diskless.caller": "tests",
        "diskless.request_id": f"looked-for{path}",
    } | ({"url.path": path} if path == "/predict" else {})
    assert [phase.name for phase in phases] == [*PHASES]
    assert {phase.parent_id for phase in phases} == {root.span_id}
    moments = [before, root.began, *(phase.ended for phase in phases), after]
    assert moments == sorted(moments)
    assert [phase.began for phase in phases] == [root.began, *(phase.ended for phase in phases[:-1])]
    assert phases[-1].ended == root.ended
    assert len({root.span_id, OWN_ID, *(phase.span_id for phase in phases)}) == 6


def test_spans_say_which_service_they_are_of(traced):
    root, phases = traced.trace(traced.ask())

    assert {"service.name": "diskless", "telemetry.sdk.language": "python"}.items() <= root.resource.items()
    assert {phase.resource["service.instance.id"] for phase in phases} == {root.resource["service.instance.id"]}


def test_what_the_caller_says_of_its_trace_is_passed_on(traced):
    root, phases = traced.trace(traced.ask(tracestate="congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"))
    odd, _ = traced.trace(traced.ask(tracestate=f"x={'y' * 3000}"))

    assert {span.state for span in (root, *phases)} == {"congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"}
    assert odd.state == ""


def test_what_a_caller_did_wrong_is_told_of_and_is_no_fault_of_the_service(traced):
    wrong = traced.ask(request={"model": "sum", "instances": [[1, 2, "x"]]})
    unknown = traced.ask(request={"model": "nobody", "instances": [[1]]})
    lost = traced.ask("/no/such/way")
    roots = [traced.trace(response)[0] for response in (wrong, unknown, lost)]
    told = [
        (root.name, root.attributes["http.response.status_code"], root.attributes["diskless.error"]) for root in roots
    ]

    assert told == [
        ("POST /predict", 422, "invalid_input"),
        ("POST /predict", 404, "model_not_found"),
        ("POST", 404, "not_found"),
    ]
    assert not any(root.has_failed or "error.type" in root.attributes for root in roots)


def test_what_the_service_failed_to_do_is_an_error_with_its_code(traced):
    root, phases = traced.trace(traced.ask(request={"model": "fails", "instances": [[1, 2, 3]]}))

    assert (root.has_failed, root.attributes["error.type"]) == (True, "prediction_failed")
    assert root.attributes["http.response.status_code"] == 500
    assert [phase.name for phase in phases][:2] == ["decode", "queue"]
    assert max(phase.ended for phase in phases) <= root.ended


def test_a_phase_whose_end_nobody_waited_for_ends_with_its_request(traced):
    late = traced.ask(request={"model": "naps", "instances": [[60, 0, 0]]}, **{"x-request-timeout": "0.5"})
    root, phases = traced.trace(late)

    assert late.status_code == 504
    assert (root.has_failed, root.attributes["error.type"]) == (True, "prediction_timeout")
    assert [(phase.name, phase.has_failed) for phase in phases] == [
        ("decode", False),
        ("queue", False),
        ("predict", True),
    ]
    assert phases[-1].ended == root.ended


def test_other_routes_are_traced_too_but_health_is_not(traced):
    header = {"traceparent": f"00-{secrets.token_hex(16)}-{OWN_ID}-01"}
    traced.service.client.get("/models/status", headers=header)
    traced.service.client.get("/health/live", headers=header)
    traced.seen()
    mine = [span for span in traced.collector.spans if span.trace_id == header["traceparent"][3:35]]

    assert [(span.name, span.attributes["http.route"]) for span in mine] == [("GET /models/status", "/models/status")]


@pytest.mark.parametrize("traced", ["asgi"], indirect=True)
async def test_a_caller_that_has_gone_leaves_a_span_without_a_status(traced):
    trace_id = secrets.token_hex(16)
    body = json.dumps({"model": "naps", "instances": [[60, 0, 0]]})  # longer than all of this takes
    head = f"POST /predict HTTP/1.1\r\nhost: x\r\ntraceparent: 00-{trace_id}-{OWN_ID}-01\r\ncontent-length: {len(body)}\r\n\r\n"
    async with connected("127.0.0.1", traced.service.port) as (_, writer):
        writer.write(f"{head}{body}".encode())
        await writer.drain()
        await asyncio.to_thread(traced.seen)  # it has begun by then
    await asyncio.to_thread(
        traced.collector.wait_for, lambda spans: any(span.trace_id == trace_id for span in spans), "span"
    )
    (root,) = [span for span in traced.collector.spans if span.trace_id == trace_id and span.kind == "server"]

    assert "http.response.status_code" not in root.attributes
    assert not root.has_failed


def test_no_value_and_no_key_leaves_the_service(folder):
    key, admin, token = "the-key-of-ann-17", "the-administrators-17", "token-of-the-collector"
    value, text = 31415.9265, "a-text-of-the-caller"
    more = {
        "ML_API_KEYS": f"ann:{key}",
        "ML_ADMIN_KEYS": admin,
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{token},tenant=blue",
        "ML_TRACE_SAMPLE": "1",
        "OTEL_SERVICE_NAME": "scores",
    }
    with collecting() as collector, running(environment(folder, collector, **more)) as service:
        service.wait_ready()
        service.client.headers.pop("x-api-key")
        traced = Traced(service, collector)
        good = {"model": "sum", "instances": [[value, 2, 3]]}
        bad = {"model": "sum", "instances": [[value, text, 3]]}
        for shown in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"x-api-key": f"{text}-as-a-key"}, {}):
            for request in (good, bad, {text: value}):
                traced.ask(request=request, **shown)
                service.client.post("/models/sum/predict", json=request, headers=shown)
                service.client.post(f"/models/{text}/predict", json=request, headers=shown)
                service.client.post(f"/predict?{text}={value}", json=request, headers=shown)
        for path in ("/models/status", "/models/refresh", f"/{text}", f"/docs?{text}"):
            service.client.request("POST" if "refresh" in path else "GET", path, headers={"x-api-key": admin})
        service.client.request(text.upper(), "/docs")
        traced.service.client.headers["x-api-key"] = key
        traced.seen()
        statuses = {span.attributes.get("http.response.status_code") for span in collector.spans}
        callers = {span.attributes.get("diskless.caller") for span in collector.spans}
        sent, headers, log = b"".join(collector.bodies), collector.requests[-1][1], service.log()
        name = collector.spans[-1].resource["service.name"]

    assert {200, 401, 404, 422} <= statuses
    assert "ann" in callers
    assert not any(secret.encode() in sent for secret in (key, admin, token, text, str(value)))
    assert token not in log
    assert (headers["authorization"], headers["tenant"]) == (f"Bearer {token}", "blue")
    assert name == "scores"


# Whose request is traced


def test_what_the_caller_does_not_trace_is_never_traced(eager):
    answers = [eager.ask(flags=flags) for flags in ("00", "02", "fe") for _ in range(5)]
    answers += [eager.ask(request={"model": "sum", "instances": [[1, 2, "x"]]}, flags="00")]
    untraced = {answer.extensions["trace_id"].decode() for answer in answers}

    assert not untraced & eager.seen()


def test_each_request_of_a_connection_belongs_to_the_span_that_it_says(traced):
    """However much of its head was known before, and whatever else is another in each."""
    generator, sent = random.Random(7), []
    few = [secrets.token_hex(16) for _ in range(3)]
    for number in range(120):
        trace_id = generator.choice([*few, secrets.token_hex(16), None])
        flags = generator.choice(["00", "01"]) if trace_id not in few else "01"
        name = generator.choice(["traceparent", "Traceparent"])
        headers = [] if trace_id is None else [(name, f"00-{trace_id}-{OWN_ID}-{flags}")]
        if generator.random() < 0.5:
            headers.append(("x-request-id", f"odd-{number}" if generator.random() < 0.7 else "again"))
        if generator.random() < 0.3:
            headers.append(("x-forwarded-for", f"10.0.0.{number}"))
        answer = traced.service.client.post("/predict", json=SUM, headers=headers)
        if trace_id is not None and flags == "01":
            sent.append((answer.headers["x-request-id"], trace_id))
    last = traced.ask()
    traced.trace(last)
    sent.append((last.headers["x-request-id"], last.extensions["trace_id"].decode()))
    known = {trace_id for _, trace_id in sent}
    roots = [span for span in traced.collector.spans if span.kind == "server" and span.parent_id == OWN_ID]

    assert [(root.attributes["diskless.request_id"], root.trace_id) for root in roots if root.trace_id in known] == sent
    assert {root.parent_id for root in traced.collector.spans if root.kind == "server"} == {OWN_ID}


def test_without_a_caller_that_says_it_a_request_begins_a_trace(eager):
    answers = [eager.service.predict(**SUM) for _ in range(3)]
    answers += [eager.service.predict(model="sum", instances=[[1, 2, 3]], unknown=1) for _ in range(3)]  # not plain
    ids = [answer.headers["x-request-id"] for answer in answers]
    eager.seen()
    roots = [span for span in eager.collector.spans if span.attributes.get("diskless.request_id") in ids]

    assert [answer.status_code for answer in answers] == [200] * 3 + [400] * 3
    assert [root.attributes["diskless.request_id"] for root in roots] == ids
    assert {root.parent_id for root in roots} == {""}
    assert len({root.trace_id for root in roots}) == 6


NO_PARENTS = [
    *("", "00", "nonsense", f"00-{'0' * 32}-{OWN_ID}-01", f"00-{'a' * 32}-{'0' * 16}-01"),
    *(f"00-{'A' * 32}-{OWN_ID}-01", f"ff-{'a' * 32}-{OWN_ID}-01", f"00-{'a' * 32}-{OWN_ID}-01-more"),
    *(f"00-{'a' * 31}-{OWN_ID}-01", f"00-{'a' * 32}-{OWN_ID}-0", f"01-{'a' * 32}-{OWN_ID}-01more"),
]


def test_with_what_is_no_traceparent_a_request_begins_a_trace_like_any_other(eager):
    answers = [eager.service.client.post("/predict", json=SUM, headers={"traceparent": value}) for value in NO_PARENTS]
    ids = [answer.headers["x-request-id"] for answer in answers]
    eager.seen()
    roots = [span for span in eager.collector.spans if span.attributes.get("diskless.request_id") in ids]

    assert {answer.status_code for answer in answers} == {200}
    assert [(root.attributes["diskless.request_id"], root.parent_id) for root in roots] == [(one, "") for one in ids]
    assert not {"a" * 32, "0" * 32} & {root.trace_id for root in roots}


def test_what_is_no_traceparent_is_not_followed(traced):
    answers = [traced.service.client.post("/predict", json=SUM, headers={"traceparent": value}) for value in NO_PARENTS]
    seen = traced.seen()
    ids = {span.attributes.get("diskless.request_id") for span in traced.collector.spans}

    assert not {"a" * 32, "0" * 32} & seen
    assert not {answer.headers["x-request-id"] for answer in answers} & ids


def test_a_later_version_of_traceparent_is_followed_as_far_as_it_is_known(traced):
    trace_id = secrets.token_hex(16)
    traced.service.client.post("/predict", json=SUM, headers={"traceparent": f"cc-{trace_id}-{OWN_ID}-01-what-ever"})

    assert trace_id in traced.seen()


def test_two_of_them_are_none(traced):
    first, second = secrets.token_hex(16), secrets.token_hex(16)
    headers = [("traceparent", f"00-{trace_id}-{OWN_ID}-01") for trace_id in (first, second)]
    traced.service.client.post("/predict", json=SUM, headers=headers)

    assert not {first, second} & traced.seen()


def test_lines_of_traced_requests_say_which_trace(traced):
    followed = traced.ask()
    failed = traced.ask(request={"model": "fails", "instances": [[1, 2, 3]]})
    alone = traced.service.predict(**SUM)
    last = alone.headers["x-request-id"]
    traced.service._wait(lambda: lines(traced.service, request_id=last), "line", 30)
    found = [
        {line.get("trace_id") for line in lines(traced.service, request_id=answer.headers["x-request-id"])}
        for answer in (followed, failed, alone)
    ]
    events = {line["event"] for line in lines(traced.service, trace_id=failed.extensions["trace_id"].decode())}

    assert found == [
        {followed.extensions["trace_id"].decode()},
        {failed.extensions["trace_id"].decode()},
        {None},
    ]
    assert events == {"prediction failed", "request"}


def test_about_the_shares_that_are_asked_for_are_traced_and_logged(folder):
    more = {"ML_TRACE_SAMPLE": "0.05", "ML_ACCESS_LOG_SAMPLE": "0.2"}
    with collecting() as collector, running(environment(folder, collector, **more)) as service:
        traced = Traced(service.wait_ready(), collector)
        for _ in range(2000):
            service.predict(**SUM)
        traced.seen()
        begun = sum(span.kind == "server" and not span.parent_id for span in collector.spans)
        logged = len(lines(service, event="request"))

    assert 50 < begun < 155  # of 2,000 each with a chance of 0.05: so far off happens once in ten million runs
    assert 300 < logged < 500  # with one of 0.2: the same


# Looks at the bucket


@pytest.mark.parametrize("command", [COMMAND, TWO], ids=["one worker", "two workers"])
def test_a_look_that_changes_something_is_a_trace_of_loads_and_swaps(tmp_path, command):
    publish(tmp_path, "sum", toys.Sum())
    with collecting() as collector, running(environment(tmp_path, collector), command=command) as service:
        service.wait_ready()
        looks(collector, 1)
        service.client.post("/models/refresh")  # finds nothing new, and is not told of
        publish(tmp_path, "sum", toys.Root())
        service.client.post("/models/refresh")
        (tmp_path / "models" / "broken.joblib").write_bytes(b"no model at all")
        service.client.post("/models/refresh")
        first, second, third = looks(collector, 3)

    roots = [root for look in (first, second, third) for root in look if not root.parent_id]
    assert [(root.name, root.kind, root.has_failed) for root in roots] == [("look", "internal", False)] * 3
    assert tree(first, roots[0]) == {
        "storage get": {},
        "storage list": {},
        "load": {"find": {"storage get": {}, "storage head": {}}, "read": {"storage get": {}}},
        "swap": {},
    }
    for look in (first, second, third):
        spans = {span.span_id: span for span in look}
        for span in look:
            around = spans.get(span.parent_id, span)
            assert around.began <= span.began <= span.ended <= around.ended
    for look, label, retired in ((first, "1", []), (second, "2", ["sum/1"])):
        (load,) = [span for span in look if span.name == "load"]
        (swap,) = [span for span in look if span.name == "swap"]
        objects = {span.attributes["diskless.object"] for span in look if span.name == "storage get"}
        assert (load.attributes["diskless.model"], load.attributes["diskless.version"]) == ("sum", label)
        assert load.attributes["diskless.seconds.load"] > 0
        assert (swap.attributes["diskless.serves"], swap.attributes["diskless.retired"]) == (
            [f"production={label}"],
            retired,
        )
        assert {"models/index.json", f"models/sum/{label}/model.joblib"} <= objects
    failed = [span for span in third if span.has_failed]
    assert {"load", "read"} == {span.name for span in failed}
    assert {span.attributes["error.type"] for span in failed} == {"LoadFailed"}


def looks(collector: Collector, count: int) -> list[list[Span]]:
    """Return the spans of each look, once there are so many."""
    found = collector.wait_for(lambda spans: sum(span.name == "look" for span in spans) >= count, "look")
    traces = [span.trace_id for span in found if span.name == "look"]
    return [[span for span in found if span.trace_id == trace_id] for trace_id in traces]


def tree(spans: list[Span], root: Span) -> dict[str, Any]:
    """Return the names of a span's parts, and of theirs; those of one name together."""
    found: dict[str, Any] = {}
    for span in spans:
        if span.parent_id == root.span_id:
            found.setdefault(span.name, {}).update(tree(spans, span))
    return found


# It costs nobody anything


@pytest.mark.parametrize("command", WAYS.values(), ids=WAYS)
def test_what_was_traced_before_the_end_is_sent_before_it(folder, command):
    with collecting() as collector, running(environment(folder, collector), command=command) as service:
        traced = Traced(service.wait_ready(), collector)
        answers = [traced.ask() for _ in range(20)]
        code = service.stop()
        sent = {span.trace_id for span in collector.spans}

    assert code == 0
    assert {answer.extensions["trace_id"].decode() for answer in answers} <= sent


@pytest.mark.parametrize("command", [COMMAND, TWO], ids=["one worker", "two workers"])
def test_a_collector_that_does_not_answer_holds_up_neither_answers_nor_the_end(folder, command):
    with collecting() as collector, running(environment(folder, collector), command=command) as service:
        traced = Traced(service.wait_ready(), collector)
        collector.released.clear()
        collector.asked.clear()
        traced.ask()
        assert collector.asked.wait(30)  # what comes from here on waits
        statuses = {traced.ask().status_code for _ in range(50)}
        code = service.stop()
        still_held = not collector.released.is_set()

    assert statuses == {200}
    assert (code, still_held) == (0, True)


@pytest.mark.parametrize("status", [None, 401, 503], ids=["down", "refusing", "busy"])
def test_a_collector_that_takes_nothing_is_complained_of_in_one_line(folder, status):
    with collecting() as collector:
        collector.status = status or 200
        where = collector.url if status else f"http://127.0.0.1:{free_port()}"
        with running(environment(folder, OTEL_EXPORTER_OTLP_ENDPOINT=where, ML_TRACE_SAMPLE="1")) as service:
            service.wait_ready()
            answers = {service.predict(**SUM).status_code for _ in range(500)}
            service._wait(lambda: lines(service, event="traces were lost"), "line", 30)
            complaints = lines(service, event="traces were lost")
            others = [line for line in lines(service) if line["logger"].startswith(("opentelemetry", "urllib3"))]
            code = service.stop()

    assert (answers, code) == ({200}, 0)
    assert len(complaints) == 1
    assert complaints[0]["count"] >= 1
    assert {None: "Connection refused", 401: "401", 503: "Service Unavailable"}[status] in complaints[0]["reason"]
    assert others == []


def test_traces_are_sent_again_once_the_collector_takes_them(folder):
    port = free_port()
    where = f"http://127.0.0.1:{port}"
    with running(environment(folder, OTEL_EXPORTER_OTLP_ENDPOINT=where)) as service:
        service.wait_ready()
        service._wait(lambda: lines(service, event="traces were lost"), "line", 30)  # of the first look
        collector = Collector(port)
        try:
            traced = Traced(service, collector)
            root, _ = traced.trace(traced.ask())
        finally:
            collector.close()

    assert root.name == "POST /predict"


def test_what_does_not_fit_is_left_out_and_what_waits_is_bounded():
    exporter = tracing.Exporter("http://127.0.0.1:9/v1/traces", service="x", headers={})
    observer = tracing.TracingObserver(exporter, sample=0, trace_sample=1)
    traced = 0
    for number in range(5 * tracing.MAX_WAITING):
        observer.countdown -= 1
        if observer.countdown <= 0:
            record = observer.begin("predict", str(number))
            traced += record.trace is not None
            observer.tell(record, 200)

    assert traced == len(exporter._waiting) == tracing.MAX_WAITING


def test_without_a_collector_the_library_is_not_even_imported(folder):
    imported = []
    for collector_wanted in (False, True):
        with collecting() as collector:
            where = collector if collector_wanted else None
            with running(environment(folder, where), command=TELLING) as service:
                service.wait_ready()
                service.client.post("/predict", json=SUM, headers={"traceparent": f"00-{'a' * 32}-{OWN_ID}-01"})
                service.process.terminate()
                service.process.wait(40)
                (line,) = [line for line in service.log().splitlines() if line.startswith("imported")]
                imported.append(json.loads(line.removeprefix("imported")))

    assert imported == [[], [*MODULES]]


@pytest.mark.parametrize("arguments", [("serve",), ("serve", "--workers", "2")], ids=["one worker", "two workers"])
def test_without_the_library_the_start_says_what_to_install(folder, arguments):
    done = start([*WITHOUT_LIBRARY, *arguments], environment(folder, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9"))

    assert done.returncode == 2
    assert re.search(
        r"OTEL_EXPORTER_OTLP_ENDPOINT is set, but what sends traces is not installed \(.*opentelemetry.*\): "
        r"run `python -m pip install -r otel-requirements.txt`, or unset it",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "expected the base URL of a collector, as in http"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/v1/traces"},
            "expected a base URL, to which /v1/traces is added",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/?a=b"}, "expected a base URL, to which /v1/traces is added"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://u:hunter2@c"}, "expected no user name or password in it"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "a=b,hunter2"}, "header 2: expected name=value"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "a b=hunter2"}, "header 1: expected name=value"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "a=hunter2%0d%0ab: c"}, "header 1: expected name=value"),
        ({"ML_TRACE_SAMPLE": "2"}, "ML_TRACE_SAMPLE is not usable: expected a number from 0 to 1, got '2'"),
    ],
)
def test_settings_that_would_not_do_are_refused(folder, variables, why):
    done = start([*COMMAND], environment(folder, **variables))

    assert done.returncode == 2
    assert why in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


def start(command: list[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=clean_environment(variables), capture_output=True, text=True, timeout=60)


def test_the_frameworks_own_telemetry_stays_off(folder):
    with collecting() as collector:
        variables = environment(folder, collector, FASTAPI_OTEL_AUTO_CONFIGURE="true", ML_TRACE_SAMPLE="1")
        with running(variables) as service:
            traced = Traced(service.wait_ready(), collector)
            service.client.get("/models/status")
            service.client.get("/nowhere")
            traced.seen()
            service.stop()
        names = {span.name for span in collector.spans if span.kind != "client"}
        paths = {path for path, _ in collector.requests}

    assert paths == {"/v1/traces"}
    assert names <= {"POST /predict", *PHASES, "GET /models/status", "GET", "look", "load", "find", "read", "swap"}
