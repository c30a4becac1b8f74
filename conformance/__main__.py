"""Run the tests of the storage against Ceph's radosgw and against Cloudflare's R2 emulator: `make conformance`.

A server that cannot be installed here is skipped, and the last lines say why. The exit code is 1 when a test failed, or
when a server that could be installed did not start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conformance import r2_emulator, radosgw
from conformance.plugin import OUTCOME
from conformance.server import Server, Unavailable
from demo.s3 import ServerFailed

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / ".conformance"
TESTS = ("tests/storage/test_contract.py", "tests/storage/test_r2.py")
TEST_SECONDS = 600.0
SERVERS = {module.NAME: module for module in (radosgw, r2_emulator)}


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=SERVERS, help="one of the servers; anything else is passed on to pytest")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where what is installed and logged lies")
    chosen, pytest_arguments = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    directory = chosen.directory.absolute()
    lines: list[str] = []
    good = True
    for name in [chosen.only] if chosen.only else SERVERS:
        began = time.monotonic()
        try:
            with SERVERS[name].running(directory) as server:
                started = time.monotonic()
                print(f"\n{name} ({server.version}) answers at {server.endpoint_url}", flush=True)
                line, passed = _test(server, directory, pytest_arguments)
        except KeyboardInterrupt:
            print("\ninterrupted: what was started has ended", file=sys.stderr)
            return 128 + signal.SIGINT
        except Unavailable as error:
            line, passed = f"skipped: {error}", True
        except ServerFailed as error:
            line, passed = f"failed to start: {error}", False
        else:
            line += f" [ready after {started - began:.1f} s, tests {time.monotonic() - started:.1f} s]"
        lines.append(f"{name}: {line}")
        good = good and passed
    print("", *lines, sep="\n")
    return 0 if good else 1


def _test(server: Server, directory: Path, arguments: list[str]) -> tuple[str, bool]:
    """Run the tests against `server`; return what came out in words, and whether it is good."""
    outcome = directory / server.kind / "outcome.json"
    outcome.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *TESTS, "-p", "conformance.plugin", "-p", "no:cacheprovider"]
    environment = os.environ | server.to_environment() | {OUTCOME: str(outcome)}
    try:
        code = subprocess.run(
            [*command, "--numprocesses=0", "--no-cov", "--tb=short", "--quiet", *arguments],
            cwd=ROOT,
            env=environment,
            timeout=TEST_SECONDS,
        ).returncode
    except subprocess.TimeoutExpired:
        return f"failed: the tests did not end within {TEST_SECONDS:.0f} s", False
    if not outcome.exists():
        return f"failed: pytest ended with exit code {code} before any test", False
    return _in_words(json.loads(outcome.read_text())), code == 0


def _in_words(outcome: dict[str, Any]) -> str:
    parts = []
    for what, counted in outcome.items():
        if isinstance(counted, int):
            parts.append(f"{what} {counted}")
        else:
            why = "; ".join(counted)
            parts.append(f"{what} {sum(counted.values())}" + (f" ({why})" if why else ""))
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
