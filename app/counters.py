"""What a runner has done, in cells that several processes can share: counts, and a histogram of latencies.

Everything lives in one run of unsigned 64-bit cells, each written by one process only, so that whoever answers for all of
them adds them up. The histogram has four buckets for every doubling, so a quantile is right to within an eighth.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, MutableSequence
from typing import ClassVar

_REQUESTS, _ROWS, _ERRORS, _BATCHES = range(4)
_FIRST_BUCKET = 4
_BUCKETS = 120  # the last one begins at 15 minutes, in microseconds
_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


class Counters:
    """Requests, rows, errors, batches, and latencies. `cells` may lie in memory that is shared with other processes."""

    CELLS: ClassVar[int] = _FIRST_BUCKET + _BUCKETS

    def __init__(self, cells: MutableSequence[int] | None = None) -> None:
        self.cells: MutableSequence[int] = array("Q", bytes(8 * self.CELLS)) if cells is None else cells

    @classmethod
    def sum(cls, several: Iterable[Counters]) -> Counters:
        """Return counters that have all of what these have."""
        total = cls()
        for counters in several:
            for position, count in enumerate(counters.cells):
                total.cells[position] += count
        return total

    @property
    def requests(self) -> int:
        """Requests that were answered, or refused after their model was known."""
        return self.cells[_REQUESTS]

    @property
    def rows(self) -> int:
        """Rows of the requests that were answered."""
        return self.cells[_ROWS]

    @property
    def errors(self) -> int:
        """Requests that were not answered with a prediction."""
        return self.cells[_ERRORS]

    @property
    def batches(self) -> int:
        """Batches that were computed."""
        return self.cells[_BATCHES]

    def computed(self) -> None:
        """Count a batch."""
        self.cells[_BATCHES] += 1

    def answered(self, rows: int, seconds: float) -> None:
        """Count a request that was answered."""
        cells = self.cells
        cells[_REQUESTS] += 1
        cells[_ROWS] += rows
        cells[_FIRST_BUCKET + bucket_of(seconds)] += 1

    def failed(self, count: int = 1) -> None:
        """Count requests that were not."""
        self.cells[_REQUESTS] += count
        self.cells[_ERRORS] += count

    def quantiles(self) -> dict[str, float] | None:
        """Return p50, p90 and p99 of the latencies, in milliseconds; None before the first answer."""
        buckets = self.cells[_FIRST_BUCKET:]
        total = sum(buckets)
        if not total:
            return None
        found = {}
        for name, share in _QUANTILES:
            rank, seen, position = round((total - 1) * share), 0, 0
            for position, count in enumerate(buckets):  # noqa: B007 - where it stops is what is looked for
                seen += count
                if seen > rank:
                    break
            found[name] = round(middle_of(position) / 1000, 3)
        return found


def bucket_of(seconds: float) -> int:
    """Return the bucket of a latency: microseconds one by one up to 8, then four for every doubling."""
    microseconds = int(seconds * 1e6)
    if microseconds < 8:
        return max(microseconds, 0)
    bits = microseconds.bit_length()
    return min(4 * (bits - 2) + (microseconds >> (bits - 3) & 3), _BUCKETS - 1)


def middle_of(bucket: int) -> float:
    """Return the microseconds in the middle of a bucket."""
    if bucket < 8:
        return bucket + 0.5
    bits, quarter = divmod(bucket, 4)
    width = 1 << (bits - 1)
    return (4 + quarter) * width + width / 2
