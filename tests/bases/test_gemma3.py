"""Gemma 3 and MedGemma: config.json, names, prompts and refusals.

What they compute: tests/parity/test_gemma3_parity.py. The ids of prompts are compared with the tiny tokeniser that the
tests make and, where TGHMOE_GEMMA3_TOKENIZER names a folder with Gemma 3's tokenizer.json, with the real one
(docs/testing.md).
"""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, Gemma3ImageProcessor, Gemma3Processor

from configs import common
from tests.bases import family_fixtures
from tghmoe_jax.bases import gemma3
from tghmoe_jax.bases.base import describe, load_base, load_config, tokenizer_of
from tghmoe_jax.errors import UserError
from tghmoe_jax.models.config import DecoderLayer
from tghmoe_jax.reader import slice_protocol
from tghmoe_jax.reader.batches import Request
from tghmoe_jax.reader.opening import load_picture_reader
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.questions import Question

REAL = os.environ.get("TGHMOE_GEMMA3_TOKENIZER", "")
GEMMA_4B = common.MEDGEMMA | {"eos_token_id": [1, 106], "initializer_range": 0.02, "torch_dtype": "bfloat16"}
SIZES = {  # of the text part: width, FFN, layers, heads, key-value heads, head size, query scalar, window
    "270m": (640, 2048, 18, 4, 1, 256, 256, 512), "1b": (1152, 6912, 26, 4, 1, 256, 256, 512),
    "12b": (3840, 15360, 48, 16, 8, 256, 256, 1024), "27b": (5376, 21504, 62, 32, 16, 128, 168, 1024),
}  # fmt: skip


def changed(**parts) -> dict:
    """The 4B with changes to its top level, or to a part of it by that name."""
    config = copy.deepcopy(GEMMA_4B)
    for key, value in parts.items():
        config[key] = config[key] | value if isinstance(value, dict) and key in config else value
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return family_fixtures.write_gemma3(tmp_path_factory.mktemp("gemma3"))


def test_the_full_4b_has_its_published_number_of_tensors_and_parameters():
    flat = gemma3.flatten(GEMMA_4B)
    rows = gemma3.FAMILY.table(flat)
    sizes = {row.name: math.prod(row.torch_shape) for row in rows}
    assert len(sizes) == len(rows) == 883 and sum(sizes.values()) == 4_300_079_472
    parts = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.")
    counts = [sum(size for name, size in sizes.items() if name.startswith(part)) for part in parts]
    assert counts == [416_866_032, 2_950_272, 3_880_263_168]
    assert gemma3.flatten(flat) == flat  # a run's own record of it reads the same
    base = describe(flat)
    assert (base.tower.grid, base.projector.merge, base.decoder.query_scale) == (64, 4, 256**-0.5)
    full = [i for i, layer in enumerate(base.decoder.blocks) if not layer.window]
    assert full == [5, 11, 17, 23, 29]


@pytest.mark.parametrize("size", SIZES)
def test_other_sizes_are_a_config_alone(size):
    width, ffn, layers, heads, kv, head, scalar, window = SIZES[size]
    text = {
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": head, "query_pre_attn_scalar": scalar, "sliding_window": window,
    }  # fmt: skip
    decoder = gemma3.decoder(gemma3.flatten(changed(text_config=text)))
    assert (decoder.width, decoder.layers, decoder.head_size) == (width, layers, head)
    assert decoder.query_scale == scalar**-0.5 and decoder.windows[0] == window
    assert sum(not layer.window for layer in decoder.blocks) == layers // 6


