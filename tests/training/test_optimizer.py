"""AdamW and Muon with rules: rates, decay, clipping, and expert groups that a step did not see."""

import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from tests import tiny_run
from tghmoe_jax.errors import UserError
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.training import optimizer

MOE = "vision/block_1/moe/experts/fc1/kernel"
STACKED = "vision/scan_2_3_1/block_2/moe/router/x/kernel"
PARAMS = {
    "connector/fc1/kernel": np.full((3, 2), 2.0, np.float32), "connector/fc1/bias": np.full(2, 2.0, np.float32),
    MOE: np.full((2, 4, 3), 2.0, np.float32), STACKED: np.full((3, 2, 5), 2.0, np.float32),
}  # fmt: skip


def config(**changes):
    cfg = common.get_config().optimizer
    cfg.update({"name": "adamw", "rate": 0.1, "warmup": 0.0, "final": 1.0, "clip": 1e9, **changes})
    return cfg


def updates(grads, steps=100, at=1, **changes):
    """The update of step `at`, by default one at the full rate."""
    tx = optimizer.build(config(**changes), steps, list(PARAMS))
    state = tx.init(PARAMS)
    for _ in range(at + 1):
        found, state = tx.update(grads, state, PARAMS)
    return {path: np.asarray(leaf) for path, leaf in found.items()}


def ones(value=1.0):
    return {path: np.full_like(leaf, value) for path, leaf in PARAMS.items()}


def test_the_rate_rises_linearly_to_its_peak_and_falls_as_a_cosine_to_its_end():
    rate = optimizer.schedule(config(rate=0.5, warmup=0.1, final=0.1), 100)
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0.05, 0.275, 0.5])
    assert float(rate(55)) == pytest.approx(0.5 * (0.1 + 0.9 * 0.5))  # half way down
    assert float(rate(100)) == float(rate(999)) == pytest.approx(0.05)
    for steps in (1, 2, 3):  # no number of steps is too short
        assert np.isfinite(float(optimizer.schedule(config(), steps)(steps)))


def test_an_update_goes_against_the_gradient_at_the_rate():
    found = updates(ones())
    assert all(np.allclose(leaf, -0.1, rtol=1e-5) for leaf in found.values())
    first = updates(ones(), at=0, warmup=0.1)  # ten steps of warm-up, of which the first moves already
    assert all(np.allclose(leaf, -0.01, rtol=1e-5) for leaf in first.values())


def test_rate_rules_scale_the_update_of_a_leaf_and_zero_stops_it():
    found = updates(ones(), rate_rules=((r"vision/.*/experts/.*", 0.2), (r"vision/.*", 0.0)))
    assert np.allclose(found[MOE], -0.02, rtol=1e-5) and not found[STACKED].any()
    assert np.allclose(found["connector/fc1/kernel"], -0.1, rtol=1e-5)


def test_decay_pulls_towards_zero_where_no_rule_excepts_a_leaf_and_follows_its_rate():
    found = updates(ones(0.0), decay=0.5, rate_rules=((STACKED.replace("scan_2_3_1/block_2", r"block_[234]"), 0.1),))
    assert np.allclose(found["connector/fc1/kernel"], -0.1 * 0.5 * 2, rtol=1e-5)
    assert not found["connector/fc1/bias"].any(), "the default rules keep biases from decaying"
    assert np.allclose(found[STACKED], -0.01 * 0.5 * 2, rtol=1e-5)


def test_the_norm_is_clipped_over_all_trained_leaves_together():
    cfg = config(clip=1.0, eps=1.0, b1=0.0, b2=0.0)  # with a large eps Adam keeps the size of the gradient
    tx = optimizer.build(cfg, 100, list(PARAMS))
    big = ones(100.0)
    norm = float(optax.tree.norm(big))
    found, state = tx.update(big, tx.init(PARAMS), PARAMS)
    found, _ = tx.update(big, state, PARAMS)
    clipped = 100.0 / norm
    assert np.allclose(found[MOE], -0.1 * clipped / (clipped + 1), rtol=1e-4)


def test_moments_exist_for_what_trains_only():
    state = optimizer.build(config(), 10, list(PARAMS)).init(PARAMS)
    names = {
        key.key for path, _ in jax.tree_util.tree_leaves_with_path(state) for key in path
        if isinstance(key, jax.tree_util.DictKey)
    }  # fmt: skip
    assert names == set(PARAMS)


def test_the_group_axis_of_experts_and_routers_follows_the_stacking():
    assert optimizer.group_axis(MOE) == 0 and optimizer.group_axis(STACKED) == 1
    assert optimizer.group_axis("vision/block_1/task_ffn/experts/fc2/bias") == 0
    assert optimizer.group_axis("connector/fc1/kernel") is None and optimizer.group_axis("vision/cls") is None


@pytest.mark.parametrize("present", [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize(("name", "moments"), [("adamw", 2 + 2), ("muon", 1 + 2)])
def test_a_group_that_a_step_did_not_see_keeps_values_and_moments(present, name, moments):
    tx = optimizer.build(config(name=name), 100, list(PARAMS))
    old = (PARAMS, tx.init(PARAMS))
    grads, state = ones(), old[1]
    for _ in range(2):
        found, state = tx.update(grads, state, PARAMS)
    new = (optax.apply_updates({path: jnp.asarray(leaf) for path, leaf in PARAMS.items()}, found), state)
    kept = optimizer.keep_absent_groups(new, old, jnp.asarray(present))
    leaves = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (kept, new, old)), strict=True)
    seen = 0
    for (path, leaf), (_, fresh), (_, stale) in leaves:
        name = next((key.key for key in path[::-1] if isinstance(key, jax.tree_util.DictKey)), "")
        axis = optimizer.group_axis(name)
        if axis is None:
            assert np.array_equal(leaf, fresh), name
            continue
        seen += 1
        for group, was in enumerate(present):
            expected = fresh if was else stale
            one = (slice(None),) * axis + (group,)
            assert np.array_equal(leaf[one], expected[one]), (name, group)
            assert not np.array_equal(fresh[one], stale[one])
    assert seen == 2 + moments  # two leaves and their moments


