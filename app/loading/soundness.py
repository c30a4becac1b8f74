"""Whether a model that was read can be used without harm, whatever wrote it.

Compiled code follows the numbers in a fitted estimator without asking: the children of a node, the row of a neighbour, the
column of a category. A model in which they point elsewhere reads or writes foreign memory when it predicts. Some estimators
can be told to read files. And a graph of objects can be deeper, or larger once it is written out, than anybody could walk.

All of it is looked at once, after reading and before anything else touches the model.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from app.compiled.patterns import is_linear
from app.errors import LoadFailed
from app.names import shortened

MAX_DEPTH = 100  # of estimators and collections in one another; the pickler of most files gives up at about 300
MAX_UNFOLDED = 64  # what is in several places, written out in each, is at most so many times as much ...
MIN_UNFOLDED = 10_000_000  # ... or this
MAX_SHOWN = 60  # characters of a pattern that are shown
MAX_TOLD = 200  # characters of another's message, or of what is in the file

_PLAIN = (
    *(str, bytes, bytearray, bool, int, float, complex, type(None), slice, range, type, np.generic, np.dtype, np.ufunc),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type(np.median), functools._lru_cache_wrapper),
)

_MOST = frozenset((str, int, float, bool, type(None), np.float64, np.int64))  # of what is plain: found faster


def check_attributes(kind: type, names: Iterable[str]) -> None:
    """Refuse attributes that would stand before what their class does: its methods, and the constants that they go by."""
    names = list(names)
    check_names(kind, names)
    hidden = _own_names(kind) & set(names)
    if hidden:
        raise LoadFailed(f"has a {kind.__name__} with a {min(hidden)} of its own")


def check_names(kind: type, names: Iterable[Any]) -> None:
    """Refuse names that Python and numpy look for: `__array_interface__` would be an array of whatever memory it says."""
    for name in names:
        if isinstance(name, str) and name.startswith("__") and name not in _TEXTS:
            raise LoadFailed(f"has a {kind.__name__} with a {name[:MAX_TOLD]} of its own")


_TEXTS = ("__doc__", "__name__")  # which what distributions of scipy consist of has


@functools.cache
def _own_names(kind: Any) -> frozenset[str]:
    # LassoLars has an attribute `positive` for the estimators derived from it, and a parameter of that name.
    return frozenset(name for base in kind.__mro__ for name, value in vars(base).items() if type(value) is not bool)


def check(value: Any, alien: type | tuple[()] = (), *, trusted: frozenset[str] = frozenset()) -> None:
    """Look at everything in `value`. Nothing in it may be of the type `alien`. Raises `LoadFailed`.

    `trusted` are full names of classes that the operator answers for: the patterns of their texts may take for ever.

    What only talks or computes in many threads is set to be quiet and alone: progress messages, and the number of
    threads of the machine that the model was fitted on.
    """
    walk = _Walk(alien)
    walk.run(value)
    for found in walk.found:
        for look in _looks(found.__class__):
            try:
                look(found)
                if look is _vectorizer and full_name(type(found)) not in trusted:
                    _pattern(found)
            except LoadFailed:
                raise
            except Exception as error:  # anything can be where a number or an array should be
                raise LoadFailed(
                    f"has a {type(found).__name__} that is not whole: {type(error).__name__}: {str(error)[:MAX_TOLD]}"
                ) from error


class _Walk:
    """Visits every object once. What nests, collections and estimators, is visited as a tree, to see how deep and large."""

    def __init__(self, alien: type | tuple[()]) -> None:
        self.found: list[Any] = []  # every object that somebody has to look at
        self._alien = alien
        self._sizes: dict[int, tuple[int, int]] = {}  # depth, and size written out, of what nests; by identity
        self._open: set[int] = set()
        self._apart: list[Any] = []  # what is reached from things that nest, but does not itself
        self._count = 0

    def run(self, value: Any) -> None:
        self._apart.append(value)
        seen: set[int] = set()
        while self._apart:
            item = self._apart.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if self._nests(item):
                self._visit(item)
            else:
                self._note(item)
                self._apart.extend(_children(item))

    def _nests(self, item: Any) -> bool:
        if isinstance(item, self._alien):
            raise LoadFailed("has a type where an object should be")
        return isinstance(item, (list, tuple, dict, set, frozenset, np.ndarray)) or hasattr(type(item), "get_params")

    def _note(self, item: Any) -> None:
        self._count += 1
        if _looks(item.__class__):
            self.found.append(item)

    def _visit(self, root: Any) -> None:
        if id(root) in self._sizes:
            return
        stack = [self._enter(root)]
        while stack:
            item, children, measured = stack[-1]
            for child in children:
                if not self._nests(child):
                    self._apart.append(child)
                    continue
                size = self._sizes.get(id(child))
                if size is None:
                    if id(child) in self._open:
                        raise LoadFailed(f"has a {type(child).__name__} that contains itself")
                    if len(stack) > MAX_DEPTH:
                        raise LoadFailed(f"is nested more than {MAX_DEPTH} deep")
                    stack.append(self._enter(child))
                    break
                _add(measured, size)
            else:
                stack.pop()
                self._open.remove(id(item))
                self._sizes[id(item)] = size = (measured[0], measured[1])
                if size[0] > MAX_DEPTH:
                    raise LoadFailed(f"is nested more than {MAX_DEPTH} deep")
                if stack:
                    _add(stack[-1][2], size)
        if self._sizes[id(root)][1] > max(MIN_UNFOLDED, MAX_UNFOLDED * self._count):
            raise LoadFailed("has the same objects in so many places that it could not be written out")

    def _enter(self, item: Any) -> tuple[Any, Any, list[int]]:
        self._open.add(id(item))
        self._note(item)
        length = len(item) if isinstance(item, (list, tuple, dict, set, frozenset)) else 0
        self._count += length
        return item, iter(_children(item)), [1, 1 + length]


def _add(measured: list[int], size: tuple[int, int]) -> None:
    measured[0] = max(measured[0], 1 + size[0])
    measured[1] += size[1]


def _children(item: Any) -> list[Any]:
    """Return what is in an object, but for numbers, texts and the like."""
    own = vars(item) if hasattr(item, "__dict__") else {}
    check_names(type(item), own)
    _calm(own)
    if isinstance(item, dict):
        if type(item).__module__ not in ("builtins", "collections"):
            check_names(type(item), item)  # whose keys may be its attributes
        _demand(isinstance(item.get("out"), _PLAIN), "a function would write its result into a part of the model")
        parts: Iterable[Any] = item.values()
    elif isinstance(item, (list, tuple, set, frozenset)):
        parts = item
    elif isinstance(item, np.ndarray):
        parts = item.view(np.ndarray).ravel().tolist() if item.dtype == object else ()
    elif isinstance(item, functools.partial):
        parts = (item.func, item.args, item.keywords)
    else:
        parts = ()
    if own:
        parts = itertools.chain(parts, own.values())
    found = []
    for part in parts:
        if type(part) is types.FunctionType and part.__module__ == "sklearn.cluster._kmeans":
            bisecting = (
                f"{type(item).__module__}.{type(item).__name__}" == "sklearn.cluster._bisect_k_means.BisectingKMeans"
            )
            _demand(
                bisecting, f"{part.__name__} takes the sizes of its arrays for granted, and is for BisectingKMeans only"
            )
        elif type(part) not in _MOST and not isinstance(part, _PLAIN):
            found.append(part)
    return found


def _calm(own: dict[str, Any]) -> None:
    """Let what has these attributes, and the functions that it calls with keywords, start no threads nor processes."""
    for attribute in _KEYWORDS & own.keys():
        _calm_keywords(own[attribute])
    _work_alone(own)


def _work_alone(own: dict[str, Any]) -> None:
    if own.get("n_jobs") is not None:
        own["n_jobs"] = 1


_KEYWORDS = {
    *("effective_metric_params_", "inv_kw_args", "kernel_params", "kw_args", "metric_params", "pairwise_kernels_kwargs")
}


def _calm_keywords(keywords: Any) -> None:
    """Refuse what tells a function of numpy where to write."""
    if isinstance(keywords, dict):
        _demand("out" not in keywords, "a function would write its result into a part of the model")
        _demand("where" not in keywords, "a function would leave parts of its result as the memory was before")
        _work_alone(keywords)


# What is looked at, by the class that it is of


def full_name(kind: type) -> str:
    """Return what `ML_TRUSTED_TYPES` calls a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def _looks(kind: Any) -> tuple[Callable[[Any], None], ...]:
    names = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    return tuple(look for name, look in _LOOKS.items() if name in names)


