"""What two sides that share seeds and items can show, against simulations and plain arithmetic."""

import itertools
import math

import numpy as np
import pytest
import scipy

from tghmoe_jax.evaluation import paired_seeds
from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.samples.questions import Question

KNOWN = ("left", "right")


# ---- what a plan can see


@pytest.mark.parametrize("seeds, items", [(3, 200), (5, 1000), (8, 400)])
def test_an_effect_of_the_size_that_a_plan_names_is_found_as_often_as_it_says(seeds, items):
    """Simulated: seeds differ by SEED_SPREAD, and items, the same for all seeds, by ITEM_VARIANCE."""
    rng, runs = np.random.default_rng(0), 20_000
    variance = paired_seeds.planned_variance({"closed": items})
    effect = paired_seeds.smallest_seen(seeds, variance)
    of_seeds = rng.normal(0, paired_seeds.SEED_SPREAD, (runs, seeds))
    means = effect + of_seeds.mean(1) + rng.normal(0, math.sqrt(variance), runs)
    error = np.sqrt(of_seeds.var(1, ddof=1) / seeds + variance)
    found = (means > scipy.stats.t.ppf(0.975, seeds - 1) * error).mean()
    # The items' variance is known and not estimated, so the t quantile asks for a little more than is needed.
    assert paired_seeds.POWER - 0.02 <= found <= 0.97


def test_more_seeds_and_more_items_see_smaller_differences():
    seen = [[paired_seeds.smallest_seen(s, 0.3 / n) for n in (100, 1000, 10_000)] for s in (2, 3, 5, 20)]
    assert all(a > b for row in seen for a, b in itertools.pairwise(row))
    assert all(a > b for row in zip(*seen, strict=True) for a, b in itertools.pairwise(row))
    assert paired_seeds.smallest_seen(1, 0.0) == math.inf
    for variance, spread in ((0.3 / 100, 0.02), (0.3 / 5000, 0.02), (0.0, 0.001), (0.3 / 50, 0.03)):
        seeds, times = paired_seeds.enough(variance, 0.02, spread)
        assert paired_seeds.smallest_seen(seeds, variance / times, spread) <= 0.02
        if times == 1 and seeds > 3:
            assert paired_seeds.smallest_seen(seeds - 1, variance, spread) > 0.02
    assert paired_seeds.enough(0.0, 0.02, 1.0) is None


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
    result = paired_seeds.difference(found)
    gaps = np.array([np.mean([b.ranked == b.letter for b in s["closed"][1]])
                     - np.mean([a.ranked == a.letter for a in s["closed"][0]]) for s in found])  # fmt: skip
    assert result["seeds"] == pytest.approx(gaps) and result["difference"] == pytest.approx(gaps.mean())
    each = np.mean([[(b.ranked == b.letter) - (a.ranked == a.letter) for a, b in zip(*s["closed"], strict=True)]
                    for s in found], axis=0)  # fmt: skip
    assert result["item_variance"] == pytest.approx(each.var() / items, rel=0.15)
    half = scipy.stats.t.ppf(0.975, seeds - 1) * math.sqrt(gaps.var(ddof=1) / seeds + result["item_variance"])
    assert result["ci95"] == pytest.approx([gaps.mean() - half, gaps.mean() + half])
    assert (result["p"] < 0.05) == (not result["ci95"][0] <= 0 <= result["ci95"][1]) and 0 < result["p"] < 1


def test_kinds_count_alike_and_a_control_is_judged_by_what_it_has():
    one = {"closed": (answers([1, 1, 0, 0]), answers([1, 1, 1, 1], ranked=False))}
    result = paired_seeds.difference([one])
    assert result["kinds"]["closed"]["score"] == "accuracy"
    half = {"closed": (answers([1, 1, 0, 0]), answers([1, 1, 1, 1]))}
    chosen = [paired_seeds.difference([half], ranked)["kinds"]["closed"]["score"] for ranked in (True, False)]
    assert chosen == ["ranked_accuracy", "accuracy_strict"]
    assert (result["first"], result["second"], result["ci95"]) == (0.5, 1.0, None)
    alone = paired_seeds.difference([{"closed": (answers([1] * 8), answers([1] * 7 + [0]))}])
    both = paired_seeds.difference(
        [{"closed": (answers([1] * 8), answers([1] * 7 + [0])), "open": (opened([1, 1]), opened([0, 0]))}]
    )
    assert alone["difference"] == pytest.approx(-1 / 8) and both["difference"] == pytest.approx((-1 / 8 - 1) / 2)


def opened(rights) -> list[Prediction]:
    questions = [Question("vqa", "open", "side", f"Side {i}?", (), "left") for i in range(len(rights))]
    return [Prediction.of(i, q, "left" if right else "no", ranked=None) for i, (q, right) in
            enumerate(zip(questions, rights, strict=True))]  # fmt: skip
