"""What is on the wire: every route, every error, and every kind of bad input, after each of which the process lives on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from app import errors, publishing
from app.api import predict
from app.api.errors import STATUS, ErrorBody, encode
from app.api.health import NotReady
from app.errors import RequestError
from app.model_storage import ModelStorageManager
from app.storage.local import LocalStorage
from tests import toys
from tests.asgi import application, client, ready
from tests.service import Service, running
from tests.trusted import TRUST

LIMIT_BYTES = 4 * 1024 * 1024
SUM = {"model": "sum", "instances": [[1, 2, 3.5]]}
FRAME = pd.DataFrame({"age": [20.0, 30.0, 40.0, 55.0] * 5, "plan": ["pro", "free", "team", "free"] * 5})
CHURNED = ["no", "yes", "no", "yes"] * 5
POINTS = np.arange(24.0).reshape(8, 3)


def churn() -> Any:
    columns = make_column_transformer((StandardScaler(), ["age"]), (OneHotEncoder(handle_unknown="ignore"), ["plan"]))
    return make_pipeline(columns, LogisticRegression()).fit(FRAME, CHURNED)


def two_numbers() -> Any:
    return LinearRegression().fit(POINTS, np.column_stack([POINTS.sum(axis=1), POINTS[:, 0] * 2]))


def two_words() -> Any:
    words = np.array([["low", "left"], ["high", "left"], ["low", "right"], ["high", "right"]] * 2)
    return DecisionTreeClassifier(random_state=0).fit(POINTS, words)


def three_classes() -> Any:
    return SVC(decision_function_shape="ovo").fit(np.tile(POINTS, (3, 1)), list("abcabcab") * 3)


def publish(folder: Path, **models: tuple[Any, Any]) -> None:
    """Publish models, each with its examples, to a folder that stands for the bucket."""
    manager = ModelStorageManager(LocalStorage(folder), trust=TRUST)
    for name, (model, examples) in models.items():
        manager.save(name, model, examples=examples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A bucket with a model of each kind, and a file that is none."""
    path: Path = tmp_path_factory.mktemp("bucket")
    publish(
        path,
        churn=(churn(), FRAME.head(4)),
        numbers=(two_numbers(), POINTS),
        words=(two_words(), POINTS),
        pairs=(three_classes(), POINTS),
        sum=(toys.Sum(), POINTS),
        root=(toys.Root(), None),
        fails=(toys.Fails(), None),
    )
    publish(path, sum=(toys.Sum(), POINTS))
    (path / "models" / "broken.joblib").write_bytes(b"not a model")
    return path


@pytest.fixture(scope="module")
def service(folder) -> Iterator[Service]:
    environment = {
        "ML_CLOUD_ONLY": "false",
        "ML_LOCAL_DIR": str(folder),
        "ML_MAX_BODY_BYTES": str(LIMIT_BYTES),
        "ML_MAX_ROWS": "1000",
        "ML_REQUIRED_MODELS": "churn,fails",
    }
    with running(environment) as running_service:
        yield running_service.wait_ready()
        running_service.client.close()
        running_service.process.terminate()
        assert running_service.process.wait(40) == 0
        for line in running_service.log().splitlines():
            json.loads(line)


