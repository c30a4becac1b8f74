"""Translations of models that multiply by a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from app.compiled.linear import Classify, ClassLabels, Linear, Mapped, Sigmoid, Softmax
from app.compiled.numeric import Finite
from app.compiled.op import Op
from app.compiler.pipeline import checked, then
from app.compiler.preprocessing import key
from app.compiler.translation import Flow, NotCompilable, predicts

_BASE = "sklearn.linear_model."


def labels(classes: Any) -> ClassLabels:
    """Return what the classes of a fitted classifier are called. Raises `NotCompilable` where they are no list of values."""
    array = np.asarray(classes)
    if array.ndim != 1 or not len(array):
        raise NotCompilable("its classes are no list")
    if array.dtype.kind in "biuf" and array.dtype.itemsize <= 8 and array.dtype != np.float16:
        return ClassLabels(array, strings=False)
    return ClassLabels(tuple(key(value) for value in array.tolist()), strings=array.dtype.kind == "U")


def of_input(flow: Flow) -> tuple[list[Op | None], Flow]:
    """Return what checks the input of a linear model, which computes in float32 on float32 as scikit-learn does."""
    if flow.kind == "matrix" and flow.dtype == "float32":
        return [Finite(False)], flow
    return checked(flow, sparse=True)


def product(estimator: Any, *, is_classifier: bool) -> Linear:
    """Return what multiplies by the coefficients of a fitted model, as the scores of its classes or as predictions."""
    coefficients = np.asarray(estimator.coef_)
    if hasattr(estimator.coef_, "toarray"):
        raise NotCompilable(f"its {type(estimator).__name__} has sparse coefficients")
    intercept = np.asarray(estimator.intercept_)
    if intercept.dtype.kind in "iu":
        intercept = intercept.astype(np.float64)
    if coefficients.dtype.kind != "f" or intercept.dtype.kind != "f":
        raise NotCompilable(f"its {type(estimator).__name__} has coefficients of {coefficients.dtype}")
    flat = is_classifier and coefficients.ndim == 2 and len(coefficients) == 1
    return Linear(np.ascontiguousarray(coefficients), intercept, flat)


@predicts(
    *(
        _BASE + name
        for name in (
            "_base.LinearRegression", "_ridge.Ridge", "_ridge.RidgeCV", "_coordinate_descent.Lasso",
            "_coordinate_descent.LassoCV", "_coordinate_descent.ElasticNet", "_coordinate_descent.ElasticNetCV",
            "_coordinate_descent.MultiTaskLasso", "_coordinate_descent.MultiTaskLassoCV",
            "_coordinate_descent.MultiTaskElasticNet", "_coordinate_descent.MultiTaskElasticNetCV",
            "_least_angle.Lars", "_least_angle.LarsCV", "_least_angle.LassoLars", "_least_angle.LassoLarsCV",
            "_least_angle.LassoLarsIC", "_omp.OrthogonalMatchingPursuit", "_omp.OrthogonalMatchingPursuitCV",
            "_bayes.BayesianRidge", "_bayes.ARDRegression", "_huber.HuberRegressor", "_theil_sen.TheilSenRegressor",
            "_quantile.QuantileRegressor", "_stochastic_gradient.SGDRegressor",
            "_passive_aggressive.PassiveAggressiveRegressor",
        )
    ),
    "sklearn.svm._classes.LinearSVR",
)  # fmt: skip
def _regressor(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = of_input(flow)
    return {"predict": then(before, product(estimator, is_classifier=False))}


@predicts(
    _BASE + "_ridge.RidgeClassifier",
    _BASE + "_ridge.RidgeClassifierCV",
    _BASE + "_perceptron.Perceptron",
    _BASE + "_passive_aggressive.PassiveAggressiveClassifier",
    "sklearn.svm._classes.LinearSVC",
)
def _classifier(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = of_input(flow)
    scores = then(before, product(estimator, is_classifier=True))
    binarizer = getattr(estimator, "_label_binarizer", None)
    if getattr(binarizer, "y_type_", "multiclass") not in ("binary", "multiclass"):
        raise NotCompilable(f"its {type(estimator).__name__} has several labels a row")
    return _decided(scores, labels(estimator.classes_))


def _decided(scores: Op, named: ClassLabels) -> dict[str, Op]:
    return {"predict": Classify(scores, named), "decision_function": scores}


@predicts(_BASE + "_logistic.LogisticRegression", _BASE + "_logistic.LogisticRegressionCV")
def _logistic(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = of_input(flow)
    scores = then(before, product(estimator, is_classifier=True))
    probabilities: Op = Sigmoid(scores) if len(estimator.classes_) <= 2 else Softmax(scores)
    return {**_decided(scores, labels(estimator.classes_)), **of_probabilities(probabilities)}


def of_probabilities(probabilities: Op) -> dict[str, Op]:
    """Return the heads for probabilities and their logarithms."""
    return {"predict_proba": probabilities, "predict_log_proba": Mapped(probabilities, "log")}


@predicts(_BASE + "_stochastic_gradient.SGDClassifier")
def _stochastic(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = of_input(flow)
    scores = then(before, product(estimator, is_classifier=True))
    heads = _decided(scores, labels(estimator.classes_))
    if estimator.loss == "log_loss":
        heads.update(of_probabilities(Sigmoid(scores)))
    return heads


@predicts(_BASE + "_glm.glm.PoissonRegressor", _BASE + "_glm.glm.GammaRegressor", _BASE + "_glm.glm.TweedieRegressor")
def _generalized(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    before, flow = of_input(flow)
    scores = then(before, product(estimator, is_classifier=False))
    link = type(estimator._get_loss().link).__name__
    if link == "IdentityLink":
        return {"predict": scores}
    if link != "LogLink":
        raise NotCompilable(f"its {type(estimator).__name__} has a {link}")
    return {"predict": Mapped(scores, "exp")}
