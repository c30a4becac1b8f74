"""The bucket over a network that fails, with credentials that are wrong, and as R2 wants to be talked to."""

import asyncio
import hashlib
import itertools
import traceback

import pytest

import app.storage.r2 as module
from app.errors import (
    InvalidRange,
    NotModified,
    ObjectNotFound,
    PreconditionFailed,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from app.storage.r2 import R2Storage
from tests import faults
from tests.faults import FaultyProxy

BODY = hashlib.shake_256(b"model").digest(300_000)
READ = "models/churn.joblib"


@pytest.fixture(scope="module")
def module_proxy(s3):
    with FaultyProxy(s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
async def module_storage(module_proxy, r2_arguments):
    """One for all tests here: botocore takes a tenth of a second to make a client."""
    async with R2Storage(**r2_arguments | {"endpoint_url": module_proxy.url}) as storage:
        yield storage


@pytest.fixture
def proxy(module_proxy, bucket):
    module_proxy.heal()
    module_proxy.seen.clear()
    return module_proxy


@pytest.fixture
def storage(module_storage, proxy):
    """The empty bucket, through the proxy."""
    return module_storage


@pytest.fixture
def arguments(r2_arguments, proxy):
    """The same as `storage`, for those who want to change something."""
    return r2_arguments | {"endpoint_url": proxy.url}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.001)


# Faults that pass


PASSING = {
    "500": faults.status(500, "InternalError"),
    "502": faults.status(502),
    "503": faults.status(503, "ServiceUnavailable"),
    "504": faults.status(504),
    "429": faults.status(429, "TooManyRequests"),
    "slow down": faults.status(503, "SlowDown"),
    "dropped": faults.drop(),
    "answer lost": faults.lose_answer(),
}
CUT = {
    "cut at once": faults.cut(1),
    "cut in the middle": faults.cut(len(BODY) // 2),
    "cut before the last byte": faults.cut(len(BODY) - 1),
}


@pytest.mark.parametrize("fault", (PASSING | CUT).values(), ids=(PASSING | CUT).keys())
async def test_a_read_survives_three_faults(storage, proxy, fault):
    await storage.put(READ, BODY)
    proxy.inject(fault, method="GET", times=3)

    assert (await storage.get(READ)).body == BODY
    assert proxy.methods().count("GET") == 4


@pytest.mark.parametrize("fault", (PASSING | CUT).values(), ids=(PASSING | CUT).keys())
async def test_a_read_gives_up_after_four_attempts(storage, proxy, fault):
    await storage.put(READ, BODY)
    proxy.inject(fault, method="GET", times=faults.FOR_EVER)

    with pytest.raises(StorageUnavailable, match=rf"cannot read {READ} in R2 bucket .* \(attempts: 4\)"):
        await storage.get(READ)
    assert proxy.methods().count("GET") == 4


@pytest.mark.parametrize("size", [0, 1, 99])
async def test_a_span_that_is_well_formed_but_short_is_fetched_again(storage, proxy, size):
    await storage.put(READ, BODY)
    proxy.inject(faults.truncate(size), method="GET")

    assert (await storage.get(READ, span=range(50, 150))).body == BODY[50:150]
    assert proxy.methods().count("GET") == 2


async def test_a_server_that_ignores_the_range_still_gives_the_span(storage, proxy):
    await storage.put("small", BODY[:1000])
    whole = faults.Answer(200, {"ETag": '"e"'}, BODY[:1000])
    proxy.inject(faults.Fault(instead=whole), method="GET", times=2)

    got = await storage.get("small", span=range(10, 2000))

    assert (got.body, got.info.size) == (BODY[10:1000], 1000)
    with pytest.raises(InvalidRange):
        await storage.get("small", span=range(1000, 2000))


@pytest.mark.parametrize("span", [None, range(len(BODY)), range(10 * len(BODY))])
async def test_a_whole_body_that_was_altered_is_fetched_again_and_never_returned(storage, proxy, span):
    await storage.put(READ, BODY)
    proxy.inject(faults.corrupt(1000), method="GET", times=3)
    assert (await storage.get(READ, span=span)).body == BODY
    proxy.inject(faults.corrupt(1000), method="GET", times=faults.FOR_EVER)

    with pytest.raises(
        StorageUnavailable, match=r"altered on their way: their MD5 is not the object's \(attempts: 4\)"
    ):
        await storage.get(READ, span=span)


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption": "aws:kms"},
        {"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption-customer-algorithm": "AES256"},
        {"ETag": f'"{"0" * 32}-2"'},
    ],
)
async def test_an_etag_that_is_no_md5_is_not_taken_for_one(storage, proxy, headers):
    proxy.inject(faults.Fault(instead=faults.Answer(200, headers, BODY)), method="GET")
    got = await storage.get(READ)

    assert (got.body, got.md5) == (BODY, None)


