"""What is asked of the kernel about processes and threads, where they are forked."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def how_it_ended(status: int) -> str:
    """Say how a process ended, from what waitpid(2) tells."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name
    return f"by {name}" + (", most likely because there was no memory left" if -code == signal.SIGKILL else "")


def other_threads(seconds: float = 0.0) -> str | None:
    """Return the names of the threads beside this one, after they had `seconds` to end; None where there is none."""
    deadline = time.monotonic() + seconds
    while names := _other_threads():
        if time.monotonic() >= deadline:
            return ", ".join(names)
        time.sleep(0.001)
    return None


def _other_threads() -> list[str]:
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    tasks = Path("/proc/self/task")
    try:
        numbers = {int(task.name) for task in tasks.iterdir()}
    except OSError:
        numbers = set(filter(None, known))
    names = []
    for number in sorted(numbers - {threading.get_native_id()}):
        try:
            names.append(known.get(number) or (tasks / str(number) / "comm").read_text().strip())
        except OSError:  # it has ended meanwhile
            continue
    return names
