"""How long batches take, measured here and now: of one model, or of several ways to compute the same, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from app.signature import Rows

SIZES = (1, 64, 1000)  # rows in a batch
PROBE_ROWS = 8  # tells how cost grows with rows, before a large batch is begun
REPEATS = 7

Batches = Mapping[int, Rows]


def race(ways: Mapping[str, Callable[[Rows], Any]], batches: Batches, *, seconds: float) -> dict[str, dict[int, float]]:
    """Return for each way the seconds that a batch took, the best of several, by its number of rows.

    It takes about `seconds` in all: a size is left out of a way when what the smaller ones took says that there is no time for
    it. Raises what a way raises.
    """
    best: dict[str, dict[int, float]] = {name: {} for name in ways}
    end = time.perf_counter() + seconds
    sizes = sorted(batches)
    for position, size in enumerate(sizes):
        rows = batches[size]
        share = (end - time.perf_counter()) / (len(sizes) - position)
        racing = {
            name: way
            for name, way in ways.items()
            if _expected(best[name], size) <= max(0.0, end - time.perf_counter()) / len(ways)
        }
        stop = time.perf_counter() + share
        for repeat in range(REPEATS):
            for name, way in racing.items():
                started = time.thread_time()  # what else the machine does shall not count
                way(rows)
                took = time.thread_time() - started
                best[name][size] = min(took, best[name].get(size, took))
            if repeat and time.perf_counter() > stop:  # the first run is slower than all others
                break
            if not racing or time.perf_counter() > end:
                break
    return {name: {size: took for size, took in found.items() if size in SIZES} for name, found in best.items()}


def _expected(known: Mapping[int, float], size: int) -> float:
    """Return about how many seconds a larger batch will take: on the line through the last two."""
    if not known:
        return 0.0
    *smaller, last = sorted(known)
    if not smaller:
        return known[last] * size / last
    slope = max(0.0, known[last] - known[smaller[-1]]) / (last - smaller[-1])
    return known[last] + slope * (size - last)


def per_row(seconds: Mapping[int, float]) -> dict[int, float]:
    """Return microseconds per row, of seconds per batch."""
    return {rows: round(took / rows * 1e6, 3) for rows, took in seconds.items()}
