"""mosec, whose workers are handed the requests of a batch: the models as in `handwritten`, all rows of a batch at once."""

from __future__ import annotations

from typing import Any

import models
import orjson
from mosec import Server, Worker


class Predictor(Worker):
    """Answers for one model."""

    name = ""

    def __init__(self) -> None:
        super().__init__()
        self._answer = models.onnx(self.name)

    def deserialize(self, data: bytes) -> Any:
        """Return the rows of a request."""
        return orjson.loads(data)["instances"]

    def serialize(self, data: Any) -> bytes:
        """Return the bytes of an answer."""
        return orjson.dumps({"predictions": data})

    def forward(self, data: list[list[Any]]) -> list[Any]:
        """Answer the requests of a batch."""
        found = self._answer([row for rows in data for row in rows])
        answers, start = [], 0
        for rows in data:
            answers.append(found[start : start + len(rows)])
            start += len(rows)
        return answers


# mosec imports a worker's class by its name in this module
WORKERS = [type(f"Predictor_{name}", (Predictor,), {"name": name, "__module__": __name__}) for name in models.KINDS]
globals().update({worker.__name__: worker for worker in WORKERS})

if __name__ == "__main__":
    server = Server()
    for worker in WORKERS:
        server.append_worker(worker, max_batch_size=64, max_wait_time=5, route=f"/{worker.name}")
    server.run()
