"""An imported LLaVA computes what Hugging Face's computes, for every text part: random small weights, float32.

The peer is saved to disk by its own `save_pretrained`, so names, config.json and defaults are those of real files.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.parity.peers import VISION, batch_of, our_model, randomised
from tghmoe_jax.bases import llava
from tghmoe_jax.bases.base import load_base
from tghmoe_jax.bases.phi3v import CLIP_MEAN, CLIP_STD
from tghmoe_jax.models.mllm import MLLM

ATOL = 1e-4
IMAGE, PREFIX, NEW = 59, 4, 64  # the placeholder's id; text before the picture; tokens generated
TOKENS = 16  # of one picture
TEXT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
ORIGINAL = 96  # positions of the short RoPE regime, in which generation stays; one logits test goes beyond
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.5, 7.0, 20.0],
}  # fmt: skip
PARTS = {
    "llama": LlamaConfig(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 50000.0}),
    "mistral": MistralConfig(**TEXT, sliding_window=128),
    "qwen2": Qwen2Config(**TEXT),
    "qwen2 tied": Qwen2Config(**TEXT, tie_word_embeddings=True),
    "qwen2 with siglip": Qwen2Config(**TEXT),
    "phi3": Phi3Config(**TEXT, rope_parameters=LONG, original_max_position_embeddings=ORIGINAL, sliding_window=256),
}


@pytest.fixture(scope="module", params=PARTS)
def pair(request, tmp_path_factory):
    """The peer, and our model with its weights from disk, as a function of (method, *arguments)."""
    tied = bool(getattr(PARTS[request.param], "tie_word_embeddings", False))
    vision = {"vision_config": CLIPVisionConfig(**VISION)}
    if "siglip" in request.param:  # the feature of the last block, before the last norm
        tower = SiglipVisionConfig(**VISION | {"hidden_act": "gelu_pytorch_tanh", "vision_use_head": False})
        vision = {"vision_config": tower, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    config = LlavaConfig(
        **vision, text_config=PARTS[request.param], image_token_index=IMAGE, image_token_id=IMAGE,
        tie_word_embeddings=tied,
    )  # fmt: skip
    peer = randomised(LlavaForConditionalGeneration(config))
    folder = tmp_path_factory.mktemp("llava")
    peer.save_pretrained(folder, max_shard_size="60KB")
    base = load_base(folder)
    assert base.family == "llava"
    if request.param == "phi3":
        scaling = peer.model.language_model.rotary_emb.attention_scaling
        assert base.config["rope_magnitude"] == pytest.approx(scaling) and scaling > 1.1

    return peer, our_model(base, PREFIX)


def asked(peer, images, tokens) -> dict:
    """The peer's input: the picture's placeholders stand between the two chunks of text."""
    ids = np.concatenate([tokens[:, :PREFIX], np.full((len(tokens), TOKENS), IMAGE), tokens[:, PREFIX:]], axis=1)
    siglip = peer.config.vision_config.model_type == "siglip_vision_model"
    mean, std = ((0.5,) * 3, (0.5,) * 3) if siglip else (CLIP_MEAN, CLIP_STD)
    pixels = (images - np.float32(mean)) / np.float32(std)
    return {
        "input_ids": torch.from_numpy(ids),
        "pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        "attention_mask": torch.ones(ids.shape, dtype=torch.long),
    }


def prompts(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, IMAGE, (2, length))


@pytest.mark.parametrize("length", [20, ORIGINAL])
def test_logits_of_a_picture_and_its_prompt_equal_the_peers(pair, images, length):
    peer, ours = pair
    tokens = prompts(length)
    expected = peer(**asked(peer, images, tokens)).logits.numpy()[:, PREFIX + TOKENS : -1]
    assert np.abs(expected).max() > 1
    found = ours(MLLM.__call__, batch_of(images, tokens)).logits
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


def test_64_greedy_tokens_with_the_cache_equal_the_peers(pair, images):
    peer, ours = pair
    tokens = prompts(12)
    start = 12 + TOKENS
    expected = peer.generate(**asked(peer, images, tokens), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    expected = expected.numpy()[:, start:]
    batch = batch_of(images, tokens)
    encoded = ours(MLLM.encode, batch)
    logits, cache = ours(MLLM.prefill, batch, encoded.tokens, encoded.mask, static=(NEW,))
    found = []
    for _ in range(NEW):
        found.append(np.asarray(jnp.argmax(logits, axis=-1), np.int32))
        logits, cache = ours(MLLM.decode, found[-1], cache, static=(start + NEW,))
    np.testing.assert_array_equal(np.stack(found, axis=1), expected)
    assert len(np.unique(expected)) > 4


def test_export_gives_the_peers_own_files_back_bit_for_bit(pair):
    peer, _ = pair
    state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    config = llava.flatten(peer.config.to_dict())
    if config.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    config["generation"] = llava.NAMES.of(state, config)
    exported = llava.FAMILY.to_checkpoint(llava.FAMILY.to_flax(state, config), config)
    assert exported.keys() == state.keys()
    assert all(exported[name].tobytes() == state[name].tobytes() for name in state)
