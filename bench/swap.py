"""Hot swaps under full load: what fails, and how late answers are while one version takes the place of another.

wrk keeps the service busy from the load's core. Beside it a few connections ask in turn, and note when each of their
requests was sent, how long it took, and which version answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench import contenders, questions, wrk
from bench.contenders import SERVE, Ground
from bench.environments import FOLDER
from bench.results import spread, table
from bench.servers import HOST, Cores, Failed, Service, cores
from bench.serving import bucket_environment, command, has_workers, publish, say
from demo import s3

SWAPS = 20
QUICK_SWAPS = 4
WORKERS = (1, 4)
PROBES = 4  # connections
BUSY = 64  # connections of wrk
SWAP_SECONDS = 30.0  # from the end of the command to the end of the swap, at most
POLL_SECONDS = 0.05
LOAD_SECONDS = 2.0  # before the first answer of the new version: it was being loaded
QUIET_SECONDS = 1.0  # so long no answer of the old version, and the swap is over
BUDGET = 3.0  # times the p99 outside
KIND = "linear"


class Probe(NamedTuple):
    """One request: when it was sent, by `time.perf_counter`; how long it took; the answer's version, None if it failed."""

    sent: float
    seconds: float
    version: str | None


class Span(NamedTuple):
    """From one moment to another: a swap from before its load to the old version's last answer."""

    start: float
    end: float

    def holds(self, probe: Probe) -> bool:
        """Whether a request was under way in it."""
        return self.start <= probe.sent + probe.seconds and probe.sent <= self.end


class Found(NamedTuple):
    """What a service with so many workers did."""

    workers: int
    swaps: int
    requests: int
    failures: int
    inside: Sequence[float]  # seconds of the requests during swaps
    outside: Sequence[float]
    overlaps: Sequence[float]  # seconds from the first answer of the new version to the last of the old


def report(*, quick: bool = False) -> str:
    """Swap under load; return the section on it. Raises `Unavailable`."""
    wrk.available()
    on = cores()
    before = os.sched_getaffinity(0)
    question = questions.KINDS[KIND]()
    counts = WORKERS if has_workers() else WORKERS[:1]
    found = []
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, before)
        os.sched_setaffinity(0, {on.load})
        FOLDER.mkdir(exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=FOLDER, prefix="swap-")))
        questions.store(folder, {KIND: question})
        server = stack.enter_context(s3.start(folder / "s3"))
        for version in ("1", "2"):
            publish(server, "swap/", KIND, folder, "--version", version)
        bodies = folder / "bodies.jsonl"
        requests = questions.singles(question)
        bodies.write_bytes(b"".join(SERVE.body(question, request.rows) + b"\n" for request in requests))
        for count in counts:
            bucket = bucket_environment(server, "swap/") | {"ML_REFRESH_SECONDS": "1"}
            with SERVE.start(Ground(on.server, folder, bucket, count)) as service:
                path = SERVE.path.format(kind=KIND)
                _, answer = service.answered(path, SERVE.body(question, requests[0].rows))
                contenders.check(SERVE, SERVE.predictions(answer, 1), requests[0].expected)
                service.answered("/health/ready")  # as a load balancer asks: before, some workers may have no model yet
                say(f"swapping with {count} worker{'s' * (count > 1)}")
                swaps = QUICK_SWAPS if quick else SWAPS
                found.append(asyncio.run(_swap(service, server, path, bodies, on, count, swaps)))
    return section(found, several=len(counts) > 1)


async def _swap(
    service: Service, server: s3.S3Server, path: str, bodies: Path, on: Cores, workers: int, swaps: int
) -> Found:
    """Move the alias to and fro while the service is busy."""
    probes: list[Probe] = []
    stop = asyncio.Event()
    lines = bodies.read_bytes().splitlines()
    loads: list[wrk.Load] = []
    spans: list[Span] = []
    commands: list[Span] = []
    with wrk.running(service.url + path, bodies, connections=BUSY, core=on.load, found=loads):
        asking = [asyncio.create_task(_ask(service.port, path, lines, at, probes, stop)) for at in range(PROBES)]
        try:
            await asyncio.sleep(2 * QUIET_SECONDS)  # some requests outside of swaps, to begin with
            for number in range(swaps):
                words, new = (("promote", KIND, "2"), "2") if number % 2 == 0 else (("rollback", KIND), "1")
                before, started = len(probes), time.perf_counter()
                await asyncio.to_thread(command, server, "swap/", *words)
                commands.append(Span(started, time.perf_counter()))
                spans.append(await _over(probes, before, new))
        finally:
            stop.set()
            await asyncio.gather(*asking)
    inside = [probe.seconds for probe in probes if any(span.holds(probe) for span in spans)]
    outside = [probe.seconds for probe in probes if not any(span.holds(probe) for span in (*spans, *commands))]
    failures = sum(probe.version is None for probe in probes) + sum(load.errors for load in loads)
    requests = len(probes) + sum(load.requests for load in loads)
    return Found(
        workers,
        swaps,
        requests,
        failures,
        inside,
        outside,
        [max(0.0, span.end - span.start - LOAD_SECONDS) for span in spans],
    )


