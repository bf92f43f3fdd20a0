"""Uploads of a browser: files without names, and the scans among them.

A body is a length (4 bytes, big-endian), a list in JSON of that length, and the files behind one another. The list
holds the ending and the size of each. No name of a file is sent; endings are those of a fixed list, files are numbered.
"""

import asyncio
import dataclasses
import json
import re
import stat
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path, PureWindowsPath

from tghmoe_jax import untrusted
from tghmoe_jax.errors import UserError, of_disk
from tghmoe_jax.scans.bounds import check_stored_size, zip_directory
from tghmoe_jax.scans.dicom import series_of
from tghmoe_jax.scans.dicom_files import MAX_FILES

ENDINGS = (".nii.gz", ".nii", ".npy", ".npz", ".nrrd", ".mha", ".zip")  # each alone is a scan; the rest is DICOM
MOST_LIST = 2**20  # bytes of the list before the files
MOST_DIRECTORY = 2**23  # bytes of a zip file's own list
SILENT = 30.0  # seconds without a byte, after which an upload is given up
SLOWEST = 2**16  # bytes in a second that an upload must keep to; few can be sent at the same time


@dataclasses.dataclass(frozen=True)
class Choice:
    """One scan of an upload: a file or a folder of DICOM files, and which of its series; `label` names no patient."""

    path: Path
    series: int | None
    label: str


def ending_of(name: str) -> str:
    """The one of ENDINGS that a name has, else that of DICOM files."""
    return next((ending for ending in ENDINGS if name.lower().endswith(ending)), ".dcm")


def place(folder: Path, number: int, ending: str) -> Path:
    """Where file `number` of an upload is put."""
    return folder / ("dicom" if ending == ".dcm" else "files") / f"{number:05d}{ending}"


def check_length(length: int, most: int) -> None:
    """UserError for an upload of more than `most` bytes."""
    if length > most:
        raise UserError(f"the files have {length} bytes, more than the {most} that this server takes; crop the scan.")


async def receive(chunks: AsyncIterator[bytes], length: int, folder: Path, most: int) -> None:
    """Writes the files of a body of `length` bytes into a new folder. UserError where it is not as described above, or
    larger than `most` bytes, which is seen before anything is written."""
    check_length(length, most)
    body = _Body(chunks)
    size = int.from_bytes(await body.take(4))
    if size > min(MOST_LIST, length):
        raise UserError("the list of the files is too long; send fewer files, or a zip file.")
    try:
        files = json.loads(await body.take(size))
    except (ValueError, RecursionError):
        files = None
    if untrusted.fault(files, [[str, range(most + 1)]]) or not 0 < len(files) <= MAX_FILES:
        raise UserError(f"the list of the files is not understood; send 1 to {MAX_FILES} files with this page.")
    if 4 + size + sum(one for _, one in files) != length:
        raise UserError("the sizes of the files are not those of what was sent; choose them again.")
    for name in ("dicom", "files"):
        (folder / name).mkdir(parents=True)
    for number, (ending, size) in enumerate(files):
        with place(folder, number, ending_of(ending)).open("xb") as file:
            while size:
                part = await body.some(min(size, 2**20))
                file.write(part)
                size -= len(part)