def test_both_spellings_of_layers_and_rope_say_the_same():
    old = changed(text_config={"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6})
    new = copy.deepcopy(GEMMA_4B)
    del new["text_config"]["rope_scaling"]
    new["text_config"] |= {
        "layer_types": [gemma3.SLIDING if (i + 1) % 6 else gemma3.FULL for i in range(34)],
        "rope_parameters": {
            gemma3.FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            gemma3.SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    }  # fmt: skip
    assert describe(gemma3.flatten(old)) == describe(gemma3.flatten(new)) == describe(gemma3.flatten(GEMMA_4B))
    sliding, full = describe(gemma3.flatten(new)).decoder.blocks[4:6]
    assert isinstance(sliding, DecoderLayer) and (sliding.window, sliding.rope.theta, sliding.rope.long_factor) == (
        1024, 1e4, ())  # fmt: skip
    assert (full.window, full.rope.theta, full.rope.long_factor) == (0, 1e6, (8.0,) * 128)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (changed(text_config={"final_logit_softcapping": 30.0}), "soft-capped"),
        (changed(text_config={"attention_bias": True}), "attention has biases"),
        (changed(text_config={"hidden_activation": "gelu"}), "hidden_activation is gelu"),
        (changed(text_config={"use_bidirectional_attention": True}), "bidirectional"),
        (changed(text_config={"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "RoPE is neither"),
        (changed(mm_tokens_per_image=250), "mm_tokens_per_image 250"),
        (changed(vision_config={"hidden_act": "quick_gelu"}), "hidden_act is quick_gelu"),
        (changed(text_config={"layer_types": ["chunked_attention"] * 34}), "chunked_attention"),
        ({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}, "Gemma3ForCausalLM"),
        ({"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4"}, "Gemma4ForConditionalGen"),
        ({"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma"}, "PaliGemmaFor"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_named_in_one_sentence(tmp_path, config, named):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=named) as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokeniser_of_another_model_is_refused(folder, tmp_path):
    family_fixtures.write_gemma3(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"boi_token_index": 7}))
    with pytest.raises(UserError, match="<start_of_image> the id .* where config.json says 7"):
        tokenizer_of(tmp_path, load_config(tmp_path))
    small = copy.deepcopy(config)
    small["text_config"]["vocab_size"] = 300
    (tmp_path / "config.json").write_text(json.dumps(small))
    with pytest.raises(UserError, match="embed_tokens.weight has shape"):
        load_base(tmp_path)


# ---- prompts ---------------------------------------------------------------------------------------------------------

QUESTIONS = [
    "Is there a lesion?", "Which side is it on?\nA. left\nB. right", "What is this?\n\nAnswer with one word.", "1 2 34",
    "Größe in mm?", "病変はありますか", "a", "Write a report.", "Is it 3.5 cm?\tor less", "\u00a0odd  spaces   within",
]  # fmt: skip
ANSWERS = ["Yes.", "B. right", "a mass of 12 mm.\nNo effusion.", "nein"]
PROMPTS = [(question, answer) for question in QUESTIONS for answer in ANSWERS]


@pytest.fixture(scope="module", params=["tiny", "real"])
def spoken(request, folder):
    """The folder of a tokeniser, its processor with four tokens a picture, and our tokeniser."""
    if request.param == "real":
        if not Path(REAL, "tokenizer.json").is_file():
            pytest.skip("TGHMOE_GEMMA3_TOKENIZER names no folder with Gemma 3's tokeniser: it is not tested")
        folder, config = Path(REAL), gemma3.flatten(GEMMA_4B)
    else:
        config = load_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)
    return processor, tokenizer_of(folder, config)


@pytest.mark.parametrize("count", [1, 3])
def test_the_ids_of_40_prompts_are_the_processors(spoken, count):
    """With an answer and without, for one picture and for several."""
    processor, ours = spoken
    frame = list(prompts.around_image(ours)["frame"])
    soft = [ours.id_of("<image_soft_token>")] * 4
    pictures = (soft + frame) * (count - 1) + soft
    assert len(PROMPTS) == 40
    for question, answer in PROMPTS:
        user = {"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": question}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        for messages, target in (([user], None), ([user, said], answer)):
            text = processor.apply_chat_template(messages, add_generation_prompt=target is None, tokenize=False)
            image = Image.new("RGB", (32, 32))
            theirs = processor(text=text.removeprefix("<bos>"), images=[[image] * count])["input_ids"][0]
            one = prompts.encode(ours, question.strip(), target)
            found = one.tokens[: one.prefix_len] + pictures + one.tokens[one.prefix_len :]
            if target is not None:
                found += ours.encode_template("\n")  # after the turn, never generated
            assert found == list(theirs), (question, target)
            asked = [i for i, on in zip(one.tokens, one.question_mask, strict=True) if on]
            assert ours.decode(asked).strip() == question.strip()
    assert ours.stop_ids == {ours.id_of("<eos>"), ours.id_of("<end_of_turn>")}


@pytest.mark.parametrize("number", [1, 12])
def test_the_ids_of_the_slice_protocol_are_the_processors(spoken, number):
    """An instruction, slices each followed by its number, and a question, in one turn."""
    processor, tokenizer = spoken
    chat = tokenizer.chat
    ours = copy.copy(tokenizer)
    ours.chat = slice_protocol.protocol_template(chat)
    labels = slice_protocol.labels(ours, chat.after_image + chat.before_question, number)
    frame = prompts.around_image(ours)["frame"]
    soft = [ours.id_of("<image_soft_token>")] * 4
    content = [{"type": "text", "text": slice_protocol.INSTRUCTION}]
    for k in range(number):
        content += [{"type": "image"}, {"type": "text", "text": f"SLICE {k + 1}"}]
    for question in ("Is there a lesion?", "Based on the slices: which side?\nA. left\nB. right"):
        asked = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        pictures = [[Image.new("RGB", (32, 32))] * number]
        theirs = processor(text=text.removeprefix("<bos>"), images=pictures)["input_ids"][0]
        one = prompts.encode(ours, question, None)
        found = one.tokens[: one.prefix_len]
        for k, label in enumerate(labels):
            found += [*(frame if k else ()), *soft, *(i for i in label if i >= 0)]
        assert found + one.tokens[one.prefix_len :] == list(theirs)


def test_the_slice_protocol_shows_85_slices_of_more_and_says_which():
    assert slice_protocol.chosen(3) == [0, 1, 2] and slice_protocol.chosen(85) == list(range(85))
    kept = slice_protocol.chosen(512)
    assert len(kept) == 85 and kept[:3] == [6, 12, 18] and kept[-1] == 511  # round half to even, index 0 never taken
    slices, mask = np.zeros((6, 16, 16, 3), np.uint8), np.arange(6) < 4
    slices += 10 * np.arange(6, dtype=np.uint8)[:, None, None, None]
    views, seen = slice_protocol.slice_views(slices, mask, gemma3.views_of(Path(), {}), 32, 6)
    assert views.shape == (6, 32, 32, 3) and seen.tolist() == mask.tolist()
    np.testing.assert_allclose(views[:4].mean(axis=(1, 2, 3)) * 255, [0, 10, 20, 30], atol=0.01)


class Slices:
    """A source of one volume."""

    def __init__(self, slices: np.ndarray, real: int):
        self.given = slices, np.arange(len(slices)) < real

    def slices(self, index: int):
        return self.given


def test_a_base_asked_by_slices_sees_them_in_order_and_nothing_of_missing_ones(folder):
    """The likelihoods for two slices are those of them padded to three, and other than of the slices swapped."""
    slices = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    padded = np.concatenate([slices, np.full((1, 16, 16, 3), 99, np.uint8)])
    asked = Request(0, Question("vqa", "open", "", "Is there a lesion?", (), ""), ("yes", "no"))
    found = []
    for given in (slices, padded, slices[::-1]):
        reader = slice_protocol.load_slice_reader(folder, ("report", "vqa"), len(given))
        found.append(reader.answer(Slices(given, 2), [asked], 0)[0].likelihoods)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_a_picture_is_squashed_as_the_processor_does_it(folder):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (50, 90, 3), np.uint8))
    views, crops = gemma3.FAMILY.views_of(folder, {})(picture, 32)
    theirs = Gemma3ImageProcessor(size={"height": 32, "width": 32})(picture, return_tensors="np")["pixel_values"][0]
    tower = describe(load_config(folder)).tower
    assert crops is None and tower.mean == (0.5,) * 3
    np.testing.assert_allclose((views[0] - 0.5) / 0.5, np.asarray(theirs).transpose(1, 2, 0), atol=0.02)


def test_it_answers_a_question_about_a_picture(folder, tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "picture.png")
    reader = load_picture_reader(folder)
    answer = reader.ask(tmp_path / "picture.png", "Is there a lesion?", ("yes", "no"), new_tokens=4)
    assert len(answer.likelihoods) == 2 and all(math.isfinite(one) for one in answer.likelihoods)
