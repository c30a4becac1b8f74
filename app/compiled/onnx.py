"""Tree ensembles on onnxruntime, from arrays that were checked: a graph of one node, written here and never read from a file.

The messages are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), the operator is `TreeEnsemble` of
ai.onnx.ml 5 (https://onnx.ai/onnx/operators/onnx_aionnxml_TreeEnsemble.html). onnxruntime follows what a graph says without
looking: give it only trees whose every index is known to be good.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from app.errors import LoadFailed
from app.signature import Array

MAX_DEPTH = 400  # onnxruntime builds a tree by recursion
MAX_LEAVES = 1 << 24  # numbers that are exact in float32

_IR_VERSION = 10
_OPSETS = (("", 21), ("ai.onnx.ml", 5))
_ELEMENT_TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.float64): 11}
_INT, _TENSOR, _INTS = 2, 4, 7  # AttributeProto.AttributeType


def ensemble(
    *,
    width: int,
    targets: int,
    roots: Array,
    features: Array,
    thresholds: Array,
    right: Array,
    right_is_leaf: Array,
    left: Array,
    left_is_leaf: Array,
    missing_goes_left: Array | None,
    leaf_targets: Array,
    leaf_weights: Array,
) -> bytes:
    """Return a model that adds up, for each of `targets`, the weights of the leaves that a row falls into.

    `features`, `thresholds`, `right` and `left` have a value for each inner node: it sends a row left whose value is at most the
    threshold. A child is the position of an inner node or, where `…_is_leaf`, of a leaf. Thresholds and weights are of the dtype
    of the input X, of shape (rows, `width`), and of the output Y, of shape (rows, `targets`).
    """
    attributes = [
        _tensor("nodes_modes", np.zeros(len(features), np.uint8)),  # BRANCH_LEQ
        _tensor("nodes_splits", thresholds),
        _tensor("leaf_weights", leaf_weights),
        _ints("tree_roots", roots),
        _ints("nodes_featureids", features),
        _ints("nodes_truenodeids", left),
        _ints("nodes_trueleafs", left_is_leaf),
        _ints("nodes_falsenodeids", right),
        _ints("nodes_falseleafs", right_is_leaf),
        _ints("leaf_targetids", leaf_targets),
        _field(1, b"n_targets") + _field(3, targets) + _field(20, _INT),
    ]
    if missing_goes_left is not None:
        attributes.append(_ints("nodes_missing_value_tracks_true", missing_goes_left))
    node = b"".join(
        (
            _field(1, b"X"),
            _field(2, b"Y"),
            _field(4, b"TreeEnsemble"),
            *(_field(5, attribute) for attribute in attributes),
            _field(7, b"ai.onnx.ml"),
        )
    )
    element = _ELEMENT_TYPES[thresholds.dtype]
    graph = b"".join(
        (
            _field(1, node),
            _field(2, b"trees"),
            _field(11, _value("X", element, width)),
            _field(12, _value("Y", element, targets)),
        )
    )
    opsets = b"".join(_field(8, _field(1, domain.encode()) + _field(2, version)) for domain, version in _OPSETS)
    return _field(1, _IR_VERSION) + _field(7, graph) + opsets


def session(model: bytes) -> Callable[[Array], Array]:
    """Return the function from X to Y of a model that `ensemble` made. It starts no thread, and survives a fork.

    Raises `LoadFailed` where onnxruntime is missing, or cannot make a session of the model.
    """
    # It would report its use to Microsoft: from a thread of its own, which no process that forks may have, and from a database
    # that it keeps on the disk.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise LoadFailed("is computed by onnxruntime, which is not installed") from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # one node
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    try:
        made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each of its states is a class of its own
        raise LoadFailed(f"cannot be computed by onnxruntime: {error}") from error
    run, outputs = made._sess.run, ["Y"]

    def compute(rows: Array) -> Array:
        return run(outputs, {"X": rows}, None)[0]  # type: ignore[no-any-return]

    return compute


def _value(name: str, element: int, columns: int) -> bytes:
    shape = _field(1, _field(2, b"rows")) + _field(1, _field(1, columns))
    return _field(1, name.encode()) + _field(2, _field(1, _field(1, element) + _field(2, shape)))


def _tensor(name: str, array: Array) -> bytes:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    tensor = _field(1, array.size) + _field(2, _ELEMENT_TYPES[array.dtype]) + _field(9, little.tobytes())
    return _field(1, name.encode()) + _field(5, tensor) + _field(20, _TENSOR)


def _ints(name: str, numbers: Array) -> bytes:
    return _field(1, name.encode()) + _field(8, _packed(numbers)) + _field(20, _INTS)


def _packed(numbers: Array) -> bytes:
    """Return the varints of numbers from 0, all as long as the longest: a varint may have empty groups at its end."""
    length = max(1, -(-int(numbers.max(initial=0)).bit_length() // 7))
    groups = np.empty((len(numbers), length), np.uint8)
    for place in range(length):
        groups[:, place] = (numbers.astype(np.int64) >> 7 * place) & 0x7F
    groups[:, :-1] |= 0x80
    return groups.tobytes()


def _field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)
