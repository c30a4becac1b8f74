"""The bucket as a model repository: where versions lie, what the index says, how one is fetched, published, saved, loaded.

`ModelStorageManager` owns the key layout and the order of writes. Bytes by key are the storage's affair, what the bytes
mean is the loaders' and the model's.
"""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import logging
import random
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from app import gate as gates
from app import publishing, versions
from app.bundle import Bundle, Part
from app.compiled import program as programs
from app.errors import (
    ArtifactMissing,
    BundleError,
    CompanionFailed,
    DigestMismatch,
    GoldenMismatch,
    InvalidIndex,
    InvalidManifest,
    InvalidName,
    InvalidRange,
    LoadFailed,
    NotModified,
    ObjectNotFound,
    PreconditionFailed,
    PublishConflict,
    PublishError,
    RequestError,
    StorageError,
    StorageUnavailable,
    UnknownVersion,
    UnusableKey,
    UnusableModel,
    VersionExists,
    VersionMismatch,
)
from app.index import MAX_INDEX_BYTES, Index, ModelEntry, Move, Removal, VersionEntry, signed
from app.loaders import LOADERS, reason
from app.manifest import COMPILED, MAX_MANIFEST_BYTES, PROGRAM_FORMAT, Artifact, Compiled, Manifest
from app.memory import HEAD_BYTES, MEASURED_FROM_BYTES
from app.model import Model
from app.names import COMPANION_ROLES, NAME, SUFFIXES, ModelRef, check_name
from app.seal import MAX_SEAL_BYTES, PrivateKey, read_private_key
from app.seal import seal as make_seal
from app.service_counters import ServiceCounters, StorageKind
from app.settings import Mode, Settings, load_settings
from app.spans import Journal
from app.storage.base import ObjectInfo, Storage
from app.storage.counted import CountedStorage
from app.storage.traced import TracedStorage
from app.trust import Trust

logger = logging.getLogger("diskless.models")
Runtime = Literal["auto", "sklearn", "compiled", "every"]
"""What of a version is loaded: what serves, scikit-learn only, the compiled form only, or all that there is (to verify it)."""

PRODUCTION = "production"
SEAL = "manifest.seal"
INDEX_ATTEMPTS = 30
LABEL_ATTEMPTS = 100
MAX_OF_A_KIND = 50  # of what is passed over for one reason, so many are named
MAX_BARE_MODELS = 10_000
DECODED_ASIDE_BYTES = 256 * 1024  # from here on, parsing would hold up the requests that the event loop answers


@dataclass(frozen=True, slots=True)
class Wanted:
    """A version that should be served, under which aliases, and what is needed to fetch it.

    A published one has the digest its manifest must have; a bare one its `parts`. `problem` is set when the listing alone
    shows that it cannot be served. `confirmed` is false of a bare model with companions of which the last look saw other
    parts: somebody may be in the middle of replacing them, so it may not be loaded before a look that finds them unchanged.
    """

    ref: ModelRef
    aliases: tuple[str, ...]
    manifest_sha256: str | None = None
    parts: tuple[Part, ...] = ()
    problem: BundleError | None = None
    confirmed: bool = True

    @property
    def bare(self) -> bool:
        """Whether it has no manifest."""
        return self.manifest_sha256 is None

    @property
    def content(self) -> str:
        """What tells one content of this version from another: a name may be removed and begin again at version 1."""
        return self.manifest_sha256 or self.ref.version


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What the bucket held when it was looked at: the index, the bare models, and what was passed over and why.

    `companions` are the roles that were ever seen beside each bare name, in this look or those before it; `seen` is the
    version that each bare name had when it was seen last.
    """

    wanted: Mapping[ModelRef, Wanted] = field(default_factory=dict)
    index: Index = field(default_factory=Index)
    ignored: Mapping[str, str] = field(default_factory=dict)
    companions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    seen: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checked:
    """A model that may serve, what its gate found, and the seconds of each phase."""

    model: Model
    gate: gates.Gate
    seconds: Mapping[str, float]

    @property
    def parity(self) -> float | None:
        """How far its golden rows were off; None without any."""
        return self.gate.parity

    @property
    def costs(self) -> Mapping[int, float] | None:
        """Seconds per batch of the default method, by its number of rows; None where it could not be measured."""
        return self.gate.costs


@dataclass(frozen=True, slots=True)
class Moved:
    """An alias and the version that it names now. `previous` is what it named before, None when there was no such alias.

    Nothing was written unless `changed`. A rollback passed over the versions `skipped`: they were unpublished since.
    """

    ref: ModelRef
    alias: str
    previous: str | None
    changed: bool
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unpublished:
    """A version that is gone: how many objects were deleted now, which aliases went with it, and when it was removed.

    `repeated` says that it had been unpublished before, so that only leftovers were looked for.
    """

    ref: ModelRef
    objects_deleted: int
    aliases: tuple[str, ...]
    removal: Removal
    repeated: bool


class _PassedOver:
    """What was passed over, and why. Anybody may fill a bucket: of each kind only the first `MAX_OF_A_KIND` are named."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def add(self, what: str, why: str, *, kind: str | None = None) -> None:
        self._counts[kind or why] += 1
        if self._counts[kind or why] <= MAX_OF_A_KIND:
            self.told[what] = why


