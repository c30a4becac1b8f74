"""Translations of ensembles of trees: their nodes in the order of `app.compiled.trees`, their sums in the order of scikit-learn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from app.compiled.anomaly import Inliers, PathLengths
from app.compiled.labels import (
    BothClasses,
    Each,
    First,
    Labels,
    Link,
    Logarithm,
    Margin,
    Mirrored,
    Parts,
    WeightedMedian,
)
from app.compiled.op import Op
from app.compiled.steps import Chain
from app.compiled.trees import MAX_LEVELS, Memberships, Trees
from app.compiler.pipeline import numbers, then
from app.compiler.translation import Flow, NotCompilable, Predictor, predicts
from app.signature import Array

Accepts = Literal["finite", "missing", "any"]
MAX_UNMEASURED_NODES = (
    500_000  # where nobody measures which engine is best: a session takes ten times what the nodes take
)
_ENSEMBLE = "sklearn.ensemble."
_TREE = "sklearn.tree._classes."


def _predicts(*classes: str) -> Callable[[Predictor], Predictor]:
    """Register a translation of what takes a matrix of numbers. Before it, columns of several kinds become one."""

    def register(translate: Predictor) -> Predictor:
        @functools.wraps(translate)
        def of_numbers(estimator: Any, flow: Flow) -> Mapping[str, Op]:
            if flow.kind == "matrix":  # float32 too: trees compare in it
                return translate(estimator, flow)
            first, made = numbers(flow)
            return {method: then([first], head) for method, head in translate(estimator, made).items()}

        return predicts(*classes)(of_numbers)

    return register


@dataclass(frozen=True, slots=True)
class Tree:
    """A binary tree, its nodes in any order after the root. Arrays of shape (nodes,); `left` is -1 at a leaf, `values` (nodes, columns)."""

    left: Array
    right: Array
    feature: Array
    threshold: Array
    missing_left: Array
    values: Array


def constant(values: Any) -> Tree:
    """Return the tree that gives `values`, of shape (columns,), to every row."""
    none = np.array([-1])
    return Tree(none, none, none, np.zeros(1), np.ones(1, np.bool_), np.asarray(values, np.float64)[None])


def of_tree(estimator: Any, values: Array | None = None, columns: Any = None) -> Tree:
    """Return the tree of a fitted scikit-learn tree: its `values`, (nodes, columns), those of its only output if none are given.

    `columns` are those of the input that it was fitted with, if not with all.
    """
    fitted = estimator.tree_
    feature = fitted.feature if columns is None else np.asarray(columns)[np.maximum(fitted.feature, 0)]
    if values is None:
        values = fitted.value[:, 0, :]
    missing_left = np.asarray(fitted.missing_go_to_left, np.bool_)
    return Tree(fitted.children_left, fitted.children_right, feature, fitted.threshold, missing_left, values)


def join(
    trees: Sequence[Tree],
    flow: Flow,
    estimator: Any,
    *,
    accepts: Accepts,
    dtype: Any = np.float32,
    turns: int = 1,
    divisor: float | None = None,
    width: int | None = None,
) -> Trees:
    """Return the ensemble of `trees`. Raises `NotCompilable` for what could not be checked when it is read."""
    if flow.kind != "matrix":
        raise NotCompilable(
            f"its {type(estimator).__name__} takes {flow.kind} input, of which trees have no compiled form"
        )
    nodes, thresholds, roots, values = [], [], [], []
    start = leaves = 0
    for tree in trees:
        order, left = _by_level(tree)
        leaf = left < 0
        numbers = leaves + np.cumsum(leaf) - 1
        places = np.arange(start, start + len(order))
        here = np.where(leaf, numbers, tree.feature[order]) + np.where(leaf | tree.missing_left[order], 0, 1 << 31)
        nodes.append((np.where(leaf, places, left + start) << 32) | here)
        thresholds.append(np.where(leaf, np.inf, _rounded_down(tree.threshold[order], dtype)).astype(dtype))
        roots.append(start)
        values.append(tree.values[order[leaf]])
        start += len(order)
        leaves += int(leaf.sum())
    table, numbers = _different(np.concatenate(values).astype(np.float64))
    joined = np.concatenate(nodes)
    leaf = joined >> 32 == np.arange(len(joined))
    joined[leaf] = (joined[leaf] >> 32 << 32) | numbers
    if not np.isfinite(table).all():
        raise NotCompilable("its leaves have values that are not finite")
    walking = Trees(
        estimator=type(estimator).__name__,
        width=int(estimator.n_features_in_) if width is None else width,
        accepts=accepts,
        nodes=joined,
        thresholds=np.concatenate(thresholds),
        roots=np.array(roots, np.int64),
        values=table,
        turns=turns,
        divisor=divisor,
        engine="walk",
        many=None,
        many_from_rows=1,
    )
    return walking.variants()[0] if len(joined) <= MAX_UNMEASURED_NODES else walking


def _by_level(tree: Tree) -> tuple[Array, Array]:
    """Return the tree's nodes level by level, and the place of each one's left child in that order: the right one follows it; -1 at a leaf."""
    order, lefts = [], []
    frontier, following = np.zeros(1, np.int64), 1
    while len(frontier):
        inner = tree.left[frontier] >= 0
        places = np.where(inner, following + 2 * (np.cumsum(inner) - 1), -1)
        order.append(frontier)
        lefts.append(places)
        asking = frontier[inner]
        frontier = np.stack((tree.left[asking], tree.right[asking]), axis=1).reshape(-1).astype(np.int64)
        following += len(frontier)
        if len(order) > MAX_LEVELS:
            raise NotCompilable(f"it has a tree of more than {MAX_LEVELS} levels")
    return np.concatenate(order), np.concatenate(lefts)


def _rounded_down(thresholds: Array, dtype: Any) -> Array:
    """Return the greatest numbers of `dtype` that are not greater: to a value of `dtype` they are the same thresholds."""
    with np.errstate(over="ignore"):
        rounded = thresholds.astype(dtype)
        return np.where(rounded > thresholds, np.nextafter(rounded, np.array(-np.inf, dtype)), rounded)


def _different(values: Array) -> tuple[Array, Array]:
    """Return the different rows of `values`, and for each row which of them it is. Most leaves of a classifier are alike."""
    numbers = np.zeros(len(values), np.int64)
    for column in values.T:
        different, inverse = np.unique(column, return_inverse=True)
        _, numbers = np.unique(numbers * len(different) + inverse, return_inverse=True)
    _, first = np.unique(numbers, return_index=True)
    return np.ascontiguousarray(values[first]), numbers


def labels(classes: Any, rule: Literal["greatest", "positive", "not_negative"] = "greatest") -> Labels:
    """Return the classes of a classifier as an operation. Raises `NotCompilable` if they are neither texts nor numbers."""
    classes = np.asarray(classes)
    if classes.dtype.kind in "biuf" and classes.dtype.itemsize <= 8 and classes.dtype != np.float16:
        return Labels(classes, rule)
    if all(type(label) in (str, np.str_) for label in classes):
        return Labels(tuple(str(label) for label in classes), rule)
    raise NotCompilable("its classes are neither texts nor numbers")


def _of_probabilities(probabilities: Op, classes: Any) -> dict[str, Op]:
    return {
        "predict": Chain((probabilities, labels(classes))),
        "predict_proba": Chain((probabilities,)),
        "predict_log_proba": Chain((probabilities, Logarithm())),
    }


def _accepts(estimator: Any) -> Accepts:
    return "missing" if estimator._support_missing_values(np.zeros((1, 1), np.float32)) else "finite"


def _classifier(estimator: Any, trees: Sequence[Any], flow: Flow) -> Mapping[str, Op]:
    """Translate the mean of the probabilities of `trees`, for one output or several."""
    divisor = float(len(trees)) if len(trees) > 1 else None
    accepts = _accepts(trees[0])
    if estimator.n_outputs_ == 1:
        return _of_probabilities(
            join([of_tree(tree) for tree in trees], flow, estimator, accepts=accepts, divisor=divisor),
            estimator.classes_,
        )
    widths = tuple(int(count) for count in estimator.n_classes_)
    side_by_side = [
        of_tree(tree, np.concatenate([tree.tree_.value[:, k, :width] for k, width in enumerate(widths)], axis=1))
        for tree in trees
    ]
    ensemble = join(side_by_side, flow, estimator, accepts=accepts, divisor=divisor)
    parts = Parts(widths)
    named = tuple(labels(classes) for classes in estimator.classes_)
    if len({np.asarray(classes).dtype for classes in estimator.classes_}) > 1:
        raise NotCompilable("its outputs have classes of several types")
    return {
        "predict": Chain((ensemble, parts, Each(named, stacked=True))),
        "predict_proba": Chain((ensemble, parts)),
        "predict_log_proba": Chain((ensemble, parts, Each((Logarithm(),) * len(widths), stacked=False))),
    }


def _regressor(estimator: Any, trees: Sequence[Any], flow: Flow) -> Mapping[str, Op]:
    """Translate the mean of the values of `trees`."""
    ensemble = join(
        [of_tree(tree, tree.tree_.value[:, :, 0]) for tree in trees],
        flow,
        estimator,
        accepts=_accepts(trees[0]),
        divisor=float(len(trees)) if len(trees) > 1 else None,
    )
    return {"predict": Chain((ensemble, First()) if estimator.n_outputs_ == 1 else (ensemble,))}


@_predicts(f"{_TREE}DecisionTreeClassifier", f"{_TREE}ExtraTreeClassifier")
def tree_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate a classification tree."""
    return _classifier(estimator, [estimator], flow)


