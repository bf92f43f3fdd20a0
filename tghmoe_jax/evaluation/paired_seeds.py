"""Two sides that were trained with the same seeds and asked the same items: what can be seen, and what was.

Seeds vary, and so does the choice of the items, which all seeds share: an interval needs both variances.
Axis legend: S seeds, N items, K kinds, R resamples; the last axis of two is the sides.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import comparison, statistics
from tghmoe_jax.evaluation.protocols import Prediction

POWER = 0.8  # chance that a difference of the size a plan can see is found
# What a plan assumes, from earlier runs (docs/ablations.md): how a difference of scores varies from seed to seed, and
# the variance of one item's difference, which is the share of items that the two sides answer differently.
SEED_SPREAD, ITEM_VARIANCE = 0.02, 0.3
MOST_SEEDS = 50

Pairs = Mapping[str, tuple[Sequence[Prediction], Sequence[Prediction]]]


def smallest_seen(seeds: int, item_variance: float, seed_spread: float = SEED_SPREAD) -> float:
    """The difference of scores that is found in `POWER` of such experiments, by a two-sided t test at 5 %.

    item_variance: of the mean difference, from the choice of items alone; seed_spread: the standard deviation of the
    difference from seed to seed. Infinite for fewer than two seeds.
    """
    if seeds < 2:
        return math.inf
    t = scipy.stats.t
    both = t.ppf(0.975, seeds - 1) + t.ppf(POWER, seeds - 1)
    return float(both * math.sqrt(seed_spread**2 / seeds + item_variance))


def planned_variance(items: Mapping[str, int]) -> float:
    """`item_variance` of the mean over kinds, of so many items each, by ITEM_VARIANCE."""
    return sum(ITEM_VARIANCE / count for count in items.values()) / len(items) ** 2


def enough(item_variance: float, effect: float, seed_spread: float = SEED_SPREAD) -> tuple[int, int] | None:
    """(seeds, at least three; by how much the items must be multiplied) that see `effect`; None without such a plan.

    More seeds come before more items, up to eight; with the most items, which are a thousandfold, up to MOST_SEEDS.
    """
    for times in (1, 2, 3, 5, 10, 20, 50, 100, 1000):
        for seeds in range(3, (8 if times < 1000 else MOST_SEEDS) + 1):
            if smallest_seen(seeds, item_variance / times, seed_spread) <= effect:
                return seeds, times
    return None


def difference(found: Sequence[Pairs], ranked: bool = True) -> dict[str, Any]:
    """The second side's score minus the first one's, from {kind: both sides' answers to the same items} of each seed.

    first, second: the score, a mean over kinds, over seeds; difference: of these; seeds: of each seed; ci95: 95 %
    interval of the mean difference, and p, both None for one seed; item_variance, seed_spread: what it rests on;
    kinds {kind: the same of its own score, named `score`}; items, units: how many. A closed question counts by the
    rank of its options where `ranked` (the finer rule, but one asks without showing them, as only training on open
    questions teaches), else by the answer. UserError where there is nothing to compare.
    """
    scores, columns, units = {}, [], []
    for kind in found[0]:
        sides = [[comparison.columns(kind, ones, judged=True) for ones in seed[kind]] for seed in found]
        known = [name for name in sides[0][0] if all(name in side for seed in sides for side in seed)]
        if known:
            first = "ranked_accuracy" if ranked else "accuracy_strict"
            scores[kind] = name = first if first in known else known[0]
            # (N, 2 S, numerator and denominator)
            columns.append(np.stack([np.stack(side[name], -1) for seed in sides for side in seed], 1))
            units += [one.unit for one in found[0][kind][0]]
    if not scores:
        raise UserError("the validation split has no item that can be right or wrong; give it closed or open items.")
    whole = np.zeros((len(units), len(columns), 2 * len(found), 2))  # numerators and denominators
    start = 0
    for number, one in enumerate(columns):
        whole[start : start + len(one), number] = one
        start += len(one)
    sums = statistics.resampled_sums(whole.reshape(len(units), -1), units)
    if sums is None:
        raise UserError("the validation split has one case or volume, which is no comparison; give it more.")

    def values(sums: np.ndarray) -> np.ndarray:
        """Sums (..., K, 2 S, 2) -> scores (..., K, S, sides)."""
        ratio = sums[..., 0] / np.maximum(sums[..., 1], 1e-9)
        return ratio.reshape(*ratio.shape[:-1], len(found), 2)

    own, again = values(whole.sum(0)), values(sums.reshape(-1, *whole.shape[1:]))
    kinds = {kind: {"score": name} | _of_score(own[i], again[:, i]) for i, (kind, name) in enumerate(scores.items())}
    size = {"items": len(units), "units": len(set(units))}
    return _of_score(own.mean(0), again.mean(1)) | {"kinds": kinds} | size


def _of_score(own: np.ndarray, again: np.ndarray) -> dict[str, Any]:
    """`difference` of one score: own (S, 2) and its resamples (R, S, 2)."""
    gaps = own[:, 1] - own[:, 0]
    variance = float((again[..., 1] - again[..., 0]).mean(-1).var())
    spread = float(np.std(gaps, ddof=1)) if len(gaps) > 1 else None
    low_high = p = None
    if spread is not None:
        error, t = math.sqrt(spread**2 / len(gaps) + variance), scipy.stats.t(len(gaps) - 1)
        half = t.ppf(0.975) * error
        low_high = [float(gaps.mean() - half), float(gaps.mean() + half)]
        p = float(2 * t.sf(abs(gaps.mean()) / error)) if error else float(not gaps.mean())
    return {
        "first": float(own[:, 0].mean()), "second": float(own[:, 1].mean()), "difference": float(gaps.mean()),
        "seeds": gaps.tolist(), "ci95": low_high, "p": p, "item_variance": variance, "seed_spread": spread,
    }  # fmt: skip
