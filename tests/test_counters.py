"""What was counted, and what a histogram of four buckets for every doubling says of latencies."""

from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.counters import Counters, bucket_of, middle_of


@given(st.floats(0, 900))
def test_a_bucket_is_right_to_an_eighth(seconds):
    microseconds = seconds * 1e6

    assert abs(middle_of(bucket_of(seconds)) - microseconds) <= max(1.0, microseconds / 8 + 1)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_longer_latencies_never_come_into_lower_buckets(one, other):
    low, high = sorted((one, other))

    assert bucket_of(low) <= bucket_of(high) < Counters.CELLS


@given(st.lists(st.floats(1e-5, 100), min_size=1, max_size=50))
def test_quantiles_are_those_of_the_latencies(latencies):
    counters = Counters()
    for seconds in latencies:
        counters.answered(2, seconds)
    ordered = sorted(latencies)
    found = counters.quantiles()

    assert (counters.requests, counters.rows, counters.errors) == (len(latencies), 2 * len(latencies), 0)
    assert found is not None
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        expected = ordered[round((len(ordered) - 1) * share)] * 1000
        assert found[name] == pytest.approx(expected, rel=0.13, abs=0.002)


def test_without_an_answer_there_are_no_quantiles():
    counters = Counters()
    counters.failed(3)
    counters.computed()

    assert counters.quantiles() is None
    assert (counters.requests, counters.errors, counters.batches) == (3, 3, 1)


def test_cells_that_processes_share_are_added_up():
    shared = mmap.mmap(-1, 2 * 8 * Counters.CELLS)
    cells = memoryview(shared).cast("Q")
    several = [Counters(cells[: Counters.CELLS]), Counters(cells[Counters.CELLS :])]
    child = os.fork()
    if not child:
        several[1].answered(5, 0.25)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    several[0].answered(1, 0.001)
    total = Counters.sum(several)

    assert (total.requests, total.rows) == (2, 6)
    assert total.quantiles() == {
        "p50": pytest.approx(1, rel=0.13),
        "p90": pytest.approx(250, rel=0.13),
        "p99": pytest.approx(250, rel=0.13),
    }
