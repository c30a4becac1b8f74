"""Seals beside manifests, aliases that several people move at once, and versions that go: what is written, and who is told."""

import asyncio
import json
import signal
import subprocess
import sys
import time

import joblib
import pytest

from app import seal
from app.errors import (
    InvalidName,
    NothingToRollBackTo,
    PublishConflict,
    StorageUnavailable,
    UnknownVersion,
    UnusableKey,
    VersionExists,
    VersionInUse,
)
from app.model_storage import ModelStorageManager
from app.storage.local import LocalStorage
from app.storage.r2 import R2Storage
from tests import faults
from tests.faults import FaultyProxy
from tests.repository import ROWS, Watched, draft, linear, scaler
from tests.service import clean_environment, r2_environment

KEY, OTHER = (seal.read_private_key(seal.keygen()[0]) for _ in range(2))


@pytest.fixture
def storage(tmp_path):
    return Watched(LocalStorage(tmp_path / "bucket"))


@pytest.fixture
def manager(storage):
    return ModelStorageManager(storage)


@pytest.fixture
def somebody_else(storage):
    """Another manager of the same bucket, which no hold and no fault is for."""
    return ModelStorageManager(storage.inner)


@pytest.fixture
def r2(bucket, r2_arguments):
    """A function that returns another manager of the empty bucket of the real server."""
    return lambda: ModelStorageManager(R2Storage(**r2_arguments))


async def published(manager, *versions, name="a"):
    for number, version in enumerate(versions):
        await manager.publish(name, draft(linear(number)), version=version)


async def entry(manager, name="a"):
    return (await manager.read_index()).models[name]


async def stored(storage, prefix="models/"):
    return {info.key.removeprefix(prefix) for info in await storage.list(prefix)}


# Seals


async def test_the_seal_is_of_the_stored_manifest_and_written_before_the_index(manager, storage):
    await manager.publish("a", draft(linear(1), scaler=scaler()), seal_key=KEY)
    manifest = (await storage.get("models/a/1/manifest.json")).body
    sealed = (await storage.get("models/a/1/manifest.seal")).body
    trusted = seal.parse_trusted_keys(f"ann:{seal.public_key_of(KEY)}")

    assert storage.writes[-3:] == ["models/a/1/manifest.json", "models/a/1/manifest.seal", "models/index.json"]
    assert seal.verify(manifest, sealed, trusted, "a/1") == "ann"


@pytest.mark.parametrize("interrupted", ["manifest.seal", "index.json"])
async def test_a_sealed_publish_that_was_interrupted_goes_on_with_the_manifest_that_is_there(
    manager, storage, interrupted
):
    storage.fail(StorageUnavailable("cut off"), "put", interrupted)
    with pytest.raises(StorageUnavailable):
        await manager.publish("a", draft(linear(1)), version="x", seal_key=KEY)
    storage.fail(None)
    manifest = (await storage.get("models/a/x/manifest.json")).body
    await manager.publish("a", draft(linear(1)), version="x", seal_key=KEY)

    assert (await storage.get("models/a/x/manifest.json")).body == manifest
    assert (await storage.get("models/a/x/manifest.seal")).body == seal.seal(manifest, KEY)


async def test_a_seal_that_another_key_left_is_not_replaced(manager, storage):
    storage.fail(StorageUnavailable("cut off"), "put", "index.json")
    with pytest.raises(StorageUnavailable):
        await manager.publish("a", draft(linear(1)), version="x", seal_key=OTHER)
    storage.fail(None)
    before = (await storage.get("models/a/x/manifest.seal")).body
    with pytest.raises(VersionExists, match="a/x: an unfinished publish left a seal there that this key did not make"):
        await manager.publish("a", draft(linear(1)), version="x", seal_key=KEY)

    assert (await storage.get("models/a/x/manifest.seal")).body == before
    assert "a" not in (await manager.read_index()).models


async def test_a_publish_that_counts_passes_by_a_seal_that_lies_there(manager, storage):
    await storage.put("models/a/1/manifest.seal", b"left")

    assert (await manager.publish("a", draft(linear(1)), seal_key=KEY))[0].version == "2"


def test_a_script_seals_with_the_text_of_a_key(manager, tmp_path):
    text, public = seal.keygen()
    manager.save("a", linear(1), seal_key=text)
    folder = tmp_path / "bucket/models/a/1"
    bodies = [(folder / name).read_bytes() for name in ("manifest.json", "manifest.seal")]

    assert seal.verify(*bodies, seal.parse_trusted_keys(f"me:{public}"), "a/1") == "me"
    with pytest.raises(UnusableKey, match="expected a private key") as told:
        manager.save("a", linear(1), seal_key=text[:-1])
    assert text[20:40] not in str(told.value)


# Moving an alias


