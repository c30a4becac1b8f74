"""Compressed bodies: however many come, and whoever goes meanwhile, one at a time becomes what it is."""

import asyncio
import gzip
import threading
from concurrent.futures import ThreadPoolExecutor

from app.api.compression import Decompressor


def test_one_body_is_decompressed_at_a_time_whoever_goes_meanwhile():
    zeros = gzip.compress(bytes(64_000_000), 1)

    async def work() -> tuple[bytes, int]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8, "decompressing"))
        decompressor = Decompressor(100_000_000)
        for _ in range(8):
            asked = asyncio.create_task(decompressor.run(zeros))
            await asyncio.wait((asked,), timeout=0.005)  # it has begun
            asked.cancel()
        last = await decompressor.run(gzip.compress(b"the last"))
        return last, sum(thread.name.startswith("decompressing") for thread in threading.enumerate())

    last, threads = asyncio.run(work())
    assert last == b"the last"
    assert threads <= 2  # the first may not know yet that it could take the last one, too
