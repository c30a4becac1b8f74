"""From a fitted estimator behind its companions to a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.compiled.program import Program
from app.compiler import translation
from app.compiler.translation import Flow, NotCompilable
from app.signature import Signature


def translate(companions: Sequence[Any], estimator: Any, signature: Signature) -> Program:
    """Return a program for those methods of the signature that can be compiled. Raises `NotCompilable`."""
    if companions or signature.layout != "matrix":
        raise NotCompilable("what stands before the model has no compiled form")
    heads = translation.predictor(estimator, Flow("matrix", len(signature.inputs)))
    wanted = {method: head for method, head in heads.items() if method in signature.methods}
    if not wanted:
        raise NotCompilable(f"no method of its {type(estimator).__name__} has a compiled form")
    return Program(None, wanted)
