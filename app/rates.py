"""How fast one caller may call: a token bucket, in one cell that all processes of a service share.

A bucket holds as many tokens as the rate gives in its period; each request takes one. Instead of tokens the cell holds the
moment at which the bucket will be full again (as the generic cell rate algorithm has it), so nothing has to fill it.
Two processes that write in the same microsecond may let one request too many through; none is refused wrongly.
"""

from __future__ import annotations

import math
import re
from collections.abc import MutableSequence
from typing import NamedTuple

MAX_CALLERS = 1000  # that are counted
_RATE = re.compile(r"(\d{1,9})/(\d{0,5})(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Rate(NamedTuple):
    """So many requests in so many seconds, however they are spread in them."""

    requests: int
    seconds: int

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read `100/s`, `600/m`, `50/10s`. Raises `ValueError`."""
        match = _RATE.fullmatch(text.replace(" ", "").lower())
        requests, count, unit = match.groups() if match else ("0", "", "s")
        rate = cls(int(requests), int(count or 1) * _SECONDS[unit])
        if rate.requests < 1 or rate.seconds < 1:
            raise ValueError("expected a number of requests and a period, as in 100/s, 600/m or 50/10s")
        return rate


class Bucket:
    """One caller's tokens. `cells[place]` is a float that others may share, 0 at first."""

    __slots__ = ("_cells", "_interval", "_period", "_place", "rate")

    def __init__(self, rate: Rate, cells: MutableSequence[float], place: int) -> None:
        self.rate = rate
        self._cells = cells
        self._place = place
        self._period = float(rate.seconds)
        self._interval = rate.seconds / rate.requests

    def take(self, now: float) -> bool:
        """Take a token if there is one; return whether there was. `now` is `time.perf_counter()`, or any clock that all share."""
        full = self._cells[self._place]
        full = (full if full > now else now) + self._interval
        if full - now > self._period * (1 + 1e-9):  # what a sum of many intervals is off by
            return False
        self._cells[self._place] = full
        return True

    def pause(self, now: float) -> int:
        """Return after how many seconds there will be a token again, at least 1."""
        return max(1, math.ceil(self._cells[self._place] + self._interval - now - self._period))
