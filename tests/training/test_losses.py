"""The loss: normalised by real answer tokens over the whole step, weighted by task, and its router terms.

Axis legend: B sample, T token, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from tests import tiny
from tests.tiny import exact_and_quick  # noqa: F401
from tghmoe_jax.models.decoder import score
from tghmoe_jax.models.mllm import EncodedVolume, Output
from tghmoe_jax.training import losses, rules
from tghmoe_jax.training.losses import LossWeights
from tghmoe_jax.training.step import TrainState, make_step

PREFIX, B, T, V = 2, 4, 9, 11
PLAIN = LossWeights(task=(1.0, 1.0), balance=0.0, z=0.0, router=0.0)


def sample(seed=0, answers=(1, 4, 2, 3)):
    """A batch whose answers have these lengths, at the end of the text, and logits for it."""
    rng = np.random.default_rng(seed)
    batch = {
        "tokens": rng.integers(0, V, (B, T)), "task": np.array([0, 1, 0, 1]),
        "loss_mask": np.arange(T) >= T - np.array(answers)[:, None], "aux": rng.integers(0, 2, (B, 3)),
    }  # fmt: skip
    return batch, rng.standard_normal((B, T - PREFIX - 1, V)).astype(np.float32)


def output(batch, logits, task_logits=None, aux=None, stats=None) -> Output:
    scores = score(logits, batch["tokens"][:, PREFIX + 1 :])
    return Output(None, scores, aux, EncodedVolume(None, None, task_logits, None, stats or {}))


def nll(batch, logits) -> np.ndarray:
    """(B, T - PREFIX - 1), zero outside the answer."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, batch["tokens"][:, PREFIX + 1 :, None], -1)[..., 0]
    return -picked * batch["loss_mask"][:, PREFIX + 1 :]


def total(batch, weights=PLAIN) -> jax.Array:
    return jnp.sum(losses.answer_weights(batch, weights, PREFIX))


def test_the_loss_is_the_mean_over_real_answer_tokens():
    batch, logits = sample()
    value, parts = losses.loss(output(batch, logits), batch, PLAIN, PREFIX, total(batch), 1)
    assert value == parts["lm"] == pytest.approx(nll(batch, logits).sum() / 10, rel=1e-5)


def test_shares_of_a_step_add_up_to_the_loss_of_the_whole_batch():
    """No mean of means: a microbatch of few answer tokens weighs as little as it holds."""
    batch, logits = sample()
    weights = dataclasses.replace(PLAIN, task=(1.0, 3.0), first_token=2.0, router=0.5, aux=0.7)
    task_logits = np.random.default_rng(1).standard_normal((B, 2)).astype(np.float32)
    aux = np.random.default_rng(2).standard_normal((B, 3)).astype(np.float32)

    def value(rows, shares):
        part = {key: leaf[rows] for key, leaf in batch.items()}
        out = output(part, logits[rows], task_logits[rows], aux[rows])
        return losses.loss(out, part, weights, PREFIX, total(batch, weights), shares)

    whole, parts = value(np.arange(B), 1)
    pieces = [value(np.array(rows), 2) for rows in ([0, 1], [2, 3])]
    assert whole == pytest.approx(float(sum(piece for piece, _ in pieces)), rel=1e-6)
    summed = jax.tree.map(jnp.add, *(found for _, found in pieces))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), summed, parts)
    log, log_summed = (losses.summarise(found, ("report", "vqa")) for found in (parts, summed))
    assert log.keys() == log_summed.keys()
    assert {"lm_report", "lm_vqa", "token_accuracy_vqa", "router", "aux"} <= set(log)


def test_task_weights_act_on_every_answer_token_and_the_first_token_weighs_more():
    batch, logits = sample()
    weights = dataclasses.replace(PLAIN, task=(1.0, 3.0), first_token=4.0)
    expected = np.zeros((B, T - PREFIX - 1))
    for row, length in enumerate((1, 4, 2, 3)):
        expected[row, -length:] = (1.0, 3.0)[row % 2]
        expected[row, -length] *= 4
    np.testing.assert_allclose(losses.answer_weights(batch, weights, PREFIX), expected)
    value, _ = losses.loss(output(batch, logits), batch, weights, PREFIX, total(batch, weights), 1)
    assert value == pytest.approx((nll(batch, logits) * expected).sum() / expected.sum(), rel=1e-5)
    _, parts = losses.loss(output(batch, logits), batch, weights, PREFIX, total(batch, weights), 1)
    log = losses.summarise(parts, ("report", "vqa"))
    for task, name in enumerate(("report", "vqa")):
        own = np.arange(B) % 2 == task
        expected_lm = (nll(batch, logits) * expected)[own].sum() / expected[own].sum()
        assert log[f"lm_{name}"] == pytest.approx(expected_lm, rel=1e-5)


def test_no_gradient_reaches_a_logit_outside_the_answers():
    batch, logits = sample()
    slope = jax.grad(lambda x: losses.loss(output(batch, x), batch, PLAIN, PREFIX, total(batch), 1)[0])(logits)
    assert np.array_equal(np.any(np.asarray(slope), -1), batch["loss_mask"][:, PREFIX + 1 :])


