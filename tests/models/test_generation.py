"""The key/value cache: prefill and decode give the logits of the full forward, whatever the padding before them."""

import functools

import jax
import numpy as np
import pytest

from tests import tiny
from tghmoe_jax.models import generation
from tghmoe_jax.models.mllm import MLLM

ANSWER = 4
LENGTHS = [14, 11, 9]


@pytest.fixture(scope="module")
def case():
    """A model, its weights, full text, the prompts alone, and visual tokens of which some are masked in two rows."""
    model = tiny.model_2d()
    full = tiny.batch(rows=3, lengths=LENGTHS)
    prompt = full | {"token_mask": full["token_mask"] & ~full["loss_mask"]}
    prompt["tokens"] = np.where(prompt["token_mask"], full["tokens"], 0).astype(np.int32)
    visual = np.random.default_rng(0).standard_normal((3, 6, 32)).astype(np.float32)
    mask = np.array([[True] * 6, [True, True, False, False, True, True], [False] * 6])
    return model, tiny.params(model), full, prompt, visual, mask


@functools.partial(tiny.jit, static_argnums=(0, 1, 2))
def call(model, method, static, params, *args):
    return model.apply(tiny.tree(params), *args, *static, method=method)


def full_logits(case):
    model, params, full, _, visual, mask = case
    return np.asarray(call(model, MLLM.text_logits, (), params, full, visual, mask))


def answer_at(row):
    """Index into the full forward's logits of the position that predicts the row's first answer token."""
    return LENGTHS[row] - ANSWER - tiny.PREFIX - 1


def test_prefill_and_decode_give_the_logits_of_the_full_forward(case):
    """Right-padded prompts of different lengths; visual tokens masked in the middle and altogether."""
    model, params, full, prompt, visual, mask = case
    expected = full_logits(case)
    logits, cache = call(model, MLLM.prefill, (ANSWER,), params, prompt, visual, mask)
    for step in range(ANSWER + 1):
        for row in range(3):
            at = answer_at(row) + step
            if at < expected.shape[1]:  # row 0 fills the text: nothing follows its last token
                tiny.close(logits[row], expected[row, at])
        if step < ANSWER:
            token = np.array([full["tokens"][row, LENGTHS[row] - ANSWER + step] for row in range(3)], np.int32)
            logits, cache = call(model, MLLM.decode, (cache.valid.shape[1],), params, token, cache)
    assert cache.index == cache.valid.shape[1] == 6 + 14 + ANSWER


def test_padding_of_prompt_and_image_does_not_reach_the_logits(case):
    """Other tokens in padding and other features in masked visual tokens change nothing, to the last bit."""
    model, params, _, prompt, visual, mask = case
    before, _ = call(model, MLLM.prefill, (ANSWER,), params, prompt, visual, mask)
    other = prompt | {"tokens": np.where(prompt["token_mask"], prompt["tokens"], 5).astype(np.int32)}
    noise = np.where(mask[..., None], visual, 100).astype(np.float32)
    after, _ = call(model, MLLM.prefill, (ANSWER,), params, other, noise, mask)
    assert np.array_equal(before, after)


def test_a_masked_image_is_no_image(case):
    """Row 2 sees no visual token: as if none had been inserted, positions included."""
    model, params, full, _, visual, _ = case
    row = tiny.take(full, [2])
    masked = call(model, MLLM.text_logits, (), params, row, visual[2:], np.zeros((1, 6), bool))
    none = call(model, MLLM.text_logits, (), params, row, visual[2:, :0], np.zeros((1, 0), bool))
    tiny.close(masked, none)
    tiny.close(full_logits(case)[2:], none)


def test_unrolled_layers_give_the_logits_of_scanned_ones(case):
    model, params, _, prompt, visual, mask = case
    _, cache = call(model, MLLM.prefill, (ANSWER,), params, prompt, visual, mask)
    token = np.array([7, 3, 9], np.int32)
    scanned, expected = call(model, MLLM.decode, (cache.valid.shape[1],), params, token, cache)
    other, variables, split = generation.unrolled(model, tiny.tree(params), cache)
    logits, found = other.apply(variables, token, split, cache.valid.shape[1], method=MLLM.decode)
    tiny.close(logits, scanned)
    tiny.close(np.stack(found.k), expected.k)
    assert np.array_equal(found.valid, expected.valid) and found.index == expected.index


def test_greedy_generation_is_argmax_of_the_full_forward_and_ends_at_stop_tokens(case):
    model, params, full, prompt, visual, mask = case
    variables = tiny.tree(params)
    out = np.asarray(generation.generate(model, variables, prompt, visual, mask, ANSWER, ()))
    assert out.shape == (3, ANSWER) and np.all(out >= 0)
    tokens = full["tokens"].copy()
    for row in range(3):
        tokens[row, LENGTHS[row] - ANSWER : LENGTHS[row]] = out[row]
    again = np.asarray(call(model, MLLM.text_logits, (), params, full | {"tokens": tokens}, visual, mask))
    for row in range(3):
        at = answer_at(row)
        assert again[row, at : at + ANSWER].argmax(-1).tolist() == out[row].tolist()

    stop = int(out[0, 1])
    ended = np.asarray(generation.generate(model, variables, prompt, visual, mask, ANSWER, (stop,)))
    for row in range(3):
        hits = np.flatnonzero(out[row] == stop)
        kept = hits[0] if len(hits) else ANSWER
        assert ended[row].tolist() == [*out[row, :kept], *[-1] * (ANSWER - kept)]


def test_answer_likelihood_is_the_mean_log_probability_of_the_answer(case):
    model, params, full, _, visual, mask = case
    found = generation.answer_likelihood(model, tiny.tree(params), full, visual, mask)
    log_p = np.asarray(jax.nn.log_softmax(full_logits(case)))
    for row in range(3):
        at = answer_at(row)
        answer = full["tokens"][row, LENGTHS[row] - ANSWER : LENGTHS[row]]
        assert found[row] == pytest.approx(np.mean(log_p[row, at + np.arange(ANSWER), answer]), rel=1e-4)


def test_generation_never_drops_tokens_or_rematerialises():
    """I21: answers do not depend on the batch, whatever the training's dispatch."""
    model = tiny.model(tgh={"dispatch": "capacity"}, remat="full")
    served = generation.inference(model)
    assert (served.cfg.tgh.dispatch, served.cfg.remat) == ("ragged", "none")
    assert tiny.shapes(served) == tiny.shapes(model)
