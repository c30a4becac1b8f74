"""Read what `skops.io.dump` wrote: a zip archive of arrays, and of a schema that says what to make of them.

skops compares the types of a file with those that are trusted, but whatever is trusted for one purpose it would use for any:
`{"__loader__": "ListNode", "__class__": "rbf_kernel"}` calls the function. So the schema is held against the list first,
name by name and for its purpose, and nothing is unpacked that would not fit. The private functions of skops below are what
its `load` consists of; the version of skops is pinned.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, override

import numpy as np
from numpy.lib import format as npy

from app.errors import LoadFailed, TooLarge, UntrustedType
from app.loading import allowlist, soundness
from app.loading.pickles import MAX_ODD_KEYS, MAX_UNTRUSTED, refusal
from app.loading.reconstruction import FINISH, MAX_RANGE, check_sizes
from app.loading.source import default_limit

BYTES_PER_ENTRY = 1024  # what zipfile makes of an entry of its directory
BYTES_PER_ITEM = 96  # what json and skops make of a bracket or comma, at the least
MAX_DIGITS = 25  # of a float, its point, sign and exponent among them
HEADER_BYTES = 2**16  # of an array; numpy reads none of more than 10,000
END_OF_DIRECTORY = b"PK\x05\x06"


def load(stream: io.BufferedReader, *, trusted: frozenset[str] = frozenset(), max_bytes: int | None = None) -> Any:
    """Return the object in `stream`, a whole archive from its beginning; the arguments and errors are `unpickle`'s."""
    from skops.io._audit import audit_tree, get_tree
    from skops.io._utils import read_schema
    from skops.io.exceptions import UntrustedTypesFoundException

    size = stream.seek(0, io.SEEK_END)
    max_bytes = default_limit(size) if max_bytes is None else max_bytes
    _check_directory(stream, size, max_bytes)
    with _Archive(stream, max_bytes) as archive:
        schema, context = read_schema(archive)
        names = sorted(_check_schema(schema, trusted))
        tree = get_tree(schema, context, trusted=names)
        try:
            audit_tree(tree, trusted=names)
        except UntrustedTypesFoundException as error:  # a method, which has no node of its own
            raise UntrustedType(" ".join(str(error).split())) from error
        _place_arrays(tree, archive.arrays)
        _check_trees(tree)
        value = tree.construct()
    soundness.check(value, trusted=trusted)
    return value


