"""Questions about one's own data: the two sides, what a plan can see, the interval, the verdict, and planted answers."""

import itertools
import json
import math
import re

import jax
import numpy as np
import pytest
import scipy

from configs import common
from tests import tiny_run
from tests.studies import planted
from tghmoe_jax import ablate as command
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.samples.questions import Question
from tghmoe_jax.studies import deciding
from tghmoe_jax.studies.deciding import QUESTIONS, SHUFFLED, Experiment
from tghmoe_jax.training import run_folder

CONFIG = str(tiny_run.ROOT / "configs" / "stage1.py")
KNOWN = ("left", "right")


def experiment(name: str, tmp_path, *flags: str) -> Experiment:
    return Experiment(name, CONFIG, tmp_path, flags)


# ---- the two sides


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_sides_of_a_question_differ_in_what_it_asks_about(name, tmp_path):
    asked = experiment(name, tmp_path)
    usual, others = asked.arms()
    plain = run_folder.flatten(asked.config(usual, 0))
    assert bool(others) != bool(asked.question.control)
    seen = {}
    for arm in others:
        config = asked.config(arm, 0)
        run_folder.check_config(config)
        changed = run_folder.flatten(config)
        assert {key for key in plain if plain[key] != changed[key]} == {
            "volumes": {"data.share"}, "base": {"fresh"}, "experts": {"model.tgh.experts", "model.tgh.top_k"},
            "slices": {"model.patch_depth", "model.depth_pool", "model.attn3d_layers"},
        }.get(name, {key for key in plain if key.startswith("data.mixture.") and plain[key] != changed[key]}
              | {"train.batch"})  # fmt: skip
        seen[arm.task] = config
    if name == "tasks":  # a step of a specialist has the samples of its task that a usual step has
        whole = asked.config(usual, 0)
        assert set(seen) == set(whole.model.tasks)
        assert sum(config.train.batch for config in seen.values()) == whole.train.batch
        assert {config.train.steps for config in seen.values()} == {whole.train.steps}
    second_seed = run_folder.flatten(asked.config(usual, 1))
    assert {key for key in plain if plain[key] != second_seed[key]} == {"train.seed"}


