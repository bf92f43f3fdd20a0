"""BLEU-1 and ROUGE-1 against numbers worked out by hand from the published definitions."""

import math

import pytest

from tghmoe_jax.evaluation import text_metrics


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
    assert text_metrics.bleu1(output, reference) == pytest.approx(expected, abs=1e-12)


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
    assert text_metrics.rouge1(output, reference) == pytest.approx(expected, abs=1e-12)


def test_meteor_is_said_to_be_missing_not_zero():
    assert text_metrics.meteor("liver", "liver") is None