def _demand(sound: Any, what: str) -> None:
    if not sound:
        raise LoadFailed(f"could not be used without harm: {what}")


def _array(value: Any, dimensions: int, what: str, kinds: str = "f") -> np.ndarray[Any, Any]:
    _demand(type(value) is np.ndarray and value.ndim == dimensions and value.dtype.kind in kinds, what)
    return value  # type: ignore[no-any-return]  # the demand is for one


def _within(numbers: np.ndarray[Any, Any], end: int) -> bool:
    """Whether all are places in something of length `end`."""
    return not numbers.size or bool(numbers.min() >= 0 and numbers.max() < end)


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, (int, np.integer)) else -1


def _estimator(estimator: Any) -> None:
    """Let it neither call what is no method of an estimator, nor talk, nor start the threads of another machine."""
    own = vars(estimator)
    for attribute in ("stack_method_", "chain_method_", "response_method"):
        chosen = own.get(attribute)
        for name in chosen if type(chosen) in (list, tuple) else [chosen]:
            known = name is None or (type(name) is str and name in _METHODS)
            _demand(known, f"a {type(estimator).__name__} would call another method than those of estimators")
    if own.get("verbose"):
        estimator.verbose = False
    if "_n_threads" in own:
        estimator._n_threads = 1


_METHODS = frozenset(
    ("auto", "decision_function", "predict", "predict_log_proba", "predict_proba", "score_samples", "transform")
)


