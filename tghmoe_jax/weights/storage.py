"""Reads and writes safetensors folders, tensor by tensor and without pickle.

A folder holds `model.safetensors`, or shards `model-00001-of-00003.safetensors` with `model.safetensors.index.json`,
as Hugging Face writes them. dtypes: float32, float16 and bfloat16 (the latter through ml_dtypes).
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tghmoe_jax import untrusted, writing
from tghmoe_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # every name `write_tensors` can leave
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),  # position_ids, which some files still carry
    "I32": np.dtype(np.int32),
}


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is read or made by `load` whenever `np.asarray` asks. `shape` and `dtype` are known before."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.load()
        return array if dtype is None else array.astype(dtype)


def cast(leaf, dtype: np.dtype | None):
    """An array or a lazy one in another dtype (None: its own)."""
    if dtype is None or leaf.dtype == dtype:
        return leaf
    if isinstance(leaf, np.ndarray):
        return leaf.astype(dtype)
    return Lazy(tuple(leaf.shape), np.dtype(dtype), lambda: np.asarray(leaf).astype(dtype))


def damaged(file: Path, error: Exception) -> UserError:
    """The error for a file that is not a whole safetensors file."""
    return UserError(f"{file} is not a complete safetensors file ({error}); copy or download it again.")


def read_tensors(folder: str | os.PathLike) -> dict[str, Lazy]:
    """Lists the tensors of a folder without reading their data; with an index, exactly those the index names."""
    folder = local_folder(folder)
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise no_weights(folder)
        return read_header(folder / SINGLE)
    shards, tensors = read_index(index), {}
    for shard in sorted(set(shards.values())):
        tensors |= {name: tensor for name, tensor in read_header(folder / shard).items() if shards.get(name) == shard}
    if missing := sorted(set(shards) - set(tensors)):
        raise UserError(f"{index} names tensors that its shards do not hold ({', '.join(missing)}); copy them again.")
    return tensors


def read_tensor(file: Path, name: str) -> np.ndarray:
    """One tensor. The file is closed at once, so resident memory stays that of the tensors in use."""
    try:
        with safe_open(file, framework="numpy") as handle:
            return handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def read_index(index: Path) -> dict[str, str]:
    """Reads {tensor name: shard file name}; every shard must be a file directly in the folder."""
    try:
        shards = untrusted.read_json(index, {"weight_map": {str: str}})["weight_map"]
    except (UserError, KeyError):
        raise UserError(f"{index} is not a safetensors index with a weight_map; copy or download it again.") from None
    names = sorted(set(shards.values()))
    # A shard elsewhere could be any file of the machine: an index from the net may not choose it.
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..") or "\\" in name]
    if outside:
        raise UserError(f"{index} names files outside its folder ({', '.join(outside)}); use an index of plain names.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index.parent} lacks the shards {', '.join(missing)} that {INDEX} names; copy them there.")
    return shards


def read_header(file: Path) -> dict[str, Lazy]:
    """Reads names, shapes and dtypes of one file."""
    try:
        with safe_open(file, framework="numpy") as handle:
            names = handle.keys()
            slices = {name: handle.get_slice(name) for name in names}
            headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error
    unknown = sorted({dtype for dtype, _ in headers.values()} - set(DTYPES))
    if unknown:
        raise UserError(f"{file} holds {', '.join(unknown)} tensors; convert it to BF16, F16 or F32 first.")
    return {
        name: Lazy(shape, DTYPES[dtype], functools.partial(read_tensor, file, name))
        for name, (dtype, shape) in headers.items()
    }


def write_tensors(
    folder: str | os.PathLike, tensors: Mapping[str, np.ndarray], max_shard_bytes: int = 1 << 30
) -> list[Path]:
    """Writes a safetensors folder; returns the files written, the index last if there is one.

    Values need `shape` and `dtype` and are read one shard at a time. All data is on disk under temporary names before
    the first file gets its own; the index is removed first and placed last, so that a reader never sees a mixture.
    """
    folder = local_folder(folder, create=True)
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=n_bytes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    pending: dict[Path, Path] = {}
    try:
        for name, keys in split.filename_to_tensors.items():
            pending[folder / f".{name}.{uuid.uuid4().hex}.tmp"] = folder / name
            # save_file writes raw memory: a strided view would be stored in the wrong order.
            data = {key: np.asarray(np.asarray(tensors[key]), order="C") for key in keys}
            # Hugging Face refuses a file without the format key.
            save_file(data, next(reversed(pending)), metadata={"format": "pt"})
            os.chmod(next(reversed(pending)), 0o666 & ~_umask())  # save_file lets nobody else read it
        if split.is_sharded:
            pending[folder / f".{INDEX}.{uuid.uuid4().hex}.tmp"] = folder / INDEX
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            next(reversed(pending)).write_text(json.dumps(index, indent=2) + "\n")
        (folder / INDEX).unlink(missing_ok=True)
        for temporary, final in pending.items():
            os.replace(temporary, final)
    finally:
        for temporary in pending:
            temporary.unlink(missing_ok=True)
    for stale in folder.iterdir():  # shards of an earlier write would be read again or waste space
        if OURS.fullmatch(stale.name) and stale not in pending.values():
            stale.unlink()
    return list(pending.values())


def _umask() -> int:
    """The process's mask of permissions, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def n_bytes(tensor) -> int:
    """Size of an array or lazy tensor in bytes."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def copy_files(names: Iterable[str], source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies those of the named files that the folder `source` has into the folder `target`."""
    for old, new in ((epath.Path(source) / name, epath.Path(target) / name) for name in names):
        if old.is_file() and old.resolve() != new.resolve():
            writing.write(new, old.read_bytes())


def cache_home() -> Path:
    """The project's own folder among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tghmoe_jax"


def local_folder(folder: str | os.PathLike, create: bool = False) -> Path:
    """The folder as a path on a local disk, because safetensors maps its files into memory: of a URL a copy."""
    if "://" in str(folder):
        if create:
            raise UserError(f"{folder} is not on a local disk; write the model to one and copy it there.")
        return fetched(folder)
    folder = Path(folder)
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one that holds {SINGLE} or {INDEX}.")
    return folder


def fetched(url: str | os.PathLike) -> Path:
    """A copy of the files of the folder at `url` in the user's cache, made once for each state of that folder.

    UserError where the URL holds no files or cannot be read.
    """
    try:
        source = epath.Path(url)
        files = [file for file in sorted(source.iterdir(), key=lambda one: one.name) if not file.is_dir()]
        stats = [file.stat() for file in files]
    except Exception as error:  # each kind of URL raises other errors
        raise UserError(f"{url} cannot be read ({' '.join(str(error).split())[:200]}); name another folder.") from error
    if not files:
        raise UserError(f"{url} holds no files; name the folder of a model.")
    state = [(file.name, stat.length, stat.mtime) for file, stat in zip(files, stats, strict=True)]
    key = hashlib.sha256(json.dumps([str(url), state]).encode()).hexdigest()[:16]
    target = cache_home() / key
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (target / file.name).is_file():
            with writing.renamed(target / file.name) as part, file.open("rb") as content, open(part, "wb") as copy:
                shutil.copyfileobj(content, copy, 1 << 24)
    return target


def no_weights(folder: Path) -> UserError:
    """The error for a folder without safetensors files."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return UserError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), which can run code when opened; save the "
            "model with save_pretrained(..., safe_serialization=True) and name that folder."
        )
    return UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; name a folder with safetensors weights.")
