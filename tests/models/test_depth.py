"""Every kind of 3D attention and of depth position: the cases in which they must coincide, and that each one acts."""

import itertools

import jax
import numpy as np
import pytest

from tests import tiny
from tghmoe_jax.errors import UserError
from tghmoe_jax.training.step import depth_scale

SLABS = 4
KINDS = ["joint", "window"]


def model(kind="joint", window=1, layers=tiny.ALL, **changes):
    return tiny.model(tgh={"layers": ()}, attn3d_layers=layers, attn3d_kind=kind, attn3d_window=window, **changes)


def run(model, batch=None, params=None, **kw):
    params = tiny.params(model) if params is None else params
    return tiny.features(model, params, tiny.batch(slices=SLABS, real=[4, 3]) if batch is None else batch, **kw)


def test_a_window_over_all_slabs_equals_joint_attention():
    joint = run(model())
    for window in (SLABS - 1, SLABS + 5):
        tiny.close(run(model("window", window)), joint)
    assert tiny.distance(run(model("window", SLABS - 2)), joint) > 0.05


def test_a_window_of_one_reaches_its_neighbours_only():
    """One layer: changing slab 3 moves slabs 2 and 3, not 0 and 1."""
    windowed = model("window", 1, layers=(3,))
    batch = tiny.batch(slices=SLABS)
    before = run(windowed, batch)
    changed = batch | {"slices": batch["slices"].copy()}
    changed["slices"][:, 3] = 255 - changed["slices"][:, 3]
    moved = np.abs(run(windowed, changed) - before).max(axis=(0, 2, 3))
    assert np.all(moved[:2] == 0) and np.all(moved[2:] > 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_slabs_without_rotation_equal_a_single_slab_of_any_kind(kind):
    one = tiny.batch(slices=1)
    same = one | {key: np.repeat(one[key], SLABS, axis=1) for key in ("slices", "slice_mask")}
    alone = run(model(kind), one)
    tiny.close(run(model(kind), same, depth_scale=0.0), np.repeat(alone, SLABS, axis=1))


def test_the_kinds_differ_from_one_another():
    found = {kind: run(model(kind)) for kind in KINDS} | {"2d": run(model(layers=()))}
    for one, other in itertools.combinations(found, 2):
        assert tiny.distance(found[one], found[other]) > 0.05, (one, other)


# ---- depth positions -------------------------------------------------------------------------------------------------


def test_rotation_off_no_depth_embedding_and_scale_zero_are_the_same():
    still = run(model(), depth_scale=0.0)
    tiny.close(run(model(depth_rope={"enabled": False})), still)
    tiny.close(run(model(depth_embed="none")), still)
    for changes in ({}, {"depth_rope": {"rotary_dim": 4}}, {"depth_rope": {"base": 50.0}}):
        assert tiny.distance(run(model(**changes)), still) > 0.05


def test_millimetre_positions_follow_each_samples_slice_spacing():
    """pos = index * spacing * patch_depth / reference: 5 mm slices in slabs of 2 at reference 10 are slab indices."""
    batch = tiny.batch(slices=2 * SLABS)
    mm = model(patch_depth=2, depth_rope={"unit": "mm", "reference_mm": 10.0})
    spacing = np.array([5.0, 2.5], np.float32)
    found = run(mm, batch | {"slice_spacing": spacing})
    slabs = model(patch_depth=2)
    tiny.close(found[0], run(slabs, batch)[0])
    tiny.close(found[1], run(slabs, batch, depth_scale=0.5)[1])
    with pytest.raises(ValueError, match="needs the slice spacing"):
        mm.apply(tiny.tree(tiny.params(mm)), {key: value for key, value in batch.items() if key != "slice_spacing"})


def test_more_slabs_than_learned_depth_positions_are_refused_with_their_key():
    learned = model(layers=(3,), depth_embed="learned_zero_init")
    with pytest.raises(UserError, match="^129 slabs are more than the 128 learned depth positions.*model.patch_depth"):
        jax.eval_shape(learned.init, jax.random.key(0), tiny.batch(rows=1, slices=129))


@pytest.mark.parametrize("layers", [(2, 3), (1, 3), (0, 2)])
def test_a_learned_depth_embedding_starts_as_none_and_then_moves_every_slab(layers):
    """It is there wherever the 3D layers are, alternating with 2D ones too (scanned in pairs)."""
    learned, none = (model(layers=layers, depth_embed=kind) for kind in ("learned_zero_init", "none"))
    params = tiny.params(learned)
    assert params["vision/depth_pos"].shape == (128, 24)
    found = run(learned, params=params | {"vision/depth_pos": 0 * params["vision/depth_pos"]})
    expected = run(none, params={path: leaf for path, leaf in params.items() if path != "vision/depth_pos"})
    tiny.close(found, expected)
    table = np.zeros_like(params["vision/depth_pos"])
    table[2] = 1 + np.arange(24) % 3
    moved = run(learned, params=params | {"vision/depth_pos": table})
    assert np.all(np.abs(moved - expected).max(axis=(2, 3))[0] > 1e-3)


def test_the_scale_of_the_rotation_ramps_linearly():
    ramp = {"scale_init": 0.0, "scale": 2.0, "ramp_steps": 10}
    scales = [float(depth_scale(model(depth_rope=ramp), step)) for step in (0, 5, 10, 99)]
    assert scales == pytest.approx([0.0, 1.0, 2.0, 2.0])
    assert depth_scale(model(), 5) is None
