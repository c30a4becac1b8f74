"""The bench's own sums: what it reads from wrk, what it holds against scikit-learn, and what it says was met."""

from __future__ import annotations

import numpy as np
import pytest

from bench import contenders, plot, questions, serving, swap, wrk
from bench.contenders import CONSTANT, FLOOR, MLSERVER, SERVE
from bench.serving import ANY, MANY, Budget, Cell, Found, Run

PRINTED = """Running 1s test @ http://127.0.0.1:8000/linear
  1 threads and 64 connections
Requests/sec:  12000.00
wrk-figures {"requests": 12000, "microseconds": 2000000, "p50": 900, "p99": 4100, "connect": 0, "read": 1, "write": 0, "status": 2, "timeout": 0}
"""


def run(rate: float, errors: int = 0, p99_ms: float = 1.0) -> Run:
    return Run(wrk.Load(int(rate), 1.0, 0.5, p99_ms, errors), 10.0)


def found(**runs: list[Run]) -> Found:
    return Found(
        runs={Cell(name, ANY if name == "constant" else "linear", MANY): taken for name, taken in runs.items()}
    )


def test_the_line_of_the_script_is_read_from_what_wrk_prints():
    load = wrk.parse(PRINTED)

    assert (load.requests, load.rate, load.p50_ms, load.p99_ms) == (12000, 6000.0, 0.9, 4.1)


def test_every_kind_of_error_counts():
    assert wrk.parse(PRINTED).errors == 3


def test_without_that_line_what_wrk_said_is_told():
    with pytest.raises(ValueError, match="unable to connect"):
        wrk.parse("unable to connect to 127.0.0.1:8000 Connection refused\n")


def test_ratios_are_those_of_each_round():
    both = found(serve=[run(300), run(100)], floor=[run(100), run(50)])

    assert both.ratios(Cell("serve", "linear", MANY), Cell("floor", "linear", MANY)) == [3.0, 2.0]


def test_a_round_in_which_a_request_failed_counts_for_nothing():
    both = found(serve=[run(300, errors=1), run(100)], floor=[run(100), run(50)])

    assert both.ratios(Cell("serve", "linear", MANY), Cell("floor", "linear", MANY)) == [2.0]
    assert both.values(Cell("serve", "linear", MANY), "rate") == [100.0]


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        (Budget("rate", 2.5, [2.4, 2.6, 2.7]), "met"),
        (Budget("rate", 2.5, [2.4, 2.4, 2.7]), "**missed**"),
        (Budget("p99", 2.0, [1.0, 2.0, 3.0], at_least=False), "met"),
        (Budget("p99", 2.0, [1.0, 2.1, 3.0], at_least=False), "**missed**"),
        (Budget("memory", 1.3, []), ""),
    ],
)
def test_the_median_decides_whether_a_budget_is_met(budget, verdict):
    assert budget.row()[-1] == verdict


def test_the_section_holds_what_was_found_against_the_budgets():
    text = serving.section(found(constant=[run(300)], floor=[run(100)], serve=[run(260)]))

    assert "| `serve` : hand-written onnxruntime, linear | ≥ 2.5 times | 2.60 (2.60-2.60) | met |" in text
    assert "| `serve` : constant answer, linear | ≥ 1.5 times | 0.87 (0.87-0.87) | **missed** |" in text
    assert "| `serve` : mosec, linear | ≥ 3 times | not measured |  |" in text


def test_a_service_all_of_whose_rounds_failed_is_void():
    text = serving.section(found(floor=[run(100)], serve=[run(260, errors=1)]))

    assert "| linear, **Diskless**, `serve` | void |" in text


def test_answers_in_float64_must_be_those_of_scikit_learn():
    expected = np.array([[0.25, 0.75]])

    assert contenders.check(SERVE, expected + 1e-12, expected) == pytest.approx(1e-12, rel=1e-3)
    with pytest.raises(contenders.WrongAnswer, match=r"100.0% of the answers differ"):
        contenders.check(SERVE, expected + 1e-8, expected)


def test_answers_in_float32_may_differ_a_little_and_one_in_a_hundred_much():
    expected = np.zeros((200, 1))
    found = expected + 1e-6
    found[:2] = 0.5

    assert contenders.check(FLOOR, found, expected) == 0.5
    found[:3] = 0.5
    with pytest.raises(contenders.WrongAnswer, match=r"1.5% of the answers differ"):
        contenders.check(FLOOR, found, expected)


def test_an_answer_of_another_shape_is_wrong():
    with pytest.raises(contenders.WrongAnswer, match=r"expected answers of shape \(1, 2\), got \(1, 1\)"):
        contenders.check(SERVE, np.zeros((1, 1)), np.zeros((1, 2)))


def test_no_answer_that_is_not_a_number_passes():
    with pytest.raises(contenders.WrongAnswer):
        contenders.check(SERVE, np.full((1, 1), np.nan), np.zeros((1, 1)))


def test_mlserver_is_asked_about_rows_that_have_every_word():
    mixed = questions.mixed()

    asked = MLSERVER.asked(mixed)
    assert asked.pool[asked.words].notna().all(axis=None)
    assert not mixed.pool[mixed.words].notna().all(axis=None)
    assert len(asked.pool) >= questions.SINGLES


def test_the_last_of_a_hundred_is_not_the_99th_percentile():
    assert swap.percentile([*range(1, 101)], 99) == 99


def test_a_request_under_way_when_a_swap_begins_belongs_to_it():
    span = swap.Span(10.0, 12.0)

    assert span.holds(swap.Probe(9.9, 0.2, "1"))
    assert not span.holds(swap.Probe(9.7, 0.2, "1"))
    assert not span.holds(swap.Probe(12.1, 0.2, "2"))


def test_the_longest_bar_of_the_picture_is_the_fastest_services():
    picture = plot.draw({"linear": {"floor": 100.0, "serve": 1000.0}})

    assert picture.index("Diskless") < picture.index("onnxruntime by hand")
    assert 'class="ours" x="205" y="58" width="180.0"' in picture
    assert 'class="theirs" x="205" y="78" width="90.0"' in picture
    assert CONSTANT.name not in plot.LABELS  # it is no service
