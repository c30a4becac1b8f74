"""Everything that can go wrong between the service and its bucket, for every object, at boot and during a refresh.

Each case is the same story: something is asked for and spoiled, what served before goes on (or nothing serves), the status
says what happened, and once the bucket is well again the service is, too, without being touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import aiohttp
import httpx
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import StandardScaler

import app.storage.r2 as r2
from app import main, seal
from app.errors import ModelNotFound, ModelNotReady, StorageUnavailable
from app.manifest import Manifest
from app.model_storage import ModelStorageManager
from app.names import ModelRef
from app.publishing import Draft
from app.refresher import Refresher
from app.registry import Registry, State
from app.runner import Runner
from app.storage.r2 import R2Storage
from app.trust import Trust
from app.verification import verify
from tests import faults
from tests.asgi import application, client, ready
from tests.faults import FOR_EVER, Answer, Fault, FaultyProxy
from tests.repository import ROWS, Served, draft, dumped, linear
from tests.service import AS_ADMIN, r2_environment, running

ATTEMPTS = 2
IMPATIENT_SECONDS = 0.15  # with what the proxy lets hang
PATIENT_SECONDS = 30.0  # with what it only takes its time for, as this machine does now and then
CHUNK_BYTES = 4096
BALLAST_BYTES = 4_300_000  # a bare model is read in chunks of 4 MiB: this one is two of them
PRIVATE, PUBLIC = seal.keygen()
KEY = seal.read_private_key(PRIVATE)
INSTANCES = ROWS[:2].tolist()


# What is served: each version has a scaler and a model of its own, and no two of them fit together


@cache
def scaler(version: int) -> Any:
    return StandardScaler().fit(ROWS * version + version)


@cache
def model(version: int) -> Any:
    """Nearly all of its bytes are in its answer: an altered one would show."""
    weights = np.random.default_rng(version).normal(size=(3, 400))
    return LinearRegression().fit(scaler(version).transform(ROWS), ROWS @ weights + version)


@cache
def bare_model(version: int) -> Any:
    """A large one. Not all of it is in its answer, but the status has the digest of what was loaded."""
    fitted = LinearRegression().fit(scaler(version).transform(ROWS), ROWS.sum(axis=1) * version)
    fitted.ballast = np.random.default_rng(version).bytes(BALLAST_BYTES)
    return fitted


def predicted(fitted: Callable[[int], Any], version: int) -> np.ndarray:
    return fitted(version).predict(scaler(version).transform(ROWS[:2]))


@cache
def file_of(fitted: Callable[[int], Any], version: int) -> bytes:
    return dumped(fitted(version))


class InSmallChunks(Draft):
    """A draft whose artifacts consist of several chunks although they are small."""

    def manifest(self, ref: ModelRef, created: str) -> Manifest:
        whole = super().manifest(ref, created)
        artifacts = []
        for artifact, part in zip(whole.artifacts, self.parts, strict=True):
            starts = range(0, len(part.body), CHUNK_BYTES)
            chunks = tuple(hashlib.sha256(part.body[start : start + CHUNK_BYTES]).hexdigest() for start in starts)
            artifacts.append(artifact.model_copy(update={"chunk_bytes": CHUNK_BYTES, "chunks": chunks}))
        return whole.model_copy(update={"artifacts": tuple(artifacts)})


@cache
def version_draft(version: int) -> Draft:
    made = draft(model(version), ROWS[:3], scaler=scaler(version))
    return InSmallChunks(made.parts, made.signature, made.golden, made.trained_with)


# What can happen to what


@dataclass(frozen=True)
class Kind:
    """The requests for one kind of object."""

    method: str
    containing: str
    span: str = ""


PUBLISHED = {
    "index": Kind("GET", "index.json"),
    "manifest": Kind("GET", "manifest.json"),
    "seal": Kind("GET", "manifest.seal"),
    "head of the model": Kind("HEAD", "model.joblib"),
    "first chunk of the model": Kind("GET", "model.joblib", "bytes=0-"),
    "later chunk of the model": Kind("GET", "model.joblib", f"bytes={2 * CHUNK_BYTES}-"),
    "head of the companion": Kind("HEAD", "scaler.joblib"),
    "companion": Kind("GET", "scaler.joblib"),
}


BARE = {
    "listing": Kind("GET", "list-type=2"),
    "first bytes of the model": Kind("GET", "a.joblib", "bytes=0-9"),
    "first chunk of the model": Kind("GET", "a.joblib", "bytes=0-4194303"),
    "later chunk of the model": Kind("GET", "a.joblib", "bytes=4194304-"),
    "companion": Kind("GET", "a_scaler.joblib"),
}


@dataclass(frozen=True)
class Trouble:
    """A fault, what is said of it (None: it does no harm), and how often the service asks before it says so."""

    fault: Fault
    says: str | None
    attempts: int = ATTEMPTS


OF_ANY = {
    "delayed": Trouble(faults.delay(0.02), None, 1),
    "dropped": Trouble(faults.drop(), "the connection was closed before the answer was there"),
    "hangs": Trouble(faults.hang(), "no answer in time"),
    "401": Trouble(faults.status(401, "Unauthorized"), "create an R2 API token", 1),
    "403": Trouble(faults.status(403, "AccessDenied"), "the token may not do this in this bucket", 1),
    "404": Trouble(
        faults.status(404, "NoSuchKey"), "not there|no such object|has no seal|changed while|no model to serve", 1
    ),
    "412": Trouble(faults.status(412, "PreconditionFailed"), "the state that was required|changed while", 1),
    "429": Trouble(faults.status(429, "TooManyRequests"), "the server answered 429"),
    "500": Trouble(faults.status(500, "InternalError"), "the server answered 500"),
    "503": Trouble(faults.status(503, "ServiceUnavailable"), "the server answered 503"),
}
OF_BODIES = {
    "cut": Trouble(faults.cut(5), "the connection was closed"),
    "hangs in the middle": Trouble(faults.hang(5), "no answer in time"),
    "truncated": Trouble(faults.truncate(5), "altered on their way|the answer is incomplete|the server answered 500"),
}
WHOLE = Trouble(faults.corrupt(30), "altered on their way")  # an object whose MD5 the server tells with it
CHUNK = Trouble(faults.corrupt(30), "sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}", 1)
BARE_CHUNK = Trouble(faults.corrupt(30), "cannot be read as joblib|is not a pickle|altered on their way", 1)
CORRUPT = {
    (False, "index"): WHOLE,
    (False, "manifest"): WHOLE,
    (False, "seal"): WHOLE,
    (False, "first chunk of the model"): CHUNK,
    (False, "later chunk of the model"): CHUNK,
    (False, "companion"): WHOLE,
    (True, "listing"): Trouble(faults.corrupt(30), "the server answered 500"),  # so botocore calls what it cannot read
    (True, "first bytes of the model"): Trouble(faults.corrupt(5), None, 1),  # they are read again with the others
    (True, "first chunk of the model"): BARE_CHUNK,
    (True, "later chunk of the model"): Trouble(faults.corrupt(30), "altered on their way", 1),
    (True, "companion"): WHOLE,
}
OF_HEADS = {"another size": Trouble(faults.resize(1), "the manifest says", 1)}


def troubles(kinds: dict[str, Kind], kind: str) -> dict[str, Trouble]:
    """Return everything that can happen to an answer of this kind."""
    if kinds[kind].method == "HEAD":
        return OF_ANY | OF_HEADS
    return OF_ANY | OF_BODIES | {"corrupt": CORRUPT[kinds is BARE, kind]}


def cases(kinds: dict[str, Kind]) -> list[Any]:
    return [
        pytest.param(kind, trouble, id=f"{kind}-{name}")
        for kind in kinds
        for name, trouble in troubles(kinds, kind).items()
    ]


# A bucket, and a service of it behind the proxy


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(r2, "FIRST_PAUSE_SECONDS", 0.005)


@pytest.fixture(scope="module")
def module_proxy(s3):
    with FaultyProxy(s3.endpoint_url) as running_proxy:
        yield running_proxy


@pytest.fixture(scope="module", autouse=True)
def little_patience_with_what_hangs(module_proxy):
    """For what hangs, and that alone, every client in this process has little patience: its time-out is what is tested."""

    class Connections(r2._Connections):
        async def send(self, request):
            session = await self._get_session(None)
            span = request.headers.get("Range", b"")  # botocore has signed it, and it is bytes since
            hangs = module_proxy.hangs(request.method, request.url, span.decode())
            seconds = IMPATIENT_SECONDS if hangs else PATIENT_SECONDS
            session._timeout = aiohttp.ClientTimeout(sock_connect=PATIENT_SECONDS, sock_read=seconds)
            return await super().send(request)  # which takes the session's time-out before it waits for anything

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r2, "_Connections", Connections)
        yield


@pytest.fixture
def proxy(module_proxy):
    yield module_proxy
    module_proxy.heal()


@pytest.fixture(scope="module")
def variables(s3, module_proxy) -> dict[str, Any]:
    """What every service here is told: few attempts."""
    where = r2_environment(module_proxy.url, s3.bucket, s3.reader)
    patience = {"R2_MAX_ATTEMPTS": str(ATTEMPTS), "R2_READ_TIMEOUT_SECONDS": "30", "ML_REFRESH_SECONDS": "3600"}
    return {"_env_file": None, **where, **patience}


class Bucket:
    """Two versions of one model in a bucket, of which one is wanted, and the digests of all that ever lay there."""

    bare = False
    version = 1

    def __init__(self, manager: ModelStorageManager) -> None:
        self.manager = manager
        self.digests: set[str] = set()

    async def fill(self) -> None:
        for version in (1, 2):
            await self.manager.publish("a", version_draft(version), seal_key=KEY)
            self.digests |= {hashlib.sha256(part.body).hexdigest() for part in version_draft(version).parts}

    async def turn(self) -> tuple[int, int]:
        """Have the other version wanted; return which was, and which is."""
        old, self.version = self.version, 3 - self.version
        await self.want(self.version)
        return old, self.version

    async def want(self, version: int) -> None:
        await self.manager.promote("a", str(version))

    def expected(self, version: int) -> np.ndarray:
        return predicted(model, version)


class BareBucket(Bucket):
    """The same of a model without a manifest: its files are replaced."""

    bare = True

    async def fill(self) -> None:
        for version in (2, 1):
            await self.want(version)

    async def want(self, version: int) -> None:
        for role, fitted in (("a", bare_model), ("a_scaler", scaler)):
            body = file_of(fitted, version)
            self.digests.add(hashlib.sha256(body).hexdigest())
            await self.manager.storage.put(f"{self.manager.prefix}{role}.joblib", body)

    def expected(self, version: int) -> np.ndarray:
        return predicted(bare_model, version)


async def filled(bucket: Bucket) -> AsyncIterator[Bucket]:
    async with bucket.manager.storage as storage:
        for info in await storage.list(bucket.manager.prefix):
            await storage.delete(info.key)
        await bucket.fill()
        yield bucket


@pytest.fixture(scope="module")
async def published(r2_arguments):
    manager = ModelStorageManager(R2Storage(**r2_arguments), prefix="faults/published/")
    async for bucket in filled(Bucket(manager)):
        yield bucket


@pytest.fixture(scope="module")
async def bare(r2_arguments):
    manager = ModelStorageManager(R2Storage(**r2_arguments), prefix="faults/bare/")
    async for bucket in filled(BareBucket(manager)):
        yield bucket


@dataclass
class Service:
    """The application in this process, and what is asked of it."""

    client: httpx.AsyncClient
    bucket: Bucket
    secrets: tuple[str, ...]

    async def look(self) -> tuple[int, dict[str, Any]]:
        response = await self.client.post("/models/refresh")
        return response.status_code, response.json()

    async def status(self) -> dict[str, Any]:
        """Return the status, in which nothing is loaded that was altered, and no secret is told."""
        response = await self.client.get("/models/status")
        assert response.status_code == 200
        assert not [secret for secret in self.secrets if secret in response.text]
        status = response.json()
        for row in status["models"]:
            assert {source["sha256"] for source in row.get("source", ())} <= self.bucket.digests
        return status

    async def predict(self) -> httpx.Response:
        return await self.client.post("/predict", json={"model": "a", "instances": INSTANCES})

    async def answers(self, version: int) -> None:
        """See that this version answers, and as scikit-learn does."""
        response = await self.predict()
        assert response.status_code == 200, response.text
        if not self.bucket.bare:
            assert response.json()["version"] == str(version)
        np.testing.assert_allclose(response.json()["predictions"], self.bucket.expected(version), rtol=1e-12)


@asynccontextmanager
async def serving_application(
    bucket: Bucket, variables: dict[str, Any], *, wait: bool = True
) -> AsyncIterator[Service]:
    trust = (
        {"ML_BARE_MODELS": "true"}
        if bucket.bare
        else {"ML_TRUSTED_KEYS": PUBLIC, "ML_REQUIRE_SEAL": "true", "ML_BARE_MODELS": "false"}
    )
    async with application(**variables, **trust, ML_PREFIX=bucket.manager.prefix) as app, client(app) as asking:
        if wait:
            await ready(app)
        yield Service(asking, bucket, (variables["R2_ACCESS_KEY_ID"], variables["R2_SECRET_ACCESS_KEY"]))


@pytest.fixture(scope="module")
async def service(published, variables):
    async with serving_application(published, variables) as started:
        yield started


@pytest.fixture(scope="module")
async def bare_service(bare, variables):
    with pytest.MonkeyPatch.context() as patch:  # no look at a changed pair but those that a test asks for
        patch.setattr(main, "Refresher", partial(Refresher, confirm_seconds=3600))
        async with serving_application(bare, variables) as started:
            yield started


def attempts(proxy: FaultyProxy, kind: Kind) -> set[int]:
    """Return how often the requests of this kind were made, each by itself."""
    spans = [
        (seen, next((v for name, v in seen.headers.items() if name.lower() == "range"), "")) for seen in proxy.seen
    ]
    asked = Counter(
        (seen.target, span)
        for seen, span in spans
        if seen.method == kind.method and kind.containing in seen.target and span.startswith(kind.span)
    )
    return set(asked.values())


async def asked_so_often(proxy: FaultyProxy, kind: Kind, count: int) -> None:
    """See that they were made so often. One that was given up may arrive after that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(30):
            while max(attempts(proxy, kind), default=0) < count:
                await asyncio.sleep(0.005)
    assert attempts(proxy, kind) == {count}


