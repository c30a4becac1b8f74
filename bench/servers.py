"""Services in processes of their own: started on one core, asked over HTTP, weighed, and ended."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from app import processes
from app.memory import MB
from venvs import Unavailable

HOST = "127.0.0.1"
START_SECONDS = 90.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.005
CLEARED = ("R2_", "AWS_", "ML_", "CLOUDFLARE_", "DYNO", "FORCE_R2", "PORT", "HOST", "WEB_CONCURRENCY", "MOSEC_")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Failed(Exception):
    """A service ended, or did not answer as it should; the message has the end of its log."""


class Cores(NamedTuple):
    """Where the services run, and where everything else does."""

    server: int
    load: int


def cores() -> Cores:
    """Return two cores that this process may use. Raises `Unavailable`."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        raise Unavailable("two cores are needed, one for the service and one for the load; this process may use one")
    return Cores(mine[0], mine[-1])


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a service: this one without what configures ours, and one thread for each library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CLEARED)}
    return kept | ONE_THREAD | {"NO_PROXY": HOST, "no_proxy": HOST} | dict(extra)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server((HOST, 0)) as sock:
        return int(sock.getsockname()[1])


def pinned(core: int) -> list[str]:
    """Return what goes before a command so that it runs on `core` only, and ends when the bench does."""
    return ["setpriv", "--pdeathsig", "TERM", "taskset", "-c", str(core)]


class Service:
    """A running service: one process, or a tree of them, all on one core and in a session of their own."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        core: int,
        extra: Mapping[str, str],
        folder: Path | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; `folder` is where it runs, an empty one unless given, `headers` is what it wants of each request."""
        self.port = port
        self.headers = dict(headers or {})
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [*pinned(core), *command],
            env=environment(extra),
            cwd=folder or self._folder.name,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    def ask(self, path: str, body: bytes | None = None, seconds: float = 30.0) -> tuple[int, bytes]:
        """Return the status and the body of an answer, to a POST if there is a body. Raises `OSError` or `HTTPException`."""
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port, timeout=seconds)) as connection:
            method = "GET" if body is None else "POST"
            connection.request(method, path, body, {"content-type": "application/json"} | self.headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def answered(self, path: str, body: bytes | None = None) -> tuple[float, bytes]:
        """Ask until it answers with 200; return the seconds since its start, and the answer. Raises `Failed`.

        With a body it is a POST, else a GET.
        """
        last = "nothing"
        while (waited := time.perf_counter() - self.started) < START_SECONDS:
            if self._process.poll() is not None:
                raise Failed(f"ended with exit code {self._process.returncode}: {self.log()}")
            try:
                status, answer = self.ask(path, body)
            except (OSError, http.client.HTTPException) as error:
                last = type(error).__name__
            else:
                if status == 200:
                    return time.perf_counter() - self.started, answer
                last = f"{status} {answer[:200]!r}"
            time.sleep(POLL_SECONDS)
        raise Failed(f"no answer within {waited:.0f} s, the last was {last}: {self.log()}")

    def cpu_seconds(self) -> float:
        """Return what its processes have computed, those that have ended included."""
        ticks = 0
        for pid in self._pids():
            with contextlib.suppress(OSError):
                ticks += sum(int(field) for field in _stat(pid)[11:15])  # user, system, and both of ended children
        return ticks / os.sysconf("SC_CLK_TCK")

    def pss_bytes(self) -> int:
        """Return what its processes hold in memory; what several share is counted once."""
        total = 0
        for pid in self._pids():
            with contextlib.suppress(OSError):
                total += processes.pss_bytes(pid)
        return total

    def log(self, characters: int = 1500) -> str:
        """Return the end of what it printed."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), characters, max(0, size - characters)).decode(errors="replace").strip()

    def stop(self) -> None:
        """End it and everything that it started: gently, and after a while not."""
        if self._log.closed:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        for pid in self._pids():  # its own session holds nothing but what it started
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def _pids(self) -> list[int]:
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and int(_stat(int(entry))[3]) == self._process.pid:
                    found.append(int(entry))
        return found


def _stat(pid: int) -> list[str]:
    """Return the fields of `/proc/PID/stat` from the state on (`man 5 proc`: field 3 is the first here)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def megabytes(size: float) -> float:
    """Return bytes as MB."""
    return size / MB
