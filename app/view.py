"""What a worker knows of what goes on outside of it: how the bucket was found, what is on its way, who else answers.

The process that looks at the bucket describes its registry (`described`); a worker keeps its own in step with that, but
for its runners: which models it serves was settled when it was forked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from app.counters import KEPT_SECONDS, Counters
from app.names import ModelRef
from app.refresher import Outcome, Refresher
from app.registry import Entry, Registry, Slot, Snapshot, State
from app.runner import Runner
from app.service_counters import ServiceCounters
from app.tally import Tally

STARTING = "the service is starting: try again in a moment"


def described(registry: Registry, refresher: Refresher) -> dict[str, Any]:
    """Return what the other processes are told, as JSON has it."""
    return {
        "entries": {
            name: {"slots": [_slot(slot) for slot in entry.slots.values()], "wanted": dict(entry.wanted)}
            for name, entry in registry.snapshot.entries.items()
        },
        "settled": registry.settled,
        "unread": registry.unread,
        "last_sync": refresher.last_sync.isoformat() if refresher.last_sync else None,
        "last_error": refresher.last_error,
        "fallback": refresher.fallback,
        "ignored": refresher.ignored,
    }


def _slot(slot: Slot) -> dict[str, Any]:
    return {
        "version": slot.ref.version,
        "state": slot.state.value,
        "reason": slot.reason,
        "hint": slot.hint,
        "bare": slot.bare,
    }


class View:
    """A worker's picture of the service around it. Stands where the status would ask a `Refresher`."""

    def __init__(self, registry: Registry, tally: Tally, service: ServiceCounters) -> None:
        self._registry = registry
        self._tally = tally
        self._counters = service
        self._service: dict[str, Any] = {}
        self._seat: int | None = None
        self.rows: Mapping[Runner, int] = {}  # where each runner's model is counted
        # The same of versions that were retired lately, and since when they are, by time.monotonic().
        self.kept_rows: Mapping[ModelRef, tuple[int, float]] = {}
        self.ask: Callable[[], Awaitable[Outcome]] | None = None
        self.last_sync: datetime | None = None
        self.last_error: str | None = None
        self.fallback: str | None = None
        self.ignored: dict[str, str] = {}
        self.unloading: list[ModelRef] = []

    async def look_now(self) -> Outcome:
        """Have the bucket looked at, and return when what follows from it has been done."""
        if self.ask is None:
            return Outcome(error=STARTING)
        return await self.ask()

    def counters(self, runner: Runner) -> Counters:
        """Return what all workers together have counted for a runner's model."""
        row = self.rows.get(runner)
        return runner.counters if row is None else self._tally.total(row)

    def count_here(self, seat: int) -> None:
        """Let each runner count where this worker counts, and the service as well."""
        self._seat = seat
        self._counters.cells = self._tally.service_cells(seat)
        for runner, row in self.rows.items():
            runner.counters = self._tally.counters(row, seat)

    def waiting(self, runner: Runner) -> tuple[int, int]:
        """Return how many requests wait for a runner's model, and how many wait or are computed, in all workers that are there."""
        row = self.rows.get(runner)
        places = [runner.counters] if row is None else [self._tally.counters(row, seat) for seat in self._seats()]
        return sum(place.queued for place in places), sum(place.in_flight for place in places)

    def _seats(self) -> set[int]:
        """Return where those count who are there: what a process last said of itself that is gone is not true any more."""
        seats = {self._tally.seat(one["generation"], one["number"]) for one in self._service.get("processes", ())}
        return seats if self._seat is None else seats | {self._seat}

    @property
    def kept(self) -> dict[ModelRef, Counters]:
        """What all workers have counted for versions that were retired lately."""
        oldest = time.monotonic() - KEPT_SECONDS
        return {ref: self._tally.total(row) for ref, (row, since) in self.kept_rows.items() if since >= oldest}

    def service_total(self) -> ServiceCounters:
        """Return what all processes together have counted that is no version's."""
        return self._tally.service_total()

    def workers(self) -> dict[str, Any]:
        """Return the processes that answer, as the supervisor last told of them; `pid` is this one's."""
        return {**self._service, "pid": os.getpid()}

    def hear(self, service: dict[str, Any]) -> None:
        """Take what the supervisor tells of the processes.

        As long as those of the first generation are there, which have no model, the service is not ready whoever is asked: told to
        leave, they still answer what has reached them.
        """
        self._service = service
        first = any(it["generation"] == 0 for it in service["processes"])
        self._registry.waits_for = "workers that have the models are taking over" if first else None

    def follow(self, told: Mapping[str, Any]) -> None:
        """Bring registry and status in step with what was `described`. What is served here stays served."""
        self.last_sync = datetime.fromisoformat(told["last_sync"]) if told["last_sync"] else None
        self.last_error, self.fallback, self.ignored = told["last_error"], told["fallback"], told["ignored"]
        own = self._registry.snapshot.entries
        entries = {name: _merged(name, own.get(name, Entry()), entry) for name, entry in told["entries"].items()}
        for name, entry in own.items():
            if name not in entries and entry.serving:
                entries[name] = entry  # until the workers come that do not have it any more
        self._registry.swap(Snapshot(dict(sorted(entries.items()))))
        self._registry.unreadable(told["unread"])
        if told["settled"]:
            self._registry.settle()


def _merged(name: str, own: Entry, told: Mapping[str, Any]) -> Entry:
    slots: dict[str, Slot] = {}
    for row in told["slots"]:
        slot = own.slots.get(row["version"])
        if slot is None or slot.runner is None:
            state = State(row["state"])
            if state is State.READY:  # in the generation that is about to come
                state = State.LOADING
            slot = Slot(ModelRef(name, row["version"]), state, bare=row["bare"])
        slots[slot.ref.version] = replace(slot, reason=row["reason"], hint=row["hint"])
    slots |= {label: slot for label, slot in own.slots.items() if label not in slots and slot.runner is not None}
    return Entry(slots, own.serving, told["wanted"])
