"""The Phi-3-V prompt: user, image, question, `<|end|>`, assistant, answer, `<|end|>`.

The text is split at the image and each chunk is encoded with its own BOS, as Phi-3-V does (model-spec 2.5). The
visual tokens go between the chunks, after the first `prefix_len` ids.

Axis legend: B sample, T token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tghmoe_jax.data.tokenizer import Tokenizer
from tghmoe_jax.errors import UserError

CHUNK1 = "<|user|>\n"
ANSWER_OPENING = "<|end|>\n<|assistant|>\n"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One sample: ids of both chunks, the length of the first, and which ids are question or carry loss (bool (T,))."""

    tokens: list[int]
    prefix_len: int
    question_mask: list[bool]
    loss_mask: list[bool]


def encode(tokenizer: Tokenizer, prompt: str, target: str | None) -> Encoded:
    """Template around a prompt and, in training, its target.

    The question mask covers the prompt's own ids only: no template, BOS or newline. Loss is on the target, `<|end|>`
    and the EOS after it (I28). Without a target the ids end where generation starts. Special tokens spelt out in
    either text are plain text.
    """
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
