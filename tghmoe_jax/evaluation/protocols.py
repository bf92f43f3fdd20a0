"""Predictions of a run -> the keys of `metrics.json`.

A run is a dict of lists of `Prediction`: `closed`, `open` and `report`, and the same questions asked again under a
control, as `control/<control>_closed` and `control/<control>_report`. Every score lies in 0..1 (CIDEr in 0..10), stands
beside a `<key>_ci95` pair [low, high], and is None where the run does not give it.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tghmoe_jax.evaluation import closed, numbers, statistics
from tghmoe_jax.evaluation.calibration import area_under_risk, calibration_error
from tghmoe_jax.evaluation.metrics import Metric, Triple, of_kind, sure
from tghmoe_jax.samples.questions import FAMILIES, FAMILY_OF, TYPES, Kind, Question
from tghmoe_jax.samples.tasks import COLUMNS, KINDS, TASKS

# shuffled: another volume; section_shuffled: another volume of the same body section; blind: no volume;
# wrong_group: the other task's expert group.
CONTROLS = ("shuffled", "section_shuffled", "blind", "wrong_group")
NOT_ASKED = "(not asked)"  # in place of an answer, where a control left an item out: an empty answer is an answer
# The task router's decisions, and those of a keyword rule, on the wordings of training and on others.
ROUTER = ("task_accuracy", "task_accuracy_unseen_wording", "keyword_accuracy", "keyword_accuracy_unseen_wording")


def control_scores() -> dict[str, tuple[str, str]]:
    """{key of metrics.json: (control, the score that it repeats)}, for the scores that tasks name."""
    return {
        f"control/{control}_{suffix}": (control, score)
        for task in TASKS.values()
        for score, suffix in task.scores.items()
        for control in CONTROLS
    }


def scores_of(metrics: Mapping[str, object]) -> list[str]:
    """The keys of `metrics` that are scores of the run itself: no interval, count of units, score of a control, or size
    of lesions."""
    beside = ("_ci95", "_few_units", "_mm")
    return [key for key in metrics if not key.endswith(beside) and not key.startswith("control/")]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question.

    `index` is the volume the question is about (under a control the one shown is another, or none); `case` the patient
    or study it belongs to, a number or a name, where known; `ranked` the letter of the likeliest option when
    the choices are not shown; `task_predicted` the task router's decision; the findings are the true triples of the
    volume and those that the output states (reports only); `key` the volume's name in its data set, empty where it has
    none; `bert_f1` the BERTScore, where a model was named (see `bert`); `confidence` that of the answer, in 0..1,
    where the model is calibrated.
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
    findings_true: frozenset[Triple] | None = None
    findings_stated: frozenset[Triple] | None = None
    case: int | str | None = None
    key: str = ""
    bert_f1: float | None = None
    confidence: float | None = None

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

    @property
    def right(self) -> bool:
        """What a confidence speaks of: the strict rule of closed questions, the reference's words of open ones."""
        return self.strictly_correct if self.choices else numbers.same_text(self.output, self.answer)


Run = Mapping[str, Sequence[Prediction]]


class Score(NamedTuple):
    """A value in 0..1, its 95% interval and the units that it rests on, each None where it is not available."""

    value: float | None = None
    ci95: list[float] | None = None
    units: int | None = None


class _Scorer:
    """Turns columns of samples into scores; the case or volume of a sample is what the bootstrap draws."""

    def __init__(self, resamples: int = statistics.RESAMPLES):
        self.resamples = resamples

    def ratio(self, numerator, denominator, units: Sequence[Hashable], most: float = 1.0) -> Score:
        """Score of float64 (N, K) columns; see `statistics.ratio_ci95`."""
        if not denominator.any():
            return Score()
        value = float(statistics.mean_of_ratios(numerator.sum(0), denominator.sum(0)))
        if not self.resamples:
            return Score(value)
        interval = statistics.ratio_ci95(numerator, denominator, units, resamples=self.resamples, most=most)
        return Score(value, interval, statistics.count_units(denominator, units))

    def mean(self, values: Sequence[bool], units: Sequence[Hashable]) -> Score:
        """Score of a plain mean; not available without values."""
        column = np.asarray(values, np.float64)[:, None]
        return self.ratio(column, np.ones_like(column), units)

    def of(
        self, metric: Metric, ones: Sequence[Prediction], groups: Sequence[str] = (),
        group_of: Callable[[str], str | None] = str,
    ) -> Score:  # fmt: skip
        """Score of a metric; with `groups` the macro mean over them, `group_of` maps a question type to its group."""
        if metric.summary is not None:
            return self._of_sums(metric, ones)
        if (columns := metric.ratio(ones)) is None:
            return Score()
        top, bottom = columns
        counted = np.flatnonzero(~np.isnan(top))
        units = [ones[i].unit for i in counted]
        belongs = np.array([[group_of(one.type) == group for group in groups] or [True] for one in ones])
        top, bottom = (column[counted, None] * belongs[counted] for column in (top, bottom))
        return self.ratio(top, bottom, units, metric.most)

    def _of_sums(self, metric: Metric, ones: Sequence[Prediction]) -> Score:
        """Score of columns that are summed over the items first, such as the counts of corpus BLEU."""
        columns = metric.per_item(ones) if ones else None
        if columns is None:
            return Score()
        columns, units = np.asarray(columns, np.float64), [one.unit for one in ones]
        count, interval = len(set(units)), None
        sums = statistics.resampled_sums(columns, units, resamples=self.resamples) if self.resamples else None
        if sums is not None:
            low, high = map(float, np.percentile([metric.summary(row) for row in sums], [2.5, 97.5]))
            interval = statistics.agreed_ci95(low, high, count, metric.most)
        return Score(metric.summary(columns.sum(0)), interval, count if self.resamples else None)


