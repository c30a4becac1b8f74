"""`make run`: serve the user's own bucket where the environment names one, else four demo models from a local S3 server.

The demo goes the way that a user goes: models are published with `python -m app publish` and served with
`python -m app serve`, whose credential may only read. `.demo/` keeps the bucket, so that the next run need not train.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import importlib.metadata
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pydantic import ValidationError

import app
from app.settings import Settings
from demo import s3
from demo.progress import step

HOST = "127.0.0.1"
FOLDER = Path(".demo")
BUCKET, TRAINED = FOLDER / "s3", FOLDER / "trained"
PUBLISHED = FOLDER / "published.json"  # what made the bucket, and a request for each model; written last
METHODS = {"cancer": "predict", "wine": "predict", "diabetes": "predict", "churn": "predict_proba"}

READY_WITHIN_SECONDS = 60.0
STOPPED_WITHIN_SECONDS = 30.0  # the service itself gives up what is in flight after 25
POLL_SECONDS = 0.05


class Stopped(BaseException):
    """Ctrl-C, `SIGTERM`, or the terminal was closed."""


class Failed(Exception):
    """The demo cannot go on; the message says why. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Damaged(Failed):
    """What `.demo/` holds from an earlier run does not serve."""


class Signals:
    """Raises `Stopped` at the first signal to stop; later ones change nothing, as stopping ends by itself."""

    def __init__(self) -> None:
        self._held = False
        self._came = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait until the end of the block, so that nothing is started or stopped by half."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._came:
            raise Stopped

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._came = not self._came, True
        if first and not self._held:
            raise Stopped


class Processes:
    """Every process that the demo started, to be stopped last in, first out."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        with self._signals.held():
            self._stack.close()

    def start_s3(self) -> s3.S3Server:
        """Start the S3 server on the bucket in `.demo/`. Raises `Damaged`."""
        with self._signals.held():
            try:
                server = s3.start(BUCKET, bucket="models")
            except (s3.ServerFailed, OSError, ValueError, LookupError, TypeError) as error:
                raise Damaged(f"The S3 server did not start: {error}") from error
            self._stack.callback(server.stop)
        return server

    def start(
        self, module: str, *arguments: str, environment: Mapping[str, str], **pipes: Any
    ) -> subprocess.Popen[str]:
        """Start `python -m module arguments`. A terminal's Ctrl-C is for the demo, which stops the others in order."""
        with self._signals.held():
            command = [sys.executable, "-m", module, *arguments]
            process = subprocess.Popen(command, env=environment, text=True, preexec_fn=_ignore_ctrl_c, **pipes)
            self._stack.callback(_stop, process)
        return process

    def run(self, module: str, *arguments: str, environment: Mapping[str, str], **pipes: Any) -> None:
        """Run `python -m module arguments` to its end. Raises `Failed` with what it printed."""
        process = self.start(module, *arguments, environment=environment, **pipes)
        printed, _ = process.communicate()
        if process.returncode:
            words = shlex.join([module, *arguments])
            raise Failed(f"python -m {words}: exit code {process.returncode}\n{printed or ''}".rstrip())


def main() -> int:
    """Serve the user's bucket or the demo; return the exit code."""
    try:
        settings = Settings()
    except ValidationError:
        _serve_the_users_bucket()  # which says what is wrong with the settings
    if settings.has_r2_credentials:
        print("R2 settings found: serving your bucket, and no demo.")
        _serve_the_users_bucket()
    signals = Signals()
    try:
        _demo(signals, settings)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return failure.code if failure.code >= 0 else 128 - failure.code  # ended by a signal: as shells have it
    except Stopped:
        print("\nStopped.", flush=True)
        return 0


def _serve_the_users_bucket() -> NoReturn:
    environment = {"HOST": HOST, **os.environ}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "app", "serve"], environment)


def _demo(signals: Signals, settings: Settings) -> NoReturn:
    """Serve the bucket in `.demo/`, made anew where it has to be. Raises `Failed` when the service ends."""
    port = _free_port(settings.port)
    with _locked_folder():
        requests = _published()
        if requests:
            try:
                _serve(signals, settings, port, requests)
            except Damaged as damage:
                print(f"{damage}\nThe bucket in {FOLDER}/ seems damaged: making it anew.", flush=True)
        for path in (PUBLISHED, BUCKET, TRAINED):
            _remove(path)
        TRAINED.mkdir()
        _serve(signals, settings, port)


def _serve(signals: Signals, settings: Settings, port: int, requests: dict[str, str] | None = None) -> NoReturn:
    """Start everything, and publish the models unless there are `requests` to published ones. Raises `Failed` at the end."""
    with Processes(signals) as processes:
        with step("Starting an S3 server"):
            server = processes.start_s3()
        if requests is None or server.kind == "moto":  # which forgets
            requests = _publish(processes, server)
        with step("Starting the service"):
            environment = _environment(server, server.reader)
            environment |= {"HOST": HOST, "PORT": str(port), "ML_REQUIRED_MODELS": ",".join(METHODS)}
            if "log_level" not in settings.model_fields_set:
                environment["ML_LOG_LEVEL"] = "warning"  # the lines below are to be seen
            key = secrets.token_urlsafe(24)  # another each time: it opens nothing but this demo
            environment["ML_ADMIN_KEYS"] = f"demo:{key}"
            service = processes.start("app", "serve", environment=environment)
            _wait_until_ready(service, port, key)
        _show(port, requests, key)
        raise Failed(f"The service ended with exit code {service.wait()}.", service.returncode)


