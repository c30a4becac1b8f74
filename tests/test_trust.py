"""What nobody trusted says is right is never loaded: seals against whoever can write to the bucket, and the gate of versions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from app import versions
from app.errors import SealMissing, SettingsError, VersionMismatch
from app.index import Index, VersionEntry
from app.model_storage import ModelStorageManager
from app.names import ModelRef
from app.seal import PrivateKey, TrustedKeys, parse_trusted_keys, public_key_of, seal
from app.settings import load_settings
from app.storage.local import LocalStorage
from app.trust import Trust
from app.verification import verify
from tests.repository import ROWS, Watched, classifier, draft, dumped, expected, linear, scaler, serving
from tests.service import running

OURS, OLD, FOREIGN = (PrivateKey(bytes([number]) * 32) for number in (1, 2, 3))


def keys(**named: PrivateKey) -> TrustedKeys:
    return parse_trusted_keys(",".join(f"{name}:{public_key_of(key)}" for name, key in named.items()))


REQUIRED = Trust(keys=keys(ci=OURS, old=OLD), require_seal=True)
NOT_REQUIRED = Trust(keys=keys(ci=OURS))


@pytest.fixture
def storage(tmp_path):
    return Watched(LocalStorage(tmp_path))


def over(storage: Any, trust: Trust = REQUIRED) -> ModelStorageManager:
    return ModelStorageManager(storage, trust=trust)


async def publish(storage: Any, name: str = "fraud", key: PrivateKey | None = OURS, **options: Any) -> ModelRef:
    made = draft(classifier(), ROWS[:5], scaler=scaler())
    ref, _ = await over(storage).publish(name, made, promote=True, seal_key=key, **options)
    return ref


async def refusal(storage: Any, trust: Trust = REQUIRED, name: str = "fraud") -> str | None:
    """Serve what is there, and return why `name` is not; None when it is, and answers rightly."""
    async with serving(over(storage, trust)) as served:
        await served.refresher.look_now()
        slot = served.slot(name)
        if slot.runner is not None:
            assert await served.ask(ROWS[:3].tolist(), name, "predict_proba") == expected(ROWS[:3])
        return slot.reason


@pytest.mark.parametrize(("key", "name"), [(OURS, "ci"), (OLD, "old")])
async def test_what_a_trusted_key_has_sealed_is_served_and_the_status_says_whose(storage, key, name):
    await publish(storage, key=key)
    async with serving(over(storage)) as served:
        await served.refresher.look_now()

        assert served.registry.get("fraud").model.report.sealed_by == name
        assert await served.ask(ROWS[:3].tolist(), "fraud", "predict_proba") == expected(ROWS[:3])


async def test_what_has_no_seal_is_not_loaded_where_one_is_required(storage):
    await publish(storage, key=None)

    assert "fraud/1: has no seal, and this service wants one" in (await refusal(storage) or "")
    assert not [key for verb, key in storage.calls if verb == "get" and "joblib" in key]


async def test_a_bare_model_is_not_loaded_where_a_seal_is_required(storage):
    await storage.put("models/a.joblib", dumped(linear(1)))

    assert "is a bare model, which nothing can seal" in (await refusal(storage, name="a") or "")


async def test_a_foreign_seal_is_none_where_none_is_required_and_a_refusal_where_one_is(storage):
    await publish(storage, key=FOREIGN)

    assert await refusal(storage, NOT_REQUIRED) is None
    assert "was sealed with key" in (await refusal(storage) or "")


async def test_without_a_key_seals_are_not_even_read(storage):
    await publish(storage)

    assert await refusal(storage, Trust()) is None
    assert ("get", "models/fraud/1/manifest.seal") not in storage.calls


async def test_a_trusted_seal_that_is_wrong_is_a_refusal_even_where_none_is_required(storage):
    await publish(storage)
    await publish(storage)
    other = await storage.get("models/fraud/2/manifest.seal")
    await storage.put("models/fraud/1/manifest.seal", other.body)
    await move(storage, "1")

    assert "its seal, of key ci, is not of this manifest" in (await refusal(storage, NOT_REQUIRED) or "")


async def move(storage: Any, version: str) -> None:
    await over(storage)._change_index(
        lambda index: index.with_alias("fraud", "production", version, at="", by="mallory")
    )


async def repin(storage: Any, name: str = "fraud", version: str = "1", to: str | None = None) -> None:
    """Let the index have the digest of whatever manifest lies there now, as somebody who may write to the bucket can."""
    body = (await storage.get(f"models/{name}/{to or version}/manifest.json")).body
    entry = VersionEntry(created="", manifest_sha256=hashlib.sha256(body).hexdigest())

    def change(index: Index) -> Index:
        model = index.models[name]
        return index._with(name, model.model_copy(update={"versions": {**model.versions, version: entry}}))

    await over(storage)._change_index(change)


def edited(body: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    manifest = json.loads(body)
    change(manifest)
    return json.dumps(manifest).encode()


async def an_altered_manifest(storage: Any) -> None:
    key = "models/fraud/1/manifest.json"
    body = edited((await storage.get(key)).body, lambda manifest: manifest.pop("golden"))
    await storage.put(key, body)
    await repin(storage)


async def a_manifest_with_a_blank_more(storage: Any) -> None:
    key = "models/fraud/1/manifest.json"
    await storage.put(key, (await storage.get(key)).body + b"\n")
    await repin(storage)


async def an_altered_manifest_sealed_again_by_somebody_else(storage: Any) -> None:
    await an_altered_manifest(storage)
    body = (await storage.get("models/fraud/1/manifest.json")).body
    await storage.put("models/fraud/1/manifest.seal", seal(body, FOREIGN))


async def a_foreign_seal_that_says_it_is_ours(storage: Any) -> None:
    body = (await storage.get("models/fraud/1/manifest.json")).body
    text = seal(body, FOREIGN).decode().replace(public_key_of(FOREIGN).id, public_key_of(OURS).id)
    await storage.put("models/fraud/1/manifest.seal", text.encode())


async def no_seal_any_more(storage: Any) -> None:
    await storage.delete("models/fraud/1/manifest.seal")


async def an_empty_seal(storage: Any) -> None:
    await storage.put("models/fraud/1/manifest.seal", b"")


async def a_huge_seal(storage: Any) -> None:
    await storage.put("models/fraud/1/manifest.seal", b"{" * 10_000_000)


async def sealed_without_the_digests_of_its_chunks(storage: Any) -> None:
    key = "models/fraud/1/manifest.json"
    body = edited((await storage.get(key)).body, lambda manifest: manifest["artifacts"][0].pop("chunks"))
    await storage.put(key, body)
    await storage.put("models/fraud/1/manifest.seal", seal(body, OURS))
    await repin(storage)


async def an_altered_model(storage: Any) -> None:
    key = "models/fraud/1/model.joblib"
    body = bytearray((await storage.get(key)).body)
    body[-40] ^= 1
    await storage.put(key, bytes(body))


async def another_model_of_the_same_size(storage: Any) -> None:
    await storage.put(
        "models/fraud/1/model.joblib", b"\0" * len((await storage.get("models/fraud/1/model.joblib")).body)
    )


async def the_companion_of_another_version(storage: Any) -> None:
    other = draft(classifier(), ROWS[:5], scaler=type(scaler())().fit(ROWS * 3 + 1))
    await over(storage).publish("fraud", other, seal_key=OURS)
    await storage.put("models/fraud/1/scaler.joblib", (await storage.get("models/fraud/2/scaler.joblib")).body)


async def all_of_another_names_version(storage: Any) -> None:
    """A sealed version of another name, copied into this one's place, with an index that says so."""
    await over(storage).publish("other", draft(linear(1), ROWS[:5]), seal_key=OURS)
    for info in await storage.list("models/other/1/"):
        await storage.put(info.key.replace("/other/", "/fraud/"), (await storage.get(info.key)).body)
    await repin(storage)


