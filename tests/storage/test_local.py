"""The directory: nothing leaves it, nothing half-written is seen, and processes do not overwrite each other."""

import asyncio
import hashlib
import os
import subprocess
import sys

import pytest

from app.errors import ObjectNotFound, PreconditionFailed, StorageDenied, StorageUnavailable
from app.storage.local import LocalStorage

BODY = b"model" * 1000


@pytest.fixture
def root(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def storage(root):
    return LocalStorage(root)


BAD_KEYS = [
    "",
    "/etc/passwd",
    "../outside",
    "a/../../outside",
    "a/./b",
    "a//b",
    "a/",
    "..",
    "nul\0byte",
    ".diskless/lock",
    "a/.diskless-0123.tmp",
]


@pytest.mark.parametrize("key", BAD_KEYS)
async def test_a_key_that_is_no_key_is_refused(storage, root, key):
    (root.parent / "outside").write_bytes(BODY)

    for call in (storage.get, storage.head, storage.delete, lambda key: storage.put(key, BODY)):
        with pytest.raises(StorageDenied):
            await call(key)
    assert not root.exists()
    assert (root.parent / "outside").read_bytes() == BODY


@pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../../", ".diskless/"])
async def test_a_prefix_leads_nowhere_else(storage, root, prefix):
    root.mkdir()

    with pytest.raises(StorageDenied):
        await storage.list(prefix)


async def test_a_link_out_of_the_directory_is_not_followed(storage, root):
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(BODY)
    root.mkdir()
    (root / "file").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (root / "circle").symlink_to(root / "circle")

    assert await storage.list("") == []
    for key in ("file", "folder/secret", "folder/new", "circle"):
        for call in (storage.get, storage.head, storage.delete, lambda key: storage.put(key, b"x")):
            with pytest.raises(StorageDenied):
                await call(key)
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_bytes() == BODY


async def test_a_link_inside_the_directory_is_an_object(storage, root):
    put = await storage.put("versions/7", BODY)
    (root / "latest").symlink_to(root / "versions" / "7")

    assert (await storage.get("latest")).body == BODY
    assert [info.key for info in await storage.list("")] == ["latest", "versions/7"]

    await storage.put("latest", b"other")

    assert await storage.head("versions/7") == put


async def test_the_etag_is_the_contents_sha256(storage):
    put = await storage.put("a", BODY)

    assert put.etag == hashlib.sha256(BODY).hexdigest()
    assert await storage.head("a") == put


async def test_an_edit_by_hand_changes_the_etag(storage, root):
    await storage.put("a", b"one")
    for settled in (False, True):
        for body in (b"two", b"six"):  # as long as each other
            (root / "a").write_bytes(body)
            if settled:
                os.utime(root / "a", ns=(0, len(body) + body[0]))  # long ago: from now on the ETag is remembered
            for _ in range(2):
                assert (await storage.head("a")).etag == hashlib.sha256(body).hexdigest()


async def test_a_settled_file_is_digested_once(storage, root, monkeypatch):
    digested = []
    file_digest = hashlib.file_digest

    def count(file, algorithm):
        digested.append(file.name)
        return file_digest(file, algorithm)

    await storage.put("a", BODY)
    os.utime(root / "a", ns=(0, 0))
    monkeypatch.setattr(hashlib, "file_digest", count)
    for start in range(0, len(BODY), 500):
        await storage.get("a", span=range(start, start + 500))

    assert len(digested) == 1


async def test_files_being_written_and_the_lock_are_not_listed(storage, root):
    await storage.put("folder/a", BODY)
    (root / "folder" / ".diskless-0123456789abcdef.tmp").write_bytes(b"half")

    assert (root / ".diskless" / "lock").exists()
    assert [info.key for info in await storage.list("")] == ["folder/a"]
    assert [info.key for info in await storage.list("folder/", recursive=False)] == ["folder/a"]


async def test_a_write_that_fails_leaves_the_old_bytes_and_no_rest(storage, root, monkeypatch):
    await storage.put("a", BODY)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageUnavailable, match="No space left"):
        await storage.put("a", b"new")

    assert (await storage.get("a")).body == BODY
    assert sorted(path.name for path in root.iterdir()) == [".diskless", "a"]


