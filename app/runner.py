"""The asynchronous front of one model: its queue, its batches, its deadline, its counters.

Nothing waits for company and there is no timer: what arrives within one turn of the event loop, or while a batch is computed,
forms the next batch. A batch that costs less than handing it to a thread would is computed in the event loop itself, any
other on the runner's thread; what batches cost is measured when the model is loaded, and ever after. A request's rows are
never split. When a batch fails, each of its requests is run alone once, so that one caller's bad row is that caller's
error only.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import perf_counter, thread_time
from typing import Any, ClassVar, override

import numpy as np
import orjson

from app import log
from app.counters import Counters
from app.errors import Overloaded, PredictionFailed, PredictionTimeout, RequestError
from app.intake import Draft, Intake
from app.limits import WEIGHED_BYTES, Claim
from app.model import Model, Prediction, part_of, wire
from app.observer import Record
from app.signature import Rows
from app.worker import NoThread, Worker

logger = logging.getLogger("diskless.runner")
# A batch that takes longer would hold up the other connections of the event loop. One that takes less is not done sooner by
# a thread: both want the interpreter, and wait up to 5 ms for each other to let go of it.
INLINE_SECONDS = 0.002
LONE_BATCHES = 8  # so many of one request each, one after the other: there is one caller at a time
LONE_SECONDS = 0.00002  # two requests that are closer to each other came in the same turn of the event loop
INLINE_TEXT_BYTES = 16 * 1024  # of requests whose values may be of any length, however few rows they have
TIMED_EVERY = 8  # of the batches in the event loop, so many are timed
LATENCY_SECONDS = 0.05  # that one batch may take because of its length; a single request may take what it takes
SERIALISED_ROWS = 32  # from here on, writing an array is faster than making a list of it first
FAILURES_PER_SECOND = 50  # lines about failed predictions, with all that Python says of them
LEARNING = 0.125  # how much of a new measurement enters what is expected
_failures = log.Trickle(FAILURES_PER_SECOND)


class Result:
    """What one batch came to, and the same as JSON carries it: worked out once, however many requests share it."""

    __slots__ = ("_values", "prediction")

    def __init__(self, prediction: Prediction) -> None:
        self.prediction = prediction
        self._values: list[Any] | None = None

    def json(self, start: int, stop: int) -> bytes:
        """Return the rows `start` up to `stop` as a JSON array, NaN and the infinities as null."""
        values = self._values
        if values is None:
            prediction = self.prediction
            if type(prediction) is np.ndarray and prediction.dtype == np.float64:  # what is no number becomes null
                if stop - start >= SERIALISED_ROWS:
                    return orjson.dumps(np.ascontiguousarray(prediction[start:stop]), option=orjson.OPT_SERIALIZE_NUMPY)
                values = prediction.tolist()
            else:
                values = wire(prediction)
            self._values = values
        return orjson.dumps(values[start:stop])


class Job:
    """One request in the queue: rows that are validated already, either as `Rows` or as the draft of a plain request.

    `size` is that of the request's body in bytes, `claim` what its rows hold of what all may hold, for as long as they are there. Whoever makes one says what happens with its outcome. `awaited` becomes false when its caller has gone or was answered.
    """

    # Whether requests of one turn of the event loop come so close to each other that one which does not is known to be alone.
    # What goes through an application's tasks does not.
    comes_at_once: ClassVar[bool] = False

    __slots__ = (
        *("alone", "awaited", "claim", "count", "deadline", "draft", "record", "request_id"),
        *("rows", "runner", "size", "started", "target", "timeout"),
    )

    def __init__(
        self, target: Target, count: int, *, draft: Draft | None = None, rows: Rows | None = None, size: int = 0
    ) -> None:
        self.target = target
        self.count = count
        self.size = size
        self.draft = draft
        self.rows = rows
        self.request_id: str | None = None
        self.record: Record | None = None  # where it will be told of
        self.timeout: float | None = None  # seconds that its caller waits, where those are fewer than others do
        self.started = perf_counter()
        self.deadline = 0.0  # by perf_counter, in seconds
        self.awaited = True
        self.alone = False  # it has been in a batch that failed
        self.claim: Claim | None = None
        self.runner: Runner | None = None  # of one whose rows are counted, as long as they are there

    def drop_rows(self) -> None:
        """Let go of the rows, which are not computed any more: a connection keeps its latest job.

        Those of a small body stay until the next ones are made. To free them before costs a small request 0.7 µs: the memory
        is not warm any more.
        """
        if self.size > WEIGHED_BYTES:
            self.draft = self.rows = self.runner = None
            if self.claim is not None:
                self.claim.release()
                self.claim = None

    def abandon(self) -> None:
        """Nobody waits for it any more: it is not computed, and its rows go, unless they are being computed already."""
        self.awaited = False
        if self.runner is not None:
            self.runner.forget(self)

    def succeed(self, result: Result, start: int, stop: int) -> None:
        """Take the rows `start` up to `stop` of a batch's result. Must not raise."""
        raise NotImplementedError

    def fail(self, error: RequestError) -> None:
        """Take the reason why there is no prediction. Must not raise."""
        raise NotImplementedError


