"""Checks of what files contain: JSON of limited size and expected types, cells of tables, words of a page.

A kind is what a value of a JSON file must be:

    str, bool, int, float    a text, true or false, a whole number, a finite number
    range(1, 65)             a whole number from 1 to 64
    None, object             null, anything
    (a, b)                   of one of these kinds
    [a]    [a, b]            a list of values of one kind; a list of exactly these
    {"x": a}    {str: a}     an object whose `x`, if it has one, is of a kind; whose values all are
"""

import json
import math
import re
from typing import Any

from etils import epath

from tghmoe_jax.errors import UserError
from tghmoe_jax.terminal import shown

MOST_BYTES = 1 << 24  # of a JSON file that describes something; the largest known has 2 MB
_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number", None: "null"}


def read_bytes(file: epath.PathLike, most: int = MOST_BYTES) -> bytes:
    """A file of at most `most` bytes. UserError where it is larger, or no file."""
    file = epath.Path(file)
    if not file.is_file():
        raise UserError(f"{file} is missing or no file; copy its folder again.")
    try:
        with file.open("rb") as content:
            found = content.read(most + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); copy its folder again.") from error
    if len(found) > most:
        raise UserError(f"{file} has more than {most} bytes; check that it is the right file.")
    return found


def read_json(
    file: epath.PathLike, kind: Any = object, most: int = MOST_BYTES, remedy: str = "copy its folder again"
) -> Any:
    """The value of a JSON file of at most `most` bytes. UserError names the file, and the key of another kind."""
    try:
        value = json.loads(read_bytes(file, most).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{file} is not valid JSON in UTF-8{line}; {remedy}.") from None
    expect(value, kind, file, remedy)
    return value


def expect(value: Any, kind: Any, file: epath.PathLike, remedy: str = "copy its folder again") -> None:
    """UserError where the value of a file is not of a kind."""
    if wrong := fault(value, kind):
        raise UserError(f"{file}: {wrong}; {remedy}.")


def fault(value: Any, kind: Any, key: str = "") -> str:
    """`KEY is VALUE, not KIND` for the first part of a value that is of another kind; empty where none is."""
    if not _is(value, kind):
        found = {dict: "an object", list: "a list"}.get(type(value)) or json.dumps(value)[:60]
        return f"{key[:120] or 'what it holds'} is {found}, not {_named(kind)}"
    if isinstance(kind, tuple):
        kind = next(one for one in kind if _is(value, one))
    parts = ()
    if isinstance(kind, dict) and kind:
        every = kind.get(str, object)
        parts = ((f"{key}.{name}".lstrip("."), one, kind.get(name, every)) for name, one in value.items())
    elif isinstance(kind, list):
        kinds = kind if len(kind) > 1 else kind * len(value)
        parts = ((f"{key}[{i}]", *one) for i, one in enumerate(zip(value, kinds, strict=True)))
    return next((wrong for name, one, its in parts if its is not object and (wrong := fault(one, its, name))), "")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, its parts aside."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(kind, tuple):
        return any(_is(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and len(kind) in (1, len(value))
    if isinstance(kind, dict):
        return isinstance(value, dict)
    if isinstance(kind, range):
        return whole and value in kind
    if kind is int:
        return whole and abs(value) < 1 << 63
    if kind is float:
        return (whole and abs(value) < 1 << 63) or (isinstance(value, float) and math.isfinite(value))
    if kind is str:
        return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # half pairs cannot be written
    return kind is object or value is None if kind in (None, object) else isinstance(value, kind)


def _named(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(_named, kind))
    if isinstance(kind, range):
        return f"a whole number from {kind.start} to {kind.stop - 1}"
    if isinstance(kind, list):
        return f"a list of {len(kind)}" if len(kind) > 1 else "a list"
    return "an object" if isinstance(kind, dict) else _NAMES[kind]


# ---- words in files of ours ------------------------------------------------------------------------------------------

_FORMULA = re.compile(r"'*\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|'*[\t\r\n]")  # full-width forms are formulas in some
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
_KEPT = " ,;/'\"?%-"  # means nothing within a line of Markdown
MOST_WORDS = 200  # characters of a name on a page


def cell(value: Any) -> Any:
    """A value for a CSV file. A text that a spreadsheet would run as a formula gets an apostrophe in front, as OWASP's
    page on CSV injection says, and so does one that begins as such a one does then; numbers stay."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def from_cell(text: str) -> str:
    """The inverse of `cell`; texts of other programs stay as they are."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def markdown(text: Any) -> str:
    """A name for one line of Markdown: no heading, link, HTML or table of its own."""
    line = shown(" ".join(str(text).split()))
    line = line if len(line) <= MOST_WORDS else line[:MOST_WORDS] + "..."
    return _PUNCTUATION.sub(lambda found: found[0] if found[0] in _KEPT else f"\\{found[0]}", line)
