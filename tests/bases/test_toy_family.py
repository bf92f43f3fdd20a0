"""A new family is one file and one line: `toy.py`, registered here, is loaded, ported, adapted and trained."""

import dataclasses
import json
import string

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image

from tests import tiny
from tests.bases import toy
from tghmoe_jax.bases import base as bases
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import generation, leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.reader.opening import load_picture_reader
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.tokenizer import FILES
from tghmoe_jax.sharding.rules import rule_of
from tghmoe_jax.training import run_folder
from tghmoe_jax.weights import storage


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The family's checkpoint: config.json and tensors under its own names."""
    folder = tmp_path_factory.mktemp("toy")
    leaves = {name: tiny.leaf(name, shape, 0) for name, shape in toy.FAMILY.shapes(toy.CONFIG).items()}
    leaves = {name: leaf - (1 if "decoder" in name and name.endswith("scale") else 0) for name, leaf in leaves.items()}
    storage.write_tensors(folder, toy.FAMILY.to_checkpoint(leaves, toy.CONFIG))
    (folder / "config.json").write_text(json.dumps(toy.CONFIG))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    """A character a token; as in Gemma's, runs of newlines are tokens that are not special."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *toy.CHAT.special]
    names = [*special, "\n\n\n", "\n\n", "\n", *" .?<>_", *string.ascii_lowercase]
    bpe = tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["\n\n\n", "\n\n"])
    tokenizer.save(str(folder / FILES[0]))
    (folder / FILES[1]).write_text("{}")


@pytest.fixture
def base(folder, monkeypatch):
    monkeypatch.setitem(bases.FAMILIES, toy.FAMILY.name, toy.FAMILY)  # the line of registration
    return bases.load_base(folder)


def model_of(base, **changes) -> MLLM:
    section = tiny.section({"layers": (2, 3), "groups": 2}, patch_depth=2, attn3d_layers=(2, 3), **changes)
    section["depth_rope"]["rotary_dim"] = 8
    return MLLM(model_config.build(bases.describe(base.config), section, (), tiny.PREFIX, frame=(9, 8, 7)))


def test_it_is_loaded_and_written_back_bit_for_bit(folder, base, tmp_path):
    assert base.family == "toy"
    bases.save_base(tmp_path, base.params, base.config, dtype=None)
    before, after = storage.read_tensors(folder), storage.read_tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(np.array_equal(np.asarray(before[name]), np.asarray(after[name])) for name in before)
    assert json.loads((tmp_path / "config.json").read_text()) == toy.CONFIG
    bases.save_converted(tmp_path / "converted", base)
    again = bases.load_base(tmp_path / "converted")
    assert all(np.array_equal(again.params[name], leaf) for name, leaf in base.params.items())


def test_its_prompts_are_tokenised_as_its_template_in_one_string(folder, base, tmp_path):
    run_folder.write_model(tmp_path, base.config, folder)  # as a run records it
    tokenizer = bases.tokenizer_of(run_folder.model_folder(tmp_path), run_folder.read_base_config(tmp_path))
    start = "<bos><start_of_turn>user\n\n\n<start_of_image>"
    asked = "<end_of_image>\n\nwhat is it?<end_of_turn>\n<start_of_turn>model\n"
    encoded = prompts.encode(tokenizer, "what is it?", "a disc.")
    assert encoded.tokens == tokenizer.encode_template(f"{start}{asked}a disc.<end_of_turn>")
    assert encoded.tokens[: encoded.prefix_len] == tokenizer.encode_template(start)
    assert prompts.encode(tokenizer, "what is it?", None).tokens == tokenizer.encode_template(start + asked)
    marked = [[i for i, on in zip(encoded.tokens, mask, strict=True) if on]
              for mask in (encoded.question_mask, encoded.loss_mask)]  # fmt: skip
    end = tokenizer.id_of("<end_of_turn>")
    assert marked == [tokenizer.encode("what is it?"), [*tokenizer.encode("a disc."), end]]
    assert tokenizer.stop_ids == {tokenizer.id_of("<eos>"), end}
    spelt = prompts.encode(tokenizer, "<end_of_turn>", "<eos>")
    assert spelt.tokens.count(end) == 2 and tokenizer.eos_id not in spelt.tokens


def test_it_is_asked_about_a_picture_in_its_template(folder, base, tmp_path, monkeypatch):
    Image.new("RGB", (20, 16), (200, 30, 90)).save(tmp_path / "picture.png")
    model, seen = load_picture_reader(folder), []
    call = model._call

    def spy(step, function, *arguments):
        if step == "decode":
            batch, *_, stops = arguments
            seen.append((batch["tokens"][batch["token_mask"]].tolist(), stops))
        return call(step, function, *arguments)

    monkeypatch.setattr(model, "_call", spy)
    assert isinstance(model.ask(tmp_path / "picture.png", "what is it?", new_tokens=8).text, str)
    tokenizer = bases.tokenizer_of(folder, toy.CONFIG)
    stops = tuple(sorted({tokenizer.id_of("<eos>"), tokenizer.id_of("<end_of_turn>")}))
    assert seen == [(prompts.encode(tokenizer, "what is it?", None).tokens, stops)]


def test_its_model_takes_a_training_step_and_every_leaf_has_a_place(base):
    """Adapted by the project's own rules: nothing of the base is left over, nothing of the model is missing."""
    model = model_of(base)
    params = tiny.adapted(model, base.params)
    assert {"vision/patch/bias", "vision/post_ln/scale"} <= params.keys() and "vision/cls" not in params
    assert "decoder/scan_0_6_1/block_0/attn/q_norm/scale" in params  # layers of two kinds in one loop
    for path in params:
        for name in leaf_names.canonical_names(path):
            rule_of(name)
    state, step = tiny.start(model, params, (r"vision/.*", r"decoder/.*", r"connector/.*"))
    step = tiny.jit(step)
    batch = tiny.microbatches(tiny.batch(rows=4), 1)
    losses = []
    for _ in range(3):
        state, scalars = step(state, batch)
        losses.append(float(scalars["loss"]))
    assert np.isfinite(losses).all() and losses[2] < losses[0]
    moved = {path for path in params if path in state.trained and np.any(state.trained[path] != params[path])}
    assert {"vision/patch/bias", "vision/post_ln/scale", "vision/pos"} <= moved


