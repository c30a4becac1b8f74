"""Loads of large models from S3 on this machine: time and memory, beside a plain download and `joblib.load` of it.

Each sample is taken in a process of its own that has the libraries, and has loaded a small model of the kind the same way
before. The order is shuffled anew in each round, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aioboto3
import boto3
import joblib
import skops.io
import uvloop
from botocore.config import Config

from app import inspection, loaders, memory, publishing, versions
from app.loading import soundness
from app.memory import MB
from app.model import Model
from app.model_storage import ModelStorageManager
from app.storage.r2 import R2Storage
from app.storage.reader import ObjectReader
from app.worker import Worker
from bench import models
from bench.results import spread, table
from demo import s3

ROUNDS = 5
STORED_MB = 100
SMALL_MB = 2.0
TEXT_MB = 8  # 300,000 words
SAMPLE_SECONDS = 120.0  # at most
TIME_BUDGET = 1.3  # times a plain download and load
ARRAY_BUDGET_MB = 32  # at the peak, beyond what stays
OBJECT_BUDGET = 2.0  # times what stays, at the peak


class Case(NamedTuple):
    """A model as it lies in the bucket."""

    kind: str
    format: str
    form: str  # published or bare

    def name(self, size: str = "large") -> str:
        """Return what the model is called there."""
        return f"{size}-{self.kind}-{self.format}-{self.form}"

    def key(self, size: str = "large") -> str:
        """Return where its bytes lie."""
        ending = publishing.ENDINGS[self.format]
        return f"models/{self.name(size)}" + (ending if self.form == "bare" else f"/1/model{ending}")


CASES = (
    *(Case(kind, "joblib", "published") for kind in models.KINDS),
    *(Case(kind, "joblib", "bare") for kind in ("linear", "forest")),
    *(Case(kind, "pickle", "published") for kind in ("forest", "boosting")),
    *(Case(kind, "skops", "published") for kind in ("linear", "forest")),
)
TAKEN_APART = tuple(Case(kind, "joblib", "published") for kind in ("linear", "forest", "boosting", "text"))
ARRAYS = ("linear", "neighbours")
TREES = ("forest", "boosting")


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where the models lie."""

    endpoint_url: str
    name: str
    access_key_id: str
    secret_access_key: str

    def storage(self) -> R2Storage:
        """Return the service's way to it."""
        return R2Storage(
            endpoint_url=self.endpoint_url,
            bucket=self.name,
            access_key_id=self.access_key_id,
            secret_access_key=self.secret_access_key,
        )

    def client_arguments(self) -> dict[str, Any]:
        """Return what boto3's and aioboto3's clients are made with."""
        return {
            "endpoint_url": self.endpoint_url,
            "aws_access_key_id": self.access_key_id,
            "aws_secret_access_key": self.secret_access_key,
            "region_name": "us-east-1",
            "config": Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        }


class Sample(NamedTuple):
    """One load: seconds, those of them that its threads computed (together), and the memory beyond what was in use before.

    In bytes, at the worst moment and afterwards.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    resident_bytes: int


# In a process of its own


class _Measured:
    """Time and memory of what happens in its block."""

    def __enter__(self) -> _Measured:
        gc.collect()
        memory.trim_heap()
        memory.reset_peak()
        self._before = memory.resident_bytes()
        self._started, self._computed = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self.cpu_seconds = time.process_time() - self._computed
        self.peak_bytes = memory.peak_bytes() - self._before

    def sample(self) -> Sample:
        """Return them, with what is in use now."""
        memory.trim_heap()
        return Sample(self.seconds, self.cpu_seconds, self.peak_bytes, memory.resident_bytes() - self._before)


def load_as_the_service(bucket: Bucket, case: Case) -> Sample:
    """Load as the service does, but for the golden rows: manifest, ranges, digests, allow-list, signature."""

    async def load() -> Sample:
        async with bucket.storage() as storage:
            manager, loader = ModelStorageManager(storage), Worker("loader")
            for size in ("small", "large"):
                wanted, model = await manager.wanted(case.name(size)), None  # the small one goes before
                with _Measured() as measured, await manager.fetch(wanted) as bundle:
                    model = await loader.run(Model.from_bundle, bundle)
            assert model is not None
            return measured.sample()

    return uvloop.run(load())


def load_with_aioboto3(bucket: Bucket, case: Case) -> Sample:
    """Download the bytes by one GET of the client that the service uses, and load them from memory."""

    async def load() -> Sample:
        async with aioboto3.Session().client("s3", **bucket.client_arguments()) as client:
            for size in ("small", "large"):
                value = None
                with _Measured() as measured:
                    answer = await client.get_object(Bucket=bucket.name, Key=case.key(size))
                    body = await answer["Body"].read()
                    value = from_memory(case.format, body)
            del body
            assert value is not None
            return measured.sample()

    return uvloop.run(load())


def load_with_boto3(bucket: Bucket, case: Case) -> Sample:
    """Download the bytes by one GET that blocks, and load them from memory."""
    client = boto3.client("s3", **bucket.client_arguments())
    for size in ("small", "large"):
        value = None
        with _Measured() as measured:
            body = client.get_object(Bucket=bucket.name, Key=case.key(size))["Body"].read()
            value = from_memory(case.format, body)
    del body
    assert value is not None
    return measured.sample()


def from_memory(format: str, body: bytes) -> Any:
    """Load as the format's own library does, which runs whatever the bytes say."""
    if format == "skops":
        return skops.io.loads(body, trusted=skops.io.get_untrusted_types(data=body))
    return joblib.load(io.BytesIO(body))


