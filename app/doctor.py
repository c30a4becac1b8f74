"""What stands between these settings and a service that answers: looked at step by step, each failure with its remedy.

The way to the bucket is tried from below (name, connection, TLS, S3) and then by signed requests, so that the first thing
that fails is the one to mend. Nothing is changed: the object that shows whether the bucket can be written to is removed.
"""

from __future__ import annotations

import asyncio
import enum
import ipaddress
import os
import re
import secrets
import socket
import ssl
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from app import memory
from app.bundle import Bundle
from app.errors import (
    DisklessError,
    InvalidIndex,
    ObjectNotFound,
    PreconditionFailed,
    SettingsError,
    StorageDenied,
    StorageError,
)
from app.model_storage import Catalogue, ModelStorageManager
from app.settings import R2_HOST, Mode, Settings, misspelt
from app.storage.base import Storage
from app.tracing import Exporter
from app.verification import verify
from app.worker import Worker

NETWORK_SECONDS = 4.0  # for a name, a connection, a handshake, an answer
REQUESTS_SECONDS = 10.0  # for a check that asks the storage
CLEANING_SECONDS = 5.0
MAX_SKEW_SECONDS = 15 * 60  # S3 refuses requests that were signed longer ago, or as far in the future
WORRYING_SKEW_SECONDS = 5 * 60
ADDRESSES = 4  # of a name, tried at once
BODY_BYTES = 16 * 1024
LISTED = 5

# https://developers.cloudflare.com/r2/pricing/: what is free in a month, for all buckets of an account together
FREE_CLASS_A, FREE_CLASS_B = 1_000_000, 10_000_000
MONTH_SECONDS = 30 * 24 * 3600
PAGE_KEYS = 1000

_REGION_CODES = {"AuthorizationHeaderMalformed", "InvalidRegionName"}
_BUCKET_CODES = {"NoSuchBucket", "InvalidBucketName", "PermanentRedirect"}

# By the name of an error's class. The sentences of `_WITH_REMEDY` end with what is to be done.
_REMEDIES = {
    "ArtifactMissing": "publish the model again as a new version, and promote that",
    "DigestMismatch": "find out who changed it after it was published, and publish the model again as a new version",
    "InvalidManifest": "publish the model again as a new version, and promote that",
    "InvalidSeal": "publish the model again as a new version, with --seal-key",
    "GoldenMismatch": "train the model with the libraries that are installed here, and publish it again",
    "CompanionFailed": "put the companion right, or publish the model together with it",
    "LoadFailed": "write the file again where the model was trained, and see that it is uploaded whole",
    "UnusableModel": "put one fitted estimator into one file",
    "StorageDenied": "let this user, or this token, read all of it",
    "StorageUnavailable": "try again, and if it stays so, ask whoever runs the server",
}
_WITH_REMEDY = {"VersionMismatch", "NoRoom", "SealMissing", "ForeignSeal", "SealBroken", "UntrustedType"}
_EXPLAINED = {"LoadFailed", "CompanionFailed"}  # maybe by the versions of libraries, or by modules that are missing
_TO_BE_DONE = re.compile(r"[:;] (?=(?:put|define|deploy|train) )")  # that explanation ends with what is to be done, too
_OTHERWISE = "mend what it says, and publish the model again"


class State(enum.StrEnum):
    """How a check ended. A warning is worth reading, and keeps nothing from serving."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and for a failure what to do about it. No secret is in it."""

    check: str
    state: State
    found: str
    remedy: str | None = None

    def __str__(self) -> str:
        remedy = f"\n        what to do: {self.remedy}" if self.remedy else ""
        return f"{self.state:<7} {self.check}: {self.found}{remedy}"


async def examine(settings: Settings, *, read_only: bool = False) -> AsyncGenerator[Finding]:
    """Run every check of the settings' mode, in order, and yield what each found.

    A check that needs what another has found to be broken is skipped. With `read_only` nothing is written, not even for
    a moment. Close the iterator if it is not read to its end.
    """
    blame: dict[str, str] = {}  # of a check that failed, or was skipped because of one that did
    async with AsyncExitStack() as opened:
        patient = _Patient(settings, read_only, opened)
        for check in _checks(settings.mode):
            cause = next((blame[need] for need in check.needs if need in blame), None)
            if cause is not None:
                blame[check.name] = cause
                yield Finding(check.name, State.SKIPPED, f"because {cause} failed")
                continue
            async for finding in _findings(check, patient):
                if finding.state is State.FAILED:
                    blame[check.name] = check.name
                yield finding


def of_settings(error: SettingsError) -> list[Finding]:
    """Return a finding for every problem of settings that describe nothing that could be examined, and what may be behind it."""
    findings = []
    for problem in error.problems:
        found, colon, remedy = problem.partition(": ")
        if not colon or remedy.startswith("expected"):
            found, remedy = problem, "set it as expected, in the environment or in .env"
        findings.append(Finding("settings", State.FAILED, found, remedy))
    return [*findings, *_misspelt()]


def _misspelt() -> Iterator[Finding]:
    for problem in misspelt():
        yield _warning(
            "settings", problem, "set the variable that was meant, or remove this one; the README has them all"
        )


