"""M3D-Cap (JSON of volumes and report texts) and M3D-VQA (CSV of questions), as they are published.

The root is the folder that holds `M3D_Cap_npy` (or the raw `M3D_Cap`) and `M3D-VQA`; every path in the index files is
relative to it. The split is the publisher's, by volume: one case may stand in several splits, which the leak report
finds. Formats: docs/data-sets.md.
"""

import dataclasses
import functools
import re
from pathlib import Path, PurePosixPath
from typing import Any

from tghmoe_jax.datasets.index_files import (
    NUMBERED_TYPES,
    Gathered,
    index_file,
    named_files,
    one_line,
    read_csv,
    read_json,
    read_text,
    split_of_name,
    text_fault,
)
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import LETTERS
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.volume import Volume

CHOICES = tuple(f"Choice {letter}" for letter in LETTERS)
COLUMNS = ("Image Path", "Text", "Question Type", "Question", *CHOICES, "Answer", "Answer Choice")
YES_NO_COLUMNS = ("Image Path", "Question", "Answer")
ARCHIVES = ("ct_case", "ct_quizze")
CAPTION_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
# What lies at the root as downloaded; the subset test5k and the unreviewed yn_train are read when named.
DEFAULTS = (
    ("M3D_Cap_npy/M3D_Cap.json", "M3D_Cap/M3D_Cap.json", "M3D_Cap.json"),
    *(
        (f"M3D-VQA/M3D_VQA_{part}.csv", f"M3D_VQA/M3D_VQA_{part}.csv", f"M3D_VQA_{part}.csv")
        for part in ("train", "val", "test")
    ),
)


def open_m3d(root: Path, manifest: str = "") -> Dataset:
    """M3D-Cap and M3D-VQA below `root`.

    `manifest` names the index files, separated by commas; empty: those that lie where they are published. A JSON of
    several test sets takes the one to use after a `#` (`M3D_Cap.json#hard_test`); without it the key `test` is used.
    Every question is asked twice, with its choices and openly. UserError for a file of another format; a bad row goes
    to `rejected`.
    """
    names = named_files(manifest, root, DEFAULTS)
    if not names:
        raise UserError(
            f"{root} holds neither M3D_Cap_npy/M3D_Cap.json nor M3D-VQA/M3D_VQA_train.csv: name the folder that holds "
            "them, or the index files with --config.data.manifest."
        )
    gathered = Gathered("m3d", root)
    for name in names:
        file, _, key = name.partition("#")
        path = index_file(root, file)
        if path.suffix == ".json":
            _captions(gathered, path, key or "test")
        elif "_yn_" in path.name:
            _yes_no(gathered, path)
        else:
            _questions(gathered, path)
    return gathered.dataset(functools.partial(read_m3d, root))


def read_m3d(root: Path, key: str) -> Volume:
    """The volume of a key: the prepared .npy, or where it is absent the raw folder of pictures it was made from."""
    path = inside(root, key)
    if not path.exists():
        raw = inside(root, re.sub(r"^M3D_Cap_npy/", "M3D_Cap/", re.sub(r"\.npy$", "", key)))
        path = raw if raw.is_dir() else path
    return read_volume(path)


def report_of(text: str) -> str:
    """The report in a text.txt, by the rule of M3D's own preparation.

    What follows `study_findings:`, else the whole; under five letters, what follows `discussion:`, else the whole.
    """
    for marker in ("study_findings:", "discussion:"):
        head, found, tail = text.partition(marker)
        part = one_line(tail if found else head)
        if len(part.replace(" ", "")) >= 5:
            return part
    return one_line(text)


def m3d_case(image: str) -> str | None:
    """The archive and the six-digit folder of a volume, `ct_case/000006`; None where there is no such folder.

    The archives ct_case and ct_quizze count their patients independently.
    """
    folder = PurePosixPath(image).parent
    if not re.fullmatch(r"\d{6}", folder.name):
        return None
    return f"{folder.parent.name}/{folder.name}" if folder.parent.name in ARCHIVES else folder.name


def _image_fault(gathered: Gathered, image: Any) -> str | None:
    if not isinstance(image, str) or not image:
        return "it names no image."
    no_case = None if m3d_case(image) else "the folder of its image is not a six-digit case."
    return gathered.path_fault(image) or no_case


# ------------------------------------------------------------------------------------------------------- captions


