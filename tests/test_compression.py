"""Compressed bodies: however many come, and whoever goes meanwhile, one at a time becomes what it is."""

import asyncio
import gzip
import threading

from app.api import compression
from app.api.compression import Decompressor


def test_one_body_is_decompressed_at_a_time_whoever_goes_meanwhile(monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    decompress, at_it, most = compression.decompress, set(), 0

    def slowly(body: bytes, max_bytes: int) -> bytes:
        nonlocal most
        at_it.add(threading.get_ident())
        most = max(most, len(at_it))
        begun.set()
        assert may_end.wait(60)
        at_it.remove(threading.get_ident())
        return decompress(body, max_bytes)

    async def work() -> bytes:
        decompressor = Decompressor(1000)
        gone = [asyncio.create_task(decompressor.run(gzip.compress(b"of one who goes")))]
        assert await asyncio.to_thread(begun.wait, 60)
        gone[0].cancel()
        for _ in range(7):
            gone.append(asyncio.create_task(decompressor.run(gzip.compress(b"of another"))))
            await asyncio.wait((gone[-1],), timeout=0.005)  # in which it could begin, if it were let
            gone[-1].cancel()
        last = asyncio.create_task(decompressor.run(gzip.compress(b"the last")))
        await asyncio.wait((last,), timeout=0.005)
        may_end.set()
        return await last

    monkeypatch.setattr(compression, "decompress", slowly)
    assert asyncio.run(work()) == b"the last"
    assert most == 1
