"""I2 to I8: what must hold when 2D attention is applied over depth."""

import jax
import numpy as np
import pytest

from tests import tiny
from tests.bases.family_fixtures import FAMILIES, WRITERS
from tghmoe_jax.bases.base import describe, load_base

DENSE = {"layers": ()}
DEPTHS = [1, 2]
SLABS = 4


def tower_3d(depth: int):
    return tiny.model(patch_depth=depth, tgh=DENSE)


def inflated(model):
    """2D leaves, and the weights of a 3D model made from them by the adaptation rules."""
    source = tiny.canonical(tiny.model_2d())
    source = {name: leaf for name, leaf in source.items() if not name.startswith("task_router")}
    source["vision/patch/kernel"] = source["vision/patch/kernel"][0]
    return tiny.adapted(model, source)


def same_slices(batch):
    """Every slice replaced by the first."""
    return batch | {"slices": np.broadcast_to(batch["slices"][:, :1], batch["slices"].shape)}


def one_slice(batch):
    return batch | {"slices": batch["slices"][:, :1], "slice_mask": batch["slice_mask"][:, :1]}


@pytest.mark.parametrize("depth", DEPTHS)
def test_identical_slices_without_rotation_give_the_2d_features_in_every_slab(depth):
    """I2: D identical slices at RoPE scale 0 equal the 2D model; with rotation they do not."""
    model, flat = tower_3d(depth), tiny.model_2d()
    batch = same_slices(tiny.batch(slices=SLABS * depth))
    expected = tiny.features(flat, inflated(flat), one_slice(batch))
    params = inflated(model)
    found = tiny.features(model, params, batch, depth_scale=0.0)
    assert found.shape == (2, SLABS, 16, 24) and np.abs(expected).max() > 1
    tiny.close(found, np.broadcast_to(expected, found.shape))
    rotated = tiny.features(model, params, batch, depth_scale=1.0)
    assert min(tiny.distance(rotated[:, d], expected[:, 0]) for d in range(SLABS)) > 0.05


@pytest.mark.parametrize("depth", DEPTHS)
def test_one_slice_gives_the_2d_features_wherever_it_lies(depth):
    """I3: a volume of one slice equals the 2D model at any depth position, rotation on."""
    model, flat = tower_3d(depth), tiny.model_2d()
    batch = one_slice(tiny.batch(slices=SLABS * depth))
    expected = tiny.features(flat, inflated(flat), batch)
    params = inflated(model)
    for place in (0, 5, 31):
        found = tiny.features(model, params, batch, depth_index=np.full((2, 1), place))
        tiny.close(found, expected)


@pytest.fixture(scope="module", params=["phi3_v", *WRITERS])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return load_base(WRITERS[request.param](folder)) if request.param in WRITERS else tiny.base(folder)


def end_to_end(base, depth):
    """Logits of the 2D path and of the whole stage-1 model on one slice."""
    sizes = base.config["vision_config"]
    batch = tiny.batch(slices=1, size=sizes["image_size"], vocab=base.config["vocab_size"])
    found = []
    for model in (
        tiny.model(base.config, attn3d_layers=(), tgh=DENSE),
        tiny.model(base.config, patch_depth=depth, depth_pool=2),
    ):
        params = tiny.adapted(model, base.params)
        output = tiny.forward(model, params, batch | {"depth_index": np.full((2, 1), 7)})
        assert output.encoded.tokens.shape[1] == model.cfg.visual_tokens(1)
        assert np.all(output.encoded.mask)
        found.append(np.asarray(output.logits))
    return *found, output.encoded.tokens.shape[1]


@pytest.mark.parametrize("depth", DEPTHS)
def test_logits_of_one_slice_equal_those_of_the_2d_base(base, depth):
    """I3 end to end, on the imported base: 3D attention, rotation, pooling and upcycled experts change nothing."""
    facts = describe(base.config)
    side = facts.tower.grid // facts.projector.merge
    flat, volume, tokens = end_to_end(base, depth)
    assert tokens == (2 * side * (side + 1) + 1 if facts.projector.separators == "newlines" else side**2)
    assert np.std(flat) > 0.1
    tiny.close(volume, flat, atol=1e-4 * max(1, np.abs(flat).max()))


