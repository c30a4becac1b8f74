"""Headers: those that are on every answer, what they say to pages of other origins, and the host that a request names.

Every request goes to two processes: one answers plain requests in the protocol, the other all of them as an ASGI application.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest

from app.api.headers import SAFE, Hosts, completed
from app.api.origins import READ
from app.model_storage import ModelStorageManager
from app.storage.local import LocalStorage
from tests import toys
from tests.asgi import application, client, ready
from tests.service import AS_ASGI, COMMAND, Service, running
from tests.trusted import TRUST

POINTS = np.arange(24.0).reshape(8, 3)
SUM = json.dumps({"model": "sum", "instances": [[1, 2, 3.5]]}).encode()
LIMIT_BYTES = 100_000
PAGE = "https://app.example.org"
HOSTS = "api.example.org,*.example.net,127.0.0.1"
Answer = tuple[int, list[tuple[str, str]], bytes]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bucket")
    manager = ModelStorageManager(LocalStorage(folder), trust=TRUST)
    for name, model in (("sum", toys.Sum()), ("fails", toys.Fails()), ("naps", toys.Naps())):
        manager.save(name, model, examples=None if name == "fails" else np.zeros((2, 3)))
    (folder / "models" / "broken.joblib").write_bytes(b"not a model")
    return {
        "ML_CLOUD_ONLY": "false",
        "ML_LOCAL_DIR": str(folder),
        "ML_MAX_BODY_BYTES": str(LIMIT_BYTES),
        "ML_MAX_ROWS": "100",
        "ML_REQUIRED_MODELS": "sum,fails,naps",
    }


def both(environment: dict[str, str], **more: str) -> Iterator[tuple[Service, Service]]:
    with ExitStack() as stack:
        services = [
            stack.enter_context(running({**environment, **more}, command=command)) for command in (COMMAND, AS_ASGI)
        ]
        yield services[0].wait_ready(), services[1].wait_ready()


@pytest.fixture(scope="module")
def closed(environment) -> Iterator[tuple[Service, Service]]:
    """As it is without settings: no page of another origin may read anything, any host may be named."""
    yield from both(environment)


@pytest.fixture(scope="module")
def opened(environment) -> Iterator[tuple[Service, Service]]:
    yield from both(environment, ML_CORS_ORIGINS=f"{PAGE},http://localhost:3000", ML_ALLOWED_HOSTS=HOSTS)


def bare(service: Service, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
    """Send a request twice on one connection, with the headers that are given and no others; the answers must be alike."""
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    sent = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    answers = []
    with (
        socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection,
        connection.makefile("rb") as file,
    ):
        for _ in range(2):  # the head of the second is known
            connection.sendall(sent)
            answers.append(read(file, method))
            if ("connection", "close") in answers[0][1]:
                return answers[0]
    assert answers[0] == answers[1]
    return answers[0]


def read(file: Any, method: str) -> Answer:
    """Read one answer; what is another each time is taken out of it."""
    status = int(file.readline().split()[1])
    headers: list[tuple[str, str]] = []
    while (line := file.readline().rstrip(b"\r\n")) != b"":
        name, _, value = line.decode("latin-1").partition(": ")
        headers.append((name, value))
    length = int(dict(headers).get("content-length", 0))
    body = b"" if method == "HEAD" else file.read(length)
    made = [("date", ""), ("x-request-id", "")]
    headers = [next((it for it in made if it[0] == name), (name, value)) for name, value in headers]
    return status, headers, re.sub(rb"[0-9a-f]{32}", b"made", body)


def alike(pair: tuple[Service, Service], *request: Any, **headers: str) -> Answer:
    """Ask both services, and return what they said: the same."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    one, other = (bare(service, *request, headers={"Host": "api.example.org", **named}) for service in pair)
    assert one == other
    return one


# On every answer


def predict(**request: Any) -> tuple[str, str, bytes]:
    return "POST", "/predict", json.dumps({"model": "sum", "instances": [[1, 2, 3]], **request}).encode()


