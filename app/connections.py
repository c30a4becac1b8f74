"""The connections of a server: how long each may keep it waiting, and which ones go when there are too many.

There is no timer for a connection and no note of the time in a request. Twice a second each connection is asked what it is
at; one that is still at the same as before has been there since it was first seen so. That makes every time-out late by up
to a second, never early, and costs a request nothing. Bytes that trickle in change nothing: a head is the same head until
it is complete.
"""

from __future__ import annotations

import enum
import itertools
import logging
from collections import Counter, deque
from time import monotonic
from typing import Any, Protocol

from uvicorn.server import ServerState

from app.errors import Overloaded, RequestError, RequestTimeout
from app.limits import Limits, connections_within_files

logger = logging.getLogger("diskless.server")
SWEEP_SECONDS = 0.5
GRACE_SECONDS = 1.0  # a connection that is idle for less may be about to send its request
HEALTH_PLACES = 16  # beside all others, for who asks how the service is while it answers as many requests as it may
FULL_SECONDS = 0.1  # after all were found busy, for which newcomers are closed without looking again
UNREAD_BYTES = 64 * 1024  # a client that has read so much of its answers has time anew


class Stage(enum.Enum):
    """What a connection is at; the value is what the log calls those that were closed for it."""

    NEW = "silent"  # nothing was ever sent
    IDLE = "idle"  # nothing of a request is here; there were some
    HEAD = "slow_heads"
    BODY = "slow_bodies"  # the head is complete
    ANSWERING = "answering"
    UNREAD = "unread_answers"  # the kernel takes no more of an answer, as its client does not read
    CLOSING = "unread_ends"  # the same, and the connection is to close after it


_QUIET = (Stage.NEW, Stage.IDLE)
_numbers = itertools.count()


class Watch:
    """What a connection was at when it was last looked at, and since when: by the clock of `Connections`, in seconds."""

    __slots__ = ("_part", "_token", "number", "since", "stage")

    def __init__(self) -> None:
        self.number = next(_numbers)  # in the order of their coming
        self.stage = Stage.NEW
        self.since = -1.0
        self._token: object = None
        self._part = 0

    def is_still(self, state: State) -> bool:
        """Whether a connection is at what it was when `see` was last called."""
        stage, token, part = state
        return stage is self.stage and token is self._token and part == self._part and self.since >= 0

    def see(self, state: State, now: float) -> bool:
        """Take note of what a connection is at; return whether it was at that before."""
        if self.is_still(state):
            return True
        self.stage, self._token, self._part = state
        self.since = now
        return False


type State = tuple[Stage, object, int]


class Connection(Protocol):
    """What is asked of a connection."""

    watch: Watch
    transport: Any
    for_health: bool

    def keep_for_health(self) -> None:
        """Be `for_health`: answer one request for the service's health, and refuse anything else."""

    def state(self) -> State:
        """Return what it is at, and an object and a number that are others for the next request, or with progress."""

    def is_held_up(self) -> bool:
        """Whether it is not the client's fault that more of a body has not arrived."""

    def has_arrived(self) -> bool:
        """Whether the kernel has something of it that was not read yet."""

    def reject(self, error: RequestError) -> None:
        """Answer the request of which a part is here with an error, and close."""


