"""A thread that computes for the event loop: models are loaded in one, and each predicts in one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

_Call = tuple[asyncio.Future[Any], Callable[[], Any]]


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

        What is no `Exception` (a `SystemExit`, from the code of somebody's model) becomes a `RuntimeError`: it would end
        the event loop.
        """
        if self._calls is None:
            self._calls = SimpleQueue()
            threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True).start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put((future, partial(function, *arguments, **named)))
        return await future

    def close(self) -> None:
        """Let the thread go once it has run what it was given. A later `run` starts another."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None


def _work(calls: SimpleQueue[_Call | None]) -> None:
    limit_native_threads()
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