EVERY = {
    "a prediction": (200, predict()),
    "by path": (200, ("POST", "/models/sum/predict", b'{"instances":[[1,2,3]]}')),
    "the careful way": (200, predict(version=None)),
    "no json": (400, ("POST", "/predict", b"{")),
    "no request": (400, predict(inputs=1)),
    "unknown model": (404, predict(model="nobody")),
    "unknown path": (404, ("GET", "/nothing")),
    "post to an unknown path": (404, ("POST", "/nothing", SUM)),
    "another method": (405, ("GET", "/predict")),
    "options": (405, ("OPTIONS", "/predict")),
    "trace": (405, ("TRACE", "/health")),
    "too large": (413, ("POST", "/predict", b" " * (LIMIT_BYTES + 1))),
    "too many rows": (413, predict(instances=[[1, 2, 3]] * 101)),
    "wrong input": (422, predict(instances=[[1, 2, "x"]])),
    "a model that fails": (500, predict(model="fails")),
    "a model that is broken": (503, predict(model="broken")),
    "a model that is late": (504, predict(model="naps", instances=[[1.2, 0, 0]]), {"X_Request_Timeout": "1"}),
    "live": (200, ("GET", "/health/live")),
    "ready": (200, ("GET", "/health/ready")),
    "head": (200, ("HEAD", "/health")),
    "head of what has none": (405, ("HEAD", "/predict")),
    "the document": (200, ("GET", "/openapi.json")),
}


@pytest.mark.parametrize("name", EVERY)
def test_safe_headers_are_on_every_answer_once(closed, name):
    expected, request, *more = EVERY[name]
    status, headers, _ = alike(closed, *request, **dict(*more))
    names = [name for name, _ in headers]

    assert status == expected
    assert {(key.decode(), value.decode()) for key, value in SAFE} <= set(headers)
    assert len(set(names)) == len(names)
    assert "server" not in names
    assert not [name for name in names if name.startswith(("access-control-", "x-powered-by", "via"))]
    assert names.count("x-request-id") == names.count("date") == 1


@pytest.mark.parametrize("name", ["status", "docs"])
def test_what_sets_its_own_headers_keeps_them(closed, name):
    path = {"status": "/models/status", "docs": "/docs"}[name]
    for service in closed:
        _, headers, _ = bare(service, "GET", path, headers={"Host": "x"})
        names = [name for name, _ in headers]

        assert {key.decode() for key, _ in SAFE} <= set(names)
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ],
    ids=repr,
)
def test_they_are_on_the_answer_to_what_is_no_http(closed, garbage):
    for service in closed:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            connection.sendall(garbage)
            status, headers, body = read(connection.makefile("rb"), "GET")

        assert (status, json.loads(body)["error"]) == (400, "invalid_request")
        assert {(key.decode(), value.decode()) for key, value in SAFE} <= set(headers)
        assert dict(headers).keys() >= {"x-request-id", "connection", "content-length"}
        assert "server" not in dict(headers)


def test_they_are_on_what_is_given_up_at_a_stop(environment):
    slow = json.dumps({"model": "naps", "instances": [[19, 0, 0]]}).encode()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(slow)
    settings = {**environment, "ML_PREDICT_TIMEOUT_SECONDS": "20", "ML_DRAIN_SECONDS": "1"}
    for command in (COMMAND, AS_ASGI):
        with running(settings, command=command) as service:
            service.wait_ready()
            with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
                connection.sendall(head + slow)
                assert service.model("naps")["state"] == "READY"  # and this was asked behind the prediction
                service.process.terminate()
                status, headers, _ = read(connection.makefile("rb"), "POST")

        assert status == 503
        assert {(key.decode(), value.decode()) for key, value in SAFE} <= set(headers)