class Promise(Job):
    """A job that somebody waits for as a future, which gives a result and where in it the job's rows lie.

    `takes_time` says that there is time to look whether the caller has gone: it was not computed at once.
    """

    __slots__ = ("_watching", "future", "takes_time")

    def __init__(
        self, future: asyncio.Future[tuple[Result, int, int]], target: Target, count: int, **rows: Any
    ) -> None:
        super().__init__(target, count, **rows)
        self.future = future
        self.takes_time = False
        self._watching: asyncio.Task[None] | None = None

    @override
    def succeed(self, result: Result, start: int, stop: int) -> None:
        if not self.future.done():
            self.future.set_result((result, start, stop))

    @override
    def fail(self, error: RequestError) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def watch(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Give up, by `CallerGone`, when ASGI's `receive` says that the caller has; its body must have been read."""
        self._watching = asyncio.get_running_loop().create_task(self._until_gone(receive))

    async def _until_gone(self, receive: Callable[[], Awaitable[Any]]) -> None:
        await until_gone(receive)
        self.abandon()
        if not self.future.done():
            self.future.set_exception(CallerGone())

    def leave(self) -> None:
        """Wait no longer. Rows whose caller has gone are not computed."""
        self.abandon()
        if self._watching is not None:
            self._watching.cancel()


async def until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Wait until ASGI's `receive` says that the caller has gone; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class CallerGone(Exception):
    """Nobody waits for the answer any more."""


class Target:
    """One method of one model: what its batches cost, and all of an answer's bytes that are the same each time.

    Methods may cost very different things, and another runtime may compute them. All begin with what the default one costs.
    It refers to neither model nor runner: a connection keeps its latest request, which shall not keep a retired model.
    """

    __slots__ = ("_classes", "_head", "method", "name", "pace", "untimed", "version")

    def __init__(self, model: Model, method: str, costs: Mapping[int, float] | None = None) -> None:
        self.name, self.version = model.ref.name, model.ref.version
        self.method = method
        self.pace = Pace(costs)
        self.untimed = 0  # how many batches in the event loop are not timed before the next that is
        names = orjson.dumps({"model": model.ref.name, "version": model.ref.version})
        self._head = names[:-1] + b',"predictions":'
        classes = model.signature.classes
        by_class = classes is not None and method in model.signature.by_class
        self._classes = b',"classes":' + _dumps(classes) + b"}" if by_class else None

    def encode(self, result: Result, start: int, stop: int) -> bytes:
        """Return the body of an answer with the rows `start` up to `stop` of a result."""
        tail = b"}"
        prediction = result.prediction
        # A binary decision function has one number for both classes.
        if self._classes is not None and (type(prediction) is tuple or prediction.ndim == 2):  # type: ignore[union-attr]
            tail = self._classes
        return b"".join((self._head, result.json(start, stop), tail))


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # a class may be an integer of more than 64 bits
        return json.dumps(value).encode()


class Pace:
    """What batches cost, by their number of rows: measured at load, learnt from every batch since.

    `costs` are seconds by rows. Without any, nothing is computed in the event loop.
    """

    def __init__(self, costs: Mapping[int, float] | None) -> None:
        self.measured = bool(costs)
        known = sorted((costs or {}).items())
        self._seconds = [_between(known, 1 << max(power - 1, 0)) if known else 0.0 for power in range(21)]

    def expected(self, rows: int) -> float:
        """Return the seconds that a batch of so many rows is expected to take."""
        return self._seconds[min(rows.bit_length(), 20)]

    def learn(self, rows: int, seconds: float) -> None:
        """Take note of what a batch took."""
        power = min(rows.bit_length(), 20)
        before = self._seconds[power]
        self._seconds[power] = before + LEARNING * (seconds - before) if before else seconds

    def rows_within(self, seconds: float) -> int:
        """Return how many rows a batch may have to be done within so many seconds; at least 1."""
        fitting = (power for power in range(20, 0, -1) if self._seconds[power] <= seconds)
        return 1 << next(fitting, 1) - 1


def _between(known: Sequence[tuple[int, float]], rows: int) -> float:
    """Return the seconds for `rows`, on the straight lines between what is known; beyond, a row costs what it costs there."""
    before, after = known[0], known[-1]
    if len(known) == 1 or rows <= before[0]:
        return before[1]
    for left, right in itertools.pairwise(known):
        if rows <= right[0]:
            before, after = left, right
            break
    else:
        before = known[-2]
    slope = (after[1] - before[1]) / (after[0] - before[0])
    return max(before[1], before[1] + slope * (rows - before[0]))


class Runner:
    """Runs one model, in the event loop or on one thread of its own. Belongs to the event loop."""

    def __init__(
        self,
        model: Model,
        *,
        costs: Mapping[int, float] | None = None,
        counters: Counters | None = None,
        max_batch_rows: int = 1024,
        max_queue: int = 1000,
        timeout_seconds: float = 20.0,
    ) -> None:
        self.model = model
        self.counters = counters or Counters()
        self.intake = Intake(model.signature)
        self.targets = {method: Target(model, method, costs) for method in model.signature.methods}
        self.default = self.targets[model.signature.default_method]
        self._rowwise = model.signature.rowwise
        layout, inputs = model.signature.layout, model.signature.inputs
        self._has_texts = layout in ("text", "records") or any(spec.datatype == "BYTES" for spec in inputs)
        self._max_batch_rows = max_batch_rows
        self._max_queue = max_queue
        self._timeout_seconds = timeout_seconds
        self._queue: deque[Job] = deque()
        self._scheduled = False  # the queue will be looked at in this turn of the event loop
        self._lone = 0  # how many batches of a single request there were since there was another
        self._done = 0.0  # when the latest batch in the event loop was, by perf_counter
        self._computing: asyncio.Task[None] | None = None  # on the thread
        self._batch: list[Job] = []  # that the thread computes
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0  # by perf_counter
        self._worker = Worker(f"predict {model.ref.name}")
        self._retired = False

    @property
    def queued(self) -> int:
        """How many requests wait to be computed."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """How many requests wait or are computed."""
        return len(self._queue) + len(self._batch)

    def submit(self, job: Job) -> None:
        """Queue a job, or compute it at once. A retired runner still answers whoever holds it.

        Raises `Overloaded` when the queue is full.
        """
        if len(self._queue) >= self._max_queue:
            self._drop_unawaited()
            if len(self._queue) >= self._max_queue:
                self.hurry()
            if len(self._queue) >= self._max_queue:
                self.counters.failed(Overloaded.code)
                raise Overloaded(f"{self.model.ref.name} has {self._max_queue} requests waiting, which is the limit")
        seconds = self._timeout_seconds
        if job.timeout is not None and job.timeout < seconds:
            seconds = job.timeout
        job.deadline = job.started + seconds
        if job.size > WEIGHED_BYTES:
            job.runner = self
        if self._lone >= LONE_BATCHES and job.comes_at_once and not self._scheduled and self._computing is None:
            if job.started - self._done > LONE_SECONDS and self._is_cheap([job]):
                self._compute([job], job.started)  # nobody else is there to wait for
                return
            self._lone = 0
        self._queue.append(job)
        if self._computing is not None:
            # Without one the thread computes for nobody any more, and may do so for long.
            if self._alarm is None or job.deadline < self._alarm_at:
                self._set_alarm(job.deadline)
        elif not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def promise(
        self,
        target: Target,
        request_id: str | None,
        count: int,
        *,
        timeout: float | None = None,
        record: Record | None = None,
        claim: Claim | None = None,
        **rows: Any,
    ) -> Promise:
        """Submit a job that can be waited for. Its future raises `PredictionTimeout`, and what `Model.predict` raises.

        Whoever gets it must `leave` it at the end. Raises `Overloaded`.
        """
        job = Promise(asyncio.get_running_loop().create_future(), target, count, **rows)
        job.request_id = request_id
        job.timeout = timeout
        job.claim = claim
        if record is not None:
            job.record = record
            record.submitted = job.started
        self.submit(job)
        job.takes_time = self._computing is not None or (job.awaited and not self._is_cheap([job]))
        return job

    def hurry(self) -> None:
        """Compute what is queued now instead of at the end of this turn of the event loop, unless the thread is to do that."""
        if self._scheduled and self._computing is None:
            self._flush()

    def forget(self, job: Job) -> None:
        """Let go of the rows of a job that nobody waits for. Those that the thread has it goes on with."""
        if job not in self._batch:
            job.drop_rows()

    async def predict(self, rows: Rows, method: str) -> Prediction:
        """Return the model's answer for the rows. Raises `Overloaded`, `PredictionTimeout`, and what `Model.predict` raises."""
        promise = self.promise(self.targets[method], log.request_id.get(), rows.count, rows=rows)
        try:
            result, start, stop = await promise.future
        finally:
            promise.leave()
        return part_of(result.prediction, start, stop)

    async def predict_aside(self, rows: Rows, method: str) -> Prediction:
        """Compute what no caller asked for, behind what the thread computes for them; it is not counted.

        Raises what `Model.predict` raises. Has no deadline: whoever waits may stop waiting.
        """
        prediction = await self._worker.run(self.model.predict, rows, method)
        if self._computing is None:  # most models compute in the event loop, and need no thread for long
            self._worker.close()
        return prediction

    async def retire(self) -> None:
        """Answer what is queued, then let the thread go. The model itself goes when its last reference does."""
        self._retired = True
        while self._scheduled or self._computing is not None:
            if self._computing is not None:
                await asyncio.wait([self._computing])
            else:
                await asyncio.sleep(0)
        self.close()

    def close(self) -> None:
        """Let the thread go without waiting for what it computes."""
        self._worker.close()

    def _flush(self) -> None:
        """Compute what is queued, batch by batch, here as long as that is cheap."""
        self._scheduled = False
        if self._computing is not None:  # it was hurried, and the thread has the rest
            return
        spent = 0.0
        while jobs := self._next_batch():
            if not self._is_cheap(jobs):
                self._batch = jobs
                self._computing = asyncio.get_running_loop().create_task(self._run())
                return
            self._lone = self._lone + 1 if len(jobs) == 1 and not self._queue else 0
            begun = perf_counter()
            self._compute(jobs, begun)
            spent += self._done - begun
            if not self._queue:
                return
            if spent > INLINE_SECONDS:  # let the connections have a turn
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._flush)
                return

    def _compute(self, jobs: list[Job], begun: float) -> None:
        """Compute a batch here and now. To know the time that it takes costs as much as a row, so not each is timed.

        `begun` is now, by perf_counter. Behind one that seemed long, the next is timed: it may be the machine that was busy.
        """
        target = jobs[0].target
        target.untimed -= 1
        if target.untimed > 0:
            self._finish(jobs, self._outcome(jobs), None, begun)
        else:
            outcome, seconds = self._attempt(jobs)
            target.untimed = TIMED_EVERY
            if seconds >= 2 * target.pace.expected(sum(job.count for job in jobs)):
                target.untimed = 1  # what surprises is looked at again
            self._finish(jobs, outcome, seconds, begun)
        self._done = perf_counter()
        if self._done - begun > INLINE_SECONDS:
            target.untimed = 0

    async def _run(self) -> None:
        """Compute batches on the thread until one is cheap enough for the event loop, or none is left."""
        try:
            while jobs := self._batch:
                self._watch_deadlines()
                begun = perf_counter()
                for job in jobs:
                    if job.record is not None:  # its time may be over before this is
                        job.record.computing = begun
                try:
                    outcome, seconds = await self._worker.run(self._attempt, jobs)
                except NoThread as error:
                    self._refuse(jobs, error)
                else:
                    self._finish(jobs, outcome, seconds, begun)
                self._batch = self._next_batch()
                if self._batch and self._is_cheap(self._batch):
                    self._queue.extendleft(reversed(self._batch))
                    self._batch = []
        finally:
            self._computing = None
            self._batch = []
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None
            if self._queue:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._flush)
            if self._retired:  # somebody asked after all
                self.close()

    def _is_cheap(self, jobs: Sequence[Job]) -> bool:
        """Whether a batch is computed in the event loop. What a long text takes, its number of rows does not tell."""
        pace = jobs[0].target.pace
        if not pace.measured or (self._has_texts and sum(job.size for job in jobs) > INLINE_TEXT_BYTES):
            return False
        rows = jobs[0].count if len(jobs) == 1 else sum(job.count for job in jobs)
        return pace.expected(rows) <= INLINE_SECONDS

    def _next_batch(self) -> list[Job]:
        """Take the oldest request that someone waits for, and those of its kind that fit beside it, in their order."""
        queue = self._queue
        if not queue:
            return []
        now = perf_counter()
        first = queue[0]
        if (len(queue) == 1 or first.alone or not self._rowwise) and first.awaited and first.deadline > now:
            return [queue.popleft()]  # none of the others could be computed with it
        jobs: list[Job] = []
        count, most = 0, self._max_batch_rows
        later: list[Job] = []
        kind: object = None
        while queue and count < most:
            job = queue.popleft()
            if not job.awaited:
                job.drop_rows()
                continue
            if job.deadline <= now:
                self._expire(job)
                job.drop_rows()
                continue
            if not jobs:
                kind = self._kind(job)
                pace = job.target.pace
                if pace.measured and most > job.count:
                    most = max(1, min(most, pace.rows_within(LATENCY_SECONDS)))
            elif count + job.count > most or self._kind(job) != kind:
                later.append(job)
                continue
            jobs.append(job)
            count += job.count
        queue.extendleft(reversed(later))
        return jobs

    def _kind(self, job: Job) -> object:
        """Return what must be equal for two jobs to be computed together."""
        if job.alone or not self._rowwise:
            return job
        if job.rows is None:
            return job.target
        return (job.target, job.rows.kinds)

    def _attempt(self, jobs: Sequence[Job]) -> tuple[Result | Exception, float]:
        """Compute a batch; return what it came to, or what was raised instead, and the seconds that this thread computed.

        Not the seconds that passed: what else the machine does must not make a cheap model look like an expensive one.
        """
        begun = thread_time()
        outcome = self._outcome(jobs)
        return outcome, thread_time() - begun

    def _outcome(self, jobs: Sequence[Job]) -> Result | Exception:
        try:
            if jobs[0].rows is not None:
                rows = Rows.concatenate([job.rows for job in jobs if job.rows is not None])
            elif len(jobs) == 1:
                rows = self.intake.rows(jobs[0].draft or [])
            else:
                rows = self.intake.rows([row for job in jobs for row in job.draft or ()])
            return Result(self.model.predict(rows, jobs[0].target.method))
        except Exception as error:  # handed to the callers; the runner itself goes on with the next batch
            return error
        except BaseException as error:  # a SystemExit, from the code of somebody's model, would end the event loop
            return RuntimeError(f"{type(error).__name__} was raised: {error}")

    def _finish(self, jobs: Sequence[Job], outcome: Result | Exception, seconds: float | None, begun: float) -> None:
        """Hand a batch's outcome to its jobs. Of a batch that failed, each job is put back to be run alone."""
        now = perf_counter()
        counters = self.counters
        if isinstance(outcome, Exception):
            counters.computed(sum(job.count for job in jobs))
            if len(jobs) > 1:
                for job in jobs:
                    job.alone = True
                self._queue.extendleft(reversed(jobs))
            elif jobs[0].awaited:
                if jobs[0].record is not None:
                    jobs[0].record.computing, jobs[0].record.computed = begun, now
                self._fail(jobs[0], outcome)
            if len(jobs) == 1:
                jobs[0].drop_rows()
            return
        start = 0
        for job in jobs:
            stop = start + job.count
            if job.awaited:
                job.awaited = False
                if job.record is not None:
                    job.record.computing, job.record.computed = begun, now
                counters.answered(job.count, now - job.started)
                job.succeed(outcome, start, stop)
            if job.size > WEIGHED_BYTES:
                job.drop_rows()
            start = stop
        counters.computed(start)
        if seconds is not None:
            jobs[0].target.pace.learn(start, seconds)

    def _refuse(self, jobs: Sequence[Job], error: NoThread) -> None:
        """Tell a batch's callers that nothing computes it."""
        if _failures.passes():
            fields = {"model": str(self.model.ref), "reason": str(error)}
            logger.error("nothing can be computed on a thread", extra={"fields": fields | _failures.held_back()})
        for job in jobs:
            if job.awaited:
                self._fail(job, Overloaded("no thread can be had to compute this: try again"))
            job.drop_rows()

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, RequestError):
            error = PredictionFailed("the model could not compute this input; the service's log says why")
        if isinstance(error, PredictionFailed) and _failures.passes():
            fields: dict[str, Any] = {
                "model": str(self.model.ref),
                "method": job.target.method,
                "request_id": job.request_id,
            }
            if job.record is not None and job.record.trace_id is not None:
                fields["trace_id"] = job.record.trace_id
            logger.error("prediction failed", exc_info=error, extra={"fields": fields | _failures.held_back()})
        self.counters.failed(error.code)
        job.awaited = False
        job.fail(error)

    # Deadlines: what is computed in the event loop needs no alarm, and the thread needs one for all that wait for it

    def _watch_deadlines(self) -> None:
        deadline = min((job.deadline for job in (*self._batch, *self._queue) if job.awaited), default=None)
        if deadline is not None and (self._alarm is None or deadline < self._alarm_at):
            self._set_alarm(deadline)

    def _set_alarm(self, deadline: float) -> None:
        delay = max(0.001, deadline - perf_counter())
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = deadline
        self._alarm = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        """Tell those whose time is over; look again when that of the next one is."""
        self._alarm = None
        now = perf_counter()
        for job in (*self._batch, *self._queue):
            if job.awaited and job.deadline <= now:
                self._expire(job)
        self._drop_unawaited()
        waiting = [job.deadline for job in (*self._batch, *self._queue) if job.awaited]
        if waiting and self._computing is not None:
            self._set_alarm(min(waiting))

    def _expire(self, job: Job) -> None:
        self.counters.failed(PredictionTimeout.code)
        job.awaited = False
        job.fail(PredictionTimeout(f"no answer within {job.deadline - job.started:.6g} s"))

    def _drop_unawaited(self) -> None:
        """Let go of what nobody waits for: it shall take no one's place."""
        for job in self._queue:
            if not job.awaited:
                job.drop_rows()
        self._queue = deque(job for job in self._queue if job.awaited)