def _place_arrays(root: Any, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    """Give each node of an array the one that was read for it, which it would make from bytes otherwise."""
    from skops.io._utils import gettype

    for node in _tree_nodes(root, "NdArrayNode"):
        if node.type == "numpy":
            array = arrays[int(node.buffer.getvalue())]
            full = f"{node.module_name}.{node.class_name}"
            node._constructed = array if full == "numpy.ndarray" else gettype(node.module_name, node.class_name)(array)


def _check_trees(root: Any) -> None:
    """Look at the sizes that trees are made with, before one is: compiled code goes by them at once."""
    for node in _tree_nodes(root, "TreeNode"):
        check_sizes(*node.args.construct())  # which is what it will be made with


def _tree_nodes(root: Any, kind: str) -> Iterator[Any]:
    """Yield the nodes of a kind below `root`."""
    seen: set[int] = set()
    rest = [root]
    while rest:
        item = rest.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if type(item).__name__ == kind:
            yield item
        inner = getattr(item, "children", item)
        if isinstance(inner, (dict, list)):
            rest.extend(inner.values() if isinstance(inner, dict) else inner)


def _check_directory(stream: IO[bytes], size: int, max_bytes: int) -> None:
    """Refuse a directory that zipfile would fill the memory with: it reads it whole, before it can be asked anything."""
    stream.seek(max(0, size - 65_557))  # the record of 22 bytes, and the longest comment behind it
    tail = stream.read()
    record = tail[tail.rfind(END_OF_DIRECTORY) :]
    if not record.startswith(END_OF_DIRECTORY) or len(record) < 22:
        raise LoadFailed("is no zip archive, which a skops file is")
    length = int.from_bytes(record[12:16], "little")
    length = size if length == 0xFFFFFFFF else length  # it is in the record for large archives, and at most all
    if length // 46 * BYTES_PER_ENTRY > max_bytes:
        raise LoadFailed(f"has a directory of {length:,} bytes, of which {length // 46:,} entries could be made")
    stream.seek(0)


class _Archive(zipfile.ZipFile):
    """An archive that unpacks no more than `max_bytes`, and nothing but a schema and arrays."""

    def __init__(self, stream: io.BufferedReader, max_bytes: int) -> None:
        super().__init__(stream)
        self._left = max_bytes
        self.arrays: list[np.ndarray[Any, Any]] = []

    @override
    def read(self, name: Any, pwd: bytes | None = None) -> bytes:
        """Return the bytes of an entry. skops calls this for each of its nodes, before it looks at any.

        Arrays are read straight into their place among `arrays`, and what is returned is which one it is: all of them beside
        the bytes that they are made of would be the archive twice in memory.
        """
        if type(name) is not str:
            raise LoadFailed(f"names a file of it by a {type(name).__name__}")
        info = self.getinfo(name)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise LoadFailed("is compressed in a way that cannot be stopped: save it stored or deflated")
        self._take(info.file_size, name)
        if name.endswith(".npy"):
            with self.open(info) as part:
                _check_array(part, info.file_size, name)
                part.seek(0)
                self.arrays.append(npy.read_array(part, allow_pickle=False))
            return str(len(self.arrays) - 1).encode("ascii")
        with self.open(info) as part:
            body = part.read(info.file_size)  # asked for everything, it would unpack what comes after that as well
        if name == "schema.json":
            self._take(BYTES_PER_ITEM * sum(body.count(mark) for mark in (b"[", b"{", b",")), name)
        elif name.endswith(".npz"):
            self._check_matrix(body, name)
        elif not name.endswith(".bin"):
            raise LoadFailed(f"has a file {name!r:.100}, which is none of skops'")
        return body

    def _take(self, count: int, name: str) -> None:
        self._left -= count
        if self._left < 0:
            raise TooLarge(f"becomes larger than it may with its {name!r:.100}, of {count:,} bytes")

    def _check_matrix(self, body: bytes, name: str) -> None:
        _check_directory(io.BytesIO(body), len(body), self._left)
        with zipfile.ZipFile(io.BytesIO(body)) as inner:
            for info in inner.infolist():
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or not info.filename.endswith(
                    ".npy"
                ):
                    raise LoadFailed(f"has {name!r:.100} that is no sparse matrix")
                self._take(info.file_size, name)
                self._take(info.file_size, name)  # as the bytes, and as the array that is made of them
                with inner.open(info) as part:
                    _check_array(part, info.file_size, name)


def _check_array(body: IO[bytes], size: int, name: str) -> None:
    """Refuse a header that promises another array than there is, or that is itself longer than any is."""
    head = io.BytesIO(body.read(min(size, HEADER_BYTES)))
    version = npy.read_magic(head)
    shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(head)
    left = size - head.tell()
    count = math.prod(shape)
    if dtype.hasobject or (count and not dtype.itemsize) or count * dtype.itemsize != left:
        raise LoadFailed(f"has {name!r:.100} with {left:,} bytes for {count:,} times {dtype.itemsize}")


def _check_schema(schema: Any, trusted: frozenset[str]) -> set[str]:
    """Hold every node against the list; return the names of all. Raises `UntrustedType`, `LoadFailed`.

    What scipy's distributions consist of is cut out: skops would run the text that they keep their methods in.
    """
    if not isinstance(schema, dict) or schema.get("protocol") == 0:
        raise LoadFailed("was written by a skops that is too old: save it again with one of today")
    names = set(trusted)
    untrusted: list[str] = []
    nodes = _nodes(schema)
    _check_identities(nodes)
    for node in nodes:
        loader, module, name = (node.get(key) for key in ("__loader__", "__module__", "__class__"))
        if not isinstance(loader, str) or not isinstance(module, str) or not isinstance(name, str):
            raise LoadFailed("has a node without a type")
        full = f"{module}.{name}"
        if full in trusted or _fits(node, loader, full):
            names.add(full)
        elif full in allowlist.KINDS:
            raise LoadFailed(f"uses {full} as {loader[:100]}, which it is not for")
        elif len(untrusted) == MAX_UNTRUSTED:
            break
        elif (error := allowlist.missing(module, name)) is not None:
            raise error
        else:
            untrusted.append(full)
    if untrusted:
        raise UntrustedType(refusal(untrusted))
    return names


def _fits(node: dict[str, Any], loader: str, full: str) -> bool:
    """Whether a node uses a name of the list for what it is there. Raises `LoadFailed`."""
    kind, content = allowlist.KINDS.get(full), node.get("content")
    if loader == "ObjectNode" and full.startswith("scipy.stats.") and kind == "calls":
        node.update(_NOTHING)
        return True
    if loader == "ConstructorFromReduceNode" and full == "builtins.range":
        return _is_range(content)
    if loader not in _LOADERS or not _LOADERS[loader](full):
        return False
    if (check := _CHECKS.get(loader)) is not None and not check(node, full):
        raise LoadFailed(f"has a {full} with something else in it than skops writes")
    if loader == "DictNode" and not all(_is_node(kind, "TypeNode", _KEYS) for kind in node["key_types"]["content"]):
        raise LoadFailed("has a dict whose keys are neither texts nor numbers")
    if (odd := _count_odd_keys(node)) > MAX_ODD_KEYS:
        raise LoadFailed(f"has {odd:,} large numbers or tuples for keys")
    if loader == "PartialNode" and not (isinstance(content, dict) and _is_node(content.get("func"), "FunctionNode")):
        raise LoadFailed("has a partial function of something that is not one")
    return True


def _has_attributes(node: dict[str, Any], full: str) -> bool:
    """Whether an object gets attributes, none of which stands before what its class does, or nothing, or its own parts."""
    content: Any = node.get("content")
    if _is_node(content, "DictNode", frozenset({"builtins.dict"})) and isinstance(content["content"], dict):
        soundness.check_attributes(allowlist.resolve(full), content["content"])
        return full not in FINISH
    if _is_node(content, "JsonNode"):
        return bool(content["content"] == "null") and full not in FINISH
    return full in FINISH and _is_node(content, "TupleNode", frozenset({"builtins.tuple"}))


def _has_numbers(node: dict[str, Any], full: str) -> bool:
    """Whether a loss is made of one number, or of none."""
    parts = _arguments(node)
    numbers = [json.loads(part["content"]) for part in parts if _is_node(part, "JsonNode")]
    return len(parts) == len(numbers) <= 1 and all(type(number) in (int, float) for number in numbers)


def _has_tree(node: dict[str, Any], full: str) -> bool:
    """Whether a tree is made with three sizes, of which the second is an array; `_check_trees` looks at their values."""
    parts = _arguments(node)
    return (
        len(parts) == 3
        and _is_node(parts[0], "JsonNode")
        and _is_node(parts[1], "NdArrayNode", frozenset({"numpy.ndarray"}))
        and parts[1].get("type") == "numpy"
        and _is_node(parts[2], "JsonNode")
        and _is_node(node.get("content"), "DictNode")
    )


def _arguments(node: dict[str, Any]) -> list[Any]:
    arguments = node["__reduce__"]["args"]
    return list(arguments["content"]) if _is_node(arguments, "TupleNode", frozenset({"builtins.tuple"})) else [None]


def _has_generator(node: dict[str, Any], full: str) -> bool:
    """Whether it is one of those that estimators draw from; what a pool of seeds takes is the square of its size."""
    generator, seeds = (node["content"][part]["content"] for part in ("bit_generator", "seed_seq"))
    known = generator["bit_generator"]["content"] in ('"MT19937"', '"PCG64"')
    return known and bool(seeds["pool_size"]["content"] == "4")


_CHECKS: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "LossNode": _has_numbers,
    "ObjectNode": _has_attributes,
    "RandomGeneratorNode": _has_generator,
    "TreeNode": _has_tree,
}


