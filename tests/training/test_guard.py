"""Bad steps: refused by the step, counted and written down, and after too many the end of the run."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from tests import tiny
from tests.devices.bad_steps import VALUES, WHERE, after_each, poisoned
from tests.tiny import exact_and_quick  # noqa: F401
from tghmoe_jax.errors import Diverged, UserError
from tghmoe_jax.models import decoder
from tghmoe_jax.models.mllm import EncodedVolume, Output
from tghmoe_jax.training import guard, run_folder
from tghmoe_jax.training.losses import LossWeights
from tghmoe_jax.training.step import TrainState, make_step

LEAVES = ["b", "a", "c"]


class Toy:
    """As much of a model as the step needs: a table of tokens, scaled by the spacing of the slices."""

    cfg = tiny.model_2d().cfg

    def apply(self, variables, batch, group, scale, score):
        table = variables["params"]["table"]  # (V, V)
        logits = table[batch["tokens"][:, tiny.PREFIX : -1]] * batch["slice_spacing"][:, None, None]
        return Output(
            None,
            decoder.score(logits, batch["tokens"][:, tiny.PREFIX + 1 :]),
            None,
            EncodedVolume(None, None, None, None, {}),
        )


def test_a_step_that_is_not_finite_changes_no_bit():
    tx = poisoned(optax.adam(1e-2))
    trained = {"table": jnp.asarray(tiny.leaf("table", (tiny.VOCAB, tiny.VOCAB), 0))}
    batches = [tiny.microbatches(tiny.batch(rows=2, slices=1, seed=seed), 1) for seed in range(3)]
    state = TrainState(jnp.int32(0), trained, {"still": jnp.ones(3)}, tx.init(trained))
    step = tiny.jit(make_step(Toy(), LossWeights(task=(1.0, 1.0)), tx))
    *faults, last = after_each(state, step, batches, lambda one: one)
    assert [(one["where"], one["value"]) for one in faults] == [(where, str(v)) for where in WHERE for v in VALUES]
    for number, one in enumerate(faults, start=2):
        assert one["same"] and one["bad"] == 1 and one["leaves"] == one["of"] == 1 and one["step"] == number, one
    assert last == {"healthy": True, "equal": True}


def scalars(loss: float = 1.0, bad: int = 0, leaves: tuple = (0, 0, 0)) -> dict:
    return {
        "loss": np.float32(loss), "grad_norm": np.float32(loss), "bad": np.int32(bad), "bad_leaves": np.array(leaves)
    }  # fmt: skip


def watch(folder, said: list, **kw) -> guard.Guard:
    items = lambda step: [{"volume": f"volume {step}", "task": "vqa", "question": "Which plane?"}]  # noqa: E731
    return guard.Guard(folder, 3, LEAVES, items, said.append, **kw)


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / guard.FILE).read_text().splitlines()]


def test_bad_steps_are_written_with_their_parameters_and_items(tmp_path):
    said = []
    one = watch(tmp_path, said)
    one.note(1, scalars())
    assert not (tmp_path / guard.FILE).exists() and not said
    one.note(2, scalars(np.nan, 1, (1, 1, 1)))
    one.note(3, scalars(2.0, 1, (0, 1, 0)))
    one.note(4, scalars())
    assert one.in_a_row == 0
    first, second = records(tmp_path)
    assert first == {
        "step": 2, "why": "the loss", "loss": "nan", "grad_norm": "nan", "parameters": ["a", "b", "c"],
        "items": [{"volume": "volume 2", "task": "vqa", "question": "Which plane?"}],
    }  # fmt: skip
    assert (second["why"], second["parameters"]) == ("the gradient", ["b"]), "leaves are in the order of their paths"
    assert [text.split(" changed")[0] for text in said] == ["step 2", "step 3"]


def test_too_many_in_a_row_end_the_run_with_parameters_and_data(tmp_path):
    one = watch(tmp_path, [])
    for step in (1, 2):
        one.note(step, scalars(np.inf, 1, (0, 0, 1)))
    one.note(3, scalars())
    for step in (4, 5):
        one.note(step, scalars(np.inf, 1, (0, 0, 1)))
    with pytest.raises(Diverged, match=r"3 steps in a row up to step 6 .* in c, with the volumes volume 6") as error:
        one.note(6, scalars(np.inf, 1, (0, 0, 1)))
    assert error.value.code == 65 and len(records(tmp_path)) == 5


def test_a_resumed_run_drops_the_records_after_its_checkpoint(tmp_path):
    one = watch(tmp_path, [])
    for step in (2, 5):
        one.note(step, scalars(np.nan, 1))
        one.note(step + 1, scalars())
    (tmp_path / guard.FILE).write_text((tmp_path / guard.FILE).read_text() + '{"step": 7, "wh')  # cut short by a kill
    watch(tmp_path, [], start_step=3)
    assert [one["step"] for one in records(tmp_path)] == [2]


def test_another_process_counts_and_writes_nothing(tmp_path):
    one = watch(tmp_path, [], enabled=False)
    one.note(1, scalars(np.nan, 1))
    assert one.in_a_row == 1 and not list(tmp_path.iterdir())


def test_a_spike_is_told_and_a_noisy_loss_is_not(tmp_path):
    said, rng = [], np.random.default_rng(0)
    one = watch(tmp_path, said)
    for step in range(1, 200):
        one.note(step, scalars(3 * 0.99**step + 0.2 * rng.standard_normal() + 1))
    assert not said
    one.note(200, scalars(60.0))
    assert "the loss of step 200, 60, is far above those before" in said[0]
    assert [record["why"] for record in records(tmp_path)] == ["spike"] and one.in_a_row == 0


def test_parameters_that_are_not_finite_are_no_beginning():
    guard.refuse_not_finite({"a": jnp.ones(3), "b": jnp.zeros((2, 2), jnp.bfloat16)}, "runs/stage1")
    with pytest.raises(UserError, match=r"runs/stage1 gives NaN or infinite parameters \(b\); start from another"):
        guard.refuse_not_finite({"a": jnp.ones(3), "b": jnp.array([1, np.inf], jnp.bfloat16)}, "runs/stage1")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.5])
@pytest.mark.parametrize(
    "key", ["optimizer.rate", "optimizer.b2", "loss.router", "loss.task", "optimizer.rate_rules", "data.augment.shift",
            "model.tgh.capacity_factor", "model.depth_rope.scale"],
)  # fmt: skip
def test_rates_weights_and_factors_are_finite_and_not_negative(key, value):
    config = common.get_config()
    section, _, name = key.rpartition(".")
    lists = {"task": (1.0, value), "rate_rules": (("vision/.*", value),)}
    with config.unlocked():
        config[section][name] = lists.get(name, value)
    wrong = "holds -0.5; give a finite number of at least 0" if value == -0.5 else ".*, not a finite number; correct it"
    with pytest.raises(UserError, match=rf"--config.{key}\S* (is )?{wrong}"):
        run_folder.check_config(config)


@pytest.mark.parametrize(("key", "value", "told"), [
    ("optimizer.eps", 0.0, "must be above 0"), ("optimizer.clip", 0.0, "must be above 0"),
    ("optimizer.b1", 1.0, "must be below 1"), ("train.bad_steps", 0, "give 1 or more"),
])  # fmt: skip
def test_numbers_without_an_effect_are_refused(key, value, told):
    config = common.get_config()
    section, _, name = key.rpartition(".")
    config[section][name] = value
    with pytest.raises(UserError, match=rf"--config.{key}={value}.* {told}"):
        run_folder.check_config(config)
