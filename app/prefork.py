"""The supervisor of several workers: it listens, starts the first process that loads, and decides who serves and who goes.

It imports nothing that a model needs, loads nothing and answers nobody, so that there is nothing in it that could fail or
grow. The processes that do are in `app/generation.py` (a parent with its workers, and its heir) and `app/forked.py` (a
worker); each has a channel to this one, and ends when that does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from app import log
from app.channel import Channel, Closed, Message
from app.errors import SettingsError
from app.processes import adopt_orphans, how_it_ended
from app.tally import GENERATIONS, Tally

if TYPE_CHECKING:
    from app.settings import Settings

logger = logging.getLogger("diskless.supervisor")
SWITCH_SECONDS = 120.0  # for the workers of a new generation to be ready
LISTENERS_SECONDS = 0.3  # at a stop, for the others to close the listening socket before the workers do
EXIT_SECONDS = 5.0  # beyond the drain, which the workers hold to themselves
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 60.0
MAX_FIRST_LOSSES = 3  # processes lost before any generation has served: then it is no accident
REMEMBERED_ENDS = 100
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
END_SECONDS = 0.5  # until it is known how a process has ended


@dataclass(eq=False, slots=True)
class _Peer:
    """A process at the other end of a channel. An heir becomes a parent."""

    role: Literal["parent", "heir", "worker"]
    pid: int
    channel: Channel
    generation: int
    number: int | None = None
    parent: _Peer | None = None  # who forked it, None: this process did
    state: Literal["starting", "serving", "leaving"] = "starting"
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    drained: bool = False
    closed: bool = False  # the listening socket
    loading: tuple[str, str] | None = None  # the version, and the content of it
    fault: str | None = None  # why it says that it ends


@dataclass(slots=True)
class _Asked:
    """What a look has done, for those who have asked for it, once nothing of before answers any more."""

    asks: list[str]
    outcome: dict[str, Any]
    waits_for: list[_Peer]


def check(settings: Settings) -> None:
    """Raise `SettingsError` where several workers cannot be had with these settings, or on this machine."""
    problems = []
    if settings.swap_policy == "replace":
        problems.append(
            "ML_SWAP_POLICY=replace needs one worker: several share the old version's memory, which is not free "
            "before the last of them has ended; set ML_WORKERS=1, or ML_SWAP_POLICY=keep"
        )
    if sys.platform != "linux":
        problems.append("ML_WORKERS must be 1 on this system: more workers are forked, which needs Linux")
    if problems:
        raise SettingsError(problems)


class Supervisor:
    """Keeps a generation of workers on a listening socket until it is told to stop."""

    def __init__(self, sock: socket.socket, *, workers: int, drain_seconds: float) -> None:
        self._sock = sock
        self._workers = workers
        self._drain_seconds = drain_seconds
        self._tally = Tally(workers)
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []
        self._current: _Peer | None = None  # the parent whose workers answer
        self._coming: _Peer | None = None  # the parent whose workers are about to
        self._switch_by = 0.0
        self._next_generation = 0
        self._since: str | None = None
        self._restarts = 0
        self._view: dict[str, Any] | None = None
        self._crashes: dict[str, dict[str, Any]] = {}  # by version: the content, the reason, how often
        self._losses = 0  # heirs in a row
        self._asks: list[str] = []  # not answered yet
        self._outcome: tuple[list[str], dict[str, Any]] | None = None  # of the generation that is coming
        self._asked: list[_Asked] = []
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._lost: dict[int, _Peer] = {}  # those of which it is not known yet how they ended
        self._ends: dict[int, str] = {}  # how processes ended
        self._stop_asked = self._stopping = self._workers_told = self._given_up = False

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, and return the exit code: 0, or 1 when nothing could ever be served."""
        adopt_orphans()  # a parent may end before those whom it has forked
        self._waking, waker = socket.socketpair()
        self._waking.setblocking(False)
        waker.setblocking(False)
        self._waker = waker
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to be woken
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._selector.register(self._waking, selectors.EVENT_READ)
        self._start_line(loading=False)
        while not self._is_over():
            for key, mask in self._selector.select(self._wait_seconds()):
                if key.fileobj is self._waking:
                    with contextlib.suppress(BlockingIOError):
                        while self._waking.recv(4096):
                            pass
                else:
                    self._exchange(key.data, mask)
            self._reap()
            if self._stop_asked and not self._stopping:
                self._stop()
            self._run_timers()
            for peer in self._peers:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.channel.has_unsent else 0)
                if self._selector.get_key(peer.channel).events != wanted:
                    self._selector.modify(peer.channel, wanted, peer)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # platforms send more of them, to the very end
        if not self._given_up:
            logger.info("stopped")
        return 1 if self._given_up else 0

    def _ask_to_stop(self, *_: object) -> None:
        self._stop_asked = True

    # Processes

    def _start_line(self, *, loading: bool) -> None:
        """Fork the first process of a line: with `loading`, one that replaces what serves when it has loaded everything."""
        generation = self._number()
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._become_line(theirs, generation, loading)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        theirs.close()
        logger.info("loading a generation", extra={"fields": {"generation": generation, "pid": pid}})
        peer = self._add(_Peer("heir" if loading else "parent", pid, Channel(ours), generation))
        if not loading:
            self._expect(peer)
        self._tell_all()

    def _become_line(self, sock: socket.socket, generation: int, loading: bool) -> NoReturn:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the supervisor's to obey, and the workers'
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._selector.close()
        self._waking.close()
        self._waker.close()
        for peer in self._peers:
            peer.channel.close()
        try:
            from app.generation import begin
            from app.settings import load_settings

            settings = load_settings().model_copy(update={"workers": self._workers})
            begin(settings, self._sock, Channel(sock), self._tally, generation=generation, loading=loading)
        except BaseException:
            logger.exception("the process that loads could not begin")
        finally:
            os._exit(1)

    def _add(self, peer: _Peer) -> _Peer:
        self._peers.append(peer)
        self._selector.register(peer.channel, selectors.EVENT_READ, peer)
        if self._stopping:
            self._tell_to_stop(peer)
        return peer

    def _number(self) -> int:
        """Return the number of a generation to come: none whose workers would count where those of one do that is here."""
        taken = {peer.generation % GENERATIONS for peer in self._peers}
        for number in range(self._next_generation, self._next_generation + GENERATIONS):
            if number % GENERATIONS not in taken:
                break
        else:
            number = self._next_generation
        self._next_generation = number + 1
        return number

    def _of(self, role: str) -> Iterator[_Peer]:
        return (peer for peer in list(self._peers) if peer.role == role)

    def _reap(self) -> None:
        """Take leave of whoever has ended and was forked here, or left behind by a parent."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._note_end(ended[0], how_it_ended(ended[1]))

    # Messages

    def _exchange(self, peer: _Peer, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            peer.channel.flush()
        if mask & selectors.EVENT_READ and peer in self._peers:
            try:
                for message in peer.channel.receive():
                    self._follow(peer, message)
            except Closed:
                self._lose(peer)

    def _follow(self, peer: _Peer, message: Message) -> None:
        match message["kind"]:
            case "worker" | "heir" as role:
                channel = Channel(socket.socket(fileno=message["file"]))
                generation = message["generation"]
                self._meet(_Peer(role, message["pid"], channel, generation, message["number"], parent=peer))
            case "ready":
                peer.state = "serving" if peer.state == "starting" else peer.state
                self._switch_if_ready()
                self._tell_all()
            case "view":
                self._view = message["view"]
                self._tell_workers("view", latest=True, view=self._view)
            case "spans":
                worker = next((peer for peer in self._of("worker") if peer.state == "serving"), None)
                if worker is not None:
                    worker.channel.send("spans", latest=True, spans=message["spans"])
            case "look":
                self._asks.append(message["ask"])
                for heir in self._of("heir"):
                    heir.channel.send("look", asks=[message["ask"]], again=False)
            case "looked":
                self._losses = 0
                self._answer(message["asks"], message["outcome"], [])
            case "loading":
                peer.loading = message["model"], message["content"]
            case "loaded":
                peer.loading = None
            case "tainted":
                peer.fault = message["reason"]
            case "becoming":
                self._view = message["view"]
                peer.role, peer.loading = "parent", None
                self._expect(peer)
                self._outcome = (message["asks"], message["outcome"]) if message["outcome"] else None
            case "ended":
                self._restarts += message["replaced"]
                self._note_end(message["pid"], message["how"])
            case "drained":
                peer.drained = True
                self._answer_asked()
            case "closed":
                peer.closed = True

    def _meet(self, peer: _Peer) -> None:
        self._add(peer)
        if peer.role == "worker":
            if self._view is not None:
                peer.channel.send("view", view=self._view)
            if peer.parent not in (self._current, self._coming):
                self._tell_to_leave(peer)
        elif self._asks:
            peer.channel.send("look", asks=self._asks, again=True)
        self._tell_all()

    def _lose(self, peer: _Peer) -> None:
        """Take leave of a process whose channel has ended, as the process has, or is about to."""
        self._peers.remove(peer)
        self._selector.unregister(peer.channel)
        peer.channel.close()
        self._answer_asked()
        if self._stopping:
            return
        if peer is self._current:
            self._current = None
            logger.error("the workers' parent was lost", extra={"fields": {"pid": peer.pid}})
            self._see_to_an_heir()
        elif peer.role == "heir" or peer is self._coming:
            self._lost[peer.pid] = peer
            self._after(END_SECONDS, lambda: self._conclude(peer.pid))  # or as soon as it is known how it ended
            if peer.pid in self._ends:
                self._conclude(peer.pid)
        self._tell_all()

    def _note_end(self, pid: int, ended: str) -> None:
        self._ends[pid] = ended
        while len(self._ends) > REMEMBERED_ENDS:
            del self._ends[next(iter(self._ends))]
        self._conclude(pid)

    def _conclude(self, pid: int) -> None:
        """Do what follows from the end of an heir, or of a parent whose workers have not taken over yet."""
        peer = self._lost.pop(pid, None)
        if peer is None or self._stopping:
            return
        why = peer.fault or f"the process that loads ended {self._ends.get(pid, 'for an unknown reason')}"
        fields = {"generation": peer.generation, "pid": pid, "reason": why}
        self._losses += 1
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (self._losses - 1), LONGEST_PAUSE_SECONDS)
        if peer.loading is not None:
            label, content = peer.loading
            before = self._crashes.get(label)
            count = before["count"] + 1 if before is not None and before["content"] == content else 1
            self._crashes[label] = {"content": content, "reason": why, "count": count}
            fields["model"] = label
        event = "a generation was lost" if peer is self._coming else "the process that loads was lost"
        logger.error(event, extra={"fields": fields | {"next_in_seconds": pause}})
        if peer is self._coming:
            self._coming = None
            for worker in self._of("worker"):
                if worker.parent is peer:
                    self._tell_to_leave(worker)
        if self._since is None and self._losses >= MAX_FIRST_LOSSES:
            self._given_up = True
            self._stop()
            return
        self._after(pause, self._see_to_an_heir)

    def _see_to_an_heir(self) -> None:
        """Have somebody look at the bucket, and take the place of a parent that is gone."""
        if self._stopping or self._coming is not None:
            return
        if heirs := list(self._of("heir")):
            if self._current is None and heirs[0].parent is not None:  # else it has nothing yet that could be served
                heirs[0].channel.send("take over")
        elif self._current is not None:
            self._breed(self._current, at_once=True)
        else:
            self._start_line(loading=any(self._of("worker")))

    def _breed(self, parent: _Peer, *, at_once: bool = False) -> None:
        parent.channel.send("breed", generation=self._number(), crashes=self._crashes, at_once=at_once)

    # Generations

    def _expect(self, parent: _Peer) -> None:
        """Wait for a parent's workers to be ready."""
        self._coming, self._switch_by = parent, time.monotonic() + SWITCH_SECONDS

    def _switch_if_ready(self) -> None:
        """Let the workers that are coming answer alone, when all of them are ready."""
        coming = self._coming
        if coming is None or self._stopping:
            return
        ready = [peer for peer in self._of("worker") if peer.parent is coming and peer.state == "serving"]
        if len(ready) < self._workers:
            return
        self._current, self._coming, self._losses = coming, None, 0
        self._since = datetime.now(UTC).isoformat(timespec="milliseconds")
        fields = {"generation": coming.generation, "parent": coming.pid, "workers": [peer.pid for peer in ready]}
        logger.info("a generation serves", extra={"fields": fields})
        old = [peer for peer in self._of("worker") if peer.parent is not coming]
        for peer in old:
            self._tell_to_leave(peer)
        for peer in self._of("parent"):
            if peer is not coming:
                peer.channel.send("retire")
        if self._outcome is not None:
            asks, outcome = self._outcome
            self._outcome = None
            self._answer(asks, outcome, old)
        self._breed(coming)

    def _tell_to_leave(self, worker: _Peer) -> None:
        if worker.state != "leaving":
            worker.state = "leaving"
            worker.channel.send("leave")

    def _answer(self, asks: list[str], outcome: dict[str, Any], waits_for: list[_Peer]) -> None:
        self._asks = [ask for ask in self._asks if ask not in asks]
        if asks:
            self._asked.append(_Asked(asks, outcome, waits_for))
            self._answer_asked()

    def _answer_asked(self) -> None:
        for asked in list(self._asked):
            if not any(peer in self._peers and not peer.drained for peer in asked.waits_for):
                self._asked.remove(asked)
                self._tell_workers("looked", asks=asked.asks, outcome=asked.outcome)

    def _tell_workers(self, kind: str, **fields: Any) -> None:
        for worker in self._of("worker"):
            worker.channel.send(kind, **fields)

    def _service(self) -> dict[str, Any]:
        current = self._current
        return {
            "count": self._workers,
            "generation": current.generation if current else None,
            "since": self._since,
            "restarts": self._restarts,
            "supervisor": os.getpid(),
            "parent": current.pid if current else None,
            "heir": next((heir.pid for heir in self._of("heir")), None),
            "processes": [
                {
                    "pid": peer.pid,
                    "number": peer.number,
                    "generation": peer.generation,
                    "state": peer.state,
                    "since": peer.since,
                }
                for peer in self._of("worker")
            ],
        }

    def _tell_all(self) -> None:
        self._tell_workers("service", latest=True, service=self._service())

    # Time, and the end

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._timers.append((time.monotonic() + seconds, action))

    def _wait_seconds(self) -> float | None:
        due = [at for at, _ in self._timers]
        if self._coming is not None:
            due.append(self._switch_by)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _run_timers(self) -> None:
        now = time.monotonic()
        ready = [timer for timer in self._timers if timer[0] <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for _, action in ready:
            action()
        if self._coming is not None and now >= self._switch_by:
            self._coming.fault = f"its workers were not ready within {SWITCH_SECONDS:g} s"
            self._switch_by = now + SWITCH_SECONDS
            _kill(self._coming)

    def _stop(self) -> None:
        """Begin to stop: nobody may keep the listening socket open who does not accept, then the workers drain."""
        self._stopping = True
        logger.info("stopping the workers")
        self._sock.close()
        for peer in self._peers:
            self._tell_to_stop(peer)
        self._after(LISTENERS_SECONDS, self._stop_workers)
        self._after(self._drain_seconds + EXIT_SECONDS, self._kill_all)

    def _tell_to_stop(self, peer: _Peer) -> None:
        if peer.role == "worker":
            if self._workers_told:
                peer.channel.send("stop")
        elif any(worker.parent is peer for worker in self._of("worker")):
            peer.channel.send("stop")
        else:
            _kill(peer)  # nobody depends on it, and it may be in the middle of a load

    def _stop_workers(self) -> None:
        if not self._workers_told:
            self._workers_told = True
            self._tell_workers("stop")

    def _kill_all(self) -> None:
        for peer in self._peers:
            _kill(peer)

    def _is_over(self) -> bool:
        """Whether everything has stopped. On the way there, the workers are told once the others have let go of the socket."""
        if not self._stopping:
            return False
        if all(peer.closed for peer in self._peers if peer.role != "worker"):
            self._stop_workers()
        if self._peers:
            return False
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        return False


def _kill(peer: _Peer) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(peer.pid, signal.SIGKILL)


def start(settings: Settings, sock: socket.socket) -> NoReturn:
    """Make this process the supervisor of `settings.workers` workers on a listening socket.

    It begins anew as `python -m app.prefork`: what has read the settings would stay in memory for nothing.
    """
    words = {
        "socket": sock.fileno(),
        "workers": settings.workers,
        "drain_seconds": settings.drain_seconds,
        "log_level": settings.log_level,
        "log_format": settings.log_format,
    }
    os.set_inheritable(sock.fileno(), True)
    given = sys.orig_argv[1:]
    options = given[: given.index("-m")] if "-m" in given else []
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until there are handlers for them again
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *options, "-m", "app.prefork", json.dumps(words)])  # noqa: S606 - this very interpreter


def main(words: Mapping[str, Any]) -> int:
    """Be the supervisor, as `start` has said; return the exit code."""
    log.configure(words["log_level"], words["log_format"])
    sock = socket.socket(fileno=words["socket"])
    return Supervisor(sock, workers=words["workers"], drain_seconds=words["drain_seconds"]).run()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
