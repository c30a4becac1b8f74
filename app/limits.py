"""What strangers may take of this process: time, connections, open files, and memory for what they send."""

from __future__ import annotations

import contextlib
import resource
import sys
from typing import NamedTuple

COUNTED_BYTES = 64 * 1024  # smaller bodies are bounded by the number of connections
# Of larger bodies the rows are counted. Rows of numbers take up to 16 times the bytes of their body, so those of smaller bodies
# take no more than 64 MB where as many wait for a model as may by default.
WEIGHED_BYTES = 4096
FILES_BESIDE = 128  # that the process opens for other things than its callers: the bucket, models, other processes
FEWEST_CONNECTIONS = 16  # however few files may be open


class Limits(NamedTuple):
    """What the connections of one server may take. `connections.py` says from when to when the times are."""

    header_timeout_seconds: float
    body_timeout_seconds: float
    keep_alive_seconds: float
    max_connections: int


class PendingBytes:
    """How many bytes of request bodies, or of the rows in them, all requests hold together, and how many they may.

    Belongs to the event loop.
    """

    __slots__ = ("held", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    def fits(self, count: int) -> bool:
        """Whether so many bytes more may be held."""
        return self.held + count <= self.most

    def refusal(self, count: int) -> str:
        """Say why so many bytes more may not."""
        return (
            f"requests with {self.held} bytes are being answered or read; {count} more would be above the limit of "
            f"{self.most}: try again"
        )


class Claim:
    """The bytes that one request holds of those."""

    __slots__ = ("_pending", "held")

    def __init__(self, pending: PendingBytes) -> None:
        self._pending = pending
        self.held = 0

    def hold(self, total: int, *, even_if_full: bool = False) -> bool:
        """Hold so many bytes from now on; return False, and hold what was held, if they do not fit."""
        more = total - self.held
        if not (even_if_full or self._pending.fits(more)):
            return False
        self._pending.held += more
        self.held = total
        return True

    def hold_rows(self, weight: int) -> bool:
        """Hold the bytes that a body's rows take instead of its own. What is there alone may be of any size."""
        return self.hold(weight, even_if_full=self._pending.held == self.held)

    def release(self) -> None:
        """Hold nothing any more. May be called again."""
        self._pending.held -= self.held
        self.held = 0


def allow_files(connections: int) -> None:
    """Raise this process's limit on open files so far that so many connections fit, or as far as it may be."""
    needed = connections + FILES_BESIDE
    if files_allowed() >= needed:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(OSError, ValueError):  # a system may have a limit of its own above which it says no
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def connections_within_files(connections: int) -> int:
    """Return how many connections this process may have open: so many, or fewer where its limit on open files is low."""
    return min(connections, max(FEWEST_CONNECTIONS, files_allowed() - FILES_BESIDE))


def files_allowed() -> int:
    """Return how many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
