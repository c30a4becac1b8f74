"""What is in the bucket is served as it was fitted, or not at all: every defect is named, and what is mended serves.

From the real S3 server, but where it says otherwise; the last test asks the real process.
"""

import hashlib
import io
import json
import pickle

import joblib
import numpy as np
import pytest
import skops.io
from sklearn.preprocessing import LabelEncoder, OrdinalEncoder

from app import model_storage
from app.errors import ModelNotReady, StorageDenied
from app.index import Index, ModelEntry, VersionEntry
from app.model_storage import ModelStorageManager
from app.registry import State
from app.storage.local import LocalStorage
from app.storage.r2 import R2Storage
from tests.repository import (
    CLASSES,
    ROWS,
    Watched,
    classifier,
    draft,
    dumped,
    expected,
    linear,
    put,
    scaler,
    serving,
)
from tests.service import r2_environment, running
from tests.trusted import TRUST

ONE = [[1.0, 1.0, 1.0]]


@pytest.fixture
def storage(bucket, r2_arguments):
    return Watched(R2Storage(**r2_arguments))


@pytest.fixture
def manager(storage):
    return ModelStorageManager(storage, trust=TRUST)


def written(format, value):
    buffer = io.BytesIO()
    if format == "compressed":
        joblib.dump(value, buffer, compress=3)
    elif format == "skops":
        skops.io.dump(value, buffer)
    elif format == "pickle":
        pickle.dump(value, buffer)
    else:
        joblib.dump(value, buffer)
    return buffer.getvalue()


# What serves


@pytest.mark.parametrize(
    ("ending", "format"),
    [("joblib", "joblib"), ("joblib", "compressed"), ("pkl", "pickle"), ("pkl", "joblib"), ("skops", "skops")],
)
async def test_a_bare_pair_serves_as_the_fitted_objects_do(manager, storage, ending, format):
    async with serving(manager) as served:
        await storage.put(f"models/fraud.{ending}", written(format, classifier()))
        await storage.put(f"models/fraud_scaler.{ending}", written(format, scaler()))
        outcome = await served.refresher.look_now()

        assert outcome.failed == {}
        assert served.slot("fraud").bare
        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()
        report = served.registry.get("fraud").model.report
        assert [source.key for source in report.sources] == [f"models/fraud_scaler.{ending}", f"models/fraud.{ending}"]


@pytest.mark.parametrize("format", ["joblib", "pickle", "skops"])
async def test_a_published_pair_serves_as_the_fitted_objects_do(manager, format):
    manager.save("fraud", classifier(), scaler=scaler(), examples=ROWS[:20], format=format, compile=False)
    async with serving(manager) as served:
        outcome = await served.refresher.look_now()
        slot = served.slot("fraud")

        assert outcome.failed == {}
        assert (slot.state, slot.parity, slot.bare) == (State.READY, 0.0, False)
        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()
        assert set(slot.seconds) == {"find", "load", "check"}


async def test_companions_are_applied_in_order_and_a_label_encoder_behind_the_model(manager, storage):
    codes = LabelEncoder().fit(CLASSES)
    ordinal = OrdinalEncoder().fit(np.array([[0.0] * 3, [1.0] * 3]))
    async with serving(manager) as served:
        model = type(classifier())().fit(ordinal.transform(scaler().transform(ROWS) > 0), codes.transform(CLASSES))
        await storage.put("models/a.joblib", dumped(model))
        await storage.put("models/a_encoder.joblib", dumped(codes))
        await storage.put("models/a_preprocessor.joblib", dumped(scaler()))
        outcome = await served.refresher.look_now()

        assert outcome.failed == {}
        answer = await served.ask(ROWS.tolist(), "a")
        assert answer == codes.inverse_transform(model.predict(scaler().transform(ROWS))).tolist()


async def test_a_changed_bare_file_is_noticed_by_its_etag(manager, storage):
    async with serving(manager) as served:
        await storage.put("models/a.joblib", dumped(linear(1)))
        await served.refresher.look_now()
        first = served.version("a")
        info = await storage.put("models/a.joblib", dumped(linear(2)))
        await served.refresher.look_now()

        assert served.version("a") == info.etag[:12] != first
        assert await served.ask(ONE, "a") == pytest.approx([5])


