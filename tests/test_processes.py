"""What is told of processes, held against processes of which is known what they use."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.processes import Figures, family, figures

MB = 1 << 20
# Opens files, starts threads, takes memory and a child that does nothing; and says which that is.
_CODE = """
import os, subprocess, sys, threading, time
files = [open(os.devnull) for _ in range(20)]
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
memory = b"x" * (64 << 20)
child = subprocess.Popen([sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
for line in sys.stdin:
    end = time.process_time() + float(line)
    while time.process_time() < end:
        pass
    print("done", flush=True)
"""
# Computes in a child, waits for that, and stays.
_PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.6: pass"], check=True)
print("done", flush=True)
sys.stdin.read()
"""
# Shares memory with a child.
_FORKING = """
import os, sys
memory = b"x" * (64 << 20)
reading, writing = os.pipe()
child = os.fork()
if not child:
    os.close(writing)
    os.read(reading, 1)
    os._exit(0)
print(child, flush=True)
sys.stdin.read()
os.close(writing)
os.waitpid(child, 0)
"""


@pytest.fixture
def start():
    """Start Python with some code; afterwards it ends."""
    started: list[subprocess.Popen[str]] = []

    def begin(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.communicate()


def test_memory_files_threads_and_age_are_those_of_a_process_and_its_descendants(
    start: Callable[..., subprocess.Popen[str]],
):
    began = time.time()
    process = start(_CODE)
    child = int(process.stdout.readline())

    found = figures(process.pid)

    assert family(process.pid) == sorted([process.pid, child])
    assert found.memory_bytes.keys() == {process.pid, child}
    assert 64 * MB < found.memory_bytes[process.pid] < 128 * MB
    assert 0 < found.memory_bytes[child] < 32 * MB
    assert found.open_files == sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (process.pid, child)) >= 20
    assert found.threads == 4 + 1
    assert began - 1 < found.began < time.time() + 1


def test_what_processes_have_computed_is_told_also_when_they_have_ended(start: Callable[..., subprocess.Popen[str]]):
    process = start(_CODE)
    process.stdout.readline()
    before = figures(process.pid).cpu_seconds
    process.stdin.write("0.5\n")
    assert process.stdout.readline() == "done\n"
    assert 0.4 < figures(process.pid).cpu_seconds - before < 5

    parent = start(_PARENT)
    assert parent.stdout.readline() == "done\n"
    assert family(parent.pid) == [parent.pid]
    assert figures(parent.pid).cpu_seconds > 0.5


def test_what_is_shared_counts_in_parts(start: Callable[..., subprocess.Popen[str]]):
    process = start(_FORKING)
    child = int(process.stdout.readline())

    found = figures(process.pid).memory_bytes

    assert found.keys() == {process.pid, child}
    assert 64 * MB < sum(found.values()) < 100 * MB  # not twice 64
    assert min(found.values()) > 30 * MB


def test_a_process_that_is_not_there_uses_nothing(start: Callable[..., subprocess.Popen[str]]):
    process = start("print('done')")
    process.wait()

    assert family(process.pid) == []
    assert figures(process.pid) == Figures({}, 0.0, 0, 0, 0.0)
