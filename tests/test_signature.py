"""The one door: what is let in, what is not, and what a caller is told."""

from __future__ import annotations

import contextlib
import difflib
import gc
import json
import math
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import timedelta, timezone
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from app.errors import InvalidInput, InvalidManifest, RequestError, RequestTooLarge
from app.manifest import Manifest
from app.marks import MAX_MARKS
from app.names import ModelRef
from app.signature import MAX_COLUMNS, MAX_COMPARED, MAX_VIOLATIONS, Rows, Signature, TensorSpec, is_dtype


def column(name: str, datatype: Any = "FP64", dtype: str = "float64", **more: Any) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, dtype=dtype, **more)


def signature(*inputs: TensorSpec, layout: Any = "frame", **more: Any) -> Signature:
    return Signature(layout=layout, inputs=inputs, methods=("predict",), **more)


NUMERIC = signature(column("age", nullable=False), column("income"))
FLOAT32 = signature(column("a", dtype="float32"), column("b", dtype="float32"), layout="matrix")
MIXED = signature(
    column("age", "INT64", "int8"),
    column("income"),
    column("plan", "BYTES", "str"),
    column("active", "BOOL", "bool", nullable=False),
    column("since", "BYTES", "datetime64[us]"),
    column("größe (m)", assumed=True),
)
ANY_WIDTH = signature(layout="matrix")
TEXT = signature(column("text", "BYTES", "object", nullable=False), layout="text")
RECORDS = signature(column("records", "BYTES", "object", nullable=False), layout="records")
ANYTHING = signature(column("a", dtype="object", assumed=True), column("b"))
UNTOLD = "nothing tells this model's columns: publish it with --examples to send objects"
GOOD = {"age": 41, "income": 2.5, "plan": "pro", "active": True, "since": "2024-02-29T12:00:00", "größe (m)": 1.8}


ALL = [NUMERIC, FLOAT32, MIXED, ANY_WIDTH, ANYTHING, TEXT, RECORDS]


def violations(sign: Signature, instances: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(InvalidInput) as caught:
        sign.validate(instances)
    assert caught.value.violations[0].path in str(caught.value)
    return [(it.path, it.expected, it.got) for it in caught.value.violations]


def test_no_more_columns_are_taken_where_nothing_tells_how_many_than_a_model_can_have():
    widest = [[0] * (MAX_COLUMNS - 1) + ["a"]]
    wider = ("instances[0]", "at most 30,000 values", "400,001 values")

    assert len(ANY_WIDTH.validate(widest).columns) == MAX_COLUMNS
    assert ANY_WIDTH.validate([[0.5] * MAX_COLUMNS]).array().shape == (1, MAX_COLUMNS)
    for last in ("a", 1, None, True):
        assert violations(ANY_WIDTH, [[0] * 400_000 + [last]]) == [wider]


def test_what_is_too_wide_is_refused_before_anything_is_made_of_it():
    instances = [[0] * 400_000 + ["a"]]
    violations(ANY_WIDTH, instances)  # what is made once

    tracemalloc.start()
    try:
        violations(ANY_WIDTH, instances)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_objects_are_refused_where_nothing_tells_the_columns_whatever_they_are_behind():
    assert violations(ANY_WIDTH, [{"x0": 1.0}]) == [("instances[0]", f"a list of values ({UNTOLD})", '{"x0": 1.0}')]
    assert violations(ANY_WIDTH, [[1.0, "a"], {"x0": 1.0, "x1": 2.0}]) == [
        ("instances[1]", "a list of 2 values", '{"x0": 1.0, "x1": 2.0}')
    ]


def test_rows_come_as_objects_in_any_order_or_as_arrays():
    backwards = dict(reversed(GOOD.items()))
    frames = [MIXED.validate([row]).frame() for row in (GOOD, backwards, [*GOOD.values()])]

    assert frames[0].iloc[0].to_dict() == {**GOOD, "since": pd.Timestamp(GOOD["since"])}
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])


def test_numbers_become_one_array_without_a_loop_over_columns():
    rows = NUMERIC.validate([{"income": 3, "age": 2}, {"age": 1.5, "income": None}])

    assert rows.matrix is not None
    assert np.array_equal(rows.matrix, [[2.0, 3.0], [1.5, math.nan]], equal_nan=True)


