"""A program is used only where it cannot be told from scikit-learn: here are programs that can."""

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from app import inspection
from app.compiler import drawing, proof
from app.manifest import Golden
from app.model import Model
from app.names import ModelRef
from app.reference import Reference
from tests import zoo
from tests.estimators import Gated
from tests.toy_operations import Careless, Chosen, Crowded, Fussy, Line, Mistaken, Off, line, program

random = np.random.default_rng(11)
X = random.normal(size=(60, 3)).round(3)
WORDS = np.where(X[:, 0] + X[:, 1] > 0, "yes", "no")
SUM = LinearRegression().fit(X, X.sum(axis=1) + random.normal(size=60))
SVC = LinearSVC().fit(X, WORDS)
TREE = DecisionTreeClassifier(max_depth=4, random_state=0).fit(X, WORDS)
KNOWN = X.tolist()


def model(estimator, **more):
    signature = inspection.infer((), estimator, X)
    return Model(ModelRef("m", "1"), signature.model_copy(update=more), estimator)


def labels(estimator=SVC):
    return Chosen(line(estimator), tuple(estimator.classes_.tolist()))


def test_a_program_that_computes_the_same_is_proved_on_thousands_of_rows():
    found = proof.prove(model(SVC), program(predict=labels(), decision_function=line(SVC)), KNOWN)

    assert found.methods == ("predict", "decision_function")
    assert found.rows > 1500
    assert found.parity <= 1e-12
    assert found.failed == {}


def test_the_same_rows_are_drawn_every_time():
    reference = Reference(model(TREE).signature, TREE)
    once, again = (drawing.samples(model(TREE).signature, reference, KNOWN, rows=400) for _ in range(2))

    assert once == again


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (Off(line(SUM), 3e-7, -9.0), "its predict differs from scikit-learn's by 3e-07"),
        (Off(line(SUM), 1e-8, 1e5), "its predict differs from scikit-learn's by 1e-08"),  # beyond all that is recorded
        (Fussy(line(SUM)), "its predict refuses a row that scikit-learn takes"),
        (Crowded(line(SUM), 64), "its predict differs from scikit-learn's"),
        (Crowded(line(SUM), 1), "its predict differs from scikit-learn's"),
        (Line(np.ones((2, 3)), np.zeros(2)), "its predict gives an array of float64 with shape (2,) a row"),
        (labels(), "its predict gives an array of <U3 with shape () a row, scikit-learn one of float64"),
    ],
)
def test_numbers_that_differ_and_rows_that_only_one_refuses_are_found(head, why):
    found = proof.prove(model(SUM), program(predict=head), KNOWN)

    assert found.methods == ()
    assert found.failed["predict"].startswith(why)


def test_a_single_label_of_thousands_is_found():
    chosen = labels()
    number = X[7, 0]
    found = proof.prove(model(SVC), program(predict=Mistaken(chosen, number, "maybe")), KNOWN)

    assert found.failed["predict"].startswith("its predict says 'maybe' where scikit-learn says")


def test_a_missing_value_that_only_the_program_takes_is_found():
    nullable = model(SUM).signature.inputs[0].model_copy(update={"nullable": True})
    loose = model(SUM, inputs=(nullable, *model(SUM).signature.inputs[1:]))
    found = proof.prove(loose, program(predict=Careless(line(SUM))), KNOWN)

    assert found.failed["predict"].startswith("its predict takes a row that scikit-learn refuses (Input X contains NaN")


def test_rows_that_both_refuse_are_no_difference():
    nullable = model(SUM).signature.inputs[0].model_copy(update={"nullable": True})
    loose = model(SUM, inputs=(nullable, *model(SUM).signature.inputs[1:]))

    assert proof.prove(loose, program(predict=line(SUM)), KNOWN).methods == ("predict",)


def test_a_method_that_differs_does_not_take_the_others_with_it():
    found = proof.prove(model(SVC), program(predict=labels(), decision_function=Off(line(SVC), 1e-6, -9.0)), KNOWN)

    assert found.methods == ("predict",)
    assert found.reason == found.failed["decision_function"]


def test_rows_lie_at_the_thresholds_of_trees_and_one_step_beside_them():
    signature = model(TREE).signature
    samples = {s.name: s.instances for s in drawing.samples(signature, Reference(signature, TREE), KNOWN, rows=1200)}
    inner = TREE.tree_.feature >= 0
    thresholds = TREE.tree_.threshold[inner]
    near = {float(value) for row in samples["at thresholds"] for value in row}

    for threshold in thresholds:
        assert threshold in near
        assert {np.nextafter(threshold, way) for way in (-np.inf, np.inf)} <= near
        assert float(np.float32(threshold)) in near
        assert {float(np.nextafter(np.float32(threshold), np.float32(way))) for way in (-np.inf, np.inf)} & near


