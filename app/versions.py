"""The versions a model was trained with against those that are here: the gate before a load, and what failures after it mean.

A pickle holds the inside of its classes, and scikit-learn promises nothing about that from one version to the next
(https://scikit-learn.org/stable/model_persistence.html). Many models of another version load and answer wrong.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from app.errors import VersionMismatch

Policy = Literal["refuse", "warn"]

GATED = ("scikit-learn", "numpy")  # major and minor version must be those that the model was trained with
LIBRARIES = (*GATED, "scipy", "joblib", "pandas")
PINS = "ml-requirements.txt"
MAX_TOLD = 40  # characters of a recorded version: whatever wrote the model wrote them


@functools.cache
def present_versions() -> Mapping[str, str]:
    """Return the versions of Python and of the libraries that are installed here."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check(
    trained_with: Mapping[str, str], label: str, *, present: Mapping[str, str] | None = None, policy: Policy = "refuse"
) -> tuple[str, ...]:
    """Compare the versions recorded with a model to those that are here; return what is worth telling, in sentences.

    Raises `VersionMismatch` with the policy `refuse`, when the major or minor version of scikit-learn or numpy differs.
    What was not recorded is not compared. `label` names the model in the error.
    """
    here = present_versions() if present is None else present
    differing = {
        library: (version[:MAX_TOLD], here.get(library, "none"))
        for library, version in trained_with.items()
        if library in ("python", *LIBRARIES) and version != here.get(library)
    }
    gated = [library for library in GATED if library in differing and len({_minor(v) for v in differing[library]}) == 2]
    warnings = []
    if gated:
        trained = " and ".join(f"{library} {differing[library][0]}" for library in gated)
        found = " and ".join(f"{library} {differing[library][1]}" for library in gated)
        pins = " and ".join(f"{library}=={differing[library][0]}" for library in gated)
        sentence = f"was trained with {trained}, here is {found}"
        if policy == "refuse":
            raise VersionMismatch(
                f"{label}: {sentence}: train it with {found} and publish it again, or put {pins} into {PINS} "
                "(ML_VERSION_POLICY=warn would load it all the same)"
            )
        warnings.append(f"{sentence}: its answers may be wrong; train it with {found} and publish it again")
    told = [f"{library} {was}, here {now}" for library, (was, now) in differing.items() if library not in gated]
    if told:
        warnings.append(f"was trained with {'; '.join(told)}")
    return tuple(warnings)


def differences(trained_with: Mapping[str, str]) -> dict[str, dict[str, str | None]]:
    """Return Python and the libraries whose version here is not the one that was recorded; of others nothing is told."""
    present = present_versions()
    return {
        library: {"trained_with": version, "present": present.get(library)}
        for library, version in trained_with.items()
        if library in ("python", *LIBRARIES) and version != present.get(library)
    }


def _minor(version: str) -> str:
    """Return major and minor version, or the whole text where it is no version."""
    found = _MINOR.match(version)
    return f"{int(found[1])}.{int(found[2])}" if found else version


_MINOR = re.compile(r"(\d{1,9})\.(\d{1,9})(?![0-9])")