async def all_of_another_version(storage: Any) -> None:
    """An older sealed version of the same name, copied into the place of this one: it would answer as somebody else."""
    await over(storage).publish("fraud", draft(linear(1), ROWS[:5]), version="old", seal_key=OURS)
    for info in await storage.list("models/fraud/old/"):
        await storage.put(info.key.replace("/old/", "/1/"), (await storage.get(info.key)).body)
    await repin(storage)


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        (an_altered_manifest, "SealBroken|is not of this manifest"),
        (a_manifest_with_a_blank_more, "is not of this manifest"),
        (an_altered_manifest_sealed_again_by_somebody_else, "was sealed with key .*, trusted are ci"),
        (a_foreign_seal_that_says_it_is_ours, "is not of this manifest"),
        (no_seal_any_more, "has no seal"),
        (an_empty_seal, "its seal is not JSON"),
        (a_huge_seal, "its seal has 1025 bytes, expected at most 1024"),
        (sealed_without_the_digests_of_its_chunks, "the manifest lists no chunks, so that its bytes would be read"),
        (an_altered_model, "sha256"),
        (another_model_of_the_same_size, "sha256"),
        (the_companion_of_another_version, "scaler is broken: .*sha256|has .* bytes, the manifest says"),
        (all_of_another_names_version, "belongs to other/1"),
        (all_of_another_version, "belongs to fraud/old"),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
