"""Keeping what is served equal to what the bucket wants: what one look costs, does, survives and never does."""

import asyncio
import gc
import hashlib
import json
import threading

import pytest

from app import refresher
from app.errors import ModelNotFound, ModelNotReady, StorageDenied, StorageUnavailable
from app.model_storage import ModelStorageManager
from app.refresher import pause_seconds
from app.registry import State
from app.runner import Runner
from app.storage.local import LocalStorage
from app.storage.r2 import R2Storage
from tests import estimators
from tests.repository import ROWS, Watched, classifier, draft, dumped, expected, linear, put, scaler, serving
from tests.trusted import TRUST

ONE = [[1.0, 1.0, 1.0]]


@pytest.fixture
def storage(tmp_path):
    return Watched(LocalStorage(tmp_path / "bucket"))


@pytest.fixture
def manager(storage):
    return ModelStorageManager(storage, trust=TRUST)


def down(what="cannot read models/index.json in R2 bucket secret at https://account.example: no answer in time"):
    return StorageUnavailable(what)


# Starting


async def test_starting_returns_before_the_load_and_readiness_follows_it(manager, storage):
    await manager.publish("a", draft(linear(1)))
    arrived, release = storage.hold("get", "model.joblib")
    async with serving(manager) as served:
        assert served.registry.not_ready() == "the bucket has not been read yet"
        served.refresher.start()
        await arrived.wait()
        assert served.registry.not_ready() == "the models are being loaded"
        assert served.slot("a").state is State.LOADING
        with pytest.raises(ModelNotReady, match="a/1 is LOADING"):
            await served.ask(ONE, "a")
        release.set()
        await served.until(lambda: served.registry.not_ready() is None)

        assert await served.ask(ONE, "a") == pytest.approx([4])


async def test_an_empty_bucket_is_not_ready_and_its_first_model_makes_it_so(manager):
    async with serving(manager) as served:
        await served.refresher.look_now()
        assert served.registry.not_ready() == "the bucket has no model to serve"
        await manager.publish("a", draft(linear(1)))
        outcome = await served.refresher.look_now()

        assert outcome.loaded == ("a/1",)
        assert served.registry.not_ready() is None


async def test_a_storage_that_is_down_at_the_start_is_waited_for(manager, storage):
    await manager.publish("a", draft(linear(1)))
    storage.fail(down())
    async with serving(manager, refresh_seconds=1) as served:
        served.refresher.start()
        await served.until(lambda: served.refresher.last_error)
        reason = served.registry.not_ready()
        assert "no answer in time" in served.refresher.last_error
        assert reason == "the storage cannot be read now; GET /models/status says more"
        storage.fail(None)
        await served.until(lambda: served.registry.not_ready() is None)

        assert served.refresher.last_error is None
        assert await served.ask(ONE, "a") == pytest.approx([4])


async def test_a_required_model_that_is_not_there_is_waited_for(manager):
    await manager.publish("a", draft(linear(1)))
    async with serving(manager, required=("b",)) as served:
        await served.refresher.look_now()
        assert served.registry.not_ready() == "b is required, but not in the bucket"
        await manager.publish("b", draft(linear(2)))
        await served.refresher.look_now()

        assert served.registry.not_ready() is None


async def test_the_log_says_where_models_are_looked_for_and_why_they_are_not_ready_when_that_changes(
    manager, storage, caplog
):
    caplog.set_level("INFO", "diskless.refresher")

    def told():
        found = [(record.getMessage(), getattr(record, "fields", {})) for record in caplog.records]
        caplog.clear()
        return [line for line in found if line[0] in ("looking for models", "models are not ready", "models are ready")]

    async with serving(manager, required=("b",)) as served:
        await served.refresher.look_now()
        assert told() == [
            ("looking for models", {"storage": storage.describe(), "prefix": "models/"}),
            ("models are not ready", {"reason": "b is required, but not in the bucket"}),
        ]
        await served.refresher.look_now()
        assert told() == []
        await storage.put("models/b.joblib", b"no model")
        await served.refresher.look_now()
        ((event, fields),) = told()
        assert (event, fields["reason"].startswith("b/")) == ("models are not ready", True)
        await manager.publish("b", draft(linear(2)))
        await served.refresher.look_now()
        assert told() == [("models are ready", {})]
        await manager.unpublish("b", "1", drop_aliases=True)
        served.registry.draining = True
        await served.refresher.look_now()
        assert told() == []


