"""What compiled models are made of: operations, each a frozen dataclass that turns one value into the next.

An operation is written as its name and its fields: JSON for what is small, arrays beside it. It is read back by the same
declaration, field by field, and then asked to `check` itself: a file is somebody's word, and compiled code follows indices
unchecked.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

import numpy as np

from app.errors import LoadFailed
from app.signature import Array

MAX_DEPTH = 60
_OPS: dict[str, type[Op]] = {}


class Malformed(LoadFailed):
    """The parts of an operation do not fit each other."""


class Op:
    """One step of a compiled model. Immutable; safe to share between threads; `run` changes nothing that it is given.

    A subclass is a frozen dataclass whose fields are `int`, `float`, `bool`, `str`, `None`, `Literal`, `Array`, `Op`, or tuples,
    string-keyed dictionaries and unions with `None` of these.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if kind:
            assert kind not in _OPS or _OPS[kind].__qualname__ == cls.__qualname__, f"two operations are called {kind}"
            cls.kind = kind
            _OPS[kind] = cls

    def run(self, value: Any) -> Any:
        """Return the next value. Raises `ValueError`, in scikit-learn's words, for input that its counterpart refuses."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise `Malformed` unless every index and every shape in the fields is one that `run` may follow."""


def encode(value: Any, arrays: dict[str, Array]) -> Any:
    """Return `value` (an operation, or what a field may hold) as JSON, and put its arrays into `arrays`."""
    if isinstance(value, Op):
        fields = {field.name: encode(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"op": value.kind, **fields}
    if isinstance(value, np.ndarray):
        # The heads of a model share most of what they compute with: that is stored once.
        name = next((name for name, stored in arrays.items() if stored is value), str(len(arrays)))
        arrays[name] = value
        return {"array": name}
    if isinstance(value, (tuple, list)):
        return [encode(item, arrays) for item in value]
    if isinstance(value, Mapping):
        return {"map": {key: encode(item, arrays) for key, item in value.items()}}
    if isinstance(value, np.generic):
        return value.item()
    return value


def decode(document: Any, arrays: Mapping[str, Array], look: Callable[[int], None] | None = None) -> Op:
    """Return the operation that `encode` wrote, checked. Raises `Malformed`.

    `look` is called behind each operation, which may have made much of little as it was checked. What it raises reaches the caller.
    """
    return _operation(document, _Decoding(arrays, look), 0)  # type: ignore[no-any-return]


class _Decoding(NamedTuple):
    arrays: Mapping[str, Array]
    look: Callable[[int], None] | None


def _operation(document: Any, decoding: _Decoding, depth: int) -> Any:
    if depth > MAX_DEPTH or type(document) is not dict or type(document.get("op")) is not str:
        raise Malformed("is not a compiled model: an operation is expected where there is none")
    cls = _OPS.get(document["op"])
    if cls is None:
        raise Malformed(f"has an operation {document['op']!r:.60} that this release does not know: upgrade Diskless")
    declared = _fields(cls)  # type: ignore[arg-type]  # mypy takes the hash of objects for that of the class
    if document.keys() - {"op"} != declared.keys():
        raise Malformed(f"is not a compiled model: {cls.kind} has other fields than it should")
    values = {
        name: _value(document[name], annotation, decoding, depth, f"{cls.kind}.{name}")
        for name, annotation in declared.items()
    }
    op = cls(**values)
    try:
        op.check()
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise Malformed(f"is not a compiled model: {cls.kind}: {error}") from error
    if decoding.look is not None:
        decoding.look(0)
    return op


@functools.cache
def _fields(cls: type[Op]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _value(given: Any, annotation: Any, decoding: _Decoding, depth: int, where: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if given is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        for kind in kinds[:-1]:
            try:
                return _value(given, kind, decoding, depth, where)
            except Malformed:
                continue
        return _value(given, kinds[-1], decoding, depth, where)
    if origin is Literal and type(given) in (str, int, bool) and given in arguments:
        return given
    if origin is tuple and type(given) is list:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_value(item, arguments[0], decoding, depth, where) for item in given)
        if len(arguments) == len(given):
            return tuple(
                _value(item, kind, decoding, depth, where) for item, kind in zip(given, arguments, strict=True)
            )
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if type(given) is dict and given.keys() == {"map"} and type(given["map"]) is dict:
            return {key: _value(item, arguments[1], decoding, depth, where) for key, item in given["map"].items()}
    elif annotation == Array:
        if type(given) is dict and given.keys() == {"array"} and type(given["array"]) is str:
            found = decoding.arrays.get(given["array"])
            if found is not None:
                return found
    elif isinstance(annotation, type) and issubclass(annotation, Op):
        operation = _operation(given, decoding, depth + 1)
        if isinstance(operation, annotation):
            return operation
    elif annotation is float and type(given) in (int, float):
        return float(given)
    elif annotation in (int, bool, str) and type(given) is annotation:
        return given
    raise Malformed(f"is not a compiled model: {where} is not what it should be")


def expect(condition: bool, text: str) -> None:
    """Raise `Malformed` unless `condition` holds."""
    if not condition:
        raise Malformed(f"is not a compiled model: {text}")


def kinds() -> frozenset[str]:
    """Return the names of all operations that have been declared."""
    return frozenset(_OPS)


def within(value: Any) -> Iterator[Op]:
    """Yield every operation in `value`, an operation or what a field of one may hold, the outer ones first."""
    if isinstance(value, Op):
        yield value
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            yield from within(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from within(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from within(item)


def rebuilt(value: Any, change: Callable[[Op], Op]) -> Any:
    """Return `value` with every operation in it, the inner ones first, replaced by what `change` makes of it."""
    if isinstance(value, Op):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
        changed = {name: rebuilt(item, change) for name, item in fields.items()}
        same = all(changed[name] is item for name, item in fields.items())
        return change(value if same else dataclasses.replace(value, **changed))  # type: ignore[type-var]
    if isinstance(value, Mapping):
        items = {key: rebuilt(item, change) for key, item in value.items()}
        return value if all(items[key] is item for key, item in value.items()) else items
    if isinstance(value, tuple):
        parts = tuple(rebuilt(item, change) for item in value)
        return value if all(map(operator.is_, parts, value)) else parts
    return value
