"""What `GET /metrics` tells: each metric declared once, in one table, and the collector that finds their values.

Nothing is counted here. The counts are in cells that all processes share (`counters.py`, `service_counters.py`, `tally.py`), everything
else is looked at when somebody asks: the registry, what looks at the bucket, /proc. So the answer is the same whichever worker gives it,
and nothing is written to disk. `prometheus_client` writes it down; it is imported when it is first needed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from app import __version__, memory, processes, versions
from app.counters import AT_A_MODEL, BATCH_BOUNDS, Counters
from app.names import ModelRef
from app.refresher import Refresher
from app.registry import Entry, Registry, Slot, State
from app.runner import Runner
from app.service_counters import OK, Route, ServiceCounters, StorageKind
from app.view import View

LATENCY_BOUNDS = (
    *(width << power for power in range(4, 15) for width in (3, 4)),  # 48 µs, 64, 96, 128, … 65.5 ms
    3 << 15,  # 98.3 ms
    *(1 << power for power in range(17, 26)),  # 131 ms, 262, … 33.6 s
)
"""Upper ends of the buckets of latencies in microseconds: each is one of a bucket of `Counters`, so that none is torn apart."""
SAMPLE_SECONDS = 1.0  # between two looks at how many requests wait
PIECE_SAMPLES = 50  # that are written between two turns of the event loop
_EOF = b"# EOF\n"  # the last line in OpenMetrics
_PREDICTION_STATUSES = ("400", "401", "404", "413", "415", "422", "429", "500", "503", "504")


# The table


class Metric(NamedTuple):
    """One metric: its name as it is queried, kind, labels, and what it means."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()


REQUESTS = Metric(
    "diskless_requests_total",
    "counter",
    "Prediction requests whose model was known: answered (ok), or by the code of their error.",
    ("model", "version", "code"),
)
ROWS = Metric("diskless_rows_total", "counter", "Rows of the requests that were answered.", ("model", "version"))
LATENCY = Metric(
    "diskless_latency_seconds",
    "histogram",
    "From a validated request to its prediction, of the requests that were answered.",
    ("model", "version"),
)
BATCH_ROWS = Metric(
    "diskless_batch_rows", "histogram", "Rows that were computed together; _count is batches.", ("model", "version")
)
QUEUE = Metric(
    "diskless_queue_requests", "gauge", "Requests that wait to be computed, all workers together.", ("model", "version")
)
IN_FLIGHT = Metric(
    "diskless_in_flight_requests",
    "gauge",
    "Requests that wait or are computed, all workers together.",
    ("model", "version"),
)
QUEUE_LIMIT = Metric(
    "diskless_queue_limit_requests", "gauge", "Requests that may wait for one model, all workers together."
)
STATE = Metric(
    "diskless_model_state",
    "gauge",
    "1 for the state that a version is in, 0 for the others.",
    ("model", "version", "state"),
)
MODEL = Metric(
    "diskless_model_info",
    "info",
    "A version that serves: the aliases that it answers to, what computes, whether it is sealed or a bare file.",
    ("model", "version", "aliases", "runtime", "sealed", "bare"),
)
LOAD_SECONDS = Metric(
    "diskless_model_load_seconds",
    "gauge",
    "What each phase of loading a version took.",
    ("model", "version", "phase"),
)
MODEL_BYTES = Metric(
    "diskless_model_resident_bytes", "gauge", "Memory that loading a version took, as measured.", ("model", "version")
)
RESPONSES = Metric("diskless_http_responses_total", "counter", "Answers, by what was asked for.", ("route", "status"))
REFUSALS = Metric(
    "diskless_refused_total", "counter", "Requests that never reached a model, by the code of their error.", ("code",)
)
CALLS = Metric(
    "diskless_key_requests_total",
    "counter",
    "Requests for predictions, by the name of the key that they showed.",
    ("key",),
)
READY = Metric("diskless_ready", "gauge", "1 when every required model can predict.")
BUILD = Metric(
    "diskless_build_info",
    "info",
    "The versions of Diskless, Python and the libraries that are installed.",
    ("version", "python", "scikit_learn", "numpy"),
)
LOOKS = Metric("diskless_refreshes_total", "counter", "Looks at the bucket, by what came of them.", ("outcome",))
LOADS = Metric("diskless_loads_total", "counter", "Loads of versions: ok, or the kind of their error.", ("outcome",))
LAST_SYNC = Metric(
    "diskless_last_sync_timestamp_seconds", "gauge", "When the bucket was last read, in seconds since 1970."
)
OPERATIONS_DONE = Metric(
    "diskless_storage_operations_total",
    "counter",
    "What was asked of the storage, and how it ended. What is tried again is one operation.",
    ("storage", "operation", "outcome"),
)
BYTES = Metric(
    "diskless_storage_bytes_total", "counter", "Bytes of objects, from and to the storage.", ("storage", "direction")
)
FALLBACK = Metric("diskless_storage_fallback", "gauge", "1 while a local copy is read instead of the bucket.")
WORKERS = Metric(
    "diskless_workers", "gauge", "Processes that answer, or are about to, or answer what is left.", ("state",)
)
WORKERS_WANTED = Metric("diskless_workers_wanted", "gauge", "Processes that should answer.")
RESTARTS = Metric("diskless_worker_restarts_total", "counter", "Workers that ended and were replaced.")
GENERATION = Metric("diskless_generation", "gauge", "The number of the generation that answers; 0 with one process.")
PROCESS_MEMORY = Metric(
    "diskless_process_memory_bytes",
    "gauge",
    "Memory of the processes; what they share counts in parts (PSS), where the kernel tells.",
    ("role",),
)
PROCESS_CPU = Metric("diskless_process_cpu_seconds_total", "counter", "Processor time of all processes.")
PROCESS_FILES = Metric("diskless_process_open_files", "gauge", "Open files and sockets of all processes.")
PROCESS_THREADS = Metric("diskless_process_threads", "gauge", "Threads of all processes.")
START_TIME = Metric("diskless_start_time_seconds", "gauge", "When the service was started, in seconds since 1970.")
MEMORY_LIMIT = Metric("diskless_memory_limit_bytes", "gauge", "The limit of memory that leaves the least free.")
MEMORY_USED = Metric("diskless_memory_used_bytes", "gauge", "What is in use of that limit, by whatever it holds for.")

