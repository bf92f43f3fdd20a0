"""The overlap scores against numbers worked out by hand, and fixed ones that the libraries themselves give."""

import dataclasses
import math
import shutil
import sys

import numpy as np
import pytest

from tghmoe_jax.evaluation import outputs, text_metrics
from tghmoe_jax.evaluation.protocols import kind_scores, score


def per_sample(outputs, references):
    pairs = list(zip(outputs, references, strict=True))
    return {name: score(pairs) for name, score in text_metrics.SAMPLE.items()}


def one(metric, output, reference):
    return per_sample([output], [reference])[metric][0]


@pytest.mark.parametrize(
    "output, reference, expected",
    [
        ("hello there general kenobi", "hello there general kenobi", 1.0),
        ("the cat sat", "the cat sat on the mat", math.exp(1 - 6 / 3)),  # precision 1, brevity penalty only
        ("the the the the", "the cat sat down", 1 / 4),  # clipped precision
        ("the cat sat on the mat", "the cat sat", 3 / 6),  # longer than the reference: no penalty
        # 13a tokens: A mass , 3.5 cm . (6) and A 3.5 cm mass . (5): five of six match.
        ("A mass, 3.5 cm.", "A 3.5 cm mass.", 5 / 6),
        ("Liver", "liver", 0.0),  # case is kept
        ("nothing shared", "other words here", 0.0),
        ("", "liver", 0.0),
        ("   ", "liver", 0.0),
        ("liver", "", 0.0),
        (" liver \n", "liver", 1.0),
    ],
)
def test_bleu1(output, reference, expected):
    assert one("bleu1", output, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "output, reference, expected",
    [
        ("the cat sat", "the cat sat on the mat", 2 * 1 * 0.5 / 1.5),
        ("a b x", "a b c d", 4 / 7),
        ("Liver, mass!", "liver mass", 1.0),  # case and punctuation are normalised away
        ("lesions", "lesion", 0.0),  # no stemmer
        ("", "liver", 0.0),
        ("liver", "", 0.0),
    ],
)
def test_rouge1(output, reference, expected):
    assert one("rouge1", output, reference) == pytest.approx(expected, abs=1e-12)


PAIRS = [
    ("A 3.5 cm mass in the right kidney.", "There is a mass of 3.5 cm in the right kidney."),
    ("No pleural effusion. The liver is normal in size.", "The liver is of normal size. No pleural effusion is seen."),
    ("It is a guide to action which ensures that the military always obeys the commands of the party",
     "It is a guide to action that ensures that the military will forever heed Party commands"),
    ("left kidney", "the left kidney"),
    ("", "liver"),
    ("a lump", "a mass"),
]  # fmt: skip
# BLEU: nltk's sentence_bleu on v13a tokens and the arithmetic of `evaluate`'s bleu; ROUGE: rouge_score;
# METEOR: nltk with WordNet 3.0 (the third is the example in the documentation of `evaluate`'s meteor);
# CIDEr: pycocoevalcap 1.2; corpus BLEU: sacrebleu's corpus_score.
FIXED = {
    "bleu1": [0.636917, 0.757957, 0.611111, 0.606531, 0, 0.5],
    "bleu2": [0.534071, 0.562116, 0.536266, 0.606531, 0, 0],
    "bleu3": [0.444105, 0.388292, 0.475990, 0, 0, 0],
    "bleu4": [0.380314, 0, 0.411804, 0, 0, 0],
    "rouge1": [0.857143, 0.8, 0.705882, 0.8, 0, 0.5],
    "rougeL": [0.761905, 0.5, 0.647059, 0.8, 0, 0.5],
    "meteor": [0.735465, 0.647266, 0.694444, 0.646552, 0, 0.25],
    "cider": [4.005845, 3.594511, 4.486119, 4.164264, 0, 0.481303],
}
CORPUS = [0.6763927811, 0.5552960170, 0.4548449388, 0.3625854788]


@pytest.mark.parametrize("metric", FIXED)
def test_fixed_numbers_of_the_libraries(metric, wordnet):
    expected = list(FIXED[metric])
    if metric == "meteor":
        # The small WordNet of the tests holds lump and mass as one synset: all words match in one chunk.
        expected[-1] = 1 - 0.5 * (1 / 2) ** 3
    found = per_sample(*map(list, zip(*PAIRS, strict=True)))[metric]
    assert found == pytest.approx(expected, abs=1e-6)


def test_bleu_equals_another_librarys():
    from nltk.translate.bleu_score import sentence_bleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words = lambda text: Tokenizer13a()(text).split()  # noqa: E731
    for output, reference in PAIRS[:3]:
        for order in (1, 2, 3):
            expected = sentence_bleu([words(reference)], words(output), weights=[1 / order] * order)
            assert one(f"bleu{order}", output, reference) == pytest.approx(expected)


def test_corpus_bleu_is_that_of_summed_counts():
    counts = np.sum([text_metrics.bleu_counts(*pair) for pair in PAIRS], axis=0)
    assert [text_metrics.bleu(counts, order) for order in text_metrics.ORDERS] == pytest.approx(CORPUS)


def test_cider_ignores_case_and_punctuation_and_rewards_rare_words():
    outputs = ["A cyst.", "a normal scan", "a normal scan"]
    same = per_sample(outputs, ["a cyst", "A normal scan.", "A normal scan."])["cider"]
    assert same[0] > 0 and same == pytest.approx(
        per_sample([text.upper() for text in outputs], ["a cyst", "a normal scan", "a normal scan"])["cider"]
    )
    assert per_sample(["a cyst"], ["a cyst"])["cider"][0] == 0  # one document has no frequencies


def answered(pairs):
    from tests.evaluation.test_protocols import small_run

    plain = small_run()["open"][0]
    return {"open": [dataclasses.replace(plain, index=i, output=o, answer=a) for i, (o, a) in enumerate(pairs)]}


def test_empty_outputs_score_nothing_and_are_counted(wordnet):
    scores = kind_scores(answered(PAIRS), resamples=50)
    assert scores["open/empty"].value == pytest.approx(1 / 6)
    for metric, values in FIXED.items():
        if metric != "meteor":
            assert scores[f"open/{metric}"].value == pytest.approx(np.mean(values), abs=1e-6)
    for order, value in zip(text_metrics.ORDERS, CORPUS, strict=True):
        found = scores[f"open/corpus_bleu{order}"]
        assert found.value == pytest.approx(value) and found.ci95[0] <= value <= found.ci95[1]


@pytest.mark.parametrize("metric", ["meteor", "cider"])
def test_what_is_missing_is_null_and_said_in_one_sentence(metric, monkeypatch):
    if metric == "cider":
        monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    metrics = score(answered(PAIRS))
    assert metrics[f"open/{metric}"] is None and metrics["open/bleu1"] > 0
    assert text_metrics.MISSING[metric] in outputs.table(metrics)
    assert text_metrics.MISSING[metric].count(". ") == 0 and "run `" in text_metrics.MISSING[metric]


def test_a_wordnet_is_read_as_the_downloader_leaves_it(wordnet):
    shutil.make_archive(str(wordnet), "zip", wordnet.parent, wordnet.name)
    shutil.rmtree(wordnet)
    text_metrics._wordnet.cache_clear()
    assert one("meteor", "a lump", "a mass") == pytest.approx(0.9375)


def test_a_damaged_wordnet_counts_as_none(wordnet):
    (wordnet / "index.sense").unlink()
    text_metrics._wordnet.cache_clear()
    assert per_sample(["a lump"], ["a mass"])["meteor"] is None
