"""Several workers: real processes that share a socket and their models' memory, killed, swapped and stopped under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.model_storage import ModelStorageManager
from app.storage.r2 import R2Storage
from tests import estimators
from tests.repository import ROWS, classifier, draft, dumped, expected, linear, put, scaler
from tests.service import AS_ADMIN, COMMAND, Service, clean_environment, r2_environment, running
from tests.trusted import TRUST

ONE = [[1.0, 1.0, 1.0]]
CALLERS = 16


@pytest.fixture
def environment(s3, bucket):
    r2 = r2_environment(s3.endpoint_url, bucket, s3.reader)
    return r2 | {"ML_WORKERS": "2", "ML_REFRESH_SECONDS": "3600"}


def refresh(service: Service) -> dict[str, Any]:
    answer = service.client.post("/models/refresh")
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def alive(pid: int) -> bool:
    """Whether a process is there and not only waited for."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def family(pid: int) -> list[int]:
    """The process ids of a process's descendants, zombies too."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, row = [], [pid]
    while row:
        row = [child for child, parent in parents.items() if parent in row]
        found += row
    return found


def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not {what} in {seconds} s"
        time.sleep(0.01)


def workers(status: dict[str, Any]) -> dict[int, int]:
    """The process ids of the workers that serve, by number."""
    return {one["number"]: one["pid"] for one in status["workers"]["processes"] if one["state"] == "serving"}


class Load:
    """Callers on connections that they keep as long as the service does, and what became of their requests.

    A service that ends waits `LINGER_SECONDS` for a connection's next request. Callers who stood still for so long find it
    closed before they ask, as clients do that keep connections, and have lost nothing.
    """

    def __init__(self, service: Service, **request: Any) -> None:
        self._port = service.port
        self._body = json.dumps(request).encode()
        self.answers: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._done = False

    @contextlib.asynccontextmanager
    async def running(self, callers: int = CALLERS) -> AsyncIterator[Load]:
        async with asyncio.timeout(600), asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(self._call())
            try:
                yield self
            finally:
                self._done = True

    async def answered(self, count: int = 100) -> None:
        """Wait for so many answers more."""
        reached = len(self.answers) + count
        while len(self.answers) < reached:
            await asyncio.sleep(0.002)

    async def _call(self) -> None:
        head = f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(self._body)}\r\n\r\n".encode()
        while not self._done:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except ConnectionRefusedError:  # nobody listens any more: what was not accepted is not lost
                return
            try:
                closing = False
                while not (self._done or closing):
                    writer.write(head + self._body)
                    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                    length = int(answer.partition("content-length:")[2].split("\r\n")[0])
                    body = await reader.readexactly(length)
                    if " 200 " not in answer[:16]:
                        self.failures.append(body.decode())
                    else:
                        self.answers.append(json.loads(body))
                    closing = "connection: close" in answer or is_closed(reader, writer)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.failures.append(repr(error))
            finally:
                writer.close()


def is_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whether the other side has closed a connection on which nothing is awaited, as the kernel knows at this moment."""
    if reader.at_eof() or reader.exception() is not None:
        return True
    poll = select.poll()
    poll.register(writer.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.to_thread(function, *arguments)


# Serving


@pytest.fixture(scope="module")
def four(s3, bucket_client, r2_arguments) -> Iterator[Service]:
    """A service with four workers and a classifier behind its scaler, under a prefix of its own."""
    manager = ModelStorageManager(R2Storage(**r2_arguments), prefix="four/", trust=TRUST)
    manager.save("fraud", classifier(), scaler=scaler(), examples=ROWS[:5])
    r2 = r2_environment(s3.endpoint_url, s3.bucket, s3.reader)
    with running(r2 | {"ML_PREFIX": "four/"}, command=[*COMMAND, "--workers", "4"]) as service:
        yield service.wait_live().wait_ready()


def each_worker(service: Service) -> Iterator[tuple[int, httpx.Client]]:
    """A connection to each of the workers."""
    missing = set(workers(service.status()).values())
    assert len(missing) == 4
    end = time.monotonic() + 120
    while missing:
        assert time.monotonic() < end, f"{missing} did not answer"
        with httpx.Client(base_url=service.url, headers=AS_ADMIN, trust_env=False, timeout=60) as client:
            pid = client.get("/models/status").json()["workers"]["pid"]
            if pid in missing:
                missing.remove(pid)
                yield pid, client


def test_every_worker_answers_as_scikit_learn_does_and_their_counts_are_added_up(four):
    before = four.model("fraud")
    request = {"instances": ROWS.tolist(), "method": "predict_proba"}

    for pid, client in each_worker(four):
        answer = client.post("/predict", json=request)
        np.testing.assert_allclose(answer.json()["predictions"], expected(), rtol=1e-9)
        assert client.post("/predict", json={"instances": [["x", 1, 2]]}).status_code == 422
        assert client.get("/models/status").json()["workers"]["pid"] == pid

    for _, client in each_worker(four):
        row = client.get("/models/status").json()["models"][0]
        counted = [row[name] - before[name] for name in ("requests", "rows", "errors", "batches")]
        assert counted == [8, 4 * len(ROWS), 4, 4]
        assert row["latency_milliseconds"]["p50"] > 0
        assert (row["state"], row["parity"], row["golden_rows"]) == ("READY", pytest.approx(0, abs=1e-9), 5)


def test_the_supervisor_has_no_library_that_computes_or_speaks_http_and_no_second_thread(four):
    service = four.status()["workers"]
    assert service["supervisor"] == four.process.pid

    mapped = Path(f"/proc/{four.process.pid}/maps").read_text()
    for library in ("numpy", "sklearn", "scipy", "pandas", "uvloop", "httptools", "aiohttp", "openblas"):
        assert f"/{library}" not in mapped
    for pid in (service["supervisor"], service["parent"]):
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1


def test_importing_the_supervisor_imports_nothing_heavy():
    heavy = {"numpy", "sklearn", "pandas", "fastapi", "starlette", "uvicorn", "aioboto3", "botocore"}
    code = "import json, sys, app.prefork, app.listening, app.log; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout

    assert not {name.split(".")[0] for name in json.loads(output)} & heavy


def test_asking_for_a_look_answers_whichever_worker_is_asked(four):
    for _, client in each_worker(four):
        assert client.post("/models/refresh").json() == {"loaded": [], "failed": {}, "retired": []}


def test_a_service_without_models_is_alive_and_says_why_it_is_not_ready(environment):
    with running(environment) as service:
        service.wait_live()
        service.wait_for(lambda status: status["storage"]["last_sync"], "synchronised")
        answer = service.client.get("/health/ready")

        assert (answer.status_code, answer.json()["reason"]) == (503, "the bucket has no model to serve")
        assert service.predict(model="a", instances=ONE).json()["error"] == "model_not_found"
        assert service.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_start_says_where_it_listens_and_looks_and_when_models_are_ready(manager, environment, workers):
    async with manager.storage:
        await manager.publish("a", draft(linear(1)))
    with running(environment | {"ML_WORKERS": str(workers), "ML_REQUIRE_MODELS": "a"}) as service:
        service.wait_ready()
        lines = [json.loads(line) for line in service.log().splitlines()]
    told = ("unknown setting", "listening", "looking for models", "models are ready", "models are not ready")
    ours = {"time", "level", "logger"}

    assert [{key: line[key] for key in line.keys() - ours} for line in lines if line["event"] in told] == [
        {"event": "unknown setting", "problem": "ML_REQUIRE_MODELS is no setting: did you mean ML_REQUIRED_MODELS?"},
        {"event": "listening", "host": "127.0.0.1", "port": service.port, "workers": workers},
        {"event": "looking for models", "storage": manager.storage.describe(), "prefix": "models/"},
        {"event": "models are ready"},
    ]


def test_what_needs_one_worker_refuses_several(environment):
    for variables, words, detail in (
        ({"ML_SWAP_POLICY": "replace"}, (), "ML_SWAP_POLICY=replace needs one worker"),
        ({}, ("--workers", "0"), "expected a whole number from 1 to 256, got '0'"),
    ):
        environ = clean_environment(environment | variables)
        ended = subprocess.run([*COMMAND, *words], env=environ, capture_output=True, text=True, timeout=60, cwd="/")
        assert (ended.returncode, detail in ended.stderr) == (2, True), ended.stderr


# What changes


async def test_versions_change_under_load_and_nobody_notices(manager, environment):
    manager.save("a", linear(1), examples=ROWS[:3])
    drafts = {version: draft(linear(version), ROWS[:3]) for version in range(2, 6)}
    with running(environment) as service:
        service.wait_ready()
        load = Load(service, model="a", instances=[[1.0, 0.5, 0.25]])
        async with load.running(), manager.storage:
            for version, made in drafts.items():
                await manager.publish("a", made, promote=True)
                outcome = await in_thread(refresh, service)
                since = len(load.answers)
                assert outcome == {"loaded": [f"a/{version}"], "failed": {}, "retired": [f"a/{version - 1}"]}
                await load.answered()
                # answers that were on their way to their callers apart, nobody gets the old version any more
                late = [answer for answer in load.answers[since:] if answer["version"] != str(version)]
                assert len(late) <= CALLERS

        assert load.failures == []
        for answer in load.answers:
            assert answer["predictions"] == pytest.approx([1.75 + int(answer["version"])])
        assert {answer["version"] for answer in load.answers} == set("12345")
        status = service.status()
        assert (status["workers"]["generation"], status["workers"]["restarts"]) == (5, 0)
        assert service.model("a")["errors"] == 0
        until(lambda: len(family(service.process.pid)) == 4, "down to parent, heir and two workers")
        assert service.stop() == 0


def test_what_cannot_serve_leaves_the_version_before_it_and_says_why(manager, environment):
    manager.save("a", linear(1), examples=ROWS[:3])
    manager.save("moody", estimators.Moody(), examples=ROWS[:3])
    with running(environment | {"MOOD": "wrong"}) as service:
        service.wait_for(lambda status: status["workers"]["generation"] == 1, "in its first generation")
        moody = service.model("moody")
        assert (moody["state"], "golden row 0" in moody["reason"]) == ("UNAVAILABLE", True)
        assert service.predict(model="moody", instances=ONE).json()["error"] == "model_not_ready"
        broken = manager.save("a", linear(2), examples=ROWS[:3], promote=True, compile=False)
        put(manager, f"models/a/{broken.version}/model.joblib", b"no model")
        put(manager, "models/fine.joblib", dumped(linear(3)))

        outcome = refresh(service)

        assert outcome["loaded"] != []
        assert [*outcome["failed"]] == ["moody/1", "a/2"] or {*outcome["failed"]} == {"moody/1", "a/2"}
        assert service.predict(model="a", instances=ONE).json()["version"] == "1"
        assert service.predict(model="fine", instances=ONE).json()["predictions"] == pytest.approx([6])
        assert service.model("a")["state"] == "UNAVAILABLE"
        assert "model.joblib" in service.model("a")["reason"]
        generation = service.status()["workers"]["generation"]
        assert {*refresh(service)["failed"]} == {"moody/1", "a/2"}
        assert service.status()["workers"]["generation"] == generation  # nothing else is served, so nobody is replaced
        assert service.stop() == 0


def test_a_model_that_ends_whoever_loads_or_tries_it_fails_alone(manager, environment):
    manager.save("a", linear(1), examples=ROWS[:3])
    manager.save("moody", estimators.Moody(), examples=ROWS[:3])
    put(manager, "models/deadly.joblib", dumped(estimators.DeadlyToRead()))
    put(manager, "models/threaded.joblib", dumped(estimators.Threaded()))
    with running(environment | {"MOOD": "deadly"}) as service:
        status = service.wait_for(
            lambda status: sorted(row["state"] for row in status["models"]) == ["READY", *3 * ["UNAVAILABLE"]],
            "through with all four",
            seconds=240,
        )

        reasons = {row["name"]: row["reason"] for row in status["models"]}
        assert reasons["a"] is None
        assert "by SIGSEGV" in reasons["moody"]
        assert "by SIGKILL, most likely because there was no memory left" in reasons["deadly"]
        assert "threads that do not end (of the model)" in reasons["threaded"]
        assert service.predict(model="a", instances=ONE).json()["predictions"] == pytest.approx([4])
        assert service.stop() == 0


# Who dies


async def test_a_worker_that_is_killed_is_replaced_and_loses_what_it_held_only(manager, environment):
    manager.save("a", linear(1))
    with running(environment) as service:
        before = workers(service.wait_ready().status())
        load = Load(service, model="a", instances=ONE)
        async with load.running():
            await load.answered()
            os.kill(before[0], signal.SIGKILL)
            status = await in_thread(
                service.wait_for,
                lambda status: workers(status).keys() == {0, 1} and workers(status)[0] != before[0],
                "replaced",
            )
            failed = len(load.failures)
            await load.answered(1000)

        assert len(load.failures) == failed <= CALLERS
        assert workers(status)[1] == before[1]
        assert status["workers"]["restarts"] == 1
        assert service.model("a")["requests"] >= len(load.answers)  # the dead worker's are not forgotten
        assert service.stop() == 0


async def test_whoever_loads_may_be_killed_and_nobody_notices(manager, environment):
    manager.save("a", linear(1))
    with running(environment) as service:
        first = service.wait_ready().status()["workers"]
        load = Load(service, model="a", instances=ONE)
        async with load.running(4):
            await load.answered()
            begun = await in_thread(service.wait_for, lambda status: status["workers"]["heir"], "with an heir")
            heir = begun["workers"]["heir"]
            os.kill(heir, signal.SIGKILL)
            second = await in_thread(
                service.wait_for,
                lambda status: status["workers"]["heir"] not in (None, heir),
                "with another heir",
            )
            assert second["workers"]["parent"] == first["parent"]

            os.kill(first["parent"], signal.SIGKILL)
            third = await in_thread(
                service.wait_for,
                lambda status: status["workers"]["parent"] not in (None, first["parent"]) and status["workers"]["heir"],
                "with another parent",
            )
            assert third["workers"]["parent"] == second["workers"]["heir"]  # it has all models, and loads none again

            os.kill(third["workers"]["heir"], signal.SIGKILL)
            os.kill(third["workers"]["parent"], signal.SIGKILL)
            fourth = await in_thread(
                service.wait_for,
                lambda status: status["workers"]["parent"] not in (None, third["workers"]["parent"]),
                "with a parent from nothing",
            )
            await load.answered()

        assert load.failures == []
        assert fourth["workers"]["restarts"] == 0
        until(lambda: len(family(service.process.pid)) == 4, "down to parent, heir and two workers")
        assert service.stop() == 0


# The end


@pytest.mark.parametrize("how", ["once", "five times", "to all, twice", "Ctrl-C"])
async def test_the_end_answers_what_was_accepted_and_leaves_nobody(manager, environment, how):
    manager.save("a", linear(1))
    with running(environment, own_group=True) as service:
        service.wait_ready()
        everybody = [service.process.pid, *family(service.process.pid)]
        load = Load(service, model="a", instances=ONE)

        async def end() -> int:
            match how:
                case "once":
                    service.process.send_signal(signal.SIGTERM)
                case "five times":
                    for _ in range(5):
                        service.process.send_signal(signal.SIGTERM)
                        await asyncio.sleep(0.01)
                case "to all, twice":
                    os.killpg(service.process.pid, signal.SIGTERM)
                    await asyncio.sleep(0.05)
                    os.killpg(service.process.pid, signal.SIGTERM)
                case "Ctrl-C":
                    os.killpg(service.process.pid, signal.SIGINT)
            return await in_thread(service.process.wait, 30)

        async with load.running():
            await load.answered()
            code = await end()

        assert code == 0
        assert load.failures == []
        assert not any(map(alive, everybody))
        assert "gave up requests" not in service.log()


def test_nobody_stays_when_the_supervisor_is_killed(manager, environment):
    manager.save("a", linear(1))
    with running(environment) as service:
        service.wait_ready().wait_for(lambda status: status["workers"]["heir"], "with an heir")
        everybody = family(service.process.pid)
        assert len(everybody) >= 4

        service.process.kill()

        until(lambda: not any(map(alive, everybody)), "gone")
