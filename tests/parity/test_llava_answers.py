"""`predict --base` on a LLaVA folder says what Hugging Face's own tokeniser, processor rules and `generate` say."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests import tiny
from tests.parity.peers import VISION, randomised
from tghmoe_jax.bases import pictures
from tghmoe_jax.bases.base import EMBEDDED, load_config, tokenizer_of
from tghmoe_jax.bases.phi3v import CLIP_MEAN, CLIP_STD
from tghmoe_jax.models import generation
from tghmoe_jax.reader.batches import padded_length
from tghmoe_jax.reader.opening import load_picture_reader
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.tokenizer import FILES

NEW = 12
QUESTIONS = ("Which plane is this?", "What?", "Is there a nodule in the left lung (CT)?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random LLaVA with a Llama-like tokeniser: the embedded one under other special tokens."""
    folder = tmp_path_factory.mktemp("llava")
    text = (EMBEDDED / FILES[0]).read_text()
    for old, new in {"<|end|>": "<x1>", "<|user|>": "<x2>", "<|assistant|>": "<x3>", "<|image|>": "<image>",
                     "<|endoftext|>": "<x4>", "<|system|>": "<x5>"}.items():  # fmt: skip
        text = text.replace(f'"{old}"', f'"{new}"')
    (folder / FILES[0]).write_text(text)
    (folder / FILES[1]).write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / FILES[0]), bos_token="<s>", eos_token="</s>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    llama = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=1024, max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=llama, image_token_index=image, image_token_id=image
    )
    peer = randomised(LlavaForConditionalGeneration(config))
    peer.save_pretrained(folder)
    return folder, peer, tokenizer


def peers_ids(tokenizer, question: str, answer: str = "", visual: int = 1) -> list[int]:
    text = f"USER: {'<image>' * visual}\n{question} ASSISTANT:{answer}"
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("question", QUESTIONS)
def test_prompts_are_tokenised_as_one_string_with_the_image_in_it(folder, question):
    path, _, peer = folder
    ours = tokenizer_of(path, load_config(path))
    image = peer.convert_tokens_to_ids("<image>")
    for target in (None, "B. coronal"):
        encoded = prompts.encode(ours, question, target)
        found = [*encoded.tokens[: encoded.prefix_len], image, *encoded.tokens[encoded.prefix_len :]]
        expected = peers_ids(peer, question, "" if target is None else f" {target}")
        assert found == expected + ([] if target is None else [peer.eos_token_id])
        marked = [i for i, on in zip(encoded.tokens, encoded.question_mask, strict=True) if on]
        assert ours.decode(marked).strip() == question
        answer = [i for i, on in zip(encoded.tokens, encoded.loss_mask, strict=True) if on]
        assert ours.decode(answer).strip() == (target or "")
    assert ours.stop_ids == {peer.eos_token_id}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_about_a_picture_equals_the_peers(folder, tmp_path, question):
    path, peer, tokenizer = folder
    rng = np.random.default_rng(len(question))
    small = Image.fromarray(rng.integers(0, 256, (5, 8, 3), np.uint8))
    small.resize((80, 50), Image.Resampling.BICUBIC).save(tmp_path / "picture.png")
    image = Image.open(tmp_path / "picture.png").resize((44, 28), Image.Resampling.BICUBIC).crop((8, 0, 36, 28))
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    ids = torch.tensor([peers_ids(tokenizer, question, visual=16)])
    with torch.no_grad():
        out = peer.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()),
        )  # fmt: skip
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert expected
    assert load_picture_reader(path).ask(tmp_path / "picture.png", question, new_tokens=NEW).text == expected


def test_the_single_view_is_the_middle_of_the_picture():
    image = Image.new("RGB", (60, 30), (255, 0, 0))
    image.paste((0, 255, 0), (15, 0, 45, 30))
    view, crops = pictures.square(image, 30)
    assert crops is None
    assert view.shape == (1, 30, 30, 3) and (view[0, :, 2:-2] == (0, 1, 0)).all()
    assert pictures.square(image.transpose(Image.Transpose.ROTATE_90), 28)[0].shape == (1, 28, 28, 3)


def test_a_question_of_another_length_compiles_nothing_anew(folder, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "picture.png")
    model = load_picture_reader(folder[0])
    model.ask(tmp_path / "picture.png", "What?", new_tokens=NEW)
    compiled = generation.generate._cache_size()
    model.ask(tmp_path / "picture.png", "Is there a nodule?", new_tokens=NEW)
    assert generation.generate._cache_size() == compiled


@pytest.mark.parametrize("tokens, others, expected", [
    (5, 20, 32), (32, 20, 32), (33, 20, 64),
    (70, 30, 70),  # to 96 would pass the 100 positions of the first RoPE regime
    (71, 30, 96),  # past it anyway
    (150, 45, 155),  # 160 would not fit the model
])  # fmt: skip
def test_texts_are_padded_within_their_rope_regime(tokens, others, expected):
    decoder = dataclasses.replace(tiny.model().cfg.decoder, original_positions=100, max_positions=200)
    assert padded_length(decoder, tokens, others, 0) == expected
