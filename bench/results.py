"""`bench/RESULTS.md`: a section for each part of the bench, replaced when that part is measured again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

PATH = Path(__file__).parent / "RESULTS.md"
TITLE = "# Results\n\nWritten by `make bench`. Compare within a section: each was measured in one run, interleaved.\n"
LIBRARIES = ("scikit-learn", "numpy", "joblib", "skops", "aioboto3", "boto3", "aiohttp", "uvloop")


def write_section(name: str, body: str, path: Path = PATH) -> None:
    """Put `body` under the heading `name`, in the place of what was there."""
    text = path.read_text() if path.exists() else TITLE
    section = f"## {name}\n\n{body.strip()}\n"
    found = re.search(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        text = f"{text.rstrip()}\n\n{section}"
    else:
        text = f"{text[: found.start()]}{section}\n{text[found.end() :]}".rstrip() + "\n"
    path.write_text(text)


def described(command: str) -> str:
    """Return when, where and with what something is being measured."""
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, `{command}`. {_processor()}, {os.cpu_count()} cores, "
        f"{_memory_gib():.0f} GiB, {platform.system()} {platform.release()}; load averages before: {load}. "
        f"Python {platform.python_version()}, {libraries}."
    )


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: names to the left, figures to the right."""
    rule = ["---", *(["---:"] * (len(header) - 1))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Write the median, and in brackets the least and the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