# What a look costs


async def test_a_quiet_look_costs_one_conditional_get_and_one_list(bucket, r2_arguments):
    storage = Watched(R2Storage(**r2_arguments))
    manager = ModelStorageManager(storage, trust=TRUST)
    async with serving(manager) as served:
        await manager.publish("a", draft(linear(1)))
        await storage.put("models/bare.joblib", dumped(linear(2)))
        await served.refresher.look_now()
        storage.calls.clear()
        await served.refresher.look_now()

        assert storage.calls == [("get", "models/index.json"), ("list", "models/")]
        assert storage.unchanged == ["models/index.json"]


async def test_without_bare_models_a_quiet_look_costs_one_get(storage):
    manager = ModelStorageManager(storage, bare_models=False, trust=TRUST)
    await manager.publish("a", draft(linear(1)))
    await storage.put("models/bare.joblib", dumped(linear(2)))
    async with serving(manager) as served:
        await served.refresher.look_now()
        storage.calls.clear()
        await served.refresher.look_now()

        assert storage.calls == [("get", "models/index.json")]
        assert list(served.registry.snapshot.entries) == ["a"]


async def test_any_number_of_callers_cost_two_looks_and_each_sees_what_was_there_when_it_asked(manager, storage):
    await manager.publish("a", draft(linear(1)))
    async with serving(manager) as served:
        arrived, release = storage.hold("list", "models/")
        first = asyncio.create_task(served.refresher.look_now())
        await arrived.wait()  # it has read the index
        await manager.publish("b", draft(linear(2)))
        others = [asyncio.create_task(served.refresher.look_now()) for _ in range(20)]
        await asyncio.sleep(0)
        others[0].cancel()  # one caller that goes away takes nothing from the others
        release.set()
        outcomes = await asyncio.gather(first, *others[1:])

        assert storage.calls.count(("list", "models/")) == 2
        assert outcomes[0].loaded == ("a/1",)
        assert [outcome.loaded for outcome in outcomes[1:]] == [("b/1",)] * 19
        assert served.version("b") == "1"


# Swapping


async def test_a_promoted_version_replaces_the_old_one_and_its_runner_goes(manager):
    await manager.publish("a", draft(linear(1)))
    async with serving(manager) as served:
        await served.refresher.look_now()
        old = served.registry.get("a")
        await manager.publish("a", draft(linear(2)))
        assert (await served.refresher.look_now()).loaded == ()  # published, but no alias names it
        await manager.publish("a", draft(linear(3)), promote=True)
        outcome = await served.refresher.look_now()

        assert (outcome.loaded, outcome.retired) == (("a/3",), ("a/1",))
        assert await served.ask(ONE, "a") == pytest.approx([6])
        with pytest.raises(ModelNotFound, match="loaded are version 3"):
            served.registry.get("a", version="1")
        rows = old.model.signature.validate(ONE)  # a request that took its runner just before the swap
        assert (await old.predict(rows, "predict")).tolist() == pytest.approx([4])


async def test_the_counts_of_retired_versions_are_kept_and_go_on_when_they_serve_again(manager, monkeypatch):
    monkeypatch.setattr(refresher, "MAX_KEPT", 2)
    async with serving(manager) as served:
        for version in range(1, 5):
            await manager.publish("a", draft(linear(version)), promote=True)
            await served.refresher.look_now()
            for _ in range(version):
                await served.ask(ONE, "a")
        kept = {ref.version: counters.answers for ref, counters in served.refresher.kept.items()}
        assert kept == {"2": 2, "3": 3}

        await manager.rollback("a")
        await served.refresher.look_now()
        assert served.registry.get("a").counters.answers == 3
        await served.ask(ONE, "a")

        assert served.registry.get("a").counters.answers == 4
        assert {ref.version for ref in served.refresher.kept} == {"2", "4"}
        monkeypatch.setattr(refresher, "KEPT_SECONDS", -1)
        assert served.refresher.kept == {}