async def test_what_has_another_etag_than_was_asked_for_is_not_returned(storage, proxy):
    put = await storage.put(READ, BODY)
    proxy.inject(faults.Fault(instead=faults.Answer(200, {"ETag": '"of another object"'}, BODY)), method="GET")

    with pytest.raises(PreconditionFailed, match=f"its ETag is of another object, not {put.etag}"):
        await storage.get(READ, if_match=put.etag)


@pytest.mark.parametrize("after_bytes", [0, 1000])
async def test_a_server_that_falls_silent_is_asked_again(arguments, storage, proxy, after_bytes):
    await storage.put(READ, BODY)
    proxy.inject(faults.hang(after_bytes), method="GET")
    # The server itself may be silent for as long, where the machine is busy: then it is asked once more.
    async with R2Storage(**arguments, read_timeout_seconds=0.2, max_attempts=50) as impatient:
        assert (await impatient.get(READ)).body == BODY
    assert proxy.methods().count("GET") > 1

    proxy.inject(faults.hang(after_bytes), method="GET", times=faults.FOR_EVER)
    async with R2Storage(**arguments, read_timeout_seconds=0.2, max_attempts=2) as impatient:
        with pytest.raises(StorageUnavailable, match=r"no answer in time \(attempts: 2\)"):
            await impatient.get(READ)


async def test_an_answer_that_is_late_is_waited_for(storage, proxy):
    await storage.put(READ, BODY)
    proxy.inject(faults.delay(0.05), method="GET")

    assert (await storage.get(READ)).body == BODY
    assert proxy.methods() == ["PUT", "GET"]


async def test_a_cancelled_read_leaves_the_pool_usable(arguments, proxy):
    async with R2Storage(**arguments, max_connections=1) as storage:
        await storage.put(READ, BODY)
        proxy.inject(faults.hang(1000), method="GET")
        reading = asyncio.create_task(storage.get(READ))
        while "GET" not in proxy.methods():
            await asyncio.sleep(0.001)
        reading.cancel()

        assert (await storage.get(READ)).body == BODY


async def test_a_listing_and_a_look_survive_faults(storage, proxy):
    put = await storage.put(READ, BODY)
    proxy.inject(faults.status(503), times=2)
    assert await storage.list("models/") == [put]

    proxy.inject(faults.drop(), times=2)
    assert await storage.head(READ) == put

    proxy.inject(faults.status(500), times=2)
    await storage.delete(READ)
    assert await storage.list("") == []


async def test_nobody_there_is_said_after_bounded_attempts(r2_arguments):
    with FaultyProxy("http://127.0.0.1:9") as proxy:
        gone = proxy.url
    async with R2Storage(**r2_arguments | {"endpoint_url": gone}) as storage:
        with pytest.raises(StorageUnavailable, match="could not connect: check the endpoint and the network"):
            await storage.get("a")


async def test_a_server_that_speaks_no_tls_is_told(arguments, proxy):
    url = proxy.url.replace("http:", "https:")
    async with R2Storage(**arguments | {"endpoint_url": url}, max_attempts=1) as storage:
        with pytest.raises(StorageUnavailable, match="no TLS connection"):
            await storage.get("a")


async def test_a_page_that_is_no_object_is_never_returned(storage, proxy):
    proxy.inject(faults.page("<html>please log in</html>"), times=faults.FOR_EVER)

    for call in (storage.get("a"), storage.head("a"), storage.list(""), storage.put("a", b"b")):
        with pytest.raises(StorageUnavailable, match="the answer is incomplete"):
            await call


async def test_what_will_not_pass_is_tried_once(storage, proxy):
    proxy.inject(faults.status(501, "NotImplemented"), times=faults.FOR_EVER)

    with pytest.raises(StorageUnavailable, match="501 NotImplemented"):
        await storage.get("a")
    assert len(proxy.seen) == 1


# Writes whose answer was lost