def _publish(processes: Processes, server: s3.S3Server) -> dict[str, str]:
    """Train and publish every model; return the body of a request for each."""
    environment = _environment(server, server.writer)
    requests = {}
    processes.run("demo.models", str(TRAINED), environment=environment)
    for name in METHODS:
        model, examples = TRAINED / f"{name}.joblib", TRAINED / f"{name}.json"
        files = ["--model", str(model), "--examples", str(examples)]
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with step(f"Publishing {name}"):
            processes.run("app", "publish", name, *files, environment=environment, **quiet)
        requests[name] = _request(name, json.loads(examples.read_text())[0])
    PUBLISHED.write_text(json.dumps({"made_by": _fingerprint(), "requests": requests}, indent=1))
    return requests


def _published() -> dict[str, str] | None:
    """Return the requests to the models in `.demo/`, None unless this very demo published them."""
    try:
        published = json.loads(PUBLISHED.read_text())
        requests: dict[str, str] = published["requests"]
        return requests if published["made_by"] == _fingerprint() and set(requests) == set(METHODS) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint() -> dict[str, str]:
    """Return what a published model depends on: the demo's code, and the versions that trained it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    libraries = ("scikit-learn", "numpy", "scipy", "pandas", "joblib")
    return {"demo": digest.hexdigest(), "app": app.__version__, "python": sys.version} | {
        name: importlib.metadata.version(name) for name in libraries
    }


def _environment(server: s3.S3Server, identity: s3.Credentials) -> dict[str, str]:
    """Return this environment with the local bucket in it, and without what could lead anywhere else."""
    away = (
        *("R2_", "AWS_", "CLOUDFLARE_", "DYNO", "FORCE_R2", "ML_COMPANIONS"),
        *("ML_API_KEYS", "ML_ADMIN_KEYS", "ML_REQUIRE_KEYS", "ML_RATE_LIMIT"),
    )
    return {name: value for name, value in os.environ.items() if not name.startswith(away)} | {
        "R2_ENDPOINT_URL": server.endpoint_url,
        "R2_BUCKET": server.bucket,
        "R2_ACCESS_KEY_ID": identity.access_key_id,
        "R2_SECRET_ACCESS_KEY": identity.secret_access_key,
        "ML_CLOUD_ONLY": "true",
        "ML_PREFIX": "models/",
        "ML_ALIASES": "production",
        "NO_PROXY": HOST,
        "no_proxy": HOST,
    }


def _request(name: str, row: dict[str, Any]) -> str:
    """Return the body of a request with `row`: for `churn` an object, for the others an array, as both are worth seeing."""
    body: dict[str, Any] = {"model": name, "instances": [row if name == "churn" else list(row.values())]}
    if METHODS[name] != "predict":
        body["method"] = METHODS[name]
    return json.dumps(body, separators=(",", ":"))


def _wait_until_ready(service: subprocess.Popen[str], port: int, key: str) -> None:
    """Return when all models are served. Raises `Failed` when the service ends, `Damaged` when they will not be."""
    deadline = time.monotonic() + READY_WITHIN_SECONDS
    reason = "it does not answer"
    while time.monotonic() < deadline:
        if service.poll() is not None:
            raise Failed(f"The service ended with exit code {service.returncode}.", service.returncode or 1)
        with contextlib.suppress(OSError):
            status = json.loads(_call(port, "GET", "/models/status", key=key)[1])
            if status["ready"]:
                return
            reason = status["reason"]
            looked = status["storage"]["last_sync"] or status["storage"]["error"]
            if looked and all(model["state"] != "LOADING" for model in status["models"]):
                break
        time.sleep(POLL_SECONDS)
    raise Damaged(f"The service is not ready: {reason}.")


def _show(port: int, requests: Mapping[str, str], key: str) -> None:
    """Print the addresses, and for each model a request, after it was answered."""
    url = f"http://{HOST}:{port}"
    lines = []
    for name, body in requests.items():
        status, answer = _call(port, "POST", "/predict", body)
        if status != 200:
            raise Damaged(f"The service does not answer for {name}: {status} {answer}")
        lines.append(f"curl -s {url}/predict -H 'content-type: application/json' -d {shlex.quote(body)}\n")
    print(f"\nServing {', '.join(requests)} on {url}\nDocumentation: {url}/docs")
    print(f"State: curl -s {url}/models/status -H 'x-api-key: {key}'\n")
    print("Each of these works as it is:\n", *lines, "Ctrl-C stops everything.", sep="\n", flush=True)


def _call(port: int, method: str, path: str, body: str | None = None, *, key: str | None = None) -> tuple[int, str]:
    """Return the status and the body of an answer. Not urllib, which might ask a proxy for it."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=30)) as connection:
        headers = {"content-type": "application/json"} | ({"x-api-key": key} if key else {})
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def _free_port(port: int) -> int:
    """Return `port`, or some free one for 0. Raises `Failed` when it cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise Failed(
                f"Port {port} cannot be used ({error.strerror}): choose another, as in `PORT=8001 make run`.", 2
            ) from error
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _locked_folder() -> Iterator[None]:
    """Make `.demo/`, and keep other demos away from it."""
    if not FOLDER.is_dir():
        _remove(FOLDER)
        FOLDER.mkdir()
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Failed(f"Another `make run` uses {FOLDER}/: stop it first.", 2) from error
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(process: subprocess.Popen[str]) -> None:
    """End the process as gently as it lets itself be ended."""
    process.terminate()
    try:
        process.wait(STOPPED_WITHIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