def explain(error: BaseException, trained_with: Mapping[str, str], *, present: Mapping[str, str] | None = None) -> str:
    """Say what an error of loading or computing means, and what to do, when it is known to come of foreign versions.

    Looks at the error and at what caused it. Returns "" when it is none of the known ones.
    """
    versions = _Versions(trained_with, present_versions() if present is None else present)
    return next(filter(None, (_explain(cause, versions) for cause in _chain(error))), "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


@dataclass(frozen=True, slots=True)
class _Versions:
    trained: Mapping[str, str]
    present: Mapping[str, str]

    def differ(self, library: str) -> bool:
        """Whether another version may have been recorded: none that was recorded speaks against it."""
        return library not in self.trained or self.trained[library] != self.present.get(library)

    def blame(self, library: str, why: str, writer: str | None = None) -> str:
        """Say that `library` wrote the file in another version; `writer` is which, where the error itself tells."""
        here = self.present.get(library, "none")
        known = self.trained.get(library)
        name = "Python" if library == "python" else library
        known = None if known is None or known == here else known[:MAX_TOLD]
        who = f"{name} {known or writer} wrote it and {here} reads it here" if known or writer else ""
        who = who or f"another version of {name} than {here} wrote it"
        if library == "python":
            other = f", or serve it with Python {_minor(known)}" if known else ""
        else:
            other = f", or put {library}=={known} into {PINS}" if known else ""
        return f"{who}: {why}; train it with {name} {here} and publish it again{other}"


# What is said by objects of other versions that were read only half. The wording is that of scikit-learn 1.9 (_tree.pyx),
# numpy 1.26 (random/_pickle.py), pandas 2.2 to 3.1, CPython 3.12 and Cython 3.
_KNOWN = (
    (
        r"node array from the pickle has an incompatible dtype|Did not recognise loaded array dytpe",
        "scikit-learn",
        "the nodes of its trees are laid out in another way",
    ),
    (r"Incompatible checksums \(0x", "scikit-learn", "a compiled class of it has other fields"),
    (
        r"is not a known BitGenerator module|not a legacy MT19937 state"
        r"|__(?:randomstate|generator|bit_generator)_ctor\(\)",
        "numpy",
        "its random state is written in another way",
    ),
    (
        r"StringDtype|BlockPlacement|BlockManager|_unpickle_block",
        "pandas",
        "it holds a DataFrame, a Series or an Index, and their inside has changed",
    ),
    (r"unsupported pickle protocol", "python", "it is pickled in a way that is newer than this Python"),
    (
        r"\bcode\(\) (?:argument|takes)|\bcode expected at (?:most|least)",
        "python",
        "it holds the byte code of a function, which belongs to one version of Python",
    ),
)
_BUILT_FOR_ANOTHER_NUMPY = re.compile(
    r"numpy\.\w+ size changed|compiled using NumPy 1\.x|numpy\.core\.multiarray failed to import"
)
# Modules that are in a package of another name.
_PACKAGES = {
    "category_encoders": "category-encoders",
    "imblearn": "imbalanced-learn",
    "sklearn": "scikit-learn",
    "sklearn_extra": "scikit-learn-extra",
    "sksurv": "scikit-survival",
}
_MAIN = ("__main__", "__mp_main__")  # of `python -m app` it is app.__main__


def _explain(error: BaseException, versions: _Versions) -> str:
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and (found := _NO_MODULE.search(text)):
        return _missing_module(error.name or found[1], versions)
    if isinstance(error, AttributeError):
        for pattern, module_first in ((_NO_NAME, False), (_NO_NAME_ELSEWHERE, True)):
            if found := pattern.search(text):
                module, name = (found[1], found[2]) if module_first else (found[2], found[1])
                return _missing_name(module, name, versions)
        if found := _NO_ATTRIBUTE.search(text):
            return _missing_attribute(error, found[1], versions)
    if _BUILT_FOR_ANOTHER_NUMPY.search(text):
        return (
            f"a library that is installed here was built for another numpy than {versions.present.get('numpy', 'none')}: "
            f"install what {PINS} pins, all of it, into a new environment"
        )
    for known, library, why in _KNOWN:
        if re.search(known, text):
            return versions.blame(library, why)
    return ""


_NO_MODULE = re.compile(r"No module named '([^']+)'")
_NO_NAME = re.compile(r"Can't get attribute '([^']+)' on <module '([^']+)'")
_NO_NAME_ELSEWHERE = re.compile(r"module '([^']+)' has no attribute '([^']+)'")
_NO_ATTRIBUTE = re.compile(r"'(\w+)' object has no attribute '\w+'")


def _missing_module(module: str, versions: _Versions) -> str:
    root, dot, _ = module.partition(".")
    if root == "_loss":
        return versions.blame("scikit-learn", "its losses are in a module that is called otherwise here")
    if module.startswith("sklearn.externals.joblib"):
        why = "it holds a copy of joblib that scikit-learn has had until then"
        return versions.blame("scikit-learn", why, writer="before 0.23")
    if module == "numpy._core" and versions.present.get("numpy", "").startswith("1."):
        return versions.blame("numpy", "numpy 2 has moved what its arrays are made of", writer="2 or later")
    library = _library(root)
    if dot and library is not None and library in versions.present:
        return versions.blame(library, f"there is no module {module} in {versions.present[library]}")
    package = _PACKAGES.get(root, root)
    if dot and importlib.util.find_spec(root) is not None:
        return f"the {package} that is installed here has no module {module}: put the version it was trained with into {PINS}"
    return (
        f"it needs the module {root}, which is not installed here: put {package}, in the version it was trained with, "
        f"into {PINS}, or, if it is code of your own, deploy it with the service"
    )


def _missing_name(module: str, name: str, versions: _Versions) -> str:
    root = module.partition(".")[0]
    if module.rpartition(".")[2] in _MAIN:
        return (
            f"{name} was defined in the notebook or script that trained it, which is not here: define it in a module, "
            "import it from there, train and publish again, and deploy the module with the service"
        )
    library = _library(root)
    if library is not None:
        return versions.blame(library, f"there is no {name} in the {module} of {versions.present.get(library, 'none')}")
    return (
        f"the {module} that is here has no {name}: deploy the version of it that the model was trained with, or train it "
        "with this one and publish it again"
    )


def _missing_attribute(error: AttributeError, kind: str, versions: _Versions) -> str:
    """Explain what an object says that another version would have given one more attribute."""
    module = type(error.obj).__module__ if error.obj is not None else ""
    library = _library(module.partition(".")[0])
    if library is None or not versions.differ(library):
        return ""
    return versions.blame(library, f"a {kind} of {versions.present.get(library, 'none')} has attributes that it lacks")


def _library(root: str) -> str | None:
    """Return the library that a top-level module belongs to, when it is one whose versions are recorded."""
    name = _PACKAGES.get(root, root)
    return name if name in LIBRARIES else None
