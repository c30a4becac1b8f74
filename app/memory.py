"""How much memory a load will take, and how much there is: the limits that hold for this process against what is in use.

Control groups of both versions are read, and every level above this process's own, because the limit of a container or
of a dyno may stand at any of them: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.stat) and
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

import ctypes
import io
import re
import resource
import sys
from collections import deque
from collections.abc import Buffer, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, override

from app.errors import NoRoom

MB = 1 << 20  # as hosters and container engines count: a dyno of 512 MB has 536,870,912 bytes
UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a number near 2**63

HERE = Path("/")


# How much there is


@dataclass(frozen=True, slots=True)
class Room:
    """A limit and what is in use of it, in bytes. File cache that the kernel can take back does not count as used."""

    limit_bytes: int
    used_bytes: int
    source: str

    @property
    def free_bytes(self) -> int:
        """What may still be taken."""
        return max(0, self.limit_bytes - self.used_bytes)


def room(limit_bytes: int | None = None, root: Path = HERE) -> Room | None:
    """Return where the least is free of everything that limits this process; None where nothing tells.

    `limit_bytes` is a limit that the operator has set, for this process alone, because the platform's own cannot be seen
    from inside. `root` is where /proc and /sys are, for tests.
    """
    found = [*_groups(root), *_machine(root)]
    if limit_bytes is not None:
        found.append(Room(limit_bytes, resident_bytes(root), "ML_MEMORY_LIMIT_BYTES"))
    return min(found, key=lambda candidate: candidate.free_bytes, default=None)


class _Files(NamedTuple):
    """What the files of one version of control groups are called."""

    limits: tuple[str, ...]
    usage: str
    statistics_prefix: str
    mapped: str


_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_", "mapped_file")
# Above memory.high a process is not killed, but held back until it hardly moves: that is no room either.
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", "", "file_mapped")


def _groups(root: Path) -> Iterator[Room]:
    """Yield the limit of every level of the control groups that account for this process's memory."""
    own = _own_groups(root)
    for kind, options, mounted, mount in _mounts(root):
        if kind == "cgroup2" and "" in own:
            path, files = own[""], _VERSION_2
        elif kind == "cgroup" and "memory" in options and "memory" in own:
            path, files = own["memory"], _VERSION_1
        else:
            continue
        for group in _levels(mount, mounted, path):
            found = _level(group, files, root)
            if found is not None:
                yield found


