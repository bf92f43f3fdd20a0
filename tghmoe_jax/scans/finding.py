"""The scans of an archive: what lies in a folder and below it."""

import os
from pathlib import Path

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.dicom_files import is_dicom
from tghmoe_jax.scans.itk_formats import NAMES
from tghmoe_jax.scans.picture_folder import is_picture_folder

FILES = (".nii", ".nii.gz", ".npy", ".npz", *NAMES)


def find_scans(root: Path) -> list[str]:
    """Paths below `root` (POSIX, sorted) of every file of a known kind and every folder of DICOM files or pictures.

    A folder that directly holds DICOM files is one scan with all below it, as `read_volume` reads it. Hidden files and
    folders are passed over, and links to folders are not followed. UserError where there is none, where `root` is a
    scan itself, and where something may not be read: nothing is left out in silence.
    """
    found: list[str] = []
    try:
        for folder, folders, names in os.walk(root, onerror=_refuse):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files = [Path(folder, name) for name in names if not name.startswith(".")]
            others = [file for file in files if not file.name.lower().endswith(FILES) and file.is_file()]
            if others and (is_picture_folder(Path(folder)) or any(map(is_dicom, others))):
                if Path(folder) == root:
                    raise UserError(f"--list {root} is itself one scan; name the folder above it, or use --volume.")
                found.append(Path(folder).relative_to(root).as_posix())
                folders.clear()
            else:
                found += [file.relative_to(root).as_posix() for file in files if file not in others]
    except PermissionError as error:
        raise UserError(f"--list {root}: {error.filename} may not be read; change its permissions.") from None
    if not found:
        raise UserError(f"--list {root} holds no scan of a known kind; name another folder, or a CSV file of scans.")
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise error
