"""What headers have to say: those that are on every answer, whoever gives it, and the one in which a request names its host.

The first are what OWASP's REST security cheat sheet asks for, as far as it is this service's to say; docs/decisions/0019 has
the reason for each, and for those that are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Header = tuple[bytes, bytes]

SAFE: tuple[Header, ...] = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
SAFE_JSON: tuple[Header, ...] = (*SAFE, (b"content-type", b"application/json"))

_HOST = re.compile(rb"[ \t]*([A-Za-z0-9_][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?[ \t]*\Z")


def lines_of(headers: Iterable[Header]) -> bytes:
    """Return headers as HTTP/1.1 writes them."""
    return b"".join(b"%b: %b\r\n" % header for header in headers)


def completed(headers: Sequence[Header], *more: Header) -> list[Header]:
    """Return an answer's headers with those of `SAFE`, and `more`, that it does not have: a route may set its own."""
    present = {name.lower() for name, _ in headers}
    return [*headers, *(header for header in (*SAFE, *more) if header[0] not in present)]


class Hosts:
    """The hosts that the service answers to: exact names, and `*.example.org` for whatever is below a name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._exact = frozenset(name.encode() for name in names if not name.startswith("*."))
        self._endings = tuple(name[1:].encode() for name in names if name.startswith("*."))

    def named(self, headers: Iterable[Header]) -> bool:
        """Whether a request's headers, their names in lower case, name one of them, once. The port does not matter."""
        found = [value for name, value in headers if name == b"host"]
        match = _HOST.match(found[0]) if len(found) == 1 else None
        if match is None:
            return False
        host = match[1].lower()
        return host in self._exact or host.endswith(self._endings)