async def test_an_alias_is_moved_and_moved_back(manager):
    await published(manager, "1", "2", "3")
    moves = [await manager.promote("a", "2"), await manager.promote("a", "3"), await manager.promote("a", "3")]
    backs = [await manager.rollback("a"), await manager.rollback("a")]

    assert [(move.previous, move.ref.version, move.changed) for move in moves + backs] == [
        ("1", "2", True),
        ("2", "3", True),
        ("3", "3", False),
        ("3", "2", True),
        ("2", "1", True),
    ]
    with pytest.raises(NothingToRollBackTo):
        await manager.rollback("a")
    last = (await entry(manager)).history["production"][-1]
    assert last.rollback
    assert last.at.endswith("+00:00")
    assert "@" in last.by


async def test_promoting_what_is_there_already_writes_nothing(manager, storage):
    await published(manager, "1")
    storage.calls.clear()
    moved = await manager.promote("a", "1")

    assert not moved.changed
    assert storage.writes == []


async def test_an_alias_of_any_name_may_be_given(manager):
    await published(manager, "1", "2")
    moved = await manager.promote("a", "2", alias="canary")

    assert (moved.previous, moved.alias) == (None, "canary")
    assert (await entry(manager)).aliases == {"production": "1", "canary": "2"}
    with pytest.raises(InvalidName, match="alias"):
        await manager.promote("a", "2", alias="no such/name")


async def race(storage, ours, theirs):
    """Start `ours`, let `theirs` happen just before its index is written, and return how `ours` ended."""
    arrived, release = storage.hold("put", "index.json")
    task = asyncio.create_task(ours)
    await arrived.wait()
    await theirs
    release.set()
    return (await asyncio.gather(task, return_exceptions=True))[0]


async def test_who_loses_the_race_for_an_alias_is_told_who_won_it(manager, somebody_else, storage):
    await published(manager, "1", "2", "3")
    lost = await race(storage, manager.promote("a", "2"), somebody_else.promote("a", "3"))
    entered = await entry(manager)

    assert isinstance(lost, PublishConflict)
    by = entered.history["production"][-1].by
    assert f"a: production was moved meanwhile, from 1 to 3 by {by} at 20" in str(lost)
    assert "nothing was changed" in str(lost)
    assert entered.aliases == {"production": "3"}
    assert len(entered.history["production"]) == 2


async def test_two_who_roll_back_at_once_go_one_step_back(manager, somebody_else, storage):
    await published(manager, "1", "2", "3")
    await manager.promote("a", "2")
    await manager.promote("a", "3")
    lost = await race(storage, manager.rollback("a"), somebody_else.rollback("a"))

    assert isinstance(lost, PublishConflict)
    assert (await entry(manager)).aliases == {"production": "2"}


async def test_two_who_promote_the_same_version_both_have_it(manager, somebody_else, storage):
    await published(manager, "1", "2")
    second = await race(storage, manager.promote("a", "2"), somebody_else.promote("a", "2"))

    assert not second.changed
    assert len((await entry(manager)).history["production"]) == 2


async def test_what_else_changes_in_the_index_disturbs_no_move(manager, somebody_else, storage):
    await published(manager, "1", "2")

    async def other_things():
        await published(somebody_else, "1", name="b")
        await published(somebody_else, "3")
        await somebody_else.promote("a", "3", alias="staging")

    moved = await race(storage, manager.promote("a", "2"), other_things())

    assert moved.changed
    assert (await entry(manager)).aliases == {"production": "2", "staging": "3"}
    assert (await entry(manager, "b")).aliases == {"production": "1"}


async def test_of_many_who_move_an_alias_at_once_on_the_server_each_is_told_the_truth(r2):
    first = r2()
    async with first.storage:
        await published(first, "1", "2", "3", "4", "5")

    async def promote(version):
        manager = r2()
        async with manager.storage:
            return await manager.promote("a", version)

    outcomes = await asyncio.gather(*(promote(version) for version in "2345"), return_exceptions=True)
    done = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    async with first.storage:
        entered = await entry(first)
    moves = entered.history["production"]

    assert done
    assert all(isinstance(outcome, PublishConflict) for outcome in outcomes if isinstance(outcome, Exception))
    assert {(move.previous, move.version) for move in moves[1:]} == {(one.previous, one.ref.version) for one in done}
    assert [move.previous for move in moves] == [None, *[move.version for move in moves[:-1]]]
    assert entered.aliases["production"] == moves[-1].version


# Unpublishing


async def test_the_index_lets_go_of_a_version_before_its_objects_are_deleted(manager, storage):
    await published(manager, "1", "10", "2")
    kept = {key for key in await stored(storage) if not key.startswith("a/10/")}
    storage.calls.clear()
    gone = await manager.unpublish("a", "10")
    deleted = [key for verb, key in storage.calls if verb == "delete"]

    assert (gone.objects_deleted, gone.repeated) == (2, False)
    assert storage.writes == ["models/index.json"]
    assert storage.calls.index(("put", "models/index.json")) < storage.calls.index(("delete", deleted[0]))
    assert deleted == ["models/a/10/manifest.json", "models/a/10/model.joblib"]
    assert await stored(storage) == kept
    assert list((await entry(manager)).versions) == ["1", "2"]


