"""The keys of callers: how they are written in a setting, and how one that a caller shows is found among them.

Only digests are kept: what a setting holds as it is, is hashed while the setting is read.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import NamedTuple

from app.names import NAME
from app.rates import MAX_CALLERS

MIN_LENGTH = 16  # characters: what is shorter can be guessed
MAX_LENGTH = 500
_KEY = re.compile(r"[!-+\--~]+")  # visible ASCII without the comma
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = "sha256:"


class Key(NamedTuple):
    """A key that is known: whose it is, and its SHA-256 (32 bytes)."""

    name: str
    digest: bytes

    @classmethod
    def of(cls, name: str, secret: str) -> Key:
        """Return the key with this secret."""
        return cls(name, hashlib.sha256(secret.encode()).digest())


def parse(text: str, kind: str) -> tuple[Key, ...]:
    """Read keys with a comma between them: each `SECRET` or `sha256:DIGEST`, with `NAME:` before it if it has one.

    One without a name is called by `kind` and its place, as in `key-2`. A name may have several keys, the new and the old.
    Raises `ValueError`, in whose message no key is.
    """
    keys: list[Key] = []
    parts = [part for part in (part.strip() for part in text.split(",")) if part]
    if len(parts) > MAX_CALLERS:
        raise ValueError(f"expected at most {MAX_CALLERS} keys, got {len(parts)}")
    for number, part in enumerate(parts, 1):
        name, colon, secret = part.partition(":")
        if not colon or part.startswith(_PREFIX):
            name, secret = f"{kind}-{number}", part
        elif not NAME.fullmatch(name):
            raise ValueError(
                f"key {number}: expected letters, digits, '.', '_' and '-' as the name before ':' (a key that has a ':' "
                "itself needs a name before it)"
            )
        key = Key(name, _digest(secret, number))
        if other := next((known for known in keys if known.digest == key.digest), None):
            raise ValueError(f"key {number}: it is the same as that of {other.name}")
        keys.append(key)
    return tuple(keys)


def _digest(secret: str, number: int) -> bytes:
    if secret.startswith(_PREFIX):
        digest = secret.removeprefix(_PREFIX).lower()
        if not _DIGEST.fullmatch(digest):
            raise ValueError(
                f"key {number}: expected 64 hexadecimal digits behind {_PREFIX}, got {len(digest)} characters"
            )
        return bytes.fromhex(digest)
    if not _KEY.fullmatch(secret):
        raise ValueError(f"key {number}: expected letters, digits and signs without blanks and commas")
    if not MIN_LENGTH <= len(secret) <= MAX_LENGTH:
        raise ValueError(
            f"key {number}: expected {MIN_LENGTH} to {MAX_LENGTH} characters, got {len(secret)}: make one with "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
        )
    return hashlib.sha256(secret.encode()).digest()


def find(secret: bytes, keys: Iterable[Key]) -> Key | None:
    """Return the key that has this secret. It takes as long whichever of them it is, and if none is."""
    digest = hashlib.sha256(secret).digest()
    found = None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found
