"""I26 to I29, and the update of I16: what training may change, what carries loss, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from tests import tiny
from tghmoe_jax.bases.base import EMBEDDED, load_base, save_base
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.models.decoder import score
from tghmoe_jax.models.mllm import EncodedVolume, Output
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.training import losses
from tghmoe_jax.weights import adapt

STAGE1 = tuple(pattern.replace("|depth_pos", "") for pattern in common.STAGE1_TRAINABLE)


def start(*args, **kw):
    state, step = tiny.start(*args, **kw)
    return state, tiny.jit(step)


def stage2_of(model):
    return model.clone(cfg=model.cfg.with_tgh(groups=2))


@pytest.fixture(scope="module")
def first_stage():
    """Stage 1 after two steps: its model, the weights before, the state after."""
    model = tiny.uniform()
    before = tiny.params(model)
    state, step = start(model, before, STAGE1)
    for seed in range(2):
        state, _ = step(state, tiny.microbatches(tiny.batch(rows=4, seed=seed)))
    return model, before, state


@pytest.fixture(scope="module")
def second_stage(first_stage):
    """Stage 2 from those weights, and its step."""
    model = stage2_of(first_stage[0])
    leaves = tiny.to_canonical(first_stage[2].params)
    params = tiny.adapted(model, leaves, adapt.NEW_FROM_STAGE1)
    state, step = start(model, params, common.STAGE2_TRAINABLE)
    return model, params, state, step


def test_stage1_moves_every_executed_leaf_of_tower_connector_and_decoder(first_stage):
    """I26: every leaf that is executed has moved; the layers above the feature layer are bit-equal (I27)."""
    _, before, state = first_stage
    for path, leaf in state.params.items():
        dead = path.startswith(("vision/block_4/", "vision/post_ln/"))
        assert np.array_equal(leaf, before[path]) == dead, path


def test_stage2_moves_experts_routers_connector_and_decoder_only(second_stage):
    """I26: the shared features of the tower stay bit-equal."""
    _, before, state, step = second_stage
    after = state
    for seed in range(2):  # the rate of the first step is zero
        after, scalars = step(after, tiny.microbatches(tiny.batch(rows=4, seed=seed)))
    assert all(np.isfinite(value).all() for value in scalars.values())
    tower = {path for path in before if path.startswith("vision/") and "/moe/" not in path}
    assert set(state.frozen) == tower and len(tower) > 30
    for path, leaf in after.params.items():
        assert np.array_equal(leaf, before[path]) == (path in tower), path


def test_a_stage1_checkpoint_loads_into_stage2_by_the_copy_rule_only(first_stage, second_stage):
    """I26: experts and token routers once per task, the task head new, every other leaf as it was."""
    shapes = {name: leaf.shape for name, leaf in tiny.canonical(second_stage[0]).items()}
    leaves = tiny.to_canonical(first_stage[2].params)
    loaded, report = adapt.assemble(shapes, leaves, adapt.NEW_FROM_STAGE1)
    assert set(report.leaves.values()) == {"reused", "copied per task", "new"}
    assert set(report.of("new")) == {"task_router/head/kernel", "task_router/head/bias"}
    assert all("/moe/" in name for name in report.of("copied per task")) and not report.ignored
    for name, leaf in loaded.items():
        copies = leaf if name in report.of("copied per task") else leaf[None]
        assert all(np.array_equal(copy, leaves[name].reshape(copy.shape)) for copy in copies)


def test_groups_without_samples_keep_values_and_moments_in_a_step(second_stage):
    """I16: after a step on both tasks, a step on task 1 alone leaves group 0 as it was, moments included."""
    _, _, state, step = second_stage
    state, _ = step(state, tiny.microbatches(tiny.batch(rows=4)))
    alone = tiny.batch(rows=4, seed=5) | {"task": np.ones(4, np.int32)}
    after, _ = step(state, tiny.microbatches(alone))
    seen, updated = 0, jax.tree.leaves((after.trained, after.opt))
    for (path, old), new in zip(jax.tree.leaves_with_path((state.trained, state.opt)), updated, strict=True):
        name = jax.tree_util.keystr(path)
        if "/moe/" in name:
            seen += 1
            assert old.shape[1] == 2
            assert np.array_equal(old[:, 0], new[:, 0]) and np.any(old[:, 0]), name
            assert not np.array_equal(old[:, 1], new[:, 1]), name
    assert seen == 3 * 6  # values and two moments of four expert and two router leaves


def test_a_step_over_microbatches_is_the_step_over_the_whole_batch():
    """The LM loss is normalised by real answer tokens, not a mean of means (no experts: their loss is not linear)."""
    model = tiny.model_2d()
    batch = tiny.batch(rows=4, slices=1)
    batch["loss_mask"] &= np.arange(tiny.LENGTH) >= np.array([[0], [12], [11], [13]])  # 4, 2, 3 and 1 answer tokens
    found = []
    for count in (1, 2):
        state, step = start(model, tiny.params(model), (".*",), eps=1.0, rate=1.0)
        for _ in range(2):  # the rate of the first step is zero
            state, scalars = step(state, tiny.microbatches(batch, count))
        found.append((scalars, state.trained))
    assert np.ptp(np.asarray(state.trained["connector/fc1/kernel"]) - tiny.params(model)["connector/fc1/kernel"]) > 1e-3
    jax.tree.map(lambda one, other: tiny.close(one, other, atol=1e-5), *found)


def test_layers_above_the_feature_layer_get_no_gradient_and_survive_export(tmp_path):
    """I27: with everything trainable, the last block and post_ln stay bit-equal, and the export holds them."""
    base = tiny.base(tmp_path / "base")
    sizes = base.config["vision_config"]
    model = tiny.model(base.config, attn3d_layers=(), tgh={"layers": ()})
    before = {path: np.asarray(leaf, np.float32) for path, leaf in tiny.adapted(model, base.params).items()}
    state, step = start(model, before, (".*",))
    batch = tiny.batch(rows=2, slices=1, size=sizes["image_size"], vocab=base.config["vocab_size"])
    for _ in range(2):  # the rate of the first step is zero
        state, _ = step(state, tiny.microbatches(batch, 1))
    dead = (f"vision/block_{sizes['num_hidden_layers'] - 1}/", "vision/post_ln/")
    still = {path for path, leaf in state.params.items() if np.array_equal(leaf, before[path])}
    assert len(still) == 18 + 4  # the prompt vector of a model without experts is not used either
    assert still == {path for path in before if path.startswith((*dead, "task_router/"))}
    after = tiny.to_canonical(state.params)
    save_base(tmp_path / "out", after, base.config, dtype=None)
    exported = load_base(tmp_path / "out").params
    for name, leaf in exported.items():
        assert np.asarray(leaf).tobytes() == np.asarray(after[name]).tobytes(), name
        if name.startswith(dead):
            assert np.array_equal(leaf, np.asarray(base.params[name], np.float32))


def test_loss_falls_on_the_answer_its_end_and_eos_and_nowhere_else():
    """I28: labels of the real prompt template, and the gradient of the loss with respect to every logit."""
    tokenizer = Tokenizer.from_folder(EMBEDDED, CHAT)
    pairs = [("Describe the scan.", "A nodule."), ("Which side?\nChoices: A. left B. right", "A. left")]
    encoded = [prompts.encode(tokenizer, question, answer) for question, answer in pairs]
    length = max(len(e.tokens) for e in encoded) + 3
    batch = prompts.batch(encoded, length, tokenizer.pad_id) | {"task": np.array([0, 1])}
    for row, (_, answer) in enumerate(pairs):
        carried = batch["tokens"][row][batch["loss_mask"][row]].tolist()
        assert carried == [*tokenizer.encode(answer), tokenizer.id_of("<|end|>"), tokenizer.eos_id]
        assert not np.any(batch["loss_mask"][row] & batch["question_mask"][row])
        assert not np.any(batch["loss_mask"][row] & ~batch["token_mask"][row])
    prefix = encoded[0].prefix_len
    logits = np.random.default_rng(0).standard_normal((2, length - prefix - 1, 300)).astype(np.float32)
    batch["tokens"] = batch["tokens"] % 300

    def total(logits):
        weight = jnp.sum(losses.answer_weights(batch, tiny.WEIGHTS, prefix))
        blank = EncodedVolume(None, None, None, None, {})
        scores = score(logits, batch["tokens"][:, prefix + 1 :])
        return losses.loss(Output(None, scores, None, blank), batch, tiny.WEIGHTS, prefix, weight, 1)[0]

    value, slope = jax.value_and_grad(total)(logits)
    moved = np.any(np.asarray(slope), axis=-1)
    assert np.array_equal(moved, batch["loss_mask"][:, prefix + 1 :])
    log_p = jax.nn.log_softmax(logits)
    nll = -np.take_along_axis(np.asarray(log_p), batch["tokens"][:, prefix + 1 :, None], axis=-1)[..., 0]
    weight = np.where(moved, [[1.0], [3.0]], 0)
    assert value == pytest.approx(np.sum(nll * weight) / weight.sum(), rel=1e-5)


def four_volumes_two_tasks():
    """Eight samples: both tasks ask about the same four volumes, each answer is of its volume and task."""
    batch = tiny.take(tiny.batch(rows=4, slices=4, seed=1), [0, 0, 1, 1, 2, 2, 3, 3])
    batch["task"] = np.array([0, 1] * 4, np.int32)
    answers = tiny.batch(rows=8, seed=2)["tokens"]
    questions = tiny.batch(rows=2, seed=4)["tokens"]
    batch["tokens"] = np.where(batch["loss_mask"], answers, questions[batch["task"]])
    return batch


@functools.partial(tiny.jit, static_argnums=0)
def right_tokens(model, params, batch):
    """Whether each answer token is the most likely one, and its negative log-likelihood: two (B, T)."""
    logits = tiny.apply(model, params, batch).logits
    targets, mask = (batch[key][:, tiny.PREFIX + 1 :] for key in ("tokens", "loss_mask"))
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return (jnp.argmax(logits, -1) == targets) | ~mask, nll * mask


@pytest.mark.slow
def test_four_volumes_and_two_tasks_are_overfitted_and_each_group_alone_reproduces_its_task():
    """I29: loss falls to near zero by the real step, and a one-group model of a task's group answers its task."""
    batch = four_volumes_two_tasks()
    model = tiny.uniform({"groups": 2}, patch_depth=2)
    state, step = start(model, tiny.params(model), (".*",), steps=80, rate=3e-3, warmup=0.05)
    first = None
    for _ in range(80):
        state, scalars = step(state, tiny.microbatches(batch, 1))
        first = first or float(scalars["lm"])
    assert first > 3 and float(scalars["lm"]) < 0.05 and scalars["router_accuracy"] == 1

    whole = tiny.to_canonical(state.params)
    alone = tiny.uniform(patch_depth=2)
    for task in (0, 1):
        leaves = {name: leaf[task : task + 1] if "/moe/" in name else leaf
                  for name, leaf in whole.items() if "task_router/head" not in name}  # fmt: skip
        params = tiny.stacked(alone, leaves)
        own = batch["task"] == task
        right, nll = (np.asarray(a) for a in right_tokens(alone, params, batch))
        assert right[own].all() and nll[own].sum() / 16 < 0.05
        assert not right[~own].all() and nll[~own].sum() > 2 * nll[own].sum()
