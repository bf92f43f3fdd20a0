"""Clinical scores from label tables: CSV files with one row a case and one 0/1 column a finding, as CT-RATE's.

How to get such a table for generated reports: run a report classifier (CT-RATE's is a RadBERT with 18 outputs) over the
predicted and the true reports and threshold its outputs at the values its authors give.
"""

from pathlib import Path

import numpy as np

from tghmoe_jax.datasets.index_files import NAMELESS
from tghmoe_jax.datasets.llava_json import case_of
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import files, statistics, text_table
from tghmoe_jax.evaluation.text_table import interval, number


def read(path: str | Path, flag: str) -> tuple[list[str], list[str], np.ndarray]:
    """Cases, labels and int8 (N, L) of a table: the first column names the case, the others with a name are labels.

    UserError names the flag and the first row or value that does not fit.
    """
    head, body = files.read_table(path, f"{flag} {path}")
    if not body or len(head) < 2:
        raise UserError(f"{flag} {path} needs a header with a case and at least one label, and a row.")
    kept = [0, *(j for j, name in enumerate(head) if j and not NAMELESS.fullmatch(name))]
    head, *body = [[row[j].strip() for j in kept] for row in (head, *body)]
    values = np.zeros((len(body), len(head) - 1), np.int8)
    for i, row in enumerate(body):
        for j, cell in enumerate(row[1:]):
            if cell not in ("0", "1", "0.0", "1.0"):
                raise UserError(f"{flag} {path}, row {i + 2}: {head[j + 1]} is {cell!r}, neither 0 nor 1.")
            values[i, j] = cell.startswith("1")
    if taken := {"micro", "macro"} & {name.lower() for name in head[1:]}:
        raise UserError(f"{flag} {path} names a label {taken.pop()!r}, as the mean over all labels is; rename it.")
    for what, names in (("case", [row[0] for row in body]), ("label", head[1:])):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{flag} {path} names the {what} {twice!r} twice.")
    return [row[0] for row in body], head[1:], values


def score(predicted: str | Path, true: str | Path, seed: int = 0) -> dict[str, dict[str, object]]:
    """{"micro" | "macro" | label: f1, ci95, precision, recall, prevalence (of the true table), items, units}.

    Rows and columns may come in any order but must be the same ones. A label that is nowhere true or predicted has no
    F1 and is left out of the macro mean. Intervals draw `units` whole: the rows of one patient where they are named as
    CT-RATE or M3D name volumes (a patient has several reconstructions there), else single rows.
    """
    cases_a, labels_a, a = read(predicted, "--pred-labels")
    cases_b, labels_b, b = read(true, "--true-labels")
    for what, one, other in (("cases", cases_a, cases_b), ("labels", labels_a, labels_b)):
        if apart := sorted(set(one) ^ set(other)):
            raise UserError(
                f"--pred-labels and --true-labels differ in their {what} ({', '.join(apart[:5])}"
                f"{', ...' if len(apart) > 5 else ''}); give tables of the same ones."
            )
    a = a[[cases_a.index(case) for case in cases_b]][:, [labels_a.index(label) for label in labels_b]]
    units = [case_of(case) for case in cases_b]
    hit, extra, missed = a * b, a * (1 - b), (1 - a) * b
    top, bottom = 2.0 * hit, 2.0 * hit + extra + missed

    def ratio(part: float, whole: float) -> float | None:
        return float(part / whole) if whole else None

    def row(columns) -> dict[str, object]:
        """Scores over all decisions of some columns."""
        h, e, m = (part[:, columns].sum() for part in (hit, extra, missed))
        n, d = top[:, columns].sum(1, keepdims=True), bottom[:, columns].sum(1, keepdims=True)
        return {
            "f1": ratio(n.sum(), d.sum()),
            "ci95": statistics.ratio_ci95(n, d, units, seed),
            "precision": ratio(h, h + e),
            "recall": ratio(h, h + m),
            "prevalence": float(b[:, columns].mean()),
            "items": len(b),
            "units": len(set(units)),
        }

    micro = row(slice(None))
    single = {label: row([j]) for j, label in enumerate(labels_b)}
    known = [one["f1"] for one in single.values() if one["f1"] is not None]
    macro = micro | {
        "f1": float(np.mean(known)) if known else None,
        "ci95": statistics.ratio_ci95(top, bottom, units, seed),
        "precision": None,
        "recall": None,
    }
    return {"micro": micro, "macro": macro, **single}


def table(result: dict[str, dict[str, object]]) -> str:
    """A terminal table, one line a label, and what its intervals are drawn of."""
    rows = [["label", "F1", "95% interval", "precision", "recall", "prevalence"]]
    for name, one in result.items():
        rows.append([name, number(one["f1"]), interval(one["ci95"]), *(number(one[key]) for key in rows[0][3:])])
    lines = text_table.table(rows, left=range(6))
    units, items = result["micro"]["units"], result["micro"]["items"]
    return "\n".join([*lines, f"intervals: whole cases are drawn, of which there are {units} in {items} rows."])
