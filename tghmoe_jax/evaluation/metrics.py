"""The metrics of each kind of question: scores, tables, files and comparisons read this registry.

A further metric is one `Metric` and one call of `register`. Axis legend: N items, K columns.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tghmoe_jax.evaluation import text_metrics

Ratio = tuple[np.ndarray, np.ndarray]
Triple = tuple[str, str, str]  # (lesion, organ, side) of a finding


@dataclasses.dataclass(frozen=True)
class Metric:
    """One score, `<kind>/<name>` in metrics.json.

    `per_item` maps predictions to float (N,), or to numerators and denominators (N,) each, NaN for items that do not
    count, or None where the metric is not available. The score is their mean (or ratio of sums), unless `summary` maps
    the sums (K,) of columns (N, K) to it. `by_type` heads the keys of the scores of each question type, which have a
    macro mean as well. `column` is the metric's column in the prediction file. `most` is the highest value.
    """

    name: str
    kind: str
    per_item: Callable[[Sequence[Any]], np.ndarray | Ratio | None]
    summary: Callable[[np.ndarray], float] | None = None
    by_type: str = ""
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


def _ranked(ones):
    return None if any(one.ranked is None for one in ones) else [one.ranked == one.letter for one in ones]


def _finding_f1(ones):
    """2 TP over 2 TP + FP + FN of positive findings, each counted once; a statement of absence does not count."""
    counts = np.full((len(ones), 2), np.nan)
    for i, (true, stated) in enumerate((one.findings_true, one.findings_stated) for one in ones):
        if true is not None and stated is not None:
            counts[i] = 2 * len(true & stated), len(true) + len(stated)
    return tuple(counts.T)


def rare_ones(counts: np.ndarray) -> np.ndarray:
    """Whether a label is rare, bool (L,): true in fewer reports, `counts` (L,), than the median label that occurs."""
    return counts < np.median(counts[counts > 0]) if counts.any() else np.zeros(len(counts), bool)


def _pairs(ones) -> list[tuple[str, str]]:
    return [(one.output.strip(), one.answer.strip()) for one in ones]


def _overlap(name: str, ones):
    return text_metrics.SAMPLE[name](_pairs(ones))


def _bert_f1(ones):
    return None if any(one.bert_f1 is None for one in ones) else [one.bert_f1 for one in ones]


def _bleu_counts(ones):
    return [text_metrics.bleu_counts(*pair) for pair in _pairs(ones)]


register(Metric("accuracy", "closed", _correct, by_type="by_type"))
register(Metric("accuracy_strict", "closed", _strictly_correct, by_type="by_type_strict"))
register(Metric("ranked_accuracy", "closed", _ranked))
for _kind in ("open", "report"):
    for _name in text_metrics.SAMPLE:
        _per_item, _column = functools.partial(_overlap, _name), "bleu" if _name == "bleu1" else _name
        _most = 10.0 if _name == "cider" else 1.0
        register(Metric(_name, _kind, _per_item, column=_column, most=_most, judged=False))
    register(Metric("bert_f1", _kind, _bert_f1, column="bert_f1", judged=False))
    for _order, _name in zip(text_metrics.ORDERS, text_metrics.CORPUS, strict=True):
        _bleu = functools.partial(text_metrics.bleu, order=_order)
        register(Metric(_name, _kind, _bleu_counts, _bleu, compared=False, judged=False))
register(Metric("finding_f1", "report", _finding_f1))
