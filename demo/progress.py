"""One line for each step of the demo: what, while it lasts; how long, when it is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Print `what` now and its seconds at the end. A step that fails or is interrupted ends its line without them."""
    started = time.monotonic()
    print(f"{what:<52}", end="", flush=True)
    try:
        yield
    except BaseException:
        print(flush=True)
        raise
    print(f"{time.monotonic() - started:5.1f} s", flush=True)
