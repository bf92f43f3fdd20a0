"""The check of a machine: passes on this one through the real command, and fails where a fast path is wrong."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tghmoe_jax.ops.attention import Mask
from tghmoe_jax.tools import selfcheck
from tghmoe_jax.training.loading import batch_shapes


@pytest.mark.slow
def test_every_fast_path_passes_on_two_devices_of_this_machine():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tghmoe_jax.selfcheck", "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["passed"] and (report["device"], report["devices"]) == ("cpu", 2)
    checks = {check["name"]: check for check in report["checks"]}
    kinds = ("attention over a volume", "attention in a window", "attention of the decoder", "experts, ragged",
             "experts, capacity", "decoding with a cache", "donated training step on 1 x 1 x 2")  # fmt: skip
    assert all(any(name.startswith(kind) for name in checks) for kind in kinds), list(checks)
    for name, check in checks.items():
        assert check["seconds"] > 0, name
        worst = max(check["distances"].values())
        assert 0 < worst <= check["tolerance"], f"{name} compares a path with itself, or fails"
        if name.startswith(("attention", "experts")):
            assert {"value"} < check["distances"].keys(), f"{name} compares no gradient"


SIZES = selfcheck.Sizes("float32", 2, 9, 3, 30, (1, 8), (1, 8), (32, 4, 8))


def test_windowed_attention_passes_with_values_and_gradients():
    valid = np.arange(54).reshape(2, 27) < 45  # the last slab of the second volume is padding
    window = Mask(key_valid=valid, slice_tokens=9, window=1)
    check = selfcheck.check_attention("attention", np.random.default_rng(0), SIZES, 2, 27, 1, 8, window)
    assert check.passed and check.distances.keys() == {"value", "d q", "d k", "d v"}
    assert 0 < max(check.distances.values()) and check.seconds > 0
    assert check.flops == 3 * 4 * 8 * 2 * (27**2 - 2 * 9**2)  # the outer slabs do not meet


def test_experts_pass_with_values_and_gradients():
    check = next(selfcheck.check_experts(np.random.default_rng(0), SIZES))
    assert check.passed and check.distances.keys() == {
        "value",
        "d x",
        "d gate",
        "d fc1",
        "d fc1_bias",
        "d fc2",
        "d fc2_bias",
    }
    assert 0 < max(check.distances.values()) and check.flops == 3 * 4 * 32 * 2 * 4 * 8


def test_a_batch_is_text_of_several_lengths_that_ends_in_an_answer():
    batch = selfcheck.random_batch(batch_shapes({"slices": 4, "size": 16, "text_length": 40}, 8), tiny.model(), seed=2)
    lengths = batch["token_mask"].sum(-1)
    assert len(set(lengths)) > 1 and set(batch["task"]) == {0, 1}
    for mask in ("question_mask", "loss_mask"):
        assert (batch[mask] <= batch["token_mask"]).all() and batch[mask].any(-1).all()
    assert (batch["loss_mask"].sum(-1) == 6).all() and not (batch["loss_mask"] & batch["question_mask"]).any()
    assert not batch["question_mask"][:, : tiny.PREFIX + 1].any()


def plain(inputs):
    return jnp.tanh(inputs["x"]) @ inputs["w"]


@pytest.mark.parametrize(
    ("fast", "passes"),
    [
        (plain, True),
        (lambda x: plain(x) * 1.001, False),
        (lambda x: plain(x) + 0.01, False),
        (lambda x: plain(x) * jnp.nan, False),
        (lambda x: plain(x) + jnp.sin(1e4 * x["x"][:1, :1]) * 1e-5, False),  # the right values with wrong gradients
    ],
)
def test_a_fast_path_that_differs_does_not_pass(fast, passes):
    inputs = {"x": jnp.linspace(-1, 1, 64).reshape(8, 8), "w": jnp.eye(8)}
    check = selfcheck.compare("a path", selfcheck.SMALL, fast, plain, inputs, 1.0)
    assert check.passed is passes
    assert selfcheck.line(check).startswith("pass" if passes else "FAIL")


def test_one_failure_ends_with_code_1_and_a_warning(monkeypatch, capsys):
    good = selfcheck.Check("a path", {"value": 0.0}, 1e-4)
    bad = selfcheck.Check("another", {"value": 0.0, "d x": float("nan")}, 1e-4)
    monkeypatch.setattr(selfcheck, "checks", lambda _: iter([good, bad]))
    assert selfcheck.main([]) == 1
    assert "1 of 2 FAIL: do not trust this machine" in capsys.readouterr().out
    assert selfcheck.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_an_unknown_flag_is_one_sentence(capsys):
    assert selfcheck.main(["--fast"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
