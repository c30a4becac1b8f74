"""How isolation forests judge the lengths of paths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import override

import numpy as np

from app.compiled.op import Op, expect
from app.signature import Array


@dataclass(frozen=True, eq=False)
class PathLengths(Op, kind="path_lengths"):
    """From the sums of path lengths, of shape (rows, 1), to scores of shape (rows,): -(2 ** -(sum / `usual`)), lower for outliers."""

    usual: float

    @override
    def check(self) -> None:
        expect(math.isfinite(self.usual) and self.usual > 0, "a usual path of no length")

    @override
    def run(self, value: Array) -> Array:
        return -(2 ** (-(value[:, 0] / self.usual)))


@dataclass(frozen=True, eq=False)
class Inliers(Op, kind="inliers"):
    """From scores of shape (rows,) to how far they are above `offset`, or, `decided`, to 1 for those that are and -1 for the others."""

    offset: float
    decided: bool

    @override
    def run(self, value: Array) -> Array:
        above = value - self.offset
        return np.where(above < 0, -1, 1) if self.decided else above