def spoil(proxy: FaultyProxy, kind: Kind, trouble: Trouble, times: int = FOR_EVER) -> None:
    proxy.seen.clear()
    proxy.inject(trouble.fault, method=kind.method, containing=kind.containing, span=kind.span, times=times)


# During a refresh


async def refreshed(running: Service, proxy: FaultyProxy, kind: Kind, trouble: Trouble) -> None:
    """Refresh while one kind of object is spoiled, then again when it is not; see what is served, and what is said."""
    await running.look()  # where an earlier case has failed, this one begins as it should all the same
    old, new = await running.bucket.turn()
    if running.bucket.bare:
        await running.look()  # a changed pair is loaded by the second look that sees it
    spoil(proxy, kind, trouble)
    code, outcome = await running.look()
    status = await running.status()
    now = {row["state"] for row in status["models"] if row["aliases"]}
    await asked_so_often(proxy, kind, trouble.attempts)
    assert (status["ready"], now) == (True, {"READY"})
    if trouble.says is None:
        assert (code, outcome["failed"]) == (200, {})
        await running.answers(new)
        return
    await running.answers(old)
    if code == 503:  # the index or the listing: whatever they would say
        assert re.search(trouble.says, outcome["detail"])
        assert status["storage"]["error"] == outcome["detail"]
    elif outcome["failed"]:
        ((ref, reason),) = outcome["failed"].items()
        (row,) = (row for row in status["models"] if row["state"] == "UNAVAILABLE")
        assert re.search(trouble.says, reason)
        assert (f"{row['name']}/{row['version']}", row["reason"], row["aliases"]) == (ref, reason, [])
    else:
        assert trouble is OF_ANY["404"], "only an index that is not there is no failure: it may be removed on purpose"
    proxy.heal()
    code, outcome = await running.look()
    status = await running.status()

    assert (code, outcome["failed"], status["storage"]["error"]) == (200, {}, None)
    assert [row["state"] for row in status["models"] if row["state"] != "UNLOADING"] == ["READY"]
    await running.answers(new)


