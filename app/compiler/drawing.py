"""The rows on which a program is compared to scikit-learn: drawn around known ones, and to where the two are most likely to differ.

What is drawn are instances, as a request would bring them. The same arguments give the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app import inspection, sampling
from app.reference import Reference, parts_of
from app.signature import Array, Signature, TensorSpec

MAX_VALUES = 600_000  # in all rows together: tables of many columns get fewer rows
MAX_WORDS = 500  # of a vocabulary
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_PLAIN_EDGES = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-3,
    1e-30,
    -1e-30,
    5e-324,
    2.3e-308,
    1e-45,
    1.2e-38,
    16777217.0,
    123456.789,
)
_HUGE = {
    "very large": (1e20, -1e30, 1e36),
    "at the end of float32": (_LARGEST_FLOAT32, -_LARGEST_FLOAT32, _LARGEST_FLOAT32 * (1 + 1e-7), -3.5e38),
    # Not up to the largest float64: sums beyond that are infinite or not a number depending on their order, in
    # scikit-learn itself too.
    "beyond float32": (1e39, -1e100, 1e300),
}
_STRANGE_WORDS = ("", " ", "?", "Ω", "unknown", "nan", "None", "x" * 10_000, "\u0000", "0", "1.0", "😀", "e\u0301")
_TIMES = (
    "1970-01-01T00:00:00",
    "1999-12-31T23:59:59.999999",
    "2024-02-29T12:00:00",
    "2100-03-01",
    "1900-01-01T00:00:00",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """Instances of one kind, which are compared together: how large their answers are tells what a difference means."""

    name: str
    instances: list[Any]


def samples(
    signature: Signature, reference: Reference, known: Sequence[Any], *, rows: int, seed: int = 0
) -> list[Sample]:
    """Draw about `rows` rows around `known` instances (golden rows, examples), of all kinds. Without any, some are invented."""
    random = np.random.default_rng(seed)
    parts = list(parts_of([*reference.companions, reference.estimator]))
    words = _words(signature, parts)
    base = [*known] or sampling.instances(signature, 60, seed=seed, words=words)
    if not base:
        return []
    if signature.layout == "text":
        return _texts(base, [*words.get("", ())], rows, random)
    if signature.layout == "records":
        return _records(base, rows, random)
    base = [_ordered(row, signature) for row in base]
    specs = signature.inputs or tuple(
        TensorSpec(name=f"x{position}", datatype="FP64", assumed=True) for position in range(len(base[0]))
    )
    rows = max(20, min(rows, MAX_VALUES // max(1, len(specs))))
    return _Table(specs, base, words, random).samples(rows, _direct_trees(signature, reference))


class _Table:
    """Draws rows of columns."""

    def __init__(
        self, specs: Sequence[TensorSpec], base: list[list[Any]], words: sampling.Words, random: np.random.Generator
    ) -> None:
        self._specs = specs
        self._base = base
        self._random = random
        self._columns = [[row[position] for row in base] for position in range(len(specs))]
        self._words = [[*words.get(spec.name, ())] for spec in specs]
        self._floats = [position for position, spec in enumerate(specs) if spec.datatype == "FP64"]

    def samples(self, rows: int, trees: Sequence[_Tree]) -> list[Sample]:
        found = [
            Sample("as recorded", self._base[:1000]),
            Sample("mixed of recorded values", self._mixtures(rows // 3)),
            Sample("beside recorded values", self._changed(rows // 8, self._floats, self._beside)),
        ]
        if trees:
            found.append(Sample("at thresholds", self._at_thresholds(rows // 3, trees)))
        everywhere = [*range(len(self._specs))]
        found.append(Sample("with edges", self._changed(rows // 8, everywhere, self._edge)))
        found.append(Sample("with unknown values", self._changed(rows // 12, everywhere, self._strange)))
        if any(spec.nullable for spec in self._specs):
            found.append(Sample("with missing values", self._missing(rows // 12)))
        if self._floats:
            found.append(Sample("with large values", self._changed(max(4, rows // 40), self._floats, self._large)))
            for name, values in _HUGE.items():

                def huge(position: int, value: Any, values: Sequence[float] = values) -> Any:
                    drawn = values[int(self._random.integers(len(values)))]
                    largest = float(np.finfo(np.float32 if "32" in self._specs[position].dtype else np.float64).max)
                    return max(-largest, min(largest, drawn))

                found.append(Sample(f"with {name} values", self._changed(max(4, rows // 80), self._floats, huge)))
        return [sample for sample in found if sample.instances]

    def _one(self) -> list[Any]:
        return list(self._base[int(self._random.integers(len(self._base)))])

    def _mixtures(self, count: int) -> list[list[Any]]:
        """Rows of values that are each known in their column, or lie between two known ones."""
        return [
            list(row)
            for row in zip(*(self._mixed(position, count) for position in range(len(self._specs))), strict=True)
        ]

    def _mixed(self, position: int, count: int) -> list[Any]:
        column = self._columns[position]
        drawn = [column[index] for index in self._random.integers(len(column), size=count)]
        if position in self._floats:
            numbers = np.array([value for value in column if type(value) in (int, float)], dtype=float)
            if len(numbers):
                between = np.quantile(numbers, self._random.random(count))
                drawn = [
                    float(number) if draw < 0.5 else value
                    for draw, number, value in zip(self._random.random(count), between, drawn, strict=True)
                ]
        elif self._words[position]:
            words = self._words[position]
            for index in self._random.integers(count, size=count // 2):
                drawn[index] = words[int(self._random.integers(len(words)))]
        return drawn

    def _changed(self, count: int, positions: Sequence[int], change: Callable[[int, Any], Any]) -> list[list[Any]]:
        """Known rows in which one to three of the columns at `positions` are changed."""
        found = []
        for _ in range(count if positions else 0):
            row = self._one()
            for _ in range(int(self._random.integers(1, 4))):
                position = int(self._random.choice(positions))
                row[position] = change(position, row[position])
            found.append(row)
        return found

    def _beside(self, position: int, value: Any) -> Any:
        return self._near(float(value)) if type(value) in (int, float) and abs(value) < _LARGEST_FLOAT32 else value

    def _near(self, value: float) -> float:
        """Return a number, or what lies next to it in float64 or float32."""
        way, towards = int(self._random.integers(5)), float(self._random.choice([-np.inf, np.inf]))
        if way == 0:
            return value
        if way <= 2:
            return float(np.nextafter(value, towards))
        single = np.float32(value)
        return float(single if way == 3 else np.nextafter(single, np.float32(towards)))

    def _edge(self, position: int, value: Any) -> Any:
        spec = self._specs[position]
        if spec.datatype == "FP64":
            return float(self._random.choice(_PLAIN_EDGES))
        if spec.datatype == "INT64":
            return int(self._random.choice([0, 1, -1, 2, 127, -128]))
        if spec.datatype == "BOOL":
            return bool(self._random.random() < 0.5)
        if spec.is_datetime:
            return str(self._random.choice(_TIMES))
        known = self._words[position] or [value]
        return known[int(self._random.integers(len(known)))]

    def _large(self, position: int, value: Any) -> Any:
        """Return a number that is up to a million times what is recorded in its column."""
        known = [abs(item) for item in self._columns[position] if type(item) in (int, float)]
        factor = float(self._random.choice([10.0, -10.0, 1e3, -1e3, 1e6, -1e6]))
        return factor * min(max(known, default=1.0) or 1.0, 1e30)

    def _strange(self, position: int, value: Any) -> Any:
        spec = self._specs[position]
        if spec.is_anything and self._random.random() < 0.5:
            return _STRANGE_WORDS[int(self._random.integers(len(_STRANGE_WORDS)))]
        if spec.datatype == "FP64":
            return bool(self._random.random() < 0.5) if spec.assumed else float(round(self._random.normal() * 100))
        if spec.datatype == "INT64":
            return int(self._random.choice([3, 99, 1000, -7, 32767, 2**31 - 1, 2**53 + 1]))
        if spec.datatype == "BYTES" and not spec.is_datetime:
            changed = [value.upper(), f"{value} ", value[:1]] if type(value) is str else []
            words = [*_STRANGE_WORDS, *changed]
            return words[int(self._random.integers(len(words)))]
        return self._edge(position, value)

    def _missing(self, count: int) -> list[list[Any]]:
        positions = [position for position, spec in enumerate(self._specs) if spec.nullable]
        rows = self._changed(count, positions, lambda position, value: None)
        for position in positions[:50]:  # one at a time, so that each is met
            row = self._one()
            row[position] = None
            rows.append(row)
        rows.append([None if spec.nullable else value for spec, value in zip(self._specs, self._one(), strict=True)])
        return rows

    def _at_thresholds(self, count: int, trees: Sequence[_Tree]) -> list[list[Any]]:
        """Rows with values at, or next to, thresholds that a tree compares them with on their way to its leaf."""
        found = []
        for _ in range(count):
            row = self._one()
            for _ in range(int(self._random.integers(1, 4))):
                way = trees[int(self._random.integers(len(trees)))].way(row)
                if way:
                    position, threshold = way[int(self._random.integers(len(way)))]
                    row[position] = self._near(threshold)
            found.append(row)
        return found


@dataclass(frozen=True, slots=True)
class _Tree:
    """A tree that reads the input's columns themselves; leaves have a negative `feature`."""

    feature: Array
    threshold: Array
    left: Array
    right: Array

    def way(self, row: Sequence[Any]) -> list[tuple[int, float]]:
        """Return the columns and the thresholds that a row meets. A missing value goes left, which may not be its way."""
        found: list[tuple[int, float]] = []
        node = 0
        while (position := int(self.feature[node])) >= 0:
            threshold, value = float(self.threshold[node]), row[position]
            if type(value) in (int, float, bool) and np.isfinite(threshold):
                found.append((position, threshold))
                node = int(self.left[node] if value <= threshold else self.right[node])
            else:
                node = int(self.left[node])
        return found


