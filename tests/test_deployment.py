"""The files that put the service on a machine agree with each other and with the code."""

import ast
import fnmatch
import http.server
import importlib.metadata
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.settings import Settings, variables

ROOT = Path(__file__).parent.parent
SERVING = ["requirements.txt"]
DEMO = [*SERVING, "demo/requirements.txt"]
TRACED = [*SERVING, "otel-requirements.txt"]
DEVELOPMENT = ["requirements-dev.txt"]


def lines(file: str) -> list[str]:
    """Return the file's lines without comments and blanks."""
    return [line.strip() for line in (ROOT / file).read_text().splitlines() if line.strip() and line[0] != "#"]


def included(file: str) -> list[str]:
    """Return `file` and the requirement files that it includes, as paths from the root, as pip finds them."""
    found = [file]
    for line in lines(file):
        if line.startswith("-r "):
            found += included(str((ROOT / file).parent.joinpath(line[3:]).relative_to(ROOT)))
    return found


def pinned(files: list[str]) -> list[Requirement]:
    """Return every requirement that pip meets in `files`."""
    every = dict.fromkeys(path for file in files for path in included(file))
    return [
        Requirement(line.partition(" #")[0].partition(" --hash")[0].rstrip(" \\"))
        for path in every
        for line in lines(path)
        if not line.startswith("-")
    ]


def here(requirement: Requirement) -> bool:
    """Whether the requirement's marker holds on this machine."""
    return requirement.marker is None or requirement.marker.evaluate()


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", "\n".join(lines("Dockerfile")))
    return [(verb, rest) for verb, _, rest in (line.partition(" ") for line in text.splitlines())]


def values(verb: str) -> list[str]:
    """Return what the Dockerfile gives to each instruction `verb`."""
    return [rest for found, rest in instructions() if found == verb]


def command() -> list[str]:
    """Return the words of the Procfile's web process."""
    return shlex.split(lines("Procfile")[0].removeprefix("web:"))


