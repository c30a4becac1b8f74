"""Models as the hand-written services call them: rows as JSON has them in, lists out, and nothing is checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(os.environ["BENCH_MODELS"])
KINDS = json.loads((FOLDER / "kinds.json").read_text())  # name: method, columns and words (where it takes a DataFrame)

Answer = Callable[[list[Any]], Any]


def onnx(name: str) -> Answer:
    """Return the model on onnxruntime in float32, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(FOLDER / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    output = [session.get_outputs()[-1].name]  # the probabilities, which follow the label; or the only one
    run, columns, words = session.run, KINDS[name]["columns"], KINDS[name]["words"]
    if columns is None:
        return lambda rows: run(output, {"X": np.array(rows, np.float32)})[0].tolist()
    numbers = [column for column in columns if column not in words]

    def of_columns(rows: list[Any]) -> Any:
        feed: dict[str, Any] = {
            column: np.array([row[column] for row in rows], np.float32).reshape(-1, 1) for column in numbers
        }
        for column in words:
            feed[column] = np.array([row[column] or "" for row in rows], object).reshape(-1, 1)
        return run(output, feed)[0].tolist()

    return of_columns


def scikit_learn(name: str) -> Answer:
    """Return the model as it was saved."""
    import joblib
    import pandas

    method = getattr(joblib.load(FOLDER / f"{name}.joblib"), KINDS[name]["method"])
    columns = KINDS[name]["columns"]
    if columns is None:
        return lambda rows: method(np.array(rows)).tolist()
    return lambda rows: method(pandas.DataFrame(rows, columns=columns).fillna(value=np.nan)).tolist()
