"""A process that reads files while everything that it does is watched: `python -m tests.loading.watched`.

An order is a line of JSON, and so is the answer. What the watch sees it stops.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import scipy.stats
import sklearn.experimental.enable_halving_search_cv
import sklearn.experimental.enable_iterative_imputer  # noqa: F401 - lets what is named in the list be imported
import skops.io
import skops.io._audit

from app import loaders, memory
from app.errors import LoadFailed
from app.loading import allowlist
from tests.service import ROOT

ADDRESS_SPACE_BYTES = 6 * 2**30
LIBRARIES = tuple(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, ROOT / "app", "/proc/self", "/sys"))
RUNS = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pty.spawn", "subprocess.")
CHANGES = (
    *("os.chmod", "os.chown", "os.kill", "os.link", "os.mkdir", "os.putenv", "os.remove", "os.rename", "os.rmdir"),
    *("os.symlink", "os.truncate", "os.unsetenv", "os.utime", "shutil.", "tempfile."),
)
REACHES = ("ctypes.", "ftplib.", "http.", "mmap.", "smtplib.", "socket.", "urllib.", "webbrowser.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

MODULES = {".".join(name.split(".")[:depth]) for name in allowlist.KINDS for depth in range(1, name.count(".") + 1)}
MODULES |= {"encodings.raw_unicode_escape"}  # which texts of protocol 0 are in


class Watch:
    """Sees what happens between `begin` and `end`, by Python's own audit events."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._on = False
        sys.addaudithook(self._hear)

    def begin(self) -> None:
        self.seen = []
        self._on = True

    def end(self) -> list[str]:
        self._on = False
        return self.seen

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        if self._on and not self._is_harmless(event, details):
            self.seen.append(f"{event} {details!r:.200}")
            raise PermissionError(f"nothing that is read may do this: {event}")

    def _is_harmless(self, event: str, details: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = details
            if path in ("<string>", "<unknown>"):  # a warning is told with the line that it is about
                return bool(not flags & WRITES)
            return not flags & WRITES and (isinstance(path, int) or os.path.realpath(path).startswith(LIBRARIES))
        if event in ("exec", "compile"):
            name = details[0].co_filename if event == "exec" else os.fsdecode(details[1] or "<string>")
            # literal_eval, which runs nothing, reads the headers of arrays; scipy makes methods of its own distributions
            caller = sys._getframe(2).f_code.co_filename
            known = caller.endswith(("/ast.py", "/stats/_distn_infrastructure.py"))
            return known or name.startswith("<frozen") or os.path.realpath(name).startswith(LIBRARIES)
        if event == "import":
            return details[0] in MODULES or details[0].startswith("app.")
        return not event.startswith((*RUNS, *CHANGES, *REACHES))


def warm_up() -> None:
    """Import what the list names, and what reads it: all that is imported or made afterwards is a file's doing."""
    for name, kind in allowlist.KINDS.items():
        if kind in ("instances", "values"):
            allowlist.resolve(name)
    for compress in (0, ("zlib", 1), ("bz2", 1), ("xz", 1), ("lzma", 1), ("gzip", 1)):
        buffer = io.BytesIO()
        joblib.dump([np.zeros(3), np.random.RandomState(0), scipy.stats.uniform()], buffer, compress=compress)
        loaders.load("joblib", io.BytesIO(buffer.getvalue()), "warming up")
    loaders.load("skops", io.BytesIO(skops.io.dumps([np.zeros(3), np.random.RandomState(0)])), "warming up")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))


def load(order: dict[str, Any], body: bytes) -> Any:
    """Read a file; by joblib, as a server does that does not look, to show that the watch sees something."""
    if order["by"] == "joblib":
        return joblib.load(io.BytesIO(body))
    return loaders.load(order["format"], io.BytesIO(body), "a file", max_bytes=order["max_bytes"]).value


def main() -> None:
    warm_up()
    watch = Watch()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        body = Path(order["path"]).read_bytes()
        environment = dict(os.environ)
        memory.reset_peak()
        before = memory.resident_bytes()
        watch.begin()
        try:
            answer = {"loaded": type(load(order, body)).__name__}
        except LoadFailed as error:
            answer = {"refused": str(error), "kind": type(error).__name__}
        except PermissionError as error:
            answer = {"stopped": str(error)}
        answer |= {
            "did": watch.end(),
            "peak": memory.peak_bytes() - before,
            "children": Path("/proc/self/task", str(os.getpid()), "children").read_text(),
            "environment": os.environ == environment,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
