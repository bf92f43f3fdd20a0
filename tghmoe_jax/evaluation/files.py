"""Prediction files of any system, read back: M3D's three CSV forms, with or without the columns this project adds.

    closed: Question Type, Question, Answer, Answer Choice, Pred      open: Question Type, Question, Answer, Pred
    report: Question, Ground Truth, pred

`Volume` (the number of the volume a row is about), `Key` or M3D's `Image Path` (its name; without either a row's own
number counts), `Case` (its patient or study), `Ranked`, `Confidence` (of the answer, 0 to 1), `Task Predicted`,
`Findings True`, `Findings Stated` and `Control <name>` (the answer under a control, or `protocols.NOT_ASKED`) are used
where a file has them. Correctness and word overlap are always computed, never read from the file.
"""

import csv
import dataclasses
import itertools
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tghmoe_jax.datasets import index_files
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation.metrics import Triple
from tghmoe_jax.evaluation.protocols import CONTROLS, NOT_ASKED, Prediction
from tghmoe_jax.samples.questions import LETTERS, TYPES, Kind
from tghmoe_jax.samples.tasks import COLUMNS, KINDS, TASK_OF
from tghmoe_jax.untrusted import from_cell

_CHOICES = re.compile(r"\s*Choices:\s*A\.\s(?P<text>.*)$", re.DOTALL)
NOT_ANSWERED = "Not Answered"  # the column that says why, in one row of a scan that could not be read
MOST_BYTES = 1 << 30  # a larger file is not a table of predictions


def listed(path: str | Path) -> list[Path]:
    """The file, or the `predictions_*.csv` of a folder or of the newest evaluation of a run. UserError without one."""
    path = Path(path)
    files = sorted(path.glob("predictions_*.csv")) if path.is_dir() else [path]
    if not files:
        scored = {int(file.parent.name): file.parent for file in path.glob("eval/*/predictions_*.csv")
                  if file.parent.name.isdecimal()}  # fmt: skip
        files = sorted(scored[max(scored)].glob("predictions_*.csv")) if scored else []
    if not files or not files[0].is_file():
        raise UserError(
            f"{path} is neither a CSV file, a folder with predictions_*.csv nor a run that was evaluated; name one."
        )
    return files


def read_run(path: str | Path) -> dict[str, list[Prediction]]:
    """{kind: predictions} of a file, or of the `predictions_*.csv` in a folder, and those under each control.

    UserError names the file and what to change.
    """
    run: dict[str, list[Prediction]] = {}
    for kind, predictions, rows in itertools.chain.from_iterable(map(read_file, listed(path))):
        if kind in run:
            raise UserError(f"{path} holds two files of {kind} predictions; remove one of them.")
        run[kind] = predictions
        for control in (name for name in CONTROLS if f"Control {name}" in rows[0]):
            answered = [(one, row[f"Control {control}"]) for one, row in zip(predictions, rows, strict=True)]
            run[f"control/{control}_{kind}"] = [
                dataclasses.replace(one, output=text, ranked=None, confidence=None, findings_stated=None)
                for one, text in answered
                if text != NOT_ASKED
            ]
    return run


