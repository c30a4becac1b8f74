"""Files that would run something, fill the memory, or end the process, if they were read as their format allows.

Each is made by a function of a `Canary`, which tells afterwards whether anything in it has run.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import skops.io
from numpy.lib import format as npy
from scipy import sparse
from sklearn.cluster import Birch, BisectingKMeans, KMeans
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
)
from sklearn.feature_extraction import DictVectorizer, FeatureHasher
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.feature_selection import SelectFromModel
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import KFold
from sklearn.neighbors import KernelDensity, KNeighborsClassifier, RadiusNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, SplineTransformer
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils import Bunch

from app.loading.archives import _nodes


@dataclass(frozen=True)
class Canary:
    """What shows that something has run: a file that is there, or somebody who has called at a port."""

    path: Path
    port: int

    @property
    def command(self) -> str:
        return f"touch {self.path}"

    @property
    def source(self) -> str:
        return f"open({str(self.path)!r}, 'w').close()"


@dataclass(frozen=True)
class Hostile:
    """A format, what makes a file of it, and what the refusal says."""

    format: str
    make: Callable[[Canary], bytes]
    says: str


CORPUS: dict[str, Hostile] = {}


def case(name: str, says: str, format: str = "pickle") -> Callable[[Callable[[Canary], bytes]], None]:
    def add(make: Callable[[Canary], bytes]) -> None:
        assert name not in CORPUS
        CORPUS[name] = Hostile(format, make, says)

    return add


# A pickle by hand

HEAD, STOP = b"\x80\x04", b"."
TEN_GB = 10**10
BOMB_BYTES = 3 * 2**24  # what files of a few KB become; they are read with less allowed than that
LARGE_BOMB_BYTES = 2**27  # to be seen where nothing is said of it


def text(value: str) -> bytes:
    body = value.encode()
    return b"X" + struct.pack("<I", len(body)) + body


def number(value: int) -> bytes:
    body = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(body)]) + body


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def item(value: Any) -> bytes:
    """Return the operations that make a value, without the memo, so that they can stand anywhere."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 4)
    pickler.fast = True
    pickler.dump(value)
    operations = buffer.getvalue()[2:-1]
    return operations[9:] if operations.startswith(pickle.FRAME) else operations


def called(function: bytes, *arguments: Any) -> bytes:
    """Return a call; an argument in bytes is the operations that make it."""
    made = (argument if isinstance(argument, bytes) else item(argument) for argument in arguments)
    return function + b"(" + b"".join(made) + b"tR"


def file(*operations: bytes) -> bytes:
    return HEAD + b"".join(operations) + STOP


