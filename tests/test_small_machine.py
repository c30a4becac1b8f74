"""The real process in a real control group of 512 MB: no load that it could have refused has the kernel kill it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from app.memory import MB, Taken
from app.model_storage import ModelStorageManager
from app.publishing import Draft
from app.storage.local import LocalStorage
from tests.cgroup import Group, small_machine
from tests.repository import draft, dumped, linear, put
from tests.service import Service, running

ROW = [1.0, 2.0, 3.0]


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with small_machine() as made:
        if isinstance(made, str):
            pytest.skip(made)
        yield made


@pytest.fixture
def manager(tmp_path) -> ModelStorageManager:
    return ModelStorageManager(LocalStorage(tmp_path))


def model(answer: float, megabytes: int) -> LinearRegression:
    """A model that answers 6 + `answer` to the row, and is as large as that."""
    fitted = LinearRegression()
    fitted.coef_, fitted.intercept_, fitted.n_features_in_ = np.ones(3), answer, 3
    fitted.singular_ = np.zeros(megabytes * MB // 8)
    return fitted


def version(answer: int, megabytes: int, *, measured: bool = True) -> Draft:
    small = draft(linear(answer), [ROW])
    taken = Taken(megabytes * MB, megabytes * MB) if measured else None
    return replace(small, parts=(replace(small.parts[0], body=dumped(model(answer, megabytes))),), taken=taken)


def publish(manager: ModelStorageManager, name: str, made: Draft) -> None:
    async def work() -> None:
        await manager.publish(name, made, promote=True)

    manager._run(work)


@pytest.fixture
def serve(group, tmp_path) -> Any:
    def start(**settings: str) -> Any:
        environment = {
            "ML_CLOUD_ONLY": "false",
            "ML_LOCAL_DIR": str(tmp_path),
            "ML_REFRESH_SECONDS": "3600",
            **settings,
        }
        return running(environment, command=group.command("-m", "app", "serve"))

    return start


def look(service: Service) -> dict[str, Any]:
    answer = service.client.post("/models/refresh", timeout=600)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def answer(service: Service, name: str) -> float:
    body = service.predict(model=name, instances=[ROW])
    assert body.status_code == 200, body.text
    return float(body.json()["predictions"][0])


def test_what_does_not_fit_is_refused_one_after_the_other_and_what_is_there_goes_on(group, serve, manager, tmp_path):
    publish(manager, "small", version(1, 8))
    bombs = tmp_path / "models" / "bomb.joblib"
    with serve(ML_REQUIRED_MODELS="small") as service:
        service.wait_ready()
        publish(manager, "small", replace(version(2, 8), taken=Taken(420 * MB, 420 * MB)))  # measured
        publish(manager, "other", version(3, 250, measured=False))  # not measured
        _compressed(bombs, 600)  # 600 KB that become 600 MB
        outcome = look(service)
        told = {name.partition("/")[0]: reason for name, reason in outcome["failed"].items()}

        assert "needs about" in told["small"]
        assert "of 512 MB are free (/sys/fs/cgroup" in told["small"]
        assert "needs about" in told["other"]
        assert re.search("takes more memory|may take", told["bomb"])
        assert answer(service, "small") == 7
        assert service.process.poll() is None
        assert group.killed == 0


def test_versions_that_do_not_fit_beside_each_other_take_each_others_place(group, serve, manager):
    publish(manager, "a", version(1, 130))
    with serve(ML_SWAP_POLICY="replace") as service:
        service.wait_ready()
        for number in range(2, 4):
            publish(manager, "a", version(number, 130))

            assert look(service)["loaded"] == [f"a/{number}"]
            assert answer(service, "a") == 6 + number
        assert group.killed == 0
        peaks = service.model("a")
        assert 120 * MB < peaks["resident_bytes"] <= peaks["peak_bytes"] < 180 * MB


def test_a_start_with_more_models_than_fit_serves_those_that_do(group, serve, manager):
    for number in range(5):
        publish(manager, f"m{number}", version(number, 110))
    with serve() as service:
        status = service.wait_for(
            lambda status: status["models"] and all(row["state"] != "LOADING" for row in status["models"]), "settled"
        )
        states = [row["state"] for row in status["models"]]

        assert states.count("READY") >= 2
        assert states.count("UNAVAILABLE") >= 1
        for row in status["models"]:
            if row["state"] == "READY":
                assert answer(service, row["name"]) == 6 + int(row["name"][1])
            else:
                assert "needs about" in row["reason"]
        assert group.killed == 0


def _compressed(path: Path, megabytes: int) -> None:
    path.parent.mkdir(exist_ok=True)
    joblib.dump(model(9, megabytes), path, compress=("zlib", 3))


def test_a_bare_file_that_grows_in_the_bucket_does_not_topple_the_service(group, serve, manager, tmp_path):
    put(manager, "models/bare.joblib", dumped(model(1, 8)))
    with serve() as service:
        service.wait_ready()
        put(manager, "models/bare.joblib", dumped(model(2, 350)))
        outcome = look(service)

        assert "needs about" in next(iter(outcome["failed"].values()))
        assert answer(service, "bare") == 7
        put(manager, "models/bare.joblib", dumped(model(3, 16)))
        look(service)
        assert answer(service, "bare") == 9
        assert group.killed == 0