def _own_groups(root: Path) -> dict[str, str]:
    """Return this process's path by controller, and that of version 2 by the empty string (see cgroups(7))."""
    found: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and (controllers or number == "0"):
            found |= dict.fromkeys(controllers.split(","), path)
    return found


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, Path]]:
    """Yield type, options, mounted folder and mount point of every mount (see proc_pid_mountinfo(5))."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, dash, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if dash and len(fields) >= 5 and rest:
            mounted, point = (_ESCAPE.sub(lambda found: chr(int(found[1], 8)), text) for text in fields[3:5])
            yield rest[0], rest[-1].split(","), mounted, root / point.lstrip("/")


_ESCAPE = re.compile(r"\\([0-7]{3})")


def _levels(mount: Path, mounted: str, path: str) -> Iterator[Path]:
    """Yield the folder of the group `path`, and those above it, up to the mount point.

    In a container `path` may be the host's, of which nothing, or only what is below `mounted`, can be seen: then the mount
    is the group.
    """
    inside = PurePosixPath("/", path)
    group = mount
    if ".." not in inside.parts:  # a group outside of this namespace
        below = inside.relative_to(mounted) if inside.is_relative_to(mounted) else inside.relative_to("/")
        group = mount / below
    if not group.is_dir():
        group = mount
    yield group
    while group != mount:
        group = group.parent
        yield group


def _level(group: Path, files: _Files, root: Path) -> Room | None:
    statistics = _statistics(group / "memory.stat")
    limits = {group / name: limit for name in files.limits if (limit := _number(group / name)) is not None}
    if not limits:
        return None
    source, limit = min(limits.items(), key=lambda item: item[1])
    # Version 1 tells the tightest limit above too, which may be outside of what a container sees.
    limit = min(limit, statistics.get("hierarchical_memory_limit", limit))
    if limit >= UNLIMITED_BYTES:
        return None
    usage = _number(group / files.usage)
    if usage is None:
        used = resident_bytes(root)
    else:
        cache = sum(statistics.get(files.statistics_prefix + name, 0) for name in ("inactive_file", "active_file"))
        # What is mapped is mostly the libraries' code: taking it back would mean reading it again and again.
        used = usage - max(0, cache - statistics.get(files.statistics_prefix + files.mapped, 0))
    return Room(limit, max(0, used), f"/{source.relative_to(root)}")


def _machine(root: Path) -> Iterator[Room]:
    """Yield what the whole machine has, by the kernel's own estimate of what can be had without swapping."""
    sizes = _statistics(root / "proc/meminfo", unit=1024)
    if {"MemTotal", "MemAvailable"} <= sizes.keys():
        yield Room(sizes["MemTotal"], max(0, sizes["MemTotal"] - sizes["MemAvailable"]), "/proc/meminfo")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return the number in a file; `UNLIMITED_BYTES` for `max`, None when there is none."""
    text = "".join(_lines(path)).strip()
    if text == "max":
        return UNLIMITED_BYTES
    return int(text) if text.isdecimal() else None


def _statistics(path: Path, unit: int = 1) -> dict[str, int]:
    pairs = (line.replace(":", " ").split() for line in _lines(path))
    return {pair[0]: int(pair[1]) * unit for pair in pairs if len(pair) >= 2 and pair[1].isdecimal()}


# What this process has


def resident_bytes(root: Path = HERE) -> int:
    """Return this process's resident size, 0 where /proc does not tell."""
    try:
        with open(f"{root}/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def peak_bytes(root: Path = HERE) -> int:
    """Return the largest resident size since the start or the last `reset_peak`, 0 where /proc does not tell."""
    return _statistics(root / "proc/self/status", unit=1024).get("VmHWM", 0)


def reset_peak(root: Path = HERE) -> bool:
    """Count the peak from now on; return whether the kernel lets us (see proc_pid_clear_refs(5))."""
    try:
        (root / "proc/self/clear_refs").write_bytes(b"5")
    except OSError:
        return False
    return True


def _c_library() -> Any:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None  # None: not glibc


_libc = _c_library()
_M_MMAP_THRESHOLD = -3  # malloc.h


def map_chunks_apart(chunk_bytes: int) -> None:
    """Have the C library give each chunk of a stream pages of its own, which go back to the system with the chunk.

    Otherwise each thread that has fetched one keeps the room of two or three, for good: 38 MB beside a model of 105 MB.
    """
    if _libc is not None:
        _libc.mallopt(_M_MMAP_THRESHOLD, chunk_bytes)


def trim_heap() -> None:
    """Give memory that a load has freed back to the system, where the C library can."""
    if _libc is not None:
        _libc.malloc_trim(0)


# How much a load will take


class Taken(NamedTuple):
    """What a load took, in bytes beyond what was in use before: afterwards, and at its worst moment."""

    resident_bytes: int
    peak_bytes: int


class Stored(NamedTuple):
    """One artifact as it is stored: its format, its size in bytes, and, where they are known, its first bytes."""

    format: str
    size: int
    head: bytes = b""


MEASURED_FROM_BYTES = MB  # what is stored in less takes nothing that counts
HEAD_BYTES = 10  # of an artifact that tell how it was written

# What loads took here, in multiples of the stored size (resident, peak): the most of random forests, histogram boosting, nearest
# neighbours and linear models of 5 to 30 MB, rounded up. scikit-learn 1.9, numpy 2.5, joblib 1.6, skops 0.16, glibc, x86-64.
# Large files are at the peak what they are afterwards; of many small trees, and whatever is packed, a little more stays beside.
# Protocol 2 writes bytes as text, and trees are made of arrays that skops has read: both at once are the peak.
# Where Python objects outweigh numbers it is more: thousands of tiny trees take 5 times their size, the vocabulary of a text
# vectoriser 7 times. A compressed size tells least: a matrix of zeros is 200 times its zlib size.
_FACTORS: Mapping[str, tuple[float, float]] = {
    "joblib": (1.1, 1.4),
    "joblib, zlib": (6.0, 7.2),
    "joblib, bz2": (9.2, 10.3),
    "joblib, xz": (9.0, 12.0),
    "joblib, lz4": (6.0, 7.2),  # not measured: it packs less than zlib
    "pickle": (1.1, 1.4),
    "pickle, protocol 2": (1.0, 2.0),
    "safetensors": (1.1, 1.2),  # compiled forms, but for what an engine makes of them
    "skops": (1.1, 2.2),
    "skops, deflated": (6.0, 12.5),
}
_COMPRESSORS = {
    b"\x78": "zlib",
    b"\x1f\x8b": "zlib",  # gzip
    b"ZF": "zlib",  # joblib before 0.10
    b"BZ": "bz2",
    b"\x5d\x00": "xz",  # lzma
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_FALLBACK = "joblib, zlib"  # for a format that is not known here

LIBRARIES_BYTES = 150 * MB  # of scikit-learn, scipy, pandas and what they import, before the first model needs them
ENGINE_BYTES = 40 * MB  # of onnxruntime, which a compiled form may need
# Chunks in flight, buffers, what requests and golden rows need meanwhile. More than what a load is stopped at.
OVERHEAD_BYTES = 56 * MB
MIN_LEARNT_BYTES = 16 * MB  # of anything smaller, the heap's own coming and going is too large a part
MAX_CORRECTION = 8.0
REMEMBERED_LOADS = 8


def kind_of(part: Stored) -> str:
    """Return how an artifact was written, as far as its format and its first bytes tell."""
    for magic, name in _COMPRESSORS.items():
        if part.format in ("joblib", "pickle") and part.head.startswith(magic):
            return f"joblib, {name}"
    if part.format == "pickle" and part.head and (part.head[:1] != b"\x80" or part.head[1:2] <= b"\x02"):
        return "pickle, protocol 2"
    if part.format == "skops" and part.head[8:10] == b"\x08\x00":  # the method of a ZIP file's first entry
        return "skops, deflated"
    return part.format if part.format in _FACTORS else _FALLBACK


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a load is expected to take, and what it was told by (`kind`: "recorded", or how the largest part was written).

    `expected` is the same before correction and overheads: what `Estimator.learn` holds a load against. `libraries`: what the
    load will import for the first time is in it.
    """

    resident_bytes: int
    peak_bytes: int
    kind: str
    expected: Taken
    libraries: bool


class Estimator:
    """Expects what was recorded or what artifacts of such sizes took, but never less than recent loads of the kind took."""

    def __init__(self) -> None:
        self._ratios: dict[str, deque[tuple[float, float]]] = {}

    def estimate(
        self, parts: Sequence[Stored], recorded: Taken | None = None, *, needs_sklearn: bool = True
    ) -> Estimate:
        """Return what loading the parts of a version will take; `recorded` is what its publisher measured.

        A compiled form does not need scikit-learn and what that imports, which is in the estimate where it is not there yet.
        """
        if recorded is not None:
            # Whoever can write a manifest can write anything into it, but bytes that are read are not less than they are.
            stored = sum(part.size for part in parts)
            kind, expected = "recorded", recorded._replace(peak_bytes=max(recorded.peak_bytes, stored))
        else:
            kind = kind_of(max(parts, key=lambda part: part.size)) if parts else "joblib"
            staying, worst = 0, 0
            for part in parts:  # one after the other, each beside what those before it have left
                resident, peak = _FACTORS[kind_of(part)]
                worst = max(worst, staying + int(part.size * peak))
                staying += int(part.size * resident)
            expected = Taken(staying, worst)
        resident, peak = self.correction(kind)
        needed = "sklearn" if needs_sklearn else "onnxruntime"
        libraries = needed not in sys.modules
        extra = (LIBRARIES_BYTES if needs_sklearn else ENGINE_BYTES) if libraries else 0
        after = int(expected.resident_bytes * resident) + extra
        highest = max(int(expected.peak_bytes * peak) + extra, after) + OVERHEAD_BYTES
        return Estimate(after, highest, kind, expected, libraries)

    def learn(self, estimate: Estimate, taken: Taken) -> None:
        """Take note of what a load really took. One that imported the libraries too, or was small, teaches nothing."""
        if not estimate.libraries and estimate.expected.peak_bytes >= MIN_LEARNT_BYTES:
            ratios = (
                taken.resident_bytes / max(1, estimate.expected.resident_bytes),
                taken.peak_bytes / max(1, estimate.expected.peak_bytes),
            )
            self._ratios.setdefault(estimate.kind, deque(maxlen=REMEMBERED_LOADS)).append(ratios)

    def forget(self, kind: str) -> None:
        """Expect of a kind what is known of it in general again: what was taken here may have been something else's."""
        self._ratios.pop(kind, None)

    def correction(self, kind: str) -> tuple[float, float]:
        """Return what resident and peak size of a kind are multiplied by: the worst of recent loads, 1 to `MAX_CORRECTION`."""
        recent = [(1.0, 1.0), *self._ratios.get(kind, ())]
        resident, peak = (min(MAX_CORRECTION, max(ratios)) for ratios in zip(*recent, strict=True))
        return resident, peak


def check(found: Room | None, needed_bytes: int, label: str, *, replaceable: bool = False) -> None:
    """Raise `NoRoom` where less is free than needed; nothing is known without a room, and nothing refused.

    `label` names the version; `replaceable`: an older one would be dropped first if the operator allowed it.
    """
    if found is None or needed_bytes <= found.free_bytes:
        return
    remedies = [
        *(["set ML_SWAP_POLICY=replace, which drops the old version first"] if replaceable else []),
        "give the service more memory",
        "serve fewer models",
        "publish a smaller one",
    ]
    raise NoRoom(
        f"{label}: needs about {-(-needed_bytes // MB)} MB to load, {found.free_bytes // MB} MB of "
        f"{found.limit_bytes // MB} MB are free ({found.source}): {', '.join(remedies[:-1])} or {remedies[-1]}"
    )


class Watched(io.RawIOBase):
    """A stream that stops a load, by `NoRoom`, when memory runs out after all.

    An estimate can be wrong, above all of what is compressed. Memory grows as bytes are read, so before each piece what this process has grown by is held against what is free.
    """

    def __init__(self, stream: Any, label: str, *, limit_bytes: int | None = None, root: Path = HERE) -> None:
        self._stream = stream
        self._label = label
        self._limit_bytes = limit_bytes
        self._root = root
        self._looked_at = -LOOK_EVERY_BYTES  # what was resident at the last look
        self._piece_bytes = PIECE_BYTES

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        """Read a piece at most: what it decompresses to must not fill the memory before the next look."""
        self.look()
        view = memoryview(buffer).cast("B")[: self._piece_bytes]
        begins = self._stream.tell() == 0
        count = int(self._stream.readinto(view))
        if begins:
            packed = view[:count].tobytes().startswith((*_COMPRESSORS, b"PK"))
            self._piece_bytes = PIECE_BYTES if packed else LARGE_PIECE_BYTES
        return count

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return int(self._stream.seek(offset, whence))

    @override
    def tell(self) -> int:
        return int(self._stream.tell())

    def look(self, about_to_take_bytes: int = 0) -> None:
        """Raise `NoRoom` when memory has run out, or would with what is about to be taken."""
        resident = resident_bytes(self._root)
        if resident + about_to_take_bytes - self._looked_at < LOOK_EVERY_BYTES:
            return
        self._looked_at = resident
        found = room(self._limit_bytes, self._root)
        if found is not None and found.free_bytes - about_to_take_bytes < RESERVE_BYTES:
            raise NoRoom(
                f"{self._label}: takes more memory to load than was expected: stopped when {found.free_bytes // MB} MB of "
                f"{found.limit_bytes // MB} MB were free ({found.source}): give the service more memory, serve fewer models, "
                "or publish a smaller one"
            )


PIECE_BYTES = 32 * 1024  # becomes at most 32 MB, as zlib packs a thousand times at best
LARGE_PIECE_BYTES = MB  # of what is not compressed
LOOK_EVERY_BYTES = 16 * MB  # of growth; a look takes a millisecond
RESERVE_BYTES = 48 * MB
