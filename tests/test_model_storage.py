"""Publishing: what is written when, who wins, what nobody sees; and saving and loading from scripts and notebooks."""

import asyncio
import json
import threading
from dataclasses import replace

import pytest

from app.errors import (
    InvalidIndex,
    InvalidManifest,
    InvalidName,
    ObjectNotFound,
    PublishError,
    StorageUnavailable,
    UnusableModel,
    VersionExists,
)
from app.index import Index, ModelEntry, VersionEntry
from app.model_storage import ModelStorageManager, load_checked
from app.storage.local import LocalStorage
from app.storage.r2 import R2Storage
from tests.repository import ROWS, Watched, classifier, draft, dumped, expected, linear, scaler
from tests.service import r2_environment
from tests.trusted import TRUST


@pytest.fixture
def storage(tmp_path):
    return Watched(LocalStorage(tmp_path / "bucket"))


@pytest.fixture
def manager(storage):
    return ModelStorageManager(storage, trust=TRUST)


@pytest.fixture
def r2(bucket, r2_arguments):
    """A function that returns another manager of the empty bucket of the real server."""
    return lambda: ModelStorageManager(R2Storage(**r2_arguments), trust=TRUST)


async def state(manager):
    """What anyone can see of a bucket: versions and production of each name."""
    index = await manager.read_index()
    return {name: (list(entry.versions), entry.aliases.get("production")) for name, entry in index.models.items()}


# The order of writes


async def test_artifacts_are_written_before_the_manifest_and_that_before_the_index(manager, storage):
    await manager.publish("fraud", draft(classifier(), scaler=scaler()))

    assert storage.writes == [
        "models/fraud/1/model.joblib",
        "models/fraud/1/scaler.joblib",
        "models/fraud/1/manifest.json",
        "models/index.json",
    ]


@pytest.mark.parametrize("version", [None, "2024-06"])
@pytest.mark.parametrize("last", range(4))
async def test_a_publish_that_fails_at_any_write_is_invisible_and_succeeds_when_repeated(
    manager, storage, version, last
):
    await manager.publish("other", draft(linear(0)))
    before = await state(manager)
    storage.calls.clear()
    storage.fault = lambda verb, key: (
        StorageUnavailable("cut off") if verb == "put" and len(storage.writes) > last else None
    )
    fraud = draft(classifier(), ROWS[:5], scaler=scaler())
    with pytest.raises(StorageUnavailable):
        await manager.publish("fraud", fraud, version=version)
    assert await state(manager) == before
    assert [ref.name for ref in (await manager.catalogue()).wanted] == ["other"]
    storage.fail(None)
    ref, live = await manager.publish("fraud", fraud, version=version)

    assert live
    assert version in (None, ref.version)
    assert await state(manager) == before | {"fraud": ([ref.version], ref.version)}
    assert (await loaded(manager, "fraud")).predict_directly(ROWS, "predict_proba").tolist() == expected()


async def loaded(manager, name):
    return await asyncio.to_thread(manager.load, name)


async def test_an_unfinished_label_is_not_taken_over_by_other_files_or_other_examples(manager, storage):
    storage.fail(StorageUnavailable("cut off"), "put", "index.json")
    with pytest.raises(StorageUnavailable):
        await manager.publish("a", draft(linear(1), ROWS[:5]), version="x")
    storage.fail(None)

    for other in (draft(linear(2), ROWS[:5]), draft(linear(1), ROWS[:6]), draft(linear(1))):
        with pytest.raises(VersionExists, match="choose another label"):
            await manager.publish("a", other, version="x")
    assert (await manager.publish("a", draft(linear(1), ROWS[:5]), version="x"))[1]


async def test_an_unfinished_number_is_left_behind(manager, storage):
    storage.fail(StorageUnavailable("cut off"), "put", "manifest.json")
    with pytest.raises(StorageUnavailable):
        await manager.publish("a", draft(linear(1)))
    storage.fail(None)
    await manager.publish("a", draft(linear(2)))

    assert await state(manager) == {"a": (["2"], "2")}


# Labels and production