def test_experts_that_all_tasks_share_are_always_updated():
    shared = {"vision/block_1/moe/experts/fc1/kernel": jnp.ones((1, 4, 3))}
    kept = optimizer.keep_absent_groups(shared, jax.tree.map(jnp.zeros_like, shared), jnp.array([True, False]))
    assert kept[MOE].all()


def test_a_rule_that_splits_a_scanned_run_names_its_flag():
    for key in ("rate_rules", "decay_rules"):
        with pytest.raises(UserError, match=f"--config.optimizer.{key}"):
            optimizer.build(config(**{key: ((r"vision/block_2/.*", 0.1),)}), 10, list(PARAMS))


MATRICES = {  # the shape of a leaf, and its axes in and out
    "vision/patch/kernel": ((2, 3, 3, 3, 8), (0, 1, 2, 3), (4,)),
    "decoder/scan_0_2_1/block_0/attn/q/kernel": ((2, 6, 3, 2), (1,), (2, 3)),
    "vision/block_0/attn/out/kernel": ((2, 3, 5), (0, 1), (2,)),
    "vision/block_1/moe/experts/fc1/kernel": ((2, 4, 3, 5), (2,), (3,)),
    "connector/fc2/kernel": ((4, 7), (0,), (1,)),
}


def test_muon_makes_every_matrix_of_an_update_nearly_orthogonal_with_the_size_of_adams():
    rng = np.random.default_rng(0)
    params = {path: np.zeros(shape, np.float32) for path, (shape, _, _) in MATRICES.items()}
    grads = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in params.items()}
    tx = optimizer.build(config(name="muon", rate=1.0), 100, list(params))
    state = tx.init(params)
    for _ in range(2):
        found, state = tx.update(grads, state, params)
    for path, (shape, reduced, output) in MATRICES.items():
        fans = [int(np.prod([shape[axis] for axis in axes])) for axes in (reduced, output)]
        update, grad = (np.asarray(tree[path]).reshape(-1, *fans) for tree in (found, grads))
        values = np.linalg.svd(update, compute_uv=False) / (optimizer.ADAM_RMS * np.sqrt(max(fans)))
        assert (values > 0.5).all() and (values < 1.3).all(), path  # five Newton-Schulz steps come this close to 1
        assert all(np.sum(u * g) < 0 for u, g in zip(update, grad, strict=True)), f"{path} goes against the gradient"


def muon_is_that_of_optax(**mesh):
    """On all devices of the process, in a mesh of these sizes."""
    rng = np.random.default_rng(1)
    shapes = {path: shape for path, (shape, _, _) in MATRICES.items()}
    axes = {p: next(found for pattern, found in optimizer.MATRICES if re.fullmatch(pattern, p)) for p in shapes}
    grads = [{p: rng.standard_normal(s).astype(np.float32) for p, s in shapes.items()} for _ in range(2)]
    ours = optimizer.scale_by_muon_and_adam(config(), list(shapes))
    theirs = optax.contrib.scale_by_muon(weight_dimension_numbers=axes)
    with jax.set_mesh(make_mesh(**mesh)):
        states = [tx.init(grads[0]) for tx in (ours, theirs)]
        for grad in grads:
            done = [jax.jit(tx.update)(grad, s) for tx, s in zip((ours, theirs), states, strict=True)]
            found, states = zip(*done, strict=True)
    for path, (shape, reduced, output) in MATRICES.items():
        most = max(math.prod(shape[a] for a in side) for side in (reduced, output))
        expected = np.asarray(found[1][path]) * optimizer.ADAM_RMS * math.sqrt(most)
        np.testing.assert_allclose(found[0][path], expected, atol=1e-4, err_msg=path)


def test_muon_is_that_of_optax():
    muon_is_that_of_optax()


def test_devices_that_share_the_work_of_muon_give_that_of_optax():
    code = "import jax, tests.training.test_optimizer as t; assert jax.device_count() == 3\n"
    code += "t.muon_is_that_of_optax(); t.muon_is_that_of_optax(data=1, fsdp=3)"
    own = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3", "PYTHONPATH": str(tiny_run.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_muon_leaves_embeddings_routers_norms_and_biases_to_adam():
    others = {
        "decoder/embed/embedding": (7, 4), "decoder/lm_head/kernel": (4, 7),
        "vision/block_1/moe/router/x/kernel": (1, 4, 2), "task_router/head/kernel": (4, 2), "connector/fc1/bias": (4,),
        "vision/pos": (5, 4), "aux_head/scale": (2, 3),
    }  # fmt: skip
    params = {path: np.ones(shape, np.float32) for path, shape in others.items()}
    for name in ("adamw", "muon"):
        tx = optimizer.build(config(name=name), 100, list(params))
        state = tx.init(params)
        for _ in range(2):
            found, state = tx.update(params, state, params)
        assert all(np.allclose(leaf, -0.1, rtol=1e-5) for leaf in found.values()), name


def test_an_unknown_optimiser_is_an_error_that_names_the_known_ones():
    with pytest.raises(UserError, match="--config.optimizer.name=sgd is unknown; use adamw or muon"):
        optimizer.build(config(name="sgd"), 10, list(PARAMS))
