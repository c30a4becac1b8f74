"""The counters of all processes, in memory that all processes of a service share: whoever is asked can add them up.

They outlive the processes that count: what follows a dead one counts on, and a version that a later generation serves again
soon enough keeps its numbers.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, MutableSequence
from typing import cast

from app.counters import Counters
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

    def total(self, row: int, seats: Iterable[int] | None = None) -> Counters:
        """Return what all workers together have counted for a version, or those on some seats."""
        return Counters.sum(self.counters(row, seat) for seat in (range(self._seats) if seats is None else seats))

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
