"""What the servers have in common: what a test knows of one, and how its processes are started, awaited and ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from demo.s3 import HOST, Credentials, ServerFailed

INSTALL_SECONDS = 600.0
START_SECONDS = 60.0
STOP_SECONDS = 10.0
BUCKET = "models"
LOG_TAIL_LINES = 20
VARIABLE = "CONFORMANCE_SERVER"
COMPLAINT = re.compile(r"(?:E:|ERROR:|npm error(?! (?:code|errno|syscall)\b)) (\S.*)")  # of apt-get, pip and npm


class Unavailable(Exception):
    """The server cannot be installed on this machine. The message says why, and what would help."""


@dataclass(frozen=True)
class Server:
    """A running S3 server with an empty bucket. `reader` is the `writer` again where a server knows only one key."""

    kind: str
    version: str
    endpoint_url: str
    writer: Credentials
    reader: Credentials
    bucket: str = BUCKET

    def to_environment(self) -> dict[str, str]:
        """Return the variable from which `from_environment` makes this again, in the process of the tests."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Self:
        """Return the server that `make conformance` started."""
        values: dict[str, Any] = json.loads(os.environ[VARIABLE])
        return cls(**values | {role: Credentials(**values[role]) for role in ("writer", "reader")})


class Processes:
    """Processes that write to logs in `directory`, and end with the `with` block, the last one first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running.values()):
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started itself, and left behind

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Start a process that goes on in the foreground; on Linux it also ends when this one was killed."""
        with self._log(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
                start_new_session=True,  # Ctrl-C in a terminal is for us, and we end them
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def run(self, name: str, command: Sequence[str | Path]) -> None:
        """Run a command to its end. Raises `ServerFailed` with the end of what it printed."""
        with self._log(name).open("wb") as log:
            try:
                code = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, timeout=START_SECONDS
                ).returncode
            except subprocess.TimeoutExpired:
                raise self._failure(name, f"did not end within {START_SECONDS:.0f} s") from None
        if code:
            raise self._failure(name, f"ended with exit code {code}")

    def wait_until_ready(self, server: Server, *, make_bucket: bool) -> None:
        """Wait until the bucket, made if `make_bucket`, can be listed with both keys. Raises `ServerFailed`."""
        writer, reader = client(server, server.writer), client(server, server.reader)
        end = time.monotonic() + START_SECONDS
        answer = "nothing"
        while time.monotonic() < end:
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise self._failure(name, f"ended with exit code {process.returncode}")
            try:
                if make_bucket:
                    writer.create_bucket(Bucket=server.bucket)
                    make_bucket = False
                for who in (writer, reader):
                    who.list_objects_v2(Bucket=server.bucket, MaxKeys=1)
                return
            except (BotoCoreError, ClientError) as error:
                answer = str(error)
                time.sleep(0.05)
        latest = [*self._running][-1]
        raise self._failure(latest, f"was not ready within {START_SECONDS:.0f} s; its last answer: {answer}")

    def _failure(self, name: str, what: str) -> ServerFailed:
        log = self._log(name)
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return ServerFailed("\n".join([f"{name} {what}. The end of {log}:", *lines]))

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"


def client(server: Server, credentials: Credentials) -> Any:
    """Return a boto client that tries once."""
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=credentials.access_key_id,
        aws_secret_access_key=credentials.secret_access_key,
        region_name="us-east-1",
        config=Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=30,
        ),
    )


def install(command: Sequence[str | Path], directory: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a package manager in `directory`. Raises `Unavailable` with the first line of what it complained of."""
    shown = " ".join(Path(word).name if isinstance(word, Path) else word for word in command)
    print(f"$ {shown}", flush=True)
    try:
        ran = subprocess.run(
            command,
            cwd=directory,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"`{shown}` did not end within {INSTALL_SECONDS:.0f} s") from None
    if ran.returncode:
        said = [line.strip() for line in ran.stdout.splitlines() if line.strip()]
        complaints = [match[1] for line in said if (match := COMPLAINT.match(line))]
        raise Unavailable(f"`{shown}` failed: {(complaints or said or [f'exit code {ran.returncode}'])[0]}")


def new_credentials() -> Credentials:
    """Return keys of the lengths that R2's have."""
    return Credentials(secrets.token_hex(16), secrets.token_hex(32))


def free_ports(count: int) -> list[int]:
    """Return `count` ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
