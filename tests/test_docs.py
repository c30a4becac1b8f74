"""The page that shows the API's document: it runs what was looked at and nothing else, in a real browser too."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.server
import re
import shutil
import ssl
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from app.api import docs
from app.model_storage import ModelStorageManager
from app.storage.local import LocalStorage
from tests.asgi import application, client
from tests.service import Service, running
from tests.zoo import fitted

CDN = "cdn.jsdelivr.net"
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("bucket")
    it = fitted("logistic, named")
    ModelStorageManager(LocalStorage(folder)).save("flowers", it.estimator, examples=it.data, compile=False)
    with running({"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder)}) as service:
        yield service.wait_ready()


@pytest.mark.parametrize("off", ["off", "OFF"])
async def test_neither_is_there_where_documentation_is_off(tmp_path, off):
    settings = {"ML_CLOUD_ONLY": False, "ML_LOCAL_DIR": tmp_path, "ML_DOCS": off}
    async with application(**settings) as app, client(app) as http:
        for path in ("/docs", "/openapi.json"):
            for method in ("GET", "HEAD", "POST"):
                assert (await http.request(method, path)).status_code == 404


async def test_nothing_else_shows_the_document(tmp_path):
    async with application(ML_CLOUD_ONLY=False, ML_LOCAL_DIR=tmp_path) as app, client(app) as http:
        for path in ("/redoc", "/docs/oauth2-redirect", "/docs/", "/openapi.json/"):
            assert (await http.get(path)).status_code == 404


def test_the_page_loads_nothing_that_was_not_looked_at(service):
    response = service.client.get("/docs")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    page = response.text
    tags = re.findall(r"<(?:script|link)[^>]*https:[^>]*>", page)
    style, script = (re.search(r'(?:src|href)="([^"]*)"', tag)[1] for tag in tags)  # type: ignore[index]
    inline = re.findall(r"<script>(.*?)</script>", page, re.S)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline]

    assert response.headers["content-type"] == "text/html; charset=utf-8"
    for tag, file in zip(tags, docs.DIGESTS, strict=True):
        assert f"https://{CDN}/npm/swagger-ui-dist@{docs.SWAGGER_UI}/{file}" in tag
        assert f'integrity="{docs.DIGESTS[file]}" crossorigin="anonymous"' in tag
    assert policy == {
        "default-src": "'none'",
        "script-src": " ".join([script, *(f"'sha256-{digest}'" for digest in digests)]),
        "style-src": style,
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert not re.search(r"<[^>]* (on\w+|style)=", page)


@pytest.fixture(scope="module")
def swagger_ui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The npm package that the CDN serves."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    folder: Path = tmp_path_factory.mktemp("npm")
    command = ["npm", "pack", f"swagger-ui-dist@{docs.SWAGGER_UI}", "--silent"]
    try:
        packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):  # npm asks again and again where nobody answers
        pytest.skip("needs the npm registry")
    with tarfile.open(folder / packed.stdout.strip()) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


@pytest.mark.parametrize("file", docs.DIGESTS)
def test_the_digests_are_those_of_the_npm_package(swagger_ui, file):
    digest = base64.b64encode(hashlib.sha384((swagger_ui / file).read_bytes()).digest()).decode()

    assert docs.DIGESTS[file] == f"sha384-{digest}"


def certificate(folder: Path) -> Path:
    """Make a key, and a certificate that nobody has signed, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, CDN)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def cdn(folder: Path) -> Iterator[int]:
    """Serve the files of a folder as the CDN does, on the port that this gives."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(folder))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def shown(service, swagger_ui, tmp_path) -> Callable[[Callable[[bytes], bytes]], tuple[str, list[str]]]:
    """Open the page in a browser, whose CDN has the files as `change` makes them; return what it shows and complains of."""

    def show(change: Callable[[bytes], bytes]) -> tuple[str, list[str]]:
        if BROWSER is None:
            pytest.skip("needs Chromium")
        files = tmp_path / "npm" / f"swagger-ui-dist@{docs.SWAGGER_UI}"
        files.mkdir(parents=True)
        for file in docs.DIGESTS:
            (files / file).write_bytes(change((swagger_ui / file).read_bytes()))
        with cdn(tmp_path) as port:
            options = ["--no-sandbox", "--headless", "--disable-gpu", "--ignore-certificate-errors", "--dump-dom"]
            waits = ["--virtual-time-budget=20000", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"]
            done = subprocess.run(
                [
                    BROWSER,
                    *options,
                    *waits,
                    f"--host-resolver-rules=MAP {CDN}:443 127.0.0.1:{port}",
                    f"{service.url}/docs",
                ],
                capture_output=True,
                text=True,
                timeout=120,
            )
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return show


def test_a_browser_shows_every_route(shown):
    page, complaints = shown(bytes)

    assert complaints == []
    assert "/models/flowers/predict" in re.sub(r"<[^>]*>|\u200b", "", page)
    assert 'id="operations-predictions-predict_flowers"' in page
    assert "could not be loaded" not in page


def test_a_browser_runs_no_file_that_is_another_one(shown):
    page, complaints = shown(lambda body: body + b"\n")

    assert len([line for line in complaints if "integrity" in line]) == len(docs.DIGESTS)
    assert "operations-" not in page
    assert "could not be loaded" in page
    assert 'href="openapi.json"' in page
