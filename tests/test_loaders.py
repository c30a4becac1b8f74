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
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from app import loaders
from app.errors import DigestMismatch, LoadFailed, UntrustedType
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

    with pytest.raises(LoadFailed, match=rf"^churn/7 model.{format}: (cannot be read as|is no zip archive)"):
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
    with pytest.raises(LoadFailed, match=rf"^churn/7 model.{format}: (cannot be read as|is no zip archive)"):
        load(format, body)


def test_an_unknown_format_is_refused():
    with pytest.raises(LoadFailed, match=r"format 'onnx' is not one of joblib, pickle, skops"):
        load("onnx", b"x")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"c_loss\nCyHalfBinomialLoss\n", r"No module named '_loss'; another version of scikit-learn than .* wrote it"),
        (
            b"csklearn.ensemble._gb_losses\nHuber\n",
            r"another version of scikit-learn than .* wrote it: there is no module",
        ),
        (
            b"csklearn.metrics._dist_metrics\nEuclidean\n",
            r"another version of scikit-learn .* there is no Euclidean in",
        ),
        (b"c__main__\nClip\n", r"Can't get attribute 'Clip' on <module '__main__'>"),
    ],
)
def test_a_class_that_is_not_here_is_named_with_what_may_be_the_matter(body, told):
    with pytest.raises(LoadFailed, match=told) as refused:
        load("pickle", b"\x80\x04" + body + b".")

    assert type(refused.value) is LoadFailed


class Ratios(BaseEstimator):
    """Somebody's own."""

    def fit(self, rows: Any, target: Any = None) -> Any:
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, rows: Any) -> Any:
        return np.asarray(rows)[:, 0]


DUMPS = {"joblib": dumped, "pickle": pickle.dumps, "skops": skops.io.dumps}
RATIOS = f"{__name__}.Ratios"


@pytest.mark.parametrize("format", DUMPS)
def test_somebodys_own_class_is_named_with_the_setting_that_would_allow_it(format):
    body = DUMPS[format](make_pipeline(Ratios()))

    with pytest.raises(UntrustedType) as refused:
        load(format, body)

    assert str(refused.value) == (
        f"churn/7 model.{format}: uses {RATIOS}, which is not trusted: "
        "if you trust whoever wrote this file, add it to ML_TRUSTED_TYPES"
    )


@pytest.mark.parametrize("format", DUMPS)
def test_somebodys_own_class_is_read_when_it_is_trusted(format):
    body = DUMPS[format](make_pipeline(Ratios()))

    loaded = loaders.load(format, io.BytesIO(body), "zoo", trusted=frozenset({RATIOS}))

    assert loaded.value.predict([[3.0]]) == [3.0]


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
        self.body, self.at = body, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: len(self.body) + 100}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        piece = self.body[self.at : self.at + len(buffer)]
        if not piece:
            raise DigestMismatch("bytes 200 to 300: sha256 is wrong")
        buffer[: len(piece)] = piece
        self.at += len(piece)
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
        body = pickle.dumps(Warner())
        found = loaders.load("pickle", io.BytesIO(body), "zoo", trusted=frozenset({f"{__name__}.warn_here"}))
        warnings.warn("afterwards", UserWarning, stacklevel=1)

    assert found.warnings == ("of the load",)
    assert [str(item.message) for item in elsewhere] == ["of the other thread", "afterwards"]
