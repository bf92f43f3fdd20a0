"""Reads a scan of any known kind into a canonical volume."""

from pathlib import Path

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.arrays import read_array
from tghmoe_jax.scans.bounds import POINTER, plain_file
from tghmoe_jax.scans.dicom import read_dicom
from tghmoe_jax.scans.dicom_files import is_dicom
from tghmoe_jax.scans.itk_formats import NAMES, read_itk
from tghmoe_jax.scans.nifti import read_nifti
from tghmoe_jax.scans.paths import as_stored
from tghmoe_jax.scans.picture_folder import is_picture_folder, read_pictures
from tghmoe_jax.scans.volume import Volume, check_place


def read_volume(path: str | Path, series: int | None = None, assume_hu: bool = False) -> Volume:
    """Read a scan: NIfTI (.nii, .nii.gz), NRRD or MetaImage (.nrrd, .nhdr, .mha, .mhd), a DICOM folder, DICOMDIR or
    multi-frame file, an M3D array (.npy, .npz) or a folder of numbered pictures (M3D's raw form).

    `series` chooses, counting from 1, among the series of a DICOM folder. `assume_hu` reads values that do not look
    like HU, with a warning. Raises UserError in one sentence that names the path and the remedy; see the readers for
    what they refuse.
    """
    path = Path(path)
    path = as_stored(Path(path.anchor), path.parts[1:] if path.anchor else path.parts)
    if not path.is_dir() and not path.is_file():  # a pipe or a device would be waited for without end
        what = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: name a NIfTI, NRRD, MetaImage or .npy file or a DICOM folder.")
    try:
        volume = _read(path, series, assume_hu)
    except PermissionError:
        raise UserError(f"{path} may not be read: change its permissions.") from None
    if volume.affine is not None:
        check_place(volume.affine, str(path))
    return volume


def _read(path: Path, series: int | None, assume_hu: bool) -> Volume:
    """The volume by the reader of its kind, which goes by the name of a file and by what a folder holds."""
    name, folder = path.name.lower(), path.is_dir()
    one_file = not folder and name.endswith((".nii", ".nii.gz", ".npy", ".npz", *NAMES))
    if not folder and _is_pointer(path):
        raise UserError(f"{path} is a pointer of Git LFS in the place of a file: fetch it with git lfs pull.")
    pictures = folder and is_picture_folder(path)
    if series is not None and (one_file or pictures):
        raise UserError(f"--series applies to DICOM folders and {path} is a single volume: leave it out.")
    if pictures:
        return read_pictures(path)
    if folder or (not one_file and is_dicom(path)):
        return read_dicom(path, series, assume_hu)
    if name.endswith((".nii", ".nii.gz")):
        return read_nifti(path, assume_hu)
    if name.endswith((".npy", ".npz")):
        return read_array(path)
    if name.endswith(NAMES):
        return read_itk(path, assume_hu)
    raise UserError(
        f"{path} is not a known kind of scan: name a .nii, .nii.gz, .nrrd, .mha, .npy or .npz file or a DICOM folder."
    )


def _is_pointer(path: Path) -> bool:
    with plain_file(path) as file:
        return file.read(len(POINTER)) == POINTER
