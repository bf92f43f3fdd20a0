"""Counts of positive (lesion, organ, side) triples, for a micro F1; a statement of absence is no triple."""

from collections.abc import Iterable

Triple = tuple[str, str, str]


def counts(true: Iterable[Triple], stated: Iterable[Triple]) -> tuple[int, int, int]:
    """True positives, false positives and false negatives of one report; repeating a triple changes nothing."""
    true, stated = set(true), set(stated)
    return len(true & stated), len(stated - true), len(true - stated)