@pytest.fixture
def send(service):
    """Post a body to the real process; afterwards the process still answers."""

    def post(body: Any, path: str = "/predict", **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        return service.client.post(path, content=content, headers=headers)

    yield post
    assert service.predict(**SUM).json() == {"model": "sum", "version": "1", "predictions": [6.5]}


def refused(response: httpx.Response, status: int, code: str) -> ErrorBody:
    """Hold an error against the form that every route's errors have, and return it."""
    assert (response.status_code, response.json()["error"]) == (status, code), response.text
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
    assert not re.search(r"Traceback|site-packages|/app/|/tmp/|/srv/|secret", response.text)
    assert len(response.text) < 10_000
    body = ErrorBody.model_validate_json(response.content)
    assert set(response.json()) == set(body.model_dump(exclude_none=True))
    return body


def talk(service: Service, request: bytes) -> bytes:
    """Send bytes over a connection of their own and return all that comes back until it is closed."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# Answers


def test_the_example_of_the_documentation(send):
    rows = [{"plan": "pro", "age": 41}, {"age": 41, "plan": "free"}]
    answer = send({"model": "churn", "instances": rows, "method": "predict_proba", "version": "1"}).json()

    assert answer == {
        "model": "churn",
        "version": "1",
        "predictions": churn().predict_proba(pd.DataFrame(rows)[["age", "plan"]]).tolist(),
        "classes": ["no", "yes"],
    }


@pytest.mark.parametrize(
    ("name", "method", "instances", "expected"),
    [
        ("churn", "predict", [[55, "free"], [20, "pro"]], ["yes", "no"]),
        ("numbers", "predict", [[0, 1, 2]], [[3.0, 0.0]]),
        ("words", "predict", [[0, 1, 2], [21, 22, 23]], [["low", "left"], ["high", "right"]]),
        ("words", "predict_proba", [[0, 1, 2]], [[[0.0, 1.0], [1.0, 0.0]]]),
        ("root", "predict", [[1, 1, 2], [-1, 0, 0], [0, 0, 0]], [2.0, None, None]),
        ("sum", "predict", [[1, 2, 3], [4, 5, 6]], [6.0, 15.0]),
    ],
)
def test_predictions_of_every_shape(send, name, method, instances, expected):
    response = send({"model": name, "instances": instances, "method": method})

    assert response.status_code == 200
    assert np.allclose(response.json()["predictions"], expected) if name == "numbers" else (
        response.json()["predictions"] == expected
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method", "classes"),
    [
        ("churn", "predict", None),
        ("churn", "predict_proba", ["no", "yes"]),
        ("churn", "predict_log_proba", ["no", "yes"]),
        ("churn", "decision_function", None),  # one number for the two of them
        ("words", "predict_proba", [["high", "low"], ["left", "right"]]),
        ("numbers", "predict", None),
        ("pairs", "decision_function", None),  # as many pairs as classes, but pairs
    ],
)
def test_classes_come_with_a_number_for_each_of_them(send, name, method, classes):
    row = {"age": 30, "plan": "pro"} if name == "churn" else [1, 2, 3]
    answer = send({"model": name, "instances": [row], "method": method}).json()

    assert answer.get("classes") == classes
    assert list(answer) == ["model", "version", "predictions"] + (["classes"] if classes else [])


def test_the_path_may_name_the_model(send):
    instances = SUM["instances"]

    assert send({"instances": instances}, "/models/sum/predict").json()["predictions"] == [6.5]
    assert send({"instances": instances, "model": "sum"}, "/models/sum/predict").json()["model"] == "sum"


@pytest.mark.parametrize("chosen", [{"version": "1"}, {"version": 1}, {"alias": "production"}, {"version": None}])
def test_version_and_alias_choose(send, chosen):
    assert send({**SUM, **chosen}).json()["version"] == "1"


def test_the_model_may_be_left_out_where_there_is_one(tmp_path):
    async def ask() -> httpx.Response:
        publish(tmp_path, sum=(toys.Sum(), POINTS))
        async with application(ML_CLOUD_ONLY=False, ML_LOCAL_DIR=tmp_path) as app, client(app) as http:
            await ready(app)
            return await http.post("/predict", json={"instances": [[1, 2, 3]]})

    assert asyncio.run(ask()).json() == {"model": "sum", "version": "1", "predictions": [6.0]}


def test_the_last_of_two_equal_keys_counts(send):
    body = b'{"model": "none", "model": "sum", "instances": [[1,2,3]], "instances": [[1,2,4]]}'

    assert send(body).json()["predictions"] == [7.0]


# Refusals


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "the body is empty: expected a JSON object"),
        (b"  \n", "the body is empty: expected a JSON object"),
        (b"age=41", "the body is not JSON: "),
        (b'{"instances": [[1, 2, 3]', "the body is not JSON: "),
        (b'{"instances": "\xff\xfe"}', "the body is not JSON: "),
        ('{"instances": []}'.encode("utf-16"), "the body is not JSON: "),
        (b"\xef\xbb\xbf{}", "the body is not JSON: UTF-8 byte order mark"),
        (b'{"model": "sum", "instances": [[NaN, 2, 3]]}', "the body is not JSON: "),
        (b'{"model": "sum", "instances": [[Infinity, 2, 3]]}', "the body is not JSON: "),
        (b'{"model": "sum", "instances": [[1e999, 2, 3]]}', "the body is not JSON: "),
        (b'{"model": "\\ud800", "instances": [[1, 2, 3]]}', "the body is not JSON: "),
        (b"[" * 100_000, "the body is nested more than 1,024 levels deep"),
        (b'{"instances":' * 20_000, "the body is nested more than 1,024 levels deep"),
        (b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the body is nested more than 1,024 levels deep"),
        (b"\x00" * 1000, "the body is not JSON: "),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_not_json_is_refused(send, body, detail):
    assert refused(send(body), 400, "invalid_json").detail.startswith(detail)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ([], "expected a JSON object with instances, got a list"),
        ("text", "expected a JSON object with instances, got a string of 4 characters"),
        (7, "expected a JSON object with instances, got a number"),
        (None, "expected a JSON object with instances, got null"),
        (True, "expected a JSON object with instances, got a boolean"),
        ({}, "instances is missing: expected a list of rows"),
        ({"instance": [[1]]}, "unknown field 'instance'; did you mean 'instances'?"),
        ({**SUM, "zzz": 1}, "unknown field 'zzz'; a request has model, instances, method, version, alias"),
        ({**SUM, "x" * 1_000_000: 1}, "unknown field 'xxx"),
        ({**SUM, "\n\u2028": 1}, r"unknown field '\n\u2028'; a request has"),
        ({**SUM, "model": 7}, "model must be a string of 1 to 100 characters, got a number"),
        ({**SUM, "model": ""}, "model must be a string of 1 to 100 characters, got a string of 0 characters"),
        ({**SUM, "model": "m" * 1_000_000}, "model must be a string of 1 to 100 characters, got a string of 1000000"),
        ({**SUM, "method": ["predict"]}, "method must be a string of 1 to 100 characters, got a list"),
        ({**SUM, "version": 1.5}, "version must be a string of 1 to 100 characters, got a number"),
        ({**SUM, "version": True}, "version must be a string of 1 to 100 characters, got a boolean"),
        ({**SUM, "alias": {}}, "alias must be a string of 1 to 100 characters, got an object"),
        ({**SUM, "version": "1", "alias": "production"}, "give version or alias, not both"),
        ({**SUM, "method": "predict_proba"}, "sum has no method 'predict_proba'; it has predict"),
        ({**SUM, "method": "__class__"}, "sum has no method '__class__'; it has predict"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_request_is_refused(send, body, detail):
    assert refused(send(body), 400, "invalid_request").detail.startswith(detail)


def test_path_and_body_must_name_the_same_model(send):
    detail = refused(send({**SUM, "model": "churn"}, "/models/sum/predict"), 400, "invalid_request").detail

    assert detail == "the path names model 'sum', the body names 'churn'"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({**SUM, "model": "nobody"}, "model 'nobody' is not served; served are: "),
        ({"instances": [[1, 2, 3]]}, "several models are served, so the request must name one: "),
        ({**SUM, "version": "3"}, "sum has no version '3' loaded; loaded are version 1 and alias production"),
        ({**SUM, "version": 3}, "sum has no version '3' loaded; loaded are version 1 and alias production"),
        ({**SUM, "version": 10**30}, "sum has no version"),
        ({**SUM, "version": "2"}, "sum has no version '2' loaded; loaded are version 1 and alias production"),
        (
            {**SUM, "alias": "staging"},
            "sum has no alias 'staging' loaded; loaded are version 1 and alias production; ML_ALIASES says which aliases are",
        ),
        ({**SUM, "model": "../index"}, "model '../index' is not served"),
        ({**SUM, "model": "a\r\nx-evil: 1"}, r"model 'a\r\nx-evil: 1' is not served"),
        ({**SUM, "model": "\x00\u202e\U0001f600"}, "model "),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_model_that_is_not_served_is_named(send, body, detail):
    response = send(body)
    if isinstance(body.get("version"), int) and body["version"] > 2**64:  # JSON's numbers end somewhere
        refused(response, 400, "invalid_request")
        return
    found = refused(response, 404, "model_not_found").detail

    assert found.startswith(detail)
    assert "x-evil" not in response.headers


@pytest.mark.parametrize(
    "path",
    [
        "/models/..%2fsum/predict",
        "/models/%2e%2e/predict",
        "/models/sum%00/predict",
        "/models/sum%0d%0ax-evil:1/predict",
        "/models/%2573um/predict",
        "/models/%ff%fe/predict",
        "/models/" + "n" * 10_000 + "/predict",
        "/models/index.json/predict",
    ],
    ids=lambda path: path[:40],
)
def test_a_path_reaches_models_only(send, path):
    response = send({"instances": [[1, 2, 3]]}, path)
    code = response.json()["error"]

    assert code in ("model_not_found", "not_found")
    refused(response, 404, code)
    assert "x-evil" not in response.headers


@pytest.mark.parametrize(
    ("name", "instances", "paths"),
    [
        ("churn", [{"age": "old", "plan": "pro"}], ["instances[0].age"]),
        ("churn", [{"age": 1, "plan": 2}, {"age": [], "plan": "pro"}], ["instances[1].age", "instances[0].plan"]),
        ("churn", [{"plan": "pro"}], ["instances[0].age"]),
        ("churn", [{"age": 1, "plan": "pro", "agee": 2}], ["instances[0].agee"]),
        ("churn", [{"age": 1, "plan": "pro"}, 7], ["instances[1]"]),
        ("churn", [[1]], ["instances[0]"]),
        ("churn", {"age": 1}, ["instances"]),
        ("churn", [], ["instances"]),
        ("sum", [], ["instances"]),
        ("numbers", [], ["instances"]),
        ("churn", None, ["instances"]),
        ("sum", [[1, 2]], ["instances[0]"]),
        ("sum", [[1, 2, True]], ["instances[0][2]"]),
        ("sum", [[1, 2, {}], ["x", 2, 3]], ["instances[1][0]", "instances[0][2]"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_every_violation_has_its_path(send, name, instances, paths):
    body = refused(send({"model": name, "instances": instances}), 422, "invalid_input")

    assert sorted(violation.path for violation in body.violations) == sorted(paths)
    assert all(violation.expected and violation.got for violation in body.violations)


def test_an_unknown_column_is_met_with_a_suggestion(send):
    (violation,) = refused(
        send({"model": "churn", "instances": [{"age": 1, "plan": "pro", "agee": 2}]}), 422, "invalid_input"
    ).violations

    assert violation.got == "an unknown column; did you mean 'age'?"


def test_violations_end_at_twenty(send):
    body = refused(send({"model": "sum", "instances": [["x", "y", "z"]] * 500}), 422, "invalid_input")

    assert len(body.violations) == 20


def test_a_huge_integer_is_a_number(send):
    assert send(b'{"model":"sum","instances":[[1' + b"0" * 300 + b",0,0]]}").json()["predictions"] == [1e300]


@pytest.mark.parametrize(
    ("rows", "got"), [(1001, "1001"), (15_000, "15000"), (1_000_000, "a body of more than 16000 lists and objects")]
)
def test_too_many_rows_are_refused(send, rows, got):
    body = b'{"model":"sum","instances":[' + b",".join([b"[]"] * rows) + b"]}"
    detail = refused(send(body), 413, "request_too_large").detail

    assert detail == f"expected at most 1000 rows in one request, got {got}"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(service, send):
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMIT_BYTES + 1}\r\n\r\n".encode()
    answer = talk(service, head)  # not a byte of the body is ever sent

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert b'"error":"request_too_large"' in answer


def test_the_sender_of_a_body_that_is_too_large_gets_to_see_why(send):
    response = send(b" " * (8 * LIMIT_BYTES))

    assert refused(response, 413, "request_too_large").detail == (
        f"expected a body of at most {LIMIT_BYTES} bytes, got {8 * LIMIT_BYTES} bytes"
    )


def test_a_chunked_body_ends_at_the_limit(service, send):
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * (LIMIT_BYTES // 16)

    refused(service.client.post("/predict", content=chunks()), 413, "request_too_large")


def test_a_body_of_exactly_the_limit_is_read(send):
    body = json.dumps(SUM).encode()

    assert send(body + b" " * (LIMIT_BYTES - len(body))).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Le",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n",
    ],
)
def test_a_client_that_goes_in_the_middle_is_let_go(service, send, head):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            connection.sendall(head)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n",
        b"\x00" * 1000,
    ],
    ids=repr,
)
def test_garbage_is_answered_and_harms_nobody(service, send, garbage):
    assert talk(service, garbage).startswith(b"HTTP/1.1 400 ")


def test_an_offer_to_change_the_protocol_is_passed_over(service, send):
    body = json.dumps(SUM).encode()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n\r\n"
    answer = talk(service, head + offer + body + head + b"Connection: close\r\n\r\n" + body)

    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert answer.count(b'"predictions":[6.5]') == 2


def test_a_model_that_raises_says_so_in_the_log_only(service, send):
    response = send({"model": "fails", "instances": [[1, 2, 3]]})
    detail = refused(response, 500, "prediction_failed").detail

    assert detail == "the model could not compute this input; the service's log says why"
    cause, told = (json.loads(line) for line in service.told(2, response.headers["x-request-id"]))
    assert "ZeroDivisionError: a secret of the model" in cause["error"]
    assert (told["event"], told["status"], told["error"]) == ("request", 500, "prediction_failed")


def test_a_model_that_is_known_to_be_unavailable_says_why(send):
    response = send({"model": "broken", "instances": [[1]]})
    detail = refused(response, 503, "model_not_ready").detail

    assert re.match(r"broken/[0-9a-f]+ is UNAVAILABLE: .*broken\.joblib: cannot be read as joblib: ", detail)
    assert response.headers["retry-after"] == "5"


# The table of errors


def every_error() -> list[type[RequestError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RequestError)]


def test_every_error_has_a_status_of_its_own_code():
    assert {kind.code for kind in every_error()} | {"internal_error"} == set(STATUS)


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.code)
def test_the_table_of_errors(kind):
    expected = {
        "invalid_json": 400, "invalid_request": 400, "unauthorized": 401, "forbidden": 403, "model_not_found": 404,
        "request_timeout": 408, "request_too_large": 413, "headers_too_large": 431, "invalid_input": 422, "overloaded": 429, "prediction_failed": 500,
        "model_not_ready": 503, "prediction_timeout": 504, "request_failed": 500, "bucket_unreadable": 503,
        "unsupported_encoding": 415, "rate_limited": 429,
    }  # fmt: skip
    added = {
        "overloaded": {"retry-after": "1"},
        "model_not_ready": {"retry-after": "5"},
        "bucket_unreadable": {"retry-after": "5"},
        "unauthorized": {"www-authenticate": "Bearer"},
        "unsupported_encoding": {"accept-encoding": "gzip"},
        "rate_limited": {
            "retry-after": "7",
            "ratelimit-policy": '"requests";q=3;w=60',
            "ratelimit": '"requests";r=0;t=7',
        },
    }
    error = kind(3, 60, pause_seconds=7) if kind is errors.RateLimited else kind("a sentence")
    status, body, headers = encode(error)

    assert status == expected[kind.code]
    assert headers == added.get(kind.code, {})
    assert json.loads(body) == {"error": kind.code, "detail": str(error)}


async def test_a_full_queue_and_a_late_answer(tmp_path):
    publish(tmp_path, waits=(toys.Waits(), None))
    settings = {"ML_CLOUD_ONLY": False, "ML_LOCAL_DIR": tmp_path, "ML_MAX_QUEUE": 1}
    request = {"instances": [[1, 2, 3]]}
    toys.GATE.clear()
    async with application(**settings) as app, client(app) as http:
        await ready(app)
        runner = app.registry.get("waits")
        async with asyncio.timeout(15):  # less than they wait for their answers
            first = asyncio.create_task(http.post("/predict", json=request))
            while (runner.in_flight, runner.queued) != (1, 0):
                await asyncio.sleep(0.001)
            second = asyncio.create_task(http.post("/predict", json=request))
            while not runner.queued:
                await asyncio.sleep(0.001)
            third = await http.post("/predict", json=request)
        toys.GATE.set()
        answered = [await first, await second]

    refused(third, 429, "overloaded")
    assert third.headers["retry-after"] == "1"
    assert [response.status_code for response in answered] == [200, 200]
    toys.GATE.clear()
    async with application(**settings, ML_PREDICT_TIMEOUT_SECONDS=0.3) as app, client(app) as http:
        await ready(app)
        late = await asyncio.gather(*(http.post("/predict", json=request) for _ in range(2)))
        toys.GATE.set()
    for response in late:
        assert refused(response, 504, "prediction_timeout").detail == "no answer within 0.3 s"


# The other routes

READING = ["/models/status", "/health", "/health/live", "/health/ready", "/docs", "/openapi.json"]


@pytest.mark.parametrize("path", READING)
def test_get_and_head_are_answered(service, path):
    got, headed = service.client.get(path), service.client.head(path)

    assert (got.status_code, headed.status_code) == (200, 200)
    assert headed.content == b""
    for name in ("content-type", "content-length") if path != "/models/status" else ("content-type",):
        assert headed.headers[name] == got.headers[name]
    assert "server" not in got.headers


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *[("POST", path, "GET, HEAD") for path in READING],
        *[("DELETE", path, "GET, HEAD") for path in READING],
        *[(method, "/predict", "POST") for method in ("GET", "PUT", "OPTIONS", "PATCH")],
        ("GET", "/models/sum/predict", "POST"),
        ("GET", "/models/refresh", "POST"),
    ],
)
def test_another_method_is_refused_with_those_that_are_allowed(service, method, path, allowed):
    response = service.client.request(method, path)

    detail = refused(response, 405, "method_not_allowed").detail
    assert detail == f"{method} {path}: Method Not Allowed: use {allowed.replace(', ', ' or ')}"
    assert response.headers["allow"] == allowed


def test_head_is_refused_where_get_is(service):
    response = service.client.head("/predict")

    assert (response.status_code, response.headers["allow"], response.content) == (405, "POST", b"")


@pytest.mark.parametrize("path", ["/", "/nothing", "/predict/", "/models", "/models/sum", "/health/", "/static/../x"])
def test_an_unknown_path_is_refused_and_never_redirected(service, path):
    for method in ("GET", "POST"):
        refused(service.client.request(method, path), 404, "not_found")


def test_health_says_ready(service):
    assert service.client.get("/health").json() == {"status": "ready"}
    assert service.client.get("/health/ready").json() == {"status": "ready"}
    assert service.client.get("/health/live").json() == {"status": "live"}


async def test_before_the_models_are_there_it_is_live_and_not_ready(tmp_path):
    settings = {"ML_CLOUD_ONLY": False, "ML_LOCAL_DIR": tmp_path, "ML_REQUIRED_MODELS": "churn"}
    async with application(**settings) as app, client(app) as http:
        live, not_ready = await http.get("/health/live"), await http.get("/health/ready")
        unserved = await http.post("/predict", json=SUM)

    assert live.status_code == 200
    assert not_ready.status_code == 503
    assert not_ready.headers["retry-after"] == "5"
    body = NotReady.model_validate_json(not_ready.content)
    assert body.reason == body.detail
    assert unserved.status_code in (404, 503)


def test_the_status_says_where_and_how_models_are_served(service):
    status = service.status()
    row = service.model("churn")

    assert (status["ready"], status["reason"], status["mode"]) == (True, None, "local")
    assert status["mode_reason"] == "ML_CLOUD_ONLY is false and R2 credentials are absent"
    assert status["storage"]["last_sync"] is not None
    assert (row["state"], row["version"], row["aliases"]) == ("READY", "1", ["production"])
    assert row["methods"][0] == "predict"
    assert service.model("broken")["state"] == "UNAVAILABLE"


def test_refresh_says_what_it_did(service):
    answer = service.client.post("/models/refresh")

    assert answer.status_code == 200
    assert answer.json()["loaded"] == []
    assert [ref.split("/")[0] for ref in answer.json()["failed"]] == ["broken"]


def test_refresh_with_an_index_that_cannot_be_read_is_an_error_of_the_usual_form(service, folder, send):
    index = folder / "models" / "index.json"
    whole = index.read_bytes()
    try:
        index.write_bytes(b"{")
        response = service.client.post("/models/refresh")
    finally:
        index.write_bytes(whole)

    assert refused(response, 503, "bucket_unreadable").detail.startswith("index.json is not an index")
    assert response.headers["retry-after"] == "5"


# The request id


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/predict", SUM),
        ("POST", "/predict", {"instances": 1}),
        ("POST", "/models/nobody/predict", SUM),
        ("GET", "/health/live", None),
        ("HEAD", "/health", None),
        ("GET", "/nothing", None),
        ("PUT", "/predict", None),
        ("GET", "/openapi.json", None),
    ],
)
def test_a_request_id_is_taken_over_and_returned_once(service, method, path, body):
    identity = "0f3c-4a.b_9:1/x+y=z@q"
    response = service.client.request(method, path, json=body, headers={"X-Request-ID": identity})

    assert response.headers.get_list("x-request-id") == [identity]


@pytest.mark.parametrize("identity", ["", "a b", "x" * 201, 'a"b', "é".encode("latin-1"), "a\tb"])
def test_a_request_id_that_is_none_is_replaced(service, identity):
    for path in ("/predict", "/health"):
        answers = [service.client.post(path, content=b"", headers={"X-Request-ID": identity}) for _ in range(2)]
        found = [answer.headers["x-request-id"] for answer in answers]

        assert all(re.fullmatch(r"[0-9a-f]{32}", it) for it in found)
        assert found[0] != found[1]


# OpenAPI


@pytest.fixture(scope="module")
def document(service) -> dict[str, Any]:
    return service.client.get("/openapi.json").json()  # type: ignore[no-any-return]


async def test_what_cannot_be_written_as_json_takes_no_other_model_from_the_status(tmp_path):
    storage = LocalStorage(tmp_path)
    manager = ModelStorageManager(storage)
    fitted = LogisticRegression().fit(POINTS, ["no", "yes"] * 4)
    for name in ("fine", "classes", "libraries"):
        await manager.publish(name, publishing.draft({"model": publishing.part_from_object("model", fitted)}))
    rewrite(tmp_path, "classes", lambda manifest: manifest["signature"].update(classes=[10**30, 1]))
    rewrite(tmp_path, "libraries", lambda manifest: manifest["trained_with"].update({"": "1", "boto3": "?"}))
    for name, label in (("surrogate", "\ud800"), ("large", 10**30)):
        fitted.classes_ = np.array([label, 1], dtype=object)
        (tmp_path / f"models/{name}.pkl").write_bytes(pickle.dumps(fitted))
    Path(os.fsdecode(os.fsencode(tmp_path / "models") + b"/\xff.txt")).touch()
    async with application(ML_CLOUD_ONLY=False, ML_LOCAL_DIR=tmp_path) as app, client(app) as http:
        await http.post("/models/refresh")
        response = await http.get("/models/status")
    rows = {row["name"]: row for row in response.json()["models"]}

    assert response.status_code == 200
    assert (rows["fine"]["state"], rows["fine"]["version_differences"]) == ("READY", {})
    assert rows["libraries"]["version_differences"] == {}
    assert rows["classes"]["warnings"] == ["it cannot be described: Integer exceeds 64-bit range"]
    assert "whole number beyond 64 bits" in rows["large"]["reason"]
    assert "half a surrogate pair" in rows["surrogate"]["reason"]
    assert response.json()["ignored"] == {"?.txt": "its ending is not one of .joblib, .pkl, .pickle, .skops"}


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and let the index have its digest, as somebody who may write to the bucket can."""
    path, index_path = folder / f"models/{name}/1/manifest.json", folder / "models/index.json"
    manifest, index = json.loads(path.read_bytes()), json.loads(index_path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))
    index["models"][name]["versions"]["1"]["manifest_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    index_path.write_text(json.dumps(index))


def test_openapi_has_every_route_and_nothing_else(document):
    operations = {(method, path) for path, item in document["paths"].items() for method in item}
    served = ("churn", "fails", "numbers", "pairs", "root", "sum", "words")

    assert document["openapi"].startswith("3.1")
    assert operations == {
        ("post", "/predict"),
        ("post", "/models/{name}/predict"),
        *[("post", f"/models/{name}/predict") for name in served],
        ("post", "/models/refresh"),
        *[("get", path) for path in ("/models/status", "/metrics", "/health", "/health/ready", "/health/live")],
    }


def test_openapi_is_whole(document):
    text = json.dumps(document)
    names = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text))
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    identities = [operation["operationId"] for operation in operations]

    assert names <= set(document["components"]["schemas"])
    assert text.count('"$ref"') == len(re.findall(r'"\$ref": "#/components/schemas/', text))
    assert len(set(identities)) == len(identities)
    assert all(response["description"] for operation in operations for response in operation["responses"].values())
    for path, item in document["paths"].items():
        for operation in item.values():
            declared = {it["name"] for it in operation.get("parameters", ()) if it["in"] == "path"}
            assert declared == set(re.findall(r"\{(\w+)\}", path))


