"""A question about an image as the base model's family writes it: Phi-3-V's template, or LLaVA-1.5's (Vicuna).

The text is split at the image. Phi-3-V encodes each chunk with its own BOS (model-spec 2.5); LLaVA has one BOS. The
visual tokens go between the chunks, after the first `prefix_len` ids.

Axis legend: B sample, T token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.tokenizer import Tokenizer

CHUNK1 = "<|user|>\n"
ANSWER_OPENING = "<|end|>\n<|assistant|>\n"
VICUNA1, VICUNA_OPENING = "USER: ", " ASSISTANT:"  # the image stands between `USER: ` and a newline


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One sample: ids of both chunks, the length of the first, and which ids are question or carry loss (bool (T,))."""

    tokens: list[int]
    prefix_len: int
    question_mask: list[bool]
    loss_mask: list[bool]


def encode(tokenizer: Tokenizer, prompt: str, target: str | None) -> Encoded:
    """Template around a prompt and, in training, its target.

    The question mask covers the prompt's own ids only: no template, BOS or newline. Loss is on the target and what ends
    it: Phi-3's `<|end|>` and the EOS (I28). Without a target the ids end where generation starts. Special tokens spelt
    out in either text are plain text.
    """
    return (_phi3 if tokenizer.chat == "phi3" else _vicuna)(tokenizer, prompt, target)


def _vicuna(tokenizer: Tokenizer, prompt: str, target: str | None) -> Encoded:
    chunk1 = [tokenizer.bos_id, *tokenizer.encode(VICUNA1)]
    newline, asked = tokenizer.encode("\n"), tokenizer.encode("\n" + prompt)
    opened = tokenizer.encode("\n" + prompt + VICUNA_OPENING)
    answer = []
    if target is not None:  # in one piece: a word alone would get another space in front
        whole = tokenizer.encode(f"\n{prompt}{VICUNA_OPENING} {target}")
        if whole[: len(opened)] != opened:
            raise UserError("This tokeniser merges the answer with the prompt template; use one of the Llama family.")
        answer = [*whole[len(opened) :], tokenizer.eos_id]
    end = next((i for i, (a, b) in enumerate(zip(asked, opened, strict=False)) if a != b), len(asked))
    question = [len(newline) <= i < end for i in range(len(opened))]
    return Encoded(
        tokens=[*chunk1, *opened, *answer],
        prefix_len=len(chunk1),
        question_mask=[False] * len(chunk1) + question + [False] * len(answer),
        loss_mask=[False] * (len(chunk1) + len(opened)) + [True] * len(answer),
    )


def _phi3(tokenizer: Tokenizer, prompt: str, target: str | None) -> Encoded:
    chunk1 = [tokenizer.bos_id, *tokenizer.encode_template(CHUNK1)]
    newline = tokenizer.encode("\n")
    asked = tokenizer.encode("\n" + prompt)
    if asked[: len(newline)] != newline:
        raise UserError(
            "This tokeniser merges the newline of the prompt template with text; use one of the Phi-3 or Llama family."
        )
    opening = tokenizer.encode_template(ANSWER_OPENING)
    answer = [] if target is None else [*tokenizer.encode(target), tokenizer.end_id, tokenizer.eos_id]

    before = len(chunk1) + 1 + len(newline)
    question = len(asked) - len(newline)
    return Encoded(
        tokens=[*chunk1, tokenizer.bos_id, *asked, *opening, *answer],
        prefix_len=len(chunk1),
        question_mask=[False] * before + [True] * question + [False] * (len(opening) + len(answer)),
        loss_mask=[False] * (before + question + len(opening)) + [True] * len(answer),
    )


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
