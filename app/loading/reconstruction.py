"""How the objects in a pickle are made: what stands for the functions that it calls, and how an object gets its state.

All of it checks what it is given. A pickle can call what it may name with any arguments, give any state, and in any order.
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import LoadFailed
from app.loading import allowlist, soundness

if TYPE_CHECKING:
    from app.loading.pickles import Reader

MAX_RANGE = 100_000
MAX_SHOWN = 100  # characters of a text in a message, or parts of a tuple

Finish = Callable[["Reader", Any, Any], Any]
"""Gives an object its state, and returns what is used from then on."""


# What stands for names that are not to be touched


class StandIn:
    """Something that must not be left in a model."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Call(StandIn):
    """A name of the list that is called: `make` checks the arguments and returns the object."""

    name: str
    make: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Marker(StandIn):
    """A type that is only named, for a call to make."""

    name: str


class Inert(StandIn):
    """What became of something that was not called. Whatever is done to it has no effect."""

    __slots__ = ()


class Header(StandIn):
    """joblib's wrapper of an array: its bytes begin where the pickle ends that describes it."""

    __slots__ = ()


UNTRUSTED = Inert()  # a class or function that is not trusted, and everything that it was to make
DISCARDED = Inert()  # part of the inside of a distribution, which scipy makes anew
GONE = Inert()  # bytes that are in an array by now


def named(value: Any) -> str:
    """Say what something is, by its name if it has one of its own."""
    if isinstance(value, (Call, Marker)):
        return value.name
    name = getattr(value, "__name__", None) if isinstance(value, _NAMED) else None
    return str(name) if name else f"a {type(value).__name__}"


_NAMED = (type, np.ufunc, types.FunctionType, types.BuiltinFunctionType)


def shown(value: Any) -> str:
    """Write what a message is about. Only what is short, and has no `__repr__` that somebody could have made long."""
    if type(value) is tuple and len(value) <= MAX_SHOWN:
        return f"({', '.join(map(shown, value))}{',' * (len(value) == 1)})"
    if type(value) in (str, bytes):
        return repr(value[:MAX_SHOWN])
    if value is None or type(value) is float or (type(value) is int and abs(value) < 2**64):
        return repr(value)
    return f"a {type(value).__name__}"


# Giving objects their state


def set_attributes(reader: Reader, value: Any, state: Any) -> Any:
    """Give an instance its attributes, as pickle does it, or as its class does it."""
    if type(state) is not dict or not all(type(key) is str for key in state):
        raise LoadFailed(f"gives a {type(value).__name__} something else than attributes")
    soundness.check_attributes(type(value), state)
    set_state = getattr(type(value), "__setstate__", None)
    if set_state is not None:
        set_state(value, state)
    else:
        value.__dict__.update({sys.intern(name): item for name, item in state.items()})
    return value


def _set_tuple(reader: Reader, value: Any, state: Any) -> Any:
    if type(state) is not tuple:
        raise LoadFailed(f"gives a {type(value).__name__} something else than its parts")
    type(value).__setstate__(value, state)
    return value


def _set_array(reader: Reader, value: Any, state: Any) -> Any:
    if type(state) is not tuple or len(state) not in (4, 5):
        raise LoadFailed("gives an array something else than its parts")
    shape, dtype, fortran, body = state[-4:]
    _check_content(shape, dtype, body)
    value.__setstate__((1, shape, dtype, bool(fortran), body))
    reader.forget(body)
    return value


def _set_masked_array(reader: Reader, value: Any, state: Any) -> Any:
    _, shape, dtype, fortran, body, mask, filling = state
    _check_content(shape, dtype, body)
    _check_content(shape, np.dtype(bool), mask)
    if not isinstance(filling, (str, bytes, bool, int, float, complex, np.generic, type(None))) and not (
        isinstance(filling, np.ndarray) and filling.size == 1
    ):
        raise LoadFailed(f"fills a masked array with a {type(filling).__name__}")
    if dtype.fields is not None:
        raise LoadFailed("has a masked array of records")
    value.__setstate__((1, shape, dtype, bool(fortran), body, mask, filling))
    return value


