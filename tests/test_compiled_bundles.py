"""A version with a compiled form: how it is stored, what of it is read, and what becomes of it when it is not what it was."""

import asyncio
import hashlib
import io
import json
import logging
import sys
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict
from sklearn.linear_model import LinearRegression
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from app import gate, memory, publishing
from app.compiled import container
from app.compiled.program import Program
from app.compiler import planner
from app.errors import (
    ArtifactMissing,
    CompiledUnreadable,
    DigestMismatch,
    GoldenMismatch,
    InvalidManifest,
    UnusableModel,
    VersionExists,
    VersionMismatch,
)
from app.index import VersionEntry
from app.manifest import COMPILED, PROGRAM_FORMAT, Artifact, Compiled, Manifest
from app.model_storage import ModelStorageManager, load_checked
from app.names import NAME, ModelRef
from app.storage.local import LocalStorage
from app.verification import verify
from tests.repository import Watched, dumped, serving
from tests.toy_operations import Chosen, line, program
from tests.trusted import TRUST

random = np.random.default_rng(4)
X = random.normal(size=(60, 3)).round(3)
WORDS = np.where(X[:, 0] > 0, "yes", "no")
SUM = LinearRegression().fit(X, X.sum(axis=1) + random.normal(size=60))
SVC = LinearSVC().fit(X, WORDS)
REF = ModelRef("a", "1")
TREE = DecisionTreeClassifier(max_depth=3).fit(X, WORDS)


@pytest.fixture
def storage(tmp_path):
    return Watched(LocalStorage(tmp_path / "bucket"))


@pytest.fixture
def manager(storage):
    return ModelStorageManager(storage, trust=TRUST)


def draft(estimator=SVC, examples=X, **options):
    parts = {"model": publishing.part_from_object("model", estimator)}
    return publishing.draft(parts, examples, trust=TRUST, **{"compile": True, **options})


def programs(root):
    return sorted(root.rglob("compiled/*"))


async def load(manager, name="a", **options):
    with await manager.fetch(await manager.wanted(name), **options) as bundle:
        return (await asyncio.to_thread(load_checked, bundle)).model


async def rewrite(manager, storage, change, ref="a/1"):
    """Change a manifest as its publisher might have written it: the index pins what is there then."""
    key = f"models/{ref}/manifest.json"
    document = json.loads((await storage.inner.get(key)).body)
    change(document)
    body = json.dumps(document).encode()
    await storage.inner.put(key, body)
    index = await manager.read_index()
    name, version = ref.split("/")
    entry = VersionEntry(created=document["created"], manifest_sha256=hashlib.sha256(body).hexdigest())
    versions = {**index.models[name].versions, version: entry}
    models = {**index.models, name: index.models[name].model_copy(update={"versions": versions})}
    await storage.inner.put("models/index.json", index.model_copy(update={"models": models}).encode())


async def replace_program(manager, storage, body):
    """Publish another program in the place of the one that is there, with its own digests."""

    def change(document):
        kept = [artifact for artifact in document["artifacts"] if artifact["role"] != COMPILED]
        (old,) = (artifact for artifact in document["artifacts"] if artifact["role"] == COMPILED)
        other = Artifact.of(body, role=COMPILED, path=old["path"], format=PROGRAM_FORMAT)
        document["artifacts"] = [*kept, other.model_dump(mode="json")]

    manifest = json.loads((await storage.inner.get("models/a/1/manifest.json")).body)
    (path,) = (artifact["path"] for artifact in manifest["artifacts"] if artifact["role"] == COMPILED)
    await storage.inner.put(f"models/a/1/{path}", body)
    await rewrite(manager, storage, change)


# Publishing


async def test_a_version_that_is_compiled_altogether_is_read_without_its_model(manager, storage):
    await manager.publish("a", draft())
    storage.calls.clear()
    model = await load(manager)

    assert model.runtime == "compiled"
    assert model.estimator is None
    assert model.predict(model.signature.validate(X.tolist()), "predict").tolist() == SVC.predict(X).tolist()
    assert not [call for call in storage.calls if "model.joblib" in call[1]]


def test_what_was_compiled_is_in_the_manifest_and_its_program_can_be_looked_into():
    made = draft()
    manifest = Manifest.decode(made.manifest(REF, "now").encode(), REF)

    assert manifest.compiled is not None
    assert manifest.compiled.methods == ("predict", "decision_function")
    assert manifest.not_compiled is None
    assert manifest.program is not None
    assert manifest.program.path.startswith("compiled/")
    (body,) = (part.body for part in made.parts if part.role == COMPILED)
    document, arrays = container.read(io.BytesIO(body), len(body))
    assert set(document["heads"]) == {"predict", "decision_function"}
    assert any(np.array_equal(np.ravel(array), SVC.coef_.ravel()) for array in arrays.values())


