"""Ensembles of decision trees, which give scikit-learn's own sums to the last bit.

There are three ways through the trees. onnxruntime follows a row through a tree at a time: the fastest for a row or two.
Walking takes many rows through all trees a level at a time, in numpy: the fastest for many rows, because no branch is there to
be mispredicted, and the smallest, because it needs nothing but the arrays. Masks look up what each column's value rules out:
the fastest for many rows and small trees. None of them decides what is summed and in which order: leaves are named by rows of
a table of float64, and those are added up as scikit-learn adds them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, override

import numpy as np

from app.compiled import onnx
from app.compiled.masks import Masks, fit
from app.compiled.op import Op, expect
from app.signature import Array

MAX_LEVELS = 4096
_STEPS = 25_000  # tree and row pairs that are walked at once: what is being worked on stays in the cache of a core
_TREES = 5_000  # of which trees
_ROWS = 1024  # rows that are computed at once at most
_MOST_TERMS = 1 << 26  # of a single row that are added up at once
_TERMS = 1_000_000  # numbers that are added up at once at most
_MANY = (4, 16, 64)  # rows from which another engine may be the faster one
_CHECKED = 1 << 16
_SHORT = 2
_HERE = 0x7FFF_FFFF  # the lower half of a node
_MISSING_RIGHT = 1 << 31
_IMPUTE = (
    " does not accept missing values encoded as NaN natively. For supervised learning, you might want to consider"
    " sklearn.ensemble.HistGradientBoostingClassifier and Regressor which accept missing values encoded as NaNs natively."
    " Alternatively, it is possible to preprocess the data, for instance by using an imputer transformer in a pipeline or"
    " drop samples with missing values. See https://scikit-learn.org/stable/modules/impute.html You can find a list of all"
    " estimators that handle NaN values at the following page:"
    " https://scikit-learn.org/stable/modules/impute.html#estimators-that-handle-nan-values"
)
_own = threading.local()

Engine = Literal["onnx", "walk", "masks"]


@dataclass(frozen=True, eq=False)
class Trees(Op, kind="trees"):
    """The sums of the leaves that each row falls into: from a matrix of shape (rows, width) to float64 of (rows, outputs).

    A tree's nodes stand together, its root first, each node's two children side by side and after it. A row goes to the
    right child where its value is greater than the threshold, or is missing and the node says so.

    `nodes`, int64: in the upper half the left child (a leaf: itself), in the lower half the column that is compared (a leaf: its
    row in `values`), plus 2**31 where a missing value goes right. `thresholds`, float32 or float64: to this dtype the input
    is cast; of a leaf, infinity. `roots`, int64. `values`, float64, of shape (different leaves, columns).

    Every tree adds to all columns; with `turns` more than 1 there is one column, and tree t adds to output t % `turns`. The sums
    are divided by `divisor`. `accepts` says which input is not refused: `finite` numbers of the dtype, `missing` ones as well, or
    `any`. `estimator` is what messages call it.

    `engine` is the way through the trees, and `many` that of batches of `many_from_rows` rows and more.
    """

    estimator: str
    width: int
    accepts: Literal["finite", "missing", "any"]
    nodes: Array
    thresholds: Array
    roots: Array
    values: Array
    turns: int
    divisor: float | None
    engine: Engine
    many: Engine | None
    many_from_rows: int

    @property
    def outputs(self) -> int:
        """How many columns the result has."""
        return self.turns if self.turns > 1 else self.values.shape[1]

    @override
    def check(self) -> None:
        self._check_arrays()
        self._check_nodes()
        # Now, and not in a request.
        _ = self._some_missing_right
        if "onnx" in (self.engine, self.many):
            _ = self._session
        if "masks" in (self.engine, self.many):
            _ = self._masks

    def _check_arrays(self) -> None:
        expect(1 <= self.width <= _HERE, "trees of no columns")
        expect(self.nodes.ndim == 1 and self.nodes.dtype == np.int64 and 1 <= len(self.nodes) <= _HERE, "no nodes")
        expect(self.thresholds.shape == self.nodes.shape, "other thresholds than nodes")
        expect(self.thresholds.dtype in (np.float32, np.float64), "thresholds that are not floats")
        expect(self.roots.ndim == 1 and self.roots.dtype == np.int64 and len(self.roots) >= 1, "no trees")
        expect(self.values.ndim == 2 and self.values.dtype == np.float64, "leaves without values")
        expect(self.values.shape[0] >= 1 and self.values.shape[1] >= 1, "leaves without values")
        expect(bool(np.isfinite(self.values).all()), "leaves whose values are not finite")
        expect(self.turns >= 1 and len(self.roots) % self.turns == 0, "trees that cannot take turns")
        expect(min(len(self.roots), _TREES) * self.values.shape[1] <= _MOST_TERMS, "too many columns for so many trees")
        expect(self.turns == 1 or self.values.shape[1] == 1, "trees that take turns and have several columns")
        expect(self.divisor is None or (math.isfinite(self.divisor) and self.divisor != 0), "a divisor that is none")
        expect(self.many_from_rows >= 1, "a batch of no rows")

    def _check_nodes(self) -> None:
        count, roots = len(self.nodes), self.roots
        expect(int(roots[0]) == 0 and bool((np.diff(roots) > 0).all()) and int(roots[-1]) < count, "roots out of order")
        expect(int(self.nodes.min()) >= 0, "a node before the first")
        ends = np.append(roots[1:], count)
        met = np.zeros(count, np.bool_)
        met[roots] = True
        inner_nodes = 0
        for start in range(0, count, _CHECKED):  # in parts: what is worked on here should not outweigh the trees
            nodes, thresholds = self.nodes[start : start + _CHECKED], self.thresholds[start : start + _CHECKED]
            places = np.arange(start, start + len(nodes))
            children, here = nodes >> 32, nodes & _HERE
            leaf = children == places
            expect(bool((here[leaf] < len(self.values)).all()), "a leaf without a value")
            expect(not (nodes[leaf] & _MISSING_RIGHT).any(), "a leaf with a direction")
            expect(bool((thresholds[leaf] == np.inf).all()), "a leaf with a threshold")
            inner = ~leaf
            children, places = children[inner], places[inner]
            expect(bool((children > places).all()), "a child before its node")
            expect(bool((here[inner] < self.width).all()), f"a column that is not among {self.width}")
            expect(not np.isnan(thresholds[inner]).any(), "a threshold that is no number")
            tree_ends = ends[np.searchsorted(roots, places, side="right") - 1]
            expect(bool((children + 1 < tree_ends).all()), "a child that is in another tree")
            met[children] = met[children + 1] = True
            inner_nodes += len(children)
        # A node has one parent, or is a root: so from a root every path ends, and meets no other.
        expect(bool(met.all()) and len(roots) + 2 * inner_nodes == count, "a node with no parent or with two")
        expect(self._levels <= MAX_LEVELS, f"a tree of more than {MAX_LEVELS} levels")

    @functools.cached_property
    def _levels(self) -> int:
        """How many steps the longest path has; `MAX_LEVELS` + 1 if more."""
        level, frontier = 0, self.roots
        while True:
            children = self.nodes[frontier] >> 32
            children = children[children != frontier]
            if not len(children) or level > MAX_LEVELS:
                return level
            frontier = np.concatenate((children, children + 1))
            level += 1

    @functools.cached_property
    def _some_missing_right(self) -> bool:
        return self.accepts != "finite" and bool((self.nodes & _MISSING_RIGHT).any())

    @functools.cached_property
    def _has_fixed_sums(self) -> bool:
        """Whether onnxruntime can be left to add: it does so in order, if there is but one number to a leaf."""
        return bool(self.values.shape[1] == 1)

    @functools.cached_property
    def _session(self) -> Callable[[Array], Array]:
        expect(self._levels <= onnx.MAX_DEPTH, f"a tree of more than {onnx.MAX_DEPTH} levels, which can only be walked")
        expect(len(self.values) < onnx.MAX_LEAVES, "too many leaves: their numbers are not exact in float32")
        nodes, places = self.nodes, np.arange(len(self.nodes))
        children, here = nodes >> 32, nodes & _HERE
        leaf = children == places
        # A tree that is but a leaf is written as a node that leads to it both ways.
        asks = ~leaf
        asks[self.roots] = True
        position = np.cumsum(asks) - 1
        left = np.where(leaf, places, children)[asks]
        right = np.where(leaf, places, children + 1)[asks]
        tree = np.repeat(np.arange(len(self.roots)), np.diff(self.roots, append=len(nodes)))
        leaves = np.flatnonzero(leaf)
        number = np.cumsum(leaf) - 1
        single = leaf[asks]
        dtype = np.dtype(np.float64) if self._has_fixed_sums else self.thresholds.dtype
        return onnx.session(
            onnx.ensemble(
                width=self.width,
                targets=self.turns if self._has_fixed_sums else len(self.roots),
                roots=position[self.roots],
                features=np.where(single, 0, here[asks]),
                thresholds=np.where(single, 0, self.thresholds[asks]).astype(dtype),
                left=np.where(leaf[left], number[left], position[left]),
                left_is_leaf=leaf[left],
                right=np.where(leaf[right], number[right], position[right]),
                right_is_leaf=leaf[right],
                missing_goes_left=(nodes[asks] & _MISSING_RIGHT) == 0 if self.accepts != "finite" else None,
                leaf_targets=tree[leaves] % self.turns if self._has_fixed_sums else tree[leaves],
                leaf_weights=self.values[here[leaves], 0] if self._has_fixed_sums else here[leaves].astype(dtype),
            )
        )

    @functools.cached_property
    def _masks(self) -> tuple[Masks, Array]:
        """Return the masks, and the values of the leaves in their order."""
        expect(self._suits("masks"), "too large a tree for masks")
        children, here = self.nodes >> 32, self.nodes & _HERE
        missing_right = (self.nodes & _MISSING_RIGHT) != 0
        made = Masks(children, here, self.thresholds, missing_right, self.roots)
        return made, self.values[here[made.order]]

    def _suits(self, engine: Engine) -> bool:
        if engine == "onnx":
            return self._levels <= onnx.MAX_DEPTH and len(self.values) < onnx.MAX_LEAVES
        leaf = self.nodes >> 32 == np.arange(len(self.nodes))
        columns = len(np.unique(self.nodes[~leaf] & _HERE))
        return engine == "walk" or fit(leaf, self.roots, columns)

    def with_engine(self, engine: Engine, many: Engine | None = None, many_from_rows: int = 1) -> Trees:
        """Return the same ensemble, computed another way. What there is already for an engine is shared."""
        changed = dataclasses.replace(self, engine=engine, many=many, many_from_rows=many_from_rows)
        for name, engines in (("_levels", {engine}), ("_session", {"onnx"}), ("_masks", {"masks"})):
            if name in self.__dict__ and engines & {engine, many}:
                changed.__dict__[name] = self.__dict__[name]
        return changed

    def variants(self) -> tuple[Trees, ...]:
        """Return the ways in which the ensemble can be computed, of which measuring must tell the best."""
        numpy: tuple[Engine, ...] = ("masks", "walk") if self._suits("masks") else ("walk",)
        found = [self.with_engine(engine) for engine in numpy]
        if self._suits("onnx"):
            both = [self.with_engine("onnx", numpy[0], rows) for rows in _MANY]
            return (*both, self.with_engine("onnx"), *found)
        return tuple(found)

    @override
    def run(self, value: Array) -> Array:
        rows = self._cast(value)
        count = len(rows)
        engine = self.engine if self.many is None or count < self.many_from_rows else self.many
        height, compute = self._computing(engine)
        if count <= height:
            sums = compute(rows)
        else:
            sums = np.empty((count, self.outputs))
            for start in range(0, count, height):
                sums[start : start + height] = compute(rows[start : start + height])
        if self.divisor is not None:
            sums /= self.divisor
        return sums

    def _computing(self, engine: Engine) -> tuple[int, Callable[[Array], Array]]:
        """Return how many rows to compute at once, and the function from them to sums."""
        if engine == "onnx":
            return self._height if not self._has_fixed_sums else _ROWS, self._by_session
        if engine == "masks":
            return min(self._height, self._masks[0].height), self._by_masks
        return max(1, min(self._height, _STEPS // min(len(self.roots), self._group))), self._by_walking

    def _by_session(self, rows: Array) -> Array:
        if self._has_fixed_sums:
            return self._session(rows.astype(np.float64, copy=False))
        return self._add(self.values, _transposed(self._session(rows)))

    def _by_masks(self, rows: Array) -> Array:
        masks, values = self._masks
        return self._add(values, _transposed(masks.leaves(rows)))

    def _by_walking(self, rows: Array) -> Array:
        total: Array | None = None
        for first in range(0, len(self.roots), self._group):
            total = self._add(self.values, self._leaves(rows, self.roots[first : first + self._group]), total)
        assert total is not None
        return total

    @functools.cached_property
    def _group(self) -> int:
        return max(1, _TREES // self.turns) * self.turns

    @functools.cached_property
    def _height(self) -> int:
        return int(min(_ROWS, max(1, _TERMS // (len(self.roots) * self.values.shape[1]))))

    def _cast(self, value: Array) -> Array:
        """Return the rows as the trees compare them. Raises `ValueError` as scikit-learn does, and in its words."""
        if value.shape[1:] != (self.width,):
            raise ValueError(_other_width(value, self.estimator, self.width))
        if not len(value):
            raise ValueError(
                f"Found array with 0 sample(s) (shape={value.shape}) while a minimum of 1 is required by {self.estimator}."
            )
        rows = value.astype(self.thresholds.dtype, order="C", copy=False)
        if self.accepts != "any" and not math.isfinite(np.add.reduce(rows, None)):
            if self.accepts == "finite" and np.isnan(rows).any():
                raise ValueError(f"Input X contains NaN.\n{self.estimator}{_IMPUTE}")
            if np.isinf(rows).any():
                raise ValueError(f"Input X contains infinity or a value too large for {rows.dtype!r}.")
        return rows

    def _add(self, values: Array, numbers: Array, before: Array | None = None) -> Array:
        """Return the sums, of shape (rows, outputs), for rows of `values` of shape (trees, rows), after the trees `before`."""
        trees, count = numbers.shape
        if values.shape[1] > 1:
            terms = values.take(numbers, axis=0, mode="clip")
            return _summed(terms if before is None else np.concatenate((before[None], terms)))
        terms = values.reshape(-1).take(numbers, mode="clip").reshape(trees // self.turns, self.turns, count)
        return _summed(terms if before is None else np.concatenate((before.T[None], terms))).T

    def _leaves(self, rows: Array, roots: Array) -> Array:
        """Return the row of `values` for each tree and row, of shape (trees, rows)."""
        count, size = len(rows), len(roots) * len(rows)
        buffers = _buffers(size, self.thresholds.dtype)
        node, word, column, value, threshold, greater, offset = buffers
        flat, nodes, thresholds = rows.reshape(-1), self.nodes, self.thresholds
        node.reshape(-1, count)[:] = roots[:, None]
        offset.reshape(-1, count)[:] = np.arange(0, flat.size, self.width)
        missing = self._some_missing_right and bool(np.isnan(flat).any())
        ended: Array | None = None  # the leaves of all, once some are no longer walked with
        places: Array | None = None  # of those that are
        for level in range(self._levels):
            nodes.take(node, out=word, mode="clip")
            np.bitwise_and(word, _HERE, out=column)
            np.add(column, offset, out=column)
            flat.take(column, out=value, mode="clip")  # of a leaf: any value, none is greater than infinity
            thresholds.take(node, out=threshold, mode="clip")
            np.greater(value, threshold, out=greater)
            if missing:
                greater |= np.isnan(value) & ((word & _MISSING_RIGHT) != 0)
            np.right_shift(word, 32, out=word)
            if level % 2 and level + 2 < self._levels:
                np.add(word, greater, out=word)
                np.not_equal(node, word, out=greater)
                if 2 * np.count_nonzero(greater) < len(node):
                    going = np.flatnonzero(greater)
                    if ended is None or places is None:
                        ended, places = word.copy(), going
                    else:
                        ended[places] = word
                        places = places.take(going)
                    node, offset = word.take(going), offset.take(going)
                    word, column, value, threshold, greater = (it[: len(going)] for it in buffers[1:6])
                    if not len(going):
                        break
                else:
                    np.copyto(node, word)
            else:
                np.add(word, greater, out=node)
        if ended is not None:
            ended[places] = node
            node = ended
        return (nodes.take(node, mode="clip") & _HERE).reshape(-1, count)


def _other_width(rows: Array, estimator: str, width: int) -> str:
    return f"X has {rows.shape[-1]} features, but {estimator} is expecting {width} features as input."


def _summed(terms: Array) -> Array:
    """Return the sums along the first axis, added one after the other, as scikit-learn adds.

    numpy's sum along an only axis is not: it adds in pairs. What is short beside that axis is quicker accumulated anyway.
    """
    if terms[0].size <= _SHORT:
        return np.add.accumulate(terms, axis=0)[-1]  # type: ignore[no-any-return]
    return np.add.reduce(terms, axis=0)  # type: ignore[no-any-return]


def _transposed(numbers: Array) -> Array:
    """Return numbers, which may be floats, of shape (rows, trees) as indices of shape (trees, rows)."""
    indices = np.empty(numbers.shape[::-1], np.intp)
    np.copyto(indices, numbers.T, casting="unsafe")
    return indices


def _buffers(size: int, dtype: np.dtype[Any]) -> tuple[Array, ...]:
    """Return arrays to work in, which are the thread's own until it asks again: node, word, column, value, threshold, greater, offset."""
    kept: dict[np.dtype[Any], tuple[Array, ...]] | None = getattr(_own, "kept", None)
    if kept is None:
        kept = _own.kept = {}
    found = kept.get(dtype)
    if found is None or len(found[0]) < size:
        kinds = (np.int64, np.int64, np.int64, dtype, dtype, np.bool_, np.int64)
        found = kept[dtype] = tuple(np.empty(max(size, _STEPS), kind) for kind in kinds)
    return tuple(buffer[:size] for buffer in found)


