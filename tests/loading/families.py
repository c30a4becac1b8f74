"""Every estimator of scikit-learn, and every variant that keeps something else in its pickle, fitted on a few rows."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import expit
from scipy.stats import loguniform, randint, uniform
from sklearn import (
    base,
    calibration,
    cluster,
    compose,
    ensemble,
    feature_selection,
    impute,
    linear_model,
    model_selection,
)
from sklearn import decomposition as parts
from sklearn import gaussian_process as gaussian
from sklearn import kernel_approximation as approximation
from sklearn import neighbors as near
from sklearn import neural_network as neural
from sklearn import preprocessing as pre
from sklearn import random_projection as projection
from sklearn.experimental import enable_halving_search_cv, enable_iterative_imputer  # noqa: F401 - what they are for
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.gaussian_process import kernels
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.multioutput import ClassifierChain
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils import all_estimators

COUNT = 48
random = np.random.default_rng(0)
X = random.normal(size=(COUNT, 6))
POSITIVE = np.abs(X) + 0.1
Y = (X[:, 0] + 0.3 * random.normal(size=COUNT) > 0).astype(int)
THREE = np.arange(COUNT) % 3
REAL = X[:, 0]
FRAME = pd.DataFrame(X, columns=list("abcdef"))
FRAME["s"] = np.where(X[:, 0] > 0, "u", "v")
FRAME["k"] = FRAME.s.astype("category")
FRAME["t"] = FRAME.s.astype(object)
TEXTS = ["apple b", "cat dog"] * 6

Fitted = tuple[Any, Any]
BUILDERS: dict[str, Callable[[], Fitted]] = {}


def add(name: str, make: Callable[[], Any], data: Any = X, target: Any = None) -> None:
    """Add an estimator; `make` gives it unfitted."""

    def build() -> Fitted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make().fit(*([data] if target is None else [data, target])), data

    assert name not in BUILDERS
    BUILDERS[name] = build


@functools.cache
def fitted(name: str) -> Fitted:
    return BUILDERS[name]()


SPECIAL: dict[str, tuple[tuple[Any, ...], Any, Any]] = {
    "CCA": ((1,), X, REAL),
    "ClassifierChain": ((linear_model.LogisticRegression(),), X, np.c_[Y, Y[::-1]]),
    "ColumnTransformer": (([("a", pre.StandardScaler(), [0, 1])],), X, None),
    "CountVectorizer": ((), TEXTS, None),
    "DictVectorizer": ((), [{"a": 1.0}, {"b": "c"}], None),
    "FeatureHasher": ((), [{"a": 1.0}], None),
    "FeatureUnion": (([("a", pre.StandardScaler())],), X, None),
    "GaussianRandomProjection": ((2,), X, None),
    "IsotonicRegression": ((), X[:, 0], REAL),
    "KernelCenterer": ((), X @ X.T, None),
    "LabelBinarizer": ((), THREE, None),
    "LabelEncoder": ((), Y, None),
    "MultiLabelBinarizer": ((), [[1], [2, 3]], None),
    "MultiOutputClassifier": ((linear_model.LogisticRegression(),), X, np.c_[Y, Y[::-1]]),
    "MultiOutputRegressor": ((linear_model.Ridge(),), X, np.c_[REAL, -REAL]),
    "Pipeline": (([("a", pre.StandardScaler())],), X, None),
    "PLSCanonical": ((1,), X, REAL),
    "PLSRegression": ((1,), X, REAL),
    "PLSSVD": ((1,), X, REAL),
    "RegressorChain": ((linear_model.Ridge(),), X, np.c_[REAL, -REAL]),
    "SparseCoder": ((X[:6],), X, None),
    "SparseRandomProjection": ((2,), X, None),
    "TfidfVectorizer": ((), TEXTS, None),
}
OUTER = {  # those that need another estimator within
    "FixedThresholdClassifier", "GridSearchCV", "HalvingGridSearchCV", "HalvingRandomSearchCV", "OneVsOneClassifier",
    "OneVsRestClassifier", "OutputCodeClassifier", "RFE", "RFECV", "RandomizedSearchCV", "SelectFromModel",
    "SelfTrainingClassifier", "SequentialFeatureSelector", "StackingClassifier", "StackingRegressor",
    "TunedThresholdClassifierCV", "VotingClassifier", "VotingRegressor",
}  # fmt: skip
QUICK = {  # what the slow ones are told
    "DictionaryLearning": {"max_iter": 2, "n_components": 2},
    "MiniBatchDictionaryLearning": {"max_iter": 2, "n_components": 2},
    "GraphicalLassoCV": {"cv": 2, "n_refinements": 1},
    "LogisticRegressionCV": {"Cs": 2, "cv": 2},
    "NeighborhoodComponentsAnalysis": {"max_iter": 2},
    "SparsePCA": {"max_iter": 2, "n_components": 2},
    "MiniBatchSparsePCA": {"max_iter": 2, "n_components": 2},
    "TSNE": {"max_iter": 250, "perplexity": 5, "method": "exact"},
    "SequentialFeatureSelector": {"cv": 2, "n_features_to_select": 1},
    "TunedThresholdClassifierCV": {"cv": 2, "thresholds": 5},
    "RFECV": {"cv": 2},
    **{
        name: {"cv": 2}
        for name in ("GridSearchCV", "HalvingGridSearchCV", "HalvingRandomSearchCV", "RandomizedSearchCV")
    },
    "MiniBatchKMeans": {"n_init": 1, "max_iter": 2},
    "MeanShift": {"bandwidth": 2},
    "TheilSenRegressor": {"max_subpopulation": 50, "n_subsamples": 8},
    "SpectralBiclustering": {"n_clusters": 2, "n_init": 1},
    "BernoulliRBM": {"n_iter": 1},
    "HistGradientBoostingClassifier": {"max_iter": 2},
    "HistGradientBoostingRegressor": {"max_iter": 2},
}
PASSED_OVER = {"FrozenEstimator", "PatchExtractor"}  # of a fitted estimator, below; of images


def _all() -> Iterator[tuple[str, Callable[[], Any], Any, Any]]:
    for name, kind in all_estimators():
        arguments, data, target = SPECIAL.get(name, ((), X, Y))
        options: dict[str, Any] = dict(QUICK.get(name, {}))
        if name in PASSED_OVER:
            continue
        if name in OUTER:
            one: Any = linear_model.Ridge() if "Regressor" in name else linear_model.LogisticRegression()
            many = "Stacking" in name or "Voting" in name
            search = ({"C": [1, 2]},) if "Search" in name else ()
            arguments = ([("a", one)],) if many else (one, *search)
        elif "n_estimators" in kind._get_param_names() and "max_iter" not in options:
            options["n_estimators"] = 3
        if name.startswith("MultiTask"):
            target = np.c_[REAL, -REAL]
        elif name in ("GammaRegressor", "PoissonRegressor", "TweedieRegressor"):
            target = POSITIVE[:, 0]
        if name in (
            "AdditiveChi2Sampler",
            "CategoricalNB",
            "ComplementNB",
            "LatentDirichletAllocation",
            "MiniBatchNMF",
        ) or name in ("MultinomialNB", "NMF", "TfidfTransformer"):
            data = np.round(POSITIVE)
        if "random_state" in kind._get_param_names():
            options["random_state"] = 0
        yield name, functools.partial(kind, *arguments, **options), data, target


for name, make, data, target in _all():
    add(name, make, data, target)

# Losses and links

for loss in ("squared_error", "absolute_error", "gamma", "poisson", "quantile"):
    make = functools.partial(ensemble.HistGradientBoostingRegressor, loss=loss, quantile=0.5, max_iter=2)
    add(f"histogram boosting, {loss}", make, X, POSITIVE[:, 0])
add("histogram boosting, three classes", lambda: ensemble.HistGradientBoostingClassifier(max_iter=2), X, THREE)
add(
    "histogram boosting, categories",
    lambda: ensemble.HistGradientBoostingClassifier(max_iter=2, categorical_features="from_dtype", min_samples_leaf=3),
    FRAME[list("abck")],
    Y,
)
add(
    "histogram boosting, stopped early",
    lambda: ensemble.HistGradientBoostingClassifier(max_iter=2, early_stopping=True, random_state=1),
    X,
    Y,
)
for loss in ("log_loss", "exponential"):
    add(f"boosting, {loss}", functools.partial(ensemble.GradientBoostingClassifier, loss=loss, n_estimators=2), X, Y)
add(
    "boosting, three classes from nothing",
    lambda: ensemble.GradientBoostingClassifier(n_estimators=2, init="zero", random_state=np.random.RandomState(1)),
    X,
    THREE,
)
add(
    "boosting, from a forest",
    lambda: ensemble.GradientBoostingRegressor(n_estimators=2, init=ensemble.RandomForestRegressor(2)),
    X,
    REAL,
)
for loss in ("absolute_error", "huber", "quantile"):
    add(f"boosting, {loss}", functools.partial(ensemble.GradientBoostingRegressor, loss=loss, n_estimators=2), X, REAL)
for loss in ("hinge", "log_loss", "modified_huber", "squared_hinge", "perceptron", "squared_error", "huber"):
    add(f"stochastic, {loss}", functools.partial(linear_model.SGDClassifier, loss=loss), X, Y)
for loss in ("epsilon_insensitive", "squared_epsilon_insensitive"):
    add(f"stochastic, {loss}", functools.partial(linear_model.SGDRegressor, loss=loss), X, REAL)
for power in (0, 1, 1.5, 2, 3):
    for link in ("identity", "log"):
        make = functools.partial(linear_model.TweedieRegressor, power=power, link=link, max_iter=5)
        add(f"tweedie {power} {link}", make, X, POSITIVE[:, 0])
for solver in ("adam", "sgd", "lbfgs"):
    make = functools.partial(neural.MLPClassifier, (3,), solver=solver, max_iter=3, early_stopping=solver != "lbfgs")
    add(f"perceptron, {solver}", make, X, Y)

# Neighbours, by each tree and distance

METRICS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("euclidean", "manhattan", "chebyshev", "cosine", "haversine", "hamming", "canberra")},
    **{name: {} for name in ("braycurtis", "jaccard", "dice", "rogerstanimoto", "russellrao", "sokalsneath")},
    "minkowski": {"p": 3},
    "seuclidean": {"metric_params": {"V": X.var(0)}},
    "mahalanobis": {"metric_params": {"V": np.cov(X.T)}},
}
TREES = {"kd_tree": near.KDTree.valid_metrics, "ball_tree": near.BallTree.valid_metrics, "brute": list(METRICS)}
for algorithm, metrics in TREES.items():
    for metric in [metric for metric in METRICS if metric in metrics]:
        for dtype in (np.float64, np.float32) if metric in ("euclidean", "minkowski") else (np.float64,):
            points = X[:, :2] if metric == "haversine" else X > 0 if metric in ("jaccard", "dice") else X
            make = functools.partial(near.KNeighborsClassifier, algorithm=algorithm, metric=metric, **METRICS[metric])
            add(f"neighbours, {algorithm} {metric} {dtype.__name__}", make, points.astype(dtype), Y)
add("neighbours, weighed", lambda: near.KNeighborsClassifier(weights="distance"), X, Y)
add("neighbours, sparse", near.KNeighborsClassifier, sparse.csr_matrix(X), Y)
add("neighbours within a radius", lambda: near.RadiusNeighborsClassifier(9.0, outlier_label=0), X, Y)
add("local outliers", lambda: near.LocalOutlierFactor(novelty=True), X)

# Kernels

for kernel in (
    kernels.RBF() + kernels.WhiteKernel(),
    kernels.Matern() * kernels.DotProduct(),
    kernels.RationalQuadratic() ** 2,
    kernels.ExpSineSquared() + kernels.WhiteKernel(5.0),
    kernels.ConstantKernel() + kernels.WhiteKernel(),
    kernels.PairwiseKernel() + kernels.WhiteKernel(),
):
    make = functools.partial(gaussian.GaussianProcessRegressor, kernel, optimizer=None)
    add(f"gaussian process, {type(kernel).__name__} {kernel}", make, X, REAL)
for mode in ("one_vs_rest", "one_vs_one"):
    make = functools.partial(gaussian.GaussianProcessClassifier, optimizer=None, multi_class=mode)
    add(f"gaussian process, {mode}", make, X, THREE)
add("support vectors, by a function", lambda: SVC(kernel=rbf_kernel), X, Y)
add("support vectors, sparse", SVC, sparse.csr_matrix(X), THREE)
for method in ("sigmoid", "isotonic", "temperature"):
    make = functools.partial(calibration.CalibratedClassifierCV, linear_model.LogisticRegression(), method=method, cv=2)
    add(f"calibrated, {method}", make, X, Y)
add(
    "calibrated, frozen",
    lambda: calibration.CalibratedClassifierCV(FrozenEstimator(linear_model.LogisticRegression().fit(X, Y))),
    X,
    Y,
)

# Columns, functions, texts


def columns(**options: Any) -> Any:
    numbers = make_pipeline(impute.SimpleImputer(strategy="median"), pre.StandardScaler())
    branches = [
        ("n", numbers, list("abc")),
        ("o", pre.OneHotEncoder(handle_unknown="ignore", min_frequency=2), ["s", "t"]),
        ("c", pre.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), ["k"]),
        ("te", pre.TargetEncoder(cv=2), ["s"]),
    ]
    return make_pipeline(compose.ColumnTransformer(branches, **options), linear_model.LogisticRegression())


def selecting() -> Any:
    numbers = compose.make_column_selector(dtype_include=[np.number, float])
    return compose.ColumnTransformer([("n", pre.StandardScaler(), numbers)], remainder="passthrough")


def scaling(where: Any, **options: Any) -> Callable[[], Any]:
    return lambda: compose.ColumnTransformer([("n", pre.StandardScaler(), where)], **options)


add("columns", columns, FRAME, Y)
add("columns, selected", selecting, FRAME[list("ab")])
add("columns, as a frame", lambda: scaling(list("ab"))().set_output(transform="pandas"), FRAME)
add("columns, a slice", scaling(slice(0, 2), remainder=pre.StandardScaler()))
add("columns, a mask", scaling(np.array([1, 0, 1, 0, 0, 0], dtype=bool)))
add("columns, some rare", lambda: pre.OneHotEncoder(max_categories=2, dtype=int), THREE[:, None])
add("columns, dropped", lambda: pre.OneHotEncoder(drop="first", sparse_output=False, dtype=np.float32), THREE[:, None])
add("functions", lambda: make_pipeline(pre.FunctionTransformer(np.log1p, np.expm1), pre.StandardScaler()), POSITIVE)
add("functions, with arguments", lambda: pre.FunctionTransformer(np.clip, kw_args={"min": 0, "max": 1}), X)
add("functions, of scipy", lambda: pre.FunctionTransformer(expit), X)
add(
    "target, a function",
    lambda: compose.TransformedTargetRegressor(None, func=np.log, inverse_func=np.exp),
    X,
    POSITIVE[:, 0],
)
add(
    "target, a transformer",
    lambda: compose.TransformedTargetRegressor(None, transformer=pre.QuantileTransformer(n_quantiles=9)),
    X,
    REAL,
)
for vectorizer in (
    CountVectorizer(dtype=np.float32),
    TfidfVectorizer(ngram_range=(1, 2), stop_words="english", sublinear_tf=True),
    TfidfVectorizer(vocabulary={"apple": 0, "cat": 1}),
    HashingVectorizer(n_features=64),
    TfidfVectorizer(analyzer="char_wb", dtype=np.float32),
):
    add(
        f"texts, {vectorizer}",
        functools.partial(make_pipeline, vectorizer, linear_model.SGDClassifier()),
        TEXTS,
        [0, 1] * 6,
    )
for imputer in (
    impute.SimpleImputer(add_indicator=True),
    impute.MissingIndicator(),
    impute.IterativeImputer(max_iter=2),
):
    add(f"imputed, {imputer}", functools.partial(base.clone, imputer), np.where(X > 2, np.nan, X))
for score in (
    feature_selection.f_classif,
    feature_selection.chi2,
    feature_selection.f_regression,
    feature_selection.mutual_info_classif,
    feature_selection.mutual_info_regression,
    feature_selection.r_regression,
):
    add(f"selected by {score.__name__}", functools.partial(feature_selection.SelectKBest, score, k=2), POSITIVE, Y)
add(
    "selected by a forest",
    lambda: feature_selection.SelectFromModel(ensemble.RandomForestClassifier(3, random_state=0)),
    X,
    Y,
)
for transformer in (
    parts.KernelPCA(2, kernel="rbf", fit_inverse_transform=True),
    parts.FastICA(2, random_state=0),
    approximation.Nystroem(n_components=5, random_state=0),
    projection.SparseRandomProjection(2, random_state=0),
    pre.SplineTransformer(extrapolation="periodic"),
    pre.PolynomialFeatures(),
    pre.KBinsDiscretizer(encode="onehot-dense"),
    pre.PowerTransformer(method="box-cox"),
):
    add(f"transformed, {transformer}", functools.partial(base.clone, transformer), POSITIVE)

# Searches

add(
    "search, scored",
    lambda: model_selection.GridSearchCV(
        ensemble.RandomForestClassifier(2, random_state=0),
        {"max_depth": [1, 2], "n_estimators": range(2, 4)},
        scoring="f1",
        cv=model_selection.StratifiedKFold(2, shuffle=True, random_state=1),
    ),
    X,
    Y,
)
add(
    "search, scored twice",
    lambda: model_selection.GridSearchCV(
        linear_model.Ridge(),
        {"alpha": [1, 2]},
        scoring=["r2", "neg_mean_squared_error"],
        refit="r2",
        cv=model_selection.KFold(2),
    ),
    X,
    REAL,
)
add(
    "search, in order",
    lambda: model_selection.GridSearchCV(
        linear_model.Ridge(), {"alpha": [1, 2]}, cv=model_selection.TimeSeriesSplit(2)
    ),
    X,
    REAL,
)
add(
    "search, drawn",
    lambda: model_selection.RandomizedSearchCV(
        linear_model.LogisticRegression(), {"C": loguniform(0.1, 1)}, n_iter=2, cv=2, random_state=0
    ),
    X,
    Y,
)
add(
    "search, drawn from several",
    lambda: model_selection.RandomizedSearchCV(
        ensemble.RandomForestClassifier(2, random_state=0),
        {"max_features": uniform(0.1, 0.5), "max_depth": randint(1, 3)},
        n_iter=2,
        cv=2,
        random_state=0,
    ),
    X,
    Y,
)

# Trees, ensembles, clusters, targets

add("tree, absolute error", lambda: DecisionTreeRegressor(criterion="absolute_error", random_state=0), X, REAL)
add("tree, monotonic", lambda: DecisionTreeClassifier(monotonic_cst=[1, 0, 0, 0, 0, 0], random_state=0), X, Y)
add("forest, of a generator", lambda: ensemble.RandomForestClassifier(2, random_state=np.random.RandomState(3)), X, Y)
add("forest, sparse", lambda: ensemble.RandomForestClassifier(2, random_state=0), sparse.csr_matrix(X), Y)
add("bag", lambda: ensemble.BaggingClassifier(SVC(), 2, max_features=0.5, random_state=0), X, Y)
add("isolation, of some columns", lambda: ensemble.IsolationForest(n_estimators=3, max_features=2, random_state=0), X)
add("clusters, a tree of them", lambda: cluster.Birch(n_clusters=2, threshold=0.1), X)
add("clusters, elkan", lambda: cluster.BisectingKMeans(2, algorithm="elkan", random_state=0), X)
add(
    "chain, in a random order",
    lambda: ClassifierChain(linear_model.LogisticRegression(), order="random", random_state=0),
    X,
    np.c_[Y, Y],
)
add("classes, texts", linear_model.LogisticRegression, FRAME[list("ab")], FRAME.s)
add("classes, categories", linear_model.LogisticRegression, FRAME[list("ab")], FRAME.k)
add("numbers, of 16 bits", linear_model.Ridge, X.astype(np.float16), Y)
add("numbers, long", linear_model.LinearRegression, X.astype(np.longdouble), Y)
