"""Bootstrap intervals and the permutations of the control protocols; every draw is a pure function of its seed.

Axis legend: N samples, U resampled units, K parts or columns, R resamples.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import scipy  # which imports its parts as they are used: `stats` takes a second

RESAMPLES = 1_000
SEED = 0  # of every interval: answers that are scored again, as files, get the intervals of their run
FEW_UNITS = 20  # with fewer cases or volumes the percentile interval is too narrow to judge by


def agreed_ci95(low: float, high: float, units: int, most: float = 1.0) -> list[float]:
    """[low, high], or Wilson's interval of `units` where every resample scores 0 or every one scores `most`.

    Units that all agree leave a bootstrap nothing to vary: it would return [0, 0] or [1, 1] for two units as for a
    thousand. Source: Wilson 1927, as scipy computes it. `most` is the highest possible score.
    """
    if low != high or low not in (0.0, most):
        return [low, high]
    return [float(limit * most) for limit in wilson(units if low else 0, units)]


def wilson(right: int, items: int) -> tuple[float, float]:
    """95% interval of a share."""
    low, high = scipy.stats.binomtest(right, items).proportion_ci(method="wilson")
    return float(low), float(high)


def count_units(denominator: np.ndarray, units: Sequence[Hashable]) -> int:
    """How many units (N labels) have a denominator (N, K) above 0: those a score rests on."""
    return len({units[i] for i in np.flatnonzero(denominator.any(axis=-1))})


def mean_of_ratios(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Mean over K of numerator / denominator (..., K) where the denominator is not 0; NaN where all of them are."""
    present = denominator > 0
    ratios = np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=present)
    parts = present.sum(-1)
    return np.divide(ratios.sum(-1), parts, out=np.full(parts.shape, np.nan), where=parts > 0)


def ratio_ci95(
    numerator: np.ndarray,
    denominator: np.ndarray,
    units: Sequence[Hashable] | None = None,
    seed: int = SEED,
    resamples: int = RESAMPLES,
    most: float = 1.0,
) -> list[float] | None:
    """95% percentile bootstrap interval of the mean over K of sum_N numerator / sum_N denominator.

    `numerator` and `denominator` are (N, K). A mean has K = 1 and denominators 1, a micro F1 2TP and 2TP+FP+FN, a
    macro accuracy one column a type. Whole `units` (N labels: the volume of each sample) are drawn with replacement,
    because questions about one volume are right or wrong together; without labels each sample is its own unit.
    Where all units score 0, or all score `most` (the highest value), it is Wilson's interval: see `agreed_ci95`.
    None where fewer than two units leave nothing to resample, or the score itself is undefined.
    """
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    labels = list(range(len(numerator)) if units is None else units)
    sums = resampled_sums(np.concatenate([numerator, denominator], axis=1), labels, seed, resamples)
    if sums is None or not denominator.any():
        return None
    scores = mean_of_ratios(*np.split(sums, 2, axis=1))  # (R,)
    low, high = map(float, np.nanpercentile(scores, [2.5, 97.5]))
    return agreed_ci95(low, high, count_units(denominator, labels), most)


def resampled_sums(
    columns: np.ndarray, units: Sequence[Hashable], seed: int = SEED, resamples: int = RESAMPLES
) -> np.ndarray | None:
    """float64 (R, K): sums of `columns` (N, K) over whole `units` (N labels) drawn with replacement.

    None where fewer than two units leave nothing to resample.
    """
    if (drawn := drawn_units(units, seed, resamples)) is None:
        return None
    counts, row = drawn
    sums = np.zeros((counts.shape[1], columns.shape[1]))  # (U, K)
    np.add.at(sums, row, columns)
    return counts @ sums


def drawn_units(
    units: Sequence[Hashable], seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray] | None:
    """How often each resample draws each unit, int64 (R, U), and the unit of each sample (N,), drawn with replacement.

    None where fewer than two units leave nothing to resample.
    """
    row = {label: i for i, label in enumerate(dict.fromkeys(units))}
    if len(row) < 2:
        return None
    evenly = np.full(len(row), 1 / len(row))
    counts = np.random.default_rng(seed).multinomial(len(row), evenly, size=resamples)
    return counts, np.array([row[label] for label in units])


