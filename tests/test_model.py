"""Companions, errors, golden rows: what stands around an estimator, and what it says when something is wrong."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    LabelBinarizer,
    LabelEncoder,
    MultiLabelBinarizer,
    OneHotEncoder,
    PolynomialFeatures,
    PowerTransformer,
    SplineTransformer,
    StandardScaler,
)

from app import inspection
from app.bundle import Bundle, Part
from app.errors import (
    CompanionFailed,
    GoldenMismatch,
    InvalidInput,
    LoadFailed,
    PredictionFailed,
    RequestTooLarge,
    UnusableModel,
)
from app.manifest import Artifact, Golden, Manifest
from app.model import Model, compare, part_of, use_one_thread, wire
from app.names import ModelRef
from app.signature import MAX_COLUMNS
from app.storage.local import LocalStorage
from app.storage.reader import CHUNK_BYTES
from tests.zoo import MIXED, NAMED, NUMBERS, REAL, TEXTS, WORDS, X, fitted

REF = ModelRef("zoo", "1")


def serve(estimator: Any, *companions: Any, **more: Any) -> Model:
    return Model(REF, inspection.infer(companions, estimator), estimator, companions, **more)


def answer(model: Model, instances: list[Any], method: str = "predict") -> list[Any]:
    return wire(model.predict(model.signature.validate(instances), method))


def test_a_scaler_of_arrays_is_applied_before_the_model():
    scaler = StandardScaler().fit(X)
    model = LogisticRegression().fit(scaler.transform(X), WORDS)

    assert answer(serve(model, scaler), X.tolist()) == model.predict(scaler.transform(X)).tolist()


def test_a_scaler_of_frames_stands_before_a_model_of_arrays():
    scaler = StandardScaler().fit(NAMED)
    model = Ridge().fit(scaler.transform(NAMED), REAL)
    served = serve(model, scaler)

    assert served.signature.layout == "frame"
    assert answer(served, NAMED.to_dict("records")) == model.predict(scaler.transform(NAMED)).tolist()


def test_a_scaler_of_arrays_stands_before_a_model_of_frames():
    scaler = StandardScaler().fit(X)
    scaled = pd.DataFrame(scaler.transform(X), columns=NAMED.columns)
    model = Ridge().fit(scaled, REAL)

    np.testing.assert_allclose(answer(serve(model, scaler), X.tolist()), model.predict(scaled), rtol=1e-12)


def test_frames_from_one_stage_become_arrays_for_the_next_that_was_fitted_on_those():
    scaler = StandardScaler().set_output(transform="pandas").fit(NAMED)
    model = Ridge().fit(scaler.transform(NAMED).to_numpy(), REAL)

    np.testing.assert_allclose(
        answer(serve(model, scaler), NAMED.to_numpy().tolist()), model.predict(scaler.transform(NAMED).to_numpy())
    )


def test_scaler_encoder_and_preprocessor_are_applied_in_this_order():
    scaler = StandardScaler().fit(X)
    encoder = FunctionTransformer(np.square).fit(scaler.transform(X))
    preprocessor = PCA(2).fit(encoder.transform(scaler.transform(X)))
    ready = preprocessor.transform(encoder.transform(scaler.transform(X)))
    model = Ridge().fit(ready, REAL)

    assert answer(serve(model, scaler, encoder, preprocessor), X.tolist()) == model.predict(ready).tolist()


def test_an_encoder_of_words_stands_before_the_model():
    encoder = OneHotEncoder(handle_unknown="ignore").fit(MIXED[["plan", "active"]])
    model = Ridge().fit(encoder.transform(MIXED[["plan", "active"]]), REAL)
    served = serve(model, encoder)

    assert [spec.datatype for spec in served.signature.inputs] == ["BYTES", "BOOL"]
    expected = model.predict(encoder.transform(MIXED[["plan", "active"]][1:3])).tolist()
    rows = MIXED[["plan", "active"]][1:3].to_dict("records")
    assert answer(served, rows) == expected


def test_a_vectorizer_stands_before_the_model():
    vectorizer = TfidfVectorizer().fit(TEXTS)
    model = MultinomialNB().fit(vectorizer.transform(TEXTS), WORDS)

    assert answer(serve(model, vectorizer), TEXTS) == model.predict(vectorizer.transform(TEXTS)).tolist()


def test_a_label_encoder_decodes_what_the_model_says():
    encoder = LabelEncoder().fit(WORDS)
    model = LogisticRegression().fit(X, encoder.transform(WORDS))
    served = serve(model, encoder)

    assert served.signature.classes == ["ant", "bee", "Ω"]
    assert answer(served, X.tolist()) == encoder.inverse_transform(model.predict(X)).tolist()
    assert answer(served, X.tolist(), "predict_proba") == model.predict_proba(X).tolist()


def test_a_label_binarizer_decodes_what_the_model_says():
    binarizer = LabelBinarizer().fit(WORDS)
    model = RandomForestClassifier(5, random_state=0).fit(X, binarizer.transform(WORDS))

    assert answer(serve(model, binarizer), X.tolist()) == binarizer.inverse_transform(model.predict(X)).tolist()


def test_a_scaler_and_a_label_encoder_go_together():
    scaler, encoder = StandardScaler().fit(NAMED), LabelEncoder().fit(WORDS)
    model = LogisticRegression().fit(scaler.transform(NAMED), encoder.transform(WORDS))

    served = serve(model, encoder, scaler)

    said = encoder.inverse_transform(model.predict(scaler.transform(NAMED)))
    assert answer(served, NAMED.to_dict("records")) == said.tolist()


@pytest.mark.parametrize(
    ("companion", "sentence"),
    [
        (
            StandardScaler().fit(X[:, :3]),
            "its StandardScaler gives 3 columns, the LogisticRegression behind it takes 4",
        ),
        (PCA(2).fit(X), "its PCA gives 2 columns, the LogisticRegression behind it takes 4"),
        (KMeans(2, n_init=1).fit(X), "its KMeans gives 2 columns"),
        (Ridge().fit(X, REAL), "a Ridge has no transform and cannot stand before the model"),
        ({"plan": LabelEncoder()}, "a dict has no transform and cannot stand before the model"),
        (
            LabelEncoder().fit(["x", "y"]),
            "its LabelEncoder decodes the numbers 0 to 1, the LogisticRegression says 0, 1, 2",
        ),
    ],
)
def test_companions_that_do_not_belong_to_the_model_are_refused(companion, sentence):
    model = LogisticRegression().fit(X, NUMBERS)

    with pytest.raises(CompanionFailed) as caught:
        serve(model, companion)

    assert str(caught.value).startswith(sentence)


def test_a_label_encoder_is_refused_where_the_model_says_words_already():
    with pytest.raises(CompanionFailed, match="the LogisticRegression says ant, bee, Ω: they do not belong together"):
        serve(LogisticRegression().fit(X, WORDS), LabelEncoder().fit(WORDS))


@pytest.mark.parametrize("parts", [(LogisticRegression(),), (LogisticRegression().fit(X, WORDS), StandardScaler())])
def test_what_was_never_fitted_is_refused(parts):
    with pytest.raises(UnusableModel, match="was saved before it was fitted"):
        serve(*parts)


@pytest.mark.parametrize("thing", [{"model": 1}, [1], "text", None, LabelEncoder])
def test_what_does_not_predict_is_refused(thing):
    with pytest.raises(UnusableModel, match="has none of the methods that can be served"):
        inspection.infer([], thing if thing is not LabelEncoder else object())


def test_null_that_the_estimator_refuses_is_pointed_at():
    rows = NAMED[:2].to_numpy().tolist()
    rows[1][1] = None

    with pytest.raises(InvalidInput, match="the model cannot take this input: Input X contains NaN") as caught:
        answer(serve(Own().fit(NAMED, REAL)), rows)

    assert [(it.path, it.got) for it in caught.value.violations] == [('instances[1]["b b"]', "null")]


def test_a_number_beyond_32_bits_that_a_forest_refuses_is_pointed_at():
    with pytest.raises(InvalidInput) as caught:
        answer(serve(fitted("forest").estimator), [[0, 0, 0, 0], [0, 0, 1e300, 0]])

    assert [(it.path, it.got) for it in caught.value.violations] == [("instances[1][2]", "1e+300")]


def test_a_word_that_training_never_had_is_the_callers_error():
    encoder = OneHotEncoder().fit(MIXED[["note"]])

    with pytest.raises(InvalidInput, match=r"unknown categories \['new'\]"):
        answer(serve(encoder), [["new"]], "transform")


def test_a_negative_number_that_no_transformation_is_defined_for_is_the_callers_error():
    with pytest.raises(InvalidInput, match="strictly positive data"):
        answer(serve(PowerTransformer("box-cox").fit(np.abs(X) + 1)), [[1, 2, -3, 4]], "transform")


def test_the_number_of_a_category_that_training_never_had_is_the_callers_error():
    with pytest.raises(InvalidInput, match="index 9 is out of bounds for axis 1 with size 9"):
        answer(serve(fitted("categorical bayes").estimator), [[0, 9, 0, 0]])


def test_what_a_function_cannot_compute_of_values_that_nothing_tells_to_be_right_is_the_callers_error():
    with pytest.raises(InvalidInput, match="nothing tells what its columns hold"):
        answer(serve(fitted("own function").estimator), [[1e200, "a", 0, 0]])


class Own(Ridge):
    """Of somebody's own making: whether it takes missing values cannot be known before."""


