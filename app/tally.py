"""The counters of all workers, in memory that all processes of a service share: whoever is asked can add them up.

They outlive the workers that count: what follows a dead one counts on, and a version that a later generation serves again
keeps its numbers.
"""

from __future__ import annotations

import mmap
from collections.abc import MutableSequence
from typing import cast

from app.counters import Counters
from app.rates import MAX_CALLERS

ROWS = 4096  # versions that are counted at a time; untouched rows take no memory
GENERATIONS = 4  # whose workers may be there at the same time, the older ones on their way out


class Tally:
    """Cells by row (a version of a model) and seat (a worker). Made before the first fork; each worker has its own seat."""

    def __init__(self, workers: int) -> None:
        self._seats = workers * GENERATIONS
        self._workers = workers
        self._memory = mmap.mmap(-1, ROWS * self._seats * Counters.CELLS * 8)
        self._cells = memoryview(self._memory).cast("Q")
        # for each caller when its tokens will all be there again: `app/rates.py`
        self.spent = cast(MutableSequence[float], memoryview(mmap.mmap(-1, 8 * MAX_CALLERS)).cast("d"))

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

    def clear(self, row: int) -> None:
        """Begin to count at 0: the row is another version's from here on."""
        size = self._seats * Counters.CELLS * 8
        self._memory[row * size : (row + 1) * size] = bytes(size)
