"""`GET /metrics` of the real service, with one worker and with several: what it tells is what happened.

The oracle is the tests' own count of what they have sent, and of what they were answered.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.counters import AT_A_MODEL
from app.metrics import BATCH_ROWS, LATENCY, LATENCY_BOUNDS, PROCESS_CPU, REFUSALS, REQUESTS, TABLE, markdown
from app.model_storage import ModelStorageManager
from app.registry import State
from app.storage.local import LocalStorage
from tests import faults, toys
from tests.asgi import application, client
from tests.repository import ROWS, linear, put
from tests.scraping import OPENMETRICS, TEXT, Scrape, changes, scrape, scrape_until
from tests.service import AS_ADMIN, AS_ASGI, COMMAND, Service, r2_environment, running
from tests.test_prefork import Load, family, in_thread, refresh, workers
from tests.trusted import TRUST

ROOT = Path(__file__).parent.parent
ONE = [[1.0, 1.0, 1.0]]
PAUSE_SECONDS = 1.0  # for which a request keeps the model that naps


def local(folder: Path, workers: int, **more: str) -> dict[str, str]:
    return {
        "ML_CLOUD_ONLY": "false",
        "ML_LOCAL_DIR": str(folder),
        "ML_WORKERS": str(workers),
        "ML_REFRESH_SECONDS": "3600",
        **more,
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def service(request, tmp_path_factory) -> Iterator[Service]:
    """A service with models that answer, fail, and take their time; and a file that is no model."""
    folder = tmp_path_factory.mktemp("bucket")
    manager = ModelStorageManager(LocalStorage(folder), trust=TRUST)
    manager.save("linear", linear(1), examples=ROWS[:5])
    manager.save("fails", toys.Fails())
    manager.save("naps", toys.Naps(), examples=np.zeros((2, 3)))
    (folder / "models" / "broken.joblib").write_bytes(b"not a model")
    more = {"ML_MAX_QUEUE": "3", "ML_REQUIRED_MODELS": "linear,naps,fails", "ML_ACCESS_LOG_SAMPLE": "1"}
    environment = local(folder, request.param, **more)
    with running(environment) as running_service:
        running_service.wait_live().wait_ready()
        yield (
            running_service.wait_for(lambda status: _state(status, "broken") == "UNAVAILABLE", "through")
            and running_service
        )


def _state(status: dict[str, Any], name: str) -> str | None:
    return next((row["state"] for row in status["models"] if row["name"] == name), None)


def counted_by_code(found: Scrape, model: str) -> dict[str, float]:
    return found.by("code", "diskless_requests_total", model=model)


def as_many(before: dict[str, float], sent: Counter[str]) -> dict[str, float]:
    return dict(Counter(before) + sent)


# What is told


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS, "", 'application/openmetrics-text; version="x";q=?', ",;=,"])
def test_every_metric_of_the_table_is_told_with_its_kind_its_help_and_its_labels(service, accept):
    service.predict(model="linear", instances=ONE)
    found = scrape(service, accept)
    families = {family.name: family for family in found.families}
    is_open = accept.startswith("application/openmetrics-text")

    assert len(found.families) == len(TABLE)
    for metric in TABLE:
        name, kind = metric.name, metric.kind
        if kind == "counter":
            name = name.removesuffix("_total")
        elif kind == "info":
            name, kind = (name.removesuffix("_info"), "info") if is_open else (name, "gauge")
        known = families[name]
        assert (known.type, known.documentation) == (kind, metric.help)
        assert known.samples, f"{name} has no value"
        for sample in known.samples:
            assert {*sample.labels} - {"le"} == {*metric.labels}, sample.name


def test_what_is_asked_for_without_a_body_has_none(service):
    answer = service.client.head("/metrics", headers={"Accept": OPENMETRICS})

    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")


def test_versions_states_and_builds_are_told(service):
    found = scrape(service)
    status = service.status()

    for row in status["models"]:
        states = found.by("state", "diskless_model_state", model=row["name"], version=row["version"])
        assert states == {row["state"]: 1}
        assert len(list(found.matching("diskless_model_state", model=row["name"], version=row["version"]))) == len(
            State
        )
        if row["state"] != "READY":
            continue
        ((info, value),) = found.matching("diskless_model_info", model=row["name"])
        assert value == 1
        assert info == {
            "model": row["name"],
            "version": row["version"],
            "aliases": "production",
            "runtime": row["runtime"],
            "sealed": "false",
            "bare": "false",
        }
        assert found.by("phase", "diskless_model_load_seconds", model=row["name"]) == {
            phase: seconds for phase, seconds in row["seconds"].items() if seconds
        }
        assert found.sum("diskless_model_resident_bytes", model=row["name"]) == row["resident_bytes"]
    assert _state(status, "broken") == "UNAVAILABLE"
    assert found.sum("diskless_ready") == 1
    ((build, _),) = found.matching("diskless_build_info")
    assert build == {
        "version": json.loads(service.client.get("/openapi.json").content)["info"]["version"],
        "python": ".".join(map(str, sys.version_info[:3])),
        "scikit_learn": __import__("sklearn").__version__,
        "numpy": np.__version__,
    }
    assert abs(found.sum("diskless_last_sync_timestamp_seconds") - time.time()) < 3600


# Counts


def test_requests_rows_errors_batches_and_latencies_are_those_of_what_was_sent(service):
    before = scrape(service)
    sizes = [1, 1, 2, 3, 5, 64, 65, 128]
    rejected = 4
    took = []
    for rows in sizes:
        started = time.perf_counter()
        assert service.predict(model="linear", instances=ONE * rows).status_code == 200
        took.append(time.perf_counter() - started)
    for _ in range(rejected):
        assert service.predict(model="linear", instances=[["x", 1, 2]]).json()["error"] == "invalid_input"
    for _ in range(3):
        assert service.predict(model="fails", instances=ONE).json()["error"] == "prediction_failed"

    expected = {"ok": len(sizes), "invalid_input": rejected}
    labels = {"model": "linear", "version": "1"}
    batches = before.sum("diskless_batch_rows_count", **labels) + len(sizes)
    after = scrape_until(service, lambda found: found.sum("diskless_batch_rows_count", **labels) == batches)
    assert counted_by_code(after, "linear") == as_many(counted_by_code(before, "linear"), Counter(expected))
    assert counted_by_code(after, "fails") == as_many(counted_by_code(before, "fails"), Counter(prediction_failed=3))
    grown = changes(before, after)
    key = frozenset(labels.items())
    assert grown["diskless_rows_total", key] == sum(sizes)
    assert grown["diskless_batch_rows_sum", key] == sum(sizes)
    assert grown["diskless_latency_seconds_count", key] == len(sizes)
    assert 0 < grown["diskless_latency_seconds_sum", key] < sum(took)
    bins, earlier = after.histogram("diskless_batch_rows", **labels), before.histogram("diskless_batch_rows", **labels)
    assert {bound: count - earlier[bound] for bound, count in bins.items()} == {
        bound: sum(rows <= bound for rows in sizes) for bound in bins
    }


def test_the_codes_that_callers_are_given_are_those_that_are_counted(service):
    before = scrape(service)
    body = {"model": "naps", "instances": [[PAUSE_SECONDS, 0, 0]]}

    refused = threading.Event()

    def call(_: int) -> Counter[str]:
        given = Counter[str]()
        with httpx.Client(base_url=service.url, trust_env=False, timeout=60) as client:
            while not refused.is_set():  # those who come first go on until all are there
                answer = client.post("/predict", json=body)
                given["ok" if answer.status_code == 200 else str(answer.json()["error"])] += 1
                if answer.status_code != 200:
                    refused.set()
        return given

    with ThreadPoolExecutor(24) as pool:
        given = sum(pool.map(call, range(24)), Counter[str]())

    assert given.keys() == {"ok", "overloaded"}  # each worker computes one, and lets three wait
    after = scrape_until(
        service, lambda found: counted_by_code(found, "naps") == as_many(counted_by_code(before, "naps"), given)
    )
    assert (
        after.histogram("diskless_latency_seconds", model="naps")[0.262144]
        == before.histogram("diskless_latency_seconds", model="naps")[0.262144]
    )


def test_buckets_are_those_that_are_said_and_grow(service):
    service.predict(model="linear", instances=ONE)
    found = scrape(service)
    bins = found.histogram(LATENCY.name, model="linear")

    assert list(bins) == [*(bound / 1e6 for bound in LATENCY_BOUNDS), float("inf")]
    assert list(bins.values()) == sorted(bins.values())
    assert bins[float("inf")] == found.sum("diskless_latency_seconds_count", model="linear")
    assert bins[float("inf")] == found.sum(REQUESTS.name, model="linear", code="ok")
    assert list(found.histogram(BATCH_ROWS.name, model="linear"))[:3] == [1.0, 2.0, 4.0]


def test_answers_of_routes_are_counted_and_what_never_reached_a_model(service):
    before = scrape(service)
    asked = [
        *3 * [("GET", "/models/status", "status", 200)],
        *2 * [("GET", "/health/live", "health", 200)],
        *2 * [("HEAD", "/health", "health", 200)],
        *2 * [("GET", "/openapi.json", "openapi", 200)],
        ("GET", "/docs", "docs", 200),
        *4 * [("GET", "/nowhere/secret", "other", 404)],
        ("GET", "/nowhere/else", "other", 404),
        *2 * [("DELETE", "/models/status", "status", 405)],
        *3 * [("GET", "/models/linear/predict", "other", 405)],
        ("POST", "/models/refresh", "refresh", 200),
        ("HEAD", "/metrics", "metrics", 200),
    ]
    for method, path, _, status in asked:
        assert service.client.request(method, path).status_code == status
    bodies: list[tuple[Any, int]] = [
        *5 * [({"model": "linear", "instances": ONE}, 200)],
        *2 * [({"model": "linear", "instances": ["?"]}, 422)],
        ({"model": "fails", "instances": ONE}, 500),
        *3 * [({"model": "secret", "instances": ONE}, 404)],
        *2 * [("{", 400)],
        ([], 400),
    ]
    for body, status in bodies:
        content = body if isinstance(body, str) else json.dumps(body)
        assert service.client.post("/predict", content=content).status_code == status
    with httpx.Client(base_url=service.url, trust_env=False, timeout=60) as stranger:
        assert stranger.get("/metrics").status_code == 401
        assert stranger.get("/models/status").status_code == 401

    expected = Counter((route, str(status)) for _, _, route, status in asked)
    expected += Counter(("predict", str(status)) for _, status in bodies)
    expected += Counter({("metrics", "401"): 1, ("status", "401"): 1})
    del expected["metrics", "200"]  # each look is one more

    def answers(found: Scrape) -> dict[tuple[str, str], float]:
        grown = {
            (dict(labels)["route"], dict(labels)["status"]): change
            for (name, labels), change in changes(before, found).items()
            if name == "diskless_http_responses_total"
        }
        assert grown.pop(("metrics", "200")) >= 1
        return grown

    # Another worker may have answered the stranger, and may not have counted that yet.
    after = scrape_until(service, lambda found: answers(found) == expected)
    grown = changes(before, after)
    refused = {dict(labels)["code"]: change for (name, labels), change in grown.items() if name == REFUSALS.name}
    assert refused == {
        **{"not_found": 5, "method_not_allowed": 5, "model_not_found": 3, "unauthorized": 2},
        **{"invalid_json": 2, "invalid_request": 1},
    }
    assert "secret" not in after.text


@pytest.mark.parametrize("arguments", [(), ("--workers", "2")], ids=["one worker", "two workers"])
@pytest.mark.parametrize("layer", [COMMAND, AS_ASGI], ids=["protocol", "asgi"])
def test_who_asks_is_told_by_the_names_of_keys(tmp_path, arguments, layer):
    if arguments and layer is AS_ASGI:
        pytest.skip("the layers differ in nothing that workers are for")
    manager = ModelStorageManager(LocalStorage(tmp_path), trust=TRUST)
    manager.save("sum", toys.Sum(), examples=np.arange(24.0).reshape(8, 3))
    ann, bob = "a-key-of-anns-own", "a-key-of-bobs-own"
    environment = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(tmp_path), "ML_API_KEYS": f"ann:{ann},bob:{bob}"}
    with running(environment, command=(*layer, *arguments)) as service:
        service.wait_ready()
        for number in range(30):
            key = ann if number % 3 else bob
            with httpx.Client(base_url=service.url, headers={"x-api-key": key}, trust_env=False, timeout=60) as client:
                assert client.post("/predict", json={"instances": [[1, 2, 3]]}).status_code == 200
                assert client.post("/predict", json={"instances": [["x", 2, 3]]}).status_code == 422
        service.client.post("/predict", json={"instances": [[1, 2, 3]]})
        service.client.post("/predict", json={"instances": [[1, 2, 3]]}, headers={"x-api-key": "no-key-of-anybody"})
        text = service.client.get("/metrics").text

    told = dict(re.findall(r'diskless_key_requests_total{key="(\w+)"} ([0-9.]+)', text))
    assert {name: float(count) for name, count in told.items()} == {"ann": 40, "bob": 20, "tests": 1}


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"x-api-key": "a-key-of-a-caller"}, 403), (AS_ADMIN, 200), ({"x-api-key": "nobody's, I think"}, 401)],
)
async def test_only_administrators_are_told(tmp_path, headers, status):
    variables = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(tmp_path), "ML_API_KEYS": "ann:a-key-of-a-caller"}
    async with application(**variables) as app, client(app) as http:
        http.headers.pop("x-api-key")
        answer = await http.get("/metrics", headers=headers)

    assert answer.status_code == status
    assert ("diskless_ready" in answer.text) == (status == 200)


def test_what_may_be_counted_is_told_before_it_is(service):
    found = scrape(service)

    for code in ("ok", *AT_A_MODEL):
        found.sum("diskless_requests_total", model="linear", code=code)
    for code in ("model_not_found", "invalid_json", "unauthorized", "internal_error"):
        found.sum("diskless_refused_total", code=code)
    for status in ("200", "429", "500", "503", "504"):
        found.sum("diskless_http_responses_total", route="predict", status=status)


# What is so at the moment


def test_requests_that_wait_and_are_computed_are_told_while_they_are(service):
    waiting, count = 3, len(service.status()["workers"]["processes"])
    body = {"model": "naps", "instances": [[2.0, 0, 0]]}
    stop = threading.Event()

    def call(_: int) -> None:
        apart = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=service.url, trust_env=False, timeout=60, limits=apart) as client:
            while not stop.wait(0.01):  # on connections of their own: in the end each worker has as many as it takes
                client.post("/predict", json=body)

    def is_full(found: Scrape) -> bool:
        queued = found.sum("diskless_queue_requests", model="naps")
        return queued == waiting * count <= found.sum("diskless_in_flight_requests", model="naps") - count

    # What waits is computed at once, as one batch, and as many wait for the next: two more than all of them find no place.
    callers = 2 * waiting * count + 2
    with ThreadPoolExecutor(callers) as pool:
        done = pool.map(call, range(callers))
        try:
            found = scrape_until(service, is_full)
        finally:
            stop.set()
        list(done)

    computed = found.sum("diskless_in_flight_requests", model="naps") - waiting * count
    assert computed <= waiting * count
    assert found.sum("diskless_queue_limit_requests") == waiting * count
    assert found.sum("diskless_in_flight_requests", model="linear") == 0
    scrape_until(service, lambda found: found.sum("diskless_in_flight_requests", model="naps") == 0)


def test_the_processes_are_told(service):
    found = scrape(service)
    told = service.status()["workers"]
    pids = [service.process.pid, *family(service.process.pid)]

    roles = {"worker"} if told["count"] == 1 else {"worker", "supervisor", "parent", "heir"}
    scrape_until(service, lambda found: {*found.by("role", "diskless_process_memory_bytes")} == roles)
    assert found.by("state", "diskless_workers") == {"serving": told["count"]}
    assert found.sum("diskless_workers_wanted") == told["count"]
    assert found.sum("diskless_worker_restarts_total") == 0
    assert found.sum("diskless_generation") == (told["generation"] or 0)
    files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    assert abs(found.sum("diskless_process_open_files") - files) <= 10  # connections come and go
    assert found.sum("diskless_process_threads") >= len(pids)
    resident = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)
    assert 0 < found.sum("diskless_process_memory_bytes") <= 1.1 * resident
    assert 0 < found.sum("diskless_memory_used_bytes") < found.sum("diskless_memory_limit_bytes")
    assert service.began - 1 < found.sum("diskless_start_time_seconds") < time.time() + 1
    seconds = found.sum("diskless_process_cpu_seconds_total")
    service.predict(model="linear", instances=ONE * 1000)
    assert scrape(service).sum("diskless_process_cpu_seconds_total") >= seconds > 0


# Over the life of a service


@pytest.fixture
def environment(s3, bucket, proxy):
    r2 = r2_environment(proxy.url, bucket, s3.reader)
    return r2 | {"ML_REFRESH_SECONDS": "3600", "R2_MAX_ATTEMPTS": "1"}


def test_the_counts_of_a_worker_that_was_killed_stay_and_its_successor_counts_on(manager, environment):
    manager.save("a", linear(1))
    with running(environment | {"ML_WORKERS": "2"}) as service:
        before = workers(service.wait_live().wait_ready().status())
        answered = Counter[str]()

        def send(count: int) -> None:
            for _ in range(count):  # each on a connection of its own, so that both workers get some
                answer = httpx.post(f"{service.url}/predict", json={"instances": ONE}, trust_env=False, timeout=60)
                answered["ok" if answer.status_code == 200 else answer.json()["error"]] += 1

        send(40)
        scrape_until(service, lambda found: counted_by_code(found, "a") == answered == {"ok": 40})
        for number in (0, 1):
            os.kill(before[number], signal.SIGKILL)
        service.client.close()
        service.client = httpx.Client(base_url=service.url, headers=AS_ADMIN, timeout=30, trust_env=False)
        service.wait_for(
            lambda status: workers(status).keys() == {0, 1} and not {*workers(status).values()} & {*before.values()},
            "with two other workers",
        )
        found = scrape_until(service, lambda found: found.sum("diskless_worker_restarts_total") == 2)
        assert counted_by_code(found, "a") == {"ok": 40}
        send(30)

        scrape_until(service, lambda found: counted_by_code(found, "a") == answered == {"ok": 70})
        # A batch is counted when its answers are on their way.
        found = scrape_until(service, lambda found: found.sum("diskless_batch_rows_sum") == 70)
        assert found.sum("diskless_rows_total") == 70
        assert found.by("state", "diskless_workers") == {"serving": 2}


@pytest.mark.parametrize("count", [1, 2])
async def test_over_hot_swaps_nothing_decreases_and_each_version_begins_at_nothing(manager, environment, count):
    manager.save("a", linear(1))
    with running(environment | {"ML_WORKERS": str(count)}) as service:
        service.wait_live().wait_ready()
        load = Load(service, model="a", instances=ONE)
        scrapes: list[Scrape] = []
        done = asyncio.Event()

        async def watch() -> None:
            while not done.is_set():
                scrapes.append(await in_thread(scrape, service))
                await asyncio.sleep(0.02)

        watching = asyncio.create_task(watch())
        async with load.running(4):
            await load.answered()
            for version in (2, 3):
                await in_thread(lambda number=version: manager.save("a", linear(number), promote=True))
                await in_thread(refresh, service)
                await load.answered()
            async with manager.storage:
                await manager.rollback("a")
            await in_thread(refresh, service)  # to version 2, which counts on
            await load.answered()
        done.set()
        await watching

        assert load.failures == []
        by_version = Counter(answer["version"] for answer in load.answers)
        assert by_version.keys() == {"1", "2", "3"}
        await in_thread(
            scrape_until, service, lambda found: found.by("version", "diskless_requests_total", model="a") == by_version
        )

        def tells_all(found: Scrape) -> bool:  # an answer is counted when it is on its way
            told = found.sum("diskless_http_responses_total", route="predict", status="200")
            return told == len(load.answers)

        found = await in_thread(scrape_until, service, tells_all)
        # What a process has computed that ends meanwhile may be counted twice, or not at all: see `processes.figures`.
        counters = {metric.name for metric in TABLE if metric.kind == "counter"} - {PROCESS_CPU.name}
        for earlier, later in itertools.pairwise(scrapes):
            for (name, labels), value in earlier.samples.items():
                if name in counters or name.endswith(("_bucket", "_count")):
                    assert later.samples.get((name, labels), -1) >= value, (name, labels)
        firsts = {}
        for found in scrapes:
            for version, value in found.by("version", "diskless_rows_total", model="a").items():
                firsts.setdefault(version, value)
        assert all(value <= by_version[version] for version, value in firsts.items())
        assert found.sum("diskless_model_info", model="a") == 1


@pytest.mark.parametrize("count", [1, 2])
def test_looks_loads_and_what_they_asked_of_the_storage_are_counted(manager, environment, proxy, count):
    manager.save("a", linear(1), examples=ROWS[:3])
    with running(environment | {"ML_WORKERS": str(count)}) as service:
        service.wait_live().wait_ready()
        service.wait_for(lambda status: status["storage"]["last_sync"], "through with a look")
        first = scrape_until(service, lambda found: found.sum("diskless_refreshes_total") >= 1)
        assert first.by("outcome", "diskless_refreshes_total") == {"changed": 1}
        assert first.by("outcome", "diskless_loads_total") == {"ok": 1}
        asked = Counter(seen.method for seen in proxy.seen if "list-type" not in seen.target)
        listed = sum("list-type" in seen.target for seen in proxy.seen)
        found = first.by("operation", "diskless_storage_operations_total", storage="r2")
        assert found == {"list": listed} | {method.lower(): times for method, times in asked.items()}
        stored = sum(source["bytes"] for source in service.model("a")["source"])
        assert first.sum("diskless_storage_bytes_total", storage="r2", direction="read") > stored

        refresh(service)
        second = scrape(service)
        assert second.by("outcome", "diskless_refreshes_total") == {"changed": 1, "unchanged": 1}
        assert second.sum("diskless_storage_operations_total", operation="get", outcome="not_modified") == 1

        put(manager, "models/broken.joblib", b"not a model")
        refresh(service)
        third = scrape(service)
        assert third.by("outcome", "diskless_refreshes_total") == {"changed": 1, "unchanged": 2}
        assert third.by("outcome", "diskless_loads_total") == {"ok": 1, "load_failed": 1}
        assert third.by("state", "diskless_model_state", model="broken") == {"UNAVAILABLE": 1}

        proxy.inject(faults.drop(), times=faults.FOR_EVER)
        synced = third.sum("diskless_last_sync_timestamp_seconds")
        assert service.client.post("/models/refresh").status_code == 503
        fourth = scrape(service)
        looks = fourth.by("outcome", "diskless_refreshes_total")
        failed = looks.pop("failed")
        unavailable = fourth.sum("diskless_storage_operations_total", storage="r2", outcome="unavailable")
        assert looks == {"changed": 1, "unchanged": 2}
        assert failed >= 1
        # Where another process looks, it does so again by itself a second later, and so on.
        assert failed == 1 or count > 1
        assert failed <= unavailable <= failed + 1
        assert fourth.sum("diskless_last_sync_timestamp_seconds") == synced
        assert fourth.by("status", "diskless_http_responses_total", route="refresh") == {"200": 2, "503": 1}
        assert fourth.sum("diskless_refused_total", code="bucket_unreadable") == 1
        assert fourth.sum("diskless_ready") == 1


def test_the_local_copy_is_told_of_apart_from_the_bucket(manager, environment, proxy, tmp_path):
    manager.save("a", linear(1), examples=ROWS[:3])
    copying = environment | {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(tmp_path)}
    with running(copying) as service:
        found = scrape(service.wait_live().wait_ready())
        read = found.sum("diskless_storage_bytes_total", storage="r2", direction="read")
        files = [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
        assert read == found.sum("diskless_storage_bytes_total", storage="copy", direction="written")
        assert read == sum(path.stat().st_size for path in files) > 0
        assert found.sum("diskless_storage_fallback") == 0

    proxy.inject(faults.drop(), times=faults.FOR_EVER)
    with running(copying) as service:
        found = scrape(service.wait_live().wait_ready())
        assert found.sum("diskless_storage_bytes_total", storage="r2") == 0
        assert found.sum("diskless_storage_bytes_total", storage="copy", direction="read") == read
        assert found.sum("diskless_storage_operations_total", storage="r2", outcome="unavailable") > 0
        assert found.sum("diskless_storage_fallback") == 1


async def test_before_there_is_a_model_the_service_says_that_it_is_not_ready(environment, proxy):
    proxy.inject(faults.hang(), times=faults.FOR_EVER)
    for count in ("1", "2"):
        with running(environment | {"ML_WORKERS": count}) as service:
            found = await in_thread(scrape, service.wait_live())
            assert found.sum("diskless_ready") == 0
            assert not list(found.matching("diskless_last_sync_timestamp_seconds"))
            proxy.heal()
            proxy.inject(faults.hang(), times=faults.FOR_EVER)


# The table in the documentation


def test_the_documentation_has_every_metric_as_the_code_has_it():
    between = re.search(r"<!-- metrics -->\n(.*?)<!-- /metrics -->", (ROOT / "docs/metrics.md").read_text(), re.S)

    assert between, "docs/metrics.md has no <!-- metrics --> ... <!-- /metrics -->"
    assert between[1].strip() == markdown(), "bring it up to date with: python -m app.metrics"


def test_the_command_prints_the_table():
    run = subprocess.run([sys.executable, "-m", "app.metrics"], cwd=ROOT, capture_output=True, text=True, check=True)

    assert run.stdout == f"{markdown()}\n"