def _selection(estimator: Any) -> None:
    getter = vars(estimator).get("importance_getter")
    _demand(
        type(getter) is not str or all(part.isidentifier() and part[0] != "_" for part in getter.split(".")),
        "features would be selected by something private",
    )


def _partial(function: Any) -> None:
    """Refuse arrays before the arguments that are to come: a function of numpy would write into one, if told to."""
    _calm_keywords(function.keywords)
    _demand(
        all(isinstance(part, _PLAIN) for part in function.args), "a partial function begins with other than numbers"
    )


def _tree(tree: Any) -> None:
    """Every split must lead on to two later nodes, by a feature that there is: then no path leaves the tree, or goes round."""
    nodes = tree.__getstate__()["nodes"]
    _demand(len(nodes) > 0, "a tree has no nodes")
    left = nodes["left_child"]
    splits = np.flatnonzero(left != -1)
    if splits.size:
        left, right, features = left[splits], nodes["right_child"][splits], nodes["feature"][splits]
        later = (left > splits).all() and (right > splits).all()
        _demand(later and max(left.max(), right.max()) < len(nodes), "a tree has a node whose children are elsewhere")
        _demand(_within(features, tree.n_features), f"a tree splits by a feature beyond its {tree.n_features}")


def _tree_estimator(estimator: Any) -> None:
    tree = vars(estimator).get("tree_")
    if tree is not None:
        width = vars(estimator).get("n_features_in_")
        fits = type(tree).__module__ == "sklearn.tree._tree" and _whole(width) == tree.n_features
        _demand(fits, f"a {type(estimator).__name__} of {width} features has a tree of others")


def _forest(forest: Any) -> None:
    own = vars(forest)
    for estimator in own.get("estimators_") or ():
        _demand(
            _is_tree_of(estimator, own.get("n_features_in_")), "a forest has trees for other features than it takes"
        )


