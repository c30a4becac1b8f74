"""Translations of models made of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.compiled.combined import AsColumns, Ballot, Calibrated, Mean, Pick, Rescaled, Rest, Several, Tempered
from app.compiled.linear import Classify
from app.compiled.numeric import Function
from app.compiled.op import Op
from app.compiled.steps import Assemble, Chain, Select
from app.compiler.linear import labels
from app.compiler.pipeline import beside, chain, numbers, then
from app.compiler.preprocessing import floats, ufunc_name
from app.compiler.translation import Flow, NotCompilable, predictor, predicts, transforms


def _head(estimator: Any, method: str, flow: Flow) -> Op:
    found = predictor(estimator, flow).get(method)
    if found is None:
        raise NotCompilable(f"its {type(estimator).__name__} has no compiled form of {method}")
    return found


def _classes(estimator: Any) -> Any:
    classes = getattr(estimator, "classes_", None)
    if not isinstance(classes, np.ndarray) or classes.ndim != 1:
        raise NotCompilable(f"its {type(estimator).__name__} has several outputs")
    return classes


@predicts("sklearn.ensemble._voting.VotingRegressor")
def _mean(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    members = tuple(_head(member, "predict", flow) for member in estimator.estimators_)
    weights = estimator._weights_not_none
    return {"predict": Mean(members, None if weights is None else floats(weights))}


@predicts("sklearn.ensemble._voting.VotingClassifier")
def _votes(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    named, weights = labels(_classes(estimator)), estimator._weights_not_none
    weights = None if weights is None else floats(weights)
    if estimator.voting == "soft":
        members = tuple(_head(member, "predict_proba", flow) for member in estimator.estimators_)
        mean = Mean(members, weights)
        return {"predict": Classify(mean, named), "predict_proba": mean}
    members = tuple(_head(member, "predict", flow) for member in estimator.estimators_)
    weights = np.ones(len(members)) if weights is None else weights
    return {"predict": Classify(Ballot(members, weights, len(estimator.classes_)), named)}


@predicts("sklearn.ensemble._stacking.StackingRegressor", "sklearn.ensemble._stacking.StackingClassifier")
def _stacked(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    below, made = _stack(estimator, flow)
    heads = {
        method: chain(below, head) or below for method, head in predictor(estimator.final_estimator_, made).items()
    }
    if type(estimator).__name__ == "StackingRegressor":
        return {"predict": heads["predict"]}
    if isinstance(estimator._label_encoder, list):
        raise NotCompilable("its StackingClassifier has several outputs")
    heads["predict"] = Chain((heads["predict"], labels(estimator._label_encoder.classes_)))
    heads.pop("predict_log_proba", None)
    return heads


def _stack(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    parts: list[Op] = []
    widths: list[int] = []
    members = [member for member in estimator.estimators_ if not isinstance(member, str)]
    for member, method in zip(members, estimator.stack_method_, strict=True):
        head = _head(member, method, flow)
        count = len(_classes(estimator)) if type(estimator).__name__ == "StackingClassifier" else 0
        if method == "predict":
            if count:
                raise NotCompilable("its StackingClassifier stacks labels")
            if getattr(member, "coef_", np.zeros(1)).ndim == 2 and len(member.coef_) > 1:
                raise NotCompilable("its StackingRegressor has several outputs")
            skip, width = 0, 1
        elif method == "predict_proba":
            skip, width = (1, 1) if count == 2 else (0, count)
        else:
            skip, width = 0, 1 if count == 2 else count
        parts.append(AsColumns(head, skip))
        widths.append(width)
    below = Assemble(tuple(parts), tuple(widths))
    made = Flow("matrix", sum(widths))
    if estimator.passthrough:
        given, passed = numbers(flow)
        return beside([(below, made), (given, dataclasses.replace(passed, dtype="float64"))])
    return below, made


@transforms("sklearn.ensemble._stacking.StackingRegressor", "sklearn.ensemble._stacking.StackingClassifier")
def _stacked_columns(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    return _stack(estimator, flow)


@transforms("sklearn.ensemble._voting.VotingRegressor")
def _member_columns(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    members = tuple(_head(member, "predict", flow) for member in estimator.estimators_)
    return Several(members, as_columns=True), Flow("matrix", len(members))


@transforms("sklearn.ensemble._voting.VotingClassifier")
def _member_chances(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if estimator.voting != "soft" or not estimator.flatten_transform:
        raise NotCompilable("its VotingClassifier has a transformation without a compiled form")
    count = len(_classes(estimator))
    members = tuple(_head(member, "predict_proba", flow) for member in estimator.estimators_)
    widths = (count,) * len(members)
    return Assemble(members, widths), Flow("matrix", sum(widths))


@predicts("sklearn.calibration.CalibratedClassifierCV")
def _calibrated(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    classes = _classes(estimator)
    mean = Mean(tuple(_calibrated_member(member, flow) for member in estimator.calibrated_classifiers_), None)
    return {"predict": Classify(mean, labels(classes)), "predict_proba": mean}


def _calibrated_member(member: Any, flow: Flow) -> Op:
    inner, count = member.estimator, len(member.classes)
    heads = predictor(inner, flow)
    has_decision = hasattr(inner, "decision_function")
    scores = heads.get("decision_function" if has_decision else "predict_proba")
    own = _classes(inner)
    if scores is None or count < 2:
        raise NotCompilable(f"its {type(inner).__name__} has no compiled form of what is calibrated")
    if not has_decision and len(own) == 2:
        scores = Pick(scores, 1)
    if member.method == "temperature":
        return Tempered(scores, float(member.calibrators[0].beta_), not has_decision)
    columns = [int(np.flatnonzero(np.asarray(member.classes) == label)[0]) for label in own.tolist()]
    columns = [column + 1 for column in columns[:1]] if count == 2 else columns
    columns = columns[: len(member.calibrators)]
    if member.method == "sigmoid":
        curves = tuple(np.array([float(curve.a_), float(curve.b_)]) for curve in member.calibrators)
        return Calibrated(scores, count, tuple(columns), "sigmoid", curves)
    curves = tuple(np.stack([floats(curve.X_thresholds_), floats(curve.y_thresholds_)]) for curve in member.calibrators)
    if any(curve.out_of_bounds != "clip" for curve in member.calibrators):
        raise NotCompilable("its CalibratedClassifierCV has a curve that ends")
    return Calibrated(scores, count, tuple(columns), "isotonic", curves)


@predicts("sklearn.ensemble._bagging.BaggingRegressor", "sklearn.ensemble._bagging.BaggingClassifier")
def _bagged(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    if flow.kind not in ("matrix", "table"):
        raise NotCompilable(f"its {type(estimator).__name__} would pick columns of {flow.kind}")
    before, flow = numbers(flow)
    found: list[dict[str, Op]] = []
    for member, features in zip(estimator.estimators_, estimator.estimators_features_, strict=True):
        columns = tuple(int(column) for column in features)
        picked = dataclasses.replace(flow, width=len(columns), names=None)
        select = None if columns == tuple(range(flow.width)) else Select(columns)
        heads = predictor(member, picked)
        found.append({method: then([before, select], head) for method, head in heads.items()})
    if type(estimator).__name__ == "BaggingRegressor":
        return {"predict": Mean(tuple(heads["predict"] for heads in found), None)}
    named, count = labels(_classes(estimator)), len(estimator.classes_)
    made: dict[str, Op] = {}
    if all(hasattr(member, "predict_proba") for member in estimator.estimators_):
        every = np.arange(count)
        if not all("predict_proba" in heads for heads in found) or not all(
            np.array_equal(member.classes_, every) for member in estimator.estimators_
        ):
            raise NotCompilable("its BaggingClassifier has members that never saw some class")
        made["predict_proba"] = Mean(tuple(heads["predict_proba"] for heads in found), None)
        made["predict"] = Classify(made["predict_proba"], named)
    else:
        ballot = Ballot(tuple(heads["predict"] for heads in found), np.ones(len(found)), count)
        made["predict"] = Classify(ballot, named)
        made["predict_proba"] = Rescaled(ballot, ("divide",), (float(len(found)),))
    if hasattr(estimator, "decision_function") and all("decision_function" in heads for heads in found):
        made["decision_function"] = Mean(tuple(heads["decision_function"] for heads in found), None)
    return made


_SEVERAL = "sklearn.multioutput."


@predicts(_SEVERAL + "MultiOutputRegressor", _SEVERAL + "MultiOutputClassifier")
def _several(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    found: Sequence[Mapping[str, Op]] = [predictor(member, flow) for member in estimator.estimators_]
    heads: dict[str, Op] = {"predict": Several(tuple(member["predict"] for member in found), as_columns=True)}
    if type(estimator).__name__ == "MultiOutputClassifier" and all("predict_proba" in member for member in found):
        heads["predict_proba"] = Several(tuple(member["predict_proba"] for member in found), as_columns=False)
    return heads


@predicts("sklearn.multiclass.OneVsRestClassifier")
def _one_against_rest(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    if estimator.multilabel_ or len(estimator.estimators_) < 2:
        raise NotCompilable("its OneVsRestClassifier has two classes or several labels a row")
    found = [predictor(member, flow) for member in estimator.estimators_]
    if any(type(member).__name__ == "_ConstantPredictor" for member in estimator.estimators_):
        raise NotCompilable("its OneVsRestClassifier has a class that was never there")
    heads: dict[str, Op] = {}
    if all("decision_function" in member for member in found):
        scores: Op = Several(tuple(member["decision_function"] for member in found), as_columns=True)
        heads["decision_function"] = scores
    elif all("predict_proba" in member for member in found) and not hasattr(estimator, "decision_function"):
        scores = Several(tuple(Pick(member["predict_proba"], 1) for member in found), as_columns=True)
    else:
        raise NotCompilable("its OneVsRestClassifier has members without a compiled form")
    heads["predict"] = Classify(scores, labels(estimator.classes_))
    if all("predict_proba" in member for member in found):
        heads["predict_proba"] = Rest(tuple(Pick(member["predict_proba"], 1) for member in found))
    return heads


@predicts("sklearn.compose._target.TransformedTargetRegressor")
def _transformed_target(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    inner, transformer = _head(estimator.regressor_, "predict", flow), estimator.transformer_
    name = type(transformer).__name__
    if name == "FunctionTransformer":
        if transformer.inverse_func is None:
            return {"predict": inner}
        function = ufunc_name(transformer.inverse_func)
        if function is None or transformer.inv_kw_args:
            raise NotCompilable("its TransformedTargetRegressor has a function that only Python can compute")
        return {"predict": Chain((inner, Function(function)))}
    if estimator._training_dim != 1:
        raise NotCompilable("its TransformedTargetRegressor has several targets")
    steps: list[tuple[Any, Any]] = []
    if name == "StandardScaler":
        steps += [("multiply", transformer.scale_)] if transformer.with_std else []
        steps += [("add", transformer.mean_)] if transformer.with_mean else []
    elif name == "MinMaxScaler":
        steps = [("subtract", transformer.min_), ("divide", transformer.scale_)]
    elif name == "MaxAbsScaler":
        steps = [("multiply", transformer.scale_)]
    elif name == "RobustScaler":
        steps += [("multiply", transformer.scale_)] if transformer.with_scaling else []
        steps += [("add", transformer.center_)] if transformer.with_centering else []
    else:
        raise NotCompilable(f"its {name} of the target has no compiled form")
    hows, operands = tuple(how for how, _ in steps), tuple(float(floats(operand)[0]) for _, operand in steps)
    return {"predict": Rescaled(inner, hows, operands)}


@predicts(
    "sklearn.model_selection._classification_threshold.TunedThresholdClassifierCV",
    "sklearn.model_selection._classification_threshold.FixedThresholdClassifier",
)
def _threshold(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    inner = getattr(estimator, "estimator_", estimator.estimator)
    found = dict(predictor(inner, flow))
    classes = _classes(estimator)
    is_tuned = type(estimator).__name__ == "TunedThresholdClassifierCV"
    positive = estimator._curve_scorer._get_pos_label() if is_tuned else estimator.pos_label
    if positive is not None and positive != classes[1]:
        raise NotCompilable(f"its {type(estimator).__name__} decides for the first class")
    method = estimator._get_response_method()
    methods = [method] if isinstance(method, str) else list(method)
    used = next(name for name in methods if hasattr(inner, name))
    if used not in found:
        raise NotCompilable(f"its {type(inner).__name__} has no compiled form of {used}")
    scores = Pick(found[used], 1) if used == "predict_proba" else found[used]
    threshold = estimator.best_threshold_ if is_tuned else estimator.threshold
    if threshold == "auto":
        threshold = 0.5 if used == "predict_proba" else 0.0
    found["predict"] = Classify(scores, labels(classes), float(threshold), inclusive=True)
    return {method: found[method] for method in _THRESHOLD_METHODS if method in found}


_THRESHOLD_METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function")
