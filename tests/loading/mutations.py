"""Valid files with something wrong in them: `python -m tests.loading.mutations FILES FIRST LAST` reads and uses them.

The mutation of a number is always the same one. Before each its number is printed, so that whoever sees the process end,
or hang, knows by which; at the end, how often what came of it.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import pickle
import random
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app import loaders, memory
from app.errors import DisklessError
from app.model import use_one_thread
from tests.loading.forms import FORMS, answers, same
from tests.zoo import fitted

MODELS = (
    *("ridge", "forest", "extra trees", "boosting", "histogram boosting, categories", "isolation forest", "svc", "svr"),
    *("neighbours", "kernel density", "gaussian bayes", "perceptron", "k-means", "pca", "quantiles", "ordinal"),
    *("mixed", "mixed, searched", "texts", "records", "calibrated", "stacked", "bagged", "transformed target"),
)
WRITTEN = ("joblib", "joblib, zlib", "joblib, xz", "pickle 2", "pickle 4", "pickle 5", "skops")
ROWS = 5
MB = 2**20
ALLOWED_BYTES = 128 * MB
HANGS_SECONDS = 60.0
INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF)
LENGTHS = (-(2**63), -1, 0, 1, 255, 1000, 10**6, 2**31, 2**40)


@dataclass(frozen=True)
class File:
    name: str
    format: str
    body: bytes
    data: Any


def files() -> list[File]:
    """Write every model in two of the forms, each time others."""
    found = []
    for index, name in enumerate(MODELS):
        it = fitted(name)
        for form in (WRITTEN[2 * index % len(WRITTEN)], WRITTEN[(2 * index + 1) % len(WRITTEN)]):
            format, dump = FORMS[form]
            found.append(File(f"{name}, {form}", format, dump(it.estimator), it.data[:ROWS]))
    return found


def _flip(random: random.Random, body: bytearray) -> None:
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        body[random.randrange(len(body))] ^= 1 << random.randrange(8)


def _replace(random: random.Random, body: bytearray) -> None:
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        body[random.randrange(len(body))] = random.choice((*INTERESTING, random.randrange(256)))


def _truncate(random: random.Random, body: bytearray) -> None:
    del body[random.randrange(len(body)) :]


def _cut_out(random: random.Random, body: bytearray) -> None:
    start = random.randrange(len(body))
    del body[start : start + random.choice((1, 2, 8, 64))]


def _insert(random: random.Random, body: bytearray) -> None:
    start = random.randrange(len(body))
    body[start:start] = random.randbytes(random.choice((1, 2, 8)))


def _copy_over(random: random.Random, body: bytearray) -> None:
    target, source = random.randrange(len(body)), random.randrange(len(body))
    length = random.choice((1, 2, 4, 8, 8, 16, 64, 200))
    body[target : target + length] = body[source : source + length]


def _change_length(random: random.Random, body: bytearray) -> None:
    """Write another number where one may be: before texts, bytes and arrays, in headers, and in the numbers themselves."""
    width = random.choice((1, 2, 4, 8))
    places = [place for place in range(0, len(body) - width) if body[place] in b"BCTXK\x8a\x8b\x8c\x8d\x8e\x95\x96r"]
    place = random.choice(places) + 1 if places and random.random() < 0.7 else random.randrange(len(body))
    number = random.choice(LENGTHS) & ((1 << 8 * width) - 1)
    body[place : place + width] = number.to_bytes(width, "little")


CHANGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    *(_flip, _flip, _replace, _replace, _truncate, _cut_out, _insert, _copy_over, _change_length),
)


def _change(random: random.Random, body: bytes, other: bytes) -> bytes:
    if random.random() < 0.1:  # the beginning of one with the end of another
        return body[: random.randrange(len(body))] + other[random.randrange(len(other)) :]
    changed = bytearray(body)
    if changed:
        random.choice(CHANGES)(random, changed)
    return bytes(changed)


def mutated(random: random.Random, file: File, other: File) -> bytes:
    """Return a file with a mistake in it: mostly inside of what is packed, as outside a checksum finds it."""
    inside = random.random() < 0.8
    if inside and file.body.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(file.body)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        victim = random.choice(sorted(parts)) if random.random() < 0.5 else "schema.json"
        parts[victim] = _change(random, parts[victim], random.choice(sorted(parts.values())))
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
        return packed.getvalue()
    if inside and file.body.startswith(b"\x78"):
        return zlib.compress(_change(random, zlib.decompress(file.body), other.body))
    return _change(random, file.body, other.body)


def mutation(known: list[File], number: int) -> tuple[File, bytes]:
    chosen = random.Random(number)
    file, other = chosen.choice(known), chosen.choice(known)
    return file, mutated(chosen, file, other)


def main(path: str, first: int, last: int) -> None:
    from threadpoolctl import threadpool_limits

    from tests.loading.watched import Watch, warm_up

    known: list[File] = pickle.loads(Path(path).read_bytes())
    warm_up()
    expected = {}
    for file in known:
        estimator = loaders.load(file.format, io.BytesIO(file.body), file.name).value
        use_one_thread(estimator)
        expected[file.name] = answers(estimator, file.data)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    watch, highest = Watch(), 0
    with threadpool_limits(1), np.errstate(all="ignore"):
        for number in range(first, last):
            print(number, flush=True)
            file, body = mutation(known, number)
            faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
            memory.reset_peak()
            before = memory.resident_bytes()
            watch.begin()
            try:
                value = loaders.load(file.format, io.BytesIO(body), "f", max_bytes=ALLOWED_BYTES).value
                outcome = "loaded"
            except DisklessError as error:
                outcome = type(error).__name__
            except BaseException as error:
                outcome = "escaped"
                wrong.append(f"{number} {error!r:.200}")
            wrong += [f"{number} {seen}" for seen in watch.end()]
            highest = max(highest, memory.peak_bytes() - before)
            if outcome == "loaded":
                use_one_thread(value)
                equal = same(expected[file.name], answers(value, file.data))
                outcome = "equal" if equal else "differs, which its digest tells"
                if not equal and hashlib.sha256(body).digest() == hashlib.sha256(file.body).digest():
                    wrong.append(f"{number} differs, and is the same file")
                del value
            outcomes[outcome] += 1
            faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"outcomes": outcomes, "wrong": wrong, "highest": highest}), flush=True)


if __name__ == "__main__":
    from tests.loading import mutations  # the files are pickled as of this module, which here is `__main__`

    mutations.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
