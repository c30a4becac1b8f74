"""Long runs of combining characters are found wherever they are, and nothing else is taken for one."""

from __future__ import annotations

import gc
import itertools
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.marks import MAX_MARKS, has_long_run, is_mark
from tests.generated import generated

EVERY = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
pieces = st.lists(
    st.tuples(
        st.sampled_from(
            ["\u0300", "\u0316\u0301", "\uff9e", "\u0f73", "\U0001d165", "a", "\u4e2d", "e\u0301", "\u3099"]
        ),
        st.sampled_from([1, 2, 49, 50, 51, 99, 100, 101, 250]),
    ),
    max_size=6,
)


def longest(text: str) -> int:
    """Return the length of the longest run, counted the simple way."""
    return max((len([*run]) for mark, run in itertools.groupby(text, key=is_mark) if mark), default=0)


@generated(300)
@given(pieces)
def test_a_run_is_found_wherever_it_begins(parts):
    text = "".join(piece * times for piece, times in parts)

    assert has_long_run(text) == (longest(text) > MAX_MARKS)


@pytest.mark.parametrize("before", [0, 1, 99, 100, 101, 102, 201, 202, 500])
def test_the_limit_is_exact(before):
    for other in ("a", "\u4e2d"):
        assert not has_long_run(other * before + "\u0301" * MAX_MARKS + other * 300)
        assert has_long_run(other * before + "\u0301" * (MAX_MARKS + 1) + other * 300)


def test_every_character_that_normalising_would_move_is_one():
    """What has any other character at an end of its decomposition keeps those before it from those behind it."""
    found = [character for character in EVERY if is_mark(character)]
    decomposed = {character: unicodedata.normalize("NFKD", character) for character in EVERY}

    assert found == [it for it, parts in decomposed.items() if all(map(unicodedata.combining, parts))]
    assert {"\uff9e", "\u0f73"} < set(found)
    for character in found:
        assert has_long_run(character * (MAX_MARKS + 1)), hex(ord(character))


def test_a_text_that_passes_has_no_more_in_a_row_when_it_is_decomposed_than_a_multiple():
    worst = max((it for it in EVERY if is_mark(it)), key=lambda it: len(unicodedata.normalize("NFKD", it)))
    text = "a" + worst * MAX_MARKS

    assert not has_long_run(text)
    assert longest(unicodedata.normalize("NFKD", text)) <= 3 * MAX_MARKS


def test_few_characters_are_looked_at_where_there_is_no_long_run():
    def calls(text: str) -> int:
        count = 0

        def see(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event == "c_call" or event == "call"

        gc.disable()  # what is told of a collection, as hypothesis is, is called when it comes
        sys.setprofile(see)
        try:
            assert not has_long_run(text)
        finally:
            sys.setprofile(None)
            gc.enable()
        return count

    assert calls("a" * 10_000_000) == calls("a" * 2000)
    assert calls("\u4e2d" * 90) <= 5
    for text in ("\u4e2d", "e\u0301", "a" + "\u0300\u0316" * 50):
        few = text * (100_000 // len(text))
        assert calls(few * 10) <= 11 * calls(few)
        assert calls(few) <= len(few) / 10