def test_a_frame_has_the_dtypes_of_training():
    dtypes = {
        "object": "BYTES", "str": "BYTES", "string": "BYTES", "bool": "BOOL", "boolean": "BOOL", "int8": "INT64",
        "Int64": "INT64", "UInt8": "INT64", "int64[pyarrow]": "INT64", "Float32": "FP64", "float16": "FP64",
        "double[pyarrow]": "FP64", "datetime64[s]": "BYTES", "datetime64[ns]": "BYTES",
        "datetime64[us, Europe/Berlin]": "BYTES", "datetime64[us, UTC+02:00]": "BYTES",
    }  # fmt: skip
    values = {"BYTES": "x", "BOOL": True, "INT64": 3, "FP64": 0.5}
    row = {dtype: "2024-01-01" if dtype.startswith("datetime") else values[kind] for dtype, kind in dtypes.items()}

    frame = signature(*(column(dtype, kind, dtype) for dtype, kind in dtypes.items())).validate([row, row]).frame()

    assert [str(dtype) for dtype in frame.dtypes] == list(dtypes)


def test_null_is_what_training_would_have_had():
    dtypes = {"int8": "INT64", "Int64": "INT64", "bool": "BOOL", "boolean": "BOOL", "str": "BYTES", "object": "BYTES"}
    sign = signature(*(column(dtype, kind, dtype) for dtype, kind in dtypes.items()))
    values: list[Any] = [3, 2**53 + 1, True, False, "x", "x"]

    frame = sign.validate([values, [None] * 6]).frame()

    assert [str(dtype) for dtype in frame.dtypes] == ["float64", "Int64", "object", "boolean", "str", "object"]
    assert frame["Int64"][0] == 2**53 + 1
    assert math.isnan(frame["object"][1])
    assert frame.iloc[1].isna().all()


def test_null_in_a_column_that_was_trained_with_none_is_none():
    rows = signature(column("a", "BYTES", "object", missing="none")).validate([[None], ["x"]])

    assert rows.frame()["a"].tolist() == [None, "x"]


def test_integers_of_an_array_stay_integers_unless_one_is_missing():
    sign = signature(column("a", "INT64", "int64"), column("b", "INT64", "int64"), layout="matrix")

    assert sign.validate([[1, 2]]).array().dtype == np.int64
    assert sign.validate([[1, None]]).array().dtype == np.float64


def test_a_categorical_column_keeps_the_categories_of_training_and_adds_what_it_never_saw():
    sign = signature(column("c", "BYTES", "category", categories=("low", "high"), ordered=True))

    series = sign.validate([["high"], [None], ["new"]]).frame()["c"]

    assert series.cat.categories.tolist() == ["low", "high", "new"]
    assert series.cat.codes.tolist() == [1, -1, 2]
    assert series.cat.ordered


def test_times_keep_their_nanoseconds():
    sign = signature(column("t", "BYTES", "datetime64[ns]"))

    assert sign.validate([["2024-01-01T00:00:00.123456789"]]).frame()["t"][0].nanosecond == 789


def test_times_with_an_offset_become_the_zone_of_training():
    sign = signature(column("t", "BYTES", "datetime64[ns, Europe/Berlin]"))

    frame = sign.validate([["2024-07-01T10:00:00Z"], ["2024-07-01T10:00:00"], [None]]).frame()

    assert [moment.hour for moment in frame["t"][:2]] == [12, 12]


