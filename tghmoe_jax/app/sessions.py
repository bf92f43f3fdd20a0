"""Who uses the page: a token for each open page, with the scan, the answers and the folder that belong to it alone."""

import dataclasses
import itertools
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tghmoe_jax.app.folder import remove
from tghmoe_jax.app.jobs import Job
from tghmoe_jax.app.uploads import Choice
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.scan import Scan
from tghmoe_jax.scans.volume import Volume

MOST_SESSIONS = 128
IDLE = 1800.0  # seconds after which a session without a request is ended
UNHURRIED = 120.0  # seconds after which it may be ended for another that needs its room
MOST_ANSWERS = 100  # of one session


@dataclasses.dataclass(eq=False)
class Session:
    """One page. scans: what each checkpoint makes of `volume`, by its place among the readers; answers: each with its
    picture of the evidence, a PNG."""

    number: int
    token: str
    folder: Path
    seen: float
    choices: list[Choice] = dataclasses.field(default_factory=list)
    volume: Volume | None = None
    scans: dict[int, Scan] = dataclasses.field(default_factory=dict)
    kind: str = ""  # of the scan: what it was read from, without a name
    answers: list[tuple[dict[str, Any], bytes | None]] = dataclasses.field(default_factory=list)
    job: Job | None = None
    uploading: bool = False
    assume_hu: bool = False  # of what is sent, as its user said
    asked: list[float] = dataclasses.field(default_factory=list)  # when, for the rate limit
    counted: int = 0  # answers that were given

    @property
    def busy(self) -> bool:
        """Whether files are being sent or something is asked for."""
        return self.uploading or (self.job is not None and not self.job.over)

    def forget_scan(self) -> None:
        """Forgets the scan, not the others of its files."""
        self.volume, self.scans, self.kind = None, {}, ""

    def close_scan(self) -> None:
        """Forgets the scan, not the answers, and empties the folder."""
        self.forget_scan()
        self.choices = []
        remove(self.folder)

    @property
    def size(self) -> int:
        """Bytes of memory that the scan takes."""
        return (
            0
            if self.volume is None
            else self.volume.array.nbytes + sum(scan.prepared.slices.nbytes for scan in self.scans.values())
        )

    def limit(self, most: int, now: float, seconds: float = 60.0) -> None:
        """Counts a request. UserError for more than `most` of them in `seconds`."""
        self.asked = [one for one in self.asked if now - one < seconds]
        if len(self.asked) >= most:
            raise UserError(f"more than {most} requests in {seconds:.0f} seconds; wait a little.")
        self.asked.append(now)


class Sessions:
    """All open pages. `memory`: bytes that their scans may take together; `ended` is called after a page has ended."""

    def __init__(
        self, folder: Path, memory: int, clock: Callable[[], float] = time.monotonic,
        ended: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self._folder, self._memory, self._clock, self._ended = folder, memory, clock, ended
        self._lock, self._numbers = threading.RLock(), itertools.count(1)
        self._open: dict[str, Session] = {}

    def new(self) -> Session:
        """UserError where too many are open."""
        with self._lock:
            self.sweep()
            if len(self._open) >= MOST_SESSIONS:
                self._end_idlest("the server has too many open pages; try again in a few minutes.")
            number, token = next(self._numbers), secrets.token_urlsafe(24)
            session = Session(number, token, self._folder / secrets.token_hex(8), self._clock())
            self._open[token] = session
            return session

    def get(self, token: str) -> Session | None:
        """The session of a token, which is in use from now on."""
        with self._lock:
            self.sweep()
            if session := self._open.get(token):
                session.seen = self._clock()
            return session

    def end(self, session: Session) -> None:
        """Cancels its job, forgets all that it holds and empties its folder."""
        with self._lock:
            self._open.pop(session.token, None)
            if session.job:
                session.job.cancel()
            session.close_scan()
            session.answers.clear()
        self._ended()

    def sweep(self) -> None:
        """Ends what nobody has used for long."""
        with self._lock:
            for session in [one for one in self._open.values() if self._clock() - one.seen > IDLE]:
                self.end(session)

    def end_all(self) -> None:
        with self._lock:
            for session in list(self._open.values()):
                self.end(session)

    def keep(self, session: Session, volume: Volume, scans: dict[int, Scan], kind: str) -> None:
        """Gives a session its scan, where there is room for it. UserError where there is none, and no idle page whose
        scan can go; the session then has no scan. A session that has ended meanwhile gets nothing."""
        with self._lock:
            session.volume, session.scans = None, {}
            need = volume.array.nbytes + sum(scan.prepared.slices.nbytes for scan in scans.values())
            while sum(one.size for one in self._open.values()) + need > self._memory:
                self._end_idlest("the server holds too many scans; try again in a few minutes.", session)
            if session.token in self._open:
                session.volume, session.scans, session.kind = volume, scans, kind
            else:
                remove(session.folder)

    def _end_idlest(self, fault: str, but: Session | None = None) -> None:
        """Ends the page that was idle longest; for the scan of `but`, one that has a scan."""
        others = (one for one in self._open.values() if one is not but and (but is None or one.size))
        idle = [one for one in others if self._clock() - one.seen > UNHURRIED]
        if not idle:
            raise UserError(fault)
        self.end(min(idle, key=lambda one: one.seen))
