"""The environment of the tools, under `.lint/`."""

from __future__ import annotations

from pathlib import Path

import venvs

FOLDER = venvs.ROOT / ".lint"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def python(folder: Path = FOLDER) -> Path:
    """Return the interpreter that has the tools. Raises `venvs.Unavailable`."""
    return venvs.python(folder, REQUIREMENTS, lambda line: print(f"lint: {line}", flush=True))
