"""An imported Gemma 3 computes what Hugging Face's computes: random small weights, float32, norms that are not zero.

The peer is saved to disk by its own `save_pretrained`, so names, config.json and defaults are those of real files.
Seven layers (one full, and a pattern that does not divide them), a query scale that is not the head size's, windows
shorter than the sequence and than an image, two images a prompt, and a padded row.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.parity.peers import batch_of, our_model, randomised
from tghmoe_jax.bases import gemma3
from tghmoe_jax.bases.base import DTYPES, describe, load_base, save_base
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.weights import storage

ATOL = 1e-4
IMAGE, BEGIN, END, NEWLINES = 290, 288, 289, 110
SIZE, TOKENS, PREFIX, NEW = 56, 4, 5, 64  # pixels; of one picture; text before the picture; tokens generated
FRAME = (END, NEWLINES, BEGIN)
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 24, "vocab_size": 300, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 1, "max_position_embeddings": 512,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
VISION = {
    "hidden_size": 144, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIZE,
    "patch_size": 14, "vision_use_head": False,
}  # fmt: skip


@pytest.fixture(scope="module", params=[24, 3], ids=["window", "window shorter than an image"])
def pair(request, tmp_path_factory):
    """The peer, our model with its weights from disk as a function of (method, *arguments), and the loaded base."""
    config = Gemma3Config(
        text_config=TEXT | {"sliding_window": request.param}, vision_config=VISION, mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE, boi_token_index=BEGIN, eoi_token_index=END, image_token_id=IMAGE,
    )  # fmt: skip
    config._attn_implementation = "eager"
    peer = randomised(Gemma3ForConditionalGeneration(config), zero_centred="language_model|mm_soft_emb_norm")
    peer.model.language_model.embed_tokens.weight.data.mul_(0.2)  # else the tied head says the last token again
    folder = tmp_path_factory.mktemp("gemma3")
    peer.save_pretrained(folder, max_shard_size="300KB")
    base = load_base(folder)
    assert base.family == "gemma3" and len(list(folder.glob("*.safetensors"))) > 2
    return peer, our_model(base, PREFIX, FRAME, SIZE), base


@pytest.fixture(scope="module")
def images():
    """Two pictures for each of two prompts, (2, 2, 56, 56, 3) in 0..1."""
    return np.random.default_rng(0).random((2, 2, SIZE, SIZE, 3), np.float32)


def pixels(images) -> torch.Tensor:
    """As Gemma's processor scales them, (B * images, 3, H, W)."""
    flat = images.reshape(-1, SIZE, SIZE, 3) * 2 - 1
    return torch.from_numpy(flat.transpose(0, 3, 1, 2).copy())


