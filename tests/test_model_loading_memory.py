"""What a load costs in memory at its peak: the model, and not much beside it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import skops.io
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsRegressor

from app.manifest import Artifact, Manifest
from app.names import ModelRef
from app.signature import Signature, TensorSpec
from tests.service import ROOT

MODEL_BYTES = 100_000_000

# A process of its own, because a peak is a process's. Everything that a first load imports is imported before, by a small one.
SCRIPT = """
import asyncio, json, resource, sys
from pathlib import Path
from app.bundle import Bundle, Part
from app.manifest import Manifest
from app.model import Model
from app.names import ModelRef
from app.storage.local import LocalStorage

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

async def load(storage, name, format, sealed):
    ref = ModelRef(name, "1")
    manifest = Manifest.decode((await storage.get(f"{name}.manifest")).body, ref) if sealed else None
    part = Part("model", format, await storage.head(f"{name}.{format}"), manifest.artifacts[0] if manifest else None)
    bundle = Bundle(ref, (part,), storage, asyncio.get_running_loop(), manifest)
    return await asyncio.to_thread(Model.from_bundle, bundle)

async def main(folder, format, sealed):
    async with LocalStorage(Path(folder)) as storage:
        await load(storage, "small", format, sealed)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = peak()
        model = await load(storage, "large", format, sealed)
        print(json.dumps({"peak": peak() - before, "resident": model.report.taken.resident_bytes}))

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3] == "sealed"))
"""


def linear(columns: int) -> LinearRegression:
    model = LinearRegression()
    model.coef_, model.intercept_ = np.random.default_rng(0).normal(size=(columns // 10, 10)), np.zeros(columns // 10)
    model.n_features_in_ = 10
    return model


def neighbours(values: int) -> KNeighborsRegressor:
    rows = np.random.default_rng(0).normal(size=(values // 20, 20))
    return KNeighborsRegressor(algorithm="brute").fit(rows, np.zeros(len(rows)))


def write(folder: Path, name: str, model: object, format: str, protocol: int) -> int:
    path = folder / f"{name}.{format}"
    if format == "pickle":
        path.write_bytes(pickle.dumps(model, protocol=protocol))
    else:
        (skops.io.dump if format == "skops" else joblib.dump)(model, path)
    body = path.read_bytes()
    signature = Signature(layout="matrix", inputs=(TensorSpec(name="x0", datatype="FP64"),), methods=("predict",))
    artifact = Artifact.of(body, role="model", path=f"model.{format}", format=format)
    manifest = Manifest(format=1, name=name, version="1", created="", artifacts=(artifact,), signature=signature)
    assert manifest.ref == ModelRef(name, "1")
    (folder / f"{name}.manifest").write_bytes(manifest.encode())
    return len(body)


@pytest.mark.parametrize(
    ("make", "format", "kind", "protocol", "factor"),
    [
        (linear, "joblib", "bare", 5, 1.3),
        (neighbours, "joblib", "sealed", 5, 1.3),
        (linear, "pickle", "sealed", 4, 1.3),
        (linear, "skops", "sealed", 5, 1.3),
    ],
)
def test_the_peak_of_a_load_is_little_more_than_the_model(tmp_path, make, format, kind, protocol, factor):
    write(tmp_path, "small", make(1000), format, protocol)
    size = write(tmp_path, "large", make(MODEL_BYTES // 8), format, protocol)

    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), format, kind], cwd=ROOT, check=True, capture_output=True
    )
    found = json.loads(run.stdout)
    print(
        f"{make.__name__} {format} {protocol} {kind}: peak {found['peak'] / size:.2f}, resident {found['resident'] / size:.2f}"
    )

    assert found["peak"] <= factor * size