def _captions(gathered: Gathered, path: Path, test: str) -> None:
    root = gathered.root
    splits = read_json(path)
    if not isinstance(splits, dict) or not all(isinstance(rows, list) for rows in splits.values()):
        raise UserError(f"{path} is not an object of splits with lists of image and text: it is not M3D_Cap.json.")
    if test not in splits and test != "test":
        raise UserError(f"{path} has no split {test!r}: choose after the # one of {', '.join(sorted(splits))}.")
    chosen = {key: split for key, split in CAPTION_SPLITS.items() if split != "test" and key in splits}
    chosen |= {test: "test"} if test in splits else {}
    if not chosen:
        raise UserError(f"{path} lacks the splits train, validation and test: it is not M3D_Cap.json.")
    texts: dict[str, str | UserError] = {}
    prefix = None
    for key, split in chosen.items():
        for number, row in enumerate(splits[key]):
            where = f"{path.name}:{key}[{number}]"
            image, text = (row.get("image"), row.get("text")) if isinstance(row, dict) else (None, None)
            if prefix is None and isinstance(image, str):
                prefix = _prefix(root, path, image)
            image, text = ((prefix or "") + v if isinstance(v, str) and v else v for v in (image, text))
            fault = _image_fault(gathered, image) or text_fault(text, "path of its text")
            if not fault:
                if text not in texts:
                    texts[text] = _report(root, text)
                report = texts[text]
                fault = str(report) if isinstance(report, UserError) else text_fault(report, "report")
            gathered.add(where, fault or Item(image, split, m3d_case(image), "report", "report", "", report))


def _prefix(root: Path, path: Path, image: str) -> str:
    """What comes before the paths of an index whose entries are relative to its own folder instead of the root."""
    first = PurePosixPath(image).parts[0]
    if (root / first).exists() or not (path.parent / first).exists():
        return ""
    folder = path.parent.resolve()
    base = root.resolve()
    return f"{folder.relative_to(base).as_posix()}/" if folder.is_relative_to(base) and folder != base else ""


def _report(root: Path, text: str) -> str | UserError:
    try:
        return report_of(read_text(inside(root, text)))
    except UserError as error:
        return error


# ------------------------------------------------------------------------------------------------------ questions


def _questions(gathered: Gathered, path: Path) -> None:
    split = _split(path)
    for where, row in read_csv(path, COLUMNS, gathered.rejected):
        image, question, answer, fault = _asked(gathered, row)
        choices = tuple(one_line(row[column]) for column in CHOICES)
        letter = row["Answer Choice"].strip().rstrip(".").upper()
        type_ = NUMBERED_TYPES.get(row["Question Type"].strip())
        fault = fault or next((f for c in choices if (f := text_fault(c, "choice"))), None)
        if not fault and type_ is None:
            fault = "its question type is not one of 1 to 5."
        if not fault and (len(letter) != 1 or letter not in LETTERS):
            fault = "its answer choice is not one of A to D."
        if not fault:
            fault = _choice_fault(choices, answer, letter)
        if fault:
            gathered.add(where, fault)
            continue
        asked = Item(image, split, m3d_case(image), "vqa", type_, question, answer)
        closed = dataclasses.replace(asked, answer=choices[LETTERS.index(letter)], choices=choices)
        gathered.add(where, closed, asked)


def _asked(gathered: Gathered, row: dict[str, str]) -> tuple[str, str, str, str | None]:
    """Image, question, answer, and what is wrong with them."""
    image, question, answer = row["Image Path"], one_line(row["Question"]), one_line(row["Answer"])
    fault = _image_fault(gathered, image) or text_fault(question, "question") or text_fault(answer, "answer")
    return image, question, answer, fault


def _choice_fault(choices: tuple[str, ...], answer: str, letter: str) -> str | None:
    """The text of the lettered choice is the answer, and no other choice has it; case and a final stop are ignored."""
    chosen = choices[LETTERS.index(letter)]
    if chosen.casefold().rstrip(".") != answer.casefold().rstrip("."):
        return f"its answer is not the text of its choice {letter}."
    if choices.count(chosen) > 1:
        return f"another letter has the text of its choice {letter}, too."
    return None


def _yes_no(gathered: Gathered, path: Path) -> None:
    """The unreviewed yes or no questions: open ones, as M3D trains on them."""
    split = _split(path)
    for where, row in read_csv(path, YES_NO_COLUMNS, gathered.rejected):
        image, question, answer, fault = _asked(gathered, row)
        if not fault and not re.match(r"(yes|no)\b", answer, re.IGNORECASE):
            fault = "its answer is neither yes nor no."
        type_ = NUMBERED_TYPES.get(row.get("Question Type", "").strip(), "yes-no")
        gathered.add(where, fault or Item(image, split, m3d_case(image), "vqa", type_, question, answer))


def _split(path: Path) -> str:
    split = split_of_name(path.stem)
    if split is None:
        raise UserError(f"{path} does not name its split: name it as published, such as M3D_VQA_train.csv.")
    return split
