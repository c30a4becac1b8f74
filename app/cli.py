"""The command line: `python -m app serve | publish | verify`.

Exit codes: 0 done, 1 it could not be done, 2 wrong usage or settings, 3 something in the bucket would not serve, 130
interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from app.errors import DisklessError, SettingsError
from app.settings import Settings, load_settings

DONE, FAILED, USAGE, UNFIT, INTERRUPTED = 0, 1, 2, 3, 130
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LOKY_MAX_CPU_COUNT")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    debugging = False
    try:
        settings = load_settings()
        debugging = settings.log_level == "debug"
        return int(options.command(options, settings))
    except SettingsError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return USAGE
    except DisklessError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if debugging:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"error: unexpected {text} (ML_LOG_LEVEL=debug shows where it comes from)", file=sys.stderr)
        return FAILED


def _serve(options: argparse.Namespace, settings: Settings) -> int:
    del options
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_before_the_start)
    # Read by the libraries when they are first imported: more threads than cores only wait for each other.
    for variable in ONE_THREAD:
        os.environ[variable] = "1"
    from app import log, protocol

    log.configure(settings.log_level)
    sock = _listen(settings)  # callers wait from here on, instead of being refused, while the rest is imported
    from app.main import create_app

    app = create_app(settings)
    try:
        protocol.serve(
            app,
            app.registry,
            sock,
            keep_alive_seconds=settings.keep_alive_seconds,
            drain_seconds=settings.drain_seconds,
        )
    except SystemExit as end:  # so uvicorn ends when the application cannot start; the log says why
        return FAILED if end.code else DONE
    return DONE


def _listen(settings: Settings) -> socket.socket:
    from app import protocol

    try:
        return protocol.listen(settings.host, settings.port)
    except socket.gaierror as error:
        problem = f"HOST is not usable: {settings.host!r}: {error.strerror}: set an address of this machine, or none"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"PORT {settings.port} is in use: stop what listens there, or choose another"
        elif error.errno == errno.EACCES:
            problem = f"PORT {settings.port} may not be listened on by this user: choose one from 1024 up"
        else:
            problem = f"HOST {settings.host!r} cannot be listened on: {error.strerror}: set an address of this machine, or none"
    raise SettingsError([problem])


def _stop_before_the_start(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(DONE)


def _publish(options: argparse.Namespace, settings: Settings) -> int:
    from app import publishing
    from app.model_storage import ModelStorageManager
    from app.names import check_name

    check_name("model name", options.name)
    if options.version is not None:
        check_name("version", options.version)
    files = {role: getattr(options, role) for role in ("scaler", "encoder", "preprocessor", "model")}
    parts = {role: publishing.part_from_file(role, path) for role, path in files.items() if path is not None}
    examples = publishing.read_examples(options.examples) if options.examples else None
    draft = publishing.draft(parts, examples, extra_columns_ignored=options.ignore_extra_columns)
    manager = ModelStorageManager.from_settings(settings)

    async def work() -> tuple[str, bool]:
        async with manager.storage:
            ref, live = await manager.publish(options.name, draft, version=options.version, promote=options.promote)
            return str(ref), live

    ref, live = asyncio.run(work())
    size = sum(len(part.body) for part in draft.parts)
    rows = len(draft.golden.instances) if draft.golden else 0
    state = "in production" if live else "not in production: --promote puts a version there"
    print(f"published {ref}: {size:,} bytes, {rows} golden rows, methods {', '.join(draft.signature.methods)}; {state}")
    if not rows:
        print(
            "no --examples were given: the service cannot check this model's answers when it loads it", file=sys.stderr
        )
    return DONE


def _verify(options: argparse.Namespace, settings: Settings) -> int:
    from app.model_storage import ModelStorageManager
    from app.verification import verify

    manager = ModelStorageManager.from_settings(settings)

    async def work() -> int:
        count = failed = 0
        async with manager.storage:
            async for verdict in verify(manager, options.names):
                count += 1
                if verdict.problem is not None:
                    failed += 1
                    print(f"FAILED {verdict.ref}: {verdict.problem}")
                elif verdict.golden_rows:
                    print(f"ok     {verdict.ref}: loads, {verdict.golden_rows} golden rows come out")
                else:
                    print(f"ok     {verdict.ref}: loads, no golden rows to check")
        if not count:
            print(f"no models in {manager.storage.describe()} under {manager.prefix}")
        return UNFIT if failed else DONE

    return asyncio.run(work())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app", description="Serve scikit-learn models from Cloudflare R2.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve the models of the bucket")
    serve.set_defaults(command=_serve)

    publish = commands.add_parser("publish", help="store a new version of a model in the bucket")
    publish.add_argument("name", metavar="NAME", help="the model's name")
    publish.add_argument("--model", type=Path, required=True, metavar="FILE", help=".joblib, .pkl or .skops")
    publish.add_argument("--scaler", type=Path, metavar="FILE", help="applied first")
    publish.add_argument(
        "--encoder", type=Path, metavar="FILE", help="applied after the scaler; a LabelEncoder: to labels"
    )
    publish.add_argument("--preprocessor", type=Path, metavar="FILE", help="applied last before the model")
    publish.add_argument("--examples", type=Path, metavar="FILE", help="rows to check by: .csv, .parquet or .json")
    publish.add_argument("--version", metavar="LABEL", help="the version's label; the next integer unless given")
    publish.add_argument("--promote", action="store_true", help="put it in production (a first version always is)")
    publish.add_argument(
        "--ignore-extra-columns", action="store_true", help="requests may have columns it does not know"
    )
    publish.set_defaults(command=_publish)

    verify = commands.add_parser("verify", help="check that what is in the bucket would serve")
    verify.add_argument("names", nargs="*", metavar="NAME", help="these models only")
    verify.set_defaults(command=_verify)
    return parser
