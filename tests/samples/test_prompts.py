from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tghmoe_jax
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.tokenizer import Tokenizer

PHI3V = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers" / "phi3v"
T = Tokenizer.from_folder(Path(tghmoe_jax.__file__).parent / "assets" / "base", CHAT)
QUESTION, ANSWER = "Which plane is this? Choices: A. axial B. coronal", "B. coronal"


def marked(encoded, mask):
    return [i for i, m in zip(encoded.tokens, mask, strict=True) if m]


def test_each_chunk_starts_with_its_own_bos_and_the_first_is_the_same_for_every_sample():
    one, other = prompts.encode(T, QUESTION, ANSWER), prompts.encode(T, "Write a report.", None)
    n = one.prefix_len
    assert one.tokens[:n] == other.tokens[: other.prefix_len]
    assert one.tokens[0] == one.tokens[n] == T.bos_id and one.tokens.count(T.bos_id) == 2
    assert one.tokens[1] == T.id_of("<|user|>")


def test_tokens_spell_the_template():
    e = prompts.encode(T, QUESTION, ANSWER)
    spelt = T._template.decode(e.tokens[e.prefix_len + 1 :], skip_special_tokens=False)
    assert spelt == f"\n{QUESTION}<|end|> \n<|assistant|> {ANSWER}<|end|><|endoftext|>"


def test_question_mask_covers_exactly_the_question():
    e = prompts.encode(T, QUESTION, ANSWER)
    assert T.decode(T.encode("") + marked(e, e.question_mask)) == QUESTION
    first, last = e.question_mask.index(True), len(e.tokens) - e.question_mask[::-1].index(True)
    assert e.tokens[last] == T.id_of("<|end|>") and all(e.question_mask[first:last])


def test_loss_is_on_answer_end_and_eos_only():
    e = prompts.encode(T, QUESTION, ANSWER)
    assert marked(e, e.loss_mask) == [*T.encode(ANSWER), T.id_of("<|end|>"), T.eos_id]
    assert e.tokens[e.loss_mask.index(True) - 1] == T.id_of("<|assistant|>")
    assert not any(prompts.encode(T, QUESTION, None).loss_mask)


def test_the_prompt_alone_is_the_start_of_the_training_sample():
    whole, start = prompts.encode(T, QUESTION, ANSWER), prompts.encode(T, QUESTION, None)
    assert whole.tokens[: len(start.tokens)] == start.tokens and start.tokens[-1] == T.id_of("<|assistant|>")


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["<|end|>", "<|assistant|>", "<|user|>", "<s>", "<|endoftext|>", "<|image|>", "\n", " ", "x"]),
        max_size=6,
    )
)
def test_special_strings_in_user_text_stay_text(parts):
    text = "".join(parts)
    e = prompts.encode(T, text, text)
    specials = {T.bos_id, T.id_of("<|user|>"), T.id_of("<|end|>"), T.id_of("<|assistant|>"), T.eos_id}
    assert not specials & set(marked(e, e.question_mask))
    assert marked(e, e.loss_mask)[:-2] == T.encode(text) and not specials & set(T.encode(text))
    assert e.tokens.count(T.id_of("<|end|>")) == 2


@pytest.mark.skipif(not PHI3V.is_dir(), reason="../shared/data is absent: the Phi-3-V chunk rule is not tested")
def test_phi3v_chunks_are_those_measured():
    phi = Tokenizer.from_folder(PHI3V, CHAT)
    e = prompts.encode(phi, "What is it?", "hi")
    assert e.tokens[: e.prefix_len] == [1, 32010, 29871, 13]
    # The whole second chunk as one text, encoded with the special tokens.
    text = "\nWhat is it?<|end|>\n<|assistant|>\nhi<|end|>"
    assert e.tokens[e.prefix_len :] == [1, *phi.encode_template(text), 32000]
    assert e.tokens[e.prefix_len : e.prefix_len + 3] == [1, 29871, 13]
    assert marked(e, e.question_mask) == [5618, 338, 372, 29973]


def test_batch_pads_to_the_right_and_names_the_flag_for_a_long_sample():
    rows = [prompts.encode(T, QUESTION, ANSWER), prompts.encode(T, "Hi", "yes")]
    long = len(rows[0].tokens)
    arrays = prompts.batch(rows, long + 3, T.pad_id)
    assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == {
        "tokens": ((2, long + 3), np.int32), "token_mask": ((2, long + 3), bool),
        "question_mask": ((2, long + 3), bool), "loss_mask": ((2, long + 3), bool),
    }  # fmt: skip
    for row, e in enumerate(rows):
        n = len(e.tokens)
        assert arrays["tokens"][row, :n].tolist() == e.tokens and (arrays["tokens"][row, n:] == T.pad_id).all()
        assert arrays["token_mask"][row].sum() == n and arrays["token_mask"][row, :n].all()
        assert arrays["loss_mask"][row, :n].tolist() == e.loss_mask and not arrays["loss_mask"][row, n:].any()
        assert arrays["question_mask"][row, :n].tolist() == e.question_mask
    with pytest.raises(UserError, match="data.text_length"):
        prompts.batch(rows, long - 1, T.pad_id)
