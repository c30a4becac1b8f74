"""Whatever becomes of the bytes of an index or a manifest: a refusal with a sentence, or the right answers; nothing else.

`DISKLESS_MUTATIONS=10000 pytest tests/test_mutations.py` tries as many; by default it is a share of them.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import os
import random
from typing import Any

import numpy as np
import pytest

from app.errors import BundleError, InvalidIndex, RequestError
from app.index import Index
from app.model import wire
from app.model_storage import ModelStorageManager, Wanted, load_checked
from app.names import ModelRef
from app.storage.local import LocalStorage
from tests.repository import CLASSES, ROWS, classifier, draft, expected, scaler

MUTATIONS = int(os.environ.get("DISKLESS_MUTATIONS", "1200")) // 3  # of each; always the same ones
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -0.0, 0.5, "", "0", "\x00", "..", "../x", "/etc/passwd",
    "a" * 5000, "é\u202e", "joblib", "pickle", "skops", "predict", "FP64", "BYTES", "frame", "records", "text", "matrix",
    [], {}, [[]], [None], {"": ""}, [1, 2, 3], {"a": {"b": []}}, "0" * 64, [0] * 1000,
]  # fmt: skip


def mutated(body: bytes, dice: random.Random) -> bytes:
    """Change a few bytes, or a few values."""
    if dice.random() < 0.5:
        document = json.loads(body)
        for _ in range(dice.choice([1, 1, 1, 2, 5])):
            _change(document, dice)
        return json.dumps(document).encode("utf-8", "surrogatepass")
    changed = bytearray(body)
    for _ in range(dice.choice([1, 1, 2, 8])):
        at, length = dice.randrange(len(changed)), dice.choice([1, 1, 2, 40])
        kind = dice.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[at : at + length] = dice.randbytes(length)
        elif kind == 2:
            del changed[at : at + length]
        else:
            start = dice.randrange(len(changed))
            changed[at:at] = changed[start : start + length]
        if not changed:
            return b""
    return bytes(changed)


def _change(document: Any, dice: random.Random) -> None:
    """Put something strange, or another value of the same document, in the place of some value, or take a key away."""
    places: list[tuple[Any, Any]] = []
    rest = [document]
    while rest:
        holder = rest.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        places += [(holder, key) for key in keys]
        rest += [holder[key] for key in keys if isinstance(holder[key], (dict, list))]
    if not places:
        return
    holder, key = dice.choice(places)
    kind = dice.randrange(5)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(dice.choice(STRANGE))[:100]] = holder.pop(key)
    elif kind == 2:
        other, at = dice.choice(places)
        holder[key] = json.loads(json.dumps(other[at])) if at in other or isinstance(other, list) else None
    else:
        holder[key] = copy.deepcopy(dice.choice(STRANGE))  # or the next change would be made to both


@pytest.fixture
async def stored(tmp_path):
    manager = ModelStorageManager(LocalStorage(tmp_path))
    await manager.publish("fraud", draft(classifier(), ROWS[:5], scaler=scaler()))
    await manager.publish("fraud", draft(classifier(), ROWS[:5], scaler=scaler()), promote=True)
    return manager


async def check(manager: ModelStorageManager, wanted: Wanted) -> bool:
    """Load what is wanted and return whether it serves; then its answers are right."""
    try:
        with await manager.fetch(wanted) as bundle:
            model = (await asyncio.to_thread(load_checked, bundle)).model
    except BundleError as error:
        return not str(error)
    for method in set(model.signature.methods) & {"predict", "predict_proba"}:
        rows = ROWS[5:10].tolist()
        try:
            names = [spec.name for spec in model.signature.inputs]
            given = [dict(zip(names, row, strict=True)) for row in rows]
            found = wire(model.predict(model.signature.validate(given), method))
        except RequestError:  # a signature that asks for something else refuses what we send
            continue
        right = (
            expected(ROWS[5:10]) if method == "predict_proba" else classifier().predict(scaler().transform(ROWS[5:10]))
        )
        if method == "predict_proba":
            assert np.allclose(np.asarray(found, dtype=float), right)
        else:
            assert found == list(right)
            assert set(found) <= set(CLASSES)
    return True


async def test_a_manifest_that_was_changed_and_pinned_again_is_refused_or_answers_rightly(stored):
    storage, dice = stored.storage, random.Random(0)
    body = (await storage.get("models/fraud/1/manifest.json")).body
    served = 0
    for _ in range(MUTATIONS):
        changed = mutated(body, dice)
        await storage.put("models/fraud/1/manifest.json", changed)
        wanted = Wanted(ModelRef("fraud", "1"), (), manifest_sha256=hashlib.sha256(changed).hexdigest())
        served += await check(stored, wanted)

    assert 0 < served < MUTATIONS


async def test_a_manifest_that_was_changed_and_not_pinned_again_is_refused(stored):
    storage, dice = stored.storage, random.Random(1)
    body = (await storage.get("models/fraud/1/manifest.json")).body
    wanted = Wanted(ModelRef("fraud", "1"), (), manifest_sha256=hashlib.sha256(body).hexdigest())
    for _ in range(MUTATIONS):
        changed = mutated(body, dice)
        await storage.put("models/fraud/1/manifest.json", changed)

        assert not await check(stored, wanted) or changed == body


async def test_an_index_that_was_changed_is_refused_or_names_what_is_there(stored):
    storage, dice = stored.storage, random.Random(2)
    body = (await storage.get("models/index.json")).body
    read = 0
    for number in range(MUTATIONS):
        await storage.put("models/index.json", mutated(body, dice))
        try:
            catalogue = await stored.catalogue()
        except InvalidIndex:
            continue
        read += 1
        for ref, wanted in catalogue.wanted.items():
            if number % 5 == 0 and await check(stored, wanted):
                assert ref.name == "fraud"
                assert ref.version in ("1", "2")
        assert Index.decode(catalogue.index.encode()).models == catalogue.index.models

    assert 0 < read < MUTATIONS
