"""Scores of short open answers: the same text, and how close a number is.

Source: the scoring of DeepTumorVQA v2 and 3D-RAD; units are theirs where an answer states one, never assumed.
"""

import math
import re

_UNIT = r"(?P<unit>%|(?:(?:mm|cm|ml|cc|hu)(?:³|²|\^?[23])?(?![a-z]))?)"
_NUMBER = rf"(?P<number>-?\d+(?:\.\d+)?)\s*{_UNIT}"
_ANSWER = re.compile(rf"(?:about |approximately )?{_NUMBER}\.?")
_PUNCTUATION = re.compile(r"(?<!\d)[^\w\s-]|[^\w\s-](?!\d)")
_MILLIMETRES = {"mm": 1.0, "cm": 10.0}


def same_text(output: str, answer: str) -> bool:
    """Whether two texts are the same, but for letter case, white space and punctuation that is not within a number."""
    one, other = (" ".join(_PUNCTUATION.sub("", text.casefold()).split()) for text in (output, answer))
    return one == other


def relative_accuracy(output: str, answer: str) -> float:
    """max(0, 1 - |said - true| / |true|) of the first number of the output; NaN where the answer is not one number
    (with or without a unit).

    Millimetres and centimetres are converted. An output without a number is 0, and so is one whose unit is not the
    answer's, or that leaves it out.
    """
    true = _ANSWER.fullmatch(answer.strip().lower())
    if true is None:
        return math.nan
    said = re.search(_NUMBER, output.lower())
    unit = said["unit"] if said else ""
    if said is None or (true["unit"] and unit != true["unit"] and not {unit, true["unit"]} <= _MILLIMETRES.keys()):
        return 0.0
    scale = _MILLIMETRES[unit] / _MILLIMETRES[true["unit"]] if unit in _MILLIMETRES and true["unit"] else 1.0
    goal, value = float(true["number"]), float(said["number"]) * scale
    return max(0.0, 1.0 - abs(value - goal) / abs(goal)) if goal else float(value == 0)