@pytest.mark.parametrize("depth", DEPTHS)
def test_identical_slices_of_the_imported_base_give_its_2d_features(base, depth):
    """I2 on a base from disk: inflated patches and 3D layers without rotation, experts upcycled from its FFNs."""
    sizes = base.config["vision_config"]
    batch = same_slices(tiny.batch(slices=2 * depth, size=sizes["image_size"], vocab=base.config["vocab_size"]))
    flat = tiny.model(base.config, attn3d_layers=(), tgh=DENSE)
    expected = tiny.features(flat, tiny.adapted(flat, base.params), one_slice(batch))
    model = tiny.model(base.config, patch_depth=depth)
    found = tiny.features(model, tiny.adapted(model, base.params), batch, depth_scale=0.0)
    assert found.shape[1] == 2 and np.abs(expected).max() > 1
    assert tiny.distance(found, np.broadcast_to(expected, found.shape)) < 1e-5 * np.abs(expected).max()


def test_logits_of_one_slice_at_phi3vs_grid_use_its_313_tokens(tmp_path):
    """I3 end to end at Phi-3-V's 24 x 24 grid: 2 x 156 + 1 = 313 visual tokens, the 2D path's logits."""
    sizes = tiny.CONFIG["vision_config"] | {"image_size": 48, "patch_size": 2}
    base = tiny.base(tmp_path, tiny.CONFIG | {"vision_config": sizes})
    flat, volume, tokens = end_to_end(base, depth=1)
    assert tokens == 313
    tiny.close(volume, flat)


def test_rotation_of_a_slices_own_tokens_changes_nothing():
    """I4: attention within a slab is the same with and without depth RoPE, whatever the positions."""
    model = tiny.model(tgh=DENSE, attn3d_kind="window", attn3d_window=0)
    params, batch = inflated(model), tiny.batch(slices=SLABS)
    places = np.array([[3, 0, 11, 40], [9, 9, 1, 0]])
    plain = tiny.features(model, params, batch, depth_scale=0.0)
    tiny.close(tiny.features(model, params, batch, depth_index=places), plain)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_shift_of_all_depth_positions_changes_nothing(depth):
    """I5."""
    model = tower_3d(depth)
    params, batch = inflated(model), tiny.batch(slices=SLABS * depth)
    places = np.tile(np.arange(SLABS), (2, 1))
    found = tiny.features(model, params, batch)
    tiny.close(tiny.features(model, params, batch, depth_index=places + 13), found)
    assert tiny.distance(tiny.features(model, params, batch, depth_index=2 * places), found) > 0.05


@pytest.mark.parametrize("depth", DEPTHS)
def test_permuting_slabs_with_their_positions_permutes_the_features(depth):
    """I6: with positions the features follow; without them they change, unless nothing is rotated."""
    model = tower_3d(depth)
    params, batch = inflated(model), tiny.batch(slices=SLABS * depth)
    order = np.array([2, 0, 3, 1])
    slabs = batch["slices"].reshape(2, SLABS, depth, 16, 16, 3)
    moved = batch | {"slices": slabs[:, order].reshape(batch["slices"].shape)}
    places = np.tile(order, (2, 1))
    found = tiny.features(model, params, batch)[:, order]
    tiny.close(tiny.features(model, params, moved, depth_index=places), found)
    assert tiny.distance(tiny.features(model, params, moved), found) > 0.05
    still = tiny.features(model, params, batch, depth_scale=0.0)[:, order]
    tiny.close(tiny.features(model, params, moved, depth_scale=0.0), still)


def noise_in_padding(batch, seed=9):
    """Other content in every masked slice."""
    noise = np.random.default_rng(seed).integers(0, 255, batch["slices"].shape, np.uint8)
    real = batch["slice_mask"][:, :, None, None, None]
    return batch | {"slices": np.where(real, batch["slices"], noise)}