def test_a_tree_behind_a_scaler_gets_rows_too():
    estimator = make_pipeline(StandardScaler(), TREE)
    signature = inspection.infer((), estimator.fit(X, WORDS), X)
    samples = drawing.samples(signature, Reference(signature, estimator), KNOWN, rows=400)

    assert "at thresholds" not in {sample.name for sample in samples}
    assert sum(len(sample.instances) for sample in samples) > 200


@pytest.mark.parametrize("name", [name for name in zoo.BUILDERS if not name.startswith("own function")])
@pytest.mark.parametrize("with_examples", [True, False])
def test_rows_are_drawn_for_every_kind_of_input_and_the_signature_takes_them(name, with_examples):
    it = zoo.fitted(name)
    examples = inspection.prepare((), it.estimator, it.data) if with_examples else None
    if not with_examples and name in zoo.NEEDS_EXAMPLES:
        pytest.skip("nothing tells its columns")
    signature = inspection.infer((), it.estimator, examples)
    known = inspection.instances_of(examples, signature) if with_examples else []
    samples = drawing.samples(signature, Reference(signature, it.estimator), known, rows=120)

    for sample in samples:
        signature.validate(sample.instances)
    assert sum(len(sample.instances) for sample in samples) > 60


def test_a_comparison_that_takes_too_long_proves_nothing():
    found = proof.prove(model(SUM), program(predict=line(SUM)), KNOWN, seconds=1e-4)

    assert found.methods == ()
    assert found.failed["predict"] == "its predict could not be compared to scikit-learn's within 0.0001 s"


def test_a_comparison_may_take_longer_than_was_planned():
    found = proof.prove(model(SUM), program(predict=line(SUM)), KNOWN, seconds=1e-4, limit=600.0)

    assert found.methods == ("predict",)
    assert 200 <= found.rows < 4000  # as many as are always compared, for want of planned time


def test_a_model_of_which_nothing_is_known_is_not_proved():
    unknown = model(SUM, inputs=())
    found = proof.prove(unknown, program(predict=line(SUM)))

    assert found.methods == ()
    assert found.failed["predict"] == "its predict could be compared to scikit-learn's on 0 rows only"


def test_golden_rows_are_compared_first():
    golden = Golden(instances=KNOWN[:5], outputs={"predict": SUM.predict(X[:5]).tolist()})
    signature = inspection.infer((), SUM, X)
    it = Model(ModelRef("m", "1"), signature, SUM, golden=golden)
    found = proof.prove(it, program(predict=Off(line(SUM), 1e-6, -99.0)))

    assert found.failed["predict"].endswith("(as recorded)")


def test_an_estimator_that_raises_what_it_likes_is_compared_as_well():
    class Broken(Gated):
        def predict(self, rows):
            raise ZeroDivisionError

        transform = predict

    signature = inspection.infer((), Broken(), X)
    found = proof.prove(Model(ModelRef("m", "1"), signature, Broken()), program(predict=line(SUM)), KNOWN)

    assert found.failed["predict"].startswith("its predict takes a row that scikit-learn refuses")


@pytest.mark.parametrize(
    ("was", "now", "wrong"),
    [
        ([1.0, np.nan, np.inf], [1.0, np.nan, np.inf], [False, False, False]),
        ([1.0, 1.0, np.inf], [1.0 + 1e-10, 1.0 + 1e-8, -np.inf], [False, True, True]),
        ([0.0, 1e-20, 0.0], [-0.0, 2e-20, 1e-11], [False, False, True]),
        ([np.nan, 1.0, 1.0], [1.0, np.nan, np.inf], [True, True, True]),
    ],
)
def test_numbers_are_held_against_themselves_or_the_magnitude_of_their_column(was, now, wrong):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, worst = proof.differences(np.array(was), np.array(now), np.array(1.0))

    assert found.tolist() == wrong
    assert worst <= proof.TOLERANCE


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        (np.array([1, 2]), np.array([1, 2], dtype=np.int32), True),
        (np.array([1, 2]), np.array([1.0, 2.0]), False),
        (np.array([True, False]), np.array([1, 0]), False),
        (np.array(["a", "b"]), np.array(["a", "b"], dtype=object), True),
        (np.array(["a", "1"]), np.array(["a", 1], dtype=object), False),
        (np.array([["a"], ["b"]]), np.array(["a", "b"]), False),
    ],
)
def test_labels_are_the_same_when_they_are_in_kind_too(was, now, same):
    wrong, _ = proof.differences(was, now, np.array(0.0))

    assert wrong.any() != same
