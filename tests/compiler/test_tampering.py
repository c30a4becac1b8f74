"""A program whose file was altered is refused, or it fails like any prediction: nothing follows an index out of an array."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from app import inspection
from app.compiled import container
from app.compiled.op import _OPS
from app.compiled.program import Program
from app.errors import LoadFailed
from app.signature import Array, Rows
from tests.compiler.test_programs import CASES, compiled

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = sorted(
    kind
    for kind, operation in _OPS.items()
    if operation.__module__.rpartition(".")[2]
    in ("steps", "numeric", "categories", "text", "linear", "bayes", "network", "neighbours", "combined")
)


def nodes(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if isinstance(document, dict):
        if "op" in document:
            yield path, document
        for key, value in document.items():
            yield from nodes(value, (*path, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from nodes(value, (*path, index))


@functools.cache
def examples() -> dict[str, tuple[tuple[Any, ...], Any, dict[str, Array], Rows]]:
    """For each kind of operation a place where it stands, the document and the arrays, and rows to run it on."""
    found: dict[str, tuple[tuple[Any, ...], Any, dict[str, Array], Rows]] = {}
    for case in CASES:
        find, name = case.values
        _, model, program = compiled(find, name)
        body = program.write()
        document, arrays = container.read(io.BytesIO(body), len(body))
        for path, node in nodes(document):
            if node["op"] not in found:
                prepared = inspection.prepare([], model.estimator, find(name).data[:3])
                rows = model.signature.validate(inspection.instances_of(prepared, model.signature))
                found[node["op"]] = path, document, arrays, rows
    return found


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        document = document[step]
    return document


def read(document: Any, arrays: dict[str, Array]) -> Program:
    body = container.write(document, arrays)
    return Program.read(io.BytesIO(body), len(body))


def altered(value: Any) -> Iterator[Any]:
    yield from (
        None,
        -1,
        1 << 62,
        0.5,
        "x",
        [],
        {},
        {"array": "none"},
        {"map": {"a": -1}},
        {"op": "chain", "steps": []},
    )
    if isinstance(value, list) and value:
        yield from (value[:-1], [*value, value[-1]], [-1, *value[1:]], [1 << 50, *value[1:]], [value])
    if isinstance(value, dict) and "map" in value and value["map"]:
        yield {"map": dict.fromkeys(value["map"], 1 << 40)}


def altered_arrays(array: Array) -> Iterator[Array]:
    yield array.reshape(-1)[:0]
    yield array[None]
    yield array.reshape(-1).astype(bool)
    yield np.full(array.shape, -2, dtype=np.int64)
    yield np.full(array.shape, np.nan)
    if array.ndim and len(array):
        yield array[:-1]
        yield np.concatenate([array, array])
        yield np.full(array.shape, 1 << 40, dtype=np.int64)


def test_there_is_an_example_of_every_operation():
    assert set(KINDS) <= examples().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_an_altered_operation_is_refused_or_fails(kind):
    path, document, arrays, rows = examples()[kind]
    for field, value in at(document, path).items():
        for other in altered(value):
            changed = copy.deepcopy(document)
            at(changed, path)[field] = other
            try_to_run(changed, arrays, rows)
        if isinstance(value, dict) and "array" in value:
            for array in altered_arrays(arrays[value["array"]]):
                try_to_run(document, {**arrays, value["array"]: array}, rows)


def try_to_run(document: Any, arrays: dict[str, Array], rows: Rows) -> None:
    """Read and run it: it may do anything but bring the process down, or ask for all of its memory."""
    try:
        program = read(document, arrays)
    except LoadFailed:
        return
    for method in program.methods:
        try:
            program.run(rows, method)
        except MemoryError:
            raise
        except Exception:  # noqa: S112 - a prediction may fail, however it likes
            continue


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_too_many_or_too_few_is_refused(kind):
    path, document, arrays, _ = examples()[kind]
    more = copy.deepcopy(document)
    at(more, path)["more"] = 1

    with pytest.raises(LoadFailed):
        read(more, arrays)

    for field in set(at(document, path)) - {"op"}:
        fewer = copy.deepcopy(document)
        del at(fewer, path)[field]
        with pytest.raises(LoadFailed):
            read(fewer, arrays)
