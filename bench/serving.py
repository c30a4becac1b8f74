"""Predictions over HTTP: ours beside services written by hand, and beside other model servers.

Every service runs on the same core, the load comes from another. All are started at once and measured in turn, in an
order shuffled anew in each round, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench import contenders, environments, models, plot, questions, wrk
from bench.contenders import ASGI, CONSTANT, FLOOR, GUARDED, INLINE, MOSEC, NAIVE, REFERENCE, SERVE, Contender, Ground
from bench.environments import FOLDER
from bench.questions import Question
from bench.results import spread, table
from bench.servers import Cores, Failed, Service, cores, environment, megabytes
from demo import s3
from venvs import ROOT, Unavailable

ROUNDS = 3
MEASURE_SECONDS = 840.0  # for all rounds; what comes before and after takes a third of that
COMMAND_SECONDS = 300.0
LARGE_MB = 100.0
WORKERS = (1, 2, 4)
SETTLED = 0.01  # memory that changes by less than this share from one look to the next
SETTLE_SECONDS = 40.0
STARTED = time.monotonic()
ANY = "any"  # the kind of the service that answers the same to all


class Shape(NamedTuple):
    """A load: how many connections send requests of how many rows, and for how long."""

    label: str
    connections: int
    seconds: int
    large: bool = False
    request_ids: bool = False


MANY = Shape("64 connections, single rows", 64, 2)
SOME = Shape("16 connections, single rows", 16, 1)
ONE = Shape("1 connection, single rows", 1, 2)
LARGE = Shape("4 connections, 1,000 rows", 4, 1, large=True)
IDS = Shape("64 connections, single rows, each request with another X-Request-ID", 64, 2, request_ids=True)
SHAPES = (MANY, SOME, ONE, LARGE, IDS)


class Cell(NamedTuple):
    """What one figure is about."""

    name: str  # of the contender
    kind: str
    shape: Shape


class Run(NamedTuple):
    """What was found about it in one round; with any error it counts for nothing."""

    load: wrk.Load
    cpu_us: float  # of the service, per request

    @property
    def is_void(self) -> bool:
        """Whether something failed."""
        return self.load.errors > 0 or self.load.requests == 0


@dataclass(slots=True)
class Found:
    """Everything that a run of the bench found."""

    runs: dict[Cell, list[Run]] = field(default_factory=dict)  # one for each round
    differences: dict[tuple[str, str], float] = field(default_factory=dict)  # from scikit-learn, by contender and kind
    first_answers: dict[str, list[float]] = field(default_factory=dict)  # seconds, by contender
    memory: dict[str, list[float]] = field(default_factory=dict)  # MB with the four models, by contender
    large: dict[str, dict[int, float]] = field(
        default_factory=dict
    )  # MB with the large forest, by contender and workers
    left_out: dict[str, str] = field(default_factory=dict)  # reasons

    def values(self, cell: Cell, figure: str) -> list[float]:
        """Return a figure of the rounds that count."""
        return [_figure(run, figure) for run in self.runs.get(cell, []) if not run.is_void]

    def ratios(self, cell: Cell, other: Cell, figure: str = "rate") -> list[float]:
        """Return the ratio in each round in which both count."""
        pairs = zip(self.runs.get(cell, []), self.runs.get(other, []), strict=False)
        return [
            _figure(one, figure) / _figure(two, figure) for one, two in pairs if not one.is_void and not two.is_void
        ]


def _figure(run: Run, figure: str) -> float:
    if figure == "cpu_us":
        return run.cpu_us
    return float(getattr(run.load, figure))


# The run


def report(*, quick: bool = False, only: Sequence[str] = ()) -> str:
    """Measure everything; return the section on it. Raises `Unavailable`."""
    wrk.available()
    found = Found()
    on = cores()
    chosen = [contender for contender in contenders.ALL if not only or contender.name in only]
    if REFERENCE in chosen and not contenders.has_runtimes():
        chosen.remove(REFERENCE)
        found.left_out[REFERENCE.name] = "this version has one runtime, so ML_RUNTIME is no setting of it"
    chosen = [contender for contender in chosen if _is_installed(contender, found)]
    before = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, before)
        say("making the models")
        kinds = {name: make() for name, make in questions.KINDS.items()}
        FOLDER.mkdir(exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=FOLDER, prefix="serving-")))
        questions.store(folder / "models", kinds)
        if any(contender in (FLOOR, MOSEC) for contender in chosen):
            _convert(folder / "models")
        os.sched_setaffinity(0, {on.load})  # and with it the S3 server, and everything that publishes
        server = stack.enter_context(s3.start(folder / "s3"))
        ground = Ground(on.server, folder / "models", bucket_environment(server, "kinds/"))
        for name in kinds:
            publish(server, "kinds/", name, folder / "models")
        with contextlib.ExitStack() as running:
            services = _start(running, chosen, ground, kinds, found)
            _measure(services, kinds, folder, on, found, quick=quick)
        say("starts")
        timed = [contender for contender in chosen if contender is not GUARDED]
        for number in range(1 if quick else ROUNDS):
            for contender in random.Random(number).sample(timed, len(timed)):
                _time_start(contender, ground, kinds, found)
        say("memory")
        _weigh(chosen, server, folder, on, found, counts=WORKERS[:2] if quick else WORKERS)
    _store(found, FOLDER / ("serving-quick.json" if quick or only else "serving.json"))
    if not quick and not only:
        plot.write(FOLDER / "serving.json", ROOT / "docs" / "bench.svg")
    return section(found)


def say(text: str) -> None:
    """Tell whoever waits what is being done, and how long the bench has run."""
    print(f"bench: {time.monotonic() - STARTED:4.0f} s: {text}", file=sys.stderr, flush=True)


def bucket_environment(server: s3.S3Server, prefix: str, *, writes: bool = False) -> dict[str, str]:
    """Return the variables by which ours finds its models under `prefix`."""
    identity = server.writer if writes else server.reader
    return {
        "R2_ENDPOINT_URL": server.endpoint_url,
        "R2_BUCKET": server.bucket,
        "R2_ACCESS_KEY_ID": identity.access_key_id,
        "R2_SECRET_ACCESS_KEY": identity.secret_access_key,
        "ML_PREFIX": prefix,
    }


def command(server: s3.S3Server, prefix: str, *words: str) -> None:
    """Run one of our commands to its end. Raises `Failed` with what it said."""
    extra = {"PYTHONPATH": str(ROOT), **bucket_environment(server, prefix, writes=True)}
    finished = subprocess.run(
        [sys.executable, "-m", "app", *words],
        env=environment(extra),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    if finished.returncode:
        raise Failed(f"python -m app {' '.join(words)}: {finished.stderr.strip()[-500:]}")


def publish(server: s3.S3Server, prefix: str, name: str, folder: Path, *more: str) -> None:
    """Publish a model that `questions.store` left in `folder`."""
    say(f"publishing {name}")
    files = ("--model", str(folder / f"{name}.joblib"), "--examples", str(folder / f"{name}.json"))
    command(server, prefix, "publish", name, *files, *more)


def _is_installed(contender: Contender, found: Found) -> bool:
    """Make the environment of a peer; where that cannot be, leave it out."""
    if contender.is_ours:
        return True
    try:
        environments.python(contender.environment)
    except Unavailable as error:
        found.left_out[contender.name] = str(error)
        return False
    return True


def _convert(folder: Path) -> None:
    say("converting the models to ONNX")
    finished = subprocess.run(
        [str(environments.python("handwritten")), str(environments.PEERS / "convert.py")],
        env=environment({"BENCH_MODELS": str(folder)}),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    if finished.returncode:
        raise Failed(f"bench/peers/convert.py: {finished.stderr.strip()[-1000:]}")


def _start(
    stack: contextlib.ExitStack,
    chosen: Sequence[Contender],
    ground: Ground,
    kinds: Mapping[str, Question],
    found: Found,
) -> list[tuple[Contender, Service, list[str]]]:
    """Start the services and check their answers; return them with the kinds for which those are right."""
    services = []
    for contender in chosen:
        say(f"starting {contender.name}, checking its answers")
        try:
            service = stack.enter_context(contender.start(ground))
            if contender is CONSTANT:
                service.answered("/", b"{}")
                services.append((contender, service, [ANY]))
                continue
            right = []
            for kind, question in kinds.items():
                try:
                    asked = contender.asked(question)
                    found.differences[contender.name, kind] = _check(contender, service, kind, asked)
                    right.append(kind)
                except (contenders.WrongAnswer, ValueError, KeyError) as error:
                    found.left_out[f"{contender.name}, {kind}"] = str(error)
            services.append((contender, service, right))
        except Failed as error:
            found.left_out[contender.name] = str(error)
    return services


def _check(contender: Contender, service: Service, kind: str, question: Question) -> float:
    """Ask every question once; return the largest difference from scikit-learn's answers. Raises `WrongAnswer`."""
    path = contender.path.format(kind=kind)
    single = questions.singles(question)
    service.answered(path, contender.body(question, single[0].rows))
    singles = [contender.predictions(*_asked(contender, service, path, question, request.rows)) for request in single]
    rows = [row for found in singles for row in found]
    worst = contenders.check(contender, rows, [request.expected[0] for request in single])
    for request in questions.larges(question):
        found = contender.predictions(*_asked(contender, service, path, question, request.rows))
        worst = max(worst, contenders.check(contender, found, request.expected))
    return worst


