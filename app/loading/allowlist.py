"""Which names the file of a model may mention: those of `trusted_types.txt`, which is to be read with this.

The list is data, and a copy: neither skops, whose lists it begins with, nor any library that it names is imported for it.
That would take 1,800 modules and 175 MB, most of them for estimators that no model here is made of.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

Kind = Literal["instances", "values", "calls", "markers"]

LIST = Path(__file__).with_name("trusted_types.txt")

# Where a name has been before, or is looked for first, on its way to where the list has it.
_MOVED = {
    "numpy._core._multiarray_umath": ("numpy",),
    "numpy._core.umath": ("numpy",),
    "scipy.special": ("scipy.special._special_ufuncs", "scipy.special._ufuncs"),
    "scipy.special._special_ufuncs": ("scipy.special._ufuncs",),
    "scipy.special._ufuncs": ("scipy.special._special_ufuncs",),
}
# Protocols below 3 write the names of Python 2.
_PYTHON_2 = {"long": "int", "unicode": "str", "xrange": "range"}
_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# The libraries of which another version has other modules: a name that is not here at all is not a question of trust.
_VERSIONED = ("_loss", "joblib", "numpy", "pandas", "scipy", "sklearn")


def _parse(text: str) -> tuple[dict[str, Kind], frozenset[str]]:
    """Return the kind of every name in the list, and which names are said to be from skops."""
    kinds: dict[str, Kind] = {}
    from_skops: set[str] = set()
    kind: Kind | None = None
    skops = False
    for line in text.splitlines():
        if found := _SECTION.fullmatch(line):
            kind, skops = found[1], found[2] is not None  # type: ignore[assignment]  # the pattern has the kinds
        elif line and not line.startswith("#"):
            assert kind is not None
            assert line not in kinds, f"{line} is in {LIST.name} twice"
            kinds[line] = kind
            if skops:
                from_skops.add(line)
    return kinds, frozenset(from_skops)


_SECTION = re.compile(rf"\[({'|'.join(get_args(Kind))})(, from skops)?\]")

KINDS: Mapping[str, Kind]
FROM_SKOPS: frozenset[str]
KINDS, FROM_SKOPS = _parse(LIST.read_text("utf-8"))


def listed(module: str, name: str) -> str | None:
    """Return the name by which the list has the `name` in `module`; None where it does not have it."""
    if module == "__builtin__":
        name = _PYTHON_2.get(name, name)
    module = module_today(module)
    if module == "numpy.core" or module.startswith("numpy.core."):  # numpy 1 called it so
        module = f"numpy._core{module.removeprefix('numpy.core')}"
    for candidate in (module, *_MOVED.get(module, ())):
        full = f"{candidate}.{name}"
        if full in KINDS:
            return full
    return None


def module_today(module: str) -> str:
    """Return what Python 3 calls a module."""
    return _PYTHON_2_MODULES.get(module, module)


def resolve(full: str) -> Any:
    """Return what a name of the list stands for.

    The name is taken apart here, at its last dot, and not as the file has it. Raises `ImportError` or `AttributeError`
    where the library that is installed has no such name.
    """
    module, _, name = full.rpartition(".")
    return getattr(importlib.import_module(module), name)


def resolve_trusted(module: str, name: str) -> Any:
    """Return what a name that the operator trusts stands for; classes within classes have dots in their name."""
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def missing(module: str, name: str) -> ImportError | AttributeError | None:
    """Return the error that importing would give, for what cannot be here; None where it may be.

    Imports nothing but modules of the list, in which another version may have had another name.
    """
    root, *rest = module.split(".")
    if root in ("__main__", "__mp_main__"):
        return AttributeError(f"Can't get attribute {name!r} on <module {module!r}>")
    if root not in _VERSIONED or not all(part.isidentifier() for part in (*rest, name)):
        return None
    spec = importlib.util.find_spec(root)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    if spec is None or (rest and not any(_is_module(folder.joinpath(*rest)) for folder in folders)):
        return ModuleNotFoundError(f"No module named {module!r}", name=module)
    if any(full.startswith(f"{module}.") for full in KINDS) and name not in vars(importlib.import_module(module)):
        return AttributeError(f"Can't get attribute {name!r} on <module {module!r}>")
    return None


def _is_module(path: PurePath) -> bool:
    folder = Path(path.parent)
    return Path(path).is_dir() or any(folder.glob(f"{path.name}.*"))
