"""What was counted, and what histograms of latencies and batches say. The oracle is a list of what was counted."""

from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api import errors as answers
from app.counters import AT_A_MODEL, BATCH_BOUNDS, CODES, Counters, bucket_of, descendants, middle_of, upper_end_of
from app.errors import BundleError, StorageDenied
from app.metrics import LATENCY_BOUNDS
from app.service_counters import Route, ServiceCounters, outcome_of


@given(st.integers(0, 900 * 10**9))
def test_a_bucket_is_right_to_an_eighth(nanoseconds):
    microseconds = nanoseconds / 1000

    assert abs(middle_of(bucket_of(nanoseconds)) - microseconds) <= max(1.0, microseconds / 8 + 1)


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_longer_latencies_never_come_into_lower_buckets(one, other):
    low, high = sorted((one, other))

    assert bucket_of(low) <= bucket_of(high) < Counters.CELLS


@pytest.mark.parametrize("bucket", range(119))
def test_a_bucket_ends_with_its_upper_end_and_the_next_begins_behind_it(bucket):
    end = 1000 * upper_end_of(bucket)

    assert [bucket_of(end - 1), bucket_of(end), bucket_of(end + 1)] == [bucket, bucket, bucket + 1]


@given(st.lists(st.integers(0, 60 * 10**9), max_size=60), st.lists(st.sampled_from(LATENCY_BOUNDS), max_size=20))
def test_what_took_no_longer_than_a_bound_is_told_exactly(nanoseconds, exact):
    counters, taken = Counters(), nanoseconds + [1000 * bound for bound in exact]
    for one in taken:
        counters.answered(1, one / 1e9)
    kept = [int(one / 1e9 * 1e9) for one in taken]  # what a float has kept of them

    assert counters.up_to(LATENCY_BOUNDS) == [sum(one <= 1000 * bound for one in kept) for bound in LATENCY_BOUNDS]
    assert counters.seconds == sum(kept) / 1e9
    assert counters.answers == len(taken)


@given(st.lists(st.integers(1, 1 << 20), max_size=60))
def test_batches_are_told_by_their_rows(sizes):
    counters = Counters()
    for rows in sizes:
        counters.computed(rows)

    assert counters.batches_up_to() == [sum(rows <= bound for rows in sizes) for bound in BATCH_BOUNDS]
    assert (counters.batches, counters.batch_rows) == (len(sizes), sum(sizes))


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
    counters.failed("overloaded", 3)
    counters.computed(7)

    assert counters.quantiles() is None
    assert (counters.requests, counters.errors, counters.batches) == (3, 3, 1)


def test_errors_are_counted_by_code_and_unknown_ones_together():
    counters = Counters()
    for position, code in enumerate(CODES[:-1]):
        counters.failed(code, position)
    counters.failed("made up", 1000)
    found = counters.errors_by_code

    assert found == {code: position for position, code in enumerate(CODES[:-1])} | {"other": 1000}
    assert counters.errors == counters.requests == sum(found.values())


def test_every_code_that_an_answer_may_have_has_a_place():
    assert {*answers.STATUS, *answers._BY_STATUS.values()} <= {*CODES}
    assert {*AT_A_MODEL} < {*CODES}


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


# The service's


def test_answers_are_counted_by_route_and_status():
    counters = ServiceCounters()
    sent = [(route, status) for route in Route for status in (200, 404, 503)] * 3 + [
        (Route.DOCS, 299),
        (Route.DOCS, 777),
    ]
    for route, status in sent:
        counters.responded(route, status)
    for _ in range(5):
        counters.predicted()
    sent += 5 * [(Route.PREDICT, 200)]

    assert {labels: count for labels, count in counters.responses.items() if count} == {
        **{(route, str(status)): sent.count((route, status)) for route in Route for status in (200, 404, 503)},
        ("docs", "other"): 2,
    }
    assert not any(counters.refusals.values())


def test_a_refusal_is_counted_unless_the_models_counters_have_it():
    counters = ServiceCounters()
    for code in (*CODES, "made up"):
        counters.responded(Route.PREDICT, 400, code, at_a_model=True)

    expected = {(code,): 1 for code in CODES if code not in AT_A_MODEL} | {("other",): 2, ("overloaded",): 0}
    assert counters.refusals == expected

    counters.responded(Route.PREDICT, 429, "overloaded")  # before it was known which model is meant
    assert counters.refusals == expected | {("overloaded",): 1}


def test_looks_loads_and_operations_have_cells_of_their_own():
    counters = ServiceCounters()
    counters.looked("changed")
    counters.looked("failed")
    counters.loaded()
    for kind in descendants(BundleError):
        counters.loaded(kind("why"))
    counters.stored("r2", "get", read=10)
    counters.stored("r2", "get", read=20)
    counters.stored("copy", "put", written=5)
    counters.stored("r2", "list", outcome_of(StorageDenied("no")))

    assert counters.looks == {("unchanged",): 0, ("changed",): 1, ("failed",): 1}
    assert {labels for labels, count in counters.loads.items() if count == 1} == {
        ("ok",),
        *((kind.kind(),) for kind in descendants(BundleError)),
    }
    assert {labels: count for labels, count in counters.operations.items() if count} == {
        ("r2", "get", "ok"): 2,
        ("copy", "put", "ok"): 1,
        ("r2", "list", "denied"): 1,
    }
    assert {labels: count for labels, count in counters.bytes_moved.items() if count} == {
        ("r2", "read"): 30,
        ("copy", "written"): 5,
    }
