"""A real memory control group of 512 MB, of whichever version this machine lets us make one of."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT_BYTES = 512 * 1024 * 1024
_numbers = itertools.count()


@dataclass(frozen=True)
class Group:
    """A group's folder, and the file in it that has the limit."""

    folder: Path
    file: Path

    def command(self, *words: str) -> tuple[str, ...]:
        """Return the command that runs `words` as a member of the group, by this Python where they begin with an option."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ("sh", "-c", enter, "sh", sys.executable, *words)

    @property
    def killed(self) -> int:
        """How many processes the kernel has killed in it for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                pairs = dict(line.split() for line in (self.folder / name).read_text().splitlines())
                return int(pairs["oom_kill"])
        raise AssertionError("the group does not tell")


@contextlib.contextmanager
def small_machine() -> Iterator[Group | str]:
    """Make a group of 512 MB for the length of a `with` block; yield why, where none can be made."""
    try:
        group = _make()
    except OSError as error:
        group = f"no memory control group can be made here: {error}"
    try:
        yield group
    finally:
        if isinstance(group, Group):
            group.folder.rmdir()


def _make() -> Group | str:
    name = f"diskless-test-{os.getpid()}-{next(_numbers)}"
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (v1 / "memory.limit_in_bytes").exists():
        folder, file = v1 / name, "memory.limit_in_bytes"
    elif "memory" in (v2 / "cgroup.subtree_control").read_text().split():
        folder, file = v2 / name, "memory.max"
    else:
        return "no memory controller whose groups could have a child"
    folder.mkdir()
    try:
        (folder / file).write_text(str(LIMIT_BYTES))
    except OSError:
        folder.rmdir()
        raise
    for swap, value in (("memory.memsw.limit_in_bytes", LIMIT_BYTES), ("memory.swap.max", 0)):
        with contextlib.suppress(OSError):  # a kernel without swap has none of them
            (folder / swap).write_text(str(value))
    return Group(folder, folder / file)
