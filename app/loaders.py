"""From a stream of bytes to the object in it: one function for each format, none of which runs what is in the bytes.

A stream is a buffered, seekable reader; whoever made it has checked, or will check, the digests of what it yields. An
error that the stream raises reaches the caller as it is, all others become `LoadFailed`.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from app import versions
from app.errors import DisklessError, LoadFailed

STREAM_BUFFER_BYTES = 1024 * 1024  # unpicklers read a few bytes at a time: let a buffer written in C answer them
MAX_WARNINGS = 100
MAX_REASON = 300  # characters of a foreign error that are kept


@dataclass(frozen=True, slots=True)
class Loaded:
    """An object, what its libraries warned of while it was made, and the scikit-learn that wrote it if it is another."""

    value: Any
    warnings: tuple[str, ...]
    trained_version: str | None = None


def load(
    format: str,
    stream: Any,
    label: str,
    *,
    trusted: frozenset[str] = frozenset(),
    max_bytes: int | None = None,
    trained_with: Mapping[str, str] | None = None,
) -> Loaded:
    """Read the object of `format` (joblib, pickle or skops) from `stream`, a binary file object; `label` names it in errors.

    `trusted` are the full names of classes and functions that the file may mention beside those of the list; `max_bytes`
    is what the process may grow by meanwhile, and the most that a compressed file may become (by default a multiple of
    its size); `trained_with` are the versions that were recorded with it, to explain a failure by. Raises `UntrustedType`, or `LoadFailed` when the bytes are not such an object.
    """
    loader = LOADERS.get(format)
    if loader is None:
        raise LoadFailed(f"{label}: format {format!r} is not one of {', '.join(LOADERS)}")
    buffered = io.BufferedReader(stream, STREAM_BUFFER_BYTES)
    with listening() as heard:
        try:
            if not buffered.peek(1):
                raise LoadFailed("is empty")
            value = loader(buffered, trusted=trusted, max_bytes=max_bytes)
        except LoadFailed as error:
            raise type(error)(f"{label}: {error}{_hint(error, heard, trained_with)}") from error
        except DisklessError:
            raise
        except (Exception, SystemExit) as error:  # broken bytes, and what the operator trusts, can raise anything
            raise LoadFailed(
                f"{label}: cannot be read as {format}: {reason(error)}{_hint(error, heard, trained_with)}"
            ) from error
        finally:
            buffered.detach()  # a buffer that goes away closes what it reads from, and its owner is not done with it
    return Loaded(value, tuple(dict.fromkeys(map(reason, heard))), _written_by(heard))


def reason(error: BaseException | Warning | str) -> str:
    """Write a foreign error in one line: its class, and the beginning of what it says, without this machine's paths."""
    text = without_paths(" ".join(str(error).split()))[:MAX_REASON]
    kind = "" if isinstance(error, (str, Warning)) else type(error).__name__
    return ": ".join(filter(None, (kind, text)))


def without_paths(text: str) -> str:
    """Return a text in which of each path only the last part is left: callers need not know what lies where on this machine."""
    return _PATH.sub(r"\1", text)


_PATH = re.compile(r"(?<![\w:/.])/(?:[^/\s'\"<>()]+/)+([^/\s'\"<>()]*)")


def _written_by(heard: list[Warning | str]) -> str | None:
    """Return the version of scikit-learn that wrote a model, where it is not the one that has read it."""
    found = next((found for item in heard if (found := getattr(item, "original_sklearn_version", None))), None)
    return found if isinstance(found, str) and _VERSION.fullmatch(found) else None  # it is what the file says


_VERSION = re.compile(r"[0-9A-Za-z.+_-]{1,50}")


def _hint(error: BaseException, heard: list[Warning | str], trained_with: Mapping[str, str] | None) -> str:
    """Say what most likely is the matter with a file that was read half."""
    written = _written_by(heard)
    recorded = {**(trained_with or {}), **({"scikit-learn": written} if written else {})}
    if told := versions.explain(error, recorded):
        return f"; {told}"
    here = versions.present_versions().get("scikit-learn")
    if written is not None:
        return f"; scikit-learn {written} wrote it and {here} reads it here: save it again with {here}"
    return ""


_thread = threading.local()  # .heard: what the libraries have warned of in this thread, while it loads


@contextmanager
def listening() -> Iterator[list[Warning | str]]:
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
        if len(heard) < MAX_WARNINGS:  # a file can give one for each of its objects
            heard.append(message)
    else:
        _show_elsewhere(message, *details, **options)


_show_elsewhere: Callable[..., None] = warnings.showwarning


def load_pickle(stream: io.BufferedReader, *, trusted: frozenset[str], max_bytes: int | None) -> Any:
    """Read a pickle, or what `joblib.dump` wrote: many people call either by the other's ending."""
    from app.loading import pickles

    return pickles.unpickle(stream, trusted=trusted, max_bytes=max_bytes)


def load_skops(stream: io.BufferedReader, *, trusted: frozenset[str], max_bytes: int | None) -> Any:
    """Read what `skops.io.dump` wrote."""
    from app.loading import archives

    return archives.load(stream, trusted=trusted, max_bytes=max_bytes)


LOADERS: dict[str, Callable[..., Any]] = {
    "joblib": load_pickle,
    "pickle": load_pickle,
    "skops": load_skops,
}
