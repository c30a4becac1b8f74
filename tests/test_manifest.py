"""The list of what a version consists of, and what is no such list."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from pydantic import ValidationError

from app.errors import InvalidManifest
from app.manifest import CHUNK_BYTES, FORMAT, MAX_MANIFEST_BYTES, Artifact, Golden, Manifest, Speeds
from app.names import ModelRef
from app.signature import Signature, TensorSpec

REF = ModelRef("churn", "7")
BODY = b"bytes of a model"
MANIFEST = Manifest(
    format=1,
    name="churn",
    version="7",
    created="2026-01-01T00:00:00+00:00",
    artifacts=(Artifact.of(BODY, role="model", path="model.joblib", format="joblib"),),
    signature=Signature(
        layout="frame",
        inputs=(TensorSpec(name="größe", datatype="BYTES", dtype="category", categories=("a", "b"), ordered=True),),
        methods=("predict",),
        classes=[0, 1.5, True, "ja"],
    ),
    golden=Golden(instances=[["a"], [None]], outputs={"predict": [5e-324, None]}),
)


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(MANIFEST.encode()), **fields}).encode()


def artifact(**fields: Any) -> dict[str, Any]:
    return {**json.loads(MANIFEST.encode())["artifacts"][0], **fields}


def test_a_manifest_comes_back_as_it_was():
    again = Manifest.decode(MANIFEST.encode(), REF)

    assert again == MANIFEST
    assert again.encode() == MANIFEST.encode()
    assert [type(item) for item in again.signature.classes or ()] == [int, float, bool, str]


def test_an_artifact_has_the_digest_of_every_chunk():
    body = bytes(CHUNK_BYTES) + b"rest"
    found = Artifact.of(body, role="model", path="model.pkl", format="pickle")

    assert found.sha256 == hashlib.sha256(body).hexdigest()
    assert found.chunks == tuple(hashlib.sha256(chunk).hexdigest() for chunk in (bytes(CHUNK_BYTES), b"rest"))
    assert Artifact.of(b"", role="model", path="model.pkl", format="pickle").chunks == ()


def test_fields_of_a_later_release_are_no_obstacle():
    assert Manifest.decode(changed(colour="blue"), REF) == MANIFEST


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "manifest.json is not a manifest: the whole: Invalid JSON"),
        (b"\xff", "manifest.json is not a manifest"),
        (b"[]", "manifest.json is not a manifest"),
        (b"{}", "manifest.json is not a manifest: format: Field required"),
        (changed(format=FORMAT + 1), "this release reads up to 1: upgrade Diskless"),
        (changed(version="8"), "manifest.json there belongs to churn/8"),
        (changed(name="fraud"), "manifest.json there belongs to fraud/7"),
        (changed(artifacts=[]), "must list one model and each role once, lists []"),
        (changed(artifacts=[artifact(), artifact()]), "must list one model and each role once"),
        (changed(artifacts=[artifact(role="scaler")]), "must list one model and each role once, lists ['scaler']"),
        (changed(artifacts=[artifact(path="../8/model.joblib")]), "leaves its version's folder or is no path"),
        (changed(artifacts=[artifact(path="/etc/passwd")]), "leaves its version's folder or is no path"),
        (changed(artifacts=[artifact(path="")]), "leaves its version's folder or is no path"),
        (changed(artifacts=[artifact(size=-1)]), "manifest.json is not a manifest: artifacts.0.size"),
        (changed(artifacts=[artifact(size=CHUNK_BYTES * 2)]), "are 2 chunks, the manifest lists 1"),
        (changed(artifacts=[artifact(chunk_bytes=0)]), "manifest.json is not a manifest: artifacts.0.chunk_bytes"),
        (
            changed(artifacts=[artifact(chunk_bytes=1024)]),
            "chunk_bytes: Input should be greater than or equal to 4096",
        ),
        (
            changed(artifacts=[artifact(chunk_bytes=1 << 40)]),
            "chunk_bytes: Input should be less than or equal to 4194304",
        ),
        (changed(artifacts=[artifact(path="a/" * 1_000_000)]), "path: String should have at most 500 characters"),
        (changed(artifacts=[artifact(path="-" * 400)]), "leaves its version's folder or is no path"),
        (changed(artifacts=[artifact(role="x" * 1_000_000)]), "role: String should have at most 100 characters"),
        (
            changed(artifacts=[artifact(role=f"r{number}") for number in range(5000)]),
            "must list one model and each role",
        ),
        (changed(artifacts=[artifact(sha256="0" * 1_000_000)]), "sha256: String should have at most 64 characters"),
        (changed(artifacts=[artifact(chunks=["0" * 1_000_000])]), "chunks.0: String should have at most 64 characters"),
        (changed(version="8" * 1_000_000), "version: String should have at most 100 characters"),
        (changed(trained_with={"numpy": "2" * 1_000_000}), "trained_with.numpy: String should have at most 100"),
        (changed(trained_with={"x" * 1_000_000: "1"}), "trained_with.x"),
        (b" " * MAX_MANIFEST_BYTES + MANIFEST.encode(), "it has more than 8,388,608 bytes"),
    ],
)
def test_what_is_no_manifest_of_this_version_is_refused(body, sentence):
    with pytest.raises(InvalidManifest) as caught:
        Manifest.decode(body, REF)

    assert str(caught.value).startswith("churn/7")
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("figure", ["Infinity", "-Infinity", "NaN", "-1"])
def test_figures_that_are_no_times_are_refused(figure):
    speeds = f'{{"reference": {{"1": {figure}, "2": 1}}, "compiled": {{"1": 1, "2": 1}}}}'

    with pytest.raises(ValidationError):
        Speeds.model_validate_json(speeds)


def test_a_number_of_rows_that_no_request_has_is_refused():
    with pytest.raises(ValidationError):
        Speeds(reference={10**400: 1.0})
