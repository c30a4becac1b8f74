"""Read a pickle, or what `joblib.dump` wrote, such that nothing in it can run, open, import or fill anything.

A pickle is a program: it names functions and classes, calls them with arguments of its choice, and sets attributes. This
is an interpreter of it with five rules:

1. A name must be in `trusted_types.txt` or trusted by the operator. Nothing is imported before that is known.
2. Of a class, an empty object is made. It is called only where the list says "calls", and then not itself, but the function
   of `reconstruction.py` that checks the arguments first.
3. State is given to an object once, and only to one that this pickle has made: a class or a function is never changed.
4. A function is a value like any other. Nothing calls it before the model predicts.
5. Nothing is allocated on the word of a header: not for more bytes than are left to read.

It is Python because the interpreter in C cannot be told rules 2 to 5, and fills 16 GB when ten bytes ask it for a place in
its memo (`LONG_BINPUT`). It skips the framing of protocol 4, and lets go of bytes that have become an array: most files load
as fast as with `joblib.load`, and in less memory.
"""

from __future__ import annotations

import io
import itertools
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, override

import numpy as np

from app.errors import DisklessError, LoadFailed, UntrustedType
from app.loading import allowlist, soundness
from app.loading.reconstruction import (
    CALLS,
    FINISH,
    GONE,
    UNTRUSTED,
    Call,
    Finish,
    Inert,
    Marker,
    StandIn,
    named,
    set_attributes,
)
from app.loading.source import Budget, Source, default_limit, open_source

OPERATIONS_PER_LOOK = 4096  # each makes at most a few KB without reading as much
MAX_TUPLE_DEPTH = 64  # hashing a tuple descends on the C stack, without a limit: a million of them end the process
MAX_ODD_KEYS = 10_000
MIN_FORGOTTEN = 1024  # shorter bytes can be one object in many places
MAX_UNTRUSTED = 100  # names that are collected, to be told at once
MAX_NAMES = 10  # in a message
MAX_NAME = 200  # characters of one


