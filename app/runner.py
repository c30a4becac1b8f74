"""The asynchronous front of one model: its queue, its batches, its deadline, its counters.

Nothing waits for company: a request that finds the runner idle starts at once, and what arrives while it computes forms
the next batch. A request's rows are never split. When a batch fails, each of its requests is run alone once, so that one
caller's bad row is that caller's error only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from app.counters import Counters
from app.errors import Overloaded, PredictionFailed, PredictionTimeout, RequestError
from app.log import request_id
from app.model import Model, Prediction, part_of
from app.signature import Rows
from app.worker import Worker

logger = logging.getLogger("diskless.runner")


@dataclass(eq=False, slots=True)
class _Job:
    rows: Rows
    method: str
    future: asyncio.Future[Prediction]
    deadline: float  # by the event loop's clock, in seconds
    request_id: str | None

    @property
    def batch(self) -> tuple[object, ...]:
        """What must be equal for two jobs to be computed together."""
        return (self.method, self.rows.kinds, None if self.rows.signature.rowwise else id(self))


class Runner:
    """Runs one model on one thread of its own. Belongs to the event loop."""

    def __init__(
        self, model: Model, *, max_batch_rows: int = 1024, max_queue: int = 1000, timeout_seconds: float = 20.0
    ) -> None:
        self.model = model
        self.counters = Counters()
        self._max_batch_rows = max_batch_rows
        self._max_queue = max_queue
        self._timeout_seconds = timeout_seconds
        self._queue: deque[_Job] = deque()
        self._running: asyncio.Task[None] | None = None
        self._worker = Worker(f"predict {model.ref.name}")
        self._retired = False

    async def predict(self, rows: Rows, method: str) -> Prediction:
        """Return the model's answer for the rows. A retired runner still answers whoever holds it.

        Raises `Overloaded` when the queue is full, `PredictionTimeout` when the deadline passes first, and what
        `Model.predict` raises. Rows whose caller has gone are not computed.
        """
        if len(self._queue) >= self._max_queue:
            self.counters.failed()
            raise Overloaded(f"{self.model.ref.name} has {self._max_queue} requests waiting, which is the limit")
        loop = asyncio.get_running_loop()
        started = loop.time()
        job = _Job(rows, method, loop.create_future(), started + self._timeout_seconds, request_id.get())
        self._queue.append(job)
        if self._running is None:
            self._running = loop.create_task(self._run())
        try:
            async with asyncio.timeout_at(job.deadline):
                prediction = await job.future
        except TimeoutError as error:
            self.counters.failed()
            raise PredictionTimeout(f"no answer within {self._timeout_seconds:g} s") from error
        except RequestError:
            self.counters.failed()
            raise
        finally:
            if not job.future.done() or job.future.cancelled():
                with contextlib.suppress(ValueError):  # not there: being computed
                    self._queue.remove(job)  # nobody waits for it, and it shall take no one's place
        self.counters.answered(rows.count, loop.time() - started)
        return prediction

    async def retire(self) -> None:
        """Answer what is queued, then let the thread go. The model itself goes when its last reference does."""
        self._retired = True
        while self._running is not None:
            await asyncio.wait([self._running])
        self.close()

    def close(self) -> None:
        """Let the thread go without waiting for what it computes."""
        self._worker.close()

    async def _run(self) -> None:
        try:
            while jobs := self._next_batch():
                await self._compute(jobs)
        finally:
            self._running = None
            if self._retired:  # somebody asked after all
                self.close()

    def _next_batch(self) -> list[_Job]:
        """Take the oldest request that someone waits for, and those of its kind that fit beside it, in their order."""
        jobs: list[_Job] = []
        count = 0
        later: list[_Job] = []
        while self._queue and count < self._max_batch_rows:
            job = self._queue.popleft()
            if not self._is_awaited(job):
                continue
            if not jobs or (job.batch == jobs[0].batch and count + job.rows.count <= self._max_batch_rows):
                jobs.append(job)
                count += job.rows.count
            else:
                later.append(job)
        self._queue.extendleft(reversed(later))
        return jobs

    def _is_awaited(self, job: _Job) -> bool:
        """Whether the caller is still there, and has not been told that it took too long."""
        return not job.future.done() and job.deadline > job.future.get_loop().time()

    async def _compute(self, jobs: Sequence[_Job]) -> None:
        self.counters.batches += 1
        try:
            rows = Rows.concatenate([job.rows for job in jobs])
            prediction = await self._worker.run(self.model.predict, rows, jobs[0].method)
            answers = _split(prediction, jobs)
        except Exception as error:  # handed to the callers; the runner itself goes on with the next batch
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                if self._is_awaited(job):
                    await self._compute([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            if not job.future.done():
                job.future.set_result(answer)

    def _fail(self, job: _Job, error: Exception) -> None:
        if not isinstance(error, RequestError):
            error = PredictionFailed("the model could not compute this input; the service's log says why")
        if isinstance(error, PredictionFailed):
            fields = {"model": str(self.model.ref), "method": job.method, "request_id": job.request_id}
            logger.error("prediction failed", exc_info=error, extra={"fields": fields})
        if not job.future.done():
            job.future.set_exception(error)


def _split(prediction: Prediction, jobs: Sequence[_Job]) -> list[Prediction]:
    """Cut a batch's prediction into those of its jobs."""
    if len(jobs) == 1:
        return [prediction]
    stops = list(itertools.accumulate(job.rows.count for job in jobs))
    return [part_of(prediction, start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
