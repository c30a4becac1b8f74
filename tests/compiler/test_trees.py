"""Every kind of tree ensemble, in every way that it can be computed, against the estimator itself."""

from __future__ import annotations

import functools
import importlib
import io
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    AdaBoostClassifier,
    AdaBoostRegressor,
    BaggingClassifier,
    BaggingRegressor,
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier, ExtraTreeRegressor

from app.compiled import op
from app.compiled.program import Program
from app.compiled.steps import Chain
from app.compiled.trees import Trees
from app.compiler import heads, translation
from app.compiler.translation import Flow, NotCompilable

importlib.import_module("app.compiler.trees")  # which registers what is tested here

WIDTH = 6
METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples")
RANDOM = np.random.default_rng(7)
ROWS = RANDOM.normal(size=(400, WIDTH))
ROWS[:, 3] = np.round(ROWS[:, 3], 1)
NUMBERS = ROWS[:, 0] * ROWS[:, 1] + ROWS[:, 3] + RANDOM.normal(size=400) * 0.3
COUNTS = RANDOM.poisson(np.exp(NUMBERS / 3)) + 0.5
WORDS = np.array(["low", "mid", "high"])[np.digitize(NUMBERS, [-0.5, 0.5])]
OBJECTS = WORDS.astype(object)
FLAGS = NUMBERS > 0
GRADES = np.digitize(NUMBERS, [-1, 0, 1]) * 10
HALVES = np.digitize(NUMBERS, [0]) + 2.0
WEIGHTS = RANDOM.uniform(0.1, 3, 400)
GAPS = ROWS.copy()
GAPS[RANDOM.random(ROWS.shape) < 0.15] = np.nan
KINDS = ROWS.copy()
KINDS[:, 1] = RANDOM.integers(0, 40, 400)
KINDS[:, 4] = RANDOM.integers(-3, 3, 400) * 1.5
KINDS[::9, 1] = np.nan
OF_KINDS = NUMBERS + 2 * np.isin(KINDS[:, 1] % 10, (1, 4, 7)) - (KINDS[:, 4] > 0)