class Broken(LinearRegression):
    def predict(self, X: Any) -> Any:
        raise OSError("secret of /home/me/weights.bin")


class Short(LinearRegression):
    def predict(self, X: Any) -> Any:
        return super().predict(X)[1:]


@pytest.mark.parametrize("kind", [Broken, Short])
def test_what_an_estimator_raises_is_told_to_nobody(kind):
    with pytest.raises(PredictionFailed) as caught:
        answer(serve(kind().fit(X, REAL)), [[1, 2, 3, 4]])

    assert str(caught.value) == "the model could not compute this input; the service's log says why"
    assert caught.value.__cause__ is not None


def test_a_sparse_answer_that_would_fill_the_memory_is_refused():
    model = serve(HashingVectorizer())

    with pytest.raises(
        RequestTooLarge, match="each row's answer has 1048576 numbers: ask for at most 4 rows at a time"
    ):
        answer(model, ["text"] * 1000, "transform")
    assert len(answer(model, ["text"] * 2, "transform")) == 2


def test_every_estimator_computes_on_one_thread():
    estimator = fitted("mixed, voting").estimator

    use_one_thread(estimator)

    assert estimator.n_jobs == 1
    assert all(
        forest.n_jobs in (None, 1) for forest in (step for pipe in estimator.estimators_ for _, step in pipe.steps)
    )


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (np.array([1.5, np.nan, np.inf, -np.inf]), [1.5, None, None, None]),
        (np.array([[0.1, 1e-320], [-0.0, 1.7976931348623157e308]]), [[0.1, 1e-320], [-0.0, 1.7976931348623157e308]]),
        (np.array([True, False]), [True, False]),
        (np.array([2**63 - 1, -5]), [2**63 - 1, -5]),
        (np.array(["a", "Ω"]), ["a", "Ω"]),
        (np.array([b"a"]), ["a"]),
        (np.array(["a", None, np.nan, 3, 2.5, True, np.float32(0.5), pd.NA], dtype=object), ["a", None, None, 3, 2.5, True, 0.5, None]),
        (np.array(["2024-01-01T00:00:00.000000001", "NaT"], dtype="datetime64[ns]"), ["2024-01-01T00:00:00.000000001", None]),
        ((np.array([[0.5, 0.5]]), np.array([[1.0, np.nan, 0.0]])), [[[0.5, 0.5], [1.0, None, 0.0]]]),
    ],
)  # fmt: skip
def test_a_prediction_on_the_wire(prediction, expected):
    assert wire(prediction) == expected


