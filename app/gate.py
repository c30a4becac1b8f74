"""The gate that a loaded model passes before it serves: its golden rows come out, and what it costs is known.

What a gate finds is plain data, so it may be run in a process that is thrown away afterwards: `settle` then gives the model that
serves, without a single prediction where the gate was not.
"""

from __future__ import annotations

import time

from pydantic import BaseModel, ConfigDict

from app import loaders, sampling
from app.errors import RequestError
from app.manifest import Compiled
from app.model import Model, holds_own_code
from app.timing import PROBE_ROWS, SIZES, race

COST_SECONDS = 0.3
COMPILE_SECONDS = 1.0  # for a model that came without a compiled form: translation, comparison and measurement together


class Gate(BaseModel):
    """What was found. `model_dump(mode="json")` and `model_validate` take it from one process to another.

    `parity` is how far the golden rows were off, None without any. `costs` are seconds per batch of the default method, by its
    number of rows (1, 64 and 1,000, but for sizes that would have taken too long); None where the model refused the rows that were
    made up for it. `compiled` is set where a candidate was found equal to its estimator, `not_compiled` where it was not.
    """

    model_config = ConfigDict(frozen=True)

    parity: float | None = None
    costs: dict[int, float] | None = None
    compiled: Compiled | None = None
    not_compiled: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


def gate(model: Model) -> Gate:
    """Run the golden rows on all that may serve, prove a candidate, and measure what batches cost.

    Raises `GoldenMismatch`, or the `RequestError` by which the golden rows were refused.
    """
    started = time.perf_counter()
    parity = model.check()
    compiled, not_compiled = None, None
    if model.candidate is not None:
        from app.compiler import planner

        left = COMPILE_SECONDS - model.report.seconds.get("compile", 0.0)
        with loaders.listening():  # what the libraries warn of is about rows that nobody sent
            compiled, not_compiled = planner.prove_candidate(model, model.candidate, seconds=left)
        serving = settle(model, Gate(compiled=compiled, not_compiled=not_compiled))
    else:
        serving = model
    return Gate(
        parity=parity,
        costs=costs(serving),
        compiled=compiled,
        not_compiled=not_compiled,
        seconds=time.perf_counter() - started,
    )


def settle(model: Model, found: Gate) -> Model:
    """Return the model that serves after this gate: with its candidate in use, or without it and with the reason."""
    if model.candidate is None:
        return model
    program = model.candidate.only(found.compiled.methods) if found.compiled else None
    if program is not None:
        program.check()
    return model.settled(program, found.compiled, found.not_compiled)


def costs(model: Model, *, seconds: float = COST_SECONDS) -> dict[int, float] | None:
    """Return the seconds that batches of the default method take, by their number of rows; None if it refuses the rows.

    It is None of somebody's own code, too: that may do anything with rows that nobody sent, and what it takes for those says
    nothing of what it takes for others.
    """
    method = model.signature.default_method
    reference = model.reference
    if reference is not None and holds_own_code([*reference.companions, reference.estimator]):
        return None
    known = model.golden.instances if model.golden else sampling.instances(model.signature, SIZES[1])
    try:
        made = sampling.batches(model.signature, known, (*SIZES, PROBE_ROWS))
        found = race({"": lambda rows: model.predict(rows, method)}, made, seconds=seconds) if made else {}
    except RequestError:
        return None
    return found.get("")