@_predicts(f"{_TREE}DecisionTreeRegressor", f"{_TREE}ExtraTreeRegressor")
def tree_regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate a regression tree."""
    return _regressor(estimator, [estimator], flow)


@_predicts(f"{_ENSEMBLE}_forest.RandomForestClassifier", f"{_ENSEMBLE}_forest.ExtraTreesClassifier")
def forest_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate a forest of classification trees."""
    return _classifier(estimator, estimator.estimators_, flow)


@_predicts(f"{_ENSEMBLE}_forest.RandomForestRegressor", f"{_ENSEMBLE}_forest.ExtraTreesRegressor")
def forest_regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate a forest of regression trees."""
    return _regressor(estimator, estimator.estimators_, flow)


_CONSTANT = {
    "DummyClassifier": ("prior", "most_frequent", "constant", "uniform"),
    "DummyRegressor": ("mean", "median", "quantile", "constant"),
}


@_predicts(f"{_ENSEMBLE}_gb.GradientBoostingClassifier")
def gradient_boosting_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate gradient boosting for two classes or more."""
    return _boosted_classifier(estimator, _boosted(estimator, flow), "not_negative")


@_predicts(f"{_ENSEMBLE}_gb.GradientBoostingRegressor")
def gradient_boosting_regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate gradient boosting of a number."""
    return {"predict": Chain((_boosted(estimator, flow), First()))}


def _boosted(estimator: Any, flow: Flow) -> Trees:
    turns = estimator.estimators_.shape[1]
    first = []
    if not (isinstance(estimator.init_, str) and estimator.init_ == "zero"):
        first = [constant([start]) for start in _start(estimator)]
    rate = estimator.learning_rate
    trees = [of_tree(tree, rate * tree.tree_.value[:, 0, :1]) for tree in estimator.estimators_.reshape(-1)]
    accepts = "finite"
    return join([*first, *trees], flow, estimator, accepts=accepts, turns=turns)  # type: ignore[arg-type]


def _start(estimator: Any) -> Array:
    """Return what the first estimator says of every row, of shape (turns,)."""
    from sklearn.ensemble._gb import _init_raw_predictions

    name, first = type(estimator.init_).__name__, estimator.init_
    if type(first).__module__ != "sklearn.dummy" or first.strategy not in _CONSTANT.get(name, ()):
        raise NotCompilable(f"its first estimator is a {name}")
    row = np.zeros((1, estimator.n_features_in_), np.float32)
    start = _init_raw_predictions(row, first, estimator._loss, name == "DummyClassifier")
    return np.asarray(start, np.float64).reshape(-1)


def _boosted_classifier(estimator: Any, ensemble: Op, rule: Literal["positive", "not_negative"]) -> Mapping[str, Op]:
    if len(estimator.classes_) > 2:
        probabilities: tuple[Op, ...] = (ensemble, Link("softmax", 1.0))
        decision: tuple[Op, ...] = (ensemble,)
        predicted: Op = labels(estimator.classes_)
    else:
        probabilities = (ensemble, _inverse(estimator._loss.link), BothClasses())
        decision = (ensemble, First())
        predicted = labels(estimator.classes_, rule)
    return {
        "predict": Chain((ensemble, predicted)),
        "predict_proba": Chain(probabilities),
        "predict_log_proba": Chain((*probabilities, Logarithm())),
        "decision_function": Chain(decision),
    }


def _inverse(link: Any) -> Op:
    name = type(link).__name__
    known = {
        "IdentityLink": Chain(()),
        "LogLink": Link("exponential", 1.0),
        "LogitLink": Link("logistic", 1.0),
        "HalfLogitLink": Link("logistic", 0.5),
    }
    if name not in known:
        raise NotCompilable(f"its loss has a {name}")
    return known[name]


_HISTOGRAM = f"{_ENSEMBLE}_hist_gradient_boosting.gradient_boosting."


@_predicts(f"{_HISTOGRAM}HistGradientBoostingClassifier")
def histogram_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate histogram boosting for two classes or more."""
    heads = dict(_boosted_classifier(estimator, _binned(estimator, flow), "positive"))
    del heads["predict_log_proba"]  # which it has not
    return heads


