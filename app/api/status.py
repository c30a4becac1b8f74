"""`GET /models/status`: what is served, from where, since when, how it does; and `POST /models/refresh`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from fastapi import APIRouter, Depends
from starlette.responses import Response

from app import versions
from app.api.errors import json_response, responses
from app.api.guards import admin_needed, key_needed
from app.auth import Access
from app.counters import Counters
from app.errors import BucketUnreadable
from app.model import Model
from app.model_storage import ModelStorageManager
from app.refresher import Refresher
from app.registry import Entry, Registry, Slot, State
from app.runner import Runner
from app.settings import Settings
from app.timing import per_row
from app.view import View

Count = Callable[[Runner], Counters]


def router(
    settings: Settings,
    manager: ModelStorageManager,
    registry: Registry,
    refresher: Refresher | View,
    access: Access,
) -> APIRouter:
    """Return the routes. They tell of what a refresher in this process does, or of a view of one in another."""
    routes = APIRouter(tags=["models"])
    count: Count = refresher.counters if isinstance(refresher, View) else _own_counters

    async def status() -> Response:
        """Say what is served and how it does."""
        reason = registry.not_ready()
        body = {
            "ready": reason is None,
            "reason": reason,
            "mode": settings.mode.value,
            "mode_reason": settings.mode_reason,
            "storage": {
                "location": manager.storage.describe(),
                "prefix": manager.prefix,
                "last_sync": refresher.last_sync.isoformat() if refresher.last_sync else None,
                "error": refresher.last_error,
                "fallback": refresher.fallback,
                "refresh_seconds": settings.refresh_seconds,
            },
            "workers": refresher.workers() if isinstance(refresher, View) else _one_worker(),
            "models": [
                *(
                    _row(slot, entry, count)
                    for entry in registry.snapshot.entries.values()
                    for slot in entry.slots.values()
                ),
                *(_row(Slot(ref, State.UNLOADING), Entry(), count) for ref in refresher.unloading),
            ],
            "ignored": {_writable(name): _writable(why) for name, why in refresher.ignored.items()},
        }
        return json_response(200, orjson.dumps(body, default=str))

    async def refresh() -> Response:
        """Look at the bucket now, and answer when what follows from it has been done."""
        outcome = await refresher.look_now()
        if outcome.error is not None:
            raise BucketUnreadable(outcome.error)
        failed = {ref: _writable(reason) for ref, reason in outcome.failed.items()}
        body = {"loaded": outcome.loaded, "failed": failed, "retired": outcome.retired}
        return json_response(200, orjson.dumps(body))

    routes.add_api_route(
        "/models/status",
        status,
        methods=["GET"],
        operation_id="models_status",
        responses=responses("unauthorized", "forbidden", "internal_error"),
        dependencies=[Depends(key_needed(access))],
    )
    routes.add_api_route(
        "/models/refresh",
        refresh,
        methods=["POST"],
        operation_id="models_refresh",
        responses=responses("unauthorized", "forbidden", "internal_error", "bucket_unreadable"),
        dependencies=[Depends(admin_needed(access))],
    )
    return routes


def _own_counters(runner: Runner) -> Counters:
    return runner.counters


def _one_worker() -> dict[str, Any]:
    pid = os.getpid()
    return {"count": 1, "generation": None, "restarts": 0, "processes": [{"pid": pid, "state": "serving"}], "pid": pid}


def _row(slot: Slot, entry: Entry, count: Count) -> orjson.Fragment:
    """Return a version's row as JSON. One that has what JSON cannot carry must not take the others with it."""
    try:
        return orjson.Fragment(orjson.dumps(_describe(slot, entry, count), default=str))
    except TypeError as error:
        body = _outline(slot, entry) | {"warnings": [f"it cannot be described: {error}"]}
        return orjson.Fragment(orjson.dumps(body | {"reason": _writable(slot.reason) if slot.reason else None}))


def _writable(text: str) -> str:
    """Return text that UTF-8 can carry: the name of a file in a directory may be any bytes."""
    return text.encode(errors="replace").decode()


def _outline(slot: Slot, entry: Entry) -> dict[str, Any]:
    return {
        "name": slot.ref.name,
        "version": slot.ref.version,
        "aliases": [alias for alias, label in entry.serving.items() if label == slot.ref.version],
        "state": slot.state.value,
        "reason": slot.reason,
        "bare": slot.bare,
    }


def _describe(slot: Slot, entry: Entry, count: Count) -> dict[str, Any]:
    body = _outline(slot, entry)
    if slot.runner is None:
        return body
    model, counters = slot.runner.model, count(slot.runner)
    report = model.report
    return body | {
        "sealed": report.sealed_by is not None,
        "sealed_by": report.sealed_by,
        "runtime": model.runtime,
        "parity": slot.parity,
        "compiled": _compiled(model),
        "microseconds_per_row": _written(per_row(slot.costs)) if slot.costs is not None else None,
        "golden_rows": len(model.golden.instances) if model.golden else 0,
        "source": [
            {
                "role": source.role,
                "key": source.key,
                "etag": source.etag,
                "sha256": source.sha256,
                "bytes": source.bytes,
            }
            for source in report.sources
        ],
        "seconds": slot.seconds,
        "resident_bytes": report.taken.resident_bytes if report.taken else None,
        "peak_bytes": report.taken.peak_bytes if report.taken else None,
        "methods": model.signature.methods,
        "signature": model.signature.model_dump(mode="json", exclude_none=True),
        "trained_with": report.trained_with,
        "version_differences": versions.differences(report.trained_with),
        "warnings": report.warnings,
        "requests": counters.requests,
        "rows": counters.rows,
        "errors": counters.errors,
        "batches": counters.batches,
        "latency_milliseconds": counters.quantiles(),
    }


def _written(figures: Mapping[int, float]) -> dict[str, float]:
    return {str(rows): figure for rows, figure in figures.items()}


def _compiled(model: Model) -> dict[str, Any]:
    """Say what computes instead of scikit-learn, how that was proved and what it was measured to cost; or why nothing does."""
    known = model.compiled
    if known is None:
        return {"parity": None, "rows": 0, "methods": [], "microseconds_per_row": None, "reason": model.not_compiled}
    return {
        "parity": known.parity,
        "rows": known.rows,
        "methods": known.methods,
        "microseconds_per_row": {
            "reference": _written(known.microseconds_per_row.reference),
            "compiled": _written(known.microseconds_per_row.compiled),
        },
        "reason": known.reason or model.not_compiled,
    }
