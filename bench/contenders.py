"""What is measured against what: how each service is started, asked, and read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app import settings
from bench import environments
from bench.environments import PEERS
from bench.questions import Question
from bench.servers import HOST, Service, free_port
from venvs import ROOT

EXACT = 1e-9  # relative, and absolute below 1: what float64 has to hold
FLOAT32 = 1e-4  # the same for the services that compute in float32 ...
FLOAT32_SHARE = 0.99  # ... which for this many of the rows have to hold it: near a threshold they take another branch

UVICORN = ("--host", HOST, "--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning")


@dataclass(frozen=True, slots=True)
class Ground:
    """What the services stand on: a core, the folder of the models, the bucket and how many workers to start."""

    core: int
    models: Path
    bucket: Mapping[str, str]  # the environment in which ours finds it
    workers: int = 1


def has_runtimes() -> bool:
    """Whether this version of ours has compiled runtimes to choose from."""
    return any(row.variable == "`ML_RUNTIME`" for row in settings.table())


@dataclass(frozen=True, slots=True)
class Contender:
    """One of the services. `exact` says whether it computes in float64."""

    name: str
    label: str
    start: Callable[[Ground], Service]
    path: str = "/{kind}"
    exact: bool = True
    is_ours: bool = False
    environment: str = "handwritten"  # of `bench/peers/`

    def asked(self, question: Question) -> Question:
        """Return what it is asked: MLServer answers wrongly where a word is null, so it gets the rows that have them all."""
        return question.with_every_word() if self.name == "mlserver" else question

    def body(self, question: Question, rows: Sequence[Any]) -> bytes:
        """Return the body of a request."""
        document: dict[str, Any] = {"instances": rows}
        if self.name == "mlserver":
            document = _open_inference(question, rows)
        elif self.is_ours and question.method != "predict":
            document["method"] = question.method
        return json.dumps(document, separators=(",", ":")).encode()

    def predictions(self, answer: bytes, rows: int) -> Any:
        """Return the predictions in an answer, as an array of one row for each row."""
        document = json.loads(answer)
        found = document["outputs"][0]["data"] if self.name == "mlserver" else document["predictions"]
        return np.asarray(found, np.float64).reshape(rows, -1)


def _open_inference(question: Question, rows: Sequence[Any]) -> dict[str, Any]:
    """Return a request of the Open Inference Protocol, as MLServer takes arrays and DataFrames."""
    outputs = [{"name": question.method}]
    if question.columns is None:
        shape = [len(rows), len(rows[0])]
        data = [value for row in rows for value in row]
        return {"inputs": [{"name": "rows", "shape": shape, "datatype": "FP64", "data": data}], "outputs": outputs}
    inputs: list[dict[str, Any]] = []
    for column in question.columns:
        data = [row[column] for row in rows]
        tensor: dict[str, Any] = {"name": column, "shape": [len(rows), 1], "datatype": "FP64", "data": data}
        if column in question.words:
            tensor |= {"datatype": "BYTES", "parameters": {"content_type": "str"}}
        inputs.append(tensor)
    return {"parameters": {"content_type": "pd"}, "inputs": inputs, "outputs": outputs}


def _uvicorn(application: str, **extra: str) -> Callable[[Ground], Service]:
    """Return how an application of `bench/peers/` is started under uvicorn."""

    def start(ground: Ground) -> Service:
        port = free_port()
        command = [str(environments.python("handwritten")), "-m", "uvicorn", application, "--port", str(port), *UVICORN]
        if ground.workers > 1:
            command += ["--workers", str(ground.workers)]
        paths = {"PYTHONPATH": str(PEERS), "BENCH_MODELS": str(ground.models)}
        return Service(command, port=port, core=ground.core, extra=paths | extra)

    return start


def _mosec(ground: Ground) -> Service:
    port = free_port()
    command = [str(environments.python("mosec")), str(PEERS / "batched.py"), "--address", HOST, "--port", str(port)]
    command += ["--timeout", "30000", "--log-level", "error"]
    paths = {"PYTHONPATH": str(PEERS), "BENCH_MODELS": str(ground.models)}
    return Service(command, port=port, core=ground.core, extra=paths)


def _mlserver(ground: Ground) -> Service:
    python = environments.python("mlserver")
    folder = ground.models / "mlserver"
    port = free_port()
    for name in json.loads((ground.models / "kinds.json").read_text()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        model = {
            "name": name,
            "implementation": "mlserver_sklearn.SKLearnModel",
            "parameters": {"uri": str(ground.models / f"{name}.joblib")},
            "max_batch_size": 64,
            "max_batch_time": 0.005,
        }
        (folder / name / "model-settings.json").write_text(json.dumps(model))
    server = {
        "host": HOST,
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "parallel_workers": 0,  # in the process itself; the default, a process beside it, has not been measured here
    }
    (folder / "settings.json").write_text(json.dumps(server))
    command = [str(python.with_name("mlserver")), "start", str(folder)]
    return Service(command, port=port, core=ground.core, extra={})


def _serve(headers: Mapping[str, str] | None = None, **extra: str) -> Callable[[Ground], Service]:
    """Return how our own command is started; `headers` is what it wants of each request."""

    def start(ground: Ground) -> Service:
        port = free_port()
        command = [sys.executable, "-m", "app", "serve"]
        if ground.workers > 1:
            command += ["--workers", str(ground.workers)]
        ours = {"PYTHONPATH": str(ROOT), "HOST": HOST, "PORT": str(port), **ground.bucket, **extra}
        return Service(command, port=port, core=ground.core, extra=ours, headers=headers)

    return start


def _asgi(ground: Ground) -> Service:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port), *UVICORN]
    return Service(command, port=port, core=ground.core, extra={"PYTHONPATH": str(ROOT), **ground.bucket})


OURS = "/models/{kind}/predict"
CONSTANT = Contender("constant", "constant answer, bare ASGI", _uvicorn("constant:app"))
FLOOR = Contender(
    "floor", "hand-written: orjson + onnxruntime", _uvicorn("handwritten:app", BENCH_RUNTIME="onnx"), exact=False
)
INLINE = Contender(
    "inline", "hand-written: orjson + scikit-learn", _uvicorn("handwritten:app", BENCH_RUNTIME="scikit-learn")
)
NAIVE = Contender("naive", "FastAPI + Pydantic + joblib", _uvicorn("naive:app"))
MOSEC = Contender("mosec", "mosec, batches of 64, 5 ms", _mosec, exact=False, environment="mosec")
MLSERVER = Contender(
    "mlserver", "MLServer, batches of 64, 5 ms", _mlserver, path="/v2/models/{kind}/infer", environment="mlserver"
)
SERVE = Contender("serve", "**Diskless**, `serve`", _serve(), path=OURS, is_ours=True)
KEY = "the-key-of-the-load-of-the-bench"
GUARDED = Contender(
    "guarded",
    "**Diskless**, `serve`, with a key, a rate limit and request ids",
    _serve({"X-API-Key": KEY}, ML_API_KEYS=f"load:{KEY}", ML_RATE_LIMIT="100000000/s"),
    path=OURS,
    is_ours=True,
)
ASGI = Contender("asgi", "**Diskless** under uvicorn (ASGI)", _asgi, path=OURS, is_ours=True)
REFERENCE = Contender(
    "reference", "Diskless, `ML_RUNTIME=sklearn`", _serve(ML_RUNTIME="sklearn"), path=OURS, is_ours=True
)
ALL = (CONSTANT, FLOOR, INLINE, NAIVE, MOSEC, MLSERVER, SERVE, GUARDED, ASGI, REFERENCE)
NAMES = tuple(contender.name for contender in ALL)


class WrongAnswer(Exception):
    """A service's answer is not scikit-learn's."""


def check(contender: Contender, found: Any, expected: Any) -> float:
    """Return the largest difference from scikit-learn's answers. Raises `WrongAnswer` where it is too large.

    Both are arrays of float64 with one row for each row that was asked about.
    """
    found = np.asarray(found)
    expected = np.asarray(expected, np.float64).reshape(len(expected), -1)
    if found.shape != expected.shape:
        raise WrongAnswer(f"{contender.name}: expected answers of shape {expected.shape}, got {found.shape}")
    difference = np.abs(found - expected) / np.maximum(1.0, np.abs(expected))
    worst = difference.max(axis=1)
    within = float(np.mean(worst <= (EXACT if contender.exact else FLOAT32)))
    if within < (1.0 if contender.exact else FLOAT32_SHARE):
        raise WrongAnswer(
            f"{contender.name}: {1 - within:.1%} of the answers differ from scikit-learn's by up to {worst.max():.1e}"
        )
    return float(worst.max())
