"""Fitted estimators for what the zoo has no example of: each setting of a step that its compiled form treats apart."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pandas as pd
from sklearn import decomposition, discriminant_analysis, dummy, feature_selection, linear_model, naive_bayes, svm
from sklearn import preprocessing as pre
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor, make_column_transformer
from sklearn.ensemble import BaggingClassifier, BaggingRegressor, StackingClassifier, VotingClassifier, VotingRegressor
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import FixedThresholdClassifier, TunedThresholdClassifierCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection

from tests.zoo import (
    CATEGORIES,
    COUNT,
    COUNTS,
    GAPS,
    MIXED,
    NAMED,
    NUMBERS,
    REAL,
    RECORDS,
    TEXTS,
    TRUTH,
    WORDS,
    Fitted,
    X,
    fit,
    random,
)

WHOLE = pd.DataFrame(COUNTS.astype(np.int64), columns=list("abcd"))
PARTS = pd.DataFrame({"n": GAPS[:, 0], "i": NUMBERS, "b": TRUTH, "f": X[:, 1]})
RARE = np.where(random.random(COUNT) < 0.08, "rare", np.where(random.random(COUNT) < 0.08, "scarce", WORDS))
KINDS = pd.DataFrame(
    {"w": pd.Series(RARE, dtype=object), "s": pd.Series(WORDS), "i": NUMBERS, "f": GAPS[:, 0].round(0), "b": TRUTH}
)
KINDS.loc[::7, "w"] = np.nan
KINDS.loc[::5, "s"] = np.nan
NONES = pd.DataFrame({"w": np.where(np.arange(COUNT) % 6 == 0, None, WORDS.astype(object))}, dtype=object)
POSITIVE = np.abs(X) + 0.01
PHRASES = [
    f"{text}, {text.upper()}s aren't   the ÄRGER of {number}" for text, number in zip(TEXTS, NUMBERS, strict=True)
]
NOTES = pd.DataFrame({"note": PHRASES, "size": REAL, "plan": WORDS})
MANY = sorted({*WORDS, *(f"word {number}" for number in range(5000))})

BUILDERS: dict[str, Callable[[], Fitted]] = {
    **{
        f"scaled, {step}": fit(step, GAPS, missing=True)
        for step in (
            pre.StandardScaler(),
            pre.StandardScaler(with_mean=False),
            pre.StandardScaler(with_std=False),
            pre.MinMaxScaler((-1, 2), clip=True),
            pre.MaxAbsScaler(),
            pre.RobustScaler(),
            pre.RobustScaler(with_centering=False, unit_variance=True),
            pre.RobustScaler(with_scaling=False),
            pre.PowerTransformer(),
            pre.PowerTransformer(standardize=False),
            pre.QuantileTransformer(n_quantiles=10),
        )
    },
    **{
        f"computed, {step}": fit(step, POSITIVE)
        for step in (
            pre.Normalizer(),
            pre.Normalizer("l1"),
            pre.Normalizer("max"),
            pre.Binarizer(threshold=0.5),
            pre.PowerTransformer("box-cox"),
            pre.PolynomialFeatures(3),
            pre.PolynomialFeatures(3, interaction_only=True, include_bias=False),
            pre.PolynomialFeatures((2, 3)),
            pre.PolynomialFeatures((2, 2), include_bias=False),
            pre.KBinsDiscretizer(4, quantile_method="averaged_inverted_cdf"),
            pre.KBinsDiscretizer(3, encode="ordinal", strategy="uniform"),
            pre.KBinsDiscretizer(3, encode="onehot-dense", strategy="uniform"),
            pre.FunctionTransformer(np.log1p),
            pre.FunctionTransformer(np.sqrt, validate=True),
            pre.FunctionTransformer(),
            decomposition.PCA(2, whiten=True),
            decomposition.TruncatedSVD(2, random_state=0),
            decomposition.FastICA(2, random_state=0, whiten="unit-variance"),
            decomposition.IncrementalPCA(2),
            feature_selection.VarianceThreshold(0.3),
        )
    },
    "selected": fit(make_pipeline(feature_selection.SelectKBest(k=2), linear_model.RidgeClassifier()), NAMED, WORDS),
    "selected by a model": fit(
        make_pipeline(feature_selection.SelectFromModel(linear_model.LogisticRegression()), svm.LinearSVC()), X, WORDS
    ),
    **{
        f"imputed, {step}": fit(step, GAPS, missing=True)
        for step in (
            SimpleImputer(strategy="median"),
            SimpleImputer(strategy="most_frequent", add_indicator=True),
            SimpleImputer(strategy="constant", fill_value=-7.0),
            MissingIndicator(),
            MissingIndicator(features="all"),
        )
    },
    "imputed, a number": fit(SimpleImputer(missing_values=0), COUNTS, missing=False),
    "imputed, an empty column": fit(
        SimpleImputer(add_indicator=True), np.column_stack([np.full(COUNT, np.nan), GAPS[:, :2]]), missing=True
    ),
    "imputed, an empty column kept": fit(
        SimpleImputer(keep_empty_features=True), np.column_stack([np.full(COUNT, np.nan), GAPS[:, :2]]), missing=True
    ),
    "imputed, whole numbers": fit(
        make_pipeline(SimpleImputer(), pre.StandardScaler(), linear_model.Ridge()), WHOLE, REAL, missing=True
    ),
    "parts of several kinds": fit(
        make_pipeline(SimpleImputer(), pre.MinMaxScaler(), linear_model.Ridge()), PARTS, REAL, missing=True
    ),
    **{
        f"encoded, {step}": fit(step, KINDS, missing=True, unknown=True)
        for step in (
            pre.OneHotEncoder(),
            pre.OneHotEncoder(handle_unknown="ignore"),
            pre.OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=9),
            pre.OneHotEncoder(handle_unknown="ignore", max_categories=3),
            pre.OneHotEncoder(drop="first"),
            pre.OneHotEncoder(drop="if_binary", min_frequency=9, dtype=int),
            pre.OrdinalEncoder(),
            pre.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2),
            pre.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan, min_frequency=9),
            pre.OrdinalEncoder(dtype=int, encoded_missing_value=99),
        )
    },
    "encoded, None": fit(pre.OneHotEncoder(handle_unknown="ignore"), NONES, missing=True, unknown=True),
    "encoded, None imputed": fit(
        make_pipeline(SimpleImputer(missing_values=None, strategy="most_frequent"), pre.OneHotEncoder()),
        NONES,
        missing=True,
        unknown=True,
    ),
    "encoded, words imputed by a constant": fit(
        make_pipeline(SimpleImputer(strategy="constant", fill_value="none"), pre.OrdinalEncoder()),
        KINDS[["w", "s"]].astype(object),
        missing=True,
        unknown=True,
    ),
    "encoded, words imputed, unknown refused": fit(
        make_pipeline(SimpleImputer(strategy="most_frequent"), pre.OneHotEncoder()),
        KINDS[["w", "s"]].astype(object),
        missing=True,
        unknown=True,
    ),
    "encoded, whole numbers": fit(pre.OneHotEncoder(handle_unknown="ignore"), WHOLE),
    "encoded, categories of pandas": fit(
        make_column_transformer(
            (pre.OneHotEncoder(handle_unknown="ignore"), ["colour"]),
            (pre.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), ["grade"]),
            (
                make_pipeline(SimpleImputer(strategy="most_frequent"), pre.OneHotEncoder(handle_unknown="ignore")),
                ["colour"],
            ),
            remainder="passthrough",
        ),
        CATEGORIES,
        missing=True,
        unknown=True,
    ),
    "encoded in 32 bits": fit(
        make_pipeline(
            make_column_transformer(
                (pre.OneHotEncoder(dtype=np.float32, handle_unknown="ignore"), ["w", "s"]),
                (pre.MinMaxScaler(), ["i"]),
                (pre.OrdinalEncoder(dtype=np.float32), ["b"]),
            ),
            linear_model.Ridge(),
        ),
        KINDS,
        REAL,
        missing=True,
        unknown=True,
    ),
    "encoded in 32 bits only": fit(
        pre.OneHotEncoder(dtype=np.float32, handle_unknown="ignore"), KINDS, missing=True, unknown=True
    ),
    "encoded, very many": fit(
        make_pipeline(
            make_column_transformer(
                (pre.StandardScaler(), ["size"]),
                (
                    pre.OneHotEncoder(categories=[MANY, MANY], handle_unknown="ignore"),
                    ["plan", "note"],
                ),
                sparse_threshold=1,
            ),
            linear_model.LogisticRegression(),
        ),
        NOTES,
        WORDS,
        unknown=True,
    ),
    "encoded, very many alone": fit(
        pre.OneHotEncoder(categories=[MANY], drop="first", dtype=int), NOTES[["plan"]].astype(object)
    ),
    "encoded, an array": fit(pre.OrdinalEncoder(), COUNTS),
    "encoded by target": fit(pre.TargetEncoder(cv=2), KINDS, TRUTH, missing=True, unknown=True),
    "encoded by three targets": fit(pre.TargetEncoder(cv=2), KINDS, WORDS, missing=True, unknown=True),
    "encoded by a number": fit(pre.TargetEncoder(cv=2), KINDS, REAL, missing=True, unknown=True),
    "columns, the rest scaled": fit(
        ColumnTransformer(
            [("w", pre.OneHotEncoder(handle_unknown="ignore"), ["plan"])], remainder=pre.StandardScaler()
        ),
        MIXED[["income", "plan", "age", "active"]],
        missing=True,
        unknown=True,
    ),
    "columns, by place": fit(
        make_pipeline(
            ColumnTransformer(
                [
                    ("a", pre.StandardScaler(), slice(0, 2)),
                    ("b", "passthrough", np.array([False, False, True, False])),
                    ("c", "drop", [1]),
                    ("d", pre.PolynomialFeatures(2), [3, 0]),
                ]
            ),
            linear_model.Ridge(),
        ),
        NAMED,
        REAL,
    ),
    "columns, in columns": fit(
        make_column_transformer(
            (
                make_column_transformer((pre.MinMaxScaler(), ["income"]), remainder="passthrough"),
                ["age", "income"],
            ),
            (pre.OrdinalEncoder(), ["active"]),
        ),
        MIXED,
        missing=True,
    ),
    "columns, projected": fit(
        make_pipeline(
            make_column_transformer(
                (make_pipeline(SimpleImputer(), pre.StandardScaler(), decomposition.PCA(1)), ["age", "income"]),
                (TfidfVectorizer(), "note"),
                (pre.OneHotEncoder(), ["active"]),
                sparse_threshold=0,
            ),
            linear_model.LogisticRegression(),
        ),
        MIXED,
        WORDS,
    ),
    "united, weighed": fit(
        FeatureUnion(
            [("a", pre.StandardScaler()), ("b", "passthrough"), ("c", "drop"), ("d", decomposition.PCA(2))],
            transformer_weights={"a": 0.3, "d": 2.0},
        ),
        X,
    ),
    **{
        f"texts, {step}": fit(make_pipeline(step, linear_model.LogisticRegression()), PHRASES, WORDS)
        for step in (
            CountVectorizer(),
            CountVectorizer(ngram_range=(1, 3), binary=True),
            CountVectorizer(ngram_range=(2, 2), stop_words="english", lowercase=False),
            CountVectorizer(analyzer="char", ngram_range=(1, 3)),
            CountVectorizer(analyzer="char_wb", ngram_range=(2, 5), strip_accents="unicode"),
            CountVectorizer(token_pattern=r"(?u)(\w)\w*", strip_accents="ascii"),
            TfidfVectorizer(sublinear_tf=True, norm="l1", min_df=2),
            TfidfVectorizer(use_idf=False, norm=None, max_features=5),
            TfidfVectorizer(vocabulary=["good", "bad", "ugly"], smooth_idf=False),
        )
    },
    "texts, several classes": fit(
        make_pipeline(CountVectorizer(), TfidfTransformer(), linear_model.SGDClassifier(random_state=0)),
        PHRASES,
        NUMBERS,
    ),
    "texts, bernoulli": fit(make_pipeline(CountVectorizer(), naive_bayes.BernoulliNB()), PHRASES, WORDS),
    "texts, complement": fit(make_pipeline(TfidfVectorizer(), naive_bayes.ComplementNB()), PHRASES, WORDS),
    "texts, scaled": fit(
        make_pipeline(
            CountVectorizer(),
            pre.StandardScaler(with_mean=False),
            pre.MaxAbsScaler(),
            pre.Normalizer("max"),
            feature_selection.SelectKBest(feature_selection.chi2, k=4),
            MLPClassifier((3,), max_iter=2000, tol=1e-2, random_state=0),
        ),
        PHRASES,
        WORDS,
    ),
    "texts beside others": fit(
        make_pipeline(
            make_column_transformer(
                (TfidfVectorizer(), "note"),
                (pre.StandardScaler(), ["size"]),
                (pre.OneHotEncoder(handle_unknown="ignore"), ["plan"]),
                sparse_threshold=1,
            ),
            linear_model.LogisticRegression(),
        ),
        NOTES,
        TRUTH,
        unknown=True,
    ),
    "records, sparse": fit(make_pipeline(DictVectorizer(separator=":"), linear_model.Ridge()), RECORDS, REAL),
    "records, dense": fit(DictVectorizer(sparse=False), RECORDS),
    **{
        f"classes, {model}": fit(make_pipeline(pre.StandardScaler(), model), NAMED, WORDS)
        for model in (
            linear_model.LogisticRegression(C=10),
            linear_model.RidgeClassifier(),
            linear_model.Perceptron(),
            linear_model.SGDClassifier(loss="log_loss", random_state=0),
            naive_bayes.GaussianNB(),
            discriminant_analysis.LinearDiscriminantAnalysis(),
            discriminant_analysis.QuadraticDiscriminantAnalysis(),
            MLPClassifier((5, 3), activation="tanh", max_iter=2000, tol=1e-2, random_state=0),
            MLPClassifier((4,), activation="logistic", max_iter=2000, tol=1e-2, random_state=0),
            svm.SVC(kernel="poly", degree=2, coef0=1),
            svm.SVC(kernel="linear", decision_function_shape="ovo"),
            svm.SVC(break_ties=True),
            svm.NuSVC(nu=0.3, kernel="sigmoid", gamma=0.1),
            KNeighborsClassifier(3, weights="distance"),
            KNeighborsClassifier(4, p=1, algorithm="brute"),
            dummy.DummyClassifier(),
            dummy.DummyClassifier(strategy="constant", constant="bee"),
        )
    },
    **{
        f"two classes, {model}": fit(make_pipeline(pre.StandardScaler(), model), X, TRUTH)
        for model in (
            svm.SVC(),
            svm.LinearSVC(),
            discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
            discriminant_analysis.QuadraticDiscriminantAnalysis(),
            MLPClassifier((4,), max_iter=2000, tol=1e-2, random_state=0),
            KNeighborsClassifier(5),
            FixedThresholdClassifier(linear_model.LogisticRegression(), threshold=0.3),
            TunedThresholdClassifierCV(linear_model.LogisticRegression(), cv=2, thresholds=5),
        )
    },
    **{
        f"numbers, {model}": fit(make_pipeline(pre.StandardScaler(), model), NAMED, np.abs(REAL) + 0.1)
        for model in (
            linear_model.Lasso(0.01),
            linear_model.BayesianRidge(),
            linear_model.HuberRegressor(),
            linear_model.PoissonRegressor(),
            linear_model.TweedieRegressor(power=0, link="identity"),
            svm.LinearSVR(random_state=0),
            svm.NuSVR(),
            KNeighborsRegressor(3, weights="distance"),
            KNeighborsRegressor(3, metric="manhattan"),
            dummy.DummyRegressor(strategy="median"),
            VotingRegressor([("a", linear_model.Ridge()), ("b", linear_model.Lasso())], weights=[2, 1]),
            TransformedTargetRegressor(linear_model.Ridge(), func=np.log, inverse_func=np.exp),
            TransformedTargetRegressor(linear_model.Ridge(), transformer=pre.StandardScaler()),
            TransformedTargetRegressor(linear_model.Ridge(), transformer=pre.MinMaxScaler()),
        )
    },
    "numbers, several by one each": fit(
        MultiOutputRegressor(linear_model.Ridge()), NAMED, np.column_stack([REAL, REAL**2])
    ),
    **{
        f"mixed, {kind}": fit(GaussianMixture(3, covariance_type=kind, random_state=0), NAMED)
        for kind in ("full", "tied", "diag")
    },
    "one class, linear": fit(linear_model.SGDOneClassSVM(random_state=0), X),
    "projected at random": fit(SparseRandomProjection(2, random_state=0, density=0.5), NAMED),
    "projected at random, texts": fit(
        make_pipeline(TfidfVectorizer(), GaussianRandomProjection(3, random_state=0)), PHRASES
    ),
    "bagged linear models": fit(
        BaggingClassifier(linear_model.LogisticRegression(), 4, max_features=0.6, random_state=0), X, WORDS
    ),
    "bagged perceptrons": fit(BaggingClassifier(linear_model.Perceptron(), 4, random_state=0), X, WORDS),
    "bagged neighbours": fit(BaggingRegressor(KNeighborsRegressor(3), 4, random_state=0), NAMED, REAL),
    "one against the rest": fit(OneVsRestClassifier(linear_model.LogisticRegression()), X, WORDS),
    "one against the rest, by chances": fit(OneVsRestClassifier(naive_bayes.GaussianNB()), X, WORDS),
    "voting, hard": fit(
        VotingClassifier(
            [("a", linear_model.LogisticRegression()), ("b", naive_bayes.GaussianNB()), ("c", svm.LinearSVC())],
            weights=[1, 2, 1.5],
        ),
        X,
        WORDS,
    ),
    "voting, soft": fit(
        VotingClassifier(
            [("a", linear_model.LogisticRegression()), ("b", naive_bayes.GaussianNB())], voting="soft", weights=[1, 2]
        ),
        NAMED,
        NUMBERS,
    ),
    "stacked classes": fit(
        StackingClassifier([("a", linear_model.LogisticRegression()), ("b", svm.LinearSVC())], cv=2, passthrough=True),
        X,
        WORDS,
    ),
    "stacked, two classes": fit(
        StackingClassifier([("a", linear_model.LogisticRegression()), ("b", svm.LinearSVC())], cv=2), NAMED, TRUTH
    ),
    **{
        f"calibrated by {method}": fit(CalibratedClassifierCV(model, method=method, cv=2, ensemble=ensemble), X, target)
        for method, model, target, ensemble in (
            ("sigmoid", naive_bayes.GaussianNB(), TRUTH, True),
            ("isotonic", svm.LinearSVC(), WORDS, True),
            ("temperature", linear_model.LogisticRegression(), WORDS, False),
        )
    },
    "calibrated by temperature, two classes": fit(
        CalibratedClassifierCV(naive_bayes.GaussianNB(), method="temperature", cv=2), X, TRUTH
    ),
}


@functools.cache
def fitted(name: str) -> Fitted:
    return BUILDERS[name]()