@pytest.mark.parametrize(("kind", "trouble"), cases(PUBLISHED))
async def test_during_a_refresh_the_old_version_serves_until_the_new_one_can(service, proxy, kind, trouble):
    await refreshed(service, proxy, PUBLISHED[kind], trouble)


@pytest.mark.parametrize(("kind", "trouble"), cases(BARE))
async def test_during_a_refresh_the_old_pair_serves_until_the_new_one_can(bare_service, proxy, kind, trouble):
    await refreshed(bare_service, proxy, BARE[kind], trouble)


# At boot


@pytest.fixture(scope="module")
async def behind_the_proxy(r2_arguments, module_proxy):
    """The storage of all services that boot here: a client of its own for each would take most of the time."""
    arguments = r2_arguments | {"endpoint_url": module_proxy.url}
    async with R2Storage(**arguments, max_attempts=ATTEMPTS) as storage:
        yield storage


@asynccontextmanager
async def booting(storage: R2Storage, bucket: Bucket) -> AsyncIterator[Served]:
    """A service without HTTP that begins with nothing."""
    trust = Trust() if bucket.bare else Trust(keys=seal.parse_trusted_keys(PUBLIC), require_seal=True)
    prefix = bucket.manager.prefix
    manager = ModelStorageManager(storage, prefix=prefix, bare_models=bucket.bare, trust=trust)
    registry = Registry()
    refresher = Refresher(
        manager, registry, lambda model, costs: Runner(model), refresh_seconds=0.01, confirm_seconds=0.01
    )
    try:
        yield Served(manager, registry, refresher)
    finally:
        await refresher.stop()