async def test_looks_and_loads_are_counted_by_how_they_ended(manager, storage):
    async with serving(manager) as served:
        counted = served.refresher._service
        await served.refresher.look_now()
        await manager.publish("a", draft(linear(1)))
        await served.refresher.look_now()
        put(manager, "models/b.joblib", b"not a model")
        await served.refresher.look_now()
        storage.fail(down())
        await served.refresher.look_now()

        assert counted.looks == {("unchanged",): 2, ("changed",): 1, ("failed",): 1}
        loads = {labels[0]: count for labels, count in counted.loads.items() if count}
        assert loads == {"ok": 1, "load_failed": 1}


async def test_requests_that_wait_in_a_retired_runner_are_answered(manager):
    await manager.publish("a", draft(estimators.Gated()))
    estimators.GATE.clear()
    async with serving(manager) as served:
        await served.refresher.look_now()
        waiting = [asyncio.create_task(served.ask(ONE, "a")) for _ in range(5)]
        assert await asyncio.to_thread(estimators.STARTED.acquire, timeout=60)
        await manager.publish("a", draft(linear(1)), promote=True)
        outcome = await served.refresher.look_now()
        assert outcome.retired == ("a/1",)
        assert await served.ask(ONE, "a") == pytest.approx([4])
        assert served.refresher.unloading == [("a", "1")]
        estimators.GATE.set()

        assert await asyncio.gather(*waiting) == [[3.0]] * 5
        await served.until(lambda: not served.refresher.unloading)


async def test_a_model_leaves_memory_with_its_last_request(manager):
    await manager.publish("a", draft(estimators.Counted(1.0)))
    async with serving(manager) as served:
        gc.collect()
        alive = len(estimators.ALIVE)
        gc.disable()
        try:
            await served.refresher.look_now()
            await served.ask(ONE, "a")
            assert len(estimators.ALIVE) == alive + 1
            await manager.publish("a", draft(linear(1)), promote=True)
            gc.collect()
            await served.refresher.look_now()
            await served.until(lambda: len(estimators.ALIVE) <= alive)
        finally:
            gc.enable()


async def test_what_failed_its_check_leaves_memory_at_once(manager, storage):
    ref, _ = await manager.publish("a", draft(estimators.Counted(1.0), examples=ROWS[:3]))
    await spoil_golden_rows(manager, ref)
    async with serving(manager) as served:
        gc.collect()
        alive = len(estimators.ALIVE)
        gc.disable()
        try:
            outcome = await served.refresher.look_now()

            assert "golden row 0: predict gave 1.0, recorded is 77.0" in outcome.failed["a/1"]
            assert len(estimators.ALIVE) <= alive
        finally:
            gc.enable()


async def spoil_golden_rows(manager, ref):
    key = f"models/{ref}/manifest.json"
    manifest = json.loads((await manager.storage.get(key)).body)
    manifest["golden"]["outputs"]["predict"][0] = 77.0
    await replace_manifest(manager, ref, manifest)


async def replace_manifest(manager, ref, manifest):
    """Put another manifest in place, and its digest into the index, as somebody would who has all rights."""
    body = json.dumps(manifest).encode()
    await manager.storage.put(f"models/{ref}/manifest.json", body)
    index = json.loads((await manager.storage.get("models/index.json")).body)
    index["models"][ref.name]["versions"][ref.version]["manifest_sha256"] = hashlib.sha256(body).hexdigest()
    await manager.storage.put("models/index.json", json.dumps(index).encode())


async def test_several_aliases_serve_their_own_versions_and_move_without_a_load(manager, storage):
    manager = ModelStorageManager(storage, aliases=("production", "staging"), trust=TRUST)
    for number in (1, 2, 3):
        await manager.publish("a", draft(linear(number)))
    await move(manager, staging="2")
    async with serving(manager, aliases=("production", "staging")) as served:
        assert (await served.refresher.look_now()).loaded == ("a/1", "a/2")
        assert await served.ask(ONE, "a") == pytest.approx([4])
        assert await served.ask(ONE, "a", alias="staging") == pytest.approx([5])
        await move(manager, production="2", staging="3")
        outcome = await served.refresher.look_now()
        assert (outcome.loaded, outcome.retired) == (("a/3",), ("a/1",))
        assert await served.ask(ONE, "a") == pytest.approx([5])
        assert await served.ask(ONE, "a", alias="staging") == pytest.approx([6])
        await move(manager, staging=None)
        outcome = await served.refresher.look_now()

        assert (outcome.loaded, outcome.retired) == ((), ("a/3",))
        with pytest.raises(ModelNotFound, match="a has no alias 'staging' loaded"):
            await served.ask(ONE, "a", alias="staging")


