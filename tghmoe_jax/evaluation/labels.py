"""Clinical scores from label tables: CSV files with one row per case and one 0/1 column per finding.

How to get such a table for generated reports: run a report classifier (CT-RATE's is a RadBERT with 18 outputs) over the
predicted and the true reports and threshold its outputs at the values its authors give. A predicted table may hold
scores of 0 to 1 instead, as a CSV or as a submission of the VLM3D challenge. Axis legend: N cases, L labels,
R resamples.
"""

from pathlib import Path

import numpy as np

from tghmoe_jax.datasets.index_files import NAMELESS
from tghmoe_jax.datasets.llava_json import case_of
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import files, statistics, text_table, vlm3d
from tghmoe_jax.evaluation.metrics import rare_ones
from tghmoe_jax.evaluation.text_table import interval, number

THRESHOLD = 0.5  # a score from here on is a positive label, as in the VLM3D challenge


def read(path: str | Path, flag: str, scores: bool = False) -> tuple[list[str], list[str], np.ndarray]:
    """Cases, labels and float64 (N, L) of a table: the first column names the case, the others with a name are labels.

    Values are 0 or 1, with `scores` anything between; then a JSON file of the VLM3D challenge is read too. Cases lose
    the suffix of a volume's file. UserError names the flag and the first row or value that does not fit.
    """
    if scores and str(path).endswith(".json"):
        head, body = vlm3d.read_probabilities(Path(path))
    else:
        head, body = files.read_table(path, f"{flag} {path}")
    if not body or len(head) < 2:
        raise UserError(f"{flag} {path} needs a header with a case and at least one label, and a row.")
    kept = [0, *(j for j, name in enumerate(head) if j and not NAMELESS.fullmatch(name))]
    head, *body = [[row[j].strip() for j in kept] for row in (head, *body)]
    body = [[vlm3d.without_suffix(row[0]), *row[1:]] for row in body]
    values = np.zeros((len(body), len(head) - 1))
    for i, row in enumerate(body):
        for j, cell in enumerate(row[1:]):
            if not _fits(cell, scores):
                wanted = "neither 0 nor 1" + (", nor a score between them" if scores else "")
                raise UserError(f"{flag} {path}, row {i + 2}: {head[j + 1]} is {cell!r}, {wanted}.")
            values[i, j] = float(cell)
    if taken := {"micro", "macro"} & {name.lower() for name in head[1:]}:
        raise UserError(f"{flag} {path} names a label {taken.pop()!r}, as the mean over all labels is; rename it.")
    for what, names in (("case", [row[0] for row in body]), ("label", head[1:])):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{flag} {path} names the {what} {twice!r} twice.")
    return [row[0] for row in body], head[1:], values


def _fits(cell: str, scores: bool) -> bool:
    try:
        return cell in ("0", "1", "0.0", "1.0") or (scores and 0.0 <= float(cell) <= 1.0)
    except ValueError:
        return False


