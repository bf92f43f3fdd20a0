"""Digests of files: written into the folder that they describe, compared before anything there is used.

`digests.json` holds {"sha256": {path below the folder: hex digest}}. A file that differs, is missing, or is not named
there counts as damage; one with an empty digest must only be there. Hidden files, which other programs leave, `*.part`,
which a killed writer leaves, and a model card, which people edit, do not.
"""

import concurrent.futures
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping

from etils import epath

from tghmoe_jax import untrusted, writing
from tghmoe_jax.errors import UserError

FILE = "digests.json"
_LOOSE = (FILE, "README.md", "durations.json")  # the last one: no two preparations take equally long
_CHUNK = 1 << 22
_MOST = 1 << 28  # bytes of digests: of a million files


class Damaged(UserError):
    """`digests.json` itself cannot be read."""


def files(folder: epath.PathLike, below: str = "") -> list[str]:
    """Paths of the files that digests speak of, relative to `folder`, in order."""
    found = []
    for entry in (epath.Path(folder) / below).iterdir():
        name = f"{below}{entry.name}"
        if entry.name.startswith(".") or name.endswith(".part") or name in _LOOSE:
            continue
        found += files(folder, name + "/") if entry.is_dir() else [name]
    return sorted(found)


def of_file(file: epath.PathLike) -> str:
    whole = hashlib.sha256()
    with epath.Path(file).open("rb") as content:
        while chunk := content.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest()


def of_files(folder: epath.PathLike, names: Iterable[str]) -> dict[str, str]:
    """{name: digest}, empty for a file that cannot be read. Several at once: hashing lets other threads run."""

    def one(name: str) -> str:
        try:
            return of_file(epath.Path(folder) / name)
        except OSError:
            return ""

    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def write(folder: epath.PathLike, found: Mapping[str, str]) -> None:
    writing.write(epath.Path(folder) / FILE, json.dumps({"sha256": dict(sorted(found.items()))}, indent=1) + "\n")


def of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read(folder: epath.PathLike) -> dict[str, str] | None:
    """{name: digest}; None where the folder has none. Damaged where they are not whole."""
    file = epath.Path(folder) / FILE
    if not file.exists():
        return None
    try:
        return untrusted.read_json(file, {"sha256": {str: str}}, most=_MOST)["sha256"]
    except (UserError, LookupError):
        raise Damaged(f"{file} is not whole; copy its folder again.") from None


def problems(
    folder: epath.PathLike,
    of: Callable[[str], bool] = lambda name: True,
    share: tuple[int, int] = (0, 1),
    unread: tuple[str, ...] = (),
) -> list[str]:
    """What is wrong with the files `of` which it is asked: `NAME has changed` and the like.

    With `share` (i, n) only every n-th file is hashed, from the i-th on. Files that end in one of `unread` have to be
    there and are not hashed. Empty for a folder without digests.
    """
    try:
        expected = read(folder)
    except Damaged:
        return [f"{FILE} is not whole"]
    if expected is None:
        return []
    there = set(files(folder))
    wanted = sorted(name for name in there | set(expected) if of(name))
    both = (name for name in wanted[share[0] :: share[1]] if name in there and name in expected)
    found = of_files(folder, (name for name in both if not name.endswith(unread)))
    result = [f"{name} is missing" for name in wanted if name not in there]
    result += [f"{name} does not belong there" for name in wanted if name not in expected]
    differ = (name for name, digest in found.items() if expected[name] and digest != expected[name])
    return result + [f"{name} {'has changed' if found[name] else 'cannot be read'}" for name in differ]


def tell_absence(folder: epath.PathLike) -> None:
    if not (epath.Path(folder) / FILE).exists():
        print(f"{folder} has no digests (an earlier version wrote it): damage may go unnoticed", file=sys.stderr)


def told(wrong: list[str]) -> str:
    """The first problems in a few words."""
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