def _is_tree_of(estimator: Any, width: Any) -> bool:
    if "sklearn.tree._classes.BaseDecisionTree" not in {
        f"{b.__module__}.{b.__qualname__}" for b in type(estimator).__mro__
    }:
        return False
    return "tree_" in vars(estimator) and 0 <= _whole(width) == _whole(vars(estimator).get("n_features_in_"))


def _isolation_forest(forest: Any) -> None:
    own = vars(forest)
    trees, features = own.get("estimators_") or [], own.get("estimators_features_") or []
    for tree, columns in zip(trees, features, strict=True):
        whole = own.get("_max_features") == own.get("n_features_in_")
        width = own.get("n_features_in_") if whole else len(columns)
        _demand(_is_tree_of(tree, width), "an isolation forest has trees for other features than it takes")


def _gradient_boosting(boosting: Any) -> None:
    own = vars(boosting)
    if "estimators_" not in own:
        return
    trees, width = _array(own["estimators_"], 2, "a boosting has no table of trees", "O"), own.get("n_features_in_")
    _demand(trees.size > 0, "a boosting has no trees")
    for tree in trees.ravel().tolist():
        sound = _is_tree_of(tree, width) and tree.tree_.n_outputs == tree.tree_.max_n_classes == 1
        _demand(sound, "a boosting has trees for other features than it takes, or of other outputs")
    first = own.get("init_")
    if type(first) is str and first == "zero":
        outputs = _whole(own.get("n_trees_per_iteration_"))
        _demand(outputs == trees.shape[1], f"a boosting begins with {outputs} outputs, of {trees.shape[1]}")
    _count_beginnings()


def _count_beginnings() -> None:
    """Have what a boosting begins with counted, whoever computes it: its trees add to as many numbers as they have rows.

    It cannot be tried here, where nothing has been looked at that it may consist of; nor would one answer tell of another.
    """
    from sklearn.ensemble._gb import BaseGradientBoosting

    original = BaseGradientBoosting._raw_predict_init
    if hasattr(original, "counted"):
        return

    def counted(boosting: Any, rows: Any) -> Any:
        first, wanted = original(boosting, rows), (rows.shape[0], boosting.estimators_.shape[1])
        if np.shape(first) != wanted:
            raise ValueError(f"a {type(boosting).__name__} begins with {np.shape(first)} numbers, of {wanted}")
        return first

    counted.counted = True  # type: ignore[attr-defined]  # a function can have attributes
    BaseGradientBoosting._raw_predict_init = counted


def _predictor(predictor: Any) -> None:
    nodes = _array(predictor.nodes, 1, "a tree has no nodes", "V")
    _demand(len(nodes) > 0, "a tree has no nodes")
    splits = np.flatnonzero(nodes["is_leaf"] == 0)
    left, right = nodes["left"][splits], nodes["right"][splits]
    later = (left > splits).all() and (right > splits).all()
    _demand(
        later and _within(left, len(nodes)) and _within(right, len(nodes)),
        "a tree has a node whose children are elsewhere",
    )
    sets = _array(predictor.raw_left_cat_bitsets, 2, "a tree has no sets of categories", "u")
    _demand(
        sets.shape[1] == 8 and sets.dtype == np.uint32 and sets.flags.c_contiguous, "a tree has odd sets of categories"
    )
    categorical = splits[nodes["is_categorical"][splits] != 0]
    _demand(_within(nodes["bitset_idx"][categorical], len(sets)), "a tree splits by a set of categories beyond its own")


