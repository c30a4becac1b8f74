"""The models that every service serves, the rows that it is asked about, and what scikit-learn itself answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer, make_classification, make_friedman1
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from demo.models import churn, records

SINGLES = 256  # different requests of one row
LARGE_ROWS = 1000
LARGES = 4  # different requests of so many rows
POOL_ROWS = 500


class Question(NamedTuple):
    """A fitted model, the rows that it is asked about, and how."""

    model: Any
    pool: Any  # a DataFrame for a model that wants one, else an array
    method: str

    @property
    def words(self) -> list[str]:
        """The columns that hold words."""
        return list(self.pool.select_dtypes(exclude="number").columns) if self.columns else []

    @property
    def columns(self) -> list[str] | None:
        """The columns, where the model wants a DataFrame."""
        return list(self.pool.columns) if isinstance(self.pool, pd.DataFrame) else None

    def rows(self, chosen: Any) -> list[Any]:
        """Return some rows as JSON has them: objects for a DataFrame, else arrays."""
        if isinstance(self.pool, pd.DataFrame):
            return records(self.pool.iloc[chosen])
        rows: list[Any] = self.pool[chosen].tolist()
        return rows

    def with_every_word(self) -> Question:
        """Return it without the rows that lack a word."""
        return self._replace(pool=self.pool.dropna(subset=self.words)) if self.columns else self

    def expected(self, chosen: Any) -> Any:
        """Return scikit-learn's answer to them, in float64."""
        rows = self.pool.iloc[chosen] if isinstance(self.pool, pd.DataFrame) else self.pool[chosen]
        return getattr(self.model, self.method)(rows)


def linear() -> Question:
    """Thirty features, scaled, and a logistic regression."""
    rows, target = load_breast_cancer(return_X_y=True)
    return Question(make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, target), rows, "predict_proba")


def mixed() -> Question:
    """Words and numbers of a DataFrame, some missing: imputers, a scaler, one-hot words, and gradient boosting."""
    model, frame = churn()
    return Question(model, frame.head(POOL_ROWS), "predict_proba")


def forest() -> Question:
    """A hundred trees of depth 12, with 85,000 nodes in all."""
    rows, target = make_classification(6000, 20, n_informative=12, n_classes=3, flip_y=0.05, random_state=0)
    rows = rows.round(4)
    model = RandomForestClassifier(100, max_depth=12, random_state=0, n_jobs=2)
    model.fit(rows[:4000], target[:4000]).set_params(n_jobs=None)
    return Question(model, rows[4000 : 4000 + POOL_ROWS], "predict_proba")


def boosting() -> Question:
    """Histogram boosting in 200 iterations."""
    rows, target = make_friedman1(10_000, noise=1.0, random_state=0)
    rows = rows.round(4)
    model = HistGradientBoostingRegressor(max_iter=200, early_stopping=False, random_state=0)
    return Question(model.fit(rows[:9000], target[:9000]), rows[9000 : 9000 + POOL_ROWS], "predict")


def large_forest(model: Any) -> Question:
    """Return rows for a large forest of `bench.models`."""
    rows = np.random.default_rng(1).random((POOL_ROWS, model.n_features_in_)).round(4)
    return Question(model, rows, "predict")


KINDS: dict[str, Callable[[], Question]] = {"linear": linear, "mixed": mixed, "forest": forest, "boosting": boosting}


class Request(NamedTuple):
    """The rows of one request, by their numbers in the pool, and what is right."""

    rows: list[Any]
    expected: Any


def singles(question: Question) -> list[Request]:
    """Return requests of one row."""
    expected = question.expected(np.arange(SINGLES))
    return [Request([row], expected[at : at + 1]) for at, row in enumerate(question.rows(np.arange(SINGLES)))]


def larges(question: Question) -> list[Request]:
    """Return requests of many rows."""
    rng = np.random.default_rng(0)
    chosen = [rng.integers(0, len(question.pool), LARGE_ROWS) for _ in range(LARGES)]
    return [Request(question.rows(rows), question.expected(rows)) for rows in chosen]


def store(folder: Path, questions: dict[str, Question]) -> None:
    """Leave the models where the peers look for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, question in questions.items():
        joblib.dump(question.model, folder / f"{name}.joblib")
        examples = question.rows(np.arange(50))
        (folder / f"{name}.json").write_text(json.dumps(examples))
    kinds = {
        name: {"method": question.method, "columns": question.columns, "words": question.words}
        for name, question in questions.items()
    }
    (folder / "kinds.json").write_text(json.dumps(kinds))
