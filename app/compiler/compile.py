"""From fitted objects to a program: the way from validated rows through companions and model, translated step by step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app import inspection
from app.compiled.op import Op
from app.compiled.program import Program
from app.compiled.steps import Cast, Chain, Select
from app.compiler import combined, linear, models, preprocessing, text, trees  # noqa: F401 - they register translations
from app.compiler.heads import common
from app.compiler.linear import labels
from app.compiler.pipeline import by_columns, chain, pipeline_steps, then
from app.compiler.translation import TRANSFORMERS, Flow, NotCompilable, predictor, transformer
from app.loaders import reason
from app.reference import order_between
from app.signature import Signature


def translate(companions: Sequence[Any], estimator: Any, signature: Signature) -> Program:
    """Return the program that computes what `estimator` behind its `companions` does, for the methods that have a form.

    Its methods may be fewer than the signature's.
    Raises `NotCompilable` for objects that have none. Nothing has proved that the program is right.
    """
    try:
        return _program(companions, estimator, signature)
    except NotCompilable:
        raise
    except Exception as error:  # a fitted object of another release, or somebody's own, may lack what is read here
        raise NotCompilable(f"its {type(estimator).__name__} cannot be read: {reason(error)}") from error


def _program(companions: Sequence[Any], estimator: Any, signature: Signature) -> Program:
    flow = flow_of(signature)
    stages = [stage for stage in companions if not inspection.is_target_encoder(stage)]
    target = next((stage for stage in companions if inspection.is_target_encoder(stage)), None)
    operations: list[Op | None] = []
    for stage, following in itertools.pairwise([*stages, estimator]):
        operation, flow = transformer(stage, flow)
        operations.append(operation)
        order = order_between(stage, following)
        if order is not None:
            operations.append(Select(tuple(order)))
        flow = dataclasses.replace(flow, names=_names(following) if flow.kind == "matrix" else None)
    body, flow, last = _split(estimator, flow)
    operations.append(body)
    heads = dict(_heads(last, flow, signature.methods))
    if not heads:
        raise NotCompilable(f"its {type(last).__name__} has no compiled form of {', '.join(signature.methods)}")
    if target is not None and "predict" in heads:
        heads["predict"] = _decoded(heads["predict"], target)
    shared, heads = common(heads) if len(heads) > 1 else ((), heads)
    body = chain(*operations, *shared)
    if signature.layout == "frame":
        body = by_columns(body)
        heads = {method: head if body is not None else by_columns(head) or head for method, head in heads.items()}
    return Program(body, {method: heads[method] for method in signature.methods if method in heads})


def _names(estimator: Any) -> tuple[str, ...] | None:
    names = getattr(estimator, "feature_names_in_", None)
    return None if names is None else tuple(map(str, names))


def flow_of(signature: Signature) -> Flow:
    """Return what is known of validated rows before anything is computed."""
    specs = signature.inputs
    if signature.layout == "text":
        return Flow("texts", 1)
    if signature.layout == "records":
        return Flow("records", 1)
    if not specs:
        raise NotCompilable("its signature has no columns")
    if any(spec.is_anything for spec in specs):
        raise NotCompilable("nothing tells what its columns hold")
    names = tuple(spec.name for spec in specs) if signature.layout == "frame" else None
    whole = not any(spec.nullable for spec in specs)
    kinds = {(spec.datatype, spec.dtype) for spec in specs}
    if len(kinds) == 1:
        ((datatype, dtype),) = kinds
        if datatype == "FP64" and dtype in ("float64", "float32"):
            return Flow("matrix", len(specs), dtype, names=names, whole=whole, bounded=True)
    dtypes = tuple(spec.dtype for spec in specs)
    dtype = "float64"
    if set(dtypes) <= {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}:
        dtype = str(np.result_type(*dtypes))
    return Flow("table", len(specs), dtype, names=names, dtypes=dtypes, whole=whole, bounded=True)


def _split(estimator: Any, flow: Flow) -> tuple[Op | None, Flow, Any]:
    """Return what all methods begin with, what is known behind it, and the estimator that remains."""
    operations: list[Op | None] = []
    while type(estimator).__name__ in ("Pipeline", *_SEARCHES) and type(estimator).__module__.startswith("sklearn."):
        if type(estimator).__name__ != "Pipeline":
            best = getattr(estimator, "best_estimator_", None)
            if best is None:
                break
            estimator = best
            continue
        *steps, last = [step for _, step in estimator.steps]
        operation, flow = pipeline_steps(steps, flow)
        operations.append(operation)
        if last is None or isinstance(last, str):
            raise NotCompilable("its last step passes through")
        estimator = last
    return chain(*operations), flow, estimator


_SEARCHES = ("GridSearchCV", "RandomizedSearchCV", "HalvingGridSearchCV", "HalvingRandomSearchCV")


def _heads(estimator: Any, flow: Flow, methods: Sequence[str]) -> Mapping[str, Op]:
    heads: dict[str, Op] = {}
    cls = type(estimator)
    refused: NotCompilable | None = None
    if "transform" in methods and f"{cls.__module__}.{cls.__qualname__}" in TRANSFORMERS:
        try:
            heads["transform"] = _transform(estimator, flow)
        except NotCompilable as error:
            refused = error
    if set(methods) - {"transform"}:
        try:
            heads.update({method: head for method, head in predictor(estimator, flow).items() if method in methods})
        except NotCompilable as error:
            refused = refused or error
    if refused is not None and not heads:
        raise refused
    return heads


def _transform(estimator: Any, flow: Flow) -> Op:
    operation, made = transformer(estimator, flow)
    if made.kind not in ("matrix", "sparse"):
        raise NotCompilable(f"its {type(estimator).__name__} gives {made.kind}")
    return operation if made.dtype == "float64" else then([operation], Cast(made.dtype))


def _decoded(head: Op, target: Any) -> Op:
    if type(target).__name__ != "LabelEncoder":
        raise NotCompilable(f"its {type(target).__name__} decodes labels, which has no compiled form")
    return Chain((head, labels(target.classes_)))
