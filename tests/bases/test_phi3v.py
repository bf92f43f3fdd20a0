"""The porting table: lossless, strict, and right about rows and heads."""

import math

import ml_dtypes
import numpy as np
import pytest

from tghmoe_jax.bases import phi3v
from tghmoe_jax.errors import UserError

FULL = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064,
}  # fmt: skip


def as_port(name: str) -> str:
    """The name that the unmerged Hugging Face port gives to a published one."""
    for old, new in {
        "model.vision_embed_tokens.img_processor": "model.vision_model",
        "model.vision_embed_tokens.img_projection.0": "model.image_projection.fc1",
        "model.vision_embed_tokens.img_projection.2": "model.image_projection.fc2",
        "model.vision_embed_tokens.glb_GN": "model.glb_newline",
        "model.vision_embed_tokens.sub_GN": "model.sub_newline",
        "model.embed_tokens": "model.language_model.embed_tokens",
        "model.norm": "model.language_model.norm",
        "model.layers": "model.language_model.layers",
    }.items():
        name = name.replace(old, new)
    return name


def test_full_size_has_592_names_and_4146621440_parameters():
    table = phi3v.entries(FULL)
    shapes = phi3v.FAMILY.shapes(FULL)
    assert len({entry.name for entry in table}) == 592
    assert sum(math.prod(entry.torch_shape) for entry in table) == 4_146_621_440
    assert sum(map(math.prod, shapes.values())) == 4_146_621_440
    assert shapes["decoder/block_31/attn/k/kernel"] == (3072, 32, 96)
    assert shapes["vision/pos"] == (577, 1024)


