"""`python -m app doctor` finds the one thing that is wrong, says what to do about it, and changes nothing."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import re
import select
import socket
import socketserver
import ssl
import sys
import threading
from dataclasses import replace
from email.utils import format_datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from app import doctor, seal
from app.cli import main
from app.doctor import Finding, State
from app.errors import SettingsError
from app.model_storage import ModelStorageManager
from app.settings import load_settings
from app.storage.local import LocalStorage
from app.storage.r2 import R2Storage
from tests.faults import FOR_EVER, Answer, Fault, FaultyProxy, hang, page, status
from tests.repository import ROWS, draft, dumped, linear, scaler
from tests.service import clean_environment, free_port, r2_environment

SECRET = "very-secret"
ACCOUNT = "0123456789abcdef0123456789abcdef"
R2_CHECKS = [
    *("settings", "name", "connection", "TLS", "S3", "clock", "credentials", "region", "bucket", "reading", "listing"),
    *("writing", "index", "ML_ALIASES", "memory", "seals", "model a/1", "operations"),
]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Set variables, and no others that the service knows."""
    for name in os.environ:
        if name not in clean_environment({}) or name.lower().endswith(("_proxy", "_ca_bundle")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine may stand still for seconds. What has to be given up is given up sooner, where a test says so."""
    for limit in ("NETWORK_SECONDS", "REQUESTS_SECONDS", "CLEANING_SECONDS"):
        monkeypatch.setattr(doctor, limit, 60.0)


@pytest.fixture
def examine(environment, monkeypatch):
    """Examine what variables describe, up to a check; return the findings: none may show the secret or lack a remedy.

    The network has one second from the finding `hasty_after` on.
    """

    async def run(
        *, read_only: bool = False, until: str | None = None, hasty_after: str | None = None, **variables: str
    ) -> list[Finding]:
        environment(**{"R2_CONNECT_TIMEOUT_SECONDS": "60"} | variables)
        findings: list[Finding] = []
        async with contextlib.aclosing(doctor.examine(load_settings(), read_only=read_only)) as examination:
            async for finding in examination:
                findings.append(finding)
                if finding.check == hasty_after:
                    monkeypatch.setattr(doctor, "NETWORK_SECONDS", 1.0)
                if finding.check == until:
                    break
        text = "\n".join(map(str, findings))
        assert SECRET not in text
        assert variables.get("R2_SECRET_ACCESS_KEY", SECRET) not in text
        assert all(bool(it.remedy) == (it.state in (State.FAILED, State.WARNING)) for it in findings)
        return findings

    return run


@pytest.fixture
def writer(s3, bucket):
    return r2_environment(s3.endpoint_url, bucket, s3.writer)


@pytest.fixture
def local(tmp_path):
    """A folder that stands for the bucket."""
    (tmp_path / "bucket").mkdir()
    return {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(tmp_path / "bucket")}


@pytest.fixture
def manager(local):
    return ModelStorageManager(LocalStorage(Path(local["ML_LOCAL_DIR"])))


def through(proxy, writer, **variables):
    return {**writer, "R2_ENDPOINT_URL": proxy.url, "R2_MAX_ATTEMPTS": "1", **variables}


def states(findings, *kinds):
    return [finding.check for finding in findings if finding.state in kinds]


def only_failure(findings):
    """The one check that failed. What needs it was skipped, and says so; the way to it was fine."""
    (failed,) = (finding for finding in findings if finding.state is State.FAILED)
    because = [finding for finding in findings if finding.found == f"because {failed.check} failed"]
    assert {finding.state for finding in because} <= {State.SKIPPED}
    assert len(because) >= 5 or failed.check not in R2_CHECKS[:10]
    return failed


def one(findings, check):
    (found,) = (finding for finding in findings if finding.check == check)
    return found


async def keys(r2_arguments):
    async with R2Storage(**r2_arguments) as storage:
        return [info.key for info in await storage.list("")]


# All is well


async def test_a_bucket_that_can_be_served_and_published_to_has_no_finding(examine, writer, r2_arguments):
    async with (manager := ModelStorageManager(R2Storage(**r2_arguments))).storage:
        await manager.publish("a", draft(linear(1), ROWS[:7]))
    before = await keys(r2_arguments)
    findings = await examine(**writer)

    assert [finding.check for finding in findings] == R2_CHECKS
    assert states(findings, State.FAILED, State.WARNING) == []
    assert states(findings, State.SKIPPED) == ["TLS", "seals"]
    assert one(findings, "model a/1").found == "loads, 7 golden rows come out"
    assert one(findings, "ML_ALIASES").found == "production: a/1"
    assert one(findings, "writing").found.endswith("conditions are honoured: enough to publish")
    assert await keys(r2_arguments) == before
    assert doctor.summary(findings) == "all is well"


async def test_a_token_that_may_only_read_is_enough_to_serve(examine, s3, writer, r2_arguments):
    reader = r2_environment(s3.endpoint_url, s3.bucket, s3.reader)
    findings = await examine(**reader)

    assert states(findings, State.FAILED) == []
    assert one(findings, "writing").state is State.OK
    assert re.search(
        "may only read: enough to serve; to publish, .*'Object Read & Write'", one(findings, "writing").found
    )
    assert await keys(r2_arguments) == []


async def test_nothing_is_written_when_nothing_may_be(examine, writer, proxy):
    findings = await examine(read_only=True, **through(proxy, writer))

    assert one(findings, "writing").state is State.SKIPPED
    assert set(proxy.methods()) == {"GET"}


async def test_an_empty_bucket_is_told_what_would_fill_it(examine, writer):
    found = one(await examine(**writer), "index")

    assert found.state is State.WARNING
    assert "nothing would be served from models/" in found.found
    assert "python -m app publish" in found.remedy


# The way there


@pytest.mark.parametrize(
    ("endpoint", "check", "found", "remedy"),
    [
        ("http://127.0.0.1:{closed}", "connection", "refuses connections", "check host and port in R2_ENDPOINT_URL"),
        ("https://no.such.host.invalid", "name", "does not resolve", "check the spelling of R2_ENDPOINT_URL"),
        ("https://127.0.0.1:{s3}", "TLS", "does not speak TLS on that port", "begin R2_ENDPOINT_URL with http://"),
    ],
)
async def test_what_is_in_the_way_is_named(examine, s3, writer, endpoint, check, found, remedy):
    url = endpoint.format(closed=free_port(), s3=s3.endpoint_url.rpartition(":")[2])
    failed = only_failure(await examine(**writer | {"R2_ENDPOINT_URL": url}))

    assert failed.check == check
    assert found in failed.found
    assert remedy in failed.remedy


FOUND = Answer(302, {"Location": "https://login.invalid/?next=x"}, b"")


@pytest.mark.parametrize(
    ("fault", "found", "remedy"),
    [
        (
            page("<html><title> Welcome to the hotel </title>"),
            r"a web page answers \('Welcome to the hotel'\)",
            "captive",
        ),
        (Fault(instead=FOUND), "a redirect to login.invalid", "log in"),
        (Fault(instead=Answer(502, {"Content-Type": "text/html"}, b"<html>")), "status 502", "try again later"),
        (
            Fault(instead=Answer(200, {"Content-Type": "application/json"}, b"{}")),
            "not in the words of S3",
            "R2_ENDPOINT",
        ),
        (Fault(instead=Answer(407, {}, b"")), "the proxy wants a password", "HTTPS_PROXY"),
        (
            Fault(instead=Answer(400, {}, b"The plain HTTP request was sent to HTTPS port")),
            "the port speaks TLS, and was asked without",
            "begin R2_ENDPOINT_URL with https://",
        ),
        (Fault(sent_bytes=0, asks=False), "no answer of HTTP", "http:// and https://"),
        (hang(), "does not answer a request", "S3 endpoint"),
    ],
)
async def test_what_answers_in_place_of_s3_is_named(examine, writer, proxy, fault, found, remedy):
    proxy.inject(fault, times=FOR_EVER)
    hasty_after = "TLS" if fault.hangs else None
    failed = only_failure(await examine(hasty_after=hasty_after, **through(proxy, writer)))

    assert failed.check == "S3"
    assert re.search(found, failed.found)
    assert remedy in failed.remedy


async def test_a_port_that_takes_no_connection_is_given_up(examine, writer):
    with contextlib.ExitStack() as opened:
        full = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):  # the queue of connections that nobody accepts
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        failed = only_failure(await examine(hasty_after="name", **writer | {"R2_ENDPOINT_URL": url}))

    assert (failed.check, "no connection in time" in failed.found) == ("connection", True)
    assert "firewall" in failed.remedy


async def test_a_server_that_does_not_shake_hands_is_given_up(examine, writer):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        failed = only_failure(await examine(hasty_after="connection", **writer | {"R2_ENDPOINT_URL": url}))

    assert failed.check == "TLS"
    assert "does not answer to the TLS handshake" in failed.found


async def test_a_server_that_breaks_the_handshake_off_is_told(examine, writer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            for _ in range(2):  # the connection of one check, and that of the next
                server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        failed = only_failure(await examine(**writer | {"R2_ENDPOINT_URL": url}))
        thread.join()

    assert failed.check == "TLS"
    assert failed.found.startswith("no TLS connection to 127.0.0.1: ")


async def test_one_address_that_answers_is_enough(examine, s3, writer):
    port = s3.endpoint_url.rpartition(":")[2]
    name, connection = (await examine(until="connection", **writer | {"R2_ENDPOINT_URL": f"http://localhost:{port}"}))[
        1:
    ]

    assert "localhost resolves to " in name.found
    assert connection.state is State.OK
    assert connection.found.startswith(f"localhost, port {port}, takes connections")


async def test_a_proxy_of_the_environment_is_what_is_dialled_and_its_password_is_not_shown(examine, writer):
    closed = {"R2_ENDPOINT_URL": "http://bucket.invalid", "HTTP_PROXY": f"http://ann:{SECRET}@127.0.0.1:{free_port()}"}
    failed = only_failure(await examine(**writer | closed))

    assert failed.check == "connection"
    assert "(the proxy of the environment), refuses connections" in failed.found
    assert "HTTPS_PROXY" in failed.remedy


async def test_a_proxy_that_nothing_here_can_speak_to_is_told(examine, writer):
    socks = {"R2_ENDPOINT_URL": "http://bucket.invalid", "HTTP_PROXY": "socks5://127.0.0.1:1"}
    failed = only_failure(await examine(**writer | socks))

    assert failed.check == "name"
    assert "a proxy of kind socks5://" in failed.found
    assert "NO_PROXY" in failed.remedy


@pytest.mark.parametrize(
    ("minutes", "state", "found"),
    [
        (0, State.OK, "clock is right"),
        (-3, State.OK, "3 minutes ahead of the server's"),
        (-7, State.WARNING, "7 minutes ahead of the server's"),
        (60, State.FAILED, "60 minutes behind the server's: S3 refuses more than 15 minutes"),
        (None, State.SKIPPED, "does not tell the time"),
    ],
)
async def test_the_clock_is_held_against_the_servers(examine, writer, proxy, monkeypatch, minutes, state, found):
    here = datetime.datetime.now(datetime.UTC)

    class Clock(datetime.datetime):  # stands still, so that it does not count how long the answer takes
        @classmethod
        def now(cls, tz=None):
            return here

    def tell(answer):
        kept = {name: value for name, value in answer.headers.items() if name.lower() != "date"}
        if minutes is not None:
            kept["Date"] = format_datetime(here + datetime.timedelta(minutes=minutes), usegmt=True)
        return replace(answer, headers=kept)

    monkeypatch.setattr(doctor, "datetime", Clock)
    proxy.inject(Fault(spoil=tell), times=FOR_EVER)
    clock = one(await examine(until="clock", **through(proxy, writer)), "clock")

    assert clock.state is state
    assert found in clock.found


# TLS


def certificate(folder: Path, *names: str, days: int = 1) -> ssl.SSLContext:
    """Make a certificate for `names`, written to `folder`/issuer.pem, and return the context of a server that has it."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    alternatives = [
        x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() and name[-1].isdigit() else x509.DNSName(name)
        for name in names
    ]
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "issuer.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "issuer.pem", folder / "key.pem")
    return context


