"""Every kind of model, published and served twice: by its compiled form where it has one, and by scikit-learn. Both say the same.

What is compared is what goes to the caller: status, predictions, violations; of rows that are taken and of rows that are refused,
in batches and alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pytest
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import LabelEncoder, OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.tree import DecisionTreeRegressor

from app import inspection
from app.api.predict import Predictor
from app.auth import Access
from app.compiler import planner
from app.model import Model
from app.model_storage import ModelStorageManager, load_checked
from app.observer import Observer, Record
from app.registry import Entry, Registry, Slot, Snapshot, State
from app.runner import Runner
from app.storage.local import LocalStorage
from tests import zoo
from tests.test_served_answers import COARSE, assert_close
from tests.trusted import TRUST
from tests.zoo import BUILDERS, COUNT, fitted

pytestmark = pytest.mark.usefixtures("one_thread")
REQUESTS = 24
SEED = 3
# Compiled altogether, and it took a closer look: logarithms of what is impossible, several types in one answer.
WHOLE = {"gaussian bayes", "mixture", "texts, united", "forest, float classes", "one column"}
# In place of a value, in any column.
STRANGE: list[Any] = [
    None,
    True,
    "",
    "x",
    "good",
    "2021-05-05T10:00:00",
    0,
    -1,
    3,
    1.5,
    -0.0,
    250,
    1e6,
    -1e9,
    1e39,
    2**62,
    2**70,
    [],
]


@contextlib.contextmanager
def predicting(model: Model, costs: Any) -> Iterator[Predictor]:
    registry = Registry()
    runner = Runner(model, costs=costs)
    slot = Slot(model.ref, runner=runner, state=State.READY)
    registry.swap(Snapshot({"a": Entry({"1": slot}, {"production": "1"}, {"production": "1"})}))
    try:
        yield Predictor(
            registry, Access(), Observer(), max_body_bytes=1 << 20, max_rows=1000, max_pending_bytes=1 << 20
        )
    finally:
        runner.close()


async def answer(predictor: Predictor, request: dict[str, Any]) -> tuple[int, Any]:
    body = json.dumps(request).encode()
    sent = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if sent:
            return sent.pop()
        await asyncio.Event().wait()
        raise AssertionError

    got = await predictor.handle({"headers": [], "http_version": "1.1"}, receive, "a", Record("predict", "it"))
    assert got is not None
    return got.status, orjson.loads(got.body)


def requests(model: Model, data: Any, seed: int) -> list[dict[str, Any]]:
    """Requests with rows of training, with rows between them, and with something strange in one of their places."""
    draw = random.Random(seed)
    known = inspection.instances_of(data, model.signature)
    names = [spec.name for spec in model.signature.inputs]
    made = []
    for number in range(REQUESTS):
        rows = [known[draw.randrange(COUNT)] for _ in range(draw.choice([1, 1, 2, 5]))]
        if model.signature.layout in ("matrix", "frame"):
            rows = [list(row) for row in rows]
            others = [known[draw.randrange(COUNT)] for _ in rows]
            for row, other in zip(rows, others, strict=True):
                for place in range(len(row)):
                    if draw.random() < 0.4:
                        row[place] = other[place]
            if number % 3 == 1:
                row = draw.choice(rows)
                row[draw.randrange(len(row))] = draw.choice(STRANGE)
            if number % 4 == 3 and len(set(names)) == len(names):
                rows = [dict(zip(names, row, strict=True)) for row in rows]
        elif number % 3 == 1:
            rows[draw.randrange(len(rows))] = draw.choice(STRANGE)
        method = draw.choice(model.signature.methods)
        made.append({"instances": rows, "method": method})
    return made


async def loaded(manager: ModelStorageManager) -> tuple[Model, Any]:
    async with manager.storage:
        with await manager.fetch(await manager.wanted("a")) as bundle:
            checked = await asyncio.to_thread(load_checked, bundle)
    return checked.model, checked.costs


async def answers(model: Model, costs: Any, asked: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    with predicting(model, costs) as predictor:
        alone = [await answer(predictor, request) for request in asked]
        together = await asyncio.gather(*[answer(predictor, request) for request in asked])
    return alone, list(together)


def kinds_of_labels() -> dict[str, Any]:
    """What people have as classes."""
    return {
        "bool": zoo.TRUTH,
        "int8": zoo.NUMBERS.astype(np.int8),
        "large": zoo.NUMBERS * 2**60,
        "float": zoo.HALVES.astype(str).astype(float) * 2,
        "negative": zoo.NUMBERS - 1,
        "str": zoo.WORDS,
        "object": zoo.WORDS.astype(object),
        "series": pd.Series(zoo.WORDS, dtype="category"),
        "column": zoo.REAL[:, None],
    }


def companions() -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """A model, its examples, and what stands before and behind it."""
    labels = LabelEncoder().fit(zoo.WORDS)
    coded = labels.transform(zoo.WORDS)
    scaler = StandardScaler().fit(zoo.X)
    named = StandardScaler().fit(zoo.NAMED)
    words = TfidfVectorizer().fit(zoo.TEXTS)
    plans = OneHotEncoder(handle_unknown="ignore").fit(zoo.MIXED[["plan", "active"]])
    scaled = scaler.transform(zoo.X)
    nullable = pd.DataFrame(
        {
            "whole": pd.Series(zoo.NUMBERS, dtype="Int64"),
            "sure": pd.Series(zoo.TRUTH, dtype="boolean"),
            "part": pd.Series(zoo.REAL, dtype="Float64"),
        }
    )
    narrow = pd.DataFrame({"a": zoo.NUMBERS.astype(np.uint8), "b": zoo.X[:, 0].astype(np.float32), "c": zoo.TRUTH})
    found = {
        "scaler": (LogisticRegression().fit(scaled, zoo.WORDS), zoo.X, {"scaler": scaler}),
        "scaler, labels": (LogisticRegression().fit(scaled, coded), zoo.X, {"scaler": scaler, "encoder": labels}),
        "labels, forest": (RandomForestClassifier(5, random_state=0).fit(zoo.X, coded), zoo.X, {"encoder": labels}),
        "labels, boosting": (
            HistGradientBoostingClassifier(max_iter=4).fit(zoo.GAPS, coded),
            zoo.GAPS,
            {"encoder": labels},
        ),
        "named scaler": (Ridge().fit(named.transform(zoo.NAMED), zoo.REAL), zoo.NAMED, {"scaler": named}),
        "vectorizer": (
            MultinomialNB().fit(words.transform(zoo.TEXTS), zoo.WORDS),
            zoo.TEXTS,
            {"preprocessor": words},
        ),
        "encoder": (
            Ridge().fit(plans.transform(zoo.MIXED[["plan", "active"]]), zoo.REAL),
            zoo.MIXED[["plan", "active"]],
            {"encoder": plans},
        ),
        "nullable": (make_pipeline(StandardScaler(), Ridge()).fit(nullable, zoo.REAL), nullable, {}),
        "narrow": (RandomForestRegressor(4, random_state=0).fit(narrow, zoo.REAL), narrow, {}),
        "narrow, linear": (LogisticRegression().fit(narrow, zoo.WORDS), narrow, {}),
        "float32": (LogisticRegression().fit(scaled.astype(np.float32), zoo.WORDS), scaled.astype(np.float32), {}),
        "scaled float32": (
            make_pipeline(StandardScaler(), LogisticRegression()).fit(zoo.X.astype(np.float32), zoo.WORDS),
            zoo.X.astype(np.float32),
            {},
        ),
        "searched": (
            GridSearchCV(RandomForestClassifier(4, random_state=0), {"max_depth": [2, 3]}, cv=2).fit(
                zoo.NAMED, zoo.TRUTH
            ),
            zoo.NAMED,
            {},
        ),
        "one column": (LinearRegression().fit(zoo.X, zoo.REAL[:, None]), zoo.X, {}),
        "whole, boosting": (
            HistGradientBoostingRegressor(max_iter=4).fit(zoo.COUNTS.astype(int), zoo.REAL),
            zoo.COUNTS.astype(int),
            {},
        ),
        "scaler only": (scaler, zoo.X, {}),
        "texts only": (words, zoo.TEXTS, {}),
        "united counts": (
            FeatureUnion([("w", CountVectorizer()), ("c", CountVectorizer(analyzer="char"))]).fit(zoo.TEXTS),
            zoo.TEXTS,
            {},
        ),
        "codes only": (
            OrdinalEncoder(dtype=np.int32).fit(zoo.MIXED[["note", "active"]]),
            zoo.MIXED[["note", "active"]],
            {},
        ),
    }
    for name, target in kinds_of_labels().items():
        for estimator in (
            RandomForestClassifier(3, random_state=0),
            LogisticRegression(),
            HistGradientBoostingClassifier(max_iter=3),
        ):
            if name != "column":
                found[f"{name}, {type(estimator).__name__}"] = (estimator.fit(zoo.NAMED, target), zoo.NAMED, {})
    found |= {
        f"column, {type(estimator).__name__}": (estimator.fit(zoo.X, zoo.REAL[:, None]), zoo.X, {})
        for estimator in (DecisionTreeRegressor(max_depth=3), Ridge(), KNeighborsRegressor())
    }
    return found


OTHERS = companions()


@pytest.mark.parametrize("name", [*BUILDERS, *OTHERS])
def test_the_compiled_form_answers_as_scikit_learn_does(name, tmp_path, monkeypatch):
    if name in OTHERS:
        estimator, data, parts = OTHERS[name]
    else:
        estimator, data, parts = fitted(name).estimator, fitted(name).data, {}
    monkeypatch.setattr(planner, "RACE_SECONDS", 0.2)
    storage = LocalStorage(tmp_path / "bucket")
    ModelStorageManager(storage, trust=TRUST).save("a", estimator, examples=data, **parts)

    async def compare() -> None:
        model, costs = await loaded(ModelStorageManager(storage, trust=TRUST, runtime="auto"))
        reference, slower = await loaded(ModelStorageManager(storage, trust=TRUST, runtime="sklearn"))
        assert model.runtime == "compiled" or name not in WHOLE
        asked = requests(reference, data, SEED)
        found, expected = await answers(model, costs, asked), await answers(reference, slower, asked)
        for given, wanted in zip(found, expected, strict=True):
            for request, one, other in zip(asked, given, wanted, strict=True):
                assert one[0] == other[0], (request, one, other)
                if one[0] == 200:
                    assert_close(one[1].pop("predictions"), other[1].pop("predictions"), COARSE.get(name, 1e-9))
                assert one[1] == other[1], request

    with np.errstate(all="ignore"):
        asyncio.run(compare())
