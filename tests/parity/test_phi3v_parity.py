"""The imported model computes what Hugging Face's CLIP and Phi-3 compute (I1, I3): random tiny weights, float32.

The connector's reference is this file's own, written from model-spec 2.3 with loops, because transformers has none.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

from tests.parity.peers import VISION, batch_of, our_model, randomised
from tghmoe_jax.bases.base import load_base
from tghmoe_jax.bases.phi3v import CLIP_MEAN, CLIP_STD, EMBED, TOWER
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.weights.storage import write_tensors

ATOL = 1e-4
PREFIX = 4
VISUAL = 13  # 2 x (2 rows of 2 cells and a newline) + the view separator
TEXT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 60, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "max_position_embeddings": 1024, "original_max_position_embeddings": 32, "tie_word_embeddings": False,
    "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.5, 7.0, 20.0]},
}  # fmt: skip


@pytest.fixture(scope="module")
def peer():
    """Hugging Face's tower and decoder, and the connector's tensors."""
    rope = {**TEXT["rope_scaling"], "rope_type": "longrope", "rope_theta": TEXT["rope_theta"]}
    rope["original_max_position_embeddings"] = TEXT["original_max_position_embeddings"]
    text = {key: value for key, value in TEXT.items() if key not in ("rope_scaling", "rope_theta")}
    clip = randomised(CLIPVisionModel(CLIPVisionConfig(**VISION)), 0)
    phi3 = randomised(Phi3ForCausalLM(Phi3Config(**text, rope_parameters=rope, pad_token_id=0, eos_token_id=2)), 1)
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "sub_GN": (1, 1, 1, 96), "glb_GN": (1, 1, 96), "img_projection.0.weight": (48, 96),
        "img_projection.0.bias": (48,), "img_projection.2.weight": (48, 48), "img_projection.2.bias": (48,),
    }  # fmt: skip
    return clip, phi3, {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def ours(peer, tmp_path_factory):
    """Our model with the same weights, through a sharded checkpoint on disk under Phi-3-V's names."""
    clip, phi3, connector = peer
    tensors = {TOWER + name.removeprefix("vision_model."): tensor for name, tensor in clip.state_dict().items()}
    tensors |= dict(phi3.state_dict()) | {EMBED + name: tensor for name, tensor in connector.items()}
    folder = tmp_path_factory.mktemp("phi3v")
    write_tensors(folder, {name: tensor.detach().numpy() for name, tensor in tensors.items()}, max_shard_bytes=40000)
    config = {"architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "vision_config": VISION, **TEXT}
    (folder / "config.json").write_text(json.dumps(config))
    return our_model(load_base(folder), PREFIX)


def prompts(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 60, (2, length)).astype(np.int32)


def clip_features(clip, images):
    pixels = (images - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    out = clip(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    return out.hidden_states[-2][:, 1:]


def connector_tokens(weights, features):
    """Phi-3-V's tokens of one crop and the global view, both the same 28 x 28 image: (B, 16, 24) -> (B, 13, 48)."""
    rows = []
    for z in features:
        view = []
        for i in range(2):
            for j in range(2):
                view.append(torch.cat([z[4 * (2 * i + dy) + 2 * j + dx] for dy in (0, 1) for dx in (0, 1)]))
            view.append(weights["sub_GN"].flatten())
        rows.append(torch.stack([*view, weights["glb_GN"].flatten(), *view]))
    x = torch.stack(rows) @ weights["img_projection.0.weight"].T + weights["img_projection.0.bias"]
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    return x @ weights["img_projection.2.weight"].T + weights["img_projection.2.bias"]


def picture_tokens(weights, features, rows, columns):
    """Phi-3-V's tokens of crops (rows * columns, 16, 24) after their global view, written cell by cell."""
    whole, crops = features[0], features[1:]

    def cell(z, i, j):
        return torch.cat([z[4 * (2 * i + dy) + 2 * j + dx] for dy in (0, 1) for dx in (0, 1)])

    tokens = []
    for i in range(2 * rows):
        for j in range(2 * columns):
            tokens.append(cell(crops[(i // 2) * columns + j // 2], i % 2, j % 2))
        tokens.append(weights["sub_GN"].flatten())
    tokens.append(weights["glb_GN"].flatten())
    for i in range(2):
        tokens += [cell(whole, i, 0), cell(whole, i, 1), weights["sub_GN"].flatten()]
    x = torch.stack(tokens) @ weights["img_projection.0.weight"].T + weights["img_projection.0.bias"]
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    return x @ weights["img_projection.2.weight"].T + weights["img_projection.2.bias"]


def peer_logits(peer, images, tokens, prefix=4):
    clip, phi3, connector = peer
    text = phi3.model.embed_tokens(torch.from_numpy(tokens).long())
    visual = connector_tokens(connector, clip_features(clip, images))
    return phi3(inputs_embeds=torch.cat([text[:, :prefix], visual, text[:, prefix:]], dim=1)).logits.numpy()


def close(found, expected):
    """Within the tolerance, and not because both are next to nothing."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


def test_features_equal_clips_second_to_last_hidden_states(peer, ours, images):
    batch = batch_of(images, prompts(8))
    zeros = jnp.zeros((2, 256)), jnp.zeros(2, jnp.int32)
    found, _, _ = ours(lambda m, *args: m.vision(*args), batch["slices"], batch["slice_mask"], *zeros)
    close(found[:, 0], clip_features(peer[0], images))


def test_visual_tokens_equal_phi3vs(peer, ours, images):
    encoded = ours(MLLM.encode, batch_of(images, prompts(8)))
    assert encoded.tokens.shape == (2, VISUAL, 48) and bool(encoded.mask.all())
    close(encoded.tokens, connector_tokens(peer[2], clip_features(peer[0], images)))


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 1)])
def test_visual_tokens_of_a_picture_in_crops_equal_phi3vs(peer, ours, grid):
    count = 1 + grid[0] * grid[1]
    views = np.random.default_rng(count).random((count, 28, 28, 3), np.float32)
    batch = batch_of(views[:1], prompts(8)[:1]) | {"slices": views[None], "slice_mask": np.ones((1, count), bool)}
    tokens, mask = ours(MLLM.encode_picture, batch, static=(grid,))
    expected = picture_tokens(peer[2], clip_features(peer[0], views), *grid)
    assert tokens.shape[1] == len(expected) and bool(mask.all())
    close(tokens[0], expected)


@pytest.mark.parametrize("length", [32, 33])  # the RoPE regime changes between 32 and 33 positions
def test_decoder_logits_equal_phi3s_in_both_rope_regimes(peer, ours, length):
    tokens = prompts(length)

    def logits(m, tokens):
        hidden, _ = m.decoder(m.decoder.embeddings(tokens), jnp.ones_like(tokens, bool), length)
        return m.decoder.logits(hidden)

    close(ours(logits, tokens), peer[1](torch.from_numpy(tokens).long()).logits.numpy())


def test_logits_of_a_one_slice_volume_equal_phi3vs_of_the_picture(peer, ours, images):
    tokens = prompts(20)  # 33 positions with the 13 visual tokens: the long regime
    found = ours(MLLM.__call__, batch_of(images, tokens)).logits
    close(found, peer_logits(peer, images, tokens)[:, 4 + VISUAL : -1])


@pytest.mark.parametrize(("length", "new"), [(12, 7), (24, 64)])  # all positions in the short, or in the long regime
def test_greedy_decoding_with_the_cache_gives_the_peers_tokens(peer, ours, images, length, new):
    tokens = prompts(length)
    batch = batch_of(images, tokens)
    encoded = ours(MLLM.encode, batch)
    logits, cache = ours(MLLM.prefill, batch, encoded.tokens, encoded.mask, static=(new,))
    for _ in range(new):
        expected = peer_logits(peer, images, tokens)[:, -1]
        close(logits, expected)
        token = np.asarray(jnp.argmax(logits, axis=-1), np.int32)
        assert np.array_equal(token, expected.argmax(-1))
        tokens = np.concatenate([tokens, token[:, None]], axis=1)
        logits, cache = ours(MLLM.decode, token, cache, static=(length + VISUAL + new,))
