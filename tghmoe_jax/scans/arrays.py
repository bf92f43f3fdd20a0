"""Volumes stored as NumPy files (.npy, .npz): M3D's pre-windowed pictures in the unit interval.

Nothing is unpickled. Such files state neither spacing nor orientation, so neither is invented.
"""

import contextlib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.bounds import check_stored_size, plain_file, zip_directory
from tghmoe_jax.scans.volume import Volume, check_canonical_shape, check_finite, check_shape

_MOST_DIRECTORY = 2**20  # bytes of the list of arrays in a .npz file


def read_array(path: Path) -> Volume:
    """Read a (1, D, H, W) or (D, H, W) array with values in 0..1. Raises UserError for any other content."""
    try:
        with _opened(path) as (file, size, packed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's parser quotes what it reads
            array = _load(file, size, packed, path)
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - a damaged header reaches NumPy's parser, zipfile and zlib, which raise anything
        raise UserError(
            f"{path} is not a plain NumPy array (or holds pickled objects): save the volume with numpy.save as float32."
        ) from None
    low, high = check_finite(array, str(path))
    if low < 0 or high > 1:
        raise UserError(
            f"{path} runs from {low:g} to {high:g} where a NumPy volume lies in 0 to 1 (M3D): "
            "give a scan in HU as NIfTI or DICOM, which also state spacing and orientation."
        )
    sizes = " x ".join(str(n) for n in array.shape)
    history = (f"NumPy, {sizes}, unit interval as stored", "spacing and orientation unknown")
    return Volume(array, "unit-interval", None, "as stored", "unknown, cut by its source", history)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int, bool]]:
    """The array's stream, the bytes that the file spends on it, and whether they are packed."""
    with plain_file(path) as raw:
        if not zipfile.is_zipfile(raw):
            raw.seek(0)
            yield raw, path.stat().st_size, False
            return
        found = zip_directory(raw)
        if found is None or found[1] > _MOST_DIRECTORY:
            raise UserError(f"{path} holds more arrays than one volume is: save one array.")
        with zipfile.ZipFile(raw) as archive:
            members = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            if len(members) != 1:
                raise UserError(f"{path} holds {len(members)} arrays where one volume is expected: save one array.")
            if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{path} is packed in a way that NumPy does not write: save it with numpy.savez.")
            with archive.open(members[0]) as file:
                packed = members[0].compress_type == zipfile.ZIP_DEFLATED
                yield file, min(members[0].compress_size, path.stat().st_size), packed


def _load(file: BinaryIO, size: int, packed: bool, path: Path) -> np.ndarray:
    """The array float32 without its channel axis; the header is judged before memory is taken for the voxels."""
    if np.lib.format.read_magic(file) != (1, 0):  # later versions are for structures, and state sizes up to 4 GiB
        raise ValueError("not a plain array")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    inner = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    check_shape(inner, str(path))
    if dtype.hasobject:
        raise ValueError("pickled objects")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise UserError(f"{path} holds {dtype.kind}-type values where real numbers are expected: save it as float32.")
    check_canonical_shape(inner, str(path))
    check_stored_size(int(np.prod(inner)) * dtype.itemsize, size, packed, str(path))
    file.seek(0)
    try:
        array = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError:
        raise UserError(f"{path} is cut short: copy or save it again.") from None
    return np.ascontiguousarray(array.reshape(inner), np.float32)