@_predicts(f"{_HISTOGRAM}HistGradientBoostingRegressor")
def histogram_regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate histogram boosting of a number."""
    return {"predict": Chain((_binned(estimator, flow), First(), _inverse(estimator._loss.link)))}


def _binned(estimator: Any, flow: Flow) -> Op:
    width = estimator.n_features_in_
    sets = _Sets(estimator, width)
    starts = [constant([start]) for start in np.asarray(estimator._baseline_prediction).reshape(-1)]
    trees = [_of_predictor(predictor, sets) for iteration in estimator._predictors for predictor in iteration]
    ensemble = join(
        [*starts, *trees],
        flow,
        estimator,
        accepts="any",
        dtype=np.float64,
        turns=len(starts),
        width=width + len(sets.of),
    )
    return Chain((sets.operation(), ensemble)) if sets.of else ensemble


class _Sets:
    """The sets of categories that the trees of histogram boosting ask for; each becomes a column behind those of the input."""

    def __init__(self, estimator: Any, width: int) -> None:
        self._name, self._width = type(estimator).__name__, width
        self.columns: list[int] = list(range(width))
        """Which column of the input a feature of the trees is: where some are categorical, those come first."""
        self._categories: list[Array] = []
        encoder = getattr(estimator, "_preprocessor", None)
        if encoder is not None:
            categorical = np.asarray(estimator.is_categorical_, np.bool_)
            self.columns = [*np.flatnonzero(categorical).tolist(), *np.flatnonzero(~categorical).tolist()]
            for categories in encoder.named_transformers_["encoder"].categories_:
                if categories.dtype.kind not in "biuf":
                    raise NotCompilable("its categories are not numbers")
                numbers = categories.astype(np.float64)
                self._categories.append(numbers[~np.isnan(numbers)])
        self.of: list[int] = []
        self._outcomes: list[Array] = []
        self._known: dict[tuple[int, bytes], int] = {}

    def column(self, feature: int, bits: Array, missing_left: bool) -> int:
        """Return the column that is 1 where a row goes right: its category is not in the set of `bits`, of shape (8,), uint32."""
        codes = np.arange(len(self._categories[feature]))
        outcomes = np.append(1 - (bits[codes // 32] >> (codes % 32) & 1), not missing_left).astype(np.int64)
        key = (feature, outcomes.tobytes())
        if key not in self._known:
            self._known[key] = len(self.of)
            self.of.append(feature)
            self._outcomes.append(outcomes)
        return self._width + self._known[key]

    def operation(self) -> Op:
        """Return the operation that adds the columns."""
        sizes = np.array([len(outcomes) for outcomes in self._outcomes], np.int64)
        return Memberships(
            estimator=self._name,
            width=self._width,
            columns=np.array(self.columns[: len(self._categories)], np.int64),
            counts=np.array([len(categories) for categories in self._categories], np.int64),
            categories=np.concatenate(self._categories),
            of=np.array(self.of, np.int64),
            starts=np.cumsum(sizes) - sizes,
            outcomes=np.concatenate(self._outcomes),
        )


def _of_predictor(predictor: Any, sets: _Sets) -> Tree:
    nodes = predictor.nodes
    leaf = nodes["is_leaf"].astype(np.bool_)
    feature = np.array(sets.columns)[np.where(leaf, 0, nodes["feature_idx"])]
    threshold = nodes["num_threshold"].copy()
    missing_left = nodes["missing_go_to_left"].astype(np.bool_)
    for place in np.flatnonzero(nodes["is_categorical"].astype(np.bool_) & ~leaf):
        bits = predictor.raw_left_cat_bitsets[nodes["bitset_idx"][place]]
        feature[place] = sets.column(int(nodes["feature_idx"][place]), bits, bool(missing_left[place]))
        threshold[place] = 0.5
    return Tree(
        left=np.where(leaf, -1, nodes["left"].astype(np.int64)),
        right=np.where(leaf, -1, nodes["right"].astype(np.int64)),
        feature=feature,
        threshold=threshold,
        missing_left=missing_left,
        values=nodes["value"][:, None],
    )


@_predicts(f"{_ENSEMBLE}_iforest.IsolationForest")
def isolation_forest(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate an isolation forest: the leaves' values are the lengths of the paths to them."""
    from sklearn.ensemble._iforest import _average_path_length

    every = estimator._max_features == estimator.n_features_in_
    trees = [
        of_tree(
            tree,
            (estimator._decision_path_lengths[index] + estimator._average_path_length_per_tree[index] - 1.0)[:, None],
            None if every else estimator.estimators_features_[index],
        )
        for index, tree in enumerate(estimator.estimators_)
    ]
    ensemble = join(trees, flow, estimator, accepts="any")
    length = float(len(trees) * _average_path_length([estimator._max_samples])[0])
    if length == 0:
        raise NotCompilable("it was fitted with a single row")
    scores = PathLengths(length)
    return {
        "predict": Chain((ensemble, scores, Inliers(float(estimator.offset_), decided=True))),
        "decision_function": Chain((ensemble, scores, Inliers(float(estimator.offset_), decided=False))),
        "score_samples": Chain((ensemble, scores)),
    }


