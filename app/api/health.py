"""Health checks for whoever balances load: they read memory only, and never touch the storage."""

from __future__ import annotations

from typing import Literal

import orjson
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from app.api.errors import ErrorBody, json_response
from app.registry import Registry

RETRY_AFTER_SECONDS = 5


class Live(BaseModel):
    """The process answers."""

    status: Literal["live"]


class Ready(BaseModel):
    """Every required model can predict."""

    status: Literal["ready"]


class NotReady(ErrorBody):
    """Not every required model can predict; `detail` has the reason, and so has `reason`."""

    status: Literal["not ready"]
    reason: str


def router(registry: Registry) -> APIRouter:
    """Return the routes `/health`, `/health/ready` and `/health/live`. HEAD is answered wherever GET is."""
    routes = APIRouter(tags=["health"])

    async def live() -> Response:
        """Answer 200 as long as the process can answer at all."""
        return json_response(200, b'{"status":"live"}')

    async def ready() -> Response:
        """Answer 200 when every required model can predict, else 503 with the reason."""
        reason = registry.not_ready()
        if reason is None:
            return json_response(200, b'{"status":"ready"}')
        body = {"status": "not ready", "reason": reason, "error": "model_not_ready", "detail": reason}
        return json_response(503, orjson.dumps(body), {"retry-after": str(RETRY_AFTER_SECONDS)})

    for path in ("/health", "/health/ready"):
        routes.add_api_route(
            path,
            ready,
            methods=["GET"],
            operation_id=path.strip("/").replace("/", "_"),
            responses={200: {"model": Ready}, 503: {"model": NotReady, "description": "Not ready, with the reason"}},
        )
    routes.add_api_route(
        "/health/live", live, methods=["GET"], operation_id="health_live", responses={200: {"model": Live}}
    )
    return routes