async def test_what_is_no_model_is_passed_over_and_said(manager, storage):
    async with serving(manager) as served:
        await manager.publish("a", draft(linear(1)))
        for key in ("notes.txt", "a.joblib", "lost_scaler.joblib", "two words.pkl", "deeper/b.joblib"):
            await storage.put(f"models/{key}", dumped(linear(2)))
        await served.refresher.look_now()

        assert list(served.registry.snapshot.entries) == ["a"]
        assert served.refresher.ignored == {
            "a (bare)": "a published model has this name",
            "lost_scaler": "a companion without its model lost",
            "notes.txt": "its ending is not one of .joblib, .pkl, .pickle, .skops",
            "two words.pkl": "its name has characters that a model's name cannot have",
        }


async def test_at_most_fifty_files_that_are_no_models_are_listed(manager, storage):
    async with serving(manager) as served:
        await manager.publish("a", draft(linear(1)))
        for number in range(60):
            await storage.put(f"models/house{number}.JOBLIB", b"")
        await served.refresher.look_now()

        assert len(served.refresher.ignored) == 50
        assert set(served.refresher.ignored.values()) == {"its ending is not one of .joblib, .pkl, .pickle, .skops"}


async def test_of_everything_that_is_passed_over_at_most_fifty_of_a_kind_are_listed(manager, storage):
    async with serving(manager, aliases=("staging",)) as served:
        for number in range(60):
            for key in (f"two words {number}.pkl", f"lost{number}_scaler.joblib"):
                await storage.put(f"models/{key}", b"")
        entry = VersionEntry(created="", manifest_sha256="0")
        names = {f"a{number}": ModelEntry(versions={"1": entry}) for number in range(60)}
        await storage.put("models/index.json", Index(models=names).encode())
        await served.refresher.look_now()

        assert len(served.refresher.ignored) == 150


async def test_more_bare_models_than_anybody_serves_are_not_tried_but_none_loses_its_companion(
    manager, storage, monkeypatch
):
    monkeypatch.setattr(model_storage, "MAX_BARE_MODELS", 2)
    async with storage:
        for name in ("a", "b", "c"):
            for file in (f"{name}.joblib", f"{name}_scaler.joblib"):
                await storage.put(f"models/{file}", b"")
        found = await manager.catalogue()

    assert [(ref.name, [part.role for part in it.parts]) for ref, it in found.wanted.items()] == [
        ("a", ["scaler", "model"]),
        ("b", ["scaler", "model"]),
    ]
    assert found.ignored == {"c": "more than 2 bare models: publish them, or remove what is none"}


# What does not serve: published versions


def change(body, **fields):
    return json.dumps(json.loads(body) | fields).encode()


async def rewrite(storage, key, edit):
    await storage.put(key, edit((await storage.get(key)).body))


async def flipped(storage, ref):
    await rewrite(storage, f"models/{ref}/model.joblib", lambda body: body[:-1] + bytes([body[-1] ^ 1]))


async def truncated(storage, ref):
    await rewrite(storage, f"models/{ref}/model.joblib", lambda body: body[:-1])


async def artifact_missing(storage, ref):
    await storage.delete(f"models/{ref}/scaler.joblib")


async def manifest_missing(storage, ref):
    await storage.delete(f"models/{ref}/manifest.json")


async def manifest_of_another_version(storage, ref):
    """Put `other/1`'s manifest where this one's was; the index is not told."""
    await storage.put(f"models/{ref}/manifest.json", (await storage.get("models/other/1/manifest.json")).body)


async def index_of_another_manifest(storage, ref):
    """Let the index want `other/1`'s manifest, and put it there."""
    await manifest_of_another_version(storage, ref)
    await pin(storage, ref)


async def pin(storage, ref):
    body = (await storage.get(f"models/{ref}/manifest.json")).body
    index = json.loads((await storage.get("models/index.json")).body)
    index["models"][ref.name]["versions"][ref.version]["manifest_sha256"] = hashlib.sha256(body).hexdigest()
    await storage.put("models/index.json", json.dumps(index).encode())


def manifest(**fields):
    async def tamper(storage, ref):
        await rewrite(storage, f"models/{ref}/manifest.json", lambda body: change(body, **fields))
        await pin(storage, ref)

    return tamper


def manifest_is(body):
    async def tamper(storage, ref):
        await storage.put(f"models/{ref}/manifest.json", body)
        await pin(storage, ref)

    return tamper


