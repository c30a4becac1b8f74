"""Who may call what, and how fast: from the headers of a request to its caller.

Predictions are open as long as no key for callers is set. What tells of the service needs a key of either kind, what changes it
or measures it needs an administrator's; as long as none is set nobody may. Health checks and documentation are open.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, MutableSequence

from app.errors import Forbidden, RateLimited, Unauthorized
from app.keys import Key, find
from app.rates import Bucket, Rate

Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""

CALLER = "diskless.caller"  # in a scope: the caller, where that is known already
_SHOW = "show it as `Authorization: Bearer KEY` or as `X-API-Key: KEY`"


class Caller:
    """Whoever sent a request, as far as it is known: a key's name, None without one."""

    __slots__ = ("bucket", "is_admin", "name", "place")

    def __init__(
        self, name: str | None, place: int | None = None, *, is_admin: bool = False, bucket: Bucket | None = None
    ) -> None:
        self.name = name
        self.place = place  # of the name among all names
        self.is_admin = is_admin
        self.bucket = bucket

    def spend(self, now: float) -> None:
        """Count a request, at `perf_counter`, against what this caller may send. Raises `RateLimited`."""
        if self.bucket is not None and not self.bucket.take(now):
            raise RateLimited(*self.bucket.rate, pause_seconds=self.bucket.pause(now))


ANYONE = Caller(None)


class Access:
    """The keys of a service, and what each opens.

    `cells` has a float for each name among `keys`: where the service's processes share what each caller has spent.
    """

    def __init__(
        self,
        keys: tuple[Key, ...] = (),
        admin_keys: tuple[Key, ...] = (),
        *,
        rate: Rate | None = None,
        cells: MutableSequence[float] | None = None,
    ) -> None:
        self._keys = (*keys, *admin_keys)
        self.needs_key = bool(keys)  # for predictions
        self._has_administrators = bool(admin_keys)
        names = sorted({key.name for key in keys})
        self.names = (*names, *sorted({key.name for key in admin_keys} - {*names}))
        places = {name: place for place, name in enumerate(self.names)}
        if cells is None:
            cells = array("d", bytes(8 * len(names)))
        buckets = {} if rate is None else {name: Bucket(rate, cells, place) for place, name in enumerate(names)}
        callers = {key.name: Caller(key.name, places[key.name], bucket=buckets.get(key.name)) for key in keys}
        administrators = {key.name: Caller(key.name, places[key.name], is_admin=True) for key in admin_keys}
        self._callers = {key.digest: callers[key.name] for key in keys}
        self._callers |= {key.digest: administrators[key.name] for key in admin_keys}

    def to_predict(self, headers: Headers) -> Caller:
        """Return who asks for a prediction. Raises `Unauthorized`."""
        if not self._keys:
            return ANYONE
        caller = self.caller(headers)
        if caller is not None:
            return caller
        if self.needs_key:
            raise _unknown(headers)
        return ANYONE

    def to_look(self, headers: Headers) -> Caller:
        """Return who asks how the service does. Raises `Unauthorized` and `Forbidden`."""
        if not self._keys:
            raise Forbidden("this needs a key, and none is set here: set ML_API_KEYS or ML_ADMIN_KEYS")
        caller = self.caller(headers)
        if caller is None:
            raise _unknown(headers)
        return caller

    def to_administer(self, headers: Headers) -> Caller:
        """Return who asks for what only administrators may. Raises `Unauthorized` and `Forbidden`."""
        if not self._has_administrators:
            raise Forbidden("this needs an administrator's key, and none is set here: set ML_ADMIN_KEYS")
        caller = self.caller(headers)
        if caller is None:
            raise _unknown(headers)
        if not caller.is_admin:
            raise Forbidden("this needs an administrator's key, one of ML_ADMIN_KEYS")
        return caller

    def described(self) -> str:
        """Return in a line who may do what, for whoever starts the service."""
        predictions = "need a key" if self.needs_key else "are open to anyone (ML_API_KEYS is not set)"
        status = "the status needs a key" if self._keys else "the status is refused"
        rest = "need an administrator's key" if self._has_administrators else "are refused (ML_ADMIN_KEYS is not set)"
        return f"predictions {predictions}; {status}; refreshing and metrics {rest}"

    def caller(self, headers: Headers) -> Caller | None:
        """Return whose key the headers show; None if they show none that is known, or more than one."""
        shown = _shown(headers)
        if len(shown) != 1:
            return None
        key = find(shown.pop(), self._keys)
        return None if key is None else self._callers[key.digest]


def _shown(headers: Headers) -> set[bytes]:
    """Return the keys that the headers show. An Authorization that is no Bearer is for somebody else, a proxy maybe."""
    shown = set()
    for name, value in headers:
        if name == b"x-api-key":
            shown.add(value.strip())
        elif name == b"authorization":
            scheme, _, secret = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                shown.add(secret.strip())
    return shown - {b""}


def _unknown(headers: Headers) -> Unauthorized:
    shown = _shown(headers)
    if not shown:
        return Unauthorized(f"this needs a key: {_SHOW}")
    if len(shown) > 1:
        return Unauthorized("expected one key, got two that differ")
    return Unauthorized("the key is not one that is known here")