def test_what_is_not_compiled_says_why():
    made = draft(compile=False)

    assert made.not_compiled == publishing.NOT_ASKED_FOR
    assert made.manifest(REF, "now").compiled is None
    assert made.summary == ""
    assert [part.role for part in made.parts] == ["model"]


def test_save_compiles_unless_it_is_told_not_to(manager, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "diskless.models"):
        manager.save("a", SVC, examples=X)
        manager.save("b", SVC, examples=X, compile=False)

    assert [path.parts[-4] for path in programs(tmp_path)] == ["a"]
    assert "a/1: compiled predict, decision_function" in caplog.text
    assert manager.load("a").estimator.coef_.tolist() == SVC.coef_.tolist()
    assert manager.load("a").runtime == manager.load("b").runtime == "sklearn"


def test_a_compiler_that_fails_does_not_fail_the_publish(manager, translated):
    def fail(estimator, flow):
        raise RecursionError("too deep")

    translated(SVC, fail)
    manager.save("a", SVC, examples=X)

    assert "RecursionError: too deep" in str(draft().not_compiled)
    assert manager.load("a").runtime == "sklearn"


async def test_an_interrupted_publish_is_taken_up_again_even_if_it_is_compiled_otherwise(manager, storage, monkeypatch):
    storage.fail(OSError("cut off"), "put", "index.json")
    with pytest.raises(OSError, match="cut off"):
        await manager.publish("a", draft(), version="1")
    storage.fail(None)
    original = planner.variants
    monkeypatch.setattr(
        planner, "variants", lambda it: [Program(it.body, dict(reversed(original(it)[0].heads.items())))]
    )
    await manager.publish("a", draft(), version="1")

    assert (await load(manager)).runtime == "compiled"
    with pytest.raises(VersionExists):
        await manager.publish("a", draft(SUM), version="1")


async def test_unpublishing_takes_the_program_along(manager, tmp_path):
    await manager.publish("a", draft())
    assert programs(tmp_path)
    await manager.unpublish("a", "1", drop_aliases=True)

    assert not [path for path in programs(tmp_path) if path.is_file()]


# What computes


async def test_what_computes_can_be_chosen(manager, storage):
    await manager.publish("a", draft())
    manager.runtime = "sklearn"
    by_sklearn = await load(manager)
    manager.runtime = "compiled"
    by_program = await load(manager)

    assert by_sklearn.runtime == "sklearn"
    assert by_sklearn.not_compiled == "only scikit-learn was asked for"
    assert by_program.runtime == "compiled"


async def test_where_only_what_is_compiled_may_serve_the_rest_is_refused_with_the_reason(manager, storage):
    await manager.publish("a", draft(compile=False))
    await storage.put("models/b.joblib", dumped(SUM))
    manager.runtime = "compiled"

    with pytest.raises(
        UnusableModel, match="a/1: ML_RUNTIME is compiled, and it was published without a compiled form"
    ):
        await load(manager)
    with pytest.raises(UnusableModel, match="is a bare model, and ML_RUNTIME is compiled: publish it again"):
        await load(manager, "b")


async def test_a_method_without_a_compiled_form_is_computed_by_scikit_learn_beside_it(manager, translated):
    chosen = Chosen(line(SVC), tuple(SVC.classes_.tolist()))
    wrong = line(LinearSVC(C=9.0).fit(X, WORDS))
    translated(SVC, lambda *_: {"predict": chosen, "decision_function": wrong})
    made = draft()
    await manager.publish("a", made)
    model = await load(manager)
    rows = model.signature.validate(X.tolist())

    assert model.runtime == "compiled+sklearn"
    assert model.runtimes_for("predict") == ("compiled", "sklearn")
    assert model.runtimes_for("decision_function") == ("sklearn",)
    assert model.predict(rows, "decision_function").tolist() == SVC.decision_function(X).tolist()
    manager.runtime = "compiled"
    with pytest.raises(UnusableModel, match="its decision_function differs from scikit-learn's by"):
        await load(manager)