def _is_node(node: Any, loader: str, names: frozenset[str] | None = None) -> bool:
    if not isinstance(node, dict) or node.get("__loader__") != loader:
        return False
    return names is None or f"{node.get('__module__')}.{node.get('__class__')}" in names


def _count_odd_keys(node: dict[str, Any]) -> int:
    """Return how many keys of a dictionary or a set could be made all alike to it, as `Reader.check_keys` says."""
    if node["__loader__"] == "DictNode":
        keys = zip(node["key_types"]["content"], node["content"], strict=True)
        return sum(kind["__class__"] != "str" and len(key) > MAX_DIGITS for kind, key in keys)
    if node["__loader__"] == "SetNode":
        items = (item["content"] if _is_node(item, "JsonNode") else None for item in node["content"])
        return sum(not isinstance(item, str) or (len(item) > MAX_DIGITS and item[0] != '"') for item in items)
    return 0


def _is_range(content: Any) -> bool:
    """Whether these are the arguments of a range that a search goes through."""
    parts = content.get("content") if _is_node(content, "TupleNode", frozenset({"builtins.tuple"})) else None
    if not isinstance(parts, list) or not all(_is_node(part, "JsonNode") for part in parts):
        return False
    numbers = [json.loads(part["content"]) for part in parts]
    return len(numbers) == 3 and all(type(number) is int for number in numbers) and len(range(*numbers)) <= MAX_RANGE


_NOTHING = {"__loader__": "JsonNode", "__module__": "builtins", "__class__": "str", "content": "null"}


