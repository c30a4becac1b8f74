"""What is made of a fitted model: which of its compiled forms is written, proved and measured; or why there is none.

Each form of a program (an operation may have several ways to compute) and scikit-learn itself are timed in turns on the same rows,
and loaded in a process of their own to see what they take. The one that is chosen is proved as it will be stored: written and read.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from app import loaders, sampling, versions
from app.compiled import op
from app.compiled import program as programs
from app.compiled.op import Op
from app.compiled.program import Program
from app.compiler import compile, proof
from app.compiler.translation import NotCompilable
from app.errors import RequestError
from app.manifest import PROGRAM_FORMAT, Compiled, Speeds
from app.measuring import Trial, measure
from app.memory import MB, MEASURED_FROM_BYTES, Taken
from app.model import Model
from app.signature import Rows
from app.timing import PROBE_ROWS, SIZES, per_row, race

RACE_SECONDS = 2.0
MAX_VARIANTS = 6
MAX_PROOFS = 2
SMALL_MACHINE_BYTES = 512 * MB
PROCESS_BYTES = 100 * MB  # what a service takes before it has loaded anything
SKLEARN_BYTES = 150 * MB  # what scikit-learn takes, which a model that is compiled altogether does without
MUCH_FASTER = 4.0  # what makes up for more than twice the memory
BUSY = ": if this machine is busy, publish it again when it is not"  # what to do where the time was not enough
WEIGHTS = {1: 0.5, 64: 0.3, 1000: 0.2}  # most requests bring one row


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled form as it will be stored, and what is known of it; or the reason why there is none."""

    body: bytes | None = None
    compiled: Compiled | None = None
    reason: str | None = None

    @property
    def summary(self) -> str:
        """One line for whoever publishes."""
        if self.compiled is None:
            return f"not compiled: {self.reason}"
        speeds = self.compiled.microseconds_per_row
        gains = [
            f"{speeds.reference[rows] / speeds.compiled[rows]:.3g} x at {rows:,}"
            for rows in SIZES
            if rows in speeds.reference and speeds.compiled.get(rows)
        ]
        faster = f"; scikit-learn's time over its own: {', '.join(gains)} rows" if gains else ""
        missing = f"; not all: {self.compiled.reason}" if self.compiled.reason else ""
        return (
            f"compiled {', '.join(self.compiled.methods)}: differs by {self.compiled.parity:.1g} at most on "
            f"{self.compiled.rows:,} rows{faster}{missing}"
        )


