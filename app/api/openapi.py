"""The OpenAPI document: what FastAPI tells of its routes, the prediction routes, and a path of its own for each model that serves.

FastAPI does not see predictions, because they are answered in front of it. What a model's path says is read off the model
(`schemas.py`), once for each version that serves; the document is put together anew when other versions do.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import re
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from app.api import schemas
from app.api.errors import STATUS, json_response, responses
from app.api.predict import FIELDS, Predictor, request_id
from app.model import Model
from app.observer import RECORD, Record
from app.registry import Registry
from app.runner import Result, Runner
from app.service_counters import Route
from app.worker import Worker

logger = logging.getLogger("diskless.api")
EXAMPLE_ROWS = 2
EXAMPLE_SECONDS = 5.0  # for one answer: whoever asks for the document waits for it
MAX_EXAMPLE_BYTES = 8 * 1024  # of one request, or of its answer
MAX_EXAMPLES_BYTES = 32 * 1024  # of all examples of a model

_ROW = {"oneOf": [{"type": "object"}, {"type": "array", "items": {}}, {"type": "string"}]}
_LABEL: dict[str, Any] = {"type": ["string", "null"], "minLength": 1, "maxLength": 100}
_PROPERTIES: dict[str, Any] = {
    "model": {**_LABEL, "description": "may be left out where one model is served"},
    "instances": {
        "type": "array",
        "minItems": 1,
        "items": _ROW,
        "description": "rows, as objects or as lists; null is missing",
    },
    "method": {**_LABEL, "description": "predict unless given"},
    **schemas.ENVELOPE,
}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "required": ["model", "version", "predictions"],
    "properties": {
        "model": {"type": "string"},
        "version": {"type": "string"},
        "predictions": {"type": "array", "items": {}, "description": "one for each row; null where it is no number"},
        "classes": {
            "type": "array",
            "items": {},
            "description": "the classes that the numbers of a row belong to, in order",
        },
    },
}
_REQUEST: dict[str, Any] = {
    "type": "object",
    "required": ["instances"],
    "properties": {field: _PROPERTIES[field] for field in FIELDS},
    "additionalProperties": False,
    "not": schemas.NOT_BOTH,
}
# No prediction ends in these, and in the first only where keys are asked for.
_ELSEWHERE = {"unauthorized", "forbidden", "bucket_unreadable", "request_failed"}
_GENERIC = "/models/{name}/predict"

_PREDICTIONS = {"/predict", _GENERIC}
_WITH_A_KEY = {"/models/status"}
_FOR_ADMINS = {"/models/refresh", "/metrics"}
_SCHEMES: dict[str, dict[str, str]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "a key, as `Authorization: Bearer KEY`"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "a key, as `X-API-Key: KEY`"},
}


def router(predictor: Predictor) -> APIRouter:
    """Return the prediction routes as FastAPI documents them, and as it answers them when it is mounted alone."""
    routes = APIRouter(tags=["predictions"])

    async def predict(request: Request) -> Response:
        """Predict for the rows in `instances`."""
        return await _through_fastapi(predictor, request, None)

    async def predict_named(name: str, request: Request) -> Response:
        """Predict with the model that the path names."""
        return await _through_fastapi(predictor, request, name)

    answers: dict[int | str, dict[str, Any]] = {
        200: {"description": "One prediction for each row", "content": _json(_ANSWER)}
    }
    for path, endpoint in (("/predict", predict), (_GENERIC, predict_named)):
        routes.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            operation_id=endpoint.__name__,
            openapi_extra={"requestBody": {"required": True, "content": _json(_REQUEST)}},
            responses=answers | responses(*(code for code in STATUS if code not in _ELSEWHERE)),
        )
    return routes


async def _through_fastapi(predictor: Predictor, request: Request, name: str | None) -> Response:
    record = request.scope.get(RECORD) or Record(Route.PREDICT, request_id(request.scope))
    answer = await predictor.handle(request.scope, request.receive, name, record)
    if answer is None:
        return Response(status_code=499)  # nobody is there to read it
    return json_response(answer.status, answer.body, answer.headers)


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _refusals(*codes: str) -> dict[str, Any]:
    """Return the responses for errors that the keys' check answers with."""
    error = _json(_reference("ErrorBody"))
    return {str(STATUS[code]): {"description": f"`{code}`", "content": error} for code in codes}


class Described(NamedTuple):
    """What is told of one version: the operation and its components as JSON, by the names that they have."""

    operation_id: str
    operation: bytes
    components: dict[str, bytes]