TREE = {"max_depth": 5, "random_state": 0}
FEW = {"n_estimators": 12, "random_state": 0}
ESTIMATORS = {
    "tree, words": (DecisionTreeClassifier(random_state=0), ROWS, WORDS),
    "tree, objects": (DecisionTreeClassifier(**TREE), ROWS, OBJECTS),
    "tree, booleans": (DecisionTreeClassifier(**TREE), ROWS, FLAGS),
    "tree, floats": (DecisionTreeClassifier(**TREE), ROWS, HALVES),
    "tree, missing": (DecisionTreeClassifier(random_state=0), GAPS, GRADES),
    "tree, a single leaf": (DecisionTreeClassifier(), ROWS, np.zeros(400, int)),
    "tree, monotonic": (DecisionTreeRegressor(monotonic_cst=[1, 0, 0, 1, 0, -1], **TREE), ROWS, NUMBERS),
    "tree, numbers, missing": (DecisionTreeRegressor(random_state=0), GAPS, NUMBERS),
    "tree, several numbers": (DecisionTreeRegressor(**TREE), ROWS, np.stack((NUMBERS, -NUMBERS, COUNTS), axis=1)),
    "extra tree": (ExtraTreeClassifier(random_state=0), ROWS, WORDS),
    "extra tree, numbers": (ExtraTreeRegressor(random_state=0), ROWS, NUMBERS),
    "forest, words": (RandomForestClassifier(**FEW), ROWS, WORDS),
    "forest, weights": (RandomForestClassifier(class_weight="balanced", **FEW), ROWS, GRADES),
    "forest, missing": (RandomForestClassifier(**FEW), GAPS, FLAGS),
    "forest, single row trees": (RandomForestClassifier(max_samples=1, **FEW), ROWS, WORDS),
    "forest, several outputs": (RandomForestClassifier(**FEW), ROWS, np.stack((GRADES, FLAGS * 1), axis=1)),
    "forest, numbers": (RandomForestRegressor(**FEW), ROWS, NUMBERS),
    "forest, poisson": (RandomForestRegressor(criterion="poisson", max_depth=4, **FEW), ROWS, COUNTS),
    "forest, several numbers": (RandomForestRegressor(**FEW), GAPS, np.stack((NUMBERS, COUNTS), axis=1)),
    "extra trees": (ExtraTreesClassifier(bootstrap=True, **FEW), ROWS, WORDS),
    "extra trees, numbers": (ExtraTreesRegressor(**FEW), GAPS, NUMBERS),
    "boosting, two": (GradientBoostingClassifier(**FEW), ROWS, FLAGS),
    "boosting, exponential": (GradientBoostingClassifier(loss="exponential", **FEW), ROWS, HALVES),
    "boosting, words": (GradientBoostingClassifier(subsample=0.7, **FEW), ROWS, WORDS),
    "boosting, from zero": (GradientBoostingClassifier(init="zero", **FEW), ROWS, WORDS),
    "boosting, given start": (GradientBoostingClassifier(init=DummyClassifier(), **FEW), ROWS, FLAGS),
    "boosting, numbers": (GradientBoostingRegressor(**FEW), ROWS, NUMBERS),
    "boosting, huber": (GradientBoostingRegressor(loss="huber", max_depth=7, **FEW), ROWS, NUMBERS),
    "boosting, quantile": (GradientBoostingRegressor(loss="quantile", init="zero", **FEW), ROWS, NUMBERS),
    "histogram, numbers": (HistGradientBoostingRegressor(max_iter=12), GAPS, NUMBERS),
    "histogram, deep": (
        HistGradientBoostingRegressor(max_iter=5, max_leaf_nodes=60, min_samples_leaf=2),
        GAPS,
        NUMBERS,
    ),
    "histogram, large": (
        HistGradientBoostingRegressor(max_iter=5, max_leaf_nodes=None, min_samples_leaf=1),
        GAPS,
        NUMBERS,
    ),
    "histogram, poisson": (HistGradientBoostingRegressor(loss="poisson", max_iter=12), ROWS, COUNTS),
    "histogram, gamma": (HistGradientBoostingRegressor(loss="gamma", max_iter=12), ROWS, COUNTS),
    "histogram, absolute": (HistGradientBoostingRegressor(loss="absolute_error", max_iter=12), ROWS, NUMBERS),
    "histogram, quantile": (HistGradientBoostingRegressor(loss="quantile", quantile=0.8, max_iter=9), ROWS, NUMBERS),
    "histogram, monotonic": (
        HistGradientBoostingRegressor(max_iter=9, monotonic_cst=[1, 0, 0, 0, 0, 0]),
        ROWS,
        NUMBERS,
    ),
    "histogram, two": (HistGradientBoostingClassifier(max_iter=12), GAPS, FLAGS),
    "histogram, words": (HistGradientBoostingClassifier(max_iter=6), GAPS, OBJECTS),
    "histogram, categories": (HistGradientBoostingRegressor(categorical_features=[4, 1], max_iter=12), KINDS, OF_KINDS),
    "histogram, categories, words": (
        HistGradientBoostingClassifier(categorical_features=[1], max_iter=6),
        KINDS,
        np.where(OF_KINDS > 1, "yes", "no"),
    ),
    "isolation": (IsolationForest(**FEW), ROWS, None),
    "isolation, some columns": (IsolationForest(max_features=3, contamination=0.1, **FEW), ROWS, None),
    "isolation, missing": (IsolationForest(max_samples=64, **FEW), GAPS, None),
    "ada": (AdaBoostClassifier(**FEW), ROWS, WORDS),
    "ada, two": (AdaBoostClassifier(DecisionTreeClassifier(max_depth=3), **FEW), ROWS, FLAGS),
    "ada, numbers": (AdaBoostRegressor(**FEW), ROWS, NUMBERS),
    "bagging": (BaggingClassifier(max_features=0.5, **FEW), ROWS, WORDS),
    "bagging, one column each": (BaggingRegressor(max_features=1, **FEW), ROWS, NUMBERS),
    "bagging, rare classes": (BaggingClassifier(max_samples=4, **FEW), ROWS, WORDS),
    "bagging, numbers": (BaggingRegressor(max_features=4, bootstrap_features=True, **FEW), ROWS, NUMBERS),
}
WITH_MISSING = {name for name, (_estimator, rows, _target) in ESTIMATORS.items() if rows is GAPS or rows is KINDS}


@functools.cache
def fitted(name):
    estimator, rows, target = ESTIMATORS[name]
    if name in ("forest, weights", "tree, floats", "histogram, numbers", "boosting, two"):
        return estimator.fit(rows, target, sample_weight=WEIGHTS)
    return estimator.fit(rows, target)


@functools.cache
def program(name):
    return written(compiled(fitted(name)))


def compiled(estimator):
    shared, rest = heads.common(translation.predictor(estimator, Flow("matrix", WIDTH)))
    return Program(Chain(shared), rest)


def written(made):
    body = made.write()
    return Program.read(io.BytesIO(body), len(body))


def ensemble(made):
    (found,) = [step for step in made.body.steps if isinstance(step, Trees)]
    return found


def every_way(made):
    """Yield the program with each of the ways through its trees."""
    trees = ensemble(made)
    for variant in trees.variants():
        steps = tuple(variant if step is trees else step for step in made.body.steps)
        yield f"{variant.engine} {variant.many} {variant.many_from_rows}", Program(Chain(steps), made.heads)


