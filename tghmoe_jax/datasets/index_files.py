"""Reads index files of data sets (JSON, CSV, plain lines) up to a size, and names faults by line. All sets use it."""

import csv
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tghmoe_jax.datasets.items import Dataset, Item, Rejected
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import TYPES
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.volume import Volume

MAX_JSON = 4 * 2**30  # bytes; CT-RATE's training questions are the largest published file, near 1.5 GiB
MAX_LINE = 2**20  # characters; longer is damage, not text
MAX_TEXT = 2**15  # characters of a question or an answer: ten pages of report
SPLIT_SHARES = (("train", 0.8), ("validation", 0.1), ("test", 0.1))
HELD_OUT = 0.05  # of the training cases, for validation, where a set publishes none
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test", "test5k": "test",
}  # fmt: skip
NUMBERED_TYPES = dict(zip("12345", TYPES, strict=True))  # question types as M3D numbers them
NAMELESS = re.compile(r"\s*(?:Unnamed: \d+)?\s*")  # what pandas calls its row numbers when it reads them back
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


# -------------------------------------------------------------------------------------------------------- finding


def index_file(root: Path, name: str) -> Path:
    """The index file a user names with `data.manifest`: a path as typed, or one below the root."""
    for path in (Path(name), root / name):
        if path.is_file():
            if not os.access(path, os.R_OK):
                raise UserError(f"{path} may not be read: change its permissions.")
            return path
    raise UserError(f"--config.data.manifest={name} is not a file here or under {root}: name the index file.")


def named_files(manifest: str, root: Path | None = None, published: Sequence[Sequence[str]] = ()) -> list[str]:
    """The names that `data.manifest` lists, separated by commas; of none the first of each group of `published` names
    that lies below `root`."""
    names = [name.strip() for name in manifest.split(",") if name.strip()]
    return names or [found for group in published if (found := next((n for n in group if (root / n).is_file()), ""))]


def split_of_name(name: str) -> str | None:
    """The split that a file name contains (`M3D_VQA_test5k.csv` -> test), None where it contains none or several."""
    words = {SPLIT_WORDS[word] for word in re.split(r"[^a-z0-9]+", name.lower()) if word in SPLIT_WORDS}
    return words.pop() if len(words) == 1 else None


def _place(name: str) -> float:
    """A number from 0 to 1 that is the same for a name wherever it is met."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_of_case(case: str) -> str:
    """The split of a case where nothing else states it: 80, 10 and 10 % by a hash of its name, the same everywhere."""
    place = _place(case)
    for split, share in SPLIT_SHARES:
        place -= share
        if place < 0:
            return split
    return SPLIT_SHARES[-1][0]


# -------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """The value of a JSON file of at most `most` bytes. UserError for everything that is no JSON."""
    _bounded(path, most)
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path} is not valid JSON in UTF-8{line}: download or export it again.") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 text, blank lines left out."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(_bounded_lines(file, path), 1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def read_list(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """(`file[number]`, entry) of a JSON list. UserError, with `what` it should list, where it is no list."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path} is not a list of {what}: check that it is the right file.")
    return ((f"{path.name}[{number}]", entry) for number, entry in enumerate(entries))


