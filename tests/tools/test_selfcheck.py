"""The check of a machine: passes on this one through the real command, and fails where a fast path is wrong."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from tghmoe_jax.tools import selfcheck


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
