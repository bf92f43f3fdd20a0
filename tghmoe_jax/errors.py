"""How commands end before they are done: by a fault that the user can fix, by a signal, or by a disk."""

import argparse
import errno
import functools
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from tghmoe_jax import terminal

PIPE_CLOSED = 141  # exit code: nobody reads the output any more, as `| head` does (128 + SIGPIPE)
PREEMPTED = 75  # exit code: stopped by a signal, and the same command goes on (EX_TEMPFAIL)
HEARD = threading.Event()  # the main thread has heard a signal
SENT_AGAIN = threading.Event()  # the next signal is one that was raised where nothing can be (`_send_again`)
_GRACE = 15.0  # seconds that a signal waits for the main thread, which may be compiling
_AT_ONCE = 2.0  # seconds that a second signal leaves it
_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR,
    errno.EISDIR, errno.ESTALE, errno.EMFILE, errno.ENAMETOOLONG,
)  # fmt: skip


class UserError(ValueError):
    """A fault in what the user gave. The message is one sentence that names the file or flag and the remedy.

    `code` is the exit code of a command that it ends. What the message quotes of a file stays on its one line.
    """

    code = 2

    def __str__(self) -> str:
        return terminal.one_line(super().__str__())


class Diverged(UserError):
    """Too many steps in a row whose loss or gradient is not finite (EX_DATAERR): starting again does not help."""

    code = 65


class Stopped(BaseException):
    """A signal asks this process to end; raised in the main thread, wherever that is. `code`: 130 or 143."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {_SIGNALS[number]}")
        self.code = 128 + number


class CommandParser(argparse.ArgumentParser):
    """Reports faults of a command line as UserError instead of printing the usage."""

    def error(self, message: str):
        raise UserError(f"{message[:1].lower()}{message[1:]}".rstrip(".") + "; see --help for the flags.")


def command(main: Callable[[list[str]], int]) -> Callable[..., int]:
    """Makes a command of `main(argv)`: a UserError becomes one sentence on stderr and its exit code.

    Without an argument the command line of the process is read. With --debug the traceback is shown too.
    """

    @functools.wraps(main)
    @terminal.shielded()
    def run(argv: list[str] | None = None) -> int:
        argv = sys.argv[1:] if argv is None else argv
        try:
            return main(argv)
        except UserError as error:
            if "--debug" in argv:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return error.code

    return run


def of_disk(error: BaseException, file: str = "a file") -> str:
    """The sentence for an error of a disk: full, read-only, another user's; empty for any other error.

    `file` is named where the error names none.
    """
    if not isinstance(error, OSError) or error.errno not in _DISK:
        return ""
    file = terminal.one_line(str(error.filename or file))
    return f"{file} cannot be read or written ({error.strerror}); make room there, or name another folder."


def end_at_once(code: int) -> None:
    """Until `run_command` takes over, SIGTERM and Ctrl-C end this process with one line and `code`."""

    def end(number: int, frame) -> None:
        print(_said(Stopped(number), code), file=sys.stderr, flush=True)
        os._exit(code)

    for number in _SIGNALS:
        signal.signal(number, end)


def run_command(main: Callable[[], int], code: int | None = None) -> int:
    """Runs a command of the shell and returns its exit code.

    SIGTERM and Ctrl-C raise Stopped, which ends it with one line and `code` (default 143 and 130); a disk that fails,
    with one sentence and 2; a reader of its output that goes (`| head`), without a word and PIPE_CLOSED. Where the main
    thread does not hear a signal within seconds, as in the C++ of a compiler, the process ends without it.
    """
    _listen(code)

    def stop(number: int, frame) -> None:
        HEARD.set()
        raise Stopped(number)

    for number in _SIGNALS:
        signal.signal(number, stop)
    ended, report = 0, sys.unraisablehook
    sys.unraisablehook = functools.partial(_send_again, report=report)
    with terminal.shielded():
        try:
            try:
                ended = main()
            finally:
                sys.unraisablehook = report
                sys.stdout.flush()  # later, what fails would be shown as an exception that is ignored
            return ended
        except Stopped as stopped:
            print(_said(stopped, code), file=sys.stderr)
            return stopped.code if code is None else code
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _output_closed():
                return ended or PIPE_CLOSED
            if not (sentence := of_disk(error)):
                raise
            print(f"error: {sentence}", file=sys.stderr)
            return 2


def _send_again(raised, report: Callable) -> None:
    """Sends a signal again that was handled while Python collected garbage, where its exception ends nothing."""
    if isinstance(raised.exc_value, Stopped):
        SENT_AGAIN.set()
        threading.Timer(0.05, os.kill, (os.getpid(), raised.exc_value.code - 128)).start()
    else:
        report(raised)


def _output_closed() -> bool:
    """Whether it is the standard output whose reader has gone; then what is left of it goes nowhere."""
    output = sys.stdout.fileno()
    asked = select.poll()
    asked.register(output, 0)
    if gone := bool(asked.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _said(stopped: Stopped, code: int | None) -> str:
    after = "; the same command continues from the last checkpoint, if there is one" if code else ""
    return f"{stopped}{after}."


def _listen(code: int | None) -> None:
    """A thread that hears signals while the main one is busy; it ends the process if it stays so, or is asked twice."""
    end, start = os.pipe()
    os.set_blocking(start, False)
    signal.set_wakeup_fd(start, warn_on_full_buffer=False)

    def listen() -> None:
        asked = False
        while number := os.read(end, 1)[0]:
            if number not in _SIGNALS:
                continue
            if asked:
                time.sleep(_AT_ONCE)
            elif HEARD.wait(_GRACE):
                asked = True
                continue
            stopped = Stopped(number)
            print(_said(stopped, code), file=sys.stderr, flush=True)
            os._exit(stopped.code if code is None else code)

    threading.Thread(target=listen, daemon=True).start()
