"""The decoder's options against Gemma 3's own decoder with random weights, every number of it different from another.

No family of this project needs them yet: zero-centred norms before and after the parts, normed queries and keys, a
query scale of its own, two RoPE tables, sliding windows, and images that see themselves in both directions.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

from tests import tiny
from tests.bases import toy
from tests.parity.peers import randomised
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.config import DecoderLayer, Rope
from tghmoe_jax.models.decoder import LanguageModel, empty_cache

WIDTH, HEADS, KV, HEAD, FFN, LAYERS, VOCAB, WINDOW = 32, 4, 2, 12, 48, 7, 64, 6
SLIDING, FULL = Rope(1e4, (), (), 1.0), Rope(1e6, (8.0,) * (HEAD // 2), (8.0,) * (HEAD // 2), 1.0)


@pytest.fixture(scope="module")
def peer():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(
        hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, head_dim=HEAD, query_pre_attn_scalar=10, vocab_size=VOCAB, sliding_window=WINDOW,
        layer_types=["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(LAYERS)],
        rope_parameters=rope, attn_implementation="eager",
    )  # fmt: skip
    return randomised(Gemma3TextModel(config))


def ours(peer):
    """The same decoder here, and its variables."""
    cfg = tiny.model().cfg
    blocks = tuple(DecoderLayer(FULL, 0) if (i + 1) % 3 == 0 else DecoderLayer(SLIDING, WINDOW) for i in range(LAYERS))
    config = toy.CONFIG | {"layers": LAYERS, "width": WIDTH, "head": HEAD}
    decoder = dataclasses.replace(toy.describe(config).decoder, blocks=blocks)
    model = LanguageModel(dataclasses.replace(cfg, decoder=decoder))
    state = {name: leaf.numpy() for name, leaf in peer.state_dict().items()}
    leaves = {"embed/embedding": state["embed_tokens.weight"], "final_norm/scale": state["norm.weight"]}
    norms = {"attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
             "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}  # fmt: skip
    for i in range(LAYERS):
        theirs, block = f"layers.{i}.", f"block_{i}/"
        leaves |= {f"{block}{a}/scale": state[f"{theirs}{b}.weight"] for a, b in norms.items()}
        leaves |= {f"{block}attn/{n}_norm/scale": state[f"{theirs}self_attn.{n}_norm.weight"] for n in "qk"}
        for n, heads in (("q", HEADS), ("k", KV), ("v", KV)):
            kernel = state[f"{theirs}self_attn.{n}_proj.weight"].T
            leaves[f"{block}attn/{n}/kernel"] = kernel.reshape(WIDTH, heads, HEAD)
        leaves[block + "attn/out/kernel"] = state[theirs + "self_attn.o_proj.weight"].T.reshape(HEADS, HEAD, WIDTH)
        leaves |= {f"{block}mlp/{n}/kernel": state[f"{theirs}mlp.{n}_proj.weight"].T for n in ("gate", "up", "down")}
    paths = {f"scan_0_7_1/{name}" for name in leaves if name.startswith("block_0/")}
    flat = leaf_names.from_canonical([*paths, "embed/embedding", "final_norm/scale"], leaves)
    return model, tiny.tree(flat)


def additive(blocks: np.ndarray, window: int) -> torch.Tensor:
    """The published rule written out: (causal or of one image) and not farther back than the window; (B, 1, T, T)."""
    at = np.arange(blocks.shape[1])
    same = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] >= 0)
    seen = (at[None, :] <= at[:, None])[None] | same
    if window:
        seen &= (at[None, :] > at[:, None] - window)[None]
    return torch.where(torch.from_numpy(seen), 0.0, torch.finfo(torch.float32).min)[:, None]


def test_hidden_states_equal_gemma3s_with_images_and_windows(peer):
    rng = np.random.default_rng(0)
    model, variables = ours(peer)
    x = rng.standard_normal((2, 20, WIDTH)).astype(np.float32)
    blocks = np.full((2, 20), -1, np.int32)
    blocks[0, 2:6], blocks[0, 8:12], blocks[1, 1:5] = 0, 1, 0
    with torch.no_grad():
        masks = {"full_attention": additive(blocks, 0), "sliding_attention": additive(blocks, WINDOW)}
        theirs = {"inputs_embeds": torch.from_numpy(x), "position_ids": torch.arange(20)[None].expand(2, -1)}
        expected = peer(**theirs, attention_mask=masks).last_hidden_state
    valid = np.ones((2, 20), bool)
    found, _ = model.apply(variables, x, valid, 20, blocks=blocks)
    tiny.close(found, expected)
    without, _ = model.apply(variables, x, valid, 20)
    assert tiny.distance(without, expected) > 0.1

    cache = empty_cache(model.cfg, 2, 20)  # the pictures at once, then a token after the other
    first, cache = model.apply(variables, x[:, :14], valid[:, :14], 20, cache, blocks=blocks[:, :14])
    parts = [first]
    for i in range(14, 20):
        part, cache = model.apply(variables, x[:, i : i + 1], valid[:, i : i + 1], 20, cache)
        parts.append(part)
    tiny.close(jnp.concatenate(parts, axis=1), expected)


def test_token_embeddings_are_scaled_in_the_tables_own_dtype(peer):
    model, variables = ours(peer)
    ids = np.array([[3, 5, 60]])
    found = model.apply(variables, ids, method=LanguageModel.embeddings)
    with torch.no_grad():
        tiny.close(found, peer.embed_tokens(torch.from_numpy(ids)), atol=1e-5)