def _asked(
    contender: Contender, service: Service, path: str, question: Question, rows: Sequence[object]
) -> tuple[bytes, int]:
    status, answer = service.ask(path, contender.body(question, rows))
    if status != 200:
        raise contenders.WrongAnswer(f"{contender.name}: {status} {answer[:300]!r}")
    return answer, len(rows)


def _shapes(contender: Contender, *, quick: bool) -> list[Shape]:
    """Return the loads that a service is measured under: not those that would say nothing, and in a hurry the main ones."""
    if contender is GUARDED:
        return [IDS]
    shapes = [MANY, ONE]
    if not quick and contender is not REFERENCE:
        shapes.append(SOME)
    if contender in (INLINE, SERVE, ASGI) if quick else contender is not CONSTANT:
        shapes.append(LARGE)
    if contender in (CONSTANT, SERVE) if quick else contender in (CONSTANT, FLOOR, SERVE, ASGI):
        shapes.append(IDS)
    return shapes


def _measure(
    services: Sequence[tuple[Contender, Service, list[str]]],
    kinds: Mapping[str, Question],
    folder: Path,
    on: Cores,
    found: Found,
    *,
    quick: bool,
) -> None:
    wanted = []
    for contender, service, right in services:
        for kind in right:
            question = contender.asked(kinds["linear" if kind == ANY else kind])
            files = {}
            for large, requests in ((False, questions.singles(question)), (True, questions.larges(question))):
                files[large] = folder / f"{contender.name}-{kind}-{'large' if large else 'single'}.jsonl"
                files[large].write_bytes(b"".join(contender.body(question, one.rows) + b"\n" for one in requests))
            for shape in _shapes(contender, quick=quick):
                wanted.append((Cell(contender.name, kind, shape), contender, service, files[shape.large]))
    deadline = time.monotonic() + MEASURE_SECONDS
    lasted = 0.0
    for number in range(1 if quick else ROUNDS):
        started = time.monotonic()
        if started + lasted > deadline:  # as on a machine that is busy with something else
            found.left_out[f"round {number + 1}"] = f"all rounds together were to take {MEASURE_SECONDS:.0f} s at most"
            break
        say(f"round {number + 1}, {len(wanted)} loads")
        for cell, contender, service, bodies in random.Random(number).sample(wanted, len(wanted)):
            run = _run(service, contender.path.format(kind=cell.kind), cell.shape, bodies, on.load, quick=quick)
            found.runs.setdefault(cell, []).append(run)
        lasted = time.monotonic() - started


