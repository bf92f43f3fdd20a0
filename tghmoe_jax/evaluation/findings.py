"""Micro F1 over positive (lesion, organ, side) triples; a statement of absence is no triple and counts nothing."""

from collections.abc import Iterable

Triple = tuple[str, str, str]


def counts(true: Iterable[Triple], stated: Iterable[Triple]) -> tuple[int, int, int]:
    """True positives, false positives and false negatives of one report; repeating a triple changes nothing."""
    true, stated = set(true), set(stated)
    return len(true & stated), len(stated - true), len(true - stated)


def micro_f1(pairs: Iterable[tuple[Iterable[Triple], Iterable[Triple]]]) -> float | None:
    """2 TP / (2 TP + FP + FN) over all (true, stated) pairs; None where nobody states and nothing is there."""
    numerator = denominator = 0
    for true, stated in pairs:
        hit, extra, missed = counts(true, stated)
        numerator += 2 * hit
        denominator += 2 * hit + extra + missed
    return numerator / denominator if denominator else None