async def test_what_was_altered_after_sealing_is_never_loaded(storage, attack, told):
    await publish(storage)
    assert await refusal(storage) is None
    await attack(storage)
    reason = await refusal(storage)

    assert reason is not None
    assert re.search(told, reason), reason


async def test_an_alteration_takes_nothing_from_service_that_was_right(storage):
    await publish(storage)
    async with serving(over(storage)) as served:
        await served.refresher.look_now()
        await publish(storage, key=FOREIGN)
        outcome = await served.refresher.look_now()

        assert "was sealed with key" in outcome.failed["fraud/2"]
        assert served.version("fraud") == "1"
        assert await served.ask(ROWS[:3].tolist(), "fraud", "predict_proba") == expected(ROWS[:3])


async def test_verify_finds_what_is_not_sealed(storage):
    await publish(storage, key=None)
    await publish(storage)
    found = {verdict.ref: verdict.problem async for verdict in verify(over(storage))}

    assert found["fraud/2"] is None
    assert "has no seal" in (found["fraud/1"] or "")


def test_a_script_that_loads_wants_the_seal_too(tmp_path):
    manager = over(LocalStorage(tmp_path))
    manager.save("a", linear(1), examples=ROWS[:3])
    manager.save("a", linear(2), examples=ROWS[:3], seal_key=OURS)

    with pytest.raises(SealMissing):
        manager.load("a", "1")
    assert manager.load("a", "2").report.sealed_by == "ci"


