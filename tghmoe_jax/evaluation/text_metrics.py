"""Similarity of outputs and references, computed by the libraries of the field.

    bleu1..bleu4   sacrebleu    mteval-v13a tokens, clipped precisions, brevity penalty, no smoothing, case kept
    rouge1, rougeL rouge_score  F of lower-cased alphanumeric words (rougeL: longest common subsequence), no stemmer
    meteor         nltk         exact, Porter stem and WordNet synonym matches; alpha 0.9, beta 3, gamma 0.5
    cider          pycocoevalcap  CIDEr-D, 0..10; document frequencies of the references that are scored together
    bert_f1        bert_score   filled in by `bert.add`, from a model folder that the user names

The first three are what Hugging Face `evaluate` computes for one sample, which M3D averages. CIDEr's own tokeniser is
a Java program; here its words are the v13a tokens that hold a letter or digit, lower-cased. Text is stripped and
otherwise left as it is. An empty output or reference scores 0. A library or data that is missing gives None, never 0.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np

ORDERS = (1, 2, 3, 4)
BLEU = tuple(f"bleu{order}" for order in ORDERS)
CORPUS = tuple(f"corpus_{name}" for name in BLEU)  # the only ones that are not the mean of the samples
MISSING = {
    "meteor": "METEOR is left out because NLTK finds no WordNet or Punkt data; run `python -m nltk.downloader wordnet "
    "punkt_tab`.",
    "cider": "CIDEr is left out because pycocoevalcap is not installed; run `pip install pycocoevalcap`.",
}
_KEPT = 1 << 16  # scores of (output, reference) pairs that are kept: tables and pages ask for them again


# ---- BLEU ------------------------------------------------------------------------------------------------------------


@functools.cache
def _sacrebleu():
    from sacrebleu.metrics import BLEU

    return BLEU(smooth_method="none", tokenize="13a", effective_order=True)


@functools.lru_cache(_KEPT)
def bleu_counts(output: str, reference: str) -> tuple[int, ...]:
    """Matched n-grams of orders 1 to 4, n-grams of the output, and both lengths in words: 10 counts that add up."""
    if not output or not reference:  # the reference still counts in a corpus score
        return (0,) * 9 + (_sacrebleu().sentence_score("", [reference]).ref_len if reference else 0,)
    found = _sacrebleu().sentence_score(output, [reference])
    return (*found.counts, *found.totals, found.sys_len, found.ref_len)


def bleu(counts: Iterable[float], order: int) -> float:
    """BLEU of counts, of one sample or summed over a corpus; 0 where the output is shorter than `order` words."""
    counts = [round(count) for count in counts]
    found = _sacrebleu().compute_bleu(
        counts[:order], counts[4 : 4 + order], *counts[8:], smooth_method="none", max_ngram_order=order
    )
    return min(1.0, found.score / 100)  # 100 comes as 100.00000000000004


# ---- ROUGE and METEOR ------------------------------------------------------------------------------------------------


@functools.cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


@functools.lru_cache(_KEPT)
def _rouge(output: str, reference: str) -> tuple[float, float]:
    found = _rouge_scorer().score(reference, output)
    return float(found["rouge1"].fmeasure), float(found["rougeL"].fmeasure)


@functools.cache
def _wordnet() -> Callable | None:
    """NLTK's reader of the user's WordNet, None where that or the sentence splitter's data is missing."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.tokenize import word_tokenize

    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            word_tokenize("a")
            root = nltk.data.find(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other languages, which METEOR does not use
                return WordNetCorpusReader(root, None)
        except (LookupError, OSError):  # not there, or there in part
            continue
    return None


@functools.lru_cache(_KEPT)
def _meteor(output: str, reference: str) -> float:
    from nltk.tokenize import word_tokenize
    from nltk.translate.meteor_score import single_meteor_score

    if not output or not reference:
        return 0.0
    return float(single_meteor_score(word_tokenize(reference), word_tokenize(output), wordnet=_wordnet()))


# ---- CIDEr -----------------------------------------------------------------------------------------------------------


def _cider(pairs: Sequence[tuple[str, str]]) -> np.ndarray | None:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return None
    outputs, references = ({i: [_cider_words(pair[side])] for i, pair in enumerate(pairs)} for side in (0, 1))
    if not any(words for (words,) in references.values()):  # the library fails without a single n-gram
        return np.zeros(len(pairs))
    # One document alone has no frequencies: the library gives 0, or nothing finite.
    return np.nan_to_num(np.asarray(Cider().compute_score(references, outputs)[1], np.float64))


def _cider_words(text: str) -> str:
    return " ".join(word for word in _tokens()(text.lower()).split() if any(map(str.isalnum, word)))


@functools.cache
def _tokens():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


# ---- all of them -----------------------------------------------------------------------------------------------------

Pairs = Sequence[tuple[str, str]]  # of an output and its reference, stripped


def _sample_bleu(pairs: Pairs, order: int) -> np.ndarray:
    return np.array([bleu(bleu_counts(*pair), order) for pair in pairs])


def _sample_rouge(pairs: Pairs, place: int) -> np.ndarray:
    return np.array([_rouge(*pair)[place] for pair in pairs])


def _sample_meteor(pairs: Pairs) -> np.ndarray | None:
    return None if _wordnet() is None else np.array([_meteor(*pair) for pair in pairs])


SAMPLE: dict[str, Callable[[Pairs], np.ndarray | None]] = {
    **{name: functools.partial(_sample_bleu, order=order) for order, name in zip(ORDERS, BLEU, strict=True)},
    "rouge1": functools.partial(_sample_rouge, place=0),
    "rougeL": functools.partial(_sample_rouge, place=1),
    "meteor": _sample_meteor,
    "cider": _cider,
}