def unpickle(stream: io.BufferedReader, *, trusted: frozenset[str] = frozenset(), max_bytes: int | None = None) -> Any:
    """Return the object in `stream`, which is seekable and at its beginning; joblib's compressions are recognised.

    `trusted` are full names that are allowed beside the list. `max_bytes` is what the process may grow by, and the most
    that a compressed file may become; by default a multiple of what the stream holds. Raises `UntrustedType`,
    `LoadFailed`, what the stream raises, and anything that broken bytes can make numpy and scikit-learn raise.
    """
    if max_bytes is None:
        max_bytes = default_limit(stream.seek(0, io.SEEK_END))
        stream.seek(0)
    source = open_source(stream, max_bytes)
    value = Reader(source, trusted, Budget(max_bytes)).load()
    source.finish()
    soundness.check(value, alien=StandIn, trusted=trusted)
    return value


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An object that was made and waits for its state; `finish` gives it, and returns what is used from then on."""

    value: Any
    finish: Finish
    required: bool


_inherited: Any = pickle._Unpickler  # the interpreter in Python, which joblib stands on, too; typeshed knows half of it


class Reader(_inherited):  # type: ignore[misc]  # its type is not known
    """The interpreter. One reads one pickle."""

    def __init__(self, source: Source, trusted: frozenset[str], budget: Budget, *, nested: bool = False) -> None:
        super().__init__(source.stream, fix_imports=False)
        self.source = source
        self.nested = nested
        self._trusted = trusted
        self._budget = budget
        self._names: dict[tuple[str, str], Any] = {}
        self._classes: dict[type, str] = {}  # those of which empty objects may be made, and their names
        self._values: dict[int, Any] = {}  # functions that were named, by identity
        self._foreign: dict[int, Any] = {}  # functions and classes that the operator trusts, by identity
        self._guests: dict[int, Any] = {}  # what these have made
        self._unfinished: dict[int, Unfinished] = {}
        self._untrusted: list[str] = []
        self._tuple_depths: dict[int, int] = {}  # of the tuples that hold tuples, by identity
        self._odd_keys = 0
        self._memo_keys: dict[int, int] = {}  # where in the memo bytes and arrays are, by identity

    def load(self) -> Any:
        """Return the object. Raises `UntrustedType` once everything is read that can be, with all that is not trusted."""
        try:
            value = self._run()
        except Exception as error:
            if not isinstance(error, DisklessError) or isinstance(error, LoadFailed):
                self._refuse_untrusted()  # it may be only for this that it went wrong
            raise
        self._refuse_untrusted()
        return value

    def load_items(self) -> Any:
        """Return the array that follows here as a pickle of its own, as joblib writes those with objects in them."""
        inner = Reader(self.source, self._trusted, self._budget, nested=True)
        inner._foreign, inner._untrusted = self._foreign, self._untrusted
        value = inner._run()
        if not isinstance(value, (np.ndarray, Inert)):
            raise LoadFailed(f"has a {type(value).__name__} where an array should be")
        return value

    def _run(self) -> Any:
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.read, self.readline = self.source.stream.read, self.source.stream.readline
        self.proto = 0
        next_byte, operations = self.read, _OPERATIONS
        try:
            while True:
                self._budget.check()
                for _ in itertools.repeat(None, OPERATIONS_PER_LOOK):
                    operations[next_byte(1)](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]  # how STOP ends it
            for waiting in self._unfinished.values():
                if waiting.required:
                    raise LoadFailed(f"has a {type(waiting.value).__name__} without anything in it") from None
            return stop.value

    def take(self, count: int) -> bytes:
        """Return that many bytes. What is short enough, `read` returns; if it ends in the middle, the next one misses."""
        self.source.require(count)
        return self.source.stream.read(count)

    def _refuse_untrusted(self) -> None:
        if self._untrusted:
            raise UntrustedType(refusal(self._untrusted))

    # Names

    @override
    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._names:
            self._names[key] = self._find(module, name)
        return self._names[key]

    def _find(self, module: str, name: str) -> Any:
        full = allowlist.listed(module, name)
        if full is None:
            return self._find_trusted(module, name)
        kind = allowlist.KINDS[full]
        if kind == "calls":
            return Call(full, CALLS[full])
        if kind == "markers":
            return Marker(full)
        value = allowlist.resolve(full)
        if kind == "instances":
            self._classes[value] = full
        else:
            self._values[id(value)] = value
        return value

    def _find_trusted(self, module: str, name: str) -> Any:
        module = allowlist.module_today(module)
        full = f"{module}.{name}"
        if full in self._trusted:
            value = allowlist.resolve_trusted(module, name)
            self._foreign[id(value)] = self._values[id(value)] = value
            return value
        if full in _NEVER:
            raise LoadFailed(_NEVER[full])
        if (error := allowlist.missing(module, name)) is not None:
            raise error
        self._untrusted.append(full)
        if len(self._untrusted) == MAX_UNTRUSTED:
            raise LoadFailed("mentions so many names that are not trusted that no more were looked at")
        return UNTRUSTED

    def is_value(self, function: Any) -> bool:
        """Whether this is a function that the pickle may hold."""
        return id(function) in self._values

    # Making objects

    def expect(self, value: Any, finish: Finish, *, required: bool = True) -> Any:
        """Let the state of `value` be given to it by `finish`, once; `required` when it is of no use without."""
        self._unfinished[id(value)] = Unfinished(value, finish, required)
        return value

    def new(self, made_of: Any, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None) -> Any:
        """Make an empty object of a class."""
        if isinstance(made_of, type) and made_of in self._classes:
            if arguments or options:
                raise LoadFailed(f"makes a {made_of.__name__} with arguments, which none needs")
            finish = FINISH.get(self._classes[made_of])
            empty: Any = made_of.__new__
            value = empty(made_of)
            return self.expect(value, finish or set_attributes, required=finish is not None)
        return self._made(made_of, arguments, options, lambda: made_of.__new__(made_of, *arguments, **(options or {})))

    def call(self, function: Any, arguments: Sequence[Any]) -> Any:
        """Make what the pickle wants to make by a call."""
        return self._made(function, arguments, None, lambda: function(*arguments))

    def _made(
        self, made_by: Any, arguments: Sequence[Any], options: dict[str, Any] | None, make: Callable[[], Any]
    ) -> Any:
        if isinstance(made_by, Call) and not options:
            return made_by.make(self, *arguments)
        if made_by is UNTRUSTED or (id(made_by) in self._foreign and self._untrusted):
            return UNTRUSTED
        if id(made_by) in self._foreign:
            value = make()
            self._guests[id(value)] = value
            return value
        raise LoadFailed(f"calls {named(made_by)}, which a model may have, but nothing may call while it is read")

    def forget(self, *values: Any) -> None:
        """Let go of bytes and arrays that were copied into something else, and are mentioned by nobody again."""
        last = len(self.memo) - 1  # the arguments or the state that they came in
        parts = self.memo.get(last)
        if type(parts) is tuple and any(part is value for part in parts for value in values):
            self.memo[last] = GONE
        for value in values:
            unique = isinstance(value, np.ndarray) or len(value) >= MIN_FORGOTTEN
            key = self._memo_keys.pop(id(value), None) if unique else None
            if key is not None:
                self.memo[key] = GONE

    # Operations, as pickle names them

    def _do_unknown(self) -> None:
        raise pickle.UnpicklingError("the bytes are no pickle")

    def _do_end(self) -> None:
        raise EOFError("the pickle ends in the middle")

    def _do_frame(self) -> None:
        self.read(8)

    def _do_bytes(self) -> None:
        self.append(self.take(int.from_bytes(self.read(4), "little")))

    def _do_bytes8(self) -> None:
        self.append(self.take(int.from_bytes(self.read(8), "little")))

    def _do_bytearray8(self) -> None:
        count = int.from_bytes(self.read(8), "little")
        self.source.require(count)
        body = bytearray(count)
        self.source.fill(memoryview(body))
        self.append(body)

    def _do_text(self) -> None:
        self._text(int.from_bytes(self.read(4), "little"))

    def _do_text8(self) -> None:
        self._text(int.from_bytes(self.read(8), "little"))

    def _text(self, count: int) -> None:
        body = self.take(count) if count > io.DEFAULT_BUFFER_SIZE else self.read(count)
        self.append(str(body, "utf-8", "surrogatepass"))

    def _do_string(self) -> None:
        self.append(self.take(int.from_bytes(self.read(4), "little")).decode("ascii"))

    def _do_number(self) -> None:
        self.append(int.from_bytes(self.take(int.from_bytes(self.read(4), "little")), "little", signed=True))

    def _do_extension(self) -> None:
        raise pickle.UnpicklingError("it refers to a registry of its writer")

    def _do_buffer(self) -> None:
        raise pickle.UnpicklingError("it refers to buffers of its writer")

    @override
    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects of its writer")

    def _do_memoize(self) -> None:
        memo, value = self.memo, self.stack[-1]
        memo[len(memo)] = value
        if type(value) in _BULK:
            self._memo_keys[id(value)] = len(memo) - 1

    def _do_put(self) -> None:
        self._memoize(int(self.readline()[:-1]))

    def _do_binput(self) -> None:
        self._memoize(self.read(1)[0])

    def _do_long_binput(self) -> None:
        self._memoize(int.from_bytes(self.read(4), "little"))

    def _memoize(self, key: int) -> None:
        value = self.memo[key] = self.stack[-1]
        if type(value) in _BULK:
            self._memo_keys[id(value)] = key

    def _do_tuple(self) -> None:
        items = tuple(self.pop_mark())  # after this, `append` is that of another stack
        self.append(self._tuple(items))

    def _do_tuple1(self) -> None:
        self.stack[-1] = self._tuple((self.stack[-1],))

    def _do_tuple2(self) -> None:
        self.stack[-2:] = [self._tuple((self.stack[-2], self.stack[-1]))]

    def _do_tuple3(self) -> None:
        self.stack[-3:] = [self._tuple((self.stack[-3], self.stack[-2], self.stack[-1]))]

    def _tuple(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        if tuple in map(type, items):
            depth = 1 + max(self._tuple_depths.get(id(item), 1) for item in items if type(item) is tuple)
            if depth > MAX_TUPLE_DEPTH:
                raise LoadFailed(f"has tuples in tuples, {depth} deep")
            self._tuple_depths[id(items)] = depth
        elif self._tuple_depths:
            self._tuple_depths.pop(id(items), None)  # another one has been at this address
        return items

    def _do_append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _do_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif self._is_foreign(target):
            for item in items:
                target.append(item)

    def _do_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _do_setitems(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        self.check_keys(items[::2])
        pairs = zip(items[::2], items[1::2], strict=True)
        if type(target) is dict:
            target.update(pairs)
        elif isinstance(target, dict) and type(target) in self._classes:
            dict.update(target, pairs)
        elif self._is_foreign(target):
            for key, value in pairs:
                target[key] = value

    def _do_additems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        self.check_keys(items)
        if type(target) is set:
            target.update(items)
        elif self._is_foreign(target):
            for item in items:
                target.add(item)

    def _do_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _do_frozenset(self) -> None:
        items = self.pop_mark()
        self.check_keys(items)
        self.append(frozenset(items))

    def check_keys(self, keys: Sequence[Any]) -> None:
        """Refuse to put many of a kind into a dictionary or a set that can be made all alike to it.

        It would compare each with each, and no other thread could do anything meanwhile.
        """
        if _TOLD_APART.issuperset(map(type, keys)):
            return
        self._odd_keys += sum(
            type(key) not in _TOLD_APART and not (type(key) is int and abs(key) < 2**63) for key in keys
        )
        if self._odd_keys > MAX_ODD_KEYS:
            raise LoadFailed(f"has more than {MAX_ODD_KEYS:,} large numbers or tuples for keys")

    def _is_foreign(self, target: Any) -> bool:
        """Whether a collection may be filled as it likes; False when nothing is to be done. Raises `LoadFailed`."""
        if isinstance(target, Inert) or self._untrusted:
            return False
        if id(target) not in self._guests:
            raise LoadFailed(f"puts items into a {type(target).__name__}")
        return True

    def _do_reduce(self) -> None:
        arguments = self.stack.pop()
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"it calls something with a {type(arguments).__name__} for arguments")
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def _do_newobj(self) -> None:
        arguments = self.stack.pop()
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"it calls something with a {type(arguments).__name__} for arguments")
        self.stack[-1] = self.new(self.stack[-1], arguments)

    def _do_newobj_ex(self) -> None:
        options, arguments = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or type(options) is not dict:
            raise pickle.UnpicklingError("it calls something with other than arguments")
        self.stack[-1] = self.new(self.stack[-1], arguments, options)

    def _instantiate(self, made_of: Any, arguments: list[Any]) -> None:
        """What the operations INST and OBJ come to."""
        self.append(self.new(made_of) if not arguments else self.call(made_of, arguments))

    def _do_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        waiting = self._unfinished.pop(id(target), None)
        if waiting is not None:
            self.stack[-1] = waiting.finish(self, target, state)
        elif id(target) in self._guests and not self._untrusted:
            if not hasattr(target, "__setstate__"):
                for names in state if type(state) is tuple else (state,):
                    soundness.check_names(type(target), names if isinstance(names, dict) else ())
            self.append(state)
            _inherited.load_build(self)
        elif not isinstance(target, Inert) and id(target) not in self._guests:
            raise LoadFailed(f"changes {named(target)}, which is complete")


_BULK = (bytes, bytearray, np.ndarray)
_TOLD_APART = frozenset(
    {str, bytes, bool, type(None), float, np.str_, np.float64, np.int64, np.int32}
)  # by their hashes


class _Operations(dict[bytes, Callable[[Reader], None]]):
    def __missing__(self, key: bytes) -> Callable[[Reader], None]:
        return Reader._do_unknown if key else Reader._do_end


def _operations() -> _Operations:
    """Return what to do at each byte: pickle's own, and ours where pickle would do too much."""
    operations = _Operations({bytes([code]): does for code, does in _inherited.dispatch.items()})
    ours: Iterable[tuple[bytes, Callable[[Reader], None]]] = [
        (pickle.FRAME, Reader._do_frame),
        (pickle.BINBYTES, Reader._do_bytes),
        (pickle.BINBYTES8, Reader._do_bytes8),
        (pickle.BYTEARRAY8, Reader._do_bytearray8),
        (pickle.BINUNICODE, Reader._do_text),
        (pickle.BINUNICODE8, Reader._do_text8),
        (pickle.BINSTRING, Reader._do_string),
        (pickle.LONG4, Reader._do_number),
        *((code, Reader._do_extension) for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4)),
        *((code, Reader._do_buffer) for code in (pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)),
        (pickle.MEMOIZE, Reader._do_memoize),
        (pickle.PUT, Reader._do_put),
        (pickle.BINPUT, Reader._do_binput),
        (pickle.LONG_BINPUT, Reader._do_long_binput),
        (pickle.TUPLE, Reader._do_tuple),
        (pickle.TUPLE1, Reader._do_tuple1),
        (pickle.TUPLE2, Reader._do_tuple2),
        (pickle.TUPLE3, Reader._do_tuple3),
        (pickle.APPEND, Reader._do_append),
        (pickle.APPENDS, Reader._do_appends),
        (pickle.SETITEM, Reader._do_setitem),
        (pickle.SETITEMS, Reader._do_setitems),
        (pickle.ADDITEMS, Reader._do_additems),
        (pickle.DICT, Reader._do_dict),
        (pickle.FROZENSET, Reader._do_frozenset),
        (pickle.REDUCE, Reader._do_reduce),
        (pickle.NEWOBJ, Reader._do_newobj),
        (pickle.NEWOBJ_EX, Reader._do_newobj_ex),
        (pickle.BUILD, Reader._do_build),
    ]
    operations.update(ours)
    return operations


