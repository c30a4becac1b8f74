"""The real process over an S3 server, with models that are compiled: what it maps into memory, and what it answers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from app.compiler import planner
from app.prediction import wire
from tests import zoo
from tests.repository import dumped, put
from tests.service import Service, r2_environment, running, serving_after

pytest.importorskip("app.compiled.trees")
pytest.importorskip("app.compiled.linear")

HEAVY = {"sklearn", "scikit_learn.libs", "pandas", "pyarrow", "scipy", "scipy.libs", "joblib"}
# Other tests keep this machine busy.
WITH_TIME = serving_after(
    "from functools import partial; from app import gate; gate.COMPILE_SECONDS = 60; gate.costs = partial(gate.costs, seconds=60.0)"
)
COMPILED = {"named": "logistic, named", "forest": "forest, float classes", "histogram": "histogram boosting"}


@pytest.fixture
def environment(s3, bucket):
    return r2_environment(s3.endpoint_url, bucket, s3.reader)


@pytest.fixture
def published(manager, monkeypatch):
    monkeypatch.setattr(planner, "RACE_SECONDS", 60.0)
    for name, kind in COMPILED.items():
        it = zoo.fitted(kind)
        manager.save(name, it.estimator, examples=it.data)


def mapped(service: Service) -> set[str]:
    """The packages that have a library in the process's memory."""
    maps = Path(f"/proc/{service.process.pid}/maps").read_text()
    return set(re.findall(r"site-packages/([^/\s]+)", maps))


def instances(data):
    values = data.to_numpy() if hasattr(data, "to_numpy") else data
    return [[None if value != value else float(value) for value in row] for row in values]


def answers(service: Service, name: str, data, method: str):
    response = service.predict(model=name, instances=instances(data), method=method)
    assert response.status_code == 200, response.text
    return response.json()["predictions"]


def test_compiled_models_are_served_without_a_library_of_scikit_learn_and_answer_as_it_does(published, environment):
    with running(environment, command=WITH_TIME) as service:
        service.wait_ready()
        for name, kind in COMPILED.items():
            it, row = zoo.fitted(kind), service.model(name)

            assert row["runtime"] == "compiled"
            assert row["parity"] <= 1e-9
            assert row["compiled"]["parity"] <= 1e-9
            assert row["compiled"]["rows"] > 1000
            assert row["compiled"]["reason"] is None
            assert set(row["compiled"]["microseconds_per_row"]["compiled"]) == {"1", "64", "1000"}
            assert set(row["microseconds_per_row"]) == {"1", "64", "1000"}
            assert {source["role"] for source in row["source"]} == {"compiled"}
            for method in row["methods"]:
                with np.errstate(divide="ignore"):  # the logarithm of an impossible class
                    expected = wire(np.asarray(getattr(it.estimator, method)(it.data)))
                np.testing.assert_allclose(
                    np.array(answers(service, name, it.data, method), dtype=float),
                    np.array(expected, dtype=float),
                    1e-9,
                )
                assert len(answers(service, name, it.data[:1], method)) == 1

        assert not mapped(service) & HEAVY
        assert "numpy" in mapped(service)


def test_scikit_learn_serves_where_the_operator_wants_it(published, environment):
    with running(environment | {"ML_RUNTIME": "sklearn"}) as service:
        service.wait_ready()

        assert {service.model(name)["runtime"] for name in COMPILED} == {"sklearn"}
        assert {service.model(name)["compiled"]["reason"] for name in COMPILED} == {"only scikit-learn was asked for"}
        assert mapped(service) & HEAVY


def test_what_is_not_compiled_is_refused_where_nothing_else_may_serve(manager, published, environment):
    it = zoo.fitted("ridge")
    manager.save("plain", it.estimator, examples=it.data, compile=False)
    with running(environment | {"ML_RUNTIME": "compiled"}) as service:
        service.wait_for(lambda status: [row["state"] for row in status["models"]].count("READY") == 3, "served")
        service.wait_for(lambda status: [row["state"] for row in status["models"]].count("UNAVAILABLE") == 1, "refused")

        assert (
            "ML_RUNTIME is compiled, and it was published without a compiled form" in service.model("plain")["reason"]
        )
        assert not mapped(service) & HEAVY


def test_a_bare_forest_is_compiled_as_it_is_loaded(manager, environment):
    it = zoo.fitted("forest, float classes")
    put(manager, "models/bare.joblib", dumped(it.estimator))
    with running(environment, command=WITH_TIME) as service:
        service.wait_ready()
        row = service.model("bare")

        assert row["compiled"]["rows"] > 100
        assert row["runtime"] == "compiled+sklearn"
        expected = it.estimator.predict_proba(it.data)
        np.testing.assert_allclose(answers(service, "bare", it.data, "predict_proba"), expected, 1e-9)


def test_values_that_scikit_learn_refuses_are_refused_in_the_same_way(published, environment):
    asked = {"model": "named", "instances": [[1e39, 0.0, 0.0, 0.0], [None, 0.0, 0.0, 0.0]]}
    told = []
    for runtime in ("compiled", "sklearn"):
        with running(environment | {"ML_RUNTIME": runtime}) as service:
            service.wait_ready()
            response = service.predict(**asked)
            told.append((response.status_code, response.json()))

    assert told[0] == told[1]
    assert told[0][0] == 422
