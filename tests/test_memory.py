"""What limits this process, what a load takes, and that a load that does not fit is refused instead of ending the process."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import skops.io
from sklearn.linear_model import LinearRegression

from app import memory
from app.errors import NoRoom
from app.memory import (
    LARGE_PIECE_BYTES,
    LIBRARIES_BYTES,
    MAX_CORRECTION,
    MB,
    OVERHEAD_BYTES,
    PIECE_BYTES,
    Estimator,
    Room,
    Stored,
    Taken,
    Watched,
    check,
    kind_of,
    peak_bytes,
    reset_peak,
    resident_bytes,
    room,
    trim_heap,
)
from tests.cgroup import LIMIT_BYTES, small_machine
from tests.service import ROOT

NO_LIMIT = "9223372036854771712"  # how version 1 writes it
V1 = "36 32 0:33 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"


class Machine:
    """A made-up /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def process(self, cgroup: str, *mounts: str) -> None:
        self.write("/proc/self/cgroup", cgroup)
        self.write("/proc/self/mountinfo", "\n".join(["22 1 8:1 / / rw - ext4 /dev/root rw", *mounts]))

    def v1(self, folder: str, limit: str | int, usage: str | int = 0, **statistics: int) -> None:
        self.write(f"{folder}/memory.limit_in_bytes", limit)
        self.write(f"{folder}/memory.usage_in_bytes", usage)
        self.statistics(folder, statistics)

    def v2(self, folder: str, limit: str | int, usage: str | int = 0, **statistics: int) -> None:
        self.write(f"{folder}/memory.max", limit)
        self.write(f"{folder}/memory.current", usage)
        self.statistics(folder, statistics)

    def statistics(self, folder: str, statistics: dict[str, int]) -> None:
        self.write(f"{folder}/memory.stat", "\n".join(f"{name} {value}" for name, value in statistics.items()))

    def room(self, limit_bytes: int | None = None) -> Room | None:
        return room(limit_bytes, self.root)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_limit_of_version_2_is_read(machine):
    machine.process("0::/app", V2)
    machine.v2("/sys/fs/cgroup/app", 512 * MB, 200 * MB)

    found = machine.room()

    assert found == Room(512 * MB, 200 * MB, "/sys/fs/cgroup/app/memory.max")
    assert found.free_bytes == 312 * MB


def test_a_limit_of_version_1_is_read(machine):
    machine.process("4:memory:/app\n1:cpu,cpuacct:/app", V1)
    machine.v1("/sys/fs/cgroup/memory/app", 512 * MB, 200 * MB)

    assert machine.room() == Room(512 * MB, 200 * MB, "/sys/fs/cgroup/memory/app/memory.limit_in_bytes")


def test_file_cache_that_can_be_taken_back_is_free_but_what_is_mapped_is_not(machine):
    machine.process("0::/", V2)
    machine.v2("/sys/fs/cgroup", 512 * MB, 400 * MB, inactive_file=150 * MB, active_file=100 * MB, file_mapped=60 * MB)
    second = machine.room()
    machine.process("4:memory:/", V1)
    machine.v1(
        "/sys/fs/cgroup/memory",
        512 * MB,
        400 * MB,
        inactive_file=1,  # this group's own, without those below it
        total_inactive_file=150 * MB,
        total_active_file=100 * MB,
        total_mapped_file=60 * MB,
    )
    first = machine.room()

    assert (first.used_bytes, second.used_bytes) == (210 * MB, 210 * MB)


def test_cache_that_is_all_mapped_is_never_counted_twice(machine):
    machine.process("0::/", V2)
    machine.v2("/sys/fs/cgroup", 512 * MB, 400 * MB, inactive_file=10 * MB, file_mapped=60 * MB)

    assert machine.room().used_bytes == 400 * MB


@pytest.mark.parametrize("levels", [(512, 256, 1024), (256, 512, 1024), (1024, 512, 256)])
def test_the_tightest_level_holds(machine, levels):
    machine.process("0::/pod/app", V2)
    for folder, size in zip(("", "/pod", "/pod/app"), levels, strict=True):
        machine.v2(f"/sys/fs/cgroup{folder}", size * MB, 10 * MB)

    assert machine.room().limit_bytes == 256 * MB