async def move(manager, **aliases):
    index = json.loads((await manager.storage.get("models/index.json")).body)
    for alias, version in aliases.items():
        index["models"]["a"]["aliases"].pop(alias, None)
        if version is not None:
            index["models"]["a"]["aliases"][alias] = version
    await manager.storage.put("models/index.json", json.dumps(index).encode())


async def test_an_alias_that_is_gone_is_gone_even_while_another_fails(manager, storage):
    manager = ModelStorageManager(storage, aliases=("production", "staging"), trust=TRUST)
    await manager.publish("a", draft(linear(1)))
    await move(manager, staging="1")
    async with serving(manager, aliases=("production", "staging")) as served:
        await served.refresher.look_now()
        await manager.publish("a", draft(linear(2)), promote=True)
        await storage.delete("models/a/2/model.joblib")
        await served.refresher.look_now()
        await move(manager, staging=None)
        await served.refresher.look_now()

        assert served.version("a") == "1"
        with pytest.raises(ModelNotFound, match="no alias 'staging'"):
            served.registry.get("a", alias="staging")


async def test_rolling_back_to_what_still_serves_needs_no_load(manager, storage):
    await manager.publish("a", draft(linear(1)))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await manager.publish("a", draft(linear(2)), promote=True)
        await storage.delete("models/a/2/model.joblib")
        outcome = await served.refresher.look_now()
        assert "model.joblib is not there" in outcome.failed["a/2"]
        assert served.slot("a").state is State.UNAVAILABLE
        await move(manager, production="1")
        outcome = await served.refresher.look_now()

        assert (outcome.loaded, outcome.failed, outcome.retired) == ((), {}, ())
        assert list(served.registry.snapshot.entries["a"].slots) == ["1"]


async def test_a_name_that_was_removed_and_began_again_serves_its_new_version_1(manager, storage):
    await manager.publish("a", draft(linear(1)))
    async with serving(manager) as served:
        await served.refresher.look_now()
        for info in await storage.list("models/"):
            await storage.delete(info.key)
        await manager.publish("a", draft(linear(9)))
        outcome = await served.refresher.look_now()

        assert (outcome.loaded, outcome.retired) == (("a/1",), ("a/1",))
        assert await served.ask(ONE, "a") == pytest.approx([12])


async def test_when_the_same_label_gets_a_content_that_fails_the_loaded_one_goes_on_and_says_so(manager):
    ref, _ = await manager.publish("a", draft(linear(1), examples=ROWS[:3]))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await spoil_golden_rows(manager, ref)
        await served.refresher.look_now()

        assert served.slot("a").state is State.READY
        assert "golden row 0" in served.slot("a").reason
        assert await served.ask(ONE, "a") == pytest.approx([4])


# What is removed


async def test_a_published_name_that_the_index_drops_goes_at_once(manager, storage):
    await manager.publish("a", draft(linear(1)))
    await manager.publish("b", draft(linear(2)))
    async with serving(manager) as served:
        await served.refresher.look_now()
        index = json.loads((await storage.get("models/index.json")).body)
        del index["models"]["a"]
        await storage.put("models/index.json", json.dumps(index).encode())
        outcome = await served.refresher.look_now()

        assert outcome.retired == ("a/1",)
        assert list(served.registry.snapshot.entries) == ["b"]
        assert served.registry.not_ready() is None