class Reduced:
    """Becomes a call in a pickle."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


# Calls of what does harm


def calls(module: str, name: str, *arguments: Callable[[Canary], Any]) -> None:
    @case(f"{module}.{name}", rf"uses {module}\.{name}(, [\w.]+)?, which (is|are) not trusted")
    def make(canary: Canary) -> bytes:
        return file(called(named(module, name), *(argument(canary) for argument in arguments)))


def command(canary: Canary) -> str:
    return canary.command


def source(canary: Canary) -> str:
    return canary.source


def path(canary: Canary) -> str:
    return str(canary.path)


def writing(canary: Canary) -> str:
    return "w"


def address(canary: Canary) -> str:
    return f"http://127.0.0.1:{canary.port}/"


def stolen(canary: Canary) -> bytes:
    return pickle.dumps(Reduced(eval, canary.source))


for module, name, *arguments in [
    ("os", "system", command),
    ("posix", "system", command),
    ("nt", "system", command),
    ("os", "popen", command),
    ("subprocess", "getoutput", command),
    ("subprocess", "Popen", lambda canary: ["touch", str(canary.path)]),
    ("subprocess", "check_output", lambda canary: ["touch", str(canary.path)]),
    ("pty", "spawn", lambda canary: ["touch", str(canary.path)]),
    ("builtins", "eval", source),
    ("builtins", "exec", source),
    ("builtins", "compile", source, lambda canary: "x", lambda canary: "exec"),
    ("builtins", "__import__", lambda canary: "antigravity"),
    ("builtins", "open", path, writing),
    ("builtins", "breakpoint"),
    ("builtins", "map", lambda canary: named("os", "system"), lambda canary: [canary.command]),
    ("builtins", "type"),
    ("builtins", "setattr"),
    ("io", "open", path, writing),
    ("_io", "FileIO", path, writing),
    ("pathlib", "Path.touch"),
    ("shutil", "rmtree", path),
    ("importlib", "import_module", lambda canary: "antigravity"),
    ("runpy", "run_path", path),
    ("code", "InteractiveInterpreter"),
    ("timeit", "timeit", source),
    ("timeit", "main"),
    ("cProfile", "run", source),
    ("pdb", "run", source),
    ("trace", "Trace"),
    ("ctypes", "CDLL", path),
    ("ctypes.util", "find_library", lambda canary: "c"),
    ("socket", "create_connection", lambda canary: ("127.0.0.1", canary.port)),
    ("urllib.request", "urlopen", address),
    ("webbrowser", "open", address),
    ("http.client", "HTTPConnection", lambda canary: "127.0.0.1"),
    ("multiprocessing", "Process"),
    ("threading", "Thread"),
    ("types", "FunctionType"),
    ("types", "CodeType"),
    ("types", "ModuleType", lambda canary: "os"),
    ("copyreg", "__newobj__", lambda canary: named("subprocess", "Popen"), lambda canary: canary.command),
    ("copyreg", "__newobj_ex__", lambda canary: named("subprocess", "Popen")),
    ("copyreg", "add_extension", lambda canary: "os", lambda canary: "system", lambda canary: 1),
    ("sys", "modules.get", lambda canary: "os"),
    ("sys", "setrecursionlimit", lambda canary: 10**9),
    ("marshal", "loads", lambda canary: item(b"\x00")),
    ("pickle", "loads", lambda canary: item(stolen(canary))),
    ("_pickle", "loads", lambda canary: item(stolen(canary))),
    ("shelve", "open", path),
    ("logging.config", "fileConfig", path),
    ("functools", "reduce"),
    ("functools", "partialmethod"),
    ("operator", "attrgetter", lambda canary: "__globals__"),
    ("operator", "methodcaller", lambda canary: "system"),
    ("collections", "defaultdict", lambda canary: named("os", "getpid")),
    ("joblib", "load", path),
    ("joblib.numpy_pickle", "load", path),
    ("joblib.numpy_pickle", "load_temporary_memmap", path),
    ("joblib.memory", "Memory", path),
    ("joblib.parallel", "Parallel"),
    ("numpy", "load", path),
    ("numpy", "save", path, lambda canary: 1),
    ("numpy", "fromfile", path),
    ("numpy.lib.format", "open_memmap", path, lambda canary: "w+"),
    ("numpy._core.records", "fromfile", path),
    ("numpy", "loadtxt", address),
    ("numpy", "genfromtxt", address),
    ("numpy", "frompyfunc", lambda canary: named("os", "system"), lambda canary: 1, lambda canary: 1),
    ("numpy", "apply_along_axis"),
    ("numpy.lib._datasource", "DataSource"),
    ("numpy.lib._datasource", "open", address),
    ("numpy.lib.npyio", "DataSource"),
    ("numpy.testing", "measure", source),
    ("numpy.testing", "rundocs", path),
    ("numpy.testing", "runstring", source, lambda canary: {}),
    ("numpy.testing._private.utils", "runstring", source, lambda canary: {}),
    ("numpy.testing._private.utils", "rundocs", path),
    ("numpy.f2py", "compile", source),
    ("numpy.f2py.crackfortran", "myeval", source),
    ("numpy.f2py.capi_maps", "load_f2cmap_file", path),
    ("numpy._core.tests.test_multiarray", "runstring", source),
    ("scipy._lib._testutils", "check_free_memory"),
    ("scipy.io", "loadmat", path),
    ("scipy.linalg._testutils", "exec"),
    ("scipy.stats._distn_infrastructure", "rv_generic"),
    ("sklearn.datasets._base", "load_files", path),
    ("sklearn.datasets._base", "_fetch_remote"),
    ("sklearn.datasets._openml", "fetch_openml"),
    ("sklearn.utils._testing", "assert_run_python_script_without_output", source),
    ("sklearn.utils._testing", "_delete_folder", path),
    ("sklearn.utils._mocking", "CheckingClassifier"),
    ("sklearn.utils._show_versions", "_get_deps_info"),
    ("sklearn.utils.validation", "check_memory", path),
    ("sklearn.externals.array_api_compat.common._helpers", "importlib"),
    ("sklearn.callback._progressbar", "ProgressBar"),
    ("pandas", "read_pickle", path),
    ("pandas", "eval", source),
    ("pandas.io.pickle", "read_pickle", path),
    ("pandas.core.computation.eval", "eval", source),
    ("torch", "load", path),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("dill._dill", "_create_function"),
    ("cloudpickle.cloudpickle", "_make_function"),
    ("skops.io", "load", path),
    ("yaml", "unsafe_load", lambda canary: "!!python/object/apply:os.system ['touch x']"),
    # Names with dots, and modules that are attributes of others
    ("sklearn.base", "os.system", command),
    ("sklearn.linear_model._logistic", "os.system", command),
    ("sklearn.linear_model._logistic", "LogisticRegression.fit.__globals__"),
    ("sklearn.linear_model._logistic", "LogisticRegression.__init__.__builtins__"),
    ("sklearn.utils.validation", "check_array.__globals__.get"),
    ("numpy", "os.system", command),
    ("numpy", "ndarray.tofile"),
    ("numpy.testing", "os.system", command),
    ("app.settings", "load_settings"),
    ("tests.hostile", "Reduced"),
]:
    calls(module, name, *arguments)


@case("a call within the objects of an array", r"uses posix\.system", "joblib")
def _(canary: Canary) -> bytes:
    import os

    model = LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0])
    model.coef_ = np.array([Reduced(os.system, canary.command), None], dtype=object)
    return dumped(model)


@case("a call within the objects of an array in a plain pickle", r"uses builtins\.eval")
def _(canary: Canary) -> bytes:
    return pickle.dumps(np.array([[Reduced(eval, canary.source)]], dtype=object), 2)


@case("a call as a parameter of an estimator", r"uses builtins\.exec", "joblib")
def _(canary: Canary) -> bytes:
    return dumped(LogisticRegression(C=Reduced(exec, canary.source)))


@case("a call for the state of an estimator", r"uses posix\.system")
def _(canary: Canary) -> bytes:
    empty = named("sklearn.linear_model._logistic", "LogisticRegression") + b")\x81"
    return file(empty, called(named("posix", "system"), canary.command), b"b")


@case("a call of what another call has given", "refers to the method 'fromhex' of float")
def _(canary: Canary) -> bytes:
    return file(called(called(named("builtins", "getattr"), named("builtins", "float"), "fromhex"), "0x1"))


@case("a call by the operation INST", r"uses os\.system")
def _(canary: Canary) -> bytes:
    return b"(S'" + canary.command.encode() + b"'\nios\nsystem\n."


@case("a call by the operation OBJ", r"uses os\.system")
def _(canary: Canary) -> bytes:
    return b"(cos\nsystem\nS'" + canary.command.encode() + b"'\no."


@case("a call by the operation NEWOBJ_EX", r"uses subprocess\.Popen")
def _(canary: Canary) -> bytes:
    return file(named("subprocess", "Popen"), item((["touch", str(canary.path)],)), item({}), b"\x92")


@case("a call in protocol 0", r"uses posix\.system")
def _(canary: Canary) -> bytes:
    import os

    return pickle.dumps(Reduced(os.system, canary.command), 0)


@case("several names that are not trusted", r"uses os\.system, builtins\.eval, my_package\.Clip, which are not trusted")
def _(canary: Canary) -> bytes:
    parts = [
        called(named(*name), canary.command)
        for name in (("os", "system"), ("builtins", "eval"), ("my_package", "Clip"))
    ]
    return file(*parts, b"\x87")


@case("a hundred thousand names that are not trusted", r"uses my\.c0, my\.c1, .*and 90 more, which are not trusted")
def _(canary: Canary) -> bytes:
    return file(*(named("my", f"c{place}") + b"0" for place in range(100_000)), b"N")


@case("skops: ten thousand names that are not trusted", r"uses my\.c.*and 90 more, which are not trusted", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(list_node(*(node("ObjectNode", f"my.c{place}") for place in range(10_000))))


# Harm with what is allowed


@case("a function of the list is called", "calls rbf_kernel, which a model may have, but nothing may call")
def _(canary: Canary) -> bytes:
    return file(called(named("sklearn.metrics.pairwise", "rbf_kernel"), [[1.0]] * 1000))


@case("a ufunc is called", "calls add, which a model may have")
def _(canary: Canary) -> bytes:
    return file(called(named("numpy", "add"), 1, 2))


@case("an estimator's constructor is called", "makes a LogisticRegression with arguments|calls LogisticRegression")
def _(canary: Canary) -> bytes:
    return file(called(named("sklearn.linear_model._logistic", "LogisticRegression")))


@case("an attribute of a function is set", "changes f_classif, which is complete")
def _(canary: Canary) -> bytes:
    function = named("sklearn.feature_selection._univariate_selection", "f_classif")
    return file(function, b"N", item({"__defaults__": (1, 2)}), b"\x86b")


@case("an attribute of a class is set", "changes RBF, which is complete")
def _(canary: Canary) -> bytes:
    return file(named("sklearn.gaussian_process.kernels", "RBF"), b"N", item({"theta": 0}), b"\x86b")


@case("an attribute of a module-level object is set", "changes float64, which is complete")
def _(canary: Canary) -> bytes:
    return file(named("numpy", "float64"), item({"x": 1}), b"b")


@case("state is given twice", "changes a StandardScaler, which is complete")
def _(canary: Canary) -> bytes:
    empty = named("sklearn.preprocessing._data", "StandardScaler") + b")\x81"
    return file(empty, item({"mean_": 1}), b"b", item({"mean_": 2}), b"b")


@case("a method is hidden by an attribute", "has a IsotonicRegression with a _build_f of its own")
def _(canary: Canary) -> bytes:
    model = IsotonicRegression().fit([0.0, 1.0], [0.0, 1.0])
    vars(model)["_build_f"] = np.exp
    return pickle.dumps(model)


@case("a constant that code goes by is hidden by an attribute", "has a SVC with a _impl of its own", "joblib")
def _(canary: Canary) -> bytes:
    model = SVC().fit(POINTS, CLASSES)
    vars(model)["_impl"] = "epsilon_svr"
    return dumped(model)


@case(
    "a method is hidden by an attribute, as skops has it",
    "has a IsotonicRegression with a _build_f of its own",
    "skops",
)
def _(canary: Canary) -> bytes:
    model = IsotonicRegression().fit([0.0, 1.0], [0.0, 1.0])
    vars(model)["_build_f"] = np.exp
    return skops.io.dumps(model)


@case("items are put into what is no collection", "puts items into a LogisticRegression")
def _(canary: Canary) -> bytes:
    return file(named("sklearn.linear_model._logistic", "LogisticRegression"), b")\x81", item("x"), item(1), b"s")


@case("a partial function of a class", "has a partial function of something that is not one")
def _(canary: Canary) -> bytes:
    return file(called(named("functools", "partial"), named("sklearn.linear_model._logistic", "LogisticRegression")))


@case("a partial function that becomes another", "has a partial function of something that is not one")
def _(canary: Canary) -> bytes:
    held = called(named("functools", "partial"), named("numpy", "log1p"))
    return file(held, b"(", named("builtins", "getattr"), item(()), b"NNtb")


@case("a partial function that is not trusted", r"uses os\.system, which is not trusted")
def _(canary: Canary) -> bytes:
    held = called(named("functools", "partial"), named("os", "system"))
    return file(held, b"(", named("os", "system"), item((canary.command,)), b"}Ntb")


@case("an array that is a file", "without anything in it|calls numpy.memmap, which")
def _(canary: Canary) -> bytes:
    return file(called(named("numpy", "memmap"), str(canary.path), "f8", "w+"))


@case("an array of a class that opens files", "something else in it|promises|class that is not numpy's", "joblib")
def _(canary: Canary) -> bytes:
    """joblib maps the files of others into memory, where it is told to: here they are arrays like all."""
    made = called(named("numpy._core.multiarray", "_reconstruct"), named("numpy", "memmap"), (0,), item(b"b"))
    return file(made, item((1, (10**9,), np.dtype("f8"), False, b"")), b"b")


@case("an object of another class than its base", "in a way that only protocols below 2 know")
def _(canary: Canary) -> bytes:
    kind = named("sklearn.linear_model._ridge", "Ridge")
    return file(called(named("copyreg", "_reconstructor"), kind, named("builtins", "int"), 1))


@case("the state of a module", r"uses os\.environ, which is not trusted")
def _(canary: Canary) -> bytes:
    return file(named("os", "environ"), item("PATH"), item(str(canary.path)), b"s")


@case("the state of what was called", r"uses os\.system")
def _(canary: Canary) -> bytes:
    return file(called(named("os", "system"), canary.command), item({"x": 1}), b"b")


@case("a method of an object", "refers to the method 'tofile' of a ndarray: name a function of a module")
def _(canary: Canary) -> bytes:
    return file(called(named("builtins", "getattr"), item(np.zeros(2)), "tofile"))


@case("the text that a distribution makes its methods of", "")
def _(canary: Canary) -> bytes:
    """A distribution's `__setstate__` runs `_parse_arg_template`. Ours is read, and the text thrown away."""
    empty = named("scipy.stats._continuous_distns", "uniform_gen") + b")\x81"
    return file(empty, item({"_parse_arg_template": canary.source}), b"b")


