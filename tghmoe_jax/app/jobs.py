"""A bounded queue of jobs, and the thread that does them one after another.

Reading a scan and asking a model each take a core and memory, so one thread reads and another asks, each in the order
of arrival. A session has at most one job, which it can cancel: at once while it waits, else before its next step.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from tghmoe_jax.errors import UserError, of_disk

_log = logging.getLogger(__name__)


class Cancelled(Exception):
    """The one who asked does not want the answer any more."""


class QueueFull(UserError):
    """More jobs wait than the server takes."""


@dataclasses.dataclass(eq=False)
class Job:
    """`work(job)` and what became of it. state: waiting, working, done, failed, cancelled. `what` and `who` are for
    the log: a word and the number of a session. `undo` is called before it is over otherwise than done."""

    work: Callable[["Job"], Any]
    what: str
    who: int
    undo: Callable[[], Any] = lambda: None
    state: str = "waiting"
    step: str = ""
    result: Any = None
    error: str = ""
    worker: "Worker | None" = None
    begun: float = dataclasses.field(default_factory=time.monotonic)
    _stop: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._stop.is_set()

    def at(self, step: str) -> None:
        """Says what is done next. Cancelled where nobody waits for it."""
        if self.unwanted:
            raise Cancelled
        self.step = step

    @property
    def place(self) -> int:
        """How many jobs are done before this one, the present one counted; 0 where it is being done or over."""
        return self.worker.place(self)

    def cancel(self) -> None:
        """A waiting job is over at once, a running one before its next step."""
        self._stop.set()
        self.worker.withdraw(self)


class Worker:
    """A thread that does jobs one by one; at most `room` wait. `worded` makes the sentence of an error for the page,
    `tidy` is called on the thread where `tidy_soon` asks for it."""

    def __init__(
        self, room: int, worded: Callable[[Exception], str] = str, tidy: Callable[[], None] = lambda: None
    ):  # fmt: skip
        self.room, self._worded, self._tidy, self._untidy = room, worded, tidy, False
        self._waiting: collections.deque[Job] = collections.deque()
        self._spare: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Puts a job at the end. QueueFull where too many wait."""
        with self._changed:
            if len(self._waiting) >= self.room:
                raise QueueFull(f"the queue is full ({self.room} requests wait); ask again in a minute.")
            job.worker = self
            self._waiting.append(job)
            self._changed.notify()
        return job

    def spare(self, job: Job) -> None:
        """Does a job of the server's own once nobody waits."""
        with self._changed:
            self._spare.append(job)
            self._changed.notify()

    def tidy_soon(self) -> None:
        """Calls `tidy` after the present job."""
        with self._changed:
            self._untidy = True
            self._changed.notify()

    def place(self, job: Job) -> int:
        """`Job.place`."""
        with self._changed:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    def withdraw(self, job: Job) -> None:
        """Ends a job that waits."""
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.undo()
        job.work, job.state = None, "cancelled"

    def close(self, seconds: float) -> bool:
        """Ends the thread after its present job, waited for `seconds` at most; what waits is cancelled. Whether the
        present job goes on."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                job.state = "cancelled"
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(seconds)
        return self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._spare or self._untidy or self._closed)
                if untidy := self._untidy:
                    self._untidy = False
                    self._tidy()
                if self._closed:
                    return
                job = None if untidy else (self._waiting or self._spare).popleft()
                if job:
                    job.state = "working"
            if job:
                self._do(job)

    def _do(self, job: Job) -> None:
        ended = self._worked(job)
        if ended != "done":
            job.undo()
        job.work, job.state = None, ended  # what it held can go
        _log.info("session %d: %s %s after %.1f s", job.who, job.what, ended, time.monotonic() - job.begun)

    def _worked(self, job: Job) -> str:
        """Does a job; the state in which it ends."""
        try:
            job.at("")
            job.result = job.work(job)
            job.at("")  # an answer that nobody waits for is not kept
            return "done"
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end the server, nor be shown in full
            job.result = None
            if job.unwanted:  # whatever went wrong then, as a file that was removed
                return "cancelled"
            job.error = self._sentence(error, job)
            return "failed"

    def _sentence(self, error: Exception, job: Job) -> str:
        if isinstance(error, UserError):
            return self._worded(error)
        if isinstance(error, MemoryError):
            return "the server has not enough memory for this scan; crop it."
        _log.error("%s failed with %s", job.what, type(error).__name__)
        if of_disk(error):
            return "the disk of the server is full or cannot be written; tell who runs it."
        return "something went wrong on the server; the scan or the question is not kept."
