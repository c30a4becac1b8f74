"""Two processes with the same models: one answers plain requests in the protocol, the other all of them as an ASGI application.

What goes over the sockets must be the same, whatever is sent: status, headers, body, and whether the connection stays open.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import os
import random
import re
import socket
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from app.api.predict import Predictor
from app.auth import Access
from app.connections import Connections
from app.direct import DirectProtocol, Shared
from app.limits import Limits
from app.model_storage import ModelStorageManager
from app.observer import Observer
from app.protocol import configuration
from app.registry import Registry
from app.storage.local import LocalStorage
from tests import toys
from tests.scraping import Scrape, scrape, scrape_until
from tests.service import AS_ASGI, COMMAND, Service, connected, running
from tests.trusted import TRUST

MUTATIONS = int(os.environ.get("DISKLESS_MUTATIONS", "2000"))
LIMIT_BYTES = 200_000
SILENCE_SECONDS = 0.25  # after which an answer is not expected any more; where the two differ, it is waited longer
PATIENCE_SECONDS = 30.0
POINTS = np.arange(24.0).reshape(8, 3)
ID = re.compile(rb"[0-9a-f]{32}\Z")
RESET = b"reset"
KEY = b"a-key-of-the-tests-0123"
END = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[tuple[Service, Service]]:
    """The two services: the protocol's answers first, the application's second."""
    folder = tmp_path_factory.mktemp("bucket")
    manager = ModelStorageManager(LocalStorage(folder), trust=TRUST)
    scaler = StandardScaler().fit(POINTS)
    model = LogisticRegression().fit(scaler.transform(POINTS), list("aabbabab"))
    manager.save("letters", model, scaler=scaler, examples=POINTS)
    manager.save("sum", toys.Sum(), examples=POINTS)
    manager.save("naps", toys.Naps(), examples=np.zeros((2, 3)))
    environment = {
        "ML_CLOUD_ONLY": "false",
        "ML_LOCAL_DIR": str(folder),
        "ML_MAX_BODY_BYTES": str(LIMIT_BYTES),
        "ML_MAX_ROWS": "100",
    }
    with running(environment) as one, running(environment, command=AS_ASGI) as other:
        yield one.wait_ready(), other.wait_ready()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[tuple[Service, Service]]:
    """Two services that look at the host that a request names, and at the origin of the page that it comes from."""
    folder = tmp_path_factory.mktemp("bucket")
    ModelStorageManager(LocalStorage(folder), trust=TRUST).save("sum", toys.Sum(), examples=POINTS)
    environment = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder)}
    environment |= {"ML_ALLOWED_HOSTS": "x", "ML_CORS_ORIGINS": "https://a.b", "ML_API_KEYS": f"tests:{KEY.decode()}"}
    with running(environment) as one, running(environment, command=AS_ASGI) as other:
        yield one.wait_ready(), other.wait_ready()


def body(**request: Any) -> bytes:
    return json.dumps(request).encode()


def post(
    content: bytes, *headers: bytes, path: bytes = b"/predict", version: bytes = b"1.1", length: Any = None
) -> bytes:
    lines = [b"POST %b HTTP/%b" % (path, version), b"Host: x", b"Content-Type: application/json"]
    lines += [b"Content-Length: %d" % len(content)] if length is None else [length] if length else []
    return b"\r\n".join((*lines, *headers)) + b"\r\n\r\n" + content


def chunked(content: bytes, *headers: bytes, size: int = 7) -> bytes:
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    encoded = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return post(encoded, b"Transfer-Encoding: chunked", *headers, length=b"")


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


SUM = body(model="sum", instances=[[1, 2, 3.5]])
GOOD = {
    "plain": post(SUM),
    "objects": post(body(model="letters", instances=[[1.5, 2, 3], [0, 0, 0]], method="predict_proba")),
    "version": post(body(model="sum", version=1, instances=[[1, 2, 3]])),
    "alias": post(body(model="letters", alias="production", instances=[[1, 2, 3]])),
    "path": post(body(instances=[[1, 2, 3]]), path=b"/models/sum/predict"),
    "request id": post(SUM, b"X-Request-ID: abc-1"),
    "id in capitals": post(SUM, b"X-REQUEST-ID: ABC"),
    "a strange id": post(SUM, b"X-Request-ID: a b"),
    "an empty id": post(SUM, b"X-Request-ID:"),
    "two ids": post(SUM, b"X-Request-ID: one", b"X-Request-ID: two"),
    "gzip not asked for": post(SUM, b"Accept-Encoding: gzip"),
    "nulls": post(body(model="letters", instances=[[None, 2, 3]])),
    "no answer that is a number": post(body(model="sum", instances=[[1e308, 1e308, 1e308]])),
    "many rows": post(body(model="letters", instances=[[1, 2, 3]] * 100, method="predict_proba")),
    "connection keep-alive": post(SUM, b"Connection: keep-alive"),
    "a query": post(SUM, path=b"/predict?x=1"),
    "an encoded path": post(SUM, path=b"/%70redict"),
    "an absolute address": post(SUM, path=b"http://x/predict"),
    "chunked": chunked(SUM),
    "expect": post(SUM, b"Expect: 100-continue"),
    "folded": post(SUM, b"X-Folded: a\r\n b"),
    "huge headers": post(SUM, b"X-Huge: " + b"h" * 30_000),
    "many headers": post(SUM, *(b"X-%d: y" % number for number in range(90))),
    "a large body": post(b" " * 150_000 + SUM),
    "a key": post(SUM, b"X-API-Key: abc"),
    "a bearer": post(SUM, b"Authorization: Bearer abc"),
    "two keys": post(SUM, b"X-API-Key: abc", b"Authorization: Bearer abc"),
    "the same key twice": post(SUM, b"X-API-Key: abc", b"X-API-Key: abc"),
    "an empty key": post(SUM, b"X-API-Key:", b"Authorization:"),
    "a bearer of nothing": post(SUM, b"Authorization: Bearer"),
    "another scheme": post(SUM, b"Authorization: Basic YWJjOmRlZg=="),
    "a key that is no ascii": post(SUM, b"X-API-Key: \xff\xfe", b"Authorization: Bearer \xc3\xa9"),
    "a long key": post(SUM, b"Authorization: Bearer " + b"k" * 5000),
    "a time limit": post(SUM, b"X-Request-Timeout: 5"),
    "a time limit of a fraction": post(SUM, b"X-Request-Timeout: 0.5"),
    "an identity encoding": post(SUM, b"Content-Encoding: identity"),
    "an empty encoding": post(SUM, b"Content-Encoding:"),
    "gzip asked for": post(SUM, b"Accept-Encoding: gzip, deflate;q=0.5"),
    "gzip refused": post(SUM, b"Accept-Encoding: gzip;q=0, identity"),
    "another type": post(SUM, b"Content-Type: text/plain"),
    "an origin": post(SUM, b"Origin: https://app.example.org"),
    "a trace": post(SUM, b"Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", b"Tracestate: a=b"),
    "forwarded": post(SUM, b"X-Forwarded-For: 1.2.3.4", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: evil"),
    "another host": post(SUM).replace(b"Host: x", b"Host: evil:99"),
    "two hosts": post(SUM, b"Host: y"),
    "no host": post(SUM).replace(b"Host: x\r\n", b""),
    "an offer of http2": post(
        SUM, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"
    ),
}
BAD = {
    "no json": post(b"{"),
    "nothing": post(b""),
    "a list": post(b"[1]"),
    "unknown field": post(body(model="sum", instances=[[1, 2, 3]], inputs=1)),
    "unknown model": post(body(model="none", instances=[[1, 2, 3]])),
    "no model": post(body(instances=[[1, 2, 3]])),
    "another model in the path": post(SUM, path=b"/models/letters/predict"),
    "a model that is no name": post(SUM, path=b"/models/a%20b/predict"),
    "unknown version": post(body(model="sum", version="9", instances=[[1, 2, 3]])),
    "version and alias": post(body(model="sum", version="1", alias="production", instances=[[1, 2, 3]])),
    "empty version": post(body(model="sum", version="", instances=[[1, 2, 3]])),
    "unknown method": post(body(model="sum", method="predict_proba", instances=[[1, 2, 3]])),
    "empty method": post(body(model="sum", method="", instances=[[1, 2, 3]])),
    "no rows": post(body(model="sum", instances=[])),
    "too many rows": post(body(model="sum", instances=[[1, 2, 3]] * 101)),
    "a short row": post(body(model="letters", instances=[[1, 2]])),
    "a word": post(body(model="letters", instances=[[1, 2, "x"]])),
    "a boolean": post(body(model="letters", instances=[[1, 2, True]])),
    "beyond floats": post(b'{"model":"letters","instances":[[1,2,1e400]]}'),
    "nan": post(b'{"model":"letters","instances":[[1,2,NaN]]}'),
    "a surrogate": post(b'{"model":"\\ud800","instances":[[1,2,3]]}'),
    "not utf-8": post(b'{"model":"\xff","instances":[[1,2,3]]}'),
    "deep": post(b'{"model":"sum","instances":' + b"[" * 2000 + b"]" * 2000 + b"}"),
    "gzip": post(zipped(SUM), b"Content-Encoding: gzip"),
    "gzip in pieces": chunked(zipped(SUM), b"Content-Encoding: gzip"),
    "gzip that is none": post(SUM, b"Content-Encoding: gzip"),
    "gzip that is cut": post(zipped(SUM)[:-5], b"Content-Encoding: gzip"),
    "gzip with more behind it": post(zipped(SUM) + b"x", b"Content-Encoding: gzip"),
    "gzip of gzip": post(zipped(zipped(SUM)), b"Content-Encoding: gzip, gzip"),
    "gzip that becomes large": post(zipped(b" " * 5_000_000 + SUM), b"Content-Encoding: gzip"),
    "gzip unasked": post(zipped(SUM)),
    "deflate": post(zlib.compress(SUM), b"Content-Encoding: deflate"),
    "an unknown encoding": post(SUM, b"Content-Encoding: br"),
    "two encodings": post(zipped(SUM), b"Content-Encoding: gzip", b"Content-Encoding: identity"),
    "a time limit of nothing": post(SUM, b"X-Request-Timeout: 0"),
    "a time limit that is none": post(SUM, b"X-Request-Timeout: soon"),
    "a negative time limit": post(SUM, b"X-Request-Timeout: -1"),
    "an endless time limit": post(SUM, b"X-Request-Timeout: inf"),
    "an empty time limit": post(SUM, b"X-Request-Timeout:"),
    "two time limits": post(SUM, b"X-Request-Timeout: 5", b"X-Request-Timeout: 0"),
    "get": b"GET /predict HTTP/1.1\r\nHost: x\r\n\r\n",
    "options": b"OPTIONS /predict HTTP/1.1\r\nHost: x\r\n\r\n",
    "put": post(SUM).replace(b"POST", b"PUT", 1),
    "elsewhere": post(SUM, path=b"/predict/"),
    "in lower case": post(SUM).replace(b"POST", b"post", 1),
}
# These end the connection, or must not be the last thing on it.
ENDS = {
    "closing": post(SUM, b"Connection: close"),
    "http 1.0": post(SUM, version=b"1.0"),
    "http 1.0 kept alive": post(SUM, b"Connection: keep-alive", version=b"1.0"),
    "head": b"HEAD /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "head of health": b"HEAD /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "both lengths": chunked(SUM, b"Content-Length: 5"),
    "two lengths": post(SUM, b"Content-Length: 3"),
    "the same length twice": post(SUM, b"Content-Length: %d" % len(SUM)),
    "a length that is no number": post(SUM, length=b"Content-Length: x"),
    "a negative length": post(SUM, length=b"Content-Length: -5"),
    "a signed length": post(SUM, length=b"Content-Length: +5"),
    "a huge length": post(SUM, length=b"Content-Length: 99999999999999999999999"),
    "a list of lengths": post(SUM, length=b"Content-Length: 5, 5"),
    "no length": post(SUM, length=b""),
    "beyond the limit": post(b" " * (LIMIT_BYTES + 1)),
    "at the limit": post(b" " * (LIMIT_BYTES - len(SUM)) + SUM, b"Connection: close"),
    "beyond the limit, announced only": post(b"x", length=b"Content-Length: %d" % (LIMIT_BYTES + 1)),
    "chunked beyond the limit": chunked(b" " * (LIMIT_BYTES + 1), size=50_000),
    "bare line feeds": post(SUM, b"Connection: close").replace(b"\r\n", b"\n"),
    "a line feed among the headers": post(SUM, b"X-Y: 1\nX-Z: 2", b"Connection: close"),
    "a header without a name": post(SUM, b": x"),
    "a blank in a name": post(SUM, b"X Y: z"),
    "a null in a header": post(SUM, b"X: a\x00b"),
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http 3.7": post(SUM, version=b"3.7"),
    "connect": b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "empty lines first": b"\r\n\r\n" + post(SUM, b"Connection: close"),
    "an empty line, then a known head": b"\r\n\r\n" + post(SUM) + END,
}


def normal(received: bytes) -> bytes:
    """Take out what is another each time: the date, and an id that the service made."""
    lines = []
    for line in received.split(b"\r\n"):
        name, _, value = line.partition(b": ")
        if name == b"date":
            line = b"date"
        elif name == b"x-request-id" and ID.match(value):
            line = b"x-request-id: made"
        else:
            line = re.sub(rb"under request id [0-9a-f]{32}", b"under request id made", line)
        lines.append(line)
    return b"\r\n".join(lines)


async def talk(service: Service, pieces: Sequence[bytes], silence: float) -> tuple[bytes, bool]:
    """Send pieces, each in a segment of its own; return what came, and whether the service ended the connection."""
    received = bytearray()
    async with connected("127.0.0.1", service.port) as (reader, writer):
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if len(pieces) > 1:
                    await asyncio.sleep(0.002)
        try:
            while True:
                async with asyncio.timeout(silence):
                    more = await reader.read(65536)
                if not more:
                    return normal(bytes(received)), True
                received += more
        except TimeoutError:
            return normal(bytes(received)), False
        except ConnectionError:  # closed while we were still sending: the kernel may have dropped what was answered
            return RESET, True


async def differs(pair: tuple[Service, Service], pieces: Sequence[bytes]) -> str | None:
    """Return how the two services differ over these pieces, None if they do not. A late answer is no difference."""
    for silence in (SILENCE_SECONDS, 1.0, PATIENCE_SECONDS):
        one, other = await asyncio.gather(*(talk(service, pieces, silence) for service in pair))
        if one == other or (RESET in (one[0], other[0]) and one[1] and other[1]):
            return None
    return f"sent {b''.join(pieces)[:600]!r}\nthe protocol:    {one!r:.1500}\nthe application: {other!r:.1500}"


async def dialogue(service: Service, requests: Sequence[bytes], silence: float) -> list[bytes]:
    """Send requests, each when the one before is answered; return the answers, up to where there is none or the end of the connection.

    Nothing is sent to a connection that is about to be closed, so that no answer is lost.
    """
    found = []
    async with connected("127.0.0.1", service.port) as (reader, writer):
        for request in requests:
            writer.write(request)
            try:
                async with asyncio.timeout(silence):
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = re.search(rb"content-length: (\d+)", head)
                    found.append(normal(head + await reader.readexactly(int(length[1]) if length else 0)))
            except TimeoutError:
                return [*found, b"nothing"]
            except (asyncio.IncompleteReadError, ConnectionError):
                return [*found, b"the end"]
    return found


async def answers_differ(pair: tuple[Service, Service], requests: Sequence[bytes]) -> str | None:
    """Return how the answers of the two services differ, None if they do not. A late one is no difference."""
    for silence in (SILENCE_SECONDS, 1.0, PATIENCE_SECONDS):
        one, other = await asyncio.gather(*(dialogue(service, requests, silence) for service in pair))
        if one == other:
            return None
    return f"sent {requests!r:.600}\nthe protocol:    {one[1:]!r:.1500}\nthe application: {other[1:]!r:.1500}"


def pieces_of(sent: bytes, seed: int) -> list[bytes]:
    places = sorted(random.Random(seed).sample(range(1, len(sent)), k=min(3, len(sent) - 1)))
    return [sent[start:stop] for start, stop in zip([0, *places], [*places, len(sent)], strict=True)]


@pytest.mark.parametrize("name", [*GOOD, *BAD])
async def test_both_give_the_same_answer_first_and_again_and_in_pieces_and_in_a_row(pair, name):
    sent = {**GOOD, **BAD}[name]
    plain = GOOD["plain"]
    for pieces in (
        [sent, END],
        [sent, sent, END],  # its head is known the second time
        pieces_of(sent + END, 1),
        [sent.partition(b"\r\n\r\n")[0] + b"\r\n\r\n", sent.partition(b"\r\n\r\n")[2] or b"\r\n", END],
        [sent + sent + END],
        [plain, plain + sent + plain, END],
        [sent + plain, plain + END],
    ):
        difference = await differs(pair, pieces)
        assert difference is None, difference


@pytest.mark.parametrize("seed", range(8))
async def test_both_answer_hundreds_in_a_row(pair, seed):
    chosen = random.Random(seed)
    blank = body(model="sum", instances=[[1, 2, 3]]).replace(b" ", b"\r\n\r\n")  # its empty lines end no head
    last = post(blank + b"\r\n\r\n" * 200)
    kinds = [GOOD["plain"], GOOD["request id"], GOOD["chunked"], BAD["get"], post(blank), last]
    sent = b"".join(chosen.choices(kinds, k=400)) + END
    one, other = [await talk(service, [sent], PATIENCE_SECONDS) for service in pair]

    assert one == other
    assert one[0].count(b"HTTP/1.1 ") == 401


@pytest.mark.parametrize("name", ENDS)
async def test_both_end_a_connection_in_the_same_way(pair, name):
    plain = GOOD["plain"]
    for pieces in ([ENDS[name]], [plain, ENDS[name]], [plain + ENDS[name]], pieces_of(ENDS[name], 2)):
        difference = await differs(pair, pieces)
        assert difference is None, difference


@pytest.mark.parametrize("name", ["plain", "request id", "a word", "chunked"])
async def test_a_request_may_be_split_at_every_byte(pair, name):
    sent = {**GOOD, **BAD}[name]
    splits = [[sent[:place], sent[place:] + END] for place in range(1, len(sent))]
    found = await asyncio.gather(*(differs(pair, pieces) for pieces in splits))
    assert not [difference for difference in found if difference], next(filter(None, found))

    for service in pair:
        received, closed = await talk(service, [bytes([byte]) for byte in sent + END], PATIENCE_SECONDS)
        assert closed
        assert received.startswith(b"HTTP/1.1 ")
        assert received.count(b"HTTP/1.1 ") == 2


@pytest.mark.parametrize("name", ["plain", "objects", "a large body"])
async def test_a_client_that_ends_or_breaks_off_early_leaves_nothing_behind(pair, name):
    sent = GOOD[name]
    for service in pair:
        for place in (1, len(sent) // 2, len(sent) - 1, len(sent)):
            for half in (True, False):
                with socket.create_connection(("127.0.0.1", service.port)) as connection:
                    connection.sendall(sent[:place])
                    if half:
                        connection.shutdown(socket.SHUT_WR)
                        connection.settimeout(PATIENCE_SECONDS)
                        assert connection.recv(65536) == b"" or place == len(sent)
        received, _ = await talk(service, [GOOD["plain"], END], PATIENCE_SECONDS)
        assert b'"predictions":[6.5]' in received


async def test_mutations_of_requests_give_the_same_answers(pair):
    chosen = random.Random(11)
    seeds = [*GOOD.values(), *BAD.values(), *ENDS.values()]
    seeds = [seed for seed in seeds if len(seed) < 3000]
    limit = asyncio.Semaphore(50)

    async def one(sent: bytes, in_pieces: bool) -> str | None:
        async with limit:
            return await differs(pair, pieces_of(sent, len(sent)) if in_pieces and len(sent) > 1 else [sent])

    found = await asyncio.gather(
        *(one(mutated(chosen, seeds) + chosen.choice([b"", END]), number % 4 == 0) for number in range(MUTATIONS))
    )
    differences = [difference for difference in found if difference]
    assert not differences, f"{len(differences)} differ: " + "\n\n".join(differences[:5])
    for service in pair:
        assert service.predict(model="sum", instances=[[1, 2, 3]]).json()["predictions"] == [6.0]


def mutated(chosen: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change a few bytes of a request, or put pieces of several together."""
    sent = bytearray(chosen.choice(seeds))
    for _ in range(chosen.randint(1, 4)):
        place = chosen.randrange(len(sent) + 1)
        how = chosen.randrange(6)
        if how == 0 and place < len(sent):
            sent[place] = chosen.randrange(256)
        elif how == 1:
            sent[place:place] = chosen.choice(
                [b"\r\n", b"\n", b"\r\n\r\n", b" ", b":", b"\x00", b"0", b",", b"]", b'"']
            )
        elif how == 2:
            del sent[place : place + chosen.randint(1, 20)]
        elif how == 3:
            sent[place:place] = sent[place : place + chosen.randint(1, 30)]
        elif how == 4:
            other = chosen.choice(seeds)
            cut = chosen.randrange(len(other))
            sent[place:place] = other[cut : cut + chosen.randint(1, 60)]
        else:
            del sent[place:]
            sent += chosen.choice(seeds)
    return bytes(sent)


