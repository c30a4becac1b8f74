"""The bucket as a model repository: where versions lie, what the index says, how one is fetched, published, saved, loaded.

`ModelStorageManager` owns the key layout and the order of writes. Bytes by key are the storage's affair, what the bytes
mean is the loaders' and the model's.
"""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from app import publishing
from app.bundle import Bundle, Part
from app.errors import (
    ArtifactMissing,
    BundleError,
    CompanionFailed,
    DigestMismatch,
    GoldenMismatch,
    InvalidManifest,
    InvalidName,
    LoadFailed,
    NotModified,
    ObjectNotFound,
    PreconditionFailed,
    PublishConflict,
    RequestError,
    StorageError,
    UnusableModel,
    VersionExists,
)
from app.index import Index, VersionEntry
from app.loaders import LOADERS, reason
from app.manifest import Artifact, Manifest
from app.model import Model
from app.names import COMPANION_ROLES, NAME, SUFFIXES, ModelRef, check_name
from app.settings import Mode, Settings, load_settings
from app.storage.base import ObjectInfo, Storage

PRODUCTION = "production"
INDEX_ATTEMPTS = 30
LABEL_ATTEMPTS = 100
MAX_STRANGE = 50  # files that are no models, in the list of what was passed over


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
    """A model that may serve: how far its golden rows were off (None without any), and the seconds of each phase."""

    model: Model
    parity: float | None
    seconds: Mapping[str, float]


