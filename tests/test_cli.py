"""The commands as a person runs them: what they print, and the code they end with."""

from __future__ import annotations

import ast
import asyncio
import fcntl
import json
import os
import pty
import re
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from app import publishing
from app.cli import main
from app.model_storage import ModelStorageManager
from app.seal import parse_trusted_keys, verify
from app.storage.local import LocalStorage
from demo.s3 import Credentials
from tests import toys
from tests.service import ROOT, clean_environment, free_port, r2_environment
from tests.trusted import TRUST

FRAME = pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "b": [0.5, 0.25, 1.5, 2.0]})
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Model files and examples, as a person has them in a folder."""
    folder: Path = tmp_path_factory.mktemp("files")
    scaler = StandardScaler().fit(FRAME)
    scaled = pd.DataFrame(scaler.transform(FRAME), columns=FRAME.columns)
    joblib.dump(scaler, folder / "scaler.joblib")
    joblib.dump(LogisticRegression().fit(scaled, ["no", "yes", "no", "yes"]), folder / "model.joblib")
    joblib.dump(toys.Sum(), folder / "sum.joblib")
    joblib.dump(toys.Fails(), folder / "fails.pkl")
    (folder / "text.joblib").write_text("not a model")
    (folder / "model.h5").write_text("another kind")
    FRAME.assign(target=1).to_csv(folder / "rows.csv", index=False)
    FRAME.to_parquet(folder / "rows.parquet")
    (folder / "rows.json").write_text(json.dumps(FRAME.to_dict("records")))
    FRAME.to_json(folder / "columns.json")
    (folder / "sums.json").write_text("[[1, 2, 3], [4, 5, 6]]")
    (folder / "broken.json").write_text("[[1, 2")
    (folder / "rows.xlsx").write_text("a table")
    return folder


def command(
    environment: dict[str, str], cwd: Path, *words: str, stdin: Path = Path(os.devnull)
) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, "-m", "app", *words],
        env=clean_environment(environment),
        cwd=cwd,
        input=stdin.read_text(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in run.stderr + run.stdout or environment.get("ML_LOG_LEVEL") == "debug"
    return run


@pytest.fixture
def run(tmp_path, files) -> Run:
    """Run a command among the files; a folder stands for the bucket."""
    local = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(tmp_path)}

    def one(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return command(local | environment, files, *words)

    return one


@pytest.fixture
def run_here(tmp_path, files, monkeypatch, capsys) -> Run:
    """Run a command like `run`, but in this process: a new one would take most of its time to import scikit-learn."""
    for name in os.environ:
        if name not in clean_environment({}):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ML_CLOUD_ONLY", "false")
    monkeypatch.setenv("ML_TRUSTED_TYPES", ",".join(TRUST.types))
    monkeypatch.setenv("ML_LOCAL_DIR", str(tmp_path))
    monkeypatch.chdir(files)

    def one(*words: str) -> subprocess.CompletedProcess[str]:
        try:
            code = main(words)
        except SystemExit as end:  # argparse ends so
            code = int(end.code or 0)
        output = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, output.out, output.err)

    return one


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--help"], ["serve the models of the bucket", "verify", "list", "rollback", "unpublish", "keygen"]),
        (["publish", "--help"], ["--model FILE", "--examples FILE", "--version LABEL", "--promote", ".csv, .parquet"]),
        (["verify", "--help"], ["[NAME ...]", "these models only"]),
        (["promote", "--help"], ["NAME VERSION", "--alias ALIAS", "--json"]),
        (["rollback", "--help"], ["NAME", "--alias ALIAS", "what it named before"]),
        (["unpublish", "--help"], ["NAME VERSION", "--drop-aliases", "that no alias names"]),
        (["list", "--help"], ["[NAME ...]", "--history"]),
        (["keygen", "--help"], ["FILE", "it must not exist"]),
    ],
)
def test_help_tells_what_there_is(run_here, words, told):
    done = run_here(*words)

    assert (done.returncode, done.stderr) == (0, "")
    assert not [text for text in told if text not in re.sub(r"\s+", " ", done.stdout)]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["predict"], "invalid choice: 'predict'"),
        (["publish", "churn"], "the following arguments are required: --model"),
        (["publish", "--model", "model.joblib"], "the following arguments are required: NAME"),
        (["serve", "--threads"], "unrecognized arguments: --threads"),
        (["promote", "churn"], "the following arguments are required: VERSION"),
    ],
)
def test_wrong_usage_ends_with_code_2(run, words, complaint):
    done = run(*words)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m app")
    assert complaint in done.stderr


def test_the_command_can_be_read_by_older_pythons():
    for minor in range(4, 12):  # it has to be read before it can say so
        for name in ("__init__.py", "__main__.py"):
            ast.parse((ROOT / "app" / name).read_text(), feature_version=(3, minor))


def test_an_older_python_says_in_a_line_that_it_is_too_old():
    def told(python: str, *words: str) -> tuple[int, str]:
        done = subprocess.run([python, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    named = [path for minor in range(5, 12) if (path := shutil.which(f"python3.{minor}"))]
    old = [
        path for path in named if told(path, "-c", "pass") == (0, "")
    ]  # a name may stand for one that is not installed
    if not old:
        pytest.skip("needs an older Python")
    for python in old:
        version = python.rpartition("python")[2]

        assert told(python, "-m", "app", "list") == (2, f"Python 3.12 is needed, this is {version}\n")


def test_a_python_without_the_requirements_says_in_a_line_what_is_missing():
    bare = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import runpy, sys; sys.path[:0] = ['.']; runpy.run_module('app', {}, '__main__')",
    ]
    done = subprocess.run([*bare, "list"], cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"module \w+ is missing: python -m pip install -r requirements.txt, or use .venv/bin/python, which `make run` makes\n",
        done.stderr,
    )


def test_publishing_says_what_was_published_and_what_serves(run, run_here, files):
    parts = ["--model", "model.joblib", "--scaler", "scaler.joblib"]
    size = sum((files / name).stat().st_size for name in ("model.joblib", "scaler.joblib"))
    methods = "predict, predict_proba, predict_log_proba, decision_function"
    first = run("publish", "churn", *parts, "--examples", "rows.csv")
    second = run_here("publish", "churn", *parts, "--examples", "rows.parquet", "--no-compile")
    third = run_here("publish", "churn", *parts, "--examples", "rows.json", "--version", "spring", "--promote")
    again = run_here("publish", "churn", *parts, "--version", "1")
    verified = run("verify", "churn")

    told = f"{size:,} bytes, 4 golden rows, methods {methods}"
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines()[0] == f"published churn/1: {told}; in production"
    assert re.match(r"(not )?compiled[ :]", first.stdout.splitlines()[1])
    assert second.stdout == f"published churn/2: {told}; not in production: `promote churn 2` would put it there\n"
    assert third.stdout.splitlines()[0] == f"published churn/spring: {told}; in production"
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.splitlines()[-1].startswith("error: churn/1 exists already")
    assert verified.returncode == 0
    assert [line.removesuffix(", compiled as well") for line in verified.stdout.splitlines()] == [
        f"ok     churn/{version}: loads, 4 golden rows come out" for version in ("1", "2", "spring")
    ]


def test_publishing_as_json_tells_what_was_compiled_or_why_nothing_was(run_here):
    words = ["publish", "sum", "--model", "sum.joblib", "--json"]
    compiled = json.loads(run_here(*words).stdout)
    plain = json.loads(run_here(*words, "--no-compile").stdout)

    assert (compiled["compiled"] is None) == (compiled["not_compiled"] is not None)
    assert plain["compiled"] is None
    assert plain["not_compiled"] == "it was published without a compiled form, as was asked for"


def test_publishing_without_examples_says_what_that_costs(run_here):
    done = run_here("publish", "sum", "--model", "sum.joblib")

    assert done.returncode == 0
    assert ", 0 golden rows, methods predict; in production" in done.stdout
    assert done.stderr.startswith("no --examples were given: ")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["a b", "--model", "sum.joblib"], "error: model name 'a b' is not one: expected 1 to 100 letters"),
        (["sum", "--model", "sum.joblib", "--version", "../1"], "error: version '../1' is not one"),
        (
            ["sum", "--model", "no/missing.joblib"],
            "error: the model cannot be read: No such file or directory: no/missing.joblib",
        ),
        (["sum", "--model", "."], "error: .*expected a file that ends in .joblib, .pkl"),
        (["sum", "--model", "model.h5"], "error: model.h5: expected a file that ends in .joblib, .pkl"),
        (["sum", "--model", "text.joblib"], "error: model.joblib: cannot be read as joblib: "),
        (["sum", "--model", "sum.joblib", "--scaler", "text.joblib"], "error: scaler.joblib: cannot be read as joblib"),
        (
            ["sum", "--model", "sum.joblib", "--examples", "no/it.csv"],
            "error: the examples cannot be read: .*: no/it.csv",
        ),
        (["sum", "--model", "sum.joblib", "--examples", "broken.json"], "error: broken.json: cannot be read: "),
        (["sum", "--model", "sum.joblib", "--examples", "rows.xlsx"], "error: rows.xlsx: expected a file that ends in"),
        (
            ["sum", "--model", "sum.joblib", "--examples", "columns.json"],
            r'error: columns.json: expected a list of rows: write it with to_json\(orient="records"\)$',
        ),
        (["fails", "--model", "fails.pkl", "--examples", "sums.json"], "error: the model cannot answer predict for"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_cannot_be_published_is_told_in_a_sentence(run_here, tmp_path, words, complaint):
    done = run_here("publish", *words)

    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(complaint, done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# The life of a version


@pytest.fixture(scope="module")
def three_versions(tmp_path_factory) -> Path:
    """A folder that stands for a bucket, with the versions 1, 2 and 3 of `sum`."""
    folder: Path = tmp_path_factory.mktemp("three")
    part = publishing.part_from_object("model", toys.Sum())
    draft = publishing.draft({"model": part}, trust=TRUST)
    manager = ModelStorageManager(LocalStorage(folder))
    for _ in range(3):
        asyncio.run(manager.publish("sum", draft))
    return folder


@pytest.fixture
def three(run_here, three_versions, tmp_path) -> Run:
    """`run_here`, with those versions in its bucket."""
    shutil.copytree(three_versions, tmp_path, dirs_exist_ok=True)
    return run_here


def said(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """The exit code and what was said, without the times and names of this machine."""
    text = re.sub(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)", "TIME", done.stdout + done.stderr)
    return done.returncode, re.sub(r"[\w.-]+@[\w.-]+", "WHO", text)


def test_an_alias_is_moved_and_moved_back_in_words(three):
    assert said(three("promote", "sum", "2")) == (0, "sum: production names 2 now; before, it named 1\n")
    assert said(three("promote", "sum", "2")) == (0, "sum: production names 2 already; nothing was changed\n")
    assert said(three("promote", "sum", "3")) == (0, "sum: production names 3 now; before, it named 2\n")
    assert said(three("promote", "sum", "1", "--alias", "old")) == (
        0,
        "sum: old names 1 now; before, it named nothing\nservices serve it only where ML_ALIASES has old\n",
    )
    assert said(three("rollback", "sum")) == (0, "sum: production went back from 3 to 2\n")
    assert said(three("rollback", "sum")) == (0, "sum: production went back from 2 to 1\n")
    nothing = "error: sum: production names 1, and its history has nothing before that to go back to; there is 1, 2, 3"
    assert said(three("rollback", "sum")) == (1, f"{nothing}: promote one of them\n")


@pytest.mark.parametrize("words", [["promote", "fraud", "1"], ["rollback", "fraud"], ["unpublish", "fraud", "1"]])
def test_a_bare_file_is_told_to_have_no_versions(run_here, tmp_path, files, words):
    (tmp_path / "models").mkdir()
    shutil.copy(files / "sum.joblib", tmp_path / "models" / "fraud.joblib")

    bare = "error: fraud is a bare file, which has no versions: publish it first\n"
    assert said(run_here(*words)) == (1, bare)
    other = [words[0], "churn", *words[2:]]
    assert said(run_here(*other)) == (1, "error: there is no published model 'churn'; there is nothing\n")


def test_rolling_back_passes_over_what_was_unpublished(three):
    for words in (["promote", "sum", "2"], ["promote", "sum", "3"], ["unpublish", "sum", "2"]):
        assert three(*words).returncode == 0

    passed = "sum: production went back from 3 to 1 (unpublished since, so passed over: 2)\n"
    assert said(three("rollback", "sum")) == (0, passed)


def test_a_version_is_unpublished_unless_an_alias_names_it(three, tmp_path):
    named = "error: sum/1 is in use: production of sum names it; let the alias name another version first (promote)\n"
    assert said(three("unpublish", "sum", "1")) == (1, named)
    assert said(three("unpublish", "sum", "3")) == (0, "unpublished sum/3: 2 objects deleted\n")
    again = "sum/3 was unpublished already, by WHO at TIME; now there was no object to delete\n"
    assert said(three("unpublish", "sum", "3")) == (0, again)
    assert said(three("unpublish", "sum", "2"))[0] == 0
    assert "--drop-aliases takes the model out of service" in said(three("unpublish", "sum", "1"))[1]
    last = "unpublished sum/1: 2 objects deleted; the model has lost the alias production\n"
    assert said(three("unpublish", "sum", "1", "--drop-aliases")) == (0, last)

    assert [path.name for path in (tmp_path / "models").rglob("*") if path.is_file()] == ["index.json"]
    assert "sum/4" in three("publish", "sum", "--model", "sum.joblib").stdout


def test_what_there_is_is_listed_with_who_moved_what(three, tmp_path):
    (tmp_path / "models" / "bare.joblib").write_text("whatever")
    for words in (["promote", "sum", "2"], ["rollback", "sum"], ["unpublish", "sum", "3"]):
        assert three(*words).returncode == 0

    short = ["sum", "  1  TIME  production (WHO, TIME)", "  2  TIME"]
    code, text = said(three("list"))
    assert (code, text.splitlines()[:3]) == (0, short)
    assert re.fullmatch(
        r"bare\n  [0-9a-f]+  bare: a file without a manifest\n", "\n".join([*text.splitlines()[3:], ""])
    )
    assert said(three("list", "sum"))[1].splitlines() == [
        *short,
        "  moves of production, the latest first:",
        "    TIME  2 -> 1  WHO, rolled back",
        "    TIME  1 -> 2  WHO",
        "    TIME  - -> 1  WHO",
        "  unpublished:",
        "    TIME  3  WHO",
    ]
    assert said(three("list", "nobody")) == (
        1,
        f"error: there is no model 'nobody' in directory {tmp_path} under models/; there is sum, bare\n",
    )


def test_the_life_of_a_model_goes_as_the_readme_tells_it(run_here, files, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    shutil.copy(files / "model.joblib", tmp_path / "here" / "churn.joblib")
    shutil.copy(files / "rows.csv", tmp_path / "here" / "examples.csv")
    monkeypatch.chdir(tmp_path / "here")
    told = (ROOT / "README.md").read_text().partition("## The life of a model")[2].split("```")[1]
    commands = [line.partition("#")[0].removeprefix("python -m app ").split() for line in told.strip().splitlines()]
    assert run_here(*commands[0]).returncode == 0  # the version 1 that is there already
    done = [run_here(*words) for words in commands]

    assert [(it.args, it.stderr) for it in done if it.returncode != 0] == []
    assert done[0].stdout.startswith("published churn/2: ")
    assert done[-1].stdout.startswith("unpublished churn/1: ")


def test_a_bare_model_under_a_name_without_versions_is_listed_beside_the_history(three, tmp_path):
    for version, *more in (["2"], ["3"], ["1", "--drop-aliases"]):
        assert three("unpublish", "sum", version, *more).returncode == 0
    gone = said(three("list"))
    (tmp_path / "models" / "sum.joblib").write_text("whatever")
    there = said(three("list", "sum"))[1].splitlines()
    (told,) = json.loads(three("list", "--json").stdout)["models"]

    assert gone == (0, "sum\n  no version is left\n")
    assert re.fullmatch("  [0-9a-f]+  bare: a file without a manifest", there[1])
    assert there[2:4] == ["  moves of production, the latest first:", "    TIME  - -> 1  WHO"]
    assert (told["published"], len(told["versions"]), len(told["unpublished"])) == (False, 1, 3)


def test_listing_nothing_says_so(run_here, tmp_path):
    assert said(run_here("list")) == (0, f"no models in directory {tmp_path} under models/\n")


def test_what_somebody_wrote_into_the_index_cannot_speak_to_the_terminal(three, tmp_path):
    path = tmp_path / "models" / "index.json"
    index = json.loads(path.read_text())
    index["models"]["sum"]["history"]["production"][0]["by"] = "\x1b]0;owned\x07ann"
    path.write_text(json.dumps(index))

    assert "?]0;owned?ann" in three("list", "sum").stdout


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["promote", "sum", "9"], 1, "unknown_version"),
        (["promote", "nobody", "1"], 1, "unknown_version"),
        (["promote", "sum", "../1"], 1, "invalid_name"),
        (["rollback", "sum"], 1, "nothing_to_roll_back_to"),
        (["unpublish", "sum", "1"], 1, "version_in_use"),
        (["publish", "sum", "--model", "sum.joblib", "--version", "1"], 1, "version_exists"),
        (["publish", "sum", "--model", "text.joblib"], 1, "load_failed"),
        (["publish", "sum", "--model", "sum.joblib", "--seal-key", "rows.csv"], 1, "unusable_key"),
        (["keygen", "rows.csv"], 1, "unusable_key"),
        (["list", "nobody"], 1, "unknown_version"),
        (["promote", "sum"], 2, "wrong_usage"),
        (["prmote", "sum"], 2, "wrong_usage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_with_json_an_error_is_one_document_with_the_same_exit_code(three, words, code, error):
    text, told = three(*words), three(*words, "--json")
    document = json.loads(told.stdout)

    assert (text.returncode, told.returncode) == (code, code)
    assert text.stdout == ""
    assert (document.keys(), document["error"]) == ({"error", "detail"}, error)
    assert document["detail"] in text.stderr


def test_json_may_be_asked_for_before_the_command(three):
    after, before = three("list", "--json"), three("--json", "list")

    assert (before.returncode, before.stdout) == (0, after.stdout)
    assert json.loads(three("--json", "promote", "sum", "2").stdout)["version"] == "2"
    refused = three("--json", "serve")
    assert (refused.returncode, json.loads(refused.stdout)["error"]) == (2, "wrong_usage")


def test_with_json_missing_settings_are_told_as_an_error(run_here, monkeypatch):
    monkeypatch.setenv("ML_CLOUD_ONLY", "true")
    done = run_here("list", "--json")

    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "settings_error"
    assert "R2_BUCKET is missing" in json.loads(done.stdout)["detail"]


def test_with_json_a_result_is_one_document(run_here, files, tmp_path):
    def told(*words: str) -> dict[str, object]:
        done = run_here(*words, "--json")
        assert done.returncode == 0
        document: dict[str, object] = json.loads(done.stdout)
        return document

    size = (files / "sum.joblib").stat().st_size
    assert told("list") == {"models": []}
    assert told("publish", "sum", "--model", "sum.joblib", "--examples", "sums.json", "--no-compile") == {
        **{"name": "sum", "version": "1", "bytes": size, "golden_rows": 2, "methods": ["predict"]},
        **{"production": True, "sealed_by": None, "compiled": None},
        "not_compiled": "it was published without a compiled form, as was asked for",
    }
    plain = told("publish", "sum", "--model", "sum.joblib", "--version", "b", "--no-compile")
    assert plain["production"] is False
    moved = {"name": "sum", "alias": "production", "version": "b", "previous": "1"}
    assert told("promote", "sum", "b") == {**moved, "changed": True}
    assert told("promote", "sum", "b") == {**moved, "previous": "b", "changed": False}
    back = {"name": "sum", "alias": "production", "version": "1", "previous": "b", "changed": True, "skipped": []}
    assert told("rollback", "sum") == back
    verified = told("verify")["versions"]
    assert [(one["ref"], one["ok"], one["problem"], one["golden_rows"]) for one in verified] == [
        ("sum/1", True, None, 2),
        ("sum/b", True, None, 0),
    ]
    gone = told("unpublish", "sum", "b")
    assert (gone["changed"], gone["objects_deleted"], gone["aliases_dropped"]) == (True, 2, [])
    (listed,) = told("list")["models"]
    assert (listed["name"], listed["published"], listed["aliases"]) == ("sum", True, {"production": "1"})
    assert [(one["version"], one["aliases"]) for one in listed["versions"]] == [("1", ["production"])]
    assert [(move["version"], move["rollback"]) for move in listed["history"]["production"]] == [
        ("1", False),
        ("b", False),
        ("1", True),
    ]
    assert [one["version"] for one in listed["unpublished"]] == ["b"]
    (tmp_path / "models" / "text.joblib").write_text("not a model")
    broken = run_here("verify", "text", "--json")
    assert broken.returncode == 3
    assert json.loads(broken.stdout)["versions"][0]["ok"] is False


# Keys and seals


def test_a_pair_of_keys_is_made_and_seals_a_version(run_here, tmp_path, monkeypatch):
    key = tmp_path / "seal.key"
    for name in ("ML_CLOUD_ONLY", "ML_LOCAL_DIR"):  # it needs no bucket
        monkeypatch.delenv(name)
    made = run_here("keygen", str(key))
    private = key.read_text().strip()
    public = re.search(r"ML_TRUSTED_KEYS=(diskless-public-\S+) ", made.stdout)
    assert public
    again = run_here("keygen", str(key))
    monkeypatch.setenv("ML_CLOUD_ONLY", "false")
    monkeypatch.setenv("ML_TRUSTED_TYPES", ",".join(TRUST.types))
    monkeypatch.setenv("ML_LOCAL_DIR", str(tmp_path))
    sealed = run_here("publish", "sum", "--model", "sum.joblib", "--seal-key", str(key))
    manifest, seal = ((tmp_path / "models/sum/1" / name).read_bytes() for name in ("manifest.json", "manifest.seal"))

    assert (made.returncode, made.stderr, stat.S_IMODE(key.stat().st_mode)) == (0, "", 0o600)
    assert private.startswith("diskless-private-")
    assert private not in made.stdout + sealed.stdout + sealed.stderr
    assert (again.returncode, again.stdout) == (1, "")
    assert re.match(rf"error: {key} exists already, and a key is never overwritten", again.stderr)
    assert key.read_text().strip() == private
    name = verify(manifest, seal, parse_trusted_keys(f"me:{public[1]}"), "sum/1")
    assert name == "me"
    assert re.search(r", sealed with key [0-9a-f]{16}; in production", sealed.stdout)
    assert "warning" not in sealed.stderr


def test_a_new_key_is_told_as_json_without_its_private_half(run_here, tmp_path):
    done = run_here("keygen", str(tmp_path / "k"), "--json")
    document = json.loads(done.stdout)

    assert document.keys() == {"file", "public_key", "key_id"}
    assert (tmp_path / "k").read_text().strip() not in done.stdout + done.stderr


def test_a_key_that_others_can_read_is_warned_about_and_one_may_come_from_standard_input(
    run_here, tmp_path, monkeypatch
):
    run_here("keygen", str(tmp_path / "k"))
    (tmp_path / "k").chmod(0o640)
    publish = ["publish", "sum", "--model", "sum.joblib", "--examples", "sums.json", "--json", "--seal-key"]
    warned = run_here(*publish, str(tmp_path / "k"))
    piped = command(
        {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(tmp_path)}, Path.cwd(), *publish, "-", stdin=tmp_path / "k"
    )

    assert (
        warned.stderr == f"warning: others can read the private key in {tmp_path / 'k'}: chmod 600 {tmp_path / 'k'}\n"
    )
    assert (piped.returncode, piped.stderr) == (0, "")
    assert json.loads(piped.stdout)["sealed_by"] == json.loads(warned.stdout)["sealed_by"]


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("missing.key", "error: the seal key cannot be read: No such file or directory: missing.key"),
        (".", "error: the seal key cannot be read: Is a directory: ."),
        ("rows.csv", "error: the seal key is not one: expected a private key as `python -m app keygen` prints it"),
    ],
)
def test_a_key_that_is_none_is_told_before_anything_is_written(run_here, tmp_path, key, complaint):
    done = run_here("publish", "sum", "--model", "sum.joblib", "--seal-key", key)

    assert (done.returncode, done.stdout) == (1, "")
    assert complaint in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_verifying_tells_what_would_not_serve(run, run_here, tmp_path):
    run_here("publish", "sum", "--model", "sum.joblib", "--examples", "sums.json")
    (tmp_path / "models" / "text.joblib").write_text("not a model")
    both = run("verify")
    one = run_here("verify", "sum")
    none = run_here("verify", "nobody")

    assert both.returncode == 3
    assert both.stdout.splitlines()[0] == "ok     sum/1: loads, 2 golden rows come out"
    assert re.match(r"FAILED text/[0-9a-f]+: .*text\.joblib: cannot be read as joblib: ", both.stdout.splitlines()[1])
    assert (one.returncode, len(one.stdout.splitlines())) == (0, 1)
    assert none.returncode == 3
    assert none.stdout == "FAILED nobody: there is no such model; there is sum, text\n"


def test_verifying_what_the_storage_does_not_give_says_nothing_of_the_version(three, tmp_path):
    artifact = tmp_path / "models" / "sum" / "1" / "model.joblib"
    artifact.unlink()
    artifact.symlink_to("/etc/hostname")  # which leads out of the folder, so it is denied
    denied = three("verify")
    told = json.loads(three("verify", "--json").stdout)["versions"]
    (tmp_path / "models" / "text.joblib").write_text("not a model")
    mixed = three("verify")

    assert denied.returncode == 1
    assert [line.split()[0] for line in denied.stdout.splitlines()] == ["unread", "ok", "ok"]
    assert denied.stderr == "whether 1 of 3 would serve is not known: the storage failed\n"
    assert [(it["ok"], it["unread"]) for it in told] == [(False, True), (True, False), (True, False)]
    assert mixed.returncode == 3


def test_verifying_nothing_says_so(run_here, tmp_path):
    done = run_here("verify")

    assert done.returncode == 0
    assert done.stdout == f"no models in directory {tmp_path} under models/\n"


# The bucket


class Terminal:
    """A terminal of 100 columns to write to."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115 - closed below

    def shown(self) -> str:
        """Return what it has shown since the last time."""
        end = b"that is all\r\n"
        print("that is all", file=self.stream, flush=True)  # what was written comes through later
        text = b""
        while not text.endswith(end):
            assert select.select([self._master], [], [], 30)[0]
            text += os.read(self._master, 65536)
        return text.removesuffix(end).decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_terminal_shows_how_far_large_objects_are(s3, bucket, tmp_path, run_here, monkeypatch, terminal):
    rows = np.random.default_rng(1).normal(size=(40_000, 8))
    joblib.dump(KNeighborsRegressor(algorithm="brute").fit(rows, rows[:, 0]), tmp_path / "near.joblib")
    values = r2_environment(s3.endpoint_url, bucket, s3.writer)
    for name, value in {**values, "ML_CLOUD_ONLY": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    publish = ["publish", "near", "--model", str(tmp_path / "near.joblib")]
    published, while_publishing = run_here(*publish), terminal.shown()
    verified, while_verifying = run_here("verify", "near"), terminal.shown()
    as_json, meanwhile = run_here("verify", "near", "--json"), terminal.shown()

    assert (published.returncode, verified.returncode, as_json.returncode) == (0, 0, 0)
    assert "near/1/model.joblib:   0%|" in while_publishing
    assert "manifest.json" not in while_publishing  # too small
    assert "near/1/model.joblib:   0%|" in while_verifying
    assert verified.stdout == "ok     near/1: loads, no golden rows to check\n"
    assert meanwhile == ""
    assert json.loads(as_json.stdout)["versions"][0]["ok"]


def test_a_bucket_that_cannot_be_reached_is_told_in_a_sentence(tmp_path, files):
    nowhere = r2_environment(f"http://127.0.0.1:{free_port()}", "models", Credentials("id", "very-secret"))
    for words in (["verify"], ["publish", "sum", "--model", str(files / "sum.joblib")]):
        done = command({**nowhere, "R2_MAX_ATTEMPTS": "1"}, tmp_path, *words)

        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"error: cannot .* could not connect: check the endpoint and the network\n", done.stderr)