_SINGLE_CLASSIFIERS = ("DecisionTreeClassifier", "ExtraTreeClassifier")
_SINGLE_REGRESSORS = ("DecisionTreeRegressor", "ExtraTreeRegressor")


def _check_members(estimator: Any, names: tuple[str, ...]) -> None:
    for member in estimator.estimators_:
        cls = type(member)
        if cls.__module__ != "sklearn.tree._classes" or cls.__name__ not in names:
            raise NotCompilable(f"its members are {cls.__name__}, not trees")


@_predicts(f"{_ENSEMBLE}_bagging.BaggingClassifier")
def bagging_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate bagged classification trees, but for the logarithms, which are added up there."""
    _check_members(estimator, _SINGLE_CLASSIFIERS)
    trees = []
    for member, columns in zip(estimator.estimators_, estimator.estimators_features_, strict=True):
        found = member.tree_.value[:, 0, : len(member.classes_)]
        values = np.zeros((len(found), estimator.n_classes_))
        values[:, np.arange(estimator.n_classes_) if found.shape[1] == values.shape[1] else member.classes_] = found
        trees.append(of_tree(member, values, columns))
    accepts = _accepts(estimator.estimators_[0])
    ensemble = join(trees, flow, estimator, accepts=accepts, divisor=float(estimator.n_estimators))
    heads = _of_probabilities(ensemble, estimator.classes_)
    del heads["predict_log_proba"]
    return heads


@_predicts(f"{_ENSEMBLE}_bagging.BaggingRegressor")
def bagging_regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate bagged regression trees."""
    _check_members(estimator, _SINGLE_REGRESSORS)
    members = zip(estimator.estimators_, estimator.estimators_features_, strict=True)
    trees = [of_tree(member, member.tree_.value[:, :, 0], columns) for member, columns in members]
    outputs = trees[0].values.shape[1]
    accepts = _accepts(estimator.estimators_[0])
    ensemble = join(trees, flow, estimator, accepts=accepts, divisor=float(estimator.n_estimators))
    return {"predict": Chain((ensemble, First()) if outputs == 1 else (ensemble,))}


