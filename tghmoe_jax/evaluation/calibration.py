"""Calibrated confidence: how often answers as likely as this one were right on the validation split.

A closed answer's confidence is its option's share of softmax(log-likelihoods / T), an open answer's the logistic
function of its log-likelihood; both are log-likelihoods per token. Where the split is large enough, isotonic regression
corrects what that one curve leaves.

Source: Guo et al. 2017 (temperature, expected calibration error); Zadrozny and Elkan 2002 (isotonic regression);
Geifman and El-Yaniv 2017 (risk and coverage). Axis legend: N items, O options.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy  # which imports its parts as they are used

ENOUGH = 20  # items below which nothing is fitted
ENOUGH_FOR_STEPS = 200  # items from which isotonic regression is used
BINS = 10
LEAST_IN_BIN = 10


def option_shares(likelihoods: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-likelihoods (..., O), -inf for an option that an item lacks -> shares (..., O) that add to one."""
    return scipy.special.softmax(np.asarray(likelihoods, np.float64) / temperature, axis=-1)


def temperature_of(likelihoods: np.ndarray, right: np.ndarray) -> float:
    """The T for which the right options, int (N,), are likeliest under `option_shares` of (N, O).

    One further item counts, of which each option is right in part: a split without an error would make T 0.
    """
    likelihoods = np.asarray(likelihoods, np.float64)
    given = np.isfinite(likelihoods)

    def loss(log_t: float) -> float:
        scaled = likelihoods / np.exp(log_t)
        shares = np.where(given, scaled, 0.0) - scipy.special.logsumexp(scaled, axis=-1, keepdims=True)
        return -float(np.mean(shares[np.arange(len(right)), right]) + np.mean(shares[given]) / len(right))

    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-7, 7), method="bounded").x))


