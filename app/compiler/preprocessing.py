"""Translations of scalers, imputers, encoders, selectors and projections."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from app.compiled.categories import Codes, Key, OneHot, Replace
from app.compiled.linear import Linear, Shift
from app.compiled.numeric import (
    Arithmetic,
    Binarize,
    Bins,
    Clip,
    Elementwise,
    Fill,
    Function,
    Missing,
    Normalize,
    Numbers,
    Polynomials,
    Power,
    Quantiles,
    is_function,
)
from app.compiled.op import Op
from app.compiled.steps import Assemble, Cast, Chain, Select
from app.compiler.pipeline import MAX_DENSE_WIDTH, chain, checked, matrix, numbers, then
from app.compiler.translation import Flow, NotCompilable, transforms
from app.signature import Array

MAX_WRITTEN_OUT = 10_000_000  # numbers of a matrix that is mostly zero


def floats(values: Any) -> Array:
    """Return an array of float64 of what fitting left. Raises `NotCompilable` where it is of fewer or other digits."""
    array = np.asarray(values)
    if array.dtype == object:
        array = np.asarray([key(value) for value in array.ravel().tolist()], dtype=np.float64).reshape(array.shape)
    if array.dtype.kind not in "iub" and array.dtype != np.float64:
        raise NotCompilable(f"it was fitted on {array.dtype}, and scikit-learn would compute with as few digits")
    return array.astype(np.float64)


def _elementwise(
    flow: Flow, steps: list[Elementwise], *, sparse: bool = False, allow_nan: bool = True, **traits: Any
) -> tuple[Op, Flow]:
    before, flow = checked(flow, allow_nan=allow_nan, sparse=sparse)
    made = matrix(flow, flow.width, **{"whole": flow.whole, **traits})
    return chain(*before, *steps) or Chain(()), made


@transforms("sklearn.preprocessing._data.StandardScaler")
def _standard(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if flow.kind == "sparse":
        if estimator.with_mean:
            raise NotCompilable("its StandardScaler cannot centre rows that are mostly zero")
        return _reciprocal(estimator, flow)
    steps: list[Elementwise] = []
    if estimator.with_mean:
        steps.append(Arithmetic("subtract", floats(estimator.mean_)))
    if estimator.with_std:
        steps.append(Arithmetic("divide", floats(estimator.scale_)))
    return _elementwise(flow, steps)


def _reciprocal(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    scale = getattr(estimator, "scale_", None)
    steps: list[Elementwise] = [] if scale is None else [Arithmetic("multiply", 1.0 / floats(scale))]
    return _elementwise(flow, steps, sparse=True)


@transforms("sklearn.preprocessing._data.MinMaxScaler")
def _min_max(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    steps: list[Elementwise] = [
        Arithmetic("multiply", floats(estimator.scale_)),
        Arithmetic("add", floats(estimator.min_)),
    ]
    if estimator.clip:
        steps.append(Clip(float(estimator.feature_range[0]), float(estimator.feature_range[1])))
    return _elementwise(flow, steps, bounded=bool(estimator.clip))


@transforms("sklearn.preprocessing._data.MaxAbsScaler")
def _max_abs(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    clips = getattr(estimator, "clip", False)
    if flow.kind == "sparse" and not clips:
        return _reciprocal(estimator, flow)
    steps: list[Elementwise] = [Arithmetic("divide", floats(estimator.scale_))]
    if clips:
        steps.append(Clip(-1.0, 1.0))
    return _elementwise(flow, steps, bounded=bool(clips))


@transforms("sklearn.preprocessing._data.RobustScaler")
def _robust(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if flow.kind == "sparse":
        if estimator.with_centering:
            raise NotCompilable("its RobustScaler cannot centre rows that are mostly zero")
        return _reciprocal(estimator, flow)
    steps: list[Elementwise] = []
    if estimator.with_centering:
        steps.append(Arithmetic("subtract", floats(estimator.center_)))
    if estimator.with_scaling:
        steps.append(Arithmetic("divide", floats(estimator.scale_)))
    return _elementwise(flow, steps)


@transforms("sklearn.preprocessing._data.Normalizer")
def _normalizer(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    return _elementwise(flow, [Normalize(estimator.norm)], sparse=True, allow_nan=False)


@transforms("sklearn.preprocessing._data.Binarizer")
def _binarizer(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    return _elementwise(flow, [Binarize(float(estimator.threshold))], allow_nan=False, bounded=True, whole=True)


@transforms("sklearn.preprocessing._data.PowerTransformer")
def _power(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    steps: list[Elementwise] = [Power(estimator.method, floats(estimator.lambdas_))]
    if estimator.standardize:
        scaler = estimator._scaler
        steps += [Arithmetic("subtract", floats(scaler.mean_)), Arithmetic("divide", floats(scaler.scale_))]
    return _elementwise(flow, steps, whole=False)


@transforms("sklearn.preprocessing._data.QuantileTransformer")
def _quantile(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if estimator.output_distribution != "uniform":
        raise NotCompilable("its QuantileTransformer makes a normal distribution, which has no compiled form")
    steps: list[Elementwise] = [Quantiles(floats(estimator.quantiles_), floats(estimator.references_))]
    return _elementwise(flow, steps, bounded=True)


@transforms("sklearn.preprocessing._discretization.KBinsDiscretizer")
def _bins(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if estimator.dtype not in (None, np.float64):
        raise NotCompilable("its KBinsDiscretizer computes in float32")
    bins = Bins(tuple(floats(edges)[1:-1] for edges in estimator.bin_edges_))
    operation, made = _elementwise(flow, [bins], allow_nan=False, bounded=True, whole=True)
    if estimator.encode == "ordinal":
        return operation, made
    encoded, made = one_hot(estimator._encoder, dataclasses.replace(made, dtype="float64"))
    return then([operation], encoded), dataclasses.replace(made, dtype="float64")


@transforms("sklearn.preprocessing._polynomial.PolynomialFeatures")
def _polynomials(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    before, flow = checked(flow)
    inputs, bias, highest = flow.width, bool(estimator.include_bias), int(estimator._max_degree)
    full = int(estimator._n_out_full)
    if full > MAX_DENSE_WIDTH or highest == 0:
        raise NotCompilable(f"its PolynomialFeatures gives {full:,} columns")
    current = int(bias) + inputs
    index = [*range(int(bias), current), current]
    blocks = []
    for _ in range(2, highest + 1):
        new, end = [], index[-1]
        for factor in range(inputs):
            start = index[factor]
            new.append(current)
            if estimator.interaction_only:
                start += index[factor + 1] - index[factor]
            after = current + end - start
            if after <= current:
                break
            blocks.append((start, end, factor, current))
            current = after
        new.append(current)
        index = new
    skip = 0
    if estimator._min_degree > 1:
        skip = full - int(estimator.n_output_features_) + int(bias)
    table = np.array(blocks, dtype=np.int64).reshape(-1, 4)
    operation = Polynomials(inputs, current, bias, skip, table)
    return then(before, operation), Flow("matrix", int(estimator.n_output_features_), whole=False)


@transforms("sklearn.impute._base.SimpleImputer")
def _imputer(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if estimator._fit_dtype.kind == "O":
        return _imputer_of_objects(estimator, flow)
    missing = _missing_number(estimator.missing_values)
    before, flow = checked(flow, allow_nan=missing is None)
    statistics = floats(estimator.statistics_)
    kept = tuple(range(flow.width))
    if not estimator.keep_empty_features:
        kept = tuple(int(column) for column in np.flatnonzero(~np.isnan(statistics)))
    fill = Fill(statistics[list(kept)], missing)
    whole = (flow.whole or missing is None) and bool(np.isfinite(fill.values).all())
    select = None if len(kept) == flow.width else Select(kept)
    filled = chain(select, Numbers(None, (fill,)))
    made = matrix(flow, len(kept), whole=whole, bounded=True)
    if not estimator.add_indicator:
        return then(before, filled or Chain(())), made
    indicator = estimator.indicator_
    told = Missing(tuple(int(column) for column in indicator.features_), missing)
    both = Assemble((filled or Chain(()), told), (len(kept), len(told.columns)))
    return then(before, both), dataclasses.replace(made, width=sum(both.widths))


def _missing_number(value: Any) -> float | None:
    if isinstance(value, (int, float, np.number)):
        return None if value != value else float(value)
    raise NotCompilable(f"it imputes {value!r:.40} among numbers")


def _imputer_of_objects(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if flow.kind not in ("table", "matrix") or estimator.add_indicator:
        raise NotCompilable("its SimpleImputer of words has an indicator beside them")
    statistics = [key(value) for value in estimator.statistics_]
    if any(value is None or value != value for value in statistics):
        raise NotCompilable("its SimpleImputer has a column without any value")
    replace = Replace(tuple(range(flow.width)), key(estimator.missing_values), tuple(statistics))
    dtypes = None if flow.dtypes is None else ("object",) * flow.width
    return replace, dataclasses.replace(flow, kind="table", dtypes=dtypes)


@transforms("sklearn.impute._base.MissingIndicator")
def _indicator(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    missing = _missing_number(estimator.missing_values)
    before, flow = checked(flow, allow_nan=missing is None)
    columns = tuple(int(column) for column in estimator.features_)
    refusing: tuple[int, ...] = ()
    if estimator.features == "missing-only" and estimator.error_on_new:
        refusing = tuple(sorted(set(range(flow.width)) - set(columns)))
    made = Flow("matrix", len(columns), dtype="bool", whole=True, bounded=True)
    return then(before, Missing(columns, missing, refusing)), made


def key(value: Any) -> Key:
    """Return a category as Python has it. Raises `NotCompilable` for one that JSON has no form for."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or type(value) in (str, int, float, bool):
        return value  # type: ignore[no-any-return]
    raise NotCompilable(f"a category is a {type(value).__name__}")


