"""Compiling for chips that are not there: a small model of full width through the real command, and every refusal."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.tools import few_layers
from tghmoe_jax.errors import UserError
from tghmoe_jax.ops.attention import attention
from tghmoe_jax.tools import aot
from tghmoe_jax.tools.chips import CHIPS, Gpu, target_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "tests/tools/few_layers.py"
FULL = "configs/stage2.py:phi3v,pod=v5e-64"


@pytest.fixture(scope="module")
def report():
    """Of the train step of `few_layers`, on four v5e chips."""
    command = [sys.executable, "-m", "tghmoe_jax.aot", "--config", CONFIG, "--topology", "v5e:2x2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_whole_state_is_donated(report):
    b = report["bytes"]
    assert report["donated"] == {"leaves": report["donated"]["of"], "of": report["donated"]["of"]}
    assert b["donated"] >= b["state"]  # a TPU keeps arrays in whole tiles
    rows = report["batch"] // report["chips"]
    pixels = rows * report["slices"] * 336 * 336 * 3
    assert pixels <= b["arguments"] - b["donated"] < 3 * pixels  # what is not given away is the batch


@pytest.mark.slow
def test_the_memory_of_a_chip_adds_up(report):
    b = report["bytes"]
    assert b["hbm"] == round(15.75 * 2**30) and b["spare"] == b["hbm"] - b["peak"]
    assert b["arguments"] < b["peak"] < b["hbm"]
    assert b["spare_share"] == pytest.approx(b["spare"] / b["hbm"], abs=1e-6)


@pytest.mark.slow
def test_experts_are_sharded_and_tokens_or_weights_are_exchanged(report):
    experts = report["experts"]
    assert "expert" in experts["spec"]
    assert experts["chip_bytes"] < experts["total_bytes"] / report["mesh"]["expert"] * 1.01
    found = report["collectives"]["train"]
    assert found["all-gather"]["count"] > 0 and found["all-to-all"]["count"] > 0
    assert all(one["sent"] > 0 and one["bytes"] > 0 for one in found.values())


@pytest.mark.slow
def test_the_roofline_is_the_slowest_of_its_parts(report):
    r, useful = report["roofline"], report["flops"]["useful"]
    assert r["seconds"] == max(r["compute"], r["hbm"], r["ici"])
    assert r["mfu_bound"] == pytest.approx(useful / 197e12 / r["seconds"])
    assert 0 < useful < report["flops"]["executed"]
    s = report["samples"]
    hours = s["number"] * useful * report["chips"] / report["batch"] / (197e12 * s["mfu"]) / 3600
    assert s["chip_hours"] == pytest.approx(hours)
    assert s["chip_hours_at_roofline"] < s["chip_hours"]


@pytest.mark.slow
def test_the_report_for_people_states_what_the_numbers_say(report):
    text = aot.text(report)
    assert "4 chips, mesh data 1, fsdp 2, expert 2" in text
    assert f"spare {report['bytes']['spare'] / 2**30:.2f}" in text
    assert "625,000 samples" in text and "all-to-all" in text
    assert f"{report['donated']['of']} of {report['donated']['of']} leaves" in text


def examined(monkeypatch, step: str) -> dict:
    """The report on `few_layers`, of which one small product is compiled in place of each function, once traced."""
    build = aot.build

    def small(name, chip, function, *arguments):
        if name != "train":  # which takes long to trace
            function.trace(*arguments)
        one = jax.sharding.SingleDeviceSharding(aot.open_topology("v5e:2x2")[1][0])
        return build(
            name, chip, jax.jit(lambda x: x @ x.T), jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=one)
        )

    monkeypatch.setattr(aot, "build", small)
    config = few_layers.get_config()
    config.eval.batch = 4
    return aot.examine(config, "v5e:2x2", step, 1000, 0.5)


def test_a_report_adds_up_whatever_was_compiled(monkeypatch):
    report = examined(monkeypatch, "train")
    b, e, r = report["bytes"], report["experts"], report["roofline"]
    assert b["arguments"] == 256 * 256 * 4 < b["peak"] and b["spare"] == b["hbm"] - b["peak"]
    assert report["donated"]["leaves"] == 0 < report["donated"]["of"]
    assert "expert" in e["spec"] and e["total_bytes"] / 4 <= e["chip_bytes"] < e["total_bytes"] / 2 * 1.01 < b["state"]
    assert r["seconds"] == max(r["compute"], r["hbm"], r["ici"]) and r["ici"] == 0
    useful, s = report["flops"]["useful"], report["samples"]
    assert s["chip_hours"] == pytest.approx(1000 * useful * 4 / 16 / (197e12 * 0.5) / 3600)
    recipe = few_layers.get_config().train
    assert report["recipe"]["number"] == recipe.steps * recipe.batch
    assert report["recipe"]["chip_hours"] / s["chip_hours"] == pytest.approx(report["recipe"]["number"] / 1000)
    text = aot.text(report)
    assert "train step on v5e:2x2: 4 chips, mesh data 1, fsdp 2, expert 2" in text and "1,000 samples" in text
    assert f"{recipe.steps * recipe.batch:,} samples, all steps of this config" in text
    assert "collectives of train, a run: none" in text


def test_answering_is_reported_function_by_function(monkeypatch):
    report = examined(monkeypatch, "evaluate")
    assert list(report["compile_seconds"]) == ["encode", "rank", "decode"] and "samples" not in report
    assert report["new_tokens"] == few_layers.get_config().eval.new_tokens
    assert report["roofline"]["hbm"] > 0 and report["flops"]["executed"] >= report["flops"]["useful"] > 0
    assert "donated:" not in (text := aot.text(report)) and "collectives of rank" in text


def refused(capsys, *arguments) -> str:
    """The one sentence of a command that ends with code 2."""
    assert aot.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--topology", "v9x:2x2"), "--topology v9x:2x2 is unknown; give a chip of v5e, v5p, v6e and its grid"),
        (("--topology", "v5e"), "--topology v5e is unknown"),
        (
            ("--topology", "h100"),
            "--topology h100 is unknown; give a chip of v5e, v5p, v6e and its grid, as v5e:8x8, or a",
        ),
        (("--topology", "h100:2x4"), "or a GPU of h100, h200, a100, l4, rtx4090 and their number, as h100:8"),
        (("--topology", "l4:0"), "--topology l4:0 is unknown"),
        (("--topology", "v5e:3x5"), "--topology v5e:3x5 does not exist"),
        (("--topology", "v5e:8x8", "--mesh", "fsdp=5"), "does not give 64 devices of v5e:8x8; change data, fsdp or"),
        (("--topology", "v5e:8x8", "--mesh", "tensor=4"), "--mesh tensor=4 is not a mesh"),
        (("--topology", "v5e:8x8", "--mesh", "data=-1,fsdp=-1,expert=1"), "only one of mesh.data"),
        (("--topology", "v5e:8x8", "--config.train.batch=100"), "--config.train.batch=100 must be a multiple of 256"),
        (("--topology", "v5e:8x8", "--mfu", "0"), "--mfu 0.0 must lie between 0 and 1"),
        (("--topology", "v5e:8x8", "--samples", "0"), "--samples 0 must be at least 1"),
        (("--topology", "v5e:8x8", "--config.model.remat=some"), "--config.model.remat=some is unknown"),
    ],
)
def test_what_cannot_be_compiled_is_named_in_one_sentence(capsys, monkeypatch, arguments, text):
    monkeypatch.chdir(ROOT)
    assert text in refused(capsys, "--config", FULL, *arguments)


def test_without_the_plugin_for_cuda_the_message_says_to_install_it(capsys, monkeypatch):
    def not_installed(**_):
        raise RuntimeError("Unknown backend cuda")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(aot.topologies, "get_topology_desc", not_installed)
    text = refused(capsys, "--config", FULL, "--topology", "h100:8")
    assert "plugin for CUDA cannot be loaded (Unknown backend cuda); pip install -r requirements-gpu.txt" in text


GPUS = [kind for kind, chip in CHIPS.items() if isinstance(chip, Gpu)]


@pytest.mark.parametrize("kind", GPUS)
def test_xla_is_told_the_memory_and_the_architecture_of_a_gpu(kind):
    chip, text = CHIPS[kind], target_config(CHIPS[kind])
    assert text.count("{") == text.count("}") == 3
    assert f"device_memory_size: {round(chip.hbm)} " in text and f"core_count: {chip.multiprocessors} " in text
    major, minor = chip.capability
    assert f"{{ major: {major} minor: {minor} feature_extension: " in text and f'name: "{chip.device_kind}"' in text
    lines = dict(part.split(": ") for part in aot.re.findall(r"\w+: \d+", text))
    assert int(lines["shared_memory_per_block"]) < int(lines["shared_memory_per_block_optin"])
    assert int(lines["shared_memory_per_block_optin"]) < int(lines["shared_memory_per_core"]) == chip.shared << 10


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs requirements-gpu.txt")
@pytest.mark.parametrize("kind", GPUS)
def test_the_fused_attention_is_compiled_for_every_gpu(kind):
    chip, devices = aot.open_topology(f"{kind}:2")
    one = jax.sharding.SingleDeviceSharding(devices[0])
    q = jax.ShapeDtypeStruct((2, 577, 4, 96), jnp.bfloat16, sharding=one)
    total = jax.jit(jax.grad(lambda q: attention(q, q, q, backend="cudnn").astype(jnp.float32).sum()))
    assert len(devices) == 2
    assert aot.build("train", chip, total, q).fused == {"fmhaSoftmax": 1, "fmhaSoftmaxBackward": 1}


def test_without_libtpu_the_message_says_to_install_it(capsys, monkeypatch):
    def not_installed(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(aot.topologies, "get_topology_desc", not_installed)
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    text = refused(capsys, "--config", FULL, "--topology", "v5e:8x8")
    assert "pip install -r requirements-tpu.txt" in text


def test_what_does_not_fit_says_by_how_much_and_what_to_change():
    chip, devices = aot.open_topology("v5e:2x2")
    big = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
    with pytest.raises(UserError) as caught:
        aot.build("train", chip, jax.jit(lambda x: x @ x.T), big)
    text = str(caught.value)
    needed, there, few = (float(part) for part in aot.re.findall(r"[\d.]+\d", text.split(";")[0]))
    assert there == 15.75 and needed >= 32 and few == pytest.approx(needed - there, abs=0.011)
    assert "train.accumulate" in text and "mesh.fsdp" in text


def test_what_the_compiler_lets_pass_must_fit_all_the_same():
    """... on a chip with a tenth of the memory that the compiler knows of."""
    chip, devices = aot.open_topology("v5e:2x2")
    few = dataclasses.replace(chip, hbm=1.5 * 2**30)
    some = jax.ShapeDtypeStruct((1 << 14, 1 << 14), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
    with pytest.raises(UserError, match=r"needs 2\.\d+ GiB a chip and 1.50 are there"):
        aot.build("train", few, jax.jit(lambda x: x + 1), some)


def test_another_failure_of_the_compiler_is_not_taken_for_a_lack_of_memory():
    assert aot.too_big("INTERNAL: Mosaic failed to compile") is None
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded by 1.75G."
    assert aot.too_big(message) == 17.5 * 2**30
