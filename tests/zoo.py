"""Fitted estimators of every family with the data they were fitted on: what the served answers are held against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import Birch, KMeans, MiniBatchKMeans
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor, make_column_transformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.ensemble import (
    BaggingClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingRegressor,
    VotingClassifier,
)
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, SGDClassifier
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import BernoulliNB, CategoricalNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KernelDensity, KNeighborsClassifier, KNeighborsRegressor, LocalOutlierFactor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, SVR, LinearSVC, OneClassSVM
from sklearn.tree import DecisionTreeClassifier

COUNT = 80
random = np.random.default_rng(3)
X = random.normal(size=(COUNT, 4)).round(3)
GAPS = np.where(random.random(X.shape) < 0.1, np.nan, X)
COUNTS = random.integers(0, 9, size=(COUNT, 4)).astype(float)
REAL = (X @ [1.0, -2.0, 0.5, 0.0] + random.normal(size=COUNT) * 0.1).round(3)
WORDS = np.array(["ant", "bee", "Ω"])[random.integers(0, 3, COUNT)]
TRUTH = REAL > 0
NUMBERS = random.integers(0, 3, COUNT)
HALVES = NUMBERS / 2
NAMED = pd.DataFrame(X, columns=["a", "b b", "größe", "温度"])

MIXED = pd.DataFrame(
    {
        "age": random.integers(18, 80, COUNT),
        "income": random.gamma(3, 900, COUNT).round(2),
        "plan": np.array(["free", "pro", "team"])[random.integers(0, 3, COUNT)],
        "active": random.random(COUNT) < 0.5,
        "since": pd.Timestamp("2020-01-01") + pd.to_timedelta(random.integers(0, 1e9, COUNT), "s"),
        "note": np.array(["fine", "very fine", "so so", "not fine"])[random.integers(0, 4, COUNT)],
        "unused": "same",
    }
)
MIXED.loc[::9, "income"] = np.nan
MIXED.loc[::11, "plan"] = np.nan
CATEGORIES = pd.DataFrame(
    {
        "size": random.normal(size=COUNT),
        "colour": pd.Categorical(np.array(["red", "green", "blue"])[random.integers(0, 3, COUNT)]),
        "grade": pd.Categorical(random.integers(1, 5, COUNT), ordered=True),
    }
)
CATEGORIES.loc[::7, ["size", "colour"]] = np.nan
TEXTS = [
    " ".join(words) for words in np.array(["good", "bad", "ugly", "größe", "fast"])[random.integers(0, 5, (COUNT, 4))]
]
RECORDS = [
    {"city": str(city), "temperature": float(t), "tags": ["x", "y"][: int(n)]}
    for city, t, n in zip(WORDS, X[:, 0], NUMBERS, strict=True)
]


def calendar(frame: pd.DataFrame) -> np.ndarray[Any, Any]:
    """Months and hours of every column of times, as a user's own module would compute them."""
    return np.column_stack([f(frame[name].dt) for name in frame.columns for f in (lambda d: d.month, lambda d: d.hour)])


def squared(values: Any) -> Any:
    return values**2


def lowered(texts: list[str]) -> list[str]:
    return [text.lower() for text in texts]


@dataclass(frozen=True)
class Fitted:
    """`missing` and `unknown` say whether the estimator takes missing values, and words that training never had."""

    estimator: Any
    data: Any
    missing: bool = False
    unknown: bool = False


def mixed_columns(*more: Any, remainder: Any = "drop") -> ColumnTransformer:
    return ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["age", "income"]),
            (
                "words",
                make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")),
                ["plan"],
            ),
            ("switches", "passthrough", ["active"]),
            ("text", TfidfVectorizer(), "note"),
            *more,
        ],
        remainder=remainder,
    )


def fit(estimator: Any, data: Any, target: Any = None, **traits: bool) -> Callable[[], Fitted]:
    return lambda: Fitted(estimator.fit(data, target), data, **traits)


def mixed(estimator: Any, target: Any, *more: Any, **traits: bool) -> Callable[[], Fitted]:
    return fit(make_pipeline(mixed_columns(*more), estimator), MIXED, target, unknown=True, **traits)