@pytest.mark.parametrize(
    "name, flags, said",
    [
        ("base", ["--config.base="], "--config.base is empty"),
        ("base", ["--config.init_from=runs/stage1"], "needs a training from a 2D base"),
        ("slices", ["--config.model.patch_depth=1", "--config.model.attn3d_layers=()"], "reads single slices already"),
        ("experts", ["--config.model.tgh.experts=1"], "has one expert"),
        ("tasks", ["--config.data.mixture.report=0"], "no sample of the task report"),
        ("scan", ["--config.mode=evaluate"], "does not train"),
    ],
)  # fmt: skip
def test_a_question_that_the_config_cannot_be_asked_is_one_sentence(name, flags, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        experiment(name, tmp_path, *flags).arms()


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


# ---- what a plan can see


@pytest.mark.parametrize("seeds, items", [(3, 200), (5, 1000), (8, 400)])
def test_an_effect_of_the_size_that_a_plan_names_is_found_as_often_as_it_says(seeds, items):
    """Simulated: seeds differ by SEED_SPREAD, and items, the same for all seeds, by ITEM_VARIANCE."""
    rng, runs = np.random.default_rng(0), 20_000
    variance = deciding.planned_variance({"closed": items})
    effect = deciding.smallest_seen(seeds, variance)
    of_seeds = rng.normal(0, deciding.SEED_SPREAD, (runs, seeds))
    means = effect + of_seeds.mean(1) + rng.normal(0, math.sqrt(variance), runs)
    error = np.sqrt(of_seeds.var(1, ddof=1) / seeds + variance)
    found = (means > scipy.stats.t.ppf(0.975, seeds - 1) * error).mean()
    # The items' variance is known and not estimated, so the t quantile asks for a little more than is needed.
    assert deciding.POWER - 0.02 <= found <= 0.97


def test_more_seeds_and_more_items_see_smaller_differences():
    seen = [[deciding.smallest_seen(s, 0.3 / n) for n in (100, 1000, 10_000)] for s in (2, 3, 5, 20)]
    assert all(a > b for row in seen for a, b in itertools.pairwise(row))
    assert all(a > b for row in zip(*seen, strict=True) for a, b in itertools.pairwise(row))
    assert deciding.smallest_seen(1, 0.0) == math.inf
    for variance, spread in ((0.3 / 100, 0.02), (0.3 / 5000, 0.02), (0.0, 0.001), (0.3 / 50, 0.03)):
        seeds, times = deciding.enough(variance, spread)
        assert deciding.smallest_seen(seeds, variance / times, spread) <= 0.02
        if times == 1 and seeds > 3:
            assert deciding.smallest_seen(seeds - 1, variance, spread) > 0.02
    assert deciding.enough(0.0, 1.0) is None


# ---- the interval and the verdict


def answers(rights, ranked: bool = True, offset: int = 0) -> list[Prediction]:
    """A closed question of each of a row of volumes, answered right or wrong."""
    made = []
    for number, right in enumerate(rights):
        question = Question("vqa", "closed", "side", f"Which side, {number}?", KNOWN, KNOWN[number % 2])
        letter = "AB"[(number + (not right)) % 2]
        text = f"{letter}. {KNOWN['AB'.index(letter)]}"
        made.append(Prediction.of(number + offset, question, text, ranked=letter if ranked else None))
    return made


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_interval_is_that_of_the_seeds_and_of_the_items_together(spread):
    rng, seeds, items = np.random.default_rng(1), 4, 300
    base = rng.random(items)
    found = []
    for _ in range(seeds):
        shift = 0.15 + rng.normal(0, spread)
        own, other = base < 0.5, base < np.clip(0.5 + shift, 0, 1)
        found.append({"closed": (answers(own), answers(other))})
    result = deciding.difference(found)
    gaps = np.array([np.mean([b.ranked == b.letter for b in s["closed"][1]])
                     - np.mean([a.ranked == a.letter for a in s["closed"][0]]) for s in found])  # fmt: skip
    assert result["seeds"] == pytest.approx(gaps) and result["difference"] == pytest.approx(gaps.mean())
    each = np.mean([[(b.ranked == b.letter) - (a.ranked == a.letter) for a, b in zip(*s["closed"], strict=True)]
                    for s in found], axis=0)  # fmt: skip
    assert result["item_variance"] == pytest.approx(each.var() / items, rel=0.15)
    half = scipy.stats.t.ppf(0.975, seeds - 1) * math.sqrt(gaps.var(ddof=1) / seeds + result["item_variance"])
    assert result["ci95"] == pytest.approx([gaps.mean() - half, gaps.mean() + half])


def test_kinds_count_alike_and_a_control_is_judged_by_what_it_has():
    one = {"closed": (answers([1, 1, 0, 0]), answers([1, 1, 1, 1], ranked=False))}
    result = deciding.difference([one])
    assert result["score"] == {"closed": "accuracy"} or result["score"] == {"closed": "accuracy_strict"}
    assert (result["first"], result["second"], result["ci95"]) == (0.5, 1.0, None)
    alone = deciding.difference([{"closed": (answers([1] * 8), answers([1] * 7 + [0]))}])
    both = deciding.difference(
        [{"closed": (answers([1] * 8), answers([1] * 7 + [0])), "open": (opened([1, 1]), opened([0, 0]))}]
    )
    assert alone["difference"] == pytest.approx(-1 / 8) and both["difference"] == pytest.approx((-1 / 8 - 1) / 2)


def opened(rights) -> list[Prediction]:
    questions = [Question("vqa", "open", "side", f"Side {i}?", (), "left") for i in range(len(rights))]
    return [Prediction.of(i, q, "left" if right else "no", ranked=None) for i, (q, right) in
            enumerate(zip(questions, rights, strict=True))]  # fmt: skip


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
    result = {"score": {"closed": "ranked_accuracy"}, "first": 0.6, "second": 0.6 + gap, "difference": gap,
              "seeds": [gap] * 3, "ci95": list(low_high), "item_variance": 1e-5, "seed_spread": 0.01, "items": 300,
              "units": 100}  # fmt: skip
    text = deciding.verdict(question, result)
    assert text.endswith(getattr(question, said)) and text.startswith(question.asks)
    wide = result | {"ci95": [gap - 0.3, gap + 0.3]}
    assert "Undecided" in deciding.verdict(question, wide)
    assert "No verdict: it needs 1 more seed" in deciding.verdict(question, result | {"seeds": [gap] * 2})
    assert "No verdict" in deciding.verdict(question, result | {"seeds": [gap], "ci95": None})


# ---- whole experiments


def test_a_plan_trains_nothing(tiny_folder, tmp_path, capsys):
    argv = ["--question=slices", f"--config={CONFIG}", f"--workdir={tmp_path}", "--plan"]
    assert command.main([*argv, *tiny_run.options(tiny_folder), "--config.base=embedded"]) == 0
    said = capsys.readouterr().out
    assert "see a difference of" in said and "6 trainings, 6 of them not finished" in said and "H100" in said
    assert "To see 0.02" in said and not list(tmp_path.iterdir())


def test_finished_arms_are_neither_trained_nor_asked_again(tiny_folder, tmp_path, capsys, monkeypatch):
    """One seed of the question that needs one training, then the same again from what it left."""
    argv = ["--question=scan", f"--config={CONFIG}", f"--workdir={tmp_path}", "--seeds=1"]
    argv += tiny_run.options(tiny_folder)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    assert command.main(argv) == 0
    said = capsys.readouterr().out
    assert "No verdict: it needs 2 more seeds" in said
    kept = json.loads((tmp_path / "scan.json").read_text())
    assert set(kept["score"]) == {"closed", "report"} and len(kept["seeds"]) == 1
    monkeypatch.setattr(deciding.ablate.train, "run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(deciding.examination, "examine", lambda *_: pytest.fail("asked again"))
    assert command.main(argv) == 0
    assert json.loads((tmp_path / "scan.json").read_text()) == kept
    assert (tmp_path / f"{deciding.USUAL}-seed0" / "validation" / f"{tiny_run.ITEMS}_items").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", planted.ANSWERS)
def test_a_planted_answer_is_found(name, tmp_path, capsys):
    """Sets of scans whose answer is known by how they were made: see `planted`."""
    question, side = planted.ANSWERS[name]
    flags = planted.write(name, tmp_path / "set")
    argv = [f"--question={question}", f"--config={CONFIG}", f"--workdir={tmp_path / 'runs'}", *flags]
    assert command.main(argv) == 0
    said = capsys.readouterr().out.strip()
    assert said.endswith(getattr(QUESTIONS[question], side)), said[-600:]
