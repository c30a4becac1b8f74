"""The counters of several processes, in memory that they share: who counts where, and that whoever is asked sees all of it."""

from __future__ import annotations

import os
from collections.abc import Callable

from app import tally as tallies
from app.service_counters import Route, ServiceCounters
from app.tally import GENERATIONS, Ledger, Tally

WORKERS = 3


def in_a_child(work: Callable[[], None]) -> None:
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_no_two_processes_that_are_there_together_count_in_the_same_cells():
    tally = Tally(WORKERS)
    seats = [tally.seat(generation, number) for generation in range(7, 7 + GENERATIONS) for number in range(WORKERS)]

    assert len({*seats, tally.looking_seat}) == GENERATIONS * WORKERS + 1
    for seat in (*seats, tally.looking_seat):
        ServiceCounters(tally.service_cells(seat)).responded(Route.OTHER, 404, "not_found")
    for seat in seats:
        tally.counters(1, seat).failed("overloaded")
    assert tally.service_total().refusals["not_found",] == len(seats) + 1
    assert tally.total(1).errors == len(seats)
    assert tally.total(0).errors == tally.total(2).errors == 0


def test_what_children_count_their_parent_sees_and_what_follows_them_counts_on():
    tally = Tally(WORKERS)

    def count() -> None:
        tally.counters(4, tally.seat(1, 2)).answered(3, 0.001)
        ServiceCounters(tally.service_cells(tally.seat(1, 2))).responded(Route.PREDICT, 200)
        ServiceCounters(tally.service_cells(tally.looking_seat)).looked("changed")

    for _ in range(3):
        in_a_child(count)

    assert (tally.total(4).answers, tally.total(4).rows) == (3, 9)
    total = tally.service_total()
    assert (total.responses["predict", "200"], total.looks["changed",]) == (3, 3)


def test_a_row_of_another_version_begins_at_nothing_and_the_others_keep_what_they_have():
    tally = Tally(WORKERS)
    for row in (0, 1, 2):
        tally.counters(row, 5).computed(8)

    tally.clear(1)

    assert [tally.total(row).batch_rows for row in (0, 1, 2)] == [8, 0, 8]


def test_a_version_has_a_row_of_its_own_that_begins_at_nothing():
    tally = Tally(WORKERS)
    for row in range(3):
        tally.counters(row, 0).failed("overloaded")
    ledger = Ledger[str](tally)

    rows = ledger.assign(["a/1", "b/1"])

    assert len({*rows.values()}) == 2
    assert [tally.total(row).errors for row in rows.values()] == [0, 0]
    assert ledger.assign(["b/1", "a/1"]) == rows


def test_a_retired_version_is_kept_and_counts_on_where_it_was_when_it_serves_again():
    tally = Tally(WORKERS)
    ledger = Ledger[str](tally)
    first = ledger.assign(["a/1"])
    tally.counters(first["a/1"], 0).failed("overloaded")

    second = ledger.assign(["a/2"])
    assert first["a/1"] != second["a/2"]
    assert [(key, row) for key, (row, _) in ledger.kept.items()] == [("a/1", first["a/1"])]

    assert ledger.assign(["a/1", "a/2"]) == first | second
    assert ledger.kept == {}
    assert tally.total(first["a/1"]).errors == 1


def test_of_retired_versions_the_latest_are_kept_for_a_while(monkeypatch):
    monkeypatch.setattr(tallies, "MAX_KEPT", 2)
    ledger = Ledger[int](Tally(WORKERS))
    for version in range(6):
        ledger.assign([version])

    assert [*ledger.kept] == [3, 4]
    monkeypatch.setattr(tallies, "KEPT_SECONDS", -1)
    rows = ledger.assign([5, 6])
    assert ledger.kept == {}
    assert len({*rows.values()}) == 2


def test_rows_are_used_again_and_what_comes_when_all_are_taken_has_none(monkeypatch):
    monkeypatch.setattr(tallies, "ROWS", 3)
    monkeypatch.setattr(tallies, "MAX_KEPT", 1)
    tally = Tally(1)
    ledger = Ledger[int](tally)
    for version in range(10):
        (row,) = ledger.assign([version]).values()
        assert tally.total(row).rows == 0
        tally.counters(row, 0).answered(1, 0.1)

    assert len(ledger.assign([20, 21, 22])) == 2  # one row is still kept
