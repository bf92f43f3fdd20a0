"""A run, the run it starts from, its base and its data at URLs of an object store, which a local emulator plays."""

import json
import socket

import pytest
from etils import epath
from gcp_storage_emulator.server import create_server

from tests import tiny_run


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """An empty bucket, and the environment that finds it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    patch = pytest.MonkeyPatch()
    for name, value in {
        "STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "NO_GCE_CHECK": "true",
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }.items():  # fmt: skip
        patch.setenv(name, value)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield epath.Path("gs://bucket")
    server.stop()
    patch.undo()


def test_a_run_at_a_url_is_trained_continued_and_started_from(tiny_folder, bucket):
    for file in (tiny_folder / "base").iterdir():
        (bucket / "base" / file.name).write_bytes(file.read_bytes())
    run = bucket / "runs" / "stage1"

    def train(config: str, workdir, *flags: str):
        done = tiny_run.command(
            tiny_folder, config, workdir, *tiny_run.options(tiny_folder), f"--config.base={bucket / 'base'}",
            "--config.eval.items=4", *flags,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    train("stage1.py", run, "--config.train.steps=2")
    assert json.loads((run / "eval" / "2" / "metrics.json").read_text())
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert [file.name for file in run.iterdir() if file.name.startswith("events.")]
    done = train("stage1.py", run, "--config.train.steps=4", "--config.eval.every=0")
    assert "continued from step 2" in done.stdout
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    train(
        "stage2.py", tiny_folder / "from_url", f"--config.init_from={run}", "--config.train.steps=1",
        "--config.eval.every=0",
    )  # fmt: skip
    assert json.loads((tiny_folder / "from_url" / "manifest.json").read_text())["base"]["init_from"] == str(run)


def test_a_url_that_cannot_be_reached_is_named(tiny_folder, bucket):
    done = tiny_run.command(tiny_folder, "stage1.py", "nowhere://bucket/run", *tiny_run.options(tiny_folder))
    assert done.returncode == 2 and done.stderr.startswith("error: --workdir nowhere://bucket/run"), done.stderr
