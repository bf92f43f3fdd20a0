"""`report.html`: one file without network that shows what an evaluation found, the failures first.

Axis legend: D slices, G expert groups, E experts.
"""

import base64
import functools
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tghmoe_jax import writing
from tghmoe_jax.evaluation import DISCLAIMER, calibration, outputs, routing_plot, statistics
from tghmoe_jax.evaluation.metrics import sure
from tghmoe_jax.evaluation.protocols import CONTROLS, Prediction, Run, kind_scores, scores_of, under_control
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.evaluation.text_table import number
from tghmoe_jax.samples.questions import TYPES, Source
from tghmoe_jax.samples.tasks import KINDS, under_controls

CASES = 12  # of each kind that is shown
SLICES = 6  # of each case's volume
COLOURS = {"score": "#1f5fa8", "shuffled": "#c9c9c9", "section_shuffled": "#9b9b9b", "blind": "#6d6d6d",
           "wrong_group": "#d98c3f"}  # fmt: skip
NAMES = {"score": "score", "shuffled": "shuffled volumes", "section_shuffled": "shuffled within the body section",
         "blind": "no volume", "wrong_group": "the other task's experts"}  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em }
h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: .9em }
td, th { padding: .25em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee }
td:first-child, th:first-child { text-align: left }
th { white-space: normal; vertical-align: bottom }
td:nth-child(n+4), th:nth-child(n+4) { max-width: 7em }
.warn { background: #fff4e0; border-left: 4px solid #d98c3f; padding: .5em 1em }
.case { border: 1px solid #ddd; border-left: 5px solid #3b8f4f; padding: .6em 1em; margin: 1em 0 }
.wrong { border-left-color: #b8352c }
.unjudged { border-left-color: #9b9b9b }
.case img { display: block; width: 100%; max-width: 900px; image-rendering: pixelated; background: #000 }
.wide { width: 100% }
.case p { margin: .3em 0 }
.note { color: #666; font-size: .85em }
"""


def write(
    path: str | Path,
    metrics: Mapping[str, object],
    run: Run,
    source: Source,
    tasks: Sequence[str],
    loads: Mapping[str, np.ndarray] | None = None,
    layers: Sequence[int] = (),
    overlays: Sequence[tuple[int, RoutingMap]] = (),
) -> None:
    """Writes the page.

    `loads` {task of the question: (layers, G, E)} counts the tokens that each expert of each group received; `overlays`
    are volumes and how a question about each was routed.
    """
    parts = [
        f"<h1>Evaluation: {len(run.get('closed', ()))} closed, {len(run.get('open', ()))} open questions, "
        f"{len(run.get('report', ()))} reports</h1>",
        f'<p class="warn">{html.escape(DISCLAIMER)}</p>',
        *(f'<p class="warn">{html.escape(text)}</p>' for text in (*outputs.cases(run), *outputs.remarks(metrics, run))),
        "<h2>Scores beside their controls</h2>", _scores(metrics, run),
        "<h2>Closed questions by type</h2>", _bars(metrics, run),
    ]  # fmt: skip
    if figure := confidence_chart(run):
        parts += ["<h2>How far confidence can be trusted</h2>", _drawn("reliability, and risk and coverage", figure)]
    confusion = _confusion(run, tasks)
    if confusion:
        parts += ["<h2>Which task the prompt was sent to</h2>", confusion]
    if loads:
        parts += ["<h2>Load of the experts</h2>", _load(loads, layers, tasks)]
    if overlays:
        parts += ["<h2>Experts over slices</h2>", *(_overlay(source, *one) for one in overlays)]
    titles = {"closed": "Closed questions", "report": "Reports"}
    for kind in (kind for kind in KINDS if kind in under_controls()):
        title = titles.get(kind, kind.capitalize())
        parts += [f"<h2>{title}: sample cases, failures first</h2>", *_cases(kind, run, source)]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{_STYLE}</style>'
    writing.write(path, page + "<body>" + "\n".join(parts) + "</body></html>\n")


_number = functools.partial(number, missing="–")


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    """An HTML table: texts of its head, and rows that are HTML."""
    return f"<table>{_row(head, 'th')}{''.join(rows)}</table>"


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _scores(metrics: Mapping[str, object], run: Run) -> str:
    beside = outputs.beside_scores(metrics, run)
    rows = []
    for key in scores_of(metrics):
        if (value := metrics[key]) is None:
            continue
        pair = metrics.get(f"{key}_ci95")
        interval = "" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"
        controls = [_number(beside[control].get(key)) for control in CONTROLS]
        rows.append(_row([key, _number(value), interval, *controls]))
    return _table(["score", "value", "95 % interval", *(NAMES[control] for control in CONTROLS)], rows)


def _bars(metrics: Mapping[str, object], run: Run) -> str:
    """The picture of `bar_chart`."""
    if (figure := bar_chart(metrics, run)) is None:
        return '<p class="note">No closed question of a known type.</p>'
    return _drawn("accuracy of each question type and its controls", figure)


def _drawn(title: str, figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return _picture(title, buffer.getvalue())


def confidence_chart(run: Run):
    """A matplotlib figure: the share of right answers at each confidence, and the share of errors among the surest
    answers. None where no answer has a confidence."""
    from matplotlib.figure import Figure  # slow to import; no display is needed

    known = {kind: pair for kind in KINDS if run.get(kind) and (pair := sure(run[kind]))}
    if not known:
        return None
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    reliability, risk = figure.subplots(1, 2)
    reliability.plot([0, 1], [0, 1], color="#9b9b9b", linewidth=1)
    for (kind, (confidence, right)), colour in zip(known.items(), COLOURS.values(), strict=False):
        points = calibration.bins_of(confidence, right)
        edges = [*(least for least, *_ in points[1:]), np.inf]
        means = [confidence[(confidence >= low) & (confidence < high)].mean()
                 for (low, *_), high in zip(points, edges, strict=True)]  # fmt: skip
        shares = [hits / items for _, items, hits in points]
        spread = np.array([statistics.wilson(hits, items) for _, items, hits in points]).T
        reliability.errorbar(means, shares, np.abs(spread - shares), fmt="o", color=colour, label=kind, markersize=4)
        risk.plot(*calibration.risk_coverage(confidence, right), color=colour, label=kind)
    reliability.set(xlabel="confidence", ylabel="share of right answers, 95 %")
    risk.set(xlabel="share of questions answered, surest first", ylabel="share of errors", xlim=(0, 1), ylim=(0, None))
    reliability.legend(frameon=False)
    return figure


def bar_chart(metrics: Mapping[str, object], run: Run):
    """A matplotlib figure: the accuracy of each question type with its interval, its controls, and a line at chance.

    None without a closed question of a known type.
    """
    from matplotlib.figure import Figure  # slow to import; no display is needed

    groups = {"score": {t: metrics.get(f"closed/by_type/{t}") for t in TYPES}}
    for control in CONTROLS:
        if f"control/{control}_closed" in run:
            scores = kind_scores(under_control(run, control), resamples=0)
            groups[control] = {t: scores[f"closed/by_type/{t}"].value for t in TYPES}
    types = [t for t in TYPES if groups["score"][t] is not None]
    if not types:
        return None
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axis, width = figure.subplots(), 1 / (len(groups) + 1)
    for j, (group, values) in enumerate(groups.items()):
        left = np.arange(len(types)) + j * width
        heights = [values[t] or 0.0 for t in types]
        axis.bar(left, heights, width, color=COLOURS[group], label=NAMES[group], align="edge")
    for i, pair in enumerate(metrics.get(f"closed/by_type/{t}_ci95") for t in types):
        if pair is not None:
            axis.vlines(i + width / 2, *pair, color="black")
    options = [len(one.choices) for one in run.get("closed", ()) if one.choices]
    chance = float(np.mean([1 / count for count in options])) if options else 0.0
    axis.axhline(chance, color="#b8352c", linestyle="--", label="chance")
    names = [f"{t} {_number(groups['score'][t])}" for t in types]
    axis.set_xticks(np.arange(len(types)) + width * len(groups) / 2, names)
    axis.set_ylim(0, 1)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _picture(alt: str, png: bytes, style: str = "") -> str:
    """An image of the page; `style` is its class."""
    return f'<img class="{style}" alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _shaded(rows: Sequence[Sequence[object]], head: Sequence[str], form: str) -> str:
    """A table of a name and numbers a row, each cell as dark as its share of the row's sum."""
    lines = []
    for name, *values in rows:
        whole = max(float(sum(values)), 1e-9)
        cells = "".join(
            f'<td style="background:rgba(31,95,168,{0.8 * float(v) / whole:.2f})">{v:{form}}</td>' for v in values
        )
        lines.append(f"<tr><td>{html.escape(str(name))}</td>{cells}</tr>")
    return _table(head, lines)


def _confusion(run: Run, tasks: Sequence[str]) -> str:
    """How many prompts of each task the router sent where; empty where it decided nothing."""
    decided = [one for kind in KINDS for one in run.get(kind, ()) if one.task_predicted]
    if not decided:
        return ""
    rows = [
        [true, *(sum(one.task_true == true and one.task_predicted == task for one in decided) for task in tasks)]
        for true in tasks
    ]
    return _shaded(rows, ["true task", *(f"sent to {task}" for task in tasks)], "d")


def _load(loads: Mapping[str, np.ndarray], layers: Sequence[int], tasks: Sequence[str]) -> str:
    """Shares of the experts of every layer, task and group; a group without tokens of that task is left out."""
    rows = []
    count, groups, experts = next(iter(loads.values())).shape
    names = [f"{task} experts" for task in tasks] if groups == len(tasks) else ["shared experts"] * groups
    for i in range(count):
        for task, load in loads.items():
            for g in np.flatnonzero(load[i].sum(-1)):
                share = load[i, g] / load[i, g].sum()
                rows.append([f"layer {layers[i] if i < len(layers) else i}, {task} prompts, {names[g]}", *share])
    table = _shaded(rows, ["layer, task, group", *(f"expert {e}" for e in range(experts))], ".2f")
    return table + '<p class="note">Routing, not explanation: which expert a token was sent to.</p>'


def _overlay(source: Source, index: int, routing: RoutingMap) -> str:
    png = routing_plot.png(routing, *source.slices(index), "of this evaluation")
    caption = f'<p class="note">Volume {index}. {html.escape(routing_plot.CAPTION)}</p>'
    return _picture(f"experts over slices of volume {index}", png, "wide") + caption


def _mark(one: Prediction) -> str:
    """The class of a case: `wrong`, `right`, or `unjudged` where nothing says which (a report without findings)."""
    if one.kind == "closed":
        return "right" if one.strictly_correct else "wrong"
    if not one.output.strip():
        return "wrong"
    if one.findings_true is None:
        return "unjudged"
    return "right" if one.findings_stated == one.findings_true else "wrong"


def _cases(kind: str, run: Run, source: Source) -> list[str]:
    """Up to CASES cases, at most two thirds of them failures, each with slices, answer, truth and the blind answer."""
    ones = list(run.get(kind, ()))
    wrong, right = [one for one in ones if _mark(one) == "wrong"], [one for one in ones if _mark(one) != "wrong"]
    most = CASES * 2 // 3
    shown = wrong[: max(most, CASES - len(right))] + right[: CASES - min(len(wrong), most)]
    blind = {(one.index, one.prompt): one.output for one in run.get(f"control/blind_{kind}", ())}
    found = []
    for one in shown[:CASES]:
        lines = [("question", one.prompt), ("answer", one.output or "(nothing)"),
                 ("truth", f"{one.letter}. {one.answer}" if one.letter else one.answer)]  # fmt: skip
        if (one.index, one.prompt) in blind:
            lines.append(("without the volume", blind[one.index, one.prompt]))
        if one.findings_true is not None:
            for name, triples in (("findings missed", one.findings_true - one.findings_stated),
                                  ("findings invented", one.findings_stated - one.findings_true)):  # fmt: skip
                lines.append((name, "; ".join(" ".join(filter(None, triple)) for triple in sorted(triples)) or "none"))
        body = "".join(f"<p><b>{name}</b>: {html.escape(text)}</p>" for name, text in lines)
        picture = _picture(f"slices of volume {one.index}", strip(source, one.index))
        found.append(f'<div class="case {_mark(one)}">{picture}{body}</div>')
    return found or ['<p class="note">None.</p>']


def strip(source: Source, index: int) -> bytes:
    """SLICES of a volume side by side, evenly spaced, the second channel, as PNG."""
    slices, mask = source.slices(index)
    real = np.flatnonzero(mask) if mask.any() else np.array([0])
    chosen = real[np.unique(np.linspace(0, len(real) - 1, SLICES).round().astype(int))]
    row = np.concatenate(list(slices[chosen][..., 1]), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, "PNG")
    return buffer.getvalue()
