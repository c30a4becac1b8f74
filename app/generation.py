"""The line of processes that load: each is first the heir, which looks at the bucket, and then the parent of workers.

A parent has one thread, has never predicted, and does nothing but to fork: workers, which share the memory of its models,
and its heir, which shares it too. The heir looks at the bucket as a single process would (`Refresher`), loads what is new
beside what it has inherited, and lets a child of its own try each new model before it counts as loaded. When what it
should serve is not what its parent's workers serve, it ends its threads and becomes a parent itself: the next generation.
So nothing is loaded twice, and whatever a load does to the process that it runs in, the workers before go on.

What happens when is decided by the supervisor (`app/prefork.py`), at the other end of each process's channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, override

from app import errors, log
from app.auth import ANYONE, CALLER
from app.bundle import Bundle
from app.channel import Channel, Closed, Message
from app.errors import BundleError, DisklessError, LoadFailed
from app.forked import outcome_fields, prepared, serve
from app.gate import Gate
from app.main import access_of, assemble, collector_for, runner_maker
from app.memory import trim_heap
from app.metrics import exposed
from app.model import Model
from app.model_storage import Checked, ModelStorageManager, check, load, settled
from app.names import ModelRef
from app.processes import end_with_parent, how_it_ended, other_threads
from app.refresher import Outcome, Refresher
from app.registry import Registry, Snapshot
from app.runner import Runner
from app.service_counters import ServiceCounters
from app.settings import Settings
from app.spans import Journal, Span
from app.tally import Ledger, Tally
from app.tracing import Exporter
from app.view import View, described
from app.worker import Worker, limit_native_threads

logger = logging.getLogger("diskless.generation")
GATE_SECONDS = 300.0  # for a model's golden rows
THREADS_SECONDS = 5.0  # for threads to end that have been told to
ANNOUNCE_SECONDS = 0.25  # between two descriptions of the same look
LONG_LIFE_SECONDS = 60.0  # a worker that lived so long is replaced at once
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
TERMINATED_PAUSE_SECONDS = 1.0  # a signal to one worker may have been one to all of the service
REHEARSALS = 20
_REHEARSED = (("GET", "/health/live"), ("GET", "/health/ready"), ("GET", "/models/status"), ("POST", "/predict"))
TAINTED = 3  # the exit code of an heir that says itself why it ends


class _Announcing(Registry):
    """A registry that says when it has changed."""

    changed: Callable[[], None] | None = None

    @override
    def swap(self, snapshot: Snapshot) -> list[Runner]:
        retired = super().swap(snapshot)
        if self.changed is not None:
            self.changed()
        return retired


@dataclass(slots=True)
class _Crash:
    """A content that ended the process which loaded it: it is taken to fail so many times again before it is tried."""

    content: str
    reason: str
    left: int


@dataclass(slots=True)
class _Child:
    """A process that was forked here; `number` is a worker's, None is the heir."""

    pid: int
    file: int  # its pidfd
    number: int | None
    began: float  # time.monotonic(), seconds


