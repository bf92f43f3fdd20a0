"""A question about an image in the words of the base model's family (`samples.chat`), as ids and masks.

Axis legend: B sample, T token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One sample: ids of both chunks, the length of the first, and which ids are question or carry loss (bool (T,))."""

    tokens: list[int]
    prefix_len: int
    question_mask: list[bool]
    loss_mask: list[bool]


def encode(tokenizer: Tokenizer, prompt: str, target: str | None) -> Encoded:
    """The family's template around a prompt and, in training, its target.

    The visual tokens go between the chunks, after the first `prefix_len` ids. The question mask covers the prompt's own
    ids only: no template, BOS or newline. Loss is on the target and what ends it (I28). Without a target the ids end
    where generation starts. Special tokens spelt out in either text are plain text.
    """
    chat, plain, trusted = tokenizer.chat, tokenizer.encode, tokenizer.encode_template
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    first = [*start, *trusted(chat.before_image)]
    second = start * chat.bos_again + trusted(chat.after_image)
    question = chat.before_question + prompt
    before, asked = plain(chat.before_question), plain(question)
    if chat.joint is None:
        opened = asked + trusted(chat.after_question)
        answer = [] if target is None else plain(target)
    else:  # in one piece: a word alone would get another space in front
        question += chat.after_question
        opened = plain(question)
        whole = opened if target is None else plain(question + chat.joint + target)
        if whole[: len(opened)] != opened:
            raise UserError("This tokeniser merges the answer with the prompt template; use the base model's own.")
        answer = whole[len(opened) :]
    ending = [] if target is None else trusted(chat.after_answer) + [tokenizer.eos_id] * chat.eos_last

    start, end = _shared(before, asked), _shared(asked, opened)
    template, carried = len(first) + len(second), len(answer) + len(ending)
    return Encoded(
        tokens=[*first, *second, *opened, *answer, *ending],
        prefix_len=len(first),
        question_mask=[False] * template + [start <= i < end for i in range(len(opened))] + [False] * carried,
        loss_mask=[False] * (template + len(opened)) + [True] * carried,
    )


def around_image(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the model must know of the template, as arguments of `models.config.build`: how many tokens come before the
    image, and the ids between two images."""
    between = tokenizer.encode_template(tokenizer.chat.between_images)
    return {"prefix_length": encode(tokenizer, "", None).prefix_len, "frame": tuple(between)}


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def batch(encoded: Sequence[Encoded], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Right-padded tokens i32 (B, T) and token_mask, question_mask, loss_mask bool (B, T), T = `length`.

    UserError for a sample longer than `length`: nothing is cut.
    """
    longest = max((len(e.tokens) for e in encoded), default=0)
    if longest > length:
        raise UserError(
            f"A sample has {longest} text tokens but --config.data.text_length={length}; raise it to {longest} or more."
        )
    shape = (len(encoded), length)
    arrays = {
        "tokens": np.full(shape, pad_id, np.int32),
        "token_mask": np.zeros(shape, bool),
        "question_mask": np.zeros(shape, bool),
        "loss_mask": np.zeros(shape, bool),
    }
    for row, e in enumerate(encoded):
        n = len(e.tokens)
        arrays["tokens"][row, :n] = e.tokens
        arrays["token_mask"][row, :n] = True
        arrays["question_mask"][row, :n] = e.question_mask
        arrays["loss_mask"][row, :n] = e.loss_mask
    return arrays


# How a report is asked for in training; a test asks in the first of these.
REPORT_REQUESTS: tuple[str, ...] = (
    "Write a report for this CT.",
    "Report the findings of this scan.",
    "What are the findings of this CT?",
    "Describe this CT.",
    "Describe the findings in the image.",
    "Give a report of this scan.",
    "Please write the report.",
    "Please describe the scan.",
    "Write the findings of this CT.",
    "Give the findings of the image.",
    "What does this CT show? Write a report.",
    "Please report this image.",
    "Generate a report for this scan.",
    "Report this CT.",
    "Write a caption for this scan.",
    "Summarise the findings.",
    "Give a summary of this study.",
    "Draft a report of the examination.",
    "Dictate a report.",
    "Provide a summary of the images.",
    "Provide the interpretation of this CT.",
    "Tell me everything you see in this scan.",
    "Could you write a report about this study?",
    "Could you describe the images?",
    "Observe the volume and write a report.",
    "Tell me the findings in a few sentences.",
    "Draft a text about this volume for a colleague.",
    "Write a radiology report.",
    "Dictate what you observe.",
)