def _run(service: Service, path: str, shape: Shape, bodies: Path, core: int, *, quick: bool) -> Run:
    computed = service.cpu_seconds()
    try:
        load = wrk.run(
            service.url + path,
            bodies,
            connections=shape.connections,
            seconds=1 if quick else shape.seconds,
            core=core,
            request_ids=shape.request_ids,
            headers=service.headers,
        )
    except (ValueError, subprocess.TimeoutExpired) as error:
        say(str(error))
        return Run(wrk.Load(0, 1.0, 0.0, 0.0, 1), 0.0)
    return Run(load, (service.cpu_seconds() - computed) / max(1, load.requests) * 1e6)


def _time_start(contender: Contender, ground: Ground, kinds: Mapping[str, Question], found: Found) -> None:
    """Start a service alone, and wait until it has answered for each of the models, rightly."""
    try:
        with contender.start(ground) as service:
            if contender is CONSTANT:
                seconds, _ = service.answered("/", b"{}")
            for kind, question in {} if contender is CONSTANT else kinds.items():
                if f"{contender.name}, {kind}" in found.left_out:
                    continue
                request = questions.singles(contender.asked(question))[0]
                path = contender.path.format(kind=kind)
                seconds, answer = service.answered(path, contender.body(question, request.rows))
                contenders.check(contender, contender.predictions(answer, 1), request.expected)
            found.first_answers.setdefault(contender.name, []).append(seconds)
            found.memory.setdefault(contender.name, []).append(megabytes(service.pss_bytes()))
    except (Failed, contenders.WrongAnswer) as error:
        found.left_out[f"{contender.name}, start"] = str(error)