def read_csv(
    path: Path, columns: Sequence[str], rejected: list[Rejected], delimiter: str = ","
) -> Iterator[tuple[str, dict[str, str]]]:
    """(`file:line`, row) of a CSV that has at least `columns`; a row of another length goes to `rejected`.

    Text is text: an empty field and `NA` stay what they are. A column without a name, such as the row numbers that
    pandas writes, is left out. UserError for a header without the columns and for what is not a CSV in UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(_bounded_lines(file, path), delimiter=delimiter, strict=True)
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path} is an empty file: download or export it again.")
            missing = [column for column in columns if column not in header]
            named = [i for i, column in enumerate(header) if not NAMELESS.fullmatch(column)]
            if missing or len({header[i] for i in named}) != len(named):
                what = f"lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
                what = what if missing else "names a column twice"
                what = other_form(header, delimiter) or what
                raise UserError(f"{path} {what}: its first line must name {', '.join(columns)}.")
            where = f"{path.name}:{reader.line_num + 1}"  # a quoted text may span lines: a row is named by its first
            for fields in reader:
                if len(fields) == len(header):
                    yield where, {header[i]: fields[i] for i in named}
                elif fields:
                    reason = f"the row has {len(fields)} fields where the header names {len(header)}."
                    rejected.append(Rejected(where, reason))
                where = f"{path.name}:{reader.line_num + 1}"
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV (line {reader.line_num}: {error}): export it again.") from None


def other_form(header: Sequence[str], delimiter: str = ",") -> str:
    """What a file is in place of a CSV with this delimiter, by the header that was read from it; else nothing."""
    if header and header[0].lstrip().startswith(("[", "{")):
        return "holds JSON, not a table"
    names = {",": "commas", ";": "semicolons", "\t": "tabs"}
    found = [name for mark, name in names.items() if mark != delimiter and len(header) == 1 and mark in header[0]]
    return f"separates its columns by {found[0]}, not by {names[delimiter]}" if found else ""


def read_text(path: Path, most: int = 2**20) -> str:
    """A small text file. UserError where it is absent, larger than `most` bytes or not UTF-8."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: download the texts of the data set beside its volumes.")
    _bounded(path, most)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: download or export it again.") from None


def _bounded(path: Path, most: int) -> None:
    size = path.stat().st_size
    if size > most:
        raise UserError(f"{path} has {size} bytes, more than {most}: split it or check that it is the right file.")


def _bounded_lines(file: TextIO, path: Path) -> Iterator[str]:
    number = 0
    try:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(f"{path} line {number} is longer than {MAX_LINE} characters: export the file again.")
            yield line
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text (after line {number}): export it again as UTF-8.") from None


# ------------------------------------------------------------------------------------------------------- checking


def one_line(text: str) -> str:
    """A text of a published data set with single spaces, as their own preparation writes it."""
    return " ".join(text.split())


def text_fault(text: Any, what: str, empty: bool = False) -> str | None:
    """Why a value is not usable text, in one sentence that does not quote it; None where it is one."""
    if not isinstance(text, str):
        return f"the {what} is not text."
    if not text.strip() and not empty:
        return f"the {what} is empty."
    if len(text) > MAX_TEXT:
        return f"the {what} has {len(text)} characters, more than {MAX_TEXT}."
    if _CONTROL.search(text) or any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        return f"the {what} holds control characters."
    return None


# ------------------------------------------------------------------------------------------------------ gathering


class Gathered:
    """The items of a data set while its index files are read, and what is left out: where, and why."""

    def __init__(self, name: str, root: Path):
        self.name, self.root = name, root
        self.items: list[Item] = []
        self.rejected: list[Rejected] = []
        self.path_fault = functools.cache(self._path_fault)

    def add(self, where: str, *found: Item | str) -> None:
        """Keeps an item; a text is the reason why an item was rejected."""
        for one in found:
            if isinstance(one, str):
                self.rejected.append(Rejected(where, one))
            else:
                self.items.append(one)

    def dataset(self, read: Callable[[str], Volume], hold_out: bool = False) -> Dataset:
        """The whole data set. UserError where nothing of it is left.

        `hold_out` is for a set that is published without a validation split: one training case in twenty becomes one
        of validation, by a hash of its name, so that sets of the same patients agree.
        """
        if not self.items:
            left = self.rejected
            first = f" (the first of {len(left)}: {left[0].reason.rstrip('.')})" if left else ""
            raise UserError(
                f"{self.root} holds no usable item of the data set {self.name}{first}: check --config.data.root."
            )
        items = self.items
        if hold_out:
            items = [
                dataclasses.replace(item, split="validation")
                if item.split == "train" and _place(f"held out: {item.case}") < HELD_OUT
                else item
                for item in items
            ]
        return Dataset(self.name, self.root, tuple(items), tuple(self.rejected), read)

    def _path_fault(self, path: str) -> str | None:
        """Why a relative path of an index cannot be read; None where it can."""
        try:
            inside(self.root, path)
        except UserError as error:
            return str(error)
        return None