async def golden_rows_differ(storage, ref):
    def edit(body):
        value = json.loads(body)
        value["golden"]["outputs"]["predict_proba"][0] = [0.5, 0.5]
        return json.dumps(value).encode()

    await rewrite(storage, f"models/{ref}/manifest.json", edit)
    await pin(storage, ref)


async def artifact_of_unknown_format(storage, ref):
    def edit(body):
        value = json.loads(body)
        value["artifacts"][0]["format"] = "onnx9"
        return json.dumps(value).encode()

    await rewrite(storage, f"models/{ref}/manifest.json", edit)
    await pin(storage, ref)


async def artifact_outside(storage, ref):
    def edit(body):
        value = json.loads(body)
        value["artifacts"][0]["path"] = "../../other/1/model.joblib"
        return json.dumps(value).encode()

    await rewrite(storage, f"models/{ref}/manifest.json", edit)
    await pin(storage, ref)


DEFECTS = {
    "a flipped byte": (flipped, r"model\.joblib.*sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"),
    "a truncated artifact": (truncated, r"model\.joblib: has \d+ bytes, the manifest says \d+"),
    "a missing artifact": (artifact_missing, r"scaler\.joblib is not there, although the manifest lists it"),
    "a missing manifest": (manifest_missing, r"manifest\.json is not there, although the index lists the version"),
    "another manifest than the index wants": (
        manifest_of_another_version,
        r"manifest\.json: sha256 is .*the index says",
    ),
    "another version's manifest": (index_of_another_manifest, r"manifest\.json there belongs to other/1"),
    "a manifest of another format": (manifest(format=9), r"manifest\.json has format 9, this release reads up to 1"),
    "a manifest without a model": (manifest(artifacts=[]), r"must list one model"),
    "a manifest without a field": (manifest(signature=None), r"manifest\.json is not a manifest: signature"),
    "a manifest that is not JSON": (manifest_is(b"\xff{"), r"manifest\.json is not a manifest"),
    "an empty manifest": (manifest_is(b""), r"manifest\.json is not a manifest"),
    "other golden rows": (golden_rows_differ, r"golden row 0: predict_proba gave .*, recorded is \[0\.5, 0\.5\]"),
    "an artifact of an unknown format": (
        artifact_of_unknown_format,
        r"format 'onnx9' is not one this release can read",
    ),
    "an artifact elsewhere": (artifact_outside, r"leaves its version's folder"),
}


@pytest.mark.parametrize("defect", DEFECTS)
async def test_a_defect_keeps_a_version_from_serving_and_is_named_and_mending_it_is_enough(manager, storage, defect):
    tamper, sentence = DEFECTS[defect]
    async with serving(manager) as served:
        await manager.publish("other", draft(linear(5)))
        ref, _ = await manager.publish("fraud", draft(classifier(), ROWS[:5], scaler=scaler()))
        good = {info.key: (await storage.get(info.key)).body for info in await storage.list("models/")}
        await tamper(storage, ref)
        outcome = await served.refresher.look_now()

        assert list(outcome.failed) == ["fraud/1"]
        assert (served.slot("fraud").state, served.slot("fraud").runner) == (State.UNAVAILABLE, None)
        with pytest.raises(ModelNotReady, match=rf"^fraud/1 is UNAVAILABLE: .*{sentence}"):
            await served.ask(ONE, "fraud")
        assert await served.ask(ONE, "other") == pytest.approx([8])
        assert "fraud/1 is UNAVAILABLE" in served.registry.not_ready()

        for key, body in good.items():
            await storage.put(key, body)
        outcome = await served.refresher.look_now()

        assert outcome.loaded == ("fraud/1",)
        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()
        assert served.registry.not_ready() is None


