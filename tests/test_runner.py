"""The queue in front of a model: batches, deadlines, one caller's fault, and how it ends."""

import asyncio
import contextlib
import threading

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from app import inspection
from app.errors import InvalidInput, Overloaded, PredictionFailed, PredictionTimeout
from app.limits import Claim, PendingBytes
from app.model import Model
from app.names import ModelRef
from app.runner import INLINE_SECONDS, INLINE_TEXT_BYTES, CallerGone, Pace, Runner
from tests import estimators
from tests.repository import ROWS, linear


def made(estimator, **limits) -> Runner:
    return Runner(Model(ModelRef("sum", "1"), inspection.infer((), estimator), estimator), **limits)


def rows_of(runner, values):
    return runner.model.signature.validate(np.asarray(values).tolist())


async def ask(runner, values):
    return (await runner.predict(rows_of(runner, values), "predict")).tolist()


@pytest.fixture
def gate():
    """Closed until the test opens it: what a `Gated` model computes takes exactly so long."""
    estimators.GATE.clear()
    while estimators.STARTED.acquire(blocking=False):
        pass
    yield estimators.GATE
    estimators.GATE.set()


async def started():
    assert await asyncio.to_thread(estimators.STARTED.acquire, timeout=60)


async def test_who_waits_behind_a_batch_from_its_beginning_is_told_in_time(gate):
    runner = made(estimators.Gated(), max_batch_rows=2)
    first = runner.promise(runner.default, None, 2, rows=rows_of(runner, [[1, 1, 1]] * 2))
    late = runner.promise(runner.default, None, 1, timeout=0.05, rows=rows_of(runner, [[1, 1, 1]]))
    try:
        with pytest.raises(PredictionTimeout, match=r"0\.05 s"):
            await asyncio.wait_for(late.future, 30)
        assert not first.future.done()
    finally:
        late.leave()
        gate.set()
    assert (await first.future)[1:] == (0, 2)
    await runner.retire()


async def test_a_cheap_model_computes_what_waits_before_it_refuses():
    runner = made(linear(0), costs={1: 1e-6, 64: 1e-6, 1024: 1e-6}, max_queue=3)
    rows = rows_of(runner, ROWS[:1])
    promises = [runner.promise(runner.default, None, 1, rows=rows) for _ in range(20)]

    assert len([await promise.future for promise in promises]) == 20
    await runner.retire()


