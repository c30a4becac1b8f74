"""The one table from an error's code to its status, and the body that every route's errors have."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Request
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import log
from app.errors import DisklessError, RateLimited, RequestError, Unauthorized, UnsupportedEncoding
from app.names import shortened
from app.observer import RECORD

logger = logging.getLogger("diskless.api")

STATUS = {
    "invalid_json": 400,
    "invalid_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "model_not_found": 404,
    "request_timeout": 408,
    "request_too_large": 413,
    "unsupported_encoding": 415,
    "invalid_input": 422,
    "overloaded": 429,
    "rate_limited": 429,
    "headers_too_large": 431,
    "request_failed": 500,
    "internal_error": 500,
    "prediction_failed": 500,
    "model_not_ready": 503,
    "bucket_unreadable": 503,
    "prediction_timeout": 504,
}
_BY_STATUS = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    422: "invalid_request",
}
MAX_SHOWN = 100  # characters of a request's own words that an error repeats


class ViolationBody(BaseModel):
    """One thing wrong with the input."""

    path: str = Field(examples=["instances[3].age"])
    expected: str = Field(examples=["FP64"])
    got: str = Field(examples=['"old"'])


class ErrorBody(BaseModel):
    """What every error looks like. `error` is for programs, `detail` for people."""

    error: str = Field(examples=["invalid_input"])
    detail: str
    violations: list[ViolationBody] | None = Field(default=None, max_length=20)


def responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of a route that may answer with these errors."""
    by_status: dict[int | str, list[str]] = {}
    for code in codes:
        by_status.setdefault(STATUS[code], []).append(code)
    return {
        status: {"model": ErrorBody, "description": " or ".join(f"`{code}`" for code in found)}
        for status, found in by_status.items()
    }


def encode(error: RequestError) -> tuple[int, bytes, dict[str, str]]:
    """Return an error's status, its body as JSON, and the headers it adds."""
    pause = error.retry_after_seconds
    headers = {} if pause is None else {"retry-after": str(pause)}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    elif isinstance(error, UnsupportedEncoding):
        headers["accept-encoding"] = "gzip"  # as RFC 9110, 12.5.3 has it for answers
    elif isinstance(error, RateLimited):  # draft-ietf-httpapi-ratelimit-headers-10
        headers["ratelimit-policy"] = f'"requests";q={error.requests};w={error.seconds}'
        headers["ratelimit"] = f'"requests";r=0;t={pause}'
    return STATUS[error.code], _dumps(error.body()), headers


def internal() -> tuple[int, bytes, dict[str, str]]:
    """Return the answer to a fault of ours: nothing but where to look for it."""
    current = log.request_id.get()
    where = f", under request id {current}" if current else ""
    body = {"error": "internal_error", "detail": f"something went wrong here; the service's log says what{where}"}
    return STATUS["internal_error"], _dumps(body), {}


def json_response(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response of JSON bytes."""
    return Response(body, status, dict(headers or {}), media_type="application/json")


async def on_error(request: Request, error: Exception) -> Response:
    """Answer an error of ours that a FastAPI route raised, or anything else that one did."""
    if isinstance(error, RequestError):
        _note(request, error.code)
        return json_response(*encode(error))
    _note(request, "internal_error")
    logger.error("a route failed", exc_info=error, extra={"fields": {"path": request.url.path}})
    return json_response(*internal())


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what Starlette raises itself (no such route, no such method) in the same form."""
    assert isinstance(error, HTTPException)
    code = _BY_STATUS.get(error.status_code, "request_failed")
    _note(request, code)
    detail = f"{request.method} {shown(request.url.path)}: {error.detail}"
    headers = dict(error.headers or {})
    if "Allow" in headers:
        allowed = {method.strip() for method in headers["Allow"].split(",")}
        named = sorted(allowed | ({"HEAD"} if "GET" in allowed else set()))
        headers["Allow"] = ", ".join(named)
        detail += f": use {' or '.join(named)}"
    return json_response(error.status_code, _dumps({"error": code, "detail": detail}), headers)


def _note(request: Request, code: str) -> None:
    if (record := request.scope.get(RECORD)) is not None:
        record.code = code


def shown(text: str) -> str:
    """Return a caller's own words as an error repeats them: not more than a line of them."""
    return shortened(text, MAX_SHOWN)


def _dumps(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except TypeError:  # a lone surrogate that a server left in a path
        return json.dumps(body).encode()


HANDLERS: dict[int | type[Exception], Any] = {
    DisklessError: on_error,
    Exception: on_error,
    HTTPException: on_http_exception,
}