async def is_told(served: Served, proxy: FaultyProxy, trouble: Trouble) -> None:
    """See that nothing is served, and that this trouble is said to be why: in full to whoever runs the service."""
    told, entries = served.registry.not_ready(), served.registry.snapshot.entries
    slot = served.slot("a") if entries else None
    reason = served.refresher.last_error or (slot and slot.reason)
    if slot:
        assert (slot.state, slot.runner) == (State.UNAVAILABLE, None)
        assert told == f"{slot.ref} is UNAVAILABLE: {slot.hint}"
    assert re.search(trouble.says or "", reason or told)
    assert reason or told == "the bucket has no model to serve"
    with pytest.raises((ModelNotReady, ModelNotFound)) as refused:
        await served.ask(INSTANCES, "a")
    assert not [place for place in (proxy.url, served.manager.prefix) if place in f"{told} {refused.value}"]


async def booted(storage: R2Storage, bucket: Bucket, proxy: FaultyProxy, kind: Kind, troubles: list[Trouble]) -> None:
    """Boot with one trouble after the other, the last of which passes without anybody telling the service."""
    *others, last = [trouble for trouble in troubles if trouble.says is not None]
    async with booting(storage, bucket) as served:
        for trouble in others:
            spoil(proxy, kind, trouble)
            await served.refresher.look_now()
            await is_told(served, proxy, trouble)
            await asked_so_often(proxy, kind, trouble.attempts)
            proxy.heal()
        spoil(proxy, kind, last)
        served.refresher.start()
        await served.until(lambda: max(attempts(proxy, kind), default=0) >= last.attempts)
        assert served.registry.not_ready()
        proxy.heal()
        for trouble in troubles:
            if trouble.says is None:
                spoil(proxy, kind, trouble)
        await served.until(lambda: served.registry.not_ready() is None)

        np.testing.assert_allclose(await served.ask(INSTANCES, "a"), bucket.expected(bucket.version), rtol=1e-12)
        assert {source.sha256 for source in served.registry.get("a").model.report.sources} <= bucket.digests
        assert served.refresher.last_error is None


