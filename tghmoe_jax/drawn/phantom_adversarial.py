"""Hard ways of asking, which never occur in training and hide the task: a test of the task router alone.

Each way is a `Wording`, so that the same volumes, answers and options are asked about in it.
"""

import re
import zlib
from collections.abc import Iterable

import numpy as np

from tghmoe_jax.drawn.phantom_wordings import SEEN, Wording
from tghmoe_jax.drawn.wordings import TEXTS


def _each(change) -> Wording:
    """The wordings of training, each changed by `change(text)` into one or several."""

    def changed(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(new for text in texts for new in change(text))

    return Wording({type: changed(texts) for type, texts in SEEN.questions.items()}, changed(SEEN.requests))


def mistyped(text: str) -> str:
    """`text` with a letter exchanged, left out or doubled in two of its words, always the same ones.

    Words of fewer than four letters and `{lesion}` stay as they are.
    """
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    words = [m.span() for m in re.finditer(r"(?<![\w{])[A-Za-z]{4,}(?![\w}])", text)]
    chosen = rng.permutation(len(words))[:2]
    for start, end in sorted((words[i] for i in chosen), reverse=True):
        at = int(rng.integers(start + 1, end - 1))
        a, b = text[at], text[at + 1]
        text = text[:at] + (b + a, a, a + a + b)[rng.integers(3)] + text[at + 2 :]
    return text


ADVERSARIAL: dict[str, Wording] = {
    "indication": _each(lambda text: (f"{indication} {text}" for indication in TEXTS["indication"]["texts"])),
    "exchanged": Wording(**TEXTS["exchanged"]),
    # CT-RATE's task tags, after the request as its authors write them.
    "tags": Wording(
        {type: tuple(f"{text}<multiple_choice>" for text in texts) for type, texts in SEEN.questions.items()},
        tuple(f"{text}<report_generation>" for text in SEEN.requests),
    ),
    "language": Wording(**TEXTS["language"]),
    "typos": _each(lambda text: (mistyped(text),)),
}
