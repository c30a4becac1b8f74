"""`make soak`: the real service for ten minutes under everything at once. What it prints at the end is what was found.

Callers ask for four models of which versions change all the while, and hold every answer against scikit-learn's. Beside them
callers break off, send garbage and bombs; the storage fails in turns; workers are killed. Nothing that was accepted may fail but what a
killed worker had in hand, memory has to be flat, and in the end there are as many open files as in the beginning.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from app.model_storage import ModelStorageManager
from app.processes import figures
from app.storage.r2 import R2Storage
from demo import s3
from tests.faults import FOR_EVER, Fault, FaultyProxy, corrupt, cut, delay, drop, hang, status
from tests.repository import linear
from tests.service import ADMIN_KEY, AS_ADMIN, COMMAND, Service, r2_environment
from tests.trusted import TRUST

SECONDS = 600.0
CALLERS = 24
NUISANCES = 6
SWAP_SECONDS, FAULT_SECONDS, KILL_SECONDS, LOOK_SECONDS = 6.0, 17.0, 23.0, 2.0
OUTAGE_SECONDS = 6.0
EXCUSED_SECONDS = 3.0  # after a kill, for those whose connection it was to notice
WARM_UP = 0.2  # of the time, before memory is looked at
WINDOW = 8  # samples, of which the least counts: while one generation takes over from another there are two
GROWTH_MB, GROWTH_SHARE = 12.0, 0.06  # that a flat line may seem to have
SETTLE_SECONDS = 40.0
LIMIT_BYTES = 200_000
FAULTS: dict[str, Callable[[], Fault]] = {
    "no connection": drop,
    "slow": lambda: delay(1.5),
    "cut": lambda: cut(after_bytes=100),
    "hanging": lambda: hang(after_bytes=10),
    "altered": lambda: corrupt(at_byte=20),
    "503": lambda: status(503, "SlowDown", "slow down"),
    "403": lambda: status(403, "AccessDenied", "no"),
}


class Question(NamedTuple):
    """A request to a model, and for each version what scikit-learn answers."""

    body: bytes
    expected: dict[str, list[Any]]


class Sample(NamedTuple):
    """What the process tree held at a moment: seconds since the start, megabytes (PSS), open files, processes."""

    seconds: float
    megabytes: float
    files: int
    processes: int


@dataclass
class Found:
    """What the soak has found."""

    answers: int = 0
    excused: int = 0
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    nuisances: Counter[str] = field(default_factory=Counter)
    swaps: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    killed_at: float = -1e9
    samples: list[Sample] = field(default_factory=list)


def fitted() -> dict[str, tuple[list[Any], list[Any], bool]]:
    """Return for each name its two versions, examples as a request has them, and whether it is compiled."""
    generator = np.random.default_rng(3)
    points = generator.random((300, 8))
    classes = np.where(points[:, 0] > points[:, 1], "left", "right")
    texts = [" ".join(generator.choice(["red", "green", "blue", "grey", "pink"], 6)) for _ in range(200)]
    moods = ["warm" if text.count("red") else "cold" for text in texts]
    forests = [RandomForestClassifier(30, max_depth=8, random_state=seed).fit(points, classes) for seed in (1, 2)]
    words = [make_pipeline(TfidfVectorizer(), LogisticRegression(C=c)).fit(texts, moods) for c in (1.0, 9.0)]
    boosted = [GradientBoostingRegressor(n_estimators=20, random_state=s).fit(points, points[:, s]) for s in (1, 2)]
    return {
        "sum": ([linear(1), linear(2)], generator.random((40, 3)).tolist(), True),
        "forest": (forests, points[:40].tolist(), True),
        "words": (words, texts[:40], True),
        "boosted": (boosted, points[:40].tolist(), False),
    }


def questions(name: str, versions: Sequence[Any], examples: Sequence[Any]) -> list[Question]:
    found = []
    for size in (1, 1, 1, 7):
        for start in range(0, len(examples) - size, 5):
            rows = list(examples[start : start + size])
            answers = {str(number): model.predict(rows).tolist() for number, model in enumerate(versions, 1)}
            found.append(Question(json.dumps({"model": name, "instances": rows}).encode(), answers))
    return found


class Soak:
    """The service, and everybody who troubles it."""

    def __init__(self, service: Service, manager: ModelStorageManager, proxy: FaultyProxy, seed: int) -> None:
        self.service = service
        self.manager = manager
        self.proxy = proxy
        self.random = random.Random(seed)
        self.asked: dict[str, list[Question]] = {}
        self.found = Found()
        self.began = time.monotonic()
        self.over = asyncio.Event()

    async def run(self, seconds: float) -> None:
        self.began = time.monotonic()
        tasks = [self.call(random.Random(number)) for number in range(CALLERS)]
        tasks += [self.trouble(random.Random(number)) for number in range(NUISANCES)]
        tasks += [self.look()]
        others = [
            self.each(SWAP_SECONDS, self.swap),
            self.each(FAULT_SECONDS, self.fail_storage),
            self.each(KILL_SECONDS, self.kill),
        ]
        async with asyncio.TaskGroup() as group, self.manager.storage:
            for task in (*tasks, *others):
                group.create_task(task)
            await asyncio.sleep(seconds)
            self.over.set()
        self.proxy.heal()

    async def each(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        while not await self.waited(seconds * self.random.uniform(0.7, 1.3)):
            await act()

    async def waited(self, seconds: float) -> bool:
        """Wait; return whether it is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)
        return self.over.is_set()

    # Callers

    async def call(self, chosen: random.Random) -> None:
        reader = writer = None
        while not self.over.is_set():
            name = chosen.choice(list(self.asked))
            question = chosen.choice(self.asked[name])
            began = time.monotonic()
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.service.port)
                assert reader is not None
                writer.write(head("/predict", question.body) + question.body)
                code, headers, body = await asyncio.wait_for(answer(reader), 30)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                self.note_loss(began, f"{name}: {error!r}")
                writer = self.left(writer)
                continue
            if code == 200:
                self.check(name, question, json.loads(body))
            else:
                self.found.failures.append(f"{self.since():.1f} s: {name}: {code} {body[:200]!r}")
            if b"connection: close" in headers:
                writer = self.left(writer)
            if chosen.random() < 0.002:
                writer = self.left(writer)
            await asyncio.sleep(0)
        self.left(writer)

    def check(self, name: str, question: Question, document: dict[str, Any]) -> None:
        expected = question.expected[document["version"]]
        got = document["predictions"]
        same = got == expected if type(expected[0]) is str else np.allclose(got, expected, rtol=1e-9, atol=1e-12)
        self.found.answers += 1
        self.found.versions[f"{name}/{document['version']}"] += 1
        if not same:
            self.found.wrong.append(f"{name}: expected {expected}, got {document}")

    def note_loss(self, began: float, what: str) -> None:
        """A connection broke: it may have been that of a worker which was killed meanwhile, or a moment before."""
        if began - EXCUSED_SECONDS <= self.found.killed_at <= time.monotonic():
            self.found.excused += 1
        else:
            self.found.failures.append(f"{self.since():.1f} s: {what}")

    @staticmethod
    def left(writer: asyncio.StreamWriter | None) -> None:
        if writer is not None:
            writer.close()

    async def trouble(self, chosen: random.Random) -> None:
        """Be a caller whom nobody wants. Whatever is answered, it is no fault of the service."""
        good = self.asked["sum"][0].body
        bomb = gzip.compress(b" " * 50_000_000)
        acts: dict[str, bytes] = {
            "breaks off in the head": b"POST /predict HTTP/1.1\r\nHo",
            "breaks off in the body": head("/predict", good) + good[:-5],
            "does not read": (head("/predict", good) + good) * 50,
            "garbage": chosen.randbytes(300),
            "no model": head("/predict", b'{"model":"x","instances":[[1]]}') + b'{"model":"x","instances":[[1]]}',
            "no json": head("/predict", b"{") + b"{",
            "a bomb": head("/predict", bomb, "content-encoding: gzip\r\n") + bomb,
            "too large": head("/predict", b"x" * (LIMIT_BYTES * 5)) + b"x" * 3000,
            "no key": b"GET /models/status HTTP/1.1\r\nhost: x\r\n\r\n",
            "elsewhere": b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
            "large headers": b"GET /health HTTP/1.1\r\n" + b"x: " + b"y" * 100_000,
        }
        while not await self.waited(chosen.uniform(0.01, 0.2)):
            name = chosen.choice(list(acts))
            self.found.nuisances[name] += 1
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.service.port)
                try:
                    writer.write(acts[name])
                    if name.startswith("breaks") or name == "does not read":
                        await asyncio.sleep(chosen.uniform(0, 0.05))
                        continue
                    code, _, body = await asyncio.wait_for(answer(reader), 5)
                    if code >= 500 and code != 503:
                        self.found.failures.append(f"{self.since():.1f} s: {name}: {code} {body[:200]!r}")
                finally:
                    writer.close()

    # What goes on meanwhile

    async def swap(self) -> None:
        name = self.random.choice(list(self.asked))
        index = await self.manager.read_index()
        now = index.models[name].aliases["production"]
        await self.manager.promote(name, "2" if now == "1" else "1")
        self.found.swaps += 1

    async def fail_storage(self) -> None:
        kind = self.random.choice(list(FAULTS))
        self.found.faults[kind] += 1
        self.proxy.inject(FAULTS[kind](), times=FOR_EVER)
        await self.waited(OUTAGE_SECONDS)
        self.proxy.heal()

    async def kill(self) -> None:
        workers = [pid for pid in await asyncio.to_thread(self.workers) if pid]
        if workers:
            self.found.killed_at = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(workers), signal.SIGKILL)
            self.found.kills += 1

    def workers(self) -> list[int]:
        with contextlib.suppress(httpx.TransportError):
            found = httpx.get(f"{self.service.url}/models/status", headers=AS_ADMIN, trust_env=False, timeout=20).json()
            if found["workers"]["count"] > 1:
                return [one["pid"] for one in found["workers"]["processes"] if one["state"] == "serving"]
        return []

    async def look(self) -> None:
        while not await self.waited(LOOK_SECONDS):
            self.found.samples.append(await asyncio.to_thread(sample, self.service.process.pid, self.since()))

    def since(self) -> float:
        return time.monotonic() - self.began