async def test_versions_are_the_next_integer_unless_labelled(manager):
    labels = [None, None, "2024-06", "10", None, "007", None]
    refs = [(await manager.publish("a", draft(linear(0)), version=label))[0] for label in labels]

    assert [ref.version for ref in refs] == ["1", "2", "2024-06", "10", "11", "007", "12"]


async def test_the_first_version_goes_to_production_and_later_ones_when_promoted(manager):
    live = [
        (await manager.publish("a", draft(linear(number)), promote=promote))[1]
        for number, promote in enumerate([False, False, True, False])
    ]
    entry = (await manager.read_index()).models["a"]

    assert live == [True, False, True, False]
    assert [(move.version, move.previous) for move in entry.history["production"]] == [("1", None), ("3", "1")]
    assert all(move.at.endswith("+00:00") and move.by for move in entry.history["production"])


async def test_a_label_is_never_used_twice(manager, storage):
    await manager.publish("a", draft(linear(1)), version="x")
    before = {info.key: info.etag for info in await storage.list("models/")}
    for again in (linear(1), linear(2)):
        with pytest.raises(VersionExists, match="a/x exists already"):
            await manager.publish("a", draft(again), version="x")

    assert {info.key: info.etag for info in await storage.list("models/")} == before


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "_a", "ä", "a b", "a" * 101, "index.json", "a\n"])
async def test_a_name_that_cannot_be_one_is_refused_before_anything_is_written(manager, storage, name):
    with pytest.raises(InvalidName):
        await manager.publish(name, draft(linear(0)))
    with pytest.raises(InvalidName):
        manager.save(name, linear(0))

    assert storage.calls == []


@pytest.mark.parametrize("label", ["", "1/2", "..", "-1", "9" * 101])
async def test_a_label_that_cannot_be_one_is_refused_before_anything_is_written(manager, storage, label):
    with pytest.raises(InvalidName, match="version"):
        await manager.publish("a", draft(linear(0)), version=label)
    with pytest.raises(InvalidName, match="version"):
        manager.save("a", linear(0), version=label)

    assert storage.calls == []


async def test_a_number_too_long_to_count_on_from_keeps_nobody_from_counting(manager):
    await manager.publish("a", draft(linear(0)), version="9" * 100)
    ref, _ = await manager.publish("a", draft(linear(0)))

    assert ref.version == "1"
    assert (await manager.catalogue()).index.models["a"].aliases == {"production": "9" * 100}


# How much is read, and written, of what should be small


class Measured(Watched):
    """A storage that records how many bytes each read returned."""

    def __init__(self, inner):
        super().__init__(inner)
        self.most: dict[str, int] = {}

    async def get(self, key, **conditions):
        stored = await super().get(key, **conditions)
        self.most[key] = max(len(stored.body), self.most.get(key, 0))
        return stored


def grow(path, size=64 << 20):
    with open(path, "r+b") as file:
        file.truncate(size)


async def test_of_an_index_or_a_manifest_that_is_none_no_more_is_read_than_one_could_have(tmp_path):
    storage = Measured(LocalStorage(tmp_path))
    manager = ModelStorageManager(storage, trust=TRUST)
    await manager.publish("a", draft(linear(0)))
    (wanted,) = (await manager.catalogue()).wanted.values()
    grow(tmp_path / "models/a/1/manifest.json")
    with pytest.raises(InvalidManifest, match=r"a/1: manifest.json has more than 8,388,608 bytes"):
        await manager.fetch(wanted)
    grow(tmp_path / "models/index.json")
    with pytest.raises(InvalidIndex, match=r"it has more than 8,388,608 bytes"):
        await manager.catalogue()

    assert max(storage.most.values()) == (8 << 20) + 1


async def test_what_an_unfinished_publish_may_have_left_is_not_read_whole_to_see_that_it_is_another(tmp_path):
    storage = Measured(LocalStorage(tmp_path))
    manager = ModelStorageManager(storage, trust=TRUST)
    storage.fail(StorageUnavailable("no answer"), "put", "manifest.json")
    with pytest.raises(StorageUnavailable):
        await manager.publish("a", draft(linear(0)), version="x")
    storage.fail(None)
    grow(tmp_path / "models/a/x/model.joblib")
    with pytest.raises(VersionExists):
        await manager.publish("a", draft(linear(0)), version="x")

    assert max(storage.most.values()) < 1 << 20


