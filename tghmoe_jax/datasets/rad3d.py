"""3D-RAD as it is published: questions of six tasks about the volumes of CT-RATE.

The root holds the question files, `3DRAD/{train,test}/Task*/*.csv` (or without `3DRAD`), and CT-RATE's volumes as
`ct_rate` finds them: its split `valid` is called `test` here, in the names of volumes too. A table with the columns
VolumeName and Path, as the set's own scripts read it, says where other files of the volumes lie. Formats:
docs/data-sets.md.
"""

import dataclasses
import functools
from pathlib import Path

from tghmoe_jax.datasets.ct_rate import PUBLISHED, SPLITS, Index, read_ct_rate
from tghmoe_jax.datasets.index_files import (
    index_file,
    named_files,
    one_line,
    read_csv,
    split_of_name,
    text_fault,
)
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import LETTERS

CHOICES = tuple(f"Choice {letter}" for letter in LETTERS)
COLUMNS = ("Task", "Subtask", "VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice", *CHOICES)
TASKS = {
    "1": "image observation", "2": "anomaly detection", "3": "medical computation", "4": "existence detection",
    "5": "static temporal diagnosis", "6": "longitudinal temporal diagnosis",
}  # fmt: skip
MISSING = "-"  # in place of a choice


def open_rad3d(root: Path, manifest: str = "") -> Dataset:
    """The questions below `root`, or of the files that `manifest` names, separated by commas.

    Named files whose names contain `path` are tables of VolumeName and Path. The split of a file is the folder or name
    that says train or test. The type of an item is its task. UserError for a file of another format; a bad row goes to
    `rejected`.
    """
    named = [index_file(root, name) for name in named_files(manifest)]
    tables = [path for path in named if "path" in path.stem.lower()]
    files = [path for path in named if path not in tables] or sorted(
        path
        for base in ("3DRAD", ".")
        for split in ("train", "test")
        for path in root.glob(f"{base}/{split}/Task*/*.csv")
    )
    if not files:
        raise UserError(
            f"{root} holds no 3DRAD/test/Task1_Image_Observation/*.csv: name the folder of 3D-RAD, or its files with "
            "--config.data.manifest."
        )
    base = "dataset/" if (root / "dataset").is_dir() else ""
    index = Index(root, base, "3d_rad")
    for kind, read in (("no_chest", index.exclude), ("metadata", index.read_metadata)):
        for path in (root / base / name for name in PUBLISHED[kind]):
            if path.is_file():
                read(path)
    places: dict[str, str] = {}
    for table in tables:
        for _, row in read_csv(table, ("VolumeName", "Path"), index.rejected):
            places[row["VolumeName"].strip()] = row["Path"].strip()
    for path in files:
        _questions(index, path, places)
    return index.dataset(functools.partial(read_ct_rate, root, index.stated), hold_out=True)


def _questions(index: Index, path: Path, places: dict[str, str]) -> None:
    split = split_of_name(path.parent.parent.name) or split_of_name(path.stem)
    if split not in ("train", "test"):
        raise UserError(
            f"{path} does not name its split: keep it in its folder, such as test/Task4_Existence_Detection."
        )
    for where, row in read_csv(path, COLUMNS, index.rejected):
        name, type_ = row["VolumeName"].strip(), TASKS.get(row["Task"].strip())
        of = "valid" if name.startswith("test_") else "train"
        key, case, own, fault = index.volume(name.replace("test_", "valid_", 1) if of == "valid" else name)
        if not fault and name in places:
            key = places[name]
            fault = index.path_fault(key)
        if not fault and (own != split or SPLITS[of] != split):
            fault = "its volume is of the other split."
        question, answer = one_line(row["Question"]), one_line(row["Answer"])
        fault = fault or text_fault(question, "question") or text_fault(answer, "answer")
        fault = fault or (None if type_ else "its task is not one of 1 to 6.")
        if fault:
            index.add(where, fault)
            continue
        item = Item(key, split, case, "vqa", type_, question, answer)
        if row["QuestionType"].strip().lower().startswith("open"):
            index.add(where, item)
            continue
        choices = tuple(one for column in CHOICES if (one := one_line(row[column])) != MISSING)
        letter = row["AnswerChoice"].strip().rstrip(".").upper()
        if len(choices) < 2 or not all(choices) or len(set(choices)) < len(choices):
            index.add(where, "its choices are not two or more different texts.")
        elif len(letter) != 1 or letter not in LETTERS[: len(choices)]:
            index.add(where, "its answer choice is not the letter of a choice.")
        elif choices[LETTERS.index(letter)].casefold() != answer.casefold():
            index.add(where, f"its answer is not the text of its choice {letter}.")
        else:
            index.add(where, dataclasses.replace(item, answer=choices[LETTERS.index(letter)], choices=choices))
