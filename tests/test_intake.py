"""The decoder that a signature makes of itself takes what `Signature.validate` takes, and makes the same rows of it."""

from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import inspection
from app.errors import InvalidInput, RequestError
from app.intake import Intake, open_envelope
from app.marks import MAX_MARKS
from app.signature import MAX_COLUMNS, Rows, Signature, TensorSpec
from tests.zoo import BUILDERS, NEEDS_EXAMPLES, fitted

# Times, columns of which nothing is known, and true and false for numbers: those requests go the careful way.
NEVER_PLAIN = {"mixed, with times", "mixed, by position", "ridge, bool", "bernoulli bayes"}
STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**62, 2**65),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1e39, -1e308, 3.0, -0.0, 5e-324, 2.5, "x", "", "größe", "\x00", [1], [], {}, {"a": 1}]),
)


def signature_of(name: str) -> tuple[Signature, list[Any]]:
    it = fitted(name)
    examples = inspection.prepare([], it.estimator, it.data[:20])
    signature = inspection.infer(
        [], it.estimator, examples if name in NEEDS_EXAMPLES or _has_strings(it.data) else None
    )
    return signature, json.loads(json.dumps(inspection.instances_of(examples, signature)))


def _has_strings(data: Any) -> bool:
    return hasattr(data, "columns") or isinstance(data, list)


def raw(instances: Any) -> msgspec.Raw:
    return open_envelope(json.dumps({"instances": instances}).encode()).instances


def equal(one: Rows, other: Rows) -> None:
    assert one.count == other.count
    assert one.kinds == other.kinds
    if one.matrix is not None:
        assert other.matrix is not None
        assert one.matrix.tobytes() == other.matrix.tobytes()
        return
    for left, right in zip(one.columns, other.columns, strict=True):
        assert [bits(value) for value in left.tolist()] == [bits(value) for value in right.tolist()]


def bits(value: Any) -> Any:
    """Something that is equal where values are the same, of the same type, to the last bit."""
    return struct.pack("d", value) if type(value) is float else (type(value).__name__, value)


def careful(signature: Signature, body: Any) -> Rows | None:
    try:
        return signature.validate(json.loads(json.dumps(body)))
    except RequestError:
        return None


@pytest.mark.parametrize("name", BUILDERS)
def test_what_the_decoder_takes_is_what_validation_makes_of_it(name):
    signature, instances = signature_of(name)
    intake = Intake(signature)
    draft = intake.draft(raw(instances))

    assert (draft is None) == (name in NEVER_PLAIN)
    if draft is not None:
        equal(intake.rows(draft), signature.validate(instances))
        names = [spec.name for spec in signature.inputs]
        if signature.layout == "frame" and names and isinstance(instances[0], list):
            objects = [dict(zip(names, row, strict=True)) for row in instances]
            found = intake.draft(raw(objects))
            assert found is not None
            equal(intake.rows(found), signature.validate(objects))


@pytest.mark.parametrize("name", BUILDERS)
def test_whatever_a_request_holds_the_decoder_never_takes_more_or_other_rows(name):
    signature, instances = signature_of(name)
    intake = Intake(signature)

    @settings(max_examples=60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        rows = json.loads(json.dumps(data.draw(st.lists(st.sampled_from(instances), min_size=1, max_size=4))))
        for _ in range(data.draw(st.integers(1, 3))):
            row = data.draw(st.integers(0, len(rows) - 1))
            how = data.draw(st.sampled_from(["value", "value", "value", "drop", "add", "row"]))
            if how == "row" or not isinstance(rows[row], (list, dict)) or not rows[row]:
                rows[row] = json.loads(json.dumps(data.draw(STRANGE)))
                continue
            keys = list(rows[row]) if isinstance(rows[row], dict) else range(len(rows[row]))
            key = data.draw(st.sampled_from(keys))
            if how == "value":
                rows[row][key] = json.loads(json.dumps(data.draw(STRANGE)))
            elif how == "drop":
                del rows[row][key]
            elif isinstance(rows[row], dict):
                rows[row][data.draw(st.sampled_from(["strange", "unused", ""]))] = json.loads(
                    json.dumps(data.draw(STRANGE))
                )
            else:
                rows[row].append(json.loads(json.dumps(data.draw(STRANGE))))
        draft = intake.draft(raw(rows))
        expected = careful(signature, rows)

        if draft is not None:
            assert expected is not None
            equal(intake.rows(draft), expected)

    check()


def test_rows_of_several_requests_become_one_batch():
    signature, instances = signature_of("mixed")
    intake = Intake(signature)
    drafts = [intake.draft(raw(instances[start : start + 2])) for start in (0, 4, 8)]
    together = intake.rows([row for draft in drafts if draft for row in draft])

    equal(together, signature.validate([*instances[0:2], *instances[4:6], *instances[8:10]]))


def test_many_rows_are_packed_piece_by_piece():
    signature = Signature(
        layout="matrix", inputs=tuple(TensorSpec(name=f"x{i}", datatype="FP64") for i in range(7)), methods=("predict",)
    )
    values = np.random.default_rng(0).normal(size=(30_000, 7))
    values[12_345, 3] = np.nan
    instances = [[None if value != value else value for value in row] for row in values.tolist()]
    intake = Intake(signature)
    draft = intake.draft(raw(instances))

    assert draft is not None
    matrix = intake.rows(draft).matrix
    assert matrix is not None
    assert matrix.tobytes() == values.tobytes()
    assert matrix.flags.writeable  # some estimators compute in place


def test_a_frame_that_has_the_same_name_twice_or_thousands_of_names_takes_lists():
    for names in (["a", "a"], [f"x{i}" for i in range(3000)]):
        inputs = tuple(TensorSpec(name=name, datatype="FP64") for name in names)
        intake = Intake(Signature(layout="frame", inputs=inputs, methods=("predict",)))

        assert intake.draft(raw([[1.0] * len(names)])) is not None
        assert intake.draft(raw([dict.fromkeys(names, 1.0)])) is None


@pytest.mark.parametrize("name", ['a "quote"', "back\\slash", "line\nfeed", "\x00"])
def test_a_name_that_json_writes_with_an_escape_leaves_objects_to_the_careful_way(name):
    signature = Signature(layout="frame", inputs=(TensorSpec(name=name, datatype="FP64"),), methods=("predict",))
    intake = Intake(signature)

    assert intake.draft(raw([[1.0]])) is not None
    assert intake.draft(raw([{name: 1.0}])) is None
    assert signature.validate([{name: 1.0}]).count == 1


@pytest.mark.parametrize("name", BUILDERS)
def test_no_rows_are_left_to_the_careful_way(name):
    signature, _ = signature_of(name)

    assert Intake(signature).draft(raw([])) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"instances":[[NaN]]}',
        b'{"instances":[[1]],"instance":1}',
        b'{"instances":[["\xff"]]}',
    ],
)
def test_what_is_no_request_is_left_to_the_careful_way(body):
    intake = Intake(Signature(layout="matrix", inputs=(TensorSpec(name="x", datatype="FP64"),), methods=("predict",)))
    try:
        instances = open_envelope(body).instances
    except msgspec.DecodeError:
        return

    assert intake.draft(instances) is None


