"""Short open answers: the same text, and numbers by their relative accuracy, units included."""

import math

import pytest

from tests.evaluation.test_protocols import Question
from tghmoe_jax.evaluation.numbers import relative_accuracy, same_text
from tghmoe_jax.evaluation.protocols import Prediction, kind_scores


@pytest.mark.parametrize(
    ("output", "answer", "accuracy"),
    [
        ("120.5", "120.5", 1.0),
        ("The volume is about 100 cm^3.", "80", 0.75),
        ("250", "100", 0.0),  # never below 0
        ("45 mm", "4.5 cm", 1.0),
        ("4.5 cm.", "45 mm", 1.0),
        ("45", "4.5 cm", 0.0),  # the unit is not guessed
        ("45", "45 mm", 0.0),
        ("45 ml", "45 mm", 0.0),
        ("12 HU", "15 hu", 0.8),
        ("-90", "-100", 0.9),
        ("50%", "50 %", 1.0),
        ("no number", "3", 0.0),
        ("0", "0", 1.0),
        ("1", "0", 0.0),
        ("20x16 mm", "20x16 mm", math.nan),  # not one number
        ("2 nodules", "2 nodules", math.nan),
        ("Both lungs", "Right lung", math.nan),
    ],
)
def test_relative_accuracy(output, answer, accuracy):
    assert relative_accuracy(output, answer) == pytest.approx(accuracy, nan_ok=True)


def test_texts_are_the_same_but_for_case_punctuation_and_space():
    assert same_text(" Right  lung.", "right lung") and not same_text("right lung", "left lung")
    assert same_text("1.5 cm.", "1.5 cm") and not same_text("1.5 cm", "15 cm") and not same_text("2/3", "23")


def test_only_answers_that_are_numbers_count_by_type():
    asked = [("lesion counting", "4", "5"), ("lesion counting", "2", "2"), ("location", "liver", "spleen")]
    ones = [
        Prediction.of(i, Question("vqa", "open", type, "How many?", (), answer), output)
        for i, (type, answer, output) in enumerate(asked)
    ]
    scores = kind_scores({"open": ones}, resamples=0)
    assert scores["open/number"].value == pytest.approx((0.75 + 1) / 2)
    assert scores["open/number_by_type/lesion counting"].value == pytest.approx(0.875)
    assert scores["open/number_by_type/location"].value is None
    assert scores["open/exact"].value == pytest.approx(1 / 3)
