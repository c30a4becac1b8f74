"""What a program computes is what the fitted object says: for every form, for generated rows, once written and read."""

from __future__ import annotations

import copy
import functools
import io
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from sklearn import linear_model, svm
from sklearn import preprocessing as pre
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.pipeline import make_pipeline

from app import inspection
from app.compiled.program import Program
from app.compiler.compile import translate
from app.compiler.translation import NotCompilable
from app.model import Model, wire
from app.names import ModelRef
from app.signature import Signature
from demo import models as demo
from tests import zoo
from tests.compiler import fits
from tests.generated import generated
from tests.test_layers import HEAVY, ROOT
from tests.test_served_answers import as_json, as_sent, as_trained, assert_close, rows
from tests.zoo import GAPS, MIXED, NAMED, REAL, TEXTS, WORDS, Fitted, X

# What has no compiled form: someone's own function, float32, pandas' categories, and a few estimators.
NOT_HERE = {
    name
    for name in zoo.BUILDERS
    if re.search("own function|with times|cleaned|mini-batch|birch|kernel density", name)
    or name in ("neighbour imputer", "local outliers", "histogram boosting, categories")
}
CASES = [
    *(pytest.param(zoo.fitted, name, id=name) for name in zoo.BUILDERS if name not in NOT_HERE),
    *(pytest.param(fits.fitted, name, id=f"{name}, here") for name in fits.BUILDERS),
]


def tolerance(name: str) -> float:
    """Kernels are products of matrices here, and sums of many of them cancel out."""
    return 1e-10 if re.search("sv[cmr]|SV[CR]", name) else 1e-12


pytestmark = pytest.mark.filterwarnings("ignore")  # scikit-learn warns of unknown categories and empty columns


def signature_of(estimator: Any, data: Any) -> Signature:
    return inspection.infer([], estimator, inspection.prepare([], estimator, data))


def stored(program: Program) -> Program:
    """The program as it is after it was written and read."""
    body = program.write()
    return Program.read(io.BytesIO(body), len(body))


@functools.cache
def compiled(find: Callable[[str], Fitted], name: str) -> tuple[Any, Model, Program]:
    """The fitted object on one thread, the reference that serves it, and its program."""
    it = find(name)
    estimator = copy.deepcopy(it.estimator)
    signature = signature_of(estimator, it.data)
    return (
        estimator,
        Model(ModelRef("zoo", "1"), signature, estimator),
        stored(translate([], estimator, signature)),
    )


def computed(program: Program, signature: Signature, sent: list[Any], method: str) -> Any:
    result = program.run(signature.validate(sent), method)
    result = result.toarray() if hasattr(result, "toarray") else result
    return list(result) if isinstance(result, tuple) else result