def is_well(findings: Sequence[Finding]) -> bool:
    """Return whether nothing failed. Warnings are no failures."""
    return all(finding.state is not State.FAILED for finding in findings)


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return findings as `--json` prints them: `checks` in order, and whether all is well."""
    checks = [asdict(finding) for finding in findings]
    return {"checks": checks, "ok": is_well(findings)}


def summary(findings: Sequence[Finding]) -> str:
    """Return the last line for a person."""
    count = {state: sum(finding.state is state for finding in findings) for state in State}
    warnings = f", {_count(count[State.WARNING], 'warning')}" if count[State.WARNING] else ""
    if is_well(findings):
        return f"all is well{warnings}"
    skipped = f", {count[State.SKIPPED]} skipped" if count[State.SKIPPED] else ""
    which = "it" if count[State.FAILED] == 1 else "the first failure first"
    return f"{count[State.FAILED]} failed{warnings}{skipped}: mend {which}, and run this again"


# The patient and the checks


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the endpoint answered to a request that nobody signed, and this machine's clock when it came."""

    status: int
    headers: Mapping[str, str]
    text: str
    at: datetime


@dataclass(slots=True)
class _Patient:
    """The settings under examination, and what the checks so far have found out."""

    settings: Settings
    read_only: bool
    opened: AsyncExitStack
    manager: ModelStorageManager = field(init=False)
    addresses: list[str] = field(default_factory=list)
    answer: _Answer | None = None
    refusal: StorageError | None = None  # what a signed request for the index got, but for "there is none"
    direct_keys: int = 0  # objects directly under the prefix
    catalogue: Catalogue = field(default_factory=Catalogue)
    bundles: list[Bundle] = field(default_factory=list)

    def __post_init__(self) -> None:
        # A local copy would hide what is wrong with the bucket.
        remote = {} if self.settings.mode is Mode.LOCAL else {"cloud_only": True}
        self.manager = ModelStorageManager.from_settings(self.settings.model_copy(update=remote))

    @property
    def place(self) -> str:
        return self.manager.storage.describe()

    @property
    def url(self) -> SplitResult:
        return urlsplit(self.settings.r2.endpoint_url)

    @property
    def host(self) -> str:
        return self.url.hostname or ""

    @property
    def is_r2(self) -> bool:
        return self.host.endswith(R2_HOST)

    @property
    def jurisdiction(self) -> str:
        """The jurisdiction whose buckets the endpoint has, as its host says."""
        label = self.host.removesuffix(R2_HOST).rpartition(".")[2] if self.is_r2 else ""
        return label if label in ("eu", "fedramp") else "default"

    @property
    def dialled(self) -> tuple[str, int, str]:
        """Host and port that a connection is made to, and as what: the endpoint's own, or those of a proxy before it."""
        proxy = _proxy(self.url)
        if proxy is not None:
            return proxy.hostname or "", proxy.port or 80, "the proxy of the environment"
        return self.host, self.url.port or (443 if self.url.scheme == "https" else 80), "the endpoint"

    async def open(self) -> None:
        """Open the storage. Raises `StorageUnavailable`."""
        await self.opened.enter_async_context(self.manager.storage)


@dataclass(frozen=True, slots=True)
class _Check:
    """A check, those that must not have failed before it, and its time limit.

    Without a limit it sees to that itself, and what it finds is told at once.
    """

    name: str
    run: Callable[[_Patient], AsyncIterator[Finding]]
    needs: tuple[str, ...] = ()
    seconds: float | None = field(default_factory=lambda: REQUESTS_SECONDS)


async def _findings(check: _Check, patient: _Patient) -> AsyncIterator[Finding]:
    """Yield what a check finds; what it could not find out is a failure too."""
    found: list[Finding] = []
    try:
        if check.seconds is None:
            async for finding in check.run(patient):
                yield finding
        else:
            async with asyncio.timeout(check.seconds):
                found = [finding async for finding in check.run(patient)]
    except TimeoutError:
        if check.seconds is None:  # it keeps its time itself
            raise
        yield _failed(check.name, _SILENT.format(check.seconds), _SILENT_REMEDY)
    except DisklessError as error:
        yield _refused(check.name, error, patient.place)
    for finding in found:
        yield finding


_SILENT = "no answer within {:g} seconds"
_SILENT_REMEDY = "try again, and if it stays so, see whether the server is well and what is between here and there"


def _ok(check: str, found: str) -> Finding:
    return Finding(check, State.OK, found)


def _warning(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, State.WARNING, found, remedy)


def _failed(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, State.FAILED, found, remedy)


def _refused(check: str, error: DisklessError, place: str) -> Finding:
    """Return a failure from an error: what it says without what was being done, and its remedy apart."""
    before, _, after = str(error).partition(f" in {place}: ")
    text = after or before
    answered = _ANSWERED.search(text)
    if isinstance(error, SettingsError) or (isinstance(error, StorageDenied) and answered):
        found, _, remedy = (text[: answered.start()] if answered else text).partition(": ")
        return _failed(check, f"{found}{answered[0] if answered else ''}", remedy)
    return _unfit(check, type(error).__name__, text)


def _unfit(check: str, kind: str | None, text: str) -> Finding:
    """Return a failure from an error of `app.errors` by the name of its class and its sentence."""
    found, colon, remedy = text.rpartition(": ")
    if kind in _WITH_REMEDY and colon:
        return _failed(check, found, remedy)
    if kind in _EXPLAINED and (itself := _TO_BE_DONE.search(text)):
        return _failed(check, text[: itself.start()], text[itself.end() :])
    return _failed(check, text, _REMEDIES.get(kind or "", _OTHERWISE))