async def test_under_another_server_a_header_that_a_route_sets_is_its_own(tmp_path):
    from starlette.responses import Response

    async def page() -> Response:
        return Response("", headers={"Content-Security-Policy": "default-src 'self'", "cache-control": "max-age=5"})

    async with application(ML_CLOUD_ONLY=False, ML_LOCAL_DIR=tmp_path) as app, client(app) as http:
        app.rest.add_api_route("/page", page)
        answer = await http.get("/page")

    assert answer.headers.get_list("content-security-policy") == ["default-src 'self'"]
    assert answer.headers.get_list("cache-control") == ["max-age=5"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_headers_are_completed_whatever_their_case():
    own = [(b"X-Frame-Options", b"SAMEORIGIN"), (b"X-REQUEST-ID", b"mine")]

    assert completed(own, (b"x-request-id", b"made")) == [*own, *(it for it in SAFE if it[0] != b"x-frame-options")]


# Pages of other origins


def origin_headers(headers: list[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name.startswith("access-control-") or name == "vary"}


@pytest.mark.parametrize("name", ["a prediction", "the careful way", "no json", "unknown path", "live"])
def test_unless_set_no_page_may_read_anything(closed, name):
    _, request = EVERY[name]
    status, headers, _ = alike(closed, *request, Origin=PAGE)

    assert status == EVERY[name][0]
    assert origin_headers(headers) == {}


def test_unless_set_a_preflight_is_a_method_that_is_not_there(closed):
    status, headers, body = alike(closed, "OPTIONS", "/predict", Origin=PAGE, Access_Control_Request_Method="POST")

    assert (status, json.loads(body)["error"]) == (405, "method_not_allowed")
    assert origin_headers(headers) == {}


@pytest.mark.parametrize("name", [name for name in EVERY if "late" not in name])
def test_a_page_of_a_named_origin_may_read_every_answer(opened, name):
    expected, request = EVERY[name]
    without = alike(opened, *request)
    status, headers, body = alike(opened, *request, Origin=PAGE)

    assert (status, body) == (expected, without[2])
    vary = {"vary": "Accept-Encoding"} if name == "the document" else {}  # it is large enough to be compressed
    assert origin_headers(headers) == {
        "access-control-allow-origin": PAGE,
        "access-control-expose-headers": ", ".join(READ),
        "vary": ", ".join([*vary.values(), "Origin"]),
    }
    assert origin_headers(without[1]) == vary
    assert {(key.decode(), value.decode()) for key, value in SAFE} <= set(headers)
    assert {name for name, _ in without[1]} == {name for name, _ in headers} - (
        origin_headers(headers).keys() - vary.keys()
    )


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example.org", "https://app.example.org.evil.com", "http://app.example.org", "null", "",
     "https://app.example.org:8443", "HTTPS://APP.EXAMPLE.ORG", "https://app.example.org, https://x", "*"],
)  # fmt: skip
def test_a_page_of_another_origin_may_not(opened, origin):
    for request in (EVERY["a prediction"][1], EVERY["live"][1], EVERY["unknown path"][1]):
        _, headers, _ = alike(opened, *request, Origin=origin)

        assert "access-control-allow-origin" not in dict(headers)
    status, headers, body = alike(opened, "OPTIONS", "/predict", Origin=origin, Access_Control_Request_Method="POST")
    assert (status, json.loads(body)["error"]) == (400, "invalid_request")
    assert json.loads(body)["detail"] == "pages of other origins are not allowed this: origin"
    assert "access-control-allow-origin" not in dict(headers)


@pytest.mark.parametrize("path", ["/predict", "/models/sum/predict", "/models/status", "/health", "/nothing"])
def test_a_preflight_says_what_a_page_may_send(opened, path):
    sent = "authorization, content-type, x-api-key, x-request-id, content-encoding"
    status, headers, _ = alike(
        opened,
        "OPTIONS",
        path,
        Origin=PAGE,
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers=sent,
    )
    told = dict(headers)

    assert status == 200
    assert told["access-control-allow-origin"] == PAGE
    assert told["access-control-allow-methods"] == "GET, HEAD, POST"
    assert {it.strip() for it in sent.split(",")} <= {
        it.strip().lower() for it in told["access-control-allow-headers"].split(",")
    }
    assert "access-control-allow-credentials" not in told
    assert told["x-content-type-options"] == "nosniff"
    assert "x-request-id" in told


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"Access_Control_Request_Method": "DELETE"}, "method"),
        ({"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "cookie"}, "headers"),
        (
            {"Access_Control_Request_Method": "POST", "Access_Control_Request_Private_Network": "true"},
            "private-network",
        ),
    ],
)
def test_a_preflight_for_more_is_refused(opened, asked, refused):
    status, _, body = alike(opened, "OPTIONS", "/predict", Origin=PAGE, **asked)

    assert status == 400
    assert json.loads(body)["detail"] == f"pages of other origins are not allowed this: {refused}"


def test_options_without_a_preflight_is_a_method_that_is_not_there(opened):
    assert alike(opened, "OPTIONS", "/predict", Origin=PAGE)[0] == 405
    assert alike(opened, "OPTIONS", "/predict")[0] == 405


async def test_a_star_lets_every_page_read(environment):
    settings = {"ML_CLOUD_ONLY": False, "ML_LOCAL_DIR": environment["ML_LOCAL_DIR"], "ML_CORS_ORIGINS": "*"}
    async with application(**settings) as app, client(app) as http:
        for method, path, *body in (EVERY["a prediction"][1], EVERY["no json"][1], EVERY["live"][1]):
            answer = await http.request(
                method, path, content=body[0] if body else None, headers={"Origin": "https://any.example"}
            )
            without = await http.request(method, path, content=body[0] if body else None)

            assert answer.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in answer.headers
            assert origin_headers(list(without.headers.items())) == {}


async def test_what_fails_is_readable_for_the_page_too(tmp_path, caplog):
    async def boom() -> None:
        raise RuntimeError("a secret")

    settings = {"ML_CLOUD_ONLY": False, "ML_LOCAL_DIR": tmp_path, "ML_CORS_ORIGINS": PAGE}
    async with application(**settings) as app, client(app) as http:
        app.rest.add_api_route("/boom", boom)
        answer = await http.get("/boom", headers={"Origin": PAGE, "X-Request-ID": "mine"})

    assert (answer.status_code, answer.json()["error"]) == (500, "internal_error")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert answer.json()["detail"].endswith("request id mine")
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["a route failed"]


async def test_a_preflight_needs_no_key_and_a_page_may_read_that_it_needs_one(environment):
    settings = {"ML_CLOUD_ONLY": False, "ML_LOCAL_DIR": environment["ML_LOCAL_DIR"], "ML_CORS_ORIGINS": PAGE}
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    async with (
        application(**settings, ML_API_KEYS="page:a-key-of-a-page-0123", ML_REQUIRED_MODELS="sum") as app,
        client(app) as http,
    ):
        await ready(app)
        http.headers.clear()
        before = await http.options("/predict", headers=asks)
        without = await http.post("/predict", content=SUM, headers={"Origin": PAGE})
        with_key = await http.post(
            "/predict", content=SUM, headers={"Origin": PAGE, "X-API-Key": "a-key-of-a-page-0123"}
        )

    assert [answer.status_code for answer in (before, without, with_key)] == [200, 401, 200]
    assert {answer.headers["access-control-allow-origin"] for answer in (before, without, with_key)} == {PAGE}


# The host that a request names


@pytest.mark.parametrize(
    "host",
    ["api.example.org", "API.Example.ORG", "api.example.org:8000", "api.example.org:", "a.example.net", "a.b.example.net:443",
     "127.0.0.1", "127.0.0.1:1"],
)  # fmt: skip
def test_a_host_that_is_allowed_may_be_named(opened, host):
    assert alike(opened, *EVERY["a prediction"][1], Host=host)[0] == 200
    assert alike(opened, *EVERY["unknown path"][1], Host=host)[0] == 404


