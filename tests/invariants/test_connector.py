"""I22 to I25: from features to visual tokens, and from slices to patches."""

import itertools
import math

import jax
import numpy as np
import pytest

from tests import tiny
from tghmoe_jax.models.config import ALLOWED
from tghmoe_jax.models.connector import Connector, cells_to_tokens, merge_patches, pool_depth


def connector(model, params, features, mask):
    """Tokens (B, L, W) and their mask, eagerly."""
    own = tiny.tree({path.removeprefix("connector/"): leaf for path, leaf in params.items() if "connector/" in path})
    return Connector(model.cfg).apply(own, features, mask)


def draw(slabs, rows=2, grid=4, width=24, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, slabs, grid * grid, width)).astype(np.float32)


def project(params, x):
    """Phi-3-V's MLP with exact GELU, in numpy."""
    x = x @ params["connector/fc1/kernel"] + params["connector/fc1/bias"]
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    return x @ params["connector/fc2/kernel"] + params["connector/fc2/bias"]


def rows_of(params, view, grid=4):
    """One view (P, C) as merged cells with a newline after every row of cells: (rows * (cells + 1), 4C)."""
    out = []
    for i in range(grid // 2):
        for j in range(grid // 2):
            out.append(np.concatenate([view[(2 * i + y) * grid + 2 * j + x] for y in (0, 1) for x in (0, 1)]))
        out.append(params["connector/sub_newline"])
    return np.stack(out)


def test_merged_cell_holds_its_four_patches_row_by_row():
    """I22: on an arange grid of 24 x 24, cell (0, 0) joins patches 0, 1, 24, 25."""
    merged = np.asarray(merge_patches(np.arange(576)[None, :, None], 24, 2))[0]
    assert merged.shape == (12, 12, 4)
    assert merged[0, 0].tolist() == [0, 1, 24, 25]
    assert merged[0, 1].tolist() == [2, 3, 26, 27]
    assert merged[1, 0].tolist() == [48, 49, 72, 73]
    assert merged[11, 11].tolist() == [550, 551, 574, 575]


def test_newlines_close_every_row_and_all_separators_pass_through_the_mlp():
    """I22: [rows of each depth group ; view separator ; rows of the global view], then the projector on all of it."""
    model = tiny.model()
    params = tiny.params(model)
    features = draw(3)
    tokens, mask = connector(model, params, features, np.ones((2, 3), bool))
    assert np.all(mask)
    for b in range(2):
        views = [rows_of(params, view) for view in features[b]]
        whole = [*views, params["connector/glb_newline"][None], rows_of(params, features[b].mean(axis=0))]
        tiny.close(tokens[b], project(params, np.concatenate(whole)))


def test_phi3vs_grid_has_a_newline_after_every_12_cells():
    """I22: at 24 x 24 patches a view is 12 rows of 12 cells and a newline."""
    sizes = tiny.CONFIG["vision_config"] | {"image_size": 48, "patch_size": 2}
    model = tiny.model(tiny.CONFIG | {"vision_config": sizes})
    params = tiny.params(model)
    tokens, _ = connector(model, params, draw(1, rows=1, grid=24), np.ones((1, 1), bool))
    newline = project(params, params["connector/sub_newline"])
    at = np.flatnonzero(np.all(np.isclose(tokens[0], newline, atol=1e-4), axis=1))
    expected = [13 * row + 12 for row in range(12)]
    assert at.tolist() == expected + [157 + place for place in expected]
    tiny.close(tokens[0, 156], project(params, params["connector/glb_newline"]))


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_identical_slabs_pool_to_themselves_and_to_the_global_view(pool):
    """I23."""
    model = tiny.model(depth_pool=pool)
    params = tiny.params(model)
    features = np.broadcast_to(draw(1), (2, 5, 16, 24))
    tokens, mask = connector(model, params, features, np.arange(5) < np.array([[5], [4]]))
    single, _ = connector(tiny.model(), params, features[:, :1], np.ones((2, 1), bool))
    views = np.asarray(tokens[:, : -6 - 1]).reshape(2, -1, 6, 32)
    for b, group in itertools.product(range(2), range(views.shape[1])):
        if mask[b, 6 * group]:
            tiny.close(views[b, group], single[b, :6])
    tiny.close(tokens[:, -6:], single[:, -6:])
    tiny.close(single[:, :6], single[:, -6:])


def test_depth_pooling_commutes_with_the_merge():
    """I23: with masked slabs and a remainder."""
    features, mask = draw(5), np.arange(5) < np.array([[5], [2]])
    pooled, _ = pool_depth(features, mask, 2)
    merged = np.asarray(merge_patches(features, 4, 2))
    after, _ = pool_depth(merged.reshape(2, 5, 4, 96), mask, 2)
    tiny.close(np.asarray(merge_patches(pooled, 4, 2)).reshape(2, 3, 4, 96), after, atol=1e-6)


def test_the_last_depth_group_is_the_masked_mean_of_the_remainder():
    """I24: five slabs in groups of two; a group without a real slab is masked and zero."""
    features, mask = draw(5), np.arange(5) < np.array([[5], [2]])
    pooled, seen = pool_depth(features, mask, 2)
    assert np.array_equal(seen, [[True, True, True], [True, False, False]])
    tiny.close(pooled[0, 2], features[0, 4])
    tiny.close(pooled[0, 0], features[0, :2].mean(axis=0))
    assert not np.any(pooled[1, 1:])


@pytest.mark.parametrize(("slabs", "pool"), [*itertools.product([1, 2, 5], [1, 2, 3]), (7, 4)])
def test_emitted_length_is_the_formulas(slabs, pool):
    """I24: for every depth and pool, depths that do not divide included; at 24 x 24 patches 156 ceil(D/p) + 157."""
    model = tiny.model(depth_pool=pool)
    shapes = jax.eval_shape(
        lambda x, m: connector(model, tiny.params(model), x, m), draw(slabs), np.ones((2, slabs), bool)
    )
    assert shapes[0].shape == (2, model.cfg.visual_tokens(slabs), 32) and shapes[1].shape == shapes[0].shape[:2]
    assert model.cfg.visual_tokens(slabs) == 6 * -(-slabs // pool) + 7
    full = tiny.model(
        tiny.CONFIG | {"vision_config": tiny.CONFIG["vision_config"] | {"image_size": 336, "patch_size": 14}},
        depth_pool=pool,
        patch_depth=2,
    )
    assert full.cfg.visual_tokens(2 * slabs) == full.cfg.visual_tokens(2 * slabs - 1) == 156 * -(-slabs // pool) + 157


@pytest.mark.parametrize(
    "changes",
    [{"spatial_pool": 2}, {"layout": "flat"}, {"layout": "flat", "spatial_pool": 2, "depth_pool": 2}],
)
def test_emitted_length_is_the_formulas_for_every_switch(changes):
    """I24 for the connector's switches; `flat` is pooled patches alone."""
    model = tiny.model(**changes)
    tokens, mask = connector(model, tiny.params(model), draw(3), np.ones((2, 3), bool))
    assert tokens.shape[1] == mask.shape[1] == model.cfg.visual_tokens(3)
    side = 2 // changes.get("spatial_pool", 1)
    if changes.get("layout") == "flat":
        assert tokens.shape[1] == side * side * -(-3 // changes.get("depth_pool", 1))


def test_spatial_pooling_is_the_mean_of_neighbouring_cells():
    model = tiny.model(spatial_pool=2, layout="flat")
    params = tiny.params(model)
    tokens, _ = connector(model, params, draw(2), np.ones((2, 2), bool))
    merged = np.asarray(merge_patches(draw(2), 4, 2))
    tiny.close(tokens, project(params, merged.mean(axis=(2, 3))))


@pytest.mark.parametrize("mode", ALLOWED["inflation"])
@pytest.mark.parametrize("depth", [2, 3])
def test_inflated_patches_equal_2d_patches_where_depth_is_constant(mode, depth):
    """I25: through the model's own patch embedding, slabs of repeated slices; a varying slab differs."""
    flat, deep = tiny.model_2d(), tiny.model_2d(patch_depth=depth)
    source = {name: leaf for name, leaf in tiny.canonical(flat).items() if not name.startswith("task_router")}
    source["vision/patch/kernel"] = source["vision/patch/kernel"][0]
    params = tiny.adapted(deep, source, inflation=mode)
    batch = tiny.batch(slices=4)
    expected = tiny.features(flat, tiny.adapted(flat, source), batch)
    repeated = batch | {key: batch[key].repeat(depth, axis=1) for key in ("slices", "slice_mask")}
    tiny.close(tiny.features(deep, params, repeated), expected)
    varying = repeated | {"slices": repeated["slices"].copy()}
    varying["slices"][:, depth // 2 :: depth] = 0
    assert tiny.distance(tiny.features(deep, params, varying), expected) > 0.05


@pytest.mark.parametrize("changes", [{}, {"layout": "flat"}])
def test_cells_follow_the_layout_of_the_visual_tokens(changes):
    """A label's cells fall on the tokens of those cells; the global view gets whole columns, separators only all."""
    model = tiny.model(**changes)
    slabs, side = 3, 2
    cells = np.random.default_rng(0).random((2, slabs, side, side, 5)) < 0.4
    cells[..., 0], cells[..., 1] = True, False
    found = np.asarray(cells_to_tokens(cells, model.cfg.flat))
    assert found.shape == (2, model.cfg.visual_tokens(slabs), 5)
    assert found[..., 0].all() and not found[..., 1].any()
    step = side + (not model.cfg.flat)
    for slab, i, j in np.ndindex(slabs, side, side):
        assert np.array_equal(found[:, (slab * side + i) * step + j], cells[:, slab, i, j])
    if not changes:
        assert np.array_equal(found[:, -side * step], cells[:, :, 0, 0].any(axis=1)), "first cell of the global view"
        assert not found[:, side, 2:].any(), "a newline"
