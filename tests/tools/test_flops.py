"""The analytic count against XLA's own on a model small enough to be compiled without a scan, and by hand."""

import jax
import pytest

from tests import tiny
from tghmoe_jax.tools import flops

BASE = tiny.CONFIG | {
    "hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 256,
    "vision_config": tiny.CONFIG["vision_config"] | {
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
    },
}  # fmt: skip
SLICES = 4


def wide(**changes):
    """One 2D block, one 3D block with experts (both unscanned), one decoder layer: products outweigh the rest."""
    tgh = {"layers": (1,), "dispatch": "dense"} | changes.pop("tgh", {})
    return tiny.model(base=BASE, attn3d_layers=(1,), tgh=tgh, **changes)


def xla(function, *args) -> float:
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def batch():
    return tiny.batch(rows=1, slices=SLICES)


@pytest.mark.parametrize(
    "changes", [{}, {"attn3d_kind": "window"}, {"lora": {"rank": 4, "alpha": 8.0, "targets": ".*"}}]
)
def test_a_forward_pass_counts_what_xla_counts(changes):
    model = wide(**changes)
    counted = flops.forward_sample(model.cfg, tiny.shapes(model), SLICES, tiny.LENGTH, "plain").executed
    params = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in tiny.shapes(model).items()}
    found = xla(lambda p, b: tiny.apply(model, p, b).logits, params, batch())
    assert counted <= found < 1.12 * counted  # XLA's holds elementwise work too


@pytest.mark.parametrize("trainable", [(".*",), ("vision/block_1/moe/.*", "decoder/.*"), ("decoder/.*",)])
def test_a_training_step_counts_what_xla_counts(trainable):
    """Gradients stop below the first layer that trains; what is frozen above it passes them on."""
    model = wide()
    paths = tiny.shapes(model)
    state, step = tiny.start(model, tiny.params(model), trainable)
    found = xla(step, state, tiny.microbatches(batch(), 1))
    trains = {path: path in state.trained for path in paths}
    counted = flops.train_sample(model.cfg, paths, trains, SLICES, tiny.LENGTH, "plain").executed
    optimiser = 50 * sum(leaf.size for leaf in state.trained.values())  # at most, with the guard of bad steps
    assert 0.97 * counted <= found - 0.5 * optimiser < 1.2 * counted


def test_rematerialisation_repeats_the_forward_pass_and_is_not_useful():
    plain, again = wide(), wide(remat="full")
    count = lambda m: flops.train_sample(  # noqa: E731
        m.cfg, tiny.shapes(m), dict.fromkeys(tiny.shapes(m), True), SLICES, tiny.LENGTH, "plain"
    )
    assert count(plain).useful == count(again).useful
    forward = flops.forward_sample(plain.cfg, tiny.shapes(plain), SLICES, tiny.LENGTH, "plain").executed
    assert 0.7 * forward < count(again).executed - count(plain).executed < forward


def test_experts_of_other_devices_compute_empty_slots_and_those_of_one_do_not():
    tgh = {"groups": 2, "experts": 4, "top_k": 2, "dispatch": "ragged", "capacity_factor": 1.25}
    count = lambda spread, **changes: (  # noqa: E731
        flops.forward_sample((m := wide(tgh=tgh | changes)).cfg, tiny.shapes(m), SLICES, tiny.LENGTH, "plain", spread)
    )
    model = wide()
    rows = model.cfg.slabs(SLICES) * model.cfg.tower.tokens
    chosen = 2 * (2 * rows) * 2 * 96 * 256  # two experts of every token, two products each
    assert count(False).executed == count(True, transport="gather").executed
    assert count(True).executed - count(False).executed == pytest.approx(0.25 * chosen)
    assert count(True).useful == count(False).useful


def test_pairs_of_masks_by_hand():
    assert flops.attention_pairs(6, 6, "plain", causal=True) == (21, 36, "plain")
    assert flops.attention_pairs(6, 6, "plain", window=(2, 1)) == (4 + 4 + 6 + 6 + 4 + 4, 36, "plain")
    assert flops.attention_pairs(100, 100, "splash") == (10000, 10000, "plain")  # too short for the kernel
    assert flops.attention_pairs(1920, 1920, "splash", causal=True) == (1920 * 1921 // 2, 6 * 640 * 640, "splash")
    assert flops.attention_pairs(1917, 1917, "cudnn", causal=True)[1:] == (1917 * 1918 // 2, "cudnn")
    assert flops.attention_pairs(577, 577, "cudnn") == (577**2, 577**2, "cudnn")
    assert flops.attention_pairs(100, 100, "cudnn") == (10000, 10000, "plain")
    assert flops.attention_pairs(1917, 1917, "cudnn", causal=True, reach=8)[1] == 1917**2  # a mask of all pairs
    visible, computed, _ = flops.attention_pairs(9232, 9232, "splash", window=(577, 1))
    assert visible == (16 * 3 - 2) * 577 * 577 and visible < computed < 0.35 * 9600**2


def test_active_parameters_hold_the_chosen_experts_only():
    model = wide(tgh={"groups": 2, "experts": 4, "top_k": 2})
    sizes = flops.parameters(model.cfg, tiny.shapes(model), dict.fromkeys(tiny.shapes(model), False))
    expert = 96 * 256 + 256 + 256 * 96 + 96
    router = (96 + 16) * 4
    assert sizes["total"] - sizes["active"] == 6 * expert + router and sizes["trained"] == 0
