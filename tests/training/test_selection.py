"""The best checkpoint by the validation split, and runs that end when nothing gets better."""

import json

import pytest

from configs import common
from tests import tiny_run
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import run_folder, selection, stored
from tghmoe_jax.training.loading import load_run
from tghmoe_jax.training.reporting import read_metrics


def test_the_best_is_the_lowest_loss_or_the_highest_score_and_patience_counts_what_is_not_better(tmp_path):
    of = {"loss": [3.0, 2.0, 2.5, 2.0, None, 1.9], "closed/accuracy": [0.3, 0.5, 0.4, 0.5, None, 0.6]}
    for name, values in of.items():
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        assert selection.read(folder) == {}
        for step, value in enumerate(values, 1):
            one = selection.Selection(folder, name, 3, selection.read(folder), range(step))  # as if resumed after each
            assert one.validated == step - 1
            assert one.note(step, {name: value}) == (step in (1, 2, 6))
            assert one.best == {1: 1, 6: 6}.get(step, 2) and one.exhausted == (step == 5)
    other = selection.Selection(folder, "loss", 3, selection.read(folder), range(7))
    assert other.best is None and other.validated == 6  # another score has another best
    gone = selection.Selection(folder, name, 3, selection.read(folder), [2, 5])  # damaged, and set aside
    assert gone.best is None and gone.validated == 5 and gone.note(6, {name: 0.1})
    (folder / selection.FILE).write_text(json.dumps({"best": "six"}))
    with pytest.raises(UserError, match='best is "six"'):
        selection.read(folder)


def test_a_run_without_validations_stands_for_its_newest_checkpoint(tmp_path):
    for step in (2, 4, 10):
        (tmp_path / stored.FOLDER / str(step)).mkdir(parents=True)
    assert stored.chosen_step(tmp_path) == stored.newest_step(tmp_path) == 10
    one = selection.Selection(tmp_path, "loss", 0, {}, [])
    one.note(4, {"loss": 1.0})
    assert stored.chosen_step(tmp_path) == 4
    one.note(6, {"loss": 0.5})  # whose checkpoint is not there
    assert stored.chosen_step(tmp_path) == 10


@pytest.mark.parametrize(("key", "value"), [("best", "closed/luck"), ("patience", -1)])
def test_a_choice_that_cannot_be_made_is_refused(key, value):
    config = common.get_config()
    with config.unlocked():
        config.eval[key] = value
    with pytest.raises(UserError, match=f"eval.{key}"):
        run_folder.check_config(config)


@pytest.mark.slow
def test_the_test_split_is_asked_once_of_the_best_checkpoint(tiny_folder, monkeypatch):
    """Too high a rate: the first validation stays the best, and patience ends the run long before its last step."""
    flags = (
        *tiny_run.options(tiny_folder), "--config.train.steps=40", "--config.checkpoint.every=2",
        "--config.checkpoint.keep=1", "--config.eval.every=2", "--config.eval.patience=2",
        "--config.optimizer.rate=3.0",
    )  # fmt: skip
    done = tiny_run.command(tiny_folder, "stage1.py", tiny_folder / "chosen", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tiny_folder / "chosen"
    best = selection.read(run)
    steps = sorted(int(one.name) for one in (run / "validation").iterdir())
    assert steps == list(range(2, best["validated"] + 1, 2)) and best["worse"] == 2
    losses = {step: json.loads((run / "validation" / str(step) / "metrics.json").read_text())["loss"] for step in steps}
    assert best["best"] == min(losses, key=losses.get) == best["validated"] - 4
    assert [one.name for one in (run / "eval").iterdir()] == [str(best["best"])]
    assert set(stored.steps(stored.folder_of(run))) == {best["best"], best["validated"]}
    loaded = load_run(run, "RUN")
    assert loaded.step == best["best"] and len(read_metrics(run / "metrics.jsonl")) >= best["validated"]
    before = (run / "eval" / str(best["best"]) / "metrics.json").stat().st_mtime_ns
    again = tiny_run.command(tiny_folder, "stage1.py", run, *flags)
    assert again.returncode == 0 and selection.read(run) == best
    assert (run / "eval" / str(best["best"]) / "metrics.json").stat().st_mtime_ns == before
