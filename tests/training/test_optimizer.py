"""AdamW with rules: rates, decay, clipping, and expert groups that a step did not see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import optimizer

MOE = "vision/block_1/moe/experts/fc1/kernel"
STACKED = "vision/scan_2_3_1/block_2/moe/router/x/kernel"
PARAMS = {
    "connector/fc1/kernel": np.full((3, 2), 2.0, np.float32), "connector/fc1/bias": np.full(2, 2.0, np.float32),
    MOE: np.full((2, 4, 3), 2.0, np.float32), STACKED: np.full((3, 2, 5), 2.0, np.float32),
}  # fmt: skip


def config(**changes):
    cfg = common.get_config().optimizer
    cfg.update({"rate": 0.1, "warmup": 0.0, "final": 1.0, "clip": 1e9, **changes})
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
def test_a_group_that_a_step_did_not_see_keeps_values_and_moments(present):
    tx = optimizer.build(config(), 100, list(PARAMS))
    old = (PARAMS, tx.init(PARAMS))
    grads, state = ones(), old[1]
    for _ in range(2):
        found, state = tx.update(grads, state, PARAMS)
    new = (optax.apply_updates({path: jnp.asarray(leaf) for path, leaf in PARAMS.items()}, found), state)
    kept = optimizer.keep_absent_groups(new, old, jnp.asarray(present))
    leaves = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (kept, new, old)), strict=True)
    seen = 0
    for (path, leaf), (_, fresh), (_, stale) in leaves:
        name = next((key.key for key in path if isinstance(key, jax.tree_util.DictKey)), "")
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
    assert seen == 2 * 3  # two leaves and their two moments


def test_experts_that_all_tasks_share_are_always_updated():
    shared = {"vision/block_1/moe/experts/fc1/kernel": jnp.ones((1, 4, 3))}
    kept = optimizer.keep_absent_groups(shared, jax.tree.map(jnp.zeros_like, shared), jnp.array([True, False]))
    assert kept[MOE].all()


def test_a_rule_that_splits_a_scanned_run_names_its_flag():
    for key in ("rate_rules", "decay_rules"):
        with pytest.raises(UserError, match=f"--config.optimizer.{key}"):
            optimizer.build(config(**{key: ((r"vision/block_2/.*", 0.1),)}), 10, list(PARAMS))
