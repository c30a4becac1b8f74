"""The least that uvicorn can be asked for: the same JSON to anything."""

from __future__ import annotations

from typing import Any

BODY = b'{"predictions":[[0.5,0.5]]}'
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))],
}
END = {"type": "http.response.body", "body": BODY}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer one request."""
    await send(START)
    await send(END)