def read_table(file: str | Path, named: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file, without blank lines; messages call it `named`.

    UserError where it is too large or not a CSV file in UTF-8, or where a row is not as long as the header.
    """
    csv.field_size_limit(min(sys.maxsize, MOST_BYTES))
    try:
        if (size := Path(file).stat().st_size) > MOST_BYTES:
            raise UserError(f"{named} has {size} bytes, more than {MOST_BYTES}; split it.")
        with open(file, encoding="utf-8-sig", newline="") as lines:
            # Strict, because a stray quote would swallow the rows up to the next one.
            header, *rows = [row for row in csv.reader(lines, strict=True) if row] or [[]]
    except FileNotFoundError as error:
        raise UserError(f"{named} does not exist; name a CSV file.") from error
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{named} is not a CSV file in UTF-8 ({error}); write it again.") from error
    header, *rows = [[from_cell(one) for one in row] for row in (header, *rows)]
    if other := index_files.other_form(header):
        raise UserError(f"{named} {other}; save it as a CSV file with commas.")
    for number, row in enumerate(rows, 2):
        if len(row) > len(header):
            raise UserError(f"{named}, row {number} has more columns than the header; quote texts that hold commas.")
        if len(row) < len(header):
            raise UserError(f"{named} ends in the middle of row {number}; write it again.")
    return header, rows


def read_file(file: Path) -> list[tuple[Kind, list[Prediction], list[dict[str, str]]]]:
    """The kinds of a file, each with its predictions in order, and the rows as they are in the file.

    The columns tell the kind; a column `Kind` does where rows are of several, as in the answers of `predict --list`.
    Rows that say why they were not answered, or that hold no true answer, are left out (`left_out`).
    """
    header, rows = read_table(file, str(file))
    columns = set(header)
    fitting = [kind for kind in KINDS if COLUMNS[kind].needed <= columns]
    if not fitting:
        wanted = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind in KINDS if (names := COLUMNS[kind].needed))
        raise UserError(f"{file} lacks the columns of every known kind; give it those of one ({wanted}).")
    if len(columns) < len(header):
        raise UserError(f"{file} has two columns of the same name; remove one of them.")
    numbered = [(i, row) for i, row in enumerate(dict(zip(header, row, strict=True)) for row in rows)]
    numbered = [(i, row) for i, row in numbered if not row.get(NOT_ANSWERED)]
    if not numbered:
        raise UserError(f"{file} holds no predictions; write at least one row.")
    if not any(row.get("Findings True") or row.get("Findings Stated") for _, row in numbered):
        # The data set knows none: it is not a set without findings.
        numbered = [(i, {**row, "Findings True": None}) for i, row in numbered]
    rows = [row for _, row in numbered]
    named: dict[str, int] = {}
    for row in rows:
        if key := _key(row):
            named.setdefault(key, len(named))
    if named and any(not _key(row) for row in rows):
        raise UserError(f"{file} names the volume of some rows only; fill the column Key (or Image Path) in every row.")
    if len({bool(row.get("Volume")) for row in rows}) > 1:
        raise UserError(f"{file} numbers the volume of some rows only; fill the column Volume in every row or none.")
    only = max(fitting, key=lambda kind: len(COLUMNS[kind].needed))  # a closed file would do as an open one
    stated = [row.get("Kind") for row in rows]
    kinds = stated if set(stated) <= set(fitting) else [only] * len(rows)
    known = [bool(row[COLUMNS[kind].truth].strip()) for kind, row in zip(kinds, rows, strict=True)]
    if not any(known):
        raise UserError(f"{file} holds no true answer, so nothing can be scored; fill the column of true answers.")
    return [
        (kind, [_prediction(kind, i, named.get(_key(row), i), row, file) for i, row in own], [row for _, row in own])
        for kind in KINDS
        if (own := [one for one, its, true in zip(numbered, kinds, known, strict=True) if true and its == kind])
    ]


def left_out(path: str | Path) -> tuple[int, int]:
    """How many rows of a file or folder say why they were not answered, and how many others hold no true answer."""
    tables = [read_table(file, str(file)) for file in listed(path)]
    silent = sum(
        bool(row[header.index(NOT_ANSWERED)]) for header, rows in tables if NOT_ANSWERED in header for row in rows
    )
    scored = sum(len(ones) for kind, ones in read_run(path).items() if kind in KINDS)
    return silent, sum(len(rows) for _, rows in tables) - silent - scored


def _key(row: Mapping[str, str]) -> str:
    return (row.get("Key") or row.get("Image Path") or "").strip()


def _prediction(kind: Kind, number: int, place: int, row: Mapping[str, str], file: Path) -> Prediction:
    """Row `number` of the file; `place` counts its volume where the file does not."""
    lettered, question, choices = COLUMNS[kind].lettered, row["Question"], ()
    if lettered:
        question, choices = split_choices(question)
    letter = row.get("Answer Choice", "").strip().rstrip(".") if lettered else ""
    if lettered and letter not in tuple(LETTERS):
        raise UserError(f"{file}, row {number + 2}: Answer Choice is {letter!r}; use one of {', '.join(LETTERS)}.")
    if letter not in LETTERS[: len(choices)]:
        choices = ()  # some were not understood, so the strict rule gives no score
    volume, case = row.get("Volume") or str(place), row.get("Case") or None
    if not volume.isdecimal():  # not quoted: it may be a name
        raise UserError(f"{file}, row {number + 2}: Volume is not a number; put names into the column Key.")
    stated = row.get("Findings True") is not None and "Findings True" in COLUMNS[kind].more
    return Prediction(
        index=int(volume), kind=kind, type=_type(row), question=question, choices=choices,
        answer=row[COLUMNS[kind].truth], letter=letter,
        output=row[COLUMNS[kind].output], ranked=row.get("Ranked") or None,
        task_true=TASK_OF[kind], task_predicted=row.get("Task Predicted") or None,
        findings_true=_triples(row["Findings True"]) if stated else None,
        findings_stated=_triples(row.get("Findings Stated") or "") if stated else None,
        confidence=_share(row.get("Confidence"), file, number),
        case=int(case) if case and case.isdecimal() else case, key=_key(row),
    )  # fmt: skip


def _share(text: str | None, file: Path, number: int) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"{file}, row {number + 2}: Confidence is {text!r}; use a number from 0 to 1, or nothing.")
    return value


def split_choices(prompt: str) -> tuple[str, tuple[str, ...]]:
    """`Which? Choices: A. left B. right` -> the question and its choices; none where they are not understood."""
    found = _CHOICES.search(prompt)
    return (prompt[: found.start()], tuple(_options(found["text"]))) if found else (prompt, ())


def _options(text: str) -> list[str]:
    """`axial B. coronal C. sagittal` -> the options in order; a letter counts only where it is the next one's.

    They may stand on separate lines or have commas between them. Empty where only one is found.
    """
    options = []
    for letter in LETTERS[1:]:
        head, *tail = re.split(rf"\s+{letter}\.\s", text, maxsplit=1)
        options.append(head)
        if not tail:
            break
        (text,) = tail
    else:
        options.append(text)
    if all(option.endswith(",") for option in options[:-1]):
        options = [*(option.removesuffix(",") for option in options[:-1]), options[-1]]
    return options if len(options) > 1 else []


def _type(row: dict[str, str]) -> str:
    """The question type by name; M3D numbers the five from 1."""
    value = (row.get("Question Type") or "").strip().removesuffix(".0")  # a table program may write 1 as 1.0
    return TYPES[int(value) - 1] if value.isdecimal() and 1 <= int(value) <= len(TYPES) else value


def _triples(text: str) -> frozenset[Triple]:
    """The inverse of `outputs`; a finding without a side has two parts."""
    parts = [tuple(part.split(" / ")) for part in text.split("; ") if part]
    return frozenset((*part, "")[:3] for part in parts)
