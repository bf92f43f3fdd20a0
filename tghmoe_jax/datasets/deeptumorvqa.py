"""DeepTumorVQA v2 as it is published: questions about abdominal CT, with their choices and openly.

The root is the repository's folder. The benchmark is the test split; the training questions are about other scans,
which lie below `train/ct` or at the root as AbdomenAtlas has them. `val_qa_pool.csv`, which the benchmark was drawn
from, counts as test where it is named. Formats: docs/data-sets.md.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tghmoe_jax.datasets.index_files import (
    Gathered,
    index_file,
    named_files,
    one_line,
    read_csv,
    read_json,
    read_lines,
    text_fault,
)
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.datasets.llava_json import choices_in
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import LETTERS
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.volume import Volume

DEFAULTS = (("benchmark/test_qa.json", "benchmark/test_qa.jsonl"), ("train/train_qa.csv",))
COLUMNS = ("image_id", "question", "answer", "question_subtype")
PLACES = {"train": ("train/ct", "."), "test": ("benchmark/ct", ".")}


def open_deeptumorvqa(root: Path, manifest: str = "") -> Dataset:
    """The questions below `root`, or of the files that `manifest` names, separated by commas.

    The type of an item is the question's subtype; without choices it is asked openly alone. UserError for a file of
    another format; a bad question goes to `rejected`.
    """
    names = named_files(manifest, root, DEFAULTS)
    if not names:
        raise UserError(
            f"{root} holds neither benchmark/test_qa.json nor train/train_qa.csv: name the folder of DeepTumorVQA v2, "
            "or its files with --config.data.manifest."
        )
    gathered = Gathered("deeptumorvqa", root)
    for name in names:
        path = index_file(root, name)
        split = "train" if "train" in path.stem else "test"
        place = next((one for one in PLACES[split] if (root / one).is_dir()), ".")
        for where, row in _rows(path, gathered):
            gathered.add(where, *_items(row, split, "" if place == "." else f"{place}/", gathered))
    return gathered.dataset(functools.partial(_read, root), hold_out=True)


def _read(root: Path, key: str) -> Volume:
    return read_volume(inside(root, key))


def _rows(path: Path, gathered: Gathered) -> Iterator[tuple[str, Any]]:
    """(place in the file, question) of a JSON object with `questions`, of lines of JSON, or of a CSV."""
    if path.suffix == ".csv":
        yield from read_csv(path, COLUMNS, gathered.rejected)
    elif path.suffix == ".jsonl":
        for number, line in read_lines(path):
            yield f"{path.name}:{number}", _object(line)
    else:
        value = read_json(path)
        questions = value.get("questions") if isinstance(value, dict) else None
        if not isinstance(questions, list):
            raise UserError(f"{path} is not an object with a list of questions: it is not test_qa.json.")
        yield from ((f"{path.name}[{number}]", row) for number, row in enumerate(questions))


def _object(line: str) -> Any:
    """The value of a line of JSON, None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _items(row: Any, split: str, place: str, gathered: Gathered) -> Iterator[Item | str]:
    """The question with its choices and without them, or a sentence for what is wrong with it."""
    if not isinstance(row, Mapping):
        yield "it is not an object with a question."
        return
    image, question, answer, type_ = (str(row.get(column) or "").strip() for column in COLUMNS)
    fault = None if re.fullmatch(r"BDMAP_\w{1,16}", image, re.ASCII) else "its image is not one of AbdomenAtlas."
    key = f"{place}{image}/ct.nii.gz"
    for text, what in ((question, "question"), (answer, "answer"), (type_, "subtype")):
        fault = fault or text_fault(text, what)
    if fault := fault or gathered.path_fault(key):
        yield fault
        return
    asked = Item(key, split, image, "vqa", type_, one_line(question), one_line(answer))
    yield asked
    lettered = row.get("mc_question")
    if not lettered:
        return
    letter = str(row.get("correct_option") or "").strip().upper()
    _, choices = choices_in(one_line(lettered), r"(?:^|\s)([A-Z])[:.)]\s") if isinstance(lettered, str) else ("", ())
    if fault := text_fault(lettered, "question with choices"):
        yield fault
    elif not choices:
        yield "its choices are not lettered A:, B: to D:."
    elif len(letter) != 1 or letter not in LETTERS[: len(choices)]:
        yield "its correct option is not the letter of a choice."
    elif len(set(choices)) < len(choices):
        yield "two of its choices have the same text."
    else:
        yield dataclasses.replace(asked, answer=choices[LETTERS.index(letter)], choices=choices)