async def settled():
    """Let everything that can run without the model's thread run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_an_idle_runner_computes_at_once_and_what_waits_meanwhile_becomes_one_batch(gate):
    runner = made(estimators.Gated())
    first = asyncio.create_task(ask(runner, [[1, 1, 1]]))
    await started()
    others = [asyncio.create_task(ask(runner, [[value, 0, 0], [value, 1, 0]])) for value in range(20)]
    await settled()
    gate.set()

    assert await first == [3]
    assert await asyncio.gather(*others) == [[value, value + 1] for value in range(20)]
    assert runner.counters.batches == 2
    assert (runner.counters.requests, runner.counters.rows, runner.counters.errors) == (21, 41, 0)
    await runner.retire()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(1, 10))
def test_every_caller_gets_the_answers_to_its_own_rows_however_they_are_batched(sizes, max_batch_rows):
    async def run():
        runner = made(linear(0), max_batch_rows=max_batch_rows)
        parts = [ROWS[position : position + size] for position, size in enumerate(sizes)]
        answers = await asyncio.gather(*(runner.predict(rows_of(runner, part), "predict") for part in parts))
        await runner.retire()
        return list(zip(parts, answers, strict=True))

    for part, answer in asyncio.run(run()):
        np.testing.assert_allclose(answer, linear(0).predict(part), rtol=1e-12)


async def test_no_batch_has_more_rows_than_allowed_unless_one_request_has(gate):
    runner = made(estimators.Gated(), max_batch_rows=4)
    first = asyncio.create_task(ask(runner, [[0, 0, 0]]))
    await started()
    others = [asyncio.create_task(ask(runner, [[1, 1, 1]] * size)) for size in (3, 2, 1, 9)]
    await settled()
    gate.set()
    await asyncio.gather(first, *others)

    assert runner.counters.batches == 1 + 3  # 3 and 1 rows fit together; 2; 9 alone
    await runner.retire()


async def test_rows_of_different_dtypes_and_methods_are_not_joined(gate):
    estimator = estimators.Gated()
    estimator.feature_names_in_ = np.array(["a", "b", "c"])
    examples = pd.DataFrame({"a": [1, 2], "b": ["x", "y"], "c": [0.5, 1.5]})
    signature = inspection.infer((), estimator, examples)
    runner = Runner(Model(ModelRef("sum", "1"), signature, estimator))
    whole = signature.validate([{"a": 1, "b": "1", "c": 3}])
    missing = signature.validate([{"a": None, "b": "1", "c": 3}])
    first = asyncio.create_task(runner.predict(whole, "predict"))
    await started()
    jobs = [(whole, "predict"), (missing, "predict"), (whole, "transform"), (whole, "predict")]
    others = [asyncio.create_task(runner.predict(*job)) for job in jobs]
    await settled()
    gate.set()
    await asyncio.gather(first, *others)

    assert whole.kinds != missing.kinds
    assert runner.counters.batches == 1 + 3
    await runner.retire()


async def test_rows_that_depend_on_each_other_are_not_joined(gate):
    estimator = estimators.Gated()
    signature = inspection.infer((), estimator).model_copy(update={"rowwise": False})
    runner = Runner(Model(ModelRef("sum", "1"), signature, estimator))
    first = asyncio.create_task(ask(runner, [[1, 1, 1]]))
    await started()
    others = [asyncio.create_task(ask(runner, [[1, 1, 1]])) for _ in range(3)]
    await settled()
    gate.set()
    await asyncio.gather(first, *others)

    assert runner.counters.batches == 4
    await runner.retire()


async def test_one_bad_row_in_a_shared_batch_fails_its_caller_only():
    runner = made(estimators.Picky())
    answers = await asyncio.gather(
        *(ask(runner, [[value, 0, 0]]) for value in (1, -1, 2, -2, 3)), return_exceptions=True
    )

    assert [answers[position] for position in (0, 2, 4)] == [[1], [2], [3]]
    for position in (1, 3):
        assert isinstance(answers[position], PredictionFailed)
        assert "secret" not in str(answers[position])
    assert (runner.counters.requests, runner.counters.errors) == (5, 2)
    await runner.retire()


async def test_an_input_that_the_estimator_refuses_is_the_callers_error():
    runner = made(estimators.Refusing())
    good, bad = await asyncio.gather(ask(runner, [[1, 1, 1]]), ask(runner, [[-1, 1, 1]]), return_exceptions=True)

    assert good == [3]
    assert isinstance(bad, InvalidInput)
    assert "unknown categories" in str(bad)
    await runner.retire()


async def test_a_cancelled_caller_is_not_computed_and_takes_no_place(gate):
    runner = made(estimators.Gated(), max_queue=2)
    first = asyncio.create_task(ask(runner, [[0, 0, 0]]))
    await started()
    gone = [asyncio.create_task(ask(runner, [[5, 5, 5]])) for _ in range(2)]
    await settled()
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    last = asyncio.create_task(ask(runner, [[1, 1, 1]]))  # there is room again
    await settled()
    gate.set()

    assert await first == [0]
    assert await last == [3]
    assert runner.counters.rows == 2
    await runner.retire()


async def test_a_full_queue_refuses_and_says_what_the_limit_is(gate):
    runner = made(estimators.Gated(), max_queue=2)
    waiting = [asyncio.create_task(ask(runner, [[0, 0, 0]]))]
    await started()
    waiting += [asyncio.create_task(ask(runner, [[1, 0, 0]])) for _ in range(2)]
    await settled()
    with pytest.raises(Overloaded, match="2 requests waiting"):
        await ask(runner, [[1, 0, 0]])
    gate.set()

    assert await asyncio.gather(*waiting) == [[0], [1], [1]]
    await runner.retire()


async def test_past_its_deadline_a_caller_is_told_and_the_next_ones_are_answered(gate):
    runner = made(estimators.Gated(), timeout_seconds=0.05)
    late = [asyncio.create_task(ask(runner, [[0, 0, 0]])) for _ in range(3)]
    answers = await asyncio.gather(*late, return_exceptions=True)
    gate.set()
    await runner.retire()  # what was still being computed

    assert all(isinstance(answer, PredictionTimeout) for answer in answers)
    assert runner.counters.errors == 3

    runner = made(linear(1))
    assert await ask(runner, [[1, 1, 1]]) == pytest.approx([4])
    await runner.retire()


async def test_a_model_that_would_end_the_process_fails_one_request():
    runner = made(estimators.Leaves())
    with pytest.raises(PredictionFailed):
        await ask(runner, [[1, 1, 1]])
    with pytest.raises(PredictionFailed):
        await ask(runner, [[1, 1, 1]])
    await runner.retire()


async def test_retiring_answers_what_is_queued_and_lets_the_thread_go(gate):
    runner = made(estimators.Gated())
    tasks = [asyncio.create_task(ask(runner, [[1, 0, 0]]))]
    await started()
    tasks += [asyncio.create_task(ask(runner, [[value, 0, 0]])) for value in range(3)]
    await settled()
    retiring = asyncio.create_task(runner.retire())
    await settled()
    assert not retiring.done()
    gate.set()
    await retiring

    assert await asyncio.gather(*tasks) == [[1], [0], [1], [2]]
    await no_thread("predict sum")


async def test_who_asks_a_retired_runner_is_answered_and_its_thread_goes_again():
    runner = made(linear(2))
    await runner.retire()

    assert await ask(runner, [[1, 1, 1]]) == pytest.approx([5])
    await no_thread("predict sum")


@contextlib.contextmanager
def no_threads_to_be_had():
    """The system gives none: each would have a stack that is larger than the memory that can be addressed."""
    threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(0)


async def test_without_a_thread_callers_are_told_and_the_next_ones_are_answered(caplog):
    await no_thread("predict sum")
    runner = made(linear(2))
    pending = PendingBytes(10**6)
    claims = [Claim(pending) for _ in range(3)]
    assert all(claim.hold(10_000) for claim in claims)
    with no_threads_to_be_had():
        promises = [
            runner.promise(runner.default, None, 1, rows=rows_of(runner, [[1, 1, 1]]), size=10_000, claim=claim)
            for claim in claims
        ]
        told = await asyncio.gather(*(promise.future for promise in promises), return_exceptions=True)
        alone = await asyncio.gather(ask(runner, [[1, 1, 1]]), return_exceptions=True)

    assert [str(error) for error in told + alone] == ["no thread can be had to compute this: try again"] * 4
    assert {type(error) for error in told + alone} == {Overloaded}
    assert pending.held == 0
    assert "nothing can be computed on a thread" in caplog.text
    assert await ask(runner, [[1, 1, 1]]) == pytest.approx([5])
    await runner.retire()


async def no_thread(name):
    async with asyncio.timeout(30):
        while any(thread.name == name for thread in threading.enumerate()):
            await asyncio.sleep(0.005)


async def test_quantiles_come_from_the_answers_only():
    runner = made(linear(0))
    assert runner.counters.quantiles() is None
    await ask(runner, [[1, 1, 1]])

    quantiles = runner.counters.quantiles()
    assert quantiles is not None
    assert set(quantiles) == {"p50", "p90", "p99"}
    assert 0 < quantiles["p50"] <= quantiles["p90"] <= quantiles["p99"]
    await runner.retire()


CHEAP = {1: 1e-6, 64: 2e-6, 1000: 1e-5}


async def test_what_is_cheap_is_computed_in_the_event_loop_without_a_thread():
    await no_thread("predict sum")  # of the test before
    runner = made(linear(1), costs=CHEAP)
    answers = await asyncio.gather(*(ask(runner, [[value, 0, 0]]) for value in range(50)))

    assert answers == [[pytest.approx(value + 1)] for value in range(50)]
    assert runner.counters.batches == 1  # one turn of the event loop brought them all
    assert all(thread.name != "predict sum" for thread in threading.enumerate())
    await runner.retire()


async def test_in_the_event_loop_too_one_bad_row_fails_its_caller_only():
    runner = made(estimators.Picky(), costs=CHEAP)
    answers = await asyncio.gather(
        *(ask(runner, [[value, 0, 0]]) for value in (1, -1, 2, -2, 3)), return_exceptions=True
    )

    assert [answers[position] for position in (0, 2, 4)] == [[1], [2], [3]]
    assert all(isinstance(answers[position], PredictionFailed) for position in (1, 3))
    assert (runner.counters.requests, runner.counters.errors) == (5, 2)
    await runner.retire()


async def test_a_model_that_would_end_the_process_does_not_end_the_event_loop():
    runner = made(estimators.Leaves(), costs=CHEAP)
    for _ in range(2):
        with pytest.raises(PredictionFailed):
            await ask(runner, [[1, 1, 1]])
    await runner.retire()


async def test_what_turns_out_to_be_expensive_leaves_the_event_loop():
    runner = made(estimators.Burning(0.004), costs=CHEAP)
    for _ in range(20):
        await ask(runner, [[1, 1, 1]])

    assert runner.default.pace.expected(1) > INLINE_SECONDS
    assert any(thread.name == "predict sum" for thread in threading.enumerate())
    await runner.retire()
    await no_thread("predict sum")


async def test_an_expensive_method_does_not_hide_behind_a_cheap_one():
    runner = made(estimators.Uneven(0.005), costs=CHEAP)
    rows = rows_of(runner, [[1, 1, 1]])
    for number in range(60):
        await runner.predict(rows, "transform" if number % 10 == 0 else "predict")

    assert runner.targets["transform"].pace.expected(1) > INLINE_SECONDS
    assert runner.default.pace.expected(1) < INLINE_SECONDS
    await runner.retire()


async def test_a_batch_is_no_longer_than_the_latency_that_it_may_take(gate):
    costs = {1: 0.005, 64: 0.02, 1000: 0.3}
    runner = made(estimators.Gated(), costs=costs)
    first = asyncio.create_task(ask(runner, [[0, 0, 0]]))
    await started()
    others = [asyncio.create_task(ask(runner, [[value, 0, 0]])) for value in range(300)]
    await settled()
    gate.set()
    await asyncio.gather(first, *others)

    assert runner.counters.batches >= 3
    await runner.retire()


async def test_whoever_has_gone_is_not_computed(gate):
    runner = made(estimators.Gated())
    rows = rows_of(runner, [[1, 1, 1]])
    left = asyncio.Event()

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    first = asyncio.create_task(ask(runner, [[0, 0, 0]]))
    await started()
    promise = runner.promise(runner.default, None, 1, rows=rows)
    assert promise.takes_time
    promise.watch(receive)
    await settled()
    left.set()
    with pytest.raises(CallerGone):
        await promise.future
    promise.leave()
    gate.set()
    await first

    assert runner.counters.rows == 1
    await runner.retire()


@pytest.mark.parametrize("costs", [{1: 1e-5}, {1: 1e-5, 64: 1e-4}, {1: 5e-3, 64: 1e-4, 1000: 1e-2}])
def test_expected_costs_never_fall_below_those_of_a_row(costs):
    pace = Pace(costs)

    assert pace.expected(1) == pytest.approx(costs[1], rel=1)
    assert all(pace.expected(rows) >= min(costs.values()) for rows in (1, 2, 63, 64, 65, 999, 5000, 10**7))
    assert pace.rows_within(0.0) == 1
    assert pace.rows_within(1e9) >= 1 << 19


async def once(runner, **job):
    promise = runner.promise(runner.default, None, 1, **job)
    await promise.future
    promise.leave()


async def test_a_long_text_is_not_computed_in_the_event_loop_however_cheap_rows_are():
    await no_thread("predict sum")
    texts = ["good film", "bad film"]
    estimator = make_pipeline(CountVectorizer(), LogisticRegression()).fit(texts, [1, 0])
    runner = made(estimator, costs=CHEAP)
    rows = runner.model.signature.validate(texts[:1])

    await once(runner, rows=rows, size=INLINE_TEXT_BYTES)
    assert all(thread.name != "predict sum" for thread in threading.enumerate())
    await once(runner, rows=rows, size=INLINE_TEXT_BYTES + 1)
    assert any(thread.name == "predict sum" for thread in threading.enumerate())
    await runner.retire()
    await no_thread("predict sum")


async def test_many_bytes_of_numbers_are_told_by_their_rows():
    await no_thread("predict sum")
    runner = made(linear(1), costs=CHEAP)
    await once(runner, rows=rows_of(runner, [[1, 2, 3]]), size=10 * INLINE_TEXT_BYTES)

    assert all(thread.name != "predict sum" for thread in threading.enumerate())


async def test_a_request_that_comes_after_all_others_were_given_up_has_a_deadline_too(gate):
    runner = made(estimators.Gated(), timeout_seconds=0.05)
    with pytest.raises(PredictionTimeout):
        await ask(runner, [[1, 1, 1]])
    async with asyncio.timeout(10):
        with pytest.raises(PredictionTimeout):  # the thread still computes the first
            await ask(runner, [[2, 2, 2]])

    assert (runner.counters.requests, runner.counters.errors) == (2, 2)
    gate.set()
    await runner.retire()