def test_openapi_describes_the_errors_that_are_sent(document):
    schema = document["components"]["schemas"]["ErrorBody"]
    responses = document["paths"]["/predict"]["post"]["responses"]

    assert schema["required"] == ["error", "detail"]
    assert set(schema["properties"]) == {"error", "detail", "violations"}
    assert set(responses) == {"200", "400", "404", "408", "413", "415", "422", "429", "431", "500", "503", "504"}
    for status in set(responses) - {"200"}:
        assert responses[status]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


def test_openapi_describes_the_request_that_is_read(document):
    body = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]

    assert set(body["properties"]) == set(predict.FIELDS)
    assert body["required"] == ["instances"]


def test_the_documentation_shows_the_document(service):
    page = service.client.get("/docs")

    assert page.headers["content-type"].startswith("text/html")
    assert 'url: "openapi.json"' in page.text


# As any ASGI server runs it


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the service logs, without what the garbage collector makes asyncio say of the tests before."""
    return [record for record in caplog.records if record.name.startswith("diskless")]


@pytest.fixture
def local(tmp_path) -> dict[str, Any]:
    publish(tmp_path, sum=(toys.Sum(), POINTS))
    return {"ML_CLOUD_ONLY": False, "ML_LOCAL_DIR": tmp_path}


async def test_it_answers_below_the_path_where_it_is_mounted(local):
    async with application(**local) as app:
        await ready(app)
        async with client(app, root_path="/ml") as http:
            answers = [
                await http.post("/ml/predict", json=SUM),
                await http.post("/ml/models/sum/predict", json=SUM),
                await http.post("/predict", json=SUM),  # by a proxy that takes the path off and says so
                await http.get("/ml/health"),
                await http.get("/ml/docs"),
            ]
            elsewhere = await http.post("/mlpredict", json=SUM)

    assert [answer.status_code for answer in answers] == [200] * 5
    assert 'url: "openapi.json"' in answers[-1].text  # relative to the page's own address
    assert elsewhere.status_code == 404


async def test_fastapi_alone_answers_the_same(local):
    async with application(**local) as app, client(app) as front, client(app.rest) as alone:
        await ready(app)
        for body in (SUM, {"instances": 7}, {"model": "nobody", "instances": []}):
            one, other = await front.post("/predict", json=body), await alone.post("/predict", json=body)

            assert (one.status_code, one.content) == (other.status_code, other.content)
        assert (await alone.post("/models/sum/predict", json=SUM)).status_code == 200


async def test_a_route_that_fails_answers_in_the_usual_form(local, caplog):
    async def boom() -> None:
        raise RuntimeError("a secret, in /srv/models")

    async with application(**local) as app, client(app) as http:
        app.rest.add_api_route("/boom", boom)
        response = await http.get("/boom")
        with_id = await http.get("/boom", headers={"X-Request-ID": "mine"})

    identity = response.headers["x-request-id"]
    assert refused(response, 500, "internal_error").detail == (
        f"something went wrong here; the service's log says what, under request id {identity}"
    )
    assert with_id.json()["detail"].endswith("request id mine")
    causes = [record.exc_info[1] for record in ours(caplog) if record.name != "diskless.access"]
    assert [str(cause) for cause in causes] == ["a secret, in /srv/models"] * 2


async def test_what_fails_outside_all_routes_answers_in_the_usual_form(local, caplog):
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a secret, in /srv/models")

    async with application(**local) as app:
        app.rest = broken
        async with client(app) as http:
            refused(await http.get("/health"), 500, "internal_error")

    assert [record.getMessage() for record in ours(caplog)] == ["a request failed"]


async def test_what_fails_in_the_middle_of_an_answer_reaches_the_server(local):
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("in the middle")

    async with application(**local) as app:
        app.rest = broken
        async with client(app) as http:
            with pytest.raises(RuntimeError, match="in the middle"):
                await http.get("/health")


async def test_a_prediction_that_fails_unexpectedly_is_an_internal_error(local, caplog):
    class Broken:
        def get(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("a secret, in /srv/models")

    async with application(**local) as app, client(app) as http:
        app.predictor._registry = Broken()
        refused(await http.post("/predict", json=SUM), 500, "internal_error")

    assert "a prediction request failed" in [record.getMessage() for record in caplog.records]


async def test_a_client_that_has_gone_is_sent_nothing(local):
    sent = []

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with application(**local) as app:
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "http_version": "1.1"}
        await app(scope, gone, send)

    assert sent == []


async def test_a_path_that_no_text_can_be_is_refused(local):
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with application(**local) as app:
        for path in ("/\udcff", "/models/\udcff/predict"):  # as a server gives it that decodes with surrogates
            scope = {"type": "http", "method": "POST", "path": path, "headers": [], "http_version": "1.1"}
            await app({**scope, "scheme": "http", "server": ("service", 80), "query_string": b""}, receive, send)

    assert [message["status"] for message in sent if "status" in message] == [404, 400]  # the second has no body
    assert json.loads(sent[1]["body"])["error"] == "not_found"


async def test_a_body_may_come_in_any_pieces(local):
    body = json.dumps(SUM).encode()
    pieces = [{"type": "http.request", "body": body[at : at + 1], "more_body": True} for at in range(len(body))]
    pieces += [{"type": "http.request", "more_body": True}, {"type": "http.request"}]
    sent = []

    async def receive() -> dict[str, Any]:
        return pieces.pop(0)  # fails if it is asked once more after the end

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with application(**local) as app:
        await ready(app)
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "http_version": "1.1"}
        await app(scope, receive, send)

    assert sent[0]["status"] == 200
    assert json.loads(sent[1]["body"])["predictions"] == [6.5]


async def test_a_websocket_is_declined(local):
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with application(**local) as app:
        await app({"type": "websocket", "path": "/predict", "headers": [], "query_string": b""}, receive, send)

    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_concurrent_requests_keep_their_own_request_ids(local, caplog):
    async with application(**local) as app, client(app) as http:
        await ready(app)
        answers = await asyncio.gather(
            *(http.post("/predict", json=SUM, headers={"X-Request-ID": f"id-{n}"}) for n in range(50))
        )

    assert [answer.headers["x-request-id"] for answer in answers] == [f"id-{n}" for n in range(50)]
