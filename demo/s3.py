"""A real S3 server on this machine, for `make run` and for the tests: SeaweedFS, or moto's server where that is missing.

It listens on 127.0.0.1 only and stops with the process that started it. SeaweedFS checks signatures and rights and
keeps its objects in a directory; moto does neither, and forgets them.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials

HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 5.0
LOG_TAIL_LINES = 20
GRPC_OFFSET = 10_000  # SeaweedFS answers gRPC on each of its ports plus this
BASE_PORTS = range(10_000, 22_000, 10)  # they and their gRPC ports lie below those that systems give to clients

Kind = Literal["seaweedfs", "moto"]

# The server replaces this process, and the kernel ends it when the thread that started it is gone, however that ended.
_TIED_TO_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerFailed(Exception):
    """The S3 server did not start; the message has the end of its log."""


@dataclass(frozen=True)
class Credentials:
    """What a client signs its requests with."""

    access_key_id: str
    secret_access_key: str


class S3Server:
    """A running S3 server with one bucket. `reader` may get and list, `writer` everything (with moto both may)."""

    def __init__(
        self, kind: Kind, process: subprocess.Popen[bytes], *, ports: Sequence[int], bucket: str, log: Path,
        writer: Credentials, reader: Credentials,
    ) -> None:  # fmt: skip
        self.kind = kind
        self.endpoint_url = f"http://{HOST}:{ports[0]}"
        self.bucket = bucket
        self.writer = writer
        self.reader = reader
        self._process = process
        self._ports = ports
        self._log = log

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server: politely, and after five seconds not. Once it is stopped this does nothing."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for port in self._ports:  # SeaweedFS leaves its sockets behind
            for own in (port, port + GRPC_OFFSET):
                for path in Path("/tmp").glob(f"seaweedfs-*-{own}.sock"):  # noqa: S108 - where SeaweedFS has them
                    path.unlink(missing_ok=True)

    def wait_until_ready(self) -> None:
        """Wait until both credentials are accepted, and make the bucket. Raises `ServerFailed`."""
        end = time.monotonic() + START_SECONDS
        answer = "nothing"
        while self._process.poll() is None and time.monotonic() < end:
            try:
                made = self._request(self.writer, "PUT", f"/{self.bucket}")
                listed = self._request(self.reader, "GET", f"/{self.bucket}?list-type=2&max-keys=1")
            except (OSError, http.client.HTTPException) as error:
                answer = type(error).__name__
            else:
                if made in (200, 409) and listed == 200:  # 409: it is there already
                    return
                answer = f"status {made} to making the bucket, {listed} to listing it"
            time.sleep(0.02)
        code = self._process.poll()
        ended = "does not answer" if code is None else f"ended with exit code {code}"
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        raise ServerFailed(
            "\n".join([f"{self.kind} {ended}; its last answer: {answer}. The end of {self._log}:", *lines])
        )

    def _request(self, credentials: Credentials, method: str, target: str) -> int:
        """Send one signed request without a body and return the status of the answer."""
        request = AWSRequest(method, self.endpoint_url + target, data=b"")
        identity = BotoCredentials(credentials.access_key_id, credentials.secret_access_key)
        S3SigV4Auth(identity, "s3", "us-east-1").add_auth(request)  # moto makes buckets without ado only there
        connection = http.client.HTTPConnection(HOST, self._ports[0], timeout=5.0)
        try:
            connection.request(method, target, headers=dict(request.headers))
            return connection.getresponse().status
        finally:
            connection.close()


def start(directory: Path, *, bucket: str = "models", port: int | None = None, kind: Kind | None = None) -> S3Server:
    """Start a server that keeps everything in `directory`, and return it when it answers.

    A later start on the same directory finds the same objects (SeaweedFS) and the same credentials. `port` is chosen
    when it is not given, and `kind` is what is installed. On Linux the server ends with the thread that called this.

    Raises `ServerFailed`.
    """
    directory = directory.absolute()
    (directory / "data").mkdir(parents=True, exist_ok=True)
    weed = Path(sys.executable).with_name("weed")
    if kind is None:
        kind = "seaweedfs" if weed.exists() else "moto"
    if kind == "moto" and importlib.util.find_spec("moto") is None:
        raise ServerFailed(f"there is no S3 server: expected {weed} or moto; install demo/requirements.txt")
    writer, reader = _identities(directory / "identities.json")
    ports = _free_ports(port)
    if kind == "seaweedfs":
        command = _seaweedfs(str(weed), directory, ports)
    else:
        command, reader = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(ports[0])], writer
    log = directory / "server.log"
    process = _spawn(command, log)
    server = S3Server(kind, process, ports=ports, bucket=bucket, log=log, writer=writer, reader=reader)
    try:
        server.wait_until_ready()
    except BaseException:
        server.stop()
        raise
    return server


def _seaweedfs(weed: str, directory: Path, ports: Sequence[int]) -> list[str]:
    names = ("s3", "master", "volume", "filer", "admin")
    return [
        weed,
        "-logtostderr",
        "mini",
        f"-dir={directory / 'data'}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *(f"-{name}.port={port}" for name, port in zip(names, ports, strict=True)),
        f"-s3.port.grpc={ports[1] - 1 + GRPC_OFFSET}",
        f"-s3.config={directory / 'identities.json'}",
        "-s3.autoCreateBucket=false",  # R2 answers NoSuchBucket
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",  # nothing leaves this machine
        "-volume.preStopSeconds=0",
    ]


def _spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *command]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is for the service, which still needs its storage then
        )


def _identities(path: Path) -> tuple[Credentials, Credentials]:
    """Return the writer and the reader of this directory; SeaweedFS reads the same file, nobody else may."""
    with contextlib.suppress(FileExistsError):
        identities = [
            {
                "name": name,
                "credentials": [{"accessKey": secrets.token_hex(16), "secretKey": secrets.token_hex(32)}],
                "actions": actions,
            }
            for name, actions in {"writer": ["Admin", "Read", "List", "Write"], "reader": ["Read", "List"]}.items()
        ]
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"identities": identities}, file, indent=1)
    keys = [identity["credentials"][0] for identity in json.loads(path.read_text())["identities"]]
    writer, reader = (Credentials(key["accessKey"], key["secretKey"]) for key in keys)
    return writer, reader


def _free_ports(port: int | None) -> list[int]:
    """Return the port for S3 (`port` if it is given) and four more whose gRPC ports are free as well."""
    if port is not None and not _is_free(port):
        raise ServerFailed(f"port {port} is in use")
    for base in random.sample(BASE_PORTS, len(BASE_PORTS)):
        ports = range(base, base + 5)
        if all(_is_free(own) and _is_free(own + GRPC_OFFSET) for own in ports):
            return [base if port is None else port, *ports[1:]]
    raise ServerFailed(f"no five ports in a row are free between {BASE_PORTS.start} and {BASE_PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections are no use
        try:
            candidate.bind((HOST, port))
        except OSError:
            return False
    return True