@pytest.mark.parametrize(
    ("changed", "path", "expected", "got"),
    [
        ({"age": "old"}, "instances[1].age", "INT64 from -128 to 127 or null", '"old"'),
        ({"age": 128}, "instances[1].age", "INT64 from -128 to 127 or null", "128"),
        ({"age": 1.5}, "instances[1].age", "INT64 from -128 to 127 or null", "1.5"),
        ({"age": True}, "instances[1].age", "INT64 from -128 to 127 or null", "true"),
        ({"income": "1"}, "instances[1].income", "FP64 or null", '"1"'),
        ({"income": False}, "instances[1].income", "FP64 or null", "false"),
        ({"income": [1]}, "instances[1].income", "FP64 or null", "[1]"),
        ({"income": {"a": {}}}, "instances[1].income", "FP64 or null", "an object of 1 elements"),
        ({"income": [0] * 100}, "instances[1].income", "FP64 or null", "a list of 100 elements"),
        ({"income": math.inf}, "instances[1].income", "FP64 or null", "Infinity"),
        ({"income": 10**400}, "instances[1].income", "FP64 or null", "1" + "0" * 58 + "…"),
        ({"income": 10**9999}, "instances[1].income", "FP64 or null", "a very long int"),
        ({"plan": 3}, "instances[1].plan", "BYTES or null", "3"),
        ({"plan": ["x" * 99]}, "instances[1].plan", "BYTES or null", '["' + "x" * 57 + "…"),
        ({"active": 1}, "instances[1].active", "BOOL", "1"),
        ({"active": None}, "instances[1].active", "BOOL", "null"),
        ({"since": "yesterday"}, "instances[1].since", "BYTES (an ISO 8601 date-time) or null", '"yesterday"'),
        ({"since": 0}, "instances[1].since", "BYTES (an ISO 8601 date-time) or null", "0"),
        (
            {"since": "2024-01-01T00:00:00+01:00"},
            "instances[1].since",
            "BYTES (an ISO 8601 date-time without offset, as in training)",
            '"2024-01-01T00:00:00+01:00"',
        ),
        ({"größe (m)": "tall"}, 'instances[1]["größe (m)"]', "FP64 or null", '"tall"'),
        ({"colour": 1}, "instances[1].colour", "a known column", "an unknown column"),
    ],
)
def test_each_violation_has_its_path(changed, path, expected, got):
    assert violations(MIXED, [GOOD, {**GOOD, **changed}]) == [(path, expected, got)]


def test_a_row_as_an_array_is_pointed_at_by_position():
    assert violations(MIXED, [[*GOOD.values()], ["old", *list(GOOD.values())[1:]]])[0][0] == "instances[1][0]"


def test_a_missing_column_and_the_misspelt_one_in_its_place_are_both_named():
    row = {key if key != "income" else "incom": value for key, value in GOOD.items()}

    assert violations(MIXED, [row]) == [
        ("instances[0].income", "FP64 or null", "nothing: the column is missing"),
        ("instances[0].incom", "a known column", "an unknown column; did you mean 'income'?"),
    ]


def test_only_the_first_unknown_column_is_compared_and_with_few_names():
    sign = signature(*[column(f"measurement_of_the_sensor_number_{number:04d}") for number in range(1000)])
    row = {spec.name: 1.0 for spec in sign.inputs}
    misspelt = {f"measurment_of_the_sensor_number_{number:04d}": 1.0 for number in range(20)}

    def compare(names: Any) -> int:
        compared = 0

        def see(frame: Any, event: str, argument: Any) -> None:
            nonlocal compared
            compared += event == "call" and frame.f_code is difflib.SequenceMatcher.set_seq1.__code__

        with profiled(see):
            found = violations(sign, [{**row, **names}])
        assert ["did you mean 'measurement_of_the_sensor" in got for *_, got in found] == [
            True,
            *([False] * (len(names) - 1)),
        ]
        return compared

    assert 0 < compare(dict([*misspelt.items()][:1])) == compare(misspelt) <= MAX_COMPARED // 30


def test_extra_columns_are_let_in_only_where_the_signature_says_so():
    relaxed = signature(*MIXED.inputs, extra_columns="ignore")
    known = signature(*MIXED.inputs, ignored=("colour",))

    assert relaxed.validate([{**GOOD, "colour": 1}]).count == 1
    assert known.validate([{**GOOD, "colour": 1}, GOOD]).count == 2
    assert violations(known, [{**GOOD, "color": 1}])[0][0] == "instances[0].color"


def test_twenty_violations_are_listed_at_most():
    found = violations(MIXED, [{str(number): number for number in range(1000)}] * 50)

    assert len(found) == MAX_VIOLATIONS


@contextlib.contextmanager
def profiled(see: Callable[[Any, str, Any], object]) -> Iterator[None]:
    """Be told of each call, and of none that the garbage collector makes: those come when they want."""
    gc.disable()
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None)
        gc.enable()