def _keys(categories: Any) -> tuple[Key, ...]:
    return tuple(key(value) for value in categories.tolist())


def _readable(flow: Flow, width: int, name: str) -> Op | None:
    """Return what makes categories readable. Raises `NotCompilable` where pandas' own dtypes would change them."""
    if flow.kind == "sparse":
        raise NotCompilable(f"its {name} would encode rows that are mostly zero")
    if flow.kind not in ("table", "matrix"):
        raise NotCompilable(f"its {name} would encode {flow.kind}")
    if flow.width != width:
        raise NotCompilable(f"its {name} was fitted on {width} columns, and {flow.width} come in")
    for dtype in flow.dtypes or ():
        if dtype not in _NUMBERS_AND_WORDS:
            raise NotCompilable(f"a column of {dtype} would have to be encoded")
    return None


_NUMBERS_AND_WORDS = {
    "object", "str", "category", "bool", "float64", "float32", "float16",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
}  # fmt: skip


@transforms("sklearn.preprocessing._encoders.OneHotEncoder")
def one_hot(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    """Translate a fitted `OneHotEncoder`."""
    categories = estimator.categories_
    _readable(flow, len(categories), "OneHotEncoder")
    groups, others = _groups(estimator)
    dropped = estimator._drop_idx_after_grouping
    places, elsewhere, start = [], [], 0
    for index, group in enumerate(groups):
        place = group.copy()
        other = others[index]
        if dropped is not None and dropped[index] is not None:
            drop = int(dropped[index])
            place = np.where(group == drop, -1, group - (group > drop))
            other = -1 if other in (-1, drop) else other - (other > drop)
        places.append(np.where(place < 0, -1, place + start))
        elsewhere.append(-1 if other < 0 else other + start)
        start += int(estimator._n_features_outs[index])
    operation = OneHot(
        tuple(range(flow.width)),
        start,
        tuple(map(_keys, categories)),
        tuple(place.astype(np.int64) for place in places),
        None if estimator.handle_unknown == "error" else tuple(elsewhere),
        sparse=start > MAX_DENSE_WIDTH,
    )
    made = Flow(
        "sparse" if operation.sparse else "matrix", start, np.dtype(estimator.dtype).name, whole=True, bounded=True
    )
    return _of_dtype(operation, made)


def _groups(encoder: Any) -> tuple[list[Array], list[int]]:
    """Return for each column where its categories go once the rare ones are one, and where unknown values go; -1: nowhere."""
    groups, others = [], []
    for index, categories in enumerate(encoder.categories_):
        mapping = rare = None
        if encoder._infrequent_enabled:
            mapping, rare = encoder._default_to_infrequent_mappings[index], encoder._infrequent_indices[index]
        group = np.arange(len(categories))
        if mapping is not None:
            group[: len(mapping)] = (
                mapping  # an ordinal encoder keeps its missing value, the last one, out of the count
            )
        groups.append(group)
        known = encoder.handle_unknown in ("infrequent_if_exist", "warn") and rare is not None and mapping is not None
        others.append(int(mapping[rare[0]]) if known and mapping is not None and rare is not None else -1)
    return groups, others


@transforms("sklearn.preprocessing._encoders.OrdinalEncoder")
def _ordinal(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    categories = estimator.categories_
    _readable(flow, len(categories), "OrdinalEncoder")
    groups, _ = _groups(estimator)
    codes = []
    for index, group in enumerate(groups):
        numbers_of = group.astype(np.float64)
        if index in estimator._missing_indices:
            numbers_of[estimator._missing_indices[index]] = estimator.encoded_missing_value
        codes.append(numbers_of[:, None])
    takes_unknown = estimator.handle_unknown == "use_encoded_value"
    other = np.array([float(estimator.unknown_value)]) if takes_unknown else None
    whole = not any(np.isnan(code).any() for code in codes) and (other is None or not np.isnan(other).any())
    operation = Codes(
        tuple(range(flow.width)),
        tuple(map(_keys, categories)),
        tuple(codes),
        None if other is None else (other,) * flow.width,
    )
    dtype = np.dtype(estimator.dtype).name
    return _of_dtype(operation, Flow("matrix", flow.width, dtype, whole=whole, bounded=True))


def _of_dtype(operation: Op, made: Flow) -> tuple[Op, Flow]:
    if made.dtype == "float16":
        raise NotCompilable("it encodes as float16, and scikit-learn would compute with as few digits")
    return (Chain((operation, Cast("float32"))) if made.dtype == "float32" else operation), made


@transforms("sklearn.preprocessing._target_encoder.TargetEncoder")
def _target(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    categories = estimator.categories_
    _readable(flow, len(categories), "TargetEncoder")
    each = len(estimator.classes_) if estimator.target_type_ == "multiclass" else 1
    encodings = [floats(encoding) for encoding in estimator.encodings_]
    means = np.atleast_1d(floats(estimator.target_mean_))
    tables = [np.stack(encodings[start : start + each], axis=1) for start in range(0, len(encodings), each)]
    keys = tuple(map(_keys, categories))
    operation = Codes(tuple(range(flow.width)), keys, tuple(tables), (means,) * flow.width)
    return operation, Flow("matrix", flow.width * each, whole=True, bounded=True)


def ufunc_name(function: Any) -> str | None:
    """Return the name of one of numpy's functions that `Function` knows, None for any other."""
    name = getattr(function, "__name__", None)
    is_numpys = isinstance(function, np.ufunc) and isinstance(name, str) and getattr(np, name, None) is function
    return name if is_numpys and is_function(str(name)) else None


@transforms("sklearn.preprocessing._function_transformer.FunctionTransformer")
def _function(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    function = estimator.func
    before: list[Op | None] = []
    if estimator.validate:
        before, flow = checked(flow)
    if function is None:
        return chain(*before) or Chain(()), flow
    name = ufunc_name(function)
    if name is None or estimator.kw_args:
        raise NotCompilable("its FunctionTransformer has a function that only Python can compute")
    if flow.dtypes is not None and not set(flow.dtypes) <= {"float64"}:
        raise NotCompilable("its FunctionTransformer computes with whole numbers")
    if flow.kind == "sparse" or flow.dtype != "float64":
        raise NotCompilable("its FunctionTransformer computes with whole numbers, or with rows that are mostly zero")
    first, flow = numbers(flow)
    return then([*before, first], Function(name)), dataclasses.replace(flow, whole=False, bounded=False)


@transforms("sklearn.decomposition._pca.PCA", "sklearn.decomposition._incremental_pca.IncrementalPCA")
def _pca(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    before, flow = checked(flow, sparse=False)
    components = floats(estimator.components_)
    offset = floats(estimator.mean_).reshape(1, -1) @ components.T
    divisor = None
    if estimator.whiten:
        divisor = np.sqrt(floats(estimator.explained_variance_))
        divisor[divisor < np.finfo(np.float64).eps] = np.finfo(np.float64).eps
    made = Flow("matrix", len(components))
    return then([*before, Linear(components, None)], Shift(offset, divisor)), made


@transforms("sklearn.decomposition._truncated_svd.TruncatedSVD")
def _svd(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    before, flow = checked(flow, sparse=True)
    components = floats(estimator.components_)
    return then(before, Linear(components, None)), Flow("matrix", len(components))


@transforms("sklearn.random_projection.GaussianRandomProjection", "sklearn.random_projection.SparseRandomProjection")
def _projection(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    before, flow = checked(flow, sparse=True)
    components = estimator.components_
    if hasattr(components, "toarray"):
        if components.shape[0] * components.shape[1] > MAX_WRITTEN_OUT:
            raise NotCompilable("its SparseRandomProjection is too large to write out")
        components = components.toarray()
    matrix_of = floats(components)
    return then(before, Linear(matrix_of, None)), Flow("matrix", len(matrix_of))


@transforms("sklearn.decomposition._fastica.FastICA")
def _ica(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    before, flow = checked(flow)
    components = floats(estimator.components_)
    if estimator.whiten:
        before.append(Shift(floats(estimator.mean_), None))
    return then(before, Linear(components, None)), Flow("matrix", len(components))


@transforms(
    *(
        f"sklearn.feature_selection.{name}"
        for name in (
            "_variance_threshold.VarianceThreshold",
            "_univariate_selection.SelectKBest",
            "_univariate_selection.SelectPercentile",
            "_univariate_selection.SelectFpr",
            "_univariate_selection.SelectFdr",
            "_univariate_selection.SelectFwe",
            "_univariate_selection.GenericUnivariateSelect",
            "_from_model.SelectFromModel",
            "_rfe.RFE",
            "_rfe.RFECV",
            "_sequential.SequentialFeatureSelector",
        )
    )
)
def _selector(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    kept = tuple(int(column) for column in np.flatnonzero(estimator.get_support()))
    if not kept:
        raise NotCompilable(f"its {type(estimator).__name__} leaves no column")
    from sklearn.utils import get_tags

    before, flow = checked(flow, sparse=True, allow_nan=bool(get_tags(estimator).input_tags.allow_nan))
    made = dataclasses.replace(flow, width=len(kept), names=None)
    return then(before, Select(kept)), made
