"""Two systems on the same items: the difference of each score with a paired bootstrap interval."""

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import statistics, text_table
from tghmoe_jax.evaluation.metrics import of_kind
from tghmoe_jax.evaluation.protocols import Prediction, Run, under_control
from tghmoe_jax.evaluation.statistics import FEW_UNITS
from tghmoe_jax.samples.tasks import KINDS

Ratios = Mapping[str, tuple[np.ndarray, np.ndarray]]


def compare(one: Run, other: Run, judged: bool = False) -> dict[str, dict]:
    """{score: {"a", "b", "difference" (b - a), "ci95" [low, high] or None, "items", "units"}} of the common kinds.

    Whole cases (or volumes) are drawn, the same ones for both; `units` counts them. UserError where the runs do not
    hold the same items. `judged` leaves out the overlap of words, which takes longest.
    """
    kinds = [kind for kind in KINDS if kind in one and kind in other]
    if not kinds:
        raise UserError(f"the two runs have no kind of prediction in common ({', '.join(KINDS)}).")
    result = {}
    for kind in kinds:
        a, b = paired(one[kind], other[kind], kind)
        known = b if all(two.case is not None for two in b) else a  # either side may know the cases
        units = [prediction.unit for prediction in known]
        sides = [columns(kind, predictions, judged) for predictions in (a, b)]
        for name in (name for name in sides[0] if name in sides[1]):
            (top, bottom), (top_b, bottom_b) = (side[name] for side in sides)
            if not (bottom.any() and bottom_b.any()):
                continue
            values = [float(n.sum() / d.sum()) for n, d in ((top, bottom), (top_b, bottom_b))]
            interval = statistics.difference_ci95((top, bottom), (top_b, bottom_b), units)
            result[f"{kind}/{name}"] = {
                "a": values[0], "b": values[1], "difference": values[1] - values[0],
                "ci95": interval, "items": len(a), "units": len(set(units)),
            }  # fmt: skip
    return result


def beside_control(
    run: Run, control: str, keep: Callable[[Prediction], bool] = lambda one: True
) -> tuple[dict[str, list[Prediction]], dict[str, list[Prediction]]]:
    """The answers of a run that a control repeats and `keep` holds for, and those under the control, by kind and in the
    same order."""
    own, other = {}, {}
    for kind, ones in under_control(run, control).items():
        answered = {(one.index, one.prompt): one for one in ones}
        if kept := [one for one in run[kind] if keep(one) and (one.index, one.prompt) in answered]:
            own[kind], other[kind] = kept, [answered[one.index, one.prompt] for one in kept]
    return own, other


def paired(
    one: Sequence[Prediction], other: Sequence[Prediction], kind: str
) -> tuple[list[Prediction], list[Prediction]]:
    """Both runs' predictions in the order of the first. UserError where their items differ.

    An item that stands twice in each is compared in the order in which it stands.
    """
    named = all(prediction.key for prediction in (*one, *other))  # numbers of volumes are each file's own
    keys = [{}, {}]
    for table, predictions in zip(keys, (one, other), strict=True):
        times = collections.Counter()
        for prediction in predictions:
            volume = prediction.key if named else prediction.index
            item = (volume, prediction.question, prediction.choices, prediction.answer)
            table[(*item, times[item])] = prediction
            times[item] += 1
    if missing := len(keys[0].keys() ^ keys[1].keys()):
        raise UserError(
            f"{kind}: {missing} items are in one run only; compare runs of the same items (eval.items, eval.seed)."
        )
    return list(keys[0].values()), [keys[1][key] for key in keys[0]]


def columns(kind: str, predictions: Sequence[Prediction], judged: bool = False) -> Ratios:
    """{score: numerator and denominator (N,)} of each metric that all items have.

    `judged` leaves out the overlap of words: closed answers and stated findings remain.
    """
    found = {one.name: one.ratio(predictions) for one in of_kind(kind) if one.compared and (one.judged or not judged)}
    return {name: ratio for name, ratio in found.items() if ratio is not None and not np.isnan(ratio[0]).any()}


def table(result: Mapping[str, Mapping]) -> str:
    """A terminal table; a difference whose interval leaves out zero is marked, of `FEW_UNITS` or more."""
    rows = [["score", "items", "units", "A", "B", "B - A", "95% interval", ""]]
    for name, row in result.items():
        low_high = row["ci95"]
        differs = low_high is not None and not low_high[0] <= 0 <= low_high[1]
        mark = "" if low_high is None else "few" if row["units"] < FEW_UNITS else "differs" if differs else ""
        rows.append([name, str(row["items"]), str(row["units"]), f"{row['a']:.3f}", f"{row['b']:.3f}",
                     f"{row['difference']:+.3f}", text_table.interval(low_high, "+"), mark])  # fmt: skip
    lines = text_table.table(rows, left=range(8))
    marks = [row[-1] for row in rows[1:]]
    if "few" in marks:
        lines.append(f"few: fewer than {FEW_UNITS} cases or volumes, so the interval is too narrow to judge by.")
    if "differs" in marks:
        lines.append("differs: the interval leaves out 0; with many scores, some do so by chance.")
    elif any(row["ci95"] is not None and row["units"] >= FEW_UNITS for row in result.values()):
        lines.append("No score shows a difference: the interval contains 0 wherever there are enough cases or volumes.")
    return "\n".join(lines)
