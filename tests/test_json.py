"""JSON at its edges, as it comes over a socket: what two parsers might read differently, and what might break one.

Every body goes to two processes: one answers plain requests in the protocol, the other all of them as an ASGI application.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from app.api.errors import ErrorBody
from app.api.predict import MAX_DEPTH
from app.model_storage import ModelStorageManager
from app.storage.local import LocalStorage
from tests.service import AS_ASGI, Service, running
from tests.trusted import TRUST

LIMIT_BYTES = 4 * 1024 * 1024
POINTS = np.arange(24.0).reshape(8, 3)
PEOPLE = pd.DataFrame(
    {
        "age": [20.0, 30.0, 40.0, 55.0] * 5,
        "plan": ["pro", "free", "team", "free"] * 5,
        "children": [0, 1, 2, 3] * 5,
        "note": ["a", "b", "c", "d"] * 5,  # that the model never reads
    }
)
CHURNED = ["no", "yes", "no", "yes"] * 5
DEEP = 100_000


def churn() -> Any:
    columns = make_column_transformer(
        (StandardScaler(), ["age", "children"]), (OneHotEncoder(handle_unknown="ignore"), ["plan"])
    )
    return make_pipeline(columns, LogisticRegression()).fit(PEOPLE, CHURNED)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[tuple[Service, Service]]:
    folder = tmp_path_factory.mktemp("bucket")
    manager = ModelStorageManager(LocalStorage(folder), trust=TRUST)
    manager.save("plane", LinearRegression().fit(POINTS, POINTS.sum(axis=1)), examples=POINTS)
    manager.save("churn", churn(), examples=PEOPLE.head(4))
    manager.save("open", churn(), examples=PEOPLE.head(4), extra_columns_ignored=True)
    words = make_pipeline(CountVectorizer(), LogisticRegression()).fit(["good day", "bad day"] * 4, ["+", "-"] * 4)
    manager.save("words", words, examples=["good", "bad"])
    records = make_pipeline(DictVectorizer(), LogisticRegression()).fit([{"a": 1}, {"b": "x"}] * 4, ["+", "-"] * 4)
    manager.save("records", records, examples=[{"a": 1}, {"b": "x"}])
    environment = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder), "ML_MAX_BODY_BYTES": str(LIMIT_BYTES)}
    with running(environment) as one, running(environment, command=AS_ASGI) as other:
        yield one.wait_ready(), other.wait_ready()


@pytest.fixture
def ask(pair):
    """Post a body to both services, which must say the same, and return what they said; afterwards both still answer."""

    def post(body: bytes) -> httpx.Response:
        one, other = (
            service.client.post("/predict", content=body, headers={"X-Request-ID": "same"}) for service in pair
        )
        assert (one.status_code, one.content) == (other.status_code, other.content)
        assert one.status_code < 500
        return one

    yield post
    for service in pair:
        assert service.predict(model="plane", instances=[[1, 2, 3]]).status_code == 200
        assert service.process.poll() is None


def refused(response: httpx.Response, status: int, code: str) -> str:
    body = ErrorBody.model_validate_json(response.content)
    assert (response.status_code, body.error) == (status, code), response.text[:500]
    assert len(response.content) < 5000
    return body.detail


def plane(cell: bytes) -> bytes:
    return b'{"model":"plane","instances":[[1,2,' + cell + b"]]}"


def person(**changed: bytes) -> bytes:
    row = {"age": b"41", "plan": b'"pro"', "children": b"1"} | changed
    return b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in row.items()) + b"}"


def of(model: str, *rows: bytes) -> bytes:
    return b'{"model":"%b","instances":[%b]}' % (model.encode(), b",".join(rows))


# Names that come twice: the last one counts, everywhere


@pytest.mark.parametrize(
    ("body", "same"),
    [
        (b'{"model":"none","model":"plane","instances":[[1,2,3]]}', plane(b"3")),
        (b'{"model":7,"model":"plane","instances":[[1,2,3]]}', plane(b"3")),
        (b'{"instances":[[9,9,9]],"model":"plane","instances":[[1,2,3]]}', plane(b"3")),
        (b'{"instances":"no rows","model":"plane","instances":[[1,2,3]]}', plane(b"3")),
        (b'{"model":"plane","version":"9","instances":[[1,2,3]],"version":"1"}', plane(b"3")),
        (b'{"model":"plane","version":"9","instances":[[1,2,3]],"version":null}', plane(b"3")),
        (b'{"model":"plane","method":[],"instances":[[1,2,3]],"method":"predict"}', plane(b"3")),
        (b'{"\\u006dodel":"none","model":"plane","instances":[[1,2,3]]}', plane(b"3")),
        (b'{"model":"none","\\u006dodel":"plane","instances":[[1,2,3]]}', plane(b"3")),
        (of("churn", b'{"age":1,' + person()[1:]), of("churn", person())),
        (of("churn", b'{"age":"old",' + person()[1:]), of("churn", person())),
        (of("churn", b'{"age":{"a":[]},' + person()[1:]), of("churn", person())),
        (of("churn", b'{"plan":null,"plan":"free",' + person()[1:]), of("churn", person())),
        (of("churn", b'{"\\u0061ge":1,' + person()[1:]), of("churn", person())),
        (of("churn", b'{"note":[],' + person(note=b'"x"')[1:]), of("churn", person())),
        (of("open", b'{"more":1,"more":{},' + person()[1:]), of("open", person())),
        (of("records", b'{"a":2,"a":1}'), of("records", b'{"a":1}')),
        (of("records", b'{"a":{},"a":1}'), of("records", b'{"a":1}')),
    ],
    ids=lambda value: value.decode()[:60],
)
def test_of_names_that_come_twice_the_last_counts(ask, body, same):
    answer, expected = ask(body), ask(same)

    assert expected.status_code == 200
    assert answer.content == expected.content


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b'{"model":"plane","model":7,"instances":[[1,2,3]]}', 400, "model must be a string"),
        (b'{"model":"plane","instances":[[1,2,3]],"instances":7}', 422, "instances must be a list"),
        (of("churn", person()[:-1] + b',"age":"old"}'), 422, "instances[0].age: expected FP64"),
        (of("churn", b'{"age":1,"age":2,"plan":"pro"}'), 422, "instances[0].children: expected"),
        (of("records", b'{"a":1,"a":{}}'), 422, "instances[0].a: expected a number"),
    ],
    ids=lambda value: value.decode()[:60] if isinstance(value, bytes) else None,
)
def test_the_last_of_two_is_refused_where_it_is_wrong(ask, body, status, detail):
    assert refused(ask(body), status, {400: "invalid_request", 422: "invalid_input"}[status]).startswith(detail)


# Numbers


@pytest.mark.parametrize("word", [b"NaN", b"-NaN", b"Infinity", b"-Infinity", b"nan", b"inf", b"-inf"])
@pytest.mark.parametrize("where", ["cell", "column", "record", "envelope", "passed over"])
def test_what_is_no_number_is_refused_with_what_to_send(ask, word, where):
    bodies = {
        "cell": plane(word),
        "column": of("churn", person(age=word)),
        "record": of("records", b'{"a":' + word + b"}"),
        "envelope": b'{"model":"plane","version":' + word + b',"instances":[[1,2,3]]}',
        "passed over": of("open", person(more=word)),
    }
    detail = refused(ask(bodies[where]), 400, "invalid_json")

    assert detail.startswith("the body is not JSON: ")
    assert detail.endswith(": JSON has no NaN and no Infinity, null is a missing value")


@pytest.mark.parametrize(
    "number", [b"1e400", b"-1e400", b"1" + b"0" * 400, b"-1" + b"0" * 400, b"9" * 5000, b"1e99999999999999999999"]
)
def test_a_number_beyond_floats_is_refused(ask, number):
    assert "infinity" in refused(ask(plane(number)), 400, "invalid_json")
    assert "infinity" in refused(ask(of("churn", person(age=number))), 400, "invalid_json")
    assert "infinity" in refused(ask(of("churn", person(children=number))), 400, "invalid_json")
    assert "infinity" in refused(ask(of("records", b'{"a":' + number + b"}")), 400, "invalid_json")


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1, 10**30, 10**300])
def test_an_integer_beyond_its_column_is_refused_and_a_float_takes_it(ask, number):
    text = str(number).encode()

    assert refused(ask(of("churn", person(children=text))), 422, "invalid_input").startswith("instances[0].children")
    assert ask(of("churn", person(age=text))).status_code == 200
    assert ask(plane(text)).status_code == 200


@pytest.mark.parametrize(
    ("version", "status", "code"),
    [
        (b"1", 200, None),
        (b"-1", 404, "model_not_found"),
        (b"%d" % 2**63, 404, "model_not_found"),
        (b"%d" % (2**64 - 1), 404, "model_not_found"),
        (b"%d" % 2**64, 400, "invalid_request"),
        (b"9" * 300, 400, "invalid_request"),
        (b"9" * 4299, 400, "invalid_json"),
        (b"9" * 4301, 400, "invalid_json"),
        (b"9" * 1_000_000, 400, "invalid_json"),
        (b"1.0", 400, "invalid_request"),
        (b"1e0", 400, "invalid_request"),
        (b"true", 400, "invalid_request"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_version_may_be_an_integer_and_no_other_number(ask, version, status, code):
    answer = ask(b'{"model":"plane","version":' + version + b',"instances":[[1,2,3]]}')

    assert answer.status_code == 200 if code is None else refused(answer, status, code)


@pytest.mark.parametrize(
    "number", [b"01", b"+1", b"1.", b".5", b"0x10", b"1_000", b"1,5", b"--1", b"1e", "\u0661".encode()]
)
def test_what_other_languages_write_as_numbers_is_refused(ask, number):
    answer = ask(plane(number))

    assert answer.status_code == 422 if number == b"1,5" else refused(answer, 400, "invalid_json")


def test_a_number_may_have_a_million_digits_behind_its_point(ask):
    assert ask(plane(b"3." + b"0" * 1_000_000)).content == ask(plane(b"3")).content


# Text


@pytest.mark.parametrize(
    "text",
    [rb"\ud800", rb"\udc00", rb"\ud800\ud800", rb"a\udfffb", rb"\ud800\u0041", b"\xed\xa0\x80", b"\xed\xbf\xbf"],
    ids=repr,
)
@pytest.mark.parametrize("where", ["model", "key", "plan", "column", "text", "record", "record's name", "passed over"])
def test_half_a_surrogate_pair_is_refused_wherever_it_is_read(ask, text, where):
    quoted = b'"' + text + b'"'
    bodies = {
        "model": b'{"model":' + quoted + b',"instances":[[1,2,3]]}',
        "key": b'{"model":"plane","instances":[[1,2,3]],' + quoted + b":1}",
        "plan": of("churn", person(plan=quoted)),
        "column": of("churn", b"{" + quoted + b":1," + person()[1:]),
        "text": of("words", quoted),
        "record": of("records", b'{"b":' + quoted + b"}"),
        "record's name": of("records", b"{" + quoted + b":1}"),
        "passed over": of("churn", person(note=quoted)),
    }

    assert refused(ask(bodies[where]), 400, "invalid_json").startswith("the body is not JSON: ")


@pytest.mark.parametrize("bad", [b"\xff", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"\x80", b"\xe2\x82"], ids=repr)
def test_what_is_not_utf8_is_refused_with_its_place(ask, bad):
    body = of("words", b'"good ' + bad + b'"')
    detail = refused(ask(body), 400, "invalid_json")

    assert detail.startswith(f"the body is not JSON: expected UTF-8, but byte {body.index(bad)} is {bad[0]:#04x}: ")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_another_encoding_is_named(ask, encoding):
    detail = refused(ask(plane(b"3").decode().encode(encoding)), 400, "invalid_json")

    assert detail == "the body is not JSON: expected UTF-8, got what looks like UTF-16 or UTF-32"


def test_a_byte_order_mark_is_refused(ask):
    assert "byte order mark" in refused(ask(b"\xef\xbb\xbf" + plane(b"3")), 400, "invalid_json")


@pytest.mark.parametrize("text", ["\U0001f600", "\u0000", "\u2028", "\u202e", "\ufffd", "e\u0301", "\x7f"])
def test_any_other_character_is_text(ask, text):
    raw, escaped = (json.dumps(f"good{text}", ensure_ascii=ascii).encode() for ascii in (False, True))

    assert ask(of("words", raw)).content == ask(of("words", escaped)).content
    assert ask(of("churn", person(plan=raw))).status_code == 200


def test_names_are_compared_as_they_are_and_not_as_they_look(ask):
    composed, apart, cyrillic = "é".encode(), "e\u0301".encode(), "\u0430ge".encode()

    assert ask(of("records", b'{"%b":1}' % composed)).status_code == 200
    assert ask(of("records", b'{"%b":1}' % apart)).status_code == 200
    assert "an unknown column" in ask(of("churn", b'{"%b":1,' % cyrillic + person()[1:])).text


@pytest.mark.parametrize("text", [b"\x00", b"\n", b"\x1f"], ids=repr)
def test_a_control_character_in_a_string_must_be_escaped(ask, text):
    refused(ask(of("words", b'"good' + text + b'"')), 400, "invalid_json")


# Depth


def nested(levels: int, kind: str) -> bytes:
    if kind == "lists":
        return b"[" * levels + b"]" * levels
    return b'{"a":' * levels + b"1" + b"}" * levels


POSITIONS = {
    "the whole": b"%b",
    "the instances": b'{"model":"plane","instances":%b}',
    "the model": b'{"model":%b,"instances":[[1,2,3]]}',
    "the version": b'{"model":"plane","version":%b,"instances":[[1,2,3]]}',
    "an unknown field": b'{"model":"plane","instances":[[1,2,3]],"x":%b}',
    "what comes twice": b'{"model":"plane","instances":%b,"instances":[[1,2,"x"]]}',
    "a row": of("plane", b"%b"),
    "a cell": plane(b"%b"),
    "a column": of("churn", person(age=b"%b")),
    "an unknown column": of("churn", person(other=b"%b")),
    "a text": of("words", b"%b"),
    "a record's value": of("records", b'{"a":%b}'),
    "beside a mistake": of("open", person(more=b"%b", age=b'"old"')),
}


@pytest.mark.parametrize("kind", ["lists", "objects"])
@pytest.mark.parametrize("position", POSITIONS)
def test_what_is_nested_too_deeply_is_refused_wherever_it_is(ask, position, kind):
    shape = POSITIONS[position]
    for levels in (MAX_DEPTH + 1, 2 * MAX_DEPTH, DEEP):
        detail = refused(ask(shape % nested(levels, kind)), 400, "invalid_json")

        assert detail == "the body is nested more than 1,024 levels deep, which is the limit"


@pytest.mark.parametrize("kind", ["lists", "objects"])
@pytest.mark.parametrize("position", POSITIONS)
def test_what_is_as_deep_as_may_be_is_read(ask, position, kind):
    shape = POSITIONS[position]
    around = max(0, json_depth(shape % b"0"))
    answer = ask(shape % nested(MAX_DEPTH - around, kind))

    assert answer.status_code in (400, 422)
    assert answer.json()["error"] in ("invalid_request", "invalid_input")


def json_depth(body: bytes) -> int:
    """Return how many lists and objects the 0 in a body is in."""
    before = body[: body.rindex(b":0") if b":0" in body else body.rindex(b"0")]
    return sum(before.count(sign) for sign in (b"[", b"{")) - sum(before.count(sign) for sign in (b"]", b"}"))


@pytest.mark.parametrize("kind", ["lists", "objects"])
def test_what_is_nested_and_never_closed_is_refused(ask, kind):
    for opened in (b"[" * DEEP, b'{"a":' * DEEP, b'{"instances":' * DEEP, b"[{" * DEEP):
        assert ask(opened).status_code == 400
        assert ask(plane(nested(DEEP, kind)[:DEEP])).status_code == 400


def test_a_column_that_nobody_reads_may_hold_anything(ask):
    expected = ask(of("churn", person())).content

    for value in (b"null", b"[[1],{}]", b'{"a":{"b":[]}}', nested(500, "lists"), b'"' + b"x" * 100_000 + b'"'):
        assert ask(of("churn", person(note=value))).content == expected
        assert ask(of("open", person(more=value))).status_code == 200


# Sizes


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"%b","instances":[[1,2,3]]}' % (b"m" * 3_900_000),
        b'{"%b":1,"instances":[[1,2,3]]}' % (b"k" * 3_900_000),
        b'{"model":"plane","method":"%b","instances":[[1,2,3]]}' % (b"m" * 3_900_000),
        plane(b'"%b"' % (b"x" * 3_900_000)),
        plane(b'"%b"' % (b"\\u0000" * 600_000)),
        of("churn", b'{"%b":1}' % (b"k" * 3_900_000)),
        of("churn", *(b'{"%b":1}' % (b"%d" % number * 30_000) for number in range(20, 60))),
        of("churn", b"{" + b",".join(b'"k%d":1' % number for number in range(250_000)) + b"}"),
        of("churn", b"{" + b",".join(b'"k%d":1' % number for number in range(250_000)) + b"," + person()[1:]),
        b"{" + b",".join(b'"k%d":1' % number for number in range(250_000)) + b"}",
        of("churn", *([b"{}"] * 10_000)),
        of("records", b"[]", b'{"a":[%b]}' % b",".join([b"[]"] * 500_000)),
        plane(b"[" + b"0," * 1_000_000 + b"0]"),
        b"[" + b"{}," * 1_000_000 + b"{}]",
    ],
    ids=range(14),
)
def test_what_is_large_and_wrong_is_refused_in_few_words(ask, body):
    answer = ask(body)

    assert answer.status_code in (400, 404, 413, 422)
    ErrorBody.model_validate_json(answer.content)
    assert len(answer.content) < 10_000


@pytest.mark.parametrize(
    "body",
    [
        of("words", b'"%b"' % (b"good " * 700_000)),
        of("records", b"{" + b",".join(b'"k%d":1' % number for number in range(250_000)) + b"}"),
        of("open", b"{" + b",".join(b'"k%d":1' % number for number in range(250_000)) + b"," + person()[1:]),
        b" " * 3_000_000 + plane(b"3") + b"\n" * 900_000,
        plane(b"\t" * 3_000_000 + b"3"),
    ],
    ids=range(5),
)
def test_what_is_large_and_right_is_answered(ask, body):
    assert ask(body).status_code == 200


# Names that mean something in other languages


@pytest.mark.parametrize(
    "name", ["__proto__", "constructor", "__class__", "__dict__", "prototype", "toString", "$ref", "@type", ""]
)
def test_a_name_means_nothing_but_itself(ask, name):
    quoted = json.dumps(name).encode()
    unknown = refused(ask(b"{%b:{},%b" % (quoted, plane(b"3")[1:])), 400, "invalid_request")
    column = refused(ask(of("churn", b"{%b:{}," % quoted + person()[1:])), 422, "invalid_input")

    assert unknown.startswith(f"unknown field {name!r}; ")
    assert "expected a known column, got an unknown column" in column
    assert ask(of("records", b"{%b:1}" % quoted)).status_code == 200
    assert ask(of("open", b"{%b:{}," % quoted + person()[1:])).content == ask(of("open", person())).content
    for field in ("method", "version", "alias"):
        body = b'{"model":"plane","%b":%b,"instances":[[1,2,3]]}' % (field.encode(), quoted)
        assert ask(body).status_code in (400, 404)


@pytest.mark.parametrize(
    "body",
    [plane(b"3") + b"x", plane(b"3") + plane(b"3"), b"/* */" + plane(b"3"), plane(b"3,"), b"'" + plane(b"3") + b"'",
     plane(b"3").replace(b'"', b"'"), plane(b"undefined"), plane(b"None"), plane(b"True"), b"\x00" + plane(b"3"),
     plane(b"3")[:-1], plane(b"3") + b"\x00", b"\xc2\xa0" + plane(b"3"), b"\x0c" + plane(b"3")],
    ids=repr,
)  # fmt: skip
def test_what_is_almost_json_is_refused(ask, body):
    refused(ask(body), 400, "invalid_json")
