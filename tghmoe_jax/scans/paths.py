"""Paths that data files name: none may lead outside its root."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from tghmoe_jax.errors import UserError

__all__ = ["as_stored", "inside"]

MAX_PATH = 4096  # what file systems take; longer text in a path column is damage
_SHOWN = 120


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, proven to lie under `root`, links followed; it need not exist.

    Where the root lies in a cache of the Hugging Face hub, whose files are links, they may lead into that cache too.
    For paths that come from a manifest, a CSV or a DICOMDIR, never for what a user types. Backslashes are separators
    too, as Windows writes them. Raises UserError for an absolute path (POSIX, drive or share), `..`, a link that leads
    out or in a circle, a NUL or another control character, and an empty or overlong text.
    """
    text = str(relative)
    shown = repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
    if not text.strip():
        raise UserError(f"a path under {root} is empty: name a file relative to that folder.")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise UserError(f"the path {shown} holds a control character: name a file under {root} in plain text.")
    if len(text) > MAX_PATH:
        raise UserError(f"the path {shown} has {len(text)} characters: name a file under {root} in {MAX_PATH} at most.")
    windows = PureWindowsPath(text)
    if windows.drive or windows.root or PurePosixPath(text).is_absolute():
        raise UserError(f"the path {shown} is absolute: name a file relative to {root}.")
    if ".." in windows.parts:
        raise UserError(f"the path {shown} climbs out of its folder with '..': name a file under {root}.")
    root = Path(root)
    path = as_stored(root, windows.parts)
    try:
        resolved, base = path.resolve(), root.resolve()
    except (OSError, RuntimeError):  # a circle of links is a RuntimeError up to Python 3.12
        raise UserError(
            f"the path {shown} cannot be followed (a circle of links?): name a file under {root}."
        ) from None
    if not resolved.is_relative_to(base) and not any(map(resolved.is_relative_to, hub_blobs(base))):
        raise UserError(f"the path {shown} leads out of {root} through a link: copy the file into that folder.")
    return path


def hub_blobs(base: Path) -> list[Path]:
    """Where the files of `REPOSITORY/snapshots/COMMIT/...` lie in a cache of the Hugging Face hub; else empty."""
    snapshots = next((folder for folder in base.parents if folder.name == "snapshots"), None)
    return [snapshots.parent / "blobs"] if snapshots and (snapshots.parent / "blobs").is_dir() else []


def as_stored(root: Path, parts: Sequence[str]) -> Path:
    """`root` and parts, each spelled as stored: macOS writes an accent as a letter of its own (NFD), others do not.

    What does not exist stays as it is.
    """
    path = root
    for part in parts:
        forms = (
            [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))] if not part.isascii() else [part]
        )
        path = next((path / form for form in forms if os.path.lexists(path / form)), path / part)
    return path