def _histogram_boosting(boosting: Any) -> None:
    own = vars(boosting)
    if "_predictors" not in own:
        return
    width, bins = _whole(own.get("n_features_in_")), vars(own["_bin_mapper"])
    categorical = _array(bins["is_categorical_"], 1, "a boosting does not know its categories", "bu")
    _demand(len(categorical) == width, "a boosting has categories for other features than it takes")
    for predictor in itertools.chain.from_iterable(own["_predictors"]):
        _demand(type(predictor).__name__ == "TreePredictor", "a boosting has trees that are none")
        splits = predictor.nodes[predictor.nodes["is_leaf"] == 0]
        features = splits["feature_idx"]
        _demand(_within(features, width), f"a tree splits by a feature beyond its {width}")
        by_category = features[splits["is_categorical"] != 0]
        _demand((categorical[by_category] != 0).all(), "a tree splits by the categories of a feature that has none")


def _neighbour_tree(tree: Any) -> None:
    """A node's points are its children's, one after the other, and all are rows: then none is counted twice, or is elsewhere."""
    data, rows, nodes, bounds, leaf_size, _, count, *_, metric, weights = tree.__getstate__()
    _demand(data is not None and data.ndim == 2 and data.size > 0, "a neighbour tree has no points")
    points, width = data.shape
    _demand(rows.shape == (points,) and _within(rows, points), "a neighbour tree has a point that is no row")
    layers = 2 if type(tree).__name__.startswith("KD") else 1
    _demand(
        nodes.shape == (count,) and bounds.shape == (layers, count, width), "a neighbour tree has nodes without bounds"
    )
    _demand(
        leaf_size > 0 and (weights is None or weights.shape == (points,)),
        "a neighbour tree has other weights than points",
    )
    start, end = nodes["idx_start"], nodes["idx_end"]
    _demand(
        (start >= 0).all() and (start <= end).all() and start[0] == 0 and end[0] == points,
        "a node has points elsewhere",
    )
    inner = np.flatnonzero(nodes["is_leaf"] == 0)
    left, right = 2 * inner + 1, 2 * inner + 2
    _demand(_within(right, count), "a neighbour tree has a node without children")
    halves = (start[left] == start[inner]) & (end[left] == start[right]) & (end[right] == end[inner])
    _demand(halves.all(), "a neighbour tree has a node with other points than its children's")
    metric._validate_data(data)


def _metric(metric: Any) -> None:
    _, _, matrix = metric.__getstate__()
    _demand(matrix.shape[0] == matrix.shape[1], "a distance has a matrix that is not square")


def _neighbours(estimator: Any) -> None:
    own = vars(estimator)
    points, width = own.get("_fit_X"), _whole(own.get("n_features_in_"))
    count = own.get("n_neighbors")  # the nearest of none would still be written down
    _demand(count is None or _whole(count) > 0, f"a {type(estimator).__name__} looks for no neighbours")
    if points is None:
        return
    _demand(
        hasattr(points, "shape")
        and len(points.shape) == 2
        and points.shape == (_whole(own.get("n_samples_fit_")), width),
        f"a {type(estimator).__name__} has other points than it was fitted with",
    )
    tree = own.get("_tree")
    _demand(tree is None or tree.data.shape == points.shape, "neighbours have another tree than points")
    options = {**(own.get("metric_params") or {}), **(own.get("effective_metric_params_") or {})}
    _demand(not {"X_norm_squared", "Y_norm_squared"} & options.keys(), "neighbours have norms that may not be theirs")
    classes, codes = own.get("classes_"), own.get("_y")
    if classes is not None and codes is not None:
        _demand(type(codes) is np.ndarray and codes.dtype.kind in "iu", "neighbours have no classes")
        columns = classes if isinstance(classes, list) else [classes]
        table = codes.reshape(len(codes), -1)
        _demand(
            len(codes) == points.shape[0] and table.shape[1] == len(columns),
            "neighbours have other classes than points",
        )
        sound = all(_within(column, len(known)) for column, known in zip(table.T, columns, strict=True))
        _demand(sound, "neighbours have a class that there is not")


def _density(estimator: Any) -> None:
    tree = vars(estimator).get("tree_")
    if tree is not None:
        _demand(
            tree.data.shape[1] == _whole(vars(estimator).get("n_features_in_")), "a density has points of another width"
        )


