"""Pages of other origins (CORS): which of them may read what the service answers. None, unless a setting names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, override

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from app.api import errors
from app.errors import InvalidRequest

METHODS = ("GET", "HEAD", "POST")
# What a page may send beside what it may anyway: keys, ids and traces, a time limit, a compressed body.
SENT = (
    "Authorization",
    "Content-Encoding",
    "Traceparent",
    "Tracestate",
    "X-API-Key",
    "X-Request-ID",
    "X-Request-Timeout",
)
READ = (
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "X-Request-ID",
)  # what a page may read beside what it may anyway
KNOWN_SECONDS = 600  # that a browser may remember what it was told


class Origins(CORSMiddleware):
    """Stands before an ASGI application, and tells browsers which origins' pages may read its answers.

    No credentials of the browser's own (cookies) are ever allowed: a key comes in a header that the page itself sets.
    """

    def __init__(self, app: Any, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=SENT,
            expose_headers=READ,
            max_age=KNOWN_SECONDS,
        )

    @override
    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks beforehand; a refusal has the form that all errors have."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        what = bytes(response.body).decode().removeprefix("Disallowed CORS ")
        status, body, _ = errors.encode(InvalidRequest(f"pages of other origins are not allowed this: {what}"))
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return errors.json_response(status, body, kept)
