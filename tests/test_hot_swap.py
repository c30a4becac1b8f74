"""The real process under load: versions change below its callers, large models arrive, and it stops when it must."""

from __future__ import annotations

import asyncio
import json
import signal

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from tests import estimators
from tests.faults import hang
from tests.repository import draft, dumped, linear, put
from tests.service import ADMIN_KEY, Service, r2_environment, running

CALLERS = 200
SWAPS = 20
ONE = [[1.0, 1.0, 1.0]]


@pytest.fixture
def environment(s3, bucket, proxy):
    # Nobody looks but who is asked to: however long a test takes, what it publishes waits for it.
    return r2_environment(proxy.url, bucket, s3.reader) | {"ML_REFRESH_SECONDS": "3600"}


class Connection:
    """A keep-alive HTTP connection that costs little: two hundred of them share a core with the service."""

    def __init__(self, service: Service) -> None:
        self._port = service.port

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def request(self, method: str, path: str, **body: object) -> tuple[int, dict]:
        content = json.dumps(body).encode() if body else b""
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {ADMIN_KEY}\r\n"
        head += f"content-length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(answer.partition("content-length:")[2].split("\r\n")[0])
        return int(answer.split(" ", 2)[1]), json.loads(await self._reader.readexactly(length))


async def test_200_callers_over_20_swaps_are_all_answered_rightly_for_the_version_named(manager, environment, s3):
    manager.save("a", linear(1))
    drafts = {version: draft(linear(version)) for version in range(2, SWAPS + 2)}
    with running(environment | {"R2_ENDPOINT_URL": s3.endpoint_url}) as service:
        service.wait_ready()
        done = asyncio.Event()
        newest = 1  # what the service has said that it serves
        seen: set[int] = set()
        answers = 0

        async def call(number: int) -> None:
            nonlocal answers
            row = [float(number), 0.5, 0.25]
            async with Connection(service) as connection:
                while not done.is_set():
                    at_least = newest
                    status, answer = await connection.request("POST", "/predict", model="a", instances=[row])
                    assert status == 200, answer
                    version = int(answer["version"])
                    assert version >= at_least
                    assert answer["predictions"] == pytest.approx([sum(row) + version])
                    seen.add(version)
                    answers += 1

        async def swap() -> None:
            nonlocal newest
            async with Connection(service) as connection, manager.storage:
                for version, made in drafts.items():
                    await manager.publish("a", made, promote=True)
                    status, outcome = await connection.request("POST", "/models/refresh")
                    assert (status, outcome["loaded"], outcome["retired"]) == (
                        200,
                        [f"a/{version}"],
                        [f"a/{version - 1}"],
                    )
                    newest = version
                    reached = answers + CALLERS  # each version answers for a while
                    while answers < reached or version not in seen:
                        await asyncio.sleep(0.001)
            done.set()

        async with asyncio.timeout(600), asyncio.TaskGroup() as group:
            group.create_task(swap())
            for number in range(CALLERS):
                group.create_task(call(number))

        assert seen == set(range(1, SWAPS + 2))
        assert service.model("a")["errors"] == 0
        assert service.stop() == 0


def large() -> Ridge:
    """A fitted model of 100 MB: a thousand inputs, and as many outputs as that makes."""
    model = Ridge().fit(np.zeros((2, 1000)), np.zeros((2, 2)))
    model.coef_ = np.random.default_rng(3).random((13_000, 1000))
    model.intercept_ = np.zeros(13_000)
    return model


async def test_while_a_100_mb_model_loads_health_and_other_models_answer(manager, environment, proxy):
    manager.save("a", linear(1))
    model = large()
    with running(environment) as service:
        service.wait_ready()
        manager.save("large", model)
        proxy.inject(hang(after_bytes=1000), method="GET", containing="large/1/model.joblib")
        counts = {"/predict": 0, "/health/live": 0, "/health/ready": 0}
        loaded = asyncio.Event()

        async def ask(method: str, path: str, **body: object) -> None:
            async with Connection(service) as connection:
                while not loaded.is_set():
                    status, answer = await connection.request(method, path, **body)
                    assert status == 200, answer
                    counts[path] += 1

        async def load() -> None:
            async with Connection(service) as connection:
                refreshing = asyncio.create_task(connection.request("POST", "/models/refresh"))
                while "LOADING" not in [row["state"] for row in service.status()["models"]]:
                    await asyncio.sleep(0.01)
                await further(50)  # answers of each kind, while its first bytes do not come
                assert service.model("large")["state"] == "LOADING"
                before = dict(counts)
                proxy.heal()
                status, outcome = await refreshing
                assert (status, outcome["loaded"]) == (200, ["large/1"])
                assert all(counts[path] > before[path] for path in counts)  # nor while they are read
            loaded.set()

        async def further(count: int) -> None:
            begun = dict(counts)
            while any(counts[path] < begun[path] + count for path in counts):
                await asyncio.sleep(0.001)

        async with asyncio.timeout(600), asyncio.TaskGroup() as group:
            group.create_task(load())
            group.create_task(ask("POST", "/predict", model="a", instances=ONE))
            group.create_task(ask("GET", "/health/live"))
            group.create_task(ask("GET", "/health/ready"))

        row = np.linspace(0, 1, 1000)
        async with Connection(service) as connection:
            status, answer = await connection.request("POST", "/predict", model="large", instances=[row.tolist()])
        assert status == 200
        np.testing.assert_allclose(answer["predictions"][0], model.predict(row[None])[0], rtol=1e-12)


def test_a_service_that_is_told_to_stop_while_it_waits_for_a_models_bytes_ends(manager, environment, proxy):
    manager.save("large", linear(1))
    proxy.inject(hang(), method="GET", containing="model.joblib", times=100)
    with running(environment) as service:
        service.wait_for(lambda status: [row["state"] for row in status["models"]] == ["LOADING"], "loading")

        assert service.stop(signal.SIGINT, seconds=20) == 0


def test_a_model_that_never_ends_to_load_or_to_answer_does_not_keep_the_process(manager, environment):
    put(manager, "models/endless.joblib", dumped(estimators.Endless()))
    put(manager, "models/slow.joblib", dumped(estimators.Slow()))
    with running(environment | {"ML_PREDICT_TIMEOUT_SECONDS": "0.1"}) as service:
        states = {"endless": "READY", "slow": "LOADING"}
        service.wait_for(
            lambda status: {row["name"]: row["state"] for row in status["models"]} == states, "one served, one loading"
        )
        assert service.predict(model="endless", instances=ONE).status_code == 504

        assert service.stop(seconds=20) == 0


def test_a_storage_that_is_down_at_boot_is_waited_for(manager, s3, bucket, proxy, environment):
    manager.save("a", linear(1))
    proxy.inject(hang(), times=10_000)
    values = {"R2_MAX_ATTEMPTS": "1", "R2_READ_TIMEOUT_SECONDS": "2", "ML_REFRESH_SECONDS": "1"}
    with running(environment | values) as service:
        service.wait_live()
        status = service.wait_for(lambda status: status["storage"]["error"], "told")
        assert (status["ready"], status["models"]) == (False, [])
        assert "no answer in time" in status["storage"]["error"]
        assert service.client.get("/health/ready").status_code == 503
        answer = service.predict(model="a", instances=ONE)
        assert (answer.status_code, answer.json()["error"]) == (503, "model_not_ready")
        proxy.heal()
        service.wait_ready()

        assert service.predict(model="a", instances=ONE).json()["predictions"] == pytest.approx([4])
