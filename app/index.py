"""The index: which versions exist, and which one each alias names. The one mutable object in a bucket.

Values of this module are immutable; a change returns a new index, and `ModelStorageManager` writes it by compare-and-swap.
Fields that this release does not know are kept: an older release that adds a version must not lose what a newer one wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from app.errors import InvalidIndex, NothingToRollBackTo, UnknownVersion, VersionExists, VersionInUse
from app.names import NAME, listed, printable

FORMAT = 1
HISTORY_LENGTH = 50  # moves kept per alias
MAX_INDEX_BYTES = 8 << 20  # some 50,000 versions
MAX_COUNTED_DIGITS = 18  # a longer number is a label like any other: nothing is counted on from it

_Said = Annotated[str, AfterValidator(printable)]  # by whoever wrote the index, and shown to others


class VersionEntry(BaseModel):
    """A published version: when, and the SHA-256 that its manifest must have."""

    model_config = ConfigDict(frozen=True, extra="allow")

    created: _Said
    manifest_sha256: str


class Move(BaseModel):
    """One move of an alias: to which version, from which, when (ISO 8601, UTC) and by whom.

    A `rollback` takes moves back instead of adding one: see `ModelEntry.behind`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    version: str
    previous: str | None = None
    at: _Said
    by: _Said = ""
    rollback: bool = Field(default=False, exclude_if=lambda value: not value)


class Removal(BaseModel):
    """When (ISO 8601, UTC) and by whom a version was unpublished."""

    model_config = ConfigDict(frozen=True, extra="allow")

    at: _Said
    by: _Said = ""