def test_the_level_with_the_least_free_holds_even_if_its_limit_is_higher(machine):
    machine.process("0::/pod/app", V2)
    machine.v2("/sys/fs/cgroup/pod/app", 512 * MB, 100 * MB)
    machine.v2("/sys/fs/cgroup/pod", 1024 * MB, 900 * MB)  # its other containers use most of it

    assert machine.room() == Room(1024 * MB, 900 * MB, "/sys/fs/cgroup/pod/memory.max")


def test_memory_high_is_a_limit_too(machine):
    machine.process("0::/app", V2)
    machine.v2("/sys/fs/cgroup/app", "max", 100 * MB)
    machine.write("/sys/fs/cgroup/app/memory.high", 300 * MB)

    assert machine.room() == Room(300 * MB, 100 * MB, "/sys/fs/cgroup/app/memory.high")


def test_on_a_hybrid_host_version_1_has_the_memory(machine):
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    systemd = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd"
    machine.process("9:name=systemd:/s\n4:memory:/app\n0::/", unified, systemd, V1)
    machine.write("/sys/fs/cgroup/unified/memory.stat", "anon 1")  # the root of version 2 has no limit
    machine.v1("/sys/fs/cgroup/memory/app", 256 * MB)

    assert machine.room().source == "/sys/fs/cgroup/memory/app/memory.limit_in_bytes"


def test_controllers_that_are_mounted_together_are_found(machine):
    machine.process("3:cpu,memory:/app", "36 32 0:33 / /cgroup/both rw - cgroup cgroup rw,cpu,memory")
    machine.v1("/cgroup/both/app", 256 * MB)

    assert machine.room().limit_bytes == 256 * MB


