"""What is nobody's business stays inside: no answer has a stack trace, a path, a secret or the storage's address.

And the log has one line of JSON for each event, whatever callers, models and buckets put into it.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from app import log
from app.manifest import MAX_REASON, Manifest
from app.model_storage import ModelStorageManager
from app.names import ModelRef
from app.refresher import MAX_REASON as MAX_TOLD
from app.storage.r2 import R2Storage
from tests import faults, toys
from tests.asgi import application, client
from tests.faults import FOR_EVER, FaultyProxy
from tests.repository import dumped
from tests.service import ADMIN_KEY, AS_ASGI, COMMAND, Service, r2_environment, running
from tests.trusted import TRUST

POINTS = np.arange(24.0).reshape(8, 3)
TRACE = re.compile(
    r'Traceback|File "|\bline \d+, in |site-packages|\.py\b|__\w+__|0x[0-9a-f]{8}|botocore|aiohttp|uvicorn'
)
PATH = re.compile(r"(?<![\w:/.])/(srv|tmp|app|usr|home|root|work|var|etc|opt|proc|private)\b")
FORGED = 'x\n{"level":"info","event":"forged"}\r\n\x1b[31m\u2028\x85'


@dataclass
class Answers:
    """Everything that a service has answered, with what it may never say."""

    secrets: tuple[str, ...]  # in no answer at all
    addresses: tuple[str, ...]  # in none that callers without a right to the status may see
    told: list[tuple[str, str]] = field(default_factory=list)
    inner: list[tuple[str, str]] = field(default_factory=list)

    def check(self) -> None:
        assert len(self.told) > 20
        for what, text in (*self.told, *self.inner):
            assert not TRACE.search(text), (what, text[:1000])
            assert not [secret for secret in self.secrets if secret in text], (what, text[:1000])
        for what, text in self.told:
            assert not PATH.search(text), (what, text[:1000])
            assert not [address for address in self.addresses if address in text], (what, text[:1000])


REQUESTS = [
    ("GET", "/health", b""),
    ("GET", "/health/ready", b""),
    ("HEAD", "/health", b""),
    ("GET", "/nothing", b""),
    ("GET", "/nothing%2felse", b""),
    ("DELETE", "/models/status", b""),
    ("GET", "/predict", b""),
    ("POST", "/predict", b"{"),
    ("POST", "/predict", b'{"instances":[[1,2,3]]}'),
    ("POST", "/predict", b'{"model":"nobody","instances":[[1,2,3]]}'),
    ("POST", "/predict", b'{"model":"plane","version":"9","instances":[[1,2,3]]}'),
    ("POST", "/predict", b'{"model":"plane","alias":"other","instances":[[1,2,3]]}'),
    ("POST", "/predict", b'{"model":"plane","method":"__class__x","instances":[[1,2,3]]}'.replace(b"__", b"-")),
    ("POST", "/predict", b'{"model":"plane","instances":[["x",2,3]]}'),
    ("POST", "/predict", b'{"model":"plane","instances":[[1,2]]}'),
    ("POST", "/models/plane/predict", b'{"model":"x","instances":[[1,2]]}'),
    ("POST", "/predict", b" " * 2_000_000),
]
INNER = [("GET", "/models/status", b""), ("POST", "/models/refresh", b"")]
MODELS = [
    "plane",
    "fails",
    "talks",
    "blames",
    "quits",
    "unloadable",
    "flipped",
    "truncated",
    "garbage",
    "untrusted",
    "lost",
    "bare",
]


def ask(service: Service, answers: Answers) -> dict[str, int]:
    """Ask for everything, as a stranger and as an administrator; return the status of a prediction of each model."""
    stranger = httpx.Client(base_url=service.url, timeout=30, trust_env=False)
    for method, path, body in (*REQUESTS, *INNER):
        answer = stranger.request(method, path, content=body or None)
        answers.told.append((f"{method} {path}", f"{answer.headers} {answer.text}"))
    for method, path, body in INNER:
        answer = service.client.request(method, path, content=body or None)
        answers.inner.append((f"{method} {path}", f"{answer.headers} {answer.text}"))
    found = {}
    for name in MODELS:
        answer = stranger.post("/predict", json={"model": name, "instances": [[1, 2, 3]]})
        answers.told.append((name, f"{answer.headers} {answer.text}"))
        found[name] = answer.status_code
    stranger.close()
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(b"\x00\x01garbage\r\n\r\n")
        answers.told.append(("garbage", connection.recv(65536).decode()))
    return found


@pytest.fixture
def spoiled(s3, bucket, bucket_client, r2_arguments) -> str:
    """A bucket with a model of each kind of trouble; returns its name."""
    manager = ModelStorageManager(R2Storage(**r2_arguments), trust=TRUST)
    plane = LinearRegression().fit(POINTS, POINTS.sum(axis=1))
    for name in ("plane", "flipped", "truncated", "lost"):
        manager.save(name, plane, examples=POINTS, compile=False)
    for name, model in {
        "fails": toys.Fails(), "talks": toys.Talks(), "blames": toys.Blames(), "quits": toys.Quits(),
    }.items():  # fmt: skip
        manager.save(name, model)

    def read(key: str) -> bytes:
        body: bytes = bucket_client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return body

    def write(key: str, body: bytes) -> None:
        bucket_client.put_object(Bucket=bucket, Key=key, Body=body)

    model = bytearray(read("models/flipped/1/model.joblib"))
    model[len(model) // 2] ^= 1
    write("models/flipped/1/model.joblib", bytes(model))
    write("models/truncated/1/manifest.json", read("models/truncated/1/manifest.json")[:200])
    bucket_client.delete_object(Bucket=bucket, Key="models/lost/1/manifest.json")
    write("models/garbage.joblib", b"/srv/private/nothing that is a model")
    write("models/bare.joblib", dumped(plane)[:300])
    write("models/unloadable.pkl", b"\x80\x04ctests.toys\nUnloadable\n)\x81}\x8c\x01a\x8c\x01bsb.")
    write("models/untrusted.pkl", b"cos\nsystem\n(S'cat /etc/passwd'\ntR.")
    return bucket


@pytest.mark.parametrize("command", [COMMAND, AS_ASGI], ids=["in the protocol", "as ASGI"])
def test_no_answer_tells_what_lies_where(s3, spoiled, command, tmp_path):
    with FaultyProxy(s3.endpoint_url) as proxy:
        environment = r2_environment(proxy.url, spoiled, s3.writer)
        settings = {
            **environment,
            "ML_REQUIRED_MODELS": "plane",
            "ML_MAX_BODY_BYTES": "1000000",
            "R2_MAX_ATTEMPTS": "1",
        }
        host = proxy.url.removeprefix("http://")
        answers = Answers(
            secrets=(s3.writer.access_key_id, s3.writer.secret_access_key, "Signature=", "AWS4-HMAC", ADMIN_KEY),
            addresses=(host, f"bucket {spoiled}", "127.0.0.1:9", "private", str(tmp_path)),
        )
        with running(settings, command=command, cwd=tmp_path) as service:
            service.wait_ready()
            well = ask(service, answers)
            for fault in (
                faults.status(403, "SignatureDoesNotMatch", f"for {s3.writer.access_key_id} at /srv/private"),
                faults.status(
                    500, "InternalError", 'Traceback (most recent call last): File "/srv/x.py", line 1, in x'
                ),
                faults.page("<html>/srv/private</html>"),
                faults.drop(),
                faults.corrupt(20),
            ):
                proxy.inject(fault, times=FOR_EVER)
                ask(service, answers)
                proxy.heal()
            log_lines = service.log()
        with running({**settings, "R2_ENDPOINT_URL": "http://127.0.0.1:9"}, command=command, cwd=tmp_path) as service:
            service.wait_live()
            service.wait_for(lambda status: status["storage"]["error"], "looked")
            never = ask(service, answers)
            log_lines += service.log()

    assert well == {
        "plane": 200, "fails": 500, "talks": 500, "blames": 422, "quits": 500, "unloadable": 503, "flipped": 503,
        "truncated": 503, "garbage": 503, "untrusted": 503, "lost": 503, "bare": 503,
    }  # fmt: skip
    assert set(never.values()) == {503}
    answers.check()
    assert "ZeroDivisionError: a secret of the model, in /srv/models" in log_lines  # which is where it belongs
    assert s3.writer.secret_access_key not in log_lines
    check_lines(log_lines)


def check_lines(text: str) -> list[dict[str, Any]]:
    """Hold a log against its form: a line is an event, whatever takes what for the end of a line."""
    assert text.splitlines() == text.split("\n")[:-1]
    found = [json.loads(line) for line in text.splitlines()]
    for line, item in zip(text.splitlines(), found, strict=True):
        assert line.isprintable()
        assert {"time", "level", "logger", "event"} <= item.keys()
        assert item["event"] != "forged"
    return found


@pytest.fixture(scope="module")
def forging(tmp_path_factory) -> Iterator[tuple[Service, Service]]:
    """Two services, in the protocol and as ASGI, whose models and bucket would write lines of their own into the log."""
    from app.storage.local import LocalStorage

    folder = tmp_path_factory.mktemp("bucket")
    manager = ModelStorageManager(LocalStorage(folder), trust=TRUST)
    manager.save("talks", toys.Talks())
    manager.save("warns", toys.Warns())
    manager.save("told", LinearRegression().fit(POINTS, POINTS.sum(axis=1)), examples=POINTS)
    manager.save("odd", LinearRegression().fit(POINTS, POINTS.sum(axis=1)), examples=POINTS, compile=False)
    rewrite(folder, "odd", {"format": f"jo{FORGED}"})
    (folder / "models" / f"a{FORGED.replace('/', '')[:60]}.joblib").write_bytes(b"x")
    settings = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder), "ML_REQUIRED_MODELS": "told"}
    with running(settings) as one, running(settings, command=AS_ASGI) as other:
        yield one.wait_ready(), other.wait_ready()


def rewrite(folder: Any, name: str, artifact: dict[str, Any]) -> None:
    """Change the artifact in a manifest, and let the index have its digest, as somebody who may write to the bucket can."""
    path, index_path = folder / f"models/{name}/1/manifest.json", folder / "models/index.json"
    manifest, index = json.loads(path.read_bytes()), json.loads(index_path.read_bytes())
    manifest["artifacts"][-1].update(artifact)
    path.write_text(json.dumps(manifest))
    index["models"][name]["versions"]["1"]["manifest_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    index_path.write_text(json.dumps(index))


HEADERS = [
    b'X-Request-ID: x\\n{"event":"forged"}',
    b'X-Request-ID: {"event":"forged"}',
    b"X-Request-ID: \x1b[2J",
    b"X-Request-ID: a\xc2\x85b",
    b"X-Request-ID: " + b"x" * 5000,
    b'X-Request-ID: ","event":"forged","x":"',
    b'User-Agent: \x1b[2J{"event":"forged"}',
    b'Referer: {"event":"forged"}\xe2\x80\xa8x',
    b'Traceparent: {"event":"forged"}',
    b'X-API-Key: {"event":"forged"}',
    b'Authorization: Bearer {"event":"forged"}',
    b'X-Forwarded-For: {"event":"forged"}',
]
TARGETS = [
    b"/predict",
    b"/models/talks/predict",
    b'/models/%0a%7b"event":"forged"%7d/predict',
    b"/%0d%0a%7b%22event%22:%22forged%22%7d",
    b"/%1b[2J%c2%85%e2%80%a8",
    b'/x?%0a{"event":"forged"}',
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: repr(header[:40]))
def test_callers_write_no_lines_of_the_log(forging, header):
    for service in forging:
        before = len(service.log())
        for target in TARGETS:
            body = json.dumps({"model": "talks", "instances": [[1, 2, 3]], "method": "predict"}).encode()
            sent = b"POST %b HTTP/1.1\r\nHost: x\r\n%b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
            with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
                connection.sendall(sent % (target, header, len(body), body))
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 ")
            assert b"forged" not in answer.partition(b"\r\n\r\n")[0]
        found = check_lines(service.log()[before:])

        failed = [item for item in found if item["event"] == "prediction failed"]
        assert len(failed) == (0 if b"\x1b" in header else 2)  # no HTTP; by the body, by the path
        for item in failed:
            assert re.fullmatch(r"[0-9a-f]{32}", item["request_id"])
            assert item["model"] == "talks/1"
            assert "forged" in item["error"]


@pytest.mark.parametrize("name", [FORGED, "\x1b[2J", "\x85", "\u2028", '","event":"forged"', "x" * 100])
def test_names_write_no_lines_of_the_log(forging, name):
    for service in forging:
        before = len(service.log())
        for field_name in ("model", "version", "alias", "method"):
            service.predict(**{"model": "talks", "instances": [[1, 2, 3]], field_name: name})
        service.predict(model="talks", instances=[[1, 2, 3]], **{name: 1})
        service.predict(model="talks", instances=[{name: name}])
        service.predict(model="talks", instances=[[1, 2, 3]])
        assert len(check_lines(service.log()[before:])) >= 1


def test_models_and_buckets_write_no_lines_of_the_log(forging):
    for service in forging:
        service.wait_for(lambda status: any(row["name"] == "odd" and row["reason"] for row in status["models"]), "told")
        for name in ("talks", "warns"):
            service.predict(model=name, instances=[[1, 2, 3]])
        found = check_lines(service.log())
        events = {item["event"] for item in found}

        assert "prediction failed" in events
        assert "cannot be served" in events
        assert [item for item in found if item["logger"] == "py.warnings" and "careful" in item["event"]]


@pytest.mark.parametrize("character", ["\n", "\r", "\x0b", "\x0c", "\x1b", "\x1c", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\u202e", "\u200b", "\ufeff", "\U000e0041", "\ud800"], ids=ascii)  # fmt: skip
def test_no_character_ends_a_line_or_moves_a_cursor(character):
    import logging

    record = logging.LogRecord("diskless.test", logging.INFO, __file__, 1, f"a{character}b é 語", (), None)
    record.fields = {f"k{character}": f"v{character}"}
    text = log.JsonFormatter().format(record)

    assert text.isprintable()
    assert len(text.splitlines()) == 1
    if character != "\ud800":
        assert json.loads(text)["event"] == f"a{character}b é 語"
        assert json.loads(text)[f"k{character}"] == f"v{character}"
        assert "é 語" in text


# What is told of a version is short, whatever somebody wrote into a bucket


def manifest_with(**changed: Any) -> bytes:
    whole = {
        "format": 1, "name": "plane", "version": "1", "created": "2026-01-01T00:00:00+00:00",
        "artifacts": [{"role": "model", "path": "model.joblib", "format": "joblib", "size": 0, "sha256": "0" * 64}],
        "signature": {"layout": "matrix", "inputs": [], "methods": ["predict"]},
    }  # fmt: skip
    return json.dumps({**whole, **changed}).encode()


def test_reasons_in_a_manifest_are_cut():
    long = "because " * 100_000
    compiled = {"format": 1, "methods": ["predict"], "parity": 0, "rows": 0, "reason": long}
    manifest = Manifest.decode(manifest_with(not_compiled=long, compiled=compiled), ModelRef("plane", "1"))

    assert manifest.not_compiled == manifest.compiled.reason == long[: MAX_REASON - 1] + "…"
    assert Manifest.decode(manifest_with(not_compiled="short"), ModelRef("plane", "1")).not_compiled == "short"


async def test_reasons_in_the_status_are_short(tmp_path):
    from app.storage.local import LocalStorage

    manager = ModelStorageManager(LocalStorage(tmp_path), trust=TRUST)
    for name in ("plane", "odd", "code"):
        model = toys.Sum() if name == "code" else LinearRegression().fit(POINTS, POINTS.sum(axis=1))
        await_free = manager.save  # it has an event loop of its own
        await_free(name, model, examples=POINTS, compile=False)
    rewrite(tmp_path, "odd", {"path": "p" * 500, "role": "model"})
    path = tmp_path / "models/plane/1/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["not_compiled"] = "n" * 1_000_000
    path.write_text(json.dumps(manifest))
    index = json.loads((tmp_path / "models/index.json").read_bytes())
    index["models"]["plane"]["versions"]["1"]["manifest_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "models/index.json").write_text(json.dumps(index))
    (tmp_path / "models" / "many.pkl").write_bytes(
        b"".join(b"c%b\nx%d\n0" % (b"m" * 50_000, n) for n in range(9)) + b"."
    )
    settings = {"ML_CLOUD_ONLY": False, "ML_LOCAL_DIR": tmp_path}
    async with application(**settings) as app, client(app) as http:
        refreshed = (await http.post("/models/refresh")).json()
        rows = {row["name"]: row for row in (await http.get("/models/status")).json()["models"]}

    assert rows["plane"]["state"] == "READY"
    assert len(rows["plane"]["compiled"]["reason"]) == MAX_REASON
    assert rows["odd"]["state"] == rows["many"]["state"] == "UNAVAILABLE"
    assert all(len(row["reason"] or "") <= MAX_TOLD for row in rows.values())
    assert all(len(reason) <= MAX_TOLD for reason in refreshed["failed"].values())