@_predicts(f"{_ENSEMBLE}_weight_boosting.AdaBoostClassifier")
def ada_boost_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate boosted classification trees, which vote with weights."""
    _check_members(estimator, _SINGLE_CLASSIFIERS)
    count = int(estimator.n_classes_)
    if count < 2:
        raise NotCompilable("it knows but one class")
    trees = []
    for member, weight in zip(estimator.estimators_, estimator.estimator_weights_, strict=False):
        chosen = member.classes_.take(np.argmax(member.tree_.value[:, 0, :], axis=1))
        votes = np.where(chosen[:, None] == estimator.classes_, weight, -1 / (count - 1) * weight)
        trees.append(of_tree(member, votes))
    divisor = float(estimator.estimator_weights_.sum())
    ensemble = join(trees, flow, estimator, accepts="finite", divisor=divisor)
    if count == 2:
        decision: tuple[Op, ...] = (ensemble, Margin())
        predicted, softmax = labels(estimator.classes_, "positive"), (Mirrored(), Link("softmax", 2.0))
    else:
        decision, predicted, softmax = (ensemble,), labels(estimator.classes_), (Link("softmax", count - 1.0),)  # type: ignore[assignment]
    return {
        "predict": Chain((*decision, predicted)),
        "predict_proba": Chain((*decision, *softmax)),
        "predict_log_proba": Chain((*decision, *softmax, Logarithm())),
        "decision_function": Chain(decision),
    }


@_predicts(f"{_ENSEMBLE}_weight_boosting.AdaBoostRegressor")
def ada_boost_regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    """Translate boosted regression trees, whose weighted median is taken."""
    _check_members(estimator, _SINGLE_REGRESSORS)
    trees = [of_tree(member) for member in estimator.estimators_]
    ensemble = join(trees, flow, estimator, accepts="finite", turns=len(trees))
    weights = np.array(estimator.estimator_weights_[: len(trees)], np.float64)
    return {"predict": Chain((ensemble, WeightedMedian(weights)))}
