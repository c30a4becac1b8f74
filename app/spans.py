"""What a trace consists of: spans, and which trace they belong to, as W3C Trace Context says it in headers.

Nothing here knows who takes the spans, or the library that sends them (`app/tracing.py`). A `Trace` is what a request carries
along; a `Journal` writes down what a look at the bucket does.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from app.errors import NotModified, ObjectNotFound, PreconditionFailed

PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
ODD_DIGITS = b"13579bdf"  # the last bit of the flags says that the parent is sampled
MAX_STATE_BYTES = 1024  # of a `tracestate`: twice as much as everybody must pass on
MAX_SPANS = 1000  # of one look
EXPECTED = (
    NotModified,
    ObjectNotFound,
    PreconditionFailed,
)  # how an operation of a storage may end without having failed

Kind = Literal["internal", "server", "client"]
Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""


class Parent(NamedTuple):
    """The caller's span, as a `traceparent` tells of it, and the `tracestate` beside that."""

    trace_id: int
    span_id: int
    is_sampled: bool
    state: str = ""


NOT_SAMPLED = Parent(0, 0, is_sampled=False)


def read_parent(headers: Headers) -> Parent | None:
    """Return whose span a request belongs to. What is no `traceparent`, or one of several, is passed over, as W3C has it."""
    value, states = None, []
    for name, text in headers:
        if name == b"traceparent":
            if value is not None:
                return None
            value = text
        elif name == b"tracestate":
            states.append(text)
    parent = None if value is None else parse_parent(value)
    if parent is None or not parent.is_sampled or not states:
        return parent
    state = b",".join(states)
    return parent._replace(state=state.decode("latin-1")) if len(state) <= MAX_STATE_BYTES else parent


def parse_parent(value: bytes) -> Parent | None:
    """Return what a `traceparent` says; of a parent that is not sampled, only that."""
    match = PARENT.fullmatch(value.strip(b" \t"))
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more is not None) or trace_id == b"0" * 32 or span_id == b"0" * 16:
        return None
    return Parent(int(trace_id, 16), int(span_id, 16), is_sampled=True) if flags[1] in ODD_DIGITS else NOT_SAMPLED


class Trace:
    """The trace that a request belongs to: the caller's, or one that begins here."""

    __slots__ = ("method", "parent", "template", "trace_id")

    def __init__(self, parent: Parent | None = None) -> None:
        self.parent = parent
        self.trace_id = parent.trace_id if parent is not None else new_id(128)
        self.method = "POST"
        self.template: str | None = None  # of the path, without anything that the caller made up

    @property
    def shown(self) -> str:
        """The trace id as it is written."""
        return f"{self.trace_id:032x}"


def new_id(bits: int) -> int:
    """Return an id that is not 0. Each process has random numbers of its own, forked or not."""
    return random.getrandbits(bits) or 1


class Span(NamedTuple):
    """Something that took time: when it began and ended in nanoseconds since 1970. Has a parent, but for the first of a trace.

    `is_remote` says that the parent is the caller's. Such a span's `state` is what came with it.
    """

    name: str
    trace_id: int
    span_id: int
    parent_id: int | None
    began: int
    ended: int
    kind: Kind = "internal"
    attributes: Mapping[str, Any] = MappingProxyType({})
    has_failed: bool = False
    is_remote: bool = False
    state: str = ""


Deliver = Callable[[list[Span]], None]


class Step:
    """A part of a look that has begun."""

    __slots__ = ("attributes", "has_failed", "is_kept", "span_id")

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes
        self.has_failed = False
        self.is_kept = False  # of the whole look: it shall be told of
        self.span_id = new_id(64)

    def fail(self, error: BaseException) -> None:
        """Take note of what went wrong. Only its kind: the log has the sentence, which may name anything."""
        self.has_failed = isinstance(error, Exception) and not isinstance(error, EXPECTED)
        self.attributes["error.type" if self.has_failed else "diskless.outcome"] = type(error).__name__


class Journal:
    """What a look at the bucket does, step by step: told as a whole at its end, if it is to be kept.

    There is one look at a time, and within it one step at a time; the operations of the storage within a step may overlap.
    Without `deliver` nothing is written down.
    """

    def __init__(self, deliver: Deliver | None = None) -> None:
        self._deliver = deliver
        self._spans: list[Span] = []
        self._trace_id = 0  # of the look that goes on; 0: none does
        self._parent_id: int | None = None
        self._offset = 0  # from perf_counter to nanoseconds since 1970, for all of one look: steps shall not overlap

    @contextmanager
    def look(self) -> Iterator[Step]:
        """Write down a look, which is delivered if its step `is_kept`."""
        if self._deliver is None:
            yield Step({})
            return
        self._spans, self._trace_id = [], new_id(128)
        self._offset = time.time_ns() - time.perf_counter_ns()
        try:
            with self.step("look") as step:
                yield step
        finally:
            spans, self._spans, self._trace_id = self._spans, [], 0
        if step.is_kept:
            self._deliver(spans)

    @contextmanager
    def step(self, name: str, **attributes: Any) -> Iterator[Step]:
        """Write down a step; whatever comes within it is a part of it."""
        with self._written(name, "internal", attributes) as step:
            before, self._parent_id = self._parent_id, step.span_id
            try:
                yield step
            finally:
                self._parent_id = before

    @contextmanager
    def operation(self, name: str, **attributes: Any) -> Iterator[Step]:
        """Write down what is asked of a storage. The same again may be asked before it is over."""
        with self._written(name, "client", attributes) as step:
            yield step

    @contextmanager
    def _written(self, name: str, kind: Kind, attributes: dict[str, Any]) -> Iterator[Step]:
        step = Step({f"diskless.{name}": value for name, value in attributes.items()})
        trace_id, parent_id, began = self._trace_id, self._parent_id, time.perf_counter_ns()
        try:
            yield step
        except BaseException as error:
            step.fail(error)
            raise
        finally:
            # What outlives its look belongs to none. The look itself comes last.
            is_there = trace_id != 0 and trace_id == self._trace_id
            if is_there and (len(self._spans) < MAX_SPANS or parent_id is None):
                ended = time.perf_counter_ns()
                times = began + self._offset, ended + self._offset
                self._spans.append(
                    Span(name, trace_id, step.span_id, parent_id, *times, kind, step.attributes, step.has_failed)
                )
