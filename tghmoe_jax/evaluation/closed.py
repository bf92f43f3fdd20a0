"""The two rules that decide whether the output to a closed-ended question is right.

Source: the M3D benchmark's rule (containment) and this project's strict rule. Both are case-sensitive.
"""

import re
from collections.abc import Sequence

from tghmoe_jax.samples.questions import LETTERS

_MARKED = re.compile(r"(?<![^\W_])(?:\((?P<both>[A-Z])\)|(?P<one>[A-Z])[.)])")  # (A), A. or A), not inside a word
_BARE = re.compile(r"([A-Z])(?: |$)")  # at the start of an output


def contains_letter(output: str, letter: str) -> bool:
    """M3D's containment rule: `<letter>.` occurs anywhere in the output.

    Kept as published, with its false positives ("Vitamin A.", an echoed list of choices); see `strict_letter`.
    """
    return bool(letter) and f"{letter}." in output


def strict_letter(output: str, choices: Sequence[str]) -> str:
    """The one option that the output states, or an empty string where it states none or several.

    Stated means: the output starts with exactly one option letter as `A`, `A.`, `(A)` or `A)`, or is an option's
    exact text. White space around the output is ignored. A bare letter counts only alone or before its own
    option's text, or the article would count. Any text may follow a marked letter, but the marked letter of a
    second option makes the statement void unless it belongs to the first option's own text.
    """
    text = output.strip()
    texts = {letter: choice.strip() for letter, choice in zip(LETTERS, choices, strict=False)}
    exact = [letter for letter, choice in texts.items() if text and choice == text]
    if exact:
        return exact[0]
    if text[:1] in texts and text[1:2] in ("", " ") and text[1:].strip() in ("", texts[text[0]]):
        return text[0]
    start = _MARKED.match(text)
    letter = (start["both"] or start["one"]) if start else ""
    if letter not in texts:
        return ""
    rest = text[start.end() :].strip()
    if rest == texts[letter]:
        return letter
    stated = {found["both"] or found["one"] for found in _MARKED.finditer(rest)}
    return "" if stated & texts.keys() - {letter} else letter


def named_option(output: str, choices: Sequence[str]) -> int:
    """The option that an answer states by the strict rule, -1 for none; without options 0, -1 for an empty answer."""
    if not choices:
        return 0 if output.strip() else -1
    return LETTERS.find(strict_letter(output, choices) or "?")


def strictly_correct(output: str, letter: str, choices: Sequence[str]) -> bool:
    """Whether `strict_letter` of the output is the true option's letter."""
    return bool(letter) and strict_letter(output, choices) == letter


def disagreement(output: str, choices: Sequence[str]) -> str:
    """What is wrong with the form of an answer to a question with choices; empty where nothing is.

    `letter and text disagree`: a letter stands before another option's text. `none of the choices`: neither an option's
    letter alone, nor its text, with or without its letter and with any text behind it.
    """
    text = output.strip()
    texts = dict(zip(LETTERS, (choice.strip() for choice in choices), strict=False))

    def begun(rest: str) -> set[str]:
        """The letters of the options that a text begins with; of those that begin alike the longest."""
        rest = rest.casefold()
        found = {key: len(own) for key, own in texts.items() if re.match(re.escape(own.casefold()) + r"(?!\w)", rest)}
        return {key for key, size in found.items() if size == max(found.values())}

    start = _MARKED.match(text) or _BARE.match(text)
    letter = next(filter(None, start.groups()), "") if start else ""
    if letter not in texts or begun(text):
        return "" if begun(text) else "none of the choices"
    rest = text[start.end() :].strip()
    if not rest or letter in begun(rest):
        return ""
    return "letter and text disagree" if begun(rest) else "none of the choices"
