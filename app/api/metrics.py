"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from app.api.errors import responses
from app.api.guards import admin_needed
from app.auth import Access
from app.metrics import Collector, exposed

_TEXT: dict[str, Any] = {"schema": {"type": "string"}}


def router(collector: Collector, access: Access) -> APIRouter:
    """Return the route `/metrics`. HEAD is answered wherever GET is."""
    routes = APIRouter(tags=["metrics"])

    async def metrics(request: Request) -> Response:
        """Tell the metrics, in Prometheus' text format or in OpenMetrics, as `Accept` says."""
        figures = await asyncio.to_thread(collector.figures)
        text, content_type = await exposed(collector.samples(figures), request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    routes.add_api_route(
        "/metrics",
        metrics,
        methods=["GET"],
        operation_id="metrics",
        response_class=Response,
        responses={
            200: {
                "description": "The metrics as text",
                "content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT},
            },
            **responses("unauthorized", "forbidden", "internal_error"),
        },
        dependencies=[Depends(admin_needed(access))],
    )
    return routes