def test_deep_nesting_is_not_taken():
    body = b'{"instances":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

    with pytest.raises((msgspec.DecodeError, RecursionError)):
        open_envelope(body)


def test_a_whole_number_of_more_than_64_bits_in_a_record_is_left_to_the_careful_way():
    intake = Intake(Signature(layout="records", inputs=(), methods=("predict",)))

    assert intake.draft(raw([{"a": 2**63 - 1}, {"a": -(2**63)}])) is not None
    for number in (2**64, -(2**63) - 1, 10**400):
        assert intake.draft(raw([{"a": number}])) is None


def test_no_more_columns_are_plain_where_nothing_tells_how_many_than_a_model_can_have():
    intake = Intake(Signature(layout="matrix", inputs=(), methods=("predict",)))

    assert intake.draft(raw([[0.5] * MAX_COLUMNS])) is not None
    assert intake.draft(raw([[0.5] * (MAX_COLUMNS + 1)])) is None


TEXT_COLUMN = TensorSpec(name="a", datatype="BYTES", dtype="object")
NUMBER_COLUMN = TensorSpec(name="b", datatype="FP64")
WITH_TEXTS = {
    "text": ("text", (TEXT_COLUMN,), lambda text: text),
    "records": ("records", (TEXT_COLUMN,), lambda text: {"a": text}),
    "records with lists": ("records", (TEXT_COLUMN,), lambda text: {"b": 1.5, "a": ["x", text]}),
    "frame, as lists": ("frame", (TEXT_COLUMN, NUMBER_COLUMN), lambda text: [text, 1.5]),
    "frame, as objects": ("frame", (TEXT_COLUMN, NUMBER_COLUMN), lambda text: {"b": 1.5, "a": text}),
    "matrix": ("matrix", (NUMBER_COLUMN, TEXT_COLUMN), lambda text: [1.5, text]),
}


@pytest.mark.parametrize("kind", WITH_TEXTS)
def test_a_text_with_a_long_run_of_combining_characters_is_not_plain(kind):
    layout, inputs, row = WITH_TEXTS[kind]
    signature = Signature(layout=layout, inputs=inputs, methods=("predict",))
    intake = Intake(signature)
    marks = "\u0300\u0316" * (MAX_MARKS // 2)
    for good in ("a" + marks, (marks + "b") * 3, "\u4e2d" * 5000, "a" * 5000, "\\u" * 5000):
        for body in ([row(good)], [row("x"), row(good)]):
            draft = intake.draft(raw(body))
            assert draft is not None
            equal(intake.rows(draft), signature.validate(body))
    for bad in ("a" + marks + "\u0301", "b" * 4000 + marks * 3):
        for body in ([row(bad)], [row("x"), row(bad)]):
            written = (json.dumps(body, ensure_ascii=False).encode(), json.dumps(body).encode())
            for instances in written:
                assert intake.draft(msgspec.Raw(instances)) is None
            with pytest.raises(InvalidInput, match="at most 100 combining characters in a row, got more than that"):
                signature.validate(body)
