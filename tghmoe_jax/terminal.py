"""Printing: text that came from a file cannot move the cursor or change colours, lines or direction."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

# Control characters, marks that turn the direction of text, line separators, half pairs, invisible tags.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
    r"\U000e0000-\U000e007f]"
)


def shown(text: str) -> str:
    """The text with such characters written out, as `\\x1b`; newlines and tabs stay."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`shown`, with newlines and tabs written out too."""
    return shown(text).replace("\n", "\\n").replace("\t", "\\t")


class Shielded:
    """A stream that prints what is `shown` of a text, and what its encoding has no letter for in the same way.

    `stream` is the stream behind it.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        safe = shown(text)
        code = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(safe.encode(code, "backslashreplace").decode(code))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Both streams of this process, while a command runs."""
    out, error = (one if isinstance(one, Shielded) else Shielded(one) for one in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield
