"""Which models that came without a compiled form are compiled as they are loaded: trees, where it pays most and takes little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.compiled.program import Program
from app.compiler import compile
from app.compiler.translation import NotCompilable
from app.loaders import reason
from app.reference import parts_of
from app.signature import Signature

MAX_NODES = 200_000  # of all trees together: more would not be translated, nor compared, within the time of a load


def candidate(companions: Sequence[Any], estimator: Any, signature: Signature) -> tuple[Program | None, str | None]:
    """Return a program for a model of trees that nobody has compared to it yet, or None and why there is none.

    It predicts nothing. A load must not fail for want of a compiled form, so neither does this.
    """
    try:
        nodes = count_nodes([*companions, estimator])
        if nodes == 0:
            return None, "it was published without a compiled form, and only trees are compiled as they are loaded"
        if nodes > MAX_NODES:
            return (
                None,
                f"its trees have {nodes:,} nodes, too many to compile them as they are loaded: publish it again",
            )
        return compile.translate(companions, estimator, signature), None
    except NotCompilable as error:
        return None, str(error)
    except Exception as error:
        return None, f"compiling it failed: {reason(error)}"


def count_nodes(values: Sequence[Any]) -> int:
    """Return how many nodes the trees in these fitted objects have together; 0 where there are none."""
    count = 0
    for part in parts_of(list(values)):
        count += int(getattr(getattr(part, "tree_", None), "node_count", 0))
        for stage in getattr(part, "_predictors", ()) or ():
            count += sum(len(predictor.nodes) for predictor in stage if hasattr(predictor, "nodes"))
    return count
