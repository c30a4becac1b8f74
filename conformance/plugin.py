"""A plugin of pytest: the fixture `s3` is the server that `make conformance` started, and what came out is counted."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from conformance.differences import DIFFERENCES
from conformance.server import Server

OUTCOME = "CONFORMANCE_OUTCOME"  # names the file that receives the counts


def server() -> Server:
    """Return the server, for `s3` in `tests/conftest.py`."""
    return Server.from_environment()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the tests of the local directory, and expect a known difference to show: gone, it is known no longer."""
    here = server()
    local = [item for item in items if "[local" in item.name]
    items[:] = [item for item in items if item not in local]
    config.hook.pytest_deselected(items=local)
    for difference in DIFFERENCES:
        if difference.kind == here.kind:
            mark = pytest.mark.xfail(reason=difference.why, strict=difference.version == here.version)
            for item in items:
                if {item.name, item.name.partition("[")[0]} & difference.tests:
                    item.add_marker(mark)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write down how many passed and failed, and how many were skipped or differed as known, with the reasons."""
    stats = terminalreporter.stats
    outcome = {
        "passed": len(stats.get("passed", ())) + len(stats.get("xpassed", ())),
        "skipped": Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", ())),
        "different": Counter(report.wasxfail for report in stats.get("xfailed", ())),
        "failed": len(stats.get("failed", ())) + len(stats.get("error", ())),
    }
    Path(os.environ[OUTCOME]).write_text(json.dumps(outcome))