async def test_a_bare_model_must_be_missing_twice_before_it_goes(manager, storage):
    body = dumped(linear(1))
    await storage.put("models/a.joblib", body)
    async with serving(manager) as served:
        await served.refresher.look_now()
        await storage.delete("models/a.joblib")
        assert (await served.refresher.look_now()).retired == ()
        await storage.put("models/a.joblib", body)
        assert (await served.refresher.look_now()).loaded == ()
        await storage.delete("models/a.joblib")
        await served.refresher.look_now()
        assert await served.ask(ONE, "a") == pytest.approx([4])
        outcome = await served.refresher.look_now()

        assert len(outcome.retired) == 1
        assert served.registry.not_ready() == "the bucket has no model to serve"


async def test_an_index_that_disappears_must_be_missing_twice(manager, storage):
    await manager.publish("a", draft(linear(1)))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await storage.delete("models/index.json")
        assert (await served.refresher.look_now()).retired == ()
        assert served.registry.not_ready() is None
        assert (await served.refresher.look_now()).retired == ("a/1",)


async def test_publishing_a_bare_model_hands_over_without_a_gap(manager, storage):
    await storage.put("models/a.joblib", dumped(linear(1)))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await manager.publish("a", draft(linear(2)))
        arrived, release = storage.hold("get", "model.joblib")
        looking = asyncio.create_task(served.refresher.look_now())
        await arrived.wait()
        assert await served.ask(ONE, "a") == pytest.approx([4])
        release.set()
        await looking

        assert await served.ask(ONE, "a") == pytest.approx([5])
        assert served.refresher.ignored == {"a (bare)": "a published model has this name"}


# What fails


async def test_a_look_that_fails_keeps_everything_serving(manager, storage):
    await manager.publish("a", draft(linear(1)))
    await storage.put("models/b.joblib", dumped(linear(2)))
    async with serving(manager) as served:
        await served.refresher.look_now()
        for error in (down(), StorageDenied("no"), KeyError("a bug")):
            storage.fail(error)
            for _ in range(3):
                outcome = await served.refresher.look_now()
                assert outcome.error
                assert outcome.error == served.refresher.last_error

        assert served.registry.not_ready() is None
        assert await served.ask(ONE, "a") == pytest.approx([4])
        assert await served.ask(ONE, "b") == pytest.approx([5])


async def test_no_error_ends_the_looking(manager, storage):
    await manager.publish("a", draft(linear(1)))
    errors = iter([KeyError("in the look"), MemoryError(), down()])
    storage.fault = lambda verb, key: next(errors, None) if verb == "list" else None
    failures = iter([RuntimeError("in the swap")])

    def make_runner(model, costs):
        for error in failures:
            raise error
        return Runner(model)

    async with serving(manager, refresh_seconds=0.01, make_runner=make_runner) as served:
        served.refresher.start()
        await served.until(lambda: served.registry.not_ready() is None)

        assert next(errors, None) is next(failures, None) is None


async def test_a_load_that_the_storage_fails_is_tried_again_soon(manager, storage):
    await manager.publish("a", draft(linear(1)))
    storage.fail(down(), "get", "model.joblib")
    async with serving(manager) as served:
        outcome = await served.refresher.look_now()
        assert outcome.passing
        with pytest.raises(ModelNotReady) as caught:
            await served.ask(ONE, "a")
        assert "secret" not in str(caught.value)
        assert "account.example" not in str(caught.value)
        assert "account.example" in served.slot("a").reason  # whoever runs the service sees it
        storage.fail(None)
        served.refresher.start()  # no pause: an ordinary look tries it
        await served.until(lambda: served.registry.not_ready() is None)


async def test_a_broken_file_is_read_ever_more_seldom_but_whenever_somebody_asks(manager, storage):
    ref, _ = await manager.publish("a", draft(linear(1)))
    good = (await storage.get(f"models/{ref}/model.joblib")).body
    await storage.put(f"models/{ref}/model.joblib", good[:-1] + b"!")
    async with serving(manager, refresh_seconds=0.01) as served:
        served.refresher.start()
        await served.until(lambda: storage.calls.count(("list", "models/")) >= 40)
        assert 2 <= storage.calls.count(("get", "models/a/1/manifest.json")) <= 20
    async with serving(manager) as served:
        await served.refresher.look_now()
        await storage.put(f"models/{ref}/model.joblib", good)
        outcome = await served.refresher.look_now()

        assert outcome.loaded == ("a/1",)


