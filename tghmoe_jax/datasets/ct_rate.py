"""CT-RATE as it is published: reports, questions, labels and metadata beside `<split>_fixed/<patient>/<scan>/` volumes.

The root is the repository's folder or its `dataset` folder. Version 2 (the `_fixed` folders, preferred where both lie
there) stores HU: the slope and intercept of the metadata table are never applied again. The spacing in the table
must agree with the file's header. The published split `valid` is the one all published scores are of, so it is `test`
here. Formats: docs/data-sets.md.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tghmoe_jax.datasets.index_files import (
    Gathered,
    index_file,
    named_files,
    one_line,
    read_csv,
    read_lines,
    read_list,
    text_fault,
)
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.datasets.llava_json import bracketed_choices, chosen, turns, volume_of
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.volume import Volume

SPLITS = {"train": "train", "valid": "test"}
NOT_GIVEN = {"", "not given.", "not given", "nan"}
TAGS = ("long_answer", "short_answer", "multiple_choice", "report_generation")
PUBLISHED = {
    "reports": ("radiology_text_reports/train_reports.csv", "radiology_text_reports/validation_reports.csv"),
    "vqa": ("vqa/train_vqa.json", "vqa/valid_vqa.json"),
    "labels": (
        "multi_abnormality_labels/train_predicted_labels.csv",
        "multi_abnormality_labels/valid_predicted_labels.csv",
    ),
    "metadata": ("metadata/train_metadata.csv", "metadata/validation_metadata.csv"),
    "no_chest": ("metadata/no_chest_train.txt", "metadata/no_chest_valid.txt"),
}
SPACING_TOLERANCE = 0.01  # of a voxel edge; headers round, and a wrong table is off by far more
_NAME = re.compile(r"(train|valid)_(\d{1,9})_([a-z]{1,3})_(\d{1,4})(?:\.nii\.gz)?", re.ASCII)
_TAG = re.compile(r"</?(?:" + "|".join(TAGS) + ")>")


@dataclasses.dataclass(frozen=True)
class Stated:
    """What the metadata table states about a volume; spacing in mm, None where it states nothing."""

    xy_mm: tuple[float, float] | None
    z_mm: float | None
    slope: float | None
    intercept: float | None


def open_ct_rate(root: Path, manifest: str = "") -> Dataset:
    """CT-RATE below `root`.

    `manifest` names the reports, VQA or labels files to use, separated by commas; empty: those that lie where they are
    published. Metadata and the lists of scans without a chest are always read. A report is findings and impression;
    where the reports table has a volume, the VQA file's copy is not asked again. Labels become yes or no questions, as
    many of each answer for every finding and split. UserError for a file of another format; a bad row goes to
    `rejected`.
    """
    base = "dataset/" if (root / "dataset").is_dir() else ""
    index = Index(root, base)
    files = _files(root, base, manifest)
    for path in files["no_chest"]:
        index.exclude(path)
    for path in files["metadata"]:
        index.read_metadata(path)
    for kind, read in (("reports", index.read_reports), ("vqa", index.read_vqa), ("labels", index.read_labels)):
        for path in files[kind]:
            read(path)
    return index.dataset(functools.partial(read_ct_rate, root, index.stated), hold_out=True)


def read_ct_rate(root: Path, stated: Mapping[str, Stated], key: str) -> Volume:
    """The volume of a key, in HU as stored. UserError where its header and the metadata table state two spacings."""
    volume = read_volume(inside(root, key))
    said = stated.get(PurePosixPath(key).name.removesuffix(".nii.gz"))
    if said is None:
        return volume
    read = volume.spacing_mm or (math.nan,) * 3
    table = (said.z_mm, *(said.xy_mm or (None, None)))
    if any(b is not None and not abs(a - b) <= SPACING_TOLERANCE * b for a, b in zip(read, table, strict=True)):
        both = [" x ".join("?" if value is None else f"{value:.4g}" for value in values) for values in (read, table)]
        raise UserError(
            f"{key} states voxels of {both[0]} mm (z, y, x) in its header and {both[1]} mm in the metadata table: "
            "download the volume again from the folder whose name ends in _fixed."
        )
    if said.slope is None or said.intercept is None:
        return volume
    note = f"metadata's slope {said.slope:g} and intercept {said.intercept:g} not applied: the file holds HU"
    return dataclasses.replace(volume, history=(*volume.history, note))


def _files(root: Path, base: str, manifest: str) -> dict[str, list[Path]]:
    """The files of each kind: the published ones, and of reports, questions and labels those that are named instead."""
    found: dict[str, list[Path]] = {}
    for kind, names in PUBLISHED.items():
        candidates = [(root / base / name, root / base / PurePosixPath(name).name) for name in names]
        found[kind] = [path for group in candidates if (path := next((p for p in group if p.is_file()), None))]
    asked = ("reports", "vqa", "labels")
    named = named_files(manifest)
    if named:
        found |= {kind: [] for kind in asked}
        for name in named:
            path = index_file(root, name)
            kind = next((kind for kind in asked if kind in path.name.lower()), None)
            if kind is None:
                raise UserError(f"{path} is not one of CT-RATE's reports, vqa or labels: name it as it is published.")
            found[kind].append(path)
    if not any(found[kind] for kind in asked):
        raise UserError(
            f"{root} holds no reports, questions or labels of CT-RATE: name the folder that holds "
            "radiology_text_reports or vqa, or the files with --config.data.manifest."
        )
    return found


class Index(Gathered):
    """What the tables state, gathered file by file."""

    def __init__(self, root: Path, base: str, name: str = "ct_rate"):
        super().__init__(name, root)
        self.stated: dict[str, Stated] = {}
        self._left_out: dict[str, str] = {}  # volume -> why its items are not used
        self._reported: set[str] = set()
        self._folders = {}
        for split in SPLITS:
            places = (f"{base}{split}_fixed/", f"{split}_fixed/", f"{base}{split}/", f"{split}/")
            self._folders[split] = next((place for place in places if (root / place).is_dir()), "")

    def exclude(self, path: Path) -> None:
        """A list of scans without a chest: one path or name a line."""
        for _, line in read_lines(path):
            name = PurePosixPath(line.strip()).name.removesuffix(".nii.gz")
            self._left_out[name] = f"the scan shows no chest ({path.name})."

    def read_metadata(self, path: Path) -> None:
        """Spacing, slope and intercept; no other column is kept (they name scanners, dates and sites)."""
        for where, row in read_csv(path, ("VolumeName", "XYSpacing", "ZSpacing"), self.rejected):
            found = _NAME.fullmatch(row["VolumeName"].strip())
            if not found:
                self.add(where, "the volume's name is not one of CT-RATE.")
                continue
            name = found[0].removesuffix(".nii.gz")
            try:
                pair = _numbers(row["XYSpacing"])
                z, slope, intercept = (
                    next(iter(_numbers(row.get(column, "")) or ()), None)
                    for column in ("ZSpacing", "RescaleSlope", "RescaleIntercept")
                )
                if pair is not None and len(pair) != 2 or any(value <= 0 for value in (*(pair or ()), z or 1.0)):
                    raise ValueError
                self.stated[name] = Stated(pair, z, slope, intercept)
            except ValueError:
                reason = "the metadata table states a spacing, slope or intercept that is not a number."
                self._left_out.setdefault(name, reason)
                self.add(where, reason)

    def read_reports(self, path: Path) -> None:
        for where, row in read_csv(path, ("VolumeName", "Findings_EN", "Impressions_EN"), self.rejected):
            parts = {"Findings": one_line(row["Findings_EN"]), "Impression": one_line(row["Impressions_EN"])}
            given = {what: text for what, text in parts.items() if text.lower() not in NOT_GIVEN}
            answer = " ".join(f"{what}: {text}" for what, text in given.items())
            key, case, split, fault = self.volume(row["VolumeName"])
            fault = fault or (None if given else "neither findings nor impression are given.")
            fault = fault or text_fault(answer, "report")
            fault = fault or ("the volume has a report already." if key in self._reported else None)
            self.add(where, fault or Item(key, split, case, "report", "report", "", answer))
            if not fault:
                self._reported.add(key)

    def read_vqa(self, path: Path) -> None:
        in_tables = frozenset(self._reported)
        for where, entry in read_list(path, "conversations"):
            self.add(where, *self._conversation(entry, in_tables))

    def _conversation(self, entry: Any, in_tables: frozenset[str]) -> Iterator[Item | str]:
        if not isinstance(entry, dict):
            yield "it is not an object with an image and conversations."
            return
        key, case, split, fault = self.volume(volume_of(entry) or "")
        if fault:
            yield fault
            return
        first = next((tag for tag in TAGS if str(entry.get("id", "")).startswith(tag)), None)
        for turn in turns(entry):
            if isinstance(turn, str):
                yield turn
                continue
            text, answer, kind = turn
            tag = next((tag for tag in TAGS if f"<{tag}>" in text), kind if kind in TAGS else first)
            question = one_line(_TAG.sub(" ", text))
            if tag == "report_generation":
                if key not in in_tables and key not in self._reported:
                    self._reported.add(key)
                    yield Item(key, split, case, "report", "report", "", answer)
                continue
            fault, choices = None if question else "the question is empty.", ()
            if tag == "multiple_choice" and not fault:
                question, choices = bracketed_choices(question)
                answer, fault = chosen(choices, answer) if choices else ("", "its choices are not (a), (b) to (d).")
            yield fault or Item(key, split, case, "vqa", tag or "conversation", question, answer, choices)

    def read_labels(self, path: Path) -> None:
        """Yes or no questions, as many yes as no of every finding, the volumes drawn by a hash of their names."""
        answers: dict[str, dict[str, list[tuple[str, str, str]]]] = {}
        for where, row in read_csv(path, ("VolumeName",), self.rejected):
            key, case, split, fault = self.volume(row.pop("VolumeName"))
            values = {finding: value.strip() for finding, value in row.items() if value.strip()}
            if not fault and not values.keys() or set(values.values()) - {"0", "1", "0.0", "1.0"}:
                fault = fault or "a label is neither 0 nor 1."
            if fault:
                self.add(where, fault)
                continue
            for finding, value in values.items():
                held = answers.setdefault(finding, {"Yes": [], "No": []})
                held["Yes" if value.startswith("1") else "No"].append((key, case, split))
        for finding, held in answers.items():
            count = min(map(len, held.values()))
            for answer, volumes in held.items():
                order = sorted(volumes, key=lambda v: hashlib.sha256(f"{finding}\n{v[0]}".encode()).digest())
                for key, case, split in sorted(order[:count]):
                    asked = f"Is the finding {finding.strip().lower()} present?"
                    self.items.append(Item(key, split, case, "vqa", "abnormality", asked, answer, ("Yes", "No")))

    def volume(self, name: str) -> tuple[str, str, str, str | None]:
        """(key, case, split, why it cannot be used) of a volume's name."""
        found = _NAME.fullmatch(name.strip())
        if not found:
            return "", "", "", "the volume's name is not one of CT-RATE."
        split, patient, scan, _ = found.groups()
        stem, case = found[0].removesuffix(".nii.gz"), f"{split}_{patient}"
        key = f"{self._folders[split]}{case}/{case}_{scan}/{stem}.nii.gz"
        return key, case, SPLITS[split], self._left_out.get(stem) or self.path_fault(key)


def _numbers(text: str) -> tuple[float, ...] | None:
    """The numbers of a cell: one, or a list as text; None for an empty one or NaN. ValueError for anything else."""
    text = text.strip().strip("[]()").strip()
    if text.lower() in ("", "nan", "none"):
        return None
    values = tuple(float(part) for part in text.split(","))
    if not all(map(math.isfinite, values)):
        raise ValueError
    return values
