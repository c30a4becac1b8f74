"""From objects and files to a draft: what would not serve is refused here, with a sentence."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.cluster import DBSCAN
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestRegressor
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, LabelEncoder, OneHotEncoder, StandardScaler

from app import inspection, publishing
from app.errors import (
    BundleError,
    GoldenMismatch,
    InvalidInput,
    LoadFailed,
    PublishError,
    UnusableExamples,
    UnusableModel,
    VersionMismatch,
)
from app.manifest import Manifest
from app.model import Model, wire
from app.names import ModelRef
from app.publishing import part_from_file, part_from_object, read_examples
from app.trust import Trust
from tests import estimators
from tests.test_loaders import written_by
from tests.toys import Fails, Lengths, Listed, lengths, small, years
from tests.trusted import TRUST
from tests.zoo import CATEGORIES, COUNT, MIXED, NAMED, REAL, RECORDS, TEXTS, WORDS, X, fitted

REF = ModelRef("churn", "7")


def draft(estimator: Any, examples: Any = None, **companions: Any) -> publishing.Draft:
    parts = {role: part_from_object(role, value) for role, value in {**companions, "model": estimator}.items()}
    return publishing.draft(parts, examples, trust=TRUST)


def as_stored(made: publishing.Draft, estimator: Any, *companions: Any) -> Model:
    manifest = Manifest.decode(made.manifest(REF, "2026-01-01T00:00:00+00:00").encode(), REF)
    return Model(REF, manifest.signature, estimator, companions, golden=manifest.golden)


@pytest.fixture(scope="module")
def plans() -> Any:
    """A pipeline of the columns that survive csv and json, and the table it was fitted on, target along."""
    table = MIXED[["age", "income", "plan", "active"]].assign(churned=WORDS)
    return fitted("mixed, remainder").estimator, table


@pytest.mark.parametrize("ending", ["csv", "parquet", "json", "jsonl", "CSV"])
def test_examples_are_read_from_files_with_the_target_along(tmp_path, plans, ending):
    estimator, table = plans
    path = tmp_path / f"examples.{ending}"
    if ending.lower() == "csv":
        table.to_csv(path, index=False)
    elif ending == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=ending == "jsonl")

    made = draft(estimator, read_examples(path))

    assert [spec.name for spec in made.signature.inputs] == ["income", "plan", "age", "active"]
    assert [spec.datatype for spec in made.signature.inputs][1::2] == ["BYTES", "BOOL"]
    assert made.golden is not None
    assert len(made.golden.instances) == COUNT
    assert as_stored(made, estimator).check() == 0.0


@pytest.mark.parametrize(
    "examples",
    [
        X, X.tolist(), [tuple(row) for row in X.tolist()], sparse.csr_matrix(X), X.astype(np.float32),
        pd.DataFrame(X), pd.DataFrame(X, columns=list("abcd")), {"instances": X.tolist()},
    ],
    ids=["array", "lists", "tuples", "sparse", "float32", "frame", "named frame", "json"],
)  # fmt: skip
def test_examples_come_as_whatever_a_person_has(tmp_path, examples):
    if isinstance(examples, dict):
        (tmp_path / "x.json").write_text(json.dumps(examples))
        examples = read_examples(tmp_path / "x.json")

    made = draft(Ridge().fit(X, REAL), examples)

    assert made.golden is not None
    assert as_stored(made, Ridge().fit(X, REAL)).check() is not None


@pytest.mark.parametrize(
    "examples",
    [TEXTS, pd.Series(TEXTS), np.array(TEXTS), pd.DataFrame({"label": 1, "text": TEXTS}), [[text] for text in TEXTS]],
    ids=["list", "series", "array", "frame", "rows"],
)
def test_texts_come_as_whatever_a_person_has(examples):
    made = draft(fitted("texts").estimator, examples)

    assert made.signature.layout == "text"
    assert made.golden is not None
    assert made.golden.instances == TEXTS


def test_records_come_as_a_list_of_objects():
    assert draft(fitted("records").estimator, RECORDS).signature.layout == "records"


def test_whole_numbers_of_json_do_not_make_a_column_of_integers():
    made = draft(Ridge().fit(NAMED, REAL), [dict.fromkeys(NAMED.columns, 1)])

    assert {spec.datatype for spec in made.signature.inputs} == {"FP64"}


def test_a_column_without_a_value_in_the_examples_is_what_fitting_knew():
    estimator = make_pipeline(OneHotEncoder(handle_unknown="ignore"), Ridge()).fit(MIXED[["plan"]], REAL)
    made = draft(estimator, pd.DataFrame({"plan": [np.nan, np.nan]}))

    assert made.signature.inputs[0].datatype == "BYTES"


def test_the_categories_of_training_are_kept():
    made = draft(fitted("histogram boosting, categories").estimator, CATEGORIES[:3])
    colour, grade = made.signature.inputs[1:]

    assert colour.categories == ("blue", "green", "red")
    assert (grade.categories, grade.ordered, grade.datatype) == ((1, 2, 3, 4), True, "INT64")


@pytest.mark.parametrize(
    ("estimator", "examples", "sentence"),
    [
        ("mixed", MIXED.drop(columns="age"), "the examples have no column 'age'; they have income, plan"),
        ("ridge", X[:, :3], "the examples have 3 columns, the model was trained with 4"),
        ("ridge", X[:0], "the examples have no rows"),
        ("ridge", X[0], "expected a DataFrame, an array of shape"),
        ("ridge", TEXTS, "expected a DataFrame, an array of shape"),
        ("ridge", [[1, 2, 3, 4], [1]], "the examples are rows of different lengths"),
        ("ridge", np.array([["a"] * 4]), "the model cannot answer predict for the examples"),
        ("ridge", [[1, 2, 3, 1 + 2j]], "a value of type complex cannot be written as JSON"),
        ("ridge", [[1, 2, 3, "\ud800"]], "half a surrogate pair"),
        ("texts", pd.DataFrame({"a": TEXTS, "b": TEXTS}), "have 2 columns of strings, expected one"),
        ("texts", [1, 2], r"instances\[0\]: expected a string, got 1"),
        (
            "mixed", MIXED.assign(plan=range(COUNT)),
            "column 'plan' was strings in training and is whole numbers in the examples: give them with the dtypes",
        ),
        ("mixed, with times", MIXED.assign(since=MIXED["since"].astype(str)), "the model cannot answer predict .*: AttributeError"),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_used_are_refused(estimator, examples, sentence):
    with pytest.raises(UnusableExamples, match=sentence):
        draft(fitted(estimator).estimator, examples)


def halve_whole_numbers(frame: pd.DataFrame) -> Any:
    """Tell apart what JSON cannot: 2 and 2.0."""
    return np.array(
        [[value / 2 if isinstance(value, int) else value for value in row] for row in frame.to_numpy()], float
    )


def test_examples_that_give_other_answers_after_json_are_refused():
    frame = pd.DataFrame({"a": pd.Series([1, 2.5, 3], dtype=object)})
    estimator = make_pipeline(FunctionTransformer(halve_whole_numbers), LinearRegression()).fit(frame, [1, 2, 3])

    with pytest.raises(UnusableExamples, match="give other answers once they have been JSON: examples: golden row 0"):
        draft(estimator, frame)


def test_a_draft_keeps_a_hundred_rows_and_no_more_than_a_quarter_of_a_megabyte():
    many = draft(Ridge().fit(X, REAL), np.tile(X, (9, 1)))
    long = draft(make_pipeline(CountVectorizer(), Ridge()).fit(TEXTS, REAL), ["x" * 50_000] * 20)
    wide = draft(
        CountVectorizer(analyzer="char", ngram_range=(1, 4)).fit([chr(n) * 3 for n in range(1000)]), ["a"] * 90
    )

    assert many.golden is not None
    assert long.golden is not None
    assert wide.golden is not None
    assert len(many.golden.instances) == 100
    assert len(long.golden.instances) == 5
    assert len(json.dumps(wide.golden.outputs)) < 300_000


def bare(estimator: Any) -> Model:
    return Model(REF, inspection.infer([], estimator), estimator)


def ask(model: Model, instances: list[Any]) -> list[Any]:
    return wire(model.predict(model.signature.validate(instances), "predict"))


PLANS = pd.DataFrame({"plan": ["Pro", "free", "PRO", "Free"] * 5, "age": [1.0, 2, 3, 4] * 5})
SPENT = np.arange(20.0)


def test_a_column_behind_a_function_is_taken_as_it_comes():
    words = make_pipeline(FunctionTransformer(small), OneHotEncoder())
    columns = ColumnTransformer([("w", words, ["plan"]), ("n", StandardScaler(), ["age"])])
    model = bare(make_pipeline(columns, Ridge()).fit(PLANS, SPENT))

    assert ask(model, PLANS.to_dict("records")) == model.estimator.predict(PLANS).tolist()
    with pytest.raises(InvalidInput, match=r"instances\[0\]\.age: expected FP64, got"):
        ask(model, [{"plan": "Pro", "age": "old"}])
    with pytest.raises(InvalidInput, match="nothing tells what its columns hold: publish it with --examples"):
        ask(model, [{"plan": None, "age": 1}, {"plan": "a", "age": 1}, {"plan": True, "age": 1}])


def test_a_column_that_passes_into_a_function_is_taken_as_it_comes():
    columns = ColumnTransformer([("w", "passthrough", ["plan"])])
    model = bare(make_pipeline(columns, FunctionTransformer(lengths), Ridge()).fit(PLANS, SPENT))

    assert ask(model, [["Pro"], ["free"]]) == model.estimator.predict(PLANS[:2]).tolist()


def test_columns_within_columns_are_known():
    inner = ColumnTransformer([("w", OneHotEncoder(), ["plan"]), ("n", StandardScaler(), ["age"])])
    outer = ColumnTransformer([("n", StandardScaler(), ["more"]), ("inner", inner, ["age", "plan"])])
    table = PLANS.assign(more=1.0, unused=2.0)
    model = bare(make_pipeline(outer, Ridge()).fit(table, SPENT))

    assert {spec.name: (spec.datatype, spec.is_anything) for spec in model.signature.inputs} == {
        "plan": ("BYTES", False), "age": ("FP64", False), "more": ("FP64", False),
    }  # fmt: skip
    assert model.signature.ignored == ("unused",)
    assert ask(model, table.to_dict("records")) == model.estimator.predict(table).tolist()


def test_a_bare_model_behind_a_class_of_ones_own_takes_lists_of_anything_and_says_how_to_send_objects():
    model = bare(make_pipeline(Lengths(), Ridge()).fit(PLANS[["plan"]], SPENT))

    assert ask(model, [["Pro"], ["free"]]) == model.estimator.predict(PLANS[["plan"]][:2]).tolist()
    with pytest.raises(InvalidInput, match="publish it with --examples to send objects"):
        ask(model, [{"plan": "Pro"}])


def test_functions_of_numpy_take_numbers():
    model = bare(make_pipeline(FunctionTransformer(np.exp), Ridge()).fit(NAMED, REAL))

    with pytest.raises(InvalidInput, match="expected FP64, got"):
        ask(model, [["x", 1, 2, 3]])


def test_zip_codes_of_csv_are_strings_where_they_were_in_training(tmp_path):
    table = pd.DataFrame({"zip": ["01234", "99999", None, "00001"] * 5, "age": range(20)})
    columns = ColumnTransformer([("w", OneHotEncoder(), ["zip"]), ("n", StandardScaler(), ["age"])])
    estimator = make_pipeline(columns, Ridge()).fit(table, SPENT)
    table.assign(target=1).to_csv(tmp_path / "x.csv", index=False)

    made = draft(estimator, read_examples(tmp_path / "x.csv"))

    assert made.golden is not None
    assert made.golden.instances[:3] == [["01234", 0], ["99999", 1], [None, 2]]
    assert np.allclose(made.golden.outputs["predict"], estimator.predict(table))


def test_csv_of_a_model_without_names_is_strings_by_position(tmp_path):
    table = np.array([["01234", "1"], ["99999", "2"]], dtype=object)
    pd.DataFrame(table, columns=["zip", "n"]).to_csv(tmp_path / "x.csv", index=False)

    made = draft(OneHotEncoder().fit(table), read_examples(tmp_path / "x.csv"))

    assert made.golden is not None
    assert made.golden.instances == table.tolist()


@pytest.mark.parametrize("encoder", [OneHotEncoder(), FunctionTransformer(years)])
def test_times_of_csv_are_refused_with_the_way_out(tmp_path, encoder):
    table = pd.DataFrame({"since": pd.to_datetime(["2024-01-01", "2025-01-01"])})
    estimator = make_pipeline(encoder, Ridge()).fit(table, [1, 2])
    table.to_csv(tmp_path / "x.csv", index=False)

    with pytest.raises(UnusableExamples, match=r"'since' .*: use parquet, or save\(\) with a DataFrame"):
        draft(estimator, read_examples(tmp_path / "x.csv"))


@pytest.mark.parametrize("values", [[1, None, 3], [1, 2, 3], [0.5, None, 2], [1, np.nan, 3]])
@pytest.mark.parametrize("ending", [None, "csv", "json"])
def test_numbers_that_are_objects_stay_what_they_were(tmp_path, values, ending):
    table = pd.DataFrame({"a": pd.Series(values * 4, dtype=object)})
    estimator = make_pipeline(OneHotEncoder(), Ridge()).fit(table, range(12))
    examples = table
    if ending:
        path = tmp_path / f"x.{ending}"
        table.to_csv(path, index=False) if ending == "csv" else table.to_json(path, orient="records")
        examples = read_examples(path)

    made, model = draft(estimator, examples), bare(estimator)
    sent = [[None if pd.isna(value) else value] for value in table["a"]]

    assert made.golden is not None
    assert made.golden.outputs["predict"] == estimator.predict(table).tolist()
    assert ask(model, sent) == ask(model, [[value] for [value] in sent]) == estimator.predict(table).tolist()


def test_a_column_of_intervals_is_named():
    cut = pd.DataFrame({"age": pd.cut(pd.Series(range(20)), 3)})

    with pytest.raises(UnusableExamples, match="column 'age': a value of type Interval cannot be written as JSON"):
        draft(make_pipeline(FunctionTransformer(lengths), Ridge()).fit(cut, SPENT), cut)


def test_a_failing_publish_says_the_cause_and_sends_nobody_to_a_log():
    with pytest.raises(UnusableExamples) as caught:
        draft(Fails(), np.ones((2, 3)))

    assert "ZeroDivisionError" in str(caught.value)
    assert "log" not in str(caught.value)


def test_a_list_of_numpy_floats_is_one_output():
    assert draft(Listed(), np.ones((2, 3))).signature.outputs[0].shape == (-1,)


def test_companions_come_first_in_their_order():
    scaler, encoder = StandardScaler().fit(X), LabelEncoder().fit(WORDS)
    estimator = LogisticRegression().fit(scaler.transform(X), encoder.transform(WORDS))

    made = draft(estimator, X, encoder=encoder, scaler=scaler)

    assert [part.path for part in made.parts] == ["scaler.joblib", "encoder.joblib", "model.joblib"]
    assert as_stored(made, estimator, scaler, encoder).check() == 0.0


def test_companions_that_do_not_fit_are_refused():
    with pytest.raises(BundleError, match="they do not belong together"):
        draft(Ridge().fit(X, REAL), scaler=StandardScaler().fit(X[:, :2]))


def test_a_tampered_golden_row_fails_the_check():
    estimator = Ridge().fit(NAMED, REAL)
    body = draft(estimator, NAMED).manifest(REF, "").encode()
    assert Manifest.decode(body, REF).golden is not None
    document = json.loads(body)
    document["golden"]["instances"][2][0] += 0.1
    manifest = Manifest.decode(json.dumps(document).encode(), REF)

    with pytest.raises(GoldenMismatch, match="churn/7: golden row 2: predict gave"):
        Model(REF, manifest.signature, estimator, golden=manifest.golden).check()


@pytest.mark.parametrize("value", [DBSCAN().fit(X), {"model": 1}, "text", LabelEncoder])
def test_what_has_no_method_to_serve_is_refused(value):
    if value is LabelEncoder:
        value = [1, 2]
    with pytest.raises(UnusableModel, match="has none of the methods that can be served"):
        draft(value)


def test_a_model_that_was_never_fitted_is_refused():
    with pytest.raises(UnusableModel, match="its Ridge was saved before it was fitted"):
        draft(Ridge())


@pytest.mark.parametrize("format", ["joblib", "pickle"])
def test_a_lambda_cannot_be_published(format):
    with pytest.raises(PublishError, match=r"the model cannot be written as .*; a lambda .*: define it in a module"):
        part_from_object("model", FunctionTransformer(lambda x: x), format)


def test_an_unknown_format_cannot_be_published():
    with pytest.raises(PublishError, match="format 'onnx' is not one of joblib, pickle, skops"):
        part_from_object("model", Ridge(), "onnx")


def test_a_function_of_a_notebook_cannot_be_published(monkeypatch):
    notebook = types.ModuleType("__main__")
    exec("def double(x):\n    return 2 * x", notebook.__dict__)  # noqa: S102 - as a notebook does
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    estimator = make_pipeline(FunctionTransformer(notebook.double), Ridge()).fit(X, REAL)

    with pytest.raises(LoadFailed, match="double was defined in the notebook or script that trained it"):
        draft(estimator, X)


def test_a_function_of_a_module_can_be_published():
    assert draft(fitted("own function").estimator, X).golden is not None


def test_a_file_is_read_by_its_ending(tmp_path):
    for ending, format in ((".joblib", "joblib"), (".pkl", "pickle"), (".PICKLE", "pickle"), (".skops", "skops")):
        (tmp_path / f"m{ending}").write_bytes(b"x")

        assert part_from_file("model", tmp_path / f"m{ending}").format == format


@pytest.mark.parametrize("name", ["model.h5", "model", "absent.pkl", "folder.pkl"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name):
    (tmp_path / "folder.pkl").mkdir()

    with pytest.raises(PublishError) as caught:
        part_from_file("model", tmp_path / name)

    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "body"),
    [("a.csv", b""), ("a.parquet", b"x"), ("a.json", b"{"), ("a.json", b"3"), ("a.xlsx", b"x"), ("absent.csv", None)],
)
def test_examples_that_cannot_be_read_are_refused(tmp_path, name, body):
    if body is not None:
        (tmp_path / name).write_bytes(body)

    with pytest.raises(UnusableExamples) as caught:
        read_examples(tmp_path / name)

    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"\x00" * 50, b"random" * 9])
def test_a_broken_file_makes_no_draft(tmp_path, body):
    path = tmp_path / "model.pkl"
    path.write_bytes(body)

    with pytest.raises(LoadFailed, match=r"^model.pkl: "):
        publishing.draft({"model": part_from_file("model", path)}, trust=TRUST)


def test_the_versions_are_recorded():
    found = draft(Ridge().fit(X, REAL)).trained_with

    assert set(found) == {"python", "scikit-learn", "numpy", "scipy", "joblib", "pandas"}


def test_a_model_of_another_scikit_learn_says_so(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(written_by("1.2.2", RandomForestRegressor(3).fit(X, REAL)))

    parts = {"model": part_from_file("model", path)}

    with pytest.raises(VersionMismatch, match="trained with scikit-learn 1.2.2, here is scikit-learn"):
        publishing.draft(parts)
    assert publishing.draft(parts, trust=Trust(version_policy="warn")).trained_with["scikit-learn"] == "1.2.2"


def test_what_the_model_never_reads_need_not_be_sent():
    made = draft(fitted("mixed").estimator, MIXED)

    assert made.signature.ignored == ("since", "unused")
    assert [spec.name for spec in made.signature.inputs] == ["age", "income", "plan", "active", "note"]


def test_a_text_column_among_others_takes_no_null():
    nullable = {spec.name: spec.nullable for spec in draft(fitted("mixed").estimator).signature.inputs}

    assert nullable == {"age": True, "income": True, "plan": True, "active": False, "note": False}


def test_columns_by_position_keep_their_kinds():
    columns = ColumnTransformer([("w", OneHotEncoder(), [0]), ("n", StandardScaler(), [1])])
    estimator = make_pipeline(columns, Ridge()).fit(MIXED[["note", "age"]].to_numpy(dtype=object), REAL)

    assert [spec.datatype for spec in draft(estimator).signature.inputs] == ["BYTES", "FP64"]


def test_a_file_of_joblib_and_its_bytes_are_the_same_draft(tmp_path: Path):
    estimator = Ridge().fit(X, REAL)
    joblib.dump(estimator, tmp_path / "m.joblib")

    assert part_from_file("model", tmp_path / "m.joblib") == part_from_object("model", estimator)


def test_the_signature_says_what_each_method_gives():
    numbers = draft(LinearRegression().fit(X, np.column_stack([REAL, REAL])), X)
    words = draft(LogisticRegression().fit(X, WORDS), X)

    assert [(spec.name, spec.datatype, spec.shape) for spec in numbers.signature.outputs] == [
        ("predict", "FP64", (-1, 2))
    ]
    by_method = {spec.name: (spec.datatype, spec.shape) for spec in words.signature.outputs}
    classes = len(set(WORDS))
    assert by_method["predict"] == ("BYTES", (-1,))
    assert by_method["predict_proba"] == ("FP64", (-1, classes))


@pytest.mark.parametrize(
    ("function", "examples", "rowwise"),
    [
        (estimators.doubled, X, True),
        (estimators.less_the_mean, X, False),
        (estimators.doubled, None, False),  # nothing has shown what it does
        (np.log1p, None, True),  # a ufunc: each value for itself
    ],
)
def test_whether_a_row_may_be_computed_beside_others_is_found_out(function, examples, rowwise):
    model = make_pipeline(FunctionTransformer(function), Ridge()).fit(np.abs(X), REAL)

    assert draft(model, None if examples is None else np.abs(examples)).signature.rowwise is rowwise
