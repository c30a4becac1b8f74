"""The index: which versions exist, and which one each alias names. The one mutable object in a bucket.

Values of this module are immutable; a change returns a new index, and `ModelStorageManager` writes it by compare-and-swap.
Fields that this release does not know are kept: an older release that adds a version must not lose what a newer one wrote.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import InvalidIndex, VersionExists
from app.names import NAME

FORMAT = 1
HISTORY_LENGTH = 50  # moves kept per alias


class VersionEntry(BaseModel):
    """A published version: when, and the SHA-256 that its manifest must have."""

    model_config = ConfigDict(frozen=True, extra="allow")

    created: str
    manifest_sha256: str


class Move(BaseModel):
    """One move of an alias: to which version, from which, when (ISO 8601, UTC) and by whom."""

    model_config = ConfigDict(frozen=True, extra="allow")

    version: str
    previous: str | None = None
    at: str
    by: str = ""


class ModelEntry(BaseModel):
    """One name: its versions, its aliases, and how each alias moved (the latest move last)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    versions: dict[str, VersionEntry] = Field(default_factory=dict)
    aliases: dict[str, str] = Field(default_factory=dict)
    history: dict[str, tuple[Move, ...]] = Field(default_factory=dict)


class _Numbered(BaseModel):
    """What the index of any release has: the number of its format."""

    format: int


class Index(BaseModel):
    """All names. `etag` is the stored object's, None where there is none yet."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: int = FORMAT
    models: dict[str, ModelEntry] = Field(default_factory=dict)
    etag: str | None = Field(default=None, exclude=True)

    def encode(self) -> bytes:
        """Return the index's bytes as they are stored."""
        return self.model_dump_json(indent=1, exclude_none=True).encode()

    @classmethod
    def decode(cls, body: bytes, etag: str | None = None) -> Index:
        """Read an index. Raises `InvalidIndex` when it is none, is too new, or an alias names a version it lacks."""
        try:
            found = _Numbered.model_validate_json(body).format
            if not 1 <= found <= FORMAT:
                raise InvalidIndex(
                    f"index.json has format {found}, this release reads up to {FORMAT}: upgrade Diskless"
                )
            index = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise InvalidIndex(f"index.json is not an index: {where}: {first['msg']}") from error
        if "models" not in index.model_fields_set:  # or else somebody's `{}` would take every model out of service
            raise InvalidIndex("index.json is not an index: models: Field required")
        for name, entry in index.models.items():
            for word in (name, *entry.versions, *entry.aliases):
                if not NAME.match(word):
                    raise InvalidIndex(f"index.json: {word!r} cannot be the name of a model, a version or an alias")
            for alias, version in entry.aliases.items():
                if version not in entry.versions:
                    raise InvalidIndex(
                        f"index.json: alias {alias!r} of {name!r} names version {version!r}, which it lacks"
                    )
        return index.model_copy(update={"etag": etag})

    def next_version(self, name: str) -> str:
        """Return the next integer label for `name`: one more than its highest integer one, `1` at first."""
        entry = self.models.get(name)
        numbers = [int(label) for label in entry.versions if label.isdecimal()] if entry else []
        return str(max(numbers, default=0) + 1)

    def with_version(self, name: str, version: str, entry: VersionEntry) -> Index:
        """Return an index that also has this version. Raises `VersionExists`."""
        model = self.models.get(name, ModelEntry())
        if version in model.versions:
            raise VersionExists(f"{name}/{version} exists already: versions never change, choose another label")
        return self._with(name, model.model_copy(update={"versions": {**model.versions, version: entry}}))

    def with_alias(self, name: str, alias: str, version: str, *, at: str, by: str = "") -> Index:
        """Return an index in which `alias` names `version`, with the move in the history."""
        model = self.models[name]
        move = Move(version=version, previous=model.aliases.get(alias), at=at, by=by)
        history = (*model.history.get(alias, ()), move)[-HISTORY_LENGTH:]
        changed: dict[str, Any] = {
            "aliases": {**model.aliases, alias: version},
            "history": {**model.history, alias: history},
        }
        return self._with(name, model.model_copy(update=changed))

    def _with(self, name: str, entry: ModelEntry) -> Index:
        return self.model_copy(update={"models": {**self.models, name: entry}})
