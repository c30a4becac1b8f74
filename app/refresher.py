"""Keeps what is served equal to what the bucket wants: looks, loads, checks, swaps, retires. The registry's only writer.

One look at a time, one load at a time: two models in the making would double the peak. Before each, what it is expected to
take is held against the memory that is free. A failure is recorded against the version that failed, and whatever served before goes on
serving; unless `swap_policy` is `replace` and there is no room for both: then the old version is dropped first, and brought
back when the new one fails.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from app import memory
from app.bundle import Bundle
from app.counters import KEPT_SECONDS, MAX_KEPT, Counters
from app.errors import (
    ArtifactMissing,
    BundleError,
    CompanionFailed,
    CompiledUnreadable,
    DisklessError,
    NoRoom,
    StorageError,
)
from app.loaders import reason, without_paths
from app.memory import trim_heap
from app.model import Model
from app.model_storage import Catalogue, Checked, ModelStorageManager, Wanted, load_checked
from app.names import ModelRef, shortened
from app.registry import Entry, Registry, Slot, Snapshot, State
from app.runner import Runner
from app.service_counters import ServiceCounters
from app.spans import Journal
from app.worker import Worker, limit_native_threads

logger = logging.getLogger("diskless.refresher")
FIRST_PAUSE_SECONDS = 1.0
MAX_FAILURE_PAUSE_SECONDS = 900.0
MAX_REASON = 1000  # characters of what is said of a version or of the bucket: what stands there may name anything
RETIRE_SECONDS = 30.0  # for a retired runner to end what it computes
UNCONFIRMED = (
    "its parts changed; waiting for one more look that finds them unchanged, in case more of them are being uploaded"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one look did. `passing`: something failed that may be over soon, so it is worth looking again soon."""

    loaded: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    retired: tuple[str, ...] = ()
    error: str | None = None
    passing: bool = False


@dataclass(frozen=True, slots=True)
class _Failure:
    content: str  # what was wanted: if something else is, the failure says nothing about it
    reason: str
    count: int
    retry_at: float  # time.monotonic(), seconds
    for_want_of_room: bool = False


@dataclass(frozen=True, slots=True)
class _InVain:
    """Something was dropped for this content so often, and it failed for this reason. Not to be repeated before `until`."""

    content: str
    count: int
    reason: str = ""
    until: float = math.inf  # time.monotonic(), seconds


@dataclass(frozen=True, slots=True)
class _Least:
    """This content could not be loaded in as much memory as this."""

    content: str
    free_bytes: int


Load = Callable[[Worker, Bundle], Awaitable[Checked]]
"""How a bundle becomes a model that may serve, with the thread that loads. Raises what `load_checked` raises."""


async def load_in_thread(loader: Worker, bundle: Bundle) -> Checked:
    """Load and check a bundle in this process, beside what it serves."""
    return await loader.run(load_checked, bundle, before_check=limit_native_threads)


