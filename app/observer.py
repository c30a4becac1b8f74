"""What becomes of every answer besides being sent: it is counted, and a share of them is logged, and every refusal and failure.

A `Record` is what one request has come to. Where requests are many it is made only for those that will be told of:
`countdown` says how many go by until the next one.
"""

from __future__ import annotations

import logging
import math
import random
from time import perf_counter
from typing import Any, ClassVar

from app import log
from app.service_counters import Route, ServiceCounters
from app.spans import Headers, Parent, Trace

logger = logging.getLogger("diskless.access")
FAILURES_PER_SECOND = 50  # lines about requests that were refused or failed
RECORD = "diskless.record"  # in a scope: the record of its request
PHASES = ("decode", "queue", "predict", "encode")


class Record:
    """One request: what it asked for, who asked, and when what happened to it, in seconds by `perf_counter`."""

    __slots__ = (
        *("began", "caller", "code", "computed", "computing", "is_sampled"),
        *("model", "request_id", "route", "rows", "submitted", "trace", "version"),
    )

    def __init__(self, route: Route, request_id: str, *, began: float | None = None) -> None:
        self.route = route
        self.request_id = request_id
        self.began = perf_counter() if began is None else began
        self.submitted = self.computing = self.computed = 0.0
        self.is_sampled = False
        self.caller: str | None = None  # the name of the key
        self.code: str | None = None  # of the error
        self.model: str | None = None
        self.version: str | None = None
        self.rows: int | None = None
        self.trace: Trace | None = None

    @property
    def trace_id(self) -> str | None:
        """The trace that it belongs to, as logs write it."""
        return None if self.trace is None else self.trace.shown

    def milliseconds(self, ended: float) -> dict[str, float]:
        """Return what each phase has taken, of those that there were, and all together."""
        found, before = {}, self.began
        if self.submitted:
            for phase, moment in zip(PHASES, (self.submitted, self.computing, self.computed, ended), strict=True):
                if not moment:  # it did not come so far
                    break
                found[f"{phase}_ms"] = round((moment - before) * 1000, 3)
                before = moment
        return {"ms": round((ended - self.began) * 1000, 3)} | found


class Observer:
    """Tells of answers, and counts them in `service`. `sample` is the share of those with a status below 400 that are logged."""

    follows: ClassVar[bool] = False  # whether it matters whose span a request belongs to

    def __init__(self, *, sample: float = 0.0, service: ServiceCounters | None = None) -> None:
        self.service = service or ServiceCounters()
        self._sample = sample
        self.is_muted = False
        self.countdown = gap(sample)  # requests until the next that is told of; who takes it to 0 asks for a record
        self._failures = log.Trickle(FAILURES_PER_SECOND)

    def begin(self, route: Route, request_id: str, parent: Parent | None = None) -> Record:
        """Return the record of a request whose turn it is, and count from there to the next."""
        record = Record(route, request_id)
        self._elect(record, parent)
        return record

    def follow(self, route: Route, request_id: str, parent: Parent) -> Record | None:
        """Return the record of a request that is told of because its caller traces it, if it is; it is no one's turn."""
        del route, request_id, parent
        return None

    def has_room(self) -> bool:
        """Whether a caller's trace could be followed now."""
        return False

    def choose(self, record: Record, headers: Headers) -> None:
        """Decide whether a request that has a record anyway is one of those that are told of."""
        del headers
        self.countdown -= 1
        if self.countdown <= 0:
            self._elect(record, None)

    def give_back(self, record: Record) -> None:
        """Make it the turn of the next request: this one comes once more, on its other way."""
        del record
        self.countdown = 0

    def _elect(self, record: Record, parent: Parent | None) -> None:
        """Note whose turn it is, and begin to count to the next."""
        del parent
        record.is_sampled = True
        self.countdown = gap(self._sample)

    def tell(self, record: Record, status: int) -> None:
        """Tell of an answer that was sent."""
        if self.is_muted:
            return
        self.service.responded(record.route, status, record.code, at_a_model=record.model is not None)
        if status < 400:
            if record.is_sampled and record.route is not Route.HEALTH:
                logger.info("request", extra={"fields": _fields(record, status)})
        elif record.route is not Route.HEALTH and self._failures.passes():
            fields = _fields(record, status) | self._failures.held_back()
            level = logging.ERROR if status == 500 else logging.WARNING
            logger.log(level, "request", extra={"fields": fields})

    def lose(self, record: Record) -> None:
        """Take note that a caller has gone before there was an answer."""


def gap(share: float) -> float:
    """Return how many requests it is to the next of those that are so large a share: at random, so that no pattern escapes it."""
    if not share:
        return math.inf
    if share == 1:
        return 1
    return math.ceil(math.log(1 - random.random()) / math.log(1 - share))  # noqa: S311 - not a secret


def _fields(record: Record, status: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"request_id": record.request_id, "route": record.route, "status": status}
    optional = {
        "error": record.code,
        "model": record.model,
        "version": record.version,
        "rows": record.rows,
        "key": record.caller,
        "trace_id": record.trace_id,
    }
    fields |= {name: value for name, value in optional.items() if value is not None}
    return fields | record.milliseconds(perf_counter())
