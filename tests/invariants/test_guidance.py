"""I18 to I21: the prompt picks the group, and nothing else does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.mllm import MLLM

GROUPS = {"groups": 2}


@functools.partial(tiny.jit, static_argnums=0)
def encode(model, params, batch, group=None):
    return model.apply(tiny.tree(params), batch, group, method=MLLM.encode)


@functools.partial(tiny.jit, static_argnums=0)
def route(model, params, batch):
    return model.apply(tiny.tree(params), batch, method=MLLM.route)


@pytest.fixture(scope="module")
def model():
    return tiny.uniform(GROUPS)


@pytest.fixture(scope="module")
def params(model):
    return tiny.params(model)


def prompts(rows=6):
    """Batches whose prompts the random task head sends to both groups."""
    return tiny.batch(rows=rows, seed=3)


def other_answer(batch):
    """Other words from the answer on, and a longer answer's mask."""
    tokens = np.where(batch["loss_mask"], (batch["tokens"] + 7) % tiny.VOCAB, batch["tokens"])
    return batch | {"tokens": tokens.astype(np.int32), "loss_mask": ~batch["question_mask"]}


def other_question(batch):
    tokens = np.where(batch["question_mask"], (batch["tokens"] + 7) % tiny.VOCAB, batch["tokens"])
    return batch | {"tokens": tokens.astype(np.int32)}


def test_the_task_decision_depends_on_the_question_alone(model, params):
    """I18: same for any image, image dtype, batch position, padding and answer; another question changes it."""
    batch = prompts()
    logits = np.asarray(route(model, params, batch))
    assert {0, 1} == set(logits.argmax(axis=1)) and np.ptp(logits) > 0.1
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, batch["slices"].shape, np.uint8)
    for same in (
        batch | {"slices": noise},
        batch | {"slices": rng.random(noise.shape).astype(np.float32)},
        batch | {"slices": np.zeros_like(noise), "slice_mask": np.zeros_like(batch["slice_mask"])},
        batch | {"image_visible": np.zeros(6, bool), "task": 1 - batch["task"]},
        other_answer(batch),
    ):
        assert np.array_equal(route(model, params, same), logits)
    order = np.array([4, 2, 0, 5, 1, 3])
    assert np.array_equal(route(model, params, tiny.take(batch, order)), logits[order])
    text = ("tokens", "token_mask", "question_mask", "loss_mask")
    longer = batch | {key: np.pad(batch[key], [(0, 0), (0, 5)], constant_values=0) for key in text}
    tiny.close(route(model, params, longer), logits, atol=1e-6)
    shorter = tiny.take(batch, [2, 3])
    tiny.close(route(model, params, shorter), logits[2:4], atol=1e-6)
    assert tiny.distance(route(model, params, other_question(batch)), logits) > 0.1


def test_changing_only_the_answer_changes_nothing_in_the_tower(model, params):
    """I18, leak test: visual tokens, routing and statistics to the last bit; changing the question does."""
    batch = prompts()
    before = encode(model, params, batch)
    after = encode(model, params, other_answer(batch))
    for found, expected in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert np.array_equal(found, expected)
    assert tiny.distance(encode(model, params, other_question(batch)).tokens, before.tokens) > 0.05


def test_the_prompt_vector_gives_no_gradient_to_the_embedding_table(model, params):
    """The decoder's live table under stop_grad (model-spec 0); the router's own leaves do learn."""

    def total(params):
        return jnp.sum(model.apply(tiny.tree(params), prompts(), method=MLLM.route)[:, 0])

    found = tiny.jit(jax.grad(total))(params)
    assert not np.any(found["decoder/embed/embedding"])
    for path in ("ln/scale", "ln/bias", "proj/kernel", "head/kernel"):
        assert np.any(found[f"task_router/{path}"])


def test_wording_reaches_the_tower_only_through_the_token_routers_text_kernel(model, params):
    """I19: with Wt = 0 and the group given, features do not depend on the question."""
    batch = prompts()
    silent = {path: leaf * ("router/t/kernel" not in path) for path, leaf in params.items()}
    before, after = (encode(model, silent, b, b["task"]).tokens for b in (batch, other_question(batch)))
    assert np.array_equal(before, after)
    heard = [encode(model, params, b, b["task"]).tokens for b in (batch, other_question(batch))]
    assert tiny.distance(*heard) > 0.05


