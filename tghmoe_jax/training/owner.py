"""One run, one owner: while a command writes into a folder, a file there says which process does.

The file's time is renewed every few seconds. On the same machine an owner that has ended is seen by its process number;
one on another machine (hosts may share a disk) by a file that is not renewed any more.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from etils import epath

from tghmoe_jax import untrusted, writing
from tghmoe_jax.errors import UserError

FILE = ".owner.json"
# What is written there, by a run, an evaluation or the owner.
_WRITTEN = (
    FILE, "config.json", "manifest.json", "params.txt", "model", "checkpoints", "damaged", "metrics.jsonl",
    "bad_steps.jsonl", "eval",
)  # fmt: skip
_BEAT = 10.0  # seconds between two signs of life
_SILENT = 60.0  # seconds without one, after which an owner on another machine is gone


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process: `machine` names the boot and the process namespace, `started` tells it from a later one."""

    host: str
    process: int
    since: str
    machine: str
    started: str
    token: str

    @classmethod
    def this(cls) -> "Owner":
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(socket.gethostname(), os.getpid(), since, machine(), _started(os.getpid()), uuid.uuid4().hex)

    def lives(self) -> bool:
        """Whether a process of this machine is still there."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        return _started(self.process) == self.started


def machine() -> str:
    """Processes with the same value see each other's numbers."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return f"{socket.gethostname()}/{uuid.getnode()}"


def _started(process: int) -> str:
    """When a process of this machine began, in the kernel's own count; empty where that is not known."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


class Hold:
    """`with Hold(folder, flag):` nobody else writes there. UserError where another process does, or nobody can.

    A folder that was made for it and has stayed empty is removed again. `wait` is time.sleep.
    """

    def __init__(self, folder: epath.PathLike, flag: str, wait=time.sleep):
        self._folder, self._flag, self._wait = epath.Path(folder), flag, wait
        self._file, self._remote = self._folder / FILE, "://" in str(folder)
        self._me, self._over, self._made = Owner.this(), threading.Event(), []

    def __enter__(self) -> "Hold":
        writing.refuse_links(self._folder, _WRITTEN, self._flag)
        try:
            if not self._remote:  # an object store has no folders of its own
                self._made = [one for one in (self._folder, *self._folder.parents) if not one.exists()]
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._take()
        except OSError as error:
            self._leave()
            why = error.strerror or error
            raise UserError(f"{self._flag} {self._folder} cannot be written ({why}); name another folder.") from error
        self._beat = threading.Thread(target=self._live, daemon=True)
        self._beat.start()
        return self

    def __exit__(self, *error) -> None:
        self._over.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            if self._read() == self._me:
                self._file.unlink()
        self._leave()

    def check(self) -> None:
        """UserError where another process has taken the folder, as after a long sleep of this machine."""
        if (found := self._read()) != self._me:
            raise UserError(
                f"{self._flag} {self._folder} was taken over by {_named(found)} while this process gave no sign of "
                "life; end one of the two."
            )

    def _take(self) -> None:
        text = json.dumps(dataclasses.asdict(self._me))
        if (found := self._read()) is not None:
            alive = found.lives() if found.machine == self._me.machine else self._renewed(found)
            if alive:
                raise UserError(
                    f"{self._flag} {self._folder} is in use by {_named(found)}; wait until it ends, or name another "
                    "folder."
                )
            self._file.unlink(missing_ok=True)
        if self._remote:
            self._file.write_text(text)
            return
        try:
            with open(self._file, "x") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(
                f"{self._flag} {self._folder} was taken by another command just now; name another folder."
            ) from None

    def _renewed(self, found: Owner) -> bool:
        """Looks for a sign of life of an owner on another machine, until there is one or it is overdue."""
        before, waited = self._state(), 0.0
        while waited < _SILENT:
            self._wait(_BEAT / 5)
            waited += _BEAT / 5
            if (state := self._state()) != before:
                return state is not None
        return False

    def _state(self):
        """What changes with every sign of life; None where the file is gone."""
        try:
            if self._remote:
                return self._file.stat().mtime
            with open(self._file) as file:  # opening asks the file's server anew
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _read(self) -> Owner | None:
        """The owner that the file names; of a damaged one nobody knows the machine."""
        try:
            found = untrusted.read_json(self._file, {"process": int, str: str}) if self._file.exists() else None
            return found and Owner(**found)
        except (ValueError, TypeError):
            return Owner("an unknown host", 0, "an unknown time", "", "", "")

    def _live(self) -> None:
        while not self._over.wait(_BEAT):
            with contextlib.suppress(OSError):
                if self._remote:
                    if self._read() == self._me:
                        self._file.write_text(json.dumps(dataclasses.asdict(self._me)))
                else:
                    os.utime(self._file)

    @contextlib.contextmanager
    def _alone(self):
        """Of two commands of one machine that begin at once, one looks first; other disks may know no such lock."""
        if self._remote:
            yield
            return
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _leave(self) -> None:
        """Removes the folders that were made and have stayed empty."""
        for one in self._made:
            with contextlib.suppress(OSError):
                os.rmdir(one)  # only an empty one


def _named(owner: Owner | None) -> str:
    return f"process {owner.process} on {owner.host} since {owner.since}" if owner else "nobody (its file is gone)"
