"""Translations of what holds other estimators: pipelines, columns beside each other, searches; and how operations are joined.

Neighbouring operations are fused where one can do the work of both: columns that are picked and then read, numbers that are
imputed and then scaled, words that are imputed and then encoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from app.compiled import steps
from app.compiled.categories import Codes, Key, OneHot, Replace
from app.compiled.numeric import Arithmetic, Elementwise, Finite, Missing, Numbers
from app.compiled.op import Op
from app.compiled.steps import Assemble, Chain, Column, Dense, Select, Stack
from app.compiler.translation import Flow, NotCompilable, predicts, transformer, transforms
from app.compiler.translation import predictor as translate_predictor

MAX_DENSE_WIDTH = 4096  # columns that rows which are mostly zero are written out to
_FLOATS = {"float64", "float32", "float16"}
_NUMBERS = _FLOATS | {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}


def chain(*operations: Op | None) -> Op | None:
    """Return one operation that does these one after the other, fused as far as possible; None for none."""
    flat: list[Op] = []
    for operation in operations:
        for step in operation.steps if isinstance(operation, Chain) else () if operation is None else (operation,):
            flat.append(step)
            while len(flat) > 1 and (fused := _fused(flat[-2], flat[-1])) is not None:
                flat[-2:] = [fused]
    return None if not flat else flat[0] if len(flat) == 1 else Chain(tuple(flat))


def then(flow_operations: Iterable[Op | None], last: Op) -> Op:
    """Return `last` behind other operations."""
    found = chain(*flow_operations, last)
    assert found is not None
    return found


def _fused(first: Op, second: Op) -> Op | None:
    if isinstance(first, Select):
        moved = _behind(first.columns, second)
        if moved is not None:
            return moved
    if isinstance(first, Numbers) and isinstance(second, Numbers) and second.columns is None:
        return Numbers(first.columns, (*first.steps, *second.steps))
    if isinstance(first, Numbers) and not first.steps and isinstance(second, Numbers):
        return second if first.columns is None else _behind(first.columns, second)
    if isinstance(first, Numbers) and isinstance(second, Elementwise):
        return Numbers(first.columns, (*first.steps, second))
    if isinstance(first, Elementwise) and isinstance(second, Elementwise):
        return Numbers(None, (first, second))
    if isinstance(first, Replace) and isinstance(second, (OneHot, Codes)):
        return _imputed(first, second)
    return None


def _behind(picked: Sequence[int], reader: Op) -> Op | None:
    """Return the same reader for the columns as they are before some of them were picked."""
    if isinstance(reader, Numbers):
        columns = picked if reader.columns is None else [picked[column] for column in reader.columns]
        return dataclasses.replace(reader, columns=tuple(columns))
    if isinstance(reader, (OneHot, Codes, Replace, Select)):
        return dataclasses.replace(reader, columns=tuple(picked[column] for column in reader.columns))
    if isinstance(reader, Missing):
        return dataclasses.replace(
            reader,
            columns=tuple(picked[column] for column in reader.columns),
            refusing=tuple(picked[column] for column in reader.refusing),
        )
    if isinstance(reader, Column):
        return Column(picked[reader.column])
    if isinstance(reader, Chain):
        first = _behind(picked, reader.steps[0])
        return None if first is None else Chain((first, *reader.steps[1:]))
    if isinstance(reader, (Assemble, Stack)):
        parts = [_behind(picked, part) for part in reader.parts]
        moved = [part or Chain((Select(tuple(picked)), old)) for part, old in zip(parts, reader.parts, strict=True)]
        return dataclasses.replace(reader, parts=tuple(moved))
    return None


def _imputed(imputer: Replace, encoder: OneHot | Codes) -> OneHot | Codes | None:
    """Let the encoder know the missing value, as that which is put in its place."""
    keys, places = [], []
    table: Sequence[Any] = encoder.places if isinstance(encoder, OneHot) else encoder.numbers
    for column, known, row in zip(encoder.columns, encoder.keys, table, strict=True):
        value = imputer.values[column]
        found = [index for index, key in enumerate(known) if key == value and type(key) is type(value)]
        if not found:
            return None
        old = [index for index, key in enumerate(known) if not _same(key, imputer.missing)]
        keys.append((*(known[index] for index in old), imputer.missing))
        places.append(row[[*old, found[0]]])
    columns = tuple(imputer.columns[column] for column in encoder.columns)
    if isinstance(encoder, OneHot):
        return dataclasses.replace(encoder, columns=columns, keys=tuple(keys), places=tuple(places))
    return dataclasses.replace(encoder, columns=columns, keys=tuple(keys), numbers=tuple(places))


def _same(one: Key, other: Key) -> bool:
    return one == other or (one != one and other != other)


def by_columns(operation: Op | None) -> Op | None:
    """Let what is read first be laid out by columns, as pandas does it, if that is a matrix of numbers.

    A product of matrices rounds its last digit by their layout.
    """
    if isinstance(operation, Numbers):
        return dataclasses.replace(operation, by_columns=True)
    if isinstance(operation, Chain) and isinstance(operation.steps[0], Numbers):
        return Chain((dataclasses.replace(operation.steps[0], by_columns=True), *operation.steps[1:]))
    return operation


def numbers(flow: Flow) -> tuple[Op | None, Flow]:
    """Return what makes a matrix of float64 of a table, and what is known of it. Raises `NotCompilable`."""
    if flow.kind == "sparse":
        return dense(flow)
    if flow.kind == "matrix":
        _refuse_few_digits(flow)
        return None, flow
    if flow.kind != "table":
        raise NotCompilable(f"its {flow.kind} would have to be numbers")
    if flow.dtypes is not None:
        kinds = set(flow.dtypes)
        strange = next((dtype for dtype in flow.dtypes if dtype not in _NUMBERS | {"object"}), None)
        if strange is not None:
            raise NotCompilable(f"a column of {strange} would have to be numbers")
        if "object" not in kinds and "bool" not in kinds and np.result_type(*kinds) in (np.float32, np.float16):
            raise NotCompilable("its numbers are float32, and scikit-learn would compute with as few digits")
    made = dataclasses.replace(flow, kind="matrix", dtype="float64", dtypes=None)
    return Numbers(tuple(range(flow.width)), ()), made


def _refuse_few_digits(flow: Flow) -> None:
    if flow.kind in ("matrix", "sparse") and flow.dtype in ("float32", "float16"):
        raise NotCompilable(f"its numbers are {flow.dtype}, and scikit-learn would compute with as few digits")


def dense(flow: Flow) -> tuple[Op | None, Flow]:
    """Return what writes out rows that are mostly zero, if they are. Raises `NotCompilable` where they are too wide."""
    if flow.kind != "sparse":
        return None, flow
    if flow.width > MAX_DENSE_WIDTH:
        raise NotCompilable(f"{flow.width:,} columns would have to be written out for each row")
    return Dense(), dataclasses.replace(flow, kind="matrix")


def finite(flow: Flow, *, allow_nan: bool = False) -> tuple[Op | None, Flow]:
    """Return the check that scikit-learn makes, unless it cannot fail."""
    known = dataclasses.replace(flow, bounded=True, whole=flow.whole or not allow_nan)
    if flow.bounded and (allow_nan or flow.whole):
        return None, known
    return Finite(allow_nan), known


def checked(flow: Flow, *, allow_nan: bool = False, sparse: bool = False) -> tuple[list[Op | None], Flow]:
    """Return what makes a matrix of numbers and checks it, as most estimators of scikit-learn begin."""
    _refuse_few_digits(flow)
    first, flow = (None, flow) if sparse and flow.kind == "sparse" else numbers(flow)
    second, flow = finite(flow, allow_nan=allow_nan)
    return [first, second], flow


def matrix(flow: Flow, width: int, **traits: Any) -> Flow:
    """Return what is known of a matrix of `width` columns that was computed from `flow`."""
    return Flow("sparse" if flow.kind == "sparse" else "matrix", width, **traits)


@transforms("sklearn.pipeline.Pipeline")
def _pipeline(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    operation, flow = pipeline_steps([step for _, step in estimator.steps], flow)
    return operation or Chain(()), flow


def pipeline_steps(steps: Sequence[Any], flow: Flow) -> tuple[Op | None, Flow]:
    """Translate transformers one after the other, those that pass through left out."""
    operations: list[Op | None] = []
    for step in steps:
        if step is None or (isinstance(step, str) and step == "passthrough"):
            continue
        operation, flow = transformer(step, flow)
        operations.append(operation)
    return chain(*operations), flow


@predicts("sklearn.pipeline.Pipeline")
def _pipeline_head(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    *steps, last = [step for _, step in estimator.steps]
    body, flow = pipeline_steps(steps, flow)
    return {method: then([body], head) for method, head in translate_predictor(last, flow).items()}


@transforms("sklearn.compose._column_transformer.ColumnTransformer")
def _columns(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if flow.kind not in ("table", "matrix"):
        raise NotCompilable(f"its ColumnTransformer would pick columns of {flow.kind}")
    branches: list[tuple[Op | None, Flow]] = []
    for name, fitted, where in estimator.transformers_:
        if isinstance(fitted, str) and fitted == "drop":
            continue
        positions, is_single = _positions(estimator, name, where, flow)
        if not positions:
            continue
        picked = _picked(flow, positions)
        if isinstance(fitted, str) or _passes_through(fitted):
            operation, made = numbers(picked)
            made = dataclasses.replace(made, dtype=picked.dtype)
        elif is_single:
            operation, made = transformer(fitted, Flow("texts", 1))
            operation = chain(Column(0), operation)
        else:
            operation, made = transformer(fitted, picked)
        branches.append((chain(Select(positions), operation), made))
    return beside(branches)


def _passes_through(fitted: Any) -> bool:
    return type(fitted).__name__ == "FunctionTransformer" and fitted.func is None and not fitted.validate


def _positions(estimator: Any, name: str, where: Any, flow: Flow) -> tuple[tuple[int, ...], bool]:
    """Return which columns of `flow` a branch is given, and whether as a single one of shape (rows,)."""
    is_single = isinstance(where, (str, int, np.integer)) and not isinstance(where, bool)
    fitted_on = getattr(estimator, "feature_names_in_", None)
    found = [int(position) for position in estimator._transformer_to_input_indices[name]]
    if fitted_on is not None and flow.names is not None:
        places = {given: place for place, given in reversed(list(enumerate(flow.names)))}
        names = [str(fitted_on[position]) for position in found]
        missing = next((given for given in names if given not in places), None)
        if missing is not None:
            raise NotCompilable(f"its column {missing!r:.100} is none of those that come in")
        found = [places[given] for given in names]
    if any(position >= flow.width for position in found):
        raise NotCompilable("it was fitted on more columns than come in")
    return tuple(found), is_single


def _picked(flow: Flow, positions: tuple[int, ...]) -> Flow:
    def of(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if values is None else tuple(values[position] for position in positions)

    return dataclasses.replace(flow, width=len(positions), names=of(flow.names), dtypes=of(flow.dtypes))


def beside(branches: Sequence[tuple[Op | None, Flow]]) -> tuple[Op, Flow]:
    """Return what computes several branches of one value and puts their columns beside each other."""
    if not branches:
        raise NotCompilable("nothing is left of its columns")
    flows = [flow for _, flow in branches]
    if any(flow.kind not in ("matrix", "sparse") for flow in flows):
        raise NotCompilable("it would put columns beside each other that are not numbers")
    if any(flow.dtype in ("float32", "float16") and flow.kind == "matrix" for flow in flows):
        dtypes = {flow.dtype for flow in flows}
        if dtypes <= {"float32", "float16"}:
            raise NotCompilable("its numbers are float32, and scikit-learn would compute with as few digits")
    widths = tuple(flow.width for flow in flows)
    traits: dict[str, Any] = {
        "dtype": str(np.result_type(*(flow.dtype for flow in flows))),
        "whole": all(flow.whole for flow in flows),
        "bounded": all(flow.bounded for flow in flows),
    }
    parts = tuple(operation or Chain(()) for operation, _ in branches)
    if any(flow.kind == "sparse" for flow in flows):
        if len(parts) == 1:
            return parts[0], flows[0]
        return Stack(parts, widths), Flow("sparse", sum(widths), **traits)
    if len(parts) == 1:
        return parts[0], dataclasses.replace(flows[0], names=None)
    if sum(widths) > steps.MAX_DENSE_WIDTH:
        raise NotCompilable(f"it would make {sum(widths):,} columns of each row")
    return Assemble(parts, widths), Flow("matrix", sum(widths), **traits)


@transforms("sklearn.pipeline.FeatureUnion")
def _union(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    weights = estimator.transformer_weights or {}
    branches: list[tuple[Op | None, Flow]] = []
    for name, fitted in estimator.transformer_list:
        if isinstance(fitted, str) and fitted == "drop":
            continue
        if isinstance(fitted, str) or _passes_through(fitted):
            operation, made = numbers(flow)
        else:
            operation, made = transformer(fitted, flow)
        if (weight := weights.get(name)) is not None:
            operation = chain(operation, Arithmetic("multiply", np.array(float(weight))))
            made = dataclasses.replace(made, bounded=False)
        if made.width:
            branches.append((operation, made))
    return beside(branches)


@predicts(
    "sklearn.model_selection._search.GridSearchCV",
    "sklearn.model_selection._search.RandomizedSearchCV",
    "sklearn.model_selection._search_successive_halving.HalvingGridSearchCV",
    "sklearn.model_selection._search_successive_halving.HalvingRandomSearchCV",
)
def _search(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    return translate_predictor(_best(estimator), flow)


@transforms(
    "sklearn.model_selection._search.GridSearchCV",
    "sklearn.model_selection._search.RandomizedSearchCV",
    "sklearn.model_selection._search_successive_halving.HalvingGridSearchCV",
    "sklearn.model_selection._search_successive_halving.HalvingRandomSearchCV",
)
def _search_transforms(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    return transformer(_best(estimator), flow)


def _best(search: Any) -> Any:
    if getattr(search, "best_estimator_", None) is None:
        raise NotCompilable(f"its {type(search).__name__} was not fitted again with the best parameters")
    return search.best_estimator_


@predicts("sklearn.frozen._frozen.FrozenEstimator")
def _frozen(estimator: Any, flow: Flow) -> Mapping[str, Op]:
    return translate_predictor(estimator.estimator, flow)


@transforms("sklearn.frozen._frozen.FrozenEstimator")
def _frozen_transforms(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    return transformer(estimator.estimator, flow)