class Document:
    """The document's bytes, as of what serves now. Belongs to the event loop.

    It refers to no model that serves no more: their memory is free with their last request.
    """

    def __init__(
        self,
        registry: Registry,
        base: Callable[[], dict[str, Any]],
        *,
        max_rows: int,
        keys_required: bool = False,
    ) -> None:
        self._registry = registry
        self._make_base = base
        self._max_rows = max_rows
        self._keys_required = keys_required
        self._base: dict[str, Any] | None = None
        self._described: weakref.WeakKeyDictionary[Runner, Described | None] = weakref.WeakKeyDictionary()
        self._of: dict[str, weakref.ref[Runner]] | None = None  # what the body is about
        self._body = b""
        self._turn = asyncio.Lock()

    async def read(self) -> bytes:
        """Return the document as JSON: the same bytes as long as the same versions serve, in every process."""
        if self._of != self._serving():
            async with self._turn:
                serving = self._serving()
                if self._of != serving:
                    await self._describe(serving)
                    self._of, self._body = serving, self._put_together(serving)
        return self._body

    def of_no_model(self) -> bytes:
        """Return the document without the models: their columns and examples are for those who may ask them."""
        return self._put_together({})

    def _serving(self) -> dict[str, weakref.ref[Runner]]:
        """Return what answers for each name when a request says no more. References to the same runner are equal."""
        found = ((name, self._registry.plain(name)) for name in sorted(self._registry.snapshot.entries))
        return {name: weakref.ref(runner) for name, runner in found if runner is not None}

    async def _describe(self, serving: dict[str, weakref.ref[Runner]]) -> None:
        """Describe what is not described yet, on a thread: it may have thousands of columns."""
        base = self._document()
        errors = {code: it for code, it in base["paths"][_GENERIC]["post"]["responses"].items() if code != "200"}
        security = self._security(_GENERIC)
        worker = Worker("openapi")
        try:
            for name, reference in serving.items():
                runner = reference()
                if runner is None or runner in self._described:
                    continue
                try:
                    shown = await examples(runner)
                    self._described[runner] = await worker.run(
                        described, name, runner.model, shown, errors, max_rows=self._max_rows, security=security
                    )
                except Exception:  # one that cannot be told of, or not as JSON, must not take the others with it
                    logger.exception("a model is left out of the API's document", extra={"fields": {"model": name}})
                    self._described[runner] = None
                del runner
        finally:
            worker.close()

    def _put_together(self, serving: dict[str, weakref.ref[Runner]]) -> bytes:
        base = self._document()
        components: dict[str, Any] = dict(base["components"]["schemas"])
        taken = {operation["operationId"] for item in base["paths"].values() for operation in item.values()}
        paths: dict[str, Any] = {}
        for name, reference in serving.items():
            runner = reference()
            told = self._described.get(runner) if runner is not None else None
            if told is None or told.operation_id in taken or not components.keys().isdisjoint(told.components):
                continue
            taken.add(told.operation_id)
            paths[f"/models/{name}/predict"] = {"post": orjson.Fragment(told.operation)}
            components |= {key: orjson.Fragment(schema) for key, schema in told.components.items()}
        whole = base | {
            "paths": paths | base["paths"],
            "components": {**base["components"], "schemas": dict(sorted(components.items()))},
        }
        return orjson.dumps(whole)

    def _document(self) -> dict[str, Any]:
        """Return what does not depend on models: FastAPI's document, with who may call what in it."""
        if self._base is None:
            base = copy.deepcopy(self._make_base())  # FastAPI keeps it
            for path, item in base["paths"].items():
                for operation in item.values():
                    if security := self._security(path):
                        operation["security"] = security
                        codes = ("unauthorized",) if path in _PREDICTIONS else ("unauthorized", "forbidden")
                        operation["responses"] = dict(sorted((_refusals(*codes) | operation["responses"]).items()))
            base["components"]["securitySchemes"] = _SCHEMES
            self._base = base
        return self._base

    def _security(self, path: str) -> list[dict[str, list[str]]]:
        """Return what a route asks for, either of which is enough; nothing where it is open to all."""
        if path in _FOR_ADMINS:
            return [{scheme: ["admin"]} for scheme in _SCHEMES]
        if path in _WITH_A_KEY or (path in _PREDICTIONS and self._keys_required):
            return [{scheme: []} for scheme in _SCHEMES]
        return []


Examples = dict[str, tuple[bytes, bytes]]
"""A request and its answer, by method."""


