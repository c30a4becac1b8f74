"""The operations that hold others together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, override

from app.compiled.op import Op


@dataclass(frozen=True, eq=False)
class Chain(Op, kind="chain"):
    """One operation after the other."""

    steps: tuple[Op, ...]

    @override
    def run(self, value: Any) -> Any:
        for step in self.steps:
            value = step.run(value)
        return value