def test_part_of_takes_the_same_rows_of_every_output():
    many = (np.arange(6).reshape(3, 2), np.arange(3))

    assert [output.tolist() for output in part_of(many, 1, 3)] == [[[2, 3], [4, 5]], [1, 2]]


GOLDEN = Golden(instances=X[:3].tolist(), outputs={"predict": fitted("ridge").estimator.predict(X[:3]).tolist()})


def test_golden_rows_that_come_out_tell_how_exactly():
    assert serve(fitted("ridge").estimator, golden=GOLDEN).check() == 0.0
    assert serve(fitted("ridge").estimator).check() is None


@pytest.mark.parametrize("change", [1e-4, -1.0, None])
def test_a_tampered_golden_row_is_noticed(change):
    outputs: list[Any] = list(GOLDEN.outputs["predict"])
    outputs[1] = None if change is None else outputs[1] + change
    golden = Golden(instances=GOLDEN.instances, outputs={"predict": outputs})

    with pytest.raises(GoldenMismatch, match="zoo/1: golden row 1: predict gave"):
        serve(fitted("ridge").estimator, golden=golden).check()


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        ([1.0], [1.0 + 1e-9], True),
        ([1.0], [1.0 + 1e-4], False),
        ([1], [True], False),
        (["a"], ["a"], True),
        (["a"], ["b"], False),
        ([None], [None], True),
        ([[1.0, None]], [[1.0, 2.0]], False),
        ([[1.0]], [1.0], False),
        ([1.0], [1.0, 2.0], False),
    ],
)
def test_two_answers_are_the_same_or_not(was, now, same):
    if same:
        assert compare(REF, "predict", was, now) < 1e-6
    else:
        with pytest.raises(GoldenMismatch):
            compare(REF, "predict", was, now)


