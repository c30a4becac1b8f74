"""A thread that computes for the event loop: models are loaded in one, and each predicts in one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

logger = logging.getLogger("diskless.worker")
_Call = tuple[asyncio.Future[Any], Callable[[], Any]]


class NoThread(Exception):
    """The system gives this process no further thread at the moment."""


class Worker:
    """One thread, started when it is first needed, that runs functions in the order in which they were given.

    Belongs to the event loop. What it still computes does not keep the process from ending: unlike a pool's threads,
    which Python waits for, a model that never answers cannot hold up a stop.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[_Call | None] | None = None

    async def run[**P, T](self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Call `function` in the thread and return what it returns. Raises what it raises.

        Raises `NoThread`, and calls nothing, when the thread was to be started and the system gives none; the next call tries
        again.

        What is no `Exception` (a `SystemExit`, from the code of somebody's model) becomes a `RuntimeError`: it would end
        the event loop.
        """
        if self._calls is None:
            calls: SimpleQueue[_Call | None] = SimpleQueue()
            try:
                threading.Thread(target=_work, args=(calls,), name=self._name, daemon=True).start()
            except (RuntimeError, MemoryError) as error:
                raise NoThread(f"no thread could be started: {error}") from error
            self._calls = calls
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put((future, partial(function, *arguments, **named)))
        return await future

    def close(self) -> None:
        """Let the thread go once it has run what it was given. A later `run` starts another."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None


def _work(calls: SimpleQueue[_Call | None]) -> None:
    try:
        limit_native_threads()
    except Exception:  # then it computes with more of them
        logger.exception("the threads of native libraries could not be limited")
    while (call := calls.get()) is not None:
        future, function = call
        result, error = None, None
        if not future.cancelled():
            try:
                result = function()
            except Exception as raised:
                error = raised
            except BaseException as raised:
                error = RuntimeError(f"{type(raised).__name__} was raised: {raised}")
        with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody waits
            future.get_loop().call_soon_threadsafe(_settle, future, result, error)
        del call, future, function, result, error  # a thread that waits must not keep a model in memory


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return  # whoever asked has gone
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def limit_native_threads() -> None:
    """Keep BLAS and OpenMP to one thread in this thread: requests are parallel already, and cores are few."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
