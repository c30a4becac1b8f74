"""Small models for the tests of the wire and of stopping. The service under test can import this module."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import numpy as np

GATE = threading.Event()  # open: `Waits` answers


class Sum:
    """Three numbers in, their sum out."""

    n_features_in_ = 3

    def predict(self, rows: Any) -> Any:
        return np.asarray(rows, dtype=float).sum(axis=1)


class Wide(Sum):
    """Answers each row with a hundred numbers that are long when written."""

    def predict(self, rows: Any) -> Any:
        return super().predict(rows)[:, None] + np.arange(100) / 3


class Root(Sum):
    """Not a number where the sum is negative, infinite where it is zero."""

    def predict(self, rows: Any) -> Any:
        total = super().predict(rows)
        with np.errstate(all="ignore"):
            return np.where(total == 0, np.inf, np.sqrt(total))


class Fails(Sum):
    """Raises, with something in its message that is nobody's business."""

    def predict(self, rows: Any) -> Any:
        raise ZeroDivisionError("a secret of the model, in /srv/models")


class Naps(Sum):
    """Takes as many seconds as the first number says."""

    def predict(self, rows: Any) -> Any:
        time.sleep(float(np.asarray(rows)[:, 0].max()))
        return super().predict(rows)


class Waits(Sum):
    """Answers once the gate is open."""

    def predict(self, rows: Any) -> Any:
        assert GATE.wait(60)
        return super().predict(rows)


class Listed(Sum):
    """Answers with a list of numpy's floats, as a loop does."""

    def predict(self, rows: Any) -> Any:
        return list(super().predict(rows))


class Lengths:
    """Counts the letters in every cell; remembers nothing of what it was fitted on."""

    def fit(self, table: Any, target: Any = None) -> Lengths:
        return self

    def transform(self, table: Any) -> Any:
        return lengths(table)


def lengths(table: Any) -> Any:
    return np.array([[len(str(value)) for value in row] for row in np.asarray(table)])


def small(table: Any) -> Any:
    return table.apply(lambda column: column.map(str.lower))


def years(table: Any) -> Any:
    return table.apply(lambda column: column.dt.year)


class Talks(Sum):
    """Raises what would be lines of a log, or a caller's fault, if anybody took its word."""

    message = 'no\n{"level":"info","event":"forged"}\r\n\x1b[2J\x9b31m\u2028{"event":"forged"}\x85\u202e'

    def predict(self, rows: Any) -> Any:
        raise RuntimeError(f"{self.message} /srv/private/model.bin")


class Blames(Sum):
    """Says that its caller sent a word, as scikit-learn would, and where its own files are."""

    def predict(self, rows: Any) -> Any:
        raise ValueError("could not convert string to float: see /srv/private/model.bin line 7")


class Quits(Sum):
    """Ends the process, if it is let."""

    def predict(self, rows: Any) -> Any:
        raise SystemExit("/srv/private/model.bin is gone")


class Unloadable(Sum):
    """Cannot be loaded, and says which file it wants."""

    def __setstate__(self, state: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/srv/private/weights.bin")


class Warns(Sum):
    """Warns of something when it predicts, on more than one line."""

    def predict(self, rows: Any) -> Any:
        warnings.warn(f"careful{Talks.message}", UserWarning, stacklevel=1)
        return super().predict(rows)
