"""Turn every model into ONNX in float32, as `skl2onnx` does it by default."""

from __future__ import annotations

import copy
from typing import Any

import joblib
import models
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, StringTensorType


def convert(name: str, columns: list[str] | None, words: list[str]) -> bytes:
    """Return the bytes of a model."""
    model = joblib.load(models.FOLDER / f"{name}.joblib")
    options: dict[str, Any] = (
        {} if hasattr(model, "predict") and not hasattr(model, "predict_proba") else {"zipmap": False}
    )
    if columns is None:
        inputs = [("X", FloatTensorType([None, model.n_features_in_]))]
    else:
        inputs = [
            (column, StringTensorType([None, 1]) if column in words else FloatTensorType([None, 1]))
            for column in columns
        ]
        model = copy.deepcopy(model)
        for _, pipeline, names in model[0].transformers_:
            if set(names) <= set(words):
                pipeline[0].missing_values = ""  # ONNX has no missing string
    return to_onnx(model, initial_types=inputs, options=options).SerializeToString()


if __name__ == "__main__":
    for _name, _kind in models.KINDS.items():
        body = convert(_name, _kind["columns"], _kind["words"])
        (models.FOLDER / f"{_name}.onnx").write_bytes(body)
