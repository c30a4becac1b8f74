"""How things are called: model names, version labels, references to a version, the roles and file endings in a bucket."""

from __future__ import annotations

import re
from typing import NamedTuple

from app.errors import InvalidName

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
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
            f"{what} {name!r} is not one: expected 1 to 100 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    return name