def _check_content(shape: Any, dtype: Any, body: Any) -> None:
    """Refuse what is not the content of an array of this shape and type."""
    count = _count(shape)
    if not isinstance(dtype, np.dtype):
        raise LoadFailed(f"has an array of type {shown(dtype)}")
    if dtype.hasobject:
        if dtype.kind != "O" or type(body) is not list or len(body) != count:
            raise LoadFailed(f"has an array of {count:,} objects with something else in it")
        return
    _check_size(count, dtype)
    if type(body) not in (bytes, bytearray) or len(body) != count * dtype.itemsize:
        raise LoadFailed(f"has an array of {count:,} times {dtype.itemsize} bytes with something else in it")


def _check_size(count: int, dtype: np.dtype[Any]) -> None:
    if count and not dtype.itemsize:
        raise LoadFailed(f"has an array of {count:,} times nothing")


def _count(shape: Any) -> int:
    if type(shape) is not tuple or len(shape) > 32 or not all(type(length) is int and length >= 0 for length in shape):
        raise LoadFailed(f"has an array of shape {shown(shape)}")
    count = 1
    for length in shape:
        count *= length
    return count


def _set_dtype(reader: Reader, dtype: Any, state: Any) -> Any:
    """Make a dtype what its state says, if there is a dtype that has this state; numpy itself believes anything."""
    if type(state) is not tuple or len(state) not in (8, 9) or state[0] not in (3, 4):
        raise LoadFailed("describes a dtype in a way that is not known here")
    _, order, parent, names, fields, size, alignment, flags, *metadata = state
    if parent is not None or order not in ("<", ">", "=", "|"):
        raise LoadFailed("describes a dtype that no estimator has")
    meant = dtype
    if fields is not None:
        meant = _record(names, fields, size, flags)
    elif dtype.kind in "mM" and metadata:
        unit, number, *_ = metadata[0][1]
        meant = np.dtype(f"{dtype.kind}8[{int(number)}{unit.decode('ascii')}]")
    if order in "<>":
        meant = meant.newbyteorder(order)
    if fields is not None and (meant.itemsize, meant.alignment, meant.names) != (size, alignment, names):
        raise LoadFailed("describes a dtype that contradicts itself")
    if meant.itemsize != dtype.itemsize or size not in (-1, dtype.itemsize):
        raise LoadFailed("describes a dtype that contradicts itself")
    dtype.__setstate__(meant.__reduce__()[2])
    return dtype


def _record(names: Any, fields: Any, size: Any, flags: Any) -> np.dtype[Any]:
    if (
        type(names) is not tuple
        or type(fields) is not dict
        or not 0 < len(names) <= 256
        or type(size) is not int
        or not 0 < size <= 65536
        or type(flags) is not int
    ):
        raise LoadFailed("describes a record that no estimator has")
    parts = [fields[name] for name in names]
    if not all(
        type(part) is tuple and len(part) == 2 and _is_plain(part[0]) and type(part[1]) is int for part in parts
    ):
        raise LoadFailed("describes a record that no estimator has")
    description: Any = {
        "names": list(names),
        "formats": [part[0] for part in parts],
        "offsets": [part[1] for part in parts],
        "itemsize": size,
    }
    record: np.dtype[Any] = np.dtype(description, align=bool(flags & _ALIGNED))
    return record


_ALIGNED = 0x80  # NPY_ALIGNED_STRUCT in numpy/ndarraytypes.h


