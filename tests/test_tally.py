"""The counters of several processes, in memory that they share: who counts where, and that whoever is asked sees all of it."""

from __future__ import annotations

import os
from collections.abc import Callable

from app.service_counters import Route, ServiceCounters
from app.tally import GENERATIONS, Tally

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
        ServiceCounters(tally.service_cells(seat)).refused("not_found")
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


def test_what_is_true_of_a_moment_is_asked_of_some_seats_only():
    tally = Tally(WORKERS)
    for seat in range(4):
        tally.counters(0, seat).waits(10, 11)

    found = tally.total(0, [1, 3])

    assert (found.queued, found.in_flight) == (20, 22)