async def test_versions_matter_only_where_scikit_learn_computes(manager, storage):
    await manager.publish("a", draft())
    await rewrite(manager, storage, lambda it: it["trained_with"].update({"scikit-learn": "0.19.2"}))

    assert (await load(manager)).runtime == "compiled"
    assert (await load(manager, runtime="every")).runtime == "compiled"
    manager.runtime = "sklearn"
    with pytest.raises(VersionMismatch, match=r"0\.19\.2"):
        await load(manager)


async def test_an_old_bundle_of_a_tree_and_a_bare_tree_are_compiled_as_they_are_loaded(manager, storage, monkeypatch):
    pytest.importorskip("app.compiled.trees")
    monkeypatch.setattr(gate, "COMPILE_SECONDS", 60.0)  # other tests keep this machine busy
    await manager.publish("a", draft(TREE, compile=False))
    await rewrite(manager, storage, lambda it: it.pop("not_compiled"))
    await storage.put("models/b.joblib", dumped(TREE))
    for name in ("a", "b"):
        model = await load(manager, name)

        assert model.runtime == "compiled+sklearn"
        assert model.compiled is not None
        assert model.compiled.rows > 200
        assert model.predict(model.signature.validate(X.tolist()), "predict").tolist() == TREE.predict(X).tolist()


async def test_what_was_published_without_a_compiled_form_on_purpose_gets_none_at_load(manager):
    await manager.publish("a", draft(TREE, compile=False))
    model = await load(manager)

    assert model.runtime == "sklearn"
    assert model.not_compiled == publishing.NOT_ASKED_FOR


# What is not as it was


async def test_a_flipped_byte_in_a_program_is_refused(manager, storage, tmp_path):
    await manager.publish("a", draft())
    (path,) = programs(tmp_path)
    body = bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)

    with pytest.raises(DigestMismatch, match="safetensors"):
        await load(manager)


async def test_a_missing_program_is_refused_unless_it_is_not_needed(manager, tmp_path):
    await manager.publish("a", draft())
    (path,) = programs(tmp_path)
    path.unlink()

    with pytest.raises(ArtifactMissing, match="compiled/"):
        await load(manager)
    assert (await load(manager, runtime="sklearn")).runtime == "sklearn"


async def test_the_program_of_another_model_does_not_pass_the_golden_rows(manager, storage):
    await manager.publish("a", draft())
    other = LinearSVC().fit(X, np.where(X[:, 1] > 0, "yes", "no"))
    heads = {"predict": Chosen(line(other), ("no", "yes")), "decision_function": line(other)}
    await replace_program(manager, storage, program(**heads).write())

    with pytest.raises(GoldenMismatch, match="a/1: its compiled form: golden row"):
        await load(manager)
    found = [verdict async for verdict in verify(manager)]
    assert "its compiled form: golden row" in str(found[0].problem)


@pytest.mark.parametrize(
    "body",
    [
        b"nonsense that is long enough",
        container.write({"format": 1, "body": None, "heads": {"predict": {"op": "from the future"}}}, {}),
        container.write({"format": 1, "body": None, "heads": {"predict": {"op": "chain", "steps": []}}}, {}),
    ],
)
async def test_a_program_that_this_release_cannot_read_leaves_scikit_learn_to_serve(manager, storage, body):
    await manager.publish("a", draft())
    await replace_program(manager, storage, body)

    with pytest.raises(CompiledUnreadable):
        await load(manager)
    async with serving(manager) as served:
        outcome = await served.refresher.look_now()
        model = served.registry.get("a").model

        assert outcome.loaded == ("a/1",)
        assert model.runtime == "sklearn"
        assert "safetensors" in str(model.not_compiled)
        assert await served.ask(X.tolist(), "a") == SVC.predict(X).tolist()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 2}, "its compiled form has format 2"),
        ({"operations": ["chain", "time travel"]}, "operations that this release does not know: time travel"),
    ],
)
async def test_a_program_of_a_later_release_is_not_even_looked_for(manager, storage, change, why):
    await manager.publish("a", draft())
    await rewrite(manager, storage, lambda it: it["compiled"].update(change))
    storage.calls.clear()
    model = await load(manager)

    assert model.runtime == "sklearn"
    assert why in str(model.not_compiled)
    assert not [call for call in storage.calls if "compiled/" in call[1]]


@pytest.mark.parametrize(
    "speeds",
    [
        {"reference": {"1": float("nan")}, "compiled": {"1": float("inf")}},
        {"reference": {"1": -1.0, "64": 0}, "compiled": {"1": 0, "64": -5}},
        {"reference": {"0": 1, str(10**400): 1}, "compiled": {"-3": 1, str(10**400): 1e308}},
    ],
)
async def test_figures_that_cannot_have_been_measured_are_refused(manager, storage, speeds):
    await manager.publish("a", draft())
    await rewrite(manager, storage, lambda document: document["compiled"].update(microseconds_per_row=speeds))

    with pytest.raises(InvalidManifest, match="microseconds_per_row"):
        await load(manager)