@pytest.mark.parametrize("kind", PUBLISHED)
async def test_a_boot_waits_until_the_version_can_be_loaded(behind_the_proxy, published, proxy, kind):
    await booted(behind_the_proxy, published, proxy, PUBLISHED[kind], list(troubles(PUBLISHED, kind).values()))


@pytest.mark.parametrize("kind", BARE)
async def test_a_boot_waits_until_the_pair_can_be_loaded(behind_the_proxy, bare, proxy, kind):
    await booted(behind_the_proxy, bare, proxy, BARE[kind], list(troubles(BARE, kind).values()))


# An index, or a listing, that is older than what was followed already


async def test_an_older_index_moves_the_alias_back_and_the_next_one_forward(service, proxy, behind_the_proxy):
    bucket = service.bucket
    await service.look()
    old, new = await bucket.turn()
    with proxy.recording("index.json") as answers:
        await service.look()
    await service.answers(new)
    await bucket.turn()
    await service.look()
    proxy.inject(faults.replay(answers[-1]), containing="index.json", times=FOR_EVER)
    for _ in range(2):  # the second is told that nothing has changed
        assert (await service.look())[0] == 200
        await service.answers(new)
    async with booting(behind_the_proxy, bucket) as served:
        await served.refresher.look_now()
        assert served.version("a") == str(new)
        proxy.heal()
        await served.refresher.look_now()
        assert served.version("a") == str(old)
    await service.look()

    await service.answers(old)


async def test_answers_are_those_of_the_version_they_name_while_indices_of_different_age_arrive(service, proxy):
    await service.look()
    await service.bucket.turn()
    with proxy.recording("index.json") as answers:
        await service.look()
    await service.bucket.turn()
    done, seen = asyncio.Event(), Counter()

    async def ask() -> None:
        while not done.is_set():
            answer = (await service.predict()).json()
            version = int(answer["version"])
            np.testing.assert_allclose(answer["predictions"], service.bucket.expected(version), rtol=1e-12)
            seen[version] += 1

    asking = [asyncio.create_task(ask()) for _ in range(3)]
    for _ in range(5):
        proxy.inject(faults.replay(answers[-1]), containing="index.json")
        await service.look()
        await service.look()
    done.set()
    await asyncio.gather(*asking)

    assert set(seen) == {1, 2}


@pytest.fixture
async def writer(r2_arguments):
    """Somebody else's way to an empty part of the bucket."""
    manager = ModelStorageManager(R2Storage(**r2_arguments), prefix="faults/written/")
    async with manager.storage as storage:
        for info in await storage.list(manager.prefix):
            await storage.delete(info.key)
        yield manager


async def test_an_older_index_that_names_a_version_which_is_gone_changes_nothing(writer, behind_the_proxy, proxy):
    for version in (1, 2):
        await writer.publish("a", version_draft(version), seal_key=KEY)
    async with booting(behind_the_proxy, Bucket(writer)) as served:
        with proxy.recording("index.json") as answers:
            await served.refresher.look_now()
        await writer.promote("a", "2")
        await served.refresher.look_now()
        await writer.unpublish("a", "1")
        proxy.inject(faults.replay(answers[-1]), containing="index.json", times=FOR_EVER)
        outcome = await served.refresher.look_now()
        assert "manifest.json is not there" in outcome.failed["a/1"]
        assert served.version("a") == "2"
        proxy.heal()
        await served.refresher.look_now()

        assert list(served.registry.snapshot.entries["a"].slots) == ["2"]
        np.testing.assert_allclose(await served.ask(INSTANCES, "a"), predicted(model, 2), rtol=1e-12)


