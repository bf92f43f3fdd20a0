"""Word overlap of one output with one reference, as Hugging Face `evaluate` computes it per sample.

All scores are floats in 0..1; text is stripped and otherwise left as it is (each library applies its own
normalisation). An empty output or reference scores 0. A table's value is the mean of the sample scores.
"""

import functools

METRICS = ("bleu1", "rouge1", "meteor")


@functools.cache
def _bleu():
    from sacrebleu.metrics import BLEU

    # Order 1 and no smoothing: clipped word precision times the brevity penalty, over mteval-v13a tokens.
    return BLEU(max_ngram_order=1, smooth_method="none", tokenize="13a", effective_order=True)


@functools.cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=False)


def bleu1(output: str, reference: str) -> float:
    """`evaluate`'s bleu with max_order=1 of one sample (case and punctuation count)."""
    output, reference = output.strip(), reference.strip()
    if not output or not reference:
        return 0.0
    return min(1.0, _bleu().sentence_score(output, [reference]).score / 100)  # 100 comes as 100.00000000000004


def rouge1(output: str, reference: str) -> float:
    """`evaluate`'s rouge1 of one sample: F of lower-cased alphanumeric words, no stemmer."""
    return float(_rouge().score(reference.strip(), output.strip())["rouge1"].fmeasure)


def meteor(output: str, reference: str) -> float | None:
    """METEOR needs WordNet, which no pinned package ships: not available, so None."""
    return None
