"""Lists of scans to be asked about: a CSV file, JSON lines or a folder (docs/asking.md).

A row names a `volume` (path below the root, as in a manifest) and may give its `id`, a `question` of its own with
`choices` and the true `answer`, and its `case`, `task` and `type`. Rows of one volume are one scan. Like a manifest it
is strict: a wrong row is refused by its line before anything is read, and its text is not quoted.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tghmoe_jax.datasets import manifest
from tghmoe_jax.datasets.index_files import read_csv, read_lines, text_fault
from tghmoe_jax.datasets.items import Rejected
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import Question
from tghmoe_jax.samples.tasks import TASKS, kind_of
from tghmoe_jax.scans.finding import find_scans
from tghmoe_jax.scans.paths import as_stored
from tghmoe_jax.scans.scan import Scan, scan_of

KEYS = (*manifest.REQUIRED, *manifest.OPTIONAL)


@dataclasses.dataclass(frozen=True)
class Listed:
    """One scan of a list: its path below the root, perhaps with a series; the name it has in the answers; the number of
    its case, None where none is named; the questions of its own."""

    volume: str
    id: str
    case: int | None = None
    questions: tuple[Question, ...] = ()


def read_list(path: Path, root: Path | None = None) -> tuple[Path, list[Listed]]:
    """The root of the paths, by default the list's folder, and the scans in the order of the list.

    UserError names the first line that is wrong.
    """
    if path.is_dir():
        if root:
            raise UserError(f"--root belongs to a file; leave it out with the folder --list {path}.")
        return path, [Listed(volume, volume) for volume in find_scans(path)]
    if not path.is_file() or path.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"--list {path} is no folder, .csv or .jsonl file; name one of these.")
    root = root or path.parent
    fault = functools.cache(functools.partial(manifest.volume_fault, root))
    rows: dict[str, list[dict[str, Any]]] = {}
    cases: dict[str, int] = {}
    for where, row in (_csv_rows if path.suffix.lower() == ".csv" else _json_rows)(path):
        wrong = [row] if isinstance(row, str) else _faults(row)
        wrong = wrong or [*filter(None, [fault(row["volume"])])] or _against(rows.setdefault(row["volume"], []), row)
        if wrong:
            raise UserError(f"{where}: {wrong[0]}")
        rows[row["volume"]].append(row)
        cases.setdefault(row.get("case", ""), len(cases))
    scans = [
        Listed(
            volume, own[0].get("id", volume), cases[case] if (case := own[0].get("case", "")) else None,
            tuple(_question(row) for row in own if _asks(row)),
        )
        for volume, own in rows.items()
    ]  # fmt: skip
    if len({scan.id for scan in scans}) < len(scans):
        raise UserError(f"{path} gives two volumes the same id; give each its own.")
    if not scans:
        raise UserError(f"{path} lists no scan; give it a row for each.")
    return root, scans


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Rows without empty fields; columns of other names are left out, as a table of scans has many."""
    cut: list[Rejected] = []
    for where, row in read_csv(path, ("volume",), cut):
        if cut:
            break
        known = {key: row[key] for key in (*KEYS, "id") if row.get(key, "").strip()}
        if "choices" in known:
            known["choices"] = [choice.strip() for choice in known["choices"].split("|")]
        yield where, known
    yield from ((one.where, one.reason) for one in cut)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for line, text in read_lines(path):
        yield f"{path.name}:{line}", manifest.json_object(text, ("id",))


def _faults(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row by itself, by the manifest's rules: an answer may be missing, and a question too."""
    row = dict(row)
    name = row.pop("id", "?")
    if not _asks(row) and (extra := row.keys() & {"answer", "choices", "indication", "type"}):
        return [f"the {min(extra)} has no question: give it a question, or leave it out."]
    if "answer" not in row:
        choices = row.get("choices")
        row["answer"] = choices[0] if isinstance(choices, list) and choices else "?"
    faults = manifest.line_faults({"question": "" if row.get("task") == "report" else "?"} | row)
    return [*faults, *filter(None, [text_fault(name, "id")])]


def _against(before: list[dict[str, Any]], row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row beside the rows of its volume so far."""
    if any(row.get(key) != one.get(key) for one in before for key in ("id", "case")):
        return ["another row gives its volume another id or case."]
    if any(not _asks(one) for one in before) or (before and not _asks(row)):
        return ["its volume has a row without a question; give each row one, or the volume one row."]
    if any(_question(row) == _question(one) for one in before):
        return ["the same is asked of the same volume in another row."]
    return []


def _asks(row: Mapping[str, Any]) -> bool:
    """Whether a row has a request of its own; an empty question is one for a report, as in a manifest."""
    return "question" in row or row.get("task") == "report"


def _question(row: Mapping[str, Any]) -> Question:
    item = manifest.item_of({"question": "", "answer": ""} | dict(row), {})
    kind = kind_of(item.task, bool(item.choices))
    asked = item.question or TASKS[item.task].request
    return Question(item.task, kind, item.type, asked, item.choices, item.answer)


def digest_rows(scans: list[Listed]) -> Iterator[bytes]:
    """Every scan of a list as bytes, for a hash."""
    for scan in scans:
        yield json.dumps(dataclasses.asdict(scan)).encode() + b"\n"


def read_listed(
    root: Path, data: Mapping[str, Any], ranges: Mapping[str, Any] | None, assume_hu: bool, scan: Listed
) -> Scan | str:
    """A scan of a list as a config's `data` section states, or in one sentence why it cannot be read.

    Neither it nor a warning names its path where the list gives it an id: a path may hold a patient's name.
    """
    try:
        found = scan_of(manifest.read_own(root, scan.volume, assume_hu), data, ranges)
    except UserError as error:
        return without_path(str(error), root, scan)
    except MemoryError:
        return "memory ran out while it was read."
    except Exception as error:  # a reader's own fault costs one scan; its text may name a patient
        return f"it cannot be read ({type(error).__name__})."
    return dataclasses.replace(found, warnings=tuple(without_path(text, root, scan) for text in found.warnings))


def without_path(text: str, root: Path, scan: Listed) -> str:
    """A message about a scan with its id in place of its path."""
    path, _ = manifest.path_and_series(scan.volume)
    return text.replace(str(as_stored(root, Path(path).parts)), scan.id)
