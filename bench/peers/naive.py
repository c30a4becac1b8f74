"""What most people write: FastAPI, a typed body, and a model loaded with joblib, asked in an ordinary function."""

from typing import Any

import joblib
import models
import numpy as np
import pandas as pd
from fastapi import FastAPI
from pydantic import BaseModel, create_model

app = FastAPI()


class Answer(BaseModel):
    """One prediction for each row."""

    predictions: list[Any]


def add(name: str, method: str, columns: list[str] | None, words: list[str]) -> None:
    """Add the route of a model."""
    model = joblib.load(models.FOLDER / f"{name}.joblib")
    if columns is None:

        class Rows(BaseModel):
            instances: list[list[float]]

        @app.post(f"/{name}")
        def predict_arrays(body: Rows) -> Answer:
            return Answer(predictions=getattr(model, method)(np.array(body.instances)).tolist())

    else:
        fields: dict[str, Any] = {column: (str | None if column in words else float | None, ...) for column in columns}
        Row = create_model("Row", **fields)

        class Records(BaseModel):
            instances: list[Row]

        @app.post(f"/{name}")
        def predict_frame(body: Records) -> Answer:
            frame = pd.DataFrame([row.model_dump() for row in body.instances], columns=columns).fillna(value=np.nan)
            return Answer(predictions=getattr(model, method)(frame).tolist())


for _name, _kind in models.KINDS.items():
    add(_name, **_kind)
