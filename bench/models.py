"""Large fitted models, the same every time: each kind that loads in a way of its own, in any size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, SGDClassifier
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline

MB = 1 << 20


def linear(megabytes: float) -> Any:
    """A thousand features and very many outputs: one array."""
    outputs = int(megabytes * MB / 8000)
    model = LinearRegression()
    model.coef_ = np.random.default_rng(0).normal(size=(outputs, 1000))
    model.intercept_, model.n_features_in_ = np.zeros(outputs), 1000
    return model


def neighbours(megabytes: float) -> Any:
    """The rows that it was fitted on, which brute force looks through."""
    rows = np.random.default_rng(0).normal(size=(int(megabytes * MB / 88), 10))
    return KNeighborsRegressor(algorithm="brute").fit(rows, rows.sum(axis=1))


def forest(megabytes: float) -> Any:
    """Trees of 1 MB, grown out on noise."""
    rng = np.random.default_rng(0)
    trees = RandomForestRegressor(max(2, round(megabytes)), max_features=1, random_state=0)
    return trees.fit(rng.random((11_500, 20), dtype=np.float32), rng.random(11_500))


def boosting(megabytes: float) -> Any:
    """Trees of 128 KB, of which all but three are copies with other leaves: to grow so many takes minutes."""
    rng = np.random.default_rng(0)
    settings: dict[str, Any] = {"max_leaf_nodes": 1000, "min_samples_leaf": 1, "early_stopping": False}
    model = HistGradientBoostingRegressor(max_iter=3, random_state=0, **settings)
    model.fit(rng.random((4_000, 10)), rng.random(4_000))
    grown = [tree for (tree,) in model._predictors]
    wanted = int(megabytes * MB) // grown[0].nodes.nbytes
    while len(model._predictors) < wanted:
        tree = copy.deepcopy(grown[len(model._predictors) % len(grown)])
        tree.nodes["value"] *= rng.random(len(tree.nodes))
        model._predictors.append([tree])
    return model


def text(megabytes: float) -> Any:
    """A vocabulary: 300,000 words are 8 MB. Most of it is Python objects, which no other kind has many of."""
    rng = np.random.default_rng(0)
    count = int(megabytes * 36_000)
    words = [f"w{number:x}" for number in rng.permutation(count)]
    documents = [" ".join(words[start : start + 300]) for start in range(0, count, 300)]
    classifier = SGDClassifier(max_iter=5, tol=None, random_state=0)
    return make_pipeline(TfidfVectorizer(), classifier).fit(documents, rng.permutation(len(documents)) % 2)


KINDS: dict[str, Callable[[float], Any]] = {
    "linear": linear,
    "neighbours": neighbours,
    "forest": forest,
    "boosting": boosting,
    "text": text,
}
