from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.rates import Bucket, Rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100/s", (100, 1)), ("600/m", (600, 60)), ("50/10s", (50, 10)), (" 1 / H ", (1, 3600)), ("9/2d", (9, 172_800))],
)
def test_a_rate_is_read(text, rate):
    assert Rate.parse(text) == rate


@pytest.mark.parametrize("text", ["", "100", "/s", "0/s", "5/0s", "-1/s", "1.5/s", "10/week", "1/s/s", "9999999999/s"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ValueError, match="expected a number of requests and a period, as in 100/s"):
        Rate.parse(text)


def bucket(requests: int, seconds: int) -> Bucket:
    return Bucket(Rate(requests, seconds), array("d", [0.0]), 0)


def test_a_full_bucket_is_spent_at_once_and_fills_evenly():
    tokens = bucket(10, 5)

    assert [tokens.take(1000.0) for _ in range(11)] == [True] * 10 + [False]
    assert not tokens.take(1000.4)
    assert tokens.take(1000.5)
    assert not tokens.take(1000.5)
    assert [tokens.take(2000.0) for _ in range(11)] == [True] * 10 + [False]


def test_whoever_waits_as_long_as_told_gets_a_token():
    tokens = bucket(1, 60)
    assert tokens.take(7.0)
    assert not tokens.take(7.5)
    pause = tokens.pause(7.5)

    assert pause == 60
    assert tokens.take(7.5 + pause)


@given(
    st.integers(1, 50),
    st.integers(1, 10),
    st.lists(st.floats(0, 3, allow_nan=False), min_size=1, max_size=300),
)
def test_no_more_are_let_through_than_a_bucket_of_tokens_holds(requests, seconds, pauses):
    """The oracle counts tokens: at most so many, and so many more for each second."""
    tokens, now = bucket(requests, seconds), 100.0
    left, before = float(requests), now
    for pause in pauses:
        now += pause
        left, before = min(float(requests), left + (now - before) * requests / seconds), now
        taken = tokens.take(now)
        if abs(left - 1) > 1e-6:
            assert taken == (left > 1)
        left -= taken


def test_two_processes_share_what_is_spent():
    cells = array("d", [0.0, 0.0])
    here, there, another = Bucket(Rate(3, 1), cells, 1), Bucket(Rate(3, 1), cells, 1), Bucket(Rate(3, 1), cells, 0)

    assert [here.take(9.0), there.take(9.0), here.take(9.0), there.take(9.0)] == [True, True, True, False]
    assert another.take(9.0)
