"""A loaded model: immutable, synchronous, and the same answer for the same rows whoever asks.

What a model is (its signature, its golden rows, where it came from) is here; what computes is a runtime: scikit-learn itself
(`reference.py`), a compiled program (`compiled/`), or both. It knows nothing of requests, queues or storage.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import numpy as np

from app import inspection, loaders, memory, versions
from app.bundle import Bundle, Part
from app.compiled.program import Program
from app.errors import (
    BundleError,
    CompanionFailed,
    CompiledUnreadable,
    InvalidInput,
    LoadFailed,
    NoRoom,
    PredictionFailed,
    RequestError,
    TooLarge,
    Violation,
)
from app.manifest import CHUNK_BYTES, COMPILED, MAX_REASON, Compiled, Golden
from app.names import ModelRef, shortened
from app.prediction import Prediction, compare, normalised, part_of, wire
from app.reference import Reference, holds_own_code, use_one_thread
from app.signature import MAX_VIOLATIONS, Rows, Signature, show, step_of

__all__ = [
    "LoadReport",
    "Model",
    "Prediction",
    "Source",
    "compare",
    "holds_own_code",
    "part_of",
    "use_one_thread",
    "wire",
]

RuntimeName = Literal["sklearn", "compiled"]

_MISSING_FAULT = re.compile(r"contains NaN|with NaN")
_SIZE_FAULT = re.compile(r"contains infinity|value too large")
_OTHER_FAULT = re.compile(
    r"[Ff]ound unknown categor|could not convert string to float|is an invalid document"
    r"|Negative values in data|must be non-negative|strictly positive data"
    r"|out of bounds for axis \d"  # the number of a category that training never had
)
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)  # trees compute in float32


@dataclass(frozen=True, slots=True)
class Source:
    """Where a part of a model came from.

    `sha256` was found in the bytes that were read, or, where each of their chunks was checked, is what the manifest says.
    """

    role: str
    key: str
    etag: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading took and told: seconds by phase, the memory it took (measured, so approximate), warnings.

    `sealed_by` is the name or id of the trusted key that sealed it.
    """

    sources: tuple[Source, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    taken: memory.Taken | None = None
    warnings: tuple[str, ...] = ()
    trained_with: dict[str, str] = field(default_factory=dict)
    sealed_by: str | None = None


class Runtime(Protocol):
    """What computes: `Reference`, or the `Program` behind `_Compiled`."""

    def run(self, rows: Rows, method: str) -> Prediction:
        """Compute `method` for the rows. Raises whatever goes wrong."""
        ...


@dataclass(frozen=True, slots=True)
class _Compiled:
    program: Program

    def run(self, rows: Rows, method: str) -> Prediction:
        result = self.program.run(rows, method)
        if (
            type(result) is np.ndarray
            and result.dtype == np.float64
            and len(result) == rows.count
            and result.flags.c_contiguous
        ):
            return result  # as most are, and looking further takes as long as a row
        return normalised(result, rows.count)


class Model:
    """What computes, with its signature: a fitted estimator behind its companions, its compiled form, or both.

    Safe to share: nothing changes after it is made. Without an `estimator`, the program must have every method of the
    signature. With both, a method that the program has goes to whichever was faster at the number of rows, as `compiled` says.

    `compiled` is what is known of the program, `not_compiled` why there is none, or none for some methods. A `candidate` is a
    program that nobody has compared to the estimator yet: it computes nothing until `settled`.
    """

    def __init__(
        self,
        ref: ModelRef,
        signature: Signature,
        estimator: Any = None,
        companions: Sequence[Any] = (),
        *,
        program: Program | None = None,
        candidate: Program | None = None,
        compiled: Compiled | None = None,
        not_compiled: str | None = None,
        golden: Golden | None = None,
        report: LoadReport | None = None,
    ) -> None:
        reference = Reference(signature, estimator, companions) if estimator is not None else None
        self._put(ref, signature, reference, program, compiled, not_compiled, golden, report or LoadReport())
        self.candidate = candidate

    candidate: Program | None = None

    def _put(
        self,
        ref: ModelRef,
        signature: Signature,
        reference: Reference | None,
        program: Program | None,
        compiled: Compiled | None,
        not_compiled: str | None,
        golden: Golden | None,
        report: LoadReport,
    ) -> None:
        assert reference is not None or (program is not None and {*signature.methods} <= {*program.methods})
        self.ref = ref
        self.signature = signature
        self.golden = golden
        self.report = report
        self.reference = reference
        self.program = program
        self.compiled = compiled
        self.not_compiled = None if not_compiled is None else shortened(not_compiled, MAX_REASON)
        self.runtimes: Mapping[RuntimeName, Runtime] = {
            **({"compiled": _Compiled(program)} if program is not None else {}),
            **({"sklearn": reference} if reference is not None else {}),
        }
        self._switches = _switches(program is not None, reference is not None, compiled)

    @property
    def estimator(self) -> Any:
        """The fitted object; None where only its compiled form was loaded."""
        return self.reference.estimator if self.reference is not None else None

    @property
    def runtime(self) -> str:
        """What computes: `sklearn`, `compiled` or `compiled+sklearn`."""
        return "+".join(self.runtimes)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Model:
        """Read a bundle's parts and put them together. Runs in a thread of its own, not on the event loop; predicts nothing.

        Raises `LoadFailed`, `NoRoom`, `DigestMismatch`, `CompanionFailed`, `VersionMismatch`, `UnusableModel`,
        `CompiledUnreadable` when only the compiled form is what cannot be read, or what the storage raises.
        """
        memory.map_chunks_apart(CHUNK_BYTES)
        counted_anew = memory.reset_peak()
        started, resident = time.perf_counter(), memory.resident_bytes()
        read = [_read(bundle, part) for part in bundle.parts if part.role != COMPILED]
        compiled = [_read_compiled(bundle, part) for part in bundle.parts if part.role == COMPILED]
        sources = tuple(source for _, source in (*read, *compiled))
        parts = [loaded for loaded, _ in read]
        manifest = bundle.manifest
        values = [loaded.value for loaded in parts]
        told = [*bundle.warnings, *(warning for loaded in parts for warning in loaded.warnings)]
        written_by = next((loaded.trained_version for loaded in parts if loaded.trained_version), None)
        trained_with = {"scikit-learn": written_by} if written_by else {}
        if manifest is None:
            told += versions.check(trained_with, str(bundle.ref), policy=bundle.trust.version_policy)
        *companions, estimator = values or [None]
        signature = manifest.signature if manifest else inspection.infer(companions, estimator)
        if manifest is None and holds_own_code(values):  # no golden rows have shown that it may be batched
            signature = signature.model_copy(update={"rowwise": False})
        read_in = time.perf_counter() - started
        candidate, not_compiled = None, bundle.not_compiled
        if bundle.compiles:
            candidate, not_compiled = _translated(companions, estimator, signature)
        seconds = {"load": read_in} | ({"compile": time.perf_counter() - started - read_in} if bundle.compiles else {})
        peak = memory.peak_bytes() - resident if counted_anew else 0
        memory.trim_heap()
        gained = max(0, memory.resident_bytes() - resident)
        report = LoadReport(
            sources=sources,
            seconds=seconds,
            taken=memory.Taken(gained, max(gained, peak)),
            warnings=tuple(dict.fromkeys(told)),
            trained_with=dict(manifest.trained_with) if manifest and manifest.trained_with else trained_with,
            sealed_by=bundle.sealed_by,
        )
        return cls(
            bundle.ref,
            signature,
            estimator,
            companions,
            program=compiled[0][0] if compiled else None,
            candidate=candidate,
            compiled=manifest.compiled if manifest and compiled else None,
            not_compiled=not_compiled,
            golden=manifest.golden if manifest else None,
            report=report,
        )

    def settled(self, program: Program | None, compiled: Compiled | None, not_compiled: str | None) -> Self:
        """Return this model with a program in use that was found equal to its estimator, or with none, and why."""
        other = object.__new__(type(self))
        other._put(self.ref, self.signature, self.reference, program, compiled, not_compiled, self.golden, self.report)
        return other

    def predict(self, rows: Rows, method: str) -> Prediction:
        """Compute `method` (one of the signature's) for the rows; the first axis of what returns is the row.

        Raises `InvalidInput` where the estimator refuses a value, `PredictionFailed` for anything else that it raises.
        """
        return self.predict_by(self._faster(rows.count, method), rows, method)

    def predict_by(self, runtime: RuntimeName, rows: Rows, method: str) -> Prediction:
        """Compute as `predict` does, by the runtime that is named. Raises the same errors, whichever it is."""
        try:
            return self.runtimes[runtime].run(rows, method)
        except RequestError:
            raise
        except (ValueError, IndexError) as error:
            message = " ".join(str(error).splitlines()[:1])
            if _MISSING_FAULT.search(message):
                violations = _cells(rows, _is_missing, "a value: this model takes no null")
            elif _SIZE_FAULT.search(message):
                violations = _cells(rows, _is_too_large, f"at most {_LARGEST_FLOAT32:.7g}, the largest float32")
            elif _OTHER_FAULT.search(message):
                violations = []
            else:
                raise _failure(rows, error) from error
            raise InvalidInput(f"the model cannot take this input: {loaders.reason(message)}", violations) from error
        except Exception as error:  # any class may come out of an estimator; the caller is told nothing of it
            raise _failure(rows, error) from error

    def _faster(self, count: int, method: str) -> RuntimeName:
        """Return the runtime that was measured to be faster for so many rows, among those that have the method."""
        if self.program is not None and method not in self.program.heads:
            return "sklearn"
        name = self._switches[0][1]
        for rows, better in self._switches[1:]:
            if count < rows:
                break
            name = better
        return name

    def check(self) -> float | None:
        """Run the golden rows, and return the largest relative difference from what was recorded; None without any.

        Whatever may serve a method computes it. Raises `GoldenMismatch`. This is also the warm-up.
        """
        if self.golden is None:
            return None
        rows = self.signature.validate(self.golden.instances)
        worst = 0.0
        for method, recorded in self.golden.outputs.items():
            for runtime in self.runtimes_for(method):
                answer = wire(self.predict_by(runtime, rows, method))
                label = f"{self.ref}" if runtime == "sklearn" else f"{self.ref}: its compiled form"
                worst = max(worst, compare(label, method, recorded, answer))
        return worst

    def runtimes_for(self, method: str) -> tuple[RuntimeName, ...]:
        """Return the runtimes that have a method."""
        return tuple(
            name
            for name in self.runtimes
            if name == "sklearn" or (self.program is not None and method in self.program.heads)
        )

    def predict_directly(self, examples: Any, method: str) -> Prediction:
        """Compute `method` for examples as they are (a DataFrame, an array, a list), as their owner would.

        Raises `PredictionFailed` for whatever the estimator raises.
        """
        assert self.reference is not None
        try:
            return self.reference.compute(examples, len(examples), method)
        except Exception as error:
            raise PredictionFailed("the estimator cannot compute them") from error


def _switches(program: bool, reference: bool, compiled: Compiled | None) -> tuple[tuple[int, RuntimeName], ...]:
    """Return from how many rows on which runtime is taken, the least first, from what was measured of both."""
    if not (program and reference):
        return ((0, "compiled" if program else "sklearn"),)
    faster = compiled.faster_from() if compiled is not None else [(1, True)]
    return tuple((rows, "compiled" if is_compiled else "sklearn") for rows, is_compiled in faster)


def _read(bundle: Bundle, part: Part) -> tuple[loaders.Loaded, Source]:
    """Read one part, to the last byte. Nothing of its stream is left in memory afterwards."""
    label = f"{bundle.ref} {part.info.key.rpartition('/')[2]}"
    trained_with = bundle.manifest.trained_with if bundle.manifest else {}
    trust = bundle.trust
    most = trust.bytes_for(part.info.size)
    with bundle.open(part) as stream:
        try:
            loaded = loaders.load(
                part.format,
                memory.Watched(stream, label, limit_bytes=trust.memory_limit_bytes),
                label,
                trusted=trust.types,
                max_bytes=most,
                trained_with=trained_with,
            )
            sha256 = stream.finish()
        except NoRoom:
            raise
        except BundleError as error:
            if isinstance(error, TooLarge) and most < trust.most_for(part.info.size):
                raise NoRoom(str(error)) from error  # it is the memory that is too small, not the file too large
            if part.role == "model":
                raise
            if isinstance(error, LoadFailed) and part.artifact is None:
                stream.finish()  # or were its bytes altered on their way? Then nothing is wrong with the companion
            raise CompanionFailed(f"{part.role} is broken: {error}") from error
    return loaded, Source(part.role, part.info.key, part.info.etag, sha256, part.info.size)


def _read_compiled(bundle: Bundle, part: Part) -> tuple[Program, Source]:
    """Read the compiled form, to the last byte. Raises `CompiledUnreadable` when these right bytes are none for this release."""
    label = f"{bundle.ref} {part.info.key.rpartition('/')[2]}"
    with bundle.open(part) as stream:
        try:
            watched = memory.Watched(stream, label, limit_bytes=bundle.trust.memory_limit_bytes)
            program = Program.read(watched, part.info.size, watched.look)
        except LoadFailed as error:
            stream.finish()  # or were its bytes altered on their way?
            raise CompiledUnreadable(f"{label}: {error}") from error
        sha256 = stream.finish()
    methods = bundle.manifest.compiled.methods if bundle.manifest and bundle.manifest.compiled else ()
    if not {*methods} <= {*program.methods}:
        raise CompiledUnreadable(f"{label}: has not the methods that the manifest says: {', '.join(methods)}")
    return program, Source(part.role, part.info.key, part.info.etag, sha256, part.info.size)


def _translated(companions: Sequence[Any], estimator: Any, signature: Signature) -> tuple[Program | None, str | None]:
    """Compile a model that came without a compiled form, if it is of the kind that is worth it; or say why not."""
    from app.compiler import candidates

    return candidates.candidate(companions, estimator, signature)


_GENERIC = "the model could not compute this input; the service's log says why"


def _failure(rows: Rows, error: Exception) -> RequestError:
    """Return whose fault it is: the caller's, where values of a kind that nothing tells to be right were not taken."""
    if rows.guessed and isinstance(error, (TypeError, ValueError, AttributeError, ArithmeticError, LookupError)):
        return InvalidInput(
            "the model cannot take these values, and nothing tells what its columns hold: publish it with --examples"
        )
    return PredictionFailed(_GENERIC)


def _is_missing(value: Any) -> bool:
    return value is None or value != value


def _is_too_large(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) > _LARGEST_FLOAT32


def _cells(rows: Rows, is_at_fault: Callable[[Any], bool], expected: str) -> list[Violation]:
    """Return the values of the rows that are at fault."""
    if rows.signature.layout not in ("matrix", "frame"):
        return []
    specs = rows.signature.inputs
    found = []
    for index, row in enumerate(rows.array().tolist()):
        for position, value in enumerate(row):
            if is_at_fault(value):
                step = step_of(specs[position].name) if rows.signature.layout == "frame" else f"[{position}]"
                found.append(Violation(f"instances[{index}]{step}", expected, show(inspection.plain_value(value))))
                if len(found) == MAX_VIOLATIONS:
                    return found
    return found
