"""A valid file with something wrong in it is refused, or read; it neither ends the process, nor runs or fills anything.

`DISKLESS_MUTATIONS=10000 pytest tests/loading/test_mutations.py` tries as many; by default it is a share of them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from app import loaders
from app.errors import LoadFailed
from tests.loading.forms import dumped
from tests.loading.mutations import ALLOWED_BYTES, MB, File, files, mutation
from tests.service import ROOT, clean_environment
from tests.zoo import fitted

COUNT = int(os.environ.get("DISKLESS_MUTATIONS", "600"))
PROCESSES = 2  # one after the other: whatever a process has read, the next one has not
LATE_BYTES = 48 * MB  # what is taken until the next look
TRUNCATED_EVERY_BYTES = 100


@pytest.fixture(scope="module")
def known() -> list[File]:
    return files()


@pytest.fixture(scope="module")
def stored(known, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "files"
    path.write_bytes(pickle.dumps(known))
    return path


@pytest.mark.parametrize("share", range(PROCESSES))
def test_a_mutation_is_refused_or_read_and_does_no_harm(stored, known, share):
    first, last = COUNT * share // PROCESSES, COUNT * (share + 1) // PROCESSES
    run = subprocess.run(
        [sys.executable, "-m", "tests.loading.mutations", str(stored), str(first), str(last)],
        cwd=ROOT,
        env=clean_environment({"OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
    )

    *begun, report = run.stdout.splitlines() or ["nothing"]
    assert run.returncode == 0, f"at mutation {report} of {mutation(known, int(report))[0].name}: {run.stderr[-3000:]}"
    assert len(begun) == last - first
    told = json.loads(report)
    assert told["wrong"] == []
    assert sum(told["outcomes"].values()) == last - first
    assert told["outcomes"]["LoadFailed"] > told["outcomes"].get("equal", 0) > 0
    assert told["highest"] < ALLOWED_BYTES + LATE_BYTES
    print(told["outcomes"], told["highest"] // MB, "MB")


def test_a_file_that_was_cut_anywhere_is_refused(known):
    for file in known:
        step = max(TRUNCATED_EVERY_BYTES, len(file.body) // 50)
        for length in (*range(1, len(file.body), step), len(file.body) - 1):
            with pytest.raises(LoadFailed):
                loaders.load(file.format, io.BytesIO(file.body[:length]), f"{file.name} cut at {length}")


@pytest.mark.parametrize("compress", [("zlib", 3), ("gzip", 3), ("bz2", 3), ("xz", 3)])
def test_a_compressed_file_is_held_against_the_checksum_behind_it(compress):
    body = dumped(fitted("ridge").estimator, compress)
    assert loaders.load("joblib", io.BytesIO(body), "whole").value

    for wrong in (body[:-3], body[:-6] + bytes(byte ^ 1 for byte in body[-6:])):
        with pytest.raises(LoadFailed):
            loaders.load("joblib", io.BytesIO(wrong), "not whole")