def edges(trees):
    """Return rows with values at thresholds, and beside them, as near as float32 and float64 can be."""
    inner = np.flatnonzero(trees.nodes >> 32 != np.arange(len(trees.nodes)))
    inner = inner[((trees.nodes[inner] & 0x7FFFFFFF) < WIDTH) & (trees.thresholds[inner] < np.inf)]
    rows = []
    for place in RANDOM.choice(inner, min(60, len(inner)), replace=False) if len(inner) else ():
        column, threshold = trees.nodes[place] & 0x7FFFFFFF, float(trees.thresholds[place])
        near = np.float32(threshold)
        for value in (
            threshold,
            np.nextafter(threshold, -np.inf),
            np.nextafter(threshold, np.inf),
            near,
            np.nextafter(near, np.float32(-np.inf)),
            np.nextafter(near, np.float32(np.inf)),
            -threshold,
        ):
            row = ROWS[RANDOM.integers(len(ROWS))].copy()
            row[column] = value
            rows.append(row)
    return np.array(rows).reshape(-1, WIDTH)


def rows_for(name):
    rows = [ESTIMATORS[name][1], RANDOM.normal(size=(200, WIDTH)) * 2, edges(ensemble(program(name)))]
    large = RANDOM.normal(size=(20, WIDTH)) * 1e37
    rows += [large, -large, np.zeros((1, WIDTH)), np.float64(1e-310) * large / 1e37]
    rows.append(np.where(RANDOM.random((30, WIDTH)) < 0.5, np.nan_to_num(KINDS[:30]), 99.0))
    if name in WITH_MISSING:
        gaps = RANDOM.normal(size=(60, WIDTH))
        gaps[RANDOM.random(gaps.shape) < 0.5] = np.nan
        rows += [gaps, np.full((1, WIDTH), np.nan)]
    return np.concatenate(rows)


def run(made, rows, method):
    with np.errstate(all="ignore"):
        return made.heads[method].run(made.body.run(rows))


def expected(estimator, rows, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(estimator, method)(rows)


def assert_same(found, wanted):
    if isinstance(wanted, list):
        assert isinstance(found, tuple)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
        return
    assert found.shape == wanted.shape
    assert found.dtype == (object if wanted.dtype.kind == "U" else wanted.dtype)
    assert np.array_equal(found, wanted, equal_nan=wanted.dtype.kind == "f")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_method_gives_the_very_numbers_of_the_estimator_in_every_way(name):
    rows, estimator = rows_for(name), fitted(name)
    missing = {"predict_log_proba"} if name.startswith("bagging") else set()

    assert {*program(name).heads} == {method for method in METHODS if hasattr(estimator, method)} - missing
    for method in program(name).heads:
        wanted = expected(estimator, rows, method)
        for _way, made in every_way(program(name)):
            assert_same(run(made, rows, method), wanted)
            assert_same(
                run(made, rows.astype(np.float32), method), expected(estimator, rows.astype(np.float32), method)
            )


@pytest.mark.parametrize("name", ["forest, words", "forest, numbers", "boosting, words", "histogram, numbers"])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 33])
def test_a_batch_of_any_size_gives_what_its_rows_give_alone(name, count):
    rows, method = rows_for(name)[:count], "predict_proba" if "words" in name else "predict"

    for _way, made in every_way(program(name)):
        assert_same(run(made, rows, method), expected(fitted(name), rows, method))
        assert np.array_equal(
            run(made, rows, method), np.concatenate([run(made, rows[i : i + 1], method) for i in range(count)])
        )


def test_many_rows_and_many_trees_are_computed_in_parts():
    forest = RandomForestRegressor(300, max_depth=2, random_state=0).fit(ROWS, NUMBERS)
    rows = RANDOM.normal(size=(5000, WIDTH))
    wanted = forest.predict(rows)

    for _way, made in every_way(compiled(forest)):
        assert_same(run(made, rows, "predict"), wanted)


@pytest.mark.parametrize("name", ["forest, words", "boosting, words", "forest, numbers"])
def test_a_great_many_trees_are_walked_through_in_groups(name, monkeypatch):
    monkeypatch.setattr("app.compiled.trees._TREES", 6)
    rows, estimator = rows_for(name), fitted(name)
    made = compiled(estimator)
    walking = ensemble(made).with_engine("walk")

    for method, head in made.heads.items():
        with np.errstate(all="ignore"):
            rest = made.body.steps[1:]
            assert_same(head.run(Chain(rest).run(walking.run(rows))), expected(estimator, rows, method))


