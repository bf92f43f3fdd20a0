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
set serves every window; values of a unit interval as uint8.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from tghmoe_jax import digests
from tghmoe_jax.datasets.items import Item
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.slices import Grid

FORMAT = 1  # of everything in the folder
SHARD = 256  # volumes a shard, rejected ones counted
DTYPES = {"HU": np.int16, "unit-interval": np.uint8}
WRITE = "group_size:1,zstd:1"  # one record is read at a time; level 1 halves a CT and reads at 0.8 GB/s a core
READ = "readahead_buffer_size:0,max_parallelism:0"  # random access
OPEN_READERS = 256  # below the usual limit of open files


# ------------------------------------------------------------------------------------------------------------- files


def write_atomic(file: Path, content: bytes) -> str:
    """Writes a whole file or nothing, whenever the process or the machine stops. Returns its digest."""
    with _renamed(file) as part:
        part.write_bytes(content)
    return digest_of(content)


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def _renamed(file: Path) -> Iterator[Path]:
    """A file to be written, which gets its name when it is whole; on a full disk it is taken away again."""
    part = file.with_name(file.name + ".part")
    try:
        yield part
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines with keys in the order given."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def table(rows: Iterable[Iterable[Any]]) -> bytes:
    """A CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def read_lines(file: epath.Path) -> list[dict[str, Any]]:
    """The objects of a file that this project wrote. UserError where it is absent or damaged.

    Lines end at `\\n` alone: a text may hold other separators, such as U+2028.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or damaged ({type(error).__name__}); prepare the set again.") from error


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
        with _renamed(shard_file(folder, shard, ".array_record")) as part:
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
        found[".npy"] = write_atomic(shard_file(folder, shard, ".npy"), packed.getvalue())
    found[".jsonl"] = digest_of(index)
    names = {f"volumes/{shard:05d}{suffix}": digest for suffix, digest in found.items()}
    write_atomic(note, json.dumps(names).encode())
    write_atomic(shard_file(folder, shard, ".jsonl"), index)


def read_parameters(folder: epath.PathLike) -> dict[str, Any] | None:
    """What a folder was prepared with; None where it is not a prepared set. UserError where that has gone."""
    file = epath.Path(folder) / "prepare.json"
    if file.is_file():
        return (read_lines(file) or [{}])[0]
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
        for key, wanted in (("slices", slices), ("size", size)):
            found = self.parameters[f"data.{key}"]
            if wanted is not None and found != wanted:
                raise UserError(
                    f"{folder} was prepared with data.{key}={found} and --config.data.{key}={wanted}; "
                    "prepare it again into another folder, or change the flag."
                )
        self.items = tuple(
            Item(**row | {"choices": tuple(row["choices"])}) for row in read_lines(self.folder / "items.jsonl")
        )
        self.rows: dict[str, dict[str, Any]] = {}
        for shard in range(self.parameters["shards"]):
            for row in read_lines(shard_file(self.folder, shard, ".jsonl")):
                if "rejected" not in row:
                    self.rows[row["volume"]] = row | {"shard": shard}
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
            if len(record) != dtype.itemsize * int(np.prod(shape)) or zlib.crc32(record) != row["crc32"]:
                fault = "its checksum differs"
        if fault:
            file = shard_file(self.folder, row["shard"], ".array_record").relative_to(self.folder)
            raise UserError(damaged(self.folder, [f"volume {key} in {file}: {fault}"]))
        values = np.frombuffer(record, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
        return Grid(values, row["spacing_mm"] and tuple(row["spacing_mm"]), tuple(row["history"]))

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            while len(self._readers) >= OPEN_READERS:
                self._readers.pop(next(iter(self._readers))).close()
            self._readers[shard] = ArrayRecordReader(str(shard_file(self.folder, shard, ".array_record")), READ)
        return self._readers[shard]