# Heads that are almost the same as one that is known

HEADS = {
    "the usual": (),
    "a key": (b"X-API-Key: abc",),
    "a bearer": (b"Authorization: Bearer abc",),
    "an id": (b"X-Request-ID: abc-1",),
    "a time limit": (b"X-Request-Timeout: 9",),
    "encodings": (b"Content-Encoding: identity", b"Accept-Encoding: gzip"),
    "an origin": (b"Origin: https://a.b", b"Connection: keep-alive"),
    "a proxy": (
        b"X-Forwarded-For: 1.2.3.4",
        b"X-Forwarded-Proto: https",
        b"Traceparent: 00-0af7-b7ad-01",
        b"Via: 1.1 x",
    ),
}


@pytest.mark.parametrize("name", HEADS)
async def test_of_two_heads_that_differ_in_one_byte_each_is_read_as_it_is(pair, name):
    await same_whatever_byte_differs(pair, name)


@pytest.mark.parametrize("name", ["the usual", "an origin", "a time limit"])
async def test_where_keys_and_hosts_and_origins_are_looked_at_too(guarded, name):
    for header in (b"X-API-Key: " + KEY, b"Authorization: Bearer " + KEY):
        await same_whatever_byte_differs(guarded, name, header)


async def same_whatever_byte_differs(pair: tuple[Service, Service], name: str, *more: bytes) -> None:
    """Send a head, so that it is known, then one that differs from it in one byte, then the known one again.

    Each comes alone: what comes together is left to the parser.
    """
    chosen = random.Random(name)
    plain = post(SUM, *HEADS[name], *more)
    head, _, content = plain.partition(b"\r\n\r\n")
    limit = asyncio.Semaphore(25)

    async def one(place: int, byte: int) -> str | None:
        other = head[:place] + bytes([byte]) + head[place + 1 :] + b"\r\n\r\n" + content
        async with limit:
            return await answers_differ(pair, [plain, other, plain])

    found = await asyncio.gather(
        *(
            one(place, byte)
            for place in range(len(head))
            for byte in {
                head[place] ^ 0x20,  # the other case of a letter
                head[place] ^ (1 << chosen.randrange(8)),
                chosen.choice(b"\r\n\0 :0129,;azAZ/%\x80\xff"),
            }
            - {head[place]}
        )
    )
    differences = [difference for difference in found if difference]
    assert not differences, f"{len(differences)} differ: " + "\n\n".join(differences[:3])