@dataclass(frozen=True, eq=False)
class Memberships(Op, kind="memberships"):
    """Columns that say whether a row's category is one of a set, put behind those that there are: (rows, width) to (rows, more).

    `categories`, float64, are those of one column after the other, each column's in ascending order, `counts` of them for each of
    `columns`. A set belongs to the column at its place `of` among `columns`; what it says is in `outcomes`, 0 or 1, from its place in
    `starts`: for each category, then for every other value, a missing one too. All but `categories` are int64, and of one axis.
    """

    estimator: str
    width: int
    columns: Array
    counts: Array
    categories: Array
    of: Array
    starts: Array
    outcomes: Array

    @override
    def check(self) -> None:
        for array in (self.columns, self.counts, self.of, self.starts, self.outcomes):
            expect(array.ndim == 1 and array.dtype == np.int64 and len(array) >= 1, "sets that are no integers")
            expect(int(array.min()) >= 0, "sets of negative numbers")
        expect(self.categories.ndim == 1 and self.categories.dtype == np.float64, "categories that are no floats")
        expect(int(self.columns.max()) < self.width <= _HERE, f"a column that is not among {self.width}")
        expect(len(self.counts) == len(self.columns), "other counts than columns")
        expect(int(self.counts.max()) <= len(self.categories), "categories that are not there")
        expect(int(self.counts.sum()) == len(self.categories), "categories that are not there")
        expect(not np.isnan(self.categories).any(), "a category that is no number")
        expect(len(self.of) == len(self.starts) and int(self.of.max()) < len(self.columns), "a set of no column")
        expect(int(self.starts.max()) < len(self.outcomes), "a set that is not there")
        expect(int((self.starts + self.counts[self.of]).max()) < len(self.outcomes), "a set that is not there")

    @functools.cached_property
    def _sorted(self) -> Array:
        # One search for all columns: complex numbers are ordered by their real parts, then by their imaginary ones.
        keys = np.empty(len(self.categories), np.complex128)
        keys.real = np.repeat(np.arange(len(self.counts)), self.counts)
        keys.imag = self.categories
        return keys

    @functools.cached_property
    def _bases(self) -> Array:
        return np.cumsum(self.counts) - self.counts

    @override
    def run(self, value: Array) -> Array:
        if value.shape[1:] != (self.width,):
            raise ValueError(_other_width(value, self.estimator, self.width))
        sought = np.empty((len(value), len(self.columns)), np.complex128)
        sought.real = np.arange(len(self.columns))
        sought.imag = value.take(self.columns, axis=1)
        keys = self._sorted
        found = keys.searchsorted(sought)
        known = keys.take(found, mode="clip") == sought if len(keys) else np.zeros(found.shape, np.bool_)
        codes = np.where(known, found - self._bases, self.counts)
        more = np.empty((len(value), self.width + len(self.of)))
        more[:, : self.width] = value
        more[:, self.width :] = self.outcomes.take(codes.take(self.of, axis=1) + self.starts)
        return more
