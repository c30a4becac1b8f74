"""The only wiring: settings in, ASGI application out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, MutableSequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.gzip import GZipMiddleware

from app import __version__
from app.api import compression, docs, errors, health, metrics, openapi, status
from app.api.headers import Hosts
from app.api.origins import Origins
from app.api.predict import Front, Predictor
from app.auth import Access
from app.metrics import Collector
from app.model import Model
from app.model_storage import ModelStorageManager
from app.observer import Observer
from app.refresher import Refresher
from app.registry import Registry
from app.runner import Runner
from app.service_counters import ServiceCounters, StorageKind
from app.settings import Mode, Settings, load_settings
from app.spans import Journal
from app.tracing import Exporter, TracingObserver
from app.view import View

logger = logging.getLogger("diskless.server")
# FastAPI's own would start threads where a variable says so, and tell what is in errors. `app/tracing.py` has the spans.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
_STORAGES: Mapping[Mode, tuple[StorageKind, ...]] = {
    Mode.CLOUD_ONLY: ("r2",),
    Mode.R2_FORCED: ("r2", "copy"),
    Mode.R2_WITH_COPY: ("r2", "copy"),
    Mode.LOCAL: ("local",),
}


def create_app(settings: Settings | None = None) -> Front:
    """Return the ASGI application. Raises `SettingsError` when the environment does not describe a service.

    Its start-up begins to load the models and returns: a server may open its port at once, and readiness follows.
    """
    settings = settings or load_settings()
    service = ServiceCounters()
    exporter = Exporter.from_settings(settings)
    journal = None if exporter is None else Journal(exporter.add)
    manager = ModelStorageManager.from_settings(settings, counters=service, journal=journal)
    registry = Registry(settings.aliases, settings.required_models)

    refresher = Refresher(
        manager,
        registry,
        runner_maker(settings),
        refresh_seconds=settings.refresh_seconds,
        swap_policy=settings.swap_policy,
        service=service,
        journal=journal,
    )

    access = access_of(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        logger.info("access", extra={"fields": {"rules": access.described()}})
        async with manager.storage:
            refresher.start()
            try:
                yield
            finally:
                await refresher.stop()

    return assemble(settings, manager, registry, refresher, access, service, exporter, lifespan)


@asynccontextmanager
async def no_lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Do nothing at the start and at the end: somebody else looks at the bucket."""
    yield


def _observer(settings: Settings, service: ServiceCounters, exporter: Exporter | None) -> Observer:
    sample = settings.access_log_sample
    if exporter is None:
        return Observer(sample=sample, service=service)
    return TracingObserver(exporter, sample=sample, trace_sample=settings.trace_sample, service=service)


@asynccontextmanager
async def sending(exporter: Exporter | None) -> AsyncIterator[None]:
    """Send what is traced, if anything is."""
    if exporter is None:
        yield
        return
    exporter.start()
    try:
        yield
    finally:
        await exporter.close()


def access_of(settings: Settings, cells: MutableSequence[float] | None = None) -> Access:
    """Return who may call what; `cells` are shared by the processes that count what callers have spent."""
    return Access(settings.api_keys, settings.admin_keys, rate=settings.rate_limit, cells=cells)


def runner_maker(settings: Settings) -> Callable[[Model, Mapping[int, float] | None], Runner]:
    """Return what makes a model's runner, of the model and what its batches were measured to cost."""

    def make_runner(model: Model, costs: Mapping[int, float] | None) -> Runner:
        return Runner(
            model,
            costs=costs,
            max_batch_rows=settings.max_batch_rows,
            max_queue=settings.max_queue,
            timeout_seconds=settings.predict_timeout_seconds,
        )

    return make_runner


def assemble(
    settings: Settings,
    manager: ModelStorageManager,
    registry: Registry,
    watch: Refresher | View,
    access: Access,
    service: ServiceCounters,
    exporter: Exporter | None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] = no_lifespan,
) -> Front:
    """Return the ASGI application that answers from a registry, tells of what `watch` sees, and counts in `service`.

    Where there is an `exporter`, it sends what is traced from the application's start to its end.
    """
    collector = collector_for(settings, registry, watch, service, access)

    @asynccontextmanager
    async def watched(api: FastAPI) -> AsyncIterator[None]:
        async with sending(exporter), lifespan(api):
            looking = asyncio.create_task(collector.keep_looking())
            try:
                yield
            finally:
                looking.cancel()
                collector.forget_queues()

    api = FastAPI(
        title="Diskless",
        version=__version__,
        description="Serves scikit-learn models straight from Cloudflare R2.",
        lifespan=watched,
        openapi_url=None,  # ours knows the models, and its page runs nothing that was not looked at
        redirect_slashes=False,  # a redirect would name the host that the caller named, and http behind a TLS proxy
        exception_handlers=errors.HANDLERS,
        telemetry=NO_TELEMETRY,
    )
    predictor = Predictor(
        registry,
        access,
        _observer(settings, service, exporter),
        max_body_bytes=settings.max_body_bytes,
        max_rows=settings.max_rows,
        max_pending_bytes=max(settings.max_pending_bytes, settings.max_body_bytes),
        timeout_seconds=settings.predict_timeout_seconds,
    )
    api.add_middleware(GZipMiddleware, minimum_size=compression.MIN_BYTES, compresslevel=compression.LEVEL)
    api.include_router(openapi.router(predictor))
    api.include_router(status.router(settings, manager, registry, watch, access))
    api.include_router(health.router(registry))
    api.include_router(metrics.router(collector, access))
    if settings.docs == "on":
        document = openapi.Document(registry, api.openapi, max_rows=settings.max_rows, keys_required=access.needs_key)
        api.include_router(docs.router(document, access))
    return Front(
        predictor,
        api,
        registry,
        hosts=Hosts(settings.allowed_hosts) if settings.allowed_hosts else None,
        origins=partial(Origins, origins=settings.cors_origins) if settings.cors_origins else None,
    )


def collector_for(
    settings: Settings, registry: Registry, watch: Refresher | View, service: ServiceCounters, access: Access
) -> Collector:
    """Return what finds the values of the metrics."""
    return Collector(
        registry=registry,
        watch=watch,
        service=service,
        keys=access.names,
        storages=_STORAGES[settings.mode],
        workers=settings.workers if isinstance(watch, View) else 1,
        max_queue=settings.max_queue,
        memory_limit_bytes=settings.memory_limit_bytes,
    )
