"""A CSV file of answers that grows part by part, survives a kill and can be merged from shards.

Beside `answers.csv` lies `answers.csv.json`: what was asked of which model about which list, as digests, and how many
bytes of the file are whole. Both are on the disk before a further part is begun; what stands behind the whole bytes was
cut short by a kill, and is cut off.
"""

import contextlib
import csv
import fcntl
import hashlib
import heapq
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tghmoe_jax import writing
from tghmoe_jax.errors import UserError

FORMAT = 1
OWN = ("parts_done", "bytes", "sha256")  # of the file itself; the other keys say what it answers
BLOCK = 2**20


class AnswerFile:
    """The file `path`, for answers to what `facts` say; opened, locked and cut to its whole parts by `opened`.

    parts_done: parts that are whole.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        self.path, self.facts = path, {"format": FORMAT, **facts}
        self.parts_done, self._bytes, self._hash = 0, 0, hashlib.sha256()

    @contextlib.contextmanager
    def opened(self, header: str) -> Iterator["AnswerFile"]:
        """With the header written. UserError where the file is another's, was changed, or another process writes it."""
        known = read_facts(self.path) if sidecar(self.path).exists() else None
        if known is None and self.path.exists():
            raise UserError(f"--to {self.path} exists already; name a new file.")
        if known is not None and (other := [key for key in self.facts if known.get(key) != self.facts[key]]):
            raise UserError(
                f"--to {self.path} answers something else (another {', '.join(other)}); name a new file, or delete it."
            )
        if known is None:
            self._note()
        with open(self.path, "ab+") as self._file:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process writes {self.path}; let it end, or stop it first.") from None
            if known:
                known = read_facts(self.path)  # another process may have ended in between
                self._cut(known)
            if not self._bytes:
                self._write(header)
                self._note()
            yield self

    def append(self, text: str) -> None:
        """Adds a part: when this returns it is on the disk."""
        self._write(text)
        self.parts_done += 1
        self._note()

    def _cut(self, known: Mapping[str, Any]) -> None:
        whole, left = hashlib.sha256(), known["bytes"]
        self._file.seek(0)
        while left and (block := self._file.read(min(left, BLOCK))):
            whole.update(block)
            left -= len(block)
        if left or (known["bytes"] and whole.hexdigest() != known["sha256"]):
            raise UserError(f"--to {self.path} was changed since it was written; name a new file, or delete that one.")
        self._file.truncate(known["bytes"])
        self.parts_done, self._bytes, self._hash = known["parts_done"], known["bytes"], whole

    def _write(self, text: str) -> None:
        content = text.encode()
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._bytes += len(content)
        self._hash.update(content)

    def _note(self) -> None:
        own = dict(zip(OWN, (self.parts_done, self._bytes, self._hash.hexdigest()), strict=True))
        writing.write(sidecar(self.path), json.dumps(self.facts | own, indent=1) + "\n")


def sidecar(path: Path) -> Path:
    """The file that says what the answers in `path` are."""
    return path.with_name(f"{path.name}.json")


def read_facts(path: Path) -> dict[str, Any]:
    """What lies beside a file of answers. UserError where it is missing or no such file."""
    try:
        found = json.loads(sidecar(path).read_text(encoding="utf-8"))
        whole = found["format"] == FORMAT and all(isinstance(found[key], int) for key in (*OWN[:2], "scans", "parts"))
        shard = [int(number) for number in found["shard"].split("/")]
        if whole and isinstance(found[OWN[2]], str) and len(shard) == 2:
            return found
    except FileNotFoundError:
        raise UserError(f"{sidecar(path)} is missing; keep it beside {path.name}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{sidecar(path)} is damaged or of another version; restore it, or answer {path.name} again.")


def parts_of(parts: int, shard: tuple[int, int]) -> range:
    """The numbers of the parts that shard (I, N), I from 1, answers."""
    return range(shard[0] - 1, parts, shard[1])


def merge(paths: Sequence[Path], to: Path) -> int:
    """Writes the shards of one list as the file that one process would have written; returns its rows.

    UserError where a shard is missing, doubled, unfinished, changed or of something else.
    """
    known = [read_facts(path) for path in paths]
    first, shards = known[0], {}
    for path, facts in zip(paths, known, strict=True):
        number, of = (int(part) for part in facts["shard"].split("/"))
        if other := [key for key in first if key not in (*OWN, "shard") and facts.get(key) != first[key]]:
            raise UserError(f"{path} and {paths[0]} differ in {' and '.join(other)}; merge the shards of one list.")
        if of != int(first["shard"].split("/")[1]) or number in shards:
            raise UserError(f"{path} is shard {facts['shard']} beside {first['shard']}; give each shard once.")
        if facts["parts_done"] < len(parts_of(facts["parts"], (number, of))):
            raise UserError(f"{path} is not finished; run its command again, then merge.")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                raise UserError(f"{path} was changed since it was written; answer that shard again.")
        shards[number] = path
    if missing := [f"{i}/{of}" for i in range(1, of + 1) if i not in shards]:
        raise UserError(f"shard {', '.join(missing)} is missing; name the files of all {of} shards.")
    numbers = [number for number, _ in _rows(shards.values())]
    if sorted(set(numbers)) != list(range(first["scans"])):
        raise UserError(f"{', '.join(map(str, paths))} lack rows of the list; answer the shards again.")
    with open(shards[1], encoding="utf-8", newline="") as file:
        _, header = next(_records(file))
    facts = {key: value for key, value in first.items() if key not in OWN} | {"shard": "1/1"}
    with AnswerFile(to, facts).opened(header) as out:
        for part, rows in itertools.groupby(_rows(shards.values()), key=lambda row: row[0] // first["batch"]):
            text = "".join(text for _, text in rows)
            if part >= out.parts_done:  # of a merge that was killed
                out.append(text)
    return len(numbers)


def _rows(paths: Iterable[Path]) -> Iterator[tuple[int, str]]:
    """The rows of all files by the number of their scan, which rises in each of them."""
    with contextlib.ExitStack() as stack:
        files = [_records(stack.enter_context(open(path, encoding="utf-8", newline=""))) for path in paths]
        yield from (record for record in heapq.merge(*files, key=lambda record: record[0]) if record[0] >= 0)


def _records(file: TextIO) -> Iterator[tuple[int, str]]:
    """(number of the scan, text of the row) of each row; the header has number -1."""
    raw: list[str] = []

    def lines():
        for line in file:
            raw.append(line)
            yield line

    place = None
    for fields in csv.reader(lines(), strict=True):
        number = -1 if place is None else int(fields[place])
        place = fields.index("Volume") if place is None else place
        yield number, "".join(raw)
        raw.clear()
