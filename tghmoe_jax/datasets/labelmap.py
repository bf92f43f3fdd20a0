"""Questions and structured reports from any CT with a segmentation mask and a table of label names.

Layouts: a folder of cases `<case>/ct.nii.gz` with `<case>/segmentations/*.nii.gz` (TotalSegmentator, split as its
`meta.csv` says), or an index (JSON list or CSV) of `volume`, `mask`, `labels` and optionally `case`, `split`, `parts`.
`parts` asks for that many crops and re-slicings of a scan beside the whole, so that few scans can give a score; one
scan is one volume otherwise.

Every question is asked as often with each of its answers within a split, question text by question text. What anatomy
fixes (the liver lies right of the spleen) therefore is not asked: the text alone never gives the answer.

Sides are the patient's. They come from the canonical orientation, which reads them from the file's geometry, and label
names that say `left` and `right` must agree with it. Axis legend: D slices toward Superior, H rows toward Posterior, W
columns toward Left.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tghmoe_jax.datasets.index_files import (
    SPLIT_WORDS,
    Gathered,
    index_file,
    read_csv,
    read_lines,
    read_list,
    split_of_case,
)
from tghmoe_jax.datasets.items import SPLITS, Dataset, Item
from tghmoe_jax.datasets.masks import LabelMap, read_mask
from tghmoe_jax.datasets.parts import PLANES, Part, cut, draw_parts, part_of, split_key
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.volume import Volume, check_canonical_shape

SPLIT_TABLE = "meta.csv"
COLUMNS = ("volume", "mask", "labels")
MAX_PARTS = 1000
READERS = 8  # masks read at a time
MOST_OF_EACH = 50  # items of one question text and one answer within a split
PARTNERS = 4  # other structures that each is compared with
LEAST_ML = 0.5  # a structure with less in the volume is neither shown nor absent: it is not asked about
CLEARLY = 1.2  # factor between volumes that are called larger and smaller
APART_MM = 10.0  # distance of centres that are called above, below, left or right
NAMED_IN_REPORT = 12
_SIDE = re.compile(r"(?:^|_)(left|right)(?=_|$)")
_MIDDLE = re.compile(r"vertebra|spin|sternum|sacrum")


# -------------------------------------------------------------------------------------------------------- opening


@dataclasses.dataclass(frozen=True)
class _Scan:
    """A scan and its mask as the layout or the index names them, all relative to the root."""

    volume: str
    mask: str
    labels: str | None
    case: str
    split: str
    parts: int


def open_labelmap(root: Path, manifest: str = "") -> Dataset:
    """The questions and reports of every scan with a mask below `root`; masks are read, scans only by their headers.

    `manifest` names an index; empty: the TotalSegmentator layout. A scan whose mask cannot be used goes to `rejected`.
    """
    gathered = Gathered("labelmap", root)
    scans = list(_listed(gathered, index_file(root, manifest)) if manifest else _folders(gathered))
    reports: list[Item] = []
    asked: list[Item] = []
    named: set[str] = set()
    # Threads: reading masks is unpacking, for which Python leaves the interpreter lock.
    with concurrent.futures.ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        for scan, found in zip(scans, pool.map(functools.partial(_items, root), scans), strict=True):
            if isinstance(found, UserError):
                gathered.add(scan.volume, str(found))
            else:
                reports += found[0]
                asked += found[1]
                named |= found[2]
    closed = balanced(asked)
    gathered.items = [*reports, *closed, *(dataclasses.replace(item, choices=()) for item in closed)]
    names, masks = tuple(sorted(named)), {scan.volume: (scan.mask, scan.labels) for scan in scans}
    return dataclasses.replace(
        gathered.dataset(functools.partial(read_labelmap, root)),
        structures=tuple(map(spoken, names)), labels=functools.partial(read_labels_of, root, masks, names),
    )  # fmt: skip


def _items(root: Path, scan: _Scan) -> tuple[list[Item], list[Item], set[str]] | UserError:
    """The reports and the closed questions, not yet balanced, of a scan and its parts; and what its mask names."""
    try:
        paths = (inside(root, scan.volume), inside(root, scan.mask), scan.labels and inside(root, scan.labels))
        mask = read_mask(*paths)
        if not mask.array.any():
            raise UserError(f"{scan.mask} is empty in every structure: the scan is not annotated, leave it out.")
        check_canonical_shape(mask.array.shape, str(paths[1]))
        _check_sides(mask, scan.mask)
    except UserError as error:
        return error
    parts = [(scan.volume, Part(tuple((0, n) for n in mask.array.shape)))]
    drawn = draw_parts(mask.array.shape, scan.parts, scan.case)
    parts += [(part.key(scan.volume), part) for part in dict.fromkeys(drawn)]
    reports, asked = [], []
    for key, part in parts:
        shown = _Shown(mask, part)
        report = Item(key, scan.split, scan.case, "report", "report", "", shown.report())
        reports.append(report)
        asked += [
            dataclasses.replace(report, task="vqa", type=type_, question=question, answer=answer, choices=choices)
            for type_, question, answer, choices in shown.questions()
        ]
    return reports, asked, set(mask.names.values())


def read_labelmap(root: Path, key: str) -> Volume:
    """The volume of a key: a scan, or the part that its fragment names."""
    path, fragment = split_key(key)
    volume = read_volume(inside(root, path))
    return part_of(volume, fragment, key) if fragment else volume


def read_labels_of(
    root: Path, masks: Mapping[str, tuple[str, str | None]], names: Sequence[str], key: str
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The labels of a key as of `Dataset.labels`: `names` are the structures, `masks` {scan: its mask and table}."""
    path, fragment = split_key(key)
    mask, table = masks[path]
    read = read_mask(inside(root, path), inside(root, mask), table and inside(root, table))
    places = {name: number for number, name in enumerate(names, 1)}
    turned = np.zeros(max(read.names) + 1, np.uint16)
    for value, name in read.names.items():
        turned[value] = places[name]
    array = turned[read.array]
    unknown = tuple(number - 1 for name, number in places.items() if name not in read.names.values())
    return (cut(array, fragment, key)[0] if fragment else array), unknown