class Connections(ServerState):
    """What uvicorn knows of a server, and the limits that its connections have. Belongs to the event loop."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.most = connections_within_files(limits.max_connections)
        self._head, self._body = limits.header_timeout_seconds, limits.body_timeout_seconds
        self._seconds = {
            Stage.NEW: self._head,
            Stage.IDLE: limits.keep_alive_seconds,
            Stage.HEAD: self._head,
            Stage.BODY: self._body,
            Stage.UNREAD: self._body,
            Stage.CLOSING: self._body,
        }
        self.are_ending = False  # and so is each that comes
        self._clock = 0.0  # seconds in which the event loop ran: while it does not, what clients send is not read
        self._swept_at = monotonic()
        self._evictable: deque[Connection] = deque()
        self._full_until = 0.0
        self._for_health: deque[Connection] = deque()
        self._closed: Counter[str] = Counter()  # since the latest sweep

    def sweep(self) -> None:
        """Close the connections that have kept the server waiting for too long. To be called every `SWEEP_SECONDS`."""
        elapsed = self._passed()
        self._swept_at = monotonic()
        self._clock = now = self._clock + elapsed
        self._evictable.clear()
        connection: Any
        for connection in tuple(self.connections):
            try:
                watch: Watch = connection.watch
                if not watch.see(connection.state(), now):
                    continue
                if watch.stage is Stage.BODY and connection.is_held_up():
                    watch.since += elapsed
                elif now - watch.since >= self._seconds.get(watch.stage, now):
                    self._time_out(connection, watch.stage)
            except Exception:
                logger.exception("a connection could not be looked at")
                connection.transport.abort()
        self._tell()

    def make_room(self, newcomer: Connection) -> None:
        """Close a connection, as there is one too many: the one that has been idle longest, or else one that is waited for.

        Who fills the server pays first: when nothing is idle for a second, the oldest of those goes that are more, idle or
        waited for. What is being answered stays; when there is nothing else, there is a place for the newcomer only if it asks
        for the service's health.
        """
        connection = self._first_to_go()
        now = monotonic()
        if connection is None and now >= self._full_until:
            self._evictable.extend(self._in_order(newcomer))
            connection = self._first_to_go()
            if connection is None:
                self._full_until = now + FULL_SECONDS
        if connection is None:
            self._keep_for_health(newcomer)
            return
        if connection.for_health:
            self._keep_for_health(newcomer)
        self._closed["to_make_room"] += 1
        if connection.watch.stage in (Stage.HEAD, Stage.BODY):
            connection.reject(self.all_taken())
        else:
            connection.transport.abort()

    def _keep_for_health(self, newcomer: Connection) -> None:
        """Give a newcomer one of the places for health checks: the oldest goes of those that have not asked yet."""
        asking: list[Connection] = []
        while self._for_health and len(self._for_health) + len(asking) >= HEALTH_PLACES:
            oldest = self._for_health.popleft()
            if oldest not in self.connections or oldest.transport.is_closing():
                continue
            stage = oldest.state()[0]
            if stage not in (Stage.ANSWERING, Stage.UNREAD) and not (stage in _QUIET and oldest.has_arrived()):
                self._closed["to_make_room"] += 1
                oldest.transport.abort()
            else:
                asking.append(oldest)
        self._for_health.extendleft(reversed(asking))
        if len(self._for_health) < HEALTH_PLACES:
            newcomer.keep_for_health()
            self._for_health.append(newcomer)
        else:
            self._closed["turned_away"] += 1
            newcomer.transport.abort()

    def all_taken(self) -> Overloaded:
        """Return what a client is told for which there is no place."""
        return Overloaded(f"all of the {self.most} connections are taken: try again")

    def _first_to_go(self) -> Connection | None:
        """Return the first that is still at what it was when they were put in order."""
        while self._evictable:
            connection = self._evictable.popleft()
            if connection not in self.connections or not connection.watch.is_still(connection.state()):
                continue
            if connection.watch.stage not in _QUIET or not connection.has_arrived():
                return connection
        return None

    def _passed(self) -> float:
        return min(monotonic() - self._swept_at, 2 * SWEEP_SECONDS)

    def _in_order(self, newcomer: Connection) -> list[Connection]:
        """Return the connections that may be closed, the first to go first."""
        now = self._clock + self._passed()
        rested: list[Connection] = []
        idle: list[Connection] = []
        waited_for: list[Connection] = []
        connection: Any
        for connection in self.connections:
            connection.watch.see(connection.state(), now)
            stage, is_young = connection.watch.stage, now - connection.watch.since < GRACE_SECONDS
            if connection is newcomer or stage is Stage.ANSWERING:
                continue
            if stage in (Stage.UNREAD, Stage.CLOSING) and is_young:
                continue  # its answer is on the way
            if stage in (Stage.HEAD, Stage.BODY, Stage.UNREAD):
                waited_for.append(connection)
            else:
                (idle if is_young else rested).append(connection)
        for group in (rested, idle, waited_for):
            group.sort(key=lambda one: (one.watch.since, one.watch.number))
        return [*rested, *idle, *waited_for] if len(idle) > len(waited_for) else [*rested, *waited_for, *idle]

    def _time_out(self, connection: Connection, stage: Stage) -> None:
        if stage in _QUIET:
            if not connection.has_arrived():
                connection.transport.close()
            return
        self._closed[stage.value] += 1
        if stage is Stage.HEAD:
            connection.reject(RequestTimeout(f"the head of the request did not arrive within {self._head:g} s"))
        elif stage is Stage.BODY:
            connection.reject(RequestTimeout(f"the body did not arrive within {self._body:g} s of its head"))
        else:
            connection.transport.abort()

    def _tell(self) -> None:
        if self._closed:
            full = self._closed["to_make_room"] or self._closed["turned_away"]
            log = logger.warning if full else logger.info
            log("closed connections", extra={"fields": dict(self._closed)})
            self._closed.clear()
