"""Trains the embedded tokeniser again: `python -m tghmoe_jax.drawn.train_tokenizer --to DIR`.

A byte-fallback BPE in the layout of Llama's and Phi-3's `tokenizer.json`, with differences that suit a tiny model:
every word of the embedded texts is one token, an option letter with its full stop ("A.") is one token apart from the
article, and a space stands for itself rather than for U+2581, so that every Unicode text comes back unchanged. Other
words of radiology are spelt with pieces learned from a word list.
"""

import argparse
import collections
import itertools
import json
import re
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tghmoe_jax.drawn import binding, wordings
from tghmoe_jax.drawn.phantom_report import FIRST
from tghmoe_jax.drawn.phantom_wordings import SEEN, UNSEEN
from tghmoe_jax.drawn.scenes import ScenesSource
from tghmoe_jax.samples.questions import LETTERS
from tghmoe_jax.samples.tokenizer import FILES

SIZE = 1024
SPECIALS = ("<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|image|>")
SWALLOW_AFTER = ("</s>", "<|assistant|>", "<|system|>")  # these eat the white space behind them, as in Phi-3
BYTES = tuple(f"<0x{b:02X}>" for b in range(256))
# A word with the space before it, a digit, an option letter with its full stop, or one other character.
PIECES = rf" ?[{LETTERS}]\.(?=\s|$)| ?\p{{L}}+| ?\p{{N}}|[^\p{{L}}\p{{N}}]"
TEXTS = 6000  # sampled questions and captions

CT_WORDS, COMMON_WORDS = (wordings.TEXTS["tokenizer"][words].split() for words in ("radiology", "common"))


def embedded_words() -> list[str]:
    """The word pieces of every embedded text, the most frequent first."""
    rng = np.random.default_rng(0)
    split = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    found: collections.Counter = collections.Counter()

    def add(text: str) -> None:
        found.update(piece for piece, _ in split.pre_tokenize_str(text))

    wordings = [requests for way in (SEEN, UNSEEN) for requests in (*way.questions.values(), way.requests)]
    for request in itertools.chain(*wordings, *binding.REQUESTS.values()):
        add("\n" + re.sub(r"\{\w+\}", "", request))  # a prompt follows a newline, and has no space before it
    for sentence in itertools.chain(*FIRST):
        add(" " + re.sub(r"\{\w+\}", "", sentence))
    for phrase in binding.COMMON_PHRASES:
        add(" " + phrase)
        add(" " + phrase.capitalize())
    for word in (*binding.CT_WORDS, *binding.CT_THINGS, *binding.CT_ADJECTIVES):
        add(" " + word)
    for wording in ("seen", "unseen"):
        source = ScenesSource("train", TEXTS, wording=wording)
        for index in range(TEXTS):
            for kind in ("closed", "open", "report"):
                question = source.question(index, kind, rng)
                add("\n" + question.prompt)
                add(" " + question.target)
    return [w for w in sorted(found, key=lambda w: (-found[w], w)) if len(w) > 1 and w.isascii()]


def word_pieces(count: int) -> tuple[list[str], list[list[str]]]:
    """`count` pieces of the listed words, the printable ASCII characters first, and the merges that make the pieces."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    characters = [chr(c) for c in range(32, 127)]
    trainer = trainers.BpeTrainer(vocab_size=count, initial_alphabet=characters, show_progress=False)
    listed = sorted({*CT_WORDS, *COMMON_WORDS})
    learner.train_from_iterator([form for w in listed for form in (f" {w}", f" {w}", w, w.capitalize())], trainer)
    learned = json.loads(learner.to_str())["model"]
    return sorted(learned["vocab"], key=learned["vocab"].get), [list(m) for m in learned["merges"]]


def build(size: int = SIZE) -> dict:
    """The content of tokenizer.json."""
    letters = [f" {letter}." for letter in LETTERS]
    whole = [*letters, *(w for w in embedded_words() if w not in letters)]
    tokens = dict.fromkeys((*SPECIALS, *BYTES, *whole))
    count = 0
    while len(tokens) < size:  # pieces that are whole words as well leave room for more
        count += size - len(tokens)
        pieces, merges = word_pieces(count)
        tokens.update(dict.fromkeys(pieces))
    vocab = {token: i for i, token in enumerate(tokens)}
    # ignore_merges: a piece that is in the vocabulary needs no merges, so a whole word costs one entry.
    model = models.BPE(vocab, [tuple(m) for m in merges], byte_fallback=True, ignore_merges=True)
    built = tokenizers.Tokenizer(model)
    built.add_special_tokens(
        [tokenizers.AddedToken(t, rstrip=t in SWALLOW_AFTER, normalized=False, special=True) for t in SPECIALS]
    )
    built.normalizer = normalizers.Prepend(" ")
    built.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return json.loads(built.to_str())


CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 4096,
    "clean_up_tokenization_spaces": False,
}


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, required=True, help="folder for tokenizer.json and tokenizer_config.json")
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    content = build()
    for name, value in zip(FILES, (content, CONFIG), strict=True):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{len(content['model']['vocab'])} tokens in {folder}")


if __name__ == "__main__":
    main()
