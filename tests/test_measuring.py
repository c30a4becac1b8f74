"""What a load takes in memory, measured in a process of its own."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesClassifier, RandomForestRegressor

from app.measuring import measure
from app.memory import MB
from tests.estimators import Counted, LeavesAtOnce, Slow
from tests.test_memory import dumped, linear
from tests.trusted import TRUST


def forest() -> RandomForestRegressor:
    generator = np.random.default_rng(0)
    return RandomForestRegressor(12, random_state=0).fit(
        generator.normal(size=(20_000, 4)), generator.normal(size=20_000)
    )


def tiny_trees() -> ExtraTreesClassifier:
    generator = np.random.default_rng(0)
    return ExtraTreesClassifier(1500, max_depth=2).fit(generator.normal(size=(100, 4)), generator.integers(0, 2, 100))


@pytest.mark.parametrize(
    ("make", "resident", "peak"),
    [
        (lambda: linear(64), (0.95, 1.1), (0.95, 1.2)),
        (forest, (0.95, 1.2), (1.0, 1.7)),
        (tiny_trees, (1.5, 6.5), (1.5, 9)),
    ],
)
def test_a_measured_load_takes_what_its_kind_is_known_to_take(make, resident, peak):
    body = dumped(make())
    taken = measure([("joblib", body)])

    assert taken is not None
    assert resident[0] < taken.resident_bytes / len(body) < resident[1]
    assert peak[0] < taken.peak_bytes / len(body) < peak[1]


def test_all_parts_are_measured_together_and_libraries_are_not():
    small, large = dumped(linear(1)), dumped(linear(32))
    taken = measure([("joblib", large), ("pickle", pickle.dumps(linear(32))), ("joblib", small)])

    assert taken is not None
    assert 62 * MB < taken.resident_bytes < 75 * MB
    assert taken.resident_bytes <= taken.peak_bytes < 85 * MB


def test_the_classes_of_a_model_are_found_as_they_are_here():
    assert measure([("pickle", pickle.dumps(Counted(1.0)))], trusted=TRUST.types) is not None


@pytest.mark.parametrize("parts", [[("joblib", b"nonsense")], [("joblib", b"")], [("onnx", b"x")]])
def test_what_cannot_be_loaded_cannot_be_measured(parts):
    assert measure(parts) is None


def test_a_model_that_ends_the_process_cannot_be_measured():
    assert measure([("pickle", pickle.dumps(LeavesAtOnce()))], trusted=TRUST.types) is None


def test_a_model_that_is_never_read_to_its_end_is_given_up():
    assert measure([("pickle", pickle.dumps(Slow()))], trusted=TRUST.types, timeout_seconds=2) is None


def test_without_an_interpreter_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")

    assert measure([("joblib", dumped(linear(1)))]) is None


def test_an_interpreter_that_reads_nothing_measures_nothing(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")

    assert measure([("joblib", dumped(linear(1)))]) is None
