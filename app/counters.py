"""What a runner has done, in numbers that several processes can keep side by side and add up."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, MutableSequence
from typing import ClassVar, Self

_REQUESTS, _ROWS, _ERRORS, _BATCHES, _HEAD = range(5)
_BUCKETS = 160  # from 10 µs on, each 10 % longer than the one before: up to 40 s
_FIRST_SECONDS = 1e-5
_GROWTH = math.log(1.1)
_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


class Counters:
    """Requests, rows, errors, batches, and how long answers took. Everything is in `cells`, unsigned 64-bit numbers."""

    CELLS: ClassVar[int] = _HEAD + _BUCKETS

    def __init__(self, cells: MutableSequence[int] | None = None) -> None:
        self.cells: MutableSequence[int] = array("Q", bytes(8 * self.CELLS)) if cells is None else cells

    @property
    def requests(self) -> int:
        """Answered or not."""
        return self.cells[_REQUESTS]

    @property
    def rows(self) -> int:
        """Rows in requests that were answered."""
        return self.cells[_ROWS]

    @property
    def errors(self) -> int:
        """Requests that were not answered with a prediction."""
        return self.cells[_ERRORS]

    @property
    def batches(self) -> int:
        """Calls of the model."""
        return self.cells[_BATCHES]

    @batches.setter
    def batches(self, count: int) -> None:
        self.cells[_BATCHES] = count

    def answered(self, rows: int, seconds: float) -> None:
        """Count a request that was answered."""
        cells = self.cells
        cells[_REQUESTS] += 1
        cells[_ROWS] += rows
        bucket = int(math.log(max(seconds, _FIRST_SECONDS) / _FIRST_SECONDS) / _GROWTH)
        cells[_HEAD + min(bucket, _BUCKETS - 1)] += 1

    def failed(self) -> None:
        """Count a request that was not."""
        self.cells[_REQUESTS] += 1
        self.cells[_ERRORS] += 1

    def quantiles(self) -> dict[str, float] | None:
        """Return p50, p90 and p99 of all latencies, in milliseconds; None before the first answer."""
        buckets = list(self.cells[_HEAD:])
        total = sum(buckets)
        if not total:
            return None
        found = {}
        for name, quantile in _QUANTILES:
            passed = 0
            for number, count in enumerate(buckets):
                passed += count
                if passed >= quantile * total:
                    found[name] = round(_FIRST_SECONDS * math.exp((number + 0.5) * _GROWTH) * 1000, 3)
                    break
        return found

    @classmethod
    def sum(cls, several: Iterable[Self]) -> Self:
        """Return the sum of several, in cells of its own."""
        total = cls()
        for one in several:
            for index, count in enumerate(one.cells):
                total.cells[index] += count
        return total