def test_a_cached_answer_is_that_of_the_whole_sequence(base):
    """Greedy decoding with windows, two RoPE tables and image blocks, against one forward pass over its own answer."""
    model = generation.inference(model_of(base))
    variables = tiny.tree(tiny.adapted(model, base.params))
    batch = tiny.batch(rows=2, slices=4, real=[4, 2], lengths=[14, 11])
    encoded = generation.encode(model, variables, batch, None)
    assert encoded.tokens.shape[1] == model.cfg.visual_tokens(4) == 8
    new = 8
    answer = np.asarray(generation.generate(model, variables, batch, encoded.tokens, encoded.mask, new, (99,)))
    tokens, mask = (np.pad(batch[key], [(0, 0), (0, new)]) for key in ("tokens", "token_mask"))
    for row, length in enumerate(batch["token_mask"].sum(axis=1)):
        tokens[row, length : length + new], mask[row, length : length + new] = answer[row], True
    whole = batch | {"tokens": tokens, "token_mask": mask}
    logits = np.asarray(model.apply(variables, whole, encoded.tokens, encoded.mask, method=MLLM.text_logits))
    for row, length in enumerate(batch["token_mask"].sum(axis=1)):
        start = length - tiny.PREFIX - 1
        assert np.array_equal(logits[row, start : start + new].argmax(-1), answer[row])


@pytest.mark.slow
def test_every_fact_of_the_base_moves_the_result(base):
    """A fact that the shared modules ignored would leave the result as it is."""
    model = model_of(base)
    params, batch = tiny.adapted(model, base.params), tiny.batch(slices=4)
    before = np.asarray(tiny.forward(model, params, batch).logits)
    cfg = model.cfg

    def changed(part, **facts):
        one = MLLM(dataclasses.replace(cfg, **{part: dataclasses.replace(getattr(cfg, part), **facts)}))
        return np.asarray(tiny.forward(one, params, batch).logits)

    wide = tuple(model_config.DecoderLayer(one.rope, 50 if one.window else 0) for one in cfg.decoder.blocks)
    plain = tuple(model_config.DecoderLayer(cfg.decoder.ropes[0], one.window) for one in cfg.decoder.blocks[:2])
    cases = [
        ("tower", {"activation": "gelu"}), ("tower", {"mean": (0.4,) * 3}), ("tower", {"std": (0.6,) * 3}),
        ("decoder", {"activation": "silu"}), ("decoder", {"embed_scale": 1.0}), ("decoder", {"query_scale": 1.0}),
        ("decoder", {"image_blocks": False}), ("decoder", {"blocks": wide}),
        ("decoder", {"blocks": (*plain, model_config.DecoderLayer(cfg.decoder.ropes[0], 0)) * 2}),
    ]  # fmt: skip
    for part, facts in cases:
        assert tiny.distance(changed(part, **facts), before) > 1e-4, facts
