"""The exception for what the user can fix, and how a command reports it."""

import argparse
import functools
import sys
import traceback
from collections.abc import Callable


class UserError(ValueError):
    """A fault in what the user gave. The message is one sentence that names the file or flag and the remedy."""


class CommandParser(argparse.ArgumentParser):
    """Reports faults of a command line as UserError instead of printing the usage."""

    def error(self, message: str):
        raise UserError(f"{message[:1].lower()}{message[1:]}".rstrip(".") + "; see --help for the flags.")


def command(main: Callable[[list[str]], int]) -> Callable[..., int]:
    """Makes a command of `main(argv)`: a UserError becomes one sentence on stderr and exit code 2.

    Without an argument the command line of the process is read. With --debug the traceback is shown too.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        argv = sys.argv[1:] if argv is None else argv
        try:
            return main(argv)
        except UserError as error:
            if "--debug" in argv:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run
