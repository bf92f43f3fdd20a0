"""The one exception that means: the user can fix this."""

import argparse


class UserError(ValueError):
    """A fault in what the user gave. The message is one sentence that names the file or flag and the remedy.

    `code` is the exit code of a command that it ends.
    """

    code = 2


class Diverged(UserError):
    """Too many steps in a row whose loss or gradient is not finite (EX_DATAERR): starting again does not help."""

    code = 65


class CommandParser(argparse.ArgumentParser):
    """Reports faults of a command line as UserError instead of printing the usage."""

    def error(self, message: str):
        raise UserError(f"{message[:1].lower()}{message[1:]}".rstrip(".") + "; see --help for the flags.")