async def test_an_older_index_of_another_content_under_the_same_label_changes_nothing(writer, behind_the_proxy, proxy):
    await writer.publish("a", version_draft(1), seal_key=KEY)
    async with booting(behind_the_proxy, Bucket(writer)) as served:
        with proxy.recording("index.json") as answers:
            await served.refresher.look_now()
        for info in await writer.storage.list(writer.prefix):
            await writer.storage.delete(info.key)
        await writer.publish("a", version_draft(2), seal_key=KEY)
        await served.refresher.look_now()
        proxy.inject(faults.replay(answers[-1]), containing="index.json", times=FOR_EVER)
        outcome = await served.refresher.look_now()
        assert "the index says" in outcome.failed["a/1"]
        np.testing.assert_allclose(await served.ask(INSTANCES, "a"), predicted(model, 2), rtol=1e-12)
        assert "the index says" in served.slot("a").reason
        proxy.heal()
        outcome = await served.refresher.look_now()

        np.testing.assert_allclose(await served.ask(INSTANCES, "a"), predicted(model, 2), rtol=1e-12)
        assert (outcome.failed, served.slot("a").state, served.slot("a").reason) == ({}, State.READY, None)


async def test_an_index_from_before_a_model_takes_it_out_of_service_until_a_newer_one_comes(
    writer, behind_the_proxy, proxy
):
    await writer.publish("other", version_draft(1), seal_key=KEY)
    async with booting(behind_the_proxy, Bucket(writer)) as served:
        with proxy.recording("index.json") as answers:
            await served.refresher.look_now()
        await writer.publish("a", version_draft(2), seal_key=KEY)
        await served.refresher.look_now()
        proxy.inject(faults.replay(answers[-1]), containing="index.json", times=FOR_EVER)
        await served.refresher.look_now()
        with pytest.raises(ModelNotFound, match="served are: other"):
            await served.ask(INSTANCES, "a")
        proxy.heal()
        await served.refresher.look_now()

        np.testing.assert_allclose(await served.ask(INSTANCES, "a"), predicted(model, 2), rtol=1e-12)


async def test_an_older_listing_of_files_that_were_replaced_changes_nothing(bare_service, proxy):
    await bare_service.look()
    await bare_service.look()
    with proxy.recording("list-type=2") as answers:
        await bare_service.look()
    _, new = await bare_service.bucket.turn()
    await bare_service.look()
    await bare_service.look()
    proxy.inject(faults.replay(answers[-1]), containing="list-type=2", times=FOR_EVER)
    await bare_service.look()
    _, outcome = await bare_service.look()
    assert ["changed while it was read" in reason for reason in outcome["failed"].values()] == [True]
    await bare_service.answers(new)
    proxy.heal()
    await bare_service.look()
    _, outcome = await bare_service.look()

    assert outcome["failed"] == {}
    await bare_service.answers(new)


async def test_an_index_that_became_another_valid_one_on_its_way_is_not_followed(service, proxy):
    await service.look()
    old, new = await service.bucket.turn()
    digest = (await service.bucket.manager.read_index()).models["a"].versions[str(new)].manifest_sha256.encode()

    def change(answer: Answer) -> Answer:
        assert digest in answer.body
        return Answer(answer.status, answer.headers, answer.body.replace(digest, b"0" * 64))

    proxy.inject(Fault(spoil=change), containing="index.json", times=FOR_EVER)
    code, outcome = await service.look()
    assert (code, "altered on their way" in outcome["detail"]) == (503, True)
    await service.answers(old)
    proxy.heal()
    await service.look()

    await service.answers(new)


# Retries


@pytest.mark.parametrize("name", ["dropped", "429", "500", "503", "cut"])
async def test_what_passes_at_the_second_attempt_is_nobodys_trouble(service, proxy, name):
    await service.look()
    _, new = await service.bucket.turn()
    trouble = (OF_ANY | OF_BODIES)[name]
    for kind in PUBLISHED.values():
        if kind.method == "GET" or name in OF_ANY:
            spoil(proxy, kind, trouble, times=1)
    code, outcome = await service.look()

    assert (code, outcome["failed"]) == (200, {})
    assert attempts(proxy, PUBLISHED["later chunk of the model"]) == {2}
    await service.answers(new)


def test_pauses_between_attempts_are_random_and_have_a_limit(monkeypatch):
    monkeypatch.setattr(r2, "FIRST_PAUSE_SECONDS", 0.25)
    for attempt, longest in [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 8), (100_000, 8)]:
        pauses = [r2.pause_seconds(attempt) for _ in range(200)]

        assert len(set(pauses)) == 200
        assert 0 <= min(pauses) < longest / 2 < max(pauses) <= longest


# Writes whose answer is lost

WRITES = ["model.joblib", "scaler.joblib", "manifest.json", "manifest.seal", "index.json"]
LOST = {"lost": faults.lose_answer(), "lost behind a 500": faults.lose_answer(500)}


