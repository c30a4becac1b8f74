"""What is served equals what scikit-learn itself says: for every family, for generated rows, batched and alone."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import random
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import inspection, loaders, publishing
from app.errors import InvalidInput
from app.manifest import Manifest
from app.model import Model, part_of, wire
from app.names import ModelRef
from app.signature import Rows
from tests.generated import generated
from tests.trusted import TRUST
from tests.zoo import BUILDERS, NEEDS_EXAMPLES, OF_ITEMS, Fitted, fitted

pytestmark = pytest.mark.usefixtures("one_thread")
REF = ModelRef("zoo", "1")
KINDS = [
    pytest.param(name, published, id=f"{name}, {'published' if published else 'bare'}")
    for name in BUILDERS
    for published in (False, True)
    if published or name not in NEEDS_EXAMPLES
]


@functools.cache
def served(name: str, published: bool) -> Model:
    """The model as the service has it: through its file, and through its manifest where it has one."""
    it = fitted(name)
    part = publishing.part_from_object("model", it.estimator)
    value = loaders.load(part.format, io.BytesIO(part.body), "zoo", trusted=TRUST.types).value
    if not published:
        return Model(REF, inspection.infer([], value), value)
    draft = publishing.draft({"model": part}, it.data[:40], trust=TRUST)
    manifest = Manifest.decode(draft.manifest(REF, "2026-01-01T00:00:00+00:00").encode(), REF)
    model = Model(REF, manifest.signature, value, golden=manifest.golden)
    assert model.check() is not None
    return model


def values(column: pd.Series, it: Fitted) -> st.SearchStrategy[Any]:
    """Values of a column as JSON has them, like those of training and beyond them."""
    kind, seen = column.dtype.kind, column.dropna().tolist()
    if kind == "b":
        found: st.SearchStrategy[Any] = st.booleans()
    elif kind == "M":
        found = st.datetimes(
            pd.Timestamp("1700-01-01").to_pydatetime(), pd.Timestamp("2200-01-01").to_pydatetime()
        ).map(lambda moment: moment.isoformat())
    elif kind == "i":
        found = st.integers(0, 8 if max(seen) < 9 else 200)
    elif kind == "f":
        low = 0 if min(seen) >= 0 else -1e6
        found = st.sampled_from(seen) | st.floats(low, 1e6, width=32) | st.integers(int(low), 1000)
    elif all(isinstance(value, str) for value in seen):
        found = st.sampled_from(seen) | (st.text(max_size=4) if it.unknown else st.nothing())
    else:
        found = st.sampled_from(seen)
    takes_missing = it.missing or (column.isna().any() and column.name in ("income", "plan"))
    return found | st.none() if takes_missing and kind not in "bi" else found


def rows(it: Fitted) -> st.SearchStrategy[list[Any]]:
    if isinstance(it.data, list):
        if isinstance(it.data[0], str):
            return st.lists(st.sampled_from(it.data) | st.text(), min_size=1, max_size=5)
        record = st.fixed_dictionaries(
            {},
            optional={
                "city": st.text(max_size=3),
                "temperature": st.floats(-9, 9) | st.integers(-9, 9),
                "tags": st.lists(st.sampled_from(["x", "y", "z"]), unique=True),
                "sure": st.booleans(),
            },
        )
        return st.lists(st.sampled_from(it.data) | record, min_size=1, max_size=5)
    columns = [values(column, it) for _, column in table(it).items()]
    return st.lists(st.tuples(*columns).map(list), min_size=1, max_size=5)


def table(it: Fitted) -> pd.DataFrame:
    if isinstance(it.data, pd.DataFrame):
        return it.data
    frame = pd.DataFrame(it.data)
    return frame.infer_objects() if it.data.dtype == object else frame


def as_trained(it: Fitted, drawn: list[list[Any]]) -> Any:
    """The rows as their owner would build them beside the training data."""
    if isinstance(it.data, list):
        return drawn
    if isinstance(it.data, np.ndarray):
        blank = [[np.nan if value is None else value for value in row] for row in drawn]
        return np.array(blank, dtype=it.data.dtype)
    if set(it.data.dtypes) == {np.dtype(np.float64)}:
        # Another layout in memory, and the product of the same matrices differs in its last digit.
        return pd.DataFrame(np.array(drawn, dtype=np.float64), columns=it.data.columns)
    columns = {}
    for position, name in enumerate(it.data.columns):
        dtype = it.data[name].dtype
        cells = [row[position] for row in drawn]
        if dtype == "category":
            known = it.data[name].cat.categories.tolist()
            more = [cell for cell in dict.fromkeys(cells) if cell is not None and cell not in known]
            dtype = pd.CategoricalDtype([*known, *more], it.data[name].cat.ordered)
        if dtype == "object":  # what pandas wrote for a missing word before it had strings
            cells = [np.nan if cell is None else cell for cell in cells]
        columns[name] = pd.Series(cells, dtype=dtype)
    return pd.DataFrame(columns)


def as_sent(it: Fitted, model: Model, drawn: list[Any], as_objects: bool, seed: int) -> list[Any]:
    """The rows as a caller would send them: as objects in any order of keys, or as arrays in the signature's."""
    if isinstance(it.data, list):
        return drawn
    names = list(it.data.columns) if isinstance(it.data, pd.DataFrame) else [s.name for s in model.signature.inputs]
    wanted = [spec.name for spec in model.signature.inputs]
    sent: list[Any] = []
    for row in drawn:
        pairs = dict(zip(names, row, strict=True))
        if as_objects:
            shuffled = [*(pairs if seed % 2 else wanted)]  # with or without the columns that the model never reads
            random.Random(seed).shuffle(shuffled)
            sent.append({name: pairs[name] for name in shuffled})
        else:
            sent.append([pairs[name] for name in wanted])
    return sent