def has_workers() -> bool:
    """Whether this version of ours starts several workers."""
    words = [sys.executable, "-m", "app", "serve", "--help"]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return "--workers" in finished.stdout


def _weigh(
    chosen: Sequence[Contender], server: s3.S3Server, folder: Path, on: Cores, found: Found, *, counts: Sequence[int]
) -> None:
    """Weigh each of ours, and what most people write, with a large forest and several workers."""
    wanted = [contender for contender in chosen if contender in (SERVE, REFERENCE, NAIVE)]
    if not wanted:
        return
    question = questions.large_forest(models.forest(LARGE_MB))
    questions.store(folder / "large", {"large": question})
    publish(server, "large/", "large", folder / "large")
    several = has_workers()
    if not several:
        found.left_out["serve, several workers"] = "this version has no --workers"
    request = questions.singles(question)[0]
    for contender in wanted:
        body = contender.body(question, request.rows)
        bodies = folder / f"{contender.name}-large.jsonl"
        bodies.write_bytes(body + b"\n")
        path = contender.path.format(kind="large")
        for count in counts if several or not contender.is_ours else (1,):
            ground = Ground(on.server, folder / "large", bucket_environment(server, "large/"), count)
            try:
                with contender.start(ground) as service:
                    _, answer = service.answered(path, body)
                    contenders.check(contender, contender.predictions(answer, 1), request.expected)
                    weight = _settled(service, path, bodies, on.load)
                    found.large.setdefault(contender.name, {})[count] = megabytes(weight)
            except (Failed, contenders.WrongAnswer) as error:
                found.left_out[f"{contender.name}, {count} workers"] = str(error)


def _settled(service: Service, path: str, bodies: Path, core: int) -> float:
    """Ask over many connections, so that every worker answers, until the memory stays as it is; return it in bytes."""
    deadline = time.monotonic() + SETTLE_SECONDS
    before = 0.0
    while True:
        wrk.run(service.url + path, bodies, connections=64, seconds=1, core=core)
        weight = service.pss_bytes()
        if abs(weight - before) <= SETTLED * weight or time.monotonic() > deadline:
            return weight
        before = weight


def _store(found: Found, path: Path) -> None:
    """Leave everything that was found as JSON."""
    runs = [
        {
            **{"name": cell.name, "kind": cell.kind, "round": number, "rate": run.load.rate, "cpu_us": run.cpu_us},
            **run.load._asdict(),
            **cell.shape._asdict(),
            "seconds": run.load.seconds,
        }
        for cell, taken in found.runs.items()
        for number, run in enumerate(taken)
    ]
    document = {
        "runs": runs,
        "differences": [[*pair, value] for pair, value in found.differences.items()],
        "first_answers": found.first_answers,
        "memory": found.memory,
        "large": found.large,
        "left_out": found.left_out,
    }
    path.write_text(json.dumps(document, indent=1))


# The section


class Budget(NamedTuple):
    """What must hold, and what was found in each round."""

    text: str
    limit: float
    found: Sequence[float]
    at_least: bool = True
    unit: str = "times"

    def row(self) -> list[str]:
        """Return its row: what, budget, found, whether that is within it."""
        sign = "≥" if self.at_least else "≤"
        budget = f"{sign} {self.limit:g} {self.unit}"
        if not self.found:
            return [self.text, budget, "not measured", ""]
        median = statistics.median(self.found)
        held = median >= self.limit if self.at_least else median <= self.limit
        return [self.text, budget, spread(self.found), "met" if held else "**missed**"]