def _k_means(estimator: Any) -> None:
    own = vars(estimator)
    if "cluster_centers_" in own:
        centers = _array(own["cluster_centers_"], 2, "clusters have no centers")
        _demand(centers.shape[1] == _whole(own.get("n_features_in_")), "clusters have centers of another width")
    nodes, seen = [own.get("_bisecting_tree")], set()
    while nodes:
        node = nodes.pop()
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            inside = vars(node)
            _demand(
                np.shape(inside["center"]) == (_whole(own.get("n_features_in_")),),
                "clusters have centers of another width",
            )
            nodes += [inside.get("left"), inside.get("right")]


def _birch(estimator: Any) -> None:
    own = vars(estimator)
    if "subcluster_centers_" in own:
        norms = _array(own.get("_subcluster_norms"), 1, "clusters have no norms")
        _demand(len(norms) == len(own["subcluster_centers_"]), "clusters have other norms than centers")


def _support_vectors(machine: Any) -> None:
    """The arrays must be of the sizes that libsvm takes for granted (sklearn/svm/src/libsvm/libsvm_helper.c)."""
    own = vars(machine)
    if "support_vectors_" not in own:
        return
    name, sparse = type(machine).__name__, own.get("_sparse")
    support = _array(own["support_"], 1, f"a {name} has no support", "i")
    counts = _array(own["_n_support"], 1, f"a {name} has no support", "i")
    intercept = _array(own["_intercept_"], 1, f"a {name} has no intercept")
    vectors, weights, classes = own["support_vectors_"], own["_dual_coef_"], len(counts)
    pairs = classes * (classes - 1) // 2
    _demand(classes >= 2 and len(intercept) == pairs, f"a {name} of {classes} classes has {len(intercept)} intercepts")
    _demand(weights.shape == (classes - 1, len(support)), f"a {name} has other weights than support vectors")
    precomputed = callable(own.get("kernel")) or own.get("kernel") == "precomputed"
    if precomputed:
        fitted = own.get("_BaseLibSVM__Xfit")
        rows = len(fitted) if isinstance(fitted, np.ndarray) else own["shape_fit_"][0]
        _demand(_within(support, min(rows, own["shape_fit_"][0])), f"a {name} has support beyond its points")
    if not precomputed or sparse:
        sizes = (len(support), _whole(own.get("n_features_in_")))
        _demand(
            vectors.shape == sizes or (precomputed and vectors.shape[0] == len(support)),
            f"a {name} has odd support vectors",
        )
    if sparse:
        rows = all(type(part).__name__ in ("csr_matrix", "csr_array") for part in (vectors, weights))
        _demand(rows, f"a {name} has support vectors that are not in rows")
        _demand(weights.nnz == weights.shape[0] * weights.shape[1], f"a {name} lacks weights")
    if type(machine)._impl in ("c_svc", "nu_svc"):
        _demand(
            (counts >= 0).all() and int(counts.sum()) == len(support), f"a {name} has other counts than support vectors"
        )
        _demand(len(own.get("classes_", ())) == classes, f"a {name} has other classes than it computes")
    likely = [len(_array(own[part], 1, f"a {name} has odd probabilities")) for part in ("_probA", "_probB")]
    needed = sparse and own.get("_effective_probability")
    fine = likely == [pairs, pairs] or (not needed and likely in ([0, 0], [1, 0]))  # regression knows one number
    _demand(fine, f"a {name} has odd probabilities")


def _sparse(matrix: Any) -> None:
    own = vars(matrix)
    data, indices, bounds = (own[part] for part in ("data", "indices", "indptr"))
    shape = own["_shape"]
    sound = type(shape) is tuple and len(shape) == 2 and all(_whole(length) >= 0 for length in shape)
    for part, kinds in ((indices, "i"), (bounds, "i"), (data, "biufc")):
        sound = sound and type(part) is np.ndarray and part.ndim == 1 and part.dtype.kind in kinds
    if sound:
        lines, length = shape if "csr" in type(matrix).__name__ else shape[::-1]
        sound = (
            len(bounds) == lines + 1
            and bounds[0] == 0
            and (bounds[:-1] <= bounds[1:]).all()
            and bounds[-1] <= len(indices) == len(data)
            and _within(indices, length)
        )
    _demand(sound, "a sparse matrix has entries outside of it")
    for known in ("_has_sorted_indices", "_has_canonical_format"):
        own.pop(known, None)  # it can tell, and need not be told


