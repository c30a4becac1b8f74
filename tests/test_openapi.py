"""The API's document: what it says of each model is true, valid, and of what serves now; and a client made of it."""

from __future__ import annotations

import asyncio
import functools
import gc
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import joblib
import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import MultiLabelBinarizer

from app import inspection, publishing
from app.api import openapi, schemas
from app.api.openapi import Document, identifier
from app.errors import InvalidInput, RequestError, RequestTooLarge
from app.manifest import Golden
from app.model import Model
from app.model_storage import ModelStorageManager
from app.names import NAME, ModelRef
from app.registry import Entry, Registry, Slot, Snapshot, State
from app.runner import Result, Runner, Target
from app.signature import Signature, TensorSpec
from app.storage.local import LocalStorage
from demo import models as demo
from tests import toys, zoo
from tests.asgi import application, client, ready
from tests.generated import generated
from tests.json_schema import ANYTHING, fitting, spoiled, violations
from tests.service import AS_ADMIN, Service, running, serving_after
from tests.trusted import TRUST
from tests.zoo import BUILDERS, NEEDS_EXAMPLES, fitted

pytestmark = pytest.mark.usefixtures("one_thread")
REF = ModelRef("zoo", "1")
ODD = [
    "$",
    "a b",
    'a "quote"',
    "",
    "größe",
    "温度",
    "\u202e",
    "back\\slash",
    "line\nfeed",
    "$ref",
    "/",
    "~1",
    "{name}",
    "a_b",
]
MODELS = {
    "linear": "logistic, named",
    "mixed": "mixed, with times",
    "remainder": "mixed, remainder",
    "forest": "forest, several outputs",
    "texts": "texts",
    "counts": "texts, sparse",
    "records": "records",
    "categories": "histogram boosting, categories",
    "narrow": "ridge, float32",
    "whole": "ridge, int64",
    "switches": "ridge, bool",
    "pairs": "svc, one against one",
    "components": "pca",
    "clusters": "k-means",
    "outliers": "isolation forest",
    "gaps": "min-max",
}
COMPILED = ("linear", "forest", "clusters")
# Whoever asks for the document does not wait long for an example, and other tests keep this machine busy.
WITH_TIME = serving_after("from app.api import openapi; openapi.EXAMPLE_SECONDS = 60")
LIKE = ["a.b", "a-b", "a_b", "A_b", "a__b", "3d", "churn-v2"]


def publish(folder: Path, name: str, model: Any, examples: Any = None, *, compile: bool = False, **more: Any) -> None:
    ModelStorageManager(LocalStorage(folder), trust=TRUST).save(name, model, examples=examples, compile=compile, **more)


@functools.cache
def points(width: int = 3) -> Any:
    return np.random.default_rng(1).normal(size=(12, width)).round(3)


def odd() -> tuple[Any, pd.DataFrame]:
    frame = pd.DataFrame(points(len(ODD)), columns=ODD)
    return LinearRegression().fit(frame, points()[:, 0]), frame


@pytest.fixture(scope="module")
def folder(one_thread, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with models of every layout, with and without examples, and some that are strange."""
    path: Path = tmp_path_factory.mktemp("bucket")
    fill(path)
    return path


def fill(path: Path) -> None:
    for name, kind in MODELS.items():
        publish(path, name, fitted(kind).estimator, fitted(kind).data, compile=name in COMPILED)
    for name, train in demo.MODELS.items():
        trained = train()
        publish(path, name, trained.estimator, trained.frame.head(20))
    publish(path, "odd", *odd())
    publish(path, "wide", LinearRegression().fit(points(1000), points()[:, 0]), points(1000))
    publish(path, "sum", toys.Sum(), points())
    publish(path, "root", toys.Root(), np.vstack([-abs(points()[:1]), abs(points())]))
    publish(path, "lengths", toys.Lengths())
    linear = LinearRegression().fit(points(), points()[:, 0])
    for name in LIKE:
        publish(path, name, linear)
    joblib.dump(fitted("logistic").estimator, path / "models" / "bare.joblib")


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder), "ML_REFRESH_SECONDS": "3600", **more}


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    with running(environment(folder, ML_MAX_ROWS="500"), command=WITH_TIME) as service:
        yield service.wait_ready()


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    return service.client.get("/openapi.json").json()  # type: ignore[no-any-return]


def operation(document: dict[str, Any], name: str) -> dict[str, Any]:
    return document["paths"][f"/models/{name}/predict"]["post"]  # type: ignore[no-any-return]


def body(it: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a request or response as the document has it."""
    return it["content"]["application/json"]  # type: ignore[no-any-return]


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]  # type: ignore[no-any-return]