def budgets(found: Found) -> list[Budget]:
    """Return everything that must hold."""

    def rate(one: Contender, two: Contender, kind: str, shape: Shape = MANY) -> list[float]:
        other = Cell(two.name, ANY if two is CONSTANT else kind, shape)
        return found.ratios(Cell(one.name, kind, shape), other)

    rows = []
    for kind, limit in {"linear": 2.5, "mixed": 3.0, "boosting": 2.2, "forest": 1.8}.items():
        rows.append(Budget(f"`serve` : hand-written onnxruntime, {kind}", limit, rate(SERVE, FLOOR, kind)))
    rows.append(Budget("`serve` : constant answer, linear", 1.5, rate(SERVE, CONSTANT, "linear")))
    rows += [Budget(f"`serve` : mosec, {kind}", 3.0, rate(SERVE, MOSEC, kind)) for kind in questions.KINDS]
    for kind, limit in {"linear": 1.1, "mixed": 1.5, "boosting": 1.0, "forest": 0.85}.items():
        rows.append(Budget(f"ASGI : hand-written onnxruntime, {kind}", limit, rate(ASGI, FLOOR, kind)))
    for kind, limit in {"linear": 30.0, "forest": 100.0, "mixed": 100.0}.items():
        rows.append(Budget(f"`serve` : FastAPI + Pydantic + joblib, {kind}", limit, rate(SERVE, NAIVE, kind)))
    for kind, limit in {"linear": 0.85, "boosting": 0.85, "forest": 0.5, "mixed": 0.4}.items():
        text = f"`serve` : constant answer, {kind}, 1 connection"
        rows.append(Budget(text, limit, rate(SERVE, CONSTANT, kind, ONE)))
    for kind in questions.KINDS:
        ratios = found.ratios(Cell(SERVE.name, kind, MANY), Cell(CONSTANT.name, ANY, MANY), "p99_ms")
        rows.append(Budget(f"p99, `serve` : constant answer, {kind}", 2.0, ratios, at_least=False))
    for kind in questions.KINDS:
        text = f"`serve` : hand-written scikit-learn, {kind}, 1,000 rows"
        rows.append(Budget(text, 1.0, rate(SERVE, INLINE, kind, LARGE)))
    for kind in questions.KINDS:
        ratios = found.ratios(Cell(GUARDED.name, kind, IDS), Cell(SERVE.name, kind, MANY))
        rows.append(Budget(f"`serve` with a key, a rate limit and request ids : without, {kind}", 0.85, ratios))
    weights = found.large.get(SERVE.name, {})
    second = [weights[2] - weights[1]] if {1, 2} <= weights.keys() else []
    further = [(weights[4] - weights[2]) / 2] if {2, 4} <= weights.keys() else []
    for text, sizes in (("the second worker, with what looks after both", second), ("a worker beyond that", further)):
        rows.append(Budget(f"{text}, 100 MB forest", 15.0, sizes, at_least=False, unit="MB"))
    four = [weights[4] / weights[1]] if {1, 4} <= weights.keys() else []
    rows.append(Budget("memory of four workers : one, 100 MB forest", 1.3, four, at_least=False))
    for text, figures in (("memory", found.memory), ("start to first answers", found.first_answers)):
        ours, theirs = figures.get(SERVE.name, []), figures.get(REFERENCE.name, [])
        ratios = [one / two for one, two in zip(ours, theirs, strict=False)]
        rows.append(Budget(f"{text}, compiled : with scikit-learn", 0.6, ratios, at_least=False))
    return rows


