"""The environments of the services that are measured beside ours: each its own, under `.bench/`, made once."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".bench"
PEERS = Path(__file__).parent / "peers"
INSTALL_SECONDS = 600.0


class Unavailable(Exception):
    """Something cannot be had on this machine; the message says what, and why."""


def python(name: str) -> Path:
    """Return the interpreter of the environment that `bench/peers/NAME.txt` describes, made anew where that changed.

    Raises `Unavailable`.
    """
    requirements, folder = PEERS / f"{name}.txt", FOLDER / "environments" / name
    interpreter, stamp = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return interpreter
    print(f"bench: installing {requirements.name} (once)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(interpreter), *install]):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.CalledProcessError as error:
            last = ([line for line in error.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
            raise Unavailable(f"{requirements.name} cannot be installed: {last}") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{requirements.name} was not installed within {INSTALL_SECONDS:.0f} s") from error
    stamp.write_text(wanted)
    return interpreter


def versions(name: str) -> dict[str, str]:
    """Return what `bench/peers/NAME.txt` pins."""
    lines = (PEERS / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
