"""What is made of a fitted model at publish: a program, its figures, or the reason why there is none."""

import io

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.svm import LinearSVC

from app import inspection
from app.compiled.program import Program, unknown
from app.compiler import candidates, planner
from app.manifest import Compiled, Speeds
from app.memory import MB, Taken
from app.model import Model
from app.names import ModelRef
from tests.toy_operations import Chosen, Either, Mistaken, Off, line, program

random = np.random.default_rng(2)
X = random.normal(size=(60, 3)).round(3)
WORDS = np.where(X[:, 0] > 0, "yes", "no")
SVC = LinearSVC().fit(X, WORDS)
SUM = LinearRegression().fit(X, X.sum(axis=1) + random.normal(size=60))
KNOWN = X.tolist()


def model(estimator):
    return Model(ModelRef("m", "1"), inspection.infer((), estimator, X), estimator)


def test_a_plan_has_a_program_that_reads_back_and_the_figures_of_both_runtimes(monkeypatch):
    monkeypatch.setattr(planner, "RACE_SECONDS", 60.0)  # or a size may be left out, where the machine is busy
    made = planner.plan(model(SVC), KNOWN)

    assert made.reason is None
    assert made.body is not None
    assert made.compiled is not None
    read = Program.read(io.BytesIO(made.body), len(made.body))
    it = model(SVC).settled(read, made.compiled, None)
    rows = it.signature.validate(KNOWN)
    assert it.predict_by("compiled", rows, "predict").tolist() == SVC.predict(X).tolist()
    assert set(made.compiled.methods) == {"predict", "decision_function"} == set(read.methods)
    assert made.compiled.operations == read.operations
    assert unknown(made.compiled.operations) == ()
    for figures in (made.compiled.microseconds_per_row.reference, made.compiled.microseconds_per_row.compiled):
        assert set(figures) == {1, 64, 1000}
        assert all(figure > 0 for figure in figures.values())
    assert made.compiled.compiled_with["numpy"] == np.__version__
    assert made.summary.startswith("compiled predict, decision_function: differs by")


def test_of_several_ways_to_compute_the_fastest_is_kept(translated):
    translated(SUM, lambda estimator, flow: {"predict": Either(line(estimator), 50)})
    made = planner.plan(model(SUM), KNOWN)

    assert made.body is not None
    kept = Program.read(io.BytesIO(made.body), len(made.body)).heads["predict"]
    while not isinstance(kept, Either):
        kept = kept.steps[0]
    assert kept.repeats == 1


def test_a_program_that_says_one_label_otherwise_is_not_kept(translated):
    chosen = Chosen(line(SVC), tuple(SVC.classes_.tolist()))
    translated(SVC, lambda *_: {"predict": Mistaken(chosen, X[3, 0], "?"), "decision_function": line(SVC)})
    made = planner.plan(model(SVC), KNOWN)

    assert made.body is made.compiled is None
    assert made.reason is not None
    assert made.reason.startswith("its predict says '?' where scikit-learn says")
    assert made.summary == f"not compiled: {made.reason}"


def test_a_method_that_differs_is_left_out_and_the_plan_says_why(translated):
    chosen = Chosen(line(SVC), tuple(SVC.classes_.tolist()))
    translated(SVC, lambda *_: {"predict": chosen, "decision_function": Off(line(SVC), 1e-6, -9.0)})
    made = planner.plan(model(SVC), KNOWN)

    assert made.body is not None
    assert made.compiled is not None
    assert made.compiled.methods == ("predict",)
    assert Program.read(io.BytesIO(made.body), len(made.body)).methods == ("predict",)
    assert made.compiled.reason is not None
    assert made.compiled.reason.startswith("its decision_function differs")
    assert "not all: its decision_function differs" in made.summary


def test_a_plan_for_which_the_time_was_not_enough_says_what_to_do(translated):
    translated(SUM, lambda estimator, flow: {"predict": line(estimator)})
    made = planner.plan(model(SUM), KNOWN, limit=1e-4)

    assert made.summary == (
        "not compiled: its predict could not be compared to scikit-learn's within 0.0001 s: "
        "if this machine is busy, publish it again when it is not"
    )