def _direct_trees(signature: Signature, reference: Reference) -> list[_Tree]:
    """Return trees that are handed the input as it comes, up to a thousand of them."""
    if any(not inspection.is_target_encoder(stage) for stage in reference.companions):
        return []
    width = len(signature.inputs)
    return [tree for tree in _trees_of(reference.estimator) if tree.feature.max(initial=-1) < width][:1000]


def _trees_of(estimator: Any) -> Iterator[_Tree]:
    for entry in inspection.entries(estimator):
        if hasattr(entry, "transform") and not hasattr(entry, "predict"):
            continue
        for part in parts_of(entry):
            tree: Any = getattr(part, "tree_", None)
            if hasattr(tree, "children_left"):  # not one of those that find neighbours
                yield _Tree(tree.feature, tree.threshold, tree.children_left, tree.children_right)
            if getattr(part, "_preprocessor", None) is not None:
                continue  # it has moved its columns
            for stage in getattr(part, "_predictors", ()) or ():
                for predictor in stage:
                    nodes = predictor.nodes
                    yield _Tree(
                        np.where(nodes["is_leaf"], -1, nodes["feature_idx"].astype(np.int64)),
                        nodes["num_threshold"],
                        nodes["left"],
                        nodes["right"],
                    )


def _ordered(row: Any, signature: Signature) -> list[Any]:
    return [row[spec.name] for spec in signature.inputs] if isinstance(row, dict) else list(row)


