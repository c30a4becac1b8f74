"""Where models come from: every row of the table of modes, on the real server, and the proof that cloud-only writes nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.model_storage import ModelStorageManager
from app.settings import Mode, load_settings
from demo.s3 import Credentials
from tests.faults import FOR_EVER, drop
from tests.repository import ROWS, classifier, dumped, expected, linear, put, scaler, serving
from tests.service import COMMAND, clean_environment, r2_environment, running

ONE = [[1.0, 1.0, 1.0]]
KEY = "models/fraud/1/model.joblib"


@pytest.fixture
def environment(monkeypatch, tmp_path, s3, bucket, proxy):
    """A function that sets the whole environment: R2 through the proxy, and what it is given. Returns the settings."""

    def set_environment(*, credentials=True, **values):
        for name in os.environ.keys() - clean_environment({}).keys():
            monkeypatch.delenv(name)
        r2 = r2_environment(proxy.url, bucket, s3.reader)
        r2["R2_MAX_ATTEMPTS"] = "1"
        local = {"ML_LOCAL_DIR": str(tmp_path / "local")}
        for name, value in ((r2 if credentials else {}) | local | values).items():
            monkeypatch.setenv(name, value)
        return load_settings()

    monkeypatch.chdir(tmp_path)
    return set_environment


@pytest.fixture
def published(s3, bucket, environment, monkeypatch, proxy):
    """A published model and a bare pair in the bucket."""
    environment()
    monkeypatch.setenv("R2_ACCESS_KEY_ID", s3.writer.access_key_id)
    monkeypatch.setenv("R2_SECRET_ACCESS_KEY", s3.writer.secret_access_key)
    manager = ModelStorageManager.from_env()
    manager.save("fraud", classifier(), scaler=scaler(), examples=ROWS[:5], compile=False)
    put(manager, "models/bare.joblib", dumped(linear(1)))
    proxy.seen.clear()
    return manager


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder but the storage's own records."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".diskless" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


async def answers(settings) -> None:
    """Serve what the settings say, once, from nothing; both models answer as they were fitted."""
    manager = ModelStorageManager.from_settings(settings)
    async with serving(manager) as served:
        outcome = await served.refresher.look_now()
        assert (outcome.error, outcome.failed) == (None, {})
        assert await served.ask(ROWS.tolist(), "fraud", "predict_proba") == expected()
        assert await served.ask(ONE, "bare") == pytest.approx([4])


def whole_reads(proxy) -> list[str]:
    """What was read of the artifacts from R2, and forget it."""
    keys = [seen.target for seen in proxy.seen if seen.method == "GET" and seen.target.endswith(".joblib")]
    proxy.seen.clear()
    return [key.rpartition("/")[2] for key in keys]


ARTIFACTS = ["bare.joblib", "model.joblib", "scaler.joblib"]


# The table


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ML_CLOUD_ONLY": "true"},
        {"DYNO": "web.1"},
        {"DYNO": "web.1", "ML_CLOUD_ONLY": "false"},
        {"DYNO": "web.1", "ML_CLOUD_ONLY": "false", "FORCE_R2": "true"},
        {"ML_CLOUD_ONLY": "true", "FORCE_R2": "true"},
    ],
)
async def test_cloud_only_reads_r2_and_neither_writes_nor_reads_a_local_copy(
    environment, published, proxy, tmp_path, values
):
    local = tmp_path / "local"
    (local / "models").mkdir(parents=True)
    (local / "models/bare.joblib").write_bytes(dumped(linear(99)))
    before = files(local)
    settings = environment(**values)
    assert settings.mode is Mode.CLOUD_ONLY
    for _ in range(2):
        await answers(settings)
        assert sorted(whole_reads(proxy)) == ARTIFACTS

    assert files(tmp_path) == {f"local/{name}": body for name, body in before.items()}


async def test_cloud_only_keeps_what_is_in_memory_when_r2_fails_and_is_not_ready_without(environment, published, proxy):
    settings = environment()
    async with serving(ModelStorageManager.from_settings(settings)) as served:
        await served.refresher.look_now()
        proxy.inject(drop(), times=FOR_EVER)
        assert (await served.refresher.look_now()).error
        assert await served.ask(ONE, "bare") == pytest.approx([4])
        assert served.registry.not_ready() is None
    async with serving(ModelStorageManager.from_settings(settings)) as fresh:
        assert (await fresh.refresher.look_now()).error
        assert fresh.registry.not_ready()
        proxy.heal()
        await fresh.refresher.look_now()
        assert fresh.registry.not_ready() is None


async def test_the_local_copy_is_written_and_serves_when_it_is_what_is_wanted(environment, published, proxy, tmp_path):
    settings = environment(ML_CLOUD_ONLY="false")
    assert settings.mode is Mode.R2_WITH_COPY
    await answers(settings)
    assert sorted(whole_reads(proxy)) == ARTIFACTS
    copies = files(tmp_path / "local")
    assert copies["models/bare.joblib"] == dumped(linear(1))
    assert {KEY, "models/fraud/1/manifest.json", "models/index.json"} <= copies.keys()
    await answers(settings)

    assert whole_reads(proxy) == []
    assert files(tmp_path / "local") == copies


async def test_a_spoiled_local_copy_is_not_used_and_is_repaired(environment, published, proxy, tmp_path):
    settings = environment(ML_CLOUD_ONLY="false")
    await answers(settings)
    copies = files(tmp_path / "local")
    for name, body in (("fraud/1/model.joblib", b"x" * 100), ("bare.joblib", dumped(linear(99)))):
        (tmp_path / "local/models" / name).write_bytes(body)
    whole_reads(proxy)
    await answers(settings)

    assert sorted(whole_reads(proxy)) == ["bare.joblib", "model.joblib"]
    assert files(tmp_path / "local") == copies


async def test_a_copy_of_what_has_changed_in_r2_is_replaced(environment, published, proxy, tmp_path):
    settings = environment(ML_CLOUD_ONLY="false")
    await answers(settings)
    put(published, "models/bare.joblib", dumped(linear(7)))
    async with serving(ModelStorageManager.from_settings(settings)) as served:
        await served.refresher.look_now()

        assert await served.ask(ONE, "bare") == pytest.approx([10])
    assert files(tmp_path / "local")["models/bare.joblib"] == dumped(linear(7))


async def test_the_local_copy_serves_when_r2_is_down_and_changes_nothing_that_serves(
    environment, published, proxy, tmp_path
):
    settings = environment(ML_CLOUD_ONLY="false")
    await answers(settings)
    proxy.inject(drop(), times=FOR_EVER)
    await answers(settings)
    manager = ModelStorageManager.from_settings(settings)
    async with serving(manager) as served:
        await served.refresher.look_now()
        assert manager.storage.fallback_reason.startswith("since ")
        (tmp_path / "local/models/bare.joblib").unlink()  # what the copy lacks is not gone from the bucket
        for _ in range(3):
            assert (await served.refresher.look_now()).retired == ()
        assert await served.ask(ONE, "bare") == pytest.approx([4])
        proxy.heal()
        await served.refresher.look_now()

        assert manager.storage.fallback_reason is None


async def test_without_a_copy_a_failure_of_r2_leaves_nothing_to_serve(environment, published, proxy):
    proxy.inject(drop(), times=FOR_EVER)
    async with serving(ModelStorageManager.from_settings(environment(ML_CLOUD_ONLY="false"))) as served:
        assert (await served.refresher.look_now()).error

        assert served.registry.not_ready()


async def test_forced_r2_writes_the_copy_and_never_reads_it(environment, published, proxy, tmp_path):
    settings = environment(ML_CLOUD_ONLY="false", FORCE_R2="true")
    assert settings.mode is Mode.R2_FORCED
    for _ in range(2):
        await answers(settings)
        assert sorted(whole_reads(proxy)) == ARTIFACTS
    assert KEY in files(tmp_path / "local")
    proxy.inject(drop(), times=FOR_EVER)
    async with serving(ModelStorageManager.from_settings(settings)) as served:
        assert (await served.refresher.look_now()).error

        assert served.registry.not_ready()


async def test_without_credentials_a_directory_is_the_store(environment, tmp_path):
    settings = environment(credentials=False, ML_CLOUD_ONLY="false")
    assert settings.mode is Mode.LOCAL
    manager = ModelStorageManager.from_settings(settings)
    manager.save("fraud", classifier(), scaler=scaler(), examples=ROWS[:5], compile=False)
    (tmp_path / "local/models/bare.joblib").write_bytes(dumped(linear(1)))

    await answers(settings)


@pytest.mark.parametrize(
    "values",
    [{}, {"DYNO": "web.1", "ML_CLOUD_ONLY": "false"}, {"ML_CLOUD_ONLY": "false", "FORCE_R2": "true"}],
)
def test_missing_credentials_end_the_process_with_a_line_each(tmp_path, values):
    done = subprocess.run(
        COMMAND, env=clean_environment(values), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 2
    assert [line.partition(" is missing: ")[0] for line in done.stderr.splitlines()] == [
        "R2_ENDPOINT_URL",
        "R2_BUCKET",
        "R2_ACCESS_KEY_ID",
        "R2_SECRET_ACCESS_KEY",
    ]
    assert done.stdout == ""


def test_one_missing_credential_is_one_line_and_shows_no_secret(tmp_path):
    values = r2_environment("https://example.invalid", "models", Credentials("", "very-secret"))
    done = subprocess.run(
        COMMAND, env=clean_environment(values), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 2
    assert done.stderr.startswith("R2_ACCESS_KEY_ID is missing: ")
    assert len(done.stderr.splitlines()) == 1
    assert "very-secret" not in done.stderr + done.stdout


# The proof: a process that has no file system to write to

READ_ONLY = """
mount --make-rprivate / || exit 96
places=$(cut -d' ' -f5 /proc/self/mountinfo | sort -u)
for place in $places; do mount -o remount,ro,bind "$place"; done 2>/dev/null
for place in $places /tmp /var/tmp "$HOME" "$PWD" "$CHECKOUT"; do
    if [ -d "$place" ] && (: > "$place/.diskless-was-here") 2>/dev/null; then
        rm -f "$place/.diskless-was-here"
        echo "$place can be written"
        exit 97
    fi