def _cost(seconds: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """Return a form's time as a multiple of scikit-learn's, over the sizes that both were measured at."""
    sizes = [size for size in WEIGHTS if size in seconds and size in reference]
    weight = sum(WEIGHTS[size] for size in sizes) or 1.0
    return math.exp(sum(WEIGHTS[size] * math.log(seconds[size] / reference[size]) for size in sizes) / weight)


def is_heavy(form: Taken | None, reference: Taken | None) -> bool:
    """Whether a form takes more than twice what scikit-learn and the model do, or more than a small machine has where they fit."""
    if form is None or reference is None:
        return False
    beside = reference.peak_bytes + SKLEARN_BYTES
    if form.resident_bytes > 2 * (reference.resident_bytes + SKLEARN_BYTES):
        return True
    return form.peak_bytes + PROCESS_BYTES > SMALL_MACHINE_BYTES >= beside + PROCESS_BYTES


def plan(
    model: Model, known: Sequence[Any] = (), *, taken: Taken | None = None, limit: float = proof.LIMIT_SECONDS
) -> Plan:
    """Compile a model, prove it on `known` instances and around them, and measure it. `taken` is what loading the model takes.

    Each proof that is tried may compute for `limit` seconds. Whatever goes wrong is the reason of a plan without a program: a
    version must not fail for want of a compiled form.
    """
    try:
        return _plan(model, known, taken, limit)
    except NotCompilable as error:
        return Plan(reason=str(error))
    except Exception as error:
        return Plan(reason=f"compiling it failed: {loaders.reason(error)}")


def _plan(model: Model, known: Sequence[Any], taken: Taken | None, limit: float) -> Plan:
    assert model.reference is not None
    signature = model.signature
    program = compile.translate(model.reference.companions, model.reference.estimator, signature)
    program = program.only(signature.methods)
    if signature.default_method not in program.heads:
        raise NotCompilable(f"its {signature.default_method} has no compiled form")
    missing = [method for method in signature.methods if method not in program.heads]
    instances = [*known] or sampling.instances(signature, SIZES[1])
    forms = variants(_warmed(model, program, instances))
    seconds = _raced(model, forms, instances, RACE_SECONDS)
    reference = seconds.get("sklearn", {})
    costs = {index: _cost(seconds.get(str(index), {}), reference) for index in range(len(forms))}
    why, tried = "no form of it could be computed", 0
    chosen: tuple[int, _Stored] | None = None
    heavy: tuple[int, _Stored] | None = None
    for index in sorted(costs, key=costs.__getitem__):  # the fastest first
        found = _stored(model, forms[index], known, instances, taken, limit)
        if isinstance(found, str):
            why, tried = found, tried + 1
            if tried == MAX_PROOFS:  # what two forms of it get wrong, the others do too
                break
        elif not is_heavy(found.taken, taken):
            chosen = index, found
            break
        elif heavy is None:
            heavy = index, found
            size = found.taken.resident_bytes // MB if found.taken else 0
            why = f"its compiled form takes {size} MB, and is not much faster for it"
    others = costs[chosen[0]] if chosen is not None else 1.0  # of scikit-learn itself
    if heavy is not None and costs[heavy[0]] * MUCH_FASTER < others:
        chosen = heavy
    if chosen is None:
        return Plan(reason=why)
    index, stored = chosen
    reasons = [stored.proved.reason] if stored.proved.reason else []
    reasons += [f"its {', '.join(missing)} has no compiled form"] if missing else []
    speeds = Speeds(reference=per_row(reference), compiled=per_row(seconds.get(str(index), {})))
    return Plan(stored.body, _described(stored.program, stored.proved, speeds, reasons, stored.taken))


@dataclass(frozen=True, slots=True)
class _Stored:
    """A form as it is written and as it was read back, its proof, and what loading it takes."""

    body: bytes
    program: Program
    proved: proof.Proof
    taken: Taken | None


def _stored(
    model: Model, form: Program, known: Sequence[Any], instances: Sequence[Any], taken: Taken | None, limit: float
) -> _Stored | str:
    """Write a form and prove what is read back, or return why that cannot be done."""
    body = form.write()
    read = Program.read(io.BytesIO(body), len(body))
    proved = proof.prove(model, read, known, limit=limit, remedy=BUSY)
    method = model.signature.default_method
    if method not in proved.methods:
        return proved.failed.get(method, f"its {method} has no compiled form")
    kept = read.only(proved.methods)
    if kept.methods != read.methods:
        body = kept.write()
    return _Stored(body, kept, proved, _memory(body, model, instances, taken))


def _warmed(model: Model, program: Program, instances: Sequence[Any]) -> Program:
    """Let a program compute a row, so that its variants share what it has made for that."""
    with suppress(RequestError):
        rows = sampling.batches(model.signature, instances, (1,))
        if rows:
            model.settled(program, None, None).predict_by("compiled", rows[1], model.signature.default_method)
    return program


def _described(
    program: Program, proved: proof.Proof, speeds: Speeds, reasons: Sequence[str], taken: Taken | None = None
) -> Compiled:
    return Compiled(
        format=programs.FORMAT,
        methods=program.methods,
        operations=program.operations,
        parity=proved.parity,
        rows=proved.rows,
        reason="; ".join(reasons) or None,
        microseconds_per_row=speeds,
        resident_bytes=taken.resident_bytes if taken else None,
        peak_bytes=taken.peak_bytes if taken else None,
        compiled_with=_versions(),
    )


def variants(program: Program) -> list[Program]:
    """Return a program in each of the ways in which it may compute: an operation's `variants()` are what could stand in its place."""
    first = [operation for operation in op.within((program.body, program.heads)) if hasattr(operation, "variants")]
    count = max((len(_variants(operation)) for operation in first), default=0)
    if count == 0:
        return [program]

    def chosen(index: int) -> Program:
        made: dict[int, Op] = {}  # an operation that stands in several places is replaced by one

        def change(operation: Op) -> Op:
            if not hasattr(operation, "variants"):
                return operation
            if id(operation) not in made:
                others = _variants(operation)
                made[id(operation)] = others[min(index, len(others) - 1)]
            return made[id(operation)]

        return Program(op.rebuilt(program.body, change), op.rebuilt(dict(program.heads), change))

    return [chosen(index) for index in range(min(count, MAX_VARIANTS))]


def _variants(operation: Any) -> Sequence[Op]:
    found: Sequence[Op] = operation.variants()
    return found


def prove_candidate(model: Model, candidate: Program, *, seconds: float) -> tuple[Compiled | None, str | None]:
    """Prove a program that was made while the model was loaded, and measure it, within a time; or return why it cannot be used.

    Whatever goes wrong is such a reason.
    """
    if seconds <= 0:
        return None, "compiling it took longer than a load may"
    try:
        known = model.golden.instances if model.golden else ()
        instances = [*known] or sampling.instances(model.signature, SIZES[1])
        _warmed(model, candidate, instances)  # the first import of an engine is no part of it
        found = proof.prove(model, candidate, known, seconds=seconds * 0.75, rows=1500)
        if model.signature.default_method not in found.methods:
            return None, found.failed.get(model.signature.default_method, "it has no form that computes")
        raced = _raced(model, [candidate], instances, seconds * 0.25)
    except Exception as error:
        return None, f"compiling it failed: {loaders.reason(error)}"
    kept = candidate.only(found.methods)
    speeds = Speeds(reference=per_row(raced.get("sklearn", {})), compiled=per_row(raced.get("0", {})))
    return _described(kept, found, speeds, [found.reason] if found.reason else []), None


def _raced(
    model: Model, forms: Sequence[Program], instances: Sequence[Any], seconds: float
) -> dict[str, dict[int, float]]:
    """Time scikit-learn (`sklearn`) and the forms (`0`, `1`, …) in turns; nothing where the rows are refused."""
    method = model.signature.default_method
    others = {str(index): model.settled(form, None, None) for index, form in enumerate(forms)}

    def way(of: Model, runtime: Any) -> Any:
        def compute(rows: Rows) -> Any:
            return of.predict_by(runtime, rows, method)

        return compute

    ways = {"sklearn": way(model, "sklearn")} | {name: way(other, "compiled") for name, other in others.items()}
    try:
        return race(ways, sampling.batches(model.signature, instances, (*SIZES, PROBE_ROWS)), seconds=seconds)
    except RequestError:
        return {}


def _memory(body: bytes, model: Model, instances: Sequence[Any], taken: Taken | None) -> Taken | None:
    """Measure what loading a form takes; None where neither it nor the model takes anything that counts."""
    if len(body) < MEASURED_FROM_BYTES and (taken is None or taken.peak_bytes < MEASURED_FROM_BYTES):
        return None
    method = model.signature.default_method
    trial = Trial(model.signature.model_dump_json(), [*instances[:64]], method) if instances else None
    return measure([(PROGRAM_FORMAT, body)], trial=trial)


def _versions() -> dict[str, str]:
    import importlib.metadata

    present = versions.present_versions()
    found = {name: present[name] for name in ("python", "scikit-learn", "numpy") if name in present}
    if "onnxruntime" in sys.modules:
        found["onnxruntime"] = importlib.metadata.version("onnxruntime")
    return found
