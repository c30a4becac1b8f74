"""Which regular expressions take a time that grows no faster than the text.

`re` tries every way to match, from every character on, and lets nobody else have the interpreter meanwhile. Whether that can
take for ever is read off the parsed expression: once something of any length has matched, nothing behind it may fail, so that it is
never tried again, shorter or from its second character on. Before that, few steps are possible at each character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from re import _parser  # type: ignore[attr-defined]  # nothing else parses what `re` does, and as it does
from typing import Any

MAX_PATTERN = 200  # characters
MAX_STEPS = 199  # at one character, before anything of any length has matched
MAX_LEAST = 99  # repetitions that something of any length has at least

_SINGLE = ("ANY", "IN", "LITERAL", "NOT_LITERAL")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_Item = tuple[Any, Any]  # an operation and its argument, as `re` has them


def is_linear(pattern: str) -> bool:
    """Whether the time that a pattern of tokens takes is known to grow no faster than the text."""
    if len(pattern) > MAX_PATTERN:
        return False
    try:
        items = _flat(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError):
        return False
    return items is not None and _cost(items, whole=True) is not None


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a sequence takes at one character. It fails within so many `steps`, or matches, and then in so many `ways`.

    `settled` is one that is never tried in another way: something in it is of any length, and nothing behind that fails.
    `at_edge` is one behind which a word ends.
    """

    steps: int
    ways: int
    settled: bool
    at_edge: bool


def _flat(items: Iterable[_Item]) -> list[_Item] | None:
    """Return a sequence with its groups opened; None where one has flags of its own, which changes what a word is."""
    found: list[_Item] = []
    for operation, argument in items:
        if operation.name != "SUBPATTERN":
            found.append((operation, argument))
            continue
        _, added, removed, inside = argument
        opened = None if added or removed else _flat(inside)
        if opened is None:
            return None
        found += opened
    return found


def _cost(items: list[_Item], *, whole: bool = False) -> _Cost | None:
    """Return what a sequence takes, None if it is not known to be linear. `whole`: nothing is before it or behind it."""
    cost: _Cost | None = _Cost(0, 1, settled=False, at_edge=False)
    for place, (operation, argument) in enumerate(items):
        if cost is None or cost.steps > MAX_STEPS:
            return None
        if operation.name == "BRANCH":
            branches = [_flat(branch) for branch in argument[1]]
            if cost.settled or None in branches:
                return None
            costs = [_cost(branch or []) for branch in branches]
            if any(it is None or it.settled for it in costs):
                return _either([[*items[:place], *(branch or []), *items[place + 1 :]] for branch in branches], whole)
            steps, ways = sum(it.steps for it in costs if it) + 1, sum(it.ways for it in costs if it)
            cost = _Cost(cost.steps + cost.ways * steps, cost.ways * ways, settled=False, at_edge=False)
        elif operation.name in _REPEATS:
            cost = _repeated(cost, operation, argument)
        elif operation.name in _SINGLE:
            cost = None if cost.settled else _Cost(cost.steps + cost.ways, cost.ways, settled=False, at_edge=False)
        elif operation.name == "AT":
            sure = argument.name == "AT_BOUNDARY" and (cost.at_edge or (whole and _is_between(items[: place + 1])))
            if not cost.settled:
                cost = _Cost(cost.steps + cost.ways, cost.ways, settled=False, at_edge=False)
            elif not sure:
                return None
        else:  # looks ahead or behind, repeats a group's text, or is not known here
            return None
    return None if cost is None or cost.steps > MAX_STEPS else cost


def _either(sequences: list[list[_Item]], whole: bool) -> _Cost | None:
    steps, at_edge = 0, True
    for sequence in sequences:
        cost = _cost(sequence, whole=whole)
        if cost is None:
            return None
        steps, at_edge = max(steps, cost.steps), at_edge and cost.at_edge
    return _Cost(steps, 1, settled=True, at_edge=at_edge)


def _repeated(before: _Cost, operation: Any, argument: Any) -> _Cost | None:
    least, most, body = int(argument[0]), int(argument[1]), argument[2]
    items = _flat(body)
    inner = None if items is None else _cost(items)
    if items is None or inner is None or body.getwidth()[0] < 1:
        return None
    at_edge = inner.at_edge or (operation.name == "MAX_REPEAT" and most > MAX_STEPS and _is_word(items))
    if before.settled:
        return _Cost(before.steps, 1, settled=True, at_edge=before.at_edge and at_edge) if least == 0 else None
    if not inner.settled and most <= MAX_STEPS:
        each = [inner.ways**count for count in range(most + 1)]
        steps = before.steps + before.ways * inner.steps * sum(each[:-1])
        if steps <= MAX_STEPS:
            return _Cost(steps, before.ways * sum(each[least:]), settled=False, at_edge=False)
    # The first repetitions must match: those that matched must not be tried in other ways because a later one did not.
    if least > (MAX_LEAST if inner.ways == 1 and not inner.settled else 1):
        return None
    steps = before.steps + before.ways * inner.steps * max(1, least)
    return _Cost(steps, 1, settled=True, at_edge=least > 0 and at_edge)


def _is_word(items: list[_Item]) -> bool:
    """Whether it is any character of a word and no other: behind as many of them as there are, the word ends."""
    if len(items) != 1 or items[0][0].name != "IN":
        return False
    return [(kind.name, getattr(what, "name", None)) for kind, what in items[0][1]] == [("CATEGORY", "CATEGORY_WORD")]


def _is_between(items: list[_Item]) -> bool:
    """Whether it is single characters, the last of them repeated, between two boundaries of words.

    The second one can fail, but then there is no boundary on the way back, at most of the characters that were passed: few
    places to begin at are left among them.
    """
    first, *singles, last, _ = items if len(items) > 2 else [*items, *items, *items]
    if getattr(first[1], "name", None) != "AT_BOUNDARY" or last[0].name not in _REPEATS:
        return False
    repeated = _flat(last[1][2]) or []
    one = len(repeated) == 1 and repeated[0][0].name in _SINGLE
    return one and all(operation.name in _SINGLE for operation, _ in singles)