def said(compute: Callable[[], Any]) -> tuple[str, Any]:
    """What an object answers, or how it refuses."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "answer", compute()
        except ValueError as error:
            first = str(error).splitlines()[0]
            return "refusal", sorted(re.split(r"[\[\], ]+", first))  # unknown categories come in any order
        except Exception:  # a fault that is nobody's answer
            return "fault", None


@pytest.mark.parametrize(("find", "name"), CASES)
def test_a_program_answers_as_the_fitted_object_on_its_training_data(find, name):
    it = find(name)
    _, model, program = compiled(find, name)
    examples = inspection.prepare([], it.estimator, it.data)
    rows_of_training = model.signature.validate(inspection.instances_of(examples, model.signature))

    assert program.methods
    for method in program.methods:
        answer = program.run(rows_of_training, method)
        answer = answer.toarray() if hasattr(answer, "toarray") else answer

        assert_close(wire(answer), wire(model.predict(rows_of_training, method)), tolerance(name))


@pytest.mark.parametrize(
    ("find", "name"), [case for case in CASES if not re.search("None|empty column", case.values[1])]
)
def test_a_program_answers_and_refuses_generated_rows_as_the_fitted_object(find, name):
    it = find(name)
    estimator, model, program = compiled(find, name)

    @generated(4)
    @given(rows(it))
    def check(drawn):
        sent = as_sent(it, model, drawn, False, 0)
        for method in program.methods:
            kind, expected = said(lambda method=method: as_json(getattr(estimator, method)(as_trained(it, drawn))))
            found, answer = said(lambda method=method: as_json(computed(program, model.signature, sent, method)))

            assert found == kind, (method, expected, answer)
            if kind == "answer":
                assert_close(answer, expected, tolerance(name))
            else:
                assert answer == expected

    check()


@pytest.mark.parametrize("null", ["i", "n", "b"])
def test_null_among_whole_numbers_is_imputed(null):
    it = fits.fitted("parts of several kinds")
    _, model, program = compiled(fits.fitted, "parts of several kinds")
    frame = it.data[:5].astype({"i": float, "b": object})
    frame.loc[2, null] = np.nan
    sent = json.loads(frame.astype(object).where(frame.notna(), None).to_json(orient="values"))

    assert as_json(computed(program, model.signature, sent, "predict")) == as_json(it.estimator.predict(frame))


@pytest.mark.parametrize("count", [1, 64, 500])
def test_the_columns_of_the_demo_are_equal_in_every_bit(count):
    churn = demo.churn()
    estimator = make_pipeline(churn.estimator[0])
    signature = signature_of(estimator, churn.frame)
    program = stored(translate([], estimator, signature))
    frame = churn.frame[:count]

    answer = program.run(signature.validate(demo.records(frame)), "transform")

    assert np.array_equal(answer, estimator.transform(frame))


@pytest.mark.parametrize("count", [1, 7, 300])
def test_the_scores_of_the_demos_linear_model_are_equal_in_every_bit(count):
    cancer = demo.cancer()
    signature = signature_of(cancer.estimator, cancer.frame)
    program = stored(translate([], cancer.estimator, signature))
    validated = signature.validate(demo.records(cancer.frame[:count]))

    answer = program.run(validated, "decision_function")

    assert np.array_equal(answer, cancer.estimator.decision_function(validated.frame()))


def test_neighbouring_steps_are_one_operation():
    churn = demo.churn()
    estimator = make_pipeline(churn.estimator[0])
    program = translate([], estimator, signature_of(estimator, churn.frame))

    (transform,) = program.heads.values()

    assert program.body is None
    assert [part.kind for part in transform.parts] == ["numbers", "one_hot"]
    assert [step.kind for step in transform.parts[0].steps] == ["fill", "arithmetic", "arithmetic"]


COMPANIONS = {
    "a scaler": (lambda: [pre.StandardScaler().fit(NAMED)], NAMED, WORDS),
    "a scaler without names": (lambda: [pre.StandardScaler().fit(X)], X, WORDS),
    "an encoder of labels": (
        lambda: [pre.StandardScaler().fit(X), pre.LabelEncoder().fit(WORDS)],
        X,
        pre.LabelEncoder().fit_transform(WORDS),
    ),
}


@pytest.mark.parametrize("name", COMPANIONS)
def test_companions_are_applied_before_and_behind_the_model(name):
    make, data, target = COMPANIONS[name]
    companions = make()
    scaled = companions[0].transform(data)
    if isinstance(data, pd.DataFrame):  # fitted on the same columns in another order
        scaled = pd.DataFrame(scaled, columns=data.columns)[list(reversed(data.columns))]
    estimator = linear_model.LogisticRegression().fit(scaled, target)
    signature = inspection.infer(companions, estimator)
    program = stored(translate(companions, estimator, signature))
    model = Model(ModelRef("zoo", "1"), signature, estimator, companions)
    validated = signature.validate(X.tolist())

    for method in signature.methods:
        assert_close(wire(program.run(validated, method)), wire(model.predict(validated, method)), 1e-12)


def squared(values: Any) -> Any:
    return values**2


class OwnScaler(pre.StandardScaler):
    """Somebody's own, which may compute anything."""


