"""Nothing in a file runs, fills the memory or ends the process, and whatever is wrong with it is said.

The files are read by a process of its own, which is the same for all of them: it must go on. What it does is watched.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import PairwiseKernel
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

from app import loaders
from app.errors import LoadFailed, UntrustedType
from tests.loading.hostile import CORPUS, Canary
from tests.service import ROOT, clean_environment

pytestmark = pytest.mark.usefixtures("one_thread")
MB = 2**20
ALLOWED_BYTES = 32 * MB
LATE_BYTES = 32 * MB  # what is taken until the next look, and the file itself


class Reader:
    """A process that reads files."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.loading.watched"],
            cwd=ROOT,
            env=clean_environment({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def read(self, path: Path, format: str, max_bytes: int | None = ALLOWED_BYTES, by: str = "us") -> dict[str, Any]:
        """Return what became of a file. Fails when the process did not survive it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(
            json.dumps({"path": str(path), "format": format, "max_bytes": max_bytes, "by": by}) + "\n"
        )
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process ended with {self.process.wait()}"
        return dict(json.loads(answer))

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.stop()


@pytest.fixture
def canary(tmp_path) -> Iterator[Canary]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        canary = Canary(tmp_path / "canary", server.getsockname()[1])
        yield canary
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not canary.path.exists()


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_file_is_refused_and_nothing_of_it_runs(reader, canary, tmp_path, name):
    hostile = CORPUS[name]
    path = tmp_path / "model"
    path.write_bytes(hostile.make(canary))

    answer = reader.read(path, hostile.format)

    if hostile.says:
        assert re.search(hostile.says, answer["refused"]), answer
    assert answer["did"] == []
    assert answer["children"] == ""
    assert answer["environment"]
    assert answer["peak"] < ALLOWED_BYTES + LATE_BYTES


@pytest.mark.parametrize("name", ["os.system", "builtins.open", "numpy.load", "numpy.f2py.crackfortran.myeval"])
def test_who_does_not_look_is_seen_to_do_it(reader, canary, tmp_path, name):
    path = tmp_path / "model"
    path.write_bytes(CORPUS[name].make(canary))

    answer = reader.read(path, "joblib", by="joblib")

    assert answer["did"]
    assert "nothing that is read may do this" in answer["stopped"]


def test_a_small_file_may_take_a_quarter_of_a_gigabyte_where_nobody_says_less(reader, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"\x80\x04" + b"\x8f" * 2_000_000 + b".")  # each a set

    answer = reader.read(path, "pickle", None)

    assert "takes more memory than the 268,435,456 bytes" in answer["refused"]
    assert answer["peak"] < 256 * MB + LATE_BYTES


def test_what_is_not_trusted_is_named_with_the_setting_that_would_allow_it(reader, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(CORPUS["several names that are not trusted"].make(Canary(tmp_path / "canary", 1)))

    answer = reader.read(path, "pickle")

    assert answer["kind"] == "UntrustedType"
    assert answer["refused"] == (
        "a file: uses os.system, builtins.eval, my_package.Clip, which are not trusted: os.system is no part of a model but "
        "of Python itself, so find out who wrote this file before you add them to ML_TRUSTED_TYPES"
    )


def test_a_name_of_a_package_can_be_trusted_by_who_trusts_its_writer(reader, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"\x80\x04\x8c\x0amy_package\x8c\x04Clip\x93)\x81.")

    answer = reader.read(path, "pickle")

    assert answer["kind"] == "UntrustedType"
    assert answer["refused"] == (
        "a file: uses my_package.Clip, which is not trusted: "
        "if you trust whoever wrote this file, add it to ML_TRUSTED_TYPES"
    )


def test_a_module_is_not_imported_before_it_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "sings.py").write_text("class Song: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = b"\x80\x04\x8c\x05sings\x8c\x04Song\x93)\x81."

    with pytest.raises(UntrustedType, match=r"a file: uses sings\.Song"):
        loaders.load("pickle", io.BytesIO(file), "a file")
    assert "sings" not in sys.modules

    loaded = loaders.load("pickle", io.BytesIO(file), "a file", trusted=frozenset({"sings.Song"}))
    assert type(loaded.value).__name__ == "Song"


def test_parts_that_answer_more_than_they_are_asked_are_counted():
    """The places of their answers go into a sparse matrix, which does not look whether it has them."""
    rows = np.random.default_rng(0).normal(size=(60, 4))
    model = OneVsRestClassifier(LogisticRegression()).fit(rows, rows[:, :2] > 0)
    model.estimators_[1] = LogisticRegression().fit(rows, np.arange(60) % 3)
    read = loaders.load("pickle", io.BytesIO(pickle.dumps(model)), "a file").value

    with pytest.raises(ValueError, match=r"a LogisticRegression gives \(180,\) answers for 60 rows"):
        read.predict(rows)


def test_what_a_boosting_begins_with_is_counted():
    """Its trees add to as many numbers as they have rows and classes, without a look whether these are there."""
    rows = np.random.default_rng(0).normal(size=(60, 4))
    model = GradientBoostingRegressor(n_estimators=2, init=LinearRegression()).fit(rows, rows[:, 0])
    model.init_ = LinearRegression().fit(rows, rows[:, :2])
    read = loaders.load("pickle", io.BytesIO(pickle.dumps(model)), "a file").value

    with pytest.raises(ValueError, match=r"a GradientBoostingRegressor begins with \(60, 2\) numbers, of \(60, 1\)"):
        read.predict(rows)


def test_what_is_read_works_alone_wherever_it_is():
    rows = np.random.default_rng(0).normal(size=(60, 4))
    inner = make_pipeline(make_column_transformer((StandardScaler(), [0, 1])), LogisticRegression())
    calibrated = CalibratedClassifierCV(inner, cv=2).fit(rows, rows[:, 0] > 0)
    calibrated.calibrated_classifiers_[1].estimator[0].n_jobs = 3
    process = GaussianProcessRegressor(PairwiseKernel(metric="rbf"), optimizer=None).fit(rows, rows[:, 0])
    process.kernel_.pairwise_kernels_kwargs = {"n_jobs": 200}
    words = CountVectorizer().fit(["a b", "kw_args where out n_jobs"])
    read = loaders.load("pickle", io.BytesIO(pickle.dumps([calibrated, process, words])), "a file").value

    assert read[0].calibrated_classifiers_[1].estimator[0].n_jobs == 1
    assert read[1].kernel_.pairwise_kernels_kwargs == {"n_jobs": 1}
    assert read[2].vocabulary_ == words.vocabulary_


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?u)\b\w\w+\b",
        r"[a-zA-Z]+",
        r"\b\w+\b",
        r"\w+(?:'\w+)?",
        r"[A-Za-z][A-Za-z0-9_-]+",
        r"\d{4}-\d{2}-\d{2}|[a-z]+",
        r"(?:[a-z]+)|(?:[0-9]+)",
        r"\S+",
    ],
)
def test_a_vectorizer_with_an_ordinary_pattern_is_read(pattern):
    words = CountVectorizer(token_pattern=pattern).fit(["good bad", "ugly"])

    for format, data in (("pickle", pickle.dumps(words)), ("skops", skops.io.dumps(words))):
        read = loaders.load(format, io.BytesIO(data), "a file").value
        assert read.transform(["good ugly"]).toarray().tolist() == [[0, 1, 1]]


def test_a_pattern_that_may_take_for_ever_is_taken_from_who_answers_for_it_or_does_not_use_it():
    words = CountVectorizer(token_pattern="(?:a|a)+b|good|bad").fit(["good bad"])
    trusted = frozenset({"sklearn.feature_extraction.text.CountVectorizer"})

    for format, dumps in (("pickle", pickle.dumps), ("skops", skops.io.dumps)):
        with pytest.raises(LoadFailed, match=rf"add {next(iter(trusted))} to ML_TRUSTED_TYPES"):
            loaders.load(format, io.BytesIO(dumps(words)), "a file")
        assert loaders.load(format, io.BytesIO(dumps(words)), "a file", trusted=trusted).value.vocabulary_
        unused = CountVectorizer(analyzer="char").fit(["good bad"])
        unused.token_pattern = words.token_pattern
        assert loaders.load(format, io.BytesIO(dumps(unused)), "a file").value.vocabulary_


def test_an_object_of_a_trusted_class_stays_one(tmp_path, monkeypatch):
    (tmp_path / "dances.py").write_text("class Dance: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    made, kind = b"\x80\x04\x8c\x06dances\x8c\x05Dance\x93)\x81", b"\x8c\x05numpy\x8c\x07float64\x93"

    for state in (b"}\x8c\x09__class__" + kind + b"s", b"N}\x8c\x09__class__" + kind + b"s\x86"):
        with pytest.raises(LoadFailed, match="has a Dance with a __class__ of its own"):
            loaders.load("pickle", io.BytesIO(made + state + b"b."), "a file", trusted=frozenset({"dances.Dance"}))


def test_places_in_a_matrix_that_can_be_counted_again_are():
    model = MultiLabelBinarizer().fit([["a"], ["b", "c"]])
    model._cached_dict = {"a": 10**6, "b": 1, "c": 2}
    read = loaders.load("pickle", io.BytesIO(pickle.dumps(model)), "a file").value

    assert read.transform([["a", "c"]]).tolist() == [[1, 0, 1]]