def _spline(spline: Any) -> None:
    own = vars(spline)
    knots, weights = _array(own["t"], 1, "a spline has no knots"), own["c"]
    sound = type(weights) is np.ndarray and weights.dtype == knots.dtype == np.float64 and weights.ndim >= 1
    sound = sound and knots.flags.c_contiguous and weights.flags.c_contiguous and 0 <= _whole(own["k"]) <= 100
    _demand(sound and _whole(own["axis"]) == 0, "a spline has odd knots or weights")
    type(spline)(knots, weights, own["k"], extrapolate=own["extrapolate"])  # compares the sizes, and raises


def _vectorizer(vectorizer: Any) -> None:
    found = vars(vectorizer).get("input", "content")
    if found != "content":
        given = repr(found[:MAX_TOLD]) if type(found) is str else f"a {type(found).__name__}"
        raise LoadFailed(
            f"has a {type(vectorizer).__name__}(input={given}), which would read the files that a request names: "
            "fit it on texts, with input='content'"
        )


def _pattern(vectorizer: Any) -> None:
    """Refuse a pattern that could hang the process on a text: while `re` looks for it, no other thread has its turn."""
    own, kind = vars(vectorizer), type(vectorizer)
    analyzer, pattern = own.get("analyzer", "word"), own.get("token_pattern")
    if callable(analyzer) or analyzer in ("char", "char_wb") or own.get("tokenizer") is not None or pattern is None:
        return
    if type(pattern) is not str or not is_linear(pattern):
        given = repr(shortened(pattern, MAX_SHOWN)) if type(pattern) is str else f"a {type(pattern).__name__}"
        raise LoadFailed(
            f"has a {kind.__name__}(token_pattern={given}), which might take for ever on some texts, and let nothing else be "
            "answered meanwhile: let nothing that can fail follow what is repeated, or, if nobody sends such texts, add "
            f"{full_name(kind)} to ML_TRUSTED_TYPES"
        )


def _hasher(hasher: Any) -> None:
    """Words go to the column that is the rest of a division by their number."""
    columns = _whole(vars(hasher).get("n_features"))
    _demand(1 <= columns < 2**31, f"a {type(hasher).__name__} has {columns:,} columns")


def _vocabulary(vectorizer: Any) -> None:
    vocabulary = vars(vectorizer).get("vocabulary_")
    if vocabulary is not None:
        sound = isinstance(vocabulary, dict) and {*map(type, vocabulary.values())} <= {int, np.int32, np.int64}
        places = np.fromiter(vocabulary.values(), np.int64, len(vocabulary)) if sound else np.full(1, -1)
        sound = _within(places, len(places)) and bool((np.bincount(places) == 1).all())
        _demand(sound, "a vocabulary has a word without a column of its own")


def _one_vs_rest(estimator: Any) -> None:
    """Have the answers of its parts counted: it makes places in a matrix of them, unchecked, and there may be any number."""
    from sklearn import multiclass
    from sklearn.utils.validation import _num_samples

    original = multiclass._predict_binary
    if hasattr(original, "counted"):
        return

    def counted(part: Any, rows: Any) -> Any:
        scores = original(part, rows)
        if np.shape(scores)[:1] != (_num_samples(rows),):
            raise ValueError(f"a {type(part).__name__} gives {np.shape(scores)} answers for {_num_samples(rows)} rows")
        return scores

    counted.counted = True  # type: ignore[attr-defined]  # a function can have attributes
    multiclass._predict_binary = counted