def test_a_container_that_sees_its_group_as_the_mount_is_read_there(machine):
    mounted = "36 32 0:33 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
    machine.process("4:memory:/docker/abc", mounted)
    machine.v1("/sys/fs/cgroup/memory", 256 * MB)

    assert machine.room() == Room(256 * MB, 0, "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def test_a_group_below_the_containers_is_read_there(machine):
    mounted = "36 32 0:33 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
    machine.process("4:memory:/docker/abc/worker", mounted)
    machine.v1("/sys/fs/cgroup/memory", 512 * MB)
    machine.v1("/sys/fs/cgroup/memory/worker", 128 * MB)

    assert machine.room().source == "/sys/fs/cgroup/memory/worker/memory.limit_in_bytes"


@pytest.mark.parametrize("path", ["/kubepods/burstable/pod1/abc", "/../../other", "/app (deleted)", ""])
def test_a_path_that_does_not_exist_under_the_mount_means_the_mount(machine, path):
    machine.process(f"0::{path}", V2)
    machine.v2("/sys/fs/cgroup", 256 * MB)

    assert machine.room().source == "/sys/fs/cgroup/memory.max"


def test_the_tightest_limit_above_what_a_container_sees_is_known_from_its_statistics(machine):
    machine.process("4:memory:/", V1)
    machine.v1("/sys/fs/cgroup/memory", NO_LIMIT, 50 * MB, hierarchical_memory_limit=256 * MB)

    assert machine.room().limit_bytes == 256 * MB


def test_a_mount_point_with_a_blank_is_found(machine):
    machine.process("0::/", r"29 23 0:26 / /sys/my\040group rw - cgroup2 cgroup2 rw")
    machine.v2("/sys/my group", 256 * MB)

    assert machine.room().source == "/sys/my group/memory.max"


@pytest.mark.parametrize("limit", ["max", "", "a lot", "-1"])
def test_no_limit_of_version_2_is_none(machine, limit):
    machine.process("0::/", V2)
    machine.v2("/sys/fs/cgroup", limit)

    assert machine.room() is None


@pytest.mark.parametrize("limit", [NO_LIMIT, "9223372036854775807", "-1", ""])
def test_no_limit_of_version_1_is_none(machine, limit):
    machine.process("4:memory:/", V1)
    machine.v1("/sys/fs/cgroup/memory", limit)

    assert machine.room() is None


def test_a_limit_without_usage_or_statistics_is_held_against_this_process(machine):
    machine.process("0::/", V2)
    machine.write("/sys/fs/cgroup/memory.max", 256 * MB)
    machine.write("/proc/self/statm", f"99999 {64 * MB // os.sysconf('SC_PAGESIZE')} 1 1 0 1 0")

    assert machine.room() == Room(256 * MB, 64 * MB, "/sys/fs/cgroup/memory.max")


def test_more_in_use_than_allowed_leaves_nothing_free(machine):
    machine.process("0::/", V2)
    machine.v2("/sys/fs/cgroup", 256 * MB, 300 * MB)

    assert machine.room().free_bytes == 0


MEMINFO = (
    "MemTotal:        1048576 kB\nMemFree:          1000 kB\nMemAvailable:     524288 kB\nHugePages_Total:       0"
)


def test_without_any_limit_the_available_memory_of_the_machine_counts(machine):
    machine.process("0::/", V2)
    machine.v2("/sys/fs/cgroup", "max", 100 * MB)
    machine.write("/proc/meminfo", MEMINFO)

    assert machine.room() == Room(1024 * MB, 512 * MB, "/proc/meminfo")


def test_a_limit_that_the_machine_cannot_give_does_not_hold(machine):
    machine.process("0::/", V2)
    machine.v2("/sys/fs/cgroup", 800 * MB)
    machine.write("/proc/meminfo", MEMINFO)

    assert machine.room().source == "/proc/meminfo"


def test_the_operators_limit_caps_what_is_found_and_counts_this_process_only(machine):
    machine.process("0::/", V2)
    machine.v2("/sys/fs/cgroup", 512 * MB, 100 * MB)
    machine.write("/proc/self/statm", f"99999 {64 * MB // os.sysconf('SC_PAGESIZE')} 1 1 0 1 0")

    assert machine.room(256 * MB) == Room(256 * MB, 64 * MB, "ML_MEMORY_LIMIT_BYTES")
    assert machine.room(1024 * MB).source == "/sys/fs/cgroup/memory.max"


def test_the_operators_limit_is_enough_where_nothing_else_tells(machine):
    assert machine.room(256 * MB) == Room(256 * MB, 0, "ML_MEMORY_LIMIT_BYTES")


@pytest.mark.parametrize(
    ("cgroup", "mounts"),
    [
        ("", ""),
        ("nonsense", V2),
        ("0:", V2),
        ("0::/", "nonsense - "),
        ("0::/", "29 23 - cgroup2 cgroup2 rw"),
        ("0::/", "29 23 0:26 / /sys/fs/cgroup rw"),
        ("4:cpu:/", V1),
    ],
)
def test_files_that_say_nothing_are_no_room(machine, cgroup, mounts):
    machine.process(cgroup, mounts)
    machine.write("/proc/meminfo", "MemTotal: many kB")

    assert machine.room() is None


def test_without_proc_and_sys_nothing_is_known(machine):
    assert machine.room() is None
    assert resident_bytes(machine.root) == 0
    assert peak_bytes(machine.root) == 0
    assert not reset_peak(machine.root)


def test_statm_that_makes_no_sense_is_nothing(machine):
    machine.write("/proc/self/statm", "")

    assert resident_bytes(machine.root) == 0


def test_this_machine_says_how_much_is_free():
    found = room()

    assert found is not None
    assert 0 < found.free_bytes <= found.limit_bytes
    assert Path(found.source).exists()


def test_the_peak_remembers_what_is_gone_until_it_is_reset():
    reset_peak()
    before = resident_bytes()
    block = np.ones(64 * MB // 8)
    during = resident_bytes()
    del block
    trim_heap()
    remembered = peak_bytes()

    assert during - before > 60 * MB
    assert remembered > before + 60 * MB
    if not reset_peak():
        pytest.skip("/proc/self/clear_refs may not be written here")
    assert peak_bytes() < remembered - 30 * MB


@pytest.mark.parametrize(
    ("write", "format", "kind"),
    [
        (lambda model, file: joblib.dump(model, file), "joblib", "joblib"),
        (lambda model, file: joblib.dump(model, file, compress=3), "joblib", "joblib, zlib"),
        (lambda model, file: joblib.dump(model, file, compress=("gzip", 3)), "joblib", "joblib, zlib"),
        (lambda model, file: joblib.dump(model, file, compress=("bz2", 3)), "joblib", "joblib, bz2"),
        (lambda model, file: joblib.dump(model, file, compress=("lzma", 3)), "joblib", "joblib, xz"),
        (lambda model, file: joblib.dump(model, file, compress=("xz", 3)), "pickle", "joblib, xz"),
        (lambda model, file: joblib.dump(model, file), "pickle", "pickle"),
        (lambda model, file: pickle.dump(model, file, protocol=0), "pickle", "pickle, protocol 2"),
        (lambda model, file: pickle.dump(model, file, protocol=1), "pickle", "pickle, protocol 2"),
        (lambda model, file: pickle.dump(model, file, protocol=2), "pickle", "pickle, protocol 2"),
        (lambda model, file: pickle.dump(model, file, protocol=3), "pickle", "pickle"),
        (lambda model, file: pickle.dump(model, file, protocol=4), "pickle", "pickle"),
        (lambda model, file: pickle.dump(model, file, protocol=5), "pickle", "pickle"),
        (lambda model, file: skops.io.dump(model, file), "skops", "skops"),
        (
            lambda model, file: skops.io.dump(model, file, compression=zipfile.ZIP_DEFLATED),
            "skops",
            "skops, deflated",
        ),
    ],
)
def test_how_a_file_was_written_is_told_by_its_first_bytes(write, format, kind):
    file = io.BytesIO()
    write(LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]), file)
    body = file.getvalue()

    assert kind_of(Stored(format, len(body), body[: memory.HEAD_BYTES])) == kind


