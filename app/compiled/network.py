"""Networks of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, override

import numpy as np

from app.compiled.linear import expit, softmax, sparse_product, two_columns
from app.compiled.op import Op, expect
from app.compiled.values import Sparse
from app.signature import Array

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda values: values,
    "logistic": expit,
    "tanh": np.tanh,
    "relu": lambda values: np.maximum(values, 0),
    "softmax": softmax,
    "exp": np.exp,
}


@dataclass(frozen=True, eq=False)
class Layers(Op, kind="layers"):
    """Products with matrices of shape (inputs, outputs), each followed by a function; gives shape (rows, outputs) or (rows,)."""

    weights: tuple[Array, ...]
    intercepts: tuple[Array, ...]
    hidden: Literal["identity", "logistic", "tanh", "relu"]
    last: Literal["identity", "logistic", "tanh", "relu", "softmax", "exp"]
    flat: bool

    @override
    def check(self) -> None:
        expect(len(self.weights) == len(self.intercepts) > 0, "a layer is not whole")
        for weights, intercepts in zip(self.weights, self.intercepts, strict=True):
            expect(weights.ndim == 2 and intercepts.shape == weights.shape[1:], "a layer does not fit")
        for weights, following in zip(self.weights, self.weights[1:], strict=False):
            expect(weights.shape[1] == len(following), "a layer does not fit the one behind it")
        expect(not self.flat or self.weights[-1].shape[1] == 1, "it has several outputs")

    @override
    def run(self, value: Any) -> Array:
        hidden, last = _ACTIVATIONS[self.hidden], len(self.weights) - 1
        for index, (weights, intercepts) in enumerate(zip(self.weights, self.intercepts, strict=True)):
            value = sparse_product(value, weights.T) if isinstance(value, Sparse) else value @ weights
            value += intercepts
            if index != last:
                value = hidden(value)
        found = _ACTIVATIONS[self.last](value)
        return found.reshape(-1) if self.flat else found


@dataclass(frozen=True, eq=False)
class TwoClasses(Op, kind="two_classes"):
    """Probabilities of two classes from that of the second."""

    second: Op

    @override
    def run(self, value: Any) -> Array:
        return two_columns(self.second.run(value))
