"""What is asked of the kernel about processes and threads: where they are forked, and for whoever wants to know what they use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

LOOKS = 3  # at processes that come and go meanwhile
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


class Figures(NamedTuple):
    """What processes use together. `memory_bytes` is by process id: what is shared counts in parts (PSS), where the kernel tells.

    `cpu_seconds` has that of children that have ended, too; `began` is when the first of the processes did, in seconds since 1970.
    """

    memory_bytes: Mapping[int, int]
    cpu_seconds: float
    open_files: int
    threads: int
    began: float


def figures(root: int, others: Iterable[int] = ()) -> Figures:
    """Return what a process uses with all its descendants (and with `others`, where the kernel does not list children).

    It reads /proc, which takes longer the more memory there is: for a thread.
    """
    for _ in range(LOOKS):
        pids = family(root, others)
        found = _figures(pids)
        # What a process has used that ends meanwhile may be counted with it and with its parent, or with neither.
        if family(root, others) == pids:
            break
    return found


def family(root: int, others: Iterable[int] = ()) -> list[int]:
    """Return the ids of a process, its descendants and `others`, as far as they are there."""
    found: list[int] = []
    waiting = [root, *others]
    while waiting:
        pid = waiting.pop()
        if pid in found:
            continue
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        found.append(pid)
        for task in tasks:
            with contextlib.suppress(OSError):  # it has ended, or the kernel was built without this file
                waiting += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return sorted(found)


def _figures(pids: Iterable[int]) -> Figures:
    memory_bytes: dict[int, int] = {}
    ticks, open_files, threads, began = 0, 0, 0, []
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # see proc_pid_stat(5)
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
        threads += int(fields[17])
        began.append(int(fields[19]))
        with contextlib.suppress(OSError):  # that of another user, or of one that has ended
            open_files += len(os.listdir(f"/proc/{pid}/fd"))
            memory_bytes[pid] = pss_bytes(pid)
    hertz = os.sysconf("SC_CLK_TCK")
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) if began else 0.0
    return Figures(memory_bytes, ticks / hertz, open_files, threads, booted + min(began, default=0) / hertz)


def pss_bytes(pid: int) -> int:
    """Return what a process holds in memory, what it shares in parts (PSS). Raises `OSError` for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):  # a kernel without it
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