def _label_sets(binarizer: Any) -> None:
    vars(binarizer).pop("_cached_dict", None)  # places in a matrix, which it can count again
    binarizer._cached_dict = None


def _one_hot(encoder: Any) -> None:
    """Go through every category, as `OneHotEncoder.transform` would: each must get a column of its own feature."""
    own = vars(encoder)
    if "categories_" not in own:
        return
    categories, widths = own["categories_"], own.get("_n_features_outs")
    mappings = own.get("_default_to_infrequent_mappings") if own.get("_infrequent_enabled") else None
    drops = own.get("_drop_idx_after_grouping")
    parts = (categories, widths, mappings, own.get("_infrequent_indices"), drops)
    _demand(
        all(part is None or len(part) == len(categories) for part in parts) and widths is not None,
        "an encoder has odd columns",
    )
    for feature, known in enumerate(categories):
        known = _array(known, 1, "an encoder has odd categories", "OUSiufbmM")
        if known.dtype.kind not in "OUS":
            ordered = (known[:-1] <= known[1:]) | (known[1:] != known[1:])
            _demand(ordered.all(), "an encoder has categories that are not in order")
        codes = np.arange(len(known))
        if mappings is not None and mappings[feature] is not None:
            codes = _array(mappings[feature], 1, "an encoder has odd categories", "iu").astype(np.int64)
        elif mappings is not None:
            _demand(own["_infrequent_indices"][feature] is None, "an encoder has odd categories")
        drop = None if drops is None else drops[feature]
        drop = len(known) if drop is None else _whole(drop)
        codes = codes[codes != drop]
        codes = codes - (codes > drop)
        _demand(
            drop >= 0 and _within(codes, _whole(widths[feature])),
            "an encoder has a category without a column of its own",
        )


_LOOKS: Mapping[str, Callable[[Any], None]] = {
    "functools.partial": _partial,
    "scipy.interpolate._bsplines._BSpline": _spline,
    "scipy.sparse._compressed._cs_matrix": _sparse,
    "sklearn.base.BaseEstimator": _estimator,
    "sklearn.cluster._birch.Birch": _birch,
    "sklearn.cluster._kmeans._BaseKMeans": _k_means,
    "sklearn.ensemble._forest.BaseForest": _forest,
    "sklearn.ensemble._gb.BaseGradientBoosting": _gradient_boosting,
    "sklearn.ensemble._hist_gradient_boosting.gradient_boosting.BaseHistGradientBoosting": _histogram_boosting,
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor": _predictor,
    "sklearn.ensemble._iforest.IsolationForest": _isolation_forest,
    "sklearn.feature_extraction._dict_vectorizer.DictVectorizer": _vocabulary,
    "sklearn.feature_extraction._hash.FeatureHasher": _hasher,
    "sklearn.feature_extraction.text.CountVectorizer": _vocabulary,
    "sklearn.feature_extraction.text.HashingVectorizer": _hasher,
    "sklearn.feature_extraction.text._VectorizerMixin": _vectorizer,
    "sklearn.feature_selection._from_model.SelectFromModel": _selection,
    "sklearn.metrics._dist_metrics.MahalanobisDistance64": _metric,
    "sklearn.multiclass.OneVsRestClassifier": _one_vs_rest,
    "sklearn.neighbors._ball_tree.BinaryTree64": _neighbour_tree,
    "sklearn.neighbors._base.NeighborsBase": _neighbours,
    "sklearn.neighbors._kd_tree.BinaryTree64": _neighbour_tree,
    "sklearn.neighbors._kde.KernelDensity": _density,
    "sklearn.preprocessing._label.MultiLabelBinarizer": _label_sets,
    "sklearn.preprocessing._encoders.OneHotEncoder": _one_hot,
    "sklearn.svm._base.BaseLibSVM": _support_vectors,
    "sklearn.tree._classes.BaseDecisionTree": _tree_estimator,
    "sklearn.tree._tree.Tree": _tree,
}
