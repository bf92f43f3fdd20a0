"""The project's own manifest: a user's scans and texts as JSON lines (docs/own-data.md).

One object a line: `volume` (path below the root), `question`, `answer`, and optionally `choices`, `task`, `type`,
`case`, `split`, `indication`; a value of null is left out. It is strict: whatever is wrong is reported by line, and
nothing is guessed or repaired. Problems never quote a value, which may be a patient's. `folder#series=2` is one series
of a DICOM folder or DICOMDIR that holds several, counted as the readers list them.
"""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tghmoe_jax.datasets.index_files import index_file, read_lines, split_of_case, text_fault
from tghmoe_jax.datasets.items import SPLITS, Dataset, Item, Rejected
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import LETTERS
from tghmoe_jax.samples.tasks import TASKS, kind_of, kinds_of_items
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.volume import Volume

REQUIRED = ("volume", "question", "answer")
OPTIONAL = ("choices", "task", "type", "case", "split", "indication")
SERIES = "#series="
MAX_NAME = 200  # characters of a case or a type
REPORT_REQUEST = "Write the report of this CT."  # behind an indication, where the line has no question of its own


@dataclasses.dataclass(frozen=True)
class ManifestReport:
    """What a check found: every problem with its line, and counts of what is usable."""

    path: Path
    items: tuple[Item, ...]
    problems: tuple[Rejected, ...]

    def text(self) -> str:
        """All problems, one a line as `file:line: reason`, then a table of items by split and kind."""
        lines = [f"{problem.where}: {problem.reason}" for problem in self.problems]
        counts = collections.Counter((item.split, item.kind) for item in self.items)
        kinds = kinds_of_items()
        lines += [f"{'split':12}{'volumes':>9}{'cases':>9}" + "".join(f"{kind:>9}" for kind in kinds)]
        for split in SPLITS:
            of = [item for item in self.items if item.split == split]
            numbers = [len({i.volume for i in of}), len({i.case for i in of}), *(counts[split, kind] for kind in kinds)]
            lines.append(f"{split:12}" + "".join(f"{number:9}" for number in numbers))
        many = len(self.problems)
        verdict = f"{many} problem{'s' if many > 1 else ''}: correct the lines above." if many else "no problem found."
        return "\n".join([*lines, f"{self.path}: {len(self.items)} items, {verdict}"])


def open_manifest(root: Path, manifest: str) -> Dataset:
    """The items of a manifest. UserError for the first problem of its lines; volumes are judged when they are read."""
    if not manifest:
        raise UserError("--config.data.name=manifest needs --config.data.manifest: name a file of JSON lines.")
    path = index_file(root, manifest)
    items, problems = _parse(path, root)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"{problems[0].where}: {problems[0].reason.rstrip('.')}{more}; see all with "
            f"python -m tghmoe_jax.prepare --check {path}."
        )
    return Dataset("manifest", root, tuple(items), (), functools.partial(read_own, root))