async def test_a_certificate_of_an_issuer_in_the_bundle_is_good_to_the_end(examine, s3, writer, tmp_path):
    with FaultyProxy(s3.endpoint_url, tls=certificate(tmp_path, "127.0.0.1")) as proxy:
        trusted = {"R2_ENDPOINT_URL": proxy.url.replace("http", "https"), "AWS_CA_BUNDLE": str(tmp_path / "issuer.pem")}
        findings = await examine(**writer | trusted)

    assert states(findings, State.FAILED) == []
    assert re.fullmatch(
        r"TLSv1\.\d, with a certificate for 127\.0\.0\.1 that is valid until .*", one(findings, "TLS").found
    )


@pytest.mark.parametrize(
    ("names", "days", "bundle", "found", "remedy"),
    [
        (["127.0.0.1"], 1, "none", "self-signed certificate", "set AWS_CA_BUNDLE"),
        (["127.0.0.1"], -1, "issuer.pem", "certificate has expired", "check this machine's date first"),
        (["elsewhere.invalid"], 1, "issuer.pem", "IP address mismatch", "the host name that the certificate is for"),
        (["127.0.0.1"], 1, "missing.pem", "missing.pem, cannot be used", "set it to one with certificates"),
    ],
)
async def test_a_certificate_that_is_not_accepted_is_told_apart(
    examine, s3, writer, tmp_path, names, days, bundle, found, remedy
):
    with FaultyProxy(s3.endpoint_url, tls=certificate(tmp_path, *names, days=days)) as proxy:
        variables = {"R2_ENDPOINT_URL": proxy.url.replace("http", "https")}
        if bundle != "none":
            variables["AWS_CA_BUNDLE"] = str(tmp_path / bundle)
        failed = only_failure(await examine(**writer | variables))

    assert failed.check == "TLS"
    assert found in failed.found
    assert remedy in failed.remedy