def test_what_has_no_translation_says_so():
    class Own(LinearRegression):
        """A subclass may compute something else."""

    assert planner.plan(model(Own().fit(X, X[:, 0])), KNOWN).reason == "its Own has no compiled form"


def test_a_translation_that_fails_is_a_reason_too(translated):
    def fail(estimator, flow):
        raise MemoryError("of some kind")

    translated(SUM, fail)
    made = planner.plan(model(SUM), KNOWN)

    assert made.reason is not None
    assert "MemoryError: of some kind" in made.reason


@pytest.mark.parametrize(
    ("form", "reference", "heavy"),
    [
        (Taken(10 * MB, 20 * MB), Taken(20 * MB, 25 * MB), False),
        (Taken(290 * MB, 300 * MB), Taken(20 * MB, 25 * MB), False),
        (Taken(390 * MB, 390 * MB), Taken(20 * MB, 25 * MB), True),  # twice what scikit-learn and its model take
        (Taken(199 * MB, 570 * MB), Taken(112 * MB, 219 * MB), True),  # more than a small machine has
        (Taken(199 * MB, 570 * MB), Taken(400 * MB, 500 * MB), False),  # where the model itself did not fit
        (None, Taken(1, 1), False),
        (Taken(900 * MB, 900 * MB), None, False),
    ],
)
def test_memory_is_held_against_what_scikit_learn_would_take(form, reference, heavy):
    assert planner.is_heavy(form, reference) == heavy


def test_a_program_takes_what_a_process_of_its_own_is_measured_to_take():
    pytest.importorskip("app.compiled.trees")
    rows = random.normal(size=(20_000, 4))
    it = model(RandomForestRegressor(8, random_state=0).fit(rows[:, :3], rows[:, 3]))
    made = planner.plan(it, KNOWN, taken=Taken(20 * MB, 25 * MB))

    assert made.body is not None
    assert made.compiled is not None
    assert made.compiled.memory is not None
    assert made.compiled.memory.peak_bytes >= made.compiled.memory.resident_bytes > 0.8 * len(made.body)


@pytest.mark.parametrize(
    ("reference", "compiled", "expected"),
    [
        ({1: 100, 64: 10, 1000: 1}, {1: 1, 64: 1, 1000: 0.5}, [(1, True)]),
        ({1: 100, 64: 10, 1000: 1}, {1: 1, 64: 1, 1000: 10}, [(1, True), (253, False)]),
        ({1: 1, 64: 10}, {1: 10, 64: 1}, [(1, False), (8, True)]),
        ({1: 1, 64: 1}, {1: 10, 64: 10}, [(1, False)]),
        ({}, {1: 1.0}, [(1, True)]),
    ],
)
def test_the_change_from_one_runtime_to_the_other_lies_where_their_costs_cross(reference, compiled, expected):
    block = Compiled(
        format=1,
        methods=("predict",),
        parity=0,
        rows=1,
        microseconds_per_row=Speeds(reference=reference, compiled=compiled),
    )

    assert block.faster_from() == expected
    assert Compiled.model_validate_json(block.model_dump_json()).faster_from() == expected


def test_a_batch_goes_to_the_runtime_that_was_faster_at_its_size():
    block = Compiled(
        format=1,
        methods=("predict",),
        parity=0,
        rows=1,
        microseconds_per_row=Speeds(reference={1: 100, 64: 10, 1000: 1}, compiled={1: 1, 64: 1, 1000: 10}),
    )
    told = model(SUM).settled(program(predict=Off(line(SUM), 1.0, -99.0)), block, None)  # twice the sum: it shows

    def factor(count, method="predict"):
        rows = told.signature.validate([KNOWN[index % 60] for index in range(count)])
        return float(told.predict(rows, method)[0] / SUM.predict(X[:1])[0])

    assert told.runtime == "compiled+sklearn"
    assert [round(factor(count)) for count in (1, 64, 252, 253, 1000)] == [2, 2, 2, 1, 1]


def test_only_trees_are_candidates_for_compiling_at_load():
    signature = model(SUM).signature

    assert candidates.candidate((), SUM, signature) == (
        None,
        "it was published without a compiled form, and only trees are compiled as they are loaded",
    )
