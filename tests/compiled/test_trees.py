"""Ensembles of random trees in every way, against following each row by hand; and arrays that are not trees."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from app.compiled import container, op
from app.compiled.op import Malformed
from app.compiled.trees import Memberships, Trees
from app.errors import LoadFailed

ROOT = Path(__file__).parents[2]
RIGHT_IF_MISSING = 1 << 31


def ensemble(random, *, trees=5, splits=6, width=4, dtype=np.float32, columns=1, turns=1, accepts="any", missing=True):
    """Return an ensemble of random trees of up to `splits` inner nodes."""
    nodes, thresholds, roots, leaves = [], [], [], 0
    for _ in range(trees):
        start = len(nodes)
        roots.append(start)
        count = random.integers(0, splits + 1)
        left, open_nodes = {}, [0]
        size = 1
        for _ in range(count):
            place = open_nodes.pop(random.integers(len(open_nodes)))
            left[place] = size
            open_nodes += [size, size + 1]
            size += 2
        for place in range(size):
            if place in left:
                right = RIGHT_IF_MISSING * bool(missing and random.integers(2))
                nodes.append((start + left[place]) << 32 | int(random.integers(width)) + right)
                thresholds.append(random.choice([random.normal(), 0.0, np.inf if missing else 1.0]))
            else:
                nodes.append((start + place) << 32 | leaves)
                thresholds.append(np.inf)
                leaves += 1
    return Trees(
        estimator="Forest",
        width=width,
        accepts=accepts,
        nodes=np.array(nodes, np.int64),
        thresholds=np.array(thresholds).astype(dtype),
        roots=np.array(roots, np.int64),
        values=random.normal(size=(leaves, columns)),
        turns=turns,
        divisor=random.choice([None, float(trees)]),
        engine="walk",
        many=None,
        many_from_rows=1,
    )


def by_hand(trees, rows):
    sums = np.zeros((len(rows), trees.outputs))
    for sum_, row in zip(sums, rows.astype(trees.thresholds.dtype), strict=True):
        for number, root in enumerate(trees.roots):
            node = int(root)
            while (left := int(trees.nodes[node]) >> 32) != node:
                value = row[int(trees.nodes[node]) & 0x7FFFFFFF]
                if math.isnan(value):
                    node = left + bool(trees.nodes[node] & RIGHT_IF_MISSING)
                else:
                    node = left + bool(value > trees.thresholds[node])
            leaf = trees.values[int(trees.nodes[node]) & 0x7FFFFFFF]
            if trees.turns > 1:
                sum_[number % trees.turns] += leaf[0]
            else:
                sum_ += leaf
    return sums if trees.divisor is None else sums / trees.divisor


def stored(operation, change=None):
    """Return the operation as it is read back, after `change` of its document or its arrays."""
    arrays = {}
    document = op.encode(operation, arrays)
    if change is not None:
        change(document, arrays)
    body = container.write(document, arrays)
    return op.decode(*container.read(io.BytesIO(body), len(body)))


def rows_of(random, count, width=4):
    rows = random.choice([0.0, 1.0, -1.0, 0.5, np.inf, -np.inf, np.nan, 1e39, 3.4e38], size=(count, width))
    return np.where(random.random(rows.shape) < 0.6, random.normal(size=rows.shape), rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("columns", "turns"), [(1, 1), (3, 1), (1, 2), (1, 6)])
@pytest.mark.parametrize("splits", [0, 1, 7, 40, 200])
def test_every_way_ends_in_the_leaves_that_following_a_row_ends_in(dtype, columns, turns, splits):
    random = np.random.default_rng(splits + columns + 10 * turns)
    for count in (1, 2, 9, 70):
        trees = ensemble(random, trees=6, splits=splits, dtype=dtype, columns=columns, turns=turns)
        rows = rows_of(random, count)
        with np.errstate(over="ignore"):
            wanted = by_hand(trees, rows)
            for variant in trees.variants():
                assert np.array_equal(stored(variant).run(rows), wanted)


def test_walking_goes_on_with_those_rows_only_that_have_not_ended():
    random = np.random.default_rng(0)
    trees = ensemble(random, trees=40, splits=120)
    rows = rows_of(random, 300)

    assert trees._levels > 8
    with np.errstate(over="ignore"):
        assert np.array_equal(trees.run(rows), by_hand(trees, rows))


def chain(length):
    """Return an ensemble of one tree that asks for one threshold after the other."""
    places = np.arange(2 * length + 1)
    inner = places % 2 == 0
    inner[-1] = False
    nodes = np.where(inner, (places + 1) << 32, places << 32)
    nodes[~inner] |= np.arange(length + 1)
    thresholds = np.where(inner, places / 2, np.inf)
    values = np.arange(length + 1.0)[:, None]
    return Trees(
        "Chain", 1, "any", nodes, thresholds, np.zeros(1, np.int64), values, 1, None, "walk", None, 1
    )  # fmt: skip


def test_a_tree_may_be_a_chain_but_not_one_without_end():
    rows = np.arange(-1, 500.0)[:, None]

    assert np.array_equal(stored(chain(450)).run(rows), by_hand(chain(450), rows))
    assert [variant.engine for variant in chain(450).variants()] == ["walk"]
    assert stored(chain(4096)).run(rows[-1:])[0, 0] == 499
    with pytest.raises(Malformed, match="levels"):
        stored(chain(4097))
    with pytest.raises(Malformed, match="can only be walked"):
        stored(chain(401).with_engine("onnx"))
    with pytest.raises(Malformed, match="too large a tree for masks"):
        stored(chain(64).with_engine("masks"))
    assert stored(chain(63).with_engine("masks")).run(np.array([[62.5]]))[0, 0] == 63


def set_to(name, place, value):
    def change(document, arrays):
        array = arrays[document[name]["array"]].copy()
        array[place] = value
        arrays[document[name]["array"]] = array

    return change


def replaced(name, make):
    def change(document, arrays):
        arrays[document[name]["array"]] = make(arrays[document[name]["array"]])

    return change


def said(name, value):
    return lambda document, arrays: document.update({name: value})


def node(left, here):
    return (left << 32) | here


@pytest.mark.parametrize(
    "change",
    [
        set_to("nodes", 0, -1),
        set_to("nodes", 0, node(-1, 0)),
        set_to("nodes", 0, node(0, 0)),  # the root a leaf: nobody's children
        set_to("nodes", 0, node(3, 0)),
        set_to("nodes", 0, node(5, 0)),
        set_to("nodes", 0, node(1 << 20, 0)),
        set_to("nodes", 0, node(0x7FFFFFFF, 0)),
        set_to("nodes", 0, node(1, 4)),
        set_to("nodes", 0, node(1, 0x7FFFFFFF)),
        set_to("nodes", 1, node(0, 0)),
        set_to("nodes", 1, node(1, 2)),  # a leaf of a value that there is not
        set_to("nodes", 1, node(1, 0x7FFFFFFF)),
        set_to("nodes", 1, node(1, RIGHT_IF_MISSING)),
        set_to("nodes", 3, node(1, 0)),  # the children of another
        set_to("nodes", 3, node(4, 0)),  # a root that is another's child
        set_to("thresholds", 0, np.nan),
        set_to("thresholds", 1, 1.0),
        set_to("thresholds", 1, -np.inf),
        set_to("thresholds", 1, np.nan),
        set_to("roots", 0, 1),
        set_to("roots", 1, 0),
        set_to("roots", 1, 2),
        set_to("roots", 1, 4),
        set_to("roots", 1, -1),
        set_to("roots", 1, 1 << 40),
        set_to("values", (0, 0), np.inf),
        set_to("values", (0, 0), np.nan),
        replaced("nodes", lambda array: array.astype(np.int32)),
        replaced("nodes", lambda array: array.astype(np.uint64)),
        replaced("nodes", lambda array: array.astype(np.float64)),
        replaced("nodes", lambda array: array[:3]),
        replaced("nodes", lambda array: array[:0]),
        replaced("nodes", lambda array: array.reshape(1, -1)),
        replaced("thresholds", lambda array: array.view(np.int32)),
        replaced("thresholds", lambda array: array[:3]),
        replaced("thresholds", lambda array: np.append(array, np.float32(1))),
        replaced("thresholds", lambda array: array.reshape(2, 2)),
        replaced("roots", lambda array: array.astype(np.int32)),
        replaced("roots", lambda array: array[:0]),
        replaced("roots", lambda array: array[:1]),
        replaced("roots", lambda array: array.reshape(1, -1)),
        replaced("values", lambda array: array.astype(np.float32)),
        replaced("values", lambda array: array[:, :0]),
        replaced("values", lambda array: array[:0]),
        replaced("values", lambda array: array[:1]),
        replaced("values", lambda array: array[:, 0]),
        said("width", 0),
        said("width", 3),
        said("width", -1),
        said("width", 1 << 40),
        said("width", 4.0),
        said("width", True),
        said("turns", 0),
        said("turns", -2),
        said("turns", 3),
        said("turns", 1 << 70),
        said("divisor", 0.0),
        said("divisor", math.inf),
        said("divisor", math.nan),
        said("divisor", "2"),
        said("engine", "numba"),
        said("engine", None),
        said("many", "every"),
        said("many_from_rows", 0),
        said("many_from_rows", None),
        said("accepts", "all"),
        said("estimator", 7),
        said("more", 1),
        lambda document, arrays: document.pop("width"),
        lambda document, arrays: document["nodes"].update(array="9"),
    ],
)
@pytest.mark.parametrize("engine", ["walk", "onnx", "masks"])
def test_arrays_that_are_no_trees_are_refused(change, engine):
    trees = Trees(
        estimator="Forest",
        width=4,
        accepts="any",
        nodes=np.array([node(1, 3), node(1, 0), node(2, 1), node(3, 1)]),
        thresholds=np.array([0.5, np.inf, np.inf, np.inf], np.float32),
        roots=np.array([0, 3]),
        values=np.array([[1.0], [2.0]]),
        turns=1,
        divisor=None,
        engine=engine,
        many=None,
        many_from_rows=1,
    )
    assert stored(trees).run(np.array([[0, 0, 0, 1.0]])).tolist() == [[4.0]]

    with pytest.raises(LoadFailed):
        stored(trees, change)


@pytest.mark.parametrize("seed", range(2))
def test_arrays_with_random_numbers_in_them_are_refused_or_computed(seed):
    random = np.random.default_rng(seed)
    outcomes = {True: 0, False: 0}
    interesting = [
        -1,
        0,
        1,
        2,
        3,
        5,
        1 << 31,
        (1 << 31) - 1,
        1 << 32,
        (1 << 32) - 1,
        1 << 62,
        -(1 << 63),
        (1 << 63) - 1,
    ]
    for _ in range(1200):
        columns, turns = [(1, 1), (2, 1), (1, 2)][random.integers(3)]
        trees = ensemble(random, trees=2, splits=5, columns=columns, turns=turns)
        engine = random.choice(["walk", "onnx", "masks"])

        def change(document, arrays, random=random):
            name = ["nodes", "nodes", "nodes", "roots", "thresholds", "values"][random.integers(6)]
            array = arrays[document[name]["array"]].copy()
            for _ in range(random.integers(1, 3)):
                place = random.integers(array.size)
                if array.dtype == np.int64:
                    old = int(array.flat[place])
                    number = (
                        int(random.choice(interesting)) if random.integers(2) else old ^ 1 << int(random.integers(63))
                    )
                    halves = [
                        number,
                        old & ~0xFFFFFFFF | int(random.integers(8)),
                        old & 0xFFFFFFFF | int(random.integers(12)) << 32,
                    ]
                    array.flat[place] = halves[random.integers(3)]
                else:
                    array.flat[place] = random.choice([np.nan, np.inf, -np.inf, 0.0, 1e300])
            arrays[document[name]["array"]] = array

        try:
            with np.errstate(all="ignore"):
                made = stored(trees.with_engine(engine if trees._suits(engine) else "walk"), change)
        except LoadFailed:
            outcomes[False] += 1
            continue
        rows = rows_of(random, 3)
        with np.errstate(all="ignore"):
            assert np.array_equal(made.run(rows), by_hand(made, rows))
        outcomes[True] += 1

    assert min(outcomes.values()) > 50


MEMBERSHIPS = Memberships(
    estimator="Boosting",
    width=3,
    columns=np.array([2, 0]),
    counts=np.array([3, 2]),
    categories=np.array([-1.5, 0.0, 7.0, 1.0, 2.0]),
    of=np.array([0, 1, 0]),
    starts=np.array([0, 4, 7]),
    outcomes=np.array([1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1]),
)


def test_categories_become_columns_of_what_sets_say_of_them():
    rows = np.array([[1, 5, -1.5], [2, 5, 7], [3, 5, 0], [np.nan, 5, np.nan], [np.inf, 5, -np.inf], [1.5, 5, 8]])

    found = stored(MEMBERSHIPS).run(rows)

    assert np.array_equal(found[:, :3], rows, equal_nan=True)
    assert found[:, 3:].tolist() == [[1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    "change",
    [
        set_to("columns", 0, 3),
        set_to("columns", 0, -1),
        set_to("counts", 0, 4),
        set_to("counts", 0, -3),
        set_to("counts", 0, (1 << 62) + 3),
        set_to("counts", slice(None), 1 << 62),
        set_to("categories", 0, np.nan),
        set_to("of", 0, 2),
        set_to("of", 2, 1 << 40),
        set_to("starts", 2, 8),
        set_to("starts", 2, -1),
        set_to("starts", 2, (1 << 63) - 1),
        set_to("outcomes", 0, -1),
        replaced("outcomes", lambda array: array[:10]),
        replaced("of", lambda array: array[:2]),
        replaced("columns", lambda array: array[:1]),
        replaced("categories", lambda array: array.astype(np.int64)),
        replaced("counts", lambda array: array.astype(np.float64)),
        said("width", 2),
        said("width", 1 << 70),
    ],
)
def test_sets_that_do_not_fit_are_refused(change):
    with pytest.raises(Malformed):
        stored(MEMBERSHIPS, change)


def test_threads_that_run_the_same_ensemble_do_not_disturb_each_other():
    random = np.random.default_rng(3)
    trees = ensemble(random, trees=30, splits=60, columns=2)
    batches = [rows_of(random, 50 + number) for number in range(4)]
    with np.errstate(all="ignore"):
        wanted = [trees.run(rows) for rows in batches]
    wrong = []

    def work(number):
        for variant in trees.variants():
            for _ in range(30):
                with np.errstate(all="ignore"):
                    if not np.array_equal(variant.run(batches[number]), wanted[number]):
                        wrong.append((number, variant.engine))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong


FORKING = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
from compiled import test_trees as t
from app.compiled import op

trees = t.ensemble(np.random.default_rng(0), trees=20, splits=30, columns=2).with_engine("onnx")
read = t.stored(trees)
assert "_session" in read.__dict__, "it is made as it is read"
assert "sklearn" not in sys.modules and "pandas" not in sys.modules and "scipy" not in sys.modules
assert len(os.listdir("/proc/self/task")) == 1, os.listdir("/proc/self/task")
rows = t.rows_of(np.random.default_rng(1), 64)
np.seterr(all="ignore")
wanted = t.by_hand(trees, rows)
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(np.array_equal(read.run(rows), wanted) for _ in range(50)) else 1)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert np.array_equal(read.run(rows), wanted)
assert len(os.listdir("/proc/self/task")) == 1
print("answered")
"""


def test_a_session_starts_no_thread_writes_no_file_and_answers_in_forked_processes(tmp_path):
    code = FORKING.format(root=str(ROOT), tests=str(ROOT / "tests"))
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)

    assert done.stdout == "answered\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_an_ensemble_that_is_walked_or_masked_needs_no_onnxruntime():
    code = FORKING.format(root=str(ROOT), tests=str(ROOT / "tests")).split("read = ")[0]
    code += """
small = t.ensemble(np.random.default_rng(0), trees=20, splits=6)
for made in (t.stored(small), t.stored(small.with_engine("masks"))):
    made.run(np.zeros((3, 4)))
print(*sorted(name for name in ("onnxruntime", "sklearn", "scipy", "pandas") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)

    assert done.stdout == "\n", done.stderr