async def test_without_figures_the_compiled_form_is_taken(manager, storage):
    await manager.publish("a", draft())
    await rewrite(manager, storage, lambda document: document["compiled"].update(microseconds_per_row={}))
    manager.runtime = "every"
    model = await load(manager)

    assert model.runtime == "compiled+sklearn"
    assert model.predict(model.signature.validate(X.tolist()), "predict").tolist() == SVC.predict(X).tolist()


async def test_verify_runs_the_golden_rows_on_both(manager, storage):
    await manager.publish("a", draft())
    await manager.publish("b", draft(compile=False))
    found = {verdict.ref: verdict async for verdict in verify(manager)}

    assert found["a/1"].problem is found["b/1"].problem is None
    assert found["a/1"].runtime == "compiled+sklearn"
    assert found["b/1"].runtime == "sklearn"


# Room


async def test_room_is_looked_for_only_for_what_will_be_read(manager, storage, monkeypatch):
    await manager.publish("a", draft())

    def measured(it):
        it.update(resident_bytes=900 << 20, peak_bytes=990 << 20)
        it["compiled"].update(resident_bytes=5 << 20, peak_bytes=7 << 20)

    await rewrite(manager, storage, measured)
    with await manager.fetch(await manager.wanted("a")) as bundle:
        assert bundle.recorded == memory.Taken(5 << 20, 7 << 20)
        assert not bundle.needs_sklearn
    with await manager.fetch(await manager.wanted("a"), runtime="every") as bundle:
        assert bundle.recorded == memory.Taken(905 << 20, 990 << 20)
        assert bundle.needs_sklearn


def test_a_program_is_not_expected_to_import_scikit_learn(monkeypatch):
    monkeypatch.delitem(sys.modules, "sklearn")
    stored = [memory.Stored(PROGRAM_FORMAT, 1000)]
    with_it = memory.Estimator().estimate(stored)
    without = memory.Estimator().estimate(stored, needs_sklearn=False)

    assert with_it.resident_bytes - without.resident_bytes >= memory.LIBRARIES_BYTES - memory.ENGINE_BYTES


# Releases that do not know of compiled forms


class ArtifactOfRelease03(BaseModel):
    model_config = ConfigDict(frozen=True)

    role: str
    path: str
    format: str
    size: int
    sha256: str
    chunk_bytes: int
    chunks: tuple[str, ...] = ()


class ManifestOfRelease03(BaseModel):
    """As the release before reads it, with the rules that it holds artifacts to."""

    model_config = ConfigDict(frozen=True)

    format: int
    name: str
    version: str
    created: str
    artifacts: tuple[ArtifactOfRelease03, ...]
    signature: dict[str, Any]
    golden: dict[str, Any] | None = None
    trained_with: dict[str, str] = {}
    resident_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def served(self) -> list[ArtifactOfRelease03]:
        order = ("scaler", "encoder", "preprocessor", "model")
        return sorted((it for it in self.artifacts if it.role in order), key=lambda it: order.index(it.role))


def test_an_older_release_reads_the_manifest_and_passes_over_what_is_compiled():
    old = ManifestOfRelease03.model_validate_json(draft().manifest(REF, "now").encode())
    roles = [artifact.role for artifact in old.artifacts]

    assert old.format == 1
    assert roles.count("model") == 1
    assert len(set(roles)) == len(roles)
    assert all(NAME.match(part) for artifact in old.artifacts for part in artifact.path.split("/"))
    assert all(len(it.role) <= 100 and len(it.format) <= 100 and len(it.path) <= 500 for it in old.artifacts)
    assert all(len(it.chunks) == -(-it.size // it.chunk_bytes) for it in old.artifacts)
    assert [artifact.role for artifact in old.served] == ["model"]


def test_a_manifest_without_a_word_of_it_keeps_loading():
    document = json.loads(draft(compile=False).manifest(REF, "now").encode())
    del document["not_compiled"]
    manifest = Manifest.decode(json.dumps(document).encode(), REF)

    assert manifest.compiled is manifest.not_compiled is manifest.program is None


def test_what_is_known_of_a_program_must_be_possible():
    with pytest.raises(ValueError, match="parity"):
        Compiled(format=1, methods=("predict",), parity=-1.0, rows=1)
