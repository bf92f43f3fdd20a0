"""The value of the task level: the router compared with a keyword rule, and scores with true and wrong routing."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from tghmoe_jax.evaluation import text_table
from tghmoe_jax.evaluation.protocols import Prediction, kind_scores

ROUTINGS = ("predicted", "oracle", "wrong")
SCORES = {"closed": "closed/accuracy", "report": "report/finding_f1"}
_REPORT = re.compile(
    r"\b(?:report\w*|describe|summar\w+|findings|impression|interpretation|caption|dictate|draft|write)\b",
    re.IGNORECASE,
)


def task_by_keyword(question: str) -> str:
    """The task of a question (without its choices) by a rule that needs no training: the router's baseline."""
    return "report" if _REPORT.search(question) else "vqa"


def score_way(
    oracle: Mapping[str, Sequence[Prediction]],
    wrong: Mapping[str, Sequence[Prediction]],
    hits: Mapping[str, Sequence[bool]],
) -> dict[str, object]:
    """One way of asking. `oracle` and `wrong` {kind: predictions} by the true and the other task's experts, item by
    item; `hits` {kind: whether the router picks the true task}, `open` being the closed questions without their
    choices, which give a question away.

    What predicted routing answers is put together from the two: an answer depends on its group alone. Returns
    `router/<kind>` and `keyword/<task>` accuracies, and `<score>/<routing>` with `_ci95` for SCORES and ROUTINGS.
    """
    predicted = {
        kind: [right if hit else other for right, other, hit in zip(ones, wrong[kind], hits[kind], strict=True)]
        for kind, ones in oracle.items()
    }
    result: dict[str, object] = {f"router/{kind}": float(np.mean(own)) for kind, own in hits.items()}
    for ones in oracle.values():
        task = ones[0].task_true
        result[f"keyword/{task}"] = float(np.mean([task_by_keyword(one.question) == task for one in ones]))
    for routing, run in zip(ROUTINGS, (predicted, oracle, wrong), strict=True):
        scores = kind_scores(run)
        for kind, name in SCORES.items():
            if kind in run:
                result[f"{name}/{routing}"], result[f"{name}/{routing}_ci95"], _ = scores[name]
    return result


def table(ways: Mapping[str, Mapping[str, object]]) -> str:
    """A terminal table, one line a way of asking."""
    keys = ["router/closed", "router/open", "router/report", "keyword/vqa", "keyword/report"]
    keys += [f"{name}/{routing}" for name in SCORES.values() for routing in ROUTINGS]
    rows = [["asked", *(" ".join(key.split("/")[-2:]) for key in keys)]]
    for way, scores in ways.items():
        rows.append([way, *(text_table.number(scores.get(key)) for key in keys)])
    return "\n".join(text_table.table(rows, left=()))