def logistic_of(likelihoods: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Slope (not negative) and offset for which expit(slope * likelihood + offset) predicts right, bool (N,).

    Source: Platt 1999, with his smoothed targets, which keep a split without an error finite.
    """
    hits = np.count_nonzero(right)
    targets = np.where(right, (hits + 1) / (hits + 2), 1 / (len(right) - hits + 2))
    place, spread = float(np.mean(likelihoods)), float(np.std(likelihoods)) or 1.0
    x = (np.asarray(likelihoods, np.float64) - place) / spread

    def loss(weights):
        z = weights[0] * x + weights[1]
        slope = scipy.special.expit(z) - targets
        return np.sum(np.logaddexp(0, z) - targets * z), np.array([slope @ x, slope.sum()])

    found = scipy.optimize.minimize(loss, (1.0, 0.0), jac=True, bounds=((0, None), (None, None)), method="L-BFGS-B").x
    return float(found[0] / spread), float(found[1] - found[0] * place / spread)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a validation split of `items` questions of a kind says of confidence; plain numbers, kept as JSON.

    temperature: of options, None for open answers, which have slope and offset instead. `steps`: raw confidences and
    what isotonic regression makes of them, ascending; empty on small splits. `bins`: [least confidence, items, right
    answers], ascending.
    """

    items: int
    temperature: float | None = None
    slope: float = 0.0
    offset: float = 0.0
    steps: tuple[tuple[float, float], ...] = ()
    bins: tuple[tuple[float, int, int], ...] = ()

    def confidence(self, likelihoods: np.ndarray, answered: np.ndarray | int = 0) -> np.ndarray:
        """float64 (...) in 0..1 of answers: of options (..., O) the one `answered`, else of open answers (..., 1).

        0 where `answered` is -1: the answer names no option, or is empty.
        """
        likelihoods, answered = np.asarray(likelihoods, np.float64), np.asarray(answered)
        if self.temperature is None:
            raw = scipy.special.expit(self.slope * likelihoods[..., 0] + self.offset)
        else:
            shares = option_shares(likelihoods, self.temperature)
            raw = np.take_along_axis(shares, np.maximum(answered, 0)[..., None], axis=-1)[..., 0]
        sure = np.interp(raw, *zip(*self.steps, strict=True)) if self.steps else raw
        return np.where(answered < 0, 0.0, sure)

    def validated(self, confidence: float) -> tuple[int, int]:
        """Right answers and items of the bin that a confidence falls into."""
        inside = [one for one in self.bins if one[0] <= confidence] or self.bins[:1]
        _, items, right = inside[-1]
        return right, items

    def threshold(self, accuracy: float) -> float | None:
        """The least confidence from which on validation answers were right at that share or more, one more answer
        counted as half right; None where even the surest were not.
        """
        found, items, right = None, 0, 0
        for least, count, hits in reversed(self.bins):
            items, right = items + count, right + hits
            found = least if right + 0.5 >= accuracy * (items + 1) else found
        return found

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Calibration":
        """The inverse of `to_json`. ValueError, TypeError for anything else."""
        one = cls(**record)
        steps = tuple((float(x), float(y)) for x, y in one.steps)
        bins = tuple((float(least), int(items), int(right)) for least, items, right in one.bins)
        plain = [one.items, one.slope, one.offset, 1.0 if one.temperature is None else one.temperature]
        sound = all(np.isfinite(np.asarray(part, np.float64)).all() for part in (plain, steps, bins))
        rising = not steps or (np.diff(steps, axis=0) >= 0).all()
        if not (sound and rising and plain[-1] > 0 and all(0 <= right <= items for _, items, right in bins)):
            raise ValueError("its numbers are those of no calibration")
        return dataclasses.replace(one, steps=steps, bins=bins)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def fit(
    likelihoods: np.ndarray, answered: np.ndarray, right: np.ndarray, truth: np.ndarray | None = None
) -> Calibration | None:
    """A calibration from N validation answers; None for fewer than `ENOUGH`.

    likelihoods float (N, O) of options, -inf where an item has fewer, or (N, 1) of open answers; answered int (N,) the
    option that the answer names; right bool (N,); truth int (N,) the right option, None for open answers.
    """
    if len(right) < ENOUGH:
        return None
    right = np.asarray(right, bool)
    if truth is None:
        slope, offset = logistic_of(likelihoods[:, 0], right)
        plain = Calibration(len(right), slope=slope, offset=offset)
    else:
        plain = Calibration(len(right), temperature_of(likelihoods, truth))
    raw = plain.confidence(likelihoods, answered)
    if len(right) >= ENOUGH_FOR_STEPS:
        plain = dataclasses.replace(plain, steps=_steps(raw, right))
    return dataclasses.replace(plain, bins=bins_of(plain.confidence(likelihoods, answered), right))


def _steps(raw: np.ndarray, right: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Isotonic regression as points to interpolate, each level's first and last confidence; held off 0 and 1 by half an
    answer of its level, since no level proves that it never errs."""
    order = np.argsort(raw, kind="stable")
    found = scipy.optimize.isotonic_regression(right[order].astype(np.float64))
    points = []
    for level, start in enumerate(found.blocks[:-1]):
        end = found.blocks[level + 1]
        value = float(np.clip(found.x[start], 0.5 / (end - start + 1), 1 - 0.5 / (end - start + 1)))
        points += [(float(raw[order[start]]), value), (float(raw[order[end - 1]]), value)]
    heights = np.maximum.accumulate([value for _, value in points])
    return tuple((x, float(height)) for (x, _), height in zip(points, heights, strict=True))


def bins_of(confidence: np.ndarray, right: np.ndarray) -> tuple[tuple[float, int, int], ...]:
    """Bins of equal confidences together: each holds a tenth of all, or, where confidence rises by more than a tenth,
    at least `LEAST_IN_BIN`."""
    found: list[tuple[float, int, int]] = []
    for value in np.unique(confidence):
        items, hits = int(np.sum(confidence == value)), int(np.sum(right[confidence == value]))
        least, many, good = found[-1] if found else (value, 0, 0)
        full = many >= len(right) / BINS or (many >= LEAST_IN_BIN and value - least > 1 / BINS)
        if not found or full:
            found.append((float(value), items, hits))
        else:
            found[-1] = (float(least), many + items, good + hits)
    return tuple(found)


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: |mean confidence - share right| over bins of equal width, weighted by their items."""
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, confidence - right, bins)).sum() / len(right))


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and risk, float64 (N,): of the n surest answers their share of all, and their share of errors.

    Equal confidences are asked together: each has the risk at the last of them.
    """
    order = np.argsort(-np.asarray(confidence), kind="stable")
    number = np.arange(1, len(order) + 1)
    wrong = np.cumsum(~np.asarray(right, bool)[order])
    last = np.searchsorted(-np.asarray(confidence)[order], -np.asarray(confidence)[order], side="right") - 1
    return number / len(order), (wrong / number)[last]


def area_under_risk(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean risk over all coverages (AURC): lower is better; the error rate where confidence says nothing."""
    return float(risk_coverage(confidence, right)[1].mean())
