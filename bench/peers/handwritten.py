"""What somebody would write in a day to be fast: a bare ASGI application, orjson, and the model inline, unchecked.

`app` answers from onnxruntime in float32, `reference` from scikit-learn; each under the path of the model's name.
"""

from __future__ import annotations

import os
from typing import Any

import models
import orjson

LOADERS = {"onnx": models.onnx, "scikit-learn": models.scikit_learn}
MODELS = {f"/{name}": LOADERS[os.environ["BENCH_RUNTIME"]](name) for name in models.KINDS}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer one request."""
    if scope["type"] != "http":
        return
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    answer = orjson.dumps({"predictions": MODELS[scope["path"]](orjson.loads(body)["instances"])})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