WAYS: dict[str, Callable[[Bucket, Case], Sample]] = {
    "service": load_as_the_service,
    "aioboto3": load_with_aioboto3,
    "boto3": load_with_boto3,
}


def take_apart(bucket: Bucket, case: Case) -> dict[str, float]:
    """Return the seconds of each thing that a load does, done alone."""
    client = boto3.client("s3", **bucket.client_arguments())
    body: bytes = client.get_object(Bucket=bucket.name, Key=case.key())["Body"].read()
    manifest = client.get_object(Bucket=bucket.name, Key=case.key().rpartition("/")[0] + "/manifest.json")
    (artifact,) = json.loads(manifest["Body"].read())["artifacts"]
    chunk_bytes = {"chunk_bytes": artifact["chunk_bytes"]}
    seconds: dict[str, float] = {}

    def timed[T](name: str, function: Callable[[], T]) -> T:
        started = time.perf_counter()
        value = function()
        seconds[name] = time.perf_counter() - started
        return value

    async def stream(digests: Sequence[str]) -> None:
        async with bucket.storage() as storage:
            info = await storage.head(case.key())
            loop = asyncio.get_running_loop()
            with ObjectReader(storage, info, loop=loop, label="it", chunk_digests=digests, **chunk_bytes) as reader:
                await asyncio.to_thread(timed, "checked" if digests else "unchecked", lambda: _read_through(reader))

    memory.map_chunks_apart(artifact["chunk_bytes"])
    uvloop.run(stream(()))
    uvloop.run(stream(artifact["chunks"]))
    timed("sha256", lambda: hashlib.sha256(body).digest())
    timed("joblib.load", lambda: from_memory(case.format, body))
    loaded = timed("loaders.load", lambda: loaders.load(case.format, io.BytesIO(body), "it"))
    timed("soundness", lambda: soundness.check(loaded.value))
    return seconds


def _read_through(reader: ObjectReader) -> None:
    buffer = bytearray(MB)
    while reader.readinto(buffer):
        pass


# The run