@pytest.fixture(scope="module")
async def patient(r2_arguments, module_proxy):
    """The storage of those who write: nothing hangs here, and what somebody else does in between takes a moment."""
    async with R2Storage(**r2_arguments | {"endpoint_url": module_proxy.url}, max_attempts=ATTEMPTS) as storage:
        yield storage


@pytest.fixture
async def through_the_proxy(patient, writer):
    """A writer who has written a version already."""
    trust = Trust(keys=seal.parse_trusted_keys(PUBLIC), require_seal=True)
    manager = ModelStorageManager(patient, prefix=writer.prefix, trust=trust)
    await manager.publish("a", version_draft(1), seal_key=KEY)
    return manager


async def versions_that_would_serve(manager: ModelStorageManager) -> list[str]:
    """See that everything in the bucket would serve, and return what that is."""
    verdicts = [verdict async for verdict in verify(manager)]
    assert [verdict.problem for verdict in verdicts if verdict.problem] == []
    return [verdict.ref for verdict in verdicts]


@pytest.mark.parametrize("fault", LOST.values(), ids=LOST.keys())
@pytest.mark.parametrize("written", WRITES)
async def test_a_publish_of_which_an_answer_is_lost_is_done_and_says_so(through_the_proxy, proxy, written, fault):
    proxy.inject(fault, method="PUT", containing=written)
    ref, live = await through_the_proxy.publish("a", version_draft(2), promote=True, seal_key=KEY)
    entry = (await through_the_proxy.read_index()).models["a"]

    assert (str(ref), live) == ("a/2", True)
    assert await versions_that_would_serve(through_the_proxy) == ["a/1", "a/2"]
    assert [move.version for move in entry.history["production"]] == ["1", "2"]


@pytest.mark.parametrize("written", [key for key in WRITES if key != "index.json"])
async def test_a_publish_that_never_gets_an_answer_fails_and_can_be_repeated(through_the_proxy, proxy, written):
    proxy.inject(faults.lose_answer(), method="PUT", containing=written, times=FOR_EVER)
    with pytest.raises(StorageUnavailable, match=rf"cannot write .*/{written} in .*attempts: {ATTEMPTS}"):
        await through_the_proxy.publish("a", version_draft(2), version="x", promote=True, seal_key=KEY)
    proxy.heal()
    assert await versions_that_would_serve(through_the_proxy) == ["a/1"]
    await through_the_proxy.publish("a", version_draft(2), version="x", promote=True, seal_key=KEY)

    assert await versions_that_would_serve(through_the_proxy) == ["a/1", "a/x"]
    assert (await through_the_proxy.read_index()).models["a"].aliases == {"production": "x"}


async def test_a_change_of_the_index_that_never_gets_an_answer_is_looked_for(through_the_proxy, proxy):
    proxy.inject(faults.lose_answer(), method="PUT", containing="index.json", times=FOR_EVER)
    await through_the_proxy.publish("a", version_draft(2), version="x", promote=True, seal_key=KEY)
    proxy.heal()

    assert await versions_that_would_serve(through_the_proxy) == ["a/1", "a/x"]
    assert (await through_the_proxy.read_index()).models["a"].aliases == {"production": "x"}


async def test_a_change_of_the_index_that_may_have_been_made_is_told_as_such(through_the_proxy, proxy):
    await through_the_proxy.publish("a", version_draft(2), seal_key=KEY)
    proxy.inject(faults.drop(), method="PUT", containing="index.json", times=FOR_EVER)
    with pytest.raises(StorageUnavailable, match="whether the index was changed is not known: look at it before you"):
        await through_the_proxy.promote("a", "2")
    proxy.heal()

    assert (await through_the_proxy.read_index()).models["a"].aliases == {"production": "1"}


@pytest.mark.parametrize("fault", LOST.values(), ids=LOST.keys())
async def test_a_promotion_whose_answer_is_lost_is_done_once_and_says_so(through_the_proxy, proxy, fault):
    await through_the_proxy.publish("a", version_draft(2), seal_key=KEY)
    proxy.inject(fault, method="PUT", containing="index.json")
    moved = await through_the_proxy.promote("a", "2")
    entry = (await through_the_proxy.read_index()).models["a"]

    assert (str(moved.ref), moved.previous, moved.changed) == ("a/2", "1", True)
    assert entry.aliases == {"production": "2"}
    assert [move.version for move in entry.history["production"]] == ["1", "2"]


@pytest.fixture
def somebody_else(r2_arguments, writer):
    """A function that publishes another model, for the proxy's thread."""
    manager = ModelStorageManager(R2Storage(**r2_arguments), prefix=writer.prefix)
    return lambda: manager.save("other", linear(1), seal_key=KEY)


