"""Room for a model: what does not fit is refused before it is loaded, and what was there goes on, or makes room."""

from __future__ import annotations

import asyncio
import gc
import io
import re
import threading
from dataclasses import replace
from functools import cache
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from app import memory, publishing, refresher
from app.errors import ModelNotReady, StorageUnavailable
from app.manifest import COMPILED, Golden
from app.memory import MB, OVERHEAD_BYTES, Taken
from app.model import Model
from app.model_storage import ModelStorageManager
from app.names import ModelRef
from app.publishing import Draft
from app.registry import State
from app.storage.local import LocalStorage
from tests.repository import ROWS, Served, Watched, draft, dumped, linear, serving
from tests.trusted import TRUST

LARGE_BYTES = 96 * MB
ROW = [1.0, 2.0, 3.0]


@cache
def large(answer: int) -> Draft:
    return of_size(answer, LARGE_BYTES)


def of_size(answer: int, size: int) -> Draft:
    """A model of so many bytes, of which it uses little, that answers `answer`. What it takes is known, and need not be measured.

    It is not compiled: room is needed for what is read, and a compiled form would leave those bytes where they are.
    """
    model = LinearRegression()
    model.coef_, model.intercept_, model.n_features_in_ = np.zeros(3), float(answer), 3
    model.singular_ = np.zeros(size // 8)
    small = draft(linear(answer))
    part = replace(small.parts[0], body=dumped(model))
    return replace(small, parts=(part,), taken=Taken(size, size))


def compiled(answer: int) -> Draft:
    """The same with a compiled form, which needs nothing of what the model is large by."""
    made = publishing.draft(
        {"model": publishing.part_from_object("model", linear(answer))}, ROWS, trust=TRUST, compile=True
    )
    (program,) = (part for part in made.parts if part.role == COMPILED)
    return replace(made, parts=(program, *large(answer).parts), taken=large(answer).taken)


def wrong(answer: int) -> Draft:
    return replace(large(answer), golden=Golden(instances=[ROW], outputs={"predict": [7.0]}))


@pytest.fixture
def storage(tmp_path):
    return Watched(LocalStorage(tmp_path))


@pytest.fixture
def manager(storage):
    return ModelStorageManager(storage, trust=TRUST)


def room_for_one() -> int:
    """A limit that the first large model fits under, and no second one beside it."""
    return in_use() + LARGE_BYTES + OVERHEAD_BYTES + LARGE_BYTES // 2


def in_use() -> int:
    """What this process has, with the files of all models that may be published later."""
    for number in (1, 2, 3):
        large(number)
    gc.unfreeze()
    gc.collect()  # what other tests have left behind would become room in the midst of this one
    memory.trim_heap()
    return memory.resident_bytes()


def answer(served: Served, name: str = "a") -> float:
    model: Any = served.registry.get(name).model
    return float(model.estimator.intercept_)


async def test_what_does_not_fit_beside_what_is_served_is_refused_with_the_reason(manager):
    await manager.publish("a", large(1))
    async with serving(manager, memory_limit_bytes=room_for_one()) as served:
        await served.refresher.look_now()
        await manager.publish("a", large(2), promote=True)
        outcome = await served.refresher.look_now()
        reason = outcome.failed["a/2"]

        assert re.match(r"a/2: needs about 1[56]\d MB to load, \d+ MB of \d+ MB are free", reason)
        assert "(ML_MEMORY_LIMIT_BYTES): set ML_SWAP_POLICY=replace, which drops the old version first" in reason
        assert answer(served) == 1
        assert [(slot.ref.version, slot.state) for slot in served.registry.snapshot.slots()] == [
            ("1", State.READY),
            ("2", State.UNAVAILABLE),
        ]
        assert served.registry.not_ready() is None


async def test_nothing_of_what_does_not_fit_is_read(manager, storage):
    await manager.publish("a", large(1))
    async with serving(manager, memory_limit_bytes=in_use() + 100 * MB) as served:
        outcome = await served.refresher.look_now()

        assert re.match(r"a/1: needs about 15\d MB to load", outcome.failed["a/1"])
        assert "ML_SWAP_POLICY" not in outcome.failed["a/1"]
        assert ("get", "models/a/1/model.joblib") not in storage.calls
        with pytest.raises(ModelNotReady, match=r"a/1 is UNAVAILABLE: a/1: needs about 15\d MB"):
            served.registry.get("a")


async def test_a_version_that_is_compiled_needs_room_for_its_compiled_form_only(manager, storage):
    await manager.publish("a", compiled(1))
    async with serving(manager, memory_limit_bytes=in_use() + 100 * MB) as served:
        outcome = await served.refresher.look_now()

        assert outcome.loaded == ("a/1",)
        assert served.registry.get("a").model.runtime == "compiled"
        assert await served.ask([ROW], "a") == pytest.approx(linear(1).predict([ROW]).tolist(), rel=1e-9)
        assert ("get", "models/a/1/model.joblib") not in storage.calls


async def test_where_scikit_learn_is_to_compute_a_compiled_version_needs_room_for_its_model(manager):
    await manager.publish("a", compiled(1))
    manager.runtime = "sklearn"
    async with serving(manager, memory_limit_bytes=in_use() + 100 * MB) as served:
        outcome = await served.refresher.look_now()

        assert re.match(r"a/1: needs about 15\d MB to load", outcome.failed["a/1"])


async def test_nothing_of_a_compiled_form_that_does_not_fit_is_read(manager, storage):
    made = compiled(1)
    assert made.compiled is not None
    block = made.compiled.model_copy(update={"resident_bytes": 900 * MB, "peak_bytes": 900 * MB})
    await manager.publish("a", replace(made, compiled=block))
    storage.calls.clear()
    async with serving(manager, memory_limit_bytes=in_use() + 400 * MB) as served:
        outcome = await served.refresher.look_now()

        assert re.match(r"a/1: needs about 9\d\d MB to load", outcome.failed["a/1"])
        assert not [key for verb, key in storage.calls if verb == "get" and ("compiled/" in key or "joblib" in key)]


async def test_what_did_not_fit_is_loaded_when_something_else_has_gone(manager):
    await manager.publish("a", large(1))
    async with serving(manager, memory_limit_bytes=room_for_one(), refresh_seconds=1.0) as served:
        await served.refresher.look_now()
        await manager.publish("b", large(2))
        assert "b/1" in (await served.refresher.look_now()).failed
        await manager.publish("a", draft(linear(3)), promote=True)
        served.refresher.start()

        await served.until(lambda: served.registry.snapshot.entries["b"].serving)
        assert answer(served, "b") == 2


async def test_an_old_version_that_may_be_replaced_is_dropped_first(manager, storage):
    await manager.publish("a", large(1))
    async with serving(manager, memory_limit_bytes=room_for_one(), swap_policy="replace") as served:
        await served.refresher.look_now()
        before = memory.resident_bytes()
        await manager.publish("a", large(2), promote=True)
        arrived, release = storage.hold("get", "a/2/model.joblib")
        look = asyncio.create_task(served.refresher.look_now())
        await arrived.wait()

        with pytest.raises(ModelNotReady, match="a/2 is LOADING: it takes the place of a/1: there is no room for both"):
            served.registry.get("a")
        assert memory.resident_bytes() < before - LARGE_BYTES // 2
        release.set()
        outcome = await look
        assert outcome.loaded == ("a/2",)
        assert answer(served) == 2
        assert [slot.ref.version for slot in served.registry.snapshot.slots()] == ["2"]


async def test_requests_that_were_accepted_are_answered_before_the_old_version_goes(manager):
    await manager.publish("a", large(1))
    async with serving(manager, memory_limit_bytes=room_for_one(), swap_policy="replace") as served:
        await served.refresher.look_now()
        await manager.publish("a", large(2), promote=True)
        runner = served.registry.get("a")
        rows = runner.model.signature.validate([ROW])
        asked = [asyncio.create_task(runner.predict(rows, "predict")) for _ in range(3)]
        await asyncio.sleep(0)
        del runner
        await served.refresher.look_now()

        assert {float(np.ravel(await answered)[0]) for answered in asked} == {1.0}
        assert answer(served) == 2


async def test_the_old_version_is_brought_back_when_the_new_one_fails(manager, storage):
    await manager.publish("a", large(1))
    async with serving(
        manager, memory_limit_bytes=room_for_one(), swap_policy="replace", refresh_seconds=1.0
    ) as served:
        await served.refresher.look_now()
        await manager.publish("a", wrong(2), promote=True)
        served.refresher.start()
        await served.until(lambda: served.registry.snapshot.entries["a"].slots.get("2"))
        await served.until(lambda: served.slot("a").state is State.UNAVAILABLE or served.slot("a").ref.version == "1")
        await served.until(lambda: served.registry.snapshot.entries["a"].serving)

        assert answer(served) == 1
        states = {slot.ref.version: slot for slot in served.registry.snapshot.slots()}
        assert states["1"].state is State.READY
        assert states["2"].state is State.UNAVAILABLE
        assert "a/2: golden row 0: predict gave" in (states["2"].reason or "")

        loads = storage.calls.count(("get", "models/a/2/model.joblib"))
        served.refresher._failures.clear()  # as if its pause were over
        looks = storage.calls.count(("get", "models/index.json"))
        await served.until(lambda: storage.calls.count(("get", "models/index.json")) >= looks + 2)
        assert storage.calls.count(("get", "models/a/2/model.joblib")) == loads  # not dropped in vain a second time
        assert answer(served) == 1


async def test_what_cannot_be_brought_back_at_once_is_brought_back_later(manager, storage):
    await manager.publish("a", large(1))
    async with serving(
        manager, memory_limit_bytes=room_for_one(), swap_policy="replace", refresh_seconds=0.1
    ) as served:
        await served.refresher.look_now()
        await manager.publish("a", large(2), promote=True)
        storage.fail(StorageUnavailable("cut off"), "get", "model.joblib")
        outcome = await served.refresher.look_now()

        assert outcome.passing
        assert "cut off" in outcome.failed["a/2"]
        with pytest.raises(ModelNotReady):
            served.registry.get("a")
        storage.fail(StorageUnavailable("cut off"), "get", "a/2/model.joblib")
        await served.refresher.look_now()
        assert answer(served) == 1
        storage.fail(None)
        while answer(served) != 2:  # it is tried again, but not at once
            await served.refresher.look_now()


async def test_what_could_not_be_brought_back_is_not_dropped(manager, storage):
    await manager.publish("a", large(1))
    async with serving(manager, memory_limit_bytes=room_for_one(), swap_policy="replace") as served:
        await served.refresher.look_now()
        await manager.publish("a", wrong(2), promote=True)
        await manager.unpublish("a", "1")
        outcome = await served.refresher.look_now()

        assert "needs about" in outcome.failed["a/2"]
        assert answer(served) == 1


async def test_asking_for_a_look_drops_nothing_in_vain_a_second_time(manager, storage):
    await manager.publish("a", large(1))
    async with serving(manager, memory_limit_bytes=room_for_one(), swap_policy="replace") as served:
        await served.refresher.look_now()
        await manager.publish("a", wrong(2), promote=True)
        first = await served.refresher.look_now()
        loads = storage.calls.count(("get", "models/a/2/model.joblib"))
        second = await served.refresher.look_now()

        assert "golden row 0" in first.failed["a/2"]
        assert (
            "it was tried once in the place of the version before, and failed: a/2: golden row 0"
            in second.failed["a/2"]
        )
        assert storage.calls.count(("get", "models/a/2/model.joblib")) == loads
        assert answer(served) == 1


async def test_what_does_not_end_to_compute_is_not_replaced_and_holds_up_nothing(manager, storage, monkeypatch):
    monkeypatch.setattr(refresher, "RETIRE_SECONDS", 0.3)
    await manager.publish("a", large(1))
    async with serving(manager, memory_limit_bytes=room_for_one(), swap_policy="replace") as served:
        await served.refresher.look_now()
        begun, release, predict = threading.Event(), threading.Event(), Model.predict

        def compute(model: Model, rows: Any, method: str) -> Any:
            if model.ref == ModelRef("a", "1") and not release.is_set():
                begun.set()
                release.wait(60)
            return predict(model, rows, method)

        monkeypatch.setattr(Model, "predict", compute)
        asked = asyncio.create_task(served.ask([ROW], "a"))
        await asyncio.to_thread(begun.wait, 30)
        await manager.publish("a", large(2), promote=True)
        await manager.publish("c", draft(linear(5)))
        outcome = await served.refresher.look_now()

        assert "which does not end what it computes" in outcome.failed["a/2"]
        assert outcome.loaded == ("c/1",)
        assert answer(served) == 1
        monkeypatch.undo()  # from here on it may take its time
        release.set()
        await asked
        await served.refresher.look_now()
        assert answer(served) == 2


async def test_a_version_that_serves_another_alias_is_never_dropped(storage):
    manager = ModelStorageManager(storage, aliases=("production", "staging"), trust=TRUST)
    await manager.publish("a", large(1))
    await manager.publish("a", draft(linear(7)))
    await manager.promote("a", "2", alias="staging")
    async with serving(
        manager, memory_limit_bytes=room_for_one(), swap_policy="replace", aliases=("production", "staging")
    ) as served:
        await served.refresher.look_now()
        await manager.publish("a", large(3), promote=True)
        await manager.publish("a", wrong(2))
        await manager.promote("a", "4", alias="staging")
        await served.refresher.look_now()

        assert served.registry.get("a", alias="production").model.ref.version == "3"
        assert served.registry.get("a", alias="staging").model.ref.version == "2"


async def test_what_takes_more_than_its_publisher_said_is_stopped_and_then_takes_the_place(manager, storage):
    size = 160 * MB  # so large that it does not matter by how many MB the rest of this process changes meanwhile
    await manager.publish("a", of_size(1, size))
    packed = io.BytesIO()
    joblib.dump(joblib.load(io.BytesIO(of_size(2, size).parts[0].body)), packed, compress=("zlib", 1))
    part = replace(large(2).parts[0], body=packed.getvalue())
    limit = in_use() + size + 104 * MB
    async with serving(manager, memory_limit_bytes=limit, swap_policy="replace") as served:
        await served.refresher.look_now()
        await manager.publish("a", replace(large(2), parts=(part,), taken=Taken(MB, MB)), promote=True)
        first = await served.refresher.look_now()

        assert re.search("takes more memory|may take here", first.failed["a/2"])
        assert answer(served) == 1
        while answer(served) != 2:  # what is free comes and goes by a few MB
            await served.refresher.look_now()


async def test_nothing_is_dropped_for_what_would_not_fit_even_then(manager):
    await manager.publish("a", large(1))
    async with serving(manager, memory_limit_bytes=room_for_one(), swap_policy="replace") as served:
        await served.refresher.look_now()
        runner = served.registry.get("a")
        await manager.publish("a", replace(large(2), taken=Taken(900 * MB, 900 * MB)), promote=True)
        outcome = await served.refresher.look_now()

        assert re.search(r"needs about (9|1[01])\d\d MB", outcome.failed["a/2"])
        assert served.registry.get("a") is runner


async def test_a_bare_model_is_never_dropped_because_its_old_file_is_gone(manager, storage):
    async with manager.storage:
        await storage.put("models/a.joblib", large(1).parts[0].body)
    async with serving(manager, memory_limit_bytes=room_for_one() + 32 * MB, swap_policy="replace") as served:
        await served.refresher.look_now()
        await storage.put("models/a.joblib", large(2).parts[0].body)
        outcome = await served.refresher.look_now()

        assert "to load" in next(iter(outcome.failed.values()))
        assert answer(served) == 1


async def test_another_alias_keeps_its_version(storage):
    manager = ModelStorageManager(storage, aliases=("production", "staging"), trust=TRUST)
    await manager.publish("a", large(1))
    async with serving(
        manager, memory_limit_bytes=room_for_one(), swap_policy="replace", aliases=("production", "staging")
    ) as served:
        await manager._change_index(lambda index: index.with_alias("a", "staging", "1", at=""))
        await served.refresher.look_now()
        await manager.publish("a", large(2), promote=True)
        await served.refresher.look_now()

        assert served.registry.get("a", alias="staging").model.ref == ModelRef("a", "1")
        assert answer(served) == 1


async def test_the_status_of_a_load_has_what_it_took(manager):
    await manager.publish("a", large(1))
    async with serving(manager) as served:
        await served.refresher.look_now()
        taken = served.registry.get("a").model.report.taken

        assert taken is not None
        assert 0.9 * LARGE_BYTES < taken.resident_bytes <= taken.peak_bytes < 1.5 * LARGE_BYTES
