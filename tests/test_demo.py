"""`python -m demo`, run as `make run` runs it: a newcomer's first command."""

import json
import os
import re
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import joblib
import pytest

from demo import s3
from demo.models import MODELS, churn_data
from tests.service import ADMIN_KEY, AS_ADMIN, free_port

ROOT = Path(__file__).parent.parent
READY = "Ctrl-C stops everything."
WAIT_SECONDS = 600.0


class Demo:
    """A running `python -m demo` in `folder`, in a process group of its own, as a terminal would start it."""

    def __init__(self, folder: Path, port: int | None = None, **environment: str) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.output = ""
        foreign = ("R2_", "AWS_", "ML_", "DYNO")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "demo"],
            cwd=folder,
            env={**clean, "PYTHONPATH": str(ROOT), "PORT": str(self.port), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> "Demo":
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            if self.process.poll() is None:
                self.process.terminate()
                self.end()

    def read_until(self, text: str | None) -> None:
        """Read the output until it contains `text` (None: to its end)."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + WAIT_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while text is None or text not in self.output:
                assert selector.select(deadline - time.monotonic()), f"waited for {text!r} in vain:\n{self.output}"
                piece = os.read(self.process.stdout.fileno(), 65536).decode()
                assert piece or text is None, f"ended before {text!r}:\n{self.output}"
                if not piece:
                    return
                self.output += piece

    def interrupt(self) -> None:
        """Do what Ctrl-C in a terminal does: signal every process of the group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> int:
        """Wait for the end and return the exit code."""
        self.read_until(None)
        return self.process.wait(WAIT_SECONDS)

    def requests(self) -> dict[str, list[str]]:
        """Return the words of each printed curl line by its model."""
        lines = [shlex.split(line) for line in self.output.splitlines() if line.startswith("curl ")]
        return {json.loads(words[-1])["model"]: words for words in lines}


def left_in(folder: Path) -> list[str]:
    """Return the command lines of the processes that work in `folder`, whatever group or session they are in."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # ended meanwhile, or somebody else's
    return found


def copied(run: Demo, folder: Path) -> Path:
    """Copy what `run` left to `folder`, and return that."""
    shutil.copytree(run.folder / ".demo", folder / ".demo")
    return folder


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Iterator[Demo]:
    """A demo's first run, up to the invitation to try it; the second runs of the tests start from what it leaves."""
    with Demo(tmp_path_factory.mktemp("demo")) as demo:
        demo.read_until(READY)
        yield demo


@pytest.fixture(scope="module")
def stopped_run(first_run) -> Demo:
    first_run.interrupt()
    first_run.end()
    return first_run


@pytest.fixture(scope="module")
def second_run(stopped_run, tmp_path_factory) -> Iterator[Demo]:
    with Demo(copied(stopped_run, tmp_path_factory.mktemp("second"))) as demo:
        demo.read_until(READY)
        yield demo


@pytest.fixture
def kept(stopped_run, tmp_path) -> Path:
    """A folder as the first run left it."""
    return copied(stopped_run, tmp_path)


def test_the_first_run_shows_what_it_does(first_run):
    steps = re.findall(r"^(\S.*\S) +\d+\.\d s$", first_run.output, re.M)

    assert steps == [
        "Starting an S3 server",
        *[f"Training {name}" for name in MODELS],
        *[f"Publishing {name}" for name in MODELS],
        "Starting the service",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_each_printed_line_is_answered_as_the_trained_model_answers(first_run, name):
    words = first_run.requests()[name]
    response = httpx.post(words[2], content=words[-1], headers=[words[4].split(": ")], timeout=WAIT_SECONDS)
    trained = joblib.load(first_run.folder / ".demo" / "trained" / f"{name}.joblib")
    frame = MODELS[name]().frame.head(1)
    expected = trained.predict_proba(frame) if name == "churn" else trained.predict(frame)

    assert words[:2] == ["curl", "-s"]
    assert response.status_code == 200
    assert response.json()["predictions"] == expected.tolist()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("name", MODELS)
def test_each_printed_line_works_when_pasted_into_a_shell(first_run, name):
    line = next(line for line in first_run.output.splitlines() if line.startswith("curl ") and f'"{name}"' in line)
    done = subprocess.run(line, shell=True, capture_output=True, check=True)  # noqa: S602 - what a user does with it

    assert json.loads(done.stdout)["model"] == name


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_service_may_only_read_its_bucket(first_run):
    line = next(line for line in first_run.output.splitlines() if line.startswith("State: curl "))
    status = json.loads(subprocess.run(shlex.split(line)[1:], capture_output=True, check=True).stdout)
    identities = json.loads((first_run.folder / ".demo" / "s3" / "identities.json").read_text())["identities"]
    reader = next(identity for identity in identities if identity["name"] == "reader")

    assert status["mode"] == "cloud-only"
    assert set(reader["actions"]) == {"Read", "List"}


def test_a_second_demo_in_the_same_folder_is_refused(first_run):
    with Demo(first_run.folder) as second:
        code = second.end()

    assert code == 2
    assert second.output == "Another `make run` uses .demo/: stop it first.\n"


def test_a_taken_port_is_refused_before_anything_is_started(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Demo(tmp_path, port) as demo:
            code = demo.end()

    assert code == 2
    assert (
        demo.output
        == f"Port {port} cannot be used (Address already in use): choose another, as in `PORT=8001 make run`.\n"
    )
    assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_everything(first_run):
    """Last of those that need the first run: afterwards it is over."""
    first_run.interrupt()
    code = first_run.end()

    assert code == 0
    assert first_run.output.endswith("\nStopped.\n")
    assert left_in(first_run.folder) == []


def test_the_second_run_neither_trains_nor_publishes(second_run):
    assert "Training" not in second_run.output
    assert "Publishing" not in second_run.output
    assert list(second_run.requests()) == list(MODELS)


def test_an_impatient_second_ctrl_c_leaves_nothing_behind(second_run):
    """Last of those that need the second run: afterwards it is over."""
    second_run.interrupt()
    second_run.interrupt()
    code = second_run.end()

    assert code == 0
    assert "Traceback" not in second_run.output
    assert left_in(second_run.folder) == []


def test_the_demo_ends_as_its_service_ends(kept):
    with Demo(kept) as demo:
        demo.read_until(READY)
        children = Path(f"/proc/{demo.process.pid}/task/{demo.process.pid}/children").read_text().split()
        service = next(int(child) for child in children if b"serve" in Path(f"/proc/{child}/cmdline").read_bytes())
        os.kill(service, signal.SIGKILL)
        code = demo.end()

    assert code == 128 + signal.SIGKILL
    assert demo.output.endswith("The service ended with exit code -9.\n")
    assert left_in(kept) == []


@pytest.mark.parametrize("at", ["Starting an S3", "Training wine", "Publishing cancer"])
def test_ctrl_c_stops_everything_while_it_is_still(at, tmp_path):
    with Demo(tmp_path) as demo:
        demo.read_until(at)
        demo.interrupt()
        code = demo.end()

    assert code == 0
    assert "Traceback" not in demo.output
    assert left_in(tmp_path) == []


def test_sigterm_to_the_demo_alone_stops_everything_while_the_service_starts(kept):
    with Demo(kept) as demo:
        demo.read_until("Starting the service")
        demo.process.terminate()
        code = demo.end()

    assert code == 0
    assert demo.output.endswith("\nStopped.\n")
    assert left_in(kept) == []


@pytest.mark.parametrize("lost", ["data", "identities.json"])
def test_a_damaged_bucket_is_made_anew(kept, lost):
    path = kept / ".demo" / "s3" / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[:40])
    with Demo(kept) as demo:
        demo.read_until("The bucket in .demo/ seems damaged: making it anew.")
        demo.read_until("Training cancer")


@pytest.mark.parametrize("made_by", ['{"scikit-learn": "1.5.2"}, "requests": {}}', "{"], ids=["older", "unfinished"])
def test_models_of_another_demo_are_made_anew(kept, made_by):
    (kept / ".demo" / "published.json").write_text(f'{{"made_by": {made_by}')
    with Demo(kept) as demo:
        demo.read_until("Training cancer")


def test_with_a_bucket_in_the_environment_that_bucket_is_served(tmp_path):
    with s3.start(tmp_path / "s3", bucket="mine") as server:
        environment = {
            "R2_ENDPOINT_URL": server.endpoint_url,
            "R2_BUCKET": "mine",
            "R2_ACCESS_KEY_ID": server.reader.access_key_id,
            "R2_SECRET_ACCESS_KEY": server.reader.secret_access_key,
            "ML_ADMIN_KEYS": ADMIN_KEY,
        }
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".env").write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
        transport = httpx.HTTPTransport(retries=8)  # with growing pauses, about a minute in all
        # Once it listens, callers wait until all is imported.
        with Demo(tmp_path / "run") as demo, httpx.Client(transport=transport, timeout=WAIT_SECONDS) as client:
            status = client.get(f"http://127.0.0.1:{demo.port}/models/status", headers=AS_ADMIN).json()

    assert status["storage"]["location"] == f"R2 bucket mine at {server.endpoint_url}"
    assert "serving your bucket, and no demo" in demo.output
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".env"]


def test_impossible_settings_are_explained_by_the_service(tmp_path):
    with Demo(tmp_path, ML_MAX_ROWS="many") as demo:
        code = demo.end()

    assert code == 2
    assert demo.output.startswith("ML_MAX_ROWS is not usable")


def test_the_churn_data_are_the_same_every_time_and_have_gaps_of_both_kinds():
    (frame, target), (again, _) = churn_data(), churn_data()

    assert frame.equals(again)
    assert set(target) == {"no", "yes"}
    assert frame["age"].isna().any()
    assert frame["country"].isna().any()
    assert len(frame.select_dtypes("number").columns) == 8
    assert len(frame.columns) == 12
