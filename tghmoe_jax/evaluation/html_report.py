"""`report.html`: one file without network that shows what an evaluation found, the failures first.

Axis legend: D slices, G expert groups, E experts.
"""

import base64
import collections
import functools
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from tghmoe_jax import writing
from tghmoe_jax.evaluation import (
    DISCLAIMER,
    calibration,
    findings,
    outputs,
    routing_plot,
    slice_strip,
    statistics,
    verdict,
)
from tghmoe_jax.evaluation.metrics import sure
from tghmoe_jax.evaluation.protocols import CONTROLS, Prediction, Run, Score, kind_scores, scores_of, under_control
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.evaluation.text_table import number
from tghmoe_jax.evaluation.verdict import Verdict
from tghmoe_jax.samples.questions import TYPES, Source
from tghmoe_jax.samples.tasks import COLUMNS, KINDS, under_controls

CASES = 12  # of each kind that is shown
MOST_TYPES = 20  # question types that are drawn; the table has all
COLOURS = {"score": "#1f5fa8", "shuffled": "#c9c9c9", "section_shuffled": "#9b9b9b", "blind": "#6d6d6d",
           "wrong_group": "#d98c3f"}  # fmt: skip
NAMES = {"score": "score", "shuffled": "shuffled volumes", "section_shuffled": "shuffled within the body section",
         "blind": "no volume", "wrong_group": "the other task's experts"}  # fmt: skip
