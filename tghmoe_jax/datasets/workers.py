"""Work on many volumes in processes: a bounded number in flight, progress with the time left, a dead worker noticed."""

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tghmoe_jax.errors import UserError

REPORT_SECONDS = 5.0


def as_completed(function: Callable, job: tuple, todo: Sequence[tuple], workers: int) -> Iterator[Any]:
    """`function(*job, *one)` of each of `todo` as it is done; with one worker in this process.

    UserError names the last values of what was in work where a process died.
    """
    if workers <= 1:
        yield from (function(*job, *one) for one in todo)
        return
    running: dict[concurrent.futures.Future, tuple] = {}
    try:
        yield from _pooled(function, job, todo, workers, 2 * workers, running, concurrent.futures.FIRST_COMPLETED)
    except BrokenProcessPool:
        names = ", ".join(sorted(str(one[-1]) for one in running.values()))
        raise UserError(
            f"a worker process died at one of {names}; run the command again with "
            "fewer --workers if memory ran out, or take that volume out of the data set."
        ) from None


def in_order(
    function: Callable, job: tuple, todo: Sequence[tuple], workers: int, ahead: int, died: Callable[..., Any]
) -> Iterator[Any]:
    """`function(*job, *one)` of each of `todo` in its order, at most `ahead` of them begun and not yet taken, in
    processes; with no worker in this process, one by one.

    Where a process dies the oldest of what was in work is tried alone; if it dies again, `died(*one)` takes its place.
    """
    if workers <= 0:
        yield from (function(*job, *one) for one in todo)
        return
    at = 0
    while at < len(todo):
        try:
            with contextlib.closing(_pooled(function, job, todo[at:], workers, ahead, {}, None)) as results:
                for result in results:
                    yield result
                    at += 1
        except BrokenProcessPool:
            try:
                (result,) = _pooled(function, job, todo[at : at + 1], 1, 1, {}, None)
            except BrokenProcessPool:
                result = died(*todo[at])
            yield result
            at += 1


def _pooled(
    function: Callable, job: tuple, todo: Sequence[tuple], workers: int, ahead: int, running: dict, when: str | None
) -> Iterator[Any]:
    """Results as they are done, or in the order of `todo` where `when` is None. BrokenProcessPool leaves `running`."""
    # Fresh interpreters: a fork after threads have started can hang.
    context = multiprocessing.get_context("spawn")
    with _without_interrupts():
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (function, job))
    waiting = iter(todo)
    try:
        while True:
            with _without_interrupts():
                while len(running) < ahead and (one := next(waiting, None)) is not None:
                    running[pool.submit(_here, *one)] = one
            if not running:
                return
            done = [next(iter(running))] if when is None else concurrent.futures.wait(running, return_when=when).done
            for future in done:
                result = future.result()
                running.pop(future)
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started here never hear Ctrl-C: it is for the one that started them to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_work: tuple[Callable, tuple] = (print, ())


def _start(function: Callable, job: tuple) -> None:
    """In a worker: keeps the job, and ends the worker when the process that started it is gone."""
    global _work
    _work = function, job
    parent = multiprocessing.parent_process().sentinel

    def watch():
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _here(*one) -> Any:
    function, job = _work
    return function(*job, *one)


class Progress:
    """Reports progress every few seconds: how many, how fast, how long it will take."""

    def __init__(self, total: int, done: int, workers: int, say: Callable[[str], None]):
        self.total, self.done, self.first, self.rejected, self.say = total, done, done, 0, say
        self.workers, self.busy, self.reported = workers, 0.0, time.monotonic()
        self.begun: float | None = None
        if done:
            say(f"{done} of {total} volumes are there already")

    def add(self, rejected: int, took: float, count: int = 1) -> None:
        """Counts volumes that cost a worker so many seconds together."""
        now = time.monotonic()
        if self.begun is None:
            self.begun = now - took  # the workers are up: until then nothing was to be measured
        self.done += count
        self.rejected += rejected
        self.busy += took
        if now - self.reported >= REPORT_SECONDS:
            self.reported = now
            count = self.done - self.first
            # The first volumes end together, so early on their own seconds tell; later also what lies between them.
            rate = count / max(self.busy / self.workers, now - self.begun if count > 20 * self.workers else 0, 1e-9)
            left = int((self.total - self.done) / rate)
            self.say(
                f"{self.done} of {self.total} volumes, {self.rejected} rejected, {rate:.1f} a second, "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
            )

    def end(self) -> None:
        self.say(f"{self.done} of {self.total} volumes, {self.rejected} rejected in this run")
