"""The private folder of a server: what is uploaded lies there until it is read, and never longer than the server."""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "tghmoe-app-"


@contextlib.contextmanager
def private_folder(parent: str | Path | None = None) -> Iterator[Path]:
    """A new folder that only this user may open, removed at the end with all it holds.

    What servers of this user that were killed have left under `parent` (default: the temporary folder) is removed
    first. A lock that ends with its process, however it ends, tells such a folder from one in use.
    """
    parent = Path(parent or tempfile.gettempdir())
    for left in parent.glob(f"{PREFIX}*"):
        _remove_if_left(left)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with contextlib.suppress(OSError):  # another server that starts just now takes it for one that was left
            lock = _locked(folder)
            if folder.exists():
                break
            os.close(lock)
    try:
        yield folder
    finally:
        remove(folder)
        os.close(lock)


def remove(folder: Path) -> None:
    """Removes a folder, if there is one. It gets another name first: a thread that is still writing there would find it
    half empty and leave files in it."""
    gone = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # there is none
        folder.rename(gone)
    for left in (gone, folder):
        shutil.rmtree(left, ignore_errors=True)


def _locked(folder: Path) -> int:
    """An open descriptor of a folder with its lock. OSError where another process holds it, or it is a link."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return
        lock = _locked(folder)
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
