"""Runs and bases at URLs of an object store, which a local emulator plays.

Checkpoints are left out: the emulator does not know the conditional writes that tensorstore makes.
"""

import io
import json
import socket

import numpy as np
import pytest
from etils import epath
from gcp_storage_emulator.server import create_server

from configs import stage1
from tests import tiny_run
from tghmoe_jax import digests
from tghmoe_jax.bases.base import load_base
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.training import exported, guard, hosts, owner, reporting, run_folder


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


def test_a_base_at_a_url_is_the_base(tiny_folder, bucket):
    for file in (tiny_folder / "base").iterdir():
        (bucket / "base" / file.name).write_bytes(file.read_bytes())
    there, here = load_base(f"{bucket}/base", lazy=True), load_base(tiny_folder / "base")
    assert there.config == here.config and there.params.keys() == here.params.keys()
    assert all(np.array_equal(np.asarray(there.params[name]), here.params[name]) for name in here.params)
    assert hosts.identity(f"{bucket}/base") == hosts.identity(tiny_folder / "base")


def test_what_describes_a_run_is_written_and_read_at_a_url(tiny_folder, bucket):
    run, config = f"{bucket}/runs/stage1", stage1.get_config()
    run_folder.write_description(run, config, {"a": 1}, tiny_folder / "base", "table", {"name": "x"})
    assert run_folder.read_config(run)["train"] == json.loads(json.dumps(config.train.to_dict()))
    assert run_folder.read_base_config(run) == {"a": 1} and run_folder.read_manifest(run)["name"] == "x"
    text = "two words"
    own = Tokenizer.from_folder(tiny_folder / "base", CHAT).encode(text)
    assert Tokenizer.from_folder(run_folder.model_folder(run), CHAT).encode(text) == own
    run_folder.check_workdir(config, run)
    config.train.seed += 1
    with pytest.raises(UserError, match="differs in train.seed"):
        run_folder.check_workdir(config, run)
    with pytest.raises(UserError, match="is not a finished run"):
        run_folder.find(run, "--config.init_from")


def test_a_run_at_a_url_has_one_owner_its_bad_steps_and_the_digests_of_an_export(bucket):
    run = f"{bucket}/runs/owned"
    with owner.Hold(run, "--workdir") as hold:
        hold.check()
        with pytest.raises(UserError, match="in use by process"):
            owner.Hold(run, "--workdir").__enter__()
        watch = guard.Guard(run, 2, ["a"], lambda step: [], lambda text: None)
        watch.note(1, {"loss": np.float32("nan"), "grad_norm": np.float32("nan"), "bad": 1, "bad_leaves": [True]})
    assert not (epath.Path(run) / owner.FILE).exists()
    assert [one["step"] for one in reporting.read_metrics(f"{run}/{guard.FILE}")] == [1]
    for file in run_folder.EMBEDDED.rglob("*"):
        if file.is_file():
            (bucket / "model" / file.relative_to(run_folder.EMBEDDED)).write_bytes(file.read_bytes())
    model = run_folder.find(f"{bucket}/model", "--checkpoint")
    assert digests.problems(model) == [] and exported.read(model)[1] == exported.read(run_folder.EMBEDDED)[1]
    (model / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged .model/config.json has changed"):
        run_folder.find(f"{bucket}/model", "--checkpoint")


def test_the_log_of_a_run_at_a_url_goes_on_after_its_checkpoint(bucket):
    run = f"{bucket}/runs/logged"
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with reporting.RunLog(run, 4, start_step=start, stream=io.StringIO(), tensorboard=False) as log:
            for step in steps:
                log.record(step, {"loss": float(step + start)})
    found = reporting.read_metrics(f"{run}/metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in found] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]


def test_a_url_that_cannot_be_reached_is_named(tiny_folder, bucket):
    done = tiny_run.command(tiny_folder, "stage1.py", "nowhere://bucket/run", *tiny_run.options(tiny_folder))
    assert done.returncode == 2 and done.stderr.startswith("error: --workdir nowhere://bucket/run"), done.stderr
