"""What the gate finds of a loaded model is plain data, and what serves afterwards is made of it without a prediction."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import OneHotEncoder
from sklearn.svm import LinearSVC

from app import gate as gates
from app import inspection, sampling
from app.errors import GoldenMismatch
from app.gate import Gate, gate, settle
from app.manifest import Golden
from app.model import Model
from app.names import ModelRef
from app.timing import race
from tests import zoo
from tests.estimators import Endless
from tests.toy_operations import Chosen, Mistaken, line, program

pytestmark = pytest.mark.usefixtures("one_thread")
random = np.random.default_rng(2)
X = random.normal(size=(60, 3)).round(3)
WORDS = np.where(X[:, 0] > 0, "yes", "no")
SVC = LinearSVC().fit(X, WORDS)
SUM = LinearRegression().fit(X, X.sum(axis=1))
REF = ModelRef("m", "1")


def model(estimator=SUM, **more):
    return Model(REF, inspection.infer((), estimator, X), estimator, **more)


def candidate():
    return program(predict=Chosen(line(SVC), tuple(SVC.classes_.tolist())), decision_function=line(SVC))


@pytest.fixture
def patient(monkeypatch):
    """A load that may take its time, because other tests keep this machine busy."""
    monkeypatch.setattr(gates, "COMPILE_SECONDS", 60.0)


def golden(offset=0.0):
    return Golden(instances=X[:5].tolist(), outputs={"predict": (SUM.predict(X[:5]) + offset).tolist()})


def test_a_gate_goes_from_one_process_to_another_as_json(patient):
    found = gate(model(SVC, candidate=candidate()))

    assert Gate.model_validate(json.loads(json.dumps(found.model_dump(mode="json")))) == found


def test_costs_are_seconds_of_batches_of_three_sizes():
    costs = gates.costs(model(golden=golden()), seconds=60)
    within_a_load = gate(model(golden=golden())).costs  # for which there is less time

    assert costs is not None
    assert within_a_load is not None
    assert set(costs) == {1, 64, 1000}
    assert {1} <= set(within_a_load) <= {1, 64, 1000}
    assert all(seconds > 0 for found in (costs, within_a_load) for seconds in found.values())


def test_the_golden_rows_must_come_out():
    assert gate(model(golden=golden())).parity == 0.0
    with pytest.raises(GoldenMismatch, match="golden row 0"):
        gate(model(golden=golden(0.1)))


def test_each_runtime_that_may_serve_computes_the_golden_rows():
    wrong = model(golden=golden()).settled(program(predict=line(LinearRegression().fit(X, X[:, 0]))), None, None)

    assert model(golden=golden()).settled(program(predict=line(SUM)), None, None).check() < 1e-9
    with pytest.raises(GoldenMismatch, match="its compiled form: golden row 0"):
        gate(wrong)


def test_a_candidate_that_is_right_serves_beside_its_estimator(patient):
    it = model(SVC, candidate=candidate())
    found = gate(it)
    serving = settle(it, found)

    assert it.runtime == "sklearn"
    assert serving.runtime == "compiled+sklearn"
    assert serving.estimator is SVC
    assert found.compiled is not None
    assert found.compiled.rows > 500
    assert serving.compiled == found.compiled
    rows = serving.signature.validate(X.tolist())
    assert serving.predict_by("compiled", rows, "predict").tolist() == SVC.predict(X).tolist()


def test_a_candidate_that_is_wrong_does_not(patient):
    chosen = Chosen(line(SVC), tuple(SVC.classes_.tolist()))
    base = sampling.instances(model(SVC).signature, 60, seed=0)
    it = model(SVC, candidate=program(predict=Mistaken(chosen, base[3][0], "?")))
    found = gate(it)
    serving = settle(it, found)

    assert serving.runtime == "sklearn"
    assert serving.not_compiled == found.not_compiled
    assert "says '?' where scikit-learn says" in str(found.not_compiled)


def test_a_candidate_that_cannot_be_proved_in_time_does_not(monkeypatch):
    monkeypatch.setattr(gates, "COMPILE_SECONDS", 1e-3)
    found = gate(model(SVC, candidate=candidate()))

    assert found.compiled is None
    assert "within" in str(found.not_compiled)


def test_what_took_its_time_to_be_translated_is_not_proved(monkeypatch):
    monkeypatch.setattr(gates, "COMPILE_SECONDS", 0.0)

    assert gate(model(SVC, candidate=candidate())).not_compiled == "compiling it took longer than a load may"


def test_what_refuses_rows_that_are_made_up_has_no_costs():
    encoder = OneHotEncoder(categories=[["very", "odd"], ["words"]]).fit([["odd", "words"]])
    it = Model(REF, inspection.infer((), encoder), encoder)

    assert gate(it).costs is None


def test_what_takes_any_width_has_no_costs():
    signature = inspection.infer((), SUM).model_copy(update={"inputs": ()})

    assert gate(Model(REF, signature, SUM)).costs is None


def test_the_code_of_others_is_not_run_on_rows_that_nobody_sent():
    assert gate(Model(REF, inspection.infer((), Endless()), Endless())).costs is None


def test_a_batch_that_would_take_too_long_is_not_tried():
    computed = []

    class Noted(Model):
        def predict(self, rows, method):
            computed.append(rows.count)
            return super().predict(rows, method)

    points = random.normal(size=(100_000, 3))
    neighbours = KNeighborsRegressor(algorithm="brute", metric="manhattan").fit(points, points[:, 0])
    it = Noted(REF, inspection.infer((), neighbours, X), neighbours)
    alone = race({"": lambda rows: it.predict(rows, "predict")}, {1: it.signature.validate(X[:1].tolist())}, seconds=1)
    costs = gates.costs(it, seconds=16 * alone[""][1])

    assert costs is not None
    assert set(costs) == {1}
    assert max(computed) <= 8


def test_ways_race_on_the_same_rows_and_the_best_of_each_counts():
    it = model()
    rows = {size: it.signature.validate(X[:1].tolist() * size) for size in (1, 8, 64)}
    seen = []
    found = race(
        {"a": lambda rows: seen.append(("a", rows.count)), "b": lambda rows: seen.append(("b", rows.count))},
        rows,
        seconds=5,
    )

    assert set(found) == {"a", "b"}
    assert set(found["a"]) == set(found["b"]) == {1, 64}
    assert seen[:4] == [("a", 1), ("b", 1), ("a", 1), ("b", 1)]


@pytest.mark.parametrize("name", [*zoo.BUILDERS])
def test_every_kind_of_model_passes_its_gate(name):
    it = zoo.fitted(name)
    if name in zoo.NEEDS_EXAMPLES:
        pytest.skip("nothing tells its columns")
    found = gate(Model(REF, inspection.infer((), it.estimator), it.estimator))

    assert found.parity is None
    assert found.costs is None or 1 in found.costs


def test_a_settled_model_is_made_without_a_prediction(patient):
    found = Gate.model_validate(gate(model(SVC, candidate=candidate())).model_dump(mode="json"))

    class Untouched(LinearSVC):
        def predict(self, rows):
            raise AssertionError("computed")

    untouched = Model(REF, model(SVC).signature, Untouched().fit(X, WORDS), candidate=candidate())

    assert settle(untouched, found).runtime == "compiled+sklearn"
