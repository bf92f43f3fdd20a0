"""LLaVA's table: every generation of names, real config.json files that leave sizes to their library, and faults."""

import json
import math

import ml_dtypes
import numpy as np
import pytest

from tghmoe_jax.bases import llava, phi3v
from tghmoe_jax.bases.base import load_base, save_base
from tghmoe_jax.errors import UserError
from tghmoe_jax.weights.storage import read_tensors, write_tensors

VISION = {
    "model_type": "clip_vision_model", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 3, "image_size": 28, "patch_size": 7,
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50,
}  # fmt: skip
# What llava-hub's 7B says of itself: the decoder's type, and no sizes.
LLAVA_1_5 = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
    "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
    },
}  # fmt: skip


def published(kind: str, **more) -> dict:
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 49,
        "text_config": TEXT | {"model_type": kind} | more, "vision_config": VISION,
    }  # fmt: skip


def checkpoint(config: dict, generation: str, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = llava.entries(llava.flatten(config))
    return {
        llava.NAMES.named(row.name, generation): rng.standard_normal(row.torch_shape).astype(np.float32).astype(dtype)
        for row in rows
    }


def test_the_text_part_decides_how_it_is_spoken_to():
    chats = {kind: llava.FAMILY.chat(llava.flatten(published(kind))) for kind in ("llama", "mistral", "qwen2", "phi3")}
    expected = {"llama": llava.VICUNA, "mistral": llava.VICUNA, "qwen2": llava.CHATML, "phi3": phi3v.CHAT}
    assert chats == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "phi3"])
@pytest.mark.parametrize("generation", llava.NAMES.prefixes)
def test_export_of_import_is_bitwise_the_checkpoint(generation, kind, dtype):
    config = llava.flatten(published(kind))
    tensors = checkpoint(config, generation, dtype)
    assert llava.NAMES.of(tensors, config) == generation
    flat = llava.FAMILY.to_flax(tensors, config)
    assert {path: leaf.shape for path, leaf in flat.items()} == llava.FAMILY.shapes(config)
    again = llava.FAMILY.to_checkpoint(flat, config | {"generation": generation})
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_all_generations_give_the_same_tree():
    config = llava.flatten(published("qwen2"))
    trees = [llava.FAMILY.to_flax(checkpoint(config, one), config) for one in llava.NAMES.prefixes]
    for tree in trees[1:]:
        assert tree.keys() == trees[0].keys() and all(np.array_equal(tree[path], trees[0][path]) for path in tree)


def test_names_are_those_of_files_in_the_wild():
    config = llava.flatten(published("llama"))
    names = {one: set(checkpoint(config, one)) for one in llava.NAMES.prefixes}
    assert names["G1"] >= {
        "language_model.model.layers.1.self_attn.q_proj.weight", "language_model.lm_head.weight",
        "vision_tower.vision_model.pre_layrnorm.weight", "multi_modal_projector.linear_1.bias",
    }  # fmt: skip
    assert names["G2"] >= {
        "model.language_model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
        "model.vision_tower.vision_model.embeddings.class_embedding",
    }
    assert "vision_tower.embeddings.class_embedding" in names["G3"]
    assert "model.vision_tower.embeddings.class_embedding" in names["G4"]
    assert names["G5"] >= {
        "model.layers.0.mlp.gate_proj.weight",
        "model.mm_projector.2.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
    }


def test_the_full_7b_has_its_published_number_of_parameters():
    flat = llava.flatten(LLAVA_1_5)
    assert (flat["hidden_size"], flat["num_hidden_layers"], flat["intermediate_size"]) == (4096, 32, 11008)
    shapes = llava.FAMILY.shapes(flat)
    assert sum(map(math.prod, shapes.values())) == 7_063_427_072
    assert llava.flatten(flat) == flat  # a run's own record of it reads the same


