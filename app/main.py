"""The only wiring: settings in, ASGI application out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app import __version__
from app.api import errors, health, openapi, status
from app.api.predict import Front, Predictor
from app.model import Model
from app.model_storage import ModelStorageManager
from app.refresher import Refresher
from app.registry import Registry
from app.runner import Runner
from app.settings import Settings, load_settings


def create_app(settings: Settings | None = None) -> Front:
    """Return the ASGI application. Raises `SettingsError` when the environment does not describe a service.

    Its start-up begins to load the models and returns: a server may open its port at once, and readiness follows.
    """
    settings = settings or load_settings()
    manager = ModelStorageManager.from_settings(settings)
    registry = Registry(settings.aliases, settings.required_models)

    def make_runner(model: Model, costs: Mapping[int, float] | None) -> Runner:
        del costs
        return Runner(
            model,
            max_batch_rows=settings.max_batch_rows,
            max_queue=settings.max_queue,
            timeout_seconds=settings.predict_timeout_seconds,
        )

    refresher = Refresher(
        manager,
        registry,
        make_runner,
        refresh_seconds=settings.refresh_seconds,
        swap_policy=settings.swap_policy,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with manager.storage:
            refresher.start()
            try:
                yield
            finally:
                await refresher.stop()

    api = FastAPI(
        title="Diskless",
        version=__version__,
        description="Serves scikit-learn models straight from Cloudflare R2.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name the host that the caller named, and http behind a TLS proxy
        exception_handlers=errors.HANDLERS,
    )
    predictor = Predictor(registry, max_body_bytes=settings.max_body_bytes, max_rows=settings.max_rows)
    api.include_router(openapi.router(predictor))
    api.include_router(status.router(settings, manager, registry, refresher))
    api.include_router(health.router(registry))
    return Front(predictor, api, registry)