done
exec "$@"
"""


def unshare() -> list[str] | None:
    """Return the command that gives a process mounts of its own, or None where the kernel does not allow it."""
    if shutil.which("unshare") is None:
        return None
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        attempt = [*command, "sh", "-c", "mount --make-rprivate / && mount -o remount,ro,bind /"]
        if subprocess.run(attempt, capture_output=True).returncode == 0:
            return command
    return None


def test_cloud_only_serves_and_swaps_in_a_process_that_can_write_no_file(s3, bucket, published):
    prefix = unshare()
    if prefix is None:
        pytest.skip("this system lets nobody remount file systems in a namespace (unshare -m, unshare -rm)")
    values = r2_environment(s3.endpoint_url, bucket, s3.reader)
    values |= {"DYNO": "web.1", "ML_CLOUD_ONLY": "false", "CHECKOUT": str(Path(__file__).parent.parent)}
    values |= {"ML_REFRESH_SECONDS": "3600"}  # it looks when it is asked to, and at no other time
    values |= {"COVERAGE_PROCESS_CONFIG": "", "COVERAGE_PROCESS_START": ""}  # it would write its findings
    command = (*prefix, "sh", "-c", READ_ONLY, "sh", sys.executable, "-m", "app", "serve")
    with running(values, command=command) as service:
        service.wait_ready()
        answer = service.predict(model="fraud", instances=ROWS.tolist(), method="predict_proba")
        assert answer.json()["predictions"] == expected()
        assert service.predict(model="bare", instances=ONE).json()["predictions"] == pytest.approx([4])
        published.save("fraud", linear(5), promote=True, compile=False)
        put(published, "models/bare.joblib", dumped(linear(6)))
        outcome = service.client.post("/models/refresh").json()
        assert (len(outcome["loaded"]), len(outcome["retired"]), outcome["failed"]) == (2, 2, {})
        assert service.predict(model="fraud", instances=ONE).json() == {
            "model": "fraud",
            "version": "2",
            "predictions": pytest.approx([8]),
        }
        assert service.predict(model="bare", instances=ONE).json()["predictions"] == pytest.approx([9])
        status = service.status()
        assert (status["mode"], status["mode_reason"]) == ("cloud-only", "DYNO is set")

        assert service.stop() == 0


def test_the_status_says_that_a_copy_answers(published, s3, bucket, proxy, tmp_path):
    values = r2_environment(proxy.url, bucket, s3.reader)
    values |= {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(tmp_path / "copy"), "R2_MAX_ATTEMPTS": "1"}
    with running(values) as service:
        service.wait_ready()
        assert service.status()["storage"]["fallback"] is None
        proxy.inject(drop(), times=FOR_EVER)
        assert service.client.post("/models/refresh").status_code == 200
        status = service.status()

        assert status["mode"] == "r2-with-copy"
        assert "cannot read models/index.json" in status["storage"]["fallback"]
        answer = service.predict(model="fraud", instances=ROWS.tolist(), method="predict_proba")
        assert answer.json()["predictions"] == expected()