def test_full_size_imports_without_memory():
    zero = np.zeros((), ml_dtypes.bfloat16)
    fakes = {entry.name: np.broadcast_to(zero, entry.torch_shape) for entry in phi3v.entries(FULL)}
    flat = phi3v.FAMILY.to_flax(fakes, FULL)
    assert {path: leaf.shape for path, leaf in flat.items()} == phi3v.FAMILY.shapes(FULL)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_export_of_import_is_bitwise_the_checkpoint(config, checkpoint, dtype):
    checkpoint = {name: tensor.astype(dtype) for name, tensor in checkpoint.items()}
    exported = phi3v.FAMILY.to_checkpoint(phi3v.FAMILY.to_flax(checkpoint, config), config)
    assert list(exported) == list(checkpoint)
    for name, tensor in checkpoint.items():
        assert exported[name].dtype == dtype
        assert exported[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("inner", [True, False])  # transformers 4 and 5 name the CLIP tower differently
def test_both_generations_of_names_give_the_same_tree(config, checkpoint, inner):
    renamed = {as_port(name): tensor for name, tensor in checkpoint.items()}
    if not inner:
        renamed = {name.replace("vision_model.vision_model.", "vision_model."): t for name, t in renamed.items()}
    assert set(renamed) & set(checkpoint) == {"lm_head.weight"}
    expected, flat = phi3v.FAMILY.to_flax(checkpoint, config), phi3v.FAMILY.to_flax(renamed, config)
    assert list(flat) == list(expected)
    assert all(np.array_equal(flat[path], expected[path]) for path in flat)


def test_fused_rows_and_heads_compute_the_same_projections(config, checkpoint):
    """Against torch's own convention, x @ W.T with contiguous q, k, v rows and heads, written without the table."""
    flat = phi3v.FAMILY.to_flax(checkpoint, config)
    x = np.random.default_rng(1).standard_normal((5, 24)).astype(np.float32)
    fused = x @ checkpoint["model.layers.1.self_attn.qkv_proj.weight"].T  # (5, 4*6 + 2*6 + 2*6)
    for part, heads, start in (("q", 4, 0), ("k", 2, 24), ("v", 2, 36)):
        ours = np.einsum("tc,cnh->tnh", x, flat[f"decoder/block_1/attn/{part}/kernel"])
        for head in range(heads):
            rows = slice(start + 6 * head, start + 6 * head + 6)
            np.testing.assert_allclose(ours[:, head], fused[:, rows], rtol=1e-5, atol=1e-5)
    both = x @ checkpoint["model.layers.0.mlp.gate_up_proj.weight"].T
    np.testing.assert_allclose(x @ flat["decoder/block_0/mlp/gate/kernel"], both[:, :40], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x @ flat["decoder/block_0/mlp/up/kernel"], both[:, 40:], rtol=1e-5, atol=1e-5)


def test_clip_heads_biases_and_output_projection(config, checkpoint):
    flat = phi3v.FAMILY.to_flax(checkpoint, config)
    prefix, ours = phi3v.CLIP.format(i=2), "vision/block_2/attn/"
    x = np.random.default_rng(2).standard_normal((5, 12)).astype(np.float32)
    k = x @ checkpoint[prefix + "self_attn.k_proj.weight"].T + checkpoint[prefix + "self_attn.k_proj.bias"]
    split = np.einsum("tc,cnh->tnh", x, flat[ours + "k/kernel"]) + flat[ours + "k/bias"]
    np.testing.assert_allclose(split.reshape(5, 12), k, rtol=1e-5, atol=1e-5)
    out = x @ checkpoint[prefix + "self_attn.out_proj.weight"].T
    joined = np.einsum("tnh,nhc->tc", x.reshape(5, 3, 4), flat[ours + "out/kernel"])
    np.testing.assert_allclose(joined, out, rtol=1e-5, atol=1e-5)


def test_patch_kernel_is_a_cross_correlation_over_rows_and_columns(config, checkpoint):
    flat = phi3v.FAMILY.to_flax(checkpoint, config)
    patch = np.random.default_rng(3).standard_normal((7, 7, 3)).astype(np.float32)  # rows, columns, channels
    torch_kernel = checkpoint[phi3v.TOWER + "embeddings.patch_embedding.weight"]
    expected = np.array([(torch_kernel[c] * patch.transpose(2, 0, 1)).sum() for c in range(12)])
    np.testing.assert_allclose(np.tensordot(patch, flat["vision/patch/kernel"], 3), expected, rtol=1e-4, atol=1e-4)


def test_all_problems_are_raised_together_with_their_names(config, checkpoint):
    checkpoint["model.layers.9.input_layernorm.weight"] = np.zeros(24, np.float32)
    checkpoint["model.language_model.norm.weight"] = checkpoint["model.norm.weight"]
    checkpoint["lm_head.weight"] = np.zeros((49, 24), np.float32)
    del checkpoint["model.embed_tokens.weight"], checkpoint["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(UserError) as error:
        phi3v.FAMILY.to_flax(checkpoint, config)
    for part in (
        "5 problems", "unknown model.layers.9.input_layernorm.weight", "model.language_model.norm.weight doubles",
        "lm_head.weight has shape (49, 24), not (50, 24)", "missing model.embed_tokens.weight",
        "missing model.layers.0.mlp.down_proj.weight",
    ):  # fmt: skip
        assert part in str(error.value)


def test_buffers_are_ignored_and_the_embedding_alias_must_agree(config, checkpoint):
    expected = phi3v.FAMILY.to_flax(checkpoint, config)
    checkpoint[phi3v.TOWER + "embeddings.position_ids"] = np.arange(17)[None]
    checkpoint["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    checkpoint[phi3v.ALIAS[0]] = checkpoint["model.embed_tokens.weight"].copy()
    assert list(phi3v.FAMILY.to_flax(checkpoint, config)) == list(expected)
    checkpoint[phi3v.ALIAS[0]][3, 4] += 1
    with pytest.raises(UserError, match="differs from model.embed_tokens.weight"):
        phi3v.FAMILY.to_flax(checkpoint, config)


def test_export_names_every_leaf_that_is_not_of_the_2d_model(config, checkpoint):
    flat = phi3v.FAMILY.to_flax(checkpoint, config)
    flat["vision/block_0/moe/experts/fc1/bias"] = np.zeros((1, 4, 20), np.float32)
    flat["vision/cls"] = np.zeros(13, np.float32)
    del flat["decoder/final_norm/scale"]
    with pytest.raises(UserError, match=r"3 problems.*moe/experts/fc1/bias.*missing decoder/final_norm.*\(13,\)"):
        phi3v.FAMILY.to_checkpoint(flat, config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"vision_config": {"hidden_act": "gelu"}}, "quick_gelu"),
        ({"vision_config": {"patch_size": 15}}, "patch_size"),
    ],
)
def test_a_config_that_cannot_be_a_phi3v_is_named(config, change, named):
    with pytest.raises(UserError, match=named):
        phi3v.sizes(config | change)


ROPE = {"type": "su", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0]}
POSITIONS = {"max_position_embeddings": 1024, "original_max_position_embeddings": 64}


def test_both_forms_of_the_rope_description_give_the_same(config):
    old = phi3v.flat_rope(config | POSITIONS | {"rope_scaling": ROPE, "rope_theta": 50000.0})
    new = ROPE | {"rope_type": "longrope", "rope_theta": 50000.0, "original_max_position_embeddings": 64}
    found = phi3v.flat_rope(config | {"max_position_embeddings": 1024, "rope_parameters": new})
    assert found["rope_theta"] == old["rope_theta"] == 50000.0
    for key in ("short_factor", "long_factor"):
        assert found["rope_scaling"][key] == old["rope_scaling"][key] == ROPE[key]
    assert found["rope_magnitude"] == old["rope_magnitude"] == pytest.approx(math.sqrt(1 + math.log(16) / math.log(64)))
    assert phi3v.flat_rope(config)["rope_scaling"] is None


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (ROPE | {"type": "linear"}, "type linear"),
        (ROPE | {"long_factor": [2.0]}, "long_factor another length than half the head size, 3"),
        ({"type": "su"}, "short_factor and long_factor"),
        ("su", "no object"),
        (ROPE | {"partial_rotary_factor": 0.5}, "a part of the head"),
    ],
)
def test_a_rope_that_is_not_computed_is_named(config, rope, said):
    with pytest.raises(UserError, match=said):
        phi3v.flat_rope(config | POSITIONS | {"rope_scaling": rope})