async def _ask(
    port: int, path: str, bodies: Sequence[bytes], turn: int, probes: list[Probe], stop: asyncio.Event
) -> None:
    """Post one after another over a connection that is kept, made anew where the service has said that it closes it."""
    head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\ncontent-length: "
    requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]
    reader, writer = await asyncio.open_connection(HOST, port)
    while not stop.is_set():
        turn = (turn + 1) % len(requests)
        sent = time.perf_counter()
        version, closes = None, True
        try:
            writer.write(requests[turn])
            version, closes = await _answer(reader)
        except (OSError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
            say(f"a request failed: {error!r}")
        probes.append(Probe(sent, time.perf_counter() - sent, version))
        if closes:
            writer.close()
            reader, writer = await asyncio.open_connection(HOST, port)
    writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[str | None, bool]:
    """Read one answer; return its version, None if it is not a prediction, and whether the connection closes."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    answer = await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r")[0]))
    good = head.startswith(b"http/1.1 200 ")
    return (json.loads(answer)["version"] if good else None), b"\r\nconnection: close" in head


async def _over(probes: Sequence[Probe], seen: int, new: str) -> Span:
    """Wait until nothing but the new version has answered for a while; return the swap. Raises `Failed`.

    `seen` is how many probes there were before it was asked for.
    """
    deadline = time.perf_counter() + SWAP_SECONDS
    first = last = math.inf
    while time.perf_counter() < deadline:
        await asyncio.sleep(POLL_SECONDS)
        for probe in probes[seen:]:
            seen += 1
            if probe.version != new:
                last = probe.sent + probe.seconds
            elif first == math.inf:
                first = probe.sent
        if first < math.inf and time.perf_counter() - last > QUIET_SECONDS:
            return Span(first - LOAD_SECONDS, last)
    raise Failed(f"version {new} did not take the place of the other within {SWAP_SECONDS:.0f} s")


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least of the values that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def section(found: Sequence[Found], *, several: bool) -> str:
    """Return the section in Markdown."""
    rows = []
    for one in found:
        inside, outside = percentile(one.inside, 99), percentile(one.outside, 99)
        met = one.failures == 0 and inside <= BUDGET * outside
        rows.append(
            [
                str(one.workers),
                f"{one.failures} of {one.requests:,}",
                f"{inside / outside:.2f}",
                "met" if met else "**missed**",
                f"{inside * 1000:.1f}",
                f"{outside * 1000:.1f}",
                f"{max(one.inside) * 1000:.0f}",
                f"{max(one.outside) * 1000:.0f}",
                spread(one.overlaps),
            ]
        )
    text = (
        f"Two versions of the linear model in turn, by `promote` and `rollback`, {found[0].swaps} times, with "
        f"`ML_REFRESH_SECONDS=1`, {BUSY} connections of wrk keeping the service busy on one core. {PROBES} further connections "
        "on the other core note the time of each of their requests. During a swap is from "
        f"{LOAD_SECONDS:.0f} s before the new version's first answer, while it is loaded, to the old one's last; outside are "
        "neither the swaps nor the times of the commands, which share the core of the load. The budget is no failed request, "
        f"and {BUDGET:.0f} times the p99 outside."
    )
    if not several:
        text += " This version has no --workers, so only one was measured."
    header = (
        *("workers", "failed", "p99 during : outside", "budget", "p99 during, ms", "p99 outside, ms"),
        *("slowest during, ms", "slowest outside, ms", "both versions answer for, s"),
    )
    return f"{text}\n\n{table(header, rows)}"
