"""`python -m app verify` names what would not serve, looks at everything else too, and says so by its exit code."""

import asyncio
import json
import re
import subprocess
import sys

import pytest

from app.errors import StorageUnavailable
from app.model_storage import ModelStorageManager
from app.storage.local import LocalStorage
from app.verification import verify
from tests.repository import ROWS, Watched, classifier, draft, dumped, linear, scaler
from tests.service import clean_environment
from tests.trusted import TRUST


@pytest.fixture
def storage(tmp_path):
    return Watched(LocalStorage(tmp_path / "bucket"))


@pytest.fixture
def manager(storage):
    return ModelStorageManager(storage, trust=TRUST)


async def verdicts(manager, *names):
    return {verdict.ref: verdict async for verdict in verify(manager, names)}


async def test_every_version_and_every_bare_model_is_looked_at(manager, storage):
    await manager.publish("a", draft(linear(1), ROWS[:7]))
    await manager.publish("a", draft(linear(2)))
    await storage.put("models/b.joblib", dumped(linear(3)))
    found = await verdicts(manager)

    assert [verdict.problem for verdict in found.values()] == [None] * 3
    assert (found["a/1"].golden_rows, found["a/1"].parity, found["a/2"].golden_rows) == (7, 0.0, 0)
    assert [verdict.bare for verdict in found.values()] == [False, False, True]


async def test_only_the_names_that_were_asked_for_are_looked_at_and_unknown_ones_are_said(manager):
    await manager.publish("a", draft(linear(1)))
    await manager.publish("b", draft(linear(2)))
    found = await verdicts(manager, "b", "c")

    assert list(found) == ["c", "b/1"]
    assert found["c"].problem == "there is no such model; there is a, b"


async def test_one_defect_keeps_no_other_version_from_being_looked_at(manager, storage):
    await manager.publish("a", draft(linear(1)))
    await manager.publish("a", draft(linear(2)))
    await manager.publish("b", draft(linear(3)))
    storage.fail(StorageUnavailable("no answer"), "", "models/a/1/")
    await storage.inner.delete("models/a/2/model.joblib")
    found = await verdicts(manager)

    assert found["a/1"].problem == "no answer"
    assert "model.joblib is not there" in found["a/2"].problem
    assert found["b/1"].problem is None


async def test_a_storage_that_cannot_be_read_says_nothing_about_the_models(manager, storage):
    storage.fail(StorageUnavailable("no answer"))
    with pytest.raises(StorageUnavailable):
        await verdicts(manager)


def spoil(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def other_golden_rows(body: bytes) -> bytes:
    value = json.loads(body)
    value["golden"]["outputs"]["predict"][0] = "neither"
    return json.dumps(value).encode()


DEFECTS = [
    ("models/a/1/model.joblib", spoil, r"a/1 model\.joblib.*sha256 is"),
    ("models/a/1/model.joblib", lambda body: body[:-1], r"a/1 model\.joblib: has"),
    ("models/a/1/model.joblib", None, r"a/1: model\.joblib is not there"),
    ("models/a/1/scaler.joblib", None, r"a/1: scaler\.joblib is not there"),
    ("models/a/1/manifest.json", None, r"a/1: manifest\.json is not there"),
    ("models/a/1/manifest.json", other_golden_rows, r"a/1 manifest\.json: sha256 is"),
    ("models/bare.joblib", spoil, r"bare\.joblib: cannot be read as joblib"),
    ("models/bare.joblib", lambda body: dumped(7), "none of the methods"),
    ("models/index.json", lambda body: b"{}", r"index\.json is not an index"),
]


def test_the_command_names_a_defect_and_ends_with_3_and_with_0_when_all_is_well(tmp_path):
    bucket = tmp_path / "bucket"
    manager = ModelStorageManager(LocalStorage(bucket), trust=TRUST)
    manager.save("a", classifier(), scaler=scaler(), examples=ROWS[:5])
    (bucket / "models/bare.joblib").write_bytes(dumped(linear(1)))
    environment = clean_environment({"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(bucket)})

    def run():
        command = [sys.executable, "-m", "app", "verify"]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok     a/1: loads, 5 golden rows come out" in done.stdout

    (bucket / "models/a/1/model.joblib").write_bytes(spoil((bucket / "models/a/1/model.joblib").read_bytes()))
    done = run()
    assert (done.returncode, done.stderr) == (3, "")
    assert "FAILED a/1: a/1 model.joblib" in done.stdout
    assert "ok     bare/" in done.stdout


@pytest.mark.parametrize(("key", "edit", "sentence"), DEFECTS)
async def test_each_defect_is_named(manager, storage, key, edit, sentence):
    await asyncio.to_thread(manager.save, "a", classifier(), scaler=scaler(), examples=ROWS[:5])
    await storage.put("models/bare.joblib", dumped(linear(1)))
    if edit is None:
        await storage.delete(key)
    else:
        await storage.put(key, edit((await storage.get(key)).body))
    problems = [verdict.problem for verdict in (await verdicts(manager)).values() if verdict.problem]

    assert len(problems) == 1
    assert re.search(sentence, problems[0])
