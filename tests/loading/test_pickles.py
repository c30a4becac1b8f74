"""What is read answers as the estimator that joblib, pickle or skops itself would have read."""

from __future__ import annotations

import io
import pickle
import warnings
from collections import Counter
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import all_estimators

from app import loaders
from app.errors import LoadFailed
from app.model import use_one_thread
from tests.loading import families
from tests.loading.forms import FORMS, answers, dumped, same
from tests.zoo import BUILDERS, fitted

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = frozenset({"tests.zoo.calendar", "tests.zoo.lowered", "tests.zoo.squared"})
NOT_BY_SKOPS = {"Birch", "clusters, a tree of them", "search, drawn from several", "birch"}


def ours(form: str, body: bytes, trusted: frozenset[str] = OWN) -> Any:
    return loaders.load(FORMS[form][0], io.BytesIO(body), "zoo", trusted=trusted).value


def theirs(form: str, body: bytes) -> Any:
    if FORMS[form][0] == "skops":
        return skops.io.loads(body, trusted=skops.io.get_untrusted_types(data=body))
    return joblib.load(io.BytesIO(body))


def compare(form: str, estimator: Any, data: Any) -> None:
    """Hold what we read against what is read by whoever wrote it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are deprecated
        body = FORMS[form][1](estimator)
        expected, found = theirs(form, body), ours(form, body)
        for estimator in (expected, found):
            use_one_thread(estimator)

    assert type(found) is type(expected)
    assert same(answers(expected, data), answers(found, data))


def in_turn(names: Any) -> list[tuple[str, str]]:
    """Give each name one of the forms, one after the other: all of them with all of them take a minute."""
    forms = list(FORMS)
    return [
        (name, "joblib" if forms[index % len(forms)] == "skops" and name in NOT_BY_SKOPS else forms[index % len(forms)])
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize(("name", "form"), in_turn(families.BUILDERS))
def test_every_estimator_answers_as_joblib_would_have_read_it(name, form):
    compare(form, *families.fitted(name))


@pytest.mark.parametrize(("name", "form"), in_turn(BUILDERS))
def test_models_as_people_make_them_answer_as_joblib_would_have_read_them(name, form):
    compare(form, fitted(name).estimator, fitted(name).data)


def test_no_estimator_of_scikit_learn_is_passed_over():
    missing = {name for name, _ in all_estimators()} - families.BUILDERS.keys()

    assert missing == families.PASSED_OVER


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form):
    compare(form, fitted("mixed").estimator, fitted("mixed").data)


VALUES = [
    *(None, True, 0, -1, 2**70, 1.5, float("inf"), "größe\n", b"\x00"),
    *(
        [],
        [1, [2]],
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        {"a": {"b": 1}},
        {1, 2},
        frozenset({"x"}),
        slice(1, None),
    ),
    range(1, 9, 2),
    *(np.float32(1.5), np.int8(3), np.str_("x"), np.bool_(True), np.datetime64("2020-01-01"), np.timedelta64(3, "s")),
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(12.0).reshape(3, 4)[:, ::2],
    np.array(3.0),
    np.zeros((0, 3)),
    np.array(["a", "größe"]),
    np.array([b"a", b"bc"]),
    np.array(["a", None, 1.5], dtype=object),
    np.array([[{"a": 1}], [np.zeros(2)]], dtype=object),
    np.zeros(3, dtype=[("a", "<i8"), ("b", "<f4")]),
    np.zeros(3, dtype=np.dtype([("a", "u1"), ("b", "<f8")], align=True)),
    np.array(["2020-01-01", "NaT"], dtype="datetime64[ns]"),
    np.arange(3).astype(">i4"),
    np.ma.MaskedArray([1.0, 2.0, 3.0], [True, False, False]),
    np.dtype("<U7"),
    np.dtype("datetime64[25s]"),
    [np.float64, np.int32, float, int],
]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "skops"])
def test_a_value_is_what_it_was(form):
    for value in VALUES:
        body = FORMS[form][1](value)
        found, expected = ours(form, body), theirs(form, body)

        assert type(found) is type(value)
        assert repr(found) == repr(expected)
        if isinstance(value, np.ndarray):
            assert found.dtype == expected.dtype
            assert (found.flags.f_contiguous, found.flags.writeable) == (expected.flags.f_contiguous, True)


@pytest.mark.parametrize("form", FORMS)
def test_an_array_that_is_in_two_places_is_one_where_the_format_knows(form):
    shared = np.arange(2000.0)
    held = make_pipeline(Ridge(), Ridge())
    held.steps[0][1].coef_ = held.steps[1][1].coef_ = shared

    body = FORMS[form][1](held)
    expected, found = theirs(form, body).steps, ours(form, body).steps

    assert (found[0][1].coef_ is found[1][1].coef_) == (expected[0][1].coef_ is expected[1][1].coef_)
    assert np.array_equal(found[0][1].coef_, shared)
    assert np.array_equal(found[1][1].coef_, shared)


def test_arrays_of_a_pickle_can_be_written_to():
    for protocol in range(6):
        found = ours("pickle 5", pickle.dumps(np.zeros(3), protocol))
        found += 1

        assert found.tolist() == [1, 1, 1]


def test_a_frame_is_refused_by_the_names_of_what_it_consists_of():
    with pytest.raises(LoadFailed, match=r"uses pandas\."):
        ours("joblib", dumped(pd.DataFrame({"a": [1]})))


class Doubling:
    """Somebody's own, with a constructor, a state, and items."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, restored=True)

    def transform(self, rows: Any) -> Any:
        return np.asarray(rows) * self.factor