async def test_a_refused_write_leaves_no_rest(storage, root):
    await storage.put("a", BODY)
    with pytest.raises(PreconditionFailed):
        await storage.put("a", b"new", if_absent=True)

    assert sorted(path.name for path in root.iterdir()) == [".diskless", "a"]


async def test_reading_writes_nothing(storage, root):
    root.mkdir()
    (root / "a").write_bytes(BODY)

    await storage.get("a")
    await storage.list("")
    await storage.delete("none")

    assert [path.name for path in root.iterdir()] == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_read_only_directory_can_be_read(storage, root):
    await storage.put("a", BODY)
    root.chmod(0o500)
    try:
        assert (await storage.get("a")).body == BODY
        with pytest.raises(StorageDenied, match="Permission denied"):
            await storage.put("b", BODY)
    finally:
        root.chmod(0o700)


async def test_a_directory_that_is_not_there_is_empty(storage):
    assert await storage.list("") == []
    assert await storage.list("models/", recursive=False) == []
    with pytest.raises(ObjectNotFound):
        await storage.get("a")


async def test_a_name_is_a_file_or_a_folder(storage):
    await storage.put("a", BODY)
    await storage.put("folder/b", BODY)

    for key in ("a/b", "folder"):
        with pytest.raises(StorageDenied, match="same name"):
            await storage.put(key, BODY)
    for key in ("a/b", "folder"):
        with pytest.raises(ObjectNotFound):
            await storage.get(key)


async def test_files_have_the_rights_that_the_user_gives_to_new_files(storage, root):
    await storage.put("a", BODY)
    (root / "b").touch()

    assert (root / "a").stat().st_mode == (root / "b").stat().st_mode


ADD_LINES = """
import asyncio, sys
from pathlib import Path
from app.errors import PreconditionFailed
from app.storage.local import LocalStorage

async def main(root, name):
    storage = LocalStorage(Path(root))
    for number in range(25):
        while True:
            seen = await storage.get("lines")
            try:
                await storage.put("lines", seen.body + f"{name} {number}\\n".encode(), if_match=seen.info.etag)
                break
            except PreconditionFailed:
                pass

asyncio.run(main(*sys.argv[1:]))
"""


async def test_no_process_loses_what_another_wrote(storage, root):
    await storage.put("lines", b"")
    writers = [subprocess.Popen([sys.executable, "-c", ADD_LINES, str(root), name]) for name in "abc"]
    torn = 0
    while any(writer.poll() is None for writer in writers):
        body = (await storage.get("lines")).body
        torn += not (body == b"" or body.endswith(b"\n"))
        await asyncio.sleep(0)

    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert torn == 0
    lines = (await storage.get("lines")).body.decode().split("\n")[:-1]
    assert sorted(lines) == sorted(f"{name} {number}" for name in "abc" for number in range(25))
    assert [line for line in lines if line.startswith("a")] == [f"a {number}" for number in range(25)]


async def test_of_many_processes_that_create_one_wins(storage, root):
    code = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom app.errors import PreconditionFailed\n"
        "from app.storage.local import LocalStorage\n"
        "try:\n asyncio.run(LocalStorage(Path(sys.argv[1])).put('a', sys.argv[2].encode(), if_absent=True))\n"
        "except PreconditionFailed:\n sys.exit(7)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(root), name]) for name in "abcd"]
    codes = [writer.wait() for writer in writers]

    assert sorted(codes) == [0, 7, 7, 7]
    assert (await storage.get("a")).body == b"abcd"[codes.index(0) :][:1]
