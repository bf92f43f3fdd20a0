"""Questions that compare two lesions, chosen so that their words give no hint of the answer.

A lung nodule mostly lies higher than a bladder stone, and an effusion is mostly larger than a rib fracture. So of the
pairs of lesions that a scan shows, one is asked about only as often as the rarer of its two answers would come up in
this scan, and a pair of which one is missing at half the rate of one that is there. Given the words, each of the three
answers is then true equally often.
"""

import dataclasses
import itertools

import numpy as np

from tghmoe_jax.drawn.chance import pick
from tghmoe_jax.drawn.phantom_lesions import KINDS, Lesion

PAIR_TYPES = ("order", "larger", "sides")
MISSING, SAME, OPPOSITE = "one is missing", "the same side", "opposite sides"
APART_MM, APART_SLICES = 15.0, 1.2  # along z, of lesions of which one lies higher
LARGER = 1.3  # times the size of the other
BOTH = 0.8  # how often a scan with two lesions or more is tried for two that are there; else for one that is not
# Of three lesions each pair is asked about at this part of the rate of a pair alone.
OF_THREE = {"order": 0.5, "larger": 0.5, "sides": 1 / 3}


def absent_rate(type: str) -> float:
    """At which part of its rate a pair of which one is missing is accepted.

    Let each of n organs be ill equally often and scans have no, one, two or three lesions equally often. Then a pair is
    there and tried in BOTH (1/2 + 3/2 OF_THREE) / n (n - 1) of the scans, and drawn as one that is not there in
    (2 - BOTH) / n (n - 1). The first is to be twice the second.
    """
    return BOTH * (0.5 + 1.5 * OF_THREE[type]) / (2 * (2 - BOTH))


def phrases_of(organ: str) -> tuple[str, ...]:
    """What lesions of an organ are called."""
    return tuple(dict.fromkeys(kind.phrase for kind in KINDS if kind.organ == organ))


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What a scan allows: of each organ in view its places and the heights in mm at which a lesion may lie, as often as
    it may, and the range of sizes in mm of each kind."""

    places: dict[str, tuple[str, ...]]
    heights: dict[str, np.ndarray]
    sizes: dict[str, tuple[float, float]]
    gap_mm: float  # least difference in height

    def chances(self, type: str, one: tuple[str, str], other: tuple[str, str]) -> tuple[float, float]:
        """How often each answer would be true of two (organ, kind): the first and the second, or same and opposite."""
        if type == "sides":
            share = [np.mean([self._side(place) for place in self.places[organ]]) for organ, _ in (one, other)]
            same = share[0] * share[1] + (1 - share[0]) * (1 - share[1])
            return same, 1 - same
        if type == "order":
            difference = self.heights[one[0]][:, None] - self.heights[other[0]]
            return float((difference > self.gap_mm).mean()), float((difference < -self.gap_mm).mean())
        steps = (np.arange(24) + 0.5) / 24
        a, b = (np.log(self.sizes[kind][0]) + steps * np.log(self.sizes[kind][1] / self.sizes[kind][0])
                for _, kind in (one, other))  # fmt: skip
        difference = a[:, None] - b
        return float((difference > np.log(LARGER)).mean()), float((difference < -np.log(LARGER)).mean())

    @staticmethod
    def _side(place: str) -> float:
        return float(not place.startswith("right"))  # what lies on one side alone is on the left


def compare(type: str, one: Lesion, other: Lesion, heights: tuple[float, float], gap_mm: float) -> int | None:
    """Which answer is true of two lesions: 0 or 1 as in `Outlook.chances`; None where they are too much alike."""
    if type == "sides":
        return int(one.side != other.side)
    difference = heights[0] - heights[1] if type == "order" else np.log(one.size_mm / other.size_mm)
    least = gap_mm if type == "order" else np.log(LARGER)
    return None if abs(difference) <= least else int(difference < 0)


def choose_pair(
    type: str, lesions: list[Lesion], heights: list[float], outlook: Outlook, rng: np.random.Generator
) -> tuple[str, str, str] | None:
    """The two kinds that a question of this type names, and its answer; None where a scan has no such question."""
    both, accepted, flip = rng.random() < BOTH, rng.random(), rng.random() < 0.5
    if len(lesions) > 1 and both:
        found = _pair_there(type, lesions, heights, outlook, accepted)
    else:
        found = _pair_not_there(type, lesions, outlook, accepted, rng)
    return found and ((found[1], found[0], found[2]) if flip else found)


def _pair_there(type: str, lesions, heights, outlook: Outlook, accepted: float) -> tuple[str, str, str] | None:
    rates, asked = [], []
    for i, j in itertools.combinations(range(len(lesions)), 2):
        one, other = lesions[i], lesions[j]
        chances = outlook.chances(type, (one.organ, one.kind), (other.organ, other.kind))
        true = compare(type, one, other, (heights[i], heights[j]), outlook.gap_mm)
        rates.append(0.0 if true is None else min(chances) / max(chances[true], 1e-9))
        named = (one.kind, other.kind)
        asked.append((*named, (SAME, OPPOSITE)[true or 0] if type == "sides" else named[true or 0]))
    ends = np.cumsum(rates) * (OF_THREE[type] if len(lesions) > 2 else 1)
    chosen = int(np.searchsorted(ends / max(1.0, ends[-1]), accepted, side="right"))
    return asked[chosen] if chosen < len(asked) else None


def _pair_not_there(type: str, lesions, outlook: Outlook, accepted: float, rng) -> tuple[str, str, str] | None:
    """A lesion and one that the scan could have, or, of a healthy scan, two of those."""
    well = [organ for organ in outlook.places if organ not in {lesion.organ for lesion in lesions}]
    pair = [(organ, pick(rng, phrases_of(organ))) for organ in (well[i] for i in rng.permutation(len(well))[:2])]
    if lesions:
        lesion = pick(rng, lesions)
        pair = [(lesion.organ, lesion.kind), *pair]
    if accepted >= absent_rate(type) * 2 * min(outlook.chances(type, *pair[:2])):
        return None
    return pair[0][1], pair[1][1], MISSING