def report() -> str:
    """Measure everything; return the section on it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # for the processes of the samples
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.loads"])
    with tempfile.TemporaryDirectory() as folder, s3.start(Path(folder)) as server:
        bucket = Bucket(
            server.endpoint_url, server.bucket, server.writer.access_key_id, server.writer.secret_access_key
        )
        _say("making the models")
        stored = asyncio.run(_fill(bucket))
        samples: dict[tuple[Case, str], list[Sample]] = {}
        parts: dict[Case, list[dict[str, float]]] = {}
        for number in range(ROUNDS):
            _say(f"round {number + 1} of {ROUNDS}")
            with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
                wanted = [(case, way) for case in CASES for way in WAYS if _is_taken(case, way)]
                random.Random(number).shuffle(wanted)
                for case, way in wanted:
                    sample = processes.submit(WAYS[way], bucket, case).result(SAMPLE_SECONDS)
                    samples.setdefault((case, way), []).append(sample)
                for case in TAKEN_APART:
                    apart = processes.submit(take_apart, bucket, case).result(SAMPLE_SECONDS)
                    parts.setdefault(case, []).append(apart)
    return "\n\n".join((_times(stored, samples), _memory(samples), _parts(parts)))


def _is_taken(case: Case, way: str) -> bool:
    """Whether a sample is needed: the bytes of a bare model are those of the published one."""
    return way == "service" or (case.form == "published" and (way == "aioboto3" or case.format == "joblib"))


async def _fill(bucket: Bucket) -> dict[Case, int]:
    """Put every case into the bucket, large and small; return the sizes of the large ones in bytes."""
    sizes: dict[Case, int] = {}
    async with bucket.storage() as storage:
        manager = ModelStorageManager(storage)
        for kind, make in models.KINDS.items():
            large = TEXT_MB if kind == "text" else STORED_MB
            for size, value in (("small", make(SMALL_MB)), ("large", make(large))):
                bodies: dict[str, publishing.DraftPart] = {}
                for case in (case for case in CASES if case.kind == kind):
                    if case.format not in bodies:
                        bodies[case.format] = publishing.part_from_object("model", value, case.format)
                    part = bodies[case.format]
                    sizes[case] = len(part.body)
                    if case.form == "bare":
                        await storage.put(case.key(size), part.body)
                    else:
                        signature, trained = inspection.infer([], value), dict(versions.present_versions())
                        draft = publishing.Draft((part,), signature, None, trained)
                        await manager.publish(case.name(size), draft)
    return sizes


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


# The tables

Samples = Mapping[tuple[Case, str], Sequence[Sample]]


def _times(stored: Mapping[Case, int], samples: Samples) -> str:
    rows = []
    for case in CASES:
        plain = case._replace(form="published")
        ours, aio, blocking = samples[case, "service"], samples[plain, "aioboto3"], samples.get((plain, "boto3"), [])
        ratios = _ratios(ours, aio, "seconds")
        rows.append(
            [
                f"{case.kind}, {case.format}, {case.form}",
                f"{stored[case] / MB:.0f}",
                spread(ratios),
                "" if case.kind == "text" else _met(statistics.median(ratios), TIME_BUDGET),
                spread(_ratios(ours, aio, "cpu_seconds")),
                spread(_ratios(ours, blocking, "seconds")) if blocking else "",
                *(spread([sample.seconds for sample in each]) if each else "" for each in (ours, aio, blocking)),
            ]
        )
    return (
        f"### Time\n\nSeconds from S3 on loopback, as medians of {ROUNDS} (least-most); the ratios are those of each round. "
        f"The budget is {TIME_BUDGET} times one GET by the service's own client (aioboto3) and a load from memory; one by boto3 "
        "blocks its thread, and costs less.\n\n"
    ) + table(
        (
            *("model", "MB", "service : aioboto3", "budget", "the same in CPU time", "service : boto3"),
            *("service, s", "aioboto3, s", "boto3, s"),
        ),
        rows,
    )


def _ratios(ours: Sequence[Sample], theirs: Sequence[Sample], field: str) -> list[float]:
    return [getattr(one, field) / getattr(other, field) for one, other in zip(ours, theirs, strict=True)]


def _met(found: float, budget: float) -> str:
    return "met" if found <= budget else "**missed**"


def _memory(samples: Samples) -> str:
    rows = []
    for case in CASES:
        peak, stays = _sizes(samples[case, "service"])
        plain_peak, plain_stays = _sizes(samples[case._replace(form="published"), "aioboto3"])
        met = ""
        if case.kind in ARRAYS:
            met = _met(peak, stays + ARRAY_BUDGET_MB)
        elif case.kind in TREES and case.format != "skops":
            met = _met(peak, OBJECT_BUDGET * stays)
        rows.append(
            [
                f"{case.kind}, {case.format}, {case.form}",
                f"{peak / stays:.2f}",
                f"{peak - stays:.0f}",
                met,
                f"{peak:.0f}",
                f"{stays:.0f}",
                f"{plain_peak / plain_stays:.2f}",
                f"{plain_peak:.0f}",
                f"{plain_stays:.0f}",
            ]
        )
    return (
        "### Memory\n\nMB beyond what was in use before, medians: at the worst moment of the load, and afterwards. The budget is "
        f"what stays + {ARRAY_BUDGET_MB} MB for linear models and neighbours, {OBJECT_BUDGET:.0f} times what stays for pickled "
        "trees. Plain is aioboto3 and a load from memory.\n\n"
    ) + table(
        (
            *("model", "peak : stays", "peak - stays", "budget", "peak", "stays"),
            *("plain, peak : stays", "plain, peak", "plain, stays"),
        ),
        rows,
    )


def _sizes(samples: Sequence[Sample]) -> tuple[float, float]:
    return (
        statistics.median(sample.peak_bytes for sample in samples) / MB,
        statistics.median(sample.resident_bytes for sample in samples) / MB,
    )


def _parts(parts: Mapping[Case, Sequence[Mapping[str, float]]]) -> str:
    rows = []
    for case, taken in parts.items():
        median = {name: statistics.median(part[name] for part in taken) for name in taken[0]}
        chunks = median["checked"] - median["unchecked"]
        reader = median["loaders.load"] - median["soundness"]
        figures = (median["unchecked"], chunks, median["sha256"], median["joblib.load"], reader, median["soundness"])
        rows.append([case.kind, *(f"{figure * 1000:.0f}" for figure in figures)])
    return (
        "### Parts\n\nMilliseconds of each part of a load done alone, medians, published with joblib. The stream is read without "
        "loading, with the digest of the whole and without those of the chunks, which add what the next column says.\n\n"
    ) + table(
        (
            "model",
            "stream",
            "+ chunk digests",
            "digest of the whole",
            "joblib.load",
            "our unpickler",
            "soundness check",
        ),
        rows,
    )
