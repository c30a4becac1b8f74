"""The command line: `python -m app serve | publish | verify | doctor | list | promote | rollback | unpublish | keygen`.

Exit codes: 0 done, 1 it could not be done, 2 wrong usage or settings, 3 something in the bucket would not serve, 130
interrupted. With `--json`, a command prints one JSON document on standard output and nothing else there: its result, or
`{"error": …, "detail": …}` with the same exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from app.errors import DisklessError, SettingsError, UnknownVersion, UnusableKey
from app.names import printable
from app.settings import KEYS_MISSING, MAX_WORKERS, Settings, load_settings, misspelt

if TYPE_CHECKING:
    from app.doctor import Finding
    from app.index import ModelEntry
    from app.model_storage import ModelStorageManager
    from app.seal import PrivateKey

DONE, FAILED, USAGE, UNFIT, INTERRUPTED = 0, 1, 2, 3, 130
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
MAX_PORT = 65535
BAR_BYTES = 1024 * 1024  # objects from this size on get a progress bar
KEY_FILE_BYTES = 4096  # nothing longer is a key


class _WrongUsage(Exception):
    """The words do not make a command; `usage` says how one is made."""

    def __init__(self, usage: str, message: str) -> None:
        super().__init__(message)
        self.usage = usage


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would end the process, so that the complaint can be told as JSON, too."""

    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(self.format_usage(), f"{self.prog}: error: {message}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    fail = _fail_as_json if "--json" in words else _fail
    debugging = False
    try:
        options = _parser().parse_args(words)
        if options.command == _serve and options.json:
            raise _WrongUsage(
                _parser().format_usage(), "python -m app: error: serve prints no document, so it has no --json"
            )
        if options.command == _keygen:  # it needs no bucket
            return _keygen(options)
        try:
            settings = load_settings()
        except SettingsError as error:
            if options.command != _doctor:
                raise SettingsError([*error.problems, *misspelt()]) from error
            return _tell_of_settings(options, error)
        debugging = settings.log_level == "debug"
        return int(options.command(options, settings))
    except _WrongUsage as error:
        return fail(USAGE, "wrong_usage", str(error), f"{error.usage}{error}")
    except SettingsError as error:
        return fail(USAGE, error.kind(), str(error), str(error))
    except DisklessError as error:
        return fail(FAILED, error.kind(), str(error), f"error: {error}")
    except KeyboardInterrupt:
        return fail(INTERRUPTED, "interrupted", "interrupted: `python -m app list` shows what is in force")
    except BrokenPipeError:  # who read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if debugging or isinstance(error, ModuleNotFoundError):
            raise  # of a module that is missing, `app/__main__.py` says what to do
        text = " ".join(f"{type(error).__name__}: {error}".split())
        detail = f"unexpected {text} (ML_LOG_LEVEL=debug shows where it comes from)"
        return fail(FAILED, "unexpected", detail, f"error: {detail}")


def _fail(code: int, error: str, detail: str, text: str | None = None) -> int:
    del error
    print(_printable(detail if text is None else text), file=sys.stderr)
    return code


def _fail_as_json(code: int, error: str, detail: str, text: str | None = None) -> int:
    del text
    print(json.dumps({"error": error, "detail": detail}, indent=1))
    return code


def _printable(text: str) -> str:
    """Return text from a bucket as a terminal may have it: whoever wrote it could have put control sequences in."""
    return "\n".join(map(printable, text.split("\n")))


def _tell(options: argparse.Namespace, document: dict[str, Any], *lines: str) -> int:
    print(json.dumps(document, indent=1) if options.json else _printable("\n".join(lines)))
    return DONE


def _serve(options: argparse.Namespace, settings: Settings) -> int:
    if options.workers is not None:
        settings = settings.model_copy(update={"workers": options.workers})
    if options.require_keys and not settings.api_keys:
        raise SettingsError([KEYS_MISSING.format(why="--require-keys was given")])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_before_the_start)
    # Read by the libraries when they are first imported: more threads than cores only wait for each other.
    for variable in ONE_THREAD:
        os.environ[variable] = "1"
    from app import limits, log

    log.configure(settings.log_level, settings.log_format)
    for problem in misspelt():
        logging.getLogger("diskless.server").warning("unknown setting", extra={"fields": {"problem": problem}})
    limits.allow_files(settings.max_connections)
    if (fit := limits.connections_within_files(settings.max_connections)) < settings.max_connections:
        text = "fewer connections than ML_MAX_CONNECTIONS fit: the process may not open so many files"
        logging.getLogger("diskless.server").warning(text, extra={"fields": {"connections": fit}})
    if settings.workers > 1:
        from app import prefork
        from app.auth import Access
        from app.tracing import Exporter

        prefork.check(settings)
        Exporter.from_settings(settings)  # refused here, not in the processes to come
        access = Access(settings.api_keys, settings.admin_keys)
        logging.getLogger("diskless.server").info("access", extra={"fields": {"rules": access.described()}})
        # Where pyarrow is installed, pandas imports it, and its allocator starts a thread: what has two does not fork.
        os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
        prefork.start(settings, _listen(settings))
    sock = _listen(settings)  # callers wait from here on, instead of being refused, while the rest is imported
    from app import protocol
    from app.direct import protocol_for
    from app.main import create_app

    app = create_app(settings)
    try:
        protocol.serve(
            app,
            app.registry,
            sock,
            limits=settings.limits,
            drain_seconds=settings.drain_seconds,
            http=protocol_for(app),
        )
    except SystemExit as end:  # so uvicorn ends when the application cannot start; the log says why
        return FAILED if end.code else DONE
    return DONE