def request_schema(document: dict[str, Any], name: str) -> dict[str, Any]:
    return resolved(document, body(operation(document, name)["requestBody"])["schema"])


def answer_schema(document: dict[str, Any], name: str) -> dict[str, Any]:
    return resolved(document, body(operation(document, name)["responses"]["200"])["schema"])


def typed(document: dict[str, Any]) -> list[str]:
    found = (re.fullmatch(r"/models/([^{}/]+)/predict", path) for path in document["paths"])
    return [match[1] for match in found if match]


# The document


def test_it_is_valid(document):
    assert document["openapi"].startswith("3.1.")
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


def test_every_model_that_serves_has_a_path_of_its_own(service, document):
    serving = [row["name"] for row in service.status()["models"] if row["state"] == "READY"]

    assert typed(document) == sorted(serving)
    assert {"/predict", "/models/{name}/predict"} < set(document["paths"])


def test_operations_and_components_have_names_that_stay(document):
    names = {name: operation(document, name)["operationId"] for name in typed(document)}
    everything = [one["operationId"] for item in document["paths"].values() for one in item.values()]

    assert (names["linear"], names["a_b"]) == ("predict_linear", "predict_a_b")
    assert names["churn-v2"] == f"predict_churn_v2_{hashlib.sha256(b'churn-v2').hexdigest()[:8]}"
    assert len(set(everything)) == len(everything)
    assert {"LinearRow", "LinearRequest", "LinearAnswer"} < set(document["components"]["schemas"])
    assert all(re.fullmatch(r"[A-Za-z0-9]+", name) for name in document["components"]["schemas"])


