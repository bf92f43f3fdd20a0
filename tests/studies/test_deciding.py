"""Questions about one's own data: the two sides, the plan, the verdict, and sets whose answer is planted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_run
from tests.reader.test_examination import Files
from tests.studies import planted
from tghmoe_jax import ablate as command
from tghmoe_jax.errors import UserError
from tghmoe_jax.studies import deciding, decisions
from tghmoe_jax.studies.deciding import Experiment
from tghmoe_jax.studies.decisions import QUESTIONS
from tghmoe_jax.training import run_folder

CONFIG = str(tiny_run.ROOT / "configs" / "stage1.py")


def experiment(name: str, tmp_path, *flags: str) -> Experiment:
    return Experiment(name, CONFIG, tmp_path, flags)


# ---- the two sides


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_sides_of_a_question_differ_in_what_it_asks_about(name, tmp_path):
    asked = experiment(name, tmp_path)
    own, others = asked.arms()
    plain = run_folder.flatten(asked.config(own, 0))
    assert others and all(arm.name != own.name or arm.shows for arm in others)
    seen = {}
    for arm in others:
        config = asked.config(arm, 0)
        run_folder.check_config(config)
        changed = run_folder.flatten(config)
        assert {key for key in plain if plain[key] != changed[key]} == {
            "volumes": {"data.share"}, "steps": {"train.steps"},
            "base": {"fresh"}, "experts": {"model.tgh.experts", "model.tgh.top_k"},
            "slices": {"model.patch_depth", "model.depth_pool", "model.attn3d_layers"}, "scan": set(), "order": set(),
            "stages": {"init_from", "trainable", "train.steps", "train.seed"}, "groups": {"model.tgh.groups"},
        }.get(name, {key for key in plain if key.startswith("data.mixture.") and plain[key] != changed[key]}
              | {"train.batch"})  # fmt: skip
        seen[arm.task] = config
    if name == "tasks":  # a step of a specialist has the samples of its task that a usual step has
        whole = asked.config(own, 0)
        assert set(seen) == set(whole.model.tasks)
        assert sum(config.train.batch for config in seen.values()) == whole.train.batch
        assert {config.train.steps for config in seen.values()} == {whole.train.steps}
    second_seed = run_folder.flatten(asked.config(own, 1))
    assert {key for key in plain if plain[key] != second_seed[key]} - {"init_from"} == {"train.seed"}


def test_two_stages_take_as_many_steps_as_one_and_the_second_follows_the_first_of_its_seed(tmp_path):
    asked = experiment("stages", tmp_path, "--config.fresh=('aux_head/.+',)")
    own, (one,) = asked.arms()
    first, second, alone = (asked.config(arm, 2) for arm in (decisions.Arm(decisions.USUAL), own, one))
    assert second.init_from == str(asked.folder(decisions.Arm(decisions.USUAL), 2)) and not second.fresh
    assert first.train.steps + second.train.steps == alone.train.steps
    assert first.train.seed == alone.train.seed != second.train.seed
    assert second.model.tgh.groups == alone.model.tgh.groups == 2 and first.model.tgh.groups == 1
    assert {*first.trainable} < {*alone.trainable} and {*second.trainable} != {*first.trainable}
    assert [arm.name for arm in asked.trained()] == [decisions.USUAL, "one_stage", "two_stages"]


class Stack(Files):
    """Six volumes of three cases, whose slices hold their own number; the last slices are padding."""

    def __len__(self):
        return 6

    def case(self, index):
        return index // 2

    def slices(self, index):
        levels = np.zeros((8, 2, 2, 3), np.uint8) + np.arange(8, dtype=np.uint8)[:, None, None, None] + 10 * index
        return levels, np.arange(8) < 8 - index % 3


def test_another_case_is_shown_and_the_own_slices_are_shown_in_another_order():
    source = Stack()
    others = decisions.shown(source, "others", 3)
    assert isinstance(others, decisions.ItemSource) and len(others) == 6
    seen = [int(others.slices(i)[0][0, 0, 0, 0]) // 10 for i in range(6)]
    assert sorted(seen) == list(range(6)) and all(a // 2 != i // 2 for i, a in enumerate(seen))
    disordered = decisions.shown(source, "disordered", 3)
    for i in range(6):
        levels, mask = disordered.slices(i)
        own, own_mask = source.slices(i)
        assert np.array_equal(mask, own_mask) and np.array_equal(levels[~mask], own[~mask])
        assert not np.array_equal(levels, own) and np.array_equal(np.sort(levels[mask, 0, 0, 0]), own[mask, 0, 0, 0])
        assert np.array_equal(levels, disordered.slices(i)[0])


@pytest.mark.parametrize(
    "name, flags, said",
    [
        ("base", ["--config.base="], "--config.base is empty"),
        ("base", ["--config.init_from=runs/stage1"], "needs a training from a 2D base"),
        ("slices", ["--config.model.patch_depth=1", "--config.model.attn3d_layers=()"], "reads single slices already"),
        ("experts", ["--config.model.tgh.experts=1"], "has one expert"),
        ("tasks", ["--config.data.mixture.report=0"], "no sample of the task report"),
        ("tasks", ["--config.model.tgh.groups=2"], "use a config with one group"),
        ("volumes", ["--config.data.volumes=1"], "as many volumes as all"),
        ("volumes", ["--config.init_from=embedded"], "was trained on these data"),
        ("scan", ["--config.mode=evaluate"], "does not train"),
        ("stages", ["--config.model.tasks=('vqa',)", "--config.data.mixture.report=0", "--config.loss.task=(1.0,)"],
         "needs two tasks"),
        ("groups", ["--config.model.tgh.groups=2"], "give one group"),
        ("groups", ["--config.model.tgh.experts=1", "--config.model.tgh.top_k=1"], "asks about experts"),
        ("stages", ["--config.model.tgh.layers=()"], "asks about experts"),
        ("stages", ["--config.trainable=('decoder/.*',)"], "leave out --config.trainable"),
        ("stages", ["--config.init_from=embedded"], "needs a training from a 2D base"),
    ],
)  # fmt: skip
def test_a_question_that_the_config_cannot_be_asked_is_one_sentence(name, flags, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        experiment(name, tmp_path, *flags).arms()


def test_a_config_without_a_second_stage_is_not_asked_about_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # a config's folder goes there
    simple = str(tiny_run.ROOT / "configs" / "simple.py")
    alone = tmp_path / "configs" / "stage1.py"
    alone.parent.mkdir()
    alone.write_text(Path(CONFIG).read_text())
    for file in (simple, str(alone)):
        with pytest.raises(UserError, match="the stage2.py in the same folder"):
            Experiment("stages", file, tmp_path, ()).arms()
    for name in ("stage1", "stage1:bench"):
        assert Experiment("stages", name, tmp_path, ()).second_file().endswith(f"stage2.py{name[6:]}")


def test_a_stage_2_is_not_resumed_after_another_length_of_stage_1(tmp_path):
    asked = experiment("groups", tmp_path)
    own, (other,) = asked.arms()
    folder = asked.folder(own, 0)
    folder.mkdir()
    shorter = experiment("groups", tmp_path, "--config.train.steps=400")
    (folder / "config.json").write_text(json.dumps(shorter.config(own, 0).to_dict()))
    shorter.check_folder(own, shorter.config(own, 0), folder)
    with pytest.raises(UserError, match="began with a stage 1 of 400 steps"):
        asked.check_folder(own, asked.config(own, 0), folder)
    own_groups, other_groups = (
        experiment("groups", tmp_path, "--config.model.tgh.groups=1").config(arm, 0).model.tgh.groups
        for arm in (own, other)
    )
    assert (own_groups, other_groups) == (2, 1)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--question=scan"], "--question needs --config"),
        (["--question=scan", f"--config={CONFIG}", "--rows=full"], "neither --rows nor --table"),
        (["--question=scan", f"--config={CONFIG}", "--table"], "neither --rows nor --table"),
        (["--question=why", f"--config={CONFIG}"], "--question"),
        (["--plan"], "--plan belongs to --question"),
        (["--question=scan", f"--config={CONFIG}", "--seeds=0"], "--seeds 0 is too small"),
        (["--question=scan", f"--config={CONFIG}", "--config.data.share=0"], "data.share=0"),
        (["--question=scan", f"--config={CONFIG}", "--config.data.share=1.5"], "data.share=1.5"),
        (["--question=scan", "--config=nowhere.py"], "nowhere.py"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_sentence(argv, said, tmp_path, capsys):
    assert command.main([*argv, f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.strip().count("\n") <= (2 if "usage" in error else 0)
    assert not list(tmp_path.iterdir())


# ---- the verdict


@pytest.mark.parametrize(
    "gap, low_high, said",
    [
        (-0.1, (-0.15, -0.05), "first"), (0.1, (0.05, 0.15), "second"), (0.005, (-0.01, 0.015), "equal"),
        (-0.01, (-0.015, -0.005), "equal"), (0.01, (0.005, 0.015), "equal"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_verdict_follows_the_interval(name, gap, low_high, said):
    question = QUESTIONS[name]
    result = {"first": 0.6, "second": 0.6 + gap, "difference": gap,
              "seeds": [gap] * 3, "ci95": list(low_high), "item_variance": 1e-5, "seed_spread": 0.01, "items": 300,
              "units": 100}  # fmt: skip
    text = deciding.verdict(question, result)
    assert text.endswith(getattr(question, said)) and text.startswith(question.asks)
    wide = result | {"ci95": [gap - 0.3, gap + 0.3]}
    assert "Undecided" in deciding.verdict(question, wide)
    assert "No verdict: it needs 1 more seed" in deciding.verdict(question, result | {"seeds": [gap] * 2})
    assert "No verdict" in deciding.verdict(question, result | {"seeds": [gap], "ci95": None})
    assert "No verdict: 20 cases or volumes are needed" in deciding.verdict(question, result | {"units": 19})


# ---- whole experiments


def run(*argv: str, folder) -> subprocess.CompletedProcess:
    """The command itself."""
    return subprocess.run(
        [sys.executable, "-m", "tghmoe_jax.ablate", f"--config={CONFIG}", *argv], env=tiny_run.environment(),
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


def test_a_plan_trains_nothing(tiny_folder, tmp_path):
    flags = ["--plan", "--workdir=runs", *tiny_run.options(tiny_folder)]
    done = run("--question=slices", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "So little shows no difference" in done.stdout and "H100" in done.stdout and "To see 0.02" in done.stdout
    assert "6 trainings, 6 of them not finished" in done.stdout and not list((tmp_path / "runs").iterdir())
    assert "3 trainings, 3 of them not finished" in run("--question=order", *flags, folder=tmp_path).stdout


def test_finished_arms_are_neither_trained_nor_asked_again(tiny_folder, tmp_path):
    """One seed of the question that needs one training, then the same again from what it left."""
    argv = ["--question=scan", "--workdir=runs", "--seeds=1", *tiny_run.options(tiny_folder)]
    done = run(*argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No verdict: 20 cases or volumes are needed" in done.stdout
    kept = json.loads((tmp_path / "runs" / "scan.json").read_text())
    made = kept.pop("made")
    assert {"closed", "report"} <= set(kept["kinds"]) and len(kept["seeds"]) == 1
    assert made["config"]["train.steps"] == tiny_run.STEPS and made["minutes"][decisions.USUAL] > 0
    asked = tmp_path / "runs" / f"{decisions.USUAL}-seed0" / "validation"
    files = {file: file.stat().st_mtime_ns for file in asked.parent.rglob("*") if file.is_file()}
    again = run(*argv, folder=tmp_path)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert {file: file.stat().st_mtime_ns for file in asked.parent.rglob("*") if file.is_file()} == files
    name, other = sorted(folder.name for folder in asked.iterdir())
    assert other == f"{name}-others"
    flags, usual = tuple(tiny_run.options(tiny_folder)), decisions.Arm(decisions.USUAL)
    one = Experiment("scan", CONFIG, tmp_path / "runs", flags, kinds=("closed",))
    code = (
        "from pathlib import Path; from tghmoe_jax.studies import deciding, decisions; "
        f"deciding.Experiment('scan', {CONFIG!r}, Path('runs'), {flags!r}, kinds=('closed',))"
        f".run(decisions.Arm({decisions.USUAL!r}), 0)"
    )
    # In a process of its own, because asking sets the mesh of the whole process.
    subprocess.run([sys.executable, "-c", code], env=tiny_run.environment(), cwd=tmp_path, check=True)
    of_all, alone = (folder / "predictions_closed.csv" for folder in (asked / name, one.asked(usual, 0)))
    assert alone.read_bytes() == of_all.read_bytes() and alone.parent not in (asked / name, asked / other)
    assert not (alone.parent / "predictions_report.csv").exists()
    shorter = run(*argv, "--config.train.steps=3", folder=tmp_path)  # the run there is longer
    assert shorter.returncode == 2 and "more than --config.train.steps=3" in shorter.stderr


@pytest.mark.slow
def test_both_sides_of_a_question_about_stage_2_start_from_one_stage_1(tiny_folder, tmp_path):
    argv = ["--question=groups", "--workdir=runs", "--seeds=1", *tiny_run.options(tiny_folder)]
    assert "3 trainings, 3 of them not finished" in run(*argv, "--plan", folder=tmp_path).stdout
    done = run(*argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    minutes = json.loads((tmp_path / "runs" / "groups.json").read_text())["made"]["minutes"]
    assert set(minutes) == {decisions.USUAL, "two_stages", "one_group"}
    groups = {}
    for name in ("two_stages", "one_group"):
        config = run_folder.read_config(tmp_path / "runs" / f"{name}-seed0")
        assert config["init_from"].endswith(f"{decisions.USUAL}-seed0")
        groups[name] = config["model"]["tgh"]["groups"]
    assert groups == {"two_stages": 2, "one_group": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", planted.ANSWERS)
def test_a_planted_answer_is_found(name, tmp_path):
    """Sets of scans whose answer is known by how they were made (`planted`), asked about by the command itself."""
    question, side = planted.ANSWERS[name]
    flags = planted.write(name, tmp_path / "set")
    done = run(f"--question={question}", "--workdir=runs", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(getattr(QUESTIONS[question], side)), done.stdout[-800:]
