"""The verdict of an evaluation in about five lines: is the score above chance and above its blind control?

A verdict is never stronger than its interval: it needs the paired difference from the blind control, item by item, with
an interval over whole cases or volumes, of `statistics.FEW_UNITS` of them at least.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from tghmoe_jax.evaluation import comparison
from tghmoe_jax.evaluation.metrics import of_kind
from tghmoe_jax.evaluation.protocols import Prediction, Run, under_control
from tghmoe_jax.evaluation.statistics import FEW_UNITS
from tghmoe_jax.evaluation.text_table import interval, number
from tghmoe_jax.samples.tasks import COLUMNS, KINDS, TASKS, under_controls

LESIONS = "lesions_mm"  # key of metrics.json: the smallest and largest drawn lesion of the test volumes in mm
ABOVE, NOT_ABOVE, TOO_FEW, NOT_ASKED = "above", "not above", "too few", "not asked"
MORE_ITEMS = 200  # that the next command asks for, where an evaluation had too few


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`score` is a key of metrics.json, `value` and `ci95` what stands there, `items` and `units` (`unit`: cases or
    volumes) what it rests on. chance and blind are None where not known. `text` is a clause, `state` its short form.
    """

    score: str
    value: float
    ci95: Sequence[float] | None
    items: int
    units: int
    unit: str
    chance: float | None
    blind: float | None
    text: str
    state: str

    def __str__(self) -> str:
        value = " ".join(filter(None, (number(self.value), interval(self.ci95))))
        return f"{self.score} {value} of {self.items} items about {self.units} {self.unit}"


def chance_of(ones: Sequence[Prediction]) -> float | None:
    """The mean share of right answers of a guess among the choices; None where an item has no known choices."""
    return sum(1 / len(one.choices) for one in ones) / len(ones) if ones and all(one.choices for one in ones) else None


def verdicts(metrics: Mapping[str, object], run: Run) -> list[Verdict]:
    """One for each kind of question that controls repeat, in the order of the tables, or else for each kind: for the
    first score of its task, or the first that says right or wrong where the data set does not give that one."""
    firsts = [first for task in TASKS.values() if (first := next(iter(task.scores), ""))]
    kinds = [kind for kind in KINDS if run.get(kind)]
    scores = []
    for kind in [kind for kind in kinds if kind in under_controls()] or kinds:
        judged = [f"{kind}/{metric.name}" for metric in of_kind(kind) if metric.judged and metric.compared]
        own_first = [first for first in firsts if first.split("/")[0] == kind]
        scores += [key for key in (*own_first, *judged) if metrics.get(key) is not None][:1]
    own, blind = comparison.beside_control(run, "blind")
    compared = comparison.compare(blind, own, judged=True) if own else {}
    return [_verdict(score, metrics, run, compared) for score in scores]


def _verdict(score: str, metrics: Mapping[str, object], run: Run, compared: Mapping[str, Mapping]) -> Verdict:
    kind = score.split("/")[0]
    ones = run[kind]
    units, unit = len({one.unit for one in ones}), "volumes" if ones[0].case is None else "cases"
    chance = chance_of(ones) if COLUMNS[kind].lettered else None
    row = compared.get(score)
    if row is None:
        state = NOT_ASKED
        asked = kind in under_control(run, "blind")
        why = "what its answers state is not known" if asked else f"it was not run on {kind} questions"
        text = f"unknown: there is no blind control to compare with ({why})"
    elif row["ci95"] is None or row["units"] < FEW_UNITS:
        state = TOO_FEW
        text = f"unknown: {row['units']} {unit} are too few for an interval ({FEW_UNITS} are needed)"
    else:
        state, text = _judged(row)
        own = (key for task in TASKS.values() if score in task.scores for key in task.scores if key in compared)
        for other in (key for key in own if key.split("/")[0] == kind):
            # A rule that counts an answer of several letters as right must not decide alone.
            if state == ABOVE and (found := _judged(compared[other]))[0] != ABOVE:
                state, text = NOT_ABOVE, f"{score} alone proves nothing: {other} is {found[1]}"
        pair = metrics.get(f"{score}_ci95")
        if state == ABOVE and chance is not None and (pair is None or pair[0] <= chance):
            state, text = NOT_ABOVE, f"{text}, but not above chance"
    known = {"value": metrics[score], "ci95": metrics.get(f"{score}_ci95"), "chance": chance}
    known |= {"blind": None if row is None else row["a"], "text": text, "state": state}
    return Verdict(score, items=len(ones), units=units, unit=unit, **known)


def _judged(row: Mapping) -> tuple[str, str]:
    """State and clause of a row of `comparison.compare` that has an interval."""
    low, high = row["ci95"]
    if low > 0:
        return ABOVE, f"above its blind control by {number(row['difference'])} {interval((low, high))}"
    lower = ", but below it" if high < 0 else ""
    return NOT_ABOVE, f"not above its blind control{lower} ({row['difference']:+.3f} {interval((low, high), '+')})"


def drawn(metrics: Mapping[str, object]) -> str:
    """What must stand beside a score on drawn anatomy; empty for other data."""
    if LESIONS not in metrics:
        return ""
    pair = metrics[LESIONS]
    sizes = "no lesions" if pair is None else f"lesions of {pair[0]:.0f} to {pair[1]:.0f} mm"
    return f"drawn anatomy; {sizes}"


def lines(found: Sequence[Verdict], metrics: Mapping[str, object]) -> list[str]:
    """The lines for a terminal: score, chance, blind, verdict, and one line for each further score."""
    if not found:
        return ["verdict  unknown: no score of a task is there to be judged"]
    first, *others = found
    named = drawn(metrics)
    return [
        f"score    {first}{f' ({named})' if named else ''}",
        f"chance   {number(first.chance, 'not known')}",
        f"blind    {number(first.blind, 'not known')}",
        f"verdict  {first.text}",
        *(f"also     {one}{'' if one.blind is None else f', blind {number(one.blind)}'}: {one.text}" for one in others),
    ]


def next_step(found: Sequence[Verdict], run: str, stage1: bool, all_asked: bool = False, own: bool = True) -> str:
    """What to run next after the evaluation of `run`; `stage1`: its model has experts, in one group.

    all_asked: every item of the test split was asked. own: `evaluate run` asks these items too; False where the config
    of the evaluation may name other data than the run was trained on.
    """
    state = found[0].state if found else NOT_ASKED
    if state == TOO_FEW:
        if all_asked:
            return f"every item of the test split was asked; add cases to it ({FEW_UNITS} are needed)"
        if not own:
            return f"ask more items: the same command with --config.eval.items={MORE_ITEMS}"
        return f"ask more items: python -m tghmoe_jax.evaluate run {run} --items {MORE_ITEMS}"
    if state == NOT_ASKED and found and found[0].score.split("/")[0] in under_controls():
        return f"ask every control: python -m tghmoe_jax.main --config configs/evaluate.py --config.init_from={run}"
    if state == NOT_ABOVE:
        return "look at the failures in the report; train longer or on more volumes (train.steps, data.volumes)"
    if stage1:
        return f"python -m tghmoe_jax.main --config configs/stage2.py --config.init_from={run}"
    return f'python -m tghmoe_jax.predict --checkpoint {run} --volume SCAN.nii.gz --question "..."'
