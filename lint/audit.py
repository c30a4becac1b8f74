"""Known vulnerabilities of what is pinned: what pip-audit says of a requirements file, told apart from that it could not ask.

pip-audit ends with 1 in either case, and with a stack trace where the network fails. Only its JSON says which it was.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCEPTED: dict[str, str] = {}
"""Vulnerabilities by id that cannot harm here, each with the reason. They are not told again."""

TIMEOUT_SECONDS = 15
AUDIT_SECONDS = 300.0
# How pip-audit ends when the service, or the way to it, failed: none of it is about what is pinned.
_UNREACHABLE = re.compile(
    r"requests\.exceptions\.|urllib3\.exceptions\.|network may be blocking|pip_audit\._service\.|json\.decoder"
)


@dataclass(frozen=True, slots=True)
class Audit:
    """What came of it, in lines for a person. `failed`: somebody has to do something about it."""

    lines: tuple[str, ...]
    failed: bool


def audit(python: Path, requirements: Path, arguments: Sequence[str] = ()) -> Audit:
    """Ask for every package in a file of pinned requirements; `arguments` go to pip-audit, which `python` has."""
    command = [str(python), "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
    command += ["--progress-spinner", "off", "--format", "json", "--timeout", str(TIMEOUT_SECONDS), *arguments]
    for identity in ACCEPTED:
        command += ["--ignore-vuln", identity]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_SECONDS)
    except subprocess.TimeoutExpired:
        return _unasked(f"no answer within {AUDIT_SECONDS:.0f} s")
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        if _UNREACHABLE.search(done.stderr):
            return _unasked(said[-1])
        return Audit((f"pip-audit failed: {said[-1][:300]}",), failed=True)
    return _told(found)


def _told(found: Sequence[dict[str, Any]]) -> Audit:
    skipped = [package["name"] for package in found if "skip_reason" in package]
    if skipped and len(skipped) == len(found):
        return _unasked("the service knows none of the packages")
    lines = [
        f"{package['name']} {package['version']} is vulnerable: {fault['id']}{_aliases(fault)}, {_remedy(fault)}"
        for package in found
        for fault in package.get("vulns", ())
    ]
    failed = bool(lines)
    if not failed:
        lines.append(f"no known vulnerability in {len(found) - len(skipped)} pinned packages")
    if skipped:
        lines.append(f"not known to the service, so not looked at: {', '.join(skipped)}")
    return Audit(tuple(lines), failed)


def _aliases(fault: dict[str, Any]) -> str:
    return f" ({', '.join(fault['aliases'])})" if fault.get("aliases") else ""


def _remedy(fault: dict[str, Any]) -> str:
    return f"fixed in {', '.join(fault['fix_versions'])}" if fault.get("fix_versions") else "not fixed yet"


def _unasked(why: str) -> Audit:
    return Audit(
        (f"known vulnerabilities were not looked for, the service cannot be asked here: {why[:200]}",), failed=False
    )
