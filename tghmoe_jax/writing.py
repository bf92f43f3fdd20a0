"""Writes files of a folder: whole or not at all, and never through a link."""

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from tghmoe_jax.errors import UserError


def write(file: epath.PathLike, content: str | bytes) -> None:
    """Replaces a file, whenever the process or the machine stops; text is UTF-8. A link is replaced, not followed.

    The file may be at a URL, where an object is written whole or not at all.
    """
    content = content.encode() if isinstance(content, str) else content
    if "://" in str(file):
        epath.Path(file).write_bytes(content)
        return
    with renamed(file) as part:
        part.write_bytes(content)


@contextlib.contextmanager
def renamed(file: epath.PathLike) -> Iterator[Path]:
    """An empty file of a new name, to be written, which becomes `file` when it is whole; else it is taken away."""
    file = Path(file)
    part = file.with_name(f".{file.name[:99]}.{uuid.uuid4().hex[:8]}.part")
    open(part, "xb").close()  # what another has put there under that name, a link too, is an error
    try:
        yield part
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def refuse_links(folder: epath.PathLike, names: Iterable[str], flag: str) -> None:
    """UserError where one of the entries `names` of a folder, or anything below them, is a link: what is written
    there would land elsewhere. The folder itself may be one."""
    if "://" in str(folder):
        return
    for name in names:
        whole = os.path.join(folder, name)
        below = (os.path.join(at, one) for at, dirs, files in os.walk(whole) for one in (*dirs, *files))
        if link := next((one for one in (whole, *below) if os.path.islink(one)), None):
            raise UserError(
                f"{flag} {folder} holds the link {os.path.relpath(link, folder)}, which leads elsewhere; put the files "
                "themselves there, or name another folder."
            )
