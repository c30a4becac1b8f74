"""Ensembles of decision trees, which give scikit-learn's own sums to the last bit.

There are two ways through the trees. onnxruntime follows a row through a tree at a time: the fastest for few rows. `_walk`
takes all rows through all trees a level at a time in numpy: the fastest for many rows, because no branch is there to be
mispredicted, and the smallest, because it needs nothing but the arrays. Neither decides what is summed and in which order:
leaves are named by the rows of a table of float64, and the table's rows are added up as scikit-learn adds them.
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
from app.compiled.op import Op, expect
from app.signature import Array

MAX_LEVELS = 4096
_STEPS = 25_000  # tree and row pairs that are walked at once: what is being worked on stays in the cache of a core
_TREES = 5_000  # of which trees
_SESSION_ROWS = 1024
_WALK_FROM_ROWS = (32, 200)
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

    `engine` is `onnx` or `walk`, `walk_from_rows` the size of a batch from which an `onnx` walks nevertheless.
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
    engine: Literal["onnx", "walk"]
    walk_from_rows: int | None

    @property
    def outputs(self) -> int:
        """How many columns the result has."""
        return self.turns if self.turns > 1 else self.values.shape[1]

    @override
    def check(self) -> None:
        self._check_arrays()
        self._check_nodes()
        if self.engine == "onnx":
            _ = self._session  # now, and not in a request

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
        expect(self.turns == 1 or self.values.shape[1] == 1, "trees that take turns and have several columns")
        expect(self.divisor is None or (math.isfinite(self.divisor) and self.divisor != 0), "a divisor that is none")
        expect(self.walk_from_rows is None or self.walk_from_rows >= 1, "a batch of no rows")

    def _check_nodes(self) -> None:
        count = len(self.nodes)
        expect(int(self.nodes.min()) >= 0, "a node before the first")
        places = np.arange(count)
        children = self.nodes >> 32
        here = self.nodes & _HERE
        leaf = children == places
        inner = ~leaf
        expect(bool((children[inner] > places[inner]).all()), "a child before its node")
        expect(bool((here[inner] < self.width).all()), f"a column that is not among {self.width}")
        expect(not np.isnan(self.thresholds[inner]).any(), "a threshold that is no number")
        expect(bool((here[leaf] < len(self.values)).all()), "a leaf without a value")
        expect(not (self.nodes[leaf] & _MISSING_RIGHT).any(), "a leaf with a direction")
        expect(bool((self.thresholds[leaf] == np.inf).all()), "a leaf with a threshold")
        roots = self.roots
        expect(int(roots[0]) == 0 and bool((np.diff(roots) > 0).all()) and int(roots[-1]) < count, "roots out of order")
        # A node has one parent, in its own tree, or is the root: so from a root every path ends, and meets no other.
        ends = np.append(roots[1:], count)
        expect(
            bool((children[inner] + 1 < np.repeat(ends, ends - roots)[inner]).all()), "a child that is in another tree"
        )
        met = np.zeros(count, np.bool_)
        met[roots] = met[children[inner]] = met[children[inner] + 1] = True
        expect(bool(met.all()) and len(roots) + 2 * int(inner.sum()) == count, "a node with no parent or with two")
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

    def with_engine(self, engine: Literal["onnx", "walk"], walk_from_rows: int | None = None) -> Trees:
        """Return the same ensemble, computed another way. A session that there is already is shared."""
        changed = dataclasses.replace(self, engine=engine, walk_from_rows=walk_from_rows)
        for name in ("_levels", "_session") if engine == "onnx" else ("_levels",):
            if name in self.__dict__:
                changed.__dict__[name] = self.__dict__[name]
        return changed

    def variants(self) -> tuple[Trees, ...]:
        """Return the ways in which the ensemble can be computed, of which measuring must tell the best."""
        walking = self.with_engine("walk")
        if self._levels > onnx.MAX_DEPTH or len(self.values) >= onnx.MAX_LEAVES:
            return (walking,)
        return (self.with_engine("onnx"), *(self.with_engine("onnx", rows) for rows in _WALK_FROM_ROWS), walking)

    @override
    def run(self, value: Array) -> Array:
        rows = self._cast(value)
        if self.engine == "walk" or (self.walk_from_rows is not None and len(rows) >= self.walk_from_rows):
            sums = self._walk(rows)
        elif self._has_fixed_sums:
            sums = self._session(rows.astype(np.float64, copy=False))
        elif len(rows) <= _SESSION_ROWS:
            sums = self._gather(self._session(rows))
        else:
            parts = (rows[start : start + _SESSION_ROWS] for start in range(0, len(rows), _SESSION_ROWS))
            sums = np.concatenate([self._gather(self._session(part)) for part in parts])
        if self.divisor is not None:
            sums /= self.divisor
        return sums

    def _cast(self, value: Array) -> Array:
        """Return the rows as the trees compare them. Raises `ValueError` as scikit-learn does, and in its words."""
        if value.ndim != 2 or value.shape[1] != self.width:
            raise ValueError(
                f"X has {value.shape[-1]} features, but {self.estimator} is expecting {self.width} features as input."
            )
        rows = value.astype(self.thresholds.dtype, order="C", copy=False)
        if self.accepts != "any" and not math.isfinite(np.add.reduce(rows, None)):
            if self.accepts == "finite" and np.isnan(rows).any():
                raise ValueError(f"Input X contains NaN.\n{self.estimator}{_IMPUTE}")
            if np.isinf(rows).any():
                raise ValueError(f"Input X contains infinity or a value too large for {rows.dtype!r}.")
        return rows

    def _gather(self, found: Array) -> Array:
        """Return the sums for rows of `values`, given as floats of shape (rows, trees)."""
        numbers = np.empty(found.shape[::-1], np.intp)
        np.copyto(numbers, found.T, casting="unsafe")
        return np.add.reduce(self.values.take(numbers, axis=0, mode="clip"), axis=0)  # type: ignore[no-any-return]

    def _walk(self, rows: Array) -> Array:
        count, trees = len(rows), len(self.roots)
        group = trees if trees <= _TREES else max(1, _TREES // self.turns) * self.turns
        height = min(count, max(1, _STEPS // group))
        sums = np.empty((count, self.outputs))
        for start in range(0, count, height):
            part = rows[start : start + height]
            total: Array | None = None
            for first in range(0, trees, group):
                total = self._add(self._leaves(part, self.roots[first : first + group]), total)
            sums[start : start + height] = total
        return sums

    def _add(self, numbers: Array, before: Array | None) -> Array:
        """Return the sums, of shape (rows, outputs), for rows of `values` of shape (trees, rows), after those of the trees `before`."""
        trees, count = numbers.shape
        if self.turns > 1:
            shape: tuple[int, ...] = (trees // self.turns, self.turns, count)
            terms = self.values[:, 0].take(numbers, mode="clip").reshape(shape)
        else:
            terms = self.values.take(numbers, axis=0, mode="clip")
        if before is not None:
            terms = np.concatenate(((before.T if self.turns > 1 else before)[None], terms))
        # Along the first axis numpy adds one after the other, as scikit-learn does; along an axis that is the only one, in pairs.
        if terms[0].size == 1:
            added = np.add.accumulate(terms.reshape(-1))[-1:].reshape(terms.shape[1:])
        else:
            added = np.add.reduce(terms, axis=0)
        return added.T if self.turns > 1 else added

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
            np.add(word, greater, out=word)
            if level % 2 and level + 2 < self._levels:
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
                    continue
            np.copyto(node, word)
        if ended is not None:
            ended[places] = node
            node = ended
        return (nodes.take(node, mode="clip") & _HERE).reshape(-1, count)


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
