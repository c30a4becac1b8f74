"""The soak itself works: a short one, of which memory cannot be told yet."""

import subprocess
import sys

from tests.service import ROOT


def test_a_short_soak_finds_answers_and_nothing_wrong():
    words = [sys.executable, "-m", "tests.soak", "--seconds", "12", "--seed", "4"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: 0;" in done.stdout
    assert "exit code after SIGTERM: 0" in done.stdout
