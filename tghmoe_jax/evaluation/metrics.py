"""The metrics of each kind of question: scores, tables, files and comparisons read this registry.

A further metric is one `Metric` and one call of `register`. Axis legend: N items, K columns.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tghmoe_jax.evaluation import closed, findings, numbers, text_metrics

Ratio = tuple[np.ndarray, np.ndarray]
Triple = tuple[str, str, str]  # (lesion, organ, side) of a finding


@dataclasses.dataclass(frozen=True)
class Metric:
    """One score, `<kind>/<name>` in metrics.json.

    `per_item` maps predictions to float (N,), or to numerators and denominators (N,) each, NaN for items that do not
    count, or None where the metric is not available. The score is their mean (or ratio of sums), unless `summary` maps
    the sums (K,) of columns (N, K) to it. `by_type` heads the keys of the scores of each question type, and `by_family`
    those of each family of types; both have a macro mean as well. `column` is the metric's column in the prediction
    file. `most` is the highest value.
    """

    name: str
    kind: str
    per_item: Callable[[Sequence[Any]], np.ndarray | Ratio | None]
    summary: Callable[[np.ndarray], float] | None = None
    by_type: str = ""
    by_family: str = ""
    column: str = ""
    most: float = 1.0
    judged: bool = True  # whether it says right or wrong; the overlap of words does not
    compared: bool = True  # whether `evaluate compare` shows it

    def ratio(self, predictions: Sequence[Any]) -> Ratio | None:
        """`per_item` as numerators and denominators float64 (N,)."""
        values = self.per_item(predictions) if predictions else None
        if values is None:
            return None
        top, bottom = values if isinstance(values, tuple) else (values, np.ones(len(predictions)))
        return np.asarray(top, np.float64), np.asarray(bottom, np.float64)


METRICS: dict[tuple[str, str], Metric] = {}


def register(metric: Metric) -> None:
    """Adds a metric. ValueError where its kind has one of that name."""
    if (metric.kind, metric.name) in METRICS:
        raise ValueError(f"a metric {metric.kind}/{metric.name} is registered already")
    METRICS[metric.kind, metric.name] = metric


def of_kind(kind: str) -> list[Metric]:
    """The metrics of a kind and the share of empty outputs, which every kind has."""
    return [*(one for one in METRICS.values() if one.kind == kind), Metric("empty", kind, _empty, compared=False)]


def _empty(ones):
    return [not one.output.strip() for one in ones]


def _correct(ones):
    return [one.correct for one in ones]


def _strictly_correct(ones):
    """The strict rule needs the options, which a file of another system may not hold."""
    return [one.strictly_correct for one in ones] if all(one.choices for one in ones) else None


def _of_form(fault: str, ones):
    """Whether the answer is `closed.disagreement` of this kind; an empty one is counted as `empty`."""
    if not all(one.choices for one in ones):
        return None
    return [bool(one.output.strip()) and closed.disagreement(one.output, one.choices) == fault for one in ones]


def _ranked(ones):
    return None if any(one.ranked is None for one in ones) else [one.ranked == one.letter for one in ones]


def _finding_f1(ones):
    """2 TP over 2 TP + FP + FN of positive findings, each counted once; a statement of absence does not count."""
    counts = np.full((len(ones), 2), np.nan)
    for i, (true, stated) in enumerate((one.findings_true, one.findings_stated) for one in ones):
        if true is not None and stated is not None:
            counts[i] = 2 * len(true & stated), len(true) + len(stated)
    return tuple(counts.T)


def _findings(ones) -> list[tuple[frozenset, frozenset]] | None:
    """(true, stated) findings of each report: the data set's own where it knows them, else by rules for English.

    None where the data set knows them and what a report states was not kept, as for a control read from a file.
    """
    found = []
    for one in ones:
        sets = one.findings_true, one.findings_stated
        if sets == (None, None):
            sets = findings.stated(one.answer), findings.stated(one.output)
        elif None in sets:
            return None
        else:
            sets = tuple(frozenset((f"{organ} {lesion}", side, "") for lesion, organ, side in of) for of in sets)
        found.append(sets)
    return found


def _ladder(step: int, ones):
    """The F1 of finding names where the name alone (step 1), its sides too (2), and its lobes too (3) must be right.

    A name's numerator counts where the two reports state the same of it; the denominators are the same at every step,
    so that no step scores above the one before.
    """
    if (found := _findings(ones)) is None:
        return None
    counts = np.zeros((len(ones), 2))
    for i, pair in enumerate(found):
        true, said = ({name: {one[:step] for one in of if one[0] == name} for name, *_ in of} for of in pair)
        counts[i] = 2 * sum(true[name] == said.get(name) for name in true), len(true) + len(said)
    return tuple(counts.T)


def _texts(ones) -> list[str]:
    """The reports, letter case and white space aside."""
    return [" ".join(one.output.lower().split()) for one in ones]


def _distinct(ones):
    """Distinct reports over reports: the mean of 1 over the number of those with the same text."""
    times = collections.Counter(texts := _texts(ones))
    return [1 / times[text] for text in texts]


def _most_frequent(ones):
    """Reports that have the most frequent text; of several texts that are equally frequent, one."""
    ((most, _),) = collections.Counter(texts := _texts(ones)).most_common(1)
    return [text == most for text in texts]


def _all_normal(which: int, ones):
    """Reports (of the true ones, 0, or the given ones, 1) that assert no finding; an empty one is `empty` instead."""
    texts = [(one.answer, one.output)[which].strip() for one in ones]
    found = _findings(ones)
    return found and [bool(text) and not sets[which] for text, sets in zip(texts, found, strict=True)]


def _recall(rare: bool, ones):
    """Of the findings that are true, by name, those of rare (or frequent) names that are stated."""
    if (found := _findings(ones)) is None:
        return None
    names = [[{name for name, *_ in of} for of in pair] for pair in found]
    times = collections.Counter(name for true, _ in names for name in true)
    kept = {name for name, low in zip(times, rare_ones(np.array([*times.values()])), strict=True) if low == rare}
    return tuple(np.array([(len(true & said & kept), len(true & kept)) for true, said in names], np.float64).T)


def rare_ones(counts: np.ndarray) -> np.ndarray:
    """Whether a label is rare, bool (L,): true in fewer reports, `counts` (L,), than the median label that occurs."""
    return counts < np.median(counts[counts > 0]) if counts.any() else np.zeros(len(counts), bool)


def _pairs(ones) -> list[tuple[str, str]]:
    return [(one.output.strip(), one.answer.strip()) for one in ones]


def _overlap(name: str, ones):
    return text_metrics.SAMPLE[name](_pairs(ones))


def _exact(ones):
    return [numbers.same_text(*pair) for pair in _pairs(ones)]


def _numbers(ones):
    return [numbers.relative_accuracy(*pair) for pair in _pairs(ones)]


def _bert_f1(ones):
    return None if any(one.bert_f1 is None for one in ones) else [one.bert_f1 for one in ones]


def _bleu_counts(ones):
    return [text_metrics.bleu_counts(*pair) for pair in _pairs(ones)]


def sure(ones) -> tuple[np.ndarray, np.ndarray] | None:
    """Confidence and whether the answer is right, (N,) each; None where an answer has no confidence."""
    if any(one.confidence is None for one in ones):
        return None
    return np.array([one.confidence for one in ones]), np.array([one.right for one in ones])


def _surest_half(ones):
    """Right answers of the surer half of all, over that half; answers as sure as its last are in it."""
    if (known := sure(ones)) is None:
        return None
    confidence, right = known
    kept = confidence >= np.sort(confidence)[len(confidence) // 2]
    return (right & kept).astype(float), kept.astype(float)


register(Metric("accuracy", "closed", _correct, by_type="by_type", by_family="accuracy"))
register(Metric("accuracy_strict", "closed", _strictly_correct, by_type="by_type_strict"))
register(Metric("ranked_accuracy", "closed", _ranked, by_family="ranked"))
# Answers whose form is wrong are scored as they are, by both rules, and counted apart.
for _name, _fault in (("letter_text_disagree", "letter and text disagree"), ("no_choice", "none of the choices")):
    register(Metric(_name, "closed", functools.partial(_of_form, _fault), judged=False, compared=False))
for _kind in ("open", "report"):
    for _name in text_metrics.SAMPLE:
        _per_item, _column = functools.partial(_overlap, _name), "bleu" if _name == "bleu1" else _name
        _most = 10.0 if _name == "cider" else 1.0
        register(Metric(_name, _kind, _per_item, column=_column, most=_most, judged=False))
    register(Metric("bert_f1", _kind, _bert_f1, column="bert_f1", judged=False))
    for _order, _name in zip(text_metrics.ORDERS, text_metrics.CORPUS, strict=True):
        _bleu = functools.partial(text_metrics.bleu, order=_order)
        register(Metric(_name, _kind, _bleu_counts, _bleu, compared=False, judged=False))
for _kind in ("closed", "open"):
    register(Metric("accuracy_surest_half", _kind, _surest_half, compared=False, judged=False))
register(Metric("exact", "open", _exact))
register(Metric("number", "open", _numbers, by_type="number_by_type"))
register(Metric("finding_f1", "report", _finding_f1))
for _step, _name in enumerate(("ladder_present", "ladder_side", "ladder_lobe"), 1):
    register(Metric(_name, "report", functools.partial(_ladder, _step)))
for _name, _is_rare in (("recall_rare", True), ("recall_frequent", False)):
    register(Metric(_name, "report", functools.partial(_recall, _is_rare)))
register(Metric("distinct", "report", _distinct, judged=False, compared=False))
register(Metric("most_frequent", "report", _most_frequent, judged=False, compared=False))
register(Metric("all_normal", "report", functools.partial(_all_normal, 1), judged=False))
register(Metric("all_normal_true", "report", functools.partial(_all_normal, 0), judged=False, compared=False))