def kind_scores(predictions: Run, resamples: int = statistics.RESAMPLES) -> dict[str, Score]:
    """The scores `<kind>/<metric>` of the lists under each kind (a missing list scores None)."""
    scorer = _Scorer(resamples)
    scores: dict[str, Score] = {}
    for kind in KINDS:
        ones = list(predictions.get(kind, ()))
        types = list(dict.fromkeys((*TYPES, *(one.type for one in ones if one.type))))  # without one: no macro mean
        for metric in of_kind(kind):
            scores[f"{kind}/{metric.name}"] = scorer.of(metric, ones)
            if metric.by_type:
                scores[f"{kind}/{metric.name}_macro"] = scorer.of(metric, ones, types)
        for metric in (one for one in of_kind(kind) if one.by_type):
            for type in types:
                own = [one for one in ones if one.type == type]
                scores[f"{kind}/{metric.by_type}/{type}"] = scorer.of(metric, own)
        for metric in (one for one in of_kind(kind) if one.by_family):
            for family in FAMILIES:
                own = [one for one in ones if FAMILY_OF.get(one.type) == family]
                scores[f"{kind}/{metric.by_family}_{family}"] = scorer.of(metric, own)
            macro = scorer.of(metric, ones, tuple(FAMILIES), FAMILY_OF.get)
            scores[f"{kind}/{metric.by_family}_macro_families"] = macro
        if COLUMNS[kind].confident:  # resampling would raise these, so they have no interval
            known = sure(ones) if ones else None
            for name, value in (("calibration_error", calibration_error), ("risk_area", area_under_risk)):
                scores[f"{kind}/{name}"] = Score(value(*known) if known else None)
    return scores


def under_control(run: Run, control: str) -> dict[str, Sequence[Prediction]]:
    """The lists of one control under their plain kind."""
    return {kind: run[key] for kind in KINDS if (key := f"control/{control}_{kind}") in run}


def _load_scores(load: np.ndarray | None) -> dict[str, Score]:
    """Worst case over layers and groups of how unevenly tokens fall on a group's experts.

    `load` (..., E) counts tokens (or shares of them) an expert; a group that received none says nothing.
    """
    most = least = None
    if load is not None and np.any(load):
        load = np.asarray(load, np.float64).reshape(-1, np.shape(load)[-1])
        load = load[load.sum(-1) > 0]
        share = load / load.sum(-1, keepdims=True)
        most, least = float(share.max() * share.shape[-1]), float(share.min())
    return {"moe/load_max_over_mean": Score(most), "moe/load_min_share": Score(least)}


def score(
    run: Run,
    *,
    router: Mapping[str, tuple[Sequence[bool], Sequence[str]]] | None = None,
    load: np.ndarray | None = None,
) -> dict[str, float | list[float] | None]:
    """The contents of `metrics.json` (design: what a run leaves behind).

    `router`: right or wrong and the prompt, one decision each (N,), for any of ROUTER; without `task_accuracy`, the
    decisions noted in the run's own predictions count. A decision rests on the prompt, so whole prompts are drawn.
    `load`: tokens each expert received in the evaluation, (..., E) with any leading layers and groups. A score that
    rests on fewer than FEW_UNITS cases, volumes or prompts has their number beside it, as `<key>_few_units`.
    """
    scorer = _Scorer()
    scores = kind_scores(run)
    controls = {name: kind_scores(under_control(run, name)) for name in CONTROLS}
    scores |= {key: controls[name][source] for key, (name, source) in control_scores().items()}

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
    for key, (value, ci95, units) in scores.items():
        metrics[key], metrics[f"{key}_ci95"] = value, ci95
        if units is not None and units < statistics.FEW_UNITS:
            metrics[f"{key}_few_units"] = units
    return metrics