def _words(signature: Signature, parts: Sequence[Any]) -> dict[str, list[str]]:
    """Return the strings that columns are known to have had, and under `""` the vocabulary of what takes texts or records."""
    found: dict[str, list[str]] = {}
    for part in parts:
        names = getattr(part, "feature_names_in_", None)
        categories = getattr(part, "categories_", None)
        if isinstance(categories, list):
            columns = [str(name) for name in names] if names is not None else [spec.name for spec in signature.inputs]
            if len(columns) == len(categories):
                for name, values in zip(columns, categories, strict=True):
                    known = [value for value in np.asarray(values).tolist()[:MAX_WORDS] if type(value) is str]
                    found.setdefault(name, []).extend(known)
        vocabulary = getattr(part, "vocabulary_", None)
        if isinstance(vocabulary, dict):
            found.setdefault("", []).extend(str(word) for word in [*vocabulary][:MAX_WORDS])
    return found


def _texts(base: list[Any], vocabulary: list[str], rows: int, random: np.random.Generator) -> list[Sample]:
    base = [
        row[0] if isinstance(row, list) else next(iter(row.values())) if isinstance(row, dict) else row for row in base
    ]
    words = [*dict.fromkeys([*vocabulary, *(word for text in base[:200] for word in text.split())])] or ["a"]
    strange = [*_STRANGE_WORDS, "don't", "e-mail@example.org", "2024-02-29", "ﬁne", "ß", "İ", "\r\n\t", "a", "_", "ab"]

    def drawn(count: int, pool: Sequence[str], most: int) -> list[str]:
        return [
            " ".join(str(pool[index]) for index in random.integers(len(pool), size=int(random.integers(0, most))))
            for _ in range(count)
        ]

    changed: list[Callable[[str], str]] = [
        lambda text: text.upper(),
        lambda text: text.title(),
        lambda text: text[::-1],
        lambda text: text.replace(" ", ", "),
        lambda text: f"{text}!",
    ]
    return [
        Sample("as recorded", base[:1000]),
        Sample("mixed of known words", drawn(rows // 3, words, 20)),
        Sample(
            "changed texts",
            [
                changed[int(random.integers(len(changed)))](base[int(random.integers(len(base)))])
                for _ in range(rows // 8)
            ],
        ),
        Sample("with unknown words", drawn(rows // 8, [*words[: len(strange)], *strange], 12)),
        Sample("empty and very long texts", ["", " ", "\n", "x" * 50_000, " ".join([words[0]] * 5_000), *strange]),
    ]


def _records(base: list[Any], rows: int, random: np.random.Generator) -> list[Sample]:
    items = [item for record in base for item in record.items()]
    names = [*dict.fromkeys(name for name, _ in items)] or ["value"]
    edges: list[Any] = [
        0,
        0.0,
        -1.5,
        1e12,
        "",
        "unknown",
        "x" * 1000,
        None,
        True,
        False,
        [],
        ["a"],
        ["a", "a", "b"],
        5e-324,
    ]

    def drawn(values: Callable[[], Any], most: int) -> dict[str, Any]:
        return {str(random.choice(names)): values() for _ in range(int(random.integers(0, most)))}

    def known() -> Any:
        return items[int(random.integers(len(items)))][1] if items else 1.0

    def edge() -> Any:
        return edges[int(random.integers(len(edges)))]

    mixed = []
    for _ in range(rows // 3):
        record = dict(base[int(random.integers(len(base)))])
        for name, value in (items[int(random.integers(len(items)))] for _ in range(2)) if items else ():
            record[name] = value
        mixed.append(record)
    return [
        Sample("as recorded", base[:1000]),
        Sample("mixed of known values", mixed),
        Sample("with values in other places", [drawn(known, 5) for _ in range(rows // 6)]),
        Sample("with edges", [drawn(edge, 4) | {"never seen": 1.0} for _ in range(rows // 12)]),
    ]


def is_writable(instance: Any) -> bool:
    """Whether an instance can be JSON at all, as every one of a request is."""
    try:
        json.dumps(instance, allow_nan=False)
    except (ValueError, TypeError):
        return False
    return True