@pytest.mark.parametrize("defect", DEFECTS)
async def test_with_a_defect_in_the_new_version_the_old_one_goes_on(tmp_path, defect):
    tamper, sentence = DEFECTS[defect]
    storage = LocalStorage(tmp_path)  # faster, and the defects are the same
    manager = ModelStorageManager(storage, trust=TRUST)
    async with serving(manager) as served:
        await manager.publish("other", draft(linear(5)))
        await manager.publish("fraud", draft(linear(1)))
        await served.refresher.look_now()
        ref, _ = await manager.publish("fraud", draft(classifier(), ROWS[:5], scaler=scaler()), promote=True)
        await tamper(storage, ref)
        outcome = await served.refresher.look_now()

        assert list(outcome.failed) == ["fraud/2"]
        assert await served.ask(ONE, "fraud") == pytest.approx([4])
        assert served.version("fraud") == "1"
        assert served.registry.not_ready() is None
        with pytest.raises(ModelNotReady, match=sentence):
            await served.ask(ONE, "fraud", version="2")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "index.json is not an index"),
        (b"\xff\xfe", "index.json is not an index"),
        (b"[]", "index.json is not an index"),
        (b"{}", "index.json is not an index: format: Field required"),
        (b'{"format": 1}', "index.json is not an index: models: Field required"),
        (b'{"format": 2, "models": []}', "index.json has format 2, this release reads up to 1: upgrade"),
        (b'{"format": 1, "models": {"a": {"aliases": {"production": "1"}}}}', "names version '1', which it lacks"),
        (b'{"format": 1, "models": {"../a": {}}}', "'../a' cannot be the name"),
        (b'{"format": 1, "models": {"a": {"versions": {"1": {"created": ""}}}}}', "manifest_sha256"),
    ],
)
async def test_a_broken_index_is_named_and_changes_nothing_that_serves(manager, storage, body, sentence):
    async with serving(manager) as served:
        await storage.put("models/index.json", body)
        outcome = await served.refresher.look_now()
        assert sentence in outcome.error
        assert sentence in served.registry.not_ready()
        await storage.delete("models/index.json")
        await manager.publish("a", draft(linear(1)))
        assert (await served.refresher.look_now()).error is None
        await storage.put("models/index.json", body)
        for _ in range(3):
            assert sentence in (await served.refresher.look_now()).error

        assert await served.ask(ONE, "a") == pytest.approx([4])
        assert served.registry.not_ready() is None


def test_an_index_survives_being_written_and_read():
    assert Index.decode(Index().encode(), "e").etag == "e"


# What does not serve: bare models


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"fraud.joblib": b"not a model"}, r"fraud\.joblib: cannot be read as joblib"),
        ({"fraud.joblib": b""}, r"fraud\.joblib: is empty"),
        ({"fraud.joblib": dumped(classifier())[:-20]}, r"fraud\.joblib: cannot be read as joblib"),
        ({"fraud.pkl": b"not a model"}, r"fraud\.pkl: cannot be read as pickle"),
        ({"fraud.skops": b"not a model"}, r"fraud\.skops: is no zip archive"),
        ({"fraud.joblib": dumped({"a": 1})}, "has none of the methods"),
        (
            {"fraud.joblib": dumped(classifier()), "fraud_scaler.joblib": dumped(scaler())[:-20]},
            r"scaler is broken: .*fraud_scaler\.joblib: cannot be read as joblib",
        ),
        (
            {"fraud.joblib": dumped(classifier()), "fraud_scaler.joblib": dumped(linear(1))},
            "a LinearRegression has no transform",
        ),
        (
            {
                "fraud.joblib": dumped(classifier()),
                "fraud_scaler.joblib": dumped(type(scaler())().fit(ROWS[:, :2])),
            },
            "gives 2 columns, the LogisticRegression behind it takes 3",
        ),
        (
            {"fraud.joblib": dumped(classifier()), "fraud.pkl": dumped(classifier())},
            r"fraud\.joblib and fraud\.pkl are both there: which one is the model cannot be known",
        ),
        (
            {
                "fraud.joblib": dumped(classifier()),
                "fraud_scaler.joblib": dumped(scaler()),
                "fraud_scaler.pkl": dumped(scaler()),
            },
            r"fraud_scaler\.joblib and fraud_scaler\.pkl are both there: which one is the scaler",
        ),
    ],
)
async def test_a_bare_model_that_is_not_whole_does_not_serve_and_says_why(manager, storage, files, sentence):
    async with serving(manager) as served:
        await storage.put("models/good.joblib", dumped(linear(1)))
        for file, body in files.items():
            await storage.put(f"models/{file}", body)
        await served.refresher.look_now()
        assert served.slot("fraud").state is State.UNAVAILABLE
        with pytest.raises(ModelNotReady, match=sentence):
            await served.ask(ONE, "fraud")
        assert await served.ask(ONE, "good") == pytest.approx([4])
        for file in files:
            await storage.delete(f"models/{file}")
        await storage.put("models/fraud.joblib", dumped(classifier()))
        await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
        for _ in range(2):  # the second look finds the changed parts unchanged
            await served.refresher.look_now()

        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()


