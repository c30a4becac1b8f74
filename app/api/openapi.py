"""The schema of the prediction routes, which FastAPI does not see because they are answered in front of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from app.api.errors import STATUS, json_response, responses
from app.api.predict import FIELDS, Predictor, request_id
from app.observer import Record

_ROW = {"oneOf": [{"type": "object"}, {"type": "array", "items": {}}, {"type": "string"}]}
_PROPERTIES: dict[str, Any] = {
    "model": {"type": "string", "description": "may be left out where one model is served"},
    "instances": {
        "type": "array",
        "minItems": 1,
        "items": _ROW,
        "description": "rows, as objects or as lists; null is missing",
    },
    "method": {"type": "string", "description": "predict unless given"},
    "version": {
        "oneOf": [{"type": "string"}, {"type": "integer"}],
        "description": "a loaded version",
    },
    "alias": {"type": "string", "description": "an alias that is served; production unless given"},
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
}
_ELSEWHERE = {"forbidden", "bucket_unreadable", "request_failed"}  # no prediction ends in these


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
    for path, endpoint in (("/predict", predict), ("/models/{name}/predict", predict_named)):
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
    record = request.scope.get("diskless.record") or Record("predict", request_id(request.scope))
    answer = await predictor.handle(request.scope, request.receive, name, record)
    if answer is None:
        return Response(status_code=499)  # nobody is there to read it
    return json_response(answer.status, answer.body, answer.headers)


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
