"""Translations of naive Bayes, discriminant analysis, networks, support vectors, neighbours, centres and constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from app.compiled.bayes import (
    Categories,
    Difference,
    Gaussians,
    Largest,
    Likelihoods,
    LogNonZero,
    LogNormalize,
    LogSumExp,
    Mixture,
    Quadratics,
)
from app.compiled.combined import Constant, Rescaled, Several
from app.compiled.linear import Classify, ClassLabels, Linear, Mapped, Shift, Sigmoid, Softmax
from app.compiled.neighbours import (
    ColumnsOf,
    Distances,
    Kernel,
    Nearest,
    NeighbourClasses,
    NeighbourMean,
    Neighbours,
    Side,
    Votes,
)
from app.compiled.network import Layers, TwoClasses
from app.compiled.numeric import Binarize
from app.compiled.op import Op
from app.compiled.steps import Chain
from app.compiler.linear import labels, of_probabilities, product
from app.compiler.pipeline import checked, then
from app.compiler.preprocessing import floats
from app.compiler.translation import Flow, NotCompilable, predicts, transforms
from app.signature import Array

MAX_PAIR_WEIGHTS = 20_000_000
_BAYES = "sklearn.naive_bayes."


def _of_joint(joint: Op, named: ClassLabels) -> dict[str, Op]:
    logs = LogNormalize(joint)
    return {"predict": Classify(joint, named), "predict_proba": Mapped(logs, "exp"), "predict_log_proba": logs}


@predicts(_BAYES + "GaussianNB")
def _gaussian(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = checked(flow)
    joint = Gaussians(floats(estimator.theta_), floats(estimator.var_), floats(estimator.class_prior_))
    return _of_joint(then(before, joint), labels(estimator.classes_))


@predicts(_BAYES + "MultinomialNB", _BAYES + "ComplementNB")
def _multinomial(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = checked(flow, sparse=True)
    has_prior = type(estimator).__name__ == "MultinomialNB" or len(estimator.classes_) == 1
    prior = floats(estimator.class_log_prior_) if has_prior else None
    joint = Linear(floats(estimator.feature_log_prob_), prior)
    return _of_joint(then(before, joint), labels(estimator.classes_))


@predicts(_BAYES + "BernoulliNB")
def _bernoulli(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = checked(flow, sparse=flow.kind == "sparse" and estimator.binarize is None)
    if estimator.binarize is not None:
        before.append(Binarize(float(estimator.binarize)))
    positive = floats(estimator.feature_log_prob_)
    negative = np.log(1 - np.exp(positive))
    prior = floats(estimator.class_log_prior_) + negative.sum(axis=1)
    joint = then(before, Linear(np.ascontiguousarray(positive - negative), prior))
    return _of_joint(joint, labels(estimator.classes_))


@predicts(_BAYES + "CategoricalNB")
def _categorical(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = checked(flow)
    joint = Categories(tuple(map(floats, estimator.feature_log_prob_)), floats(estimator.class_log_prior_))
    return _of_joint(then(before, joint), labels(estimator.classes_))


_DISCRIMINANT = "sklearn.discriminant_analysis."


@predicts(_DISCRIMINANT + "LinearDiscriminantAnalysis")
def _linear_discriminant(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = checked(flow)
    scores = then(before, product(estimator, is_classifier=True))
    probabilities: Op = Sigmoid(scores) if len(estimator.classes_) == 2 else Softmax(scores)
    return {
        "predict": Classify(scores, labels(estimator.classes_)),
        "decision_function": scores,
        "predict_proba": probabilities,
        "predict_log_proba": LogNonZero(probabilities),
    }


@transforms(_DISCRIMINANT + "LinearDiscriminantAnalysis")
def _discriminants(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if estimator.solver == "lsqr":
        raise NotCompilable("its LinearDiscriminantAnalysis cannot transform")
    before, flow = checked(flow)
    matrix = np.ascontiguousarray(floats(estimator.scalings_).T[: estimator._max_components])
    if estimator.solver == "svd":
        before.append(Shift(floats(estimator.xbar_), None))
    return then(before, Linear(matrix, None)), Flow("matrix", len(matrix))


@predicts(_DISCRIMINANT + "QuadraticDiscriminantAnalysis")
def _quadratic_discriminant(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = checked(flow)
    scores = then(
        before,
        Quadratics(
            floats(estimator.means_),
            tuple(map(floats, estimator.rotations_)),
            tuple(map(floats, estimator.scalings_)),
            floats(estimator.priors_),
        ),
    )
    logs = Likelihoods(scores)
    return {
        "predict": Classify(scores, labels(estimator.classes_)),
        "decision_function": Difference(scores) if len(estimator.classes_) == 2 else scores,
        "predict_proba": Mapped(logs, "exp"),
        "predict_log_proba": logs,
    }


_NETWORK = "sklearn.neural_network._multilayer_perceptron."


def _layers(estimator: Any, flow: Flow) -> Op:
    before, flow = checked(flow, sparse=True)
    weights = tuple(map(floats, estimator.coefs_))
    flat = weights[-1].shape[1] == 1
    intercepts = tuple(map(floats, estimator.intercepts_))
    return then(before, Layers(weights, intercepts, estimator.activation, estimator.out_activation_, flat))


@predicts(_NETWORK + "MLPRegressor")
def _network_regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    return {"predict": _layers(estimator, flow)}


@predicts(_NETWORK + "MLPClassifier")
def _network_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    if estimator._label_binarizer.y_type_ not in ("binary", "multiclass"):
        raise NotCompilable("its MLPClassifier has several labels a row")
    found = _layers(estimator, flow)
    is_binary = estimator.n_outputs_ == 1
    predicted = Classify(found, labels(estimator.classes_), threshold=0.5)
    return {"predict": predicted, **of_probabilities(TwoClasses(found) if is_binary else found)}


_VECTORS = "sklearn.svm._classes."


def _kernel(estimator: Any, flow: Flow, weights: Array, intercepts: Array, *, flat: bool) -> Op:
    name = type(estimator).__name__
    if callable(estimator.kernel) or estimator.kernel not in ("linear", "poly", "rbf", "sigmoid"):
        raise NotCompilable(f"its {name} has a kernel that only Python can compute")
    if estimator._sparse:
        raise NotCompilable(f"its {name} was fitted on rows that are mostly zero")
    if flow.kind == "sparse":
        raise NotCompilable(f"its {name} would be given rows that are mostly zero")
    before, flow = checked(flow)
    kernel = Kernel(
        estimator.kernel,
        floats(estimator.support_vectors_),
        np.ascontiguousarray(weights),
        np.ascontiguousarray(intercepts),
        float(estimator._gamma),
        float(estimator.coef0),
        int(estimator.degree),
        flat,
    )
    return then(before, kernel)


@predicts(_VECTORS + "SVR", _VECTORS + "NuSVR")
def _vector_regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    weights, intercepts = floats(estimator._dual_coef_), floats(estimator._intercept_)
    return {"predict": _kernel(estimator, flow, weights, intercepts, flat=True)}


@predicts(_VECTORS + "OneClassSVM")
def _one_class(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    weights, intercepts = floats(estimator._dual_coef_), floats(estimator._intercept_)
    scores = _kernel(estimator, flow, weights, intercepts, flat=True)
    return {
        "predict": Side(scores),
        "decision_function": scores,
        "score_samples": Rescaled(scores, ("add",), (float(np.ravel(estimator.offset_)[0]),)),
    }


@predicts(_VECTORS + "SVC", _VECTORS + "NuSVC")
def _vector_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    count = len(estimator.classes_)
    weights, intercepts = _of_pairs(estimator), floats(estimator._intercept_)
    scores = _kernel(estimator, flow, weights, intercepts, flat=False)
    decision: Op
    if count == 2:
        decision = _kernel(estimator, flow, -weights, -intercepts, flat=True)
    elif estimator.decision_function_shape == "ovr":
        decision = Votes(scores, count, confident=True)
    else:
        decision = scores
    votes = decision if estimator.break_ties and count > 2 else Votes(scores, count, confident=False)
    if estimator.break_ties and estimator.decision_function_shape == "ovo":
        raise NotCompilable("its SVC breaks ties between pairs, which scikit-learn refuses")
    return {"predict": Classify(votes, labels(estimator.classes_)), "decision_function": decision}


def _of_pairs(estimator: Any) -> Array:
    """Return the weights of all support vectors for each pair of classes, of shape (pairs, vectors)."""
    duals, sizes = floats(estimator._dual_coef_), estimator._n_support.tolist()
    count = len(sizes)
    if count * (count - 1) // 2 * duals.shape[1] > MAX_PAIR_WEIGHTS:
        raise NotCompilable(f"its {type(estimator).__name__} has too many pairs of classes")
    stops = np.cumsum(sizes)
    own = [slice(int(stop) - size, int(stop)) for stop, size in zip(stops, sizes, strict=True)]
    rows = []
    for first in range(count):
        for second in range(first + 1, count):
            row = np.zeros(duals.shape[1])
            row[own[first]] = duals[second - 1, own[first]]
            row[own[second]] = duals[first, own[second]]
            rows.append(row)
    return np.array(rows)


@predicts("sklearn.mixture._gaussian_mixture.GaussianMixture")
def _mixture(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    kind = estimator.covariance_type
    if kind == "spherical":
        raise NotCompilable("its GaussianMixture has spherical distributions, which have no compiled form")
    before, flow = checked(flow)
    means, factors = floats(estimator.means_), floats(estimator.precisions_cholesky_)
    if kind == "diag":
        determinants = np.log(factors).sum(axis=1)
    else:
        factors = factors.reshape(-1, *factors.shape[-2:])
        determinants = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)
    constants = np.column_stack([np.broadcast_to(determinants, (len(means),)), np.log(floats(estimator.weights_))])
    scores = then(before, Mixture(means, factors, constants, means.shape[1]))
    return {
        "predict": Largest(scores),
        "predict_proba": Mapped(LogNormalize(scores), "exp"),
        "score_samples": LogSumExp(scores),
    }


@predicts("sklearn.linear_model._stochastic_gradient.SGDOneClassSVM")
def _linear_one_class(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = checked(flow, sparse=True)
    offset = floats(estimator.offset_).ravel()
    product = then(before, Linear(floats(estimator.coef_).reshape(1, -1), None, flat=True))
    scores = Rescaled(product, ("subtract",), (float(offset[0]),))
    return {"predict": Side(scores, inclusive=True), "decision_function": scores, "score_samples": product}


_CENTRES = "sklearn.cluster._kmeans."


@predicts(_CENTRES + "KMeans", _CENTRES + "MiniBatchKMeans", "sklearn.cluster._bisect_k_means.BisectingKMeans")
def _centres(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    if type(estimator).__name__ == "BisectingKMeans":
        raise NotCompilable("its BisectingKMeans predicts by a tree")
    before, flow = checked(flow)
    return {"predict": then(before, Nearest(floats(estimator.cluster_centers_)))}


@transforms(_CENTRES + "KMeans", _CENTRES + "MiniBatchKMeans")
def _distances(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    before, flow = checked(flow)
    centres = floats(estimator.cluster_centers_)
    return then(before, Distances(centres)), Flow("matrix", len(centres))


_NEIGHBOURS = "sklearn.neighbors."


def _neighbours(estimator: Any, flow: Flow) -> tuple[list[Op | None], Neighbours]:
    name = type(estimator).__name__
    if estimator.weights not in ("uniform", "distance", None):
        raise NotCompilable(f"its {name} has weights that only Python can compute")
    if hasattr(estimator._fit_X, "toarray") or flow.kind == "sparse":
        raise NotCompilable(f"its {name} compares rows that are mostly zero")
    metric = estimator.effective_metric_
    if metric == "minkowski":
        metric = {1: "manhattan", 2: "euclidean"}.get(estimator.effective_metric_params_.get("p", 2), metric)
    if metric not in ("euclidean", "manhattan", "chebyshev"):
        raise NotCompilable(f"its {name} measures distances as {metric!r:.40}")
    before, flow = checked(flow)
    return before, Neighbours(floats(estimator._fit_X), int(estimator.n_neighbors), metric)


@predicts(_NEIGHBOURS + "_regression.KNeighborsRegressor")
def _neighbour_regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, found = _neighbours(estimator, flow)
    mean = NeighbourMean(found, floats(estimator._y), by_distance=estimator.weights == "distance")
    return {"predict": then(before, mean)}


@predicts(_NEIGHBOURS + "_classification.KNeighborsClassifier")
def _neighbour_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, found = _neighbours(estimator, flow)
    by_distance = estimator.weights == "distance"
    several = bool(estimator.outputs_2d_)
    classes = list(estimator.classes_) if several else [estimator.classes_]
    numbers = np.asarray(estimator._y).reshape(len(found.points), -1)

    def counts(index: int, *, normalized: bool) -> Op:
        column = np.ascontiguousarray(numbers[:, index]).astype(np.int64)
        return NeighbourClasses(found, column, len(classes[index]), by_distance, normalized)

    if several:
        named = [labels(names) for names in classes]
        outputs = range(len(classes))
        return {
            "predict": then(before, ColumnsOf(tuple(counts(i, normalized=False) for i in outputs), tuple(named))),
            "predict_proba": then(before, Several(tuple(counts(i, normalized=True) for i in outputs), False)),
        }
    return {
        "predict": Classify(then(before, counts(0, normalized=False)), labels(classes[0])),
        "predict_proba": then(before, counts(0, normalized=True)),
    }


@predicts("sklearn.dummy.DummyRegressor")
def _constant(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    constant = floats(estimator.constant_).ravel()
    return {"predict": Constant(np.array(constant[0]) if estimator.n_outputs_ == 1 else constant)}


@predicts("sklearn.dummy.DummyClassifier")
def _constant_classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    strategy = estimator._strategy
    if strategy not in ("most_frequent", "prior", "constant") or estimator.n_outputs_ != 1 or estimator.sparse_output_:
        raise NotCompilable("its DummyClassifier draws at random, or has several outputs")
    prior = floats(estimator.class_prior_)
    if strategy == "constant":
        number = int(np.flatnonzero(estimator.classes_ == np.ravel(estimator.constant)[0])[0])
    else:
        number = int(prior.argmax())
    chances = prior if strategy == "prior" else np.eye(len(prior))[number]
    return {
        "predict": Chain((Constant(np.array(number)), labels(estimator.classes_))),
        **of_probabilities(Constant(chances)),
    }