async def test_a_mended_file_is_found_without_being_told(manager, storage):
    ref, _ = await manager.publish("a", draft(linear(1)))
    good = (await storage.get(f"models/{ref}/model.joblib")).body
    await storage.put(f"models/{ref}/model.joblib", b"")
    async with serving(manager, refresh_seconds=0.05) as served:
        served.refresher.start()
        await served.until(lambda: served.registry.snapshot.entries and served.slot("a").state is State.UNAVAILABLE)
        await storage.put(f"models/{ref}/model.joblib", good)
        await served.until(lambda: served.registry.not_ready() is None)

        assert await served.ask(ONE, "a") == pytest.approx([4])


def test_the_pause_after_failures_grows_to_a_limit_however_often_it_failed():
    assert [pause_seconds(60, failures) for failures in (1, 2, 3, 4, 100_000)] == [120, 240, 480, 900, 900]


async def test_a_model_that_would_end_the_process_when_it_is_read_does_not_serve(manager, storage):
    await storage.put("models/a.joblib", dumped(estimators.LeavesAtOnce()))
    await storage.put("models/b.joblib", dumped(linear(1)))
    async with serving(manager) as served:
        outcome = await served.refresher.look_now()

        assert ["SystemExit" in reason for reason in outcome.failed.values()] == [True]
        assert await served.ask(ONE, "b") == pytest.approx([4])


async def test_a_reason_for_callers_names_no_file_of_this_machine(manager, storage):
    body = dumped(linear(1)).replace(b"LinearRegression", b"LinearRegressioN")
    await storage.put("models/a.joblib", body)
    async with serving(manager) as served:
        await served.refresher.look_now()
        slot = served.slot("a")

        assert "LinearRegressioN" in slot.hint
        assert "site-packages" not in slot.reason + slot.hint


# Pairs


async def look_twice(served):
    """Look until parts that changed are confirmed; return what the second look did."""
    await served.refresher.look_now()
    return await served.refresher.look_now()


OTHER_SCALER = type(scaler())().fit(ROWS**2)
OTHER_CLASSIFIER = type(classifier())().fit(OTHER_SCALER.transform(ROWS), ROWS[:, 1] > 3)
NEW = {"scaler": dumped(OTHER_SCALER), "model": dumped(OTHER_CLASSIFIER)}
KEYS = {"scaler": "models/fraud_scaler.joblib", "model": "models/fraud.joblib"}


@pytest.fixture
async def pair(storage):
    """The storage, with a pair in it."""
    await storage.put(KEYS["model"], dumped(classifier()))
    await storage.put(KEYS["scaler"], dumped(scaler()))
    return storage


async def answer(served):
    return await served.ask(ROWS.tolist(), "fraud", "predict_proba")


def together(first, second):
    return second.predict_proba(first.transform(ROWS)).tolist()


@pytest.mark.parametrize("order", [("scaler", "model"), ("model", "scaler")])
async def test_a_pair_that_is_half_uploaded_never_answers(manager, pair, order):
    async with serving(manager) as served:
        await served.refresher.look_now()
        for role in order:
            await pair.put(KEYS[role], NEW[role])
            outcome = await served.refresher.look_now()
            assert (outcome.loaded, outcome.failed, outcome.retired) == ((), {}, ())
            assert await answer(served) == expected()
            assert served.registry.not_ready() is None
            slot = served.registry.snapshot.entries["fraud"].slots[wanted_version(served)]
            assert slot.state is State.LOADING
            assert "waiting for one more look that finds them unchanged" in slot.reason
        outcome = await served.refresher.look_now()

        assert len(outcome.loaded) == len(outcome.retired) == 1
        assert await answer(served) == together(OTHER_SCALER, OTHER_CLASSIFIER)
        assert [slot.reason for slot in served.registry.snapshot.slots()] == [None]


def wanted_version(served):
    return served.registry.snapshot.entries["fraud"].wanted["production"]


async def test_a_pair_that_is_replaced_between_two_looks_is_taken_by_the_second_that_sees_it(manager, pair):
    async with serving(manager) as served:
        await served.refresher.look_now()
        for role, body in NEW.items():
            await pair.put(KEYS[role], body)
        await served.refresher.look_now()
        assert await answer(served) == expected()
        await served.refresher.look_now()

        assert await answer(served) == together(OTHER_SCALER, OTHER_CLASSIFIER)