class _Body:
    """The bytes of a request in the pieces that are asked for."""

    def __init__(self, chunks: AsyncIterator[bytes]):
        self._chunks, self._left = chunks, b""
        self._begun, self._came = time.monotonic(), 0

    async def some(self, most: int) -> bytes:
        """At least one byte and at most `most`."""
        while not self._left:
            late = time.monotonic() - self._begun - self._came / SLOWEST
            if late > SILENT:
                raise UserError("the files came too slowly; send them over a faster connection.")
            try:
                self._left = await asyncio.wait_for(anext(self._chunks), SILENT)
            except (TimeoutError, StopAsyncIteration):
                raise UserError("the files were cut short on the way; send them again.") from None
            self._came += len(self._left)
        part, self._left = self._left[:most], self._left[most:]
        return part

    async def take(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            found += await self.some(size - len(found))
        return found


# ---- what is in it ---------------------------------------------------------------------------------------------------


def choices_of(folder: Path, most: int) -> list[Choice]:
    """The scans of an upload, its zip files unpacked to at most `most` bytes. UserError where there is none."""
    first = sum(1 for _ in folder.glob("*/*"))
    for archive in sorted((folder / "files").glob("*.zip")):
        count, size = unpack(archive, folder, most, first)
        first, most = first + count, most - size
        archive.unlink()
    files = [Choice(file, None, f"a {ending_of(file.name)} file") for file in sorted((folder / "files").iterdir())]
    dicom = folder / "dicom"
    if not any(dicom.iterdir()):
        return files or _nothing()
    try:
        return files + [Choice(dicom, number, label) for number, label in series_of(dicom)]
    except UserError:
        if not files:
            raise
        return files  # beside a scan, a text that is no DICOM


def _nothing() -> list[Choice]:
    raise UserError("the zip file holds no file; pack the scan again.")


def unpack(archive: Path, folder: Path, most: int, first: int = 0) -> tuple[int, int]:
    """Puts the files of a zip file beside those of the upload, numbered from `first`; how many, and their bytes.

    UserError for what no zip file of a scan holds: names that lead out of it, links, passwords, zip files, more than
    `most` bytes or than these can be packed from, and for more than MAX_FILES files of an upload.
    """
    size = archive.stat().st_size
    _check_directory(archive)
    try:
        with zipfile.ZipFile(archive) as packed:
            infos = [info for info in packed.infolist() if not info.is_dir()]
            _check_entries(infos, size, most)
            kept = [info for info in infos if not _hidden(info.filename)]
            if first + len(kept) > MAX_FILES + 1:
                raise UserError(f"the zip files hold more than {MAX_FILES} files; pack the scan alone.")
            for number, info in enumerate(kept, first):
                with packed.open(info) as source, place(folder, number, ending_of(info.filename)).open("xb") as file:
                    _copy(source, file, info.file_size)
            return len(kept), sum(info.file_size for info in kept)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile raises anything on damaged files, and quotes names
        if of_disk(error):
            raise
        raise UserError("the zip file is damaged or cut short; pack the scan again.") from None


def _check_directory(archive: Path) -> None:
    """Refuse a list of files too long to be read, before it is."""
    with archive.open("rb") as file:
        found = zip_directory(file)
    if found is None:
        raise UserError("the zip file is damaged, cut short or holds too many files; pack the scan again.")
    if found[0] > MAX_FILES or found[1] > MOST_DIRECTORY:
        raise UserError(f"the zip file holds more than {MAX_FILES} files; pack the scan alone.")


def _check_entries(infos: list[zipfile.ZipInfo], size: int, most: int) -> None:
    if len(infos) > MAX_FILES:
        raise UserError(f"the zip file holds more than {MAX_FILES} files; pack the scan alone.")
    for info in infos:
        name = PureWindowsPath(info.filename)
        if name.drive or name.root or ".." in name.parts:
            raise UserError("the zip file names a file outside of its folder; pack the scan again.")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError("the zip file holds a link; pack the files themselves.")
        if info.flag_bits & 1:
            raise UserError("the zip file has a password; pack the scan without one.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError("the zip file is packed in an unusual way; pack the scan with plain deflation.")
        if info.filename.lower().endswith(".zip"):
            raise UserError("the zip file holds another zip file; unpack that one and send it alone.")
    total = sum(info.file_size for info in infos)
    check_stored_size(total, size, True, "the zip file")
    if total > most:
        raise UserError(f"the zip file unpacks to {total} bytes, more than the {most} of this server; crop the scan.")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PureWindowsPath(name).parts)


def _copy(source, file, size: int) -> None:
    """ValueError where there is another number of bytes than stated."""
    head = source.read(4)
    if head[:4] == b"PK\3\4" and not file.name.endswith(".npz"):
        raise UserError("the zip file holds another zip file; unpack that one and send it alone.")
    file.write(head)
    left = size - len(head)
    while part := source.read(min(2**20, left + 1)):
        left -= len(part)
        if left < 0:
            raise ValueError("longer than stated")
        file.write(part)
    if left:
        raise ValueError("shorter than stated")


def plainly(error: Exception, folder: Path) -> str:
    """The sentence of an error without the paths of this machine, and with the words of the page for flags."""
    text = re.sub(re.escape(str(folder)) + r"[\w./-]*", "the scan", str(error))
    for flag, words in _WORDS.items():
        text = re.sub(rf"{re.escape(flag)}(?![\w-])", words, text)
    return text


_WORDS = {
    ", as in --choices 'axial|coronal'": "; write them as axial | coronal",
    "--question with --choices": "the question with its choices",
    "--question": "the question", "--choices": "the field of choices",
    "--report": "a report", "--min-accuracy": "the accuracy asked for", "--new-tokens": "the limit of the answer",
    "give predict --assume-hu": "tick the field for values that are HU",
}  # fmt: skip
