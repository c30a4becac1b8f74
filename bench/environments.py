"""The environments of the services that are measured beside ours: each its own, under `.bench/`."""

from __future__ import annotations

import sys
from pathlib import Path

import venvs
from venvs import ROOT

FOLDER = ROOT / ".bench"
PEERS = Path(__file__).parent / "peers"


def python(name: str) -> Path:
    """Return the interpreter of the environment that `bench/peers/NAME.txt` describes. Raises `venvs.Unavailable`."""
    return venvs.python(
        FOLDER / "environments" / name,
        PEERS / f"{name}.txt",
        lambda line: print(f"bench: {line}", file=sys.stderr, flush=True),
    )


def versions(name: str) -> dict[str, str]:
    """Return what `bench/peers/NAME.txt` pins."""
    lines = (PEERS / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