def test_a_batch_without_an_answer_gives_zero_and_not_nan():
    batch, logits = sample()
    batch["loss_mask"] = np.zeros((B, T), bool)
    value, parts = losses.loss(output(batch, logits), batch, PLAIN, PREFIX, total(batch), 1)
    assert value == 0 and all(np.isfinite(v) for v in losses.summarise(parts, ("report", "vqa")).values())


def test_token_accuracy_counts_the_answer_tokens_of_each_task():
    batch, logits = sample()
    logits[:] = 0
    np.put_along_axis(logits, batch["tokens"][:, PREFIX + 1 :, None], 5.0, axis=-1)  # everything right
    logits[1, -1] = -np.eye(V)[batch["tokens"][1, -1]]  # but one of the seven vqa tokens
    _, parts = losses.loss(output(batch, logits), batch, PLAIN, PREFIX, total(batch), 1)
    log = losses.summarise(parts, ("report", "vqa"))
    assert (log["token_accuracy_report"], log["token_accuracy_vqa"]) == (1.0, pytest.approx(6 / 7))


def test_router_and_auxiliary_terms_are_added_with_their_weights():
    batch, logits = sample()
    task_logits = np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]], np.float32)  # the third is wrong
    aux = np.zeros((B, 3), np.float32)
    weights = dataclasses.replace(PLAIN, router=0.5, aux=2.0)
    value, parts = losses.loss(output(batch, logits, task_logits, aux), batch, weights, PREFIX, total(batch), 1)
    right, wrong = np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0))
    assert parts["router"] == pytest.approx((3 * right + wrong) / 4, rel=1e-5) and parts["router_accuracy"] == 0.75
    assert parts["aux"] == pytest.approx(np.log(2), rel=1e-5)
    assert value == pytest.approx(float(parts["lm"] + 0.5 * parts["router"] + 2.0 * parts["aux"]), rel=1e-6)
    # A label that is not known adds nothing, whatever is stated of it.
    unknown = {**batch, "aux": np.where(np.arange(3) == 1, -1, batch["aux"])}
    stated = aux + np.array([0, 40, 0], np.float32)
    _, parts = losses.loss(output(unknown, logits, None, stated), unknown, weights, PREFIX, total(batch), 1)
    assert parts["aux"] == pytest.approx(np.log(2) * 2 / 3, rel=1e-5)
    _, parts = losses.loss(output(batch, logits, None, aux), batch, PLAIN, PREFIX, total(batch), 1)
    assert "aux" not in parts and "router" not in parts


def test_the_share_of_a_group_without_tokens_says_nothing():
    load = jnp.array([[[3.0, 1.0], [0.0, 0.0]]])  # one layer, the second group unseen
    share = losses.load_shares(load)
    assert share[0, 0].tolist() == [0.75, 0.25] and np.isnan(share[0, 1]).all()
    parts = {key: jnp.zeros(2) for key in ("task_nll", "task_weight", "task_right", "task_tokens")} | {"load": load}
    log = losses.summarise(parts, ("report", "vqa"))
    assert (log["moe/load_max_over_mean"], log["moe/load_min_share"]) == (1.5, 0.25)


# ------------------------------------------------------------------------------------------------ the step as a whole


def test_accumulation_changes_neither_loss_nor_parameters():
    """1 and 4 microbatches, without the balance loss (it is not linear in the batch); answers of unequal length."""
    model = tiny.uniform({"groups": 2})
    params = {path: jnp.asarray(leaf) for path, leaf in tiny.params(model).items()}
    trains = rules.trainable(params, common.STAGE2_TRAINABLE)
    trained = {path: params[path] for path in params if trains[path]}
    frozen = {path: params[path] for path in params if not trains[path]}
    tx = optax.sgd(0.1)
    state = TrainState(jnp.int32(0), trained, frozen, tx.init(trained))
    weights = dataclasses.replace(tiny.WEIGHTS, balance=0.0, first_token=2.0)
    step = tiny.jit(make_step(model, weights, tx))
    batch = tiny.batch(rows=8, slices=2)
    answer = np.arange(tiny.LENGTH) >= tiny.LENGTH - np.array([1, 4, 2, 7, 1, 1, 5, 3])[:, None]
    batch["loss_mask"] = answer

    (one, log), (four, log_four) = (step(state, tiny.microbatches(batch, count)) for count in (1, 4))
    assert log.keys() == log_four.keys()
    for key in ("loss", "lm", "lm_report", "lm_vqa", "router", "z", "grad_norm"):
        assert float(log[key]) == pytest.approx(float(log_four[key]), rel=2e-4), key
    for path in trained:
        tiny.close(one.trained[path] - trained[path], four.trained[path] - trained[path], atol=2e-5)
        assert np.any(one.trained[path] != trained[path]) or "router/t" in path, path
    assert one.frozen.keys() == frozen.keys()
    assert all(np.array_equal(one.frozen[path], frozen[path]) for path in frozen)