def difference_ci95(
    one: tuple[np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray],
    units: Sequence[Hashable],
) -> list[float] | None:
    """95% percentile interval of (ratio of `other`) - (ratio of `one`) by a paired bootstrap.

    Each is a numerator and a denominator (N,) over the same items; both are resampled with the same `units` (N,).
    None where fewer than two units leave nothing to resample. Where all units differ by 1, or all by -1, it is Wilson's
    interval: see `agreed_ci95`.
    """
    sums = resampled_sums(np.stack([*one, *other], axis=1), units)
    if sums is None:
        return None
    top, bottom, other_top, other_bottom = sums.T[:, :, None]
    differences = mean_of_ratios(other_top, other_bottom) - mean_of_ratios(top, bottom)
    low, high = map(float, np.nanpercentile(differences, [2.5, 97.5]))
    if low == high == 1:
        return agreed_ci95(low, high, len(set(units)))
    if low == high == -1:
        return [-limit for limit in reversed(agreed_ci95(1.0, 1.0, len(set(units))))]
    return [low, high]


def derangement(n: int, seed: int) -> np.ndarray:
    """A uniformly drawn permutation int64 (n,) that leaves no index in place; raises ValueError for n = 1."""
    if n == 1:
        raise ValueError("one item alone cannot be shuffled: a derangement needs at least two")
    rng = np.random.default_rng(seed)
    identity = np.arange(n)
    while True:  # a permutation has no fixed point with probability near 1/e
        order = rng.permutation(n)
        if not (order == identity).any():
            return order


def _members(groups: Sequence[Hashable]) -> list[list[int]]:
    """The indices of each group's items, groups in order of appearance."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return list(members.values())


def derangement_across(groups: Sequence[Hashable], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A permutation int64 (N,) that gives each item one of another group, and moved bool (N,).

    Drawn: the order of groups and of the items in each. `moved` is False for items of a group that holds more than
    half of all, which find no partner: the control leaves them out.
    """
    rng = np.random.default_rng(seed)
    lists = _members(groups)
    row = np.concatenate([rng.permutation(lists[i]) for i in rng.permutation(len(lists))]) if lists else np.arange(0)
    order = np.arange(len(groups))
    if len(row):  # a shift by the largest group takes every item of a smaller or equal one out of its own
        order[row] = np.roll(row, -max(map(len, lists)))
    return order, np.array([groups[i] != groups[int(j)] for i, j in enumerate(order)], bool)


def derangement_within(groups: Sequence[Hashable], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A derangement inside each group: permutation int64 (N,) and moved bool (N,).

    An item alone in its group cannot be exchanged: it keeps its place and `moved` is False, so that the control
    leaves it out.
    """
    order = np.arange(len(groups))
    for number, indices in enumerate(_members(groups)):
        if len(indices) > 1:
            own = np.array(indices)
            order[own] = own[derangement(len(own), np.random.SeedSequence([seed, number]).generate_state(1)[0])]
    return order, order != np.arange(len(groups))


def nested_ci95(
    numerators: np.ndarray,
    denominators: np.ndarray,
    units: Sequence[Hashable],
) -> list[float] | None:
    """95% percentile interval of the mean over repeats S of sum_N numerator / sum_N denominator, both (S, N).

    Repeats (training seeds) and, within them, whole `units` (N,) are drawn with replacement, the same units in all
    repeats, which share their items. With few repeats it is too narrow: see `student_ci95`. None for fewer than two
    units. Where all units agree in all repeats it is Wilson's interval of the units: see `agreed_ci95`.
    """
    sums = resampled_sums(np.concatenate([numerators, denominators]).T, units)  # (R, 2 S)
    if sums is None:
        return None
    tops, bottoms = np.split(sums, 2, axis=1)
    repeats = len(numerators)
    drawn = np.random.default_rng([0, 1]).multinomial(repeats, np.full(repeats, 1 / repeats), size=len(sums))
    scores = (tops / np.maximum(bottoms, 1e-9) * drawn).sum(axis=1) / repeats
    low, high = map(float, np.percentile(scores, [2.5, 97.5]))
    return agreed_ci95(low, high, count_units(denominators.T, list(units)))


def student_ci95(differences: Sequence[float]) -> list[float] | None:
    """95% t interval of the mean of paired differences, one a training seed; None for fewer than two."""
    values = np.asarray(differences, np.float64)
    if len(values) < 2:
        return None
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]
