"""Predictions of a run -> the keys of `metrics.json`.

A run is a dict of lists of `Prediction`: `closed`, `open` and `report`, and the same questions asked again under a
control, as `control/<control>_closed` and `control/<control>_report`. Every score lies in 0..1 (CIDEr in 0..10), stands
beside a `<key>_ci95` pair [low, high], and is None where the run does not give it.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tghmoe_jax.evaluation import closed, findings, statistics, text_metrics
from tghmoe_jax.samples.questions import TYPES, Kind, Question

KINDS = ("closed", "open", "report")
# shuffled: another volume; section_shuffled: another volume of the same body section; blind: no volume;
# wrong_group: the other task's expert group.
CONTROLS = ("shuffled", "section_shuffled", "blind", "wrong_group")
NOT_ASKED = "(not asked)"  # in place of an answer, where a control left an item out: an empty answer is an answer
# The task router's decisions, and those of a keyword rule, on the wordings of training and on others.
ROUTER = ("task_accuracy", "task_accuracy_unseen_wording", "keyword_accuracy", "keyword_accuracy_unseen_wording")
CONTROL_SCORES = {
    **{f"control/{name}_closed_accuracy": (name, "closed/accuracy") for name in CONTROLS},
    **{f"control/{name}_closed_accuracy_strict": (name, "closed/accuracy_strict") for name in CONTROLS},
    **{f"control/{name}_finding_f1": (name, "report/finding_f1") for name in CONTROLS},
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question.

    `index` is the volume the question is about (under a control the one shown is another, or none); `case` the patient
    or study it belongs to, a number or a name, where a data set tells; `ranked` the letter of the likeliest option when
    the choices are not shown; `task_predicted` the task router's decision; the findings are the true triples of the
    volume and those that the output states (reports only); `key` the volume's name in its data set, empty where it has
    none; `bert_f1` the BERTScore, where a model was named (see `bert`).
    """

    index: int
    kind: Kind
    type: str
    question: str
    choices: tuple[str, ...]
    answer: str
    letter: str
    output: str
    ranked: str | None = None
    task_true: str = ""
    task_predicted: str | None = None
    findings_true: frozenset[findings.Triple] | None = None
    findings_stated: frozenset[findings.Triple] | None = None
    case: int | str | None = None
    key: str = ""
    bert_f1: float | None = None

    @classmethod
    def of(cls, index: int, question: Question, output: str, **known) -> "Prediction":
        """The prediction for a `Question`; `known` are the optional fields."""
        asked = {name: getattr(question, name) for name in ("kind", "type", "question", "choices", "answer", "letter")}
        return cls(index=index, output=output, task_true=question.task, **asked, **known)

    @property
    def prompt(self) -> str:
        """The question as it was asked, lettered choices included."""
        return Question(self.task_true, self.kind, self.type, self.question, self.choices, self.answer).prompt

    @property
    def unit(self) -> tuple[str, int | str]:
        """What the bootstrap draws whole: the case, whose volumes are no independent patients, else the volume."""
        return ("volume", self.index) if self.case is None else ("case", self.case)

    @property
    def correct(self) -> bool:
        return closed.contains_letter(self.output, self.letter)

    @property
    def strictly_correct(self) -> bool:
        return closed.strictly_correct(self.output, self.letter, self.choices)


Run = Mapping[str, Sequence[Prediction]]


def overlap(predictions: Sequence[Prediction]) -> dict[str, np.ndarray | None]:
    """{name of text_metrics.METRICS: float64 (N,)} of open questions or reports, None where it is not available."""
    scores = text_metrics.per_sample([one.output for one in predictions], [one.answer for one in predictions])
    known = [one.bert_f1 for one in predictions]
    return scores | {"bert_f1": None if None in known else np.array(known, np.float64)}


class Score(NamedTuple):
    """A value in 0..1 and its 95% interval, each None where it is not available."""

    value: float | None = None
    ci95: tuple[float, float] | None = None


class _Scorer:
    """Turns columns of samples into scores; the case or volume of a sample is what the bootstrap draws."""

    def __init__(self, seed: int, resamples: int):
        self.seed, self.resamples = seed, resamples

    def ratio(self, numerator, denominator, units: Iterable[Hashable] | None) -> Score:
        """Score of (N, K) columns; see `statistics.ratio_ci95`."""
        numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
        if not denominator.any():
            return Score()
        value = float(statistics.mean_of_ratios(numerator.sum(0), denominator.sum(0)))
        if not self.resamples:
            return Score(value)
        units = None if units is None else list(units)
        return Score(value, statistics.ratio_ci95(numerator, denominator, units, self.seed, self.resamples))

    def mean(self, values: Sequence[float | None] | None, units: Iterable[Hashable] | None = None) -> Score:
        """Score of a plain mean; not available where a single value is not."""
        if values is None or not len(values) or any(value is None for value in values):
            return Score()
        column = np.asarray(values, np.float64)[:, None]
        return self.ratio(column, np.ones_like(column), units)

    def corpus_bleu(self, ones: Sequence[Prediction], units: Iterable[Hashable]) -> dict[str, Score]:
        """BLEU of the counts summed over the samples, as corpus-level tables print it."""
        if not ones:
            return {name: Score() for name in text_metrics.CORPUS}
        counts = np.array([text_metrics.bleu_counts(one.output.strip(), one.answer.strip()) for one in ones], float)
        sums = statistics.resampled_sums(counts, list(units), self.seed, self.resamples) if self.resamples else None
        scores = {}
        for order, name in zip(text_metrics.ORDERS, text_metrics.CORPUS, strict=True):
            interval = None
            if sums is not None:
                low, high = np.percentile([text_metrics.bleu(row, order) for row in sums], [2.5, 97.5])
                interval = (float(low), float(high))
            scores[name] = Score(text_metrics.bleu(counts.sum(0), order), interval)
        return scores


