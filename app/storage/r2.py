"""Objects in a Cloudflare R2 bucket, through its S3 interface.

The only module that knows botocore and aiohttp: their errors stop here, each as one of `app.errors` and as a sentence
with a remedy.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aioboto3
import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.handlers import add_expect_header
from botocore.loaders import Loader
from botocore.parsers import ResponseParserError

from app.errors import (
    InvalidRange,
    NotModified,
    ObjectNotFound,
    PreconditionFailed,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from app.storage.base import ObjectInfo, StoredObject

PAGE_KEYS = 1000  # the most that one page of a listing holds
SENT_BYTES = 64 * 1024  # of a body whose progress is watched, handed to the connection at a time
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 8.0

_TRANSIENT_STATUSES = frozenset({429, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset({"TooManyRequests", "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable"})

# https://developers.cloudflare.com/r2/api/error-codes/, and S3's names for the same things.
_UNKNOWN_KEY = (
    "the access key id is unknown, or its token has expired: create an R2 API token and take R2_ACCESS_KEY_ID and"
    " R2_SECRET_ACCESS_KEY from it (a new token may need a minute until it works)"
)
_SESSION = "the session token is not, or no longer, valid: create new temporary credentials, or set none"
_DENIED = {
    "Unauthorized": _UNKNOWN_KEY,
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "SignatureDoesNotMatch": (
        "the secret access key does not belong to the access key id: copy both again, from the same token"
        " (R2_SECRET_ACCESS_KEY)"
    ),
    "AccessDenied": (
        "the token may not do this in this bucket: serving needs 'Object Read only' on the bucket, publishing"
        " 'Object Read & Write' (a changed token may need a minute until it works)"
    ),
    "NotEntitled": "R2 is not enabled for this account: enable it in the Cloudflare dashboard",
    "RequestTimeTooSkewed": "this machine's clock is wrong by more than 15 minutes: set it",
    "ExpiredToken": _SESSION,
    "InvalidToken": _SESSION,
    "ExpiredRequest": _SESSION,
    "NoSuchBucket": (
        "the endpoint has no such bucket: check the bucket's name and the account, and whether the bucket was created"
        " in a jurisdiction: one in 'eu' or 'fedramp' answers only at that jurisdiction's endpoint (R2_JURISDICTION)"
    ),
    "AuthorizationHeaderMalformed": "the bucket is in another region: set R2_REGION to the bucket's",
    "InvalidRegionName": "the server knows no such region: set R2_REGION, for R2 to 'auto'",
    "InvalidBucketName": "this cannot be a bucket's name: check R2_BUCKET",
    "PermanentRedirect": "the bucket answers at another endpoint: check R2_ENDPOINT_URL",
}
_DENIED_STATUSES = {
    401: _UNKNOWN_KEY,
    403: "the credentials are wrong, or the token may not do this in this bucket: check both",
}


class _CutShort(Exception):
    """The answer's body is not as long as its headers say."""


class _Altered(Exception):
    """The answer's body is not the object's."""


_PASSING = (  # OSError: time-outs, sockets and TLS
    *(HTTPClientError, BotoConnectionError, IncompleteReadError, ResponseParserError),
    *(aiohttp.ClientError, OSError, _CutShort, _Altered),
)
_FOREIGN = (*_PASSING, BotoCoreError, ClientError)


class _Connections(AIOHTTPSession):  # type: ignore[misc]
    """aiohttp's connections, which do not send anything twice by themselves.

    By default aiohttp repeats a PUT whose answer was lost, and hides it: the 412 that the repetition of a conditional
    PUT gets would look as if somebody else had written.
    """

    async def _get_session(self, proxy_url: str | None) -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = await super()._get_session(proxy_url)
        session._retry_connection = False  # there is no public name for it
        return session


