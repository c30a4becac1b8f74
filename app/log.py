"""Logs: one line an event on stdout, as JSON or logfmt, with the ids of the request and the trace that it belongs to."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, override

import orjson

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)
_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")  # visible ASCII without '"', '=' and '\\'


def _line(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a line says: time, level, logger, event, what `extra={"fields": …}` gave, the error."""
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage(),
    }
    if (current := request_id.get()) is not None:
        line["request_id"] = current
    if (current := trace_id.get()) is not None:
        line["trace_id"] = current
    line |= getattr(record, "fields", {})
    if record.exc_info and record.exc_info[1] is not None:
        line["error"] = "".join(traceback.format_exception(record.exc_info[1]))
    return line


@contextmanager
def about(request: str | None, trace: str | None) -> Iterator[None]:
    """Let the lines that are logged within say which request and which trace they belong to."""
    tokens = request_id.set(request), trace_id.set(trace)
    try:
        yield
    finally:
        request_id.reset(tokens[0])
        trace_id.reset(tokens[1])


class Trickle:
    """Lets lines of one kind through, but only so many a second: a flood of requests must not become one of lines."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._second = 0
        self._left = per_second
        self._held_back = 0

    def passes(self) -> bool:
        """Whether a line may be written now."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._left = second, self._per_second
        if not self._left:
            self._held_back += 1
            return False
        self._left -= 1
        return True

    def held_back(self) -> dict[str, int]:
        """Return as fields how many lines were kept back since the latest that says so."""
        count, self._held_back = self._held_back, 0
        return {"unlogged_before": count} if count else {}


class JsonFormatter(logging.Formatter):
    """Write a record as one line of JSON."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        line = _line(record)
        try:
            text = orjson.dumps(line, default=str).decode()
        except TypeError:  # a lone surrogate, a huge integer, a key that is no string: rare, and still one line
            text = json.dumps(line, default=str, skipkeys=True)
        return _printable(text)


class LogfmtFormatter(logging.Formatter):
    """Write a record as one line of `name=value`. What is not a plain word is quoted as JSON quotes it."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return _printable(" ".join(f"{_word(name)}={_value(value)}" for name, value in _line(record).items()))


def _word(name: object) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", str(name)) or "_"


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict | list | tuple):
        value = json.dumps(value, default=str, skipkeys=True)
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _printable(line: str) -> str:
    """Return a line with escapes for what ends one for some reader, moves a terminal's cursor, or turns the direction of writing."""
    return line if line.isprintable() else _NOT_PLAIN.sub(_escaped, line)


_NOT_PLAIN = re.compile(r"[^ -~]")


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    return character if character.isprintable() else json.dumps(character)[1:-1].replace("\x7f", "\\u007f")


def configure(level: str, form: str = "json") -> None:
    """Send every log of the process to stdout, as `json` or `logfmt`, from `level` on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LogfmtFormatter() if form == "logfmt" else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("diskless").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.captureWarnings(True)