def head(path: str, body: bytes, more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{more}content-length: {len(body)}\r\n\r\n".encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Read an answer: its status, its head in lower case, its body."""
    headers = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(headers.partition(b"content-length:")[2].partition(b"\r")[0] or 0)
    return int(headers.split(b" ", 2)[1]), headers, await reader.readexactly(length)


def sample(pid: int, seconds: float) -> Sample:
    """Weigh a process and all below it. Processes that end meanwhile do not count."""
    found = figures(pid)
    return Sample(seconds, sum(found.memory_bytes.values()) / 2**20, found.open_files, len(found.memory_bytes))


def settled(pid: int, processes: int, files: int | None = None) -> Sample:
    """Wait until the tree is as it was, or does not change any more; return what it holds then."""
    end = time.monotonic() + SETTLE_SECONDS
    before = sample(pid, 0)
    while time.monotonic() < end:
        time.sleep(1)
        now = sample(pid, 0)
        same = now.files == before.files and now.processes == before.processes
        if same and now.processes == processes and files in (None, now.files):
            return now
        before = now
    return before


def slope(samples: Sequence[Sample]) -> tuple[float, float]:
    """Return by how many megabytes a minute memory grows once it is warm, and by how many in all that time."""
    warm = [one for one in samples if one.seconds >= samples[-1].seconds * WARM_UP]
    windows = [warm[start : start + WINDOW] for start in range(0, len(warm), WINDOW)]
    least = [min(window, key=lambda one: one.megabytes) for window in windows if len(window) == WINDOW]
    if len(least) < 3:
        return 0.0, 0.0
    minutes = [one.seconds / 60 for one in least]
    gradient = statistics.linear_regression(minutes, [one.megabytes for one in least]).slope
    return gradient, gradient * (minutes[-1] - minutes[0])


def report(soak: Soak, first: Sample, last: Sample, code: int) -> list[str]:
    """Print what was found; return what is not as it must be."""
    found = soak.found
    gradient, growth = slope(found.samples)
    heaviest = max(one.megabytes for one in found.samples)
    usual = statistics.median(one.megabytes for one in found.samples)
    print(f"answers: {found.answers:,}, all held against scikit-learn's; {len(found.wrong)} were others")
    print(f"versions that answered: {', '.join(f'{name} {count:,}' for name, count in sorted(found.versions.items()))}")
    print(f"failed: {len(found.failures)}; lost with a worker that was killed: {found.excused}")
    print(f"swaps: {found.swaps}; workers killed: {found.kills}; storage faults: {dict(found.faults)}")
    print(f"unwanted callers: {sum(found.nuisances.values()):,}: {dict(found.nuisances)}")
    print(
        f"memory, PSS of all processes: median {usual:.0f} MB, most {heaviest:.0f} MB; {gradient:+.2f} MB a minute once warm"
    )
    print(f"idle before and after: {first.megabytes:.0f} and {last.megabytes:.0f} MB")
    print(
        f"open files, idle before and after: {first.files} and {last.files}; processes: {first.processes} and {last.processes}"
    )
    print(f"exit code after SIGTERM: {code}", flush=True)
    problems = [*found.failures[:10], *found.wrong[:10]]
    allowed = max(GROWTH_MB, GROWTH_SHARE * usual)
    if growth > allowed:
        problems.append(f"memory grew by {growth:.0f} MB; a flat line may seem to grow by {allowed:.0f} MB")
    if last.files > first.files or last.processes != first.processes:
        problems.append(
            f"{last.files} open files of {last.processes} processes are left; before there were {first.files}"
        )
    if code != 0:
        problems.append(f"the service ended with {code}")
    if found.excused > found.kills * (CALLERS + 1):
        problems.append(f"{found.excused} requests were lost with {found.kills} workers")
    if found.answers == 0 or found.swaps == 0:
        problems.append("there was nothing to see: no answers, or no swaps")
    return problems


def main() -> int:
    """Soak the service; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(
        f"python -m tests.soak --seconds {options.seconds:g} --workers {options.workers} --seed {options.seed}",
        flush=True,
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        server = s3.start(folder / "s3")
        stack.callback(server.stop)
        writer = server.writer
        storage = R2Storage(
            endpoint_url=server.endpoint_url,
            bucket=server.bucket,
            access_key_id=writer.access_key_id,
            secret_access_key=writer.secret_access_key,
        )
        manager = ModelStorageManager(storage, trust=TRUST)
        proxy = stack.enter_context(FaultyProxy(server.endpoint_url))
        asked = {}
        for name, (versions, examples, is_compiled) in fitted().items():
            asked[name] = questions(name, versions, examples)
            for model in versions:
                manager.save(name, model, examples=examples[:20], compile=is_compiled)
        bucket = r2_environment(proxy.url, server.bucket, server.reader)
        ours = {
            **{"ML_REFRESH_SECONDS": "1", "R2_MAX_ATTEMPTS": "2", "R2_READ_TIMEOUT_SECONDS": "3"},
            **{"ML_MAX_BODY_BYTES": str(LIMIT_BYTES), "ML_ADMIN_KEYS": f"tests:{ADMIN_KEY}", "ML_LOG_LEVEL": "error"},
        }
        service = Service(bucket | ours, command=(*COMMAND, "--workers", str(options.workers)))
        stack.callback(service.close)
        service.wait_ready()
        soak = Soak(service, manager, proxy, options.seed)
        soak.asked = asked
        warm_up(service, asked)
        processes = sample(service.process.pid, 0).processes
        first = settled(service.process.pid, processes)
        asyncio.run(soak.run(options.seconds))
        last = settled(service.process.pid, first.processes, first.files)
        code = service.process.poll()
        if code is None:
            service.process.send_signal(signal.SIGTERM)
            code = service.process.wait(60)
        problems = report(soak, first, last, code)
        if problems:
            print(service.log()[-3000:], file=sys.stderr)
    for problem in problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if problems else 0


def warm_up(service: Service, asked: dict[str, list[Question]]) -> None:
    """Ask for each model once or more from each worker, so that what is made at the first request is there."""
    for _ in range(20):
        for found in asked.values():
            httpx.post(f"{service.url}/predict", content=found[0].body, trust_env=False).raise_for_status()
        httpx.get(f"{service.url}/models/status", headers=AS_ADMIN, trust_env=False).raise_for_status()


if __name__ == "__main__":
    sys.exit(main())