OTHERS = [
    "evil.example", "example.org", "example.net", ".example.net", "xexample.net", "api.example.org.", "api.example.org.evil.com",
    "evil.com/api.example.org", "evil@api.example.org", "api.example.org@evil", "api.example.org, evil", "api.example.org evil",
    "", "[::1]", "api.example.org:x", "api.example.org:80:80", "http://api.example.org", "api.example.org\\", "\uff41pi.example.org",
    "a" * 5000, "a.example.net\t", "%61pi.example.org",
]  # fmt: skip


@pytest.mark.parametrize("host", OTHERS, ids=lambda host: host[:30])
def test_any_other_is_refused_by_both_layers(opened, host):
    encoded = host.encode().decode("latin-1")
    if host.endswith("\t"):  # blanks around a value are not part of it
        assert alike(opened, *EVERY["a prediction"][1], Host=encoded)[0] == 200
        return
    for name in ("a prediction", "no json", "unknown path", "another method", "the document"):
        status, headers, body = alike(opened, *EVERY[name][1], Host=encoded)

        assert status == 400
        if name != "another method" or body:
            assert json.loads(body) == {
                "error": "invalid_request",
                "detail": "the request's Host header names no host that this service answers to",
            }
        assert dict(headers)["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_checks_may_name_any_host(opened, path):
    for method in ("GET", "HEAD"):
        assert alike(opened, method, path, Host="10.1.2.3:8000")[0] == 200


@pytest.mark.parametrize("path", ["/health/", "/health/../predict", "/healthy", "//health", "/HEALTH"])
def test_nothing_else_passes_for_a_health_check(opened, path):
    assert alike(opened, "GET", path, Host="10.1.2.3:8000")[0] == 400


def test_a_request_must_name_a_host_and_only_one(opened):
    content = SUM
    for service in opened:
        for lines in (
            b"",
            b"Host: api.example.org\r\nHost: api.example.org\r\n",
            b"Host: api.example.org\r\nHost: evil\r\n",
        ):
            with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
                head = b"POST /predict HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (lines, len(content))
                connection.sendall(head + content)
                assert read(connection.makefile("rb"), "POST")[0] == 400


def test_what_is_refused_for_its_host_does_not_end_the_connection(opened):
    sent = b"POST /predict HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n%b"
    for service in opened:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            connection.sendall(
                b"".join(sent % (host, len(SUM), SUM) for host in (b"evil", b"127.0.0.1", b"evil", b"x.example.net"))
            )
            file = connection.makefile("rb")
            assert [read(file, "POST")[0] for _ in range(4)] == [400, 200, 400, 200]


def test_unless_set_any_host_may_be_named(closed):
    for host in ("evil.example", "", "a b"):
        assert alike(closed, *EVERY["a prediction"][1], Host=host)[0] == 200


@pytest.mark.parametrize(
    ("value", "allowed"),
    [(b"[::1]", True), (b"[::1]:8000", True), (b"[::2]", False), (b"::1", False), (b"[::1", False), (b"[::1]x", False)],
)
def test_addresses_of_ipv6_are_in_brackets(value, allowed):
    assert Hosts(("[::1]",)).named([(b"host", value)]) is allowed


def test_many_requests_at_once_are_told_apart_by_their_hosts(opened):
    async def ask(service: Service, number: int) -> None:
        async with httpx.AsyncClient(base_url=service.url, timeout=30, trust_env=False) as http:
            for step in range(20):
                good = (number + step) % 3 > 0
                answer = await http.post(
                    "/predict", content=SUM, headers={"Host": "127.0.0.1" if good else "evil", "Origin": PAGE} if step % 2 else
                    {"Host": "127.0.0.1" if good else "evil"},
                )  # fmt: skip
                assert answer.status_code == (200 if good else 400)
                assert ("access-control-allow-origin" in answer.headers) == (good and step % 2 == 1)

    async def everybody() -> None:
        await asyncio.gather(*(ask(service, number) for service in opened for number in range(10)))

    asyncio.run(everybody())
