"""What loading a version takes in memory, measured where it can be measured alone: in a process of its own."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

from app import loaders
from app.compiled.program import Program
from app.manifest import PROGRAM_FORMAT
from app.memory import Taken, peak_bytes, reset_peak, resident_bytes, trim_heap
from app.signature import Signature


class Trial(NamedTuple):
    """What a program is asked once it is loaded, as engines make up their minds then: a signature as JSON, instances, a method."""

    signature: str
    instances: list[Any]
    method: str


def measure(
    parts: Sequence[tuple[str, bytes]],
    *,
    trusted: frozenset[str] = frozenset(),
    trial: Trial | None = None,
    timeout_seconds: float = 600.0,
) -> Taken | None:
    """Load artifacts, each a format and its bytes, in a process of its own; return what that took beyond the libraries.

    They are loaded twice, the first time to import what they need; `trusted` is as for `loaders.load`. A program is asked the
    `trial` as well. The bytes go through a pipe: nothing is written to disk. None when it cannot be told: the process failed, was
    killed, or took too long.
    """
    header = {
        "path": sys.path,
        "trusted": sorted(trusted),
        "parts": [(format, len(body)) for format, body in parts],
        "trial": trial,
    }
    try:
        process = subprocess.Popen(  # noqa: S603 - this very interpreter
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return None
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = threading.Timer(timeout_seconds, process.kill)
    deadline.start()
    answer = b""
    try:
        with process.stdin as stdin:
            stdin.write(json.dumps(header).encode("ascii") + b"\n")
            for _, body in parts:
                stdin.write(body)
        answer = process.stdout.read()
    except OSError:  # it has ended before it had read everything
        pass
    finally:
        deadline.cancel()
        process.kill()
        process.stdout.close()
        process.wait()
    try:
        resident, peak = json.loads(answer)
    except (ValueError, TypeError):
        return None
    return Taken(resident, peak)


# The parent's import path makes ours out of it, with the modules that a model's own classes are in.
_CHILD = """
import json, sys
header = json.loads(sys.stdin.buffer.readline())
sys.path[:] = header["path"]
from app.measuring import _answer
_answer(sys.stdin.buffer, header["parts"], frozenset(header["trusted"]), header["trial"])
"""


def _answer(
    stdin: IO[bytes], sizes: Sequence[tuple[str, int]], trusted: frozenset[str], trial: Sequence[Any] | None
) -> None:
    """Be the process that measures: load the parts that follow on `stdin`, and write what it took to `stdout`."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model prints is no answer
    parts = [(format, stdin.read(size)) for format, size in sizes]
    _load(parts, trusted, trial)
    gc.collect()
    trim_heap()
    reset_peak()  # where it may not be, the peak of the first load counts, which is a little more
    before = resident_bytes()
    values = _load(parts, trusted, trial)
    peak = peak_bytes() - before
    gc.collect()
    trim_heap()
    resident = resident_bytes() - before
    del values
    with answer:
        json.dump([max(0, resident), max(0, peak, resident)], answer)


def _load(parts: Sequence[tuple[str, bytes]], trusted: frozenset[str], trial: Sequence[Any] | None) -> list[Any]:
    values: list[Any] = []
    for format, body in parts:
        if format != PROGRAM_FORMAT:
            values.append(loaders.load(format, io.BytesIO(body), "a part", trusted=trusted).value)
            continue
        program = Program.read(io.BytesIO(body), len(body))
        values.append(program)
        if trial is not None:
            signature, instances, method = trial
            for count in (1, len(instances)):
                program.run(Signature.model_validate_json(signature).validate(instances[:count]), method)
    return values