def test_a_chain_of_splits_too_long_for_a_session_is_walked():
    rows = np.arange(1500.0)[:, None]
    tree = DecisionTreeRegressor(max_leaf_nodes=None).fit(rows, np.cumsum(2.0 ** (np.arange(1500) % 900)))
    (head,) = translation.predictor(tree, Flow("matrix", 1)).values()
    (trees,) = [step for step in head.steps if isinstance(step, Trees)]

    assert tree.get_depth() > 400
    assert [variant.engine for variant in trees.variants()] == ["walk"]
    assert np.array_equal(written(Program(None, {"predict": head})).heads["predict"].run(rows), tree.predict(rows))


@pytest.mark.parametrize("name", ["forest, words", "boosting, two", "ada, two", "tree, monotonic"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_what_the_estimator_refuses_is_refused_in_its_words(name, value):
    rows = ROWS[:3].copy()
    rows[1, 2] = value
    try:
        expected(fitted(name), rows, "predict")
    except ValueError as error:
        words = str(error)
    else:
        assert np.isnan(value)  # a tree takes missing values even where it met none
        for _way, made in every_way(program(name)):
            assert_same(run(made, rows, "predict"), expected(fitted(name), rows, "predict"))
        return

    for _way, made in every_way(program(name)):
        with pytest.raises(ValueError, match="Input X contains") as refused:
            run(made, rows, "predict")
        named = str(refused.value)
        if name == "ada, two" and np.isinf(value):  # it looks at them before they are float32
            words = words.replace("float64", "float32")
        assert named == words


@pytest.mark.parametrize("name", ["forest, words", "histogram, categories"])
def test_rows_of_another_width_are_refused_in_the_words_of_the_estimator(name):
    with pytest.raises(ValueError, match="features") as wanted:
        fitted(name).predict(ROWS[:, :4])

    for _way, made in every_way(program(name)):
        with pytest.raises(ValueError, match="features") as refused:
            run(made, ROWS[:, :4], "predict")
        if name == "forest, words":
            assert str(refused.value) == str(wanted.value)


def test_no_rows_are_refused_in_the_words_of_the_estimator():
    with pytest.raises(ValueError, match="0 sample") as wanted:
        fitted("forest, words").predict(ROWS[:0])

    for _way, made in every_way(program("forest, words")):
        with pytest.raises(ValueError, match="0 sample") as refused:
            run(made, ROWS[:0], "predict")
        assert str(refused.value) == str(wanted.value)


@pytest.mark.parametrize(
    ("estimator", "target", "reason"),
    [
        (GradientBoostingClassifier(init=LogisticRegression(), n_estimators=3), FLAGS, "first estimator"),
        (GradientBoostingClassifier(init=DummyClassifier(strategy="stratified"), n_estimators=3), FLAGS, "first"),
        (AdaBoostClassifier(LogisticRegression(), n_estimators=3), FLAGS, "not trees"),
        (AdaBoostClassifier(n_estimators=3), np.ones(400), "one class"),
        (HistGradientBoostingRegressor(max_iter=2, categorical_features=[0]), NUMBERS, "categories"),
    ],
)
def test_what_has_no_compiled_form_is_refused_with_the_reason(estimator, target, reason):
    rows = ROWS
    if reason == "categories":
        rows = KINDS.astype(object)
        rows[:, 0] = np.array(["a", "b", "c", "d"])[RANDOM.integers(0, 4, 400)]
        rows = pd.DataFrame(rows).astype({column: float for column in range(1, WIDTH)})
    estimator.fit(rows, target)

    with pytest.raises(NotCompilable, match=reason):
        translation.predictor(estimator, Flow("matrix", WIDTH))


def test_trees_do_not_take_texts():
    with pytest.raises(NotCompilable, match="texts"):
        translation.predictor(fitted("forest, words"), Flow("texts", WIDTH))


@pytest.mark.parametrize("kind", ["table", "sparse"])
def test_what_is_no_matrix_becomes_one_before_the_trees(kind):
    made = translation.predictor(fitted("forest, words"), Flow(kind, WIDTH))

    assert {type(head.steps[0]).__name__ for head in made.values()} == {"Numbers" if kind == "table" else "Dense"}


def test_what_methods_have_in_common_is_stored_once():
    made = translation.predictor(fitted("boosting, words"), Flow("matrix", WIDTH))
    shared, rest = heads.common(made)

    assert [type(step).__name__ for step in shared] == ["Trees"]
    assert all(not any(isinstance(step, Trees) for step in head.steps) for head in rest.values())
    assert len(program("boosting, words").write()) < 1.2 * len(Program(None, {"predict": made["predict"]}).write())


def test_an_ensemble_is_changed_without_being_built_again():
    trees = ensemble(program("forest, words"))
    session = trees._session

    assert trees.with_engine("onnx", "walk", 8)._session is session
    assert "_session" not in trees.with_engine("walk").__dict__
    assert {variant.engine for variant in trees.variants()} >= {"onnx", "walk"}
    assert op.encode(trees, {})["op"] == "trees"