MORE = [
    b"Content-Length: %d", b"content-length:%d", b"Content-Length: 5", b"Content-Length: +%d", b"X-Request-ID: abc-2", b"X-Request-ID: a b",
    b"X-Forwarded-For: \xff", b"X-Forwarded-For: a\tb", b"Traceparent: x", b" folded: x", b"X-Real-IP : x", b": x", b"", b"x", b"Host: x",
    b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Connection: close", b"X-Request-Timeout: 8", b"Content-Encoding: gzip",
]  # fmt: skip


@pytest.mark.parametrize("name", ["the usual", "an id", "a proxy"])
async def test_a_line_more_anywhere_in_a_head_that_is_known_is_read(pair, name):
    plain = post(SUM, *HEADS[name])
    head, _, content = plain.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    limit = asyncio.Semaphore(25)

    async def one(place: int, more: bytes) -> str | None:
        more = more.replace(b"%d", b"%d" % len(content))
        other = b"\r\n".join((*lines[:place], more, *lines[place:])) + b"\r\n\r\n" + content
        async with limit:
            return await answers_differ(pair, [plain, other, plain])

    found = await asyncio.gather(*(one(place, more) for place in range(1, len(lines) + 1) for more in MORE))
    differences = [difference for difference in found if difference]
    assert not differences, f"{len(differences)} differ: " + "\n\n".join(differences[:3])