async def test_a_scaler_that_alone_is_replaced_is_taken_soon_after_a_look_that_saw_it(manager, pair):
    async with serving(manager, confirm_seconds=0.01) as served:
        served.refresher.start()
        await served.until(lambda: served.registry.not_ready() is None)
        before = served.version("fraud")
        await pair.put(KEYS["scaler"], NEW["scaler"])
        await served.refresher.look_now()
        await served.until(lambda: served.version("fraud") != before)

        assert await answer(served) == together(OTHER_SCALER, classifier())


async def test_a_pair_that_changes_again_or_back_while_it_waits_waits_again(manager, pair):
    async with serving(manager) as served:
        await served.refresher.look_now()
        before = served.version("fraud")
        await pair.put(KEYS["scaler"], NEW["scaler"])
        await served.refresher.look_now()
        await pair.put(KEYS["scaler"], dumped(linear(1)))  # it would break the pair
        await served.refresher.look_now()
        assert await answer(served) == expected()
        await pair.put(KEYS["scaler"], dumped(scaler()))
        outcome = await served.refresher.look_now()
        assert (outcome.failed, outcome.retired, wanted_version(served)) == ({}, (), before)
        await pair.put(KEYS["scaler"], NEW["scaler"])
        await served.refresher.look_now()
        assert await answer(served) == expected()
        await served.refresher.look_now()

        assert await answer(served) == together(OTHER_SCALER, classifier())


async def test_a_look_that_cannot_see_the_bucket_confirms_nothing(manager, pair):
    async with serving(manager) as served:
        await served.refresher.look_now()
        await pair.put(KEYS["scaler"], NEW["scaler"])
        await served.refresher.look_now()
        pair.fail(down(), "list")
        for _ in range(2):
            assert (await served.refresher.look_now()).error
        assert await answer(served) == expected()
        pair.fail(None)
        await served.refresher.look_now()

        assert await answer(served) == together(OTHER_SCALER, classifier())


async def test_a_model_that_comes_back_after_it_was_gone_waits_for_its_companion(manager, pair):
    async with serving(manager) as served:
        await served.refresher.look_now()
        await pair.delete(KEYS["model"])
        await look_twice(served)
        await pair.put(KEYS["model"], NEW["model"])
        await served.refresher.look_now()
        with pytest.raises(ModelNotReady, match="its parts changed; waiting for one more look"):
            await answer(served)
        await pair.put(KEYS["scaler"], NEW["scaler"])
        await look_twice(served)

        assert await answer(served) == together(OTHER_SCALER, OTHER_CLASSIFIER)


async def test_a_vanished_companion_takes_a_pair_out_of_service_until_it_is_back(manager, storage):
    await storage.put("models/fraud.joblib", dumped(classifier()))
    await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
    async with serving(manager) as served:
        await served.refresher.look_now()
        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()
        await storage.delete("models/fraud_scaler.joblib")
        outcome = await served.refresher.look_now()
        assert len(outcome.retired) == 1
        with pytest.raises(ModelNotReady, match="its scaler is gone: fraud_scaler was beside it and must come back"):
            await served.ask(ONE, "fraud")
        retrained = dumped(linear(3))  # perhaps it needs no scaler: nobody can know
        await storage.put("models/fraud.joblib", retrained)
        await served.refresher.look_now()
        with pytest.raises(ModelNotReady, match="restart the service or publish the model"):
            await served.ask(ONE, "fraud")
        await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
        await storage.put("models/fraud.joblib", dumped(classifier()))
        await look_twice(served)

        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()


async def test_a_model_that_disappeared_with_its_companion_does_not_come_back_without_it(manager, storage):
    await storage.put("models/fraud.joblib", dumped(classifier()))
    await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
    async with serving(manager) as served:
        await served.refresher.look_now()
        for key in ("models/fraud.joblib", "models/fraud_scaler.joblib"):
            await storage.delete(key)
        for _ in range(3):
            await served.refresher.look_now()
        assert served.registry.snapshot.entries == {}
        await storage.put("models/fraud.joblib", dumped(classifier()))
        await served.refresher.look_now()

        with pytest.raises(ModelNotReady, match="its scaler is gone"):
            await served.ask(ONE, "fraud")


