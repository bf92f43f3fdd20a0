"""Files of the VLM3D challenge, read and written: generated reports, and the probabilities of labels.

    {"name", "type": "Report generation", "version", "generated_reports": [{"input_image_name", "report"}]}
    {"name", "type": "Abnormality Classification", "version",
     "predictions": [{"input_image_name", "probabilities": {label: 0..1}}]}

Either may lie inside `[{"outputs": [{"value": ...}]}]`, as the challenge's platform wraps it; it is written bare. Names
are those of volumes without the suffix of a file. Source: forithmus/VLM3D-Dockers.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tghmoe_jax.datasets.index_files import MAX_TEXT, read_json, text_fault
from tghmoe_jax.datasets.llava_json import case_of
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation.protocols import Prediction

MOST_BYTES = 1 << 28
VERSION = {"major": 1, "minor": 0}
_SUFFIX = re.compile(r"\.(?:nii\.gz|nii|mha|npy|npz)$")


def without_suffix(name: str) -> str:
    """The name of a volume without the suffix of its file."""
    return _SUFFIX.sub("", name)


def _entries(path: Path, listed: str, key: str) -> dict[str, Any]:
    """{name: entry[key]} of the list `listed`. UserError where the file is not one of these."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a JSON file of the VLM3D challenge.")
    value = read_json(path, MOST_BYTES)
    try:
        if isinstance(value, list):
            value = value[0]["outputs"][0]["value"]
        entries = value[listed]
        found = {without_suffix(one["input_image_name"]): one[key] for one in entries}
        if not found or len(found) < len(entries):
            raise ValueError
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        raise UserError(
            f"{path} is not a file of the VLM3D challenge with {listed}, each with its own input_image_name and {key}; "
            "write it again."
        ) from None
    return found


def read_reports(path: Path) -> dict[str, str]:
    """{name: report}; a report may be empty. UserError for a file of another kind."""
    found = _entries(path, "generated_reports", "report")
    for name, report in found.items():
        if fault := text_fault(report, "report", empty=True):
            raise UserError(f"{path}, {name}: {fault.rstrip('.')} (of at most {MAX_TEXT} characters); write it again.")
    return found


def read_run(path: Path, truth: Path | None) -> dict[str, list[Prediction]]:
    """{"report": predictions} of a file of reports against one of true reports, in the order of the latter.

    A true report without a prediction counts as an empty one. UserError without `truth`, and for names that it lacks.
    """
    if truth is None:
        raise UserError(f"{path} holds no true reports; name their file of the same form with --truth.")
    given, true = read_reports(path), read_reports(truth)
    if apart := sorted(given.keys() - true.keys()):
        raise UserError(f"{path} names volumes that {truth} lacks ({', '.join(apart[:5])}); score the same ones.")
    asked = {"kind": "report", "type": "report", "question": "", "choices": (), "letter": "", "task_true": "report"}
    return {
        "report": [
            Prediction(index=i, answer=report, output=given.get(name, ""), case=case_of(name), key=name, **asked)
            for i, (name, report) in enumerate(true.items())
        ]
    }


def reports_file(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The content of a file of generated reports. UserError where a volume has no name, or two reports."""
    names = [without_suffix(PurePosixPath(one.key).name) for one in predictions]
    if not all(names) or len(set(names)) < len(names):
        raise UserError("--vlm3d needs one report a volume, and the name of each in the column Key (or Image Path).")
    reports = [{"input_image_name": name, "report": one.output} for name, one in zip(names, predictions, strict=True)]
    named = {"name": "Generated reports", "type": "Report generation", "version": VERSION}
    return named | {"generated_reports": reports}


def read_probabilities(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of scores, as text. UserError where entries have other labels than the first."""
    found = _entries(path, "predictions", "probabilities")
    labels = next(iter(found.values()))
    if not isinstance(labels, dict) or any(
        not isinstance(one, dict) or one.keys() != labels.keys() for one in found.values()
    ):
        raise UserError(f"{path}: its entries do not give the same labels; write it again.")
    return ["input_image_name", *labels], [[name, *(str(one[key]) for key in labels)] for name, one in found.items()]


def probabilities_file(cases: Sequence[str], labels: Sequence[str], values) -> dict[str, Any]:
    """The content of a file of probabilities (N, L)."""
    named = {"name": "Generated probabilities", "type": "Abnormality Classification", "version": VERSION}
    rows = [dict(zip(labels, map(float, row), strict=True)) for row in values]
    return named | {
        "predictions": [{"input_image_name": case, "probabilities": row} for case, row in zip(cases, rows, strict=True)]
    }