async def test_of_heads_in_any_order_each_is_read_as_it_is(pair):
    """Heads of several kinds, of which some are known, one behind the other on a connection, cut anywhere."""
    chosen = random.Random(23)
    extra = [header for headers in HEADS.values() for header in headers]
    extra += [
        b"X-Request-Timeout: 0",
        b"X-Request-Timeout: 1",
        b"Accept: */*",
        b"User-Agent: y",
        b"Content-Encoding: gzip",
        b"Host: y",
    ]
    extra += [
        b"Content-Length: 5",
        b"Transfer-Encoding: chunked",
        b"X-Forwarded-For: \xff",
        b"X-Request-ID: a b",
        b" folded: x",
    ]
    limit = asyncio.Semaphore(25)

    def request() -> bytes:
        headers = [chosen.choice(extra if chosen.random() < 0.2 else extra[:-5]) for _ in range(chosen.randrange(4))]
        if chosen.random() < 0.3 and headers:  # in another case: another head, and the same request
            headers[0] = headers[0].swapcase() if chosen.random() < 0.5 else headers[0].replace(b": ", b":", 1)
        content = (
            SUM if chosen.random() < 0.8 else chosen.choice([b"{", b"", body(model="letters", instances=[[1, 2, 3]])])
        )
        sent = post(content, *headers, path=chosen.choice([b"/predict", b"/predict", b"/models/sum/predict"]))
        if chosen.random() < 0.5:  # the same lines in another order
            head, _, rest = sent.partition(b"\r\n\r\n")
            first, *others = head.split(b"\r\n")
            chosen.shuffle(others)
            sent = b"\r\n".join((first, *others)) + b"\r\n\r\n" + rest
        return sent if chosen.random() < 0.9 else chunked(content, *headers)

    async def one(requests: list[bytes], seed: int) -> str | None:
        sent = b"".join(requests) + END
        pieces = pieces_of(sent, seed) if seed % 2 else [*requests, END]
        async with limit:
            return await differs(pair, pieces)

    found = await asyncio.gather(
        *(one([request() for _ in range(chosen.randint(2, 5))], number) for number in range(MUTATIONS // 4))
    )
    differences = [difference for difference in found if difference]
    assert not differences, f"{len(differences)} differ: " + "\n\n".join(differences[:3])


# A client that does not read; many clients that share a head; what is dropped and what times out


async def test_a_client_that_does_not_read_is_not_answered_without_end(pair):
    quick = post(body(model="letters", method="predict_proba", instances=[[1.5, 2, 3]] * 100))
    slow = post(
        body(model="naps", instances=[[0, 0, 0]] * 100)
    )  # a thread's: meanwhile it is looked whether somebody is there
    for service, request in itertools.product(pair, (quick, slow)):
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            sent = 0
            quiet = 0
            while quiet < 50 and sent < 50_000_000:
                try:
                    sent += connection.send(request[sent % len(request) :])
                    quiet = 0
                except BlockingIOError:
                    quiet += 1
                    await asyncio.sleep(0.01)
            assert sent < 50_000_000  # the service has stopped to read, and the sender is held up
        assert service.predict(model="sum", instances=[[1, 2, 3]]).status_code == 200


async def test_a_late_answer_is_the_same_time_out_and_its_connection_goes_on(pair):
    late = post(body(model="naps", instances=[[2.5, 0, 0]]), b"X-Request-ID: late", b"X-Request-Timeout: 2")
    found = await asyncio.gather(*(talk(service, [late, GOOD["plain"] + END], PATIENCE_SECONDS) for service in pair))

    assert found[0] == found[1]
    assert found[0][0].startswith(b"HTTP/1.1 504 ")
    assert found[0][0].count(b"HTTP/1.1 200 ") == 2


async def test_who_has_gone_is_not_computed(pair):
    def counts(found: Scrape) -> tuple[float, float, float]:
        names = ("diskless_batch_rows_sum", "diskless_in_flight_requests", "diskless_queue_requests")
        return tuple(found.sum(name, model="naps") for name in names)

    for service in pair:
        for seconds in (1, 4, 15):  # as long as it takes that the others come and go meanwhile
            held = post(body(model="naps", instances=[[seconds, 0, 0]]))
            before, *_ = counts(scrape_until(service, lambda found: counts(found)[1:] == (0, 0)))
            async with several(service, 1) as (first,):
                first.write(held)
                await first.drain()
                scrape_until(  # it is being computed; the others wait behind it
                    service, lambda found, before=before: counts(found)[1:] == (1, 0) or counts(found)[0] > before
                )
                async with several(service, 5) as gone:
                    for writer in gone:
                        writer.write(held)
                        await writer.drain()
                    scrape_until(
                        service, lambda found, before=before: counts(found)[2] == 5 or counts(found)[0] > before
                    )
                are_late = counts(scrape(service))[2] < 5  # the first was done before they had gone
            assert service.predict(model="naps", instances=[[0, 0, 0]]).status_code == 200
            if not are_late:
                break
        assert counts(scrape(service))[0] == before + 2


@contextlib.asynccontextmanager
async def several(service: Service, count: int) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """Open connections, and break them off."""
    writers = [(await asyncio.open_connection("127.0.0.1", service.port))[1] for _ in range(count)]
    try:
        yield writers
    finally:
        for writer in writers:
            writer.transport.abort()
        while any(writer.get_extra_info("socket").fileno() >= 0 for writer in writers):
            await asyncio.sleep(0)  # they close in the event loop's next turn


async def test_hundreds_of_connections_get_their_own_answers(pair):
    service = pair[0]

    async def ask(number: int) -> None:
        async with connected("127.0.0.1", service.port) as (reader, writer):
            for step in range(20):
                values = [float(number), float(step), 0.25]
                content = body(model="sum", instances=[values])
                headers = [b"X-Request-ID: %d-%d" % (number, step)] if step % 2 else []
                writer.write(post(content, *headers))
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"content-length: (\d+)", head)[1])
                answer = json.loads(await reader.readexactly(length))
                assert answer["predictions"] == [sum(values)]
                assert not headers or b"x-request-id: %d-%d\r\n" % (number, step) in head

    await asyncio.gather(*(ask(number) for number in range(300)))