class R2Storage:
    """Objects in one bucket, over one pool of at most `max_connections` connections, open inside `async with`.

    A call that fails for a passing reason (connection, time-out, throttling, server fault, a body that is cut) is made
    up to `max_attempts` times, with growing random pauses. `read_timeout_seconds` is the longest silence of the server,
    so it does not limit how long a large object may take.

    `moved` is told of each object's bytes as they come and go: the key, how many more, and how many the object has. The
    number is negative when a write has to begin again.
    """

    def __init__(
        self,
        *,
        endpoint_url: str,
        bucket: str,
        access_key_id: str,
        secret_access_key: str,
        session_token: str | None = None,
        region: str = "auto",
        connect_timeout_seconds: float = 5.0,
        read_timeout_seconds: float = 30.0,
        max_attempts: int = 4,
        max_connections: int = 10,
        moved: Callable[[str, int, int], None] | None = None,
    ) -> None:
        url = urlsplit(endpoint_url)
        self._endpoint_url = url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()  # it is shown: no password
        self._bucket = bucket
        self._max_attempts = max_attempts
        self._moved = moved
        self._client: Any = None
        self._opened = AsyncExitStack()
        self._api = (
            Loader()
        )  # keeps what it has read of S3's API: a process that is forked later does not read it again
        self._client_arguments = {
            "endpoint_url": self._endpoint_url,
            "aws_access_key_id": access_key_id,
            "aws_secret_access_key": secret_access_key,
            "aws_session_token": session_token,
            "config": AioConfig(
                region_name=region,
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                # R2 refuses the checksum trailers ("aws-chunked") that botocore adds by default since 1.36
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"mode": "standard", "total_max_attempts": 1},  # `_call` retries: it sees the body too
                connect_timeout=connect_timeout_seconds,
                read_timeout=read_timeout_seconds,
                max_pool_connections=max_connections,
                tcp_keepalive=True,
                http_session_cls=_Connections,
            ),
        }

    async def __aenter__(self) -> Self:
        # What is on this machine for other programs (profiles, ~/.aws) must not change how the bucket is reached.
        session = AioSession(
            session_vars={
                "profile": (None, None, None, None),
                "config_file": (None, None, os.devnull, None),
                "credentials_file": (None, None, os.devnull, None),
            }
        )
        session.register_component("data_loader", self._api)
        opening = aioboto3.Session(botocore_session=session).client("s3", **self._client_arguments)
        try:
            self._client = await self._opened.enter_async_context(opening)
        except (BotoCoreError, ValueError) as error:
            raise StorageUnavailable(
                f"{self.describe()} cannot be used ({type(error).__name__}): is the endpoint a URL, and the bucket's"
                " name one?"
            ) from error
        events = self._client.meta.events
        events.register("before-call.s3", _stay_in_region)
        events.unregister("before-call.s3", add_expect_header)  # Cloudflare has no "100 Continue" to answer it with
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.aclose()

    def describe(self) -> str:
        """Return the bucket and its endpoint; no secret is in it."""
        return f"R2 bucket {self._bucket} at {self._endpoint_url}"

    async def get(
        self, key: str, *, span: range | None = None, if_match: str | None = None, if_none_match: str | None = None
    ) -> StoredObject:
        """Return the object, or the bytes of it in `span`: see `Storage.get`.

        A body that was cut is never returned, nor is a whole one that was altered, where the server tells its MD5.
        """
        request: dict[str, Any] = {"Bucket": self._bucket, "Key": key}
        if span is not None:
            if not span or span.step != 1:
                raise ValueError(f"expected a span of at least one byte and of step 1, got {span}")
            request["Range"] = f"bytes={span.start}-{span.stop - 1}"
        if if_match is not None:
            request["IfMatch"] = f'"{if_match}"'
        if if_none_match is not None:
            request["IfNoneMatch"] = f'"{if_none_match}"'

        async def send() -> StoredObject:
            answer = await self._client.get_object(**request)
            async with answer["Body"] as stream:
                body = await stream.read()
            body, size = _complete(answer, body, span)
            etag, md5 = _etag(answer), _md5(answer)
            if if_match not in (None, etag):  # something between the server and here does not know If-Match
                raise PreconditionFailed(f"cannot read {key} in {self.describe()}: its ETag is {etag}, not {if_match}")
            if md5 is not None and len(body) == size and await asyncio.to_thread(_md5_of, body) != md5:
                raise _Altered
            if self._moved is not None:
                self._moved(key, len(body), size)
            return StoredObject(ObjectInfo(key, size, etag), body, md5)

        return await self._call(f"read {key}", send)

    async def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> ObjectInfo:
        """Write the object: see `Storage.put`. A write whose answer was lost, but which happened, is a success."""
        watched = body if self._moved is None or not body else _Watched(body, partial(self._moved, key))
        request: dict[str, Any] = {"Bucket": self._bucket, "Key": key, "Body": watched}
        if if_match is not None:
            request["IfMatch"] = f'"{if_match}"'
        if if_absent:
            request["IfNoneMatch"] = "*"
        unsure = False  # an earlier attempt got no clear answer, so it may have written

        async def send() -> ObjectInfo:
            nonlocal unsure
            try:
                return ObjectInfo(key, len(body), _etag(await self._client.put_object(**request)))
            except ClientError as error:
                if unsure and _status(error) in (409, 412) and (written := await self._find_own_write(key, body)):
                    return written
                unsure = unsure or _status(error) >= 500
                raise
            except _FOREIGN:
                unsure = True
                raise

        try:
            return await self._call(f"write {key}", send)
        except ObjectNotFound as error:  # If-Match, and there is nothing to match
            raise PreconditionFailed(f"cannot write {key} in {self.describe()}: there is no such object") from error
        except PreconditionFailed as error:
            error.unsure = unsure
            raise

    async def head(self, key: str) -> ObjectInfo:
        """Return the object's size and ETag. Raises `ObjectNotFound`."""

        async def send() -> ObjectInfo:
            answer = await self._client.head_object(Bucket=self._bucket, Key=key)
            etag = _etag(answer)
            return ObjectInfo(key, answer["ContentLength"], etag)

        return await self._call(f"look at {key}", send)

    async def list(self, prefix: str, *, recursive: bool = True) -> list[ObjectInfo]:
        """Return the objects below `prefix`, all pages of them, in the order of their keys: see `Storage.list`."""
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS}
        if not recursive:
            request["Delimiter"] = "/"

        async def send() -> dict[str, Any]:
            page: dict[str, Any] = await self._client.list_objects_v2(**request)
            if "IsTruncated" not in page:
                raise _CutShort("expected a listing")
            return page

        found: list[ObjectInfo] = []
        while True:
            page = await self._call(f"list {prefix or 'all objects'}", send)
            found += [ObjectInfo(item["Key"], item["Size"], _etag(item)) for item in page.get("Contents", ())]
            if not page["IsTruncated"]:
                # consoles mark empty folders with objects named "folder/": nothing of ours
                return sorted((info for info in found if not info.key.endswith("/")), key=lambda info: info.key)
            request["ContinuationToken"] = page["NextContinuationToken"]

    async def delete(self, key: str) -> None:
        """Remove the object. That there is none is no error."""
        try:
            await self._call(f"delete {key}", partial(self._client.delete_object, Bucket=self._bucket, Key=key))
        except ObjectNotFound:
            return

    async def _call[T](self, what: str, send: Callable[[], Awaitable[T]]) -> T:
        """Await `send()` until it succeeds, fails for good, or has had its attempts. The one place that retries."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await send()
            except _FOREIGN as error:
                if attempt >= self._max_attempts or not _is_transient(error):
                    raise self._translate(error, what, attempt) from error
            await asyncio.sleep(pause_seconds(attempt))

    async def _find_own_write(self, key: str, body: bytes) -> ObjectInfo | None:
        """Return what is stored if it is exactly `body`, as after a write whose answer was lost."""
        try:
            info = await self.head(key)
            if info.etag == _md5_of(body):
                return info
            if info.size != len(body):
                return None
            stored = await self.get(key)
        except ObjectNotFound:
            return None
        return stored.info if stored.body == body else None

    def _translate(self, error: Exception, what: str, attempts: int) -> StorageError:
        """Return our error for `error`. Its own text stays out of the message: it may quote the request."""
        failed = f"cannot {what} in {self.describe()}"
        after = f" (attempts: {attempts})" if attempts > 1 else ""
        if not isinstance(error, ClientError):
            return StorageUnavailable(f"{failed}: {_reason(error)}{after}")
        status, code = _status(error), _code(error)
        if code == "InvalidArgument" and "access key" in str(error.response["Error"].get("Message", "")):
            code = "InvalidAccessKeyId"  # R2's answer to a key id that has not even the right length
        remedy = _DENIED.get(code) or _DENIED_STATUSES.get(status)
        region = str(error.response.get("Error", {}).get("Region", ""))
        if code == "AuthorizationHeaderMalformed" and re.fullmatch(r"[a-z0-9-]{1,40}", region):
            remedy = f"the bucket is in another region: set R2_REGION to {region!r}"
        if remedy:
            return StorageDenied(f"{failed}: {remedy} [{status} {code}]")
        match status:
            case 304:
                return NotModified(f"{failed}: it has not changed")
            case 404:
                return ObjectNotFound(f"{failed}: there is no such object")
            case 409 | 412:
                return PreconditionFailed(
                    f"{failed}: the object is not in the state that was required [{status} {code}]"
                )
            case 416:
                return InvalidRange(f"{failed}: the range begins beyond the object's end")
        return StorageUnavailable(f"{failed}: the server answered {status} {code}{after}")


def pause_seconds(attempt: int) -> float:
    """Return how long to wait behind an attempt, the first being 1: anything up to a limit that doubles each time."""
    longest = min(FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 20), LONGEST_PAUSE_SECONDS)
    return random.uniform(0, longest)  # noqa: S311 - it spreads load, it hides nothing


class _Watched:
    """A body that tells how much of it has gone out: botocore reads it to sign it, and aiohttp iterates it to send it."""

    def __init__(self, body: bytes, moved: Callable[[int, int], None]) -> None:
        self._body = body
        self._moved = moved
        self._sent = 0
        reader = io.BytesIO(body)
        self.read, self.seek, self.tell = reader.read, reader.seek, reader.tell

    def __len__(self) -> int:
        return len(self._body)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        size = len(self._body)
        if self._sent:  # another attempt
            self._moved(-self._sent, size)
            self._sent = 0
        with memoryview(self._body) as view:
            for start in range(0, size, SENT_BYTES):
                piece = view[start : start + SENT_BYTES]
                yield piece  # and come back when the connection has taken it
                self._sent += len(piece)
                self._moved(len(piece), size)


def _stay_in_region(context: dict[str, Any], **_: Any) -> None:
    # botocore answers a redirect, or a HEAD's bare 400, with HeadBucket in search of the bucket's region. R2 has one
    # region, and a token for objects only may not ask.
    context.setdefault("s3_redirect", {})["redirected"] = True


def _complete(answer: dict[str, Any], body: bytes, span: range | None) -> tuple[bytes, int]:
    """Return the bytes asked for and the whole object's size. Raises `_CutShort` if the headers promise other bytes."""
    promised = answer.get("ContentLength", len(body))
    if len(body) != promised:
        raise _CutShort(f"expected {promised} bytes, got {len(body)}")
    if span is None:
        return body, len(body)
    if "ContentRange" not in answer:  # a server may ignore Range, and send the whole
        if span.start >= len(body):
            raise InvalidRange(f"the object has {len(body)} bytes, asked for those from {span.start}")
        return body[span.start : span.stop], len(body)
    parts = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer["ContentRange"])
    first, last, size = map(int, parts.groups()) if parts else (-1, -1, 0)
    if (first, last) != (span.start, min(span.stop, size) - 1) or len(body) != last - first + 1:
        raise _CutShort(f"expected bytes {span.start} to {span.stop}, got {len(body)} as {answer['ContentRange']!r}")
    return body, size


