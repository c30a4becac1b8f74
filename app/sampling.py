"""Rows that nobody sent: taken from known ones, or invented from a signature where there are none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.signature import Rows, Signature, TensorSpec

Words = Mapping[str, Sequence[str]]
"""Strings that a column is known to have had in training, by its name; those under `""` are of any column."""


def instances(signature: Signature, count: int, *, seed: int = 0, words: Words | None = None) -> list[Any]:
    """Invent instances as a request would bring them; none where nothing tells even how many columns there are."""
    random = np.random.default_rng(seed)
    known = words or {}
    if signature.layout == "text":
        pool = [*known.get("", ()), "a", "few", "words"]
        return [" ".join(random.choice(pool, 5).tolist()) for _ in range(count)]
    if signature.layout == "records":
        names = [word for word in known.get("", ()) if "=" not in word] or ["value"]
        pairs = [word.split("=", 1) for word in known.get("", ()) if "=" in word]
        return [_record(names, pairs, random) for _ in range(count)]
    if not signature.inputs:
        return []
    columns = [column(spec, count, random, known.get(spec.name, ())) for spec in signature.inputs]
    return [list(row) for row in zip(*columns, strict=True)]


def _record(names: Sequence[str], pairs: Sequence[Sequence[str]], random: np.random.Generator) -> dict[str, Any]:
    record: dict[str, Any] = {str(random.choice(names)): float(random.normal()) for _ in range(3)}
    if pairs:
        name, value = pairs[int(random.integers(len(pairs)))]
        record[name] = value
    return record


def column(spec: TensorSpec, count: int, random: np.random.Generator, words: Sequence[str] = ()) -> list[Any]:
    """Invent values of one column, as JSON has them."""
    if spec.categories:
        return [spec.categories[index] for index in random.integers(len(spec.categories), size=count)]
    if spec.datatype == "BOOL":
        return (random.random(count) < 0.5).tolist()  # type: ignore[no-any-return]
    if spec.datatype == "INT64":
        return random.integers(0, 10, count).tolist()  # type: ignore[no-any-return]
    if spec.is_datetime:
        days = np.datetime64("2020-01-01T00:00:00") + random.integers(0, 10**8, count).astype("timedelta64[s]")
        return np.datetime_as_string(days).tolist()  # type: ignore[no-any-return]
    if spec.datatype == "BYTES":
        return random.choice([*words] or ["a", "b"], count).tolist()  # type: ignore[no-any-return]
    scale = 10.0 ** random.integers(-1, 3)
    return (random.normal(size=count) * scale).tolist()  # type: ignore[no-any-return]


def batches(signature: Signature, known: Sequence[Any], sizes: Sequence[int]) -> dict[int, Rows]:
    """Return validated rows of each size, made of known instances over and over.

    Raises `RequestError` where the signature does not take them.
    """
    if not known:
        return {}
    repeated = [*known] * math.ceil(max(sizes) / len(known))
    return {size: signature.validate(repeated[:size]) for size in sizes}