LOST = {"dropped": faults.lose_answer(), "500": faults.lose_answer(500), "503": faults.lose_answer(503)}


@pytest.mark.parametrize("fault", LOST.values(), ids=LOST.keys())
@pytest.mark.parametrize("condition", ["if_absent", "if_match", "none"])
async def test_our_own_write_is_recognised_when_its_answer_was_lost(storage, proxy, fault, condition):
    options = {"none": {}, "if_absent": {"if_absent": True}}.get(condition)
    if options is None:
        options = {"if_match": (await storage.put("a", b"before")).etag}
    proxy.inject(fault, method="PUT")

    put = await storage.put("a", BODY, **options)

    assert (await storage.get("a")).info == put
    assert (await storage.get("a")).body == BODY


async def test_our_own_write_is_recognised_by_its_bytes_where_the_etag_is_no_md5(storage, proxy):
    proxy.inject(faults.lose_answer(), method="PUT")
    plain = faults.Fault(
        spoil=lambda it: faults.Answer(it.status, it.headers | {"ETag": '"other-2"', "Etag": '"other-2"'}, it.body)
    )
    proxy.inject(plain, method="HEAD")

    assert (await storage.put("a", BODY, if_absent=True)).size == len(BODY)


@pytest.mark.parametrize("other", [b"of the same len", b"longer than what we wrote"])
async def test_somebody_elses_write_is_not_taken_for_ours(storage, proxy, other):
    await storage.put("a", other)
    proxy.inject(faults.drop(), method="PUT")

    with pytest.raises(PreconditionFailed):
        await storage.put("a", b"written by us..", if_absent=True)
    assert (await storage.get("a")).body == other


async def test_a_conflict_with_what_is_gone_again_stays_one(storage, proxy):
    proxy.inject(faults.drop(), method="PUT")
    proxy.inject(faults.status(412, "PreconditionFailed"), method="PUT")

    with pytest.raises(PreconditionFailed):
        await storage.put("a", BODY, if_absent=True)


async def test_servers_that_say_not_found_are_understood(storage, proxy):
    proxy.inject(faults.status(404, "NoSuchKey"), times=2)

    with pytest.raises(PreconditionFailed, match="there is no such object"):
        await storage.put("a", BODY, if_match="e")
    await storage.delete("a")


async def test_equal_bytes_of_somebody_else_are_a_conflict_when_no_answer_was_lost(storage):
    await storage.put("a", BODY)

    with pytest.raises(PreconditionFailed):
        await storage.put("a", BODY, if_absent=True)


async def test_a_conflict_while_writing_is_a_failed_precondition(storage, proxy):
    proxy.inject(faults.status(409, "ConditionalRequestConflict"), method="PUT")

    with pytest.raises(PreconditionFailed, match="409 ConditionalRequestConflict"):
        await storage.put("a", BODY, if_absent=True)


# Refusals, each with its remedy


REFUSALS = [
    (401, "Unauthorized", "create an R2 API token"),
    (403, "InvalidAccessKeyId", "create an R2 API token"),
    (400, "InvalidArgument", "create an R2 API token"),
    (403, "SignatureDoesNotMatch", "the secret access key does not belong to the access key id"),
    (403, "AccessDenied", "publishing 'Object Read & Write'"),
    (403, "NotEntitled", "R2 is not enabled for this account"),
    (403, "RequestTimeTooSkewed", "clock is wrong"),
    (400, "ExpiredToken", "session token"),
    (404, "NoSuchBucket", "jurisdiction"),
    (400, "InvalidBucketName", "R2_BUCKET"),
    (403, "", "the credentials are wrong, or the token may not do this"),
    (401, "", "create an R2 API token"),
]


@pytest.mark.parametrize(("status", "code", "remedy"), REFUSALS)
async def test_a_refusal_is_said_once_with_its_remedy(storage, proxy, status, code, remedy):
    proxy.inject(faults.status(status, code, "Credential access key has length 3, should be 32"))

    with pytest.raises(StorageDenied, match=remedy):
        await storage.get("a")
    assert len(proxy.seen) == 1


async def test_a_head_without_a_body_is_understood(storage, proxy):
    for status, kind in [(401, StorageDenied), (403, StorageDenied), (404, ObjectNotFound), (412, PreconditionFailed)]:
        proxy.inject(faults.status(status))
        with pytest.raises(kind):
            await storage.head("a")


