"""From a stream of bytes to the object in it: one function for each format.

A stream is a buffered, seekable reader; whoever made it has checked, or will check, the digests of what it yields. An
error that the stream raises reaches the caller as it is, all others become `LoadFailed`.
"""

from __future__ import annotations

import io
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from app.errors import DisklessError, LoadFailed

STREAM_BUFFER_BYTES = 1024 * 1024  # unpicklers read a few bytes at a time: let a buffer written in C answer them
MAX_REASON = 300  # characters of a foreign error that are kept


@dataclass(frozen=True, slots=True)
class Loaded:
    """An object, what its libraries warned of while it was made, and the scikit-learn that wrote it if it is another."""

    value: Any
    warnings: tuple[str, ...]
    trained_version: str | None = None


def load(format: str, stream: Any, label: str) -> Loaded:
    """Read the object of `format` (joblib, pickle or skops) from `stream`, a binary file object; `label` names it in errors.

    Raises `LoadFailed` when the bytes are not such an object.
    """
    loader = LOADERS.get(format)
    if loader is None:
        raise LoadFailed(f"{label}: format {format!r} is not one of {', '.join(LOADERS)}")
    buffered = io.BufferedReader(stream, STREAM_BUFFER_BYTES)
    with _listening() as heard:
        try:
            if not buffered.peek(1):
                raise LoadFailed(f"{label}: is empty")
            value = loader(buffered)
        except DisklessError:
            raise
        except Exception as error:  # unpickling runs the constructors of any class: any exception can come out
            raise LoadFailed(f"{label}: cannot be read as {format}: {reason(error)}{_hint(error, heard)}") from error
        finally:
            buffered.detach()  # a buffer that goes away closes what it reads from, and its owner is not done with it
    return Loaded(value, tuple(dict.fromkeys(map(reason, heard))), _written_by(heard))


def reason(error: BaseException | Warning | str) -> str:
    """Write a foreign error in one line: its class, and the beginning of what it says, without this machine's paths."""
    text = _PATH.sub(r"\1", " ".join(str(error).split()))[:MAX_REASON]
    kind = "" if isinstance(error, (str, Warning)) else type(error).__name__
    return ": ".join(filter(None, (kind, text)))


_PATH = re.compile(r"(?<![\w:/.])/(?:[^/\s'\"<>()]+/)+([^/\s'\"<>()]*)")


def _written_by(heard: list[Warning | str]) -> str | None:
    """Return the version of scikit-learn that wrote a model, where it is not the one that has read it."""
    return next((found for item in heard if (found := getattr(item, "original_sklearn_version", None))), None)


def _hint(error: Exception, heard: list[Warning | str]) -> str:
    """Say what most likely is the matter with a file that was read half."""
    from sklearn import __version__

    if (written := _written_by(heard)) is not None:
        return f"; scikit-learn {written} wrote it and {__version__} reads it here: save it again with {__version__}"
    if isinstance(error, (ImportError, AttributeError)):
        return f"; it needs a module that is not installed here, or another scikit-learn than {__version__} wrote it"
    return ""


_thread = threading.local()  # .heard: what the libraries have warned of in this thread, while it loads


@contextmanager
def _listening() -> Iterator[list[Warning | str]]:
    """Collect the warnings of this thread. `warnings.catch_warnings` would change what happens to those of all threads."""
    from sklearn.exceptions import InconsistentVersionWarning

    global _show_elsewhere
    if warnings.showwarning is not _show:  # not yet, or somebody's catch_warnings has put another back since
        _show_elsewhere, warnings.showwarning = warnings.showwarning, _show
    warnings.simplefilter("always", InconsistentVersionWarning)  # by default, a second model's would not be heard
    heard: list[Warning | str] = []
    _thread.heard = heard
    try:
        yield heard
    finally:
        del _thread.heard


def _show(message: Warning | str, *details: Any, **options: Any) -> None:
    heard: list[Warning | str] | None = getattr(_thread, "heard", None)
    if heard is not None:
        heard.append(message)
    else:
        _show_elsewhere(message, *details, **options)


_show_elsewhere: Callable[..., None] = warnings.showwarning


def load_joblib(stream: io.BufferedReader) -> Any:
    """Read what `joblib.dump` wrote, compressed or not."""
    import joblib

    return joblib.load(stream)


def load_pickle(stream: io.BufferedReader) -> Any:
    """Read a pickle. `.pkl` is also what many people call the file that `joblib.dump` wrote: that is read, too."""
    if stream.peek(1)[:1] != pickle.PROTO:
        return load_joblib(stream)
    try:
        return _PlainUnpickler(stream).load()
    except _WrittenByJoblib:
        stream.seek(0)
        return load_joblib(stream)


class _WrittenByJoblib(Exception):
    """The stream refers to joblib's array wrapper: the bytes of the arrays stand between the pickle's own."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "joblib.numpy_pickle":
            raise _WrittenByJoblib
        return super().find_class(module, name)


# What skops leaves to its users to trust: the parts of scikit-learn's own models that hold numbers, and run nothing.
SKOPS_TRUSTED = [
    "numpy.dtype",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.metrics._dist_metrics.EuclideanDistance64",
    "sklearn.metrics._scorer._PassthroughScorer",
    "sklearn.model_selection._split.KFold",
    "sklearn.model_selection._split.StratifiedKFold",
    "sklearn.neighbors._ball_tree.BallTree",
    "sklearn.neighbors._kd_tree.KDTree",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.tree._tree.Tree",
    "sklearn.utils._bunch.Bunch",
]


def load_skops(stream: io.BufferedReader) -> Any:
    """Read what `skops.io.dump` wrote, if every type in it is one that skops or we trust."""
    import skops.io

    return skops.io.load(stream, trusted=SKOPS_TRUSTED)


LOADERS: dict[str, Callable[[io.BufferedReader], Any]] = {
    "joblib": load_joblib,
    "pickle": load_pickle,
    "skops": load_skops,
}