def _listen(settings: Settings) -> socket.socket:
    """Return the listening socket, and log where it listens. Raises `SettingsError`."""
    from app import listening

    try:
        sock = listening.listen(settings.host, settings.port)
        host, port, *_ = sock.getsockname()
        fields = {"host": host, "port": port, "workers": settings.workers}
        logging.getLogger("diskless.server").info("listening", extra={"fields": fields})
        return sock
    except socket.gaierror as error:
        problem = f"HOST is not usable: {settings.host!r}: {error.strerror}: set an address of this machine, or none"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"PORT {settings.port} is in use: stop what listens there, or choose another, "
            problem += f"for example PORT={settings.port + 1 if settings.port < MAX_PORT else 8000}"
        elif error.errno == errno.EACCES:
            problem = f"PORT {settings.port} may not be listened on by this user: choose one from 1024 up"
        else:
            problem = f"HOST {settings.host!r} cannot be listened on: {error.strerror}: set an address of this machine, or none"
    raise SettingsError([problem])


def _worker_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {MAX_WORKERS}, got {text!r}")
    return int(text)


def _stop_before_the_start(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(DONE)


# Publishing and looking


def _publish(options: argparse.Namespace, settings: Settings) -> int:
    from app import publishing
    from app.manifest import COMPILED
    from app.names import check_name
    from app.seal import public_key_of

    check_name("model name", options.name)
    if options.version is not None:
        check_name("version", options.version)
    key = _read_key(options.seal_key) if options.seal_key else None
    files = {role: getattr(options, role) for role in ("scaler", "encoder", "preprocessor", "model")}
    parts = {role: publishing.part_from_file(role, path) for role, path in files.items() if path is not None}
    examples = publishing.read_examples(options.examples) if options.examples else None
    draft = publishing.draft(
        parts,
        examples,
        extra_columns_ignored=options.ignore_extra_columns,
        trust=settings.trust,
        compile=not options.no_compile,
    )
    ref, live = _in_bucket(
        options,
        settings,
        lambda manager: manager.publish(
            options.name, draft, version=options.version, promote=options.promote, seal_key=key
        ),
    )
    size = sum(len(part.body) for part in draft.parts if part.role != COMPILED)
    rows = len(draft.golden.instances) if draft.golden else 0
    signer = public_key_of(key).id if key else None
    document = {
        **ref._asdict(),
        "bytes": size,
        "golden_rows": rows,
        "methods": draft.signature.methods,
        "production": live,
        "sealed_by": signer,
        "compiled": draft.compiled.model_dump(mode="json", exclude_none=True) if draft.compiled else None,
        "not_compiled": draft.not_compiled,
    }
    seal = f", sealed with key {signer}" if signer else ""
    state = "in production" if live else f"not in production: `promote {ref.name} {ref.version}` would put it there"
    methods = ", ".join(draft.signature.methods)
    lines = [f"published {ref}: {size:,} bytes, {rows} golden rows, methods {methods}{seal}; {state}"]
    _tell(options, document, *lines, *([draft.summary] if draft.summary else []))
    if not rows:
        print(
            "no --examples were given: the service cannot check this model's answers when it loads it", file=sys.stderr
        )
    return DONE


def _verify(options: argparse.Namespace, settings: Settings) -> int:
    from app.verification import Verdict, verify

    async def work(manager: ModelStorageManager) -> tuple[list[Verdict], str]:
        found = []
        async for verdict in verify(manager, options.names):
            found.append(verdict)
            if options.json:
                continue
            if verdict.problem is not None:
                print(_printable(f"{'unread' if verdict.unread else 'FAILED'} {verdict.ref}: {verdict.problem}"))
            else:
                rows = (
                    f"{verdict.golden_rows} golden rows come out" if verdict.golden_rows else "no golden rows to check"
                )
                forms = {"compiled": ", compiled only", "compiled+sklearn": ", compiled as well"}
                print(_printable(f"ok     {verdict.ref}: loads, {rows}{forms.get(verdict.runtime or '', '')}"))
        return found, _where(manager)

    found, where = _in_bucket(options, settings, work)
    if options.json:
        _tell(options, {"versions": [{"ok": verdict.problem is None, **asdict(verdict)} for verdict in found]})
    elif not found:
        print(f"no models in {where}")
    if any(verdict.problem is not None and not verdict.unread for verdict in found):
        return UNFIT
    if unread := sum(verdict.unread for verdict in found):
        print(f"whether {unread} of {len(found)} would serve is not known: the storage failed", file=sys.stderr)
        return FAILED
    return DONE


def _doctor(options: argparse.Namespace, settings: Settings) -> int:
    from app import doctor

    async def work() -> list[Finding]:
        findings = []
        async with aclosing(doctor.examine(settings, read_only=options.read_only)) as examination:
            async for finding in examination:
                findings.append(finding)
                if not options.json:
                    print(_printable(str(finding)), flush=True)
        return findings

    findings = asyncio.run(work())
    _tell(options, doctor.document(findings), doctor.summary(findings))
    return DONE if doctor.is_well(findings) else UNFIT


def _tell_of_settings(options: argparse.Namespace, error: SettingsError) -> int:
    from app import doctor

    findings = doctor.of_settings(error)
    _tell(options, doctor.document(findings), *map(str, findings), doctor.summary(findings))
    return USAGE


def _list(options: argparse.Namespace, settings: Settings) -> int:
    from app.model_storage import Catalogue

    async def work(manager: ModelStorageManager) -> tuple[Catalogue, str]:
        return await manager.catalogue(), _where(manager)

    catalogue, where = _in_bucket(options, settings, work)
    known = catalogue.index.models
    bare = {wanted.ref.name: wanted for wanted in catalogue.wanted.values() if wanted.bare}
    names = list(dict.fromkeys(options.names or (*known, *bare)))
    if unknown := [name for name in names if name not in known and name not in bare]:
        there = ", ".join(dict.fromkeys((*known, *bare))) or "nothing"
        raise UnknownVersion(f"there is no model {' or '.join(map(repr, unknown))} in {where}; there is {there}")
    models: list[dict[str, Any]] = []
    lines: list[str] = []
    for name in names:
        document: dict[str, Any] = {"name": name, "published": True}
        lines.append(name)
        if name in known:
            document |= _as_document(known[name])
        if name in bare and name not in catalogue.index.published:
            document |= {"published": False, "versions": [{"version": bare[name].ref.version}]}
            lines.append(f"  {bare[name].ref.version}  bare: a file without a manifest")
        elif not known[name].versions:
            lines.append("  no version is left")
        if name in known:
            lines += _as_lines(known[name], history=options.history or bool(options.names))
        models.append(document)
    return _tell(options, {"models": models}, *lines or [f"no models in {where}"])


def _as_document(entry: ModelEntry) -> dict[str, Any]:
    return {
        "versions": [
            {"version": version, **stored.model_dump(), "aliases": entry.aliases_of(version)}
            for version, stored in entry.versions.items()
        ],
        "aliases": entry.aliases,
        "history": {
            alias: [{"rollback": False, **move.model_dump()} for move in moves]
            for alias, moves in entry.history.items()
        },
        "unpublished": [{"version": version, **removal.model_dump()} for version, removal in entry.unpublished.items()],
    }


def _as_lines(entry: ModelEntry, *, history: bool) -> Iterator[str]:
    width = max(map(len, (*entry.versions, *entry.unpublished)), default=0)
    for version, stored in entry.versions.items():
        aliases = []
        for alias in entry.aliases_of(version):
            moves = entry.history.get(alias)
            aliases.append(f"{alias} ({moves[-1].by or 'unknown'}, {_time(moves[-1].at)})" if moves else alias)
        yield f"  {version:<{width}}  {_time(stored.created)}  {', '.join(aliases)}".rstrip()
    if not history:
        return
    for alias, moves in entry.history.items():
        yield f"  moves of {alias}, the latest first:"
        for move in reversed(moves):
            back = ", rolled back" if move.rollback else ""
            yield f"    {_time(move.at)}  {move.previous or '-'} -> {move.version}  {move.by or 'unknown'}{back}"
    if entry.unpublished:
        yield "  unpublished:"
        for version, removal in entry.unpublished.items():
            yield f"    {_time(removal.at)}  {version:<{width}}  {removal.by or 'unknown'}"


def _time(at: str) -> str:
    return at.replace("+00:00", "Z")


# The life of a version


def _promote(options: argparse.Namespace, settings: Settings) -> int:
    moved = _in_bucket(
        options, settings, lambda manager: manager.promote(options.name, options.version, alias=options.alias)
    )
    name, version = moved.ref
    now = f"{name}: {moved.alias} names {version}"
    return _tell(
        options,
        {"name": name, "alias": moved.alias, "version": version, "previous": moved.previous, "changed": moved.changed},
        f"{now} now; before, it named {moved.previous or 'nothing'}"
        if moved.changed
        else f"{now} already; nothing was changed",
        *([] if moved.alias in settings.aliases else [f"services serve it only where ML_ALIASES has {moved.alias}"]),
    )


def _rollback(options: argparse.Namespace, settings: Settings) -> int:
    moved = _in_bucket(options, settings, lambda manager: manager.rollback(options.name, alias=options.alias))
    name, version = moved.ref
    since = f" (unpublished since, so passed over: {', '.join(moved.skipped)})" if moved.skipped else ""
    return _tell(
        options,
        {
            **{"name": name, "alias": moved.alias, "version": version, "previous": moved.previous},
            **{"changed": moved.changed, "skipped": moved.skipped},
        },
        f"{name}: {moved.alias} went back from {moved.previous} to {version}{since}",
    )


def _unpublish(options: argparse.Namespace, settings: Settings) -> int:
    gone = _in_bucket(
        options,
        settings,
        lambda manager: manager.unpublish(options.name, options.version, drop_aliases=options.drop_aliases),
    )
    objects = f"{gone.objects_deleted} objects deleted" if gone.objects_deleted else "there was no object to delete"
    aliases = f"; the model has lost the alias {', '.join(gone.aliases)}" if gone.aliases else ""
    by, at = gone.removal.by or "unknown", _time(gone.removal.at)
    return _tell(
        options,
        {
            **{**gone.ref._asdict(), "changed": not gone.repeated, "objects_deleted": gone.objects_deleted},
            **{"aliases_dropped": gone.aliases, "unpublished": gone.removal.model_dump()},
        },
        f"{gone.ref} was unpublished already, by {by} at {at}; now {objects}"
        if gone.repeated
        else f"unpublished {gone.ref}: {objects}{aliases}",
    )


def _in_bucket[T](
    options: argparse.Namespace, settings: Settings, work: Callable[[ModelStorageManager], Coroutine[Any, Any, T]]
) -> T:
    """Do `work` with the bucket open, and with progress bars where somebody sees them."""
    from app.model_storage import ModelStorageManager

    with _progress(settings.prefix, shown=sys.stderr.isatty() and not options.json) as moved:
        manager = ModelStorageManager.from_settings(settings, moved=moved)

        async def opened() -> T:
            async with manager.storage:
                return await work(manager)

        return asyncio.run(opened())


def _where(manager: ModelStorageManager) -> str:
    return f"{manager.storage.describe()} under {manager.prefix}"


@contextmanager
def _progress(prefix: str, *, shown: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield what the storage is to tell of moved bytes: it draws a bar for each large object, while that is on its way."""
    if not shown:
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # or a thread would watch the bars
    bars: dict[str, tqdm[NoReturn]] = {}

    def moved(key: str, more: int, size: int) -> None:
        if key not in bars:
            if size < BAR_BYTES or more < 0:
                return
            bars[key] = tqdm(
                desc=key.removeprefix(prefix), total=size, unit="B", unit_scale=True, unit_divisor=1024, leave=False
            )
        bar = bars[key]
        bar.update(more)
        if bar.n >= size:
            bars.pop(key).close()

    try:
        yield moved
    finally:
        for bar in bars.values():
            bar.close()


# Keys


def _keygen(options: argparse.Namespace) -> int:
    from app.seal import keygen, read_public_key

    private, public = keygen()
    key_id = read_public_key(public).id
    path: Path = options.file
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UnusableKey(
            f"{path} exists already, and a key is never overwritten, for nobody could seal with it again: "
            "choose another file, or move that one away first"
        ) from error
    except OSError as error:
        raise UnusableKey(f"the private key cannot be written: {error.strerror}: {path}") from error
    try:
        with open(file, "w", encoding="ascii") as stream:
            stream.write(f"{private}\n")
            stream.flush()
            os.fsync(file)
    except BaseException as error:
        path.unlink(missing_ok=True)  # half a key would look like one
        if isinstance(error, OSError):
            raise UnusableKey(f"the private key cannot be written: {error.strerror}: {path}") from error
        raise
    return _tell(
        options,
        {"file": str(path), "public_key": public, "key_id": key_id},
        f"private key: in {path}, which only you can read; it belongs where you publish, never on a server",
        f"public key:  {public} (id {key_id})",
        f"to publish:  python -m app publish NAME --model FILE --seal-key {path}",
        f"to serve:    ML_TRUSTED_KEYS={public} (several: with a comma between them)",
        "             ML_REQUIRE_SEAL=true, once everything that serves is sealed",
    )


def _read_key(path: str) -> PrivateKey:
    """Read a private key from a file, or from standard input if it is called `-`. Raises `UnusableKey`."""
    from app.model_storage import private_key

    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            status = os.fstat(file.fileno())
            text = file.read(KEY_FILE_BYTES)
    except OSError as error:
        raise UnusableKey(f"the seal key cannot be read: {error.strerror}: {path}") from error
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        print(f"warning: others can read the private key in {path}: chmod 600 {path}", file=sys.stderr)
    return private_key(text.decode("ascii", errors="replace"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m app", description="Serve scikit-learn models from Cloudflare R2.")
    json_help = "print one JSON document instead of text"
    parser.add_argument("--json", action="store_true", help=json_help)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, help: str, *parents: _Parser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", parents=parents)

    common = _Parser(add_help=False)
    # Suppressed, or its default would undo one before the command.
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=json_help)
    named = _Parser(add_help=False)
    named.add_argument("name", metavar="NAME", help="the model's name")
    one = _Parser(add_help=False, parents=[named])
    one.add_argument("version", metavar="VERSION", help="the version's label")
    aliased = _Parser(add_help=False)
    aliased.add_argument("--alias", default="production", metavar="ALIAS", help="which alias to move; production")

    serve = command("serve", "serve the models of the bucket")
    serve.add_argument(
        "--workers",
        type=_worker_count,
        metavar="N",
        help="processes that answer; ML_WORKERS, else WEB_CONCURRENCY, else 1",
    )
    serve.add_argument(
        "--require-keys", action="store_true", help="do not start without ML_API_KEYS; as ML_REQUIRE_KEYS=true"
    )
    serve.set_defaults(command=_serve)

    publish = command("publish", "store a new version of a model", named, common)
    publish.add_argument("--model", type=Path, required=True, metavar="FILE", help=".joblib, .pkl or .skops")
    publish.add_argument("--scaler", type=Path, metavar="FILE", help="applied first")
    publish.add_argument(
        "--encoder", type=Path, metavar="FILE", help="applied after the scaler; a LabelEncoder: to labels"
    )
    publish.add_argument("--preprocessor", type=Path, metavar="FILE", help="applied last before the model")
    publish.add_argument("--examples", type=Path, metavar="FILE", help="rows to check by: .csv, .parquet or .json")
    publish.add_argument("--version", metavar="LABEL", help="the version's label; the next integer unless given")
    publish.add_argument("--promote", action="store_true", help="put it in production (a first version always is)")
    publish.add_argument("--seal-key", metavar="FILE", help="seal it with this private key; -: from standard input")
    publish.add_argument("--no-compile", action="store_true", help="store no compiled form beside the model")
    publish.add_argument(
        "--ignore-extra-columns", action="store_true", help="requests may have columns it does not know"
    )
    publish.set_defaults(command=_publish)

    verify = command("verify", "check that what is in the bucket would serve", common)
    verify.add_argument("names", nargs="*", metavar="NAME", help="these models only")
    verify.set_defaults(command=_verify)

    doctor = command("doctor", "find what keeps the service from serving, and how to mend it", common)
    doctor.add_argument("--read-only", action="store_true", help="do not try whether the bucket can be written to")
    doctor.set_defaults(command=_doctor)

    listing = command("list", "show models, versions, aliases, and who moved them", common)
    listing.add_argument("names", nargs="*", metavar="NAME", help="these models only, with their history")
    listing.add_argument("--history", action="store_true", help="with the history of all of them")
    listing.set_defaults(command=_list)

    promote = command("promote", "let an alias name a version", one, aliased, common)
    promote.set_defaults(command=_promote)

    rollback = command("rollback", "let an alias name what it named before", named, aliased, common)
    rollback.set_defaults(command=_rollback)

    unpublish = command("unpublish", "remove a version that no alias names, with its files", one, common)
    unpublish.add_argument(
        "--drop-aliases", action="store_true", help="remove the aliases that name it, too: they stop serving"
    )
    unpublish.set_defaults(command=_unpublish)

    keys = command("keygen", "make a pair of keys to seal versions with", common)
    keys.add_argument("file", type=Path, metavar="FILE", help="where the private key is written; it must not exist")
    keys.set_defaults(command=_keygen)
    return parser
