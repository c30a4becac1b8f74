"""The environment of the tools, under `.lint/`: made once, and anew where what it consists of has changed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".lint"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
INSTALL_SECONDS = 600.0


class Unavailable(Exception):
    """The tools cannot be had on this machine; the message says why."""


def python(folder: Path = FOLDER) -> Path:
    """Return the interpreter that has the tools. Raises `Unavailable`."""
    interpreter, stamp = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return interpreter
    print("Installing lint/requirements.txt (once)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(interpreter), *install]):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.CalledProcessError as error:
            last = ([line for line in error.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
            raise Unavailable(f"lint/requirements.txt cannot be installed: {last.strip()}") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"lint/requirements.txt was not installed within {INSTALL_SECONDS:.0f} s") from error
    stamp.write_text(wanted)
    return interpreter