@pytest.mark.parametrize("command", [COMMAND, AS_ASGI])
async def test_a_connection_is_not_kept_for_the_rest_of_a_request_that_was_answered(command, tmp_path):
    unread = b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
    environment = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(tmp_path), "ML_BODY_TIMEOUT_SECONDS": "1"}
    with running(environment, command=command) as service:
        service.wait_live()
        async with connected("127.0.0.1", service.port) as (reader, writer):
            writer.write(unread)
            answer = await asyncio.wait_for(reader.read(), 20)

    assert answer.startswith(b"HTTP/1.1 200")


def test_the_commands_differ_in_the_protocol_only():
    assert COMMAND[-1] == "serve"
    assert "DrainingProtocol" in AS_ASGI[-1]


USUAL = (b"X-Forwarded-For: 10.0.0.1", b"X-Request-ID: one", b"X-Request-Start: 17", b"Accept: */*")
VARIED = {
    "another caller": (
        b"X-Forwarded-For: 10.0.0.2, 10.0.0.3",
        b"X-Request-ID: two",
        b"X-Request-Start: 18",
        b"Accept: */*",
    ),
    "another order": (b"Accept: */*", b"X-Request-Start: 18", b"X-Request-ID: two", b"X-Forwarded-For: 10.0.0.2"),
    "fewer": (b"X-Request-ID: two", b"Accept: */*"),
    "no id": (b"X-Forwarded-For: 10.0.0.1", b"X-Request-Start: 17", b"Accept: */*"),
    "two ids": (*USUAL, b"X-Request-ID: two"),
    "an id that is none": (b"X-Request-ID: a b", *USUAL[:1], *USUAL[2:]),
    "an empty id": (b"X-Request-ID: ", *USUAL[:1], *USUAL[2:]),
    "an id without a blank": (b"X-Request-ID:two", *USUAL[:1], *USUAL[2:]),
    "an id with a tab": (b"X-Request-ID: \ttwo\t", *USUAL[:1], *USUAL[2:]),
    "an id in another spelling": (b"x-request-id: two", *USUAL[:1], *USUAL[2:]),
    "an id that goes on": (b"X-Request-ID: two", b" three", *USUAL[:1], *USUAL[2:]),
    "a line that goes on": (*USUAL, b" more"),
    "a null": (b"X-Forwarded-For: 10\x00", *USUAL[1:]),
    "a bare line feed": (b"X-Forwarded-For: 10\nX-Request-Timeout: 0", *USUAL[1:]),
    "a bare return": (b"X-Forwarded-For: 10\rX-Request-Timeout: 0", *USUAL[1:]),
    "no ascii": (b"X-Forwarded-For: \xff", *USUAL[1:]),
    "a blank behind a name": (b"X-Forwarded-For : 10", *USUAL[1:]),
    "no colon": (b"X-Forwarded-For", *USUAL[1:]),
    "a second length": (*USUAL, b"Content-Length: 5"),
    "chunked": (*USUAL, b"Transfer-Encoding: chunked"),
    "closing": (*USUAL, b"Connection: close"),
    "a time limit of nothing": (*USUAL, b"X-Request-Timeout: 0"),
    "an unknown line": (*USUAL, b"X-Unknown: 1"),
}