async def test_an_empty_index_is_none_and_is_not_written_over(manager, storage):
    await storage.put("models/index.json", b"")
    with pytest.raises(InvalidIndex, match="it is empty"):
        await manager.publish("a", draft(linear(0)))


async def test_an_index_that_has_not_changed_is_not_read_again_and_a_large_one_is_parsed_aside(manager, storage):
    entry = ModelEntry(versions={str(number): VersionEntry(created="", manifest_sha256="0") for number in range(9000)})
    await storage.put("models/index.json", Index(models={"a": entry}).encode())
    first = await manager.read_index()
    again = await manager.read_index(first)

    assert len(first.models["a"].versions) == 9000
    assert again is first
    assert storage.unchanged == ["models/index.json"]


async def test_what_could_not_be_read_again_is_not_published(manager, storage):
    made = replace(draft(linear(0)), trained_with={f"library{number}": "1" * 100 for number in range(80_000)})
    with pytest.raises(PublishError, match="its manifest would have .* and none is read of more than 8,388,608"):
        await manager.publish("a", made)
    assert storage.writes == []
    full = Index(models={"b": ModelEntry(versions={"1": VersionEntry(created="x" * (8 << 20), manifest_sha256="0")})})
    fitting = full.encode().replace(b"x" * 300, b"", 1)
    await storage.put("models/index.json", fitting)
    with pytest.raises(PublishError, match="index.json would have .* and none is read of more than 8,388,608"):
        await manager.publish("a", draft(linear(0)))

    assert (await storage.get("models/index.json")).body == fitting


# Several at once, on the real server


@pytest.mark.parametrize("count", [2, 10])
async def test_publishers_at_once_all_succeed_with_their_own_versions(r2, count):
    async def publish(number):
        manager = r2()
        async with manager.storage:
            return (await manager.publish("a", draft(linear(number)), promote=True))[0]

    refs = await asyncio.gather(*(publish(number) for number in range(count)))
    versions = {ref.version: number for number, ref in enumerate(refs)}
    manager = r2()
    async with manager.storage:
        entry = (await manager.read_index()).models["a"]
        loaded = {version: await load(manager, version) for version in entry.versions}

    assert sorted(entry.versions) == sorted(versions)
    assert len(versions) == count
    assert entry.aliases["production"] in versions
    assert len(entry.history["production"]) == count
    for version, number in versions.items():
        assert loaded[version].estimator.intercept_ == linear(number).intercept_


async def load(manager, version):
    with await manager.fetch(await manager.wanted("a", version)) as bundle:
        return (await asyncio.to_thread(load_checked, bundle)).model


async def test_of_two_publishers_of_one_label_one_wins_and_its_files_stay(r2):
    async def publish(number):
        manager = r2()
        async with manager.storage:
            return await manager.publish("a", draft(linear(number), scaler=scaler()), version="x")

    outcomes = await asyncio.gather(*(publish(number) for number in range(2)), return_exceptions=True)
    winners = [number for number, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]

    assert len(winners) == 1
    assert isinstance(outcomes[1 - winners[0]], VersionExists)
    assert (await loaded(r2(), "a")).estimator.intercept_ == linear(winners[0]).intercept_


async def test_publishing_beside_a_change_of_the_index_loses_neither(manager, storage):
    arrived, release = storage.hold("put", "index.json")
    first = asyncio.create_task(manager.publish("a", draft(linear(1))))
    await arrived.wait()
    other = ModelStorageManager(storage.inner, trust=TRUST)
    await other.publish("b", draft(linear(2)))
    release.set()
    await first

    assert await state(manager) == {"a": (["1"], "1"), "b": (["1"], "1")}


