"""A data set of files -> a prepared set (see `prepared`): in parallel, and resumed after a kill.

A volume that is done lies in `.work` under its number in the plan, whole or not at all; when all of a shard are there
they are packed. What is written is a function of the data set and the sizes alone: neither the number of workers nor
when a process was killed shows in it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax import __version__, digests, untrusted
from tghmoe_jax.datasets import card, leaks, prepared
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.datasets.registry import open_dataset
from tghmoe_jax.datasets.workers import Progress, as_completed
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.slices import Grid, nearest, to_grid
from tghmoe_jax.scans.volume import Volume
from tghmoe_jax.writing import refuse_links, write

WORK, LOCK = ".work", ".lock"
READERS = ("numpy", "nibabel", "pydicom", "pillow")  # packages whose version may show in a voxel


def prepare(
    data: Mapping[str, Any], folder: Path, workers: int = 1, say: Callable[[str], None] = print,
    dataset: Dataset | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Prepares what a config's `data` section names into `folder`, and returns the card.

    `dataset` replaces what `data` names. UserError where the folder holds anything else, another process writes
    into it, or no volume could be read.
    """
    begun = time.monotonic()
    dataset = dataset or open_dataset(data)
    if dataset.labels and "structures" not in (prepared.read_parameters(folder) or {"structures": ()}):
        dataset = dataclasses.replace(dataset, structures=(), labels=None)  # of an earlier version, which kept no masks
    if len(dataset.structures) > prepared.MAX_STRUCTURES:
        raise UserError(
            f"the masks of {dataset.root} name {len(dataset.structures)} structures, more than "
            f"{prepared.MAX_STRUCTURES}; give all scans the same names."
        )
    keys = list(dict.fromkeys(item.volume for item in dataset.items))
    if not keys:
        raise UserError(f"{dataset.root} holds no usable item of the data set {dataset.name}; see what was rejected.")
    parameters = {
        "format": prepared.FORMAT,
        **{f"data.{key}": data[key] for key in ("name", "root", "manifest", "slices", "size")},
        "items": hashlib.sha256(prepared.lines(map(prepared.item_row, dataset.items))).hexdigest(),
        "volumes": len(keys), "shards": -(-len(keys) // prepared.SHARD), "shard": prepared.SHARD,
    } | ({"structures": list(dataset.structures)} if dataset.labels else {})  # fmt: skip
    refuse_links(folder, ("volumes", WORK, LOCK), "--to")
    try:
        _claim(folder, parameters)
        with _locked(folder):
            if (folder / "card.json").is_file() and not _missing(folder, parameters) and not _spoiled(folder, say):
                _tidy(folder)  # the run that finished the set may have been killed behind its card
                say(f"{folder} is prepared already")
                return untrusted.read_json(folder / "card.json", card.KIND, remedy="prepare the set into a new folder")
            seconds = _volumes(dataset, keys, data, folder, parameters, workers, say)
            result = _finish(dataset, folder, parameters, say)
            durations = {
                "seconds": round(time.monotonic() - begun, 1), "workers": workers, "volumes_of_this_run": len(seconds),
                "seconds_a_volume": {f"p{q}": round(float(np.percentile(seconds, q)), 3) for q in (50, 95)}
                if seconds else {},
            }  # fmt: skip
            write(folder / "durations.json", json.dumps(durations, indent=1).encode())
            _tidy(folder)
            return result
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or type(error).__name__}); fix that and run the command "
            "again: what is prepared stays."
        ) from error


