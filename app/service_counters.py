"""What a whole service has done, beside what each model's runner counts: answers, refusals, looks at the bucket, loads, storage.

In cells as `Counters` has them: each process counts in cells of its own, and whoever is asked adds them up. Every cell's place is settled
when this module is imported, so all processes of a service agree about it, and counting is a look-up and an addition.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Literal

from app.counters import AT_A_MODEL, CODES, OTHER, Cells, descendants
from app.errors import (
    BundleError,
    DisklessError,
    InvalidRange,
    NotModified,
    ObjectNotFound,
    Overloaded,
    PreconditionFailed,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from app.rates import MAX_CALLERS


class Route(enum.StrEnum):
    """What was asked for, without anything that a caller made up."""

    PREDICT = "predict"
    STATUS = "status"
    REFRESH = "refresh"
    HEALTH = "health"
    METRICS = "metrics"
    OPENAPI = "openapi"
    DOCS = "docs"
    OTHER = "other"

    __hash__ = str.__hash__  # that of Enum is written in Python


Look = Literal["unchanged", "changed", "failed"]
LOOKS: tuple[Look, ...] = ("unchanged", "changed", "failed")

OK = "ok"
LOADS = (OK, *sorted({kind.kind() for root in (BundleError, StorageError) for kind in descendants(root)}), OTHER)
"""How a load may end: well, or with an error of one of these kinds."""

StorageKind = Literal["r2", "local", "copy"]
Operation = Literal["get", "put", "head", "list", "delete"]
Direction = Literal["read", "written"]
STORAGES: tuple[StorageKind, ...] = ("r2", "local", "copy")
OPERATIONS: tuple[Operation, ...] = ("get", "put", "head", "list", "delete")
DIRECTIONS: tuple[Direction, ...] = ("read", "written")
CANCELLED = "cancelled"
_OUTCOMES: Mapping[type[StorageError], str] = {
    NotModified: "not_modified",
    ObjectNotFound: "not_found",
    PreconditionFailed: "precondition_failed",
    InvalidRange: "invalid_range",
    StorageDenied: "denied",
    StorageUnavailable: "unavailable",
}
OUTCOMES = (OK, *_OUTCOMES.values(), CANCELLED, OTHER)
"""How an operation of a storage may end."""

_STATUSES = (*(str(status.value) for status in HTTPStatus if status >= 200), OTHER)


class _Layout:
    """Hands out the places of cells."""

    def __init__(self) -> None:
        self.size = 0

    def section(self, *axes: Sequence[str]) -> dict[tuple[str, ...], int]:
        """Return the place of each combination of these."""
        first = self.size
        places = {labels: first + position for position, labels in enumerate(itertools.product(*axes))}
        self.size += len(places)
        return places


_layout = _Layout()
_RESPONSES = _layout.section([*Route], _STATUSES)
_REFUSALS = _layout.section(CODES)
_LOOKS = _layout.section(LOOKS)
_LOADS = _layout.section(LOADS)
_OPERATIONS = _layout.section(STORAGES, OPERATIONS, OUTCOMES)
_BYTES = _layout.section(STORAGES, DIRECTIONS)
_CALLERS = _layout.section([str(place) for place in range(2 * MAX_CALLERS)])
_FIRST_CALLER = _CALLERS["0",]

# The same for those who count in a hurry, without tuples.
_RESPONSE_AT: Mapping[Route, Mapping[int, int]] = {
    route: {int(status): place for (found, status), place in _RESPONSES.items() if found == route and status != OTHER}
    for route in Route
}
_OTHER_RESPONSE_AT: Mapping[Route, int] = {route: _RESPONSES[route, OTHER] for route in Route}
_PREDICTED = _RESPONSES[Route.PREDICT, "200"]
_REFUSAL_AT = {code: place for (code,), place in _REFUSALS.items()}
_OTHER_REFUSAL = _REFUSAL_AT[OTHER]


class ServiceCounters(Cells):
    """The counts of one process, or of all of them together."""

    CELLS = _layout.size

    def responded(self, route: Route, status: int, code: str | None = None, *, at_a_model: bool = False) -> None:
        """Count an answer to a request for a `Route`, and the code of its error if it is one. Each answer is counted once.

        `at_a_model` when its model was known, whose counters have the codes that a model may be the reason of.
        """
        try:
            self.cells[_RESPONSE_AT[route][status]] += 1
        except KeyError:
            self.cells[_OTHER_RESPONSE_AT[route]] += 1
        if code is not None and not (at_a_model and code in AT_A_MODEL):
            self.cells[_REFUSAL_AT.get(code, _OTHER_REFUSAL)] += 1

    def predicted(self) -> None:
        """Count a prediction that was answered, as `responded` does, for those who have no time."""
        self.cells[_PREDICTED] += 1

    def called(self, place: int) -> None:
        """Count a request for a prediction by the place of its key's name among all names."""
        self.cells[_FIRST_CALLER + place] += 1

    def looked(self, look: Look) -> None:
        """Count a look at the bucket."""
        self.cells[_LOOKS[look,]] += 1

    def loaded(self, error: DisklessError | None = None) -> None:
        """Count a load that has ended, well or with an error."""
        kind = OK if error is None else error.kind()
        self.cells[_LOADS.get((kind,), _LOADS[OTHER,])] += 1

    def stored(
        self, storage: StorageKind, operation: Operation, outcome: str = OK, *, read: int = 0, written: int = 0
    ) -> None:
        """Count an operation of a storage, and the bytes of objects that it moved."""
        cells = self.cells
        cells[_OPERATIONS[storage, operation, outcome]] += 1
        cells[_BYTES[storage, "read"]] += read
        cells[_BYTES[storage, "written"]] += written

    @property
    def responses(self) -> dict[tuple[str, ...], int]:
        """Answers by route and status."""
        return self._section(_RESPONSES)

    @property
    def refusals(self) -> dict[tuple[str, ...], int]:
        """Requests that never reached a model, by code. There may be too many for a model, or for the service."""
        found = self._section(_REFUSALS)
        return {
            labels: found[labels] for labels in found if labels[0] not in AT_A_MODEL or labels[0] == Overloaded.code
        }

    @property
    def looks(self) -> dict[tuple[str, ...], int]:
        """Looks at the bucket, by what came of them."""
        return self._section(_LOOKS)

    @property
    def loads(self) -> dict[tuple[str, ...], int]:
        """Loads by how they ended."""
        return self._section(_LOADS)

    @property
    def operations(self) -> dict[tuple[str, ...], int]:
        """What was asked of storages: by storage, operation and outcome."""
        return self._section(_OPERATIONS)

    @property
    def bytes_moved(self) -> dict[tuple[str, ...], int]:
        """Bytes of objects by storage and direction."""
        return self._section(_BYTES)

    def calls(self, names: Sequence[str]) -> dict[tuple[str, ...], int]:
        """Requests for predictions by the names of keys, in the order of their places."""
        cells = self.cells
        return {(name,): cells[_FIRST_CALLER + place] for place, name in enumerate(names)}

    def _section(self, places: Mapping[tuple[str, ...], int]) -> dict[tuple[str, ...], int]:
        cells = self.cells
        return {labels: cells[place] for labels, place in places.items()}


def outcome_of(error: BaseException) -> str:
    """Return how an operation has ended that raised this."""
    if not isinstance(error, Exception):
        return CANCELLED
    return next((outcome for kind, outcome in _OUTCOMES.items() if isinstance(error, kind)), OTHER)
