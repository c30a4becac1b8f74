"""Environments beside `.venv`, for programs whose packages would not go together with ours: made once, and anew where their requirements changed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent
INSTALL_SECONDS = 600.0


class Unavailable(Exception):
    """Something cannot be had on this machine; the message says what, and why."""


def python(folder: Path, requirements: Path, tell: Callable[[str], None]) -> Path:
    """Return the interpreter of the environment in `folder` that has these requirements; `tell` is told that it is being made.

    Raises `Unavailable`.
    """
    interpreter, stamp = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return interpreter
    name = requirements.relative_to(ROOT)
    tell(f"installing {name} (once)")
    shutil.rmtree(folder, ignore_errors=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(interpreter), *install]):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.CalledProcessError as error:
            last = ([line for line in error.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
            raise Unavailable(f"{name} cannot be installed: {last.strip()}") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{name} was not installed within {INSTALL_SECONDS:.0f} s") from error
    stamp.write_text(wanted)
    return interpreter
