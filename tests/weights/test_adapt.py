"""Inflation, upcycling, the stage-1 to stage-2 copy, and the accounting of every leaf."""

import ml_dtypes
import numpy as np
import pytest

from tghmoe_jax.errors import UserError
from tghmoe_jax.weights import adapt
from tghmoe_jax.weights.phi3v import import_phi3v

LAYERS, G, E, R = (0, 2), 2, 4, 256


@pytest.fixture
def base(config, checkpoint):
    return import_phi3v(checkpoint, config)


def with_experts(flat, groups, depth=2):
    """Canonical shapes of a nested 3D model, written out by hand."""
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    shapes["vision/patch/kernel"] = (depth, 7, 7, 3, 12)
    for i in LAYERS:
        for leaf, shape in {
            "fc1/kernel": (12, 20), "fc1/bias": (20,), "fc2/kernel": (20, 12), "fc2/bias": (12,)
        }.items():  # fmt: skip
            del shapes[f"vision/block_{i}/mlp/{leaf}"]
            shapes[f"vision/block_{i}/moe/experts/{leaf}"] = (groups, E, *shape)
        shapes[f"vision/block_{i}/moe/router/x/kernel"] = (groups, 12, E)
        shapes[f"vision/block_{i}/moe/router/t/kernel"] = (groups, R, E)
    shapes["task_router/proj/kernel"] = (24, R)
    if groups > 1:
        shapes["task_router/head/kernel"] = (R, groups)
    return shapes


