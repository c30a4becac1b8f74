"""What a runner has done, in cells that several processes can share: counts, and histograms of latencies and batches.

Everything lives in one run of unsigned 64-bit cells, each written by one process only, so that whoever answers for all of
them adds them up. What can be added up from other cells (all requests, all batches) has none of its own.

The histogram of latencies has four buckets for every doubling, so a quantile is right to within an eighth. A bucket holds its
upper end, as a bucket of Prometheus does (`le`), so that sums over buckets are exact at every boundary of theirs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, MutableSequence
from itertools import accumulate
from operator import add
from typing import Any, ClassVar, Self

from app.errors import RequestError

# Codes of answers that no class of error has: no such route, no such method, a fault of ours.
_OTHER_CODES = ("internal_error", "method_not_allowed", "not_found")
OTHER = "other"  # whatever is not in a table that was made at the start


def descendants(kind: type[Any]) -> Iterator[type[Any]]:
    """Yield a class and all that are derived from it."""
    yield kind
    for child in kind.__subclasses__():
        yield from descendants(child)


CODES = (*sorted({kind.code for kind in descendants(RequestError)} | {*_OTHER_CODES}), OTHER)
"""Every code that an error answer may have."""
AT_A_MODEL = ("invalid_input", "overloaded", "prediction_failed", "prediction_timeout")
"""Codes of requests whose model was known: a runner counts those."""

KEPT_SECONDS = 600.0  # for which the counts of a retired version are kept: they are told, and go on if it serves again
MAX_KEPT = 32  # of those, the latest ones

_ROWS, _NANOSECONDS, _BATCH_ROWS, _QUEUED, _IN_FLIGHT = range(5)
_FIRST_ERROR = 5
_ERROR_AT = {code: _FIRST_ERROR + position for position, code in enumerate(CODES)}
_OTHER_ERROR = _ERROR_AT[OTHER]
_FIRST_BATCH = _FIRST_ERROR + len(CODES)
_BATCH_SIZES = 18  # up to 1 row, 2, 4, … 65,536, and more
_FIRST_BUCKET = _FIRST_BATCH + _BATCH_SIZES
_BUCKETS = 120  # the last one begins at 15 minutes, in microseconds
_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))

_MOST_ROWS = 1 << (_BATCH_SIZES - 2)

BATCH_BOUNDS = tuple(1 << power for power in range(_BATCH_SIZES - 1))
"""Upper ends of the buckets of batches but for the last, in rows."""


class Cells:
    """Counts in `cells`, which may lie in memory that is shared with other processes."""

    CELLS: ClassVar[int]

    def __init__(self, cells: MutableSequence[int] | None = None) -> None:
        self.cells: MutableSequence[int] = array("Q", bytes(8 * self.CELLS)) if cells is None else cells

    @classmethod
    def sum(cls, several: Iterable[Cells]) -> Self:
        """Return counts that have all of what these have."""
        total = [0] * cls.CELLS
        for counts in several:
            total = list(map(add, total, counts.cells))
        return cls(total)


class Counters(Cells):
    """Requests, rows, errors, batches, and latencies of one version."""

    CELLS = _FIRST_BUCKET + _BUCKETS

    @property
    def requests(self) -> int:
        """Requests that were answered, or refused after their model was known."""
        return self.answers + self.errors

    @property
    def answers(self) -> int:
        """Requests that were answered with a prediction."""
        return sum(self.cells[_FIRST_BUCKET:])

    @property
    def rows(self) -> int:
        """Rows of the requests that were answered."""
        return self.cells[_ROWS]

    @property
    def errors(self) -> int:
        """Requests that were not answered with a prediction."""
        return sum(self.cells[_FIRST_ERROR:_FIRST_BATCH])

    @property
    def errors_by_code(self) -> dict[str, int]:
        """The same by their codes, all of `CODES`."""
        return dict(zip(CODES, self.cells[_FIRST_ERROR:_FIRST_BATCH], strict=True))

    @property
    def batches(self) -> int:
        """Batches that were computed."""
        return sum(self.cells[_FIRST_BATCH:_FIRST_BUCKET])

    @property
    def batch_rows(self) -> int:
        """Rows of the batches that were computed, whatever came out."""
        return self.cells[_BATCH_ROWS]

    @property
    def seconds(self) -> float:
        """The latencies of all answers, added up."""
        return self.cells[_NANOSECONDS] / 1e9

    @property
    def queued(self) -> int:
        """Requests that waited when that was last looked at."""
        return self.cells[_QUEUED]

    @property
    def in_flight(self) -> int:
        """Requests that waited or were computed when that was last looked at."""
        return self.cells[_IN_FLIGHT]

    def computed(self, rows: int) -> None:
        """Count a batch."""
        cells = self.cells
        cells[_BATCH_ROWS] += rows
        cells[_FIRST_BATCH + (rows - 1).bit_length() if rows <= _MOST_ROWS else _FIRST_BUCKET - 1] += 1

    def answered(self, rows: int, seconds: float) -> None:
        """Count a request that was answered."""
        cells = self.cells
        nanoseconds = int(seconds * 1e9)
        cells[_ROWS] += rows
        cells[_NANOSECONDS] += nanoseconds
        cells[_FIRST_BUCKET + bucket_of(nanoseconds)] += 1

    def failed(self, code: str, count: int = 1) -> None:
        """Count requests that were not, by the code of their error."""
        self.cells[_ERROR_AT.get(code, _OTHER_ERROR)] += count

    def waits(self, queued: int, in_flight: int) -> None:
        """Take note of how many requests wait, and how many wait or are computed."""
        self.cells[_QUEUED] = queued
        self.cells[_IN_FLIGHT] = in_flight

    def up_to(self, bounds: Iterable[int]) -> list[int]:
        """Return how many answers took no longer than each of these microseconds, which must be upper ends of buckets."""
        totals = list(accumulate(self.cells[_FIRST_BUCKET:]))
        return [totals[bucket_of(1000 * bound)] for bound in bounds]

    def batches_up_to(self) -> list[int]:
        """Return how many batches had no more rows than each of `BATCH_BOUNDS`."""
        return list(accumulate(self.cells[_FIRST_BATCH : _FIRST_BUCKET - 1]))

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


def bucket_of(nanoseconds: int) -> int:
    """Return the bucket of a latency: microseconds one by one up to 8, then four for every doubling, each with its upper end."""
    microseconds = (nanoseconds - 1) // 1000
    if microseconds < 8:
        return microseconds if microseconds > 0 else 0
    bits = microseconds.bit_length()
    bucket = 4 * (bits - 2) + (microseconds >> (bits - 3) & 3)
    return bucket if bucket < _BUCKETS else _BUCKETS - 1


def upper_end_of(bucket: int) -> int:
    """Return the microseconds that a bucket ends with; the last one has no end."""
    if bucket < 8:
        return bucket + 1
    doublings, quarter = divmod(bucket, 4)
    return (5 + quarter) << (doublings - 1)


def middle_of(bucket: int) -> float:
    """Return the microseconds in the middle of a bucket."""
    below = upper_end_of(bucket - 1) if bucket else 0
    return (below + upper_end_of(bucket)) / 2