def load_checked(bundle: Bundle, *, before_check: Callable[[], None] | None = None) -> Checked:
    """Load a bundle and run its golden rows. It blocks: for a thread other than the event loop's.

    `before_check` is called when the libraries that the model needs have been loaded and nothing was computed yet.

    Raises the `BundleError` that says why it cannot serve, or what the storage raises; nothing else.
    """
    try:
        model = Model.from_bundle(bundle)
        started = time.perf_counter()
        if before_check is not None:
            before_check()
        parity = model.check()
    except (BundleError, StorageError):
        raise
    except RequestError as error:  # refused or failed, as a request would
        cause = reason(error.__cause__) if error.__cause__ else str(error)
        raise GoldenMismatch(f"{bundle.ref}: the golden rows cannot be computed: {cause}") from error
    except BaseException as error:  # a model's own code runs here, and may raise even SystemExit
        raise LoadFailed(f"{bundle.ref}: cannot be loaded: {reason(error)}") from error
    return Checked(model, parity, {**model.report.seconds, "check": time.perf_counter() - started})


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
    ) -> None:
        self.storage = storage
        self.prefix = prefix
        self._bare_models = bare_models
        self._companions = dict(companions or {})
        self._aliases = aliases
        self._alone = threading.Lock()  # of `save` and `load`: a storage belongs to one event loop at a time

    @classmethod
    def from_settings(cls, settings: Settings) -> ModelStorageManager:
        """Return a manager over the storage that the settings call for. Raises `SettingsError`."""
        return cls(
            storage_for(settings),
            prefix=settings.prefix,
            bare_models=settings.bare_models,
            companions=settings.companions,
            aliases=settings.aliases,
        )

    @classmethod
    def from_env(cls) -> ModelStorageManager:
        """Return a manager as the environment (and `.env`) describes it. Raises `SettingsError`."""
        return cls.from_settings(load_settings())

    # Looking

    async def read_index(self, known: Index | None = None) -> Index:
        """Return the index, `known` itself if it has not changed. A bucket without one has an empty index."""
        try:
            stored = await self.storage.get(self._index_key, if_none_match=known.etag if known else None)
        except NotModified:
            assert known is not None
            return known
        except ObjectNotFound:
            return Index()
        return Index.decode(stored.body, stored.info.etag)

    async def catalogue(self, previous: Catalogue | None = None) -> Catalogue:
        """Look at the bucket: one conditional GET of the index, and one listing for bare models if they are served."""
        index = await self.read_index(previous.index if previous else None)
        wanted: dict[ModelRef, Wanted] = {}
        ignored: dict[str, str] = {}
        for name, entry in index.models.items():
            versions = {alias: entry.aliases[alias] for alias in self._aliases if alias in entry.aliases}
            for version in dict.fromkeys(versions.values()):
                ref = ModelRef(name, version)
                aliases = tuple(alias for alias, target in versions.items() if target == version)
                wanted[ref] = Wanted(ref, aliases, manifest_sha256=entry.versions[version].manifest_sha256)
            if not versions:
                ignored[name] = f"none of the served aliases ({', '.join(self._aliases)}) names a version of it"
        companions: dict[str, frozenset[str]] = dict(previous.companions) if previous else {}
        seen = dict(previous.seen) if previous else {}
        if self._bare_models:
            for bare in await self._find_bare(previous, companions, ignored):
                seen[bare.ref.name] = bare.ref.version
                if bare.ref.name in index.models:
                    ignored[f"{bare.ref.name} (bare)"] = "a published model has this name"
                else:
                    wanted[bare.ref] = bare
        return Catalogue(wanted, index, ignored, companions, seen)

    async def _find_bare(
        self, previous: Catalogue | None, companions: dict[str, frozenset[str]], ignored: dict[str, str]
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
                ignored[f"{name}_{role}"] = f"a companion without its model {name}"
        bare = [self._bare(name, parts, beside, companions.get(name, frozenset())) for name, parts in models.items()]
        return [replace(model, confirmed=_is_confirmed(model, previous)) for model in bare]

    def _sorted(
        self, listing: list[ObjectInfo], ignored: dict[str, str]
    ) -> tuple[dict[str, list[Part]], dict[tuple[str, str], list[Part]]]:
        """Sort a listing into models by name, and companions by the model's name and the role."""
        strange = 0
        models: dict[str, list[Part]] = {}
        companions: dict[tuple[str, str], list[Part]] = {}
        for info in listing:
            file = info.key.removeprefix(self.prefix)
            stem, dot, ending = file.rpartition(".")
            format = SUFFIXES.get(f"{dot}{ending}")
            if format is None:
                if file not in ("", "index.json") and (strange := strange + 1) <= MAX_STRANGE:
                    ignored[file] = f"its ending is not one of {', '.join(SUFFIXES)}"
                continue
            if not NAME.match(stem):
                ignored[file] = "its name has characters that a model's name cannot have"
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

    async def fetch(self, wanted: Wanted) -> Bundle:
        """Find everything that a version needs and return it, ready to be read.

        Raises the `BundleError` that says what is missing or wrong, or what the storage raises.
        """
        if wanted.problem is not None:
            raise wanted.problem
        loop = asyncio.get_running_loop()
        if wanted.bare:
            return Bundle(wanted.ref, wanted.parts, self.storage, loop)
        body = await self._manifest_bytes(wanted.ref)
        found = hashlib.sha256(body).hexdigest()
        if found != wanted.manifest_sha256:
            raise DigestMismatch(
                f"{wanted.ref} manifest.json: sha256 is {found}, the index says {wanted.manifest_sha256}"
            )
        manifest = Manifest.decode(body, wanted.ref)
        served = [artifact for artifact in manifest.artifacts if artifact.role in (*COMPANION_ROLES, "model")]
        order = (*COMPANION_ROLES, "model")
        served.sort(key=lambda artifact: order.index(artifact.role))
        parts = await asyncio.gather(*(self._part(wanted.ref, artifact) for artifact in served))
        return Bundle(wanted.ref, tuple(parts), self.storage, loop, manifest, found)

    async def _manifest_bytes(self, ref: ModelRef) -> bytes:
        try:
            return (await self.storage.get(self._key(ref, "manifest.json"))).body
        except ObjectNotFound as error:
            raise ArtifactMissing(f"{ref}: manifest.json is not there, although the index lists the version") from error

    async def _part(self, ref: ModelRef, artifact: Artifact) -> Part:
        if artifact.format not in LOADERS:
            raise InvalidManifest(f"{ref} {artifact.path}: format {artifact.format!r} is not one this release can read")
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
        entry = catalogue.index.models.get(name)
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
        self, name: str, draft: publishing.Draft, *, version: str | None = None, promote: bool = False
    ) -> tuple[ModelRef, bool]:
        """Store a draft as a new version; return its reference, and whether it is in production now.

        The artifacts are written first, then the manifest, then the index: whatever fails in between leaves nothing that
        anyone can see. Raises `VersionExists` when the label is taken, `PublishConflict`, or what the storage raises.
        """
        _check_names(name, version)
        ref, entry = await self._write_version(name, draft, version)

        def add(index: Index) -> Index:
            first = name not in index.models
            changed = index.with_version(name, ref.version, entry)
            if first or promote:
                changed = changed.with_alias(name, PRODUCTION, ref.version, at=_now(), by=_who())
            return changed

        index = await self._change_index(add)
        return ref, index.models[name].aliases.get(PRODUCTION) == ref.version

    async def _write_version(
        self, name: str, draft: publishing.Draft, version: str | None
    ) -> tuple[ModelRef, VersionEntry]:
        label = version or (await self.read_index()).next_version(name)
        for _ in range(LABEL_ATTEMPTS):
            ref = ModelRef(name, check_name("version", label))
            manifest = draft.manifest(ref, _now())
            try:
                for part in reversed(draft.parts):  # the model first: its key is what two publishers meet at
                    await self._write_once(self._key(ref, part.path), part.body, resume=version is not None)
                return ref, await self._write_manifest(manifest, resume=version is not None)
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
            if not resume or (await self.storage.get(key)).body != body:
                raise

    async def _write_manifest(self, manifest: Manifest, *, resume: bool) -> VersionEntry:
        """Write the manifest, or find it written by an interrupted publish of the very same; return the index's entry."""
        body, key = manifest.encode(), self._key(manifest.ref, "manifest.json")
        try:
            await self.storage.put(key, body, if_absent=True)
        except PreconditionFailed:
            known = (await self.read_index()).models.get(manifest.name)
            if not resume or (known and manifest.version in known.versions):
                raise
            body = (await self.storage.get(key)).body
            stored = Manifest.decode(body, manifest.ref)
            if stored.model_copy(update={"created": manifest.created}) != manifest:
                raise
            manifest = stored
        return VersionEntry(created=manifest.created, manifest_sha256=hashlib.sha256(body).hexdigest())

    async def _change_index(self, change: Callable[[Index], Index]) -> Index:
        """Apply `change` to the index as it is now, again and again until nobody was faster."""
        for attempt in range(INDEX_ATTEMPTS):
            index = await self.read_index()
            changed = change(index)
            try:
                info = await self.storage.put(
                    self._index_key, changed.encode(), if_match=index.etag, if_absent=index.etag is None
                )
            except PreconditionFailed:
                await asyncio.sleep(random.uniform(0, min(2.0, 0.05 * 2**attempt)))  # noqa: S311 - not a secret
                continue
            return changed.model_copy(update={"etag": info.etag})
        raise PublishConflict(f"the index changed {INDEX_ATTEMPTS} times while it was to be changed: try again")

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
    ) -> ModelRef:
        """Publish a fitted estimator as the next version of `name` (or as `version`) and return its reference.

        `examples` (a DataFrame or an array of rows that the model takes) become the golden rows and tell the dtypes. The
        first version of a name goes to production, later ones with `promote`. Raises `PublishError`, `BundleError`,
        `StorageError`.
        """
        _check_names(name, version)
        objects = {"scaler": scaler, "encoder": encoder, "preprocessor": preprocessor, "model": model}
        parts = {
            role: publishing.part_from_object(role, value, format)
            for role, value in objects.items()
            if value is not None
        }
        draft = publishing.draft(parts, examples, extra_columns_ignored=extra_columns_ignored)

        async def work() -> ModelRef:
            ref, _ = await self.publish(name, draft, version=version, promote=promote)
            return ref

        return self._run(work)

    def load(self, name: str, version: str | None = None, *, alias: str = PRODUCTION) -> Model:
        """Return a version, loaded and checked against its golden rows; its fitted object is `.estimator`.

        Raises `UnusableModel` when there is none, `BundleError` when it cannot be served, `StorageError`.
        """

        async def work() -> Model:
            with await self.fetch(await self.wanted(name, version, alias)) as bundle:
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


def storage_for(settings: Settings) -> Storage:
    """Return the storage of the settings' mode; nothing is connected yet. Raises `SettingsError`."""
    from app.storage.local import LocalStorage

    if settings.mode is Mode.LOCAL:
        return LocalStorage(settings.local_dir)
    from app.storage.r2 import R2Storage

    target = settings.r2
    remote = R2Storage(
        endpoint_url=target.endpoint_url,
        bucket=target.bucket,
        access_key_id=target.access_key_id,
        secret_access_key=target.secret_access_key.get_secret_value(),
        session_token=settings.session_token.get_secret_value() if settings.session_token else None,
        region=settings.region,
        connect_timeout_seconds=settings.connect_timeout_seconds,
        read_timeout_seconds=settings.read_timeout_seconds,
        max_attempts=settings.max_attempts,
    )
    if settings.mode is Mode.CLOUD_ONLY:
        return remote
    from app.storage.copy import CopyingStorage

    local = LocalStorage(settings.local_dir)
    return CopyingStorage(remote, local, read_copy=settings.mode is Mode.R2_WITH_COPY)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _who() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container's user may have no name
        return "unknown"
