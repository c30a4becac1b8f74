"""Whether a program gives scikit-learn's answers: shown on golden rows, and on thousands drawn around them.

Labels must be identical, numbers equal to 1e-9 relative in float64, and what one of the two refuses the other must refuse. All
rows go through the signature, as a request's do. It is deterministic but for the time that it may take.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.compiled.program import Program
from app.compiler import drawing
from app.errors import InvalidInput, RequestError, RequestTooLarge
from app.model import Model, RuntimeName
from app.prediction import Prediction, part_of
from app.signature import Array, Rows

TOLERANCE = 1e-9  # relative
FLOOR = 1e-3  # of the magnitude of a column: what is smaller is held against that; 1e-12 of it is the smallest difference told
ROWS = 4000
SECONDS = 5.0  # what is compared is as much as is expected to take so long
LIMIT_SECONDS = 30.0  # for whoever publishes: by luck, on a busy machine, nothing may be left without a compiled form
PATIENCE = 4
MIN_ROWS = 200  # where fewer can be compared in the time, nothing is proved
MOST = 1000  # rows in a batch
FEW = (7, 64)  # rows in a batch: of each kind one is computed
ALONE = 10  # rows of each kind that are computed one by one, as many as there is time for
REFUSED = 60  # rows of each kind: when so many were refused by both, no further batch is taken apart to find more
LOOKED_AT = 30  # rows of a batch that differ: more are not worth a second look


@dataclass(frozen=True, slots=True)
class Proof:
    """The methods that were found equal, the largest relative difference in them, how many rows were compared; why not others."""

    methods: tuple[str, ...]
    parity: float
    rows: int
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str | None:
        """Why methods are missing, in one sentence."""
        return "; ".join(self.failed.values()) or None


def prove(
    model: Model,
    program: Program,
    known: Sequence[Any] = (),
    *,
    seconds: float = SECONDS,
    limit: float | None = None,
    rows: int = ROWS,
    remedy: str = "",
) -> Proof:
    """Compare a program to the estimator of `model`, on `known` instances, the golden rows, and rows drawn around them.

    As many rows are compared as are expected to take `seconds`. It computes for at most about `limit`, which is the same unless
    it is given (on a busy machine that takes longer, `PATIENCE` times that at most); what could not be compared by then is not
    proved, and the reason ends with `remedy`.
    """
    return _Trial(model, program, seconds, seconds if limit is None else limit, remedy).run(known, rows)


class _Differs(Exception):
    """The end of a sentence that begins with "its"."""


class _OutOfTime(Exception):
    pass


class _Trial:
    def __init__(self, model: Model, program: Program, seconds: float, limit: float, remedy: str) -> None:
        self._model = model.settled(program, None, None)
        self._methods = [method for method in model.signature.methods if method in program.heads]
        self._started = time.perf_counter()
        self._computed_before = time.thread_time()
        self._seconds = seconds
        self._limit = limit
        self._remedy = remedy
        self._worst: dict[str, float] = dict.fromkeys(self._methods, 0.0)
        self._magnitudes: dict[str, list[Array]] = {}
        self._failed: dict[str, str] = {}
        self._refused: set[int] = set()  # the identities of the rows of one kind that both refuse
        self._skipped = 0

    def run(self, known: Sequence[Any], rows: int) -> Proof:
        signature, reference = self._model.signature, self._model.reference
        assert reference is not None
        golden = self._model.golden.instances if self._model.golden else []
        known = [*golden, *known]
        compared = 0
        try:
            # The same rows are drawn whatever the time; where that is short, fewer of each kind are compared.
            samples = drawing.samples(signature, reference, known, rows=rows)
            drawn = sum(len(sample.instances) for sample in samples)
            share = self._affordable(samples[0].instances if samples else [], rows) / max(1, min(rows, drawn))
            for sample in samples:
                count = max(len(golden), FEW[0], math.ceil(share * len(sample.instances)))
                instances = [instance for instance in sample.instances[:count] if drawing.is_writable(instance)]
                whole = self._validated(instances)
                if whole is None:
                    instances = [one for one in instances if self._validated([one]) is not None]
                    whole = self._validated(instances)
                if whole is None:
                    continue
                compared += whole.count
                self._refused.clear()
                passing = [method for method in self._methods if method not in self._failed]
                for method in passing:
                    # What is computed for a few rows does not depend on the method, so the kinds of rows share them.
                    few = method == passing[samples.index(sample) % len(passing)]
                    self._compare_all(method, instances, sample.name, few, self._seconds / len(samples) / 4)
        except _OutOfTime:
            why = f"could not be compared to scikit-learn's within {self._limit:.2g} s{self._remedy}"
            self._failed |= {method: f"its {method} {why}" for method in self._methods if method not in self._failed}
        compared -= self._skipped
        if compared < min(MIN_ROWS, rows):
            why = f"could be compared to scikit-learn's on {compared} rows only"
            self._failed |= {method: f"its {method} {why}" for method in self._methods if method not in self._failed}
        passed = tuple(method for method in self._methods if method not in self._failed)
        return Proof(passed, max((self._worst[method] for method in passed), default=0.0), compared, self._failed)

    def _affordable(self, instances: list[Any], rows: int) -> int:
        """Return how many rows the reference can compute in about half of the time."""
        trial = self._validated(instances[:64])
        if trial is None or not self._methods:
            return rows
        started = time.thread_time()
        self._outcome("sklearn", trial, self._methods[0])
        took = (time.thread_time() - started) / trial.count * len(self._methods)
        left = self._seconds - self._spent()
        return int(max(MIN_ROWS, min(rows, left / 4 / max(took, 1e-9))))

    def _spent(self) -> float:
        """Return the seconds that were computed, or the share of patience that is used up where that is more."""
        return max(time.thread_time() - self._computed_before, (time.perf_counter() - self._started) / PATIENCE)

    def _validated(self, instances: list[Any]) -> Rows | None:
        try:
            return self._model.signature.validate(instances)
        except RequestError:
            return None

    def _compare_all(self, method: str, instances: list[Any], name: str, few: bool, seconds: float) -> None:
        """Compare a method on one kind of rows, with `few` in small batches, too. What differs is put down as the reason."""
        refused = [instance for instance in instances if id(instance) in self._refused]
        if refused:  # by another method, so most likely by this one as well, and each would break up a batch
            instances = [instance for instance in instances if id(instance) not in self._refused]
        try:
            scale: list[Array] = []
            for instance in refused[:3]:
                self._compare(method, [instance], name, scale)
            for start in range(0, len(instances), MOST):
                scale = self._compare(method, instances[start : start + MOST], name, scale)
            if not few:
                return
            for size in FEW if instances else ():
                self._compare(method, instances[-size:], name, scale)
            stop = self._spent() + seconds
            for index in range(min(len(instances), ALONE)):
                self._compare(method, instances[index : index + 1], name, scale)
                if self._spent() > stop:
                    break
        except _Differs as error:
            self._failed[method] = f"its {method} {error} ({name})"

    def _compare(self, method: str, instances: list[Any], name: str, scale: list[Array]) -> list[Array]:
        """Compare one batch, or its halves where it was refused; return the magnitude of each column of the answer."""
        if self._spent() > self._limit:
            raise _OutOfTime
        rows = self._model.signature.validate(instances)
        expected, found = (self._outcome(runtime, rows, method) for runtime in ("sklearn", "compiled"))
        if isinstance(expected, Exception) or isinstance(found, Exception):
            if len(instances) > 1 and (self._model.signature.rowwise or isinstance(expected, RequestTooLarge)):
                if len(self._refused) > REFUSED and isinstance(expected, Exception) and isinstance(found, Exception):
                    self._skipped += len(instances)
                    return scale
                half = len(instances) // 2
                scale = self._compare(method, instances[:half], name, scale)
                return self._compare(method, instances[half:], name, scale)
            _check_refusals(expected, found)
            self._refused.update(map(id, instances))
            return scale
        outputs = _outputs(expected), _outputs(found)
        if len(outputs[0]) != len(outputs[1]):
            raise _Differs(f"gives {len(outputs[1])} arrays, where scikit-learn gives {len(outputs[0])}")
        known = self._magnitudes.get(method, [])
        scales = [
            _magnitude(output, earlier)
            for output, earlier in zip(outputs[0], _beside(outputs[0], scale, known), strict=True)
        ]
        self._magnitudes.setdefault(method, scales)
        for index, (left, right) in enumerate(zip(*outputs, strict=True)):
            wrong, worst = differences(left, right, scales[index])
            if wrong.any():
                self._look_again(method, instances, wrong, found, expected, scales)
            else:
                self._worst[method] = max(self._worst[method], worst)
        return scales

    def _look_again(
        self,
        method: str,
        instances: list[Any],
        wrong: Array,
        found: Prediction,
        expected: Prediction,
        scales: list[Array],
    ) -> None:
        """Raise unless scikit-learn itself answers these rows alone as the program does: then it depends on the batch."""
        places = np.flatnonzero(wrong)
        for place in places[:LOOKED_AT].tolist():
            alone = self._outcome("sklearn", self._model.signature.validate([instances[place]]), method)
            given, wanted = part_of(found, place, place + 1), part_of(expected, place, place + 1)
            forgiven = (
                self._model.signature.rowwise
                and len(instances) > 1
                and len(places) <= LOOKED_AT
                and not isinstance(alone, Exception)
                and not any(
                    differences(left, right, scale)[0].any()
                    for left, right, scale in zip(_outputs(alone), _outputs(given), scales, strict=True)
                )
            )
            if not forgiven:
                raise _Differs(_told(_outputs(wanted), _outputs(given), scales))

    def _outcome(self, runtime: RuntimeName, rows: Rows, method: str) -> Prediction | RequestError:
        try:
            return self._model.predict_by(runtime, rows, method)
        except RequestError as error:
            return error


def _check_refusals(expected: Prediction | RequestError, found: Prediction | RequestError) -> None:
    if not isinstance(expected, RequestError):
        cause = found.__cause__ if isinstance(found, RequestError) else None
        raise _Differs(f"refuses a row that scikit-learn takes ({cause!s:.100})")
    if not isinstance(found, RequestError):
        raise _Differs(f"takes a row that scikit-learn refuses ({expected.__cause__!s:.100})")
    places = [
        [violation.path for violation in error.violations] if isinstance(error, InvalidInput) else None
        for error in (expected, found)
    ]
    if type(expected) is not type(found) or places[0] != places[1]:
        raise _Differs(
            f"refuses a row for another reason ({found.__cause__!s:.100}) than scikit-learn ({expected.__cause__!s:.100})"
        )


def _outputs(prediction: Prediction) -> tuple[Array, ...]:
    return prediction if isinstance(prediction, tuple) else (prediction,)


def _beside(outputs: tuple[Array, ...], scale: list[Array], known: list[Array]) -> list[list[Array]]:
    """Return for each output the magnitudes that are known of it already."""
    return [[earlier[index] for earlier in (scale, known) if index < len(earlier)] for index, _ in enumerate(outputs)]


def _magnitude(output: Array, earlier: list[Array]) -> Array:
    """Return the largest finite magnitude of each column, in this batch and before; zeros where it is not of numbers."""
    if output.dtype.kind != "f":
        return np.zeros(output.shape[1:])
    largest = np.abs(np.where(np.isfinite(output), output, 0.0)).max(axis=0, initial=0.0)
    for other in earlier:
        if other.shape == largest.shape:
            largest = np.maximum(largest, other)
    return np.asarray(largest)


def differences(expected: Array, found: Array, magnitude: Array) -> tuple[Array, float]:
    """Return which rows differ, and the largest relative difference in the others.

    A difference is relative to the expected value, or to a thousandth of the column's `magnitude` where that is more.
    """
    rows = len(expected)
    if expected.shape != found.shape or _kind(expected) != _kind(found):
        return np.ones(rows, dtype=bool), 0.0
    if expected.dtype.kind != "f":
        if _kind(expected) == "O":
            pairs = zip(expected.tolist(), found.tolist(), strict=True)
            return np.array([not _same(left, right) for left, right in pairs], dtype=bool), 0.0
        return (expected != found).reshape(rows, -1).any(axis=1), 0.0
    with np.errstate(all="ignore"):
        off = np.abs(expected - found) / np.maximum(np.abs(expected), FLOOR * magnitude)
    same = (expected == found) | (np.isnan(expected) & np.isnan(found))
    off = np.where(same, 0.0, np.where(np.isfinite(off), off, np.inf)).reshape(rows, -1)
    wrong = (off > TOLERANCE).any(axis=1)
    return wrong, float(off[~wrong].max(initial=0.0))


def _kind(array: Array) -> str:
    """Return what an array holds, as the wire tells it apart: text is text, in an array of its own dtype or of objects."""
    return {"u": "i", "U": "O"}.get(array.dtype.kind, array.dtype.kind)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right) and (left == right or (left != left and right != right))


def _told(wanted: tuple[Array, ...], given: tuple[Array, ...], scales: list[Array]) -> str:
    for left, right, scale in zip(wanted, given, scales, strict=True):
        if left.shape != right.shape or _kind(left) != _kind(right):
            return (
                f"gives an array of {right.dtype} with shape {right.shape[1:]} a row, "
                f"scikit-learn one of {left.dtype} with {left.shape[1:]}"
            )
        if left.dtype.kind == "f":
            with np.errstate(all="ignore"):
                off = np.abs(left - right) / np.maximum(np.abs(left), FLOOR * scale)
            strange = ~np.isfinite(left) | ~np.isfinite(right)
            if (odd := np.argwhere(strange & (left != right) & ~(np.isnan(left) & np.isnan(right)))).size:
                place = tuple(odd[0])
                return f"gives {right[place]:.6g} where scikit-learn gives {left[place]:.6g}"
            largest = float(np.where(strange, 0.0, off).max(initial=0.0))
            if largest > TOLERANCE:
                return f"differs from scikit-learn's by {largest:.1g}"
        elif not _same(left.tolist(), right.tolist()):
            return f"says {right.tolist()[0]!r:.40} where scikit-learn says {left.tolist()[0]!r:.40}"
    return "differs from scikit-learn's"