def _nodes(schema: Any) -> list[dict[str, Any]]:
    """Return every node of a schema, none before the one that it is in."""
    nodes = []
    rest = [schema]
    while rest:
        item = rest.pop()
        if isinstance(item, dict) and "__loader__" in item:
            nodes.append(item)
        inner = item.values() if isinstance(item, dict) else item
        rest.extend(part for part in inner if isinstance(part, (dict, list)))
    return nodes


def _check_identities(nodes: list[dict[str, Any]]) -> None:
    """Refuse nodes that skops would take for others.

    It writes an object out wherever it is, and makes it once, of one of the nodes with its `__id__`. If these are all alike,
    what is found in a node is what will be made of it, and no object can be in itself, or become larger than the file. The
    attributes of an object are no object that others could share: they were looked at as its own.
    """
    outlines: dict[Any, int] = {}  # all that there are, and their numbers
    drawn: dict[int, int] = {}  # the number of a node's outline, by its address
    for node in reversed(nodes):
        drawn[id(node)] = outlines.setdefault(_outline(node, drawn), len(outlines) + 1)
    known: dict[Any, int] = {}
    owners: dict[Any, set[Any]] = {}
    seen, owned = Counter(node.get("__id__") for node in nodes), Counter[Any]()
    for node in nodes:
        identity, content = node.get("__id__"), node.get("content")
        if identity is not None and known.setdefault(identity, drawn[id(node)]) != drawn[id(node)]:
            raise LoadFailed("has two objects where it says that they are the same")
        if node["__loader__"] == "ObjectNode" and isinstance(content, dict) and not _is_node(content, "JsonNode"):
            owned[content.get("__id__")] += 1
            owners.setdefault(content.get("__id__"), set()).add(identity)
    owned.pop(None, None)
    if any(len(owners[attributes]) > 1 or count != seen[attributes] for attributes, count in owned.items()):
        raise LoadFailed("has the attributes of an object in another place")


def _outline(item: Any, drawn: dict[int, int]) -> Any:
    """Return what is in a node, but for what it is called: identities, and names of files, are others in every copy."""
    if isinstance(item, dict):
        named = ("__id__", "file") if "__loader__" in item else ()
        parts = ((key, value) for key, value in item.items() if key not in named)
        return tuple((key, drawn.get(id(value)) or _outline(value, drawn)) for key, value in parts)
    if isinstance(item, list):
        return tuple(drawn.get(id(value)) or _outline(value, drawn) for value in item)
    return repr(item)


_KEYS = frozenset({"builtins.str", "builtins.int", "builtins.float", "builtins.bool"}) | {
    name for name, kind in allowlist.KINDS.items() if kind == "values" and name.startswith(("numpy.int", "numpy.uint"))
}


def _only(*names: str) -> Callable[[str], bool]:
    return lambda name: name in names


def _is_value(name: str) -> bool:
    return allowlist.KINDS.get(name) == "values"


_NUMBER = re.compile(r"numpy\.(bool_?|u?int\d+|float\d+|longdouble|complex\d+|str_|datetime64|timedelta64)")

# What may be named for what.
_LOADERS: dict[str, Callable[[str], bool]] = {
    "BytearrayNode": _only("builtins.bytearray"),
    "BytesNode": _only("builtins.bytes"),
    "DTypeNode": _only("numpy.dtype"),
    "DictNode": _only("builtins.dict", "sklearn.utils._bunch.Bunch"),
    "FunctionNode": _is_value,
    "JsonNode": _only("builtins.str"),
    "ListNode": _only("builtins.list"),
    "LossNode": lambda name: (
        name.startswith(("sklearn._loss._loss.Cy", "sklearn.linear_model._sgd_fast.")) and name in allowlist.KINDS
    ),
    "MaskedArrayNode": _only("numpy.ma.MaskedArray"),
    "NdArrayNode": lambda name: name == "numpy.ndarray" or (_is_value(name) and _NUMBER.fullmatch(name) is not None),
    "ObjectNode": lambda name: allowlist.KINDS.get(name) == "instances",
    "PartialNode": _only("functools.partial"),
    "RandomGeneratorNode": _only("numpy.random._generator.Generator"),
    "RandomStateNode": _only("numpy.random.mtrand.RandomState"),
    "SetNode": _only("builtins.set"),
    "SliceNode": _only("builtins.slice"),
    "SparseMatrixNode": lambda name: name.startswith("scipy.sparse.") and name in allowlist.KINDS,
    "TreeNode": _only("sklearn.tree._tree.Tree"),
    "TupleNode": _only("builtins.tuple", "sklearn.impute._iterative._ImputerTriplet"),
    "TypeNode": _is_value,
}