def imports(folder: str) -> Iterator[str]:
    """Yield the outermost name of every module that Python files under `folder` import."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def test_the_procfile_has_one_process_and_it_is_web():
    assert [line.partition(":")[0] for line in lines("Procfile")] == ["web"]
    assert command() == ["python", "-m", "app", "serve"]


def test_heroku_finds_one_package_manager_only():
    managers = ["requirements.txt", "Pipfile", "Pipfile.lock", "poetry.lock", "uv.lock", "setup.py", "runtime.txt"]

    assert [name for name in managers if (ROOT / name).exists()] == ["requirements.txt"]


def test_requirements_include_the_ml_requirements():
    assert "-r ml-requirements.txt" in lines("requirements.txt")


def test_what_serves_without_traces_installs_nothing_of_them():
    needed = {requirement.name for requirement in pinned(SERVING)}
    extra = {requirement.name for requirement in pinned(["otel-requirements.txt"])} - needed

    assert {"opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"} <= extra
    assert "otel-requirements.txt" not in included("requirements.txt")


def test_every_place_names_the_same_python():
    version = (ROOT / ".python-version").read_text().strip()

    assert version == "3.12"
    assert values("FROM") == [f"python:{version}-slim"]
    assert f"ifneq ($(usable),{version})" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("files", [DEMO, TRACED, DEVELOPMENT], ids=["run", "traces", "test"])
def test_every_requirement_is_pinned_to_one_version(files):
    requirements = pinned(files)
    pins = {(canonicalize_name(requirement.name), str(requirement.specifier)) for requirement in requirements}

    assert all(re.fullmatch(r"==[^,*]+", version) for _, version in pins)
    assert len({name for name, _ in pins}) == len(pins)


@pytest.mark.parametrize("files", [SERVING, DEMO, TRACED, DEVELOPMENT], ids=["serve", "run", "traces", "test"])
def test_what_the_requirements_require_is_pinned_too(files):
    pins = {canonicalize_name(requirement.name): requirement for requirement in pinned(files) if here(requirement)}

    missing = set()
    wanted = [(name, extra) for name, pin in pins.items() for extra in ("", *pin.extras)]
    for name, extra in dict.fromkeys(wanted):
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                wanted += [(canonicalize_name(needed.name), wish) for wish in needed.extras]
                missing |= {canonicalize_name(needed.name)} - set(pins)

    assert missing == set()


def test_the_tests_run_on_the_pinned_versions():
    pins = [requirement for requirement in pinned(DEVELOPMENT) if here(requirement)]

    assert {pin.name: importlib.metadata.version(pin.name) for pin in pins} == {
        pin.name: str(pin.specifier).removeprefix("==") for pin in pins
    }


@pytest.mark.parametrize(
    ("folder", "files", "optional"),
    [("app", SERVING, {"pyarrow"}), ("demo", DEMO, set())],
    ids=["app", "demo"],
)
def test_only_what_the_requirements_name_is_imported(folder, files, optional):
    providers = importlib.metadata.packages_distributions()
    foreign = set(imports(folder)) - set(sys.stdlib_module_names) - {"app", "demo"} - optional
    pins = {canonicalize_name(requirement.name) for requirement in pinned(files)}

    assert {name for name in foreign if not pins & {canonicalize_name(it) for it in providers.get(name, [])}} == set()


def test_the_image_installs_what_make_run_installs_to_serve():
    recipe = re.search(r"^TO_RUN := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    image = [file for step in values("RUN") for file in re.findall(r"-r (\S+)", step)]

    assert recipe is not None
    assert recipe[1].split() == [*image, "demo/requirements.txt"]
    assert set(image) == set(included("requirements.txt"))


def test_the_image_has_each_file_before_the_step_that_needs_it():
    copied: set[str] = set()
    for verb, rest in instructions():
        if verb == "COPY":
            *sources, target = rest.split()
            assert all((ROOT / source).exists() for source in sources)
            assert target in {"./", *(f"./{source}" for source in sources)}
            copied |= set(sources)
        if verb == "RUN":
            assert copied >= {path for file in re.findall(r"-r (\S+)", rest) for path in included(file)}

    assert copied == {"app", *included("requirements.txt")}


def test_the_image_copies_its_code_after_the_requirements_are_installed():
    steps = instructions()
    last_install = max(at for at, (verb, rest) in enumerate(steps) if verb == "RUN" and "pip install" in rest)

    assert steps.index(("COPY", "app ./app")) > last_install


def test_the_image_runs_the_procfiles_command_as_somebody_without_rights():
    (user,) = values("USER")

    assert user not in {"root", "0"}
    assert f"--uid {user} " in " ".join(values("RUN"))
    assert [json.loads(words) for words in values("CMD")] == [command()]
    assert values("STOPSIGNAL") == ["SIGTERM"]
    assert [verb for verb, _ in instructions()].index("USER") > [verb for verb, _ in instructions()].index("RUN")


def health_check(port: int) -> int:
    """Run the image's health check against `port` of this machine and return its exit code."""
    (check,) = values("HEALTHCHECK")
    python, *arguments = json.loads(check.partition("CMD ")[2])

    assert python == "python"
    return subprocess.run(
        [sys.executable, *arguments], env={"PORT": str(port)}, check=False, stderr=subprocess.DEVNULL
    ).returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_images_health_check_tells_a_live_service_from_another(status, code):
    class Service(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/live" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.handle_request).start()

        assert health_check(server.server_port) == code


def test_the_images_health_check_fails_where_nothing_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, so that nobody else gets it, but not listening

        assert health_check(taken.getsockname()[1]) == 1


def test_app_json_asks_for_settings_that_exist():
    app = json.loads((ROOT / "app.json").read_text())
    known = {name for field in Settings.model_fields for name in variables(field)}

    assert set(app["env"]) <= known
    assert {"R2_BUCKET", "R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY"} <= set(app["env"])
    assert all(entry["description"] for entry in app["env"].values())
    assert list(app["formation"]) == ["web"]


def test_the_settings_that_app_json_requires_are_enough_to_start(monkeypatch, tmp_path):
    app = json.loads((ROOT / "app.json").read_text())
    monkeypatch.chdir(tmp_path)  # away from a .env
    for name, entry in app["env"].items():
        monkeypatch.setenv(name, entry.get("value", "x"))

    assert Settings().r2.bucket == "x"


def test_heroku_yml_builds_the_dockerfile():
    document = yaml.safe_load((ROOT / "heroku.yml").read_text())

    assert document == {"build": {"docker": {"web": "Dockerfile"}}}  # without `run`, the image's CMD is the web process


@pytest.mark.parametrize(
    "name", [".env", ".git", ".demo", ".venv", "tests", "models", "README.md", "requirements-dev.txt"]
)
def test_the_image_never_sees(name):
    rules = lines(".dockerignore")
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]

    assert rules[0] == "*"
    assert name not in let_in


def test_the_image_sees_what_it_copies():
    let_in = {rule[1:] for rule in lines(".dockerignore") if rule.startswith("!")}

    assert let_in == {source for rest in values("COPY") for source in rest.split()[:-1]}


def slug_ignores(path: str) -> bool:
    """Whether a dyno goes without `path`: a rule with a slash counts from the root, one without anywhere."""
    return any(fnmatch.fnmatch(f"/{path}" if rule.startswith("/") else path, rule) for rule in lines(".slugignore"))


@pytest.mark.parametrize(
    "path", [".env", ".git", ".demo", ".lint", "tests", "demo", "docs", "bench", "lint", "requirements-dev.txt"]
)
def test_the_slug_leaves_out(path):
    assert slug_ignores(path)


@pytest.mark.parametrize("path", ["app", "Procfile", ".python-version", "requirements.txt", "ml-requirements.txt"])
def test_the_slug_keeps(path):
    assert not slug_ignores(path)


def test_the_slug_keeps_all_code():
    code = [path for path in (ROOT / "app").rglob("*.py")]

    assert not [path for path in code if slug_ignores(path.relative_to(ROOT).as_posix())]