def crg(hit: np.ndarray, missed: np.ndarray, extra: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """The clinical relevance score (...) of counts (...): all right 1, all negative 1/3, NaN without both classes.

    Source: crg_score.py of the VLM3D challenge: X = decisions, A = positives, r = (X - A) / 2A, U = (X - A) / 2,
    s = r TP - r FN - FP, CRG = U / (2U - s).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        half = (decisions - (hit + missed)) / 2
        weight = half / (hit + missed)
        return half / (2 * half - (weight * (hit - missed) - extra))


def auroc(scores: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Areas under the ROC curve (R,) of scores (N,), truth bool (N,) and weights (R, N) of the cases.

    It is the chance that a positive case scores above a negative one, where equal scores count half (Mann and Whitney
    1947). NaN without both classes.
    """
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of each run of equal scores
    positive, negative = (np.add.reduceat((weights * of)[:, order], first, axis=1) for of in (true, ~true))
    below = negative.cumsum(axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def score(predicted: str | Path, true: str | Path, seed: int = 0) -> dict[str, dict[str, object]]:
    """{"micro" | "macro" | label: f1, ci95, precision, recall, accuracy, auroc, auroc_ci95, prevalence, items, units}.

    `micro` has, too, crg, crg_ci95, recall_rare and recall_frequent (of the labels that are true in fewer rows than the
    median label, and of the others), all_normal and all_normal_true (shares of rows without a positive label).
    `prevalence` is of the true table. An AUROC needs a predicted table of scores. Rows and columns may come in any
    order but must be the same ones. A label that is nowhere true or predicted has no F1 and is left out of the macro
    means, and so is one without both classes for its AUROC. Intervals draw `units` whole: the rows of one patient where
    they are named as CT-RATE or M3D name volumes (a patient has several reconstructions there), else single rows.
    """
    cases_a, labels_a, a = read(predicted, "--pred-labels", scores=True)
    cases_b, labels_b, b = read(true, "--true-labels")
    for what, one, other in (("cases", cases_a, cases_b), ("labels", labels_a, labels_b)):
        if apart := sorted(set(one) ^ set(other)):
            raise UserError(
                f"--pred-labels and --true-labels differ in their {what} ({', '.join(apart[:5])}"
                f"{', ...' if len(apart) > 5 else ''}); give tables of the same ones."
            )
    row_of, column_of = ({name: i for i, name in enumerate(names)} for names in (cases_a, labels_a))
    scores = a[[row_of[case] for case in cases_b]][:, [column_of[label] for label in labels_b]]
    units = [case_of(case) for case in cases_b]
    a = (scores >= THRESHOLD).astype(np.float64)
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
            "accuracy": float((a == b)[:, columns].mean()),
            "auroc": None,
            "auroc_ci95": None,
            "prevalence": float(b[:, columns].mean()),
            "items": len(b),
            "units": len(set(units)),
        }

    micro = row(slice(None))
    single = {label: row([j]) for j, label in enumerate(labels_b)}
    macro = micro | {"f1": None, "ci95": statistics.ratio_ci95(top, bottom, units, seed)}
    if not np.isin(scores, (0.0, 1.0)).all():
        _add_auroc([*single.values(), macro], scores, b > 0, units, seed)
    for key in ("f1", "precision", "recall", "accuracy", "auroc"):
        known = [one[key] for one in single.values() if one[key] is not None]
        macro[key] = float(np.mean(known)) if known else None
    counts = np.stack([*(part.sum(1) for part in (hit, missed, extra)), np.full(len(b), b.shape[1])], axis=1)
    micro["crg"], micro["crg_ci95"] = _summed(lambda sums: crg(*sums.T), counts, units, seed)
    rare = rare_ones(b.sum(0))
    for name, labels in (("recall_rare", rare), ("recall_frequent", ~rare)):
        micro[name] = ratio(hit[:, labels].sum(), b[:, labels].sum())
    micro |= {"all_normal": float((a.sum(1) == 0).mean()), "all_normal_true": float((b.sum(1) == 0).mean())}
    return {"micro": micro, "macro": macro, **single}


def _summed(summary, columns: np.ndarray, units: list[str], seed: int) -> tuple[float | None, list[float] | None]:
    """`summary` of the sums (..., K) of columns (N, K), and its interval; None where it is not defined."""
    value = float(summary(columns.sum(0)))
    sums = statistics.resampled_sums(columns, units, seed)
    if np.isnan(value) or sums is None:
        return (None if np.isnan(value) else value), None
    return value, _percentiles(summary(sums), units)


def _add_auroc(rows: list[dict], scores: np.ndarray, true: np.ndarray, units: list[str], seed: int) -> None:
    """The AUROC of each label, and the interval of it and (the last row) of their mean."""
    drawn = statistics.drawn_units(units, seed)
    # In parts, because all draws of all cases at once may not fit the memory.
    parts = [] if drawn is None else [(part, drawn[1]) for part in np.array_split(drawn[0], 20)]
    every = []
    for j, row in enumerate(rows[:-1]):
        value = auroc(scores[:, j], true[:, j], np.ones((1, len(true))))[0]
        row["auroc"] = None if np.isnan(value) else float(value)
        if row["auroc"] is not None and parts:
            areas = [auroc(scores[:, j], true[:, j], counts[:, unit]) for counts, unit in parts]
            every.append(np.concatenate(areas))
            row["auroc_ci95"] = _percentiles(every[-1], units)
    if every:
        rows[-1]["auroc_ci95"] = _percentiles(np.nanmean(every, axis=0), units)


def _percentiles(values: np.ndarray, units: list[str]) -> list[float]:
    return statistics.agreed_ci95(*map(float, np.nanpercentile(values, [2.5, 97.5])), len(set(units)))


def table(result: dict[str, dict[str, object]]) -> str:
    """A terminal table, one line a label, and what its intervals are drawn of."""
    micro = result["micro"]
    rows = [["label", "F1", "95% interval", "precision", "recall", "prevalence"]]
    for name, one in result.items():
        rows.append([name, number(one["f1"]), interval(one["ci95"]), *(number(one[key]) for key in rows[0][3:])])
    if result["macro"]["auroc"] is not None:
        rows[0] += ["AUROC", "95% interval"]
        for row, one in zip(rows[1:], result.values(), strict=True):
            row += [number(one["auroc"]), interval(one["auroc_ci95"])]
    return "\n".join([
        *text_table.table(rows, left=range(8)),
        f"CRG {number(micro['crg'])} {interval(micro['crg_ci95'])} (all right 1, all negative 0.333)",
        f"recall of rare labels {number(micro['recall_rare'])}, of frequent ones {number(micro['recall_frequent'])}; "
        f"rows without a positive label {number(micro['all_normal'])} (in truth {number(micro['all_normal_true'])})",
        f"intervals: whole cases are drawn, of which there are {micro['units']} in {micro['items']} rows.",
    ])  # fmt: skip