@pytest.mark.parametrize("mode", adapt.INFLATIONS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_inflated_patches_of_depth_constant_input_equal_2d_patches(mode, depth):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((7, 7, 3, 12)).astype(np.float32)
    image = rng.standard_normal((28, 28, 3)).astype(np.float32)
    inflated = adapt.inflate_patch(kernel, depth, mode)
    assert inflated.shape == (depth, 7, 7, 3, 12) and inflated.dtype == kernel.dtype
    patches = image.reshape(4, 7, 4, 7, 3)
    volume = np.broadcast_to(image, (depth, 28, 28, 3)).reshape(depth, 4, 7, 4, 7, 3)
    flat2d = np.einsum("ypxqc,pqcw->yxw", patches, kernel)
    flat3d = np.einsum("zypxqc,zpqcw->yxw", volume, inflated)
    np.testing.assert_allclose(flat3d, flat2d, rtol=1e-4, atol=1e-5)


def test_average_inflation_by_a_power_of_two_is_exact_in_bf16():
    kernel = np.random.default_rng(0).standard_normal((7, 7, 3, 12)).astype(ml_dtypes.bfloat16)
    inflated = adapt.inflate_patch(kernel, 2, "average")
    assert inflated.dtype == kernel.dtype
    assert np.array_equal(inflated.astype(np.float32).sum(0), kernel.astype(np.float32))


def test_an_unknown_inflation_is_named():
    with pytest.raises(UserError, match="--config.model.inflation=mean"):
        adapt.inflate_patch(np.zeros((7, 7, 3, 12)), 2, "mean")


def test_every_expert_of_every_group_is_the_dense_ffn(base):
    flat, new = adapt.upcycle(base, LAYERS, G, E)
    assert new == [f"vision/block_{i}/moe/router/{s}/kernel" for i in LAYERS for s in "xt"]
    assert flat["vision/block_2/moe/experts/fc1/kernel"].shape == (G, E, 12, 20)
    for i in LAYERS:
        for leaf in ("fc1/kernel", "fc1/bias", "fc2/kernel", "fc2/bias"):
            experts, dense = flat[f"vision/block_{i}/moe/experts/{leaf}"], base[f"vision/block_{i}/mlp/{leaf}"]
            assert all(np.array_equal(experts[g, e], dense) for g in range(G) for e in range(E))
            assert f"vision/block_{i}/mlp/{leaf}" not in flat
    assert flat["vision/block_1/mlp/fc1/kernel"] is base["vision/block_1/mlp/fc1/kernel"]


def test_stage_2_copies_experts_and_token_routers_and_nothing_else(base):
    stage1, new = adapt.upcycle(base, LAYERS, 1, E)
    rng = np.random.default_rng(0)
    stage1 |= {path: rng.standard_normal((1, 12, E)) for path in new}
    stage2 = adapt.split_groups(stage1, G)
    for path, leaf in stage1.items():
        if "/moe/" in path:
            assert stage2[path].shape == (G, *leaf.shape[1:])
            assert all(np.array_equal(stage2[path][g], leaf[0]) for g in range(G))
        else:
            assert stage2[path] is leaf


def test_with_a_task_ffn_stage_2_leaves_token_experts_shared():
    stage1 = {"vision/block_1/moe/experts/fc1/bias": np.ones((1, E, 20)),
              "vision/block_2/task_ffn/experts/fc1/bias": np.ones((1, 1, 20))}  # fmt: skip
    for topology in ("stacked", "parallel"):
        stage2 = adapt.split_groups(stage1, G, topology)
        assert [leaf.shape for leaf in stage2.values()] == [(1, E, 20), (G, 1, 20)]


def test_assembling_stage_1_from_the_base_equals_inflating_and_upcycling(base):
    loaded, report = adapt.assemble(with_experts(base, 1), base)
    expected, new = adapt.upcycle(base, LAYERS, 1, E)
    expected["vision/patch/kernel"] = adapt.inflate_patch(base["vision/patch/kernel"], 2, "average")
    assert set(loaded) == set(expected)
    assert all(np.array_equal(loaded[path], expected[path]) for path in loaded)
    assert report.of("inflated") == ["vision/patch/kernel"]
    assert len(report.of("upcycled")) == 4 * len(LAYERS)
    assert set(report.of("new")) == {*new, "task_router/proj/kernel"}
    assert report.parameters["upcycled"] == len(LAYERS) * E * (12 * 20 + 20 + 20 * 12 + 12)
    assert sum(report.parameters.values()) == sum(np.prod(shape) for shape in with_experts(base, 1).values())


def test_assembling_stage_2_from_stage_1_equals_the_copy_rule(base):
    rng = np.random.default_rng(0)
    stage1 = {path: rng.standard_normal(shape) for path, shape in with_experts(base, 1).items()}
    loaded, report = adapt.assemble(with_experts(base, G), stage1, adapt.NEW_FROM_STAGE1)
    expected = adapt.split_groups(stage1, G)
    assert set(loaded) == set(expected)
    assert all(np.array_equal(loaded[path], expected[path]) for path in loaded)
    assert report.of("new") == ["task_router/head/kernel"]
    assert len(report.of("copied per task")) == 6 * len(LAYERS)


def test_stage_2_with_one_expert_per_task_upcycles_the_dense_ffn_of_stage_1(base):
    """With E = k = 1 stage 1 takes the dense code path (I11), so its FFN is what each task starts from."""
    shapes = {path: leaf.shape for path, leaf in base.items() if not path.startswith("vision/block_1/mlp")}
    shapes |= {path.replace("/mlp/", "/moe/experts/"): (G, 1, *base[path].shape)
               for path in base if path.startswith("vision/block_1/mlp")}  # fmt: skip
    loaded, report = adapt.assemble(shapes, base, adapt.NEW_FROM_STAGE1)
    assert len(report.of("upcycled")) == 4
    assert np.array_equal(loaded["vision/block_1/moe/experts/fc1/bias"][1, 0], base["vision/block_1/mlp/fc1/bias"])


def test_every_leaf_that_fits_nowhere_is_named_at_once(base):
    shapes = with_experts(base, 1)
    shapes["decoder/extra/kernel"] = (3, 3)
    shapes["vision/cls"] = (13,)
    shapes["vision/patch/kernel"] = (2, 7, 7, 1, 12)
    source = dict(base) | {"vision/stray": np.zeros(3), "vision/known": np.zeros(3)}
    with pytest.raises(UserError) as error:
        adapt.assemble(shapes, source, ignored=["vision/known"])
    for part in ("4 problems", "missing decoder/extra/kernel", "unused vision/stray",
                 "vision/cls has shape (12,), not (13,)", "vision/patch/kernel has shape"):  # fmt: skip
        assert part in str(error.value)
    assert "vision/known" not in str(error.value)


def test_the_report_can_be_read(base):
    _, report = adapt.assemble(with_experts(base, 1), dict(base) | {"aux": np.zeros(5)}, ignored=["aux"])
    text = str(report)
    assert [line.split()[0] for line in text.splitlines()] == ["reused", "inflated", "upcycled", "new", "ignored"]