def _etag(answer: dict[str, Any]) -> str:
    """Return the answer's ETag without quotes. Raises `_CutShort` when it has none, as a captive portal's page has."""
    if "ETag" not in answer:
        raise _CutShort("expected an ETag")
    return str(answer["ETag"]).strip('"')


def _md5(answer: dict[str, Any]) -> str | None:
    """Return the whole object's MD5 where its ETag is that: not if it came in parts, or is encrypted with a key of its own.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
    return etag if re.fullmatch("[0-9a-f]{32}", etag := _etag(answer)) and plain else None


def _md5_of(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _is_transient(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return _status(error) in _TRANSIENT_STATUSES or _code(error) in _TRANSIENT_CODES
    return isinstance(error, _PASSING)


def _reason(error: Exception) -> str:
    match error:
        case ConnectTimeoutError():
            return "no connection in time"
        case ReadTimeoutError() | TimeoutError():
            return "no answer in time"
        case EndpointConnectionError():
            return "could not connect: check the endpoint and the network"
        case SSLError():
            return "no TLS connection: the certificate or the protocol was not accepted"
        case _CutShort():
            return f"the answer is incomplete: {error}"
        case _Altered():
            return "the bytes were altered on their way: their MD5 is not the object's"
        case IncompleteReadError() | aiohttp.ClientPayloadError():
            return "the answer is incomplete: the connection was closed in the middle"
        case ConnectionClosedError():
            return "the connection was closed before the answer was there"
        case ResponseParserError():
            return "the answer is none that S3 gives"
    return type(error).__name__