async def test_a_publish_that_somebody_else_overtook_before_its_lost_answer_says_that_it_is_done(
    through_the_proxy, proxy, somebody_else
):
    proxy.inject(faults.after(somebody_else, faults.lose_answer()), method="PUT", containing="index.json")
    ref, live = await through_the_proxy.publish("a", version_draft(2), promote=True, seal_key=KEY)
    index = await through_the_proxy.read_index()

    assert (str(ref), live) == ("a/2", True)
    assert [move.version for move in index.models["a"].history["production"]] == ["1", "2"]
    assert list(index.models) == ["a", "other"]


async def test_a_promotion_that_somebody_else_overtook_before_its_lost_answer_says_that_it_is_done(
    through_the_proxy, proxy, somebody_else
):
    await through_the_proxy.publish("a", version_draft(2), seal_key=KEY)
    proxy.inject(faults.after(somebody_else, faults.lose_answer()), method="PUT", containing="index.json")
    moved = await through_the_proxy.promote("a", "2")
    index = await through_the_proxy.read_index()

    assert (moved.previous, moved.changed) == ("1", True)
    assert [move.version for move in index.models["a"].history["production"]] == ["1", "2"]
    assert list(index.models) == ["a", "other"]


async def test_a_rollback_that_somebody_else_overtook_before_its_lost_answer_says_that_it_is_done(
    through_the_proxy, proxy, somebody_else
):
    await through_the_proxy.publish("a", version_draft(2), promote=True, seal_key=KEY)
    proxy.inject(faults.after(somebody_else, faults.lose_answer()), method="PUT", containing="index.json")
    moved = await through_the_proxy.rollback("a")
    index = await through_the_proxy.read_index()

    assert (str(moved.ref), moved.previous, moved.changed) == ("a/1", "2", True)
    assert [move.version for move in index.models["a"].history["production"]] == ["1", "2", "1"]
    assert list(index.models) == ["a", "other"]


async def test_an_unpublishing_that_somebody_else_overtook_before_its_lost_answer_says_that_it_is_done(
    through_the_proxy, proxy, somebody_else
):
    await through_the_proxy.publish("a", version_draft(2), seal_key=KEY)
    proxy.inject(faults.after(somebody_else, faults.lose_answer()), method="PUT", containing="index.json")
    gone = await through_the_proxy.unpublish("a", "2")

    assert (gone.objects_deleted, gone.repeated) == (4, False)
    assert await versions_that_would_serve(through_the_proxy) == ["a/1", "other/1"]


# The real process


async def test_a_process_boots_when_what_hung_answers_and_goes_on_when_an_artifact_is_cut(writer, proxy, variables):
    await writer.publish("a", version_draft(1), seal_key=KEY)
    environment = {name: value for name, value in variables.items() if value} | {
        "ML_PREFIX": writer.prefix,
        "ML_TRUSTED_KEYS": PUBLIC,
        "ML_REQUIRE_SEAL": "true",
        "ML_REFRESH_SECONDS": "1",
        "R2_READ_TIMEOUT_SECONDS": "2",
    }
    proxy.inject(faults.hang(), times=FOR_EVER)
    with running(environment) as process, ThreadPoolExecutor(3) as threads:
        process.wait_live()
        status = await asyncio.to_thread(process.wait_for, lambda status: status["storage"]["error"], "told")
        assert (status["ready"], status["models"]) == (False, [])
        assert "no answer in time" in status["storage"]["error"]
        proxy.heal()
        await asyncio.to_thread(process.wait_ready)
        done, seen = threading.Event(), Counter()

        def ask() -> None:
            with httpx.Client(base_url=process.url, headers=AS_ADMIN, timeout=30, trust_env=False) as asking:
                while not done.is_set():
                    answer = asking.post("/predict", json={"model": "a", "instances": INSTANCES})
                    assert answer.status_code == 200, answer.text
                    version = int(answer.json()["version"])
                    np.testing.assert_allclose(answer.json()["predictions"], predicted(model, version), rtol=1e-12)
                    seen[version] += 1

        try:
            asking = [threads.submit(ask) for _ in range(3)]
            proxy.inject(faults.cut(1000), method="GET", containing="/a/2/model.joblib", times=FOR_EVER)
            await writer.publish("a", version_draft(2), promote=True, seal_key=KEY)
            states = {"1": "READY", "2": "UNAVAILABLE"}
            status = await asyncio.to_thread(
                process.wait_for,
                lambda status: {row["version"]: row["state"] for row in status["models"]} == states,
                "told of the cut",
            )
            assert re.search("the connection was closed|no answer in time", process.model("a")["reason"])
            assert set(seen) <= {1}
            proxy.heal()
            await asyncio.to_thread(process.wait_for, lambda _: seen[2], "serving the new version")
        finally:
            done.set()
        for task in asking:
            task.result()

        assert set(seen) == {1, 2}
        assert process.stop() == 0