def load(folder: Path, files: Sequence[tuple[str, Any]]) -> Model:
    """Load a bare model whose parts (companions first) are objects, or the bytes of broken ones."""
    for role, value in files:
        buffer = io.BytesIO()
        joblib.dump(value, buffer)
        (folder / f"{role}.joblib").write_bytes(value if isinstance(value, bytes) else buffer.getvalue())

    async def work() -> Model:
        async with LocalStorage(folder) as storage:
            infos = [(role, await storage.head(f"{role}.joblib")) for role, _ in files]
            parts = tuple(Part(role, "joblib", info) for role, info in infos)
            return await asyncio.to_thread(Model.from_bundle, Bundle(REF, parts, storage, asyncio.get_running_loop()))

    return asyncio.run(work())


def test_a_bundle_is_read_to_the_last_byte_through_the_storage(tmp_path):
    scaler = StandardScaler().fit(X)
    neighbours = KNeighborsRegressor(algorithm="brute").fit(
        np.tile(scaler.transform(X), (5000, 1)), np.tile(REAL, 5000)
    )

    model = load(tmp_path, [("scaler", scaler), ("model", neighbours)])

    assert answer(model, X[:2].tolist()) == neighbours.predict(scaler.transform(X[:2])).tolist()
    bodies = {role: (tmp_path / f"{role}.joblib").read_bytes() for role in ("scaler", "model")}
    assert len(bodies["model"]) > 3 * CHUNK_BYTES
    assert [(it.role, it.bytes, it.sha256) for it in model.report.sources] == [
        (role, len(body), hashlib.sha256(body).hexdigest()) for role, body in bodies.items()
    ]


def test_a_broken_companion_is_named(tmp_path):
    with pytest.raises(CompanionFailed, match=r"^scaler is broken: zoo/1 scaler.joblib: cannot be read as joblib"):
        load(tmp_path, [("scaler", b"broken"), ("model", fitted("ridge").estimator)])


def test_a_broken_model_is_named(tmp_path):
    with pytest.raises(LoadFailed, match=r"^zoo/1 model.joblib: cannot be read as joblib"):
        load(tmp_path, [("model", b"broken")])


def test_a_model_that_cannot_be_read_tells_what_it_was_published_from(tmp_path):
    body = b"\x80\x04c_loss\nHalfBinomialLoss\n."
    artifact = Artifact.of(body, role="model", path="model.pkl", format="pickle")
    manifest = Manifest(
        format=1, name="zoo", version="1", created="", artifacts=(artifact,), trained_with={"scikit-learn": "1.5.0"},
        signature=inspection.infer([], fitted("ridge").estimator),
    )  # fmt: skip
    (tmp_path / "model.pkl").write_bytes(body)

    async def work() -> Model:
        async with LocalStorage(tmp_path) as storage:
            part = Part("model", "pickle", await storage.head("model.pkl"), artifact)
            bundle = Bundle(REF, (part,), storage, asyncio.get_running_loop(), manifest)
            return await asyncio.to_thread(Model.from_bundle, bundle)

    with pytest.raises(
        LoadFailed, match=r"No module named '_loss'; scikit-learn 1\.5\.0 wrote it and [\d.]+ reads it here"
    ):
        asyncio.run(work())


def test_sparse_matrices_pass_between_stages():
    encoder = OneHotEncoder().fit(NUMBERS[:, None])
    assert sparse.issparse(encoder.transform(NUMBERS[:, None]))
    model = Ridge().fit(encoder.transform(NUMBERS[:, None]), REAL)

    assert (
        answer(serve(model, encoder), NUMBERS[:, None].tolist())
        == model.predict(encoder.transform(NUMBERS[:, None])).tolist()
    )


def test_the_classes_behind_an_encoder_are_in_the_order_of_the_models_columns():
    encoder = LabelEncoder().fit(["bird", "cat", "dog"])
    codes = encoder.transform(np.resize(["dog", "cat", "bird"], len(X)))
    model = serve(LogisticRegression().fit(X, codes), encoder)

    assert model.signature.classes == ["bird", "cat", "dog"]
    assert (
        wire(model.predict(model.signature.validate(X.tolist()), "predict"))
        == encoder.inverse_transform(model.estimator.predict(X)).tolist()
    )


