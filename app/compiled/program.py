"""A compiled model: for each method one operation from validated rows to a prediction."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.compiled import container, op
from app.compiled.op import Op
from app.compiled.values import Table
from app.errors import LoadFailed
from app.signature import Array, Rows

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Program:
    """What computes instead of scikit-learn: the common beginning of all methods, then an operation for each of them.

    `body` takes a matrix of shape (rows, columns), or a `Table` where the columns are of several kinds, or the array of texts or
    records of shape (rows,). A head gives an array whose first axis is the row, or a tuple of those.
    """

    body: Op | None
    heads: Mapping[str, Op]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that it computes."""
        return tuple(self.heads)

    @property
    def operations(self) -> tuple[str, ...]:
        """The kinds of operations that it is made of."""
        return tuple(sorted({operation.kind for operation in op.within((self.body, self.heads))}))

    def only(self, methods: Iterable[str]) -> Program:
        """Return the program for these of its methods only."""
        return Program(self.body, {method: self.heads[method] for method in methods if method in self.heads})

    def run(self, rows: Rows, method: str) -> Any:
        """Compute `method` for the rows. Raises `ValueError` as scikit-learn would for input that it refuses."""
        return _quiet.context.run(self._run, rows, method)

    def _run(self, rows: Rows, method: str) -> Any:
        value = input_of(rows)
        if self.body is not None:
            value = self.body.run(value)
        return self.heads[method].run(value)

    def check(self) -> None:
        """Let every operation check itself, and make what it computes with. Raises `LoadFailed`. `read` has done so."""
        for operation in op.within((self.body, dict(self.heads))):
            operation.check()

    def write(self) -> bytes:
        """Return the program as it is stored."""
        arrays: dict[str, Array] = {}
        document = {
            "format": FORMAT,
            "body": op.encode(self.body, arrays),
            "heads": {method: op.encode(head, arrays) for method, head in self.heads.items()},
        }
        return container.write(document, arrays)

    @classmethod
    def read(cls, stream: container.Readable, size: int, look: Callable[[int], None] = lambda _: None) -> Program:
        """Read a program of `size` bytes. Raises `LoadFailed` when it is none, and what `look` raises.

        `look` is called now and then, with the bytes that are about to be taken: it stops what takes too many.
        """
        from app.compiled import operations  # noqa: F401 - every operation that a file may name

        document, arrays = container.read(stream, size, look)
        if type(document) is not dict or document.keys() != {"format", "body", "heads"}:
            raise LoadFailed("is not a compiled model: it does not say what to compute")
        if document["format"] != FORMAT:
            raise LoadFailed(f"is a compiled model of format {document['format']!r:.20}, this release reads {FORMAT}")
        heads = document["heads"]
        if type(heads) is not dict or not heads:
            raise LoadFailed("is not a compiled model: it has no methods")
        body = None if document["body"] is None else op.decode(document["body"], arrays, look)
        return cls(body, {method: op.decode(head, arrays, look) for method, head in heads.items()})


class _Quiet(threading.local):
    """A context for each thread in which numpy is silent: made once, where `np.errstate` would cost each run a microsecond."""

    def __init__(self) -> None:
        self.context = contextvars.copy_context()
        self.context.run(np.seterr, all="ignore")


_quiet = _Quiet()


def input_of(rows: Rows) -> Array | Table:
    """Return rows as a program takes them."""
    if rows.matrix is not None:
        return rows.matrix
    if rows.signature.layout in ("text", "records"):
        return rows.columns[0]
    return Table(rows.count, rows.columns)


def unknown(operations: Iterable[str]) -> tuple[str, ...]:
    """Return those of the kinds of operations that this release does not know."""
    from app.compiled import operations as every  # noqa: F401 - importing it declares them

    return tuple(sorted({*operations} - op.kinds()))