def check_manifest(path: str | Path, root: str | Path | None = None) -> ManifestReport:
    """Every problem of a manifest, volumes that do not exist among them; `root` is the manifest's folder by default.

    UserError only where the file itself cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--check {path} does not exist: name a manifest of JSON lines.")
    root = Path(root) if root else path.parent
    items, problems = _parse(path, root, exist=True)
    return ManifestReport(path, tuple(items), tuple(problems))


def read_own(root: Path, key: str, assume_hu: bool = False) -> Volume:
    """The volume of a key. UserError names the words of the manifest, not the flag of a command."""
    path, series = path_and_series(key)
    try:
        return read_volume(inside(root, path), int(series) if series else None, assume_hu)
    except UserError as error:
        message = re.sub(r"--series( N\b| \d+)?", lambda found: f"{SERIES}{(found[1] or 'N').strip()}", str(error))
        raise UserError(message) from None


def path_and_series(volume: str) -> tuple[str, str]:
    """`study#series=2` -> (`study`, `2`); the second is empty where no series is named."""
    path, _, series = volume.partition(SERIES)
    return path, series


def _parse(path: Path, root: Path, exist: bool = False) -> tuple[list[Item], list[Rejected]]:
    """Items in the order of the lines, and problems in theirs."""
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[tuple[int, str]] = []
    paths: dict[str, str | None] = {}
    for line, text in read_lines(path):
        if not rows and not problems and text.lstrip().startswith("["):
            problems.append((line, "the file is a JSON list: write one object a line, without [ ] and commas between."))
            break
        row = json_object(text)
        faults = [row] if isinstance(row, str) else line_faults(row)
        volume = None if isinstance(row, str) else row.get("volume")
        if volume is not None and not text_fault(volume, "volume"):
            if volume not in paths:
                paths[volume] = volume_fault(root, volume, exist)
            faults += [paths[volume]] if paths[volume] else []
        problems += [(line, fault) for fault in faults]
        if not faults:
            rows.append((line, row))
    splits, crossed = _splits(rows)
    problems += crossed
    items: list[Item] = []
    asked: dict[tuple, int] = {}
    for line, row in rows:
        item = item_of(row, splits)
        key = (item.volume, item.task, item.question, item.choices)
        if key in asked:
            problems.append((line, f"the same is asked of the same volume in line {asked[key]}."))
            continue
        asked[key] = line
        items.append(item)
    if not items and not problems:
        problems.append((1, "the file has no line."))
    return items, [Rejected(f"{path}:{line}", reason) for line, reason in sorted(problems)]


def json_object(text: str, more: Sequence[str] = ()) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it; known keys (`more` among them) whose value is null left out."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in found}) != len(found):
            raise KeyError
        known = (*REQUIRED, *OPTIONAL, *more)
        return {key: value for key, value in found if value is not None or key not in known}

    try:
        row = json.loads(text, object_pairs_hook=pairs)
    except KeyError:
        return "a key occurs twice."
    except (ValueError, RecursionError):
        return "the line is not valid JSON: every line must be one whole object."
    return row if isinstance(row, dict) else "the line is not a JSON object."


def line_faults(row: dict[str, Any]) -> list[str]:
    """All that is wrong with a line by itself."""
    known = (*REQUIRED, *OPTIONAL)
    faults = [f"the key {key!r:.60} is unknown; known are {', '.join(known)}." for key in row if key not in known]
    faults += [f"the key {key} is missing." for key in REQUIRED if key not in row]
    question, answer, choices = row.get("question", "?"), row.get("answer", "?"), row.get("choices", [])
    task = row.get("task", "vqa" if question else "report")
    known_task = isinstance(task, str) and task in TASKS
    texts = (
        text_fault(row.get("volume", "?"), "volume"),
        text_fault(question, "question", empty=known_task and bool(TASKS[task].request)),
        text_fault(answer, "answer"),
        text_fault(row.get("indication", ""), "indication", empty=True),
    )
    faults += filter(None, texts)
    if not known_task:
        faults.append(f"the task is not one of {', '.join(TASKS)}.")
    for key in ("type", "case"):
        value = row.get(key, "?")
        fault = text_fault(value, key)
        if fault or len(value) > MAX_NAME:
            faults.append(fault or f"the {key} has more than {MAX_NAME} characters.")
    if row.get("split", "train") not in SPLITS:
        faults.append(f"the split is not one of {', '.join(SPLITS)}.")
    if "choices" in row:
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            faults.append(f"the choices are not a list of 2 to {len(LETTERS)} texts.")
        else:
            faults += dict.fromkeys(filter(None, (text_fault(choice, "choice") for choice in choices)))
            if any(choices.count(choice) > 1 for choice in choices):
                faults.append("a choice occurs twice.")
            if answer not in choices and "answer" in row:
                faults.append("the answer is not one of the choices, letter by letter.")
        if known_task and kind_of(task, True) == kind_of(task, False):
            faults.append(f"the task {task} has no choices.")
    return faults


def volume_fault(root: Path, volume: str, exist: bool = False) -> str | None:
    """Why a `volume` cannot be read below the root, in a sentence that does not quote it; None where it can."""
    path, series = path_and_series(volume)
    if path != volume and not re.fullmatch(r"[1-9]\d{0,3}", series):
        return f"what follows {SERIES} is not a number of a series, counted from 1."
    try:
        found = inside(root, path)
    except UserError as error:  # in its own words but for the path, which may name a patient
        return re.sub(r"^the path (['\"]).*\1 ", "its path ", str(error))
    return "the volume does not exist below the root." if exist and not found.exists() else None


def _splits(rows: list[tuple[int, dict[str, Any]]]) -> tuple[dict[str, str], list[tuple[int, str]]]:
    """The split that each case states, and the lines where it states another."""
    first: dict[str, tuple[str, int]] = {}
    problems = []
    for line, row in rows:
        if "split" in row:
            split, where = first.setdefault(_case(row), (row["split"], line))
            if split != row["split"]:
                problems.append((line, f"its case is in the split {split} in line {where}, and in another here."))
    return {case: split for case, (split, _) in first.items()}, problems


def _case(row: dict[str, Any]) -> str:
    return row.get("case") or row["volume"]


def item_of(row: dict[str, Any], splits: dict[str, str]) -> Item:
    question, case = row["question"].strip(), _case(row)
    task = row.get("task", "vqa" if question else "report")
    indication = row.get("indication", "").strip()
    if indication:
        own = REPORT_REQUEST if task == "report" else TASKS[task].request
        question = f"Indication: {indication.rstrip('.')}. {question or own}"
    return Item(
        volume=row["volume"],
        split=splits.get(case) or split_of_case(case),
        case=case,
        task=task,
        type=row.get("type", "question" if task == "vqa" else task),
        question=question,
        answer=row["answer"] if row.get("choices") else row["answer"].strip(),
        choices=tuple(row.get("choices", ())),
    )