BUILDERS: dict[str, Callable[[], Fitted]] = {
    "logistic": fit(LogisticRegression(), X, WORDS),
    "logistic, named": fit(make_pipeline(StandardScaler(), LogisticRegression()), NAMED, TRUTH),
    "ridge": fit(Ridge(), X, REAL),
    "ridge, float32": fit(Ridge(), X.astype(np.float32), REAL.astype(np.float32)),
    "ridge, int64": fit(Ridge(), COUNTS.astype(np.int64), REAL),
    "ridge, bool": fit(Ridge(), X > 0, REAL),
    "sgd": fit(SGDClassifier(random_state=0), X, NUMBERS),
    "forest": fit(RandomForestClassifier(8, random_state=0), X, WORDS, missing=True),
    "forest, several outputs": fit(
        RandomForestClassifier(5, random_state=0), NAMED, np.column_stack([WORDS, NUMBERS.astype(str)]), missing=True
    ),
    "forest, float classes": fit(RandomForestClassifier(5, random_state=0), GAPS, HALVES * 2, missing=True),
    "forest, several numbers": fit(
        RandomForestRegressor(5, random_state=0), X, np.column_stack([REAL, -REAL]), missing=True
    ),
    "extra trees": fit(ExtraTreesRegressor(8, random_state=0), X.astype(np.float32), REAL, missing=True),
    "tree": fit(DecisionTreeClassifier(max_depth=3), X, TRUTH, missing=True),
    "boosting": fit(GradientBoostingClassifier(n_estimators=5), X, WORDS),
    "boosting regressor": fit(GradientBoostingRegressor(n_estimators=5), NAMED, REAL),
    "histogram boosting": fit(HistGradientBoostingRegressor(max_iter=5), GAPS, REAL, missing=True),
    "histogram boosting, categories": fit(
        HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=3), CATEGORIES, WORDS, missing=True, unknown=True
    ),
    "isolation forest": fit(IsolationForest(n_estimators=8, random_state=0), NAMED, missing=True),
    "svc": fit(SVC(), X, WORDS),
    "svc, one against one": fit(SVC(decision_function_shape="ovo"), X, NUMBERS),
    "linear svc": fit(LinearSVC(), X, TRUTH),
    "svr": fit(SVR(), X, REAL),
    "one-class svm": fit(OneClassSVM(), X),
    "neighbours": fit(KNeighborsClassifier(), X, WORDS),
    "neighbours, several outputs": fit(KNeighborsClassifier(), X, np.column_stack([NUMBERS, TRUTH])),
    "neighbours regressor": fit(KNeighborsRegressor(), X, REAL),
    "local outliers": fit(LocalOutlierFactor(novelty=True), X),
    "kernel density": fit(KernelDensity(), X),
    "gaussian bayes": fit(GaussianNB(), X, WORDS),
    "multinomial bayes": fit(MultinomialNB(), COUNTS, WORDS),
    "complement bayes": fit(ComplementNB(), COUNTS, WORDS),
    "bernoulli bayes": fit(BernoulliNB(), X > 0, WORDS),
    "categorical bayes": fit(CategoricalNB(min_categories=9), COUNTS.astype(np.int64), WORDS),
    "perceptron": fit(MLPClassifier((4,), max_iter=2000, tol=1e-2, random_state=0), X, WORDS),
    "perceptron regressor": fit(
        MLPRegressor(hidden_layer_sizes=(4,), max_iter=2000, tol=1e-2, random_state=0),
        X,
        np.column_stack([REAL, -REAL]),
    ),
    "k-means": fit(KMeans(3, n_init=1, random_state=0), X),
    "mini-batch k-means": fit(MiniBatchKMeans(3, n_init=1, random_state=0), X.astype(np.float32)),
    "birch": fit(Birch(n_clusters=3), X),
    "mixture": fit(GaussianMixture(2, random_state=0), NAMED),
    "pca": fit(PCA(2), NAMED),
    "pca, frames out": fit(make_pipeline(StandardScaler(), PCA(2)).set_output(transform="pandas"), NAMED),
    "scaled polynomials": fit(make_pipeline(RobustScaler(), PolynomialFeatures(2)), X),
    "quantiles": fit(QuantileTransformer(n_quantiles=20), GAPS, missing=True),
    "min-max": fit(MinMaxScaler(), GAPS, missing=True),
    "neighbour imputer": fit(KNNImputer(n_neighbors=2), GAPS, missing=True),
    "imputed": fit(make_pipeline(SimpleImputer(add_indicator=True), LinearRegression()), GAPS, REAL, missing=True),
    "sparse one-hot": fit(
        OneHotEncoder(handle_unknown="ignore"), MIXED[["plan", "active"]], missing=True, unknown=True
    ),
    "one-hot of arrays": fit(
        make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()),
        np.column_stack([WORDS, np.roll(WORDS, 1)]).astype(object),
        TRUTH,
        missing=True,
        unknown=True,
    ),
    "ordinal": fit(
        OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1),
        MIXED[["plan"]].astype(object),
        missing=True,
        unknown=True,
    ),
    "mixed": mixed(GradientBoostingClassifier(n_estimators=4), WORDS),
    "mixed, with times": mixed(Ridge(), REAL, ("times", FunctionTransformer(calendar), ["since"])),
    "mixed, searched": lambda: Fitted(
        GridSearchCV(
            make_pipeline(mixed_columns(), LogisticRegression()), {"logisticregression__C": [0.1, 1.0]}, cv=2
        ).fit(MIXED, TRUTH),
        MIXED,
        unknown=True,
    ),
    "mixed, voting": lambda: Fitted(
        VotingClassifier(
            [
                ("a", make_pipeline(mixed_columns(), LogisticRegression())),
                ("b", make_pipeline(mixed_columns(), RandomForestClassifier(4, random_state=0))),
            ],
            voting="soft",
        ).fit(MIXED, WORDS),
        MIXED,
        unknown=True,
    ),
    "mixed, remainder": fit(
        make_pipeline(
            make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["plan"]), remainder="passthrough"),
            HistGradientBoostingClassifier(max_iter=4),
        ),
        MIXED[["income", "plan", "age", "active"]],
        NUMBERS,
        missing=True,
        unknown=True,
    ),
    "mixed, by position": fit(
        make_pipeline(
            ColumnTransformer(
                [("words", OneHotEncoder(handle_unknown="ignore"), [1]), ("rest", SimpleImputer(), [0, 2])]
            ),
            Ridge(),
        ),
        MIXED[["income", "plan", "age"]].to_numpy(dtype=object),
        REAL,
        missing=True,
        unknown=True,
    ),
    "texts": fit(make_pipeline(TfidfVectorizer(), LogisticRegression()), TEXTS, WORDS),
    "texts, cleaned": fit(
        make_pipeline(FunctionTransformer(lowered), CountVectorizer(lowercase=False), MultinomialNB()), TEXTS, WORDS
    ),
    "texts, united": fit(
        make_pipeline(
            FeatureUnion([("w", CountVectorizer()), ("c", TfidfVectorizer(analyzer="char"))]), TruncatedSVD(2)
        ),
        TEXTS,
    ),
    "texts, sparse": fit(CountVectorizer(binary=True), TEXTS),
    "records": fit(make_pipeline(DictVectorizer(), RandomForestRegressor(4, random_state=0)), RECORDS, REAL),
    "several targets": fit(LinearRegression(), NAMED, np.column_stack([REAL, REAL**2])),
    "several classifiers": fit(
        MultiOutputClassifier(LogisticRegression()), X, np.column_stack([WORDS, NUMBERS.astype(str)])
    ),
    "calibrated": fit(CalibratedClassifierCV(LinearSVC(), cv=2), X, WORDS),
    "calibrated, mixed": fit(
        CalibratedClassifierCV(make_pipeline(mixed_columns(), LinearSVC()), cv=2), MIXED, TRUTH, unknown=True
    ),
    "stacked": fit(StackingRegressor([("r", Ridge()), ("n", KNeighborsRegressor())], cv=2), NAMED, REAL),
    "bagged": fit(BaggingClassifier(DecisionTreeClassifier(max_depth=2), 4, random_state=0), X, WORDS, missing=True),
    "transformed target": fit(
        TransformedTargetRegressor(make_pipeline(StandardScaler(), Ridge()), func=np.arcsinh, inverse_func=np.sinh),
        NAMED,
        REAL,
    ),
    "own function": fit(make_pipeline(FunctionTransformer(squared), Ridge()), X, REAL),
    "own function, named": fit(make_pipeline(FunctionTransformer(squared), Ridge()), NAMED, REAL),
}


@functools.cache
def fitted(name: str) -> Fitted:
    it = BUILDERS[name]()
    if name in ON_MANY_THREADS:
        it.estimator.set_params(n_jobs=-1)  # as people save them; to fit them so here would start processes
    return it


ON_MANY_THREADS = {"forest", "extra trees", "neighbours", "bagged", "mixed, voting"}


# Nothing in these tells what they were given: times, or numbers of 32 bits.
NEEDS_EXAMPLES = {"mixed, with times", "ridge, float32", "extra trees", "mini-batch k-means"}
OF_ITEMS = {name for name in BUILDERS if name.startswith(("texts", "records"))}