async def _decoded[T](body: bytes, decode: Callable[[], T]) -> T:
    return await asyncio.to_thread(decode) if len(body) >= DECODED_ASIDE_BYTES else decode()


def load_checked(bundle: Bundle, *, before_check: Callable[[], None] | None = None) -> Checked:
    """Load a bundle and run its golden rows. It blocks: for a thread other than the event loop's.

    `before_check` is called when the libraries that the model needs have been loaded and nothing was computed yet.

    Raises the `BundleError` that says why it cannot serve, or what the storage raises; nothing else.
    """
    model = load(bundle)
    if before_check is not None:
        before_check()
    return settled(model, check(model))


def load(bundle: Bundle) -> Model:
    """Load a bundle, and predict nothing. It blocks, and raises as `load_checked` does."""
    with _told(bundle.ref):
        return Model.from_bundle(bundle)


def check(model: Model) -> gates.Gate:
    """Run the gate of a loaded model: its golden rows, the proof of its candidate, its costs. It raises as `load_checked` does."""
    with _told(model.ref):
        return gates.gate(model)


def settled(model: Model, found: gates.Gate) -> Checked:
    """Put together what `load` and `check` gave, the second perhaps in another process. Predicts nothing."""
    return Checked(gates.settle(model, found), found, {**model.report.seconds, "check": found.seconds})


@contextmanager
def _told(ref: ModelRef) -> Iterator[None]:
    try:
        yield
    except (BundleError, StorageError):
        raise
    except RequestError as error:  # refused or failed, as a request would
        cause = reason(error.__cause__) if error.__cause__ else str(error)
        raise GoldenMismatch(f"{ref}: the golden rows cannot be computed: {cause}") from error
    except BaseException as error:  # a model's own code runs here, and may raise even SystemExit
        raise LoadFailed(f"{ref}: cannot be loaded: {reason(error)}") from error


