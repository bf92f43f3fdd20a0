"""A data set of files as a source of samples: prepared shards, or the raw files read on the fly, with their own items.

Both ways give the same slices: a volume goes through `slices.to_grid` when it is prepared or read, then it is windowed.
Axis legend: D slices of the model, S pixels.
"""

import functools
import hashlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from etils import epath

from tghmoe_jax.datasets import leaks, prepared
from tghmoe_jax.datasets.items import Item
from tghmoe_jax.datasets.prepared import PreparedSet
from tghmoe_jax.datasets.registry import open_dataset
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.prompts import REPORT_REQUESTS
from tghmoe_jax.samples.questions import Kind, Question, cell_grid
from tghmoe_jax.samples.tasks import TASKS, kinds_of_items
from tghmoe_jax.scans.scan import low_high
from tghmoe_jax.scans.slices import Grid, to_grid
from tghmoe_jax.scans.volume import Volume

TEST_REQUEST = REPORT_REQUESTS[0]  # one wording for every report that is scored
_KEPT = 16  # grids kept: an evaluation asks about one volume many times


class FileSource:
    """`samples.ItemSource` over the split of the data sets that a config's `data` section names.

    `name` and `root` may be lists of the same length, separated by commas; `weights` then says how many samples of each
    kind come from each (empty: as many as it has items). A root is a prepared set or, where only one is named, a raw
    one. `made_up` answers kinds of samples that are no items and that any volume may stand beside. UserError names the
    flag where the split holds nothing.
    """

    def __init__(
        self, data: Mapping[str, Any], split: str, made_up: Mapping[str, Callable[..., Question]] = MappingProxyType({})
    ):
        names = [name.strip() for name in data["name"].split(",")]
        roots = [root.strip() for root in str(data["root"]).split(",")]
        self.weights = tuple(data.get("weights") or ())
        if len(names) != len(roots) or (self.weights and len(self.weights) != len(names)):
            raise UserError(
                f"--config.data.name lists {len(names)} data sets, data.root {len(roots)} folders and data.weights "
                f"{len(self.weights)} numbers; give one of each for every data set."
            )
        if any(weight < 1 for weight in self.weights):
            raise UserError(f"--config.data.weights={self.weights} holds a number below 1; leave that data set out.")
        self.data, self.split, self.made_up = data, split, dict(made_up)
        self.aux_names = aux_names_of(data)
        parts = [_open(data, name, root, alone=len(names) == 1) for name, root in zip(names, roots, strict=True)]
        self._read = [part[1] for part in parts]
        self.rows: list[Mapping[str, Any]] = []  # index rows of this split's volumes, where the sets are prepared
        self.volumes: list[tuple[int, str]] = []  # (data set, key)
        self._cases: list[int] = []
        cases: dict[tuple[int, str], int] = {}
        items: dict[str, list[list[tuple[int, Item]]]] = {kind: [[] for _ in names] for kind in kinds_of_items()}
        left: list[str] = []  # the volumes of items left out as leaks
        for number, (given, _, rows, gone) in enumerate(parts):
            index: dict[str, int] = {}
            # What chooses a checkpoint shares no patient with what scores it; published splits may go by volume.
            apart = {item.case for item in given if item.split == "test"} if split == "validation" else ()
            used = _share(given, data.get("share", 1.0)) if split == "train" else None
            for item in given:
                if item.split != split or item.case in apart or (used is not None and item.case not in used):
                    continue
                if (split, item.volume) in gone:
                    left.append(f"{number} {item.volume}")
                    continue
                if item.volume not in index:
                    index[item.volume] = len(self.volumes)
                    self.volumes.append((number, item.volume))
                    self._cases.append(cases.setdefault((number, item.case), len(cases)))
                    self.rows += [rows[item.volume]] if rows else []
                items[item.kind][number].append((index[item.volume], item))
        if not self.volumes:
            remedy = "" if split == "train" else ", give some cases that split, or train with --config.eval.every=0"
            raise UserError(
                f"--config.data.root={data['root']} holds no item of the split {split}; see its card.md{remedy}."
            )
        # What a command says of it: empty where nothing of this split is to be left out.
        self.left_out, drop = "", data.get("drop_leaks", "none")
        if drop != "none" and (drop == "train") == (split == "train"):
            self.left_out = (
                f"data.drop_leaks={drop}: {len(set(left))} volumes with {len(left)} items of the split {split} are "
                f"left out (leaks.csv names them); {len(self.volumes)} volumes remain"
            )
        self._counts = {kind: tuple(map(len, lists)) for kind, lists in items.items()}
        # Training takes the sets one after another (see `pipeline`), a test asks them in turns.
        joined = itertools.chain.from_iterable if split == "train" else _in_turns
        self._items = {kind: list(joined(lists)) for kind, lists in items.items()}
        self._kept: OrderedDict[int, Grid] = OrderedDict()

    def __getstate__(self):
        return self.__dict__ | {"_kept": OrderedDict()}

    def __len__(self) -> int:
        return len(self.volumes)

    def counts(self, kind: Kind) -> tuple[int, ...]:
        """Items of a kind in each data set."""
        return self._counts.get(kind, ())

    def item(self, kind: Kind, index: int, rng: np.random.Generator) -> tuple[int, Question]:
        """Item `index` of a kind: its volume and request. `rng` words a report request in training; tests have one."""
        volume, item = self._items[kind][index]
        training = self.split == "train"
        request = REPORT_REQUESTS[rng.integers(len(REPORT_REQUESTS))] if training else TEST_REQUEST
        return volume, item.asked(request if item.task == "report" else TASKS[item.task].request)

    def case(self, index: int) -> int:
        """Cases are numbered, so that no name of a patient reaches a table."""
        return self._cases[index]

    def key(self, index: int) -> str:
        """The name of volume `index` for a message."""
        return self.volumes[index][1]

    def digest(self) -> str:
        """sha256 of this split's items and of the stored voxels of its volumes; of a raw set, of its items alone."""
        result = hashlib.sha256()
        for listed in self._items.values():
            result.update(prepared.lines(prepared.item_row(item) for _, item in listed))
        result.update("".join(row["sha256"] + row.get("labels_sha256", "") for row in self.rows).encode())
        return result.hexdigest()

    def slices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Slices uint8 (D, S, S, 3) and the mask bool (D,) of real ones. UserError for a volume that is broken."""
        return self._grid(index).slices(self.data["slices"], self.data["channels"])

    def slice_spacing(self, index: int) -> float:
        """Distance of neighbouring slices in mm, 1.0 where the source states none."""
        spacing = self.rows[index]["spacing_mm"] if self.rows else self._grid(index).spacing_mm
        return float(spacing[0]) if spacing else 1.0

    def _grid(self, index: int) -> Grid:
        if index not in self._kept:
            number, key = self.volumes[index]
            self._kept[index] = self._read[number](key)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[index]

    def question(self, index: int, kind: Kind, rng: np.random.Generator, type: str | None = None) -> Question:
        """A question of a kind in `made_up`, whatever the volume; items are given, not drawn: see `item`."""
        return self.made_up[kind](rng)

    def aux(self, index: int) -> np.ndarray:
        """float32 (A,): 1 for a structure that the model's grid shows, -1 for one that the mask does not tell of."""
        shown = np.zeros(len(self.aux_names), np.float32)
        if self.aux_names:
            labels = self._grid(index).labels
            shown[np.unique(labels[labels > 0]) - 1] = 1
            shown[self.rows[index]["unknown"]] = -1
        return shown

    def aux_cells(self, index: int, cell: tuple[int, int, int]) -> np.ndarray:
        """bool (V, R, C, A): a structure is read off the cells that hold a voxel of it (see `samples.Source`)."""
        size = self.data["size"]
        cells = np.zeros((*cell_grid((self.data["slices"], size, size), cell), len(self.aux_names)), bool)
        if self.aux_names:
            labels = self._grid(index).labels
            places = np.nonzero(labels)
            cells[(*(at // c for at, c in zip(places, cell, strict=True)), labels[places] - 1)] = True
        return cells | ~cells.any((0, 1, 2))

    def input_ranges(self) -> dict:
        """See `samples.Source`; empty for a raw data set, whose volumes nobody has measured."""
        if not self.rows:
            return {}
        counts = [row["shape"][0] for row in self.rows]
        ranges: dict[str, Any] = {"slices": [min(counts), max(counts)]}
        spacing = np.array([row["spacing_mm"] for row in self.rows if row["spacing_mm"]])
        if len(spacing):
            ranges |= {
                "spacing_mm": [low_high(column) for column in spacing.T],
                "field_of_view_mm": low_high(spacing[:, 1] * self.data["size"]),
            }
        hu = [row["hu_range"] for row in self.rows if row["hu_range"]]
        return ranges | ({"hu": low_high(hu)} if hu else {})

    def group(self, index: int) -> str:
        """No strata: there is no control within a body section."""
        return ""

    def sides(self, index: int) -> tuple[str, str] | None:
        """Right and left, or front and back, where the volume states its orientation."""
        sagittal = {"LPS": False, "coronal slices of LPS": False, "sagittal slices of LPS": True}
        orientation = self._grid(index).orientation
        return (("R", "L"), ("A", "P"))[sagittal[orientation]] if orientation in sagittal else None

    def findings(self, index: int) -> frozenset[tuple[str, str, str]]:
        """None known."""
        return frozenset()


def aux_names_of(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The auxiliary labels of the data set in `data`: the structures of a prepared set with masks; else none."""
    if "," in data["name"]:
        return ()
    found = prepared.read_parameters(data["root"])
    return tuple(f"structure:{name}" for name in (found or {}).get("structures", ()))


def _open(
    data: Mapping[str, Any], name: str, root: str, alone: bool
) -> tuple[Iterable[Item], Callable[[str], Grid], Mapping[str, Mapping], set[tuple[str, str]]]:
    """Items, the reader of a key, the index rows (empty for a raw set), and the (split, key) left out as leaks."""
    drop = data.get("drop_leaks", "none")
    if prepared.read_parameters(root) is not None:
        found = PreparedSet(root, data["slices"], data["size"])
        if found.parameters["data.name"] != name:
            raise UserError(
                f"{root} was prepared from the data set {found.parameters['data.name']} and --config.data.name is "
                f"{name}; use that name."
            )
        return found.items, found.grid, found.rows, leaks.dropped(epath.Path(root) / "leaks.csv", drop)
    if not alone or drop != "none":
        why = f"--config.data.drop_leaks={drop}" if drop != "none" else "a list of data sets"
        raise UserError(
            f"{why} needs prepared sets and {root or 'data.root'} is not one; run tghmoe_jax.prepare first."
        )
    dataset = open_dataset(data)
    return dataset.items, functools.partial(_read_raw, dataset.read, data["slices"], data["size"]), {}, set()


def _share(given: Iterable[Item], share: float) -> set[str]:
    """The training cases that `data.share` leaves, at least one: a smaller share holds cases of a larger one alone."""
    cases = {item.case for item in given if item.split == "train"}
    order = sorted(cases, key=lambda case: hashlib.sha256(case.encode()).digest())
    return set(order[: math.ceil(share * len(order))])


def _read_raw(read: Callable[[str], Volume], slices: int, size: int, key: str) -> Grid:
    """A raw volume as it would be stored."""
    return to_grid(read(key), slices, size)


def _in_turns(lists: Iterable[list]) -> Iterable:
    nothing = object()
    turns = itertools.zip_longest(*lists, fillvalue=nothing)
    return (one for turn in turns for one in turn if one is not nothing)
