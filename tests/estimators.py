"""Estimators that misbehave. The service under test can import this module, as it can any that a model was made with."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from typing import Any

import numpy as np

GATE = threading.Event()  # open: `Gated` answers
STARTED = threading.Semaphore(0)  # released whenever `Gated` begins to compute
ALIVE: weakref.WeakSet[Counted] = weakref.WeakSet()


class Fitted:
    """Something with three features whose prediction is their sum."""

    n_features_in_ = 3

    def predict(self, rows: Any) -> Any:
        return np.asarray(rows, dtype=float).sum(axis=1)


class Gated(Fitted):
    """Answers once the gate is open."""

    def predict(self, rows: Any) -> Any:
        STARTED.release()
        assert GATE.wait(60)
        return super().predict(rows)

    transform = predict


class Picky(Fitted):
    """Fails for every row that begins with a negative number, as a whole batch does that has one."""

    def predict(self, rows: Any) -> Any:
        if (np.asarray(rows)[:, 0] < 0).any():
            raise ZeroDivisionError("a secret of the model")
        return super().predict(rows)


class Refusing(Fitted):
    """Says of a row that begins with a negative number what scikit-learn says of a category that it does not know."""

    def predict(self, rows: Any) -> Any:
        if (np.asarray(rows)[:, 0] < 0).any():
            raise ValueError("Found unknown categories [-1] in column 0 during transform")
        return super().predict(rows)


class Endless(Fitted):
    """Never answers."""

    def predict(self, rows: Any) -> Any:
        while True:
            time.sleep(0.1)


class Leaves(Fitted):
    """Ends the process when it computes."""

    def predict(self, rows: Any) -> Any:
        raise SystemExit(7)


class Burning(Fitted):
    """Computes for so many seconds of the processor."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def predict(self, rows: Any) -> Any:
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass
        return np.asarray(rows).sum(axis=1)


class Uneven(Burning):
    """Predicts at once, and takes its time to transform."""

    predict = Fitted.predict
    transform = Burning.predict


class LeavesAtOnce(Fitted):
    """Ends the process when it is read."""

    def __reduce__(self) -> Any:
        return leave, ()


def leave() -> None:
    raise SystemExit(7)


class Moody(Fitted):
    """Answers as it was fitted, but where a variable says that it should not: then it is wrong, or ends the process."""

    def predict(self, rows: Any) -> Any:
        mood = os.environ.get("MOOD")
        if mood == "deadly":
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().predict(rows) + (mood is not None)


class DeadlyToRead(Fitted):
    """Ends the process when it is read, as the kernel does when there is no memory left."""

    def __reduce__(self) -> Any:
        return die, ()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Threaded(Fitted):
    """Starts a thread when it is read, which does not end."""

    def __reduce__(self) -> Any:
        return start_a_thread, ()


def start_a_thread() -> Any:
    threading.Thread(target=rest, name="of the model", daemon=True).start()
    return Fitted()


class Counted(Fitted):
    """Known in `ALIVE` as long as it is in memory."""

    def __init__(self, answer: float = 0.0) -> None:
        self.answer = answer
        ALIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        ALIVE.add(self)

    def predict(self, rows: Any) -> Any:
        return np.full(len(rows), self.answer)


class Slow(Fitted):
    """Is never read to its end."""

    def __reduce__(self) -> Any:
        return rest, ()


def rest() -> None:
    while True:
        time.sleep(0.1)


def less_the_mean(rows: Any) -> Any:
    """Not a function of a row: it depends on the rows beside it."""
    return rows - np.asarray(rows).mean(axis=0)


def doubled(rows: Any) -> Any:
    return rows * 2