async def test_an_index_that_cannot_be_read_is_not_overwritten(manager, storage):
    for body in (b"{}", b"[]", b"not json", b'{"format": 99, "models": {}}', b'{"format": 0, "models": {}}'):
        await storage.put("models/index.json", body)
        with pytest.raises(InvalidIndex):
            await manager.publish("a", draft(linear(1)))

        assert (await storage.get("models/index.json")).body == body


def test_what_a_later_release_wrote_into_the_index_stays():
    later = {
        "format": 1,
        "flags": ["x"],
        "models": {
            "a": {
                "owner": "ann",
                "versions": {"1": {"created": "c", "manifest_sha256": "m", "sealed_by": "k"}},
                "aliases": {"production": "1"},
                "history": {"production": [{"version": "1", "at": "t", "why": "w"}]},
            }
        },
    }
    index = Index.decode(json.dumps(later).encode()).with_version(
        "a", "2", VersionEntry(created="d", manifest_sha256="n")
    )
    written = json.loads(index.encode())
    del written["models"]["a"]["versions"]["2"]
    written["models"]["a"]["history"]["production"][0].pop("by")

    assert written == later


# From scripts and notebooks


def test_what_was_saved_is_loaded_and_is_the_fitted_object(manager):
    ref = manager.save("fraud", classifier(), scaler=scaler(), examples=ROWS[:20])
    model = manager.load("fraud")

    assert str(ref) == str(model.ref) == "fraud/1"
    assert model.predict_directly(ROWS, "predict_proba").tolist() == expected()
    assert len(model.golden.instances) == 20


async def test_saving_and_loading_work_inside_a_running_event_loop(r2):
    manager = r2()

    assert str(manager.save("a", linear(1))) == "a/1"
    assert manager.load("a").estimator.intercept_ == linear(1).intercept_


def test_one_manager_may_be_used_from_several_threads(r2):
    manager = r2()
    refs = []
    threads = [threading.Thread(target=lambda n=n: refs.append(manager.save("a", linear(n)))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(ref.version for ref in refs) == ["1", "2", "3", "4"]


def test_the_environment_says_where_to_save(s3, bucket, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DYNO", raising=False)
    values = r2_environment(s3.endpoint_url, bucket, s3.writer)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    manager = ModelStorageManager.from_env()
    manager.save("a", linear(3), examples=ROWS[:5])

    assert ModelStorageManager.from_env().load("a").estimator.intercept_ == linear(3).intercept_


def test_what_is_not_there_is_named_with_what_is(manager):
    with pytest.raises(UnusableModel, match="there is nothing"):
        manager.load("a")
    manager.save("a", linear(1))

    with pytest.raises(UnusableModel, match="there is no model 'b' in .*; there is a"):
        manager.load("b")
    with pytest.raises(UnusableModel, match="a has no version '9'; it has versions 1"):
        manager.load("a", "9")
    with pytest.raises(UnusableModel, match="a has no alias 'staging'; it has versions 1"):
        manager.load("a", alias="staging")


async def test_a_bare_model_loads_too(manager, storage):
    await storage.put("models/fraud.joblib", dumped(classifier()))
    await storage.put("models/fraud_scaler.joblib", dumped(scaler()))

    assert (await loaded(manager, "fraud")).predict_directly(ROWS, "predict_proba").tolist() == expected()


def test_what_cannot_be_published_fails_where_it_was_asked_for(manager, storage):
    with pytest.raises(PublishError, match="format 'npz'"):
        manager.save("a", linear(1), format="npz")
    with pytest.raises(UnusableModel, match="none of the methods"):
        manager.save("a", {"no": "model"})
    storage.fail(StorageUnavailable("cut off"))
    with pytest.raises(StorageUnavailable):
        manager.save("a", linear(1))


async def test_the_prefix_is_where_everything_lies(storage):
    manager = ModelStorageManager(storage, prefix="", trust=TRUST)
    await manager.publish("a", draft(linear(1)))
    await storage.put("b.joblib", dumped(linear(2)))

    assert sorted(ref.name for ref in (await manager.catalogue()).wanted) == ["a", "b"]
    with pytest.raises(ObjectNotFound):
        await storage.get("models/index.json")