@case("the text that a distribution makes its methods of, as skops has it", "", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(
        node(
            "ObjectNode",
            "scipy.stats._continuous_distns.uniform_gen",
            content=dict_node(_parse_arg_template=canary.source),
        )
    )


@case("an encoding that names a module", "encodes a text")
def _(canary: Canary) -> bytes:
    return file(called(named("_codecs", "encode"), "x", "antigravity"))


@case("a reference to objects of its writer", "refers to objects of its writer")
def _(canary: Canary) -> bytes:
    return b"Pmodule os\n."


@case("a reference to objects of its writer, on the stack", "refers to objects of its writer")
def _(canary: Canary) -> bytes:
    return file(item("module os"), b"Q")


@case("a reference to a registry", "refers to a registry of its writer")
def _(canary: Canary) -> bytes:
    return file(b"\x82\x01")


@case("a reference to a registry, in two bytes", "refers to a registry of its writer")
def _(canary: Canary) -> bytes:
    return file(b"\x83\x01\x01")


@case("a reference to a registry, in four bytes", "refers to a registry of its writer")
def _(canary: Canary) -> bytes:
    return file(b"\x84\x01\x01\x01\x01")


@case("a reference to buffers", "refers to buffers of its writer")
def _(canary: Canary) -> bytes:
    return b"\x80\x05\x97."


# Memory


@case("a place far away in the memo", "")
def _(canary: Canary) -> bytes:
    """Ten bytes for which the interpreter in C takes 32 GB."""
    return file(b"Nr\xff\xff\xff\x7f")


@case("a text of 10 GB", "promises 10,000,000,000 bytes where")
def _(canary: Canary) -> bytes:
    return HEAD + b"\x8d" + struct.pack("<Q", TEN_GB) + b"abc."


@case("bytes of 10 GB", "promises 10,000,000,000 bytes where")
def _(canary: Canary) -> bytes:
    return HEAD + b"\x8e" + struct.pack("<Q", TEN_GB) + b"abc."


@case("a byte array of 10 GB", "promises 10,000,000,000 bytes where")
def _(canary: Canary) -> bytes:
    return HEAD + b"\x96" + struct.pack("<Q", TEN_GB) + b"abc."


@case("a number of 2 GB", "promises 2,147,483,647 bytes where")
def _(canary: Canary) -> bytes:
    return HEAD + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc."


@case("a number of ten million digits", "Exceeds the limit")
def _(canary: Canary) -> bytes:
    return b"L" + b"9" * 10_000_000 + b"L\n."


@case("a frame of 4 EB", "ends in the middle")
def _(canary: Canary) -> bytes:
    return HEAD + b"\x95" + struct.pack("<Q", 2**62) + b"N"


@case("millions of empty sets", "takes more memory than the [0-9,]+ bytes")
def _(canary: Canary) -> bytes:
    return file(b"\x8f" * 1_000_000)


@case("a list of lists of lists, which are the same ten", "the same objects in so many places")
def _(canary: Canary) -> bytes:
    return file(*(b"]\x94(" + (b"h" + bytes([level - 1]) if level else b"N") * 10 + b"e" for level in range(40)))


@case("pipelines of pipelines, which are the same two", "the same objects in so many places")
def _(canary: Canary) -> bytes:
    held: Any = make_pipeline(LinearRegression().fit([[0.0]], [0.0]))
    for _level in range(30):
        held = make_pipeline(held, held)
    return pickle.dumps(held)


@case("a range of a trillion", "has a range of more than 100,000")
def _(canary: Canary) -> bytes:
    return file(called(named("builtins", "range"), 0, number(10**12), 1))


@case("a set of a range", "makes a set of a range")
def _(canary: Canary) -> bytes:
    return file(called(named("builtins", "set"), called(named("builtins", "range"), 0, 1000, 1)))


@case("bytes by their number", "takes 1 positional argument")
def _(canary: Canary) -> bytes:
    return file(called(named("builtins", "bytes"), number(TEN_GB)))


@case("a header of 10 GB before an array", "promises [0-9,]+ bytes where", "joblib")
def _(canary: Canary) -> bytes:
    return dumped(np.zeros(1000)).replace(item(1000), number(TEN_GB // 8), 1)


@case("a header of 10 GB before an array, compressed", "is compressed and becomes more than the", "joblib")
def _(canary: Canary) -> bytes:
    return zlib.compress(dumped(np.zeros(1000)).replace(item(1000), number(TEN_GB // 8), 1))


@case("an array of a trillion times nothing", "has an array of 1,000,000,000,000 times nothing")
def _(canary: Canary) -> bytes:
    return array_of(b"", "U0", (10**12,))


@case("an array whose shape is not its content", "with something else in it")
def _(canary: Canary) -> bytes:
    return array_of(bytes(8), "f8", (10**9,))


@case("an array of a negative shape", r"has an array of shape \(-1,\)")
def _(canary: Canary) -> bytes:
    return array_of(bytes(8), "f8", (-1,))


def bomb(pack: Callable[[bytes], bytes]) -> Callable[[Canary], bytes]:
    def make(canary: Canary) -> bytes:
        return pack(HEAD + b"(B" + struct.pack("<I", BOMB_BYTES) + bytes(BOMB_BYTES) + b"t.")

    return make


def bomb_of_many(pack: Callable[[bytes], bytes]) -> Callable[[Canary], bytes]:
    """It never promises much, and never ends."""

    def make(canary: Canary) -> bytes:
        one = b"B" + struct.pack("<I", 2**20) + bytes(2**20)
        return pack(HEAD + b"(" + one * (BOMB_BYTES // 2**20) + b"t.")

    return make


for name, pack in {
    "zlib": lambda body: zlib.compress(body, 9),
    "gzip": lambda body: gzip.compress(body, 9),
    "bz2": lambda body: bz2.compress(body, 9),
    "xz": lambda body: lzma.compress(body, preset=1),
    "lzma": lambda body: lzma.compress(body, lzma.FORMAT_ALONE, preset=1),
}.items():
    case(f"zeros by {name}", "becomes more than the 33,554,432 bytes that it may take here", "joblib")(bomb(pack))
    case(f"zeros by {name}, a megabyte at a time", "becomes more than the|takes more memory", "joblib")(
        bomb_of_many(pack)
    )


@case("a gigabyte of zeros by zlib", "becomes more than the", "joblib")
def _(canary: Canary) -> bytes:
    """Each flush leaves blocks that stand for themselves: the same ones again and again."""
    packer = zlib.compressobj(9)
    head = packer.compress(HEAD + b"(B" + struct.pack("<I", 2**30)) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + zeros * 1024


@case("ten gigabytes of dictionaries by zlib", "becomes more than the|takes more memory", "joblib")
def _(canary: Canary) -> bytes:
    packer = zlib.compressobj(9)
    head = packer.compress(HEAD) + packer.flush(zlib.Z_FULL_FLUSH)
    dictionaries = packer.compress(b"}" * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + dictionaries * 1024


@case("an xz file that wants a dictionary of 1.5 GB", "LZMAError", "joblib")
def _(canary: Canary) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**26}]
    body = bytearray(lzma.compress(dumped([1]), filters=filters, check=lzma.CHECK_NONE))
    place = body.index(b"\x21\x01") + 2  # the filter's property, which is the size
    body[place] = 39  # 3 GB
    start = 12
    length = (body[start] + 1) * 4
    body[start + length - 4 : start + length] = struct.pack("<I", zlib.crc32(bytes(body[start : start + length - 4])))
    return bytes(body)


@case("joblib's format of 2014", "written by joblib before 0.10", "joblib")
def _(canary: Canary) -> bytes:
    return b"ZF0x2a                 " + zlib.compress(dumped([1]))


@case("joblib's wrapper that opens a file", "has arrays in other files", "joblib")
def _(canary: Canary) -> bytes:
    wrapper = named("joblib.numpy_pickle", "NDArrayWrapper") + b")\x81"
    return file(wrapper, item({"filename": str(canary.path), "subclass": None, "allow_mmap": True}), b"b")


# The stack of the interpreter, and that of C


@case("tuples in tuples, a million deep, for a key", "has tuples in tuples, 65 deep")
def _(canary: Canary) -> bytes:
    """Its hash would end the process."""
    return file(b"}(", b")", b"\x85" * 1_000_000, b"K\x01u")


@case("lists in lists, a hundred thousand deep", "nested more than 100 deep")
def _(canary: Canary) -> bytes:
    return file(b"]" * 100_000, b"a" * 99_999)


@case("dictionaries in dictionaries, a hundred thousand deep", "nested more than 100 deep")
def _(canary: Canary) -> bytes:
    return file(b"}K\x01" * 100_000, b"N", b"s" * 100_000)


@case("tuples in tuples, a hundred thousand deep", "has tuples in tuples, 65 deep")
def _(canary: Canary) -> bytes:
    return file(b")", b"\x85" * 100_000)


@case("objects in objects, ten thousand deep", "nested more than 100 deep|RecursionError")
def _(canary: Canary) -> bytes:
    one = named("sklearn.utils._bunch", "Bunch") + b")\x81" + item("a")
    return file(one * 10_000, b"N", b"s" * 10_000)


ALIKE = 2**61 - 1  # a multiple of it has a hash of 0


@case("numbers that are all alike to a dictionary", "has more than 10,000 large numbers or tuples for keys")
def _(canary: Canary) -> bytes:
    """They would take as many steps as their square, for as long as no other thread could do any."""
    return file(b"}(", *(number(place * ALIKE) + b"N" for place in range(100_000)), b"u")


@case("numbers that are all alike to a set", "has more than 10,000 large numbers or tuples for keys")
def _(canary: Canary) -> bytes:
    return file(b"\x8f(", *(number(place * ALIKE) for place in range(100_000)), b"\x90")


@case("numbers that are all alike to a frozen set", "has more than 10,000 large numbers or tuples for keys")
def _(canary: Canary) -> bytes:
    return file(b"(", *(number(place * ALIKE) for place in range(100_000)), b"\x91")


@case("tuples that are all alike to a set of protocol 2", "has more than 10,000 large numbers or tuples for keys")
def _(canary: Canary) -> bytes:
    items = b"](" + b"".join(number(place * ALIKE) + b"\x85" for place in range(20_000)) + b"e"
    return file(called(named("builtins", "set"), items))


@case("numbers that are all alike to a dictionary of protocol 0", "has more than 10,000 large numbers or tuples")
def _(canary: Canary) -> bytes:
    return b"(" + b"".join(b"L%dL\nN" % (place * ALIKE) for place in range(20_000)) + b"d."


@case("skops: numbers that are all alike to a dictionary", "has 20,000 large numbers or tuples for keys", "skops")
def _(canary: Canary) -> bytes:
    held = dict_node(**{str((place + 10**12) * ALIKE): "1" for place in range(20_000)})
    held["key_types"]["content"] = [node("TypeNode", "builtins.int") for _ in held["content"]]
    return schema_of(held)


@case("skops: numbers that are all alike to a set", "has 20,000 large numbers or tuples for keys", "skops")
def _(canary: Canary) -> bytes:
    numbers = [node("JsonNode", "builtins.str", content=str((place + 10**12) * ALIKE)) for place in range(20_000)]
    return schema_of(node("SetNode", "builtins.set", content=numbers))


def rewritten(value: Any, change: Callable[[list[dict[str, Any]]], None]) -> bytes:
    """Return the archive of a value, with something changed in the nodes of its schema."""
    packed, body = io.BytesIO(), skops.io.dumps(value)
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            if name == "schema.json":
                schema = json.loads(part)
                change(_nodes(schema))
                part = json.dumps(schema).encode()
            new.writestr(name, part)
    return packed.getvalue()


def with_arguments(loader: str, place: int, argument: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(nodes: list[dict[str, Any]]) -> None:
        for held in nodes:
            if held.get("__loader__") == loader:
                held["__reduce__"]["args"]["content"][place] = argument

    return change


@case("skops: a tree of more outputs than it has classes for", "has a tree of 1000000000 outputs with classes", "skops")
def _(canary: Canary) -> bytes:
    """It would be made of what is in memory behind the classes."""
    model = DecisionTreeClassifier(random_state=0).fit(POINTS, CLASSES)
    return rewritten(model, with_arguments("TreeNode", 2, node("JsonNode", "builtins.str", content=str(10**9))))


@case("skops: a tree whose classes are no array", "with something else in it than skops writes", "skops")
def _(canary: Canary) -> bytes:
    model = DecisionTreeClassifier(random_state=0).fit(POINTS, CLASSES)
    return rewritten(model, with_arguments("TreeNode", 1, node("JsonNode", "builtins.str", content="[3]")))


@case("skops: a loss of a text", "with something else in it than skops writes", "skops")
def _(canary: Canary) -> bytes:
    model = GradientBoostingRegressor(loss="huber", n_estimators=1).fit(POINTS, POINTS[:, 0])
    return rewritten(model, with_arguments("LossNode", 0, text_node("x")))


@case("skops: attributes in a text", "with something else in it than skops writes", "skops")
def _(canary: Canary) -> bytes:
    """They would not be seen to stand before what the class does."""
    held = node("JsonNode", "builtins.str", content='{"_impl": "epsilon_svr"}')
    return schema_of(node("ObjectNode", "sklearn.svm._classes.SVC", content=held))


@case("skops: attributes in a list", "with something else in it than skops writes", "skops")
def _(canary: Canary) -> bytes:
    held = list_node(tuple_node(text_node("diag"), node("FunctionNode", "numpy.exp")))
    return schema_of(node("ObjectNode", "sklearn.gaussian_process.kernels.RBF", content=held))


@case("skops: a neighbour tree of attributes", "has a KDTree with a data of its own", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(node("ObjectNode", "sklearn.neighbors._kd_tree.KDTree", content=dict_node(data="1")))


@case("skops: a number that is a function of an array", "uses numpy.exp as NdArrayNode, which it is not for", "skops")
def _(canary: Canary) -> bytes:
    held = node("NdArrayNode", "numpy.exp", type="numpy", file="a.npy")
    return schema_of(held, {"a.npy": array_file((1,), "<f8", bytes(8))})


@case("skops: as many bytes as a number says", "uses numpy.void as NdArrayNode, which it is not for", "skops")
def _(canary: Canary) -> bytes:
    held = node("NdArrayNode", "numpy.void", type="numpy", file="a.npy")
    return schema_of(held, {"a.npy": array_file((), "<i8", struct.pack("<q", TEN_GB))})


def generator(name: str, pool: int) -> dict[str, Any]:
    seeds = node(
        "DictNode", "builtins.dict", content={"pool_size": node("JsonNode", "builtins.str", content=str(pool))}
    )
    state = dict_node(bit_generator=name)
    seeds["key_types"] = state["key_types"]
    content = {"bit_generator": state, "seed_seq": seeds}
    return node("RandomGeneratorNode", "numpy.random._generator.Generator", content=content)


@case("skops: a generator that nothing draws from", "with something else in it than skops writes", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(generator("Philox", 4))


@case("skops: seeds that take the square of a number", "with something else in it than skops writes", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(generator("PCG64", 10**6))


@case("skops: a range of a trillion", "uses builtins.range as ConstructorFromReduceNode", "skops")
def _(canary: Canary) -> bytes:
    parts = [node("JsonNode", "builtins.str", content=str(part)) for part in (0, 10**12, 1)]
    return schema_of(node("ConstructorFromReduceNode", "builtins.range", content=tuple_node(*parts)))


@case("skops: a node that says that it is another", "has two objects where it says that they are the same", "skops")
def _(canary: Canary) -> bytes:
    """The range would be made of what stands first in the list."""
    first, second = (
        tuple_node(*(node("JsonNode", "builtins.str", content=str(part)) for part in (0, stop, 1))) | {"__id__": 1}
        for stop in (10**12, 3)
    )
    return schema_of(list_node(first, node("ConstructorFromReduceNode", "builtins.range", content=second)))


@case("pipelines in pipelines, a thousand deep", "nested more than 100 deep")
def _(canary: Canary) -> bytes:
    one = named("sklearn.pipeline", "Pipeline") + b")\x81}" + item("steps") + b"](" + item("a")
    return file(one * 1000, b"N", b"\x86esb" * 1000)


@case("a list that contains itself", "has a list that contains itself")
def _(canary: Canary) -> bytes:
    held: list[Any] = []
    held.append(held)
    return pickle.dumps(held)


@case("a pipeline that contains itself", "has a Pipeline that contains itself")
def _(canary: Canary) -> bytes:
    held = make_pipeline(LinearRegression())
    held.steps.append(("again", held))
    return pickle.dumps(held)


@case("arrays in the objects of arrays of joblib's", "has an array within another's items", "joblib")
def _(canary: Canary) -> bytes:
    header = named("joblib.numpy_pickle", "NumpyArrayWrapper") + b")\x81"
    objects = item(np.dtype("O"))
    state = (
        b"}(" + item("subclass") + named("numpy", "ndarray") + item("shape") + item((1,)) + item("order") + item("C")
    )
    state += item("dtype") + objects + b"u"
    return (HEAD + header + state + b"b") * 100


# What is broken


@case("nothing but a beginning", "ends in the middle")
def _(canary: Canary) -> bytes:
    return HEAD


@case("no end", "ends in the middle")
def _(canary: Canary) -> bytes:
    return HEAD + b"N"


@case("half a model", "missing at the end|ends in the middle|promises [0-9,]+ bytes", "joblib")
def _(canary: Canary) -> bytes:
    body = dumped(forest())
    return body[: len(body) // 2]


@case("half a compressed model", "ends in the middle", "joblib")
def _(canary: Canary) -> bytes:
    body = dumped(forest(), compress=3)
    return body[: len(body) // 2]


@case("an empty stack", "IndexError")
def _(canary: Canary) -> bytes:
    return file()


@case("no pickle at all", "the bytes are no pickle")
def _(canary: Canary) -> bytes:
    return b"\x00\x01\x02\x03" * 100


@case("a protocol of the future", "unsupported pickle protocol: 200")
def _(canary: Canary) -> bytes:
    return b"\x80\xc8N."


@case("a type where an object should be", "has a type where an object should be")
def _(canary: Canary) -> bytes:
    return file(named("numpy", "ndarray"))


@case("what a header has left in the memo", "has a type where an object should be", "joblib")
def _(canary: Canary) -> bytes:
    body = dumped([np.zeros(3), 1.5])
    wrapper = body[: body.index(b"\x81\x94")].count(b"\x94")  # its place is the number of those before it
    return body.replace(item(1.5), b"h" + bytes([wrapper]))


# dtypes that lie: numpy would follow the numbers in the bytes as addresses of objects


def array_of(body: bytes, description: str, shape: tuple[int, ...], state: tuple[Any, ...] | None = None) -> bytes:
    """Return the pickle of an array with these parts."""
    made = called(named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), (0,), item(b"b"))
    dtype = (
        called(named("numpy", "dtype"), description, False, True)
        + item(state or np.dtype(description).__reduce__()[2])
        + b"b"
    )
    return file(made, b"(", item(1), item(shape), dtype, b"\x89", item(body), b"tb")


@case("a record with objects that denies them", "describes a record that no estimator has")
def _(canary: Canary) -> bytes:
    state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
    return array_of(struct.pack("<Q", 0x4141414141414141), "V8", (1,), state)


@case("a record whose field is beyond its end", "ValueError|contradicts itself")
def _(canary: Canary) -> bytes:
    state = (3, "|", None, ("a",), {"a": (np.dtype("f8"), 10**6)}, 8, 1, 0)
    return array_of(bytes(8), "V8", (1,), state)


@case("a text type that says it holds objects", "")
def _(canary: Canary) -> bytes:
    """The lie is passed over: the type is made anew of what it is called."""
    return array_of("abcde".encode("utf-32-le"), "U5", (1,), (3, "<", None, None, None, 20, 4, 63))


@case("a type that is larger than it says", "contradicts itself")
def _(canary: Canary) -> bytes:
    return array_of(bytes(20), "U5", (1,), (3, "<", None, None, None, 2**30, 4, 8))


@case("an array of objects in a buffer", "has an array of objects in a buffer")
def _(canary: Canary) -> bytes:
    dtype = item(np.dtype("O"))
    return file(called(named("numpy._core.numeric", "_frombuffer"), item(b"A" * 8), dtype, (1,), "C"))


@case("a number that is an object", "has a number that is not one")
def _(canary: Canary) -> bytes:
    dtype = item(np.dtype("O"))
    return file(called(named("numpy._core.multiarray", "scalar"), dtype, item(b"A" * 8)))


@case("an array whose content is replaced under another", "changes a ndarray, which is complete|with something else")
def _(canary: Canary) -> bytes:
    """A view of an array that is freed: `_frombuffer` takes bytes only, and an array gets its content once."""
    whole = item(np.zeros(100)) + b"q\xc8"
    again = b"(" + item(1) + item((100,)) + item(np.dtype("f8")) + b"\x89" + item(bytes(800)) + b"tb"
    return file(whole, again)


@case("a view of an array", "with something else in it")
def _(canary: Canary) -> bytes:
    whole = item(np.zeros(100))
    dtype = item(np.dtype("f8"))
    return file(called(named("numpy._core.numeric", "_frombuffer"), whole, dtype, (100,), "C"))


@case("a random state that reads beyond its numbers", "state position must be between 0 and 624")
def _(canary: Canary) -> bytes:
    state = np.random.RandomState(0)
    body = pickle.dumps(state, 4)
    return body.replace(b"pos\x94Mp\x02", b"pos\x94M\xff\xff")


# Numbers that compiled code follows


POINTS = np.random.default_rng(0).normal(size=(60, 4))
CLASSES = np.array(["a", "b", "c"])[np.random.default_rng(1).integers(0, 3, 60)]


def dumped(value: Any, compress: int = 0) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(value, buffer, compress=compress)
    return buffer.getvalue()


def forest() -> RandomForestClassifier:
    return RandomForestClassifier(5, random_state=0).fit(POINTS, CLASSES)


def spoilt(name: str, says: str, *formats: str) -> Callable[[Callable[[], Any]], None]:
    """Add a model in every format: to each it is the same."""

    def add(make: Callable[[], Any]) -> None:
        writers = {"joblib": dumped, "pickle": lambda value: pickle.dumps(value, 5), "skops": skops.io.dumps}
        for format in formats or writers:
            case(f"{name}, {format}", says, format)(lambda canary, write=writers[format]: write(make()))  # type: ignore[misc]

    return add


def with_nodes(estimator: Any, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Change the nodes of a fitted tree."""
    state = estimator.tree_.__getstate__()
    state["nodes"] = state["nodes"].copy()
    change(state["nodes"])
    estimator.tree_.__setstate__(state)


def put(field: str, value: int, index: int = 0) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(nodes: np.ndarray[Any, Any]) -> None:
        nodes[field][index] = value

    return change


for field, value, says in [
    ("left_child", 10**6, "a tree has a node whose children are elsewhere"),
    ("left_child", -2, "a tree has a node whose children are elsewhere"),
    ("right_child", 0, "a tree has a node whose children are elsewhere"),
    ("left_child", 0, "a tree has a node whose children are elsewhere"),
    ("feature", 10**6, "a tree splits by a feature beyond its 4"),
    ("feature", -1, "a tree splits by a feature beyond its 4"),
]:

    @spoilt(f"a tree whose root has {field} {value}", says)
    def _(field: str = field, value: int = value) -> Any:
        model = DecisionTreeClassifier(random_state=0).fit(POINTS, CLASSES)
        with_nodes(model, put(field, value))
        return model


@spoilt("a tree without nodes", "has no nodes|has a tree without|without anything in it|Wrong shape", "pickle")
def _() -> Any:
    model = DecisionTreeClassifier(random_state=0).fit(POINTS, CLASSES)
    state = model.tree_.__getstate__()
    model.tree_.__setstate__({**state, "nodes": state["nodes"][:0], "values": state["values"][:0], "node_count": 0})
    return model


@spoilt("a tree for more features than its estimator", "of 2 features has a tree of others")
def _() -> Any:
    model = DecisionTreeClassifier(random_state=0).fit(POINTS, CLASSES)
    model.n_features_in_ = 2
    return model


@spoilt("a forest with a tree of another", "a forest has trees for other features")
def _() -> Any:
    model = forest()
    model.estimators_[1] = DecisionTreeClassifier().fit(np.hstack([POINTS, POINTS]), np.zeros(60))
    return model


@spoilt("an isolation forest with a tree of another", "isolation forest has trees for other features")
def _() -> Any:
    model = IsolationForest(n_estimators=3, random_state=0).fit(POINTS)
    model.estimators_[1].n_features_in_ = 9
    return model


@spoilt("a boosting that begins with fewer outputs than it has trees", "a boosting begins with 1 outputs, of 3")
def _() -> Any:
    model = GradientBoostingClassifier(n_estimators=2, init="zero").fit(POINTS, CLASSES)
    model.n_trees_per_iteration_ = 1
    return model


@spoilt(
    "a boosting whose trees are no trees", "a boosting has trees for other features than it takes, or of other outputs"
)
def _() -> Any:
    model = GradientBoostingClassifier(n_estimators=2).fit(POINTS, CLASSES)
    model.estimators_[0, 0] = DecisionTreeClassifier().fit(POINTS, CLASSES)
    return model


def histogram() -> Any:
    table = np.column_stack([POINTS, np.arange(60) % 3])
    return HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=3, categorical_features=[4]).fit(table, CLASSES)


for field, value, says in [
    ("left", 2**31, "a tree has a node whose children are elsewhere"),
    ("right", 0, "a tree has a node whose children are elsewhere"),
    ("feature_idx", 10**9, "a tree splits by a feature beyond its 5"),
    ("feature_idx", -1, "a tree splits by a feature beyond its 5"),
]:

    @spoilt(f"a histogram tree whose root has {field} {value}", says)
    def _(field: str = field, value: int = value) -> Any:
        model = histogram()
        model._predictors[0][0].nodes[field][0] = value
        return model


@spoilt(
    "a histogram tree that splits by categories that there are not", "by a set of categories|categories of a feature"
)
def _() -> Any:
    model = histogram()
    nodes = model._predictors[0][0].nodes
    nodes["is_categorical"][0], nodes["bitset_idx"][0], nodes["feature_idx"][0] = 1, 10**6, 4
    return model


@spoilt("a histogram boosting for fewer features than its trees", "a boosting has categories for other features")
def _() -> Any:
    model = histogram()
    model.n_features_in_ = 2
    return model


def with_tree_state(model: Any, attribute: str, part: int, change: Callable[[Any], Any]) -> Any:
    """Change one part of the state of a neighbour tree."""
    tree = getattr(model, attribute)
    state = list(tree.__getstate__())
    state[part] = change(state[part].copy() if isinstance(state[part], np.ndarray) else state[part])
    tree.__setstate__(tuple(state))
    return model


def at(index: int, value: Any, field: str | None = None) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        (array if field is None else array[field])[index] = value
        return array

    return change


for algorithm in ("kd_tree", "ball_tree"):
    for name, part, change, says in [
        ("a point that is no row", 1, at(3, 10**9), "a neighbour tree has a point that is no row"),
        ("a point before the first row", 1, at(3, -1), "a neighbour tree has a point that is no row"),
        ("a node with points beyond the last", 2, at(0, 10**6, "idx_end"), "a node has points elsewhere"),
        ("a leaf that is none", 2, at(-1, 0, "is_leaf"), "a neighbour tree has a node without children"),
        ("a node with others' points", 2, at(1, 60, "idx_end"), "other points than its children's|points elsewhere"),
        ("bounds for fewer nodes", 3, lambda bounds: bounds[:, :1].copy(), "a neighbour tree has nodes without bounds"),
        ("no points", 0, lambda points: points[:1].copy(), "no row|without bounds|another tree than points|elsewhere"),
    ]:

        @spoilt(f"a {algorithm} with {name}", says)
        def _(algorithm: str = algorithm, part: int = part, change: Callable[[Any], Any] = change) -> Any:
            model = KNeighborsClassifier(algorithm=algorithm, leaf_size=5).fit(POINTS, CLASSES)
            return with_tree_state(model, "_tree", part, change)


@spoilt("a density with points of another width", "a density has points of another width")
def _() -> Any:
    model = KernelDensity().fit(POINTS)
    model.n_features_in_ = 3
    return model


@spoilt("neighbours with a class that there is not", "neighbours have a class that there is not")
def _() -> Any:
    model = KNeighborsClassifier(algorithm="brute", metric="cityblock").fit(POINTS, CLASSES)
    model._y[0] = 10**9
    return model


@spoilt("neighbours of whom the nearest none are asked for", "a KNeighborsClassifier looks for no neighbours")
def _() -> Any:
    model = KNeighborsClassifier(3).fit(POINTS, CLASSES)
    model.n_neighbors = 0
    return model


@spoilt("neighbours with points of another width", "other points than it was fitted with")
def _() -> Any:
    model = KNeighborsClassifier(algorithm="brute").fit(POINTS, CLASSES)
    model._fit_X = POINTS[:, :1].copy()
    return model


@spoilt("neighbours within a radius with a class that there is not", "neighbours have a class that there is not")
def _() -> Any:
    model = RadiusNeighborsClassifier(algorithm="brute").fit(POINTS, CLASSES)
    model._y[0] = -5
    return model


@spoilt("a distance for points of another width", "size of V does not match|SEuclidean dist: size of V", "pickle")
def _() -> Any:
    model = KNeighborsClassifier(algorithm="ball_tree", metric="seuclidean", metric_params={"V": np.ones(4)}).fit(
        POINTS, CLASSES
    )
    metric = model._tree.__getstate__()[11]
    metric.__setstate__((2.0, np.ones(1), np.ones((1, 1))))
    return model


@spoilt("support vectors of fewer rows than there are", "a SVC has odd support vectors")
def _() -> Any:
    model = SVC().fit(POINTS, CLASSES)
    model.support_vectors_ = model.support_vectors_[:1].copy()
    return model


@spoilt("support vectors that are counted wrong", "a SVC has other counts than support vectors")
def _() -> Any:
    model = SVC().fit(POINTS, CLASSES)
    model._n_support = np.array([10**6, 1, 1], dtype=np.int32)
    return model


@spoilt("support vectors without intercepts", "a SVC of 3 classes has 1 intercepts")
def _() -> Any:
    model = SVC().fit(POINTS, CLASSES)
    model._intercept_ = model._intercept_[:1].copy()
    return model


@spoilt("support vectors with probabilities that are missing", "a SVC has odd probabilities")
def _() -> Any:
    model = SVC().fit(POINTS, CLASSES)
    model._probA = model._probB = np.ones(1)
    return model


@spoilt("a precomputed kernel's support beyond its points", "a SVR has support beyond its points")
def _() -> Any:
    model = SVR(kernel="precomputed").fit(POINTS @ POINTS.T, POINTS[:, 0])
    model.support_[0] = 10**6
    return model


@spoilt("clusters with centers of another width", "clusters have centers of another width")
def _() -> Any:
    model = KMeans(3, n_init=1).fit(POINTS)
    model.cluster_centers_ = model.cluster_centers_[:, :1].copy()
    return model


@spoilt("bisected clusters with centers of another width", "clusters have centers of another width")
def _() -> Any:
    model = BisectingKMeans(3, random_state=0).fit(POINTS)
    model._bisecting_tree.left.center = np.zeros(1)
    return model


@spoilt("clusters with other norms than centers", "clusters have other norms than centers", "joblib", "pickle")
def _() -> Any:
    model = Birch(n_clusters=2).fit(POINTS)
    model._subcluster_norms = model._subcluster_norms[:1].copy()
    return model


@spoilt(
    "a sparse matrix with an index beyond its width", "a sparse matrix has entries outside of it", "pickle", "joblib"
)
def _() -> Any:
    from scipy import sparse

    model = KNeighborsClassifier().fit(sparse.csr_matrix(POINTS), CLASSES)
    model._fit_X.indices[0] = 10**6
    return model


@spoilt("a sparse matrix whose bounds go round", "a sparse matrix has entries outside of it", "pickle", "joblib")
def _() -> Any:
    """The differences of its bounds are positive, because they overflow."""
    from scipy import sparse

    model = KNeighborsClassifier().fit(sparse.csr_matrix(POINTS), CLASSES)
    model._fit_X.indptr = model._fit_X.indptr.astype(np.int32)
    model._fit_X.indptr[1:4] = 2**31 - 1, -(2**31), -1
    return model


@spoilt("a sparse matrix with bounds that go back", "a sparse matrix has entries outside of it", "pickle", "joblib")
def _() -> Any:
    from scipy import sparse

    model = KNeighborsClassifier().fit(sparse.csr_matrix(POINTS), CLASSES)
    model._fit_X.indptr[1] = 10**6
    return model


@spoilt("a spline of more knots than weights", "Knots, coefficients and degree are inconsistent|Need at least")
def _() -> Any:
    model = SplineTransformer().fit(POINTS)
    model.bsplines_[0]._delegate_to.k = 30
    return model


@spoilt("a word without a column", "a vocabulary has a word without a column of its own")
def _() -> Any:
    model = CountVectorizer().fit(["good bad", "ugly"])
    model.vocabulary_["good"] = 10**6
    return model


@spoilt("two words with one column", "a vocabulary has a word without a column of its own")
def _() -> Any:
    model = DictVectorizer().fit([{"a": 1.0, "b": 2.0}])
    model.vocabulary_["a"] = 1
    return model


@spoilt("a category without a column", "an encoder has a category without a column of its own")
def _() -> Any:
    model = OneHotEncoder().fit(CLASSES[:, None])
    model._n_features_outs = [1]
    return model


@spoilt("rare categories that become a column beyond the last", "an encoder has a category without a column of its own")
def _() -> Any:
    model = OneHotEncoder(min_frequency=15).fit(np.array(list("a" * 20 + "b" * 20 + "c" + "d"))[:, None])
    model._default_to_infrequent_mappings[0][2] = 10**6
    return model


@spoilt("a boosting that begins with a tree whose root has children elsewhere", "whose children are elsewhere")
def _() -> Any:
    model = GradientBoostingRegressor(n_estimators=2, init=DecisionTreeRegressor(max_depth=3))
    model.fit(POINTS, POINTS[:, 0])
    with_nodes(model.init_, put("left_child", 2**40))
    model.init = None
    return model


@spoilt("a boosting that begins with histograms whose root has children elsewhere", "whose children are elsewhere")
def _() -> Any:
    model = GradientBoostingRegressor(n_estimators=1, init=HistGradientBoostingRegressor(max_iter=2))
    model.fit(POINTS, POINTS[:, 0])
    model.init_._predictors[0][0].nodes["left"][0] = 2**31
    return model


for kind in (FeatureHasher, HashingVectorizer):
    for count in (0, -1, 2**31):

        @spoilt(f"a {kind.__name__} of {count} columns", rf"a {kind.__name__} has -?[\d,]+ columns")
        def _(kind: Any = kind, count: int = count) -> Any:
            model = kind()
            model.n_features = count
            return model


@spoilt("support vectors of a sparse machine in columns", "has support vectors that are not in rows")
def _() -> Any:
    model = SVC().fit(sparse.csr_matrix(POINTS), CLASSES)
    model.support_vectors_ = sparse.csc_matrix(model.support_vectors_)
    return model


# What says of itself where its memory is

ELSEWHERE = {"version": 3, "shape": (1,), "typestr": "<f8", "data": (0x4141414141, True)}


@spoilt("a part that numpy would take for an array", "has a KFold with a __array_interface__ of its own")
def _() -> Any:
    model = LinearRegression().fit(POINTS, POINTS[:, 0])
    model.intercept_ = KFold()
    vars(model.intercept_)["__array_interface__"] = ELSEWHERE
    return model


@spoilt("a bunch that numpy would take for an array", "has a Bunch with a __array_interface__ of its own")
def _() -> Any:
    model = LinearRegression().fit(POINTS, POINTS[:, 0])
    model.intercept_ = Bunch(__array_interface__=ELSEWHERE)
    return model


for name in ("__array__", "__array_struct__", "__getattr__", "__sklearn_is_fitted__"):

    @spoilt(f"a {name} of its own", f"has a LinearRegression with a {name} of its own")
    def _(name: str = name) -> Any:
        model = LinearRegression().fit(POINTS, POINTS[:, 0])
        vars(model)[name] = np.sum
        return model


# What would write into the model that it is in, or call what is not for it


for keywords in ("kw_args", "inv_kw_args"):

    @spoilt(f"a function that does not write its result, by its {keywords}", "would leave parts of its result")
    def _(keywords: str = keywords) -> Any:
        return FunctionTransformer(np.exp, **{keywords: {"where": False}}).fit(POINTS)


@spoilt("a partial function that does not write its result", "would leave parts of its result", "joblib", "pickle")
def _() -> Any:
    return FunctionTransformer(functools.partial(np.exp, where=0)).fit(POINTS)


@spoilt("a function that writes its result into a model", "a function would write its result into a part of the model")
def _() -> Any:
    model = make_pipeline(FunctionTransformer(np.rint), KNeighborsClassifier(algorithm="brute")).fit(POINTS, CLASSES)
    model.steps[0][1].kw_args = {"out": model.steps[1][1]._y, "casting": "unsafe"}
    return model


@spoilt("a partial function that writes into a model", "a function would write its result", "joblib", "pickle")
def _() -> Any:
    model = make_pipeline(FunctionTransformer(np.rint), KNeighborsClassifier(algorithm="brute")).fit(POINTS, CLASSES)
    model.steps[0][1].func = functools.partial(np.rint, out=model.steps[1][1]._y, casting="unsafe")
    return model


@spoilt(
    "a partial function of a part of a model", "a partial function begins with other than numbers", "joblib", "pickle"
)
def _() -> Any:
    """`np.median(labels, None, None, True, rows)` would sort the labels."""
    model = make_pipeline(FunctionTransformer(np.rint), KNeighborsClassifier(algorithm="brute")).fit(POINTS, CLASSES)
    model.steps[0][1].func = functools.partial(np.median, model.steps[1][1]._y, None, None, True)
    return model


@spoilt("a compiled function outside of its place", "takes the sizes of its arrays for granted")
def _() -> Any:
    from sklearn.cluster._kmeans import _kmeans_single_lloyd

    return FunctionTransformer(_kmeans_single_lloyd, kw_args={"sample_weight": np.ones(1)}).fit(POINTS)


for attribute, value in {"stack_method_": ["format"], "chain_method_": "tofile", "response_method": "__init__"}.items():

    @spoilt(f"a {attribute} that is none", "would call another method than those of estimators")
    def _(attribute: str = attribute, value: Any = value) -> Any:
        model = LinearRegression().fit(POINTS, POINTS[:, 0])
        setattr(model, attribute, value)
        return model


@spoilt("features that are selected by something private", "features would be selected by something private")
def _() -> Any:
    model = SelectFromModel(LinearRegression()).fit(POINTS, POINTS[:, 0])
    model.importance_getter = "fit.__globals__"
    return model


@case("a version that is no version", "")
def _(canary: Canary) -> bytes:
    model = LinearRegression().fit(POINTS, POINTS[:, 0])
    return pickle.dumps(model).replace(b"_sklearn_version\x94\x8c\x05", b"_sklearn_version\x94C\x05")


# What would read files, or talk


for kind in (CountVectorizer, TfidfVectorizer, HashingVectorizer):
    for where in ("filename", "file"):

        @spoilt(
            f"a {kind.__name__} that reads from a {where}",
            rf"has a {kind.__name__}\(input='{where}'\), which would read",
        )
        def _(kind: Any = kind, where: str = where) -> Any:
            model = kind().fit(["good bad", "ugly"])
            model.input = where
            return model


for kind in (CountVectorizer, TfidfVectorizer, HashingVectorizer):

    @spoilt(
        f"a {kind.__name__} with a pattern that may take for ever",
        rf"has a {kind.__name__}\(token_pattern='\(\?:a\|a\)\+b'\), which might take for ever",
    )
    def _(kind: Any = kind) -> Any:
        model = kind().fit(["good bad", "ugly"])
        model.token_pattern = "(?:a|a)+b"
        return model


@spoilt("a pattern that is none", r"has a CountVectorizer\(token_pattern=a bytes\), which might take for ever")
def _() -> Any:
    model = CountVectorizer().fit(["good bad", "ugly"])
    model.token_pattern = b"a"
    return model


@case("a transformer with a function that is not trusted", r"uses posix\.system", "joblib")
def _(canary: Canary) -> bytes:
    import os

    return dumped(make_pipeline(FunctionTransformer(os.system), LinearRegression()))


@case("a pipeline with a cache", r"uses joblib\.memory\.Memory", "joblib")
def _(canary: Canary) -> bytes:
    return dumped(make_pipeline(LinearRegression(), memory=joblib.Memory(f"{canary.path}-cache", verbose=0)))


# skops


def node(loader: str, full: str, **parts: Any) -> dict[str, Any]:
    module, _, name = full.rpartition(".")
    return {"__loader__": loader, "__module__": module, "__class__": name, **parts}


def dict_node(**items: str) -> dict[str, Any]:
    keys = [node("TypeNode", "builtins.str") for _ in items]
    values = {key: node("JsonNode", "builtins.str", content=json.dumps(value)) for key, value in items.items()}
    return node("DictNode", "builtins.dict", key_types=node("ListNode", "builtins.list", content=keys), content=values)


def schema_of(
    root: dict[str, Any],
    files: dict[str, bytes] | None = None,
    method: int = zipfile.ZIP_STORED,
    protocol: int = 2,
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("schema.json", json.dumps(root | {"protocol": protocol, "_skops_version": "0.16.0"}))
        for name, body in (files or {}).items():
            archive.writestr(name, body)
    return buffer.getvalue()


def list_node(*items: dict[str, Any], full: str = "builtins.list") -> dict[str, Any]:
    return node("ListNode", full, content=list(items))


def tuple_node(*items: dict[str, Any]) -> dict[str, Any]:
    return node("TupleNode", "builtins.tuple", content=list(items))


def text_node(value: str) -> dict[str, Any]:
    return node("JsonNode", "builtins.str", content=json.dumps(value))


@case("skops: a function that is not trusted", r"uses os\.system, which is not trusted", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(node("FunctionNode", "os.system"))


@case("skops: a call of a function that is not trusted", r"uses os\.system", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(node("ConstructorFromReduceNode", "os.system", content=list_node(text_node(canary.command))))


@case("skops: a list that is a function of the list", "uses sklearn.metrics.pairwise.rbf_kernel as ListNode", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(list_node(text_node("x"), full="sklearn.metrics.pairwise.rbf_kernel"))


@case(
    "skops: a constructor that is called",
    "uses sklearn.neighbors._kd_tree.KDTree as ConstructorFromReduceNode",
    "skops",
)
def _(canary: Canary) -> bytes:
    return schema_of(node("ConstructorFromReduceNode", "sklearn.neighbors._kd_tree.KDTree", content=list_node()))


@case("skops: a method", "uses builtins.str", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(node("MethodNode", "builtins.str", content={"func": "format", "obj": text_node("x")}))


@case("skops: an operator", r"uses operator\.methodcaller", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(node("OperatorFuncNode", "operator.methodcaller", attrs=list_node(text_node("system"))))


@case("skops: keys that are made by a function", "a dict whose keys are neither texts nor numbers", "skops")
def _(canary: Canary) -> bytes:
    held = dict_node(a="1")
    held["key_types"]["content"] = [node("FunctionNode", "numpy.exp")]
    return schema_of(held)


@case("skops: a name of protocol 0, which is written elsewhere", "written by a skops that is too old", "skops")
def _(canary: Canary) -> bytes:
    inner = node("FunctionNode", "numpy.exp", content={"module_path": "os", "function": "system"})
    return schema_of(inner, protocol=0)


@case("skops: an object within itself", "has two objects where it says that they are the same", "skops")
def _(canary: Canary) -> bytes:
    inner = list_node(text_node("x")) | {"__id__": 7}
    return schema_of(list_node(inner) | {"__id__": 7})


@case("skops: lists of lists, which are the same two", "has two objects where it says that they are the same", "skops")
def _(canary: Canary) -> bytes:
    held = list_node(text_node("x"), text_node("y")) | {"__id__": 0}
    for level in range(1, 40):
        held = list_node(held, list_node() | {"__id__": level - 1}) | {"__id__": level}
    return schema_of(held)


@case("skops: a schema thirty thousand deep", "RecursionError|nested|has none", "skops")
def _(canary: Canary) -> bytes:
    depth = 30_000
    before, after = json.dumps(list_node(text_node("x"))).split(json.dumps(text_node("x")))
    body = before * depth + json.dumps(text_node("x")) + after * depth
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("schema.json", body)
    return buffer.getvalue()


def array_file(shape: tuple[int, ...], description: str, body: bytes) -> bytes:
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": description, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def array_node(file: str) -> dict[str, Any]:
    return node("NdArrayNode", "numpy.ndarray", type="numpy", file=file)


@case("skops: a header of 10 GB before an array", "with 8 bytes for 1,250,000,000 times 8", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(array_node("a.npy"), {"a.npy": array_file((TEN_GB // 8,), "<f8", bytes(8))})


@case("skops: an array of objects", "with 40 bytes for 1 times 8|Object arrays", "skops")
def _(canary: Canary) -> bytes:
    body = pickle.dumps(np.array([Reduced(eval, canary.source)], dtype=object))
    return schema_of(array_node("a.npy"), {"a.npy": array_file((1,), "|O", body[:40])})


@case("skops: a pickle for an array", "magic string is not correct", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(array_node("a.npy"), {"a.npy": stolen(canary)})


@case("skops: a zip bomb", "becomes larger than it may", "skops")
def _(canary: Canary) -> bytes:
    zeros = BOMB_BYTES
    return schema_of(
        array_node("a.npy"), {"a.npy": array_file((zeros // 8,), "<f8", bytes(zeros))}, zipfile.ZIP_DEFLATED
    )


@case("skops: one file that is read a thousand times", "becomes larger than it may", "skops")
def _(canary: Canary) -> bytes:
    zeros = 2**20
    nodes = [array_node("a.npy") for _ in range(1000)]
    return schema_of(list_node(*nodes), {"a.npy": array_file((zeros // 8,), "<f8", bytes(zeros))}, zipfile.ZIP_DEFLATED)


@case("skops: a zip bomb in a sparse matrix", "becomes larger than it may", "skops")
def _(canary: Canary) -> bytes:
    inner = io.BytesIO()
    zeros = BOMB_BYTES
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", array_file((zeros // 8,), "<f8", bytes(zeros)))
    held = node("SparseMatrixNode", "scipy.sparse._csr.csr_matrix", type="scipy", file="a.npz")
    return schema_of(held, {"a.npz": inner.getvalue()})


def understated(archive: bytes, name: str, size: int) -> bytes:
    """Return the archive with another size for what a file of it becomes, in its directory."""
    place = archive.rindex(name.encode()) - 46  # of the entry, whose name comes last
    assert archive[place : place + 4] == b"PK\x01\x02"
    return archive[: place + 24] + struct.pack("<L", size) + archive[place + 28 :]


@case("skops: a zip bomb that is said to be small", "Bad CRC-32", "skops")
def _(canary: Canary) -> bytes:
    held = node("BytesNode", "builtins.bytes", file="a.bin")
    return understated(schema_of(held, {"a.bin": bytes(LARGE_BOMB_BYTES)}, zipfile.ZIP_DEFLATED), "a.bin", 100)


@case("skops: a zip bomb for the header of an array", "EOF: reading array header|Bad CRC-32", "skops")
def _(canary: Canary) -> bytes:
    body = b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**32 - 16) + bytes(LARGE_BOMB_BYTES)
    return understated(schema_of(array_node("a.npy"), {"a.npy": body}, zipfile.ZIP_DEFLATED), "a.npy", 10_000_000)


@case("skops: a sparse matrix with a directory of half a million entries", "has a directory of", "skops")
def _(canary: Canary) -> bytes:
    held = node("SparseMatrixNode", "scipy.sparse._csr.csr_matrix", type="scipy", file="a.npz")
    return schema_of(held, {"a.npz": crowded(500_000)}, zipfile.ZIP_DEFLATED)


@case("skops: packed by bz2, which has no limit", "compressed in a way that cannot be stopped", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(text_node("x"), method=zipfile.ZIP_BZIP2)


@case("skops: a file outside of the archive", "There is no item named|none of skops'", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(array_node(f"../../{canary.path}"))


@case("skops: a path in the archive that leads out of it", "which is none of skops'", "skops")
def _(canary: Canary) -> bytes:
    return schema_of(array_node(str(canary.path)), {str(canary.path): b"x"})


@case("skops: an archive in the place of an array", "magic string is not correct", "skops")
def _(canary: Canary) -> bytes:
    inner = io.BytesIO()
    np.savez(inner, a=np.zeros(3))
    return schema_of(array_node("a.npy"), {"a.npy": inner.getvalue()})


@case("skops: a directory of a million entries that are not there", "has a directory of|is no zip archive", "skops")
def _(canary: Canary) -> bytes:
    return crowded(1_000_000)


def crowded(count: int) -> bytes:
    """Return an archive of nothing but a directory."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * count
    return directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), 0, 0)


@case("skops: no archive", "is no zip archive", "skops")
def _(canary: Canary) -> bytes:
    return b"not a model"