@pytest.mark.parametrize(
    ("estimator", "labels", "reason"),
    [
        (LogisticRegression().fit(X, np.arange(len(X)) % 2), ["basic", "free", "pro"], "knows 3 labels.* 2 classes"),
        (LogisticRegression().fit(X, np.arange(len(X)) % 2 + 1), ["bird", "cat", "dog"], "knows 3 labels.* 2 classes"),
        (LinearRegression().fit(X, X[:, 0]), ["basic", "free"], "LinearRegression has none"),
    ],
)
def test_an_encoder_of_something_else_is_refused(estimator, labels, reason):
    with pytest.raises(CompanionFailed, match=reason):
        serve(estimator, LabelEncoder().fit(labels))


def test_several_labels_a_row_are_decoded():
    rows = [["red", "round"], ["round"], []] * (len(X) // 3)
    encoder = MultiLabelBinarizer().fit(rows)
    estimator = KNeighborsClassifier(1).fit(X[: len(rows)], encoder.transform(rows))
    model = serve(estimator, encoder)

    served = wire(model.predict(model.signature.validate(X[: len(rows)].tolist()), "predict"))

    assert served == [list(labels) for labels in encoder.inverse_transform(estimator.predict(X[: len(rows)]))]
    assert ["round"] in served


@pytest.mark.parametrize("output", ["default", "pandas"])
def test_columns_between_a_companion_and_its_model_are_matched_by_name(output):
    frame = pd.DataFrame(X, columns=[f"c{position}" for position in range(X.shape[1])])
    turned = frame[frame.columns[::-1]]
    scaler = StandardScaler().fit(turned)
    scaled = pd.DataFrame(scaler.transform(turned), columns=turned.columns)[frame.columns]
    estimator = LinearRegression().fit(scaled, frame["c0"] * 3)
    model = serve(estimator, scaler.set_output(transform=output))

    served = wire(model.predict(model.signature.validate(frame.to_dict("records")), "predict"))

    assert served == pytest.approx(estimator.predict(scaled).tolist())
    assert served == pytest.approx((frame["c0"] * 3).tolist())


def test_a_companion_that_shares_only_some_columns_with_its_model_is_refused():
    frame = pd.DataFrame(X[:, :2], columns=["a", "b"])
    scaler = StandardScaler().fit(frame)
    estimator = LinearRegression().fit(frame.rename(columns={"b": "c"}), X[:, 0])

    with pytest.raises(CompanionFailed, match="share some columns, but not 'c'"):
        serve(estimator, scaler)


def test_more_columns_than_can_be_described_are_refused():
    """A small file says so, and each would have a description of its own."""
    model = LinearRegression().fit(X, X[:, 0])
    model.n_features_in_ = MAX_COLUMNS + 1

    with pytest.raises(UnusableModel, match="takes 30,001 columns, and at most 30,000 can be served"):
        inspection.infer([], model)


def test_columns_are_not_made_up_to_be_counted():
    model = LinearRegression().fit(X, X[:, 0])
    width = X.shape[1]
    scaler, products = StandardScaler().fit(X), PolynomialFeatures(2).fit(X)
    scaler.n_features_in_ = 1_000_000
    products.n_output_features_ = width  # which it would find to be more, if it made their names

    signature = inspection.infer([], model)

    Model(REF, signature, model, [products])
    Model(REF, signature, model, [FeatureUnion([("scaler", scaler)])])
    with pytest.raises(CompanionFailed, match="its StandardScaler gives 1000000 columns"):
        Model(REF, signature, model, [scaler])


@pytest.mark.parametrize(
    "companion",
    [
        *(StandardScaler(), PCA(2), PolynomialFeatures(2), SplineTransformer(), OneHotEncoder()),
        *(FeatureUnion([("a", StandardScaler()), ("b", PCA(2))]), make_pipeline(StandardScaler(), PCA(2))),
        make_column_transformer((PolynomialFeatures(2), [0, 1]), (StandardScaler(), [2]), remainder="passthrough"),
    ],
)
def test_a_companion_of_another_width_is_refused_whatever_tells_its_width(companion):
    gives = companion.fit_transform(X).shape[1]
    wide = np.zeros((4, gives + 1))

    with pytest.raises(
        CompanionFailed, match=f"gives {gives} columns, the LinearRegression behind it takes {gives + 1}"
    ):
        serve(LinearRegression().fit(wide, wide[:, 0]), companion)
