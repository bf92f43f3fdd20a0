"""The form of the chat template of a base family. The values themselves are in `bases/<family>.py`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The texts around the image, the question and the answer, and the names of the special tokens.

    A sample is two chunks of ids, with the visual tokens between them:

        BOS before_image | after_image before_question QUESTION after_question ANSWER after_answer

    before_image, after_image, after_question and after_answer may hold special tokens. between_images is what stands
    between the visual tokens of two images (`frames` of models/config.py). before_question is plain text in one piece
    with the question. bos_again: the second chunk starts with a BOS too. joint: the text between
    after_question and the answer of a template whose question, after_question and answer are tokenised in one piece,
    without special tokens; None where each is tokenised by itself. eos_last: the EOS follows after_answer.

    bos, eos: the names where tokenizer_config.json gives none; eos stands for a missing pad too, and an empty bos says
    that the family has none. special: the other tokens that the tokeniser must have. stop: those of them that end an
    answer, as the EOS does.
    """

    before_image: str
    between_images: str
    after_image: str
    before_question: str
    after_question: str
    after_answer: str
    bos_again: bool
    joint: str | None
    eos_last: bool
    bos: str
    eos: str
    special: tuple[str, ...]
    stop: tuple[str, ...]
