"""The models this process serves. The refresher is the only writer; requests only read.

A `Snapshot` is never edited: the refresher makes the next one and puts it in place by one assignment, so whoever reads
sees all of the old or all of the new.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from app.errors import ModelNotFound, ModelNotReady, RequestError
from app.names import ModelRef, listed
from app.runner import Runner


class State(enum.StrEnum):
    """What a version is doing (Open Inference Protocol)."""

    LOADING = "LOADING"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True, slots=True)
class Slot:
    """One version: its state, its runner where it is READY, and what is wrong where something is.

    `reason` is for whoever runs the service; `hint` says the same to callers, without places and paths. `content` is
    what the bucket wanted under this version when it was loaded, `seconds` is what each phase of that took; `held_bytes` is about
    how much memory would be free without it; `costs` are seconds per batch of the default method, by its number of rows.
    """

    ref: ModelRef
    state: State
    reason: str | None = None
    hint: str | None = None
    runner: Runner | None = None
    bare: bool = False
    content: str | None = None
    parity: float | None = None
    held_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[int, float] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One name: its versions, which of them each alias serves, and which one each alias should serve."""

    slots: Mapping[str, Slot] = field(default_factory=dict)
    serving: Mapping[str, str] = field(default_factory=dict)
    wanted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is served at one moment."""

    entries: Mapping[str, Entry] = field(default_factory=dict)

    def slots(self) -> Iterator[Slot]:
        """Yield every version of every name."""
        for entry in self.entries.values():
            yield from entry.slots.values()

    def with_entry(self, name: str, entry: Entry | None) -> Snapshot:
        """Return a snapshot in which `name` has this entry, or none."""
        entries = {key: value for key, value in self.entries.items() if key != name}
        if entry is not None:
            entries[name] = entry
        return replace(self, entries=dict(sorted(entries.items())))


class Registry:
    """Published runners by name, and by version or alias."""

    def __init__(self, aliases: tuple[str, ...] = ("production",), required: tuple[str, ...] = ()) -> None:
        self._snapshot = Snapshot()
        self._plain: Mapping[str | None, Runner] = {}
        self._aliases = aliases
        self._required = required
        self._found_at_start: frozenset[str] | None = None
        self._unread = "the bucket has not been read yet"
        self.draining = False
        self.waits_for: str | None = None  # what else must happen before the service is ready

    @property
    def snapshot(self) -> Snapshot:
        """What is served now."""
        return self._snapshot

    def swap(self, snapshot: Snapshot) -> list[Runner]:
        """Serve from `snapshot`; return the runners that it no longer holds."""
        kept = {slot.runner for slot in snapshot.slots()}
        retired = [slot.runner for slot in self._snapshot.slots() if slot.runner and slot.runner not in kept]
        self._snapshot, self._plain = snapshot, _plain(snapshot, self._aliases[0])
        return retired

    def plain(self, name: str | None) -> Runner | None:
        """Return the runner that answers for a name (None: for the only one) under the default alias; None if none does."""
        return self._plain.get(name)

    def labelled(self, name: str | None, version: str | int | None, alias: str | None) -> Runner | None:
        """Return the runner of a version or alias; None if there is none, or if it cannot be asked for in that way."""
        if (version is not None and alias is not None) or version == "" or alias == "":
            return None
        try:
            return self.get(name, version=None if version is None else str(version), alias=alias)
        except RequestError:
            return None

    def get(self, name: str | None = None, *, version: str | None = None, alias: str | None = None) -> Runner:
        """Return the runner that answers for this name (the only one where none is given), version or alias.

        Raises `ModelNotFound`, naming what is served; `ModelNotReady` for what is known but cannot answer now.
        """
        entries = self._snapshot.entries
        if name is None:
            if len(entries) != 1:
                if not entries:
                    raise ModelNotReady("no model is loaded yet")
                raise ModelNotFound(f"several models are served, so the request must name one: {listed(entries)}")
            (name,) = entries
        entry = entries.get(name)
        if entry is None:
            if not entries and self._found_at_start is None:
                raise ModelNotReady("no model is loaded yet: the service is starting")
            raise ModelNotFound(f"model {name!r} is not served; served are: {listed(entries) or 'none'}")
        alias = alias or (None if version else self._aliases[0])
        label = version or entry.serving.get(alias or "") or entry.wanted.get(alias or "")
        slot = entry.slots.get(label or "")
        if slot is None:
            if version is None and alias == self._aliases[0] and entry.slots:
                raise ModelNotReady(f"{name} has no version under alias {alias!r} yet")
            asked = f"version {version!r}" if version else f"alias {alias!r}"
            where = "" if version else "; ML_ALIASES says which aliases are"
            raise ModelNotFound(f"{name} has no {asked} loaded; loaded are {_loaded(entry)}{where}")
        if slot.runner is None:
            raise ModelNotReady(f"{slot.ref} is {slot.state}: {slot.hint or 'try again shortly'}")
        return slot.runner

    @property
    def settled(self) -> bool:
        """Whether a first look has been complete."""
        return self._found_at_start is not None

    @property
    def unread(self) -> str:
        """Why the bucket could not be looked at, as long as no look has worked."""
        return self._unread

    def settle(self) -> None:
        """Remember which names the first complete look found: those are required where no setting says which."""
        if self._found_at_start is None:
            self._found_at_start = frozenset(self._snapshot.entries)

    def unreadable(self, hint: str) -> None:
        """Remember why the bucket could not be looked at: until one look has worked, it is why the service is not ready."""
        self._unread = hint

    def not_ready(self) -> str | None:
        """Return why the service is not ready, or None when it is.

        Every required model must answer under its default alias: those that a setting names, or else those that the
        first complete look found, as long as the bucket has them. A model that came later never lowers readiness.
        """
        if self.draining:
            return "the service is stopping"
        reason = self.missing()
        return self.waits_for if reason is None else reason

    def missing(self) -> str | None:
        """Return why not every required model can answer, or None when each can; whatever else keeps the service from it."""
        entries = self._snapshot.entries
        if self._found_at_start is None and not self._required:
            return "the models are being loaded" if entries else self._unread
        required = self._required or tuple(name for name in sorted(self._found_at_start or ()) if name in entries)
        if required:
            return next(filter(None, map(self._not_serving, required)), None)
        if any(entry.serving for entry in entries.values()):
            return None
        return next(filter(None, map(self._not_serving, entries)), "the bucket has no model to serve")

    def _not_serving(self, name: str) -> str | None:
        """Return why `name` does not answer under the default alias (or under the one it has), or None when it does."""
        entry, alias = self._snapshot.entries.get(name), self._aliases[0]
        if entry is None:
            return self._unread if self._found_at_start is None else f"{name} is required, but not in the bucket"
        if alias in entry.serving or (alias not in entry.wanted and entry.serving):
            return None
        for slot in entry.slots.values():
            if slot.runner is None:
                return f"{slot.ref} is {slot.state}" + (f": {slot.hint}" if slot.hint else "")
        return f"{name} has no version under alias {alias!r}"


def _loaded(entry: Entry) -> str:
    """Say which versions and aliases of a name there are."""
    kinds = (("version", "versions", entry.slots), ("alias", "aliases", entry.serving))
    told = [f"{one if len(names) == 1 else several} {listed(names)}" for one, several, names in kinds if names]
    return " and ".join(told) or "none"


def _plain(snapshot: Snapshot, alias: str) -> Mapping[str | None, Runner]:
    """Return what answers for each name that nothing more is said of; None stands for the only name."""
    found: dict[str | None, Runner] = {}
    for name, entry in snapshot.entries.items():
        slot = entry.slots.get(entry.serving.get(alias, ""))
        if slot is not None and slot.runner is not None:
            found[name] = slot.runner
    if len(snapshot.entries) == 1:
        found |= dict.fromkeys((None,), *found.values()) if found else {}
    return found
