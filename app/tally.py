"""The counters of all processes, in memory that all processes of a service share: whoever is asked can add them up.

They outlive the processes that count: what follows a dead one counts on, and a version that a later generation serves again
soon enough keeps its numbers.
"""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Collection, Hashable, MutableSequence
from typing import cast

from app.counters import KEPT_SECONDS, MAX_KEPT, Counters
from app.rates import MAX_CALLERS
from app.service_counters import ServiceCounters

ROWS = 4096  # versions that are counted at a time; untouched rows take no memory
GENERATIONS = 4  # whose workers may be there at the same time, the older ones on their way out


class Tally:
    """Cells by row (a version of a model) and seat (a worker). Made before the first fork; each worker has its own seat.

    What is no version's (`ServiceCounters`) is counted beside the rows, by seat too; there whoever looks at the bucket has a seat of
    its own, the last: it is one process at a time.
    """

    def __init__(self, workers: int) -> None:
        self._seats = workers * GENERATIONS
        self._workers = workers
        self._memory = mmap.mmap(-1, ROWS * self._seats * Counters.CELLS * 8)
        self._cells = memoryview(self._memory).cast("Q")
        # for each caller when its tokens will all be there again: `app/rates.py`
        self.spent = cast(MutableSequence[float], memoryview(mmap.mmap(-1, 8 * MAX_CALLERS)).cast("d"))
        self._service = memoryview(mmap.mmap(-1, (self._seats + 1) * ServiceCounters.CELLS * 8)).cast("Q")

    @property
    def looking_seat(self) -> int:
        """Where the process counts that looks at the bucket. It has no counters of versions."""
        return self._seats

    def seat(self, generation: int, number: int) -> int:
        """Return where worker `number` of a generation counts."""
        return generation % GENERATIONS * self._workers + number

    def counters(self, row: int, seat: int) -> Counters:
        """Return the counters of one version in one worker."""
        start = (row * self._seats + seat) * Counters.CELLS
        return Counters(cast(MutableSequence[int], self._cells[start : start + Counters.CELLS]))

    def total(self, row: int) -> Counters:
        """Return what all workers together have counted for a version."""
        return Counters.sum(self.counters(row, seat) for seat in range(self._seats))

    def service_cells(self, seat: int) -> MutableSequence[int]:
        """Return the cells of the `ServiceCounters` of one seat."""
        start = seat * ServiceCounters.CELLS
        return cast(MutableSequence[int], self._service[start : start + ServiceCounters.CELLS])

    def service_total(self) -> ServiceCounters:
        """Return what all processes together have counted that is no version's."""
        return ServiceCounters.sum(ServiceCounters(self.service_cells(seat)) for seat in range(self._seats + 1))

    def clear(self, row: int) -> None:
        """Begin to count at 0: the row is another version's from here on."""
        size = self._seats * Counters.CELLS * 8
        self._memory[row * size : (row + 1) * size] = bytes(size)


class Ledger[Key: Hashable]:
    """Which row each version is counted in. Of the process that loads; whoever it forks has what it says then.

    Rows of versions that are not served any more are kept for a while: they are told, and a version that serves again counts on.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._rows: dict[Key, int] = {}
        self._retired: dict[Key, float] = {}  # since when, by time.monotonic(); the oldest first
        self._free = deque(range(ROWS))

    @property
    def kept(self) -> dict[Key, tuple[int, float]]:
        """The rows of retired versions, and since when they are, by time.monotonic()."""
        return {key: (self._rows[key], since) for key, since in self._retired.items()}

    def assign(self, served: Collection[Key]) -> dict[Key, int]:
        """Return the row of each version that is served: the one that it has, or a new one that begins at 0.

        There is none for what comes when all rows are taken.
        """
        now = time.monotonic()
        since = {key: self._retired.get(key, now) for key in self._rows if key not in served}
        self._retired = dict(sorted(since.items(), key=lambda item: item[1]))
        old = [key for key, at in self._retired.items() if at < now - KEPT_SECONDS]
        for key in [*old, *list(self._retired)[len(old) : -MAX_KEPT]]:
            del self._retired[key]
            self._free.append(self._rows.pop(key))  # to the end: workers of before may still count there
        for key in served:
            if key not in self._rows and self._free:
                self._rows[key] = row = self._free.popleft()
                self._tally.clear(row)
        return {key: self._rows[key] for key in served if key in self._rows}