def losses_of(stats):
    return [np.asarray(part) for s in stats.values() for part in (s.balance, s.z, s.load, s.entropy, s.sample_load)]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_content_and_amount_of_padding_change_nothing(family, depth):
    """I7: tokens of valid slabs, router losses and logits; row 1 ends inside a slab where slabs are deeper."""
    model = tiny.model(FAMILIES[family], patch_depth=depth, depth_pool=depth)
    params = tiny.params(model)
    batch = tiny.batch(slices=4 * depth, real=[4 * depth, 2 * depth + 1])
    output = tiny.forward(model, params, batch)
    other = tiny.forward(model, params, noise_in_padding(batch))
    for found, expected in zip(jax.tree.leaves(other), jax.tree.leaves(output), strict=True):
        assert np.array_equal(found, expected)

    def longer(value):
        return np.concatenate([value, np.ones((2, 2 * depth, *value.shape[2:]), value.dtype)], axis=1)

    padded = batch | {"slices": longer(batch["slices"]), "slice_mask": longer(batch["slice_mask"])}
    padded["slice_mask"][:, 4 * depth :] = False
    wide = tiny.forward(model, params, noise_in_padding(padded))
    seen = np.asarray(wide.encoded.mask)
    assert not seen.all() and seen.sum(axis=1).tolist() == np.asarray(output.encoded.mask).sum(axis=1).tolist()
    tiny.close(wide.encoded.tokens[seen], output.encoded.tokens[np.asarray(output.encoded.mask)])
    tiny.close(wide.logits, output.logits)
    for found, expected in zip(losses_of(wide.encoded.stats), losses_of(output.encoded.stats), strict=True):
        tiny.close(found, expected)


@pytest.mark.parametrize("kind", ["joint", "window"])
def test_padding_changes_nothing_under_any_kind_of_3d_attention(kind):
    """I7 for the alternatives to joint attention."""
    model = tiny.model(attn3d_kind=kind)
    batch = tiny.batch(real=[4, 2])
    found, valid, _ = tiny.tower(model, tiny.params(model), batch)
    noisy, _, _ = tiny.tower(model, tiny.params(model), noise_in_padding(batch))
    assert np.array_equal(found[np.asarray(valid)], noisy[np.asarray(valid)])


def test_a_volume_without_any_real_slice_is_finite_and_invisible():
    """I7: guarded means where nothing is valid; the decoder sees the text alone."""
    model = tiny.model()
    params = tiny.params(model)
    batch = tiny.batch(real=[4, 4])
    batch["slice_mask"] = np.array([[True] * 4, [False] * 4])
    output = tiny.forward(model, params, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))
    assert not np.any(output.encoded.mask[1])
    hidden = tiny.forward(model, params, batch | {"image_visible": np.array([True, False])})
    tiny.close(hidden.logits[1], output.logits[1])


@pytest.mark.parametrize("backend", ["plain", "blocked"])
def test_attention_with_a_block_diagonal_mask_equals_2d_attention(backend):
    """I8: the 3D path under a mask of single slabs is the 2D path."""
    model = tiny.model(tgh=DENSE, attn3d_kind="window", attn3d_window=0, attention=backend)
    flat, batch = tiny.model_2d(), tiny.batch(slices=SLABS)
    expected = tiny.features(flat, inflated(flat), batch)
    tiny.close(tiny.features(model, inflated(model), batch), expected)


def test_a_batch_without_slices_equals_the_prompt_beside_a_picture_that_is_not_seen():
    model = tiny.model()
    params, batch = tiny.params(model), tiny.batch(rows=2, slices=4)
    real = batch["token_mask"][:, tiny.PREFIX + 1 :]
    unseen = tiny.forward(model, params, batch | {"image_visible": np.zeros(2, bool)}).logits
    text = tiny.forward(model, params, batch | {"slices": batch["slices"][:, :0], "slice_mask": np.ones((2, 0), bool)})
    tiny.close(np.asarray(text.logits)[real], np.asarray(unseen)[real])
