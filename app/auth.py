"""Who may call what. The seam that every call which changes something goes through; keys are not checked yet."""

from __future__ import annotations

from starlette.requests import Request


async def require_admin(request: Request) -> None:
    """Let an admin call through. Raises `Unauthorized` or `Forbidden` once there are keys to ask for."""
    del request
