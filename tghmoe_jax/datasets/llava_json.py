"""LLaVA-style JSON: a list of conversations about volumes, as Med-2E3, MedM-VL and CT-CHAT write them.

An entry has `conversations` (turns of `human` and `gpt`) and one volume in `vision3d`, `image3d` or `image`; an answers
file has the human turn alone and `answer`, `answer_choice`, `question_type` beside it. Formats: docs/data-sets.md.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tghmoe_jax.datasets.index_files import (
    NUMBERED_TYPES,
    Gathered,
    index_file,
    named_files,
    one_line,
    read_list,
    split_of_case,
    split_of_name,
    text_fault,
)
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.datasets.m3d import m3d_case
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import LETTERS
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.volume import Volume

VOLUME_KEYS = ("vision3d", "image3d", "image")
PICTURE_KEYS = ("vision2d", "image2d")
REPORT_WORDS = {"cap", "caption", "captions", "report", "reports", "report_generation"}
_TAG = re.compile(r"<(?:image|image3d|video|im_patch)>")
_CT_RATE = re.compile(r"((?:train|valid)_\d+)_[a-z]+_\d+")


def open_llava(root: Path, manifest: str = "") -> Dataset:
    """The entries of the JSON files that `manifest` names, separated by commas; volumes lie below `root`.

    The split is the one in a file's name (`..._train.json`), else a hash of the case. Every turn is an item of its own.
    A file whose name contains `cap`, `caption` or `report` holds report requests, asked in the project's own wordings.
    """
    names = named_files(manifest)
    if not names:
        raise UserError("--config.data.name=llava needs --config.data.manifest: name its JSON files.")
    gathered = Gathered("llava", root)
    for name in names:
        path = index_file(root, name)
        report = bool(REPORT_WORDS & set(re.split(r"[^a-z]+", path.stem.lower())))
        for where, entry in read_list(path, "conversations"):
            gathered.add(where, *_items(entry, split_of_name(path.stem), report, gathered))
    return gathered.dataset(functools.partial(_read, root))


def _read(root: Path, key: str) -> Volume:
    return read_volume(inside(root, key))


def _items(entry: Any, split: str | None, report: bool, gathered: Gathered) -> Iterator[Item | str]:
    """The items of an entry, or a sentence for what is wrong with it or with one of its turns."""
    if not isinstance(entry, dict):
        yield "it is not an object with conversations and a volume."
        return
    volume = volume_of(entry)
    fault = gathered.path_fault(volume) if volume else "it does not name exactly one volume, and no pictures."
    if fault:
        yield fault
        return
    case = str(entry.get("case") or case_of(volume))
    for turn in turns(entry):
        if isinstance(turn, str):
            yield turn
            continue
        question, answer, kind = turn
        kind = str(entry.get("question_type") or kind).strip().lower()
        if report or kind in REPORT_WORDS:
            yield Item(volume, split or split_of_case(case), case, "report", "report", "", answer)
            continue
        type_ = NUMBERED_TYPES.get(kind, kind or "question")
        asked, choices = lettered_choices(question)
        fault = None
        if choices:
            answer, fault = chosen(choices, answer, entry.get("answer_choice"))
        elif "Choices:" in question:
            fault = "its choices are not lettered A., B. to D."
        if fault:
            yield fault
        else:
            yield Item(volume, split or split_of_case(case), case, "vqa", type_, asked, answer, choices)


def volume_of(entry: Mapping[str, Any]) -> str | None:
    """The one volume an entry names; None where it names none, several, or flat pictures too."""
    named = [entry[key] for key in VOLUME_KEYS if entry.get(key)]
    if len(named) != 1 or any(entry.get(key) for key in PICTURE_KEYS):
        return None
    value = named[0][0] if isinstance(named[0], list) and len(named[0]) == 1 else named[0]
    return value if isinstance(value, str) else None


def case_of(volume: str) -> str:
    """The case in a path of M3D (six-digit folder) or CT-RATE (patient), else the path without its suffix."""
    if found := m3d_case(volume):
        return found
    found = _CT_RATE.match(PurePosixPath(volume).name)
    return found[1] if found else re.sub(r"\.(nii|nii\.gz|npy|npz|dcm)$", "", volume)


def turns(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, str] | str]:
    """(question, answer, type) of each pair of turns, image tags removed; a sentence for a pair that is not one."""
    spoken = entry.get("conversations")
    if not isinstance(spoken, list) or not spoken or not all(isinstance(turn, dict) for turn in spoken):
        yield "it has no conversations."
        return
    if len(spoken) == 1 and "answer" in entry:
        spoken = [*spoken, {"from": "gpt", "value": entry["answer"]}]
    if [turn.get("from") for turn in spoken] != ["human", "gpt"] * (len(spoken) // 2):
        yield "its turns do not alternate between human and gpt."
        return
    for asked, said in zip(spoken[::2], spoken[1::2], strict=True):
        fault = text_fault(asked.get("value"), "question") or text_fault(said.get("value"), "answer")
        question = "" if fault else one_line(_TAG.sub(" ", asked["value"]))
        if fault or not question:
            yield fault or "the question is empty."
        else:
            yield question, one_line(said["value"]), str(asked.get("type") or "")


def lettered_choices(question: str) -> tuple[str, tuple[str, ...]]:
    """The question without its choices, and its choices in M3D's form `Choices: A. one B. two`, if it has any."""
    head, found, listed = question.partition("Choices:")
    parts = re.split(r"(?:^|\s)([A-D])\.\s", f" {listed.strip()} ") if found else []
    return _consecutive(question, head, parts, LETTERS)


def bracketed_choices(question: str) -> tuple[str, tuple[str, ...]]:
    """The same of CT-RATE's form `(a) one (b) two`."""
    return choices_in(question, r"\(([a-z])\)", LETTERS.lower())


def choices_in(question: str, pattern: str, letters: str = LETTERS) -> tuple[str, tuple[str, ...]]:
    """The same of choices before each of which `pattern` finds its letter, in group 1."""
    head, *parts = re.split(pattern, question)
    return _consecutive(question, head, ["", *parts], letters)


def _consecutive(question: str, head: str, parts: Sequence[str], letters: str) -> tuple[str, tuple[str, ...]]:
    choices = tuple(part.strip().strip(",;").strip() for part in parts[2::2])
    if len(choices) < 2 or "".join(parts[1::2]) != letters[: len(choices)] or not all(choices):
        return question, ()
    return head.removesuffix("Choices:").strip(), choices


def chosen(choices: Sequence[str], answer: str, letter: Any = None) -> tuple[str, str | None]:
    """The choice that an answer (`B`, `B. text`, `(b) text` or the text) means, and why it means none."""
    named = re.match(r"\(?([A-Da-d])(?:[.)]\s*|$)", answer)
    text = answer[named.end() :] if named else answer
    if named is None and letter is not None:
        named = re.match(r"\(?([A-Da-d])[.)]?$", str(letter).strip())
    plain = [choice.casefold().rstrip(".") for choice in choices]
    if named:
        index = "abcd".index(named[1].lower())
        if index >= len(choices) or text.strip() and text.casefold().rstrip(". ") != plain[index]:
            return answer, "its answer is not the choice that it letters."
    else:
        index = plain.index(text.casefold().rstrip(". ")) if text.casefold().rstrip(". ") in plain else -1
        if index < 0:
            return answer, "its answer is not one of its choices."
    if plain.count(plain[index]) > 1:
        return answer, "two choices have the text of its answer."
    return choices[index], None
