"""The application as any ASGI server runs it: with its lifespan, and a client in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from app.api.predict import Front
from app.main import create_app
from app.settings import Settings
from tests.service import ADMIN_KEY, AS_ADMIN
from tests.trusted import TRUST


@asynccontextmanager
async def application(**variables: Any) -> AsyncIterator[Front]:
    """Run the application from its start-up to its shutdown, with settings given as variables."""
    ours = {"ML_TRUSTED_TYPES": ",".join(TRUST.types), "ML_ADMIN_KEYS": f"tests:{ADMIN_KEY}"}
    app = create_app(Settings(**ours | variables))
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    task = asyncio.create_task(
        app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, inbox.get, outbox.put)
    )
    await inbox.put({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    try:
        yield app
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
        await task


def client(app: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, **options), base_url="http://service", headers=AS_ADMIN)


async def ready(app: Front) -> None:
    """Wait until every required model is served."""
    async with asyncio.timeout(180):
        while app.registry.not_ready() is not None:
            await asyncio.sleep(0.005)
