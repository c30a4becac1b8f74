"""The commands as a person runs them: what they print, and the code they end with."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from app.cli import main
from tests import toys
from tests.service import ROOT, clean_environment, free_port, r2_environment

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
    (folder / "sums.json").write_text("[[1, 2, 3], [4, 5, 6]]")
    (folder / "broken.json").write_text("[[1, 2")
    (folder / "rows.xlsx").write_text("a table")
    return folder


def command(environment: dict[str, str], cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, "-m", "app", *words],
        env=clean_environment(environment),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
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
        (["--help"], ["serve", "publish", "verify", "serve the models of the bucket"]),
        (["publish", "--help"], ["--model FILE", "--examples FILE", "--version LABEL", "--promote", ".csv, .parquet"]),
        (["verify", "--help"], ["[NAME ...]", "these models only"]),
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
        (["serve", "--workers"], "unrecognized arguments: --workers"),
    ],
)
def test_wrong_usage_ends_with_code_2(run, words, complaint):
    done = run(*words)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m app")
    assert complaint in done.stderr


def test_publishing_says_what_was_published_and_what_serves(run, run_here, files):
    parts = ["--model", "model.joblib", "--scaler", "scaler.joblib"]
    size = sum((files / name).stat().st_size for name in ("model.joblib", "scaler.joblib"))
    methods = "predict, predict_proba, predict_log_proba, decision_function"
    first = run("publish", "churn", *parts, "--examples", "rows.csv")
    second = run_here("publish", "churn", *parts, "--examples", "rows.parquet")
    third = run_here("publish", "churn", *parts, "--examples", "rows.json", "--version", "spring", "--promote")
    again = run_here("publish", "churn", *parts, "--version", "1")
    verified = run("verify", "churn")

    told = f"{size:,} bytes, 4 golden rows, methods {methods}"
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == f"published churn/1: {told}; in production\n"
    assert second.stdout == f"published churn/2: {told}; not in production: --promote puts a version there\n"
    assert third.stdout == f"published churn/spring: {told}; in production\n"
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.splitlines()[-1].startswith("error: churn/1 exists already")
    assert verified.returncode == 0
    assert verified.stdout.splitlines() == [
        f"ok     churn/{version}: loads, 4 golden rows come out" for version in ("1", "2", "spring")
    ]


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
        (["sum", "--model", "missing.joblib"], "error: the model cannot be read: No such file or directory: missing"),
        (["sum", "--model", "."], "error: .*expected a file that ends in .joblib, .pkl"),
        (["sum", "--model", "model.h5"], "error: model.h5: expected a file that ends in .joblib, .pkl"),
        (["sum", "--model", "text.joblib"], "error: model.joblib: cannot be read as joblib: "),
        (["sum", "--model", "sum.joblib", "--scaler", "text.joblib"], "error: scaler.joblib: cannot be read as joblib"),
        (["sum", "--model", "sum.joblib", "--examples", "missing.csv"], "error: the examples cannot be read: No such"),
        (["sum", "--model", "sum.joblib", "--examples", "broken.json"], "error: broken.json: cannot be read: "),
        (["sum", "--model", "sum.joblib", "--examples", "rows.xlsx"], "error: rows.xlsx: expected a file that ends in"),
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


def test_verifying_nothing_says_so(run_here, tmp_path):
    done = run_here("verify")

    assert done.returncode == 0
    assert done.stdout == f"no models in directory {tmp_path} under models/\n"


# The bucket


def test_a_bucket_that_cannot_be_reached_is_told_in_a_sentence(tmp_path, files):
    nowhere = r2_environment(f"http://127.0.0.1:{free_port()}", "models", "id", "very-secret")
    for words in (["verify"], ["publish", "sum", "--model", str(files / "sum.joblib")]):
        done = command({**nowhere, "R2_MAX_ATTEMPTS": "1"}, tmp_path, *words)

        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"error: cannot .* could not connect: check the endpoint and the network\n", done.stderr)


def test_a_credential_that_is_denied_is_told_with_its_remedy(s3, tmp_path, files):
    wrong = r2_environment(s3.endpoint_url, s3.bucket, s3.reader.access_key_id, "very-secret")
    reader = r2_environment(s3.endpoint_url, s3.bucket, s3.reader.access_key_id, s3.reader.secret_access_key)
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
        assert one.stderr == f"PORT {port} is in use: stop what listens there, or choose another\n"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_told_with_the_remedy(run, host):
    done = run("serve", PORT=str(free_port()), HOST=host)

    assert done.returncode == 2
    assert re.fullmatch(rf"HOST .*'{re.escape(host)}'.*: set an address of this machine, or none\n", done.stderr)


def test_what_nobody_expected_is_one_line_unless_asked_for_more(run, tmp_path):
    broken = tmp_path / "shadow"
    broken.mkdir()
    (broken / "uvicorn.py").write_text("raise RuntimeError('cannot\\nbe imported')\n")
    environment = {"PYTHONPATH": f"{broken}:{ROOT}"}
    plain, asked = run("serve", **environment), run("serve", **environment, ML_LOG_LEVEL="debug")

    assert (plain.returncode, plain.stdout) == (1, "")
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