@given(st.lists(st.from_regex(r"[A-Za-c0-2][A-Ca-c0-2._-]{0,5}", fullmatch=True), min_size=2, max_size=40, unique=True))
def test_no_two_names_get_the_same_identifier(names):
    assert all(NAME.match(name) for name in names)
    assert len({identifier(name) for name in names}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", identifier(name)) for name in names)


def test_a_name_that_looks_like_one_with_a_digest_gets_a_digest_too():
    imitation = identifier("a.b")

    assert imitation != "a_b"
    assert identifier(imitation) != imitation


@pytest.mark.parametrize("name", [*MODELS, "odd", "sum", "root"])
def test_each_example_fits_and_its_answer_is_the_models_own(service, document, name):
    it = operation(document, name)
    asked, answered = body(it["requestBody"]), body(it["responses"]["200"])
    methods = service.model(name)["methods"]

    assert list(asked["examples"]) == list(answered["examples"]) == methods
    for method in methods:
        request, answer = asked["examples"][method]["value"], answered["examples"][method]["value"]
        response = service.client.post(f"/models/{name}/predict", json=request)

        assert violations(request, asked["schema"], document["components"]) == []
        assert violations(answer, answered["schema"], document["components"]) == []
        assert (response.status_code, response.json()) == (200, answer)


def test_examples_are_golden_rows_as_objects_where_columns_have_names(document):
    request = body(operation(document, "linear")["requestBody"])["examples"]["predict"]["value"]
    matrix = body(operation(document, "narrow")["requestBody"])["examples"]["predict"]["value"]

    assert request == {"instances": zoo.NAMED[:2].to_dict("records")}
    assert matrix["instances"][0] == zoo.X[0].astype(np.float32).astype(float).tolist()


def test_what_is_no_number_is_null_in_an_example(document):
    rows = body(operation(document, "root")["requestBody"])["examples"]["predict"]["value"]["instances"]
    answer = body(operation(document, "root")["responses"]["200"])["examples"]["predict"]["value"]

    assert answer["predictions"] == [None if sum(row) < 0 else pytest.approx(sum(row) ** 0.5) for row in rows]
    assert None in answer["predictions"]


@pytest.mark.parametrize("name", ["bare", "lengths", "a.b"])
def test_a_model_without_golden_rows_has_a_path_without_examples(document, name):
    it = operation(document, name)

    assert "examples" not in body(it["requestBody"])
    assert "published without examples" in it["description"]


def test_every_model_has_the_errors_of_the_general_path(document):
    general = operation(document, "{name}")["responses"]
    for name in typed(document):
        responses = operation(document, name)["responses"]

        assert {status: it for status, it in responses.items() if status != "200"} == {
            status: it for status, it in general.items() if status != "200"
        }


def test_it_is_the_same_bytes_each_time_and_in_every_process(tmp_path):
    publish(tmp_path, "linear", fitted("logistic, named").estimator, fitted("logistic, named").data)
    publish(tmp_path, "texts", fitted("texts").estimator, fitted("texts").data)
    with running(environment(tmp_path), command=WITH_TIME) as one:
        whole = {one.wait_ready().client.get("/openapi.json").content for _ in range(2)}
    with running(environment(tmp_path, ML_WORKERS="2")) as several:
        several.wait_ready()
        found: dict[int, bytes] = {}
        while len(found) < 2:
            with httpx.Client(base_url=several.url, trust_env=False, timeout=30, headers=AS_ADMIN) as fresh:
                pid = fresh.get("/models/status").json()["workers"]["pid"]
                found[pid] = fresh.get("/openapi.json").content

    assert {*found.values()} == whole
    assert typed(json.loads(whole.pop())) == ["linear", "texts"]


# What it says of columns


def test_columns_are_typed_required_and_closed(document):
    row = document["components"]["schemas"]["MixedRow"]

    assert row["properties"] == {
        "age": {"type": ["integer", "null"], "format": "int64"},
        "income": {"type": ["number", "null"]},
        "plan": {"type": ["string", "null"]},
        "active": {"type": "boolean"},
        "since": {
            "type": "string",
            "pattern": "^[0-9]{4}-?([0-9]{2}|W[0-9]{2})",
            "description": "an ISO 8601 date-time without an offset",
        },
        "note": {"type": "string"},
        "unused": {"description": "not read"},
    }
    assert row["required"] == ["age", "income", "plan", "active", "since", "note"]
    assert row["additionalProperties"] is False


def test_columns_have_the_names_that_they_have(document):
    assert list(document["components"]["schemas"]["OddRow"]["properties"]) == ODD


def test_methods_are_listed(document):
    listed, null = request_schema(document, "linear")["properties"]["method"]["oneOf"]
    methods = ["predict", "predict_proba", "predict_log_proba", "decision_function"]

    assert resolved(document, listed) == {"type": "string", "enum": methods}
    assert null == {"type": "null"}


def predictions(document: dict[str, Any], name: str) -> list[Any]:
    """The forms of one row's prediction."""
    schema = answer_schema(document, name)["properties"]["predictions"]
    return [one["items"] for one in schema.get("anyOf", [schema])]


NUMBER = {"type": ["number", "null"]}


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("linear", [{"type": "boolean"}, {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}, NUMBER]),
        ("narrow", [NUMBER]),
        ("outliers", [{"type": "integer"}, NUMBER]),
        ("components", [{"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}, NUMBER]),
        (
            "forest",
            [
                {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
                {
                    "type": "array",
                    "items": {"type": "array", "items": NUMBER, "minItems": 3, "maxItems": 3},
                    "minItems": 2,
                    "maxItems": 2,
                },
            ],
        ),
        ("sum", [{}]),
        ("lengths", [{}]),
    ],
)
def test_answers_are_typed_by_method(document, name, forms):
    assert predictions(document, name) == forms


def test_classes_are_told(document):
    flat = answer_schema(document, "remainder")["properties"]["classes"]
    nested = answer_schema(document, "forest")["properties"]["classes"]

    assert (flat["items"], flat["examples"]) == ({"type": "integer"}, [[0, 1, 2]])
    assert (nested["items"], nested["examples"]) == (
        {"type": "array", "items": {"type": "string"}},
        [[["ant", "bee", "Ω"], ["0", "1", "2"]]],
    )
    for without in ("narrow", "pairs"):
        assert "classes" not in answer_schema(document, without)["properties"]


def test_a_thousand_columns_are_described_together(document):
    it, components = request_schema(document, "wide"), document["components"]["schemas"]
    size = sum(len(json.dumps(components[f"Wide{part}"])) for part in ("Row", "Request", "Answer"))

    assert size < 5000
    assert components["WideRow"]["minProperties"] == components["WideRow"]["maxProperties"] == 1000
    assert violations({"instances": points(1000).tolist()}, it, document["components"]) == []
    assert violations({"instances": points(999).tolist()}, it, document["components"]) != []


@pytest.mark.parametrize("width", [1, schemas.MAX_COLUMNS, schemas.MAX_COLUMNS + 1, 30_000])
def test_the_size_of_what_is_said_of_columns_is_bounded(width):
    inputs = tuple(TensorSpec(name=f"x{place}", datatype="FP64" if place % 2 else "INT64") for place in range(width))
    row = schemas.row(Signature(layout="frame", inputs=inputs, methods=("predict",)))
    listed = width <= schemas.MAX_COLUMNS

    assert ("properties" in (row.record or {})) == listed
    assert len(json.dumps([row.record, row.others])) < schemas.MAX_ROW_BYTES


def test_names_of_any_length_do_not_make_it_long():
    inputs = tuple(TensorSpec(name=f"{place}" * 5000, datatype="FP64") for place in range(20))
    row = schemas.row(Signature(layout="frame", inputs=inputs, methods=("predict",)))

    assert row.record is not None
    assert row.record["minProperties"] == 20
    assert "properties" not in row.record


def test_two_columns_of_one_name_must_both_take_the_value():
    inputs = (TensorSpec(name="a", datatype="FP64"), TensorSpec(name="a", datatype="INT64", nullable=False))
    row = schemas.row(Signature(layout="frame", inputs=inputs, methods=("predict",)))

    assert row.record is not None
    assert row.record["required"] == ["a"]
    assert violations({"a": 1}, row.record, {}) == []
    assert violations({"a": None}, row.record, {}) != []


@pytest.mark.parametrize(
    ("more", "free"),
    [({}, False), ({"extra_columns": "ignore"}, True), ({"ignored": ("b",)}, False)],
)
def test_further_columns_are_allowed_where_they_are_ignored(more, free):
    sign = Signature(layout="frame", inputs=(TensorSpec(name="a", datatype="FP64"),), methods=("predict",), **more)
    record = schemas.row(sign).record
    assert record is not None

    assert (violations({"a": 1, "c": [{}]}, record, {}) == []) == free
    assert (violations({"a": 1, "b": [{}]}, record, {}) == []) == (free or bool(sign.ignored))


# What it says is true


@functools.cache
def loaded(name: str, published: bool) -> Model:
    it = fitted(name)
    if not published:
        return Model(REF, inspection.infer([], it.estimator), it.estimator)
    part = publishing.part_from_object("model", it.estimator)
    draft = publishing.draft({"model": part}, it.data[:20], trust=TRUST)
    return Model(REF, draft.signature, it.estimator, golden=draft.golden)


KINDS = [
    pytest.param(name, published, id=f"{name}, {'published' if published else 'bare'}")
    for name in BUILDERS
    for published in (False, True)
    if published or name not in NEEDS_EXAMPLES
]


def answered(model: Model, instances: Any, method: str) -> dict[str, Any] | None:
    """The body of the answer to instances; None where they are refused as the document says that they may be."""
    try:
        rows = model.signature.validate(instances)
        with np.errstate(all="ignore"):
            result = Result(model.predict(rows, method))
    except (InvalidInput, RequestTooLarge):
        return None
    return orjson.loads(Target(model, method).encode(result, 0, rows.count))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "published"), KINDS)
def test_what_fits_is_answered_or_refused_and_what_is_answered_fits(name, published):
    model = loaded(name, published)
    forms = schemas.row(model.signature)
    components = {"schemas": {"Row": forms.record}}
    rows = [*([{"$ref": "#/components/schemas/Row"}] if forms.record else []), *forms.others]
    row = {"oneOf": rows} if len(rows) > 1 else rows[0]
    request = schemas.request("zoo", model.signature, row, schemas.methods(model.signature), max_rows=100)
    instances, answer = request["properties"]["instances"], schemas.answer(model)
    right = fitting(instances, components)

    @generated(12)
    @given(right, spoiled(right), st.sampled_from(model.signature.methods))
    def check(right, wrong, method):
        told = answered(model, orjson.loads(json.dumps(right)), method)
        assert told is None or violations(told, answer, components) == []
        told = answered(model, orjson.loads(json.dumps(wrong)), method)
        if told is not None:
            assert violations(wrong, instances, components) == []
            assert violations(told, answer, components) == []

    check()


@pytest.mark.parametrize("name", [*MODELS, "odd", "sum", "lengths", "bare", "churn-v2"])
def test_the_service_answers_what_fits_and_what_it_answers_fits(service, document, name):
    asked, components = request_schema(document, name), document["components"]
    responses = operation(document, name)["responses"]
    right = fitting(asked, components)

    @generated(20)
    @given(right, spoiled(right), spoiled(spoiled(right)))
    def check(right, wrong, worse):
        for request in (right, wrong, worse):
            response = service.client.post(f"/models/{name}/predict", content=json.dumps(request))
            status, told = response.status_code, response.json()
            assert status < 500, told
            assert str(status) in responses
            assert violations(told, body(responses[str(status)])["schema"], components) == [], told
            if status == 200:
                assert violations(request, asked, components) == []
            if request is right:
                chosen = {key for key in ("version", "alias") if request.get(key) is not None}
                assert status in ({200, 422} | ({400, 404} if chosen else set())), told

    check()


@given(ANYTHING)
@generated(200)
def test_whatever_is_accepted_without_columns_fits(value):
    sign = Signature(layout="matrix", inputs=(), methods=("predict",))
    (form,) = schemas.row(sign).others
    for instances in ([value], [[1.0, 2.0], value]):
        try:
            sign.validate(instances)
        except RequestError:
            continue
        assert all(violations(row, form, {}) == [] for row in instances)


def test_a_list_of_labels_may_be_of_any_length():
    labels = MultiLabelBinarizer().fit([["x", "y"], ["z"]])
    targets = labels.transform([["x"], ["x"], ["y", "z"], []] * 3)
    model = MLPClassifier((4,), max_iter=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not trained to its end
        model.fit(points(), targets)
    parts = {role: publishing.part_from_object(role, it) for role, it in (("encoder", labels), ("model", model))}
    draft = publishing.draft(parts, points(), trust=TRUST)
    served = Model(REF, draft.signature, model, [labels], golden=draft.golden)
    form = schemas.answer(served)["properties"]["predictions"]

    assert {"type": "array", "items": {"type": "array", "items": {"type": "string"}}, "minItems": 1} in form["anyOf"]
    for count in range(4):
        assert violations([["x"] * count], form, {}) == []


# What serves now


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Any]:
    return {"ML_CLOUD_ONLY": False, "ML_LOCAL_DIR": tmp_path, "ML_REFRESH_SECONDS": 3600}


async def read(http: httpx.AsyncClient) -> dict[str, Any]:
    response = await http.get("/openapi.json")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    return response.json()  # type: ignore[no-any-return]


def columns(document: dict[str, Any]) -> list[str]:
    return list(document["components"]["schemas"]["ChurnRow"]["properties"])


async def test_it_follows_a_hot_swap(tmp_path, local):
    frame = pd.DataFrame(points(), columns=["a", "b", "c"])
    other = frame.rename(columns={"c": "d"})
    target = points()[:, 0]
    await asyncio.to_thread(publish, tmp_path, "churn", LinearRegression().fit(frame, target), frame)
    async with application(**local) as app, client(app) as http:
        await ready(app)
        before = await read(http)
        await asyncio.to_thread(publish, tmp_path, "churn", LinearRegression().fit(other, target), other, promote=True)
        await asyncio.to_thread(publish, tmp_path, "second", LinearRegression().fit(other, target), other)
        await http.post("/models/refresh")
        after = await read(http)

    assert (columns(before), columns(after)) == (["a", "b", "c"], ["a", "b", "d"])
    assert (typed(before), typed(after)) == (["churn"], ["churn", "second"])
    assert "version `2`" in operation(after, "churn")["description"]


async def test_it_is_put_together_once_for_what_serves(tmp_path, local):
    await asyncio.to_thread(publish, tmp_path, "sum", toys.Sum(), points())
    async with application(**local) as app:
        await ready(app)
        document = Document(app.registry, app.rest.openapi, max_rows=10)
        first = await document.read()
        app.registry.swap(Snapshot(dict(app.registry.snapshot.entries)))  # another snapshot of the same versions
        again, at_once = await document.read(), await asyncio.gather(*(document.read() for _ in range(5)))

    assert again is first
    assert all(it is first for it in at_once)


async def test_it_keeps_no_model_that_serves_no_more():
    model = Model(REF, Signature(layout="matrix", inputs=(), methods=("predict",)), toys.Sum())
    registry = Registry()
    registry.swap(Snapshot({"zoo": Entry({"1": Slot(REF, State.READY, runner=Runner(model))}, {"production": "1"})}))
    base = {"openapi": "3.1.0", "paths": {openapi._GENERIC: {"post": {"operationId": "x", "responses": {}}}}}
    document = Document(registry, lambda: base | {"components": {"schemas": {}}}, max_rows=10)
    assert b'"/models/zoo/predict"' in await document.read()
    gone = weakref.ref(model)

    for runner in registry.swap(Snapshot({})):
        await runner.retire()
    del model, runner

    async with asyncio.timeout(30):
        while gone() is not None:  # the thread that described it lets go of it in its own time
            gc.collect()
            await asyncio.sleep(0)
    assert b'"/models/zoo/predict"' not in await document.read()


async def test_a_model_that_cannot_be_described_takes_no_other_with_it(tmp_path, local, caplog):
    for name in ("fine", "strange"):
        fit = LogisticRegression().fit(points(), points()[:, 0] > 0)
        await asyncio.to_thread(publish, tmp_path, name, fit)
    async with application(**local) as app, client(app) as http:
        await ready(app)
        strange = app.registry.get("strange").model
        strange.signature = strange.signature.model_copy(update={"classes": [10**30, 1]})
        document = await read(http)

    assert typed(document) == ["fine"]
    assert [record.fields["model"] for record in caplog.records if "left out" in record.message] == ["strange"]


async def test_an_example_that_does_not_come_in_time_is_left_out(monkeypatch):
    monkeypatch.setattr(openapi, "EXAMPLE_SECONDS", 0.1)
    toys.GATE.clear()
    sign = Signature(layout="matrix", inputs=(TensorSpec(name="a", datatype="FP64"),), methods=("predict",))
    model = Model(REF, sign, toys.Waits(), golden=Golden(instances=[[1.0]], outputs={"predict": [1.0]}))
    try:
        found = await openapi.examples(Runner(model))
    finally:
        toys.GATE.set()

    assert found == {}


# A generated client


@pytest.fixture(scope="module")
def generated_client(service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """What imports a module of a client that was generated from the running service's document."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "config.yaml").write_text("post_hooks: []")  # it would be formatted
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    paths = ["--config", "config.yaml", "--output-path", "diskless_client"]
    done = subprocess.run(
        [*command, *paths, "--url", f"{service.url}/openapi.json"],
        cwd=folder,
        env={**os.environ, "NO_PROXY": "*", "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    try:
        yield lambda name: importlib.import_module(f"diskless_client{name}")
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "diskless_client"]:
            del sys.modules[name]


def asked_of_a_client(module: Callable[[str], Any], url: str, name: str, rows: list[Any], method: str) -> Any:
    """Call a model through the generated client, its classes for all that is sent and comes back."""
    title = "".join(word.capitalize() for word in name.split("_"))
    models, operation = module(".models"), module(f".api.predictions.predict_{name}")
    request = getattr(models, f"{title}Request")(instances=rows, method=getattr(models, f"{title}Method")(method))
    with module("").Client(base_url=url, httpx_args={"trust_env": False}) as http:
        answer = operation.sync(client=http, body=request)
    assert type(answer).__name__ == f"{title}Answer"
    return answer


@pytest.mark.parametrize("name", demo.MODELS)
def test_a_generated_client_can_call_each_demo_model(service, generated_client, name):
    trained = demo.MODELS[name]()
    frame = trained.frame.head(5)
    kind = getattr(generated_client(".models"), f"{name.capitalize()}Row")
    rows = [kind(*row.values()) for row in demo.records(frame)]
    for method in service.model(name)["methods"]:
        answer = asked_of_a_client(generated_client, service.url, name, rows, method)
        with np.errstate(divide="ignore"):
            expected = getattr(trained.estimator, method)(frame)

        if expected.dtype.kind == "f":  # of a part of a frame, the last digit may be another
            found = np.array(answer.predictions, dtype=float)  # null becomes NaN
            np.testing.assert_allclose(found, np.where(np.isfinite(expected), expected, np.nan), rtol=1e-12, atol=0)
        else:
            assert answer.predictions == expected.tolist()
        if method == "predict_proba":
            assert answer.classes == trained.estimator.classes_.tolist()


def test_a_generated_client_can_call_models_of_texts_records_and_arrays(service, generated_client):
    texts, records, forest = (fitted(kind).estimator for kind in ("texts", "records", "forest, several outputs"))
    record = generated_client(".models").RecordsRow.from_dict
    ask = functools.partial(asked_of_a_client, generated_client, service.url)

    assert ask("texts", zoo.TEXTS[:5], "predict").predictions == texts.predict(zoo.TEXTS[:5]).tolist()
    assert ask("records", [record(row) for row in zoo.RECORDS[:5]], "predict").predictions == (
        records.predict(zoo.RECORDS[:5]).tolist()
    )
    assert ask("forest", zoo.NAMED[:5].to_numpy().tolist(), "predict_proba").predictions == [
        list(pair) for pair in zip(*(part.tolist() for part in forest.predict_proba(zoo.NAMED[:5])), strict=True)
    ]


def test_a_generated_client_is_told_what_is_wrong(service, generated_client):
    models, operation = generated_client(".models"), generated_client(".api.predictions.predict_wine")
    with generated_client("").Client(base_url=service.url, httpx_args={"trust_env": False}) as http:
        answer = operation.sync_detailed(client=http, body=models.WineRequest(instances=[[1.0]]))

    assert answer.status_code == 422
    assert (answer.parsed.error, answer.parsed.violations[0].expected) == ("invalid_input", "13 values")


# Who may call what


def secured(keys_required: bool) -> dict[str, Any]:
    def base() -> dict[str, Any]:
        paths = ["/predict", "/models/status", "/models/refresh", "/metrics", "/health", openapi._GENERIC]
        item = {"responses": {"200": {"description": "fine"}}}
        return {
            "openapi": "3.1.0",
            "paths": {path: {"post": {"operationId": path, **item}} for path in paths},
            "components": {"schemas": {"ErrorBody": {}}},
        }

    return json.loads(asyncio.run(Document(Registry(), base, max_rows=1, keys_required=keys_required).read()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("keys_required", [False, True])
def test_security_is_told_by_route(keys_required):
    paths = secured(keys_required)["paths"]
    either = [{"bearer": []}, {"header": []}]
    admin = [{"bearer": ["admin"]}, {"header": ["admin"]}]
    found = {path: item["post"].get("security") for path, item in paths.items()}

    assert found == {
        "/predict": either if keys_required else None,
        "/models/{name}/predict": either if keys_required else None,
        "/models/status": either,
        "/models/refresh": admin,
        "/metrics": admin,
        "/health": None,
    }
    for path, item in paths.items():
        assert ("401" in item["post"]["responses"]) == (found[path] is not None)
        assert ("403" in item["post"]["responses"]) == (path in ("/models/status", "/models/refresh", "/metrics"))


async def test_a_models_path_asks_for_what_the_general_one_asks_for(tmp_path, local):
    await asyncio.to_thread(publish, tmp_path, "sum", toys.Sum(), points())
    async with application(**local) as app:
        await ready(app)
        for keys_required in (False, True):
            document = Document(app.registry, app.rest.openapi, max_rows=10, keys_required=keys_required)
            told = orjson.loads(await document.read())

            assert operation(told, "sum").get("security") == operation(told, "{name}").get("security")
            assert ("401" in operation(told, "sum")["responses"]) == keys_required
            assert [error.message for error in OpenAPIV31SpecValidator(told).iter_errors()] == []


async def test_where_it_is_mounted_the_document_says_so(tmp_path, local):
    await asyncio.to_thread(publish, tmp_path, "sum", toys.Sum(), points())
    async with application(**local) as app:
        await ready(app)
        async with client(app) as http, client(app, root_path="/ml") as below:
            plain, mounted = await read(http), (await below.get("/ml/openapi.json")).json()

    assert "servers" not in plain
    assert mounted == {"servers": [{"url": "/ml"}], **plain}
