"""What a PromQL expression refers to: metrics, the labels it chooses by, and those that it groups by. Enough for our own expressions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_STRING = r'"(?:[^"\\]|\\.)*"'
_MATCHER = re.compile(rf"\s*([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*({_STRING})\s*(?:,|\Z)")
_UNREAD = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")  # over which time, and when
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(rf"(?<![\w.])([a-zA-Z_:][\w:]*)\s*(\{{(?:[^}}\"]|{_STRING})*\}})?(?!\w)\s*(\()?")
_WORDS = {"and", "or", "unless", "bool", "by", "without", "on", "ignoring", "group_left", "group_right"}


class Matcher(NamedTuple):
    """`label operator "value"` in a selector."""

    label: str
    operator: str
    value: str


class Selector(NamedTuple):
    """A metric, and what its labels must be."""

    name: str
    matchers: tuple[Matcher, ...]


def selectors(expression: str) -> Iterator[Selector]:
    """Yield the metrics that an expression reads. Raises `ValueError` for what cannot be read."""
    for name, braces, call in _SELECTOR.findall(_UNREAD.sub("", _GROUPING.sub("", expression))):
        if call or name in _WORDS:
            continue
        yield Selector(name, tuple(_matchers(braces[1:-1])))


def grouped_by(expression: str) -> set[str]:
    """Return the labels that an expression groups by, or matches two sides on."""
    lists = _GROUPING.findall(expression)
    return {label.strip() for labels in lists for label in labels.split(",") if label.strip()}


def _matchers(text: str) -> Iterator[Matcher]:
    position = 0
    while position < len(text):
        found = _MATCHER.match(text, position)
        if found is None:
            raise ValueError(f"expected a matcher, got {text[position:]!r}")
        yield Matcher(found[1], found[2], found[3][1:-1])
        position = found.end()
