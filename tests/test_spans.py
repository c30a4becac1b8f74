"""Whose span a request belongs to, as headers say it; and what the journal of a look has in it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import NotModified, ObjectNotFound, StorageUnavailable
from app.spans import MAX_SPANS, NOT_SAMPLED, Journal, Parent, Span, Trace, read_parent
from app.storage.local import LocalStorage
from app.storage.traced import TracedStorage

TRACE, OWN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
WHOLE = Parent(int(TRACE, 16), int(OWN, 16), is_sampled=True)


def parent(*values: str, states: tuple[str, ...] = ()) -> Parent | None:
    headers = [(b"host", b"x"), *((b"traceparent", value.encode()) for value in values)]
    return read_parent([*headers, *((b"tracestate", state.encode()) for state in states)])


@pytest.mark.parametrize(
    ("value", "is_sampled"),
    [
        *((f"00-{TRACE}-{OWN}-01", True), (f"00-{TRACE}-{OWN}-00", False), (f"00-{TRACE}-{OWN}-ff", True)),
        *((f"00-{TRACE}-{OWN}-02", False), (f" 00-{TRACE}-{OWN}-03\t", True)),
        *((f"01-{TRACE}-{OWN}-01", True), (f"fe-{TRACE}-{OWN}-01-and-more", True)),
    ],
)
def test_a_parent_is_read_as_the_standard_has_it(value, is_sampled):
    assert parent(value) == (WHOLE if is_sampled else NOT_SAMPLED)


@pytest.mark.parametrize(
    "values",
    [
        *((), ("",), ("00",), (f"00-{TRACE}-{OWN}",), (f"00-{TRACE}-{OWN}-1",), (f"0-{TRACE}-{OWN}-01",)),
        *((f"ff-{TRACE}-{OWN}-01",), (f"00-{TRACE}-{OWN}-01-more",), (f"00-{TRACE}-{OWN}-01-",)),
        *((f"00-{'0' * 32}-{OWN}-01",), (f"00-{TRACE}-{'0' * 16}-01",), (f"00-{TRACE.upper()}-{OWN}-01",)),
        *((f"00-{TRACE}-{OWN}-0g",), (f"00_{TRACE}_{OWN}_01",), (f"01-{TRACE}-{OWN}-01more",)),
        (f"00-{TRACE}-{OWN}-01", f"00-{TRACE}-{OWN}-01"),
    ],
)
def test_what_is_no_parent_is_none(values):
    assert parent(*values) is None


@given(st.binary(max_size=80))
def test_no_bytes_whatsoever_do_harm(value):
    found = read_parent([(b"traceparent", value), (b"tracestate", value)])

    assert found is None or found == NOT_SAMPLED or (found.trace_id and found.span_id)


def test_a_state_of_several_lines_is_one():
    value = f"00-{TRACE}-{OWN}-01"

    assert parent(value, states=("a=1,b=2", "c=3")) == WHOLE._replace(state="a=1,b=2,c=3")
    assert parent(value, states=("a=1", "b=" + "x" * 2000)) == WHOLE


def test_a_trace_without_a_parent_has_an_id_of_its_own():
    ids = {Trace().shown for _ in range(100)}

    assert len(ids) == 100
    assert all(len(one) == 32 and int(one, 16) for one in ids)
    assert Trace(WHOLE).shown == TRACE


# The journal


def names(spans: list[Span]) -> list[tuple[str, str | None]]:
    """Return each span's name and that of its parent."""
    by_id = {span.span_id: span.name for span in spans}
    return [(span.name, None if span.parent_id is None else by_id[span.parent_id]) for span in spans]


def test_a_look_that_is_not_kept_is_not_delivered_and_the_next_begins_anew():
    told: list[list[Span]] = []
    journal = Journal(told.append)
    with journal.look(), journal.step("load"):
        pass
    with journal.look() as look:
        look.is_kept = True

    assert [names(spans) for spans in told] == [[("look", None)]]


async def test_operations_belong_to_the_step_in_which_they_were_asked_for(tmp_path):
    told: list[list[Span]] = []
    journal = Journal(told.append)
    storage = TracedStorage(LocalStorage(tmp_path), "local", journal)
    await storage.put("before", b"any look")
    with journal.look() as look:
        look.is_kept = True
        await storage.put("a", b"12345")
        with journal.step("load", model="churn"):
            await asyncio.gather(storage.get("a"), storage.head("a"), storage.list(""))
        await storage.delete("a")
    (spans,) = told
    got = next(span for span in spans if span.name == "storage get")

    assert sorted(names(spans), key=str) == sorted(
        [
            *(("storage put", "look"), ("storage delete", "look"), ("load", "look"), ("look", None)),
            *(("storage get", "load"), ("storage head", "load"), ("storage list", "load")),
        ],
        key=str,
    )
    assert got.attributes == {"diskless.storage": "local", "diskless.object": "a", "diskless.bytes": 5}
    assert {span.kind for span in spans if span.name.startswith("storage")} == {"client"}


@pytest.mark.parametrize(
    ("error", "has_failed", "attributes"),
    [
        (StorageUnavailable("at /srv/secret"), True, {"error.type": "StorageUnavailable"}),
        (ZeroDivisionError("a secret"), True, {"error.type": "ZeroDivisionError"}),
        (NotModified("a"), False, {"diskless.outcome": "NotModified"}),
        (ObjectNotFound("a"), False, {"diskless.outcome": "ObjectNotFound"}),
        (asyncio.CancelledError(), False, {"diskless.outcome": "CancelledError"}),
    ],
)
def test_how_something_ended_is_told_by_its_kind_and_not_by_its_words(error, has_failed, attributes):
    told: list[list[Span]] = []
    journal = Journal(told.append)
    with journal.look() as look:
        look.is_kept = True
        with pytest.raises(type(error)), journal.operation("storage get"):
            raise error
    span = told[0][0]

    assert (span.has_failed, span.attributes) == (has_failed, attributes)


def test_a_journal_is_bounded_and_never_without_the_look_itself():
    told: list[list[Span]] = []
    journal = Journal(told.append)
    with journal.look() as look:
        look.is_kept = True
        for _ in range(2 * MAX_SPANS):
            with journal.operation("storage get"):
                pass

    assert len(told[0]) == MAX_SPANS + 1
    assert told[0][-1].name == "look"


def test_what_outlives_its_look_belongs_to_no_other():
    told: list[list[Span]] = []
    journal = Journal(told.append)
    with journal.look():
        late = journal.operation("storage get")
        late.__enter__()
    with journal.look() as look:
        look.is_kept = True
        late.__exit__(None, None, None)

    assert names(told[0]) == [("look", None)]