async def test_a_demanded_companion_is_missed_from_the_start(storage):
    manager = ModelStorageManager(storage, companions={"fraud": ("scaler",)}, trust=TRUST)
    async with serving(manager) as served:
        await storage.put("models/fraud.joblib", dumped(classifier()))
        await served.refresher.look_now()
        with pytest.raises(ModelNotReady, match="its scaler is missing: ML_COMPANIONS demands fraud_scaler beside it"):
            await served.ask(ONE, "fraud")
        await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
        for _ in range(2):
            await served.refresher.look_now()

        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()


async def test_a_companion_that_was_never_read_is_missed_too(manager, storage):
    async with serving(manager) as served:
        await storage.put("models/fraud.joblib", dumped(classifier()))
        await storage.put("models/fraud_scaler.joblib", b"half an upload")
        await served.refresher.look_now()
        await storage.delete("models/fraud_scaler.joblib")
        await served.refresher.look_now()

        with pytest.raises(ModelNotReady, match="its scaler is gone"):
            await served.ask(ONE, "fraud")


async def test_a_version_names_only_the_companion_that_is_missing(manager, storage):
    async with storage:
        info = await storage.put("models/fraud.joblib", dumped(classifier()))
        await storage.put("models/fraud_scaler.joblib", dumped(scaler()))
        before = await manager.catalogue()
        await storage.delete("models/fraud_scaler.joblib")

        (ref,) = (await manager.catalogue(before)).wanted

    assert ref.version == f"{info.etag[:12]}-scaler.missing"


async def test_a_model_whose_rights_are_missing_is_the_only_one_that_does_not_serve(manager, storage):
    async with serving(manager) as served:
        await manager.publish("a", draft(linear(1)))
        await manager.publish("b", draft(linear(2)))
        storage.fail(StorageDenied("not with this token"), "", "models/a/1")
        outcome = await served.refresher.look_now()

        assert outcome.failed == {"a/1": "not with this token"}
        assert await served.ask(ONE, "b") == pytest.approx([5])


# The real process


@pytest.fixture
def environment(s3, bucket):
    """What the service is started with: the right to read, and no more."""
    values = r2_environment(s3.endpoint_url, bucket, s3.reader)
    return values | {"ML_REFRESH_SECONDS": "1"}


def test_the_service_names_a_defect_and_recovers_by_itself(environment, bucket, r2_arguments):
    manager = ModelStorageManager(R2Storage(**r2_arguments), trust=TRUST)
    ref = manager.save("fraud", classifier(), scaler=scaler(), examples=ROWS[:5], compile=False)
    key = f"models/{ref}/model.joblib"
    good = put(manager, key, b"")
    put(manager, key, good[:-1] + b"!")
    put(manager, "models/pair.joblib", dumped(classifier()))
    put(manager, "models/pair_scaler.joblib", dumped(scaler()))
    with running(environment) as service:
        service.wait_for(
            lambda status: (
                {(row["name"], row["state"]) for row in status["models"]}
                == {("fraud", "UNAVAILABLE"), ("pair", "READY")}
            ),
            "one served, one not",
        )
        answer = service.predict(model="fraud", instances=ONE)
        ready = service.client.get("/health/ready")
        assert answer.status_code == ready.status_code == 503
        assert answer.json()["error"] == "model_not_ready"
        assert "model.joblib" in answer.json()["detail"]
        assert "fraud/1 is UNAVAILABLE" in ready.json()["reason"]
        put(manager, key, good)
        service.wait_ready()
        for name in ("fraud", "pair"):
            answer = service.predict(model=name, instances=ROWS.tolist(), method="predict_proba")
            assert answer.json()["predictions"] == expected()

        put(manager, "models/pair_scaler.joblib", None)
        service.wait_for(lambda status: status["models"][1]["state"] == "UNAVAILABLE", "the pair is broken")
        assert "its scaler is gone" in service.predict(model="pair", instances=ONE).json()["detail"]
        put(manager, "models/pair_scaler.joblib", dumped(scaler()))
        for _ in range(2):
            assert service.client.post("/models/refresh").json()["failed"] == {}
        answer = service.predict(model="pair", instances=ROWS.tolist(), method="predict_proba")
        assert answer.json()["predictions"] == expected()