REFUSED = {
    "own function": (lambda: make_pipeline(pre.FunctionTransformer(squared), linear_model.Ridge()), X, REAL),
    "own subclass": (lambda: make_pipeline(OwnScaler(), linear_model.Ridge()), X, REAL),
    "function of a text": (
        lambda: make_pipeline(CountVectorizer(preprocessor=str.lower), linear_model.Ridge()),
        TEXTS,
        REAL,
    ),
    "float32": (lambda: make_pipeline(pre.StandardScaler(), linear_model.Ridge()), X.astype(np.float32), REAL),
    "own kernel": (lambda: svm.SVC(kernel=lambda a, b: a @ b.T), X, WORDS),
    "times": (lambda: ColumnTransformer([("a", "passthrough", ["since"])]), MIXED, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_compiled_form_is_refused_with_the_reason(name):
    make, data, target = REFUSED[name]
    estimator = make().fit(data, target)

    with pytest.raises(NotCompilable, match="^(its|a column of) "):
        translate([], estimator, signature_of(estimator, data))


def test_methods_without_a_compiled_form_are_left_out():
    estimator = make_pipeline(pre.StandardScaler(), fits.decomposition.PCA(2)).fit(X)
    signature = signature_of(estimator, X)

    assert signature.methods == ("transform", "score_samples")
    assert translate([], estimator, signature).methods == ("transform",)


def test_an_infinity_that_a_function_makes_is_refused_where_scikit_learn_refuses_it():
    estimator = make_pipeline(pre.FunctionTransformer(np.log), pre.StandardScaler(), linear_model.Ridge())
    estimator.fit(fits.POSITIVE, REAL)
    signature = signature_of(estimator, X)
    program = stored(translate([], estimator, signature))

    with pytest.raises(ValueError, match="^Input X contains infinity or a value too large"):
        program.run(signature.validate([[0.0, 1.0, 1.0, 1.0]]), "predict")


def test_a_program_runs_without_scikit_learn_pandas_and_scipy(tmp_path):
    for number, (name, examples) in enumerate(
        {"mixed, searched": MIXED, "texts": TEXTS, "svc": X, "calibrated, mixed": MIXED, "neighbours": X}.items()
    ):
        _, model, program = compiled(zoo.fitted, name)
        prepared = inspection.prepare([], model.estimator, examples[:3])
        instances = inspection.instances_of(prepared, model.signature)
        (tmp_path / f"{number}.program").write_bytes(program.write())
        (tmp_path / f"{number}.json").write_text(
            json.dumps({"signature": model.signature.model_dump(mode="json"), "instances": instances})
        )
    code = """
import io, json, sys
from pathlib import Path
from app.compiled.program import Program
from app.signature import Signature
for path in Path(sys.argv[1]).glob("*.program"):
    body = path.read_bytes()
    program = Program.read(io.BytesIO(body), len(body))
    told = json.loads(path.with_suffix(".json").read_text())
    rows = Signature.model_validate(told["signature"]).validate(told["instances"])
    for method in program.methods:
        assert len(program.run(rows, method)) == 3
print(json.dumps(sorted(sys.modules)))
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    output = subprocess.run(run, cwd=ROOT, capture_output=True, check=True, text=True).stdout

    assert not {name.split(".")[0] for name in json.loads(output)} & (HEAVY | {"onnxruntime", "onnx"})


def test_nothing_that_is_given_is_changed():
    _, model, program = compiled(zoo.fitted, "logistic, named")
    validated = model.signature.validate(GAPS[~np.isnan(GAPS).any(axis=1)][:9].tolist())
    before = validated.matrix.copy()

    once = program.run(validated, "predict_proba")

    assert np.array_equal(validated.matrix, before)
    assert np.array_equal(program.run(validated, "predict_proba"), once)
