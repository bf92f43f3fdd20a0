"""Questions and answers of a session to download: JSON, CSV, or one page that needs no network.

Neither patient nor file is named; what the user wrote into a question stands there as it was written.
"""

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from tghmoe_jax import terminal, untrusted
from tghmoe_jax.evaluation import DISCLAIMER, evidence_plot

Answers = Sequence[tuple[dict[str, Any], bytes | None]]  # each with a PNG of what it rests on
_DRAWN = ("parts", "experts")  # only for the page's overlays
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 900px; margin: 2em auto; padding: 0 1em }
section { border: 1px solid #bbb; padding: .5em 1em; margin: 1em 0 }
td, th { text-align: left; padding: .1em 1em .1em 0; vertical-align: top }
.warn { background: #fff4e0; border-left: 4px solid #b86a00; padding: .3em 1em }
"""


def to_json(answers: Answers) -> str:
    rows = [{key: value for key, value in row.items() if key not in _DRAWN} for row, _ in answers]
    return json.dumps({"disclaimer": DISCLAIMER, "answers": rows}, indent=1, allow_nan=False) + "\n"


def to_csv(answers: Answers) -> str:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow([*_COLUMNS, "disclaimer"])
    for row, _ in answers:
        table.writerow([untrusted.cell(_shown(value(row))) for value in _COLUMNS.values()] + [DISCLAIMER])
    return out.getvalue()


def to_html(answers: Answers) -> str:
    parts = [f'<p class="warn">{html.escape(DISCLAIMER)}</p>', *(_section(*one) for one in answers)]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Answers</title><style>{_STYLE}</style>'
    return f"{head}<body><h1>Questions and answers about one or more scans</h1>{''.join(parts)}</body></html>\n"


def _section(row: dict[str, Any], picture: bytes | None) -> str:
    cells = {name: _shown(str(value(row))) for name, value in _COLUMNS.items() if name not in ("number", "question")}
    lines = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in cells.items() if text)
    asked = html.escape(_shown(row["question"]) or "A report")
    shown = ""
    if picture:
        data = base64.b64encode(picture).decode()
        alt = "axial slice with a red box around the region that the answer rests on most"
        shown = f'<p><img alt="{alt}" src="data:image/png;base64,{data}"></p><p>{evidence_plot.CAPTION}</p>'
    return f"<section><h2>{row['number']}. {asked}</h2><table>{lines}</table>{shown}</section>"


def _shown(value: Any) -> Any:
    """A text without what moves a cursor or turns the direction of letters, wherever the file is shown."""
    return terminal.shown(value) if isinstance(value, str) else value


def _shares(values: dict[str, float] | None) -> str:
    return "; ".join(f"{name} {value:.4f}" for name, value in (values or {}).items())


def _evidence(row: dict[str, Any]) -> str:
    if not (found := row.get("evidence")):
        return ""
    part = found["region"]
    spans = (f"{name} {part[name][0]} to {part[name][1]}" for name in ("slices", "rows", "columns"))
    centre = part["centre_mm"]
    return ", ".join(spans) + (f"; centre {centre} mm (LPS)" if centre else "") + f"; fall {part['fall']} nats"


_COLUMNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "number": lambda row: row["number"],
    "question": lambda row: row["question"] or ("a report" if row["report"] else ""),
    "choices": lambda row: "|".join(row["choices"]),
    "answer": lambda row: row["refusal"] or row["text"],
    "answered by": lambda row: row["task"],
    "router": lambda row: _shares(row["task_probabilities"]),
    "option likelihoods": lambda row: _shares(row.get("option_likelihoods")),
    "confidence": lambda row: row["sure"],
    "without the scan": lambda row: row["blind_text"],
    "rests on": _evidence,
    "warnings": lambda row: " | ".join(row["warnings"]),
    "checkpoint": lambda row: f"{row['checkpoint']['name']} {row['checkpoint']['digest']}",
    "seconds": lambda row: row["seconds"],
}
FORMS = {
    "json": (to_json, "application/json"), "csv": (to_csv, "text/csv; charset=utf-8"),
    "html": (to_html, "text/html; charset=utf-8"),
}  # fmt: skip
