"""What two sides that share seeds and items can show, against simulations and plain arithmetic."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy

from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import paired_seeds
from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.samples.questions import Question

KNOWN = ("left", "right")


# ---- what a plan can see


@pytest.mark.parametrize("seeds, units, spread", [(3, 200, 0.02), (5, 1000, 0.02), (8, 400, 0.02), (5, 100_000, 0.05)])
def test_an_effect_of_the_size_that_a_plan_names_is_found_as_often_as_it_says(seeds, units, spread):
    """Simulated: seeds differ by `spread`, and items, the same for all seeds, by ITEM_VARIANCE. Without an effect one
    in twenty is found."""
    rng, runs = np.random.default_rng(0), 20_000
    variance = paired_seeds.planned_variance({"closed": units})
    effect = paired_seeds.smallest_seen(seeds, variance, units, spread)
    of_seeds = rng.normal(0, spread, (runs, seeds))
    means = of_seeds.mean(1) + rng.normal(0, math.sqrt(variance), runs)
    tests = [paired_seeds._error(seeds, variance, units, one) for one in of_seeds.std(1, ddof=1)]
    limits = np.array([scipy.stats.t.ppf(0.975, df) * error for error, df in tests])
    assert (np.abs(means) > limits).mean() == pytest.approx(0.05, abs=0.02)
    assert (means + effect > limits).mean() == pytest.approx(paired_seeds.POWER, abs=0.06)


def test_more_seeds_and_more_items_see_smaller_differences():
    seen = [[paired_seeds.smallest_seen(s, 0.3 / n, n) for n in (100, 1000, 10_000)] for s in (3, 5, 8, 20)]
    assert all(a > b for row in seen for a, b in itertools.pairwise(row))
    assert all(a > b for row in zip(*seen, strict=True) for a, b in itertools.pairwise(row))
    assert paired_seeds.smallest_seen(2, 0.0, 100) == paired_seeds.smallest_seen(3, 0.0, 1) == math.inf
    for units, spread in ((100, 0.02), (5000, 0.02), (10**6, 0.001), (50, 0.03)):
        seeds, times = paired_seeds.enough(0.3 / units, units, 0.02, spread)
        assert paired_seeds.smallest_seen(seeds, 0.3 / units / times, units * times, spread) <= 0.02
        if seeds > 3:
            assert paired_seeds.smallest_seen(seeds - 1, 0.3 / units / times, units * times, spread) > 0.02
    assert paired_seeds.enough(0.0, 100, 0.02, 1.0) is None


def test_where_nothing_differs_few_units_leave_room_and_a_score_without_items_does_not_count():
    same = {"closed": (answers([1] * 8), answers([1] * 8))}
    low, high = difference([same] * 3)["ci95"]
    assert low < -0.02 and high > 0.02
    many = {"closed": (answers([1] * 400), answers([1] * 400))}
    low, high = difference([many] * 3)["ci95"]
    assert -0.02 < low < 0 < high < 0.02
    report = Question("report", "report", "", "Report.", (), "Alles ohne Befund.")
    silent = [Prediction.of(i, report, "Nichts.", ranked=None) for i in range(8)]
    found = difference([same | {"report": (silent, silent)}] * 3)
    assert set(found["kinds"]) == {"closed"}


def difference(found, ranked: bool = True):
    """Of answers that are not graded yet."""
    graded = [
        {kind: tuple(paired_seeds.Graded.of(kind, side) for side in sides) for kind, sides in seed.items()}
        for seed in found
    ]
    again = [
        {kind: tuple(paired_seeds.Graded.from_json(json.loads(json.dumps(one.to_json()))) for one in sides)
         for kind, sides in seed.items()} for seed in graded
    ]  # fmt: skip
    result = paired_seeds.difference(graded, ranked)
    assert paired_seeds.difference(again, ranked) == result  # as it is kept in a file
    return result


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
    result = difference(found)
    gaps = np.array([np.mean([b.ranked == b.letter for b in s["closed"][1]])
                     - np.mean([a.ranked == a.letter for a in s["closed"][0]]) for s in found])  # fmt: skip
    assert result["seeds"] == pytest.approx(gaps) and result["difference"] == pytest.approx(gaps.mean())
    each = np.mean([[(b.ranked == b.letter) - (a.ranked == a.letter) for a, b in zip(*s["closed"], strict=True)]
                    for s in found], axis=0)  # fmt: skip
    assert result["item_variance"] == pytest.approx(each.var() / items, rel=0.15)
    parts = gaps.var(ddof=1) / seeds, result["item_variance"]
    df = sum(parts) ** 2 / (parts[0] ** 2 / (seeds - 1) + parts[1] ** 2 / (items - 1))
    half = scipy.stats.t.ppf(0.975, df) * math.sqrt(sum(parts))
    assert result["ci95"] == pytest.approx([gaps.mean() - half, gaps.mean() + half])
    assert (result["p"] < 0.05) == (not result["ci95"][0] <= 0 <= result["ci95"][1]) and 0 < result["p"] < 1


def test_kinds_count_alike_and_sides_without_ranks_are_judged_by_their_answers():
    one = {"closed": (answers([1, 1, 0, 0]), answers([1, 1, 1, 1], ranked=False))}
    result = difference([one])
    assert result["kinds"]["closed"]["score"] == "accuracy"
    half = {"closed": (answers([1, 1, 0, 0]), answers([1, 1, 1, 1]))}
    chosen = [difference([half], ranked)["kinds"]["closed"]["score"] for ranked in (True, False)]
    assert chosen == ["ranked_accuracy", "accuracy_strict"]
    assert (result["first"], result["second"], result["ci95"]) == (0.5, 1.0, None)
    alone = difference([{"closed": (answers([1] * 8), answers([1] * 7 + [0]))}])
    both = difference(
        [{"closed": (answers([1] * 8), answers([1] * 7 + [0])), "open": (opened([1, 1]), opened([0, 0]))}]
    )
    assert alone["difference"] == pytest.approx(-1 / 8) and both["difference"] == pytest.approx((-1 / 8 - 1) / 2)


def opened(rights) -> list[Prediction]:
    questions = [Question("vqa", "open", "side", f"Side {i}?", (), "left") for i in range(len(rights))]
    return [Prediction.of(i, q, "left" if right else "no", ranked=None) for i, (q, right) in
            enumerate(zip(questions, rights, strict=True))]  # fmt: skip


def test_sides_that_were_asked_different_items_are_refused():
    with pytest.raises(UserError, match="closed: the sides were asked different items"):
        difference([{"closed": (answers([1] * 8), answers([1] * 8, offset=1))}])
