"""wrk, which sends the load, and what it tells."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.servers import pinned
from venvs import Unavailable

SCRIPT = Path(__file__).parent / "load.lua"
MARK = "wrk-figures "  # what the script's line begins with
HANG_SECONDS = 30.0
MOST_SECONDS = 900


class Load(NamedTuple):
    """What one run of wrk found. Its latencies are corrected for coordinated omission, as wrk does it."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int  # answers of status 400 and more, timeouts, and what failed on the socket

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def available() -> None:
    """Install wrk with apt where it is missing, which root may. Raises `Unavailable`."""
    if shutil.which("wrk"):
        return
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid():
        raise Unavailable(
            "wrk is missing: install it (`apt-get install wrk` as root, `brew install wrk`) and run again"
        )
    try:
        for arguments in (("update",), ("install", "--yes", "wrk")):
            subprocess.run([apt, *arguments], check=True, capture_output=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"wrk is missing, and apt-get cannot install it: {error}") from error


def words(
    url: str,
    bodies: Path,
    *,
    connections: int,
    seconds: int,
    core: int,
    request_ids: bool = False,
    headers: Mapping[str, str] | None = None,
) -> list[str]:
    """Return the command that posts the lines of `bodies` in turn, over connections that are kept, from `core`."""
    further = [word for name, value in (headers or {}).items() for word in ("-H", f"{name}: {value}")]
    mode = "ids" if request_ids else "plain"
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", *further, "-s", str(SCRIPT)]
    return [*pinned(core), "wrk", *options, url, "--", str(bodies), mode]


def run(url: str, bodies: Path, *, seconds: int, **how: Any) -> Load:
    """Run it to its end, as `words` has it. Raises `ValueError` when it tells nothing, and `subprocess.TimeoutExpired`."""
    command = words(url, bodies, seconds=seconds, **how)
    finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds + HANG_SECONDS, check=False)
    return parse(finished.stdout + finished.stderr)


@contextlib.contextmanager
def running(url: str, bodies: Path, *, connections: int, core: int, found: list[Load]) -> Iterator[None]:
    """Run it for as long as the block lasts, then add to `found` what it tells."""
    command = words(url, bodies, connections=connections, seconds=MOST_SECONDS, core=core)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield
        process.send_signal(signal.SIGINT)  # upon which it stops and tells
        printed, _ = process.communicate(timeout=HANG_SECONDS)
        found.append(parse(printed))
    finally:
        process.kill()
        process.wait()


def parse(printed: str) -> Load:
    """Read the line that the script prints at the end. Raises `ValueError` when there is none."""
    for line in printed.splitlines():
        if line.startswith(MARK):
            found = json.loads(line.removeprefix(MARK))
            return Load(
                requests=int(found["requests"]),
                seconds=found["microseconds"] / 1e6,
                p50_ms=found["p50"] / 1000,
                p99_ms=found["p99"] / 1000,
                errors=sum(int(found[kind]) for kind in ("connect", "read", "write", "status", "timeout")),
            )
    raise ValueError(f"wrk told no figures: {printed.strip()[-500:]!r}")