def test_a_credential_that_is_denied_is_told_with_its_remedy(s3, tmp_path, files):
    wrong = r2_environment(s3.endpoint_url, s3.bucket, Credentials(s3.reader.access_key_id, "very-secret"))
    reader = r2_environment(s3.endpoint_url, s3.bucket, s3.reader)
    unknown = command(wrong, tmp_path, "verify")
    reading = command(reader, tmp_path, "publish", "denied", "--model", str(files / "sum.joblib"))

    assert unknown.returncode == 1
    assert "the secret access key does not belong to the access key id" in unknown.stderr
    assert "very-secret" not in unknown.stderr
    assert reading.returncode == 1
    assert "publishing 'Object Read & Write'" in reading.stderr


# Serving


def test_a_port_in_use_is_told_with_the_remedy(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = [run("serve", PORT=str(port), HOST=host) for host in ("127.0.0.1", "")]

    for one in done:
        assert (one.returncode, one.stdout) == (2, "")
        assert (
            one.stderr
            == f"PORT {port} is in use: stop what listens there, or choose another, for example PORT={port + 1}\n"
        )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_told_with_the_remedy(run, host):
    done = run("serve", PORT=str(free_port()), HOST=host)

    assert done.returncode == 2
    assert re.fullmatch(rf"HOST .*'{re.escape(host)}'.*: set an address of this machine, or none\n", done.stderr)


def test_what_nobody_expected_is_one_line_unless_asked_for_more(run, tmp_path):
    broken = tmp_path / "shadow"
    broken.mkdir()
    (broken / "uvicorn.py").write_text("raise RuntimeError('cannot\\nbe imported')\n")
    environment = {"PYTHONPATH": f"{broken}:{ROOT}", "PORT": str(free_port())}
    plain, asked = run("serve", **environment), run("serve", **environment, ML_LOG_LEVEL="debug")

    assert plain.returncode == 1
    assert [json.loads(line)["event"] for line in plain.stdout.splitlines()] == ["listening"]
    assert plain.stderr == (
        "error: unexpected RuntimeError: cannot be imported (ML_LOG_LEVEL=debug shows where it comes from)\n"
    )
    assert asked.returncode == 1
    assert "Traceback" in asked.stderr


def test_a_file_of_numbers_is_no_model(run_here, files):
    joblib.dump(np.arange(3), files / "numbers.joblib")
    done = run_here("publish", "numbers", "--model", "numbers.joblib")

    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