# Signed requests


@pytest.mark.parametrize(
    ("variables", "check", "found", "remedy"),
    [
        ({"R2_SECRET_ACCESS_KEY": SECRET}, "credentials", "does not belong to the access key id", "copy both again"),
        ({"R2_ACCESS_KEY_ID": "unknown"}, "credentials", "the access key id is unknown", "create an R2 API token"),
        ({"R2_BUCKET": "other"}, "bucket", "127.0.0.1 has no bucket 'other'", "check R2_BUCKET"),
    ],
)
async def test_a_setting_that_the_server_refuses_is_named(examine, writer, variables, check, found, remedy):
    failed = only_failure(await examine(**writer | variables))

    assert failed.check == check
    assert found in failed.found
    assert remedy in failed.remedy


def region(expected: str) -> Fault:
    text = f"<Error><Code>AuthorizationHeaderMalformed</Code><Region>{expected}</Region></Error>"
    return Fault(instead=Answer(400, {"Content-Type": "application/xml"}, text.encode()))


@pytest.mark.parametrize(
    ("fault", "check", "found", "remedy"),
    [
        (status(403, "ExpiredToken"), "credentials", "the session token is not", "create new temporary credentials"),
        (status(401, "Unauthorized"), "credentials", "is unknown, or its token has expired", "create an R2 API token"),
        (status(403, "RequestTimeTooSkewed"), "credentials", "clock is wrong by more than 15 minutes", "set it"),
        (status(503, "SlowDown"), "credentials", "the server answered 503 SlowDown", "try again"),
        (
            region("eu-west-1"),
            "region",
            "R2_REGION is 'auto', and the bucket is in another",
            "set R2_REGION to 'eu-west-1'",
        ),
        (region(SECRET.upper()), "region", "the bucket is in another", "set R2_REGION to the bucket's"),
        (status(400, "InvalidRegionName"), "region", "knows no such region", "for R2 to 'auto'"),
        (status(403, "AccessDenied"), "reading", "the token may not do this", "'Object Read only'"),
        (status(400, "InvalidBucketName"), "bucket", "cannot be a bucket's name (R2_BUCKET is", "check R2_BUCKET"),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
async def test_a_refusal_is_put_down_to_what_it_is_about(examine, writer, proxy, fault, check, found, remedy):
    proxy.inject(fault, containing="index.json", times=FOR_EVER)
    failed = only_failure(await examine(**through(proxy, writer)))

    assert failed.check == check
    assert found in re.sub(r" \[\d+ \w+\]", "", failed.found)
    assert remedy in failed.remedy


async def test_a_token_that_may_not_list_is_enough_without_bare_models(examine, writer, proxy):
    proxy.inject(status(403, "AccessDenied"), containing="prefix=", times=FOR_EVER)
    with_bare = only_failure(await examine(**through(proxy, writer)))
    without = await examine(**through(proxy, writer, ML_BARE_MODELS="false"))

    assert with_bare.check == "listing"
    assert "ML_BARE_MODELS=false" in with_bare.remedy
    assert states(without, State.FAILED) == []


IGNORED = Fault(instead=Answer(200, {"ETag": '"0123"'}, b""))
LOST = status(412, "PreconditionFailed")


@pytest.mark.parametrize(
    ("faults", "found"),
    [
        ([Fault(), IGNORED], "ignores If-None-Match"),
        ([Fault(), Fault(), IGNORED], "ignores If-Match"),
        ([Fault(), Fault(), Fault(), LOST], "refuses If-Match with the right ETag"),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
async def test_a_server_that_conditions_cannot_be_trusted_to_is_named_and_nothing_is_left(
    examine, writer, proxy, r2_arguments, faults, found
):
    for fault in faults:
        proxy.inject(fault, method="PUT")
    findings = await examine(**through(proxy, writer))
    proxy.heal()

    assert states(findings, State.FAILED) == ["writing"]
    assert found in one(findings, "writing").found
    assert "DELETE" in proxy.methods()
    assert await keys(r2_arguments) == []


async def test_each_request_that_hangs_is_given_up_and_the_object_is_removed_all_the_same(
    examine, writer, proxy, monkeypatch, r2_arguments
):
    checks = doctor._checks

    def hasty(mode):
        return [replace(it, seconds=1.5) if it.name in ("listing", "writing") else it for it in checks(mode)]

    monkeypatch.setattr(doctor, "_checks", hasty)
    proxy.inject(hang(), containing="prefix=", times=FOR_EVER)
    proxy.inject(hang(), method="PUT", times=FOR_EVER)
    findings = await examine(**through(proxy, writer))
    proxy.heal()

    assert states(findings, State.FAILED) == ["listing", "writing"]
    assert one(findings, "listing").found == one(findings, "writing").found == "no answer within 1.5 seconds"
    assert "DELETE" in proxy.methods()
    assert await keys(r2_arguments) == []


async def test_an_object_that_cannot_be_removed_again_is_named(examine, writer, proxy, r2_arguments):
    proxy.inject(status(403, "AccessDenied"), method="DELETE", times=FOR_EVER)
    _, left = (it for it in await examine(**through(proxy, writer)) if it.check == "writing")
    (key,) = await keys(r2_arguments)

    assert left.state is State.WARNING
    assert re.fullmatch(r"models/\.doctor-[0-9a-f]{16}", key)
    assert left.found.startswith(f"the object {key} may be left")


# R2 itself, as far as its host name goes: a proxy of the environment leads to the S3 server


class _Tunnel(socketserver.StreamRequestHandler):
    """Connects to the one target whatever CONNECT asks for."""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        with socket.create_connection(self.server.target) as there:  # type: ignore[attr-defined]
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            pair = {self.connection: there, there: self.connection}
            with contextlib.suppress(OSError):
                while True:
                    for ready in select.select(list(pair), [], [], 30)[0]:
                        if not (piece := ready.recv(65536)):
                            return
                        pair[ready].sendall(piece)


@pytest.fixture
def at_r2(s3, bucket, writer, tmp_path):
    """Reach the S3 server as if it were an account's endpoint, of any jurisdiction."""
    hosts = [f"{ACCOUNT}{infix}.r2.cloudflarestorage.com" for infix in ("", ".eu", ".fedramp")]
    with (
        FaultyProxy(s3.endpoint_url, tls=certificate(tmp_path, *hosts)) as proxy,
        socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Tunnel) as tunnel,
    ):
        tunnel.daemon_threads = True
        tunnel.target = ("127.0.0.1", proxy._server.server_port)  # type: ignore[attr-defined]
        thread = threading.Thread(target=tunnel.serve_forever, args=(0.01,))
        thread.start()
        variables = {name: value for name, value in writer.items() if name != "R2_ENDPOINT_URL"}
        yield variables | {
            "R2_ACCOUNT_ID": ACCOUNT,
            "HTTPS_PROXY": f"http://127.0.0.1:{tunnel.server_address[1]}",
            "AWS_CA_BUNDLE": str(tmp_path / "issuer.pem"),
        }
        tunnel.shutdown()
        thread.join()


async def test_r2_is_told_what_it_would_cost_and_that_it_knows_one_region(examine, at_r2):
    findings = await examine(**at_r2, R2_REGION="eu-west-1", R2_JURISDICTION="eu")

    assert states(findings, State.FAILED) == []
    assert one(findings, "region").remedy == "set R2_REGION=auto, or remove it"
    assert one(findings, "bucket").found == "the endpoint of jurisdiction 'eu' has bucket 'models'"
    assert one(findings, "operations").found.endswith(
        "costs each process 43,200 class A (list) and 43,200 class B (get) operations a month; "
        "4.3 % and 0.4 % of what R2 gives free to an account"
    )


@pytest.mark.parametrize(("variables", "asked"), [({}, "default"), ({"R2_JURISDICTION": "fedramp"}, "fedramp")])
async def test_a_bucket_that_r2_does_not_have_may_be_in_another_jurisdiction(examine, at_r2, variables, asked):
    failed = only_failure(await examine(**at_r2 | {"R2_BUCKET": "elsewhere"}, **variables))

    assert failed.check == "bucket"
    assert failed.found.startswith(f"the endpoint of jurisdiction {asked!r} has no bucket 'elsewhere'")
    assert "R2_JURISDICTION" in failed.remedy


@pytest.mark.parametrize(
    ("variables", "state", "costs"),
    [
        ({"ML_REFRESH_SECONDS": "1"}, State.WARNING, "2,592,000 class A (list) and 2,592,000 class B"),
        ({"ML_REFRESH_SECONDS": "1", "ML_BARE_MODELS": "false"}, State.OK, "0 class A (list) and 2,592,000 class B"),
    ],
)
async def test_looking_too_often_is_told_with_the_settings_that_lower_it(examine, at_r2, variables, state, costs):
    operations = one(await examine(**at_r2 | variables), "operations")

    assert operations.state is state
    assert costs in operations.found
    assert state is State.OK or "ML_REFRESH_SECONDS, or set ML_BARE_MODELS=false" in operations.remedy


# What is in the bucket


async def test_a_folder_that_stands_for_the_bucket_is_examined_without_a_network(examine, local, manager):
    manager.save("a", linear(1), examples=ROWS[:3])
    findings = await examine(**local)

    assert [it.check for it in findings] == [
        "settings",
        "folder",
        "index",
        "ML_ALIASES",
        "memory",
        "seals",
        "model a/1",
    ]
    assert states(findings, State.FAILED, State.WARNING) == []
    assert one(findings, "folder").found.endswith("can be read and written")


@pytest.mark.parametrize(
    ("variables", "state", "found"),
    [
        ({"ML_LOCAL_DIR": "missing"}, State.FAILED, "missing does not exist"),
        ({"ML_LOCAL_DIR": "file"}, State.FAILED, "file is no folder"),
        ({"ML_LOCAL_DIR": "/proc", "ML_PREFIX": "no-such/"}, State.OK, "can be read, but not written"),
    ],
)
async def test_a_folder_that_cannot_be_the_bucket_is_named(examine, local, tmp_path, variables, state, found):
    (tmp_path / "file").touch()
    folder = one(await examine(**local | variables), "folder")

    assert folder.state is state
    assert found in folder.found


@pytest.mark.parametrize(
    ("folder", "state", "found"),
    [
        ("missing", State.OK, "does not exist yet"),
        ("file", State.WARNING, "is no folder"),
        ("/proc", State.WARNING, "can be read, but not written"),
    ],
)
async def test_a_local_copy_that_cannot_be_made_keeps_nothing_from_serving(
    examine, writer, tmp_path, folder, state, found
):
    (tmp_path / "file").touch()
    findings = await examine(until="folder", **writer, ML_CLOUD_ONLY="false", ML_LOCAL_DIR=folder)

    assert one(findings, "folder").state is state
    assert found in one(findings, "folder").found
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("body", "remedy"),
    [(b"{}", "put a good index.json back"), (b'{"format": 99}', "upgrade Diskless")],
)
async def test_an_index_that_cannot_be_read_is_told(examine, local, manager, body, remedy):
    async with manager.storage as storage:
        await storage.put("models/index.json", body)
    failed = only_failure(await examine(**local))

    assert failed.check == "index"
    assert remedy in failed.remedy


async def test_what_the_settings_ask_for_and_the_bucket_lacks_is_told(examine, local, manager):
    async with manager.storage as storage:
        await manager.publish("a", draft(linear(1)))
        await storage.put("models/b.joblib", dumped(linear(2)))
        await storage.put("models/c_scaler.joblib", b"")
    findings = await examine(
        **local,
        ML_ALIASES="staging,production",
        ML_REQUIRED_MODELS="a,z",
        ML_COMPANIONS="a:scaler,b:encoder,y:scaler",
    )
    told = {f"{it.state} {it.check}: {it.found}" for it in findings}

    assert told >= {
        "warning index: passed over: c_scaler (a companion without its model c)",
        "warning ML_ALIASES: no published model has the alias 'staging'",
        "ok ML_ALIASES: production: a/1",
        "FAILED ML_REQUIRED_MODELS: not in the bucket, so that the service would never be ready: z",
        "warning ML_COMPANIONS: a is published, and a published version brings its own companions",
        "warning ML_COMPANIONS: there is no bare model y, of which scaler would be demanded",
    }
    assert [it.found for it in findings if it.check.startswith("model b/")] == [
        "its encoder is missing: ML_COMPANIONS demands b_encoder beside it"
    ]


async def test_what_the_settings_ask_for_and_the_bucket_has_is_told(examine, local, manager):
    async with manager.storage as storage:
        await storage.put("models/b.joblib", dumped(linear(2)))
    findings = await examine(**local, ML_REQUIRED_MODELS="b")

    assert states(findings, State.FAILED, State.WARNING) == []
    assert one(findings, "ML_REQUIRED_MODELS").found == "all there: b"
    assert one(findings, "index").found == "there is none: nothing was published, and 1 bare model: b"


async def test_a_published_model_without_a_served_alias_is_told(examine, local, manager):
    manager.save("a", linear(1))
    told = [it.found for it in await examine(**local, ML_ALIASES="staging") if it.check == "ML_ALIASES"]

    assert told[-1] == "not served, as none of these aliases names a version: a"


async def test_a_broken_version_fails_where_it_is_served_and_is_a_warning_where_it_is_not(examine, local, manager):
    manager.save("a", linear(1))
    manager.save("a", linear(2))
    folder = Path(local["ML_LOCAL_DIR"])
    (folder / "models/a/1/model.joblib").unlink()
    (folder / "models/a/2/model.joblib").write_bytes(b"x")
    served, unserved = (it for it in await examine(**local) if it.check.startswith("model "))

    assert (served.check, served.state) == ("model a/1", State.FAILED)
    assert "promote" in served.remedy
    assert (unserved.check, unserved.state) == ("model a/2", State.WARNING)
    assert "unpublish a 2" in unserved.remedy


async def test_a_missing_module_is_told_with_the_remedy_that_helps_and_no_other(examine, local):
    folder = Path(local["ML_LOCAL_DIR"]) / "models"
    folder.mkdir()
    (folder / "a.pkl").write_bytes(b"cfeatures\nClean\n.")
    (told,) = (it for it in await examine(**local, ML_TRUSTED_TYPES="features.Clean") if it.check.startswith("model "))

    assert told.state is State.FAILED
    assert told.found.endswith("it needs the module features, which is not installed here")
    assert told.remedy == (
        "put features, in the version it was trained with, into ml-requirements.txt, or, if it is code of your own, "
        "deploy it with the service"
    )


async def test_a_version_without_a_trusted_seal_is_told(examine, local, manager):
    private, public = seal.keygen()
    manager.save("a", linear(1), seal_key=private)
    sealed = one(await examine(**local, ML_TRUSTED_KEYS=f"ci:{public}"), "seals")
    manager.save("b", linear(1))
    mixed = one(await examine(**local, ML_TRUSTED_KEYS=f"ci:{public}"), "seals")
    required = await examine(**local, ML_TRUSTED_KEYS=f"ci:{public}", ML_REQUIRE_SEAL="true")

    assert (sealed.state, sealed.found.startswith("all that is served is sealed")) == (State.OK, True)
    assert (mixed.state, mixed.found.startswith("served without a seal of a trusted key: b/1; ")) == (
        State.WARNING,
        True,
    )
    assert (one(required, "model b/1").state, one(required, "model b/1").remedy) == (
        State.FAILED,
        "publish it with --seal-key",
    )


async def test_traces_that_could_not_be_sent_are_told_of_and_the_collector_is_not_asked(examine, local, monkeypatch):
    tracing = {**local, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    installed = one(await examine(**tracing), "traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as where it is not installed
    missing = one(await examine(**tracing), "traces")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")

    assert (installed.state, installed.found) == (State.OK, "are sent to http://127.0.0.1:9/v1/traces")
    assert (missing.state, "otel-requirements.txt" in missing.remedy) == (State.FAILED, True)
    assert "traces" not in [finding.check for finding in await examine(**local)]


async def test_a_seal_that_could_not_be_looked_at_is_not_called_right(examine, local, manager):
    private, public = seal.keygen()
    trusting = {**local, "ML_TRUSTED_KEYS": f"ci:{public}"}
    nothing = one(await examine(**trusting), "seals")
    manager.save("a", linear(1), seal_key=private)
    manager.save("b", linear(1), compile=False)
    (Path(local["ML_LOCAL_DIR"]) / "models/b/1/model.joblib").unlink()
    unknown = one(await examine(**trusting), "seals")

    assert (nothing.state, nothing.found.split(",")[0]) == (State.SKIPPED, "nothing is served")
    assert (unknown.state, unknown.found.split(";")[0]) == (
        State.WARNING,
        "not known, as it could not be fetched: b/1",
    )


async def test_a_bare_model_under_a_name_without_versions_is_one(examine, local, manager):
    manager.save("a", linear(1))
    async with manager.storage as storage:
        await manager.unpublish("a", "1", drop_aliases=True)
        empty = one(await examine(**local), "index")
        await storage.put("models/a.joblib", dumped(linear(2)))
        await storage.put("models/a_scaler.joblib", dumped(scaler()))
    findings = await examine(**local, ML_COMPANIONS="a:scaler")

    assert empty.found == "no version is left in it, and no bare model: nothing would be served from models/"
    assert states(findings, State.FAILED, State.WARNING) == []
    assert one(findings, "index").found == "no version is left in it, and 1 bare model: a"
    assert one(findings, "ML_COMPANIONS").found == "a must have scaler: see the model"


async def test_a_version_that_nothing_serves_and_that_cannot_be_read_is_not_to_be_removed(examine, local, manager):
    manager.save("a", linear(1))
    manager.save("a", linear(2))
    artifact = Path(local["ML_LOCAL_DIR"]) / "models/a/2/model.joblib"
    artifact.unlink()
    artifact.symlink_to("/etc/hostname")
    unread = one(await examine(**local), "model a/2")

    assert (unread.state, unread.remedy) == (State.WARNING, "let this user, or this token, read all of it")


async def test_models_that_will_not_fit_are_told_before_they_are_loaded(examine, local, manager):
    manager.save("a", linear(1))
    memory = one(await examine(**local, ML_MEMORY_LIMIT_BYTES=str(64 * 1024 * 1024)), "memory")

    assert memory.state is State.WARNING
    assert "0 MB of 64 MB are free here (ML_MEMORY_LIMIT_BYTES); 1 served version and the libraries" in memory.found


# How it is told


def test_settings_that_describe_nothing_are_told_with_their_remedies():
    findings = doctor.of_settings(
        SettingsError(["R2_BUCKET is missing: set it to a name", "PORT is not usable: expected a number, got 'x'"])
    )

    assert [(it.found, it.remedy) for it in findings] == [
        ("R2_BUCKET is missing", "set it to a name"),
        ("PORT is not usable: expected a number, got 'x'", "set it as expected, in the environment or in .env"),
    ]
    assert doctor.summary(findings) == "2 failed: mend the first failure first, and run this again"
    assert str(findings[0]) == "FAILED  settings: R2_BUCKET is missing\n        what to do: set it to a name"


async def test_a_misspelt_setting_is_a_warning_without_its_value(examine, environment, local):
    warning = State.WARNING, "ML_REQUIRE_MODELS is no setting: did you mean ML_REQUIRED_MODELS?"
    findings = [it for it in await examine(**local, ML_REQUIRE_MODELS=SECRET) if it.check == "settings"]
    environment(ML_REFRESH_SECONDS="x")
    with pytest.raises(SettingsError) as caught:
        load_settings()

    assert [(it.state, it.found) for it in findings[1:]] == [warning]
    assert [(it.state, it.found) for it in doctor.of_settings(caught.value)[1:]] == [warning]


async def test_the_document_has_every_check_in_order_and_whether_all_is_well(examine, local):
    findings = await examine(**local)
    document = json.loads(json.dumps(doctor.document(findings)))

    assert document["ok"] is True
    assert document["checks"][0].keys() == {"check", "state", "found", "remedy"}
    assert [it["state"] for it in document["checks"]] == ["ok", "ok", "warning", "ok", "skipped"]


def test_the_command_ends_with_0_with_3_when_something_fails_and_with_2_without_settings(environment, local, capsys):
    runs = []
    for variables in (local, {"ML_REQUIRED_MODELS": "a"}, {"ML_REFRESH_SECONDS": SECRET}):
        environment(**variables)
        for words in (["doctor"], ["doctor", "--json", "--read-only"]):
            runs.append((main(words), capsys.readouterr()))
    codes = [code for code, _ in runs]
    documents = [json.loads(output.out) for _, output in runs[1::2]]

    assert codes == [0, 0, 3, 3, 2, 2]
    assert [output.err for _, output in runs] == [""] * 6
    assert runs[0][1].out.splitlines()[-1] == "all is well, 1 warning"
    assert re.search(r"(?m)^FAILED  ML_REQUIRED_MODELS: .*: a$", runs[2][1].out)
    assert [document["ok"] for document in documents] == [True, False, False]
    assert documents[2]["checks"][0]["check"] == "settings"
