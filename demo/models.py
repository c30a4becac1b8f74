"""The demo's four models: trained from scratch in a second or two each, and the same every time.

`python -m demo.models FOLDER` trains them all and leaves `NAME.joblib` and `NAME.json` (example rows) in the folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from demo.progress import step

EXAMPLE_ROWS = 50


class Trained(NamedTuple):
    """A fitted estimator, and the frame that it was fitted on."""

    estimator: Any
    frame: pd.DataFrame


def cancer() -> Trained:
    """Tell malignant (0) from benign (1) tumours by 30 measurements: a scaled linear model."""
    frame, target = load_breast_cancer(return_X_y=True, as_frame=True)
    return Trained(make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, target), frame)


def wine() -> Trained:
    """Tell three cultivars of wine apart by 13 chemical measurements: a forest."""
    frame, target = load_wine(return_X_y=True, as_frame=True)
    return Trained(RandomForestClassifier(100, random_state=0).fit(frame, target), frame)


def diabetes() -> Trained:
    """Predict how far diabetes has gone on in a year, from 10 scaled measurements: histogram boosting."""
    frame, target = load_diabetes(return_X_y=True, as_frame=True)
    return Trained(HistGradientBoostingRegressor(random_state=0).fit(frame, target), frame)


def churn() -> Trained:
    """Tell who cancels ("yes") from who stays ("no"): numbers and words, some missing, and boosting on them."""
    frame, target = churn_data()
    numbers = list(frame.select_dtypes("number").columns)
    words = [column for column in frame.columns if column not in numbers]
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
            (
                "words",
                make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")),
                words,
            ),
        ]
    )
    return Trained(make_pipeline(columns, GradientBoostingClassifier(random_state=0)).fit(frame, target), frame)


def churn_data(rows: int = 2000) -> tuple[pd.DataFrame, pd.Series]:
    """Invent customers of a subscription service: 8 columns of numbers and 4 of words, about 4 % of six of them missing."""
    random = np.random.default_rng(7)
    tenure_months = random.integers(0, 72, rows)
    monthly_charge = random.gamma(6.0, 9.0, rows).round(2)
    logins_last_30_days = random.poisson(9.0, rows)
    support_tickets = random.poisson(1.2, rows)
    plan = random.choice(["free", "basic", "pro", "team"], rows, p=[0.3, 0.35, 0.25, 0.1])
    payment_method = random.choice(["card", "invoice", "direct debit", "wallet"], rows, p=[0.5, 0.15, 0.25, 0.1])
    frame = pd.DataFrame(
        {
            "age": random.integers(18, 80, rows),
            "tenure_months": tenure_months,
            "monthly_charge": monthly_charge,
            "total_charge": (monthly_charge * tenure_months).round(2),
            "logins_last_30_days": logins_last_30_days,
            "support_tickets": support_tickets,
            "days_since_last_login": random.exponential(12.0, rows).round(1),
            "storage_gb": random.lognormal(1.0, 1.1, rows).round(2),
            "plan": plan,
            "country": random.choice(["DE", "FR", "GB", "JP", "US"], rows, p=[0.2, 0.15, 0.15, 0.1, 0.4]),
            "payment_method": payment_method,
            "signup_channel": random.choice(["ads", "friend", "search", "store"], rows),
        }
    )
    leaning = (
        0.4
        + 0.35 * support_tickets
        + 0.03 * frame["days_since_last_login"]
        + 0.9 * (plan == "free")
        + 0.6 * (payment_method == "invoice")
        - 0.04 * tenure_months
        - 0.08 * logins_last_30_days
    )
    leaves = random.random(rows) < 1 / (1 + np.exp(-leaning))
    for column in ("age", "monthly_charge", "days_since_last_login", "storage_gb", "country", "signup_channel"):
        frame.loc[random.random(rows) < 0.04, column] = np.nan
    return frame, pd.Series(np.where(leaves, "yes", "no"), name="churned")


MODELS: dict[str, Callable[[], Trained]] = {"cancer": cancer, "wine": wine, "diabetes": diabetes, "churn": churn}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as a request has them: missing is null, and a number keeps all its digits (`to_json` rounds)."""
    rows: list[dict[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows


def main(folder: Path) -> None:
    """Train every model into `folder`."""
    for name, train in MODELS.items():
        with step(f"Training {name}"):
            trained = train()
            joblib.dump(trained.estimator, folder / f"{name}.joblib")
            (folder / f"{name}.json").write_text(json.dumps(records(trained.frame.head(EXAMPLE_ROWS)), indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
