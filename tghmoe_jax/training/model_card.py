"""The model card of an exported run, made from what the run recorded about itself."""

from collections.abc import Mapping
from typing import Any

from tghmoe_jax.evaluation import DISCLAIMER
from tghmoe_jax.evaluation.protocols import CONTROLS
from tghmoe_jax.evaluation.text_table import number
from tghmoe_jax.samples.tasks import TASKS
from tghmoe_jax.training import domain
from tghmoe_jax.untrusted import fault, markdown

# Licences that this project can vouch for; of anything else it knows none.
_LICENCES = {
    "embedded": "Apache-2.0",
    "phantom": "Apache-2.0 (drawn, no patient data)",
    "patients": "Apache-2.0 (drawn, no patient data)",
    "scenes": "Apache-2.0 (drawn)",
}
_SCORES = (
    "closed/accuracy", "closed/ranked_accuracy", "report/finding_f1", "report/bleu1", "open/bleu1",
    "router/task_accuracy_unseen_wording",
)  # fmt: skip


def card(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Markdown for the README.md beside an exported run's weights, from its manifest and config.

    Base and data with their licences, intended use, domain, digest, input ranges, and the scores beside controls.
    """
    base = manifest["base"]["base"] or "none (random initialisation)"
    data, commit = config["data"]["name"], (manifest.get("git") or {}).get("commit") or "unknown"
    lines = [
        f"# {markdown(manifest.get('name') or 'model')}", "",
        "A 3D CT multimodal model with a text-guided hierarchical mixture of experts (arXiv 2604.10233), trained by "
        "tghmoe_jax.", "",
        f"- **Not for clinical use.** {DISCLAIMER}",
        "- Intended use: research on methods. It answers questions and writes reports about CT volumes of its domain.",
        f"- Domain: {markdown(domain.of(manifest, config, manifest['step']))}",
        f"- Base model: {markdown(base)}, licence {_LICENCES.get(base, 'unknown')}",
        f"- Training data: {markdown(data)}, licence {_LICENCES.get(data, 'unknown')}",
        f"- Leaks between training and test data: {_leaks(config['data'])}",
        f"- Parameters: digest {manifest['digest']}, {manifest['dtype']}, step {manifest['step']}, "
        f"code {markdown(commit[:12])}",
        f"- Input seen in training: {_ranges(manifest.get('input_ranges') or {})}", "",
        "To use it, run `pip install .` in a clone of tghmoe_jax once. Then `tghmoe_jax.load(FOLDER)` loads it, and "
        "`python -m tghmoe_jax.predict --checkpoint FOLDER --help` says how to ask it.",
    ]  # fmt: skip
    for name, metrics in manifest.get("scores", {}).items():
        if name.endswith("metrics.json"):
            what = name.removesuffix("metrics.json").strip("/").replace("_", " ")
            lines += ["", *_table(markdown(what), metrics)]
    return "\n".join(lines) + "\n"


def _leaks(data: Mapping[str, Any]) -> str:
    """What a run knows of items that its splits share."""
    if data["name"] in _LICENCES:
        return "none, by seed"
    dropped = data.get("drop_leaks", "none")
    if dropped == "none":
        return "not known to the run; leaks.csv of the prepared set lists them"
    return f"the items of the {markdown(str(dropped))} split that another split shares were left out"


def _ranges(ranges: Mapping[str, Any]) -> str:
    span = lambda pair: f"{pair[0]:g} to {pair[1]:g}" if pair[0] != pair[1] else f"{pair[0]:g}"  # noqa: E731
    parts = []
    if "spacing_mm" in ranges:
        parts.append("slices " + span(ranges["spacing_mm"][0]) + " mm apart")
    for key, text in (("slices", "{} slices"), ("field_of_view_mm", "field of view {} mm"), ("hu", "{} HU")):
        if key in ranges:
            parts.append(text.format(span(ranges[key])))
    return ", ".join(parts) or "not recorded"


def _table(what: str, metrics: Mapping[str, Any]) -> list[str]:
    """Scores beside the same scores under each control."""
    repeated = {score: name for task in TASKS.values() for score, name in task.scores.items()}
    lines = [f"| {what or 'own test set'} | score | 95% interval | {' | '.join(CONTROLS)} |", "|---" * 7 + "|"]
    score = lambda key: number(metrics.get(key) if not fault(metrics.get(key), float) else None)  # noqa: E731
    for key in _SCORES:
        if fault(metrics.get(key), float):  # none, or no number
            continue
        low_high = metrics.get(f"{key}_ci95")
        interval = "-" if fault(low_high, [float, float]) else f"{low_high[0]:.3f} to {low_high[1]:.3f}"
        beside = [score(f"control/{name}_{repeated.get(key)}") for name in CONTROLS]
        lines.append(f"| {key} | {score(key)} | {interval} | {' | '.join(beside)} |")
    return lines