@functools.cache
def oracle(name: str) -> Any:
    """The fitted object itself, on one thread: several add up their trees in any order."""
    estimator = copy.deepcopy(fitted(name).estimator)
    return estimator.set_params(n_jobs=1) if "n_jobs" in estimator.get_params(deep=False) else estimator


def as_json(result: Any) -> list[Any]:
    """What the fitted object says, as JSON has it. Written apart from the code under test."""
    if isinstance(result, list) and all(isinstance(output, np.ndarray) for output in result):
        return [list(row) for row in zip(*map(as_json, result), strict=True)]
    if hasattr(result, "toarray"):
        result = result.toarray()

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [clean(value) for value in np.asarray(result).tolist()]


# Computed in 32 bits; or by a formula for distances whose differences cancel out.
COARSE = {"ridge, float32": 1e-5, "mini-batch k-means": 1e-3, "birch": 1e-6}


def assert_close(left: Any, right: Any, tolerance: float) -> None:
    """Equal to the tolerance; where a matrix is multiplied, the order of a sum depends on how many rows there are."""
    if isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_close(one, other, tolerance)
    elif isinstance(left, float) and isinstance(right, float):
        assert math.isclose(left, right, rel_tol=tolerance, abs_tol=tolerance)
    else:
        assert left == right


@pytest.mark.parametrize(("name", "published"), KINDS)
def test_the_served_answer_is_the_fitted_objects(name, published):
    it, model = fitted(name), served(name, published)

    @generated(3)
    @given(rows(it), st.booleans(), st.integers(0, 9))
    def check(drawn, as_objects, seed):
        sent = orjson.loads(orjson.dumps(as_sent(it, model, drawn, as_objects, seed)))
        validated = model.signature.validate(sent)
        with np.errstate(all="ignore"):
            for method in model.signature.methods:
                expected = as_json(getattr(oracle(name), method)(as_trained(it, drawn)))

                answer = orjson.loads(orjson.dumps(wire(model.predict(validated, method))))

                assert answer == expected, method

    check()


@pytest.mark.parametrize("name", BUILDERS)
def test_a_batch_gives_every_caller_what_it_would_get_alone(name):
    it, model = fitted(name), served(name, True)

    @generated(3)
    @given(st.lists(rows(it), min_size=2, max_size=3), st.integers(0, 9))
    def check(callers, seed):
        parts = [model.signature.validate(as_sent(it, model, drawn, bool(seed % 2), seed)) for drawn in callers]
        parts = [part for part in parts if part.kinds == parts[0].kinds]
        for method in model.signature.methods:
            together = model.predict(Rows.concatenate(parts), method)
            start = 0
            for part in parts:
                alone = model.predict(part, method)

                assert_close(wire(part_of(together, start, start + part.count)), wire(alone), COARSE.get(name, 1e-12))

                start += part.count

    check()


@pytest.mark.parametrize("name", BUILDERS)
def test_every_method_of_the_fitted_object_is_served(name):
    expected = [method for method in inspection.METHODS if hasattr(fitted(name).estimator, method)]

    assert list(served(name, True).signature.methods) == expected


@pytest.mark.parametrize("format", ["pickle", "skops"])
@pytest.mark.parametrize(
    "name",
    ["logistic", "forest", "mixed", "histogram boosting", "texts", "neighbours", "pca", "calibrated", "perceptron"],
)
def test_every_format_brings_the_same_answers(name, format):
    it, model = fitted(name), served(name, True)
    part = publishing.part_from_object("model", it.estimator, format)

    other = Model(
        REF,
        model.signature,
        loaders.load(format, io.BytesIO(part.body), "zoo", trusted=TRUST.types).value,
        golden=model.golden,
    )

    assert other.check() == 0.0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol):
    it = fitted("forest")
    body = pickle.dumps(it.estimator, protocol=protocol)

    value = loaders.load("pickle", io.BytesIO(body), "zoo", trusted=TRUST.types).value

    assert np.array_equal(value.predict(it.data), it.estimator.predict(it.data))


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in OF_ITEMS])
def test_null_is_refused_just_where_the_estimator_would(name):
    it, model = fitted(name), served(name, name in NEEDS_EXAMPLES)
    whole = inspection.instances_of(it.data[:1], model.signature)
    for position, spec in enumerate(model.signature.inputs):
        sent = [list(whole[0])]
        sent[0][position] = None
        try:
            model.predict(model.signature.validate(sent), model.signature.default_method)
            served_it = True
        except InvalidInput:
            served_it = False

        assert served_it == _takes_missing(it, oracle(name), position, spec.name), spec.name


def _takes_missing(it: Fitted, estimator: Any, position: int, name: str) -> bool:
    if isinstance(it.data, pd.DataFrame):
        row = it.data[:1].copy()
        kind = row[name].dtype.kind
        row[name] = pd.Series([None], dtype=np.float64 if kind == "i" else object if kind == "b" else row[name].dtype)
    else:
        row = it.data[:1].astype(np.float64 if it.data.dtype.kind in "ib" else it.data.dtype)
        row[0, position] = np.nan
    try:
        getattr(estimator, next(method for method in inspection.METHODS if hasattr(estimator, method)))(row)
    except (ValueError, TypeError, AttributeError):
        return False
    return True
