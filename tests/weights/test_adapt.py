"""Inflation, upcycling, the stage-1 to stage-2 copy, and the accounting of every leaf."""

import ml_dtypes
import numpy as np
import pytest
import torch

from tghmoe_jax.bases import phi3v
from tghmoe_jax.errors import UserError
from tghmoe_jax.models.config import ALLOWED
from tghmoe_jax.weights import adapt

LAYERS, G, E, R = (0, 2), 2, 4, 256


@pytest.fixture
def base(config, checkpoint):
    return phi3v.FAMILY.to_flax(checkpoint, config)


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


@pytest.mark.parametrize("mode", ALLOWED["inflation"])
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


@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(6, 9), (8, 4), (5, 5)])
def test_positions_are_interpolated_as_torch_does_it(cls, old, new):
    table = np.random.default_rng(0).standard_normal((cls + old**2, 3)).astype(np.float32)
    found = adapt.resize_positions(table, (cls + new**2, 3))
    grid = torch.from_numpy(table[cls:]).reshape(1, old, old, 3).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(found[cls:], grid[0].permute(1, 2, 0).reshape(-1, 3).numpy(), atol=2e-6)
    assert np.array_equal(found[:cls], table[:cls]) and found.dtype == table.dtype
    assert adapt.resize_positions(table, (new**2 + 1 - cls, 3)) is None  # one has a class token, the other none


def test_stage_1_reuses_inflates_and_upcycles_every_leaf_of_the_base(base):
    shapes = with_experts(base, 1)
    loaded, report = adapt.assemble(shapes, base)
    routers = {path for path in shapes if "/router/" in path}
    assert set(report.of("new")) == {*routers, "task_router/proj/kernel"} and len(routers) == 2 * len(LAYERS)
    assert report.of("inflated") == ["vision/patch/kernel"]
    inflated = adapt.inflate_patch(base["vision/patch/kernel"], 2, "average")
    assert np.array_equal(loaded["vision/patch/kernel"], inflated)
    for path in report.of("reused"):
        assert loaded[path] is base[path]
    upcycled = report.of("upcycled")
    assert len(upcycled) == 4 * len(LAYERS)
    for path in upcycled:  # every expert is the dense FFN
        dense = base[path.replace("/moe/experts/", "/mlp/")]
        assert loaded[path].shape == (1, E, *dense.shape)
        assert all(np.array_equal(loaded[path][0, e], dense) for e in range(E))
    assert report.parameters["upcycled"] == len(LAYERS) * E * (12 * 20 + 20 + 20 * 12 + 12)
    assert sum(report.parameters.values()) == sum(np.prod(shape) for shape in shapes.values())


def test_stage_2_copies_experts_and_token_routers_per_task_and_nothing_else(base):
    rng = np.random.default_rng(0)
    stage1 = {path: rng.standard_normal(shape) for path, shape in with_experts(base, 1).items()}
    loaded, report = adapt.assemble(with_experts(base, G), stage1, adapt.NEW_FROM_STAGE1)
    assert report.of("new") == ["task_router/head/kernel"]
    assert set(report.of("copied per task")) == {path for path in stage1 if "/moe/" in path}
    assert set(loaded) == set(stage1)
    for path, leaf in stage1.items():
        if "/moe/" in path:
            assert loaded[path].shape == (G, *leaf.shape[1:])
            assert all(np.array_equal(loaded[path][g], leaf[0]) for g in range(G))
        else:
            assert loaded[path] is leaf


def test_with_a_task_ffn_stage_2_leaves_token_experts_shared():
    stage1 = {"vision/block_1/moe/experts/fc1/bias": np.ones((1, E, 20)),
              "vision/block_2/task_ffn/experts/fc1/bias": np.ones((1, 1, 20))}  # fmt: skip
    shapes = {path: ((1, E, 20) if "/moe/" in path else (G, 1, 20)) for path in stage1}
    loaded, report = adapt.assemble(shapes, stage1, adapt.NEW_FROM_STAGE1)
    assert [leaf.shape for leaf in loaded.values()] == [(1, E, 20), (G, 1, 20)]
    assert report.of("copied per task") == ["vision/block_2/task_ffn/experts/fc1/bias"]


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