def described(
    name: str,
    model: Model,
    shown: Examples,
    errors: dict[str, Any],
    *,
    max_rows: int,
    security: list[dict[str, list[str]]],
) -> Described:
    """Return what is told of a model under its name. Raises whatever a strange model makes it raise.

    `errors` are the responses that every prediction may have, `security` is what the route asks for.
    """
    signature = model.signature
    identity = identifier(name)
    title = "".join(word.capitalize() for word in identity.split("_"))
    forms = schemas.row(signature)
    components: dict[str, Any] = {}
    rows = [*forms.others]
    if forms.record is not None:
        components[f"{title}Row"] = forms.record
        rows.insert(0, _reference(f"{title}Row"))
    row = {"oneOf": rows} if len(rows) > 1 else rows[0]
    components[f"{title}Method"] = schemas.methods(signature)
    components[f"{title}Request"] = schemas.request(
        name, signature, row, _reference(f"{title}Method"), max_rows=max_rows
    )
    components[f"{title}Answer"] = schemas.answer(model)
    requests = {method: {"value": orjson.Fragment(request)} for method, (request, _) in shown.items()}
    answers = {method: {"value": orjson.Fragment(answer)} for method, (_, answer) in shown.items()}
    operation_id = f"predict_{identity}"
    operation: dict[str, Any] = {
        "tags": ["predictions"],
        "summary": f"Predict with {name}",
        "description": _description(model, bool(shown)),
        "operationId": operation_id,
        "requestBody": {"required": True, "content": _content(f"{title}Request", requests)},
        "responses": {
            "200": {"description": "One prediction for each row", "content": _content(f"{title}Answer", answers)},
            **errors,
        },
        **({"security": security} if security else {}),
    }
    return Described(
        operation_id, orjson.dumps(operation), {key: orjson.dumps(schema) for key, schema in components.items()}
    )


def _reference(component: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{component}"}


def _content(component: str, shown: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(component), **({"examples": shown} if shown else {})}}


def _description(model: Model, has_examples: bool) -> str:
    text = (
        f"What is said here is of version `{model.ref.version}`, which answers unless `version` or `alias` asks for another; "
        "that may take other columns, and give other answers."
    )
    if model.golden is None:
        text += " It was published without examples: what its columns hold and what its answers look like is said as far as it is certain."
    elif not has_examples:
        text += " A row is too long to be shown as an example."
    return text


_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z][a-z0-9]*)*\Z")
_DIGEST = re.compile(r"(.*_)?[0-9a-f]{8}\Z")


def identifier(name: str) -> str:
    """Return a model's name as programs can have it: words with `_` between them. No two names get the same.

    It depends on nothing but the name, so that it stays whatever else is served. What is no such word already, or is the same as
    another one to a generator of code that puts its words together in its own way, gets a digest of the name behind it.
    """
    if _SNAKE.match(name) and not _DIGEST.match(name):
        return name
    return "_".join([*re.findall(r"[a-z0-9]+", name.lower()), hashlib.sha256(name.encode()).hexdigest()[:8]])


async def examples(runner: Runner) -> Examples:
    """Return a request for each method with the model's own answer to it, the default one first.

    The rows are golden ones, as objects where their columns have names. What would be too long to read is left out, and all
    that the model has not answered in time.
    """
    model, left = runner.model, MAX_EXAMPLES_BYTES
    signature = model.signature
    rows = _example_rows(model)
    found: Examples = {}
    for method in sorted(signature.methods, key=lambda method: method != signature.default_method) if rows else ():
        chosen = {} if method == signature.default_method else {"method": method}
        request = orjson.dumps({"instances": rows} | chosen)
        try:
            async with asyncio.timeout(EXAMPLE_SECONDS):
                prediction = await runner.predict_aside(signature.validate(rows), method)
        except Exception as error:  # whatever a model may raise, TimeoutError among it: the rest can be told without
            fields = {"model": str(model.ref), "method": method, "error": type(error).__name__}
            logger.warning("a model gave no example of its answers", extra={"fields": fields})
            break
        answer = runner.targets[method].encode(Result(prediction), 0, len(rows))
        if len(answer) <= MAX_EXAMPLE_BYTES and len(request) + len(answer) <= left:
            left -= len(request) + len(answer)
            found[method] = (request, answer)
    return found


def _example_rows(model: Model) -> list[Any]:
    """Return the first golden rows, as many as are short enough."""
    if model.golden is None:
        return []
    signature = model.signature
    names = [spec.name for spec in signature.inputs]
    for count in range(EXAMPLE_ROWS, 0, -1):
        rows = model.golden.instances[:count]
        forms = [rows]
        if signature.layout == "frame" and len(set(names)) == len(names):
            forms.insert(0, [dict(zip(names, row, strict=True)) if isinstance(row, list) else row for row in rows])
        for form in forms:
            if len(orjson.dumps(form)) <= MAX_EXAMPLE_BYTES:
                return form
    return []