@pytest.mark.parametrize(
    ("format", "kind"), [("joblib", "joblib"), ("pickle", "pickle"), ("skops", "skops"), ("onnx", "joblib, zlib")]
)
def test_without_the_first_bytes_the_format_decides_and_an_unknown_one_counts_as_compressed(format, kind):
    assert kind_of(Stored(format, 1)) == kind


def test_an_estimate_from_sizes_takes_the_parts_one_after_the_other():
    estimate = Estimator().estimate([Stored("joblib", 10 * MB), Stored("joblib", 100 * MB)])

    assert estimate.kind == "joblib"
    assert estimate.resident_bytes == pytest.approx(1.1 * 110 * MB)
    assert estimate.peak_bytes == pytest.approx(1.1 * 10 * MB + 1.4 * 100 * MB + OVERHEAD_BYTES)


def test_what_the_publisher_measured_is_what_is_expected():
    estimate = Estimator().estimate([Stored("joblib", 40 * MB)], Taken(50 * MB, 60 * MB))

    assert (estimate.resident_bytes, estimate.peak_bytes) == (50 * MB, 60 * MB + OVERHEAD_BYTES)
    assert estimate.kind == "recorded"


def test_a_manifest_cannot_say_that_loading_takes_less_than_is_read():
    estimate = Estimator().estimate([Stored("joblib", 300 * MB), Stored("joblib", 200 * MB)], Taken(0, 0))

    assert (estimate.resident_bytes, estimate.peak_bytes) == (0, 500 * MB + OVERHEAD_BYTES)


def test_nothing_to_load_takes_nothing_but_the_overhead():
    assert Estimator().estimate([]).peak_bytes == OVERHEAD_BYTES


def test_the_largest_part_names_the_kind():
    parts = [Stored("skops", 2 * MB), Stored("pickle", 1 * MB)]

    assert Estimator().estimate(parts).kind == "skops"


def test_what_loads_really_took_raises_the_next_estimate_of_that_kind_only():
    estimator = Estimator()
    first = estimator.estimate([Stored("joblib", 100 * MB)])
    estimator.learn(first, Taken(220 * MB, 280 * MB))
    second = estimator.estimate([Stored("joblib", 50 * MB)])

    assert second.resident_bytes == pytest.approx(110 * MB, abs=10)
    assert second.peak_bytes == pytest.approx(140 * MB + OVERHEAD_BYTES, abs=10)
    assert estimator.correction("joblib") == (2.0, 2.0)
    assert estimator.correction("skops") == (1.0, 1.0)


def test_the_worst_of_the_recent_loads_counts_and_is_forgotten_after_some():
    estimator = Estimator()
    estimate = estimator.estimate([Stored("joblib", 100 * MB)])
    estimator.learn(estimate, Taken(110 * MB, 420 * MB))
    for _ in range(memory.REMEMBERED_LOADS - 1):
        estimator.learn(estimate, Taken(110 * MB, 140 * MB))
    remembered = estimator.correction("joblib")
    estimator.learn(estimate, Taken(110 * MB, 140 * MB))

    assert remembered == (1.0, 3.0)
    assert estimator.correction("joblib") == (1.0, 1.0)


