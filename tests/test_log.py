"""A log is lines of JSON, whatever is logged."""

import json
import logging

import pytest

from app import log


def line(
    message: object, *arguments: object, error: BaseException | None = None, **fields: object
) -> dict[str, object]:
    """Format a record as the service does, and read it back."""
    record = logging.LogRecord(
        "diskless.test", logging.WARNING, __file__, 1, message, arguments, (type(error), error, None) if error else None
    )
    record.fields = fields
    text = log.JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_line_has_its_time_level_logger_and_event():
    found = line("served %s", "churn", rows=3)

    assert (found["level"], found["logger"], found["event"], found["rows"]) == (
        "warning", "diskless.test", "served churn", 3,
    )  # fmt: skip
    assert str(found["time"]).endswith("Z")
    assert "request_id" not in found


def test_a_line_has_the_id_of_its_request():
    token = log.request_id.set("mine")
    try:
        assert line("event")["request_id"] == "mine"
    finally:
        log.request_id.reset(token)


def test_an_error_is_in_the_same_line():
    assert "ValueError: two\nlines" in str(line("failed", error=ValueError("two\nlines"))["error"])


@pytest.mark.parametrize("value", ["\udcff", 10**30, {1: 2}, object(), float("nan"), "a\r\nb\u2028c", b"\xff"])
def test_anything_can_be_logged(value):
    assert line("event", value=value)["event"] == "event"
    assert "event" in line(f"{value}")