SIDES = {("R", "L"): "R and L: the patient's right and left", ("A", "P"): "A and P: the patient's front and back"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em }
h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: .9em }
td, th { padding: .25em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee }
td:first-child, th:first-child { text-align: left }
th { white-space: normal; vertical-align: bottom }
td:nth-child(n+4), th:nth-child(n+4) { max-width: 7em }
tbody th { text-align: left; padding-top: 1em; background: #f4f6f8 }
.head { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; margin: 1em 0 }
.head dt { color: #666 }
.head dd { margin: 0; overflow-wrap: anywhere }
.verdict { font-size: 1.15em; border-left: 5px solid #9b9b9b; padding: .4em 1em; margin: .5em 0; background: #f4f6f8 }
.above { border-left-color: #3b8f4f }
.not { border-left-color: #b8352c }
.warn { background: #fff4e0; border-left: 4px solid #d98c3f; padding: .5em 1em }
.case { border: 1px solid #ddd; border-left: 5px solid #3b8f4f; padding: .6em 1em; margin: 1em 0 }
.wrong { border-left-color: #b8352c }
.unjudged { border-left-color: #9b9b9b }
.case img { display: block; max-width: 100%; image-rendering: pixelated; background: #000 }
.wide { max-width: 100% }
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
    *,
    facts: Mapping[str, str] = MappingProxyType({}),
    windows: Sequence[str] = (),
    verdicts: Sequence[Verdict] = (),
) -> None:
    """Writes the page.

    `loads` {task of the question: (layers, G, E)} counts the tokens that each expert of each group received; `overlays`
    are volumes and how a question about each was routed; `facts` {name: text} stand in the head; `windows` names the
    window of each channel of the slices; `verdicts` head the page.
    """
    notes = [*outputs.cases(run), *outputs.remarks(metrics, run)]
    parts = [
        "<h1>Evaluation</h1>", _verdicts(verdicts), _facts(metrics, run, facts),
        f'<p class="warn">{html.escape(DISCLAIMER)}</p>',
        *(f'<p class="warn">{html.escape(text)}</p>' for text in notes),
        "<h2>Scores beside chance and their controls</h2>", _scores(metrics, run),
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
    for kind in (kind for kind in KINDS if kind in under_controls()):
        parts += [f"<h2>{title(kind)}: sample cases, failures first</h2>", *_cases(kind, run, source, windows)]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{_STYLE}</style>'
    writing.write(path, page + "<body>" + "\n".join(parts) + "</body></html>\n")


_number = functools.partial(number, missing="–")


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    """An HTML table: texts of its head, and rows that are HTML."""
    return f"<table>{_row(head, 'th')}{''.join(rows)}</table>"


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _verdicts(found: Sequence[Verdict]) -> str:
    """Each verdict beside what it rests on."""
    kinds = {verdict.ABOVE: "above", verdict.NOT_ABOVE: "not"}
    lines = [
        f'<p class="verdict {kinds.get(one.state, "")}"><b>{html.escape(one.score)} {_number(one.value)}</b> '
        f"(chance {_number(one.chance)}, blind {_number(one.blind)}): {html.escape(one.text)}</p>"
        for one in found
    ]
    return "\n".join(lines or ['<p class="verdict">No score of a task is there to be judged.</p>'])


def _facts(metrics: Mapping[str, object], run: Run, facts: Mapping[str, str]) -> str:
    """What was asked of what, when and by which command."""
    asked = {"items": ", ".join(f"{len(run[kind])} {kind}" for kind in KINDS if run.get(kind))}
    rows = facts | {"anatomy": verdict.drawn(metrics)} | asked
    cells = (f"<dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd>" for key, text in rows.items() if text)
    return f'<dl class="head">{"".join(cells)}</dl>'


def _scores(metrics: Mapping[str, object], run: Run) -> str:
    """The scores in groups, each kind of question first, with the items behind them, chance and every control."""
    beside = outputs.beside_scores(metrics, run)
    head = ["score", "items", "value", "95 % interval", "chance", *(NAMES[control] for control in CONTROLS)]
    titles = {kind: title(kind) for kind in KINDS} | {"router": "Task router", "moe": "Load of the experts"}
    groups: dict[str, list[str]] = {}
    for key in scores_of(metrics):
        if (value := metrics[key]) is None:
            continue
        group, _, name = key.partition("/")
        pair = metrics.get(f"{key}_ci95")
        interval = "" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"
        ones, chance = _behind(group, name, run)
        controls = [_number(beside[control].get(key)) for control in CONTROLS]
        shown = [key, str(len(ones)) if ones else "–", _number(value), interval, _number(chance), *controls]
        groups.setdefault(titles.get(group, group), []).append(_row(shown))
    rows = [row for group, own in groups.items() for row in (f'<tr><th colspan="{len(head)}">{group}</th></tr>', *own)]
    return _table(head, rows)


def _behind(kind: str, name: str, run: Run) -> tuple[Sequence[Prediction], float | None]:
    """The items that a score rests on, and what guessing among their choices would score, where that is known."""
    ones, (rule, _, type) = run.get(kind, ()), name.partition("/")
    if type:
        ones = [one for one in ones if one.type == type]
    guessed = kind in COLUMNS and COLUMNS[kind].lettered and ("accuracy" in rule or type)
    return ones, verdict.chance_of(ones) if guessed else None


def title(kind: str) -> str:
    return {"closed": "Closed questions", "open": "Open questions", "report": "Reports"}.get(kind, kind.capitalize())


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
    """A matplotlib figure: the accuracy of each question type, those of the data set's own among them, with its
    interval, its controls, and a line at its own chance. The MOST_TYPES types with most questions; None without one.
    """
    from matplotlib.figure import Figure  # slow to import; no display is needed

    asked = collections.Counter(one.type for one in run.get("closed", ()) if one.type)
    most = {type for type, _ in asked.most_common(MOST_TYPES)}
    types = [type for type in dict.fromkeys((*TYPES, *asked)) if type in most]
    if not types:
        return None
    groups = {"score": [metrics.get(f"closed/by_type/{type}") for type in types]}
    for control in CONTROLS:
        if f"control/{control}_closed" in run:
            scores = kind_scores(under_control(run, control), resamples=0)
            groups[control] = [scores.get(f"closed/by_type/{type}", Score()).value for type in types]
    figure = Figure(figsize=(max(8, 1.1 * len(types)), 3.6), layout="constrained")
    axis, width = figure.subplots(), 1 / (len(groups) + 1)
    for j, (group, values) in enumerate(groups.items()):
        left, heights = np.arange(len(types)) + j * width, [value or 0.0 for value in values]
        axis.bar(left, heights, width, color=COLOURS[group], label=NAMES[group], align="edge")
    label = "chance"
    for i, type in enumerate(types):
        if (pair := metrics.get(f"closed/by_type/{type}_ci95")) is not None:
            axis.vlines(i + width / 2, *pair, color="black")
        if (chance := verdict.chance_of([one for one in run["closed"] if one.type == type])) is not None:
            axis.hlines(chance, i, i + len(groups) * width, color="#b8352c", linestyle="--", label=label)
            label = None  # named once
    names = [f"{type[:24]}\n{_number(groups['score'][i])}, n = {asked[type]}" for i, type in enumerate(types)]
    axis.set_xticks(np.arange(len(types)) + width * len(groups) / 2, names, fontsize=8)
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


def _cases(kind: str, run: Run, source: Source, windows: Sequence[str]) -> list[str]:
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
        found.append(f'<div class="case {_mark(one)}">{_slices(one, source, windows)}{body}</div>')
    return found or ['<p class="note">None.</p>']


def _slices(one: Prediction, source: Source, windows: Sequence[str]) -> str:
    """Pictures of the volume of a case, one for each window that shows what it is about."""
    named = source.findings(one.index)
    if one.choices or one.kind == "open":  # the findings that question and answer speak of, and both themselves
        said = f"{one.question} {one.answer}".lower()
        topics = [said, *(" ".join(triple) for triple in named if triple[0] in said or triple[1] in said)]
    else:
        topics = [" ".join(triple) for triple in named or findings.stated(one.answer)] or [one.answer]
    slices, mask = source.slices(one.index)
    if (slices[..., :1] == slices).all():  # one window, or values that their source windowed: it has no name here
        windows = ()
    sides, parts = source.sides(one.index), []
    for channel in slice_strip.windows_of(topics, windows):
        png, shown = slice_strip.strip(slices[..., channel], mask, sides)
        window = f"{windows[channel].replace('_', ' ')} window, " if windows else ""
        letters = SIDES.get(sides, "the patient's sides are not known")
        parts.append(_picture(f"slices of volume {one.index}", png))
        parts.append(f'<p class="note">Volume {one.index}, {window}{shown} with their numbers; {letters}.</p>')
    return "".join(parts)