def test_oracle_and_predicted_runs_agree_where_predictions_are_right(model, params):
    """I20: forcing the predicted group is the predicted run, forcing the other is not."""
    batch = prompts()
    predicted = encode(model, params, batch)
    group = np.asarray(predicted.group)
    assert np.array_equal(group, np.argmax(predicted.task_logits, axis=1)) and len(set(group)) == 2
    forced = encode(model, params, batch, group.astype(np.int32))
    tiny.close(forced.tokens, predicted.tokens, atol=1e-5)
    wrong = encode(model, params, batch, (1 - group).astype(np.int32))
    assert np.all(np.abs(np.asarray(wrong.tokens - predicted.tokens)).max(axis=(1, 2)) > 0.05)


def same_routing(found, expected, rows=slice(None)):
    """First choices and each sample's expert loads, exactly; features up to rounding."""
    tiny.close(found[0], np.asarray(expected[0])[rows])
    assert found[2].keys() == expected[2].keys()
    for layer in found[2]:
        assert np.array_equal(found[2][layer].winner, np.asarray(expected[2][layer].winner)[rows])
        assert np.array_equal(found[2][layer].sample_load, np.asarray(expected[2][layer].sample_load)[rows])


@pytest.mark.parametrize("dispatch", ["ragged", "dense"])
def test_routing_of_a_sample_does_not_depend_on_its_batch(dispatch):
    """I21: alone, in another order, or next to other samples; dropless dispatches."""
    model = tiny.uniform(GROUPS | {"dispatch": dispatch})
    params, batch = tiny.params(model), tiny.batch(rows=3, real=[4, 2, 4])
    whole = tiny.tower(model, params, batch, batch["task"])
    assert all(len(np.unique(s.winner)) == 4 for s in whole[2].values())
    order = [2, 0, 1]
    same_routing(tiny.tower(model, params, tiny.take(batch, order), batch["task"][order]), whole, order)
    alone = tiny.take(batch, [1])
    same_routing(tiny.tower(model, params, alone, alone["task"]), whole, [1])


def test_routing_is_the_same_without_jit(model, params):
    """I21."""
    batch = tiny.batch()
    compiled = tiny.tower(model, params, batch, batch["task"])

    def run(m: MLLM):
        t = m.task_router.prompt_vector(m.decoder.embeddings(batch["tokens"]), batch["question_mask"])
        return m.vision(batch["slices"], batch["slice_mask"], t, batch["task"], batch["slice_spacing"], 1.0)

    same_routing(model.apply(tiny.tree(params), method=run), compiled)


def test_routing_is_the_same_for_scanned_and_single_layers(monkeypatch):
    """I21: the same canonical weights, executed by one scan or layer by layer."""
    scanned = tiny.model(tgh=GROUPS)
    leaves, batch = tiny.canonical(scanned), tiny.batch()
    expected = tiny.tower(scanned, tiny.stacked(scanned, leaves), batch, batch["task"])
    assert sorted(expected[2]) == [2, 3]
    monkeypatch.setattr(leaf_names, "segments", lambda specs, *_: [(i, 1, 1) for i in range(len(specs))])
    # Another value of a field that is not used here: nothing compiled or counted for the scanned model is taken again.
    single = scanned.clone(cfg=dataclasses.replace(scanned.cfg, aux_labels=(), prefix_length=tiny.PREFIX + 1))
    params = tiny.stacked(single, leaves)
    assert any(path.startswith("vision/block_3/moe") for path in params)
    same_routing(tiny.tower(single, params, batch, batch["task"]), expected)


def test_routing_and_gradients_are_the_same_under_every_remat_policy():
    """I21: none, dots and full."""
    batch = tiny.batch()

    def run(remat):
        model = tiny.uniform(GROUPS, remat=remat)
        params = tiny.params(model)

        def total(params):
            output = tiny.apply(model, params, batch, batch["task"])
            return jnp.mean(output.logits**2), output

        return tiny.jit(jax.value_and_grad(total, has_aux=True))(params)

    (_, expected), gradients = run("none")
    for remat in ("dots", "full"):
        (_, output), found = run(remat)
        for layer, stats in output.encoded.stats.items():
            assert np.array_equal(stats.winner, expected.encoded.stats[layer].winner)
        tiny.close(output.logits, expected.logits)
        for path in gradients:
            scale = max(1.0, float(np.abs(gradients[path]).max()))
            tiny.close(found[path] / scale, gradients[path] / scale)
