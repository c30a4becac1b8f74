"""A name is a word, and never a way somewhere: through the wire, through a bucket, on the command line."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import joblib
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from app.cli import main
from app.errors import InvalidIndex, InvalidName
from app.index import Index
from app.model_storage import ModelStorageManager
from app.names import check_name, listed, shortened
from app.storage.local import LocalStorage
from tests.repository import dumped
from tests.service import AS_ASGI, Service, r2_environment, running

POINTS = np.arange(24.0).reshape(8, 3)
LINEAR = LinearRegression().fit(POINTS, POINTS.sum(axis=1))
NO_NAMES = [
    "..", ".", "../plane", "..\\plane", "plane/..", "plane/../plane", "plane/1", "/plane", "//plane", "\\plane", "~plane", "~",
    "%2e%2e", "%2e%2e%2fplane", "..%2f", "%2fplane", "plane%00", "plane\x00", "\x00", "plane\n", "\nplane", "plane\r\nx-evil: 1",
    " plane", "plane ", "pl ane", "plane\t", "", "pl\u0430ne", "\uff50lane", "pl\u200bane", "plane\u202e", "\u2024\u2024", "\uff0e\uff0e",
    "\u2025", "..\u2215plane", "pl\u00e5ne", "plane\ud800", "\x1b[2Jplane", "-plane", "_plane", ".plane", "*", "plane*", "plane?",
    "{plane}", "$plane", "$(id)", "`id`", "plane;id", "plane|id", "plane&x=1", "plane#x", "plane:1", "plane,1", "'plane'", '"plane"',
    "<plane>", "p" * 101, "p" * 100_000, "C:plane", "file:///etc/passwd", "s3://models/plane", "http://evil.example/plane",
]  # fmt: skip
NAMES = ["p", "plane", "Plane-1.2_b", "0", "a..b", "p" * 100, "index.json", "plane.joblib", "con"]


@pytest.mark.parametrize("text", NO_NAMES, ids=lambda text: ascii(text)[:40])
def test_what_is_no_name_is_refused_with_what_one_is(text):
    with pytest.raises(InvalidName, match="expected 1 to 100 letters, digits"):
        check_name("model name", text)


@pytest.mark.parametrize("text", NAMES)
def test_a_name_is_one(text):
    assert check_name("model name", text) == text
    assert "/" not in text


def test_a_refusal_repeats_little_of_what_was_said():
    with pytest.raises(InvalidName) as caught:
        check_name("model name", "p" * 100_000)

    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("count", "expected"), [(0, ""), (2, "0, 1"), (50, None), (60, "and 10 more")])
def test_names_in_a_sentence_are_few(count, expected):
    text = listed(map(str, range(count)))

    assert text.endswith(expected if expected is not None else "48, 49")
    assert len(shortened(text, 10)) <= 10


# Through the wire: both layers


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[tuple[Service, Service]]:
    """Two services over a folder that lies among files that must stay where they are."""
    outside = tmp_path_factory.mktemp("outside")
    joblib.dump(LINEAR, outside / "secret.joblib")
    folder = outside / "bucket"
    ModelStorageManager(LocalStorage(folder)).save("plane", LINEAR, examples=POINTS)
    (folder / "models" / "link.joblib").symlink_to(outside / "secret.joblib")
    environment = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder), "ML_REQUIRED_MODELS": "plane"}
    with running(environment) as one, running(environment, command=AS_ASGI) as other:
        yield one.wait_ready(), other.wait_ready()


def ask(pair: tuple[Service, Service], target: str, body: bytes, method: str = "POST") -> tuple[int, dict[str, Any]]:
    """Send a request with this very target to both services; return status and body, which must be the same."""
    sent = b"%b %b HTTP/1.1\r\nHost: x\r\nX-Request-ID: same\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
    answers = []
    for service in pair:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            connection.sendall(sent % (method.encode(), target.encode("utf-8", "surrogatepass"), len(body), body))
            head, _, content = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
        assert b"x-evil" not in head.lower()
        answers.append((int(head.split()[1]), json.loads(content)))
    assert answers[0] == answers[1]
    return answers[0]


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda text: ascii(text)[:40])
@pytest.mark.parametrize("field", ["model", "version", "alias", "method"])
def test_a_body_cannot_name_what_is_no_name(pair, field, name):
    request = {"model": "plane", "instances": [[1, 2, 3]], field: name}
    status, answer = ask(pair, "/predict", json.dumps(request).encode())

    assert status in (400, 404)
    assert answer["error"] in ("invalid_json", "invalid_request", "model_not_found")
    assert len(answer["detail"]) < 500
    assert answer["detail"].isprintable()


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda text: ascii(text)[:40])
def test_a_path_cannot_name_what_is_no_name(pair, name):
    body = b'{"instances":[[1,2,3]]}'
    once = quote(name[:50_000].encode("utf-8", "surrogatepass"), safe="")  # a longer head is refused as such
    for target in (once, quote(once, safe=""), once.replace(".", "%2E"), once.replace(".", "%252e")):
        status, answer = ask(pair, f"/models/{target}/predict", body)

        assert status in (400, 404)
        assert answer["error"] in ("invalid_request", "model_not_found", "not_found")
        assert len(answer["detail"]) < 500


@pytest.mark.parametrize(
    "target",
    [
        "/models/../models/plane/predict", "/models/./plane/predict", "/x/../predict", "//predict", "/predict/..", "/models//predict",
        "/models/plane/../plane/predict", "/models/plane//predict", "/models/plane/predict/", "/%2e%2e/predict", "/..;/predict",
        "/models/plane;x/predict", "/predict%00", "/predict%20", "/predict%0a", "/models/plane/predict%0a", "/models/status%0a",
        "/models/refresh%0a", "/health%0A", "/predict%0d", "/predict%0a%0a", "/predict%c2%85", "/predict%e2%80%a8",
        "/static/../app/settings.py", "/..%2f..%2fetc%2fpasswd", "/../../../../etc/passwd", "/models/..%5c..%5cetc/predict",
        "/models/link.joblib/predict", "/models/secret/predict", "/.env", "/.git/config", "/models/index.json", "/docs/../.env",
        "/openapi.json/..%2f.env", "/" + "a/" * 20_000, "/" + "a" * 60_000,
    ],
    ids=lambda target: target[:40],
)  # fmt: skip
def test_a_path_is_compared_as_it_is_and_never_leads_anywhere(pair, target):
    for method in ("POST", "GET"):
        status, answer = ask(pair, target, b'{"instances":[[1,2,3]]}', method)

        assert status in (400, 404, 405)
        assert answer["error"] in ("invalid_request", "not_found", "model_not_found", "method_not_allowed")
        assert len(answer["detail"]) < 500


@pytest.mark.parametrize(
    "target", ["/%70redict", "/models%2Fplane%2Fpredict", "/models/plan%65/predict", "/predict?x=/../y"]
)
def test_a_path_that_is_written_otherwise_is_the_same_path(pair, target):
    assert ask(pair, target, b'{"instances":[[1,2,3]]}')[1] == ask(pair, "/predict", b'{"instances":[[1,2,3]]}')[1]


def test_a_link_in_a_bucket_leads_nowhere(pair):
    for service in pair:
        rows = {row["name"]: row["state"] for row in service.status()["models"]}

        assert rows == {"plane": "READY"}


# Through a bucket


def index_of(**models: Any) -> bytes:
    return json.dumps({"format": 1, "models": models}).encode()


def entry(version: str = "1", sha256: str = "0" * 64) -> dict[str, Any]:
    stored = {"created": "2026-01-01T00:00:00+00:00", "manifest_sha256": sha256}
    return {"versions": {version: stored}, "aliases": {"production": version}, "history": {}}


@pytest.fixture
def put(bucket_client, bucket) -> Callable[[str, bytes], None]:
    def write(key: str, body: bytes) -> None:
        bucket_client.put_object(Bucket=bucket, Key=key, Body=body)

    return write


@pytest.fixture
def environment(s3, bucket, tmp_path) -> dict[str, str]:
    """R2 with a local copy: what a key could lead out of is a real folder, among others."""
    inner = tmp_path / "inner"
    inner.mkdir()
    return {
        **r2_environment(s3.endpoint_url, bucket, s3.writer),
        "ML_CLOUD_ONLY": "false",
        "ML_LOCAL_DIR": str(inner / "copy"),
    }


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_keys_that_are_no_names_are_passed_over_and_written_nowhere(put, environment, tmp_path):
    model = dumped(LINEAR)
    put("models/plane.joblib", model)
    strange = [
        "%2e%2e%2fevil",
        "a b",
        "pl\u0430ne",
        "\u202eenalp",
        "a\u2028b",
        "-x",
        "~x",
        "x;id",
        "n" * 101,
        "{x}",
        "x%00",
        "a'b",
    ]
    for name in strange:
        put(f"models/{name}.joblib", model)
    with running(environment) as service:
        status = service.wait_ready().status()
        lines = [json.loads(line) for line in service.log().splitlines()]

    assert [row["name"] for row in status["models"]] == ["plane"]
    assert {f"{name}.joblib" for name in strange} <= set(status["ignored"])
    assert set(status["ignored"].values()) == {"its name has characters that a model's name cannot have"}
    assert all(line["event"] for line in lines)
    assert {name.split("/")[0] for name in files_in(tmp_path)} == {"inner"}
    assert all(name.startswith("inner/copy/") for name in files_in(tmp_path))


@pytest.mark.parametrize("name", [name for name in NO_NAMES if len(name) < 200 and "\ud800" not in name], ids=ascii)
def test_an_index_that_names_anything_else_is_refused_whole(name):
    bodies = [
        index_of(**{name: entry()}),
        index_of(plane=entry(version=name)),
        index_of(plane={**entry(), "aliases": {"production": "1", name: "1"}}),
        index_of(plane={**entry(), "history": {name: []}}),
        index_of(plane={**entry(), "unpublished": {name: {"at": "now"}}}),
        index_of(plane={**entry(), "history": {"production": [{"version": name, "at": "now"}]}}),
    ]
    for body in bodies:
        with pytest.raises(InvalidIndex) as caught:
            Index.decode(body)

        assert len(str(caught.value)) < 400


NO_PATHS = [
    "../../../evil.joblib", "..", "/etc/passwd", "model/../../x", "a//b", ".hidden", "model.joblib\x00", "%2e%2e/x", "a\\..\\b", "",
    "C:/x", "\u2025/x", "x" * 501,
]  # fmt: skip


def test_a_manifest_cannot_point_out_of_its_version(put, environment, tmp_path):
    made = tmp_path / "made"
    ModelStorageManager(LocalStorage(made)).save("plane", LINEAR, examples=POINTS)
    manifest = json.loads((made / "models/plane/1/manifest.json").read_bytes())
    index = {}
    for number, path in enumerate(NO_PATHS):
        manifest["name"], manifest["artifacts"][-1]["path"] = f"plane{number}", path
        body = json.dumps(manifest).encode()
        put(f"models/plane{number}/1/manifest.json", body)
        index[f"plane{number}"] = entry(sha256=hashlib.sha256(body).hexdigest())
    put("models/index.json", index_of(**index))
    put("models/evil.joblib", dumped(LINEAR))
    with running(environment) as service:
        status = service.wait_live().wait_for(
            lambda status: [row["state"] for row in status["models"]].count("UNAVAILABLE") == len(NO_PATHS), "refused"
        )
        answer = service.predict(model="plane0", instances=[[1, 2, 3]])
    reasons = {row["name"]: row["reason"] for row in status["models"] if row["name"] != "evil"}

    assert len(reasons) == len(NO_PATHS)
    assert all("manifest.json" in reason or "leaves its version's folder" in reason for reason in reasons.values())
    assert all(len(reason) < 400 for reason in reasons.values())
    assert answer.status_code == 503
    written = {name for name in files_in(tmp_path) if not name.startswith("made/")}
    assert all(name.startswith("inner/copy/") for name in written)


# On the command line


@pytest.mark.parametrize(
    "name", ["../evil", "..", "a/b", "pl\u0430ne", "a\nb", "\x1b[2J", "p" * 101, "a b", "", "index.json"], ids=ascii
)
def test_a_command_takes_names_only_and_writes_nothing_for_others(tmp_path, monkeypatch, capsys, name):
    joblib.dump(LINEAR, tmp_path / "model.joblib")
    monkeypatch.setenv("ML_CLOUD_ONLY", "false")
    monkeypatch.setenv("ML_LOCAL_DIR", str(tmp_path / "bucket"))
    before = files_in(tmp_path)
    commands = [
        ("publish", name, "--model", str(tmp_path / "model.joblib")),
        ("promote", name, "1"),
        ("rollback", name),
        ("unpublish", name, "1"),
    ]
    if name != "index.json":
        commands += [
            ("publish", "plane", "--version", name, "--model", str(tmp_path / "model.joblib")),
            ("promote", "plane", name),
            ("promote", "plane", "1", "--alias", name),
            ("unpublish", "plane", name),
        ]
    for words in commands:
        code = main(words)
        told = capsys.readouterr().err

        assert code == 1, told
        assert told.startswith("error: ")
        assert told.count("\n") == 1
        assert told.rstrip("\n").isprintable()
        assert len(told) < 400
    assert files_in(tmp_path) == before


def test_what_somebody_wrote_into_an_index_does_not_reach_a_terminal(tmp_path, monkeypatch, capsys):
    ModelStorageManager(LocalStorage(tmp_path)).save("plane", LINEAR, examples=POINTS)
    path = tmp_path / "models/index.json"
    index = json.loads(path.read_bytes())
    index["models"]["plane"]["history"]["production"][0]["by"] = (
        "mallory\x1b[2J\x9b31m\u202e\r\nplane 9 promoted by ann"
    )
    path.write_text(json.dumps(index))
    monkeypatch.setenv("ML_CLOUD_ONLY", "false")
    monkeypatch.setenv("ML_LOCAL_DIR", str(tmp_path))
    code = main(["list", "plane"])
    lines = capsys.readouterr().out.split("\n")

    assert code == 0
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.lstrip().startswith("plane 9")]
    assert [line for line in lines if "mallory" in line]
