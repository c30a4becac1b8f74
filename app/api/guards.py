"""What lets a call through to a route of FastAPI's: dependencies that ask `Access`, and note who called."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request

from app.auth import ANYONE, CALLER, Access, Caller
from app.observer import RECORD

Guard = Callable[[Request], Awaitable[None]]


def key_needed(access: Access) -> Guard:
    """Return what lets whoever has a key through. The process itself may say in the scope who calls."""

    async def guard(request: Request) -> None:
        _note(request, request.scope.get(CALLER) or access.to_look(request.scope["headers"]))

    return guard


def admin_needed(access: Access) -> Guard:
    """Return what lets administrators through."""

    async def guard(request: Request) -> None:
        headers = request.scope["headers"]
        _note(request, access.caller(headers) or ANYONE)  # whoever may not do this is told of, too
        access.to_administer(headers)

    return guard


def _note(request: Request, caller: Caller) -> None:
    if (record := request.scope.get(RECORD)) is not None:
        record.caller = caller.name