class ModelEntry(BaseModel):
    """One name: its versions, its aliases, and how each alias moved (the latest move last).

    `unpublished` has the labels of versions that were there once: a label never means something else later.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    versions: dict[str, VersionEntry] = Field(default_factory=dict)
    aliases: dict[str, str] = Field(default_factory=dict)
    history: dict[str, tuple[Move, ...]] = Field(default_factory=dict)
    unpublished: dict[str, Removal] = Field(default_factory=dict, exclude_if=lambda value: not value)

    def aliases_of(self, version: str) -> tuple[str, ...]:
        """Return the aliases that name `version`."""
        return tuple(alias for alias, target in self.aliases.items() if target == version)

    def behind(self, alias: str) -> tuple[str, ...]:
        """Return the versions that `alias` would go back to, the next one first, whether or not they are still there.

        The history is read as a stack: a move lays its version on top, a rollback takes versions off until its own is
        the top one. So rolling back twice goes two versions back, and not forth again.
        """
        stack: list[str] = []
        for move in self.history.get(alias, ()):
            if not move.rollback:
                if not stack and move.previous is not None:  # older moves were dropped
                    stack.append(move.previous)
                stack.append(move.version)
                continue
            del stack[-1:]
            while stack and stack[-1] != move.version:
                stack.pop()
            if not stack:
                stack.append(move.version)
        if stack and stack[-1] == self.aliases.get(alias):  # or else somebody edited the index without a move
            stack.pop()
        return tuple(reversed(stack))


class _Numbered(BaseModel):
    """What the index of any release has, whatever else has changed: the number of its format."""

    format: int


class Index(BaseModel):
    """All names. `etag` is the stored object's, None where there is none yet."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: int = FORMAT
    models: dict[str, ModelEntry] = Field(default_factory=dict)
    etag: str | None = Field(default=None, exclude=True)

    @property
    def published(self) -> Mapping[str, ModelEntry]:
        """The names that have a version. Of the others, all were unpublished: what is left of them is the history."""
        return {name: entry for name, entry in self.models.items() if entry.versions}

    def encode(self) -> bytes:
        """Return the index's bytes as they are stored."""
        return self.model_dump_json(indent=1, exclude_none=True).encode()

    @classmethod
    def decode(cls, body: bytes, etag: str | None = None) -> Index:
        """Read an index.

        Raises `InvalidIndex` when it is none, is too large or too new, or an alias names a version it lacks.
        """
        if len(body) > MAX_INDEX_BYTES:
            raise InvalidIndex(f"index.json is not an index: it has more than {MAX_INDEX_BYTES:,} bytes")
        try:
            index = cls.model_validate_json(body)
        except ValidationError as error:
            _check_format(body)  # one of a later release may well look otherwise
            raise _no_index(error) from error
        if "format" not in index.model_fields_set or not 1 <= index.format <= FORMAT:
            _check_format(body)
        if "models" not in index.model_fields_set:  # or else somebody's `{}` would take every model out of service
            raise InvalidIndex("index.json is not an index: models: Field required")
        for name, entry in index.models.items():
            for word in (name, *_words(entry)):
                if not NAME.match(word):
                    raise InvalidIndex(
                        f"index.json: {word!r:.100} cannot be the name of a model, a version or an alias"
                    )
            for alias, version in entry.aliases.items():
                if version not in entry.versions:
                    raise InvalidIndex(
                        f"index.json: alias {alias!r} of {name!r} names version {version!r}, which it lacks"
                    )
        return index.model_copy(update={"etag": etag})

    def next_version(self, name: str) -> str:
        """Return the next integer label for `name`: one more than the highest that it ever had, `1` at first.

        Of labels that are numbers, those of more than `MAX_COUNTED_DIGITS` digits do not count.
        """
        entry = self.models.get(name, ModelEntry())
        labels = {*entry.versions, *entry.unpublished}
        numbers = [int(label) for label in labels if label.isdecimal() and len(label) <= MAX_COUNTED_DIGITS]
        number = max(numbers, default=0) + 1
        while str(number) in labels:
            number += 1
        return str(number)

    def entry(self, name: str, version: str | None = None) -> ModelEntry:
        """Return the entry of `name`, which has `version`. Raises `UnknownVersion`, naming what there is."""
        model = self.models.get(name)
        if model is None:
            raise UnknownVersion(f"there is no published model {name!r}; {_there(self.models)}")
        if version is not None and version not in model.versions:
            removal = model.unpublished.get(version)
            gone = f": it was unpublished {signed(removal.at, removal.by)}" if removal else ""
            raise UnknownVersion(f"{name} has no version {version!r}{gone}; {_there(model.versions)}")
        return model

    def check_free(self, name: str, version: str) -> None:
        """Raise `VersionExists` when the label is taken, or ever was."""
        model = self.models.get(name, ModelEntry())
        if version in model.versions:
            raise VersionExists(f"{name}/{version} exists already: versions never change, choose another label")
        if removal := model.unpublished.get(version):
            raise VersionExists(
                f"{name}/{version} was unpublished {signed(removal.at, removal.by)}: "
                "labels are not used again, choose another one"
            )

    def with_version(self, name: str, version: str, entry: VersionEntry) -> Index:
        """Return an index that also has this version. Raises `VersionExists`."""
        self.check_free(name, version)
        model = self.models.get(name, ModelEntry())
        return self._with(name, model.model_copy(update={"versions": {**model.versions, version: entry}}))

    def without_version(self, name: str, version: str, *, at: str, by: str = "", drop_aliases: bool = False) -> Index:
        """Return an index that lacks this version and says when it went, without its aliases if they may be dropped.

        Raises `UnknownVersion`, `VersionInUse`.
        """
        model = self.entry(name, version)
        aliases = model.aliases_of(version)
        if aliases and not drop_aliases:
            remedy = (
                "let the alias name another version first (promote)"
                if len(model.versions) > 1
                else "it is the only version; --drop-aliases takes the model out of service"
            )
            raise VersionInUse(f"{name}/{version} is in use: {', '.join(aliases)} of {name} names it; {remedy}")
        changed: dict[str, Any] = {
            "versions": {label: entry for label, entry in model.versions.items() if label != version},
            "aliases": {alias: target for alias, target in model.aliases.items() if target != version},
            "unpublished": {**model.unpublished, version: Removal(at=at, by=by)},
        }
        return self._with(name, model.model_copy(update=changed))

    def rolled_back(self, name: str, alias: str, *, at: str, by: str = "") -> tuple[Index, tuple[str, ...]]:
        """Return an index in which `alias` names what it named before, and the versions passed over: unpublished since.

        Raises `UnknownVersion` when there is no such name or alias, `NothingToRollBackTo`.
        """
        model = self.entry(name)
        now = model.aliases.get(alias)
        if now is None:
            raise UnknownVersion(f"{name} has no alias {alias!r}; {_there(model.aliases)}")
        behind = model.behind(alias)
        skipped: list[str] = []
        for version in behind:
            if version == now:
                continue
            if version in model.versions:
                return self.with_alias(name, alias, version, at=at, by=by, rollback=True), tuple(skipped)
            skipped.append(version)
        since = f"; unpublished since: {', '.join(skipped)}" if skipped else ""
        raise NothingToRollBackTo(
            f"{name}: {alias} names {now}, and its history has nothing before that to go back to{since}; "
            f"{_there(model.versions)}: promote one of them"
        )

    def with_alias(
        self, name: str, alias: str, version: str, *, at: str, by: str = "", rollback: bool = False
    ) -> Index:
        """Return an index in which `alias` names `version`, with the move in the history. Raises `UnknownVersion`."""
        model = self.entry(name, version)
        move = Move(version=version, previous=model.aliases.get(alias), at=at, by=by, rollback=rollback)
        history = (*model.history.get(alias, ()), move)[-HISTORY_LENGTH:]
        changed: dict[str, Any] = {
            "aliases": {**model.aliases, alias: version},
            "history": {**model.history, alias: history},
        }
        return self._with(name, model.model_copy(update=changed))

    def _with(self, name: str, entry: ModelEntry) -> Index:
        return self.model_copy(update={"models": {**self.models, name: entry}})


def _check_format(body: bytes) -> None:
    """Raise `InvalidIndex` when the number of the format is none that this release reads; otherwise nothing is said."""
    try:
        found = _Numbered.model_validate_json(body).format
    except ValidationError as error:
        raise _no_index(error) from error
    if not 1 <= found <= FORMAT:
        raise InvalidIndex(f"index.json has format {found}, this release reads up to {FORMAT}: upgrade Diskless")


def _no_index(error: ValidationError) -> InvalidIndex:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole"
    return InvalidIndex(f"index.json is not an index: {where:.200}: {first['msg']:.200}")


def _words(entry: ModelEntry) -> Iterator[str]:
    """Yield every label and alias that is somewhere in an entry."""
    yield from entry.versions
    yield from entry.aliases
    yield from entry.unpublished
    for alias, moves in entry.history.items():
        yield alias
        for move in moves:
            yield move.version
            if move.previous is not None:
                yield move.previous


def _there(labels: Iterable[str]) -> str:
    return f"there is {listed(labels) or 'nothing'}"


def signed(at: str, by: str) -> str:
    """Say by whom and when, of which an index may claim anything."""
    return f"by {by or 'unknown':.100} at {at:.40}"
