"""Every route of a running service, called as its OpenAPI document says, and as it says that nobody may: by schemathesis."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from app.model_storage import ModelStorageManager
from app.storage.local import LocalStorage
from tests import toys
from tests.service import ADMIN_KEY, AS_ADMIN, Service, running
from tests.trusted import TRUST
from tests.zoo import fitted

pytest.importorskip("schemathesis")

MODELS = {
    "linear": "logistic, named",
    "mixed": "mixed, with times",
    "forest": "forest, several outputs",
    "texts": "texts",
    "records": "records",
    "narrow": "ridge, float32",
    "categories": "categorical bayes",
    "clusters": "k-means",
}
EXAMPLES = 15  # of requests that fit and as many that do not, for each route, beside those at every edge of the schemas
CONFIGURATION = f"""
seed = 1
request-timeout = 30
continue-on-failure = true

[auth.openapi.header]
api_key = "{ADMIN_KEY}"

[generation]
deterministic = true
max-examples = {EXAMPLES}
database = "none"

[phases.stateful]
enabled = false

# What only the estimator can tell is refused with 422, a version that is not there with 404.
[checks.positive_data_acceptance]
expected-statuses = [200, 401, 404, 422]

# That path and body must name the same model, no schema can say.
[[operations]]
include-path = "/models/{{name}}/predict"
checks.positive_data_acceptance.expected-statuses = [200, 400, 401, 404, 422]
"""


@pytest.fixture(scope="module")
def service(one_thread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with models of every layout, some bare, which asks for keys."""
    folder = tmp_path_factory.mktemp("bucket")
    manager = ModelStorageManager(LocalStorage(folder), trust=TRUST)
    points = np.random.default_rng(1).normal(size=(12, 300)).round(3)
    for name, kind in MODELS.items():
        it = fitted(kind)
        manager.save(name, it.estimator, examples=it.data, compile=name == "forest")
    manager.save("wide-and.odd", LinearRegression().fit(points, points[:, 0]), examples=points)
    manager.save("sum", toys.Sum())
    manager.save("lengths", toys.Lengths())
    environment = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder), "ML_API_KEYS": "caller:" + "k" * 40}
    with running(environment) as service:
        yield service.wait_ready()


def test_no_call_is_answered_in_a_way_that_is_not_documented(service, tmp_path):
    document = service.client.get("/openapi.json", headers=AS_ADMIN)  # of the models it tells those with a key only
    (tmp_path / "openapi.json").write_bytes(document.content)
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", service.url, "--checks", "all"]
    assert {f"/models/{name}/predict" for name in MODELS} < set(document.json()["paths"])

    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "NO_PROXY": "*", "no_proxy": "*", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-3000:]
    alive = service.client.post("/models/texts/predict", json={"instances": ["good"]}, headers=AS_ADMIN)
    assert alive.status_code == 200