def section(found: Found) -> str:
    """Return the section in Markdown."""
    parts = [_method(found), "### Must hold", "At 64 connections with single rows unless said otherwise."]
    parts.append(table(("what", "budget", "found", ""), [budget.row() for budget in budgets(found)]))
    for shape in SHAPES:
        rows = [row for kind in questions.KINDS for row in _rows(found, kind, shape)]
        if not rows:
            continue
        header = ("model, service", "rate : hand-written", "p99 : constant", "requests/s", "p50, ms", "p99, ms")
        parts += [f"### {shape.label}", table((*header, "CPU, µs per request"), rows)]
    parts += ["### Memory and start", _of_starts(found)]
    if found.left_out:
        parts += ["### Left out", "\n".join(f"- {name}: {_line(reason)}" for name, reason in found.left_out.items())]
    return "\n\n".join(parts)


def _line(text: str) -> str:
    return " ".join(text.split())[:400]


def _method(found: Found) -> str:
    peers = {name: environments.versions(name) for name in ("handwritten", "mosec", "mlserver")}
    libraries = ("uvicorn", "fastapi", "onnxruntime", "skl2onnx")
    versions = ", ".join(f"{name} {peers['handwritten'][name]}" for name in libraries)
    exact = [value for (name, _), value in found.differences.items() if _of(name).exact]
    ours = [value for (name, _), value in found.differences.items() if _of(name).is_ours]
    single = [value for (name, _), value in found.differences.items() if not _of(name).exact]
    worst = {
        f"ours ({contenders.EXACT:g} allowed)": ours,
        "all that compute in float64": exact,
        f"those in float32 ({contenders.FLOAT32:g} allowed in {contenders.FLOAT32_SHARE:.0%} of the rows)": single,
    }
    differences = "; ".join(f"{text} {max(values):.1e}" for text, values in worst.items() if values)
    void = sum(run.is_void for taken in found.runs.values() for run in taken)
    rounds = max((len(taken) for taken in found.runs.values()), default=0)
    return (
        "All services on one core, wrk on the other; one worker each. Medians of "
        f"{rounds} interleaved rounds (least-most); a ratio is that of each round. Hand-written is a bare ASGI application "
        "with orjson and the model inline, which checks nothing; its onnxruntime computes in float32. "
        f"Peers: {versions}, mosec {peers['mosec']['mosec']}, MLServer {peers['mlserver']['mlserver']}. Before anything was "
        f"measured, {questions.SINGLES} requests of one row and {questions.LARGES} of {questions.LARGE_ROWS} were compared "
        f"with scikit-learn's own answers; largest difference, relative above 1: {differences or 'not measured'}. A run in which "
        f"a request fails is void: {void} were. wrk corrects its latencies for coordinated omission."
    )


def _of(name: str) -> Contender:
    return next(contender for contender in contenders.ALL if contender.name == name)


def _rows(found: Found, kind: str, shape: Shape) -> Iterator[list[str]]:
    floor = Cell(FLOOR.name, kind, shape)
    for contender in contenders.ALL:
        cell = Cell(contender.name, ANY if contender is CONSTANT else kind, shape)
        if cell not in found.runs:
            continue
        rates = found.values(cell, "rate")
        if not rates:
            yield [f"{kind}, {contender.label}", "void", "", "", "", "", ""]
            continue
        p99 = found.ratios(cell, Cell(CONSTANT.name, ANY, shape), "p99_ms")
        ratios = found.ratios(cell, floor)
        latencies = [f"{statistics.median(found.values(cell, figure)):.2f}" for figure in ("p50_ms", "p99_ms")]
        yield [
            f"{kind}, {contender.label}",
            spread(ratios) if ratios else "",
            spread(p99) if p99 else "",
            spread(rates, 0),
            *latencies,
            f"{statistics.median(found.values(cell, 'cpu_us')):.0f}",
        ]


def _of_starts(found: Found) -> str:
    rows = []
    for contender in contenders.ALL:
        seconds, weight = found.first_answers.get(contender.name), found.memory.get(contender.name)
        large = found.large.get(contender.name, {})
        if not seconds or not weight:
            continue
        several = [f"{large[count]:.0f}" if count in large else "" for count in WORKERS]
        rows.append([contender.label, spread(seconds), spread(weight, 0), *several])
    header = ("service", "first answers, s", "MB, the four models", *(f"MB, 100 MB forest, {n} w." for n in WORKERS))
    return (
        "From the start of the process to a right answer for each of the four models, from the local S3 server for ours and "
        "from files for the others; memory is the proportional set size of the whole process tree.\n\n"
    ) + table(header, rows)
