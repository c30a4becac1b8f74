"""What every test may ask for. The S3 server is a real one, started once for the whole run."""

import fcntl
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_limits

from app.compiler import translation
from app.model_storage import ModelStorageManager
from app.storage.r2 import R2Storage
from conformance.server import Server
from demo.s3 import S3Server, start
from tests.faults import FaultyProxy
from tests.trusted import TRUST

# What an example takes says more of what the machine does beside it.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """Leave the tests themselves out of collections: each would stand still for half a second, and its service not."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the service has it. Of what is computed on several, the time of one says nothing; and for a few rows, others are in the way."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def s3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server | Server]:
    """The S3 server; `s3.writer` and `s3.reader` are its two credentials."""
    if plugin := request.config.pluginmanager.get_plugin("conformance.plugin"):  # `make conformance` has its own
        yield plugin.server()
        return
    with open(Path(tempfile.gettempdir()) / "diskless-tests-s3.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: until a server listens, its ports look free to the others
        server = start(tmp_path_factory.mktemp("s3"))
    with server:
        yield server


@pytest.fixture(scope="session")
def bucket_client(s3) -> Any:
    """boto3's client of that server: for what no storage of ours would do."""
    return boto3.client(
        "s3",
        endpoint_url=s3.endpoint_url,
        aws_access_key_id=s3.writer.access_key_id,
        aws_secret_access_key=s3.writer.secret_access_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    )


@pytest.fixture
def bucket(s3, bucket_client) -> str:
    """The name of an empty bucket.

    It is the same bucket for every test, emptied before each: the first object in a new bucket takes SeaweedFS 0.2 s,
    emptying this one a few milliseconds, and tests may use fixed keys. SeaweedFS keeps the folders, though: no test may
    write `a` if absent where another had `a/b`.
    """
    for page in bucket_client.get_paginator("list_objects_v2").paginate(Bucket=s3.bucket):
        if keys := [{"Key": item["Key"]} for item in page.get("Contents", ())]:
            bucket_client.delete_objects(Bucket=s3.bucket, Delete={"Objects": keys})
    return s3.bucket


@pytest.fixture(scope="session")
def r2_arguments(s3) -> dict[str, str]:
    """What `R2Storage` needs to write to that bucket."""
    return {
        "endpoint_url": s3.endpoint_url,
        "bucket": s3.bucket,
        "access_key_id": s3.writer.access_key_id,
        "secret_access_key": s3.writer.secret_access_key,
    }


@pytest.fixture
def manager(bucket, r2_arguments) -> ModelStorageManager:
    """Saves into that bucket, and trusts our own code."""
    return ModelStorageManager(R2Storage(**r2_arguments), trust=TRUST)


@pytest.fixture
def proxy(s3) -> Iterator[FaultyProxy]:
    """A way to that server that can be told to go wrong."""
    with FaultyProxy(s3.endpoint_url) as running_proxy:
        yield running_proxy


@pytest.fixture
def translated(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, translation.Predictor], None]:
    """Lets a test say what the class of a fitted predictor is translated to, in the place of its own translations."""

    def put(estimator: Any, translate: translation.Predictor) -> None:
        kind = type(estimator)
        monkeypatch.setitem(translation.PREDICTORS, f"{kind.__module__}.{kind.__qualname__}", [translate])

    return put
