"""Limits that are checked before memory is taken: how much a file of some size can hold, and bounded reads."""

import io
import os
from pathlib import Path
from typing import BinaryIO

from tghmoe_jax.errors import UserError

__all__ = ["DEFLATE", "MAX_PACKING", "POINTER", "check_stored_size", "plain_file", "zip_directory"]

MAX_PACKING = 200  # scans are noisy: packed files hold 2 to 10 bytes for each of theirs, deflate's bombs 1,000
SMALL = 2**26  # 64 MiB: below, only deflate's own limit counts, as synthetic volumes may pack well
DEFLATE = 1032  # bytes that deflate can make of one


_END = b"PK\5\6"  # of a zip file's list
_END64 = b"PK\6\7"  # stands before it where there is a longer list


POINTER = b"version https://git-lfs.github.com/"  # what Git LFS leaves in the place of a file that was not fetched


class _Bounded(io.BufferedReader):
    """A reader that never reserves more than the file has: `read(n)` of the standard library reserves n bytes."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path), 2**16)
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, self.size))


def plain_file(path: Path) -> io.BufferedReader:
    """A file opened for reading, whose reads reserve no more memory than it has bytes. OSError as `open` raises it."""
    return _Bounded(path)


def check_stored_size(stated: int, size: int, packed: bool, name: str, most_packing: int = MAX_PACKING) -> None:
    """Refuse a header that states more bytes than a file of `size` bytes holds, or packs as only a bomb does."""
    if stated > (size * DEFLATE + 2**16 if packed else size):
        raise UserError(f"{name} is cut short: its header states {stated} bytes and it has {size}; copy it again.")
    if packed and stated > max(SMALL, size * most_packing):
        raise UserError(
            f"{name} unpacks from {size} to {stated} bytes, as no scan does: name a scan of real measurements, "
            "or save it unpacked."
        )


def zip_directory(file: BinaryIO) -> tuple[int, int] | None:
    """(number of files, bytes) that a zip file states for its list of files, which `zipfile` reads as a whole.

    None where there is no list, or one of more than 65,535 files or 4 GiB, whose true length stands elsewhere
    (ZIP64). The place in the file changes.
    """
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - 2**16 - 22 - 20))
    tail = file.read(size - start)
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + 22 or tail[max(0, at - 20) : at].startswith(_END64):
        return None
    return int.from_bytes(tail[at + 10 : at + 12], "little"), int.from_bytes(tail[at + 12 : at + 16], "little")