def balanced(items: Sequence[Item]) -> list[Item]:
    """The most items in which, within a split, every answer of a question is equally frequent.

    A question none of whose items has one of its answers is left out; which items stay is drawn by a hash. They come
    in rounds of one item for each answer of each question, so that the beginning of the list is balanced too.
    """
    groups: dict[tuple, dict[str, list[Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        groups[item.split, item.question, item.choices][item.answer].append(item)
    kept = []
    for (split, question, choices), answers in groups.items():
        count = min(MOST_OF_EACH, *(len(answers[choice]) for choice in choices))
        for choice in choices:
            chosen = sorted(answers[choice], key=lambda item: _hash(question, item.volume))[:count]
            kept += [((split, turn, _hash(question), choices), item) for turn, item in enumerate(chosen)]
    return [item for _, item in sorted(kept, key=lambda one: one[0])]


def _folders(gathered: Gathered) -> Iterator[_Scan]:
    root = gathered.root
    found = sorted(path.name for path in root.iterdir() if (path / "segmentations").is_dir())
    cases = [name for name in found if not name.startswith(".")]
    if not cases:
        raise UserError(
            f"{root} holds no <case>/ct.nii.gz with <case>/segmentations: name that folder, or an index of volume, "
            "mask and labels with --config.data.manifest."
        )
    published = _published_splits(gathered)
    for case in cases:
        split = split_of_case(case) if published is None else published.get(case)
        if split:
            yield _Scan(f"{case}/ct.nii.gz", f"{case}/segmentations", None, case, split, 0)
        else:
            gathered.add(case, f"{SPLIT_TABLE} states no split (train, val or test) for it.")


def _published_splits(gathered: Gathered) -> dict[str, str] | None:
    """The splits that TotalSegmentator's meta.csv states; None where it is absent, or is another table."""
    path = gathered.root / SPLIT_TABLE
    if not path.is_file():
        return None
    try:
        delimiter = ";" if ";" in next(read_lines(path), (0, ""))[1] else ","
        rows = list(read_csv(path, ("image_id", "split"), gathered.rejected, delimiter))
    except UserError:
        gathered.add(SPLIT_TABLE, "it is not read, for it names no image_id and split: a hash of the case splits.")
        return None
    return {row["image_id"].strip(): SPLIT_WORDS.get(row["split"].strip().lower(), "") for _, row in rows}


def _listed(gathered: Gathered, path: Path) -> Iterator[_Scan]:
    if path.suffix.lower() == ".csv":
        rows = read_csv(path, COLUMNS, gathered.rejected)
    else:
        rows = read_list(path, "objects with volume, mask and labels")
    splits: dict[str, str] = {}
    listed: set[str] = set()
    for where, row in rows:
        texts = row if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in COLUMNS[:2]) else {}
        parts, case = str(texts.get("parts") or 0), str(texts.get("case") or texts.get("volume"))
        split = str(texts.get("split") or split_of_case(case))
        if not texts:
            gathered.add(where, "it does not name a volume and a mask.")
        elif split not in SPLITS:
            gathered.add(where, f"its split is not one of {', '.join(SPLITS)}.")
        elif splits.setdefault(case, split) != split:
            gathered.add(where, "its case is already in another split.")
        elif not (parts.isascii() and parts.isdigit() and len(parts) < 6 and int(parts) <= MAX_PARTS):
            gathered.add(where, f"its parts are not a whole number up to {MAX_PARTS}.")
        elif texts["volume"] in listed:
            gathered.add(where, "its volume is listed already.")
        else:
            listed.add(texts["volume"])
            yield _Scan(texts["volume"], texts["mask"], texts.get("labels") or None, case, split, int(parts))


def _check_sides(mask: LabelMap, name: str) -> None:
    """Refuses a mask whose names of left and right contradict the geometry of its file.

    Most pairs must be crossed: one alone may be (a kidney that lies on the other side).
    """
    whole = _Shown(mask, Part(tuple((0, n) for n in mask.array.shape)))
    pairs = [pair for pair in whole.pairs() if min(map(whole.ml, pair)) >= LEAST_ML]
    crossed = [(left, right) for left, right in pairs if whole.centre(left)[2] < whole.centre(right)[2]]
    if 2 * len(crossed) > len(pairs):
        left, right = map(spoken, crossed[0])
        raise UserError(
            f"{name} has its {left} on the patient's right of the {right}: its labels or its geometry are mirrored, "
            "so export it again."
        )


# ------------------------------------------------------------------------------------------------------ questions


class _Shown:
    """What a part of a scan shows of each structure: volume, centre and contact with the edge, in patient axes."""

    def __init__(self, mask: LabelMap, part: Part):
        array = mask.array[tuple(slice(low, high) for low, high in part.box)]
        self.part, self.names = part, list(mask.names.values())
        self._spacing, self._shape = mask.spacing_mm, array.shape
        bins = max(mask.names) + 1
        values = {name: value for value, name in mask.names.items()}
        # Voxels of each label in each plane across each axis; everything below is read off these.
        counts = [
            np.stack([np.bincount(plane.ravel(), minlength=bins) for plane in np.moveaxis(array, axis, 0)])
            for axis in range(3)
        ]
        self._profiles = {name: [count[:, values[name]] for count in counts] for name in self.names}

    def ml(self, name: str) -> float:
        """What is shown of a structure, in mL."""
        return float(self._profiles[name][0].sum()) * float(np.prod(self._spacing)) / 1000

    def centre(self, name: str) -> np.ndarray:
        """The centre in mm from the middle of the part, toward Superior, Posterior and Left."""
        profiles = self._profiles[name]
        places = [np.average(np.arange(len(profile)), weights=profile) for profile in profiles]
        return (np.array(places) - (np.array(self._shape) - 1) / 2) * np.array(self._spacing)

    def at_edge(self, name: str) -> bool:
        """Whether the structure reaches an outermost voxel of the part."""
        return any(profile[0] > 0 or profile[-1] > 0 for profile in self._profiles[name])

    def pairs(self) -> list[tuple[str, str]]:
        """(left, right) of every structure that has both."""
        return [
            (name, other)
            for name in self.names
            if (found := _SIDE.search(name)) and found[1] == "left"
            if (other := f"{name[: found.start(1)]}right{name[found.end(1) :]}") in self._profiles
        ]

    def questions(self) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
        """(type, question, answer, choices) of everything that is clear enough to be asked, before balancing."""
        yield "plane", "In which plane are the slices of this scan cut?", self.part.plane, PLANES
        shown = [name for name in self.names if self.ml(name) >= LEAST_ML]
        for name in self.names:
            if self.ml(name) == 0 or name in shown:
                yield "organ", f"Is any of the {spoken(name)} shown?", _yes(name in shown), ("yes", "no")
        for name in shown:
            said = spoken(name)
            yield "edge", f"Does the {said} touch the edge of the scan?", _yes(self.at_edge(name)), ("yes", "no")
            z, _, x = self.centre(name)
            half = f"Is most of the {said} in the upper or in the lower half of the scan?"
            if abs(z) >= APART_MM:
                yield "location", half, "upper" if z > 0 else "lower", ("upper", "lower")
            if not _SIDE.search(name) and not _MIDDLE.search(name) and (middle := self._middle(shown)) is not None:
                if abs(x - middle) >= APART_MM:
                    asked = f"On which side of the patient's spine is most of the {said}?"
                    yield "side", asked, _side(x - middle), ("left", "right")
        for left, right in self.pairs():
            a, b = self.ml(left), self.ml(right)
            if max(a, b) >= LEAST_ML and max(a, b) >= CLEARLY * min(a, b):
                both = spoken(_SIDE.sub("", left))
                yield "side", f"Of which side is more {both} shown?", _side(a - b), ("left", "right")
        for one in shown:
            for other in (name for name in _partners(one, self.names) if name in shown):
                apart = self.centre(one)[0] - self.centre(other)[0]
                if abs(apart) >= APART_MM:
                    asked = f"Is the {spoken(one)} above or below the {spoken(other)}?"
                    yield "location", asked, "above" if apart > 0 else "below", ("above", "below")
                a, b = self.ml(one), self.ml(other)
                if max(a, b) >= CLEARLY * min(a, b):
                    asked = f"Is what is shown of the {spoken(one)} larger or smaller than of the {spoken(other)}?"
                    yield "size", asked, "larger" if a > b else "smaller", ("larger", "smaller")

    def report(self) -> str:
        """The structured report: the plane, and the largest structures with their volume or where they are cut."""
        shown = sorted((name for name in self.names if self.ml(name) >= LEAST_ML), key=self.ml, reverse=True)
        named = [
            f"{spoken(name)} ({'touches the edge' if self.at_edge(name) else f'{self.ml(name):.0f} mL'})"
            for name in shown[:NAMED_IN_REPORT]
        ]
        return f"Plane: {self.part.plane}. Shown: {', '.join(named) or 'none of the labelled structures'}."

    def _middle(self, shown: Sequence[str]) -> float | None:
        """Where the spine or the sternum stands across the patient, in mm; None where neither is shown."""
        places = [self.centre(name)[2] for name in shown if _MIDDLE.search(name)]
        return float(np.mean(places)) if places else None


def spoken(name: str) -> str:
    """A label name in words: `kidney_left` -> left kidney, `rib_right_5` -> right rib 5."""
    found = _SIDE.search(name)
    rest = _SIDE.sub("", name).replace("_", " ").strip()
    return f"{found[1]} {rest}" if found else rest


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _side(toward_left: float) -> str:
    return "left" if toward_left > 0 else "right"


def _partners(name: str, names: Sequence[str]) -> list[str]:
    """The structures that one is compared with: a few, the same in every scan, drawn by a hash."""
    others = [other for other in names if other != name]
    return sorted(others, key=lambda other: _hash(*sorted((name, other))))[:PARTNERS]


def _hash(*texts: str) -> bytes:
    return hashlib.sha256("\n".join(texts).encode()).digest()
