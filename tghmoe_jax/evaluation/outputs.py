"""The files of an evaluation: `predictions_{report,open,closed}.csv`, `metrics.json` and the terminal table."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from tghmoe_jax import untrusted, writing
from tghmoe_jax.evaluation import DISCLAIMER, comparison, text_metrics, text_table
from tghmoe_jax.evaluation.metrics import of_kind
from tghmoe_jax.evaluation.protocols import (
    CONTROLS,
    NOT_ASKED,
    Prediction,
    Run,
    control_scores,
    kind_scores,
    scores_of,
    under_control,
)
from tghmoe_jax.evaluation.text_table import interval, number
from tghmoe_jax.samples.questions import TYPES
from tghmoe_jax.samples.tasks import COLUMNS, KINDS, TASKS


def _triples(triples) -> str:
    return "" if triples is None else "; ".join(" / ".join(part for part in triple) for triple in sorted(triples))


def _rows(predictions: Sequence[Prediction]) -> list[dict[str, object]]:
    """All columns that the predictions of a kind can fill; each file keeps its own."""
    rows = [row_of(one) for one in predictions]
    for metric in of_kind(predictions[0].kind) if predictions else ():
        values = metric.per_item(predictions) if metric.column else None
        for row, value in zip(rows, () if values is None else values, strict=values is not None):
            row[metric.column] = float(value)
    return rows


def row_of(one: Prediction) -> dict[str, object]:
    """The columns of one prediction, those aside that compare it with others."""
    row = {
        # M3D numbers the five types from 1; any other type keeps its name.
        "Question Type": TYPES.index(one.type) + 1 if one.type in TYPES else one.type,
        "Question": one.prompt,
        COLUMNS[one.kind].truth: one.answer,
        "Answer Choice": one.letter,
        COLUMNS[one.kind].output: one.output,
        "Volume": one.index,
        "Case": one.case,
        "Key": one.key,
        "Type": one.type,
        "Ranked": one.ranked,
        "Confidence": one.confidence,
        "Task": one.task_true,
        "Task Predicted": one.task_predicted,
        "Findings True": _triples(one.findings_true),
        "Findings Stated": _triples(one.findings_stated),
        "Disclaimer": DISCLAIMER,
    }
    if COLUMNS[one.kind].lettered:
        # The strict rule needs the options, which a file of another system may not hold.
        row |= {"Correct": int(one.correct), "Strict": int(one.strictly_correct) if one.choices else ""}
    return row


def write_json(path: epath.PathLike, content: object) -> None:
    """Writes a whole JSON file or nothing, as `writing.write` does. ValueError for NaN and infinity."""
    writing.write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """The columns of rows as lines of CSV, without a header; what a row lacks is empty."""
    text = io.StringIO(newline="")
    # Texts are quoted: a model may write a carriage return, which would end a row.
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerows({name: untrusted.cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def write_predictions(folder: epath.PathLike, run: Run) -> list[epath.Path]:
    """Writes `predictions_<kind>.csv` for each kind in `run` and returns their paths.

    M3D's columns come first, then the volume, its case where the data set knows it, the task and what each control
    answered to the same question (`NOT_ASKED` where the control left it out). Every row ends with the disclaimer.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in KINDS:
        if kind not in run:
            continue
        answers = {
            name: {(one.index, one.prompt): one.output for one in ones[kind]}
            for name in CONTROLS
            if kind in (ones := under_control(run, name))
        }
        case = ["Case"] if any(one.case is not None for one in run[kind]) else []
        key = ["Key"] if any(one.key for one in run[kind]) else []
        own = COLUMNS[kind]
        scored = [metric.column for metric in of_kind(kind) if metric.column]
        columns = [*own.first, "Volume", *case, *key, *own.more, *scored, "Task", "Task Predicted"]
        columns = list(dict.fromkeys(columns))  # most scores have their place in `first` and `more`
        columns += [f"Control {name}" for name in answers] + ["Disclaimer"]
        rows = []
        for one, row in zip(run[kind], _rows(run[kind]), strict=True):
            controls = {
                f"Control {name}": given.get((one.index, one.prompt), NOT_ASKED) for name, given in answers.items()
            }
            rows.append(row | controls)
        path = folder / f"predictions_{kind}.csv"
        writing.write(path, csv_text(columns, [dict(zip(columns, columns, strict=True)), *rows]))
        written.append(path)
    return written


def remarks(metrics: Mapping[str, object], run: Run | None = None) -> list[str]:
    """Sentences on what forcing the wrong expert group changes, item by item, and on missing metrics."""
    remarks = []
    scored = [kind for kind in KINDS if metrics.get(f"{kind}/bleu1") is not None]
    for name, why in text_metrics.MISSING.items():
        if any(metrics.get(f"{kind}/{name}") is None for kind in scored):
            remarks.append(why)
    # Where the router erred the forced experts are those that answered already.
    own, forced = comparison.beside_control(
        run or {}, "wrong_group", lambda one: one.task_predicted in (None, one.task_true)
    )
    paired = comparison.compare(own, forced, judged=True) if own else {}
    for score in sorted(next(iter(task.scores), "") for task in TASKS.values()):  # of each task the first
        if (row := paired.get(score)) and row["ci95"] is not None:
            low, high = row["ci95"]
            shown = "no effect of the task level is shown" if low <= 0 <= high else "the choice of experts matters"
            if row["units"] < comparison.FEW_UNITS:
                shown = f"{row['units']} cases or volumes are too few to judge by"
            remarks.append(
                f"{score}: with the other task's experts forced, {row['items']} items that the router sent to their "
                f"task score {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]: {shown}."
            )
    return remarks


def cases(run: Run | None) -> list[str]:
    """A sentence on the number of cases behind the intervals; nothing where no case is known."""
    known = {one.case for kind in KINDS for one in (run or {}).get(kind, ()) if one.case is not None}
    if not known:
        return []
    few = "" if len(known) >= comparison.FEW_UNITS else "; so few cases say little about other patients"
    return [f"intervals: whole cases are drawn, of which there are {len(known)}{few}."]


def beside_scores(metrics: Mapping[str, object], run: Run | None = None) -> dict[str, dict[str, float | None]]:
    """{control: {score: its value under the control}}; without `run` those that `metrics` holds."""
    beside = {control: {} for control in CONTROLS}
    for key, (control, score) in control_scores().items():
        beside[control][score] = metrics.get(key)
    if run is not None:
        for control in CONTROLS:
            scores = kind_scores(under_control(run, control), resamples=0)
            beside[control] |= {key: one.value for key, one in scores.items() if one.value is not None}
    return beside


def table(metrics: Mapping[str, object], run: Run | None = None) -> str:
    """A terminal table: each score that there is, its 95% interval and the same score under each control.

    Without `run` only the controls that `metrics` holds are filled; with it every row is.
    """
    beside = beside_scores(metrics, run)
    rows = [["score", "value", "95% interval", "shuffled", "in section", "blind", "wrong group"]]
    for key in scores_of(metrics):
        known = [metrics[key], *(beside[control].get(key) for control in CONTROLS)]
        if all(value is None for value in known):
            continue
        controls = [number(value) for value in known[1:]]
        rows.append([key, number(metrics[key]), interval(metrics.get(f"{key}_ci95")), *controls])
    lines = text_table.table(rows, left=(0, 2))
    lines.insert(1, "  ".join("-" * max(map(len, column)) for column in zip(*rows, strict=True)))
    return "\n".join([*lines, *cases(run), *remarks(metrics, run), DISCLAIMER])