def test_the_config_of_the_original_repository_is_understood():
    original = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 4096, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    for kind in ("llava_llama", "llava"):  # its later and its earlier files
        flat = llava.flatten(original | {"model_type": kind, "hidden_size": 5120, "num_hidden_layers": 40})
        assert flat["vision_config"]["image_size"] == 336 and flat["vocab_size"] == 32000 and not flat["qkv_bias"]
        assert (flat["hidden_size"], flat["num_hidden_layers"], flat["rms_norm_eps"]) == (5120, 40, 1e-5)
    qwen = original | {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen"}
    assert llava.flatten(qwen)["qkv_bias"]
    siglip = llava.flatten(qwen | {"mm_vision_tower": "google/siglip-so400m-patch14-384"})
    tower = llava.describe(siglip).tower
    assert (tower.layers, tower.executed, tower.grid, tower.post_norm, tower.class_token) == (26, 26, 27, False, False)
    for change, named in (
        ({"mm_vision_tower": "laion/CLIP-ViT-H-14"}, "mm_vision_tower is CLIP-ViT-H-14"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is linear"),
        ({"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"}, "names no Llama, Mistral or Qwen"),
    ):
        with pytest.raises(UserError, match=named):
            llava.flatten(original | change)


def test_a_folder_is_loaded_and_written_back_bit_for_bit(tmp_path):
    config = published("qwen2")
    tensors = checkpoint(config, "G1")
    write_tensors(tmp_path / "a", tensors, max_shard_bytes=5000)
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    base = load_base(tmp_path / "a")
    assert base.family == "llava" and base.config["qkv_bias"]
    save_base(tmp_path / "b", base.params, base.config, dtype=None)
    written = read_tensors(tmp_path / "b")
    assert written.keys() == tensors.keys()
    assert all(np.asarray(written[name]).tobytes() == tensors[name].tobytes() for name in tensors)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config


def test_names_of_another_generation_are_exported_again(tmp_path):
    config = published("llama")
    write_tensors(tmp_path / "a", checkpoint(config, "G4"))
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    base = load_base(tmp_path / "a")
    save_base(tmp_path / "b", base.params, base.config, dtype=None)
    assert read_tensors(tmp_path / "a").keys() == read_tensors(tmp_path / "b").keys()


def test_a_tie_that_only_the_top_level_states_counts():
    config = published("qwen2") | {"tie_word_embeddings": True}
    assert "decoder/lm_head/kernel" not in llava.FAMILY.shapes(llava.flatten(config))


def test_a_tied_head_may_be_written_out_but_must_agree():
    config = llava.flatten(published("qwen2", tie_word_embeddings=True))
    tensors = checkpoint(config, "G2")
    assert "lm_head.weight" not in tensors
    expected = llava.FAMILY.to_flax(tensors, config)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].copy()
    assert llava.FAMILY.to_flax(tensors, config).keys() == expected.keys()
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(UserError, match="lm_head.weight differs"):
        llava.FAMILY.to_flax(tensors, config)


def test_a_window_bounds_the_positions_and_longrope_keeps_its_factors():
    assert llava.flatten(published("mistral", sliding_window=64, max_position_embeddings=512))[
        "max_position_embeddings"] == 64  # fmt: skip
    rope = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0]}
    more = {"rope_scaling": rope, "max_position_embeddings": 512, "original_max_position_embeddings": 64}
    flat = llava.flatten(published("phi3", **more))
    assert flat["rope_scaling"]["long_factor"] == [1.0, 2.0, 3.0]
    assert flat["original_max_position_embeddings"] == 64
    magnitude = math.sqrt(1 + math.log(512 / 64) / math.log(64))
    assert flat["rope_magnitude"] == pytest.approx(magnitude)
    windowed = llava.flatten(published("phi3", **more, sliding_window=128))  # bounds positions, not the magnitude
    assert windowed["max_position_embeddings"] == 128 and windowed["rope_magnitude"] == pytest.approx(magnitude)
    stated = llava.flatten(published("phi3", **(more | {"rope_scaling": rope | {"attention_factor": 2.5}})))
    assert stated["rope_magnitude"] == 2.5


def test_all_problems_are_raised_together_with_their_names():
    config = llava.flatten(published("llama"))
    tensors = checkpoint(config, "G3")
    tensors["vision_tower.extra"] = np.zeros(1)
    tensors["language_model.model.norm.weight"] = np.zeros(25, np.float32)
    del tensors["multi_modal_projector.linear_2.bias"]
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3)  # a buffer
    with pytest.raises(UserError, match="3 problems") as error:
        llava.FAMILY.to_flax(tensors, config)
    for part in ("unknown vision_tower.extra", "language_model.model.norm.weight has shape (25,)",
                 "missing multi_modal_projector.linear_2.bias"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_config": TEXT | {"model_type": "gemma"}}, "gemma is none of llama, mistral, qwen2, phi3"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "is default, not full"),
        ({"vision_config": {"model_type": "dinov2"}}, "dinov2 is neither clip_vision_model nor siglip_vision_model"),
        ({"vision_feature_select_strategy": "full"}, "is full, not default"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is relu"),
        (
            {"text_config": TEXT | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}},
            "RoPE of the type linear",
        ),
    ],
)
def test_what_cannot_be_computed_is_named(change, named):
    with pytest.raises(UserError, match=named):
        llava.flatten(published("llama") | change)
