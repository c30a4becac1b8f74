"""A dyno's life: the Procfile's own command with a dyno's environment, on a bucket that it may only read."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.model_storage import ModelStorageManager
from app.protocol import LINGER_SECONDS
from app.storage.r2 import R2Storage
from tests import toys
from tests.faults import FaultyProxy, hang
from tests.service import Service, clean_environment, connected, free_port, r2_environment, running
from tests.trusted import TRUST

ROOT = Path(__file__).parent.parent
PREFIX = "heroku/"
CLIENTS = 64
SUM = {"model": "sum", "instances": [[1, 2, 3.5]]}
ROWS = np.arange(9.0).reshape(3, 3)


def command() -> list[str]:
    """The words of the Procfile's web process."""
    (line,) = [line for line in (ROOT / "Procfile").read_text().splitlines() if line.startswith("web:")]
    return shlex.split(line.removeprefix("web:"))


@pytest.fixture(scope="module")
def dyno(s3, r2_arguments) -> dict[str, str]:
    """A dyno's environment, with the read-only credential for a bucket that has two models."""
    manager = ModelStorageManager(R2Storage(**r2_arguments), prefix=PREFIX, trust=TRUST)
    manager.save("sum", toys.Sum(), examples=ROWS)
    manager.save("naps", toys.Naps())
    return {
        **r2_environment(s3.endpoint_url, s3.bucket, s3.reader),
        "ML_PREFIX": PREFIX,
        "DYNO": "web.1",
        "DYNO_RAM": "512",
        "WEB_CONCURRENCY": "2",
        "WEB_CONCURRENCY_SET_BY": "heroku/python",
        "FORWARDED_ALLOW_IPS": "*",
        "PYTHONUNBUFFERED": "true",
        "HOST": "",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.fixture
def start(dyno) -> Iterator[Callable[..., Service]]:
    """Start dynos, and stop what is left of them."""
    started = []

    def one(**variables: str) -> Service:
        started.append(Service({**dyno, **variables}, command(), own_group=True))
        return started[-1]

    yield one
    for service in started:
        service.close()


@pytest.fixture(scope="module")
def service(dyno) -> Iterator[Service]:
    with running(dyno, command=command()) as running_service:
        yield running_service.wait_ready()
        running_service.process.terminate()
        assert exit_code(running_service) == 0


def request_bytes(body: Any) -> bytes:
    content = json.dumps(body).encode()
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bool, dict[str, Any]]:
    """Return an answer's status, whether it says that the connection closes, and its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = re.search(r"content-length: (\d+)", head)
    assert length is not None
    body = json.loads(await reader.readexactly(int(length[1])))
    return int(head.split()[1]), "connection: close" in head, body


def exit_code(service: Service, seconds: float = 120) -> int:
    return service.process.wait(seconds)


def through_with_its_start(status: dict[str, Any]) -> bool:
    """Whether those workers have gone that had no model yet: until then, they answer too."""
    return len(status["workers"]["processes"]) == 2


# Running


def test_the_processes_that_heroku_asks_for_share_what_they_serve(service):
    workers = service.wait_for(through_with_its_start, "through with its start")["workers"]

    assert workers["count"] == 2
    shared = Path(f"/proc/{workers['pid']}/smaps_rollup").read_text()
    own = int(re.findall(r"^Private_Dirty:\s+(\d+)", shared, re.M)[0])
    assert own < int(re.findall(r"^Shared_Dirty:\s+(\d+)", shared, re.M)[0])


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_it_listens_on_both_kinds_of_addresses(service, address):
    with socket.create_connection((address, service.port), timeout=30) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_it_serves_cloud_only_with_a_credential_that_may_only_read(service):
    status = service.status()

    assert (status["mode"], status["mode_reason"]) == ("cloud-only", "DYNO is set")
    assert {row["name"]: row["state"] for row in status["models"]} == {"naps": "READY", "sum": "READY"}
    assert service.predict(**SUM).json() == {"model": "sum", "version": "1", "predictions": [6.5]}


def test_the_routers_request_id_is_taken_over(service):
    identity = "9a2f8e1c-5d7b-4c3a-8f6e-1b0d9c8a7e65"
    answer = service.client.post("/predict", json=SUM, headers={"X-Request-ID": identity, "Via": "1.1 heroku-router"})

    assert answer.headers["x-request-id"] == identity


def test_what_the_router_says_of_the_client_changes_nothing(service):
    answer = service.client.get(
        "/docs", headers={"X-Forwarded-For": "evil", "X-Forwarded-Proto": "gopher", "X-Forwarded-Port": "x"}
    )

    assert answer.status_code == 200


def test_logs_are_lines_of_json(service):
    lines = [json.loads(line) for line in service.log().splitlines()]

    assert {line["model"] for line in lines if line["event"] == "serving"} == {"naps/1", "sum/1"}
    assert all({"time", "level", "logger", "event"} <= set(line) for line in lines)
    assert not [line for line in lines if line["level"] in ("warning", "error")]


def test_it_is_live_while_models_load_and_ready_when_they_are_there(s3, start):
    with FaultyProxy(s3.endpoint_url) as proxy:
        proxy.inject(hang(), containing="naps/1/model.joblib", times=100)
        service = start(R2_ENDPOINT_URL=proxy.url).wait_live()
        service.wait_for(lambda status: {row["name"] for row in status["models"]} == {"naps", "sum"}, "announced")
        not_ready = service.client.get("/health/ready")
        proxy.heal()
        service.wait_ready()

    assert not_ready.status_code == 503
    assert not_ready.headers["retry-after"] == "5"
    assert not_ready.json()["reason"] in ("the models are being loaded", "naps/1 is LOADING")


def test_it_is_live_and_says_why_it_is_not_ready_while_the_bucket_cannot_be_reached(start):
    service = start(R2_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}", R2_MAX_ATTEMPTS="1").wait_live()
    status = service.wait_for(lambda status: status["storage"]["error"], "told of the error")

    assert service.client.get("/health/ready").status_code == 503
    assert "could not connect: check the endpoint and the network" in status["storage"]["error"]
    assert service.stop() == 0


def test_it_ends_while_a_model_is_being_read(s3, start):
    with FaultyProxy(s3.endpoint_url) as proxy:
        proxy.inject(hang(), containing="sum/1/model.joblib", times=100)
        service = start(R2_ENDPOINT_URL=proxy.url, ML_DRAIN_SECONDS="5").wait_live()
        service.wait_for(lambda status: len(status["models"]) == 2, "announced")
        service.process.terminate()

        assert exit_code(service, 60) == 0
    assert "Traceback" not in service.log()


# Stopping


class Dialogue:
    """A connection on which one request follows the other. Once told to stop, the server waits a second for the next.

    `stopped` has when it was told. Who stands still for longer, as a busy machine makes us, may find the connection closed.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stopped: list[float]) -> None:
        self._reader = reader
        self._writer = writer
        self._stopped = stopped
        self._sent = 0.0

    async def ask(self, request: bytes) -> tuple[int, bool, dict[str, Any]] | None:
        """Return the answer, or None where the server need not have waited for the request. Fails when there is none."""
        before, self._sent = self._sent, time.monotonic()
        self._writer.write(request)
        written = time.monotonic()
        try:
            return await read_answer(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            waited = written - max([before, *self._stopped]) if self._stopped else 0.0
            if getattr(error, "partial", b"") or waited < LINGER_SECONDS:
                raise
            return None


class Caller:
    """A client that keeps its connection busy until it is told that the connection closes."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.answered = 0
        self.told = False

    async def run(self, port: int, stopped: list[float], most: int = 20_000) -> None:
        async with connected("127.0.0.1", port) as (reader, writer):
            dialogue = Dialogue(reader, writer, stopped)
            while not self.told and self.answered < most:
                answer = await dialogue.ask(
                    request_bytes({"model": "sum", "instances": [[self.number, self.answered, 0]]})
                )
                if answer is None:
                    self.told = True
                    return
                status, self.told, body = answer
                assert (status, body["predictions"]) == (200, [self.number + self.answered])
                self.answered += 1
            assert await reader.read() == b""


async def stop_while_busy(service: Service, signals: Callable[[Service], None]) -> list[Caller]:
    """Let clients call without a pause, stop the service in the middle, and return what became of them.

    One more has sent a request that takes long, one asks for nothing, and one whether the service is ready.
    """
    callers = [Caller(number) for number in range(CLIENTS)]
    stopped: list[float] = []
    address = ("127.0.0.1", service.port)
    async with (
        asyncio.timeout(180),
        connected(*address) as (silent, _),
        connected(*address) as (long, long_writer),
        connected(*address) as (health, health_writer),
        asyncio.TaskGroup() as group,
    ):
        for caller in callers:
            group.create_task(caller.run(service.port, stopped))
        while min(caller.answered for caller in callers) < 5:
            await asyncio.sleep(0.001)
        long_writer.write(request_bytes({"model": "naps", "instances": [[1.2, 0, 0]]}))
        await long_writer.drain()
        stopped.append(time.monotonic())
        signals(service)
        asking = Dialogue(health, health_writer, stopped)
        answer = await asking.ask(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        while answer is not None and not answer[1]:
            answer = await asking.ask(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer is None or answer[0] == 503
        status, told, body = await read_answer(long)
        assert (status, told, body["predictions"]) == (200, True, [1.2])
        assert await silent.read() == b""
    return callers


def sigterm(service: Service) -> None:
    service.process.terminate()


def sigterm_five_times(service: Service) -> None:
    for _ in range(5):
        service.process.terminate()


def sigterm_to_all(service: Service) -> None:
    os.killpg(service.process.pid, signal.SIGTERM)


def ctrl_c(service: Service) -> None:
    os.killpg(service.process.pid, signal.SIGINT)


@pytest.mark.parametrize("signals", [sigterm, sigterm_five_times, sigterm_to_all, ctrl_c], ids=lambda it: it.__name__)
def test_every_request_that_was_sent_is_answered(start, signals):
    service = start().wait_ready()
    callers = asyncio.run(stop_while_busy(service, signals))
    if signals is sigterm_five_times:
        while service.process.poll() is None:  # to the very end
            service.process.terminate()

    assert exit_code(service) == 0
    assert all(caller.told for caller in callers)
    assert "Traceback" not in service.log()
    assert [json.loads(line)["event"] for line in service.log().splitlines()][-1] == "stopped"


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("signals", [sigterm, sigterm_five_times], ids=lambda it: it.__name__)
def test_what_never_ends_does_not_hold_up_the_end(start, signals, workers):
    unfinished = {
        "body": b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Request-ID: half\r\nContent-Length: 100\r\n\r\n{",
        "head": b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Le",
        "body of a known head": request_bytes(SUM)[:-1],
        "answer": request_bytes({"model": "naps", "instances": [[600, 0, 0]]}),
    }

    async def ask(service: Service) -> dict[str, bytes]:
        readers = {}
        async with AsyncExitStack() as stack:
            for name, sent in unfinished.items():
                readers[name], writer = await stack.enter_async_context(connected("127.0.0.1", service.port))
                if name == "body of a known head":
                    writer.write(request_bytes(SUM))
                    await read_answer(readers[name])
                writer.write(sent)
                await writer.drain()
            live, writer = await stack.enter_async_context(connected("127.0.0.1", service.port))
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            await live.read()  # the others were sent before, so they have arrived
            signals(service)
            return {name: await reader.read() for name, reader in readers.items()}

    service = start(ML_DRAIN_SECONDS="1", WEB_CONCURRENCY=workers).wait_ready()
    if workers == "2":
        service.wait_for(through_with_its_start, "through with its start")
    answers = asyncio.run(ask(service))

    assert exit_code(service, 60) == 0
    assert answers["head"] == b""
    for name in ("body", "body of a known head", "answer"):
        assert answers[name].startswith(b"HTTP/1.1 503 ")
        assert b"\r\nconnection: close\r\n" in answers[name]
        assert json.loads(answers[name].partition(b"\r\n\r\n")[2])["error"] == "model_not_ready"
    assert b"\r\nx-request-id: half\r\n" in answers["body"]
    assert "Traceback" not in service.log()


def test_the_command_is_found_as_a_dyno_finds_it(dyno):
    assert command()[0] == "python"
    assert Path(clean_environment(dyno)["PATH"].split(":")[0], "python").exists()