@pytest.fixture
def needs_rights(s3):
    if s3.kind == "moto":
        pytest.skip("moto takes every key for a good one")


@pytest.mark.usefixtures("needs_rights", "bucket")
async def test_the_reader_may_get_look_and_list_but_not_write(s3, r2_arguments):
    if s3.reader == s3.writer:
        pytest.skip("the server knows one key, which may do everything")
    keys = {"access_key_id": s3.reader.access_key_id, "secret_access_key": s3.reader.secret_access_key}
    async with R2Storage(**r2_arguments) as writer, R2Storage(**r2_arguments | keys) as reader:
        put = await writer.put("a", BODY)

        assert (await reader.get("a", if_match=put.etag)).body == BODY
        assert await reader.head("a") == put
        assert await reader.list("") == [put]
        with pytest.raises(NotModified):
            await reader.get("a", if_none_match=put.etag)
        with pytest.raises(ObjectNotFound):
            await reader.get("none")
        for call in (reader.put("a", b"x"), reader.put("b", b"x", if_absent=True), reader.delete("a")):
            with pytest.raises(StorageDenied, match="serving needs 'Object Read only'"):
                await call
        assert (await reader.get("a")).body == BODY


@pytest.mark.usefixtures("needs_rights")
@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"secret_access_key": "wrong-secret-0123456789"}, "the secret access key does not belong"),
        ({"access_key_id": "unknown-key-0123456789"}, "the access key id is unknown"),
    ],
)
async def test_wrong_credentials_are_told_apart(r2_arguments, wrong, remedy):
    async with R2Storage(**r2_arguments | wrong) as storage:
        for call in (storage.get("a"), storage.list(""), storage.put("a", b"x")):
            with pytest.raises(StorageDenied, match=remedy):
                await call
        with pytest.raises(StorageDenied):
            await storage.head("a")


async def test_a_wrong_bucket_is_told_with_the_jurisdiction(r2_arguments):
    async with R2Storage(**r2_arguments | {"bucket": "not-there"}) as storage:
        for call in (storage.get("a"), storage.list(""), storage.put("a", b"x")):
            with pytest.raises(StorageDenied, match=r"no such bucket: .*jurisdiction"):
                await call


async def test_no_secret_is_shown_anywhere(arguments, proxy):
    secrets = {"secret_access_key": "s3cr3t-of-the-token", "session_token": "s3cr3t-of-the-session"}
    url = arguments["endpoint_url"].replace("http://", "http://user:s3cr3t-in-the-url@")
    storage = R2Storage(**arguments | secrets | {"endpoint_url": url})
    shown = [repr(storage), str(storage), storage.describe()]
    failing = [
        *(faults.status(status, code, "s3cr3t in the server's words") for status, code, _ in REFUSALS),
        *(faults.status(418, "Teapot", "s3cr3t"), faults.drop(), faults.page("s3cr3t")),
    ]

    async with storage:
        for fault in failing:
            proxy.inject(fault, times=4)
            with pytest.raises(StorageError) as caught:
                await storage.list("models/")
            proxy.heal()
            shown += [str(caught.value), repr(caught.value)]
            shown += traceback.format_exception(caught.value, chain=False)

    assert not [text for text in shown if "s3cr3t" in text]


# How R2 is talked to


@pytest.fixture
async def requests_over_https(r2_arguments):
    """The requests that would go to R2, each answered with 503 before it leaves."""
    arguments = r2_arguments | {"endpoint_url": "https://account.r2.cloudflarestorage.com/kept", "bucket": "models"}
    async with R2Storage(**arguments, session_token="session", max_attempts=1) as storage:
        sent = []

        def catch(request, **_):
            sent.append(request)
            raise TimeoutError

        storage._client.meta.events.register("before-send.s3", catch)
        yield storage, sent


async def test_no_checksum_trailer_is_sent_over_https(requests_over_https):
    storage, sent = requests_over_https
    for call in (storage.put("a", BODY), storage.put("a", BODY, if_absent=True), storage.get("a"), storage.delete("a")):
        with pytest.raises(StorageUnavailable):
            await call

    assert [request.method for request in sent] == ["PUT", "PUT", "GET", "DELETE"]
    for request in sent:
        headers = {name.lower(): str(value) for name, value in request.headers.items()}
        assert "aws-chunked" not in headers.get("content-encoding", "")
        assert not {"x-amz-trailer", "transfer-encoding", "expect"} & headers.keys()
        assert not [name for name in headers if name.startswith(("x-amz-sdk-checksum", "x-amz-checksum"))]
        assert "STREAMING" not in headers["x-amz-content-sha256"]
    assert sent[0].headers["x-amz-content-sha256"].decode() == hashlib.sha256(BODY).hexdigest()