def test_to_require_a_seal_and_trust_nobody_does_not_start(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ML_CLOUD_ONLY", "false")
    monkeypatch.setenv("ML_REQUIRE_SEAL", "true")

    with pytest.raises(SettingsError, match=r"^ML_TRUSTED_KEYS is missing: ML_REQUIRE_SEAL is true"):
        load_settings()


def test_the_process_serves_what_is_sealed_and_says_why_it_does_not_serve_the_rest(tmp_path):
    manager = ModelStorageManager(LocalStorage(tmp_path))
    manager.save("sealed", linear(1), examples=ROWS[:3], seal_key=OURS)
    manager.save("open", linear(2), examples=ROWS[:3])
    environment = {
        "ML_CLOUD_ONLY": "false",
        "ML_LOCAL_DIR": str(tmp_path),
        "ML_REQUIRE_SEAL": "true",
        "ML_TRUSTED_KEYS": f"ci:{public_key_of(OURS)}",
        "ML_REQUIRED_MODELS": "sealed",
    }
    with running(environment) as service:
        service.wait_ready()
        service.wait_for(lambda status: all(row["state"] != "LOADING" for row in status["models"]), "loaded")
        sealed, unsealed = service.model("sealed"), service.model("open")
        answer = service.predict(model="sealed", instances=[[1, 2, 3]])

        assert (sealed["state"], sealed["sealed"], sealed["sealed_by"]) == ("READY", True, "ci")
        assert (unsealed["state"], unsealed["reason"].partition(":")[0]) == ("UNAVAILABLE", "open/1")
        assert answer.json()["predictions"] == pytest.approx([7.0])


# The gate of versions


def of(**trained_with: str) -> Any:
    return replace(draft(linear(1), ROWS[:3]), trained_with={**versions.present_versions(), **trained_with})


async def test_a_model_of_another_scikit_learn_is_refused_before_it_is_read(storage):
    manager = over(storage, Trust())
    await manager.publish("a", of(**{"scikit-learn": "1.2.2"}))
    here = versions.present_versions()["scikit-learn"]

    reason = await refusal(storage, Trust(), "a") or ""
    assert reason.startswith(f"a/1: was trained with scikit-learn 1.2.2, here is scikit-learn {here}: train it with")
    assert not [key for verb, key in storage.calls if verb == "get" and "model.joblib" in key]


async def test_a_model_of_another_numpy_is_loaded_with_a_warning_where_the_policy_is_to_warn(storage):
    manager = over(storage, Trust(version_policy="warn"))
    await manager.publish("a", of(numpy="1.26.4"))
    async with serving(manager) as served:
        await served.refresher.look_now()

        assert "was trained with numpy 1.26.4" in served.registry.get("a").model.report.warnings[0]


async def test_another_patch_release_is_told_and_served(storage):
    here = versions.present_versions()["scikit-learn"]
    other = f"{here.rpartition('.')[0]}.99"
    manager = over(storage, Trust())
    await manager.publish("a", of(**{"scikit-learn": other}))
    async with serving(manager) as served:
        await served.refresher.look_now()

        assert served.registry.get("a").model.report.warnings == (
            f"was trained with scikit-learn {other}, here {here}",
        )


async def test_the_version_before_goes_on_when_the_next_one_fails_the_gate(storage):
    manager = over(storage, Trust())
    await manager.publish("a", draft(linear(1), ROWS[:3]))
    async with serving(manager) as served:
        await served.refresher.look_now()
        await manager.publish("a", of(**{"scikit-learn": "2.0.0"}), promote=True)
        outcome = await served.refresher.look_now()

        assert "was trained with scikit-learn 2.0.0" in outcome.failed["a/2"]
        assert served.version("a") == "1"


@pytest.mark.parametrize("policy", ["refuse", "warn"])
async def test_a_bare_model_tells_by_itself_what_wrote_it(storage, policy):
    body = dumped(linear(1)).replace(versions.present_versions()["scikit-learn"].encode(), b"1.2.2")
    await storage.put("models/a.joblib", body)
    manager = over(storage, Trust(version_policy=policy))
    async with serving(manager) as served:
        outcome = await served.refresher.look_now()
        failed = next(iter(outcome.failed.values()), "")

        if policy == "refuse":
            assert "was trained with scikit-learn 1.2.2, here is" in failed
        else:
            report = served.registry.get("a").model.report
            assert report.trained_with == {"scikit-learn": "1.2.2"}
            assert any("its answers may be wrong" in warning for warning in report.warnings)


def test_a_script_meets_the_gate_too(tmp_path):
    manager = over(LocalStorage(tmp_path), Trust())
    manager.save("a", linear(1), examples=ROWS[:3])
    body = json.loads((tmp_path / "models/a/1/manifest.json").read_text())

    assert body["trained_with"]["scikit-learn"] == versions.present_versions()["scikit-learn"]
    with pytest.raises(VersionMismatch):
        versions.check({"scikit-learn": "0.1"}, "a/1")
