"""What is made of a fitted model: which of its compiled forms is written, proved and measured; or why there is none.

Each form of a program (an operation may have several ways to compute) and scikit-learn itself are timed in turns on the same rows,
and loaded in a process of their own to see what they take. The one that is chosen is proved as it will be stored: written and read.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
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
SMALL_MACHINE_BYTES = 512 * MB
PROCESS_BYTES = 100 * MB  # what a service takes before it has loaded anything
SKLEARN_BYTES = 150 * MB  # what scikit-learn takes, which a model that is compiled altogether does without
MUCH_FASTER = 4.0  # what makes up for more than twice the memory
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


@dataclass(frozen=True, slots=True)
class _Form:
    """One way to compute a program, and what it was measured to take."""

    program: Program
    body: bytes
    seconds: Mapping[int, float]
    taken: Taken | None

    def cost(self, reference: Mapping[int, float], reference_taken: Taken | None) -> float:
        """Return its time as a multiple of scikit-learn's, over the sizes; more where it takes too much memory."""
        sizes = [size for size in WEIGHTS if size in self.seconds and size in reference]
        weight = sum(WEIGHTS[size] for size in sizes) or 1.0
        logarithm = sum(WEIGHTS[size] * math.log(self.seconds[size] / reference[size]) for size in sizes) / weight
        return math.exp(logarithm) * (MUCH_FASTER if self._is_heavy(reference_taken) else 1.0)

    def _is_heavy(self, reference: Taken | None) -> bool:
        if self.taken is None:
            return False
        if self.taken.peak_bytes + PROCESS_BYTES > SMALL_MACHINE_BYTES:
            fits = reference is not None and reference.peak_bytes + PROCESS_BYTES + SKLEARN_BYTES <= SMALL_MACHINE_BYTES
            return fits or reference is None
        return reference is not None and self.taken.resident_bytes > 2 * reference.resident_bytes + SKLEARN_BYTES


def plan(
    model: Model, known: Sequence[Any] = (), *, taken: Taken | None = None, seconds: float = proof.SECONDS
) -> Plan:
    """Compile a model, prove it on `known` instances and around them, and measure it. `taken` is what loading the model takes.

    Whatever goes wrong is the reason of a plan without a program: a version must not fail for want of a compiled form.
    """
    try:
        return _plan(model, known, taken, seconds)
    except NotCompilable as error:
        return Plan(reason=str(error))
    except Exception as error:
        return Plan(reason=f"compiling it failed: {loaders.reason(error)}")


def _plan(model: Model, known: Sequence[Any], taken: Taken | None, seconds: float) -> Plan:
    assert model.reference is not None
    signature = model.signature
    program = compile.translate(model.reference.companions, model.reference.estimator, signature)
    program = program.only(signature.methods)
    if signature.default_method not in program.heads:
        raise NotCompilable(f"its {signature.default_method} has no compiled form")
    missing = [method for method in signature.methods if method not in program.heads]
    instances = [*known] or sampling.instances(signature, SIZES[1])
    bodies = [form.write() for form in variants(program)]
    read = [Program.read(io.BytesIO(body), len(body)) for body in bodies]
    speeds = _raced(model, read, instances, RACE_SECONDS)
    reference = speeds.pop("sklearn", {})
    forms = [
        _Form(form, body, speeds.get(str(index), {}), _memory(body, model, instances, taken))
        for index, (form, body) in enumerate(zip(read, bodies, strict=True))
    ]
    why = "no form of it could be computed"
    for form in sorted(forms, key=lambda form: form.cost(reference, taken)):
        if form.cost(reference, taken) > MUCH_FASTER:
            why = f"its compiled form takes {form.taken.resident_bytes // MB if form.taken else 0} MB, and is not faster for it"
            continue
        found = proof.prove(model, form.program, known, seconds=seconds)
        if signature.default_method not in found.methods:
            why = found.failed.get(signature.default_method, why)
            continue
        kept = form.program.only(found.methods)
        body = form.body if kept.methods == form.program.methods else kept.write()
        reasons = [found.reason] if found.reason else []
        reasons += [f"its {', '.join(missing)} has no compiled form"] if missing else []
        compiled = Compiled(
            format=programs.FORMAT,
            methods=kept.methods,
            operations=kept.operations,
            parity=found.parity,
            rows=found.rows,
            reason="; ".join(reasons) or None,
            microseconds_per_row=Speeds(reference=per_row(reference), compiled=per_row(form.seconds)),
            resident_bytes=form.taken.resident_bytes if form.taken else None,
            peak_bytes=form.taken.peak_bytes if form.taken else None,
            compiled_with=_versions(),
        )
        return Plan(body, compiled)
    return Plan(reason=why)


def variants(program: Program) -> list[Program]:
    """Return a program in each of the ways in which it may compute: an operation's `variants()` are what could stand in its place."""
    first = [operation for operation in op.within((program.body, program.heads)) if hasattr(operation, "variants")]
    count = max((len(_variants(operation)) for operation in first), default=0)
    if count == 0:
        return [program]

    def chosen(index: int) -> Program:
        def change(operation: Op) -> Op:
            others = _variants(operation) if hasattr(operation, "variants") else ()
            return others[min(index, len(others) - 1)] if others else operation

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
        found = proof.prove(model, candidate, known, seconds=seconds * 0.75, rows=1500)
        if model.signature.default_method not in found.methods:
            return None, found.failed.get(model.signature.default_method, "it has no form that computes")
        instances = [*known] or sampling.instances(model.signature, SIZES[1])
        speeds = _raced(model, [candidate], instances, seconds * 0.25)
    except Exception as error:
        return None, f"compiling it failed: {loaders.reason(error)}"
    kept = candidate.only(found.methods)
    return Compiled(
        format=programs.FORMAT,
        methods=kept.methods,
        operations=kept.operations,
        parity=found.parity,
        rows=found.rows,
        reason=found.reason,
        microseconds_per_row=Speeds(
            reference=per_row(speeds.get("sklearn", {})), compiled=per_row(speeds.get("0", {}))
        ),
        compiled_with=_versions(),
    ), None


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
