"""What the methods of an estimator begin with: computed once for each, and stored once for all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from app.compiled.op import Op
from app.compiled.steps import Chain


def common(heads: Mapping[str, Op]) -> tuple[tuple[Op, ...], dict[str, Op]]:
    """Return the operations that all heads begin with, the very same objects, and what is left of each head."""
    chains = {method: _flat(head) for method, head in heads.items()}
    shared = tuple(
        steps[0]
        for steps in itertools.takewhile(
            lambda steps: all(step is steps[0] for step in steps), zip(*chains.values(), strict=False)
        )
    )
    return shared, {method: Chain(steps[len(shared) :]) for method, steps in chains.items()}


def _flat(operation: Op) -> tuple[Op, ...]:
    if isinstance(operation, Chain):
        return tuple(itertools.chain.from_iterable(_flat(step) for step in operation.steps))
    return (operation,)
