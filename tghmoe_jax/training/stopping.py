"""What a signal does to a training: all its processes finish the same step, save and end."""

import contextlib
import ctypes
import os
import signal
import threading

from jax.experimental import multihost_utils

from tghmoe_jax.errors import HEARD, SENT_AGAIN, Stopped
from tghmoe_jax.training import hosts


def stop_at_once() -> None:
    """Signals end this process as if it were alone: where nothing is to be saved. jax's own handler would wait."""
    if hosts.several() and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


class Stop:
    """Whether SIGTERM or Ctrl-C asks the run to save and end. Within `with`, the first of them ends nothing by itself.

    With several processes one signal stops all of them at the same step, which jax agrees on in the background.
    """

    def __init__(self):
        self.asked, self.name = False, "SIGTERM"
        self.calls = 0  # of `at`
        self._breaks = False
        self._before = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self
        if not hosts.several():
            self.asked = HEARD.is_set()  # code that may not be interrupted can have swallowed it
        # With several processes jax's own handler of SIGTERM, in place since the start, must stay.
        for number in (signal.SIGINT,) if hosts.several() else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame) -> None:
        HEARD.set()
        again, self.asked = self.asked and not SENT_AGAIN.is_set(), True
        SENT_AGAIN.clear()
        if not hosts.several():
            self.name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if again:
            self._breaks = False  # the second one ends more than the work
        if again or self._breaks:
            raise Stopped(number)
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def breaking(self):
        """Within it the first signal interrupts, for work that the resumed run does again.

        Of several processes it ends all of them (Stopped goes on from here): they have no common step to stop at.
        """
        self._breaks = bool(self._before)
        with _heard(self._note) if self._breaks and hosts.several() else contextlib.nullcontext():
            try:
                yield
            except Stopped:
                if hosts.several() or not self._breaks:
                    raise
            finally:
                self._breaks = False

    def __exit__(self, *error) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def at(self) -> bool:
        """True when all processes are to stop here; each asks at the same places.

        jax stops several processes at the number after the largest one that any of them has asked with, and that is 0
        before the first. So the calls are counted: the steps of a resumed run would pass that number unseen.
        """
        self.calls += 1
        return multihost_utils.reached_preemption_sync_point(self.calls) if hosts.several() else self.asked


@contextlib.contextmanager
def _heard(note):
    """SIGTERM calls `note`, and afterwards jax's own handler again, which Python does not know and cannot restore."""
    system, jax_handler = ctypes.CDLL(None), ctypes.create_string_buffer(1024)  # room for any `struct sigaction`
    system.sigaction(signal.SIGTERM, None, jax_handler)
    signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        system.sigaction(signal.SIGTERM, jax_handler, None)