def _is_plain(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.fields is None and dtype.subdtype is None and not dtype.hasobject


def _set_partial(reader: Reader, value: Any, state: Any) -> Any:
    function, arguments, options, attributes = state
    if not reader.is_value(function) or attributes:
        raise LoadFailed("has a partial function of something that is not one")
    value.__setstate__((function, arguments, options, None))
    return value


def _set_tree(reader: Reader, value: Any, state: Any) -> Any:
    if type(state) is not dict or not all(type(state.get(key)) is np.ndarray for key in ("nodes", "values")):
        raise LoadFailed("has a tree without nodes")
    value.__setstate__(state)
    reader.forget(state["nodes"], state["values"])
    state.clear()  # the tree has a copy of its own, and a forest would be in memory twice
    return value


def _ignore(reader: Reader, value: Any, state: Any) -> Any:
    return value


def _set_joblib_array(reader: Reader, header: Header, state: Any) -> Any:
    """Read the array that a header of joblib's describes, straight into its place."""
    if type(state) is not dict or reader.nested:
        raise LoadFailed("has an array within another's items")
    shape, dtype, order = state["shape"], state["dtype"], state["order"]
    if state["subclass"] not in _ARRAYS or order not in ("C", "F") or not isinstance(dtype, np.dtype):
        raise LoadFailed("has an array that is not one of numpy's")
    shape = tuple(int(length) for length in shape)
    count = _count(shape)
    if dtype.hasobject:
        return reader.load_items()
    _check_size(count, dtype)
    if state.get("numpy_array_alignment_bytes") is not None:
        reader.take(reader.read(1)[0])
    reader.source.require(count * dtype.itemsize)
    array = np.empty(count, dtype)
    reader.source.fill(memoryview(array.view(np.uint8)))
    array = array.reshape(shape[::-1]).transpose() if order == "F" else array.reshape(shape)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


# What stands for what pickles call


def _array(reader: Reader, kind: Any, shape: Any = (0,), dtype: Any = b"b") -> Any:
    if kind not in _ARRAYS:
        raise LoadFailed("has an array of a class that is not numpy's")
    return reader.expect(np.ndarray((0,), np.int8), _set_array, required=False)


_ARRAYS = (Marker("numpy.ndarray"), Marker("numpy.matrix"), Marker("numpy.memmap"))


def _array_of_buffer(
    reader: Reader, buffer: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None
) -> np.ndarray[Any, Any]:
    from numpy._core.numeric import _frombuffer  # type: ignore[attr-defined]  # what numpy names in pickles

    if isinstance(dtype, np.dtype) and dtype.hasobject:
        raise LoadFailed("has an array of objects in a buffer")
    _check_content(shape, dtype, buffer)
    reader.forget(buffer)
    array: np.ndarray[Any, Any] = _frombuffer(buffer, dtype, shape, order, *([axis_order] if axis_order else []))
    return array


def _masked_array(reader: Reader, kind: Any, base: Any, shape: Any, dtype: Any) -> Any:
    from numpy.ma.core import _mareconstruct  # type: ignore[attr-defined]  # what numpy names in pickles

    if kind != Marker("numpy.ma.MaskedArray") or base not in _ARRAYS:
        raise LoadFailed("has a masked array of a class that is not numpy's")
    return reader.expect(_mareconstruct(np.ma.MaskedArray, np.ndarray, (0,), "b"), _set_masked_array)


def _scalar(reader: Reader, dtype: Any, body: Any = b"") -> Any:
    from numpy._core.multiarray import scalar

    if not _is_plain(dtype) or type(body) is not bytes or len(body) != dtype.itemsize:
        raise LoadFailed("has a number that is not one")
    return scalar(dtype, body)


def _dtype(reader: Reader, description: Any, align: Any = False, copy: Any = False) -> Any:
    if type(description) is not str or not _DTYPE.fullmatch(description):
        raise LoadFailed(f"has a dtype {shown(description)}")
    return reader.expect(np.dtype(description, copy=True), _set_dtype, required=False)


_DTYPE = re.compile(r"[<>=|]?[?biufcOSUVmM]\d{0,9}")


def _encode(reader: Reader, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise LoadFailed("encodes a text, which only protocol 2 does, and as latin1")
    return text.encode("latin1")


def _bytes(reader: Reader) -> bytes:
    return b""


def _set(reader: Reader, items: Any) -> set[Any]:
    return set(_items(reader, items))


def _frozenset(reader: Reader, items: Any) -> frozenset[Any]:
    return frozenset(_items(reader, items))


def _items(reader: Reader, items: Any) -> list[Any]:
    if type(items) is not list:
        raise LoadFailed(f"makes a set of a {type(items).__name__}")
    reader.check_keys(items)
    return items


def _slice(reader: Reader, *parts: Any) -> slice:
    if not all(isinstance(part, (str, int, np.integer, type(None))) for part in parts):
        raise LoadFailed("has a slice from or to what is no place")
    return slice(*parts)


def _range(reader: Reader, start: Any, stop: Any, step: Any) -> range:
    if not all(type(part) is int for part in (start, stop, step)) or len(range(start, stop, step)) > MAX_RANGE:
        raise LoadFailed(f"has a range of more than {MAX_RANGE:,}")
    return range(start, stop, step)


def _partial(reader: Reader, function: Any) -> Any:
    if not reader.is_value(function):
        raise LoadFailed("has a partial function of something that is not one")
    return reader.expect(functools.partial(function), _set_partial)


def _reconstructor(reader: Reader, made_of: Any, base: Any, state: Any) -> Any:
    if base is not object or state is not None:
        raise LoadFailed("makes an object in a way that only protocols below 2 know")
    return reader.new(made_of)


def _bit_generator(reader: Reader, kind: Any = "MT19937") -> Any:
    name = kind.name.rpartition(".")[2] if isinstance(kind, Marker) else kind
    if name not in ("MT19937", "PCG64"):
        raise LoadFailed(f"{shown(name)} is not a known BitGenerator module.")
    return reader.expect(getattr(np.random, name)(0), _set_bit_generator)


def _set_bit_generator(reader: Reader, value: Any, state: Any) -> Any:
    own, seeds = state if type(state) is tuple else (state, None)  # numpy before 1.24 wrote no seeds
    if not isinstance(seeds, (np.random.SeedSequence, type(None))):
        raise LoadFailed("has a random state without one")
    _check_random(own)
    value.__setstate__(state)
    return value


def _random_state(reader: Reader, generator: Any = "MT19937", make: Any = None) -> Any:
    generator = _generator_of(reader, generator)
    return reader.expect(np.random.RandomState(generator), _set_random_state, required=False)


def _set_random_state(reader: Reader, value: Any, state: Any) -> Any:
    _check_random(state)
    value.__setstate__(state)
    return value


def _check_random(state: Any) -> None:
    """Refuse all but numbers and one array of them; that they are within their bounds is checked by numpy."""
    if type(state) is not dict or type(state.get("state")) is not dict:
        raise LoadFailed("has a random state without one")
    for part in (*state.values(), *state["state"].values()):
        array = isinstance(part, np.ndarray) and part.dtype.kind == "u" and part.ndim == 1
        if not array and type(part) not in (int, float, str, dict):
            raise LoadFailed(f"has a {type(part).__name__} in a random state")


def _generator(reader: Reader, generator: Any = "MT19937", make: Any = None) -> Any:
    return reader.expect(np.random.Generator(_generator_of(reader, generator)), _set_random_state, required=False)


def _generator_of(reader: Reader, generator: Any) -> Any:
    if isinstance(generator, (np.random.MT19937, np.random.PCG64)):
        return generator
    generator = _bit_generator(reader, generator)  # numpy before 1.24 gives its name, and its state later
    del reader._unfinished[id(generator)]
    return generator


def _seeds(reader: Reader, kind: Any, checksum: Any, state: Any) -> Any:
    from numpy.random import bit_generator

    if kind != Marker("numpy.random.bit_generator.SeedSequence") or type(checksum) is not int or state is not None:
        raise LoadFailed("has seeds that are none")
    make: Any = bit_generator.__pyx_unpickle_SeedSequence  # type: ignore[attr-defined]  # what numpy names in pickles
    return reader.expect(make(np.random.SeedSequence, checksum, None), _set_seeds)


def _set_seeds(reader: Reader, value: Any, state: Any) -> Any:
    entropy, spawned, pool, size, key, *more = state
    if (
        not isinstance(entropy, (int, np.integer, list, np.ndarray, type(None)))
        or not isinstance(pool, np.ndarray)
        or pool.dtype != np.uint32
        or pool.shape != (size,)
        or type(key) is not tuple
        or any(more)
    ):
        raise LoadFailed("has seeds that are none")
    value.__setstate__((entropy, spawned, pool, size, key))
    return value


def _tree(reader: Reader, features: Any, classes: Any, outputs: Any) -> Any:
    from sklearn.tree._tree import Tree

    check_sizes(features, classes, outputs)
    return reader.expect(Tree(features, classes, outputs), _set_tree)


def check_sizes(features: Any, classes: Any, outputs: Any) -> None:
    """Refuse to make a tree with sizes that contradict each other."""
    if type(features) is not int or type(outputs) is not int or type(classes) is not np.ndarray:
        raise LoadFailed("has a tree without a size")
    if not (classes.shape == (outputs,) and outputs > 0 and features >= 0 and (classes > 0).all()):
        raise LoadFailed(f"has a tree of {shown(outputs)} outputs with classes for {shown(classes.shape)}")


def _new_object(reader: Reader, made_of: Any) -> Any:
    return reader.new(made_of)


def _imputer_triplet(reader: Reader, feature: Any, neighbours: Any, estimator: Any) -> Any:
    from sklearn.impute._iterative import _ImputerTriplet

    if isinstance(feature, tuple) or isinstance(neighbours, tuple) or isinstance(estimator, tuple):
        raise LoadFailed("has tuples where an imputer has none")
    return _ImputerTriplet(feature, neighbours, estimator)


def _loss(full: str) -> Callable[..., Any]:
    def make(reader: Reader, *parameters: Any) -> Any:
        if len(parameters) > 1 or not all(isinstance(parameter, (int, float)) for parameter in parameters):
            raise LoadFailed(f"has a {full.rpartition('.')[2]} of more than one number")
        return allowlist.resolve(full)(*parameters)

    return make


def _multinomial_loss(reader: Reader, kind: Any, checksum: Any, state: Any = None) -> Any:
    from sklearn._loss import _loss

    if (
        kind != Marker("sklearn._loss._loss.CyHalfMultinomialLoss")
        or type(checksum) is not int
        or state not in (None, ())
    ):
        raise LoadFailed("has a CyHalfMultinomialLoss with something in it")
    value = _loss.__pyx_unpickle_CyHalfMultinomialLoss(_loss.CyHalfMultinomialLoss, checksum, state)
    return reader.expect(value, _ignore, required=False)  # there is nothing in it


def _joblib_array(reader: Reader) -> Any:
    return reader.expect(Header(), _set_joblib_array)


def _distribution(full: str) -> Callable[..., Any]:
    """Return what puts a distribution of scipy's own in the place of one whose methods are a text in the pickle."""

    def make(reader: Reader) -> Any:
        import scipy.stats

        name = full.rpartition(".")[2].removesuffix("_gen")
        own = getattr(scipy.stats, {"reciprocal": "loguniform"}.get(name, name))
        return reader.expect(type(own)(**own._updated_ctor_param()), _ignore, required=False)

    return make


def _method(reader: Reader, value: Any, name: Any) -> Any:
    if type(value).__module__.startswith("scipy.stats."):  # only we can have made it
        return DISCARDED
    raise LoadFailed(
        f"refers to the method {shown(name)} of {named(value)}: name a function of a module in its place, which can be trusted"
    )


def _vectorized(reader: Reader) -> Any:
    value = Inert()
    return reader.expect(value, _ignore, required=False)


CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "builtins.bytes": _bytes,
    "builtins.frozenset": _frozenset,
    "builtins.getattr": _method,
    "builtins.range": _range,
    "builtins.set": _set,
    "builtins.slice": _slice,
    "copyreg._reconstructor": _reconstructor,
    "functools.partial": _partial,
    "joblib.numpy_pickle.NumpyArrayWrapper": _joblib_array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array_of_buffer,
    "numpy.dtype": _dtype,
    "numpy.ma.core._mareconstruct": _masked_array,
    "numpy.random._pickle.__bit_generator_ctor": _bit_generator,
    "numpy.random._pickle.__generator_ctor": _generator,
    "numpy.random._pickle.__randomstate_ctor": _random_state,
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence": _seeds,
    "numpy.vectorize": _vectorized,
    "sklearn._loss._loss.__pyx_unpickle_CyHalfMultinomialLoss": _multinomial_loss,
    "sklearn.impute._iterative._ImputerTriplet": _imputer_triplet,
    "sklearn.metrics._dist_metrics.newObj": _new_object,
    "sklearn.neighbors._ball_tree.newObj": _new_object,
    "sklearn.neighbors._kd_tree.newObj": _new_object,
    "sklearn.tree._tree.Tree": _tree,
}
CALLS |= {
    full: _distribution(full) if full.startswith("scipy.stats.") else _loss(full)
    for full, kind in allowlist.KINDS.items()
    if kind == "calls" and full not in CALLS
}

FINISH: dict[str, Finish] = {
    full: _set_tuple
    for full, kind in allowlist.KINDS.items()
    if kind == "instances"
    and full.startswith(
        (
            "scipy.interpolate._bsplines.BSpline",
            "sklearn.metrics._dist_metrics.",
            "sklearn.neighbors._ball_tree.",
            "sklearn.neighbors._kd_tree.",
        )
    )
}
