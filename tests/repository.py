"""What the tests of serving share: small fitted models, a watched storage that fails on demand, a service without its wire."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import TracebackType
from typing import Any, Literal, Self

import joblib
import numpy as np
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.preprocessing import StandardScaler

from app import publishing
from app.errors import NotModified, ObjectNotFound
from app.model import Model, wire
from app.model_storage import ModelStorageManager
from app.refresher import Refresher
from app.registry import Registry, Slot
from app.runner import Runner
from app.storage.base import ObjectInfo, Storage, StoredObject
from tests.trusted import TRUST

ROWS = np.random.default_rng(5).normal(3.0, 2.0, size=(40, 3))
CLASSES = np.where(ROWS[:, 0] > 3, "high", "low")


@cache
def linear(offset: int) -> Any:
    """A fitted model whose answer to a row is the row's sum, plus `offset`: every version answers differently."""
    return LinearRegression().fit(ROWS, ROWS.sum(axis=1) + offset)


@cache
def scaler() -> Any:
    return StandardScaler().fit(ROWS)


@cache
def classifier() -> Any:
    """Fitted on scaled rows: without the scaler in front of it, its answers are others."""
    return LogisticRegression().fit(scaler().transform(ROWS), CLASSES)


def expected(rows: Any = ROWS) -> list[list[float]]:
    """The probabilities of the scaler and the classifier together."""
    return classifier().predict_proba(scaler().transform(rows)).tolist()  # type: ignore[no-any-return]


def dumped(value: Any) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(value, buffer)
    return buffer.getvalue()


def draft(model: Any, examples: Any = None, **companions: Any) -> publishing.Draft:
    objects = {**companions, "model": model}
    parts = {role: publishing.part_from_object(role, value) for role, value in objects.items()}
    return publishing.draft(parts, examples, trust=TRUST)


class Watched:
    """A storage that records what is asked of it, fails where `fault` says so, and waits where `hold` was called."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.calls: list[tuple[str, str]] = []
        self.unchanged: list[str] = []  # keys that were asked for with an ETag that still held
        self.fault: Callable[[str, str], Exception | None] = lambda verb, key: None
        self._held: dict[tuple[str, str], tuple[asyncio.Event, asyncio.Event]] = {}

    @property
    def writes(self) -> list[str]:
        return [key for verb, key in self.calls if verb == "put"]

    def fail(self, error: Exception | None, verb: str = "", containing: str = "") -> None:
        """From now on raise `error` for `verb` (any, when empty) on keys with `containing` in them; None: no more."""
        self.fault = lambda asked, key: error if verb in ("", asked) and containing in key else None

    def hold(self, verb: str, containing: str) -> tuple[asyncio.Event, asyncio.Event]:
        """Stop the next calls of this kind: the first event is set when one has come, and the second lets them go."""
        return self._held.setdefault((verb, containing), (asyncio.Event(), asyncio.Event()))

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.inner.__aexit__(kind, error, trace)

    def describe(self) -> str:
        return self.inner.describe()

    async def get(self, key: str, **conditions: Any) -> StoredObject:
        await self._before("get", key)
        try:
            return await self.inner.get(key, **conditions)
        except NotModified:
            self.unchanged.append(key)
            raise

    async def put(self, key: str, body: bytes, **conditions: Any) -> ObjectInfo:
        await self._before("put", key)
        return await self.inner.put(key, body, **conditions)

    async def head(self, key: str) -> ObjectInfo:
        await self._before("head", key)
        return await self.inner.head(key)

    async def list(self, prefix: str, *, recursive: bool = True) -> list[ObjectInfo]:
        await self._before("list", prefix)
        return await self.inner.list(prefix, recursive=recursive)

    async def delete(self, key: str) -> None:
        await self._before("delete", key)
        await self.inner.delete(key)

    async def _before(self, verb: str, key: str) -> None:
        self.calls.append((verb, key))
        for (held, containing), (arrived, release) in self._held.items():
            if held == verb and containing in key:
                arrived.set()
                await release.wait()
        if (error := self.fault(verb, key)) is not None:
            raise error


@dataclass
class Served:
    """A registry and the refresher that keeps it, without HTTP."""

    manager: ModelStorageManager
    registry: Registry
    refresher: Refresher

    async def ask(self, instances: Any, name: str | None = None, method: str | None = None, **which: Any) -> list[Any]:
        """Predict as a request would: get, validate, run, encode."""
        runner = self.registry.get(name, **which)
        rows = runner.model.signature.validate(instances)
        return wire(await runner.predict(rows, method or runner.model.signature.default_method))

    def slot(self, name: str) -> Slot:
        """The version of a name that was wanted last."""
        return list(self.registry.snapshot.entries[name].slots.values())[-1]

    def version(self, name: str) -> str:
        return self.registry.get(name).model.ref.version

    async def until(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(
    manager: ModelStorageManager, *, aliases: tuple[str, ...] = ("production",), required: tuple[str, ...] = (),
    refresh_seconds: float = 3600.0, confirm_seconds: float = 10.0, make_runner: Callable[[Model, Any], Runner] = lambda model, costs: Runner(model),
    memory_limit_bytes: int | None = None, swap_policy: Literal["keep", "replace"] = "keep",
) -> AsyncIterator[Served]:  # fmt: skip
    """Serve what `manager` finds; nothing is looked at before `refresher.start` or `look_now`."""
    manager.trust = replace(manager.trust, memory_limit_bytes=memory_limit_bytes)
    registry = Registry(aliases, required)
    refresher = Refresher(
        manager, registry, make_runner, refresh_seconds=refresh_seconds, confirm_seconds=confirm_seconds,
        swap_policy=swap_policy,
    )  # fmt: skip
    async with manager.storage:
        try:
            yield Served(manager, registry, refresher)
        finally:
            await refresher.stop()


def put(manager: ModelStorageManager, key: str, body: bytes | None) -> bytes | None:
    """Write an object, or remove it; return what was there. For tests without an event loop, and beside one."""

    async def work() -> bytes | None:
        async with manager.storage as storage:
            try:
                before = (await storage.get(key)).body
            except ObjectNotFound:
                before = None
            await (storage.delete(key) if body is None else storage.put(key, body))
            return before

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work()).result()