async def test_requests_are_signed_for_region_auto_with_the_session_token(requests_over_https):
    storage, sent = requests_over_https
    with pytest.raises(StorageUnavailable, match="no answer in time"):
        await storage.get("folder/a")

    headers = {name.lower(): value.decode() for name, value in sent[0].headers.items()}
    assert "/auto/s3/aws4_request" in headers["authorization"]
    assert headers["x-amz-security-token"] == "session"


async def test_the_bucket_is_in_the_path_and_the_endpoints_own_path_is_kept(requests_over_https):
    storage, sent = requests_over_https
    with pytest.raises(StorageUnavailable):
        await storage.get("folder/a b")

    assert sent[0].url == "https://account.r2.cloudflarestorage.com/kept/models/folder/a%20b"


async def test_the_machines_aws_settings_change_nothing(r2_arguments, monkeypatch, tmp_path):
    (tmp_path / "config").write_text(
        "[default]\ns3 =\n  addressing_style = virtual\n  use_accelerate_endpoint = true\n"
    )
    for name, value in {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_PROFILE": "not-there",
        "AWS_ACCESS_KEY_ID": "other",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_SESSION_TOKEN": "other",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported",
        "AWS_MAX_ATTEMPTS": "9",
    }.items():
        monkeypatch.setenv(name, value)

    async with R2Storage(**r2_arguments) as storage:
        await storage.put("a", BODY)

        assert (await storage.get("a")).body == BODY


async def test_buckets_are_never_asked_about(storage, proxy):
    """Tokens for objects may not. botocore does it by itself, after a redirect and after a HEAD's bare 400."""
    for call, fault in [
        (storage.get, faults.redirect(301, "PermanentRedirect")),
        (storage.get, faults.redirect(307, "TemporaryRedirect")),
        (storage.get, faults.redirect(400, "AuthorizationHeaderMalformed")),
        (storage.get, faults.redirect(400, "IllegalLocationConstraintException")),
        (storage.head, faults.redirect(400, "")),
        (storage.head, faults.redirect(301, "")),
    ]:
        proxy.inject(fault)
        with pytest.raises(StorageError):
            await call("folder/a")

    assert len(proxy.seen) == 6
    paths = {f"http://{seen.headers['Host']}{seen.target.partition('?')[0]}" for seen in proxy.seen}
    assert paths == {f"{proxy.url}/models/folder/a"}


async def test_a_listing_comes_in_pages(storage, proxy, monkeypatch):
    monkeypatch.setattr(module, "PAGE_KEYS", 2)
    keys = [f"models/{name}" for name in "abcde"] + ["models/x/1", "models/x/2", "models/x/3", "models/y", "other"]
    for key in keys:
        await storage.put(key, b"")
    proxy.seen.clear()

    assert [info.key for info in await storage.list("models/")] == keys[:-1]
    assert len(proxy.seen) == 5
    assert [info.key for info in await storage.list("models/", recursive=False)] == [*keys[:5], "models/y"]
    assert all("delimiter=%2F" in seen.target for seen in itertools.islice(proxy.seen, 5, None))


async def test_a_folder_marker_of_a_console_is_no_object(storage):
    await storage._client.put_object(Bucket="models", Key="models/", Body=b"")
    put = await storage.put("models/a", b"")

    assert await storage.list("models/") == [put]
    assert await storage.list("models/", recursive=False) == [put]


async def test_connections_are_kept_and_bounded(arguments, proxy):
    before = proxy.connections
    async with R2Storage(**arguments, max_connections=3) as storage:
        await storage.put(READ, BODY)
        await asyncio.gather(*(storage.get(READ) for _ in range(12)))

    assert proxy.connections - before <= 3


@pytest.mark.parametrize("url", ["", "not a url", "http://"])
async def test_an_endpoint_that_is_none_is_said(r2_arguments, url):
    with pytest.raises(StorageUnavailable, match="is the endpoint a URL"):
        async with R2Storage(**r2_arguments | {"endpoint_url": url}):
            pass
