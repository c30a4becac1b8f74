"""Small trees by the leaves that a row cannot reach: the idea of QuickScorer (Lucchese et al., SIGIR 2015), in numpy.

A tree has a bit for each leaf, from left to right. A node that sends a row right rules out the leaves to its left. Where the
row ends is the first leaf that no node rules out. What the nodes of one column rule out, in all trees at once, depends only on
which of their thresholds lie below the row's value: it is looked up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from app.signature import Array

MAX_LEAVES = 64
MAX_BYTES = 64 << 20
_FEW_ROWS = 8
_STEPS = 50_000
_KINDS = ((8, np.uint8), (16, np.uint16), (32, np.uint32), (64, np.uint64))


def fit(leaf: Array, roots: Array, columns: int) -> bool:
    """Return whether trees are small enough, by which of their nodes are leaves, and how many columns they compare."""
    inner = len(leaf) - int(leaf.sum())
    largest = int(np.add.reduceat(leaf, roots, dtype=np.int64).max())
    return (
        inner > 0
        and largest <= MAX_LEAVES
        and (inner + 2 * columns) * len(roots) * _kind(largest).itemsize <= MAX_BYTES
    )


def _kind(leaves: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype(next(kind for most, kind in _KINDS if leaves <= most))


class Masks:
    """The tables of an ensemble: what every interval of every column rules out.

    Takes, for each node: its left child (a leaf: itself), the column, the threshold, whether a missing value goes right; and
    the first node of each tree. The children of a node are side by side and after it.
    """

    def __init__(self, children: Array, columns: Array, thresholds: Array, missing_right: Array, roots: Array) -> None:
        count, trees = len(children), len(roots)
        inner = np.flatnonzero(children != np.arange(count))
        below, first = _spans(children, roots)
        kind = _kind(int(below[roots].max()))
        ones = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
        left = below[children[inner]].astype(np.uint64)
        ruled_out = ((np.uint64(1) << left) - np.uint64(1)) << first[inner].astype(np.uint64)
        kept = (ones ^ ruled_out).astype(kind)
        tree = np.repeat(np.arange(trees), np.diff(roots, append=count))
        column, threshold, missing = columns[inner], thresholds[inner], missing_right[inner]

        blocks, self._limits, starts = [], [], []
        self._columns = np.unique(column)
        start = 0
        for asked in self._columns:
            of = np.flatnonzero(column == asked)
            finite = of[threshold[of] < np.inf]  # no number is above infinity, only what is missing
            limits = np.unique(threshold[finite])
            block = np.full((len(limits) + 2, trees), ones.astype(kind))
            places = (np.searchsorted(limits, threshold[finite]) + 1, tree[inner[finite]])
            np.bitwise_and.at(block, places, kept[finite])
            np.bitwise_and.accumulate(block[:-1], axis=0, out=block[:-1])
            gone = of[missing[of]]
            np.bitwise_and.at(block[-1], tree[inner[gone]], kept[gone])
            blocks.append(block)
            self._limits.append(np.append(limits, np.inf).astype(thresholds.dtype))  # what is missing is above that
            starts.append(start)
            start += len(block)
        self._table = np.concatenate(blocks)
        self._starts = np.array(starts, np.intp)[:, None]

        # All columns in one search, for few rows: complex numbers are ordered by their real parts, then by their imaginary ones.
        sizes = np.array([len(limits) - 1 for limits in self._limits])
        self._all_limits = np.empty(int(sizes.sum()), np.complex128)
        self._all_limits.real = np.repeat(np.arange(len(sizes)), sizes)
        self._all_limits.imag = np.concatenate([limits[:-1] for limits in self._limits])
        self._shift = self._starts - (np.cumsum(sizes) - sizes)[:, None]
        self._missing = self._starts + sizes[:, None] + 1

        self.order = np.empty(int(below[roots].sum()), np.intp)
        """The leaves' nodes: tree by tree, from left to right. `leaves` gives places in it."""
        bases = np.cumsum(below[roots]) - below[roots]
        leaf = np.flatnonzero(children == np.arange(count))
        self.order[bases[tree[leaf]] + first[leaf]] = leaf
        # The place of the only bit of a number is the exponent of that number as a float.
        wide = kind.itemsize == 8
        self._float: np.dtype[Any] = np.dtype(np.float64 if wide else np.float32)
        self._bits: np.dtype[Any] = np.dtype(np.int64 if wide else np.int32)
        self._exponent = 52 if wide else 23
        self._bases = bases - (1023 if wide else 127)

    @property
    def height(self) -> int:
        """How many rows are best given at once."""
        return max(1, _STEPS // len(self._bases))

    def leaves(self, rows: Array) -> Array:
        """Return the place in `order` of the leaf of each row in each tree, of shape (rows, trees). Rows are of the dtype of the thresholds."""
        ranks = self._ranks(rows)
        if len(rows) == 1:
            left = np.bitwise_and.reduce(self._table.take(ranks[:, 0], axis=0, mode="clip"), axis=0)[None]
        else:
            left = self._table.take(ranks[0], axis=0, mode="clip")
            others = np.empty_like(left)
            for rank in ranks[1:]:
                self._table.take(rank, axis=0, out=others, mode="clip")
                np.bitwise_and(left, others, out=left)
        left &= -left
        bits = left.astype(self._float).view(self._bits)
        bits >>= self._exponent
        return np.add(bits, self._bases)  # type: ignore[no-any-return]

    def _ranks(self, rows: Array) -> Array:
        """Return the row of the table for each column and row, of shape (columns, rows)."""
        if len(rows) <= _FEW_ROWS:
            values = rows.T.take(self._columns, axis=0)
            sought = np.empty(values.shape, np.complex128)
            sought.real = np.arange(len(values))[:, None]
            sought.imag = values
            found = self._all_limits.searchsorted(sought)
            found += self._shift
            missing = np.isnan(values)
            return np.where(missing, self._missing, found) if missing.any() else found
        ranks = np.empty((len(self._columns), len(rows)), np.intp)
        for rank, column, limits in zip(ranks, self._columns, self._limits, strict=True):
            rank[:] = limits.searchsorted(rows[:, column])
        ranks += self._starts
        return ranks


def _spans(children: Array, roots: Array) -> tuple[Array, Array]:
    """Return for each node how many leaves are below it, and how many of its tree are to the left of those."""
    levels, frontier = [], roots
    while len(frontier):
        frontier = frontier[children[frontier] != frontier]
        levels.append(frontier)
        frontier = np.concatenate((children[frontier], children[frontier] + 1))
    below = np.ones(len(children), np.int64)
    for nodes in reversed(levels):
        below[nodes] = below[children[nodes]] + below[children[nodes] + 1]
    first = np.zeros(len(children), np.int64)
    for nodes in levels:
        first[children[nodes]] = first[nodes]
        first[children[nodes] + 1] = first[nodes] + below[children[nodes]]
    return below, first