def kind_scores(predictions: Run, seed: int = 0, resamples: int = statistics.RESAMPLES) -> dict[str, Score]:
    """The `closed/*`, `open/*` and `report/*` scores of the lists under those keys (a missing list scores None)."""
    scorer = _Scorer(seed, resamples)
    asked = {kind: list(predictions.get(kind, ())) for kind in KINDS}
    drawn = {kind: [one.unit for one in ones] for kind, ones in asked.items()}
    ones, units = asked["closed"], drawn["closed"]
    right = np.array([one.correct for one in ones], np.float64)
    # The strict rule needs the options, which a file of another system may not hold.
    strict = np.array([one.strictly_correct for one in ones], np.float64) if all(o.choices for o in ones) else None
    types = list(dict.fromkeys((*TYPES, *(one.type for one in ones if one.type))))  # rows without one have no macro
    of_type = np.array([[one.type == type for type in types] for one in ones], np.float64).reshape(-1, len(types))

    scores = {
        "closed/accuracy": scorer.mean(right, units),
        "closed/accuracy_strict": scorer.mean(strict, units),
        "closed/accuracy_macro": scorer.ratio(right[:, None] * of_type, of_type, units),
        "closed/accuracy_strict_macro": Score()
        if strict is None
        else scorer.ratio(strict[:, None] * of_type, of_type, units),
        "closed/ranked_accuracy": scorer.mean(
            [None if one.ranked is None else one.ranked == one.letter for one in ones], units
        ),
    }
    for type, column in zip(types, of_type.T, strict=True):
        own = np.flatnonzero(column)
        scores[f"closed/by_type/{type}"] = scorer.mean(right[own], [units[i] for i in own])
    for type, column in zip(types, of_type.T, strict=True):
        own = np.flatnonzero(column)
        scores[f"closed/by_type_strict/{type}"] = scorer.mean(
            None if strict is None else strict[own], [units[i] for i in own]
        )
    for kind in ("open", "report"):
        for name, values in overlap(asked[kind]).items():
            scores[f"{kind}/{name}"] = scorer.mean(values, drawn[kind])
        for name, found in scorer.corpus_bleu(asked[kind], drawn[kind]).items():
            scores[f"{kind}/{name}"] = found
    known = [one for one in asked["report"] if one.findings_true is not None and one.findings_stated is not None]
    triples = np.array([findings.counts(one.findings_true, one.findings_stated) for one in known], np.float64)
    hit, extra, missed = triples.reshape(-1, 3).T[:, :, None]
    scores["report/finding_f1"] = scorer.ratio(2 * hit, 2 * hit + extra + missed, [one.unit for one in known])
    for kind in KINDS:
        scores[f"{kind}/empty"] = scorer.mean([not one.output.strip() for one in asked[kind]], drawn[kind])
    return scores


def under_control(run: Run, control: str) -> dict[str, Sequence[Prediction]]:
    """The lists of one control under their plain kind."""
    return {kind: run[key] for kind in KINDS if (key := f"control/{control}_{kind}") in run}


def _load_scores(load: np.ndarray | None) -> dict[str, Score]:
    """Worst case over layers and groups of how unevenly tokens fall on a group's experts.

    `load` (..., E) counts tokens (or shares of them) an expert; a group that received none says nothing.
    """
    if load is None:
        return {"moe/load_max_over_mean": Score(), "moe/load_min_share": Score()}
    load = np.asarray(load, np.float64)
    load = load.reshape(-1, load.shape[-1])
    load = load[load.sum(-1) > 0]
    if not len(load):
        return _load_scores(None)
    share = load / load.sum(-1, keepdims=True)
    return {
        "moe/load_max_over_mean": Score(float(share.max() * share.shape[-1])),
        "moe/load_min_share": Score(float(share.min())),
    }


def score(
    run: Run,
    *,
    router: Mapping[str, tuple[Sequence[bool], Sequence[str]]] | None = None,
    load: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = statistics.RESAMPLES,
) -> dict[str, float | list[float] | None]:
    """The contents of `metrics.json` (design: what a run leaves behind).

    `router`: right or wrong and the prompt, one decision each (N,), for any of ROUTER; without `task_accuracy`, the
    decisions noted in the run's own predictions count. A decision rests on the prompt, so whole prompts are drawn.
    `load`: tokens each expert received in the evaluation, (..., E) with any leading layers and groups. `resamples` 0
    leaves the intervals out.
    """
    scorer = _Scorer(seed, resamples)
    scores = kind_scores(run, seed, resamples)
    controls = {name: kind_scores(under_control(run, name), seed, resamples) for name in CONTROLS}
    scores |= {key: controls[name][source] for key, (name, source) in CONTROL_SCORES.items()}

    router = router or {}
    decided = [one for kind in KINDS for one in run.get(kind, ()) if one.task_predicted is not None]
    for name in ROUTER:
        scores[f"router/{name}"] = scorer.mean(*router.get(name, ((), ())))
    if "task_accuracy" not in router:
        scores["router/task_accuracy"] = scorer.mean(
            [one.task_predicted == one.task_true for one in decided], [one.prompt for one in decided]
        )
    scores |= _load_scores(load)

    metrics: dict[str, float | list[float] | None] = {}
    for key, (value, ci95) in scores.items():
        metrics[key] = value
        metrics[f"{key}_ci95"] = None if ci95 is None else list(ci95)
    return metrics