class ModelStorageManager:
    """Loads models from a storage and saves them there.

    The coroutines are for a service, inside `async with manager.storage`. `save` and `load` are for scripts and
    notebooks: they open the storage themselves and work inside a running event loop, too.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        prefix: str = "models/",
        bare_models: bool = True,
        companions: Mapping[str, tuple[str, ...]] | None = None,
        aliases: tuple[str, ...] = (PRODUCTION,),
        trust: Trust | None = None,
        runtime: Runtime = "auto",
    ) -> None:
        self.storage = storage
        self.runtime = runtime
        self.trust = trust or Trust()
        self.prefix = prefix
        self._bare_models = bare_models
        self._companions = dict(companions or {})
        self._aliases = aliases
        self._alone = threading.Lock()  # of `save` and `load`: a storage belongs to one event loop at a time

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        moved: Callable[[str, int, int], None] | None = None,
        counters: ServiceCounters | None = None,
        journal: Journal | None = None,
    ) -> ModelStorageManager:
        """Return a manager over the storage that the settings call for; `moved` is as in `R2Storage`.

        `counters` are told of all that is asked of the storage, and it is written down in `journal`. Raises `SettingsError`.
        """
        return cls(
            storage_for(settings, moved=moved, counters=counters, journal=journal),
            prefix=settings.prefix,
            bare_models=settings.bare_models,
            companions=settings.companions,
            aliases=settings.aliases,
            trust=settings.trust,
            runtime=settings.runtime,
        )

    @classmethod
    def from_env(cls) -> ModelStorageManager:
        """Return a manager as the environment (and `.env`) describes it. Raises `SettingsError`."""
        return cls.from_settings(load_settings())

    # Looking

    async def read_index(self, known: Index | None = None) -> Index:
        """Return the index, `known` itself if it has not changed. A bucket without one has an empty index.

        Raises `InvalidIndex`, or what the storage raises.
        """
        span, etag = range(MAX_INDEX_BYTES + 1), known.etag if known else None
        try:
            stored = await self.storage.get(self._index_key, span=span, if_none_match=etag)
        except NotModified:
            assert known is not None
            return known
        except ObjectNotFound:
            return Index()
        except InvalidRange as error:
            raise InvalidIndex("index.json is not an index: it is empty") from error
        return await _decoded(stored.body, lambda: Index.decode(stored.body, stored.info.etag))

    async def _read(self, key: str, most: int) -> bytes:
        """Return an object's bytes, `most` and one more at most: whoever wants no more of them sees that there are."""
        try:
            return (await self.storage.get(key, span=range(most + 1))).body
        except InvalidRange:  # an empty object
            return b""

    async def catalogue(self, previous: Catalogue | None = None) -> Catalogue:
        """Look at the bucket: one conditional GET of the index, and one listing for bare models if they are served."""
        index = await self.read_index(previous.index if previous else None)
        published = index.published
        wanted: dict[ModelRef, Wanted] = {}
        ignored = _PassedOver()
        for name, entry in published.items():
            versions = {alias: entry.aliases[alias] for alias in self._aliases if alias in entry.aliases}
            for version in dict.fromkeys(versions.values()):
                ref = ModelRef(name, version)
                aliases = tuple(alias for alias, target in versions.items() if target == version)
                wanted[ref] = Wanted(ref, aliases, manifest_sha256=entry.versions[version].manifest_sha256)
            if not versions:
                ignored.add(name, f"none of the served aliases ({', '.join(self._aliases)}) names a version of it")
        companions: dict[str, frozenset[str]] = dict(previous.companions) if previous else {}
        seen = dict(previous.seen) if previous else {}
        if self._bare_models:
            for bare in await self._find_bare(previous, companions, ignored):
                seen[bare.ref.name] = bare.ref.version
                if bare.ref.name in published:
                    ignored.add(f"{bare.ref.name} (bare)", "a published model has this name")
                else:
                    wanted[bare.ref] = bare
        return Catalogue(wanted, index, ignored.told, companions, seen)

    async def _find_bare(
        self, previous: Catalogue | None, companions: dict[str, frozenset[str]], ignored: _PassedOver
    ) -> list[Wanted]:
        """List the bucket and return the bare models in it; add the companions seen, and what was passed over."""
        listing = await self.storage.list(self.prefix, recursive=False)
        if previous is not None and getattr(self.storage, "fallback_reason", None):
            # A local copy answered. It may lack files: that says nothing about the bucket, so nothing changes.
            return [bare for bare in previous.wanted.values() if bare.bare]
        models, beside = self._sorted(listing, ignored)
        for name, role in beside:
            companions[name] = companions.get(name, frozenset()) | {role}
            if name not in models:
                ignored.add(f"{name}_{role}", f"a companion without its model {name}", kind="alone")
        if len(models) > MAX_BARE_MODELS:
            too_many = f"more than {MAX_BARE_MODELS:,} bare models: publish them, or remove what is none"
            for name in [*models][MAX_BARE_MODELS:]:
                del models[name]
                ignored.add(name, too_many)
        bare = [self._bare(name, parts, beside, companions.get(name, frozenset())) for name, parts in models.items()]
        return [replace(model, confirmed=_is_confirmed(model, previous)) for model in bare]

    def _sorted(
        self, listing: list[ObjectInfo], ignored: _PassedOver
    ) -> tuple[dict[str, list[Part]], dict[tuple[str, str], list[Part]]]:
        """Sort a listing into models by name, and companions by the model's name and the role."""
        models: dict[str, list[Part]] = {}
        companions: dict[tuple[str, str], list[Part]] = {}
        for info in listing:
            file = info.key.removeprefix(self.prefix)
            stem, dot, ending = file.rpartition(".")
            format = SUFFIXES.get(f"{dot}{ending}")
            if format is None:
                if file not in ("", "index.json"):
                    ignored.add(file, f"its ending is not one of {', '.join(SUFFIXES)}")
                continue
            if not NAME.match(stem):
                ignored.add(file, "its name has characters that a model's name cannot have")
                continue
            name, _, role = stem.rpartition("_")
            if name and role in COMPANION_ROLES:
                companions.setdefault((name, role), []).append(Part(role, format, info))
            else:
                models.setdefault(stem, []).append(Part("model", format, info))
        return models, companions

    def _bare(
        self, name: str, models: list[Part], beside: Mapping[tuple[str, str], list[Part]], seen: frozenset[str]
    ) -> Wanted:
        """Put a bare model and its companions together.

        A companion that was once seen stays needed, even when the model's file changes as well: a listing cannot say
        whether that was a retraining without it or an accident, and a model without its scaler answers, but wrongly.
        Nobody restarts a service by accident, so a restart takes the bucket as it then is, but for ML_COMPANIONS.
        """
        problem: BundleError | None = None
        parts: list[Part] = []
        labels: list[str] = []
        for role in ("model", *COMPANION_ROLES):
            candidates = models if role == "model" else beside.get((name, role), [])
            if len(candidates) > 1:
                files = " and ".join(part.info.key.rpartition("/")[2] for part in candidates)
                problem = UnusableModel(f"{files} are both there: which one is the {role} cannot be known, remove one")
            etags = [part.info.etag[:12] for part in candidates]
            if not candidates and role in self._companions.get(name, ()):
                problem = CompanionFailed(f"its {role} is missing: ML_COMPANIONS demands {name}_{role} beside it")
                etags = ["missing"]
            elif not candidates and role in seen:
                problem = CompanionFailed(
                    f"its {role} is gone: {name}_{role} was beside it and must come back; "
                    "if it is not needed any more, restart the service or publish the model"
                )
                etags = ["missing"]
            parts += candidates[:1]
            labels += etags if role == "model" else [f"{role}.{etag}" for etag in etags]
        ordered = (*parts[1:], parts[0])
        return Wanted(ModelRef(name, "-".join(labels)), self._aliases[:1], parts=ordered, problem=problem)

    # Fetching

    async def fetch(self, wanted: Wanted, *, runtime: Runtime | None = None, unreadable: str | None = None) -> Bundle:
        """Find everything that a version needs and return it, ready to be read.

        `runtime` is what shall compute, as the manager was told unless given; `unreadable` is why its compiled form cannot be read,
        where that was found out: then it is passed over. Parts that will not be read are not looked for.

        What a version says of itself is believed in this order: that it is the one in the index (its digest), that somebody
        who is trusted says so (its seal), that it was made for these libraries (its versions), and then what it consists of.
        Raises the `BundleError` that says what is missing or wrong, or what the storage raises.
        """
        if wanted.problem is not None:
            raise wanted.problem
        loop = asyncio.get_running_loop()
        runtime = runtime or self.runtime
        if wanted.bare:
            self.trust.allow_bare(wanted.ref)
            if runtime == "compiled":
                raise UnusableModel(f"{wanted.ref}: is a bare model, and ML_RUNTIME is compiled: publish it{_OR_ELSE}")
            parts = await asyncio.gather(*(self._with_head(wanted.ref, part) for part in wanted.parts))
            return Bundle(wanted.ref, tuple(parts), self.storage, loop, trust=self.trust, compiles=runtime == "auto")
        ref = wanted.ref
        body, seal = await self._manifest_and_seal(ref)
        found = hashlib.sha256(body).hexdigest()
        if found != wanted.manifest_sha256:
            raise DigestMismatch(f"{ref} manifest.json: sha256 is {found}, the index says {wanted.manifest_sha256:.64}")
        sealed_by = self.trust.sealed_by(body, seal, str(ref)) if self.trust.looks_at_seals else None
        manifest = await _decoded(body, lambda: Manifest.decode(body, ref))
        form = _form(manifest, runtime, unreadable)
        warnings: tuple[str, ...] = ()
        if form.reference:
            try:
                warnings = versions.check(manifest.trained_with, str(ref), policy=self.trust.version_policy)
            except VersionMismatch:
                if not form.is_complete:
                    raise
                form = replace(
                    form, reference=False
                )  # what would serve does without scikit-learn, whatever its version
        order = (*((*COMPANION_ROLES, "model") if form.reference else ()), *((COMPILED,) if form.compiled else ()))
        served = [artifact for artifact in manifest.artifacts if artifact.role in order]
        served.sort(key=lambda artifact: order.index(artifact.role))
        parts = await asyncio.gather(*(self._part(ref, artifact) for artifact in served))
        if form.reference and manifest.memory is None:
            parts = await asyncio.gather(*(self._with_head(ref, part) for part in parts))
        return Bundle(
            ref,
            tuple(parts),
            self.storage,
            loop,
            manifest,
            found,
            self.trust,
            sealed_by=sealed_by,
            warnings=warnings,
            compiles=form.compiles,
            not_compiled=form.reason,
        )

    async def _manifest_and_seal(self, ref: ModelRef) -> tuple[bytes, bytes | None]:
        if not self.trust.looks_at_seals:
            return await self._manifest_bytes(ref), None
        return await asyncio.gather(self._manifest_bytes(ref), self._seal_bytes(ref))

    async def _seal_bytes(self, ref: ModelRef) -> bytes | None:
        try:
            return await self._read(self._key(ref, SEAL), MAX_SEAL_BYTES)
        except ObjectNotFound:
            return None

    async def _with_head(self, ref: ModelRef, part: Part) -> Part:
        """Read the first bytes of a large part of which nobody has measured what loading it takes: they tell how it is packed."""
        if part.info.size < MEASURED_FROM_BYTES:
            return part
        try:
            stored = await self.storage.get(part.info.key, span=range(HEAD_BYTES), if_match=part.info.etag)
        except (ObjectNotFound, PreconditionFailed) as error:
            file = part.info.key.rpartition("/")[2]
            raise ArtifactMissing(f"{ref} {file}: the object changed while it was read") from error
        return replace(part, head=stored.body)

    async def _manifest_bytes(self, ref: ModelRef) -> bytes:
        try:
            body = await self._read(self._key(ref, "manifest.json"), MAX_MANIFEST_BYTES)
        except ObjectNotFound as error:
            raise ArtifactMissing(f"{ref}: manifest.json is not there, although the index lists the version") from error
        if len(body) > MAX_MANIFEST_BYTES:  # or else the digest of its beginning would be told
            raise InvalidManifest(f"{ref}: manifest.json has more than {MAX_MANIFEST_BYTES:,} bytes, so it is none")
        return body

    async def _part(self, ref: ModelRef, artifact: Artifact) -> Part:
        if artifact.format not in LOADERS and artifact.role != COMPILED:
            raise InvalidManifest(f"{ref} {artifact.path}: format {artifact.format!r} is not one this release can read")
        if self.trust.require_seal and artifact.size and not artifact.chunks:
            raise InvalidManifest(
                f"{ref} {artifact.path}: the manifest lists no chunks, so that its bytes would be read before their digest "
                "is known, and this service wants what is sealed only: publish it again"
            )
        try:
            info = await self.storage.head(self._key(ref, artifact.path))
        except ObjectNotFound as error:
            raise ArtifactMissing(f"{ref}: {artifact.path} is not there, although the manifest lists it") from error
        if info.size != artifact.size:
            raise DigestMismatch(f"{ref} {artifact.path}: has {info.size} bytes, the manifest says {artifact.size}")
        return Part(artifact.role, artifact.format, info, artifact)

    async def wanted(self, name: str, version: str | None = None, alias: str = PRODUCTION) -> Wanted:
        """Return one version by name, and label or alias. Raises `UnusableModel` when there is no such version."""
        catalogue = await self.catalogue()
        entry = catalogue.index.published.get(name)
        if entry is not None:
            label = version or entry.aliases.get(alias)
            if label is None or label not in entry.versions:
                asked = f"version {version!r}" if version else f"alias {alias!r}"
                raise UnusableModel(f"{name} has no {asked}; it has versions {', '.join(entry.versions)}")
            return Wanted(ModelRef(name, label), (), manifest_sha256=entry.versions[label].manifest_sha256)
        for ref, bare in catalogue.wanted.items():
            if ref.name == name and version in (None, ref.version):
                return bare
        names = ", ".join(sorted({ref.name for ref in catalogue.wanted})) or "nothing"
        raise UnusableModel(f"there is no model {name!r} in {self.storage.describe()}; there is {names}")

    # Publishing

    async def publish(
        self,
        name: str,
        draft: publishing.Draft,
        *,
        version: str | None = None,
        promote: bool = False,
        seal_key: PrivateKey | None = None,
    ) -> tuple[ModelRef, bool]:
        """Store a draft as a new version; return its reference, and whether it is in production now.

        The artifacts are written first, then the manifest, its seal where there is a key for one, and the index: whatever
        fails in between leaves nothing that anyone can see. Raises `VersionExists` when the label is taken,
        `PublishConflict`, or what the storage raises.
        """
        _check_names(name, version)
        ref, entry = await self._write_version(name, draft, version, seal_key)

        def add(index: Index) -> Index:
            first = name not in index.published
            changed = index.with_version(name, ref.version, entry)
            if first or promote:
                changed = changed.with_alias(name, PRODUCTION, ref.version, at=_now(), by=_who())
            return changed

        def is_added(index: Index) -> bool:
            return index.models.get(name, ModelEntry()).versions.get(ref.version) == entry

        index = await self._change_index(add, is_done=is_added)
        return ref, index.models[name].aliases.get(PRODUCTION) == ref.version

    async def _write_version(
        self, name: str, draft: publishing.Draft, version: str | None, seal_key: PrivateKey | None
    ) -> tuple[ModelRef, VersionEntry]:
        index = await self.read_index()
        if version is not None:
            index.check_free(name, version)
        label = version or index.next_version(name)
        for _ in range(LABEL_ATTEMPTS):
            ref = ModelRef(name, check_name("version", label))
            manifest = draft.manifest(ref, _now())
            if (size := len(manifest.encode())) > MAX_MANIFEST_BYTES:
                raise PublishError(
                    f"{ref}: its manifest would have {size:,} bytes, and none is read of more than {MAX_MANIFEST_BYTES:,}: "
                    "give fewer or smaller examples, or a model of fewer columns"
                )
            try:
                for part in reversed(draft.parts):  # the model first: its key is what two publishers meet at
                    await self._write_once(self._key(ref, part.path), part.body, resume=version is not None)
                entry, body = await self._write_manifest(manifest, resume=version is not None)
                if seal_key is not None:
                    await self._write_seal(ref, make_seal(body, seal_key), resume=version is not None)
                return ref, entry
            except PreconditionFailed as error:
                if version is not None:
                    raise VersionExists(
                        f"{ref} exists already, or an unfinished publish of other files left its traces there: "
                        "versions never change, choose another label"
                    ) from error
                label = str(int(label) + 1)  # somebody else took it between our look at the index and now
        raise PublishConflict(f"{name}: no free version label was found below {label}")

    async def _write_once(self, key: str, body: bytes, *, resume: bool) -> None:
        try:
            await self.storage.put(key, body, if_absent=True)
        except PreconditionFailed:
            # The same file from an interrupted publish of the same label may stand; anything else may not be touched.
            if not resume or await self._read(key, len(body)) != body:
                raise

    async def _write_seal(self, ref: ModelRef, seal: bytes, *, resume: bool) -> None:
        try:
            await self._write_once(self._key(ref, SEAL), seal, resume=resume)
        except PreconditionFailed as error:
            if not resume:
                raise
            raise VersionExists(
                f"{ref}: an unfinished publish left a seal there that this key did not make: "
                "publish with that key, or choose another label"
            ) from error

    async def _write_manifest(self, manifest: Manifest, *, resume: bool) -> tuple[VersionEntry, bytes]:
        """Write the manifest, or find it written by an interrupted publish of the very same files.

        Return the index's entry, and the bytes that are stored.
        """
        body, key = manifest.encode(), self._key(manifest.ref, "manifest.json")
        try:
            await self.storage.put(key, body, if_absent=True)
        except PreconditionFailed:
            known = (await self.read_index()).models.get(manifest.name)
            if not resume or (known and manifest.version in known.versions):
                raise
            body = await self._manifest_bytes(manifest.ref)
            stored = Manifest.decode(body, manifest.ref)
            if _unmeasured(stored) != _unmeasured(manifest):
                raise
            manifest = stored
        return VersionEntry(created=manifest.created, manifest_sha256=hashlib.sha256(body).hexdigest()), body

    async def _find_change(self, is_done: Callable[[Index], bool]) -> Index | None:
        """Return the index if the change is in it; None if it is not, or cannot be looked at."""
        try:
            index = await self.read_index()
        except (StorageError, BundleError):
            return None
        return index if is_done(index) else None

    async def _change_index(
        self, change: Callable[[Index], Index], *, is_done: Callable[[Index], bool] | None = None
    ) -> Index:
        """Apply `change` to the index as it is now, again and again until nobody was faster.

        A change that returns the index that it was given writes nothing. Where an attempt got no answer, and somebody has
        changed the index since, `is_done` tells whether the change is in it all the same.
        """
        unsure = False
        for attempt in range(INDEX_ATTEMPTS):
            index = await self.read_index()
            if unsure and is_done is not None and is_done(index):
                return index
            changed = change(index)
            if changed is index:
                return index
            body = changed.encode()
            if len(body) > MAX_INDEX_BYTES:
                raise PublishError(
                    f"index.json would have {len(body):,} bytes, and none is read of more than {MAX_INDEX_BYTES:,}: "
                    "unpublish versions that nobody needs, or publish under another prefix (ML_PREFIX)"
                )
            try:
                info = await self.storage.put(self._index_key, body, if_match=index.etag, if_absent=index.etag is None)
            except PreconditionFailed as error:
                unsure = unsure or error.unsure
                await asyncio.sleep(random.uniform(0, min(2.0, 0.05 * 2**attempt)))  # noqa: S311 - not a secret
                continue
            except StorageUnavailable as error:  # what got no answer may have been written
                if is_done is not None and (found := await self._find_change(is_done)) is not None:
                    return found
                raise StorageUnavailable(
                    f"{error}; whether the index was changed is not known: look at it before you repeat this"
                ) from error
            return changed.model_copy(update={"etag": info.etag})
        raise PublishConflict(f"the index changed {INDEX_ATTEMPTS} times while it was to be changed: try again")

    # The life of a version

    async def _change_of(
        self, name: str, change: Callable[[Index], Index], *, is_done: Callable[[Index], bool]
    ) -> Index:
        """Change the index in what it has of a model. Raises `UnknownVersion`, which says so where the model is a bare one."""
        is_published = True

        def watched(index: Index) -> Index:
            nonlocal is_published
            is_published = name in index.models
            return change(index)

        try:
            return await self._change_index(watched, is_done=is_done)
        except UnknownVersion as error:
            if not is_published and await self._is_bare(name):
                raise UnknownVersion(f"{name} is a bare file, which has no versions: publish it first") from error
            raise

    async def _is_bare(self, name: str) -> bool:
        """Whether a name that is not published is that of a bare model, as far as that can be seen."""
        with suppress(StorageError):
            return any(wanted.ref.name == name for wanted in (await self.catalogue()).wanted.values() if wanted.bare)
        return False

    async def promote(self, name: str, version: str, *, alias: str = PRODUCTION) -> Moved:
        """Let `alias` name this version. Where it does already, nothing is written.

        Raises `UnknownVersion`; `PublishConflict` when somebody else moved the alias since this call first saw it.
        """
        _check_names(name, version)
        check_name("alias", alias)
        at, by = _now(), _who()
        seen: list[ModelEntry] = []
        changed = False

        def move(index: Index) -> Index:
            nonlocal changed
            entry = index.entry(name, version)
            seen.append(entry)
            changed = entry.aliases.get(alias) != version
            if not changed:
                return index
            _check_unmoved(name, alias, seen[0], entry)
            return index.with_alias(name, alias, version, at=at, by=by)

        def is_moved(index: Index) -> bool:
            return _has_move(index, name, alias, seen[0], Move(version=version, at=at, by=by))

        await self._change_of(name, move, is_done=is_moved)
        return Moved(ModelRef(name, version), alias, (seen[0] if changed else seen[-1]).aliases.get(alias), changed)

    async def rollback(self, name: str, *, alias: str = PRODUCTION) -> Moved:
        """Let `alias` name what it named before its latest move that was not taken back yet.

        Versions that were unpublished since are passed over. Raises `UnknownVersion`, `NothingToRollBackTo`;
        `PublishConflict` when somebody else moved the alias since this call first saw it.
        """
        _check_names(name, None)
        check_name("alias", alias)
        at, by = _now(), _who()
        seen: list[ModelEntry] = []
        skipped: tuple[str, ...] = ()
        version = ""

        def move(index: Index) -> Index:
            nonlocal skipped, version
            seen.append(index.entry(name))
            _check_unmoved(name, alias, seen[0], seen[-1])
            changed, skipped = index.rolled_back(name, alias, at=at, by=by)
            version = changed.models[name].aliases[alias]
            return changed

        def is_moved(index: Index) -> bool:
            return _has_move(index, name, alias, seen[0], Move(version=version, at=at, by=by, rollback=True))

        await self._change_of(name, move, is_done=is_moved)
        return Moved(ModelRef(name, version), alias, seen[0].aliases.get(alias), True, skipped)

    async def unpublish(self, name: str, version: str, *, drop_aliases: bool = False) -> Unpublished:
        """Take a version out of the index, then delete its objects. The name stays, with its history, without versions too.

        What is interrupted in between leaves objects that nothing refers to; unpublishing the version again deletes them.
        Raises `UnknownVersion`; `VersionInUse` when an alias names it, unless `drop_aliases`: then they go as well.
        """
        _check_names(name, version)
        at, by = _now(), _who()
        aliases: tuple[str, ...] = ()
        repeated = False

        def remove(index: Index) -> Index:
            nonlocal aliases, repeated
            known = index.models.get(name, ModelEntry())
            repeated = version in known.unpublished and version not in known.versions
            if repeated:
                return index
            aliases = index.entry(name, version).aliases_of(version)
            return index.without_version(name, version, at=at, by=by, drop_aliases=drop_aliases)

        def is_removed(index: Index) -> bool:
            return index.models.get(name, ModelEntry()).unpublished.get(version) == Removal(at=at, by=by)

        index = await self._change_of(name, remove, is_done=is_removed)
        ref = ModelRef(name, version)
        manifest = self._key(ref, "manifest.json")  # goes first: without it there is no version to be taken up again
        stored = [info.key for info in await self.storage.list(self._key(ref, ""))]
        for key in sorted(stored, key=lambda key: key != manifest):
            await self.storage.delete(key)
        return Unpublished(ref, len(stored), aliases, index.models[name].unpublished[version], repeated)

    # For scripts and notebooks

    def save(
        self,
        name: str,
        model: Any,
        *,
        scaler: Any = None,
        encoder: Any = None,
        preprocessor: Any = None,
        examples: Any = None,
        version: str | None = None,
        promote: bool = False,
        format: str = "joblib",
        extra_columns_ignored: bool = False,
        seal_key: PrivateKey | str | None = None,
        compile: bool = True,
    ) -> ModelRef:
        """Publish a fitted estimator as the next version of `name` (or as `version`) and return its reference.

        It is compiled as well, where that gives the same answers, unless `compile` is False.

        `examples` (a DataFrame or an array of rows that the model takes) become the golden rows and tell the dtypes. The
        first version of a name goes to production, later ones with `promote`. `seal_key` is a private key, or its text
        form. Raises `PublishError`, `BundleError`, `StorageError`.
        """
        _check_names(name, version)
        key = private_key(seal_key) if isinstance(seal_key, str) else seal_key
        objects = {"scaler": scaler, "encoder": encoder, "preprocessor": preprocessor, "model": model}
        parts = {
            role: publishing.part_from_object(role, value, format)
            for role, value in objects.items()
            if value is not None
        }
        draft = publishing.draft(
            parts, examples, extra_columns_ignored=extra_columns_ignored, trust=self.trust, compile=compile
        )

        async def work() -> ModelRef:
            ref, _ = await self.publish(name, draft, version=version, promote=promote, seal_key=key)
            if draft.summary:
                logger.info("%s: %s", ref, draft.summary)
            return ref

        return self._run(work)

    def load(self, name: str, version: str | None = None, *, alias: str = PRODUCTION) -> Model:
        """Return a version, loaded by scikit-learn and checked against its golden rows; its fitted object is `.estimator`.

        Raises `UnusableModel` when there is none, `BundleError` when it cannot be served, `StorageError`.
        """

        async def work() -> Model:
            with await self.fetch(await self.wanted(name, version, alias), runtime="sklearn") as bundle:
                return (await asyncio.to_thread(load_checked, bundle)).model

        return self._run(work)

    def _run[T](self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` with the storage open, in a thread with an event loop of its own: a notebook's may be running."""
        outcome: list[T] = []
        failure: list[BaseException] = []

        async def opened() -> T:
            async with self.storage:
                return await work()

        def run() -> None:
            try:
                with self._alone:
                    outcome.append(asyncio.run(opened()))
            except BaseException as error:  # raised below, in the thread that asked
                failure.append(error)

        thread = threading.Thread(target=run, name="diskless-storage")
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]

    @property
    def _index_key(self) -> str:
        return f"{self.prefix}index.json"

    def _key(self, ref: ModelRef, path: str) -> str:
        return f"{self.prefix}{ref.name}/{ref.version}/{path}"


@dataclass(frozen=True, slots=True)
class _Form:
    """What of a version is read: the fitted objects, its compiled form (`is_complete`: of all methods), or both.

    `reason` is why not all is compiled; `compiles`: that may be done while it is loaded.
    """

    reference: bool
    compiled: bool
    is_complete: bool
    reason: str | None
    compiles: bool


_OR_ELSE = " again, or set ML_RUNTIME=auto"


def _form(manifest: Manifest, runtime: Runtime, unreadable: str | None) -> _Form:
    """Decide what of a version is read. Raises `UnusableModel` where only what is compiled may serve, and not all of it is."""
    block, artifact = manifest.compiled, manifest.program
    reason = unreadable
    if block is None or artifact is None:
        reason = manifest.not_compiled or "it was published without a compiled form"
    elif reason is None:
        reason = _foreign(block, artifact)
    usable = block is not None and reason is None
    lacking = [method for method in manifest.signature.methods if block is None or method not in block.methods]
    if usable and lacking:
        reason = (block.reason if block else None) or f"its {', '.join(lacking)} has no compiled form"
    is_complete = usable and not lacking
    if runtime == "compiled" and not is_complete:
        raise UnusableModel(f"{manifest.ref}: ML_RUNTIME is compiled, and {reason}: publish it{_OR_ELSE}")
    if runtime == "sklearn":
        return _Form(True, False, False, "only scikit-learn was asked for", False)
    compiles = runtime == "auto" and block is None and manifest.not_compiled is None
    return _Form(runtime == "every" or not is_complete, usable, is_complete, reason, compiles)


def _foreign(block: Compiled, artifact: Artifact) -> str | None:
    """Return why this release cannot read a compiled form, as far as the manifest tells."""
    if block.format > programs.FORMAT or artifact.format != PROGRAM_FORMAT:
        return f"its compiled form has format {block.format} in {artifact.format}, this release reads {programs.FORMAT}"
    if unknown := programs.unknown(block.operations):
        return f"its compiled form has operations that this release does not know: {', '.join(unknown):.100}"
    return None


def _unmeasured(manifest: Manifest) -> Manifest:
    """Return a manifest without what comes out differently each time: when it was made, what it takes, how it was compiled."""
    kept = tuple(artifact for artifact in manifest.artifacts if artifact.role != COMPILED)
    measured = ("resident_bytes", "peak_bytes", "compiled", "not_compiled")
    return manifest.model_copy(update={"created": "", "artifacts": kept, **dict.fromkeys(measured)})


def _is_confirmed(bare: Wanted, previous: Catalogue | None) -> bool:
    """Whether these parts may be loaded together: a pair that was seen before must be found twice in the same state."""
    before = previous.seen.get(bare.ref.name) if previous else None
    return bare.problem is not None or len(bare.parts) == 1 or before in (None, bare.ref.version)


def _check_names(name: str, version: str | None) -> None:
    check_name("model name", name)
    if name == "index.json":  # a directory could not have a folder of that name beside the index
        raise InvalidName("model name 'index.json' is taken: the index is called so")
    if version is not None:
        check_name("version", version)


def private_key(text: str) -> PrivateKey:
    """Read the text form of a private key. Raises `UnusableKey`, which shows nothing of the text."""
    try:
        return read_private_key(text)
    except ValueError as error:
        raise UnusableKey(f"the seal key is not one: {error}") from None


def _has_move(index: Index, name: str, alias: str, before: ModelEntry, move: Move) -> bool:
    """Whether `move`, from what the alias named `before`, is in the history."""
    own = move.model_copy(update={"previous": before.aliases.get(alias)})
    return own in index.models.get(name, ModelEntry()).history.get(alias, ())


def _check_unmoved(name: str, alias: str, before: ModelEntry, now: ModelEntry) -> None:
    """Raise `PublishConflict` when the alias is not as it was: whoever decided to move it has not seen that."""
    if (before.aliases.get(alias), before.history.get(alias)) == (now.aliases.get(alias), now.history.get(alias)):
        return
    moves = now.history.get(alias, ())
    told = moves and moves != before.history.get(alias)
    who = f" {signed(moves[-1].at, moves[-1].by)}" if told else ""
    raise PublishConflict(
        f"{name}: {alias} was moved meanwhile, from {before.aliases.get(alias) or 'nothing'} "
        f"to {now.aliases.get(alias) or 'nothing'}{who}: nothing was changed; look at it, and repeat what is still wanted"
    )


def storage_for(
    settings: Settings,
    *,
    moved: Callable[[str, int, int], None] | None = None,
    counters: ServiceCounters | None = None,
    journal: Journal | None = None,
) -> Storage:
    """Return the storage of the settings' mode; nothing is connected yet. `moved` is told of bytes that cross the network.

    `counters` are told of every operation, and it is written down in `journal`. Raises `SettingsError`.
    """
    from app.storage.local import LocalStorage

    if settings.mode is Mode.LOCAL:
        return _counted(_traced(LocalStorage(settings.local_dir), "local", journal), "local", counters)
    from app.storage.r2 import R2Storage

    target = settings.r2
    bucket = R2Storage(
        endpoint_url=target.endpoint_url,
        bucket=target.bucket,
        access_key_id=target.access_key_id,
        secret_access_key=target.secret_access_key.get_secret_value(),
        session_token=settings.session_token.get_secret_value() if settings.session_token else None,
        region=settings.region,
        connect_timeout_seconds=settings.connect_timeout_seconds,
        read_timeout_seconds=settings.read_timeout_seconds,
        max_attempts=settings.max_attempts,
        moved=moved,
    )
    remote = _counted(_traced(bucket, "r2", journal), "r2", counters)
    if settings.mode is Mode.CLOUD_ONLY:
        return remote
    from app.storage.copy import CopyingStorage

    local = LocalStorage(settings.local_dir)
    return CopyingStorage(remote, local, read_copy=settings.mode is Mode.R2_WITH_COPY, counters=counters)


def _counted(storage: Storage, kind: StorageKind, counters: ServiceCounters | None) -> Storage:
    return storage if counters is None else CountedStorage(storage, kind, counters)


def _traced(storage: Storage, kind: Literal["r2", "local"], journal: Journal | None) -> Storage:
    return storage if journal is None else TracedStorage(storage, kind, journal)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _who() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container's user may have no name
        return "unknown"