async def test_publishing_the_model_settles_what_it_needs(manager, storage):
    await storage.put("models/fraud.joblib", dumped(classifier()))
    await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await storage.delete("models/fraud_scaler.joblib")
        await served.refresher.look_now()
        await manager.publish("fraud", draft(linear(1)))
        await served.refresher.look_now()

        assert await served.ask(ONE, "fraud") == pytest.approx([4])


async def test_a_companion_that_breaks_takes_the_pair_out_of_service_and_a_model_file_that_breaks_does_not(
    manager, storage
):
    await storage.put("models/fraud.joblib", dumped(classifier()))
    await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await storage.put("models/fraud.joblib", dumped(classifier())[:-10])
        assert len((await look_twice(served)).failed) == 1
        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()
        await storage.put("models/fraud.joblib", dumped(classifier()))
        await storage.put("models/fraud_scaler.joblib", dumped(scaler())[:-10])
        await served.refresher.look_now()
        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()
        await served.refresher.look_now()
        with pytest.raises(ModelNotReady, match=r"scaler is broken: .*fraud_scaler.joblib: cannot be read as joblib"):
            await served.ask(ONE, "fraud")
        await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
        await look_twice(served)

        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()


async def test_a_pair_whose_storage_fails_goes_on(manager, storage):
    await storage.put("models/fraud.joblib", dumped(classifier()))
    await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await storage.put("models/fraud_scaler.joblib", dumped(linear(1)))
        storage.fail(down(), "get", "fraud_scaler")
        outcome = await look_twice(served)

        assert outcome.passing
        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()


async def test_a_pair_of_which_a_file_is_replaced_while_it_is_read_goes_on_and_is_read_again_soon(manager, storage):
    await storage.put("models/fraud.joblib", dumped(classifier()))
    await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await storage.put("models/fraud_scaler.joblib", dumped(scaler()) + b" ")
        await served.refresher.look_now()
        arrived, release = storage.hold("get", "fraud_scaler")
        looking = asyncio.create_task(served.refresher.look_now())
        await arrived.wait()
        await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
        release.set()
        outcome = await looking

        assert outcome.passing
        assert "changed while it was read" in next(iter(outcome.failed.values()))
        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()
        assert (await look_twice(served)).failed == {}
        assert served.registry.snapshot.entries["fraud"].serving


async def test_a_companion_under_another_role_is_another_version(manager, storage):
    await storage.put("models/fraud.joblib", dumped(classifier()))
    await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
    async with serving(manager) as served:
        await served.refresher.look_now()
        before = served.version("fraud")
        await storage.put("models/fraud_preprocessor.joblib", dumped(scaler()))
        await storage.delete("models/fraud_scaler.joblib")
        await served.refresher.look_now()

        assert "scaler." in before
        assert served.slot("fraud").state is State.UNAVAILABLE  # the scaler is gone, whatever came instead


async def test_a_second_file_for_one_role_is_not_chosen_between_while_the_loaded_one_goes_on(manager, storage):
    await storage.put("models/a.joblib", dumped(linear(1)))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await storage.put("models/a.pkl", dumped(linear(2)))
        outcome = await served.refresher.look_now()

        assert "a.joblib and a.pkl are both there" in next(iter(outcome.failed.values()))
        assert await served.ask(ONE, "a") == pytest.approx([4])
    async with serving(manager) as fresh:
        await fresh.refresher.look_now()
        with pytest.raises(ModelNotReady, match="remove one"):
            await fresh.ask(ONE, "a")


# Stopping


async def test_stopping_while_a_model_is_read_leaves_no_thread_waiting(manager, storage):
    await manager.publish("a", draft(linear(1)))
    arrived, _ = storage.hold("get", "model.joblib")
    async with serving(manager) as served:
        served.refresher.start()
        await arrived.wait()
    async with asyncio.timeout(30):
        while any(thread.name == "load" for thread in threading.enumerate()):
            await asyncio.sleep(0.005)