def test_a_correction_is_bounded_on_both_sides():
    estimator = Estimator()
    estimate = estimator.estimate([Stored("joblib", 100 * MB)])
    estimator.learn(estimate, Taken(1, 1))
    low = estimator.correction("joblib")
    estimator.learn(estimate, Taken(50_000 * MB, 50_000 * MB))

    assert low == (1.0, 1.0)
    assert estimator.correction("joblib") == (MAX_CORRECTION, MAX_CORRECTION)


def test_the_peak_is_never_expected_below_what_stays():
    estimator = Estimator()
    estimate = estimator.estimate([], Taken(100 * MB, 110 * MB))
    estimator.learn(estimate, Taken(300 * MB, 110 * MB))

    again = estimator.estimate([], Taken(100 * MB, 110 * MB))

    assert again.peak_bytes == again.resident_bytes + OVERHEAD_BYTES == 300 * MB + OVERHEAD_BYTES


def test_small_loads_teach_nothing():
    estimator = Estimator()
    estimator.learn(estimator.estimate([Stored("joblib", 1000)]), Taken(3 * MB, 5 * MB))

    assert estimator.correction("joblib") == (1.0, 1.0)


LIBRARIES_SCRIPT = """
from app.memory import *
estimator = Estimator()
first = estimator.estimate([Stored("joblib", 100 * MB)])
estimator.learn(first, Taken(900 * MB, 900 * MB))
before = resident_bytes()
import sklearn.ensemble, sklearn.linear_model, sklearn.compose, pandas
libraries = resident_bytes() - before
second = estimator.estimate([Stored("joblib", 100 * MB)])
print(first.peak_bytes - second.peak_bytes, libraries, estimator.correction("joblib") == (1.0, 1.0))
"""


def test_the_first_load_is_expected_to_import_the_libraries_and_not_learnt_from():
    run = subprocess.run([sys.executable, "-c", LIBRARIES_SCRIPT], cwd=ROOT, check=True, capture_output=True, text=True)
    expected, real, unlearnt = run.stdout.split()

    assert int(expected) == LIBRARIES_BYTES
    assert 0.5 * LIBRARIES_BYTES < int(real) < 1.5 * LIBRARIES_BYTES
    assert unlearnt == "True"


def test_a_load_that_does_not_fit_is_refused_with_numbers_and_remedies():
    found = Room(512 * MB, 382 * MB + 5, "/sys/fs/cgroup/memory.max")

    with pytest.raises(NoRoom) as caught:
        check(found, 410 * MB - 7, "churn/7")
    with pytest.raises(
        NoRoom, match="free .*: set ML_SWAP_POLICY=replace, which drops the old version first, give the"
    ):
        check(found, 410 * MB, "churn/7", replaceable=True)

    assert str(caught.value) == (
        "churn/7: needs about 410 MB to load, 129 MB of 512 MB are free (/sys/fs/cgroup/memory.max): give the service more "
        "memory, serve fewer models or publish a smaller one"
    )


def test_a_load_that_fits_exactly_is_allowed():
    check(Room(512 * MB, 100 * MB, "here"), 412 * MB, "churn/7")


def test_where_nothing_is_known_nothing_is_refused():
    check(None, 10**15, "churn/7")


