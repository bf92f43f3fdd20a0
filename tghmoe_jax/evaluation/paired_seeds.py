"""Two sides that were trained with the same seeds and asked the same items: what can be seen, and what was.

Seeds vary, and so does the choice of the items, which all seeds share: an interval needs both variances.
Axis legend: S seeds, N items, K kinds, R resamples; the last axis of two is the sides.
"""

import dataclasses
import hashlib
import json
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
LEAST_SEEDS, MOST_SEEDS = 3, 50  # fewer do not show how seeds differ


@dataclasses.dataclass(frozen=True)
class Graded:
    """The answers to the items of one kind, as scores count them.

    scores {name: numerators and denominators, float64 (N, 2)}, the case or volume and the question type of each item,
    and a digest of the items.
    """

    scores: Mapping[str, np.ndarray]
    units: Sequence[tuple]
    types: Sequence[str]
    items: str

    @classmethod
    def of(cls, kind: str, ones: Sequence[Prediction]) -> "Graded":
        scores = {name: np.stack(pair, -1) for name, pair in comparison.columns(kind, ones, judged=True).items()}
        asked = json.dumps([(one.key or one.index, one.question, one.choices, one.answer) for one in ones])
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        return cls(scores, [one.unit for one in ones], [one.type for one in ones], digest)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Graded":
        """The inverse of `to_json`."""
        scores = {name: np.array(pairs, np.float64) for name, pairs in record["scores"].items()}
        return cls(scores, [tuple(unit) for unit in record["units"]], record["types"], record["items"])

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"scores": {name: pairs.tolist() for name, pairs in self.scores.items()}}


Pairs = Mapping[str, tuple[Graded, Graded]]


def primary(scores: Sequence[str], ranked: bool = True) -> str:
    """The score that a kind with these is judged by."""
    first = "ranked_accuracy" if ranked else "accuracy_strict"
    return first if first in scores else scores[0]


def smallest_seen(seeds: int, item_variance: float, units: int, seed_spread: float = SEED_SPREAD) -> float:
    """The difference of scores that is found in about `POWER` of such experiments, by a two-sided t test at 5 %.

    item_variance: of the mean difference, from the choice of `units` cases alone; seed_spread: the standard deviation
    of the difference from seed to seed. Infinite for fewer than three seeds or two units.
    """
    if seeds < LEAST_SEEDS or units < 2:
        return math.inf
    error, df = _error(seeds, item_variance, units, seed_spread)
    return float((scipy.stats.t.ppf(0.975, df) + scipy.stats.t.ppf(POWER, df)) * error)


def _error(seeds: int, item_variance: float, units: int, seed_spread: float) -> tuple[float, float]:
    """The standard error of a mean difference and its degrees of freedom (Welch and Satterthwaite)."""
    of_seeds = seed_spread**2 / seeds
    whole = of_seeds + item_variance
    parts = of_seeds**2 / (seeds - 1) + item_variance**2 / (units - 1)
    return math.sqrt(whole), whole**2 / parts if parts else math.inf


def planned_variance(units: Mapping[str, int]) -> float:
    """`item_variance` of the mean over kinds, each about so many cases, by ITEM_VARIANCE: several items about one case
    may be right or wrong together, so they count as one."""
    return sum(ITEM_VARIANCE / count for count in units.values()) / len(units) ** 2


def enough(item_variance: float, units: int, effect: float, seed_spread: float = SEED_SPREAD) -> tuple[int, int] | None:
    """(seeds; by how much the cases must be multiplied) that see `effect` at the least product of both; None without
    such a plan of up to MOST_SEEDS seeds and a thousandfold cases."""
    plans = [
        (seeds * times, seeds, times)
        for times in (1, 2, 3, 5, 10, 20, 50, 100, 1000)
        for seeds in range(LEAST_SEEDS, MOST_SEEDS + 1)
        if smallest_seen(seeds, item_variance / times, units * times, seed_spread) <= effect
    ]
    return min(plans)[1:] if plans else None


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
        every = [side for seed in found for side in seed[kind]]
        if len({side.items for side in every}) > 1:
            raise UserError(f"{kind}: the sides were asked different items; ask both again.")
        # A score that rests on no item, as that of findings where no report states one, would pull a mean to 0.
        known = [
            name
            for name in every[0].scores
            if all(name in side.scores and side.scores[name][:, 1].any() for side in every)
        ]
        if known:
            scores[kind] = name = primary(known, ranked)
            # (N, 2 S, numerator and denominator)
            columns.append(np.stack([side.scores[name] for side in every], 1))
            units += every[0].units
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
    count = len(set(units))
    kinds = {k: {"score": name} | _of_score(own[i], again[:, i], count) for i, (k, name) in enumerate(scores.items())}
    return _of_score(own.mean(0), again.mean(1), count) | {"kinds": kinds, "items": len(units), "units": count}


def _of_score(own: np.ndarray, again: np.ndarray, units: int) -> dict[str, Any]:
    """`difference` of one score: own (S, 2) and its resamples (R, S, 2).

    Where no unit differs, resampling shows no variance: then it is that of as many as may differ unseen (Wilson).
    """
    gaps = own[:, 1] - own[:, 0]
    unseen = statistics.wilson(0, units)[1] / units
    variance = float((again[..., 1] - again[..., 0]).mean(-1).var()) or unseen
    spread = float(np.std(gaps, ddof=1)) if len(gaps) > 1 else None
    low_high = p = None
    if spread is not None:
        error, df = _error(len(gaps), variance, units, spread)
        half = scipy.stats.t.ppf(0.975, df) * error
        low_high = [float(gaps.mean() - half), float(gaps.mean() + half)]
        p = float(2 * scipy.stats.t.sf(abs(gaps.mean()) / error, df))
    return {
        "first": float(own[:, 0].mean()), "second": float(own[:, 1].mean()), "difference": float(gaps.mean()),
        "seeds": gaps.tolist(), "ci95": low_high, "p": p, "item_variance": variance, "seed_spread": spread,
    }  # fmt: skip