TABLE = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""Every metric, in the order in which they are told."""


# Finding the values


class Bins(NamedTuple):
    """A histogram: how many values up to each bound, the last of them all; and their sum."""

    bounds: Sequence[float]
    counts: Sequence[int]
    sum: float


class Samples:
    """Values by metric and labels. Of the same labels the first value counts."""

    def __init__(self) -> None:
        self.found: dict[Metric, dict[tuple[str, ...], float | Bins]] = {metric: {} for metric in TABLE}

    def add(self, metric: Metric, value: float | Bins | None, *labels: str) -> None:
        """Add a value, if there is one."""
        assert len(labels) == len(metric.labels)
        if value is not None:
            self.found[metric].setdefault(labels, value)

    def add_all(self, metric: Metric, values: Mapping[tuple[str, ...], int]) -> None:
        """Add the values of several labels."""
        for labels, value in values.items():
            self.add(metric, value, *labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collector:
    """Finds the values of all metrics, in this process or, with several workers, of the whole service."""

    registry: Registry
    watch: Refresher | View
    service: ServiceCounters
    keys: Sequence[str]  # their names
    storages: tuple[StorageKind, ...]
    workers: int
    max_queue: int
    memory_limit_bytes: int | None

    def look_at_queues(self) -> None:
        """Take note of how many requests wait in this process, for whichever process is asked."""
        for slot in self.registry.snapshot.slots():
            if slot.runner is not None:
                slot.runner.counters.waits(slot.runner.queued, slot.runner.in_flight)

    async def keep_looking(self) -> None:
        """Do that again and again."""
        while True:
            self.look_at_queues()
            await asyncio.sleep(SAMPLE_SECONDS)

    def forget_queues(self) -> None:
        """Take note that nothing waits here any more."""
        for slot in self.registry.snapshot.slots():
            if slot.runner is not None:
                slot.runner.counters.waits(0, 0)

    def figures(self) -> processes.Figures:
        """Look at the processes. It blocks for some milliseconds: for a thread."""
        return processes.figures(self._root, self._roles())

    def samples(self, figures: processes.Figures | None) -> Samples:
        """Return the values of everything, as it is now."""
        samples = Samples()
        self.look_at_queues()
        self._add_models(samples)
        self._add_service(samples)
        self._add_processes(samples, figures)
        return samples

    # Models

    def _add_models(self, samples: Samples) -> None:
        for name, entry in self.registry.snapshot.entries.items():
            for slot in entry.slots.values():
                self._add_state(samples, slot.ref, slot.state)
                if slot.runner is not None:
                    self._add_version(samples, name, entry, slot, slot.runner)
        for ref in self.watch.unloading:
            self._add_state(samples, ref, State.UNLOADING)
        for ref, counters in self.watch.kept.items():
            if (*ref, OK) not in samples.found[REQUESTS]:
                _add_counts(samples, ref, counters)
        samples.add(QUEUE_LIMIT, self.max_queue * self.workers)

    def _add_version(self, samples: Samples, name: str, entry: Entry, slot: Slot, runner: Runner) -> None:
        version, model = slot.ref.version, runner.model
        view = self.watch if isinstance(self.watch, View) else None
        _add_counts(samples, slot.ref, view.counters(runner) if view else runner.counters)
        queued, in_flight = view.waiting(runner) if view else (runner.queued, runner.in_flight)
        samples.add(QUEUE, queued, name, version)
        samples.add(IN_FLIGHT, in_flight, name, version)
        aliases = ",".join(alias for alias, label in entry.serving.items() if label == version)
        sealed = model.report.sealed_by is not None
        samples.add(MODEL, 1, name, version, aliases, model.runtime, _yes(sealed), _yes(slot.bare))
        for phase, seconds in slot.seconds.items():
            samples.add(LOAD_SECONDS, seconds, name, version, phase)
        if model.report.taken is not None:
            samples.add(MODEL_BYTES, model.report.taken.resident_bytes, name, version)

    def _add_state(self, samples: Samples, ref: ModelRef, state: State) -> None:
        for each in State:
            samples.add(STATE, int(each is state), ref.name, ref.version, each.value)

    # The service

    def _add_service(self, samples: Samples) -> None:
        watch = self.watch
        counts = watch.service_total() if isinstance(watch, View) else self.service
        samples.add_all(RESPONSES, _expected(counts.responses, _is_usual))
        samples.add_all(REFUSALS, counts.refusals)
        samples.add_all(CALLS, counts.calls(self.keys))
        samples.add(READY, int(self.registry.not_ready() is None))
        found = versions.present_versions()
        samples.add(BUILD, 1, __version__, *(found.get(one, "") for one in ("python", "scikit-learn", "numpy")))
        samples.add_all(LOOKS, counts.looks)
        samples.add_all(LOADS, counts.loads)
        samples.add(LAST_SYNC, watch.last_sync.timestamp() if watch.last_sync else None)
        ends, here = (OK, "denied", "unavailable"), self.storages
        operations = _expected(counts.operations, lambda labels: labels[0] in here and labels[2] in ends)
        samples.add_all(OPERATIONS_DONE, operations)
        samples.add_all(BYTES, _expected(counts.bytes_moved, lambda labels: labels[0] in here))
        samples.add(FALLBACK, int(watch.fallback is not None))

    # The processes

    @property
    def _root(self) -> int:
        """The process that all others descend from."""
        told = self.watch.workers() if isinstance(self.watch, View) else {}
        return int(told.get("supervisor", os.getpid()))

    def _roles(self) -> dict[int, str]:
        if not isinstance(self.watch, View):
            return {os.getpid(): "worker"}
        told = self.watch.workers()
        roles = {told[role]: role for role in ("supervisor", "parent", "heir") if told.get(role)}
        return roles | {one["pid"]: "worker" for one in told.get("processes", ())} | {os.getpid(): "worker"}

    def _add_processes(self, samples: Samples, figures: processes.Figures | None) -> None:
        alone: dict[str, Any] = {"processes": [{"state": "serving"}]}
        told = self.watch.workers() if isinstance(self.watch, View) else alone
        states = dict.fromkeys(("starting", "serving", "leaving"), 0)
        for one in told.get("processes", ()):
            states[one["state"]] += 1
        samples.add_all(WORKERS, {(state,): count for state, count in states.items()})
        samples.add(WORKERS_WANTED, self.workers)
        samples.add(RESTARTS, told.get("restarts", 0))
        samples.add(GENERATION, told.get("generation") or 0)
        room = memory.room(self.memory_limit_bytes)
        if room is not None:
            samples.add(MEMORY_LIMIT, room.limit_bytes)
            samples.add(MEMORY_USED, room.used_bytes)
        if figures is None or not figures.memory_bytes:  # a system without /proc
            return
        roles, sizes = self._roles(), dict[str, int]()
        for pid, size in figures.memory_bytes.items():
            role = roles.get(pid, "other")
            sizes[role] = sizes.get(role, 0) + size
        samples.add_all(PROCESS_MEMORY, {(role,): size for role, size in sizes.items()})
        samples.add(PROCESS_CPU, figures.cpu_seconds)
        samples.add(PROCESS_FILES, figures.open_files)
        samples.add(PROCESS_THREADS, figures.threads)
        samples.add(START_TIME, figures.began)


def _add_counts(samples: Samples, ref: ModelRef, counters: Counters) -> None:
    # One look at the cells: others count on meanwhile, and the parts shall fit together.
    seen = Counters(list(counters.cells))
    samples.add(REQUESTS, seen.answers, *ref, OK)
    for code, count in seen.errors_by_code.items():
        if count or code in AT_A_MODEL:
            samples.add(REQUESTS, count, *ref, code)
    samples.add(ROWS, seen.rows, *ref)
    seconds = [bound / 1e6 for bound in LATENCY_BOUNDS]
    samples.add(LATENCY, Bins(seconds, [*seen.up_to(LATENCY_BOUNDS), seen.answers], seen.seconds), *ref)
    samples.add(BATCH_ROWS, Bins(BATCH_BOUNDS, [*seen.batches_up_to(), seen.batches], seen.batch_rows), *ref)


def _expected(
    counts: Mapping[tuple[str, ...], int], is_expected: Callable[[tuple[str, ...]], bool]
) -> dict[tuple[str, ...], int]:
    """Leave out what is 0 and not to be expected: a rate of what comes for the first time needs the 0 before it."""
    return {labels: count for labels, count in counts.items() if count or is_expected(labels)}


def _is_usual(response: tuple[str, ...]) -> bool:
    route, status = response
    return status == "200" or (route == Route.PREDICT and status in _PREDICTION_STATUSES)


def _yes(value: bool) -> str:
    return "true" if value else "false"


# Writing them down


async def exposed(samples: Samples, accept: str) -> tuple[bytes, str]:
    """Return the values as the text that an `Accept` header asks for (OpenMetrics where it is named), and its content type.

    The library takes long for a line, so it is done in pieces, between which the event loop has a turn.
    """
    from prometheus_client import exposition
    from prometheus_client.openmetrics import exposition as openmetrics

    # Not by the library's `choose_encoder`: that fails for versions that are no numbers, and repeats what it was given.
    is_open = any(kind.partition(";")[0].strip() == "application/openmetrics-text" for kind in accept.split(","))
    write: Callable[[_Alone], bytes] = openmetrics.generate_latest if is_open else exposition.generate_latest
    pieces = []
    for metric, found in samples.found.items():
        entries = list(found.items())
        at_a_time = 1 if metric.kind == "histogram" else PIECE_SAMPLES
        for start in range(0, max(1, len(entries)), at_a_time):
            text = write(_Alone(_family(metric, entries[start : start + at_a_time]))).removesuffix(_EOF)
            pieces.append(text if start == 0 else text.split(b"\n", 2)[2])  # help and kind are told once
            await asyncio.sleep(0)
    if not is_open:
        return b"".join(pieces), exposition.CONTENT_TYPE_PLAIN_0_0_4
    return b"".join((*pieces, _EOF)), openmetrics.CONTENT_TYPE_LATEST


class _Alone:
    """Stands for a registry with one family."""

    def __init__(self, family: Any) -> None:
        self._family = family

    def collect(self) -> Iterator[Any]:
        yield self._family


def _family(metric: Metric, entries: Sequence[tuple[tuple[str, ...], float | Bins]]) -> Any:
    from prometheus_client import metrics_core
    from prometheus_client.utils import floatToGoString

    kinds = {"counter": metrics_core.CounterMetricFamily, "gauge": metrics_core.GaugeMetricFamily}
    family: Any
    match metric.kind:
        case "histogram":
            family = metrics_core.HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, bins in entries:
                assert isinstance(bins, Bins)
                bounds = [*map(floatToGoString, bins.bounds), "+Inf"]
                family.add_metric(labels, list(zip(bounds, bins.counts, strict=True)), bins.sum)
        case "info":
            family = metrics_core.InfoMetricFamily(metric.name.removesuffix("_info"), metric.help)
            for labels, _ in entries:
                family.add_metric((), dict(zip(metric.labels, labels, strict=True)))
        case kind:
            family = kinds[kind](metric.name, metric.help, labels=metric.labels)
            for labels, value in entries:
                family.add_metric(labels, value)
    return family


# Describing them


def markdown() -> str:
    """Return the table as Markdown: what stands between `<!-- metrics -->` and `<!-- /metrics -->` in docs/metrics.md."""
    rows = [("metric", "kind", "labels", "meaning"), ("---", "---", "---", "---")]
    for metric in TABLE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append((f"`{metric.name}`", metric.kind, labels, metric.help))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(markdown())