class Registry(dict):  # type: ignore[type-arg]
    pass


class Steps(list):  # type: ignore[type-arg]
    pass


class Names(set):  # type: ignore[type-arg]
    pass


class Reduced:
    def __init__(self, factor: float, *, unit: str = "") -> None:
        self.factor, self.unit = factor, unit

    def __reduce__(self) -> Any:
        return Reduced, (self.factor,), {"unit": self.unit}


class WithOptions:
    def __new__(cls, *, unit: str) -> Any:
        made = super().__new__(cls)
        made.unit = unit
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"unit": self.unit}


MINE = frozenset(f"{__name__}.{kind.__name__}" for kind in (Doubling, Registry, Steps, Names, Reduced, WithOptions))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_the_operator_trusts_is_read_as_pickle_reads_it(protocol):
    names = Names({"a"})
    names.more = 1  # type: ignore[attr-defined]
    held = [Doubling(2.0), Registry(a=Doubling(3.0)), Steps([1, 2]), names, Reduced(1.5, unit="m")]
    if protocol >= 4:
        held.append(WithOptions(unit="kg"))

    found = loaders.load("pickle", io.BytesIO(pickle.dumps(held, protocol)), "zoo", trusted=MINE).value

    assert [type(item) for item in found] == [type(item) for item in held]
    assert found[0].restored
    assert found[0].transform([1.0]).tolist() == [2.0]
    assert found[1]["a"].factor == 3.0
    assert found[2] == [1, 2]
    assert found[3] == {"a"}
    assert found[3].more == 1
    assert (found[4].factor, found[4].unit) == (1.5, "m")
    assert [item.unit for item in found[5:]] == ["kg"] * (protocol >= 4)


def test_a_function_that_the_operator_trusts_is_held_and_not_called():
    made = make_pipeline(FunctionTransformer(counted), Ridge())

    found = loaders.load("joblib", io.BytesIO(dumped(made)), "zoo", trusted=frozenset({f"{__name__}.counted"})).value

    assert found.steps[0][1].func is counted
    assert Counter() == CALLED


CALLED: Counter[str] = Counter()


def counted(rows: Any) -> Any:
    CALLED["counted"] += 1
    return rows


def test_progress_messages_and_threads_of_the_machine_that_it_was_fitted_on_are_left_behind():
    forest = families.fitted("RandomForestClassifier")[0].set_params(verbose=3)

    found = ours("joblib", dumped(forest))

    assert not found.verbose