_OPERATIONS = _operations()


def refusal(names: Sequence[str]) -> str:
    """Say which names are not trusted, and what to set."""
    names = list(dict.fromkeys(names))
    shown = [name if name.isprintable() and len(name) <= MAX_NAME else ascii(name)[:MAX_NAME] for name in names]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    are, them = ("is", "it") if len(names) == 1 else ("are", "them")
    python = [name for name in shown[:MAX_NAMES] if name.partition(".")[0] in sys.stdlib_module_names]
    if python:  # functions of Python itself are what attacks are made of
        return (
            f"uses {', '.join(shown[:MAX_NAMES])}{more}, which {are} not trusted: {python[0]} is no part of a model but of "
            f"Python itself, so find out who wrote this file before you add {them} to ML_TRUSTED_TYPES"
        )
    return (
        f"uses {', '.join(shown[:MAX_NAMES])}{more}, which {are} not trusted: "
        f"if you trust whoever wrote this file, add {them} to ML_TRUSTED_TYPES"
    )


# Names that trusting would not help.
_NEVER = {
    f"joblib.{module}.{name}": "has arrays in other files, as joblib before 0.10 wrote them: save it again with a joblib of today"
    for module in ("numpy_pickle", "numpy_pickle_compat")
    for name in ("NDArrayWrapper", "ZNDArrayWrapper")
}
