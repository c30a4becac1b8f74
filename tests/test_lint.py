"""What `make lint` says of known vulnerabilities: found, not found, or not to be asked; pip-audit itself, and a service of ours."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import venvs
from lint import audit, environment
from tests.service import free_port

ROOT = Path(__file__).parent.parent
FLAW = {
    "id": "GHSA-1111-2222-3333",
    "aliases": ["CVE-2026-0001"],
    "published": "2026-01-01T00:00:00Z",
    "summary": "something",
    "affected": [
        {
            "package": {"name": "orjson", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
        }
    ],
}
needs_tools = pytest.mark.skipif(
    not (environment.FOLDER / "installed").exists(), reason="`make lint` installs pip-audit, and has not been run"
)


@contextmanager
def service(answers: dict[str, Any], status: int = 200) -> Iterator[str]:
    """Answer as OSV does: with the flaws of a package by name. Yields the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            found = answers.get(asked["package"]["name"])
            body = json.dumps({"vulns": [found]} if found else {}).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()
            thread.join()


def asked(requirements: Path, url: str) -> audit.Audit:
    return audit.audit(
        environment.FOLDER / "bin" / "python", requirements, ["--vulnerability-service", "osv", "--osv-url", url]
    )


@needs_tools
def test_a_known_vulnerability_is_named_and_fails():
    with service({"orjson": FLAW}) as url:
        found = asked(ROOT / "requirements.txt", url)

    (line,) = found.lines
    assert found.failed
    assert re.fullmatch(
        r"orjson [\d.]+ is vulnerable: (GHSA-1111-2222-3333|CVE-2026-0001) \(.+\), fixed in 99\.0", line
    )


@needs_tools
def test_what_has_none_passes_and_says_how_much_was_looked_at():
    with service({}) as url:
        found = asked(ROOT / "requirements.txt", url)

    assert not found.failed
    assert re.fullmatch(r"no known vulnerability in \d\d pinned packages", found.lines[0])


@needs_tools
@pytest.mark.parametrize("how", ["refused", "broken"])
def test_a_service_that_cannot_be_asked_is_a_line_and_no_failure(how):
    if how == "refused":
        found = asked(ROOT / "requirements.txt", f"http://127.0.0.1:{free_port()}/")
    else:
        with service({}, status=503) as url:
            found = asked(ROOT / "requirements.txt", url)

    (line,) = found.lines
    assert not found.failed
    assert line.startswith("known vulnerabilities were not looked for, the service cannot be asked here: ")
    assert len(line) < 300
    assert "\n" not in line


@needs_tools
def test_requirements_that_are_none_fail(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("orjson>=3\n")  # which version that is, nobody knows
    with service({}) as url:
        found = asked(path, url)

    assert found.failed
    assert found.lines[0].startswith("pip-audit failed: ")


def test_a_service_that_knows_nothing_was_not_asked():
    found = audit._told([{"name": "a", "skip_reason": "not found"}, {"name": "b", "skip_reason": "not found"}])

    assert not found.failed
    assert "cannot be asked here" in found.lines[0]


def test_what_the_service_does_not_know_is_named():
    found = audit._told([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}])

    assert found == audit.Audit(
        ("no known vulnerability in 1 pinned packages", "not known to the service, so not looked at: b"), failed=False
    )


def test_tools_that_cannot_be_installed_are_a_reason_and_no_stack_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(venvs.Unavailable, match="cannot be installed: ERROR: "):
        environment.python(tmp_path / "tools")
    assert not (tmp_path / "tools" / "installed").exists()


def test_tools_that_are_there_are_not_installed_again(tmp_path):
    wanted = hashlib.sha256(environment.REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    (tmp_path / "installed").write_text(wanted)

    assert environment.python(tmp_path) == tmp_path / "bin" / "python"


def test_every_tool_and_what_it_requires_is_pinned():
    lines = environment.REQUIREMENTS.read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]

    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert len({pin.partition("==")[0].lower() for pin in pins}) == len(pins)


@needs_tools
def test_the_tools_are_those_that_are_pinned():
    listed = subprocess.run(
        [environment.FOLDER / "bin" / "python", "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    there = {re.sub(r"[-_.]+", "-", it["name"]).lower(): it["version"] for it in json.loads(listed)}
    lines = environment.REQUIREMENTS.read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))

    assert {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()} == {
        name: version for name, version in there.items() if name != "pip"
    }


def test_every_exception_to_a_rule_has_its_reason_beside_it():
    marked = [
        (f"{path.relative_to(ROOT)}:{number}", line.partition("# no")[2])
        for path in (ROOT / "app").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"# (noqa: S\d|nosec)", line)
    ]

    assert marked
    assert [where for where, mark in marked if not re.search(r"\d - \w", mark)] == []
    assert all(audit.ACCEPTED.values())