def _code(error: StorageError | None) -> str:
    """Return the code of S3 that a refusal was made of, empty where it had none."""
    answered = _ANSWERED.search(str(error))
    return answered[1] if answered and isinstance(error, StorageDenied) else ""


_ANSWERED = re.compile(r" \[\d+ (\w*)\]\Z")  # our sentences end with what S3 answered, as in [403 AccessDenied]


# The settings


async def _settings(patient: _Patient) -> AsyncIterator[Finding]:
    settings = patient.settings
    yield _ok(
        "settings", f"mode {settings.mode} ({settings.mode_reason}): {patient.place}, models under {_prefix(settings)}"
    )
    for finding in _misspelt():
        yield finding


async def _traces(patient: _Patient) -> AsyncIterator[Finding]:
    """Look whether traces could be sent. The collector is not asked: without it the service serves as well."""
    if (endpoint := patient.settings.otlp_endpoint) is None:
        return
    try:
        Exporter.from_settings(patient.settings)
    except SettingsError:
        remedy = "run `python -m pip install -r otel-requirements.txt`, or unset OTEL_EXPORTER_OTLP_ENDPOINT"
        yield _failed("traces", f"would be sent to {endpoint}, but what sends them is not installed", remedy)
    else:
        yield _ok("traces", f"are sent to {endpoint}")


async def _folder(patient: _Patient) -> AsyncIterator[Finding]:
    """Look at the folder that stands for the bucket, or has the copy: nothing is ever seen in it."""
    settings, check = patient.settings, "folder"
    folder, local = settings.local_dir, settings.mode is Mode.LOCAL
    broken = _failed if local else _warning  # without a copy, the bucket still serves
    if not folder.is_dir():
        if folder.exists() or local:
            what = "is no folder" if folder.exists() else "does not exist"
            remedy = f"set ML_LOCAL_DIR to the folder that {'has your models' if local else 'is to have the copy'}, or create it"
            yield broken(check, f"{folder.absolute()} {what}", remedy)
        else:
            yield _ok(check, f"{folder.absolute()} does not exist yet: the first copy makes it")
        return
    for part in (folder, folder / settings.prefix):
        try:
            there = part.is_dir()
            if there:
                next(part.iterdir(), None)
        except OSError as error:
            yield broken(check, f"{part.absolute()} cannot be read: {error.strerror}", "let this user read it")
            return
        if not there or patient.read_only:
            continue
        try:
            tempfile.TemporaryFile(dir=part, prefix=".diskless-").close()
        except OSError as error:
            found = f"{part.absolute()} can be read, but not written: {error.strerror}"
            if local:
                yield _ok(check, f"{found}; enough to serve, not to publish")
            else:
                yield _warning(
                    check, found, "let this user write there, or set ML_CLOUD_ONLY=true to do without a copy"
                )
            return
    yield _ok(check, f"{folder.absolute()} can be read" + ("" if patient.read_only else " and written"))


# The way to the bucket


