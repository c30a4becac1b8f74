"""The real process on a real port: starts `python -m app serve` (or another command), and stops what it started."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from demo.s3 import Credentials
from tests.trusted import TRUST

ROOT = Path(__file__).parent.parent
ADMIN_KEY = "the-administrator-of-the-tests"
AS_ADMIN = {"x-api-key": ADMIN_KEY}
COMMAND = (sys.executable, "-m", "app", "serve")


def serving_after(code: str) -> tuple[str, ...]:
    """Return the command of the service in a process that has run something before."""
    return sys.executable, "-c", f"{code}; from app.cli import main; raise SystemExit(main(['serve']))"


# The same service, but that the ASGI application answers what the protocol would.
AS_ASGI = serving_after(
    "from app import direct; from app.protocol import DrainingProtocol; direct.protocol_for = lambda front: DrainingProtocol"
)


# Below those that the system gives to whoever asks for any, and those of the S3 servers: each of pytest's processes has its own.
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_BLOCK = range(2000 + 1000 * (_PROCESS % 8), 3000 + 1000 * (_PROCESS % 8))
_ports = itertools.cycle([*_BLOCK[(at := random.randrange(1000)) :], *_BLOCK[:at]])


def free_port() -> int:
    """Return a port that nobody has, and that nobody else is given until it is taken."""
    for port in itertools.islice(_ports, len(_BLOCK)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError(f"no port is free in {_BLOCK}")


def r2_environment(endpoint_url: str, bucket: str, credentials: Credentials) -> dict[str, str]:
    return {
        "R2_ENDPOINT_URL": endpoint_url,
        "R2_BUCKET": bucket,
        "R2_ACCESS_KEY_ID": credentials.access_key_id,
        "R2_SECRET_ACCESS_KEY": credentials.secret_access_key,
    }


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The machine's environment without what configures the service, and what a test sets. Our own code is trusted."""
    ours = ("R2_", "AWS_", "ML_", "CLOUDFLARE_", "DYNO", "FORCE_R2", "OTEL_", "PORT", "HOST", "WEB_CONCURRENCY")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    ours_too = {"ML_TRUSTED_TYPES": ",".join(TRUST.types), "ML_ADMIN_KEYS": f"tests:{ADMIN_KEY}"}
    return kept | {"PYTHONPATH": str(ROOT)} | ours_too | dict(extra)


class Service:
    """A running service. Its standard output and error are in `log()`."""

    def __init__(
        self,
        environment: Mapping[str, str],
        command: Sequence[str] = COMMAND,
        cwd: Path | None = None,
        own_group: bool = False,
    ) -> None:
        self.port = int(environment.get("PORT", "0")) or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        self._folder = tempfile.TemporaryDirectory() if cwd is None else None
        self.began = time.time()
        self.process = subprocess.Popen(
            command,
            env=clean_environment({"HOST": "127.0.0.1", **environment, "PORT": str(self.port)}),
            cwd=cwd or (self._folder.name if self._folder else None),  # no .env of this checkout
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=own_group,
        )
        # Tests take it that they ask over one connection: it must outlast what keeps them from it for a while.
        kept = httpx.Limits(keepalive_expiry=60)
        self.client = httpx.Client(base_url=self.url, headers=AS_ADMIN, timeout=120, trust_env=False, limits=kept)

    def log(self) -> str:
        self._log.flush()
        return os.pread(self._log.fileno(), 10_000_000, 0).decode()

    def told(self, count: int, *containing: str) -> list[str]:
        """The lines of the log that have all of this in them, once there are so many: an answer is told of after it was sent."""
        end = time.monotonic() + 60
        while True:
            lines = [line for line in self.log().splitlines() if all(text in line for text in containing)]
            if len(lines) >= count or time.monotonic() > end:
                assert len(lines) == count, lines
                return lines
            time.sleep(0.01)

    def wait_live(self, seconds: float = 180) -> Service:
        self._wait(lambda: self.client.get("/health/live").status_code == 200, "live", seconds)
        return self

    def wait_ready(self, seconds: float = 180) -> Service:
        self._wait(lambda: self.client.get("/health/ready").status_code == 200, "ready", seconds)
        return self

    def wait_for(self, condition: Callable[[dict[str, Any]], Any], what: str, seconds: float = 180) -> dict[str, Any]:
        """Wait until the status fulfils a condition, and return that status: the next one may not."""
        found: dict[str, Any] = {}

        def holds() -> Any:
            nonlocal found
            found = self.status()
            return condition(found)

        self._wait(holds, what, seconds)
        return found

    def status(self) -> dict[str, Any]:
        return self.client.get("/models/status").json()  # type: ignore[no-any-return]

    def model(self, name: str) -> dict[str, Any]:
        """The one row of the status for a name (the last, where it has several)."""
        return [row for row in self.status()["models"] if row["name"] == name][-1]

    def predict(self, **request: Any) -> httpx.Response:
        return self.client.post("/predict", json=request)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 120) -> int:
        """Stop the process and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.client.close()
        if not self._log.closed:
            self._log.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _wait(self, condition: Callable[[], Any], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"the service ended with {self.process.returncode}:\n{self.log()[-3000:]}")
            with contextlib.suppress(httpx.TransportError):
                if condition():
                    return
            time.sleep(0.02)
        raise AssertionError(f"not {what} in {seconds} s:\n{self.log()[-3000:]}")


@contextlib.contextmanager
def running(environment: Mapping[str, str], **options: Any) -> Iterator[Service]:
    """Run the service for the length of a `with` block."""
    service = Service(environment, **options)
    try:
        yield service
    finally:
        service.close()


@contextlib.asynccontextmanager
async def connected(host: str, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a bare connection for the length of an `async with` block."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):  # the other side was faster
            await writer.wait_closed()