@pytest.mark.parametrize("name", VARIED)
async def test_a_head_is_read_as_it_is_however_much_of_it_is_known(pair, name):
    usual, varied = post(SUM, *USUAL), post(SUM, *VARIED[name])
    longer = post(SUM.replace(b"3.5", b"3.25"), *VARIED[name])
    for pieces in ([usual, varied, END], [usual, usual, longer, usual, END], [usual, longer, varied, END]):
        difference = await differs(pair, pieces)
        assert difference is None, difference


@pytest.mark.parametrize("header", [b"User-Agent: x", b"Authorization: Bearer a-secret", b"X-Api-Key: a-secret"])
async def test_of_heads_only_hashes_are_kept(header):
    predictor = Predictor(Registry(), Access(), Observer(), max_body_bytes=100, max_rows=10, max_pending_bytes=100)
    shared = Shared(predictor)
    config = configuration(_nothing)
    config.load()
    state = Connections(Limits(10, 20, 95, 1000))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: DirectProtocol(shared, config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    lines = (b"POST /predict HTTP/1.1", b"Host: x", header, b"Content-Length: 2")
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    with_id = head.replace(b"Host: x", b"Host: x\r\nX-Request-ID: %b")
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        for sent in (head, head, with_id % b"1", with_id % b"22", head.replace(b": 2", b": 3")):
            writer.write(sent + b"{}" + b" " * sent.count(b": 3\r\n"))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.close()
        await writer.wait_closed()

    assert set(shared.heads) == {hash(head), hash(head.replace(b": 2", b": 3"))}
    assert set(shared.cut_heads) == {hash(with_id % b"")}
    assert set(shared.forms) == {hash(b"\r\n".join((*lines[:3], b"", b"")))}
    assert b"a-secret" not in repr(vars(shared)).encode()


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})