async def _name(patient: _Patient) -> AsyncIterator[Finding]:
    check, (host, port, role) = "name", patient.dialled
    proxy = _proxy(patient.url)
    if proxy is not None and proxy.scheme not in ("http", "https"):
        told = f"the environment has a proxy of kind {proxy.scheme}://, and a bucket can be asked only through http://"
        yield _failed(
            check, told, "set HTTP_PROXY and HTTPS_PROXY to one of that kind, or NO_PROXY to the endpoint's host"
        )
        return
    worker = Worker("resolve")  # the system's own patience may be long, and nothing waits for this thread
    try:
        async with asyncio.timeout(NETWORK_SECONDS):
            found = await worker.run(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    except TimeoutError:
        remedy = "see that this machine can ask a name server"
        yield _failed(check, f"no name server told the address of {host} within {NETWORK_SECONDS:g} seconds", remedy)
        return
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or "it is no name"
        remedy = (
            "check R2_ACCOUNT_ID (or R2_ENDPOINT_URL), and that this machine can ask a name server"
            if patient.is_r2
            else "check the spelling of R2_ENDPOINT_URL, and that this machine can ask a name server"
        )
        if role != "the endpoint":
            remedy = "check the variables HTTP_PROXY and HTTPS_PROXY"
        yield _failed(check, f"{host}, {role}, does not resolve: {told}", remedy)
        return
    finally:
        worker.close()
    patient.addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if patient.addresses == [host]:
        yield _ok(check, f"{host} is an address")
    else:
        yield _ok(check, f"{host} resolves to {_some(patient.addresses)}")


async def _connection(patient: _Patient) -> AsyncIterator[Finding]:
    """Connect to every address at once: one that answers is enough."""
    check, (host, port, role) = "connection", patient.dialled

    async def dial(address: str) -> str:
        async with asyncio.timeout(min(NETWORK_SECONDS, patient.settings.connect_timeout_seconds)):
            _, writer = await asyncio.open_connection(address, port)
        await _close(writer)
        return address

    tried = patient.addresses[:ADDRESSES]
    outcomes = await asyncio.gather(*map(dial, tried), return_exceptions=True)
    reached = [outcome for outcome in outcomes if isinstance(outcome, str)]
    problems = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    endpoint = role == "the endpoint"
    where = f"{host}, port {port}" + ("" if endpoint else f" ({role})")
    if reached:
        patient.addresses = reached
        silent = [address for address in tried if address not in reached]
        beside = f", but not at {_some(silent)}" if silent else ""
        yield _ok(check, f"{where}, takes connections{beside}")
    elif any(isinstance(problem, ConnectionRefusedError) for problem in problems):
        variable = "R2_ENDPOINT_URL" if endpoint else "HTTP_PROXY and HTTPS_PROXY"
        remedy = f"check host and port in {variable}, and that the server runs"
        yield _failed(check, f"{where}, refuses connections: nothing listens there", remedy)
    elif any(isinstance(problem, TimeoutError) for problem in problems):
        remedy = "see whether a firewall lets this machine out to that port"
        yield _failed(check, f"{where}, does not answer: no connection in time", remedy)
    else:
        told = _some({getattr(problem, "strerror", None) or type(problem).__name__: None for problem in problems})
        yield _failed(
            check, f"{where}, cannot be reached: {told}", "see whether this machine has a network, and a way there"
        )


async def _tls(patient: _Patient) -> AsyncIterator[Finding]:
    check, (host, port, role) = "TLS", patient.dialled
    if patient.url.scheme == "http":
        if role == "the endpoint" and all(
            ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in patient.addresses
        ):
            yield Finding(check, State.SKIPPED, "the endpoint is http://, on this machine")
        else:
            remedy = "use an https:// endpoint"
            yield _warning(check, "the endpoint is http://: whoever is in between can read and change models", remedy)
        return
    if role != "the endpoint":
        yield Finding(check, State.SKIPPED, f"is made through {role}: what follows uses it")
        return
    try:
        async with asyncio.timeout(NETWORK_SECONDS):
            _, writer = await asyncio.open_connection(
                patient.addresses[0], port, ssl=_trusted_issuers(), server_hostname=host
            )
    except TimeoutError:
        remedy = "see whether the server there speaks TLS, and whether something in between swallows it"
        yield _failed(check, f"{host} takes connections, but does not answer to the TLS handshake", remedy)
        return
    except ssl.SSLCertVerificationError as error:
        yield _failed(
            check, f"the certificate of {host} is not accepted: {error.verify_message}", _certificate_remedy(error)
        )
        return
    except (OSError, ssl.SSLError) as error:
        yield _no_tls(check, patient, error)
        return
    protocol = writer.get_extra_info("ssl_object").version()
    until = writer.get_extra_info("peercert").get("notAfter", "")
    await _close(writer)
    yield _ok(check, f"{protocol}, with a certificate for {host} that is valid until {until}")


def _certificate_remedy(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
        return "check this machine's date first, then have whoever runs the server renew the certificate"
    if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        return "use in R2_ENDPOINT_URL the host name that the certificate is for"
    return (
        "set AWS_CA_BUNDLE to a file with the certificate of whoever issued this one, if you know them: "
        "otherwise something between here and the server answers in its place"
    )


def _no_tls(check: str, patient: _Patient, error: OSError) -> Finding:
    why = str(getattr(error, "reason", None) or error.strerror or "it was broken off").replace("_", " ").lower()
    if "wrong version" in why or "record layer" in why:
        remedy = "begin R2_ENDPOINT_URL with http://, or give the port that speaks TLS"
        return _failed(check, f"{patient.host} does not speak TLS on that port ({why})", remedy)
    remedy = (
        "check R2_ACCOUNT_ID first, and then whether something in between wants another version of TLS"
        if patient.is_r2
        else "see whether the server, or something in between, wants another version of TLS"
    )
    return _failed(check, f"no TLS connection to {patient.host}: {why}", remedy)


async def _s3(patient: _Patient) -> AsyncIterator[Finding]:
    """Send one request that nobody signed: an S3 server refuses it in its own words, and tells the time."""
    import httpx

    check, bucket = "S3", patient.settings.r2.bucket
    issuers = _trusted_issuers() if patient.url.scheme == "https" else False  # to read them takes a while
    through = _proxy(patient.url)
    proxy = through.geturl() if through else None
    url = f"{patient.settings.r2.endpoint_url.rstrip('/')}/{bucket}?list-type=2&max-keys=1"
    try:
        async with (
            asyncio.timeout(NETWORK_SECONDS),
            httpx.AsyncClient(verify=issuers, proxy=proxy, trust_env=False, timeout=NETWORK_SECONDS) as client,
            client.stream("GET", url) as response,
        ):
            at, body = datetime.now(UTC), b""
            async for piece in response.aiter_bytes(BODY_BYTES):
                body += piece
                if len(body) >= BODY_BYTES:
                    break
    except (TimeoutError, httpx.TimeoutException):
        remedy = "see whether R2_ENDPOINT_URL is an S3 endpoint, and whether the server is well"
        yield _failed(check, f"{patient.host} takes connections, but does not answer a request", remedy)
        return
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        told = re.sub(r"//[^/@\s]*@", "//", str(error)) or type(error).__name__  # a proxy's URL may have a password
        remedy = "see whether R2_ENDPOINT_URL is an S3 endpoint, with the right one of http:// and https://"
        yield _failed(check, f"{patient.host} takes connections, but gives no answer of HTTP: {told}", remedy)
        return
    answer = _Answer(response.status_code, response.headers, body.decode(errors="replace"), at)
    patient.answer = answer
    problem = _no_s3(patient, answer)
    if problem is not None:
        yield _failed(check, *problem)
    else:
        server = answer.headers.get("server", "which does not tell its name")
        yield _ok(check, f"an S3 server answers at {patient.host} ({server})")


def _no_s3(patient: _Patient, answer: _Answer) -> tuple[str, str] | None:
    """Return what else than S3 has answered, and what to do; None where it was S3."""
    text, kind = answer.text, answer.headers.get("content-type", "").partition(";")[0]
    if "x-amz-request-id" in answer.headers or re.search(r"<Error>.*<Code>|<ListBucketResult", text, re.DOTALL):
        return None
    if answer.status == 400 and patient.url.scheme == "http" and "HTTPS" in text:
        return "the port speaks TLS, and was asked without", "begin R2_ENDPOINT_URL with https://"
    if answer.status == 407:
        return "the proxy wants a password", "put it into HTTPS_PROXY, as in http://USER:PASSWORD@HOST:PORT"
    if 300 <= answer.status < 400:
        to = re.match(r"https?://([\w.-]+)", answer.headers.get("location", ""))
        return (
            f"the answer is a redirect to {to[1] if to else 'somewhere else'}, not one of an S3 server",
            "log in to the network if it wants that (a captive portal), or check R2_ENDPOINT_URL",
        )
    if answer.status >= 500:
        return (
            f"the answer is status {answer.status}, and not one of an S3 server",
            "try again later: the server, or a proxy before it, is not well",
        )
    if kind == "text/html" or text.lstrip()[:9].lower() in ("<!doctype", "<html>"):
        title = re.search(r"<title[^>]*>\s*([^<]{1,60})", text, re.IGNORECASE)
        named = f" ({title[1].strip()!r})" if title else ""
        return (
            f"a web page answers{named}, not an S3 server",
            "log in to the network if it wants that (a captive portal), or set R2_ENDPOINT_URL to the S3 endpoint, "
            "which is no address of a dashboard or of a public bucket",
        )
    return (
        f"something answers with status {answer.status} and {kind or 'no content type'}, but not in the words of S3",
        "set R2_ENDPOINT_URL to the S3 endpoint",
    )


async def _clock(patient: _Patient) -> AsyncIterator[Finding]:
    check, answer = "clock", patient.answer
    assert answer is not None
    try:
        told = parsedate_to_datetime(answer.headers.get("date", ""))
    except ValueError:
        yield Finding(check, State.SKIPPED, "the server does not tell the time")
        return
    seconds = (answer.at - (told if told.tzinfo else told.replace(tzinfo=UTC))).total_seconds()
    skew = abs(seconds)
    side = "ahead of" if seconds > 0 else "behind"
    size = f"{skew:.0f} seconds" if skew < 120 else f"{skew / 60:.0f} minutes"
    remedy = "set this machine's clock, best by a time service (NTP)"
    if skew > MAX_SKEW_SECONDS:
        yield _failed(
            check, f"this machine's clock is {size} {side} the server's: S3 refuses more than 15 minutes", remedy
        )
    elif skew > WORRYING_SKEW_SECONDS:
        yield _warning(
            check, f"this machine's clock is {size} {side} the server's: S3 refuses from 15 minutes on", remedy
        )
    else:
        yield _ok(
            check,
            "this machine's clock is right" if skew < 2 else f"this machine's clock is {size} {side} the server's",
        )


# Signed requests


async def _credentials(patient: _Patient) -> AsyncIterator[Finding]:
    """Ask for the index. What comes back tells of credentials, region, bucket and rights: the next checks read it."""
    check, settings = "credentials", patient.settings
    await patient.open()
    try:
        async with asyncio.timeout(REQUESTS_SECONDS):
            await patient.manager.storage.get(f"{settings.prefix}index.json")
    except ObjectNotFound:
        pass
    except TimeoutError:
        yield _failed(check, _SILENT.format(REQUESTS_SECONDS), _SILENT_REMEDY)
        return
    except StorageError as error:
        patient.refusal = error
    code = _code(patient.refusal)
    if patient.refusal is None or code == "AccessDenied" or code in _BUCKET_CODES:
        temporary = ", with a session token," if settings.session_token else ""
        yield _ok(check, f"access key id {settings.r2.access_key_id[:4]}… is known{temporary} and its secret is right")
    elif code in _REGION_CODES:
        yield Finding(check, State.SKIPPED, "not looked at by the server, which refused the region first")
    else:
        yield _refused(check, patient.refusal, patient.place)


async def _region(patient: _Patient) -> AsyncIterator[Finding]:
    check, region = "region", patient.settings.region
    if _code(patient.refusal) in _REGION_CODES:
        assert patient.refusal is not None
        finding = _refused(check, patient.refusal, patient.place)
        found = f"R2_REGION is {region!r}, and {finding.found}"
        yield _failed(check, found, "set R2_REGION=auto, or remove it" if patient.is_r2 else finding.remedy or "")
    elif patient.is_r2 and region not in ("auto", "us-east-1"):
        yield _warning(check, f"R2_REGION is {region!r}, and R2 knows only 'auto'", "set R2_REGION=auto, or remove it")
    else:
        yield _ok(check, f"R2_REGION {region!r} is accepted")


async def _bucket(patient: _Patient) -> AsyncIterator[Finding]:
    check, bucket, code = "bucket", patient.settings.r2.bucket, _code(patient.refusal)
    where = f"the endpoint of jurisdiction {patient.jurisdiction!r}" if patient.is_r2 else patient.host
    if code == "NoSuchBucket" and patient.is_r2:
        yield _failed(
            check,
            f"{where} has no bucket {bucket!r} [{code}]",
            "compare R2_BUCKET and R2_ACCOUNT_ID with the dashboard, and if the bucket was created in a jurisdiction, set "
            "R2_JURISDICTION to it ('eu' or 'fedramp'; 'default' for none): the endpoint of another does not see it",
        )
    elif code == "NoSuchBucket":
        remedy = "check R2_BUCKET, and whether R2_ENDPOINT_URL is the server that has it"
        yield _failed(check, f"{where} has no bucket {bucket!r} [{code}]", remedy)
    elif code in _BUCKET_CODES:
        assert patient.refusal is not None
        finding = _refused(check, patient.refusal, patient.place)
        yield _failed(check, f"{finding.found} (R2_BUCKET is {bucket!r})", finding.remedy or "check R2_BUCKET")
    elif patient.refusal is None:
        yield _ok(check, f"{where} has bucket {bucket!r}")
    else:
        yield Finding(check, State.SKIPPED, "a token that may not read there is not told whether there is one")


async def _reading(patient: _Patient) -> AsyncIterator[Finding]:
    if patient.refusal is not None:
        finding = _refused("reading", patient.refusal, patient.place)
        yield _failed(
            "reading", finding.found, "give the token 'Object Read only', or more, on this bucket (R2_BUCKET)"
        )
    else:
        yield _ok("reading", f"objects under {_prefix(patient.settings)} can be read")


async def _listing(patient: _Patient) -> AsyncIterator[Finding]:
    check, settings = "listing", patient.settings
    try:
        listed = await patient.manager.storage.list(settings.prefix, recursive=False)
    except StorageDenied as error:
        finding = _refused(check, error, patient.place)
        if settings.bare_models:
            remedy = "give the token the right to list too, or set ML_BARE_MODELS=false if all models are published"
            yield _failed(check, finding.found, remedy)
        else:
            yield _ok(check, f"{finding.found}; with ML_BARE_MODELS=false nothing needs it")
        return
    patient.direct_keys = len(listed)
    yield _ok(check, f"objects under {_prefix(settings)} can be listed: {len(listed):,} directly there")


async def _writing(patient: _Patient) -> AsyncIterator[Finding]:
    """Write an object that nothing reads, and remove it, whatever happens in between."""
    check = "writing"
    if patient.read_only:
        yield Finding(check, State.SKIPPED, "not tried, as --read-only was given")
        return
    key = f"{patient.settings.prefix}.doctor-{secrets.token_hex(8)}"
    left: Finding | None = None
    # Until something else is known: the object may be there although no answer came.
    finding: Finding | None = _failed(check, _SILENT.format(REQUESTS_SECONDS), _SILENT_REMEDY)
    try:
        async with asyncio.timeout(REQUESTS_SECONDS):
            finding = await _conditions(patient.manager.storage, key)
    except TimeoutError:
        pass
    except StorageError as error:
        finding = _refused(check, error, patient.place)
    finally:
        if finding is not None:
            left = await _removed(patient, key)
    if finding is None:
        finding = _ok(check, "the token may only read: enough to serve; to publish, use one with 'Object Read & Write'")
    yield finding
    if left is not None:
        yield left


async def _conditions(storage: Storage, key: str) -> Finding | None:
    """Do with `key` what publishing does with its objects; return what became of it, None where nothing may be written."""
    check, body = "writing", b"written by `python -m app doctor`, and of no use\n"
    try:
        info = await storage.put(key, body, if_absent=True)
    except StorageDenied as error:
        if _code(error) in ("AccessDenied", ""):
            return None
        raise
    remedy = "publish to a server that honours conditions, as R2 does: serving from this one is safe"
    for condition, kept in ({"if_absent": True}, "If-None-Match"), ({"if_match": "0" * 32}, "If-Match"):
        try:
            await storage.put(key, body, **condition)
        except PreconditionFailed:
            continue
        found = f"the server ignores {kept}: two who publish at the same time would overwrite each other"
        return _failed(check, found, remedy)
    try:
        await storage.put(key, body, if_match=info.etag)
    except PreconditionFailed:
        found = "the server refuses If-Match with the right ETag: the index could never be changed"
        return _failed(check, found, remedy)
    return _ok(check, "objects can be written and removed, and conditions are honoured: enough to publish")


async def _removed(patient: _Patient, key: str) -> Finding | None:
    """Remove the object; return a warning where it may still be there."""
    try:
        async with asyncio.timeout(CLEANING_SECONDS):
            await patient.manager.storage.delete(key)
    except (TimeoutError, StorageError):
        return _warning(
            "writing", f"the object {key} may be left: it could not be removed", "remove it; it does no harm"
        )
    return None


# What is in the bucket


async def _index(patient: _Patient) -> AsyncIterator[Finding]:
    check, settings = "index", patient.settings
    if settings.mode is Mode.LOCAL:
        await patient.open()
    try:
        catalogue = await patient.manager.catalogue()
    except InvalidIndex as error:
        upgrade = str(error).endswith("upgrade Diskless")
        remedy = (
            "upgrade Diskless" if upgrade else "put a good index.json back, or remove it and publish the models again"
        )
        yield _failed(check, str(error), remedy)
        return
    patient.catalogue = catalogue
    models = catalogue.index.published
    bare = [wanted.ref.name for wanted in catalogue.wanted.values() if wanted.bare]
    beside = f", and {_count(len(bare), 'bare model')}: {_some(bare)}" if bare else ""
    if models:
        versions = _count(sum(len(entry.versions) for entry in models.values()), "version")
        yield _ok(check, f"{_count(len(models), 'published model')}, {versions}: {_some(models)}{beside}")
    elif bare:
        nothing = "no version is left in it" if catalogue.index.models else "there is none: nothing was published"
        yield _ok(check, f"{nothing}{beside}")
    else:
        nothing = "no version is left in it" if catalogue.index.models else "there is none"
        yield _warning(
            check,
            f"{nothing}, and no bare model: nothing would be served from {_prefix(settings)}",
            "publish a model (`python -m app publish NAME --model FILE`), or set ML_PREFIX to where the models are",
        )
    ignored = {name: why for name, why in catalogue.ignored.items() if name not in models}
    if ignored:
        told = _some([f"{name} ({why})" for name, why in ignored.items()])
        yield _warning(check, f"passed over: {told}", "rename, publish or remove them, if they were meant to be served")


async def _aliases(patient: _Patient) -> AsyncIterator[Finding]:
    check, aliases, models = "ML_ALIASES", patient.settings.aliases, patient.catalogue.index.published
    for alias in aliases:
        targets = [f"{name}/{entry.aliases[alias]}" for name, entry in models.items() if alias in entry.aliases]
        if targets:
            yield _ok(check, f"{alias}: {_some(targets)}")
        elif models:
            remedy = f"promote a version (`python -m app promote NAME VERSION --alias {alias}`), or correct ML_ALIASES"
            yield _warning(check, f"no published model has the alias {alias!r}", remedy)
    unserved = [name for name, entry in models.items() if not set(aliases) & set(entry.aliases)]
    if unserved:
        remedy = "promote a version (`python -m app promote NAME VERSION`), or add the alias that it has to ML_ALIASES"
        yield _warning(check, f"not served, as none of these aliases names a version: {_some(unserved)}", remedy)


async def _required(patient: _Patient) -> AsyncIterator[Finding]:
    check, required = "ML_REQUIRED_MODELS", patient.settings.required_models
    names = {ref.name for ref in patient.catalogue.wanted}
    missing = [name for name in required if name not in names]
    if missing:
        remedy = "publish them (`python -m app publish`), or take them out of ML_REQUIRED_MODELS"
        yield _failed(check, f"not in the bucket, so that the service would never be ready: {_some(missing)}", remedy)
    elif required:
        yield _ok(check, f"all there: {_some(required)}")


async def _companions(patient: _Patient) -> AsyncIterator[Finding]:
    check, catalogue = "ML_COMPANIONS", patient.catalogue
    bare = {wanted.ref.name for wanted in catalogue.wanted.values() if wanted.bare}
    for name, roles in patient.settings.companions.items():
        remedy = f"correct ML_COMPANIONS, or remove {name} from it"
        if name in catalogue.index.published:
            yield _warning(check, f"{name} is published, and a published version brings its own companions", remedy)
        elif name not in bare:
            yield _warning(check, f"there is no bare model {name}, of which {_some(roles)} would be demanded", remedy)
        else:
            yield _ok(check, f"{name} must have {_some(roles)}: see the model")


async def _memory(patient: _Patient) -> AsyncIterator[Finding]:
    """Compare what the served versions are expected to take with what is free here, before any of them is loaded."""
    check, estimator = "memory", memory.Estimator()
    fetched = await asyncio.gather(
        *map(patient.manager.fetch, patient.catalogue.wanted.values()), return_exceptions=True
    )
    patient.bundles = [
        bundle for bundle in fetched if isinstance(bundle, Bundle)
    ]  # the models' check tells of the others
    expected = [
        estimator.estimate(bundle.stored, bundle.manifest.memory if bundle.manifest else None).expected
        for bundle in patient.bundles
    ]
    resident = sum(taken.resident_bytes for taken in expected)
    swing = max((taken.peak_bytes - taken.resident_bytes for taken in expected), default=0)
    needed = resident + max(0, swing) + memory.LIBRARIES_BYTES + memory.OVERHEAD_BYTES
    room = memory.room(patient.settings.memory_limit_bytes)
    told = f"{_count(len(expected), 'served version')} and the libraries are expected to take up to {_mb(needed)}"
    if room is None:
        yield Finding(check, State.SKIPPED, f"nothing tells the limit of this process; {told}")
        return
    found = f"{_mb(room.free_bytes)} of {_mb(room.limit_bytes)} are free here ({room.source}); {told}"
    if needed > room.free_bytes:
        yield _warning(check, found, "give the service more memory, serve fewer models, or publish smaller ones")
    else:
        yield _ok(check, found)


async def _seals(patient: _Patient) -> AsyncIterator[Finding]:
    check, settings = "seals", patient.settings
    if not settings.trusted_keys:
        yield Finding(check, State.SKIPPED, "ML_TRUSTED_KEYS is not set: seals are not looked at")
        return
    fetched = {bundle.ref for bundle in patient.bundles}
    unknown = [str(ref) for ref in patient.catalogue.wanted if ref not in fetched]
    unsealed = [str(bundle.ref) for bundle in patient.bundles if bundle.sealed_by is None]
    by = f"trusted are {_some(list(settings.trusted_keys))}"
    if unsealed:  # with ML_REQUIRE_SEAL they could not even be fetched: their check says so
        remedy = "publish them with --seal-key, and set ML_REQUIRE_SEAL=true once all are sealed"
        yield _warning(check, f"served without a seal of a trusted key: {_some(unsealed)}; {by}", remedy)
    elif settings.require_seal:
        yield _ok(check, f"only what is sealed is loaded; {by}")
    elif not patient.catalogue.wanted:
        yield Finding(check, State.SKIPPED, f"nothing is served, so there is no seal to look at; {by}")
    elif unknown:
        remedy = "mend what the check of each says, and look again"
        yield _warning(check, f"not known, as it could not be fetched: {_some(unknown)}; {by}", remedy)
    else:
        yield _ok(check, f"all that is served is sealed, though ML_REQUIRE_SEAL=true does not demand it yet; {by}")


async def _models(patient: _Patient) -> AsyncIterator[Finding]:
    """Load every version, as `verify` does. One that nothing serves cannot fail the service: it is a warning."""
    served = {str(ref) for ref in patient.catalogue.wanted}
    async for verdict in verify(patient.manager):
        check = f"model {verdict.ref}"
        if verdict.problem is None:
            rows = verdict.golden_rows
            yield _ok(check, f"loads, {rows} golden rows come out" if rows else "loads, no golden rows to check")
            continue
        problem = verdict.problem.removeprefix(verdict.ref).lstrip(": ")
        if verdict.unread and verdict.ref not in served:
            yield _warning(check, f"{problem} (nothing serves it now)", _REMEDIES.get(verdict.kind or "", _OTHERWISE))
        elif verdict.ref in served:
            yield _unfit(check, verdict.kind, problem)
        else:
            remedy = f"do not promote it; `python -m app unpublish {verdict.ref.replace('/', ' ')}` removes it"
            yield _warning(check, f"{problem} (nothing serves it now)", remedy)


async def _operations(patient: _Patient) -> AsyncIterator[Finding]:
    """Count what looking at the bucket costs in a month: a GET each time, and the pages of a listing for bare models."""
    check, settings = "operations", patient.settings
    looks = MONTH_SECONDS / settings.refresh_seconds
    pages = -(-max(1, patient.direct_keys + len(patient.catalogue.index.models)) // PAGE_KEYS)
    lists, gets = round(looks * pages) if settings.bare_models else 0, round(looks)
    found = (
        f"a look every {settings.refresh_seconds:g} s (ML_REFRESH_SECONDS) costs each process "
        f"{lists:,} class A (list) and {gets:,} class B (get) operations a month"
    )
    if not patient.is_r2:
        yield _ok(check, f"{found}; on R2 {FREE_CLASS_A:,} and {FREE_CLASS_B:,} would be free")
        return
    found += f"; {_percent(lists, FREE_CLASS_A)} and {_percent(gets, FREE_CLASS_B)} of what R2 gives free to an account"
    if lists <= FREE_CLASS_A and gets <= FREE_CLASS_B:
        yield _ok(check, found)
    else:
        bare = ", or set ML_BARE_MODELS=false, which needs no list, once all models are published" if lists else ""
        yield _warning(check, found, f"set a longer ML_REFRESH_SECONDS{bare}")


# How it is told


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return ", ".join(listed[:LISTED]) + more


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _mb(size: int) -> str:
    return f"{-(-size // memory.MB):,} MB"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.1f} %" if 0 < share < 10 else f"{share:.0f} %"


def _prefix(settings: Settings) -> str:
    return settings.prefix or "the bucket's root"


# How the service connects


def _proxy(url: SplitResult) -> SplitResult | None:
    """Return the proxy that requests go through: botocore, as httpx, follows the environment in this."""
    proxy = getproxies().get(url.scheme)
    if not proxy or proxy_bypass(url.hostname or ""):
        return None
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _trusted_issuers() -> ssl.SSLContext:
    """Return what certificates are checked by: the file that botocore would take, so that both come to the same end.

    Raises `SettingsError`.
    """
    import certifi

    file = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE") or certifi.where()
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:  # ssl.SSLError is one
        problem = f"the file of AWS_CA_BUNDLE or REQUESTS_CA_BUNDLE, {file}, cannot be used ({error.strerror})"
        raise SettingsError([f"{problem}: set it to one with certificates (PEM), or set none"]) from error


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def _checks(mode: Mode) -> Sequence[_Check]:
    """Return the checks of a mode in the order in which they are run."""
    contents = [
        _Check("index", _index, ("folder", "reading", "listing")),
        _Check("ML_ALIASES", _aliases, ("index",)),
        _Check("ML_REQUIRED_MODELS", _required, ("index",)),
        _Check("ML_COMPANIONS", _companions, ("index",)),
        _Check("memory", _memory, ("index",)),
        _Check("seals", _seals, ("index",)),
        _Check("models", _models, ("index",), seconds=None),
    ]
    folder = _Check("folder", _folder, ("settings",))
    if mode is Mode.LOCAL:
        return [_Check("settings", _settings), _Check("traces", _traces), folder, *contents]
    way = [
        _Check("name", _name),
        _Check("connection", _connection),
        _Check("TLS", _tls),
        _Check("S3", _s3),
    ]
    steps = [_Check(later.name, later.run, (before.name,)) for before, later in pairwise(way)]
    return [
        _Check("settings", _settings),
        _Check("traces", _traces),
        *([] if mode is Mode.CLOUD_ONLY else [folder]),
        way[0],
        *steps,
        _Check("clock", _clock, ("S3",)),
        _Check("credentials", _credentials, ("S3",), seconds=None),
        _Check("region", _region, ("credentials",)),
        _Check("bucket", _bucket, ("credentials", "region")),
        _Check("reading", _reading, ("bucket", "credentials", "region")),
        _Check("listing", _listing, ("reading", "bucket", "credentials", "region")),
        _Check("writing", _writing, ("bucket", "credentials", "region"), seconds=None),
        *contents,
        _Check("operations", _operations),
    ]