def calls(function: Callable[[], object]) -> int:
    """Count the functions that are called until a request is refused. One look at a row or a value is none."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_name != "<genexpr>"

    with contextlib.suppress(RequestError), profiled(see):
        function()
        raise AssertionError("was not refused")
    return count


BAD_VALUES: dict[str, tuple[Signature, Any]] = {
    "numbers": (signature(*[column(f"c{it}") for it in range(5)], layout="matrix"), [""] * 5),
    "integers": (signature(column("a", "INT64", "int64")), [0.5]),
    "booleans": (signature(column("a", "BOOL", "bool")), [1]),
    "strings": (signature(column("a", "BYTES", "str")), [1]),
    "times": (signature(column("a", "BYTES", "datetime64[us]")), ["then"]),
    "of any kind": (ANYTHING, [[], 1.0]),
    "of any width": (ANY_WIDTH, [[]]),
    "texts": (TEXT, 1),
    "records": (RECORDS, {"a": {}}),
    "rows of another length": (MIXED, [1, 2]),
    "rows without a column": (MIXED, {}),
    "rows that are none": (MIXED, 1),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_nothing_is_done_about_what_a_full_report_could_not_list(kind):
    sign, row = BAD_VALUES[kind]
    few, many = [row] * 50, [row] * 5000
    calls(lambda: sign.validate(few))  # what is made once

    assert violations(sign, many) == violations(sign, few)
    assert calls(lambda: sign.validate(many)) == calls(lambda: sign.validate(few))


@pytest.mark.parametrize(
    ("sign", "row", "path"),
    [
        (TEXT, lambda text: text, ""),
        (TEXT, lambda text: [text], ""),
        (TEXT, lambda text: {"text": text}, ""),
        (RECORDS, lambda text: {"a": text}, ".a"),
        (RECORDS, lambda text: {"a": ["b", text]}, ".a"),
        (MIXED, lambda text: {**GOOD, "plan": text}, ".plan"),
        (ANYTHING, lambda text: [text, 1.0], "[0]"),
        (ANY_WIDTH, lambda text: [1.0, text], "[1]"),
    ],
)
def test_texts_that_would_take_too_long_to_normalise_are_refused(sign, row, path):
    marks = "\u0316\u0300" * (MAX_MARKS // 2)

    assert sign.validate([row("a" + marks), row(("b" + marks) * 3)]).count == 2
    for text in ("a" + marks + "\u0301", marks * 300 + "b"):
        assert violations(sign, [row("a"), row(text)]) == [
            (f"instances[1]{path}", "a text with at most 100 combining characters in a row", "more than that")
        ]


def test_the_sentence_counts_the_violations():
    with pytest.raises(InvalidInput, match=r"^instances\[0\].age: expected FP64, got null, and 1 more violation$"):
        NUMERIC.validate([{"age": None, "income": "x"}])


@pytest.mark.parametrize("instances", [None, 3, "text", {}, {"age": 1}, True])
def test_what_is_no_list_of_rows_is_refused(instances):
    assert violations(MIXED, instances)[0][:2] == ("instances", "a list of rows")


@pytest.mark.parametrize("sign", ALL)
def test_no_rows_are_refused(sign):
    assert violations(sign, []) == [("instances", "at least one row", "[]")]


@pytest.mark.parametrize(
    ("sign", "row", "expected"),
    [
        (NUMERIC, "text", "a list of 2 values"),
        (NUMERIC, None, "a list of 2 values"),
        (NUMERIC, [], "2 values"),
        (NUMERIC, [1, 2, 3], "2 values"),
        (NUMERIC, [[1, 2]], "2 values"),
        (ANY_WIDTH, [], "a list of values"),
        (ANY_WIDTH, {}, "a list of values"),
        (ANY_WIDTH, {"a": 1}, f"a list of values ({UNTOLD})"),
        (ANY_WIDTH, 3, f"a list of values ({UNTOLD})"),
        (TEXT, 3, "a string"),
        (TEXT, ["a", "b"], "a string"),
        (TEXT, None, "a string"),
        (RECORDS, "a", "an object"),
        (RECORDS, [1], "an object"),
    ],
)
def test_a_row_of_the_wrong_kind_is_refused(sign, row, expected):
    assert violations(sign, [row])[0][:2] == ("instances[0]", expected)


def test_rows_of_mixed_kinds_are_each_read_as_what_they_are():
    assert MIXED.validate([GOOD, [*GOOD.values()]]).count == 2
    assert violations(MIXED, [GOOD, "text", 3])[0] == ("instances[1]", "an object", '"text"')


def test_a_text_may_come_as_a_row_of_one_column():
    assert TEXT.validate(["a", ["b"], {"text": "c"}]).items() == ["a", "b", "c"]


def test_records_hold_what_a_dict_vectorizer_takes():
    record = {"city": "Köln", "rooms": 3, "price": 0.5, "new": True, "tags": ["a", "b"], "floor": None}

    assert RECORDS.validate([record]).items() == [record]
    assert violations(RECORDS, [{"city": [1], "x": {}}])[0][0] == "instances[0].city"


def test_floats_beyond_32_bits_are_refused_where_training_had_32():
    assert violations(FLOAT32, [[1.0, 1e39], [-1e300, None]]) == [
        ("instances[1][0]", "FP64 or null", "-1e+300"),
        ("instances[0][1]", "FP64 or null", "1e+39"),
    ]


@pytest.mark.parametrize("value", ["1677-01-01", "2262-06-01", "0001-01-01"])
def test_times_outside_of_nanoseconds_are_refused_only_where_training_had_those(value):
    assert violations(signature(column("t", "BYTES", "datetime64[ns]")), [[value]])
    assert signature(column("t", "BYTES", "datetime64[us]")).validate([[value]]).frame()["t"][0].year < 3000


def test_a_time_that_its_offset_moves_out_of_the_calendar_is_refused():
    sign = signature(column("t", "BYTES", "datetime64[us, UTC]"))

    assert violations(sign, [["9999-12-31T23:59:59-05:00"], ["0001-01-01T00:00:00+05:00"]])


def test_a_number_of_an_unknown_column_may_be_true_or_false():
    assert MIXED.validate([{**GOOD, "größe (m)": True}]).frame()["größe (m)"][0] == 1.0


@pytest.mark.parametrize(
    ("sent", "dtype", "handed_on"),
    [
        (["Pro", "01234"], "object", ["Pro", "01234"]),
        (["Pro", 3], "object", ["Pro", 3]),
        ([True, "Pro"], "object", [True, "Pro"]),
        ([True, False], "bool", [True, False]),
        ([3, 2.5], "float64", [3.0, 2.5]),
        ([True, 2.5], "float64", [1.0, 2.5]),
    ],
)
def test_a_column_of_which_nothing_is_known_has_what_came(sent, dtype, handed_on):
    rows = ANYTHING.validate([[value, 1] for value in sent])

    assert rows.frame()["a"].dtype == dtype
    assert rows.frame()["a"].tolist() == handed_on
    assert rows.guessed == (dtype == "object")


def test_null_where_nothing_is_known_is_missing_and_lists_are_refused():
    assert ANYTHING.validate([["Pro", 1], [None, 1]]).frame()["a"].isna().tolist() == [False, True]
    assert violations(ANYTHING, [[[1], "x"], [10**400, 1]]) == [
        ("instances[0][0]", "a number, a string, true, false or null", "[1]"),
        ("instances[1][0]", "a number, a string, true, false or null", "1" + "0" * 58 + "…"),
        ("instances[0][1]", "FP64 or null", '"x"'),
    ]


def test_numbers_that_were_objects_in_training_are_objects():
    sign = signature(
        column("a", "INT64", "object", missing="none"), column("b", dtype="object", missing="none"), column("c")
    )
    frame = sign.validate([[1, 0.5, 1], [None, None, 1]]).frame()

    assert frame["a"].tolist() == [1, None]
    assert frame["b"].tolist() == [0.5, None]


def test_too_many_rows_are_too_large():
    with pytest.raises(RequestTooLarge, match="expected at most 2 rows in one request, got 3"):
        NUMERIC.validate([[1, 2]] * 3, max_rows=2)


def test_rows_of_other_kinds_are_kept_apart():
    whole, gap, wider = (
        ANY_WIDTH.validate([[1.0]]),
        MIXED.validate([{**GOOD, "age": None}]),
        ANY_WIDTH.validate([[1, 2]]),
    )

    assert whole.kinds != wider.kinds
    assert gap.kinds != MIXED.validate([GOOD]).kinds


def test_rows_of_one_kind_are_put_behind_each_other():
    first, second = MIXED.validate([GOOD]), MIXED.validate([{**GOOD, "age": 7}, GOOD])

    assert Rows.concatenate([first, second]).frame()["age"].tolist() == [41, 7, 41]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just(10**400)
    | st.sampled_from(["2024-01-01", "9999-12-31T23:59:59-05:00", "24:00", "2024-W01-1"]),
    lambda inner: st.lists(inner, max_size=7)
    | st.dictionaries(st.sampled_from([*GOOD, "text", ""]) | st.text(max_size=3), inner, max_size=7),
    max_leaves=40,
)  # fmt: skip
rows_like = st.lists(
    st.fixed_dictionaries({name: json_values for name in GOOD})
    | st.lists(json_values, min_size=6, max_size=6)
    | json_values,
    max_size=4,
)


@settings(max_examples=50, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(rows_like | json_values)
def test_no_json_raises_anything_but_a_request_error(instances):
    for sign in ALL:
        try:
            rows = sign.validate(instances)
        except RequestError as error:
            found = error.violations
        else:
            found = ()
            assert rows.count == len(instances)
            if sign.layout == "frame":
                assert len(rows.frame()) == rows.count
        assert len(found) <= MAX_VIOLATIONS
        assert all(len(it.got) <= 300 and len(it.path) <= 100 for it in found)


@pytest.mark.parametrize("sign", ALL)
def test_deep_nesting_is_only_a_wrong_value(sign):
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]

    assert violations(sign, [deep])
    assert violations(sign, [[deep] * 6])


@pytest.mark.parametrize(
    "row", [GOOD, {**GOOD, "age": "x"}, {str(n): n for n in range(40)}, [*GOOD.values()], "text", [[[]]]]
)
def test_the_work_grows_no_faster_than_the_rows(row):
    """Counted in calls, not in seconds: ten times the rows may cost ten times the calls, and little more."""

    def calls(count: int) -> int:
        number = 0

        def count_one(*_: object) -> None:
            nonlocal number
            number += 1

        with contextlib.suppress(InvalidInput), profiled(count_one):
            MIXED.validate([row] * count)
        return number

    assert calls(2000) <= 10 * calls(200) + 1000


@pytest.mark.parametrize(
    "dtype",
    [
        *("S1000000000", "U300000000", "V1000000000", "<U5", "period[1000000000Y]", "M8[ns]x", ""),
        *("datetime64[ns, dateutil//etc/hostname]", "datetime64[ns, /etc/hostname]", "datetime64[ns, ../../hostname]"),
        *("datetime64[ns, tzlocal()]", "timestamp[ns, tz=dateutil//etc/hostname][pyarrow]", "int64\n", "_" * 10**6),
    ],
)
def test_a_dtype_that_tells_how_much_memory_to_take_or_a_file_to_read_is_none(dtype):
    with pytest.raises(ValidationError, match="is no dtype that a column of a model can have"):
        TensorSpec(name="a", datatype="BYTES", dtype=dtype)


def test_the_dtypes_that_columns_have_are_known():
    numbers = np.array([1, 2])
    dtypes: list[Any] = [np.dtype(kind) for kind in np.sctypeDict.values() if np.dtype(kind).kind in "biufc"]
    dtypes += [kind.newbyteorder(">") for kind in dtypes]
    dtypes += [np.dtype(f"{kind}8[{unit}]") for kind in "mM" for unit in ("Y", "25s", "us", "ns", "as", "D", "generic")]
    dtypes += [pd.Series(numbers).astype(kind).dtype for kind in ("Int64", "UInt8", "Float32", "category")] + [
        pd.BooleanDtype()
    ]
    dtypes += [pd.Series(["a"]).astype(kind).dtype for kind in ("object", "str", "string", "string[python]")]
    dtypes += [pd.CategoricalDtype([1]), pd.PeriodDtype("M"), pd.IntervalDtype("int64"), pd.SparseDtype("float64", 0.0)]
    dtypes += [
        pd.DatetimeTZDtype("ns", zone)
        for zone in ("UTC", "Europe/Berlin", "America/Argentina/Ushuaia", "Etc/GMT+5", timezone(timedelta(hours=5.5)))
    ]

    assert [str(dtype) for dtype in dtypes if not is_dtype(str(dtype))] == []


def test_a_manifest_with_such_a_dtype_is_refused():
    spec = {"name": "a", "datatype": "BYTES", "dtype": "S1000000000"}
    signature = {"layout": "frame", "inputs": [spec], "methods": ["predict"]}
    body = {"format": 1, "name": "churn", "version": "1", "created": "", "artifacts": [], "signature": signature}

    with pytest.raises(InvalidManifest, match=r"signature\.inputs\.0\.dtype: .* no dtype that a column of a model"):
        Manifest.decode(json.dumps(body).encode(), ModelRef("churn", "1"))
