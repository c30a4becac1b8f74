"""From bytes to objects, and what is said of bytes that are none."""

from __future__ import annotations

import io
import pickle
import random
import threading
import warnings
from typing import Any

import joblib
import numpy as np
import pytest
import skops.io
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import Ridge

from app import loaders
from app.errors import DigestMismatch, LoadFailed
from tests.zoo import fitted


def dumped(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(value, buffer, **options)
    return buffer.getvalue()


def load(format: str, body: bytes) -> loaders.Loaded:
    return loaders.load(format, io.BytesIO(body), f"churn/7 model.{format}")


def written_by(version: str, estimator: Any, dump: Any = pickle.dumps) -> bytes:
    """The bytes of a model as another scikit-learn would have written them."""
    from sklearn import base

    here = base.__version__
    base.__version__ = version
    try:
        return dump(estimator)
    finally:
        base.__version__ = here


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3)])
@pytest.mark.parametrize("format", ["joblib", "pickle"])
def test_what_joblib_wrote_is_read_under_either_name(format, compress):
    it = fitted("forest")

    value = load(format, dumped(it.estimator, compress=compress)).value

    assert np.array_equal(value.predict(it.data), it.estimator.predict(it.data))


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read(protocol):
    it = fitted("ridge")

    for format in ("pickle", "joblib"):
        value = load(format, pickle.dumps(it.estimator, protocol=protocol)).value

        assert np.array_equal(value.predict(it.data), it.estimator.predict(it.data))


def test_the_stream_stays_open_for_its_owner():
    stream = io.BytesIO(dumped(Ridge()) + b"behind")

    loaders.load("joblib", stream, "zoo")

    assert not stream.closed


@pytest.mark.parametrize("format", loaders.LOADERS)
def test_an_empty_file_is_called_empty(format):
    with pytest.raises(LoadFailed, match=rf"^churn/7 model.{format}: is empty$"):
        load(format, b"")


@pytest.mark.parametrize("format", loaders.LOADERS)
@pytest.mark.parametrize("kept", [1, 10, 100, 0.5, -1])
def test_a_truncated_file_is_refused(format, kept):
    body = skops.io.dumps(fitted("ridge").estimator) if format == "skops" else dumped(fitted("ridge").estimator)
    cut = int(len(body) * kept) if isinstance(kept, float) else kept

    with pytest.raises(LoadFailed, match=rf"^churn/7 model.{format}: cannot be read as {format}: "):
        load(format, body[:cut])


@pytest.mark.parametrize("format", loaders.LOADERS)
def test_random_bytes_are_refused(format):
    for seed in range(100):
        with pytest.raises(LoadFailed):
            load(format, random.Random(seed).randbytes(200))


@pytest.mark.parametrize(
    ("format", "body"),
    [
        ("joblib", skops.io.dumps(fitted("ridge").estimator)),
        ("pickle", skops.io.dumps(fitted("ridge").estimator)),
        ("skops", dumped(fitted("ridge").estimator)),
        ("joblib", b'{"model": "json"}'),
        ("pickle", b"<html>Not found</html>"),
        ("skops", b"a,b\n1,2\n"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(format, body):
    with pytest.raises(LoadFailed, match=rf"^churn/7 model.{format}: cannot be read as {format}: "):
        load(format, body)


def test_an_unknown_format_is_refused():
    with pytest.raises(LoadFailed, match=r"format 'onnx' is not one of joblib, pickle, skops"):
        load("onnx", b"x")


def test_a_class_that_is_not_here_is_named_with_what_may_be_the_matter():
    for body in (b"\x80\x04cnowhere\nThing\n.", b"\x80\x04csklearn.linear_model\nRidged\n."):
        with pytest.raises(LoadFailed, match="it needs a module that is not installed here, or another scikit-learn"):
            load("pickle", body)


def test_no_message_has_a_path_of_this_machine():
    for error in (
        ImportError("cannot import name 'Tree' from 'sklearn.tree' (/srv/app/.venv/lib/sklearn/tree/__init__.py)"),
        AttributeError("Can't get attribute 'f' on <module 'm' from '/home/me/m.py'>"),
        FileNotFoundError(2, "No such file or directory", "/etc/secret/weights.bin"),
    ):
        text = loaders.reason(error)

        assert type(error).__name__ in text
        assert "/srv" not in text
        assert "/home" not in text
        assert "/etc" not in text
    assert "https://scikit-learn.org/stable/a.html" in loaders.reason("see https://scikit-learn.org/stable/a.html")


class Failing(io.RawIOBase):
    """A storage whose bytes turn out to be wrong in the middle."""

    def __init__(self, body: bytes) -> None:
        self.rest = body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.rest:
            raise DigestMismatch("bytes 200 to 300: sha256 is wrong")
        piece, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("format", ["joblib", "pickle"])
def test_what_the_stream_raises_comes_out_as_it_is(format):
    with pytest.raises(DigestMismatch, match="sha256 is wrong"):
        loaders.load(format, Failing(dumped(fitted("ridge").estimator)[:200]), "zoo")


def test_the_version_that_wrote_a_model_is_told_every_time():
    for dump in (pickle.dumps, dumped):
        for _ in range(2):
            found = load("pickle", written_by("1.2.2", fitted("ridge").estimator, dump))

            assert found.trained_version == "1.2.2"
            assert len(found.warnings) == 1
            assert "Trying to unpickle estimator Ridge from version 1.2.2" in found.warnings[0]


def test_a_forest_warns_once_for_each_of_its_classes():
    found = load("pickle", written_by("1.2.2", RandomForestClassifier(30).fit([[0], [1]], [0, 1])))

    assert len(found.warnings) == 2


def test_a_model_of_another_version_that_cannot_be_read_says_both():
    both = [fitted("ridge").estimator, fitted("forest").estimator]
    body = written_by("1.2.2", both, lambda value: pickle.dumps(value, protocol=2))

    with pytest.raises(LoadFailed, match=r"scikit-learn 1\.2\.2 wrote it and .* reads it here: save it again with"):
        load("pickle", body[:-300])


def test_our_own_models_load_without_a_word():
    assert load("joblib", dumped(fitted("mixed").estimator)).warnings == ()


class Warner:
    """Warns while it is unpickled, and lets another thread warn meanwhile."""

    during: Any = None

    def __reduce__(self) -> Any:
        return warn_here, ()


def warn_here() -> int:
    thread = threading.Thread(target=lambda: warnings.warn("of the other thread", UserWarning, stacklevel=1))
    thread.start()
    thread.join()
    warnings.warn("of the load", UserWarning, stacklevel=1)
    return 1


def test_a_load_hears_its_own_warnings_and_leaves_other_threads_theirs():
    with warnings.catch_warnings(record=True) as elsewhere:
        warnings.simplefilter("always")
        found = load("pickle", pickle.dumps(Warner()))
        warnings.warn("afterwards", UserWarning, stacklevel=1)

    assert found.warnings == ("of the load",)
    assert [str(item.message) for item in elsewhere] == ["of the other thread", "afterwards"]