@pytest.mark.parametrize("after", range(4))
async def test_an_unpublish_that_is_interrupted_is_finished_by_another(manager, storage, after):
    await published(manager, "1")
    await manager.publish("a", draft(linear(2), scaler=scaler()), version="2", seal_key=KEY)
    before = await stored(storage, "models/a/1/")
    storage.calls.clear()

    def fault(verb, key):
        deletions = [verb for verb, _ in storage.calls].count("delete")
        return asyncio.CancelledError() if verb == "delete" and deletions > after else None

    storage.fault = fault
    with pytest.raises(asyncio.CancelledError):
        await manager.unpublish("a", "2")
    left = await stored(storage, "models/a/2/")
    assert list((await entry(manager)).versions) == ["1"]
    assert len(left) == 4 - after
    storage.fail(None)
    again, nothing = await manager.unpublish("a", "2"), await manager.unpublish("a", "2")

    assert (again.repeated, again.objects_deleted, nothing.objects_deleted) == (True, len(left), 0)
    assert await stored(storage, "models/a/2/") == set()
    assert await stored(storage, "models/a/1/") == before


async def test_a_version_that_gets_an_alias_meanwhile_is_not_unpublished(manager, somebody_else, storage):
    await published(manager, "1", "2")
    before = await stored(storage)
    lost = await race(storage, manager.unpublish("a", "2"), somebody_else.promote("a", "2"))

    assert isinstance(lost, VersionInUse)
    assert await stored(storage) == before


async def test_a_version_that_goes_meanwhile_is_not_promoted(manager, somebody_else, storage):
    await published(manager, "1", "2")
    lost = await race(storage, manager.promote("a", "2"), somebody_else.unpublish("a", "2"))

    assert isinstance(lost, UnknownVersion)
    assert "it was unpublished by" in str(lost)
    assert (await entry(manager)).aliases == {"production": "1"}


async def test_a_name_without_versions_keeps_its_history_and_begins_again_behind_it(manager, storage):
    await published(manager, "1", "2")
    await manager.unpublish("a", "2")
    gone = await manager.unpublish("a", "1", drop_aliases=True)

    assert gone.aliases == ("production",)
    assert await stored(storage) == {"index.json"}
    assert (await manager.catalogue()).wanted == {}
    with pytest.raises(VersionExists, match="a/1 was unpublished by"):
        await manager.publish("a", draft(linear(1)), version="1")
    ref, live = await manager.publish("a", draft(linear(1), ROWS[:5]))
    assert (ref.version, live) == ("3", True)
    assert [move.version for move in (await entry(manager)).history["production"]] == ["1", "3"]


async def test_versions_go_from_the_real_server(r2):
    manager = r2()
    async with manager.storage as storage:
        await manager.publish("a", draft(linear(0)), seal_key=KEY)
        await manager.publish("a", draft(linear(1), scaler=scaler()), seal_key=KEY)
        gone = await manager.unpublish("a", "2")

        assert gone.objects_deleted == 4
        assert await stored(storage) == {"index.json", "a/1/model.joblib", "a/1/manifest.json", "a/1/manifest.seal"}


# Interrupted with Ctrl-C


def interrupted(environment, proxy, method, containing, *words):
    """Run a command until such a request has come, and hangs; then press Ctrl-C, and return the command as it ended."""
    proxy.inject(faults.hang(), method=method, containing=containing)
    process = subprocess.Popen(
        [sys.executable, "-m", "app", *words],
        env=clean_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            if any(seen.method == method and containing in seen.target for seen in proxy.seen):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def test_ctrl_c_in_the_middle_of_a_command_leaves_what_can_be_finished(s3, bucket, r2_arguments, tmp_path):
    joblib.dump(linear(1), tmp_path / "model.joblib")
    publish = ["publish", "a", "--model", str(tmp_path / "model.joblib"), "--no-compile", "--version"]
    manager = ModelStorageManager(R2Storage(**r2_arguments))

    async def look():
        async with manager.storage as storage:
            models = (await manager.read_index()).models
            return list(models["a"].versions) if models else [], await stored(storage)

    with FaultyProxy(s3.endpoint_url) as proxy:
        environment = r2_environment(proxy.url, bucket, s3.writer)
        stopped = interrupted(environment, proxy, "PUT", "index.json", *publish, "x", "--json")
        assert stopped.returncode == 130
        assert json.loads(stopped.stdout)["error"] == "interrupted"
        assert asyncio.run(look()) == ([], {"a/x/model.joblib", "a/x/manifest.json"})

        proxy.heal()
        manager.save("a", linear(1), version="x", compile=False)
        manager.save("a", linear(2), version="y", compile=False)
        stopped = interrupted(environment, proxy, "DELETE", "a/y/manifest.json", "unpublish", "a", "y")
        assert (stopped.returncode, stopped.stdout) == (130, "")
        assert stopped.stderr == "interrupted: `python -m app list` shows what is in force\n"
        assert asyncio.run(look())[0] == ["x"]

        async def finish():
            async with manager.storage:
                return await manager.unpublish("a", "y")

        assert asyncio.run(finish()).objects_deleted == 2
        assert asyncio.run(look()) == (["x"], {"index.json", "a/x/model.joblib", "a/x/manifest.json"})