class Line:
    """One process of the line."""

    def __init__(
        self, settings: Settings, sock: socket.socket, channel: Channel, tally: Tally, *, generation: int
    ) -> None:
        self._settings = settings
        self._sock = sock
        self._channel = channel
        self._tally = tally
        self._generation = generation
        self._service = ServiceCounters()  # of its own as long as nothing is real
        self._exporter = Exporter.from_settings(settings)  # only the workers start it: it has a thread
        journal = None if self._exporter is None else Journal(self._tell_spans)
        self._manager = ModelStorageManager.from_settings(settings, counters=self._service, journal=journal)
        self._registry = _Announcing(settings.aliases, settings.required_models)
        self._refresher = Refresher(
            self._manager,
            self._registry,
            runner_maker(settings),
            refresh_seconds=settings.refresh_seconds,
            load=self._load,
            service=self._service,
            journal=journal,
        )
        self._view = View(self._registry, tally, self._service)
        access = access_of(settings, tally.spent)
        app = assemble(settings, self._manager, self._registry, self._view, access, self._service, self._exporter)
        asyncio.run(_rehearsed(app))
        collector = collector_for(settings, self._registry, self._view, self._service, access)
        asyncio.run(exposed(collector.samples(collector.figures()), ""))  # what it imports and makes, the workers share
        self._service.cells = tally.service_cells(tally.looking_seat)
        self._config = prepared(app)
        # by version, and what the bucket wanted under it
        self._ledger = Ledger[tuple[ModelRef, str | None]](tally)
        self._children: dict[int, _Child] = {}  # by pidfd
        self._deaths: dict[int, int] = {}  # how often each worker has died young
        # The heir's
        self._outcome: Outcome | None = None  # of the latest look
        self._asks: list[str] = []
        self._told = asyncio.Event()
        self._taking_over = False
        self._crashes: dict[str, _Crash] = {}
        self._pool = ThreadPoolExecutor()
        self._announced_at = 0.0
        self._announcing: asyncio.TimerHandle | None = None

    # The heir

    def look(self) -> None:
        """Be the heir: look at the bucket until something else is to be served than the parent's workers serve."""
        self._taking_over, self._asks = False, []
        asks = asyncio.run(self._look())
        if (threads := other_threads(THREADS_SECONDS)) is not None:
            self._end_tainted(f"the process that loads cannot fork: it has other threads ({threads})")
        self._registry.changed = None
        gc.unfreeze()
        gc.collect()
        trim_heap()
        self._assign_rows()
        outcome = outcome_fields(self._outcome) if self._outcome else None
        self._channel.send_now("becoming", asks=asks, outcome=outcome, view=described(self._registry, self._refresher))

    async def _look(self) -> list[str]:
        """Look until there is a change, or the supervisor says that it is time; return whose asking the last look answers."""
        self._told = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(self._pool)
        before = _served(self._registry.snapshot)
        self._registry.changed = self._announce
        loop.add_reader(self._channel.fileno(), self._hear)
        asks: list[str] = []
        async with self._manager.storage:
            while not self._is_wanted():
                if self._outcome is not None and not self._asks:
                    await self._unless_told(self._refresher.rest(self._outcome))
                    if self._is_wanted():
                        break
                asks, self._asks = self._asks, []
                outcome = await self._unless_told(self._refresher.look(insist=bool(asks)), by_asking=False)
                if outcome is None:
                    self._asks = [*asks, *self._asks]
                    asks = []
                    break
                self._outcome = outcome
                self._describe()
                if _served(self._registry.snapshot) != before:
                    break
                if asks:
                    self._channel.send_now("looked", asks=asks, outcome=outcome_fields(outcome))
            await self._refresher.end_threads()
        loop.remove_reader(self._channel.fileno())
        if self._announcing is not None:
            self._announcing.cancel()
        self._pool = ThreadPoolExecutor()  # the loop ends its own
        return asks

    def _is_wanted(self) -> bool:
        """Whether the parent is gone, so that this process is to take its place with what it has."""
        return self._taking_over

    async def _unless_told[T](self, work: Coroutine[Any, Any, T], *, by_asking: bool = True) -> T | None:
        """Do `work`; leave it, and return None, when the supervisor wants the process to take over (or to look)."""
        task = asyncio.ensure_future(work)
        while not task.done():
            self._told.clear()
            if self._is_wanted() or (by_asking and self._asks):
                task.cancel()
                await asyncio.wait([task])
                return None
            told = asyncio.ensure_future(self._told.wait())
            await asyncio.wait([task, told], return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
        return task.result()

    def _hear(self) -> None:
        try:
            messages = self._channel.receive()
        except Closed:
            os._exit(0)
        for message in messages:
            match message["kind"]:
                case "look":
                    self._asks += message["asks"]
                    if not message["again"]:
                        self._crashes.clear()  # somebody wants it to be tried, whatever it did before
                case "take over":
                    self._taking_over = True
                case "stop":
                    self._sock.close()
                    self._channel.send_now("closed")
                    os._exit(0)
        self._told.set()

    def _announce(self) -> None:
        """Describe the registry soon: all that changes until then at once."""
        if self._announcing is None:
            wait = max(0.0, self._announced_at + ANNOUNCE_SECONDS - time.monotonic())
            self._announcing = asyncio.get_running_loop().call_later(wait, self._describe)

    def _describe(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None
        self._announced_at = time.monotonic()
        self._channel.send_now("view", view=described(self._registry, self._refresher))

    def _tell_spans(self, spans: list[Span]) -> None:
        """Have a worker send what a look was: this process may have no thread for it."""
        self._channel.send_now("spans", spans=spans)

    # A load

    async def _load(self, loader: Worker, bundle: Bundle) -> Checked:
        """Load a bundle into this process, and have a child of it compute the golden rows."""
        label, content = str(bundle.ref), bundle.manifest_sha256 or bundle.ref.version
        crash = self._crashes.get(label)
        if crash is not None and crash.content == content and crash.left > 0:
            crash.left -= 1
            raise LoadFailed(f"{label}: {crash.reason}")
        self._channel.send_now("loading", model=label, content=content)
        model = await loader.run(load, bundle)
        loader.close()
        self._pool.shutdown()  # it has nothing to do
        self._pool = ThreadPoolExecutor()
        asyncio.get_running_loop().set_default_executor(self._pool)
        deadline = time.monotonic() + THREADS_SECONDS
        while (threads := other_threads()) is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        if threads is not None:
            self._end_tainted(
                f"loading it started threads that do not end ({threads}), and a process that has them cannot fork "
                "workers: serve it with one worker (ML_WORKERS=1)"
            )
        found = await self._tried(model, label)
        self._channel.send_now("loaded")
        return settled(model, found)

    async def _tried(self, model: Model, label: str) -> Gate:
        """Try a model in a child process; return what it found. Raises the `BundleError` that says why it cannot serve."""
        reading, writing = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._channel.close()
            os.close(reading)
            _be_gate(model, writing)
        os.close(writing)
        timed_out = False
        try:
            async with asyncio.timeout(GATE_SECONDS):
                body = await _read(reading)
        except TimeoutError:
            timed_out, body = True, b""
        finally:
            os.close(reading)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it has told all it has to tell, or is not wanted any more
            _, status = os.waitpid(pid, 0)
        if timed_out:
            raise LoadFailed(f"{label}: its golden rows took more than {GATE_SECONDS:g} s")
        try:
            found: dict[str, Any] = json.loads(body)
        except ValueError:
            raise LoadFailed(
                f"{label}: the process that computed its golden rows ended: {how_it_ended(status)}"
            ) from None
        if "error" in found:
            kind = getattr(errors, found["error"], LoadFailed)
            raise kind(found["detail"]) if issubclass(kind, BundleError) else LoadFailed(found["detail"])
        for name in found["modules"]:  # what it needed to predict, every worker will: here they share it
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        return Gate.model_validate(found["gate"])

    def _end_tainted(self, why: str) -> NoReturn:
        logger.error("cannot fork", extra={"fields": {"reason": why}})
        self._channel.send_now("tainted", reason=why)
        os._exit(TAINTED)

    # The parent

    def lead(self) -> None:
        """Be the parent: fork the workers, replace those that die. Returns in a child only, which is the heir."""
        self._assign_rows()
        gc.freeze()  # or collecting in a worker would write to every object that it shares
        selector = selectors.DefaultSelector()
        selector.register(self._channel, selectors.EVENT_READ)
        due: dict[int, float] = {number: 0.0 for number in range(self._settings.workers)}
        ending = False
        while True:
            now = time.monotonic()
            for number in [number for number, at in due.items() if at <= now]:
                del due[number]
                child = self._fork("worker", number, generation=self._generation)
                selector.register(child.file, selectors.EVENT_READ)
            wait = max(0.0, min(due.values()) - now) if due else None
            for key, _ in selector.select(wait):
                if key.fileobj is self._channel:
                    for message in self._messages():
                        match message["kind"]:
                            case "breed":
                                child = self._fork("heir", None, generation=message["generation"])
                                if child.pid == 0:
                                    selector.close()
                                    self._inherit(message)
                                    return
                                selector.register(child.file, selectors.EVENT_READ)
                            case "retire":
                                ending = True
                            case "stop":
                                ending = True
                                self._sock.close()
                                self._channel.send_now("closed")
                    continue
                selector.unregister(key.fileobj)
                pause = self._reap(self._children.pop(key.fd), ending=ending)
                if pause is not None:
                    due[pause[0]] = time.monotonic() + pause[1]
            if ending:
                due.clear()
                if not any(child.number is not None for child in self._children.values()):
                    os._exit(0)

    def _messages(self) -> list[Message]:
        try:
            return self._channel.receive()
        except Closed:  # the supervisor is gone: the workers see that, too
            os._exit(0)

    def _fork(self, kind: str, number: int | None, *, generation: int) -> _Child:
        """Fork a worker, which never returns, or the heir: in that, the child's process id is 0."""
        if (threads := other_threads(THREADS_SECONDS)) is not None:
            logger.error("refusing to fork", extra={"fields": {"threads": threads}})
            os._exit(1)
        theirs, ours = socket.socketpair()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            theirs.close()
            self._channel.close()
            self._channel = Channel(ours)
            for child in self._children.values():
                os.close(child.file)
            self._children.clear()
            if number is not None:
                self._work(number)
            return _Child(0, -1, number, 0.0)
        ours.close()
        self._channel.send_now(kind, file=theirs.fileno(), pid=pid, number=number, generation=generation)
        theirs.close()
        child = _Child(pid, os.pidfd_open(pid), number, time.monotonic())
        self._children[child.file] = child
        return child

    def _reap(self, child: _Child, *, ending: bool) -> tuple[int, float] | None:
        """Take leave of a child that has ended; return which worker is to be replaced, and after how many seconds."""
        _, status = os.waitpid(child.pid, 0)
        os.close(child.file)
        fields: dict[str, Any] = {"pid": child.pid, "how": how_it_ended(status)}
        self._channel.send_now("ended", **fields, replaced=child.number is not None and not ending)
        if child.number is None or ending:
            return None
        if time.monotonic() - child.began > LONG_LIFE_SECONDS:
            self._deaths.pop(child.number, None)
        if status == 0:
            return child.number, TERMINATED_PAUSE_SECONDS
        deaths = self._deaths[child.number] = self._deaths.get(child.number, 0) + 1
        pause = 0.0 if deaths == 1 else min(FIRST_PAUSE_SECONDS * 2 ** (deaths - 2), LONGEST_PAUSE_SECONDS)
        logger.warning(
            "worker died", extra={"fields": {"worker": child.number, **fields, "replaced_in_seconds": pause}}
        )
        return child.number, pause

    def _work(self, number: int) -> NoReturn:
        """Be a worker."""
        code = 1
        try:
            self._view.count_here(self._tally.seat(self._generation, number))
            serve(
                self._config,
                self._registry,
                self._view,
                self._sock,
                self._channel,
                limits=self._settings.limits,
                drain_seconds=self._settings.drain_seconds,
                exporter=self._exporter,
            )
            code = 0
        except BaseException:
            logger.exception("a worker failed")
        finally:
            _exit(code)

    def _inherit(self, message: Message) -> None:
        """Become the heir, which was told of in `message`."""
        self._generation = message["generation"]
        self._deaths.clear()
        self._crashes = {
            label: _Crash(crash["content"], crash["reason"], crash["count"])
            for label, crash in message["crashes"].items()
        }
        if message["at_once"]:
            self._outcome = None

    def _assign_rows(self) -> None:
        """Give each version that is served its row in the tally."""
        slots = [slot for slot in self._registry.snapshot.slots() if slot.runner is not None]
        runners = {(slot.ref, slot.content): slot.runner for slot in slots}
        rows = self._ledger.assign(runners)
        self._view.rows = {runner: rows[key] for key, runner in runners.items() if runner is not None and key in rows}
        self._view.kept_rows = {ref: place for (ref, _), place in self._ledger.kept.items()}


def begin(
    settings: Settings, sock: socket.socket, channel: Channel, tally: Tally, *, generation: int, loading: bool
) -> NoReturn:
    """Be the first process of a line, from nothing; with `loading` as an heir, else as a parent that has no model yet.

    Without a model its workers answer that they are alive, and why they are not ready.
    """
    log.configure(settings.log_level, settings.log_format)
    try:
        line = Line(settings, sock, channel, tally, generation=generation)
        while True:
            if loading:
                line.look()
            line.lead()
            loading = True
    except BaseException:
        logger.exception("the process that loads failed")
        _exit(1)


async def _rehearsed(app: Any) -> None:
    """Answer what needs no model, as often as makes the interpreter know its way.

    What is made for the first answers, and what Python notes in code that it runs often, is shared by all workers so.
    """

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        del message

    hosts, app.hosts = app.hosts, None  # nobody has named one
    app.predictor.observer.is_muted = True
    for method, path in _REHEARSED * REHEARSALS:
        scope: dict[str, Any] = {
            **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"},
            **{"method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""},
            **{"headers": [(b"host", b"localhost")], "client": None, "server": None, "state": {}},
            CALLER: ANYONE,
        }
        await app(scope, receive, send)
    app.predictor.observer.is_muted, app.hosts = False, hosts


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(code)


def _served(snapshot: Snapshot) -> dict[str, Any]:
    """Return what is served: of each name the versions, and which of them each alias answers with."""
    return {
        name: (
            {label: (slot.content, id(slot.runner)) for label, slot in entry.slots.items() if slot.runner is not None},
            dict(entry.serving),
        )
        for name, entry in snapshot.entries.items()
        if any(slot.runner is not None for slot in entry.slots.values())
    }


def _be_gate(model: Model, writing: int) -> NoReturn:
    """Be the process that tries a model, and write what comes out as JSON."""
    end_with_parent()
    before = set(sys.modules)
    try:
        limit_native_threads()
        found: dict[str, Any] = {"gate": check(model).model_dump(mode="json")}
    except DisklessError as error:
        found = {"error": type(error).__name__, "detail": str(error)}
    found["modules"] = sorted(set(sys.modules) - before)
    body = json.dumps(found).encode()
    while body:
        body = body[os.write(writing, body) :]
    _exit(0)


async def _read(file: int) -> bytes:
    """Read a pipe to its end."""
    os.set_blocking(file, False)
    loop = asyncio.get_running_loop()
    pieces: list[bytes] = []
    ended: asyncio.Future[None] = loop.create_future()

    def read() -> None:
        with contextlib.suppress(BlockingIOError):
            piece = os.read(file, 65536)
            pieces.append(piece)
            if not piece and not ended.done():
                ended.set_result(None)

    loop.add_reader(file, read)
    try:
        await ended
    finally:
        loop.remove_reader(file)
    return b"".join(pieces)