def _claim(folder: Path, parameters: dict[str, Any]) -> None:
    """Makes `folder` the set of these parameters. UserError where it is anything else."""
    whole = prepared.lines([parameters])
    with contextlib.suppress(digests.Damaged):
        if (digests.read(folder) or {}).get("prepare.json") == digests.of_bytes(whole):  # also where it is damaged
            write(folder / "prepare.json", whole)
    found = prepared.read_parameters(folder) if folder.is_dir() else None
    if found is None:
        # What a run leaves that is killed before prepare.json has its name, and the dot files of desktops and disks.
        own = {folder / "volumes"}
        there = (*folder.iterdir(), *(folder / "volumes").glob("*")) if folder.is_dir() else (folder,) * folder.exists()
        if any(path not in own and not (path.name.startswith(".") and path.is_file()) for path in there):
            raise UserError(f"--to {folder} holds other files; name a new folder.")
        (folder / "volumes").mkdir(parents=True, exist_ok=True)
        write(folder / "prepare.json", whole)
        return
    differ = [key for key in parameters.keys() | found.keys() if parameters.get(key) != found.get(key)]
    if differ:
        raise UserError(
            f"--to {folder} holds a set prepared with other values of {', '.join(sorted(differ))}; "
            "name another folder, or delete that one."
        )
    (folder / "volumes").mkdir(exist_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process prepares into {folder}; let it end, or stop it first.") from None
        yield


def _tidy(folder: Path) -> None:
    """Removes what only an unfinished set needs."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
    for part in folder.glob("*.part"):
        part.unlink()


def _spoiled(folder: Path, say: Callable[[str], None]) -> bool:
    """Whether a finished set is damaged: all its files are hashed, and what is not whole is removed to be made again.

    UserError for a file that is none of its own.
    """
    if not (wrong := prepared.problems(folder)):
        return False
    if foreign := [one for one in wrong if one.endswith(" does not belong there")]:
        raise UserError(f"{folder}: {foreign[0]}; move it elsewhere.")
    say(f"{folder} is damaged ({digests.told(wrong)}): that part is prepared again")
    (folder / "card.json").unlink(missing_ok=True)  # from here on the set is not finished
    unproven = any(one.startswith(digests.FILE) for one in wrong)
    for file in (folder / "volumes").iterdir():
        if unproven or any(one.startswith(f"volumes/{file.stem}.") for one in wrong):
            file.unlink()
    if unproven:
        (folder / digests.FILE).unlink(missing_ok=True)
    return True


def _missing(folder: Path, parameters: Mapping[str, Any]) -> list[int]:
    return [s for s in range(parameters["shards"]) if not prepared.shard_file(folder, s, ".jsonl").is_file()]


# ----------------------------------------------------------------------------------------------------------- volumes


def _volumes(dataset, keys, data, folder, parameters, workers, say) -> list[float]:
    """Reads and packs all that is missing; returns the seconds that each volume of this run took."""
    work = folder / WORK
    work.mkdir(exist_ok=True)
    for part in (*work.glob("*.part"), *(folder / "volumes").glob("*.part")):
        part.unlink()
    there = {int(file.name) for file in work.iterdir() if re.fullmatch(r"\d{8}", file.name)}  # .nfs*, .DS_Store are not
    missing = _missing(folder, parameters)
    left: dict[int, set[int]] = {}
    for shard in missing:
        numbers = range(shard * prepared.SHARD, min((shard + 1) * prepared.SHARD, len(keys)))
        left[shard] = {number for number in numbers if number not in there}
    todo = [number for shard in missing for number in sorted(left[shard])]
    progress = Progress(len(keys), len(keys) - len(todo), workers, say)
    job = (dataset, work, data["slices"], data["size"])
    seconds = []
    for shard in missing:
        if not left[shard]:
            _pack(folder, shard, len(keys))
    with contextlib.closing(as_completed(_one, job, [(n, keys[n]) for n in todo], workers)) as results:
        for number, rejected, took in results:
            seconds.append(took)
            progress.add(rejected, took)
            shard = number // prepared.SHARD
            left[shard].discard(number)
            if not left[shard]:
                _pack(folder, shard, len(keys))
    progress.end()
    return seconds


def _one(dataset: Dataset, work: Path, slices: int, size: int, number: int, key: str) -> tuple[int, bool, float]:
    """Reads volume `number` of the plan and leaves it in `work`: one line of JSON, the signature, the voxels."""
    begun = time.monotonic()
    content, row = b"", {"volume": key}
    try:
        volume = dataset.read(key)
        grid = to_grid(volume, slices, size)
        record = grid.values.astype(grid.values.dtype.newbyteorder("<")).tobytes()
        row |= _provenance(dataset.root, key, volume, grid, record)
        if dataset.labels:
            spacing = volume.spacing_mm
            del volume  # as large as the labels
            labels, unknown = dataset.labels(key)
            seen = nearest(labels, spacing, slices, size)
            lost = {*_values(labels)} - {*_values(seen)}  # too small for the grid's centres, and yet in the picture
            packed = seen.astype("<u2").tobytes()
            record += packed
            row |= {
                "unknown": sorted({*unknown, *lost}), "crc32": zlib.crc32(record),
                "labels_sha256": hashlib.sha256(packed).hexdigest(),
            }  # fmt: skip
        content = leaks.signature(grid.values).tobytes() + record
    except MemoryError:
        raise UserError(
            f"memory ran out at {key}; run the command again with fewer --workers, or take that volume out of the data "
            "set."
        ) from None
    except UserError as error:
        row["rejected"] = str(error).replace(f"{dataset.root}{os.sep}", "")
    except Exception as error:  # a reader's own fault costs one volume; its text may name a patient
        row["rejected"] = f"it cannot be read ({type(error).__name__})."
    write(work / f"{number:08d}", prepared.lines([row]) + content)
    return number, "rejected" in row, time.monotonic() - begun


def _values(labels: np.ndarray) -> list[int]:
    """The indices of the structures that occur."""
    found = np.zeros(1 << 16, bool)
    for plane in labels:
        found[plane.ravel()] = True
    return np.flatnonzero(found[1:]).tolist()


def _provenance(root: Path, key: str, volume: Volume, grid: Grid, record: bytes) -> dict:
    return {
        "place": None, "shape": list(grid.values.shape), "unit": volume.unit, "crc32": zlib.crc32(record),
        "sha256": hashlib.sha256(record).hexdigest(), "source_sha256": source_digest(root, key, volume),
        "source_shape": list(volume.array.shape), "source_spacing_mm": volume.spacing_mm,
        "spacing_mm": grid.spacing_mm, "orientation": volume.orientation, "window": volume.window,
        "hu_range": grid.hu_range, "history": grid.history, "warnings": volume.warnings,
        "versions": {"tghmoe_jax": __version__} | {name: importlib.metadata.version(name) for name in READERS},
    }  # fmt: skip


def source_digest(root: Path, key: str, volume: Volume) -> str:
    """sha256 of the file, or of the files of the folder, that a key names; of the canonical voxels where it names none.

    Dot files are left out: a Mac leaves them beside the scan. What follows a `#` names a part of a scan.
    """
    for name in (key, key.partition("#")[0]):
        path = inside(root, name)
        if path.exists():
            digest = hashlib.sha256()
            files = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            for file in sorted(files) if path.is_dir() else [path]:
                digest.update(file.relative_to(path).as_posix().encode())
                with open(file, "rb") as content:
                    while block := content.read(2**20):
                        digest.update(block)
            return digest.hexdigest()
    return hashlib.sha256(volume.array.tobytes()).hexdigest()


def _note(folder: Path, shard: int) -> Path:
    """Where the digests of a shard are kept until the set is finished."""
    return folder / WORK / f"{shard:05d}.digests"


def _pack(folder: Path, shard: int, volumes: int) -> None:
    """Packs the volumes of a shard, which all lie in `.work`, and takes them from there."""
    files = [
        folder / WORK / f"{number:08d}"
        for number in range(shard * prepared.SHARD, min((shard + 1) * prepared.SHARD, volumes))
    ]
    cells = int(np.prod(leaks.SIGNATURE))
    rows, records, signatures = [], [], []
    for file in files:
        head, _, content = file.read_bytes().partition(b"\n")
        row = json.loads(head)
        if "rejected" not in row:
            row["place"] = len(records)
            signatures.append(np.frombuffer(content[:cells], np.int8))
            records.append(content[cells:])
        rows.append(row)
    prepared.write_shard(folder, shard, rows, records, np.array(signatures), _note(folder, shard))
    for file in files:
        file.unlink()


# ------------------------------------------------------------------------------------------------------------ finish


def _finish(dataset: Dataset, folder: Path, parameters: Mapping[str, Any], say: Callable[[str], None]) -> dict:
    """Writes items, rejections, warnings, leaks and the card, the card last: with it the set is finished."""
    rows, signatures = {}, {}
    bad = [(one.where, one.reason) for one in dataset.rejected]
    for shard in range(parameters["shards"]):
        found = prepared.read_lines(prepared.shard_file(folder, shard, ".jsonl"), prepared.ROW)
        good = [row for row in found if "rejected" not in row]
        bad += [(row["volume"], row["rejected"]) for row in found if "rejected" in row]
        rows |= {row["volume"]: row for row in good}
        if good:
            stored = np.load(prepared.shard_file(folder, shard, ".npy"), allow_pickle=False)
            signatures |= dict(zip((row["volume"] for row in good), stored, strict=True))
    doubts = [(key, warning) for key, row in rows.items() for warning in row.get("warnings", ())]
    written = {"prepare.json": digests.of_bytes(prepared.lines([parameters]))}

    def keep(name: str, content: bytes) -> None:
        write(folder / name, content)
        written[name] = digests.of_bytes(content)

    keep("rejected.csv", prepared.table([("where", "reason"), *bad]))
    keep("warnings.csv", prepared.table([("volume", "warning"), *doubts]))
    if not rows:
        raise UserError(f"no volume of the data set could be read; {folder / 'rejected.csv'} gives the reasons.")
    items = [_anonymous(item) for item in dataset.items if item.volume in rows]
    keep("items.jsonl", prepared.lines(map(prepared.item_row, items)))
    say("comparing the splits for leaks")
    leaked = leaks.find_leaks(items, {key: row["sha256"] for key, row in rows.items()}, signatures)
    keep("leaks.csv", prepared.table(leaks.rows(leaked)))
    result = card.card(dataset.name, parameters, items, rows, len(bad), doubts, Counter(leak.kind for leak in leaked))
    keep("card.md", card.markdown(result).encode())
    result["digests"] = f"{digests.FILE} (sha256)"  # it belongs to the set
    text = (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode()
    written |= _of_shards(folder, parameters) | {"card.json": digests.of_bytes(text)}
    digests.write(folder, written)
    write(folder / "card.json", text)
    return result


def _of_shards(folder: Path, parameters: Mapping[str, Any]) -> dict[str, str]:
    """The digests of all shards: as they were packed, or of a damaged set the old ones of what is whole."""
    known = digests.read(folder) or {}
    for shard in range(parameters["shards"]):
        if (note := _note(folder, shard)).is_file():
            known |= json.loads(note.read_text())
    names = digests.files(folder, "volumes/")
    fresh = digests.of_files(folder, [name for name in names if name not in known])  # packed by an earlier version
    return {name: known.get(name) or fresh[name] for name in names}


def _anonymous(item: Item) -> Item:
    """The item with a hash for its case: what groups a patient's items need not name the patient."""
    case = hashlib.blake2b(item.case.encode(), digest_size=8).hexdigest()
    return Item(**vars(item) | {"case": case})