def dumped(model: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    joblib.dump(model, file, **options)
    return file.getvalue()


def linear(megabytes: int) -> LinearRegression:
    model = LinearRegression()
    model.coef_, model.intercept_ = np.random.default_rng(0).normal(size=(megabytes * MB // 80, 10)), 0.0
    return model


def test_a_watched_stream_yields_the_same_bytes(machine):
    body = np.random.default_rng(0).bytes(3 * MB)
    stream = Watched(io.BytesIO(body), "churn/7 model.joblib", root=machine.root)
    buffered = io.BufferedReader(stream)

    assert buffered.read() == body
    assert buffered.seek(5) == 5
    assert buffered.read(10) == body[5:15]
    assert buffered.tell() == 15


@pytest.mark.parametrize(("options", "piece"), [({}, LARGE_PIECE_BYTES), ({"compress": 1}, PIECE_BYTES)])
def test_what_is_compressed_is_read_in_small_pieces(machine, options, piece):
    stream = Watched(io.BytesIO(dumped(linear(4), **options)), "churn/7 model.joblib", root=machine.root)
    first, second = bytearray(8 * MB), bytearray(8 * MB)

    assert stream.readinto(first) == PIECE_BYTES
    assert stream.readinto(second) == piece


def test_a_watched_stream_stops_when_less_is_free_than_the_reserve(machine):
    machine.process("0::/", V2)
    machine.v2("/sys/fs/cgroup", 512 * MB, 500 * MB)
    stream = Watched(io.BytesIO(b"x"), "churn/7 model.joblib", root=machine.root)

    with pytest.raises(
        NoRoom, match=r"^churn/7 model.joblib: takes more memory .* when 12 MB of 512 MB were free \(/sys/"
    ):
        stream.read(1)


# In a real control group

Limited = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def limited() -> Iterator[Limited]:
    """Run a script, by the name of what is to be done, in a memory cgroup of 512 MB."""
    with small_machine() as group:
        if isinstance(group, str):
            pytest.skip(group)

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = group.command("-c", SCRIPT, str(group.file), *arguments)
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)

        yield run


SCRIPT = """
import sys, zlib
from pathlib import Path
from app import loaders, memory
from app.errors import NoRoom
from app.memory import MB
limit_file, task, *paths = sys.argv[1:]

def load(path, wrap):
    with open(path, "rb", buffering=0) as file:
        return loaders.load("joblib", wrap(file), "churn/7 model.joblib", max_bytes=1 << 40).value

found = memory.room()
if task == "room":
    print(found.limit_bytes, found.source == limit_file, found.free_bytes // MB)
elif task == "load":
    load(paths[0], lambda file: file)
    print("loaded")
elif task == "watched":
    try:
        load(paths[0], lambda file: memory.Watched(file, "churn/7 model.joblib"))
        print("loaded")
    except NoRoom as error:
        print("refused:", error)
elif task == "check":
    for path in paths:
        with open(path, "rb") as file:
            part = memory.Stored("joblib", Path(path).stat().st_size, file.read(memory.HEAD_BYTES))
        try:
            memory.check(memory.room(), memory.Estimator().estimate([part]).peak_bytes, path)
            print("loaded", load(path, lambda file: file) is not None)
        except NoRoom as error:
            print("refused:", error)
elif task == "cache":
    for _ in range(3):  # read again and again, its pages become active
        with open(paths[0], "rb", buffering=0) as file:
            while file.read(MB):
                pass
    free = memory.room().free_bytes
    block = bytearray(free - 48 * MB)
    for start in range(0, len(block), 4096):
        block[start] = 1
    print("free", free // MB)
print("alive")
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of 500 MB, which cannot be in a group of 512 MB beside an interpreter."""
    path = tmp_path_factory.mktemp("large") / "large.joblib"
    model = LinearRegression()
    model.coef_, model.intercept_ = np.zeros(500 * MB // 8), 0.0
    joblib.dump(model, path)
    return path


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose 700 KB become 700 MB."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.joblib"
    model = LinearRegression()
    model.coef_, model.intercept_ = np.zeros(700 * MB // 8), 0.0
    joblib.dump(model, path, compress=("zlib", 3))
    return path


def test_a_process_in_a_memory_cgroup_reads_its_limit(limited):
    run = limited("room")
    limit, source, free = run.stdout.split()[:3]

    assert int(limit) == LIMIT_BYTES
    assert source == "True"
    assert 400 < int(free) < 512


def test_without_a_check_the_kernel_ends_the_process(limited, large):
    run = limited("load", str(large))

    assert run.returncode == -signal.SIGKILL
    assert run.stdout == ""


def test_a_process_that_checks_refuses_what_does_not_fit_and_lives(limited, large, tmp_path):
    small = tmp_path / "small.joblib"
    joblib.dump(linear(8), small)
    run = limited("check", str(large), str(small))
    first, second, last = run.stdout.splitlines()

    assert run.returncode == 0
    assert first.startswith(f"refused: {large}: needs about ")
    assert " MB of 512 MB are free (/sys/fs/cgroup" in first
    assert (second, last) == ("loaded True", "alive")


@pytest.mark.parametrize("name", ["large", "bomb"])
def test_a_watched_load_that_was_not_expected_to_be_so_large_stops_and_lives(limited, name, request):
    run = limited("watched", str(request.getfixturevalue(name)))

    assert run.returncode == 0
    assert run.stdout.startswith("refused: churn/7 model.joblib: takes more memory to load than was expected")
    assert run.stdout.endswith("alive\n")


def test_file_cache_in_a_real_group_is_as_free_as_it_is_said_to_be(limited, large):
    run = limited("cache", str(large))

    assert run.returncode == 0
    assert int(run.stdout.split()[1]) > 400