class Refresher:
    """Brings the registry up to date, at once when told to and every `refresh_seconds` (with jitter) otherwise.

    While a bare model's changed parts wait to be confirmed, the next look comes after `confirm_seconds` at the latest.
    """

    def __init__(
        self,
        manager: ModelStorageManager,
        registry: Registry,
        make_runner: Callable[[Model, Mapping[int, float] | None], Runner],
        *,
        refresh_seconds: float = 60.0,
        confirm_seconds: float = 10.0,
        swap_policy: Literal["keep", "replace"] = "keep",
        load: Load = load_in_thread,
        service: ServiceCounters | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._manager = manager
        self._service = service or ServiceCounters()
        self._journal = journal or Journal()
        self._load_bundle = load
        self._registry = registry
        self._make_runner = make_runner
        self._refresh_seconds = refresh_seconds
        self._confirm_seconds = confirm_seconds
        self._memory_limit_bytes = manager.trust.memory_limit_bytes
        self._swap_policy = swap_policy
        self._estimator = memory.Estimator()
        self._dropped: dict[str, list[Wanted]] = {}  # what was taken out of service to make room, by name
        self._in_vain: dict[ModelRef, _InVain] = {}  # for what something was dropped, and it failed
        self._least: dict[ModelRef, _Least] = {}  # what could not be loaded in all that was free
        self._catalogue: Catalogue | None = None
        self._failures: dict[ModelRef, _Failure] = {}
        self._gone: frozenset[str] = frozenset()
        self._pause = FIRST_PAUSE_SECONDS
        self._unconfirmed = asyncio.Event()
        self._looking = asyncio.Lock()
        self._next_look: asyncio.Task[Outcome] | None = None
        self._loader = Worker("load")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._retiring: dict[asyncio.Task[None], tuple[ModelRef, float]] = {}  # since when, by time.monotonic()
        self._kept: dict[ModelRef, tuple[Counters, float]] = {}  # of retired versions, the same
        self._is_place_told = False
        self._missing_told: str | None = ""  # why models are not ready, as it was logged last: nothing yet
        self.unloading: list[ModelRef] = []
        self.last_sync: datetime | None = None
        self.last_error: str | None = None

    @property
    def ignored(self) -> dict[str, str]:
        """What the last look passed over, and why."""
        return dict(self._catalogue.ignored) if self._catalogue else {}

    @property
    def fallback(self) -> str | None:
        """Why a local copy is read instead of the bucket, if it is."""
        reason: str | None = getattr(self._manager.storage, "fallback_reason", None)
        return reason

    @property
    def kept(self) -> dict[ModelRef, Counters]:
        """The counts of versions that were retired lately."""
        oldest = time.monotonic() - KEPT_SECONDS
        return {ref: counters for ref, (counters, since) in self._kept.items() if since >= oldest}

    def start(self) -> None:
        """Begin to look, in the background: the process answers its health checks meanwhile."""
        self._begin(self._run())

    async def stop(self) -> None:
        """End the looking, and let the threads go. What is being loaded is abandoned."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._loader.close()
        for slot in self._registry.snapshot.slots():
            if slot.runner is not None:
                slot.runner.close()

    async def look(self, *, insist: bool = False) -> Outcome:
        """Look at the bucket once, and do what follows from it; with `insist` whatever the pause after a failure says.

        For whoever does not `start` it, and looks when `rest` is over.
        """
        async with self._looking:
            return await self._look(insist=insist)

    async def end_threads(self) -> None:
        """Finish what is on its way out and let the thread go. A later look starts it again, in whichever event loop."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._loader.close()
        unconfirmed = self._unconfirmed.is_set()
        self._looking, self._unconfirmed = asyncio.Lock(), asyncio.Event()
        if unconfirmed:
            self._unconfirmed.set()

    async def look_now(self) -> Outcome:
        """Look at the bucket and do what follows from it. Failures are tried again whatever their pause.

        Whoever asks before such a look has begun shares it: any number of callers cost one look, or two.
        """
        if self._next_look is None:
            self._next_look = self._begin(self._look_insistently())
        return await asyncio.shield(self._next_look)

    async def _look_insistently(self) -> Outcome:
        async with self._looking:
            self._next_look = None  # who asks from here on may know of something that this look does not see any more
            return await self._look(insist=True)

    async def _run(self) -> None:
        while True:
            await self.rest(await self.look())

    async def rest(self, outcome: Outcome) -> None:
        """Wait until it is time for the look after the one with this outcome.

        When the bucket cannot be read, that is soon, then ever more slowly.
        """
        troubled = outcome.error is not None or outcome.passing
        wait = min(self._pause, self._refresh_seconds) if troubled else self._refresh_seconds
        self._pause = self._pause * 2 if troubled and self._pause < self._refresh_seconds else FIRST_PAUSE_SECONDS
        with suppress(TimeoutError):
            async with asyncio.timeout(wait * random.uniform(0.9, 1.1)):  # noqa: S311 - spreads load, keeps no secret
                await self._unconfirmed.wait()  # this look may have set it, or one that somebody asks for meanwhile
                await asyncio.sleep(self._confirm_seconds)

    async def _look(self, *, insist: bool = False) -> Outcome:
        """Look once, count it and write it down. Whatever goes wrong becomes an outcome: nothing may end the looking."""
        if not self._is_place_told:
            fields = {"storage": self._manager.storage.describe(), "prefix": self._manager.prefix}
            logger.info("looking for models", extra={"fields": fields})
            self._is_place_told = True
        with self._journal.look() as step:
            outcome = await self._look_once(insist=insist)
            self._tell_readiness()
            step.has_failed = outcome.error is not None
            step.is_kept = bool(outcome.error or outcome.loaded or outcome.failed or outcome.retired)
        changed = outcome.loaded or outcome.retired
        self._service.looked("failed" if outcome.error is not None else "changed" if changed else "unchanged")
        return outcome

    async def _look_once(self, *, insist: bool) -> Outcome:
        self._unconfirmed.clear()
        try:
            self._catalogue = catalogue = await self._manager.catalogue(self._catalogue)
            if self.last_error is not None:
                logger.info("the bucket can be read again")
            self.last_sync, self.last_error = datetime.now(UTC), None
            outcome = await self._follow(catalogue, insist=insist)
        except DisklessError as error:
            return self._blind(_told(error), hint(error))
        except Exception as error:
            logger.exception("looking at the bucket failed")
            text = f"looking at the bucket failed: {type(error).__name__}; the service's log says more"
            return self._blind(text, text)
        self._registry.settle()
        if outcome.loaded:
            # What was loaded stays: the garbage collector would go through all of it again and again, and stop everything
            # for as long. `_collect` finds what is in there in vain.
            gc.freeze()
        return outcome

    def _tell_readiness(self) -> None:
        """Log whether the required models can answer, when that has changed, or the reason why they cannot."""
        missing = self._registry.missing()
        if missing == self._missing_told or self._registry.draining:
            return
        self._missing_told = missing
        if missing is None:
            logger.info("models are ready")
        else:
            logger.warning("models are not ready", extra={"fields": {"reason": missing}})

    def _blind(self, text: str, told: str) -> Outcome:
        if text != self.last_error:
            logger.warning("the bucket cannot be read", extra={"fields": {"reason": text}})
        self.last_error = text
        self._registry.unreadable(told)
        return Outcome(error=text)

    async def _follow(self, catalogue: Catalogue, *, insist: bool) -> Outcome:
        """Load what is wanted and not there, move the aliases, retire what nobody wants."""
        loaded: list[str] = []
        failed: dict[str, str] = {}
        passing = False
        retired = self._drop_gone(catalogue)
        for name in dict.fromkeys(ref.name for ref in catalogue.wanted):
            retired += self._announce(name, catalogue)
        for wanted in catalogue.wanted.values():
            if self._is_served(wanted) or (self._is_hopeless(wanted) and not insist):
                continue
            if not wanted.confirmed:
                self._unconfirmed.set()
                continue
            result = await self._load(wanted, catalogue)
            if isinstance(result, Slot):
                loaded.append(str(wanted.ref))
                retired += self._put(result, catalogue)
            else:
                failed[str(wanted.ref)] = _told(result)
                passing = passing or _is_passing(wanted, result)
                retired += self._fail(wanted, result, catalogue)
                passing = not await self._bring_back(wanted.ref.name, catalogue) or passing
        for name in list(self._dropped):  # an earlier look could not
            passing = not await self._bring_back(name, catalogue) or passing
        return Outcome(tuple(loaded), failed, tuple(retired), passing=passing)

    def _drop_gone(self, catalogue: Catalogue) -> list[str]:
        """Take out the names that the bucket no longer has.

        An index that does not list a name any more says so on purpose. A bare model, or a whole index, that is not there
        must be missing twice: somebody may be in the middle of an upload.
        """
        snapshot = self._registry.snapshot
        names = {ref.name for ref in catalogue.wanted}
        gone = frozenset(snapshot.entries) - names
        for name in gone:
            bare = any(slot.bare for slot in snapshot.entries[name].slots.values())
            if name in self._gone or not (bare or catalogue.index.etag is None):
                snapshot = snapshot.with_entry(name, None)
        self._gone = gone
        self._failures = {ref: failure for ref, failure in self._failures.items() if ref in catalogue.wanted}
        self._in_vain = {ref: tried for ref, tried in self._in_vain.items() if ref in catalogue.wanted}
        self._least = {ref: least for ref, least in self._least.items() if ref in catalogue.wanted}
        return self._swap(snapshot)

    def _announce(self, name: str, catalogue: Catalogue) -> list[str]:
        """Show the new versions of a name as LOADING, and move its aliases to what is there already."""
        entry = self._registry.snapshot.entries.get(name, Entry())
        slots = dict(entry.slots)
        for wanted in catalogue.wanted.values():
            slot = slots.get(wanted.ref.version)
            if wanted.ref.name == name and (slot is None or slot.state is State.LOADING):
                why = None if wanted.confirmed else UNCONFIRMED
                slots[wanted.ref.version] = Slot(wanted.ref, State.LOADING, why, why, bare=wanted.bare)
            elif wanted.ref.name == name and slot is not None and self._is_served(wanted):
                slots[wanted.ref.version] = replace(slot, reason=None, hint=None)  # of a content that nobody wants now
        return self._replace(name, replace(entry, slots=slots), catalogue)

    def _is_served(self, wanted: Wanted) -> bool:
        slot = self._slot(wanted.ref)
        return slot is not None and slot.runner is not None and slot.content == wanted.content

    def _is_hopeless(self, wanted: Wanted) -> bool:
        """Whether this very content has failed, and it is too early to try again."""
        failure = self._failures.get(wanted.ref)
        return failure is not None and failure.content == wanted.content and time.monotonic() < failure.retry_at

    async def _load(self, wanted: Wanted, catalogue: Catalogue, *, may_drop: bool = True) -> Slot | DisklessError:
        """Load one version, and write it down; return the slot that serves it, or why it cannot be served."""
        with self._journal.step("load", model=wanted.ref.name, version=wanted.ref.version) as step:
            result = await self._load_once(wanted, catalogue, may_drop=may_drop)
            if isinstance(result, Slot):
                step.attributes |= {f"diskless.seconds.{phase}": took for phase, took in result.seconds.items()}
            else:
                step.fail(result)
        return result

    async def _load_once(
        self, wanted: Wanted, catalogue: Catalogue, *, may_drop: bool, unreadable: str | None = None
    ) -> Slot | DisklessError:
        """Do what `_load` says.

        Where only its compiled form is not one that this release can read (then that is `unreadable`), scikit-learn serves it.
        """
        ref, started = wanted.ref, time.perf_counter()
        try:
            with self._journal.step("find"):
                opened = await self._manager.fetch(wanted, unreadable=unreadable)
            with opened as bundle:
                found = time.perf_counter()
                await self._finish_retiring()  # what is on its way out needs no room any more
                estimate = self._estimator.estimate(bundle.stored, bundle.recorded, needs_sklearn=bundle.needs_sklearn)
                room = await self._make_room(wanted, estimate, catalogue, may_drop=may_drop)
                try:
                    with self._journal.step("read"):
                        checked = await self._load_bundle(self._loader, bundle)
                except NoRoom:  # it takes more than was expected: more than there was
                    self._least[ref] = _Least(wanted.content, room.free_bytes + memory.LOOK_EVERY_BYTES if room else 0)
                    raise
        except CompiledUnreadable as error:
            failure: DisklessError = error
            if unreadable is None:
                told = _told(error)
                logger.warning(
                    "its compiled form cannot be read", extra={"fields": {"model": str(ref), "reason": told}}
                )
                return await self._load_once(wanted, catalogue, may_drop=may_drop, unreadable=told)
        except (BundleError, StorageError) as error:
            failure = error
        except Exception as error:
            logger.exception("loading failed", extra={"fields": {"model": str(ref)}})
            failure = BundleError(f"{ref}: {reason(error)}")
        else:
            model, report = checked.model, checked.model.report
            if report.taken is not None:
                self._estimator.learn(estimate, report.taken)
            seconds = {"find": found - started, **checked.seconds}
            seconds = {phase: round(took, 4) for phase, took in seconds.items()}
            fields: dict[str, Any] = {"model": str(ref), "seconds": seconds, "bytes": bundle.size}
            logger.info(
                "serving", extra={"fields": fields | ({"warnings": report.warnings} if report.warnings else {})}
            )
            self._service.loaded()
            return Slot(
                ref,
                State.READY,
                runner=self._runner(model, checked.costs),
                bare=wanted.bare,
                content=wanted.content,
                parity=checked.parity,
                seconds=seconds,
                costs=checked.costs,
                held_bytes=estimate.expected.resident_bytes,
            )
        self._service.loaded(failure)
        _forget_frames(failure)
        await self._loader.run(trim_heap)
        return failure

    def _runner(self, model: Model, costs: Mapping[int, float] | None) -> Runner:
        """Return a runner for a model. If its version was retired lately, it counts on."""
        runner = self._make_runner(model, costs)
        counters, _ = self._kept.pop(model.ref, (None, 0.0))
        if counters is not None:
            runner.counters = counters
        return runner

    # Room

    async def _make_room(
        self, wanted: Wanted, estimate: memory.Estimate, catalogue: Catalogue, *, may_drop: bool
    ) -> memory.Room | None:
        """Return the room that there is when it is as much as is needed; drop what is superseded for it if the policy allows.

        None where nothing tells how much there is. Raises `NoRoom`.
        """
        label, needed_bytes = str(wanted.ref), estimate.peak_bytes
        least = self._least.get(wanted.ref)
        if least is not None and least.content == wanted.content:
            needed_bytes = max(needed_bytes, least.free_bytes)
        room = memory.room(self._memory_limit_bytes)
        superseded = self._superseded(wanted, catalogue) if may_drop else []
        held = sum(slot.held_bytes for slot in superseded)
        enough = room is not None and room.free_bytes + held >= needed_bytes
        try:
            memory.check(room, needed_bytes, label, replaceable=enough and self._swap_policy == "keep")
            return room
        except NoRoom as error:
            # The next attempt is made without a correction: what happened once must not refuse for ever.
            self._estimator.forget(estimate.kind)
            tried = self._in_vain.get(wanted.ref)
            if tried is not None and tried.content == wanted.content and time.monotonic() < tried.until:
                raise NoRoom(
                    f"{error}; it was tried once in the place of the version before, and failed: {tried.reason}"
                ) from None
            if self._swap_policy == "keep" or not enough or not superseded:
                raise
        await self._drop(wanted, superseded, catalogue)
        room = memory.room(self._memory_limit_bytes)
        memory.check(room, needed_bytes, label)
        return room

    def _superseded(self, wanted: Wanted, catalogue: Catalogue) -> list[Slot]:
        """Return what serves in the place of `wanted` until it is there, and could be fetched again if that failed.

        Not what serves another alias, too; nor what the index does not have any more, or has with another content; nor
        anything of a bare model, whose old file has been overwritten.
        """
        entry = self._registry.snapshot.entries.get(wanted.ref.name, Entry())
        published = catalogue.index.models.get(wanted.ref.name)
        if wanted.bare or published is None:
            return []
        found = []
        for slot in entry.slots.values():
            aliases = {alias for alias, label in entry.serving.items() if label == slot.ref.version}
            version = published.versions.get(slot.ref.version)
            again = version is not None and version.manifest_sha256 == slot.content
            if slot.runner is not None and aliases <= {*wanted.aliases} and again and slot.ref not in catalogue.wanted:
                found.append(slot)
        return found

    async def _drop(self, wanted: Wanted, superseded: list[Slot], catalogue: Catalogue) -> None:
        """Take versions out of service, and return when the memory that they had is free.

        Raises `NoRoom` when they do not end what they are computing; then they serve again.
        """
        name = wanted.ref.name
        entry = self._registry.snapshot.entries[name]
        names = ", ".join(str(slot.ref) for slot in superseded)
        labels = {slot.ref.version for slot in superseded}
        why = f"it takes the place of {names}: there is no room for both"
        logger.warning("dropping", extra={"fields": {"models": names, "for": str(wanted.ref)}})
        slots = {label: slot for label, slot in entry.slots.items() if label not in labels}
        slots[wanted.ref.version] = Slot(wanted.ref, State.LOADING, why, why)
        serving = {alias: label for alias, label in entry.serving.items() if label not in labels}
        self._replace(name, Entry(slots, serving), catalogue)
        if await self._finish_retiring() & {slot.ref for slot in superseded}:
            again = {
                slot.ref.version: replace(slot, runner=self._runner(slot.runner.model, slot.costs))
                for slot in superseded
                if slot.runner is not None
            }
            self._replace(name, replace(entry, slots={**slots, **again}), catalogue)
            raise NoRoom(
                f"{wanted.ref}: there is room only in the place of {names}, which does not end what it computes"
            )
        before = self._in_vain.get(wanted.ref)
        count = before.count + 1 if before is not None and before.content == wanted.content else 1
        self._in_vain[wanted.ref] = _InVain(wanted.content, count)  # unless it loads
        self._dropped[name] = [
            Wanted(
                slot.ref,
                tuple(alias for alias, label in entry.serving.items() if label == slot.ref.version),
                manifest_sha256=slot.content,
            )
            for slot in superseded
        ]
        superseded.clear()  # the caller's list, too: it holds what is to be let go of
        del entry
        await self._loader.run(_collect)

    async def _bring_back(self, name: str, catalogue: Catalogue) -> bool:
        """Serve again what was dropped for a version that failed; return whether nothing is left to be brought back."""
        left = []
        for wanted in self._dropped.pop(name, []):
            entry = self._registry.snapshot.entries.get(name)
            published = catalogue.index.models.get(name)
            known = published is not None and wanted.ref.version in published.versions
            aliases = [
                alias for alias in wanted.aliases if entry and alias in entry.wanted and alias not in entry.serving
            ]
            if entry is None or not known or not aliases:
                continue  # the name has gone, or the version, or something else serves by now
            result = await self._load(wanted, catalogue, may_drop=False)
            if isinstance(result, Slot):
                entry = self._registry.snapshot.entries[name]
                serving = {**entry.serving, **dict.fromkeys(aliases, wanted.ref.version)}
                self._replace(
                    name, replace(entry, slots={**entry.slots, wanted.ref.version: result}, serving=serving), catalogue
                )
            else:
                logger.warning(
                    "cannot be brought back", extra={"fields": {"model": str(wanted.ref), "reason": _told(result)}}
                )
                left.append(wanted)
        if left:
            self._dropped[name] = left
        return not left

    async def _finish_retiring(self) -> set[ModelRef]:
        """Wait for what is on its way out, each `RETIRE_SECONDS` at most since it was retired; return what is still there."""
        if self._retiring:
            latest = max(began for _, began in self._retiring.values())
            await asyncio.wait(self._retiring, timeout=max(0.0, latest + RETIRE_SECONDS - time.monotonic()))
        return {ref for task, (ref, _) in self._retiring.items() if not task.done()}

    # The registry

    def _put(self, slot: Slot, catalogue: Catalogue) -> list[str]:
        self._failures.pop(slot.ref, None)
        self._in_vain.pop(slot.ref, None)
        self._least.pop(slot.ref, None)
        entry = self._registry.snapshot.entries.get(slot.ref.name, Entry())
        return self._replace(slot.ref.name, replace(entry, slots={**entry.slots, slot.ref.version: slot}), catalogue)

    def _fail(self, wanted: Wanted, error: DisklessError, catalogue: Catalogue) -> list[str]:
        """Record a failure. What served before goes on, but for a bare model that has lost a companion."""
        ref, text = wanted.ref, _told(error)
        before = self._failures.get(ref)
        passing = _is_passing(wanted, error)
        count = (before.count if before and before.content == wanted.content else 0) + (not passing)
        # What is wrong with a file stays wrong until it is replaced; what is wrong with the network does not.
        pause = 0.0 if passing else pause_seconds(self._refresh_seconds, count)
        tried = self._in_vain.get(ref)
        if tried is not None and not tried.reason:  # something was just dropped for it
            # Another attempt drops it again: only after a passing failure, and ever later.
            until = time.monotonic() + pause_seconds(self._refresh_seconds, tried.count) if passing else math.inf
            self._in_vain[ref] = replace(tried, reason=text, until=until)
        self._failures[ref] = _Failure(
            wanted.content, text, count, time.monotonic() + pause, for_want_of_room=isinstance(error, NoRoom)
        )
        if before is None or before.reason != text:
            logger.warning("cannot be served", extra={"fields": {"model": str(ref), "reason": text}})
        entry = self._registry.snapshot.entries.get(ref.name, Entry())
        if wanted.bare and isinstance(error, CompanionFailed) and not passing:
            entry = (
                Entry()
            )  # the old pair is in this memory only: no restart could bring it back, so nobody may rely on it
        slot = entry.slots.get(ref.version, Slot(ref, State.UNAVAILABLE, bare=wanted.bare))
        state = State.UNAVAILABLE if slot.runner is None else State.READY  # an older content of the same version serves
        slot = replace(slot, state=state, reason=text, hint=hint(error))
        return self._replace(ref.name, replace(entry, slots={**entry.slots, ref.version: slot}), catalogue)

    def _replace(self, name: str, entry: Entry, catalogue: Catalogue) -> list[str]:
        """Put a name's entry in place: an alias serves what it should when that is there, else what it served before."""
        targets = {alias: ref.version for ref, w in catalogue.wanted.items() if ref.name == name for alias in w.aliases}
        serving: dict[str, str] = {}
        for alias, version in targets.items():
            for label in (version, entry.serving.get(alias)):
                if label is not None and label in entry.slots and entry.slots[label].runner is not None:
                    serving[alias] = label
                    break
        keep = {*targets.values(), *serving.values()}
        slots = {label: slot for label, slot in entry.slots.items() if label in keep}
        after, before = Entry(slots, serving, targets), self._registry.snapshot.entries.get(name)
        if after == before:
            return []
        snapshot = self._registry.snapshot.with_entry(name, after)
        if _answering(after) == _answering(before):
            return self._swap(snapshot)
        serves = [f"{alias}={label}" for alias, label in serving.items()]
        with self._journal.step("swap", model=name, serves=serves) as step:
            step.attributes["diskless.retired"] = retired = self._swap(snapshot)
        return retired

    def _swap(self, snapshot: Snapshot) -> list[str]:
        """Serve from `snapshot`, retire what it no longer holds, and return what that was."""
        retired = []
        for runner in self._registry.swap(snapshot):
            retired.append(str(runner.model.ref))
            self._keep(runner)
            task = self._begin(self._retire(runner))
            self._retiring[task] = runner.model.ref, time.monotonic()
            task.add_done_callback(self._retiring.pop)
        return retired

    def _keep(self, runner: Runner) -> None:
        """Keep a retired runner's counts for a while."""
        now = time.monotonic()
        self._kept.pop(runner.model.ref, None)
        kept = [(ref, entry) for ref, entry in self._kept.items() if entry[1] >= now - KEPT_SECONDS]
        self._kept = dict([*kept, (runner.model.ref, (runner.counters, now))][-MAX_KEPT:])

    async def _retire(self, runner: Runner) -> None:
        ref = runner.model.ref
        self.unloading.append(ref)
        await runner.retire()
        self.unloading.remove(ref)
        del runner
        logger.info("retired", extra={"fields": {"model": str(ref)}})
        await self._loader.run(trim_heap)
        self._failures = {ref: failure for ref, failure in self._failures.items() if not failure.for_want_of_room}

    def _begin[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the event loop itself keeps no task alive
        task.add_done_callback(self._tasks.discard)
        return task

    def _slot(self, ref: ModelRef) -> Slot | None:
        entry = self._registry.snapshot.entries.get(ref.name)
        return entry.slots.get(ref.version) if entry else None


def pause_seconds(refresh_seconds: float, failures: int) -> float:
    """Return how long a version is left alone that has failed so often: ever longer, up to a quarter of an hour."""
    return min(refresh_seconds * 2.0 ** min(failures, 20), MAX_FAILURE_PAUSE_SECONDS)


def hint(error: DisklessError) -> str:
    """Return what a caller may know of an error: not which bucket this is, nor what lies where on this machine."""
    return (
        "the storage cannot be read now; GET /models/status says more"
        if isinstance(error, StorageError)
        else without_paths(_told(error))
    )


def _told(error: DisklessError) -> str:
    return shortened(str(error), MAX_REASON)


def _answering(entry: Entry | None) -> dict[str, Runner | None]:
    """Return what answers under each alias of a name."""
    return {} if entry is None else {alias: entry.slots[label].runner for alias, label in entry.serving.items()}


def _collect() -> None:
    """Free what only the garbage collector finds, and give it back. It stops everything for a moment."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim_heap()


def _is_passing(wanted: Wanted, error: DisklessError) -> bool:
    """Whether trying again soon may help: the storage failed, or a bare model's file was replaced while it was read."""
    replaced = isinstance(error, ArtifactMissing) or isinstance(error.__cause__, ArtifactMissing)
    return isinstance(error, StorageError) or (wanted.bare and replaced)


def _forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks: their frames hold what was loaded before it failed, which may be all of a large model."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
