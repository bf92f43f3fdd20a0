"""A prepared set on disk: volumes on the model's grid in ArrayRecord shards, read by random access.

    prepare.json      what the set was made with; a set of other parameters is refused in its folder
    items.jsonl       one request a line        volumes/00000.array_record   SHARD volumes, one a record
    card.json, .md    counts and ranges         volumes/00000.jsonl          their index and provenance, and what was
    rejected.csv      what was left out                                      rejected among them, one a line
    warnings.csv      what readers warned of    volumes/00000.npy            their signatures (see `leaks`)
    leaks.csv         what two splits share             digests.json              a SHA-256 of each file
    durations.json    the only file that differs between two preparations of one set

When a set is opened, its small files are compared with their digests and every file has to be there; a volume is
compared with the checksum in its index whenever it is read. HU are stored as int16 and windowed when read, so that one
set serves every window; values of a unit interval as uint8. Where the data set has masks, a record holds the labels on
the same grid too, uint16 behind the values, and prepare.json names the `structures`.
"""

import contextlib
import csv
import dataclasses
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from tghmoe_jax import digests, untrusted
from tghmoe_jax.datasets.items import Item
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.tasks import TASKS
from tghmoe_jax.scans.slices import Grid
from tghmoe_jax.writing import renamed, write

FORMAT = 1  # of everything in the folder
SHARD = 256  # volumes a shard, rejected ones counted
# What prepare.json and the index rows of volumes may hold (see `untrusted`).
_PARAMETERS = {
    "format": int, "data.name": str, "data.root": str, "data.manifest": str, "data.slices": range(1, 1 << 13),
    "data.size": range(1, 1 << 13), "items": str, "volumes": range(1 << 31), "shards": range(1 << 24), "shard": int,
}  # fmt: skip
_OF_MASKS = {"structures": [str]}  # of sets with masks alone
MAX_STRUCTURES = 1024  # the auxiliary head has an output for each
ROW = {
    "volume": str, "rejected": str, "place": (range(1 << 31), None), "shape": [range(1, 1 << 13)] * 3, "unit": str,
    "crc32": int, "sha256": str, "spacing_mm": ([float] * 3, None), "hu_range": ([float, float], None),
    "history": [str], "unknown": [range(MAX_STRUCTURES)], "labels_sha256": str,
}  # fmt: skip
_OF_LABELS = {"unknown", "labels_sha256"}
_NEEDED = ROW.keys() - {"rejected"} - _OF_LABELS
DTYPES = {"HU": np.int16, "unit-interval": np.uint8}
WRITE = "group_size:1,zstd:1"  # one record is read at a time; level 1 halves a CT and reads at 0.8 GB/s a core
READ = "readahead_buffer_size:0,max_parallelism:0"  # random access
OPEN_READERS = 256  # below the usual limit of open files


# ------------------------------------------------------------------------------------------------------------- files


def lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines with keys in the order given."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def table(rows: Iterable[Iterable[Any]]) -> bytes:
    """A CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(map(untrusted.cell, row) for row in rows)
    return text.getvalue().encode()


def read_lines(file: epath.Path, kind: Any) -> list[dict[str, Any]]:
    """The objects, of a kind (see `untrusted`), of a file that this project wrote. UserError where it is damaged.

    Lines end at `\\n` alone: a text may hold other separators, such as U+2028.
    """
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is missing or damaged ({type(error).__name__}); prepare the set again.") from error
    untrusted.expect(rows, [kind], file, "prepare the set again")
    return rows


def shard_file(folder: epath.PathLike, shard: int, suffix: str) -> epath.Path:
    return epath.Path(folder) / "volumes" / f"{shard:05d}{suffix}"


def write_shard(
    folder: Path, shard: int, rows: list[dict[str, Any]], records: list[bytes], signatures: np.ndarray, note: Path
) -> None:
    """Writes a shard whole: its index comes last, so that an index means a whole shard. OSError on a full disk.

    The digests of its files are kept in `note` until the set is finished.
    """
    index, found = lines(rows), {}
    if records:
        with renamed(shard_file(folder, shard, ".array_record")) as part:
            try:
                writer = ArrayRecordWriter(str(part), WRITE)
                for record in records:
                    writer.write(record)
                writer.close()
            except RuntimeError as error:  # "write() failed: No space left on device; writing ..."
                reason = re.search(r"failed: ([^;]+)", str(error))
                raise OSError(0, reason[1] if reason else "a shard failed") from error
            found[".array_record"] = digests.of_file(part)
        packed = io.BytesIO()
        np.save(packed, signatures, allow_pickle=False)
        content = packed.getvalue()
        write(shard_file(folder, shard, ".npy"), content)
        found[".npy"] = digests.of_bytes(content)
    found[".jsonl"] = digests.of_bytes(index)
    names = {f"volumes/{shard:05d}{suffix}": digest for suffix, digest in found.items()}
    write(note, json.dumps(names))
    write(shard_file(folder, shard, ".jsonl"), index)


def read_parameters(folder: epath.PathLike) -> dict[str, Any] | None:
    """What a folder was prepared with; None where it is not a prepared set. UserError where that has gone."""
    file = epath.Path(folder) / "prepare.json"
    if file.is_file():
        return (read_lines(file, _PARAMETERS | _OF_MASKS) or [{}])[0]
    if (file.parent / "volumes").is_dir() and (file.parent / digests.FILE).is_file():
        raise UserError(damaged(folder, [f"{file.name} is missing"]))
    return None


def problems(folder: epath.PathLike, unread: tuple[str, ...] = ()) -> list[str]:
    """`digests.problems` of a finished set; earlier versions wrote no digests."""
    if not (epath.Path(folder) / digests.FILE).exists():
        try:
            declared = "digests" in json.loads((epath.Path(folder) / "card.json").read_text())
        except OSError:
            return ["card.json is missing"]
        except (ValueError, TypeError):
            declared = True
        return [f"{digests.FILE} is missing"] if declared else []
    return digests.problems(folder, unread=unread)


def damaged(folder: epath.PathLike, wrong: list[str]) -> str:
    """The sentence about a damaged set, with the command that makes again what is damaged."""
    if "://" in str(folder):
        return f"{folder} is damaged ({digests.told(wrong)}); copy it there again."
    command = "python -m tghmoe_jax.prepare with the flags that it was prepared with"
    if not any(one.startswith("prepare.json") for one in wrong):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            found = read_parameters(folder)
            config = found["data.name"] if found["data.name"] in ("m3d", "ct_rate") else "manifest"
            flags = [f"--config.{key}={found[key]}" for key in found if key.startswith("data.") and found[key]]
            flags = [f"--config=configs/data_{config}.py", *flags, f"--to={folder}"]
            command = shlex.join(["python", "-m", "tghmoe_jax.prepare", *flags])
    return f"{folder} is damaged ({digests.told(wrong)}); to make that part again, run {command}"


def item_row(item: Item) -> dict[str, Any]:
    return dataclasses.asdict(item) | {"choices": list(item.choices)}


def _items(file: epath.Path) -> tuple[Item, ...]:
    texts = tuple(field.name for field in dataclasses.fields(Item) if field.name != "choices")
    try:  # there may be millions, so that each is looked at once
        items = tuple(Item(**row | {"choices": tuple(row["choices"])}) for row in read_lines(file, {}))
        whole = all(isinstance(getattr(item, name), str) for item in items for name in texts)
        whole = whole and all(isinstance(one, str) for item in items for one in item.choices)
        whole = whole and all(item.task in TASKS for item in items)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{file} holds a line that is no item; prepare the set again.")
    return items


# ------------------------------------------------------------------------------------------------------------ reading


class PreparedSet:
    """A finished set. `items` are in the order of the data set; `rows` {volume key: its index row}.

    The folder may be a URL. UserError where it holds no finished set, or one of other sizes than `slices` and `size`.
    """

    def __init__(self, folder: epath.PathLike, slices: int | None = None, size: int | None = None):
        self.folder = epath.Path(folder)
        self.parameters = read_parameters(folder)
        if self.parameters is None or not (self.folder / "card.json").is_file():
            raise UserError(
                f"{folder} holds no finished set; run python -m tghmoe_jax.prepare to its end (it resumes)."
            )
        if wrong := problems(folder, unread=(".array_record", ".npy")):
            raise UserError(damaged(folder, wrong))
        if self.parameters.get("format") != FORMAT:
            raise UserError(f"{folder} was prepared by another version of this project; prepare it into a new folder.")
        if missing := [key for key in _PARAMETERS if key not in self.parameters]:
            raise UserError(f"{self.folder / 'prepare.json'} lacks {missing[0]}; prepare the set again.")
        for key, wanted in (("slices", slices), ("size", size)):
            found = self.parameters[f"data.{key}"]
            if wanted is not None and found != wanted:
                raise UserError(
                    f"{folder} was prepared with data.{key}={found} and --config.data.{key}={wanted}; "
                    "prepare it again into another folder, or change the flag."
                )
        self.structures = tuple(self.parameters.get("structures", ()))
        if len(self.structures) > MAX_STRUCTURES:
            raise UserError(f"{self.folder / 'prepare.json'} names too many structures; prepare the set again.")
        needed = _NEEDED | (_OF_LABELS if self.structures else set())
        self.items = _items(self.folder / "items.jsonl")
        self.rows: dict[str, dict[str, Any]] = {}
        for shard in range(self.parameters["shards"]):
            for row in read_lines(file := shard_file(self.folder, shard, ".jsonl"), ROW):
                if "rejected" in row:
                    continue
                known = max(row.get("unknown", ()), default=-1) < max(len(self.structures), 1)
                if not row.keys() >= needed or row["unit"] not in DTYPES or not known:
                    raise UserError(f"{file} does not say what its volumes are; prepare the set again.")
                self.rows[row["volume"]] = row | {"shard": shard}
        if lost := next((item.volume for item in self.items if item.volume not in self.rows), None):
            raise UserError(f"{self.folder} has items of {lost}, which no shard holds; prepare the set again.")
        self._readers: dict[int, ArrayRecordReader] = {}

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}}  # open files stay in their process

    def grid(self, key: str) -> Grid:
        """The volume of a key. UserError where its record is not what was written."""
        row = self.rows[key]
        fault = None
        try:
            record = self._reader(row["shard"]).read([row["place"]])[0]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            fault = type(error).__name__
        else:
            shape, dtype = tuple(row["shape"]), np.dtype(DTYPES[row["unit"]])
            end = dtype.itemsize * int(np.prod(shape))
            whole = end + (2 * int(np.prod(shape)) if self.structures else 0)
            if len(record) != whole or zlib.crc32(record) != row["crc32"]:
                fault = "its checksum differs"
        if fault:
            file = shard_file(self.folder, row["shard"], ".array_record").relative_to(self.folder)
            raise UserError(damaged(self.folder, [f"volume {key} in {file}: {fault}"]))
        values = np.frombuffer(record[:end], dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
        labels = np.frombuffer(record[end:], "<u2").reshape(shape) if self.structures else None
        if labels is not None and labels.max() > len(self.structures):
            raise UserError(
                f"{self.folder} has labels of {key} that prepare.json does not name; prepare the set again."
            )
        spacing = row["spacing_mm"] and tuple(row["spacing_mm"])
        return Grid(values, spacing, tuple(row["history"]), str(row.get("orientation")), labels)

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            while len(self._readers) >= OPEN_READERS:
                self._readers.pop(next(iter(self._readers))).close()
            self._readers[shard] = ArrayRecordReader(str(shard_file(self.folder, shard, ".array_record")), READ)
        return self._readers[shard]
