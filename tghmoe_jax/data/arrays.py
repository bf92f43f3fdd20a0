"""Volumes stored as NumPy files (.npy, .npz): M3D's pre-windowed pictures in the unit interval.

Nothing is unpickled. Such files state neither spacing nor orientation, so neither is invented.
"""

import zipfile
from pathlib import Path

import numpy as np

from tghmoe_jax.data.canonical import Volume, check_canonical_shape, check_finite, check_shape
from tghmoe_jax.errors import UserError


def read_array(path: Path) -> Volume:
    """Read a (1, D, H, W) or (D, H, W) array with values in 0..1. Raises UserError for any other content."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
                if len(members) != 1:
                    raise UserError(f"{path} holds {len(members)} arrays where one volume is expected: save one array.")
                with archive.open(members[0]) as file:
                    array = _load(file, path)
        else:
            with path.open("rb") as file:
                array = _load(file, path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a plain NumPy array (or holds pickled objects): save the volume with numpy.save as float32."
        ) from None
    array = np.ascontiguousarray(array, np.float32)
    low, high = check_finite(array, str(path))
    if low < 0 or high > 1:
        raise UserError(
            f"{path} runs from {low:g} to {high:g} where a NumPy volume lies in 0 to 1 (M3D): "
            "give a scan in HU as NIfTI or DICOM, which also state spacing and orientation."
        )
    check_canonical_shape(array.shape, str(path))
    size = " x ".join(str(n) for n in array.shape)
    history = (f"NumPy, {size}, unit interval as stored", "spacing and orientation unknown")
    return Volume(array, "unit-interval", None, "as stored", "unknown, cut by its source", history)


def _load(file, path: Path) -> np.ndarray:
    """The array without its channel axis; the header is judged before the voxels are read."""
    version = np.lib.format.read_magic(file)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError("unknown .npy version")
    shape, _, dtype = reader(file)
    inner = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    check_shape(inner, str(path))
    if dtype.hasobject:
        raise ValueError("pickled objects")
    if dtype.kind not in "biuf":
        raise UserError(f"{path} holds {dtype} where real numbers are expected: save the volume as float32.")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False).reshape(inner)
