"""How things are called: model names, version labels, references to a version, the roles and file endings in a bucket.

And how they are spoken of in a sentence that may not become as long as what somebody has put into a bucket.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from app.errors import InvalidName

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
MAX_SHOWN = 100  # characters of what is no name
MAX_LISTED = 50  # names or labels in a sentence
COMPANION_ROLES = ("scaler", "encoder", "preprocessor")  # the order in which they are applied, before the model
SUFFIXES = {".joblib": "joblib", ".pkl": "pickle", ".pickle": "pickle", ".skops": "skops"}


class ModelRef(NamedTuple):
    """A name and a version, written `churn/7`. Versions are labels: nothing sorts them."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


def check_name(what: str, name: str) -> str:
    """Return `name` if it can be a model name, version label or alias (`what` says which). Raises `InvalidName`."""
    if not NAME.match(name):
        raise InvalidName(
            f"{what} {shortened(repr(name), MAX_SHOWN)} is not one: expected 1 to 100 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    return name


def listed(names: Iterable[str]) -> str:
    """Write names or labels in a row, `MAX_LISTED` of them at most: a bucket may have any number."""
    found = list(names)
    more = f" and {len(found) - MAX_LISTED:,} more" if len(found) > MAX_LISTED else ""
    return f"{', '.join(found[:MAX_LISTED])}{more}"


def shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def printable(text: str) -> str:
    """Return a text as one line of a terminal or a log may have it: whoever wrote it could have put control sequences in."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)