def texts(length: int, short: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids (2, length) and their mask; the second row ends `short` tokens earlier."""
    tokens = np.random.default_rng(length).integers(3, NEWLINES, (2, length))
    return tokens, np.arange(length)[None] < np.array([[length], [length - short]])


def asked(images, tokens, mask) -> dict:
    """The peer's input: prefix, image, END newlines BEGIN, image, the rest; positions do not count padding."""
    rows = len(tokens)
    soft, frame = np.full((rows, TOKENS), IMAGE), np.tile(FRAME, (rows, 1))
    pictures = np.concatenate([soft, frame, soft], axis=1)
    ids = np.concatenate([tokens[:, :PREFIX], pictures, tokens[:, PREFIX:]], axis=1)
    valid = np.concatenate([mask[:, :PREFIX], np.ones_like(pictures, bool), mask[:, PREFIX:]], axis=1)
    return {
        "input_ids": torch.from_numpy(ids), "pixel_values": pixels(images),
        "attention_mask": torch.from_numpy(valid.astype(np.int64)),
        "token_type_ids": torch.from_numpy((ids == IMAGE).astype(np.int64)),
        "position_ids": torch.from_numpy(np.maximum(np.cumsum(valid, axis=1) - 1, 0)),
    }  # fmt: skip


def ours_of(images, tokens, mask) -> dict:
    batch = batch_of(np.zeros((len(tokens), SIZE, SIZE, 3), np.float32), tokens)
    return batch | {"slices": images, "slice_mask": np.ones(images.shape[:2], bool), "token_mask": mask}


def test_features_of_siglip_and_the_projector_equal_the_peers(pair, images):
    peer, ours, _ = pair
    features = peer.model.vision_tower(pixel_values=pixels(images)).last_hidden_state
    projected = peer.model.multi_modal_projector(features).numpy().reshape(2, 2 * TOKENS, -1)

    def tower(model: MLLM, batch):
        hidden = model.cfg.tgh.hidden
        return model.vision(batch["slices"], batch["slice_mask"], jnp.zeros((2, hidden)), jnp.zeros(2, jnp.int32))[0]

    batch = ours_of(images, *texts(12))
    found = np.asarray(ours(tower, batch)).reshape(features.shape)
    np.testing.assert_allclose(found, features.numpy(), rtol=0, atol=1e-5 * float(features.abs().max()))
    tokens = np.asarray(ours(MLLM.encode, batch).tokens)
    np.testing.assert_allclose(tokens, projected, rtol=0, atol=1e-5 * float(np.abs(projected).max()))


@pytest.mark.parametrize("size", [28, 84])
def test_features_at_another_image_size_equal_the_peers(pair, size):
    """Positions are interpolated; below the base's number of tokens a side, each patch is one."""
    peer, _, base = pair
    pictures = np.random.default_rng(size).random((2, 1, size, size, 3), np.float32)
    flat = torch.from_numpy((pictures[:, 0] * 2 - 1).transpose(0, 3, 1, 2).copy())
    expected = peer.model.vision_tower(pixel_values=flat, interpolate_pos_encoding=True).last_hidden_state
    facts = describe(base.config, size)
    assert facts.tower.grid == size // 14 and facts.projector.merge == (1 if size == 28 else 3)
    tokens = np.random.default_rng(0).integers(3, NEWLINES, (2, 8))
    ours = our_model(base, PREFIX, FRAME, size, facts, resized=True)

    def tower(model: MLLM, batch):
        hidden = model.cfg.tgh.hidden
        return model.vision(batch["slices"], batch["slice_mask"], jnp.zeros((2, hidden)), jnp.zeros(2, jnp.int32))[0]

    found = np.asarray(ours(tower, batch_of(pictures[:, 0], tokens)))[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_a_flat_layout_makes_one_block_of_the_scan(pair, images):
    """Without frames every visual token sees every other, whatever the view."""
    _, _, base = pair
    tokens, mask = texts(12)
    batch = ours_of(images, tokens, mask)
    blocks = {}
    for layout in ("sub_glb_3d", "flat"):
        ours = our_model(base, PREFIX, FRAME, SIZE, layout=layout)
        encoded = ours(MLLM.encode, batch)
        x, _, found = ours(MLLM._sequence, batch, encoded.tokens, encoded.mask)
        blocks[layout] = np.asarray(found)[0].tolist()
        assert x.shape[1] == len(blocks[layout])
    text, rest = [-1] * PREFIX, [-1] * (12 - PREFIX)
    assert blocks["flat"] == [*text, *[0] * 2 * TOKENS, *rest]
    assert blocks["sub_glb_3d"] == [*text, *[0] * TOKENS, *[-1] * len(FRAME), *[1] * TOKENS, *rest]


@pytest.mark.parametrize(("length", "short"), [(12, 0), (60, 9)])
def test_logits_of_two_pictures_and_a_prompt_equal_the_peers(pair, images, length, short):
    peer, ours, _ = pair
    tokens, mask = texts(length, short)
    expected = peer(**asked(images, tokens, mask)).logits.numpy()[:, PREFIX + 2 * TOKENS + len(FRAME) : -1]
    assert np.abs(expected).max() > 1
    found = np.asarray(ours(MLLM.__call__, ours_of(images, tokens, mask)).logits)
    seen = mask[:, PREFIX + 1 :]  # what stands after the text is padding
    seen = np.concatenate([np.ones((2, 1), bool), seen], axis=1)[:, : found.shape[1]] & mask[:, PREFIX:-1]
    np.testing.assert_allclose(found[seen], expected[seen], rtol=0, atol=ATOL)


def test_text_alone_equals_the_peers(pair):
    peer, ours, _ = pair
    tokens, mask = texts(50)
    expected = peer(input_ids=torch.from_numpy(tokens)).logits.numpy()[:, PREFIX:-1]
    batch = ours_of(np.zeros((2, 0, SIZE, SIZE, 3), np.float32), tokens, mask)
    np.testing.assert_allclose(ours(MLLM.__call__, batch).logits, expected, rtol=0, atol=ATOL)


def test_64_greedy_tokens_with_the_cache_equal_the_peers(pair, images):
    peer, ours, _ = pair
    tokens, mask = texts(20)
    start = 20 + 2 * TOKENS + len(FRAME)
    inputs = asked(images, tokens, mask)
    del inputs["position_ids"]  # without padding they are the index, which `generate` counts on from
    expected = peer.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False).numpy()[:, start:]
    batch = ours_of(images, tokens, mask)
    encoded = ours(MLLM.encode, batch)
    logits, cache = ours(MLLM.prefill, batch, encoded.tokens, encoded.mask, static=(NEW,))
    found = []
    for _ in range(NEW):
        stopped = jnp.asarray(logits).at[:, TEXT["eos_token_id"]].set(-jnp.inf)  # as min_new_tokens does
        found.append(np.asarray(jnp.argmax(stopped, axis=-1), np.int32))
        logits, cache = ours(MLLM.decode, found[-1], cache, static=(start + NEW,))
    np.testing.assert_array_equal(np.stack(found, axis=1), expected)
    assert len(np.unique(expected)) > 4


def test_without_blocks_or_frames_the_logits_differ(pair, images):
    """The comparison above would see a missing block, window or frame."""
    _, ours, base = pair
    tokens, mask = texts(60)
    batch = ours_of(images, tokens, mask)
    expected = np.asarray(ours(MLLM.__call__, batch).logits)
    facts = describe(base.config)
    causal = dataclasses.replace(facts, decoder=dataclasses.replace(facts.decoder, image_blocks=False))
    wide = tuple(dataclasses.replace(layer, window=0) for layer in facts.decoder.blocks)
    wide = dataclasses.replace(facts, decoder=dataclasses.replace(facts.decoder, blocks=wide))
    for other, layout in ((causal, "sub_glb_3d"), (wide, "sub_glb_3d"), (facts, "flat")):
        found = our_model(base, PREFIX, FRAME, SIZE, other, layout)(MLLM.__call__, batch).logits
        assert np.abs(np.asarray(found) - expected).max() > 10 * ATOL


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("generation", ["saved", *gemma3.NAMES.prefixes])
def test_export_gives_files_of_every_generation_back_bit_for_bit(pair, tmp_path, generation, dtype):
    peer, _, base = pair
    if generation == "saved":
        tensors = {name: np.asarray(leaf) for name, leaf in storage.read_tensors(base.folder).items()}
    else:
        table = gemma3.NAMES.table(base.config | {"generation": generation})
        tensors = {row.name: row.to_torch(base.params) for row in table}
    tensors = {name: np.asarray(leaf).astype(DTYPES[dtype]) for name, leaf in tensors.items()}
    storage.write_tensors(tmp_path / "in", tensors, 200_000)
    (tmp_path / "in" / "config.json").write_text((base.folder / "config.json").read_text())
    again = load_base(tmp_path / "in", lazy=True)
    save_base(tmp_path / "out", again.params, again.config, dtype=None)
    written = storage.read_tensors(tmp_path / "out")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = np.asarray(written[name])
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes(), name
