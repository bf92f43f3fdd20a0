"""The containment rule and the strict rule of closed-ended questions."""

import pytest

from tghmoe_jax.evaluation.closed import contains_letter, disagreement, strict_letter, strictly_correct

CHOICES = ("liver", "spleen", "left kidney", "A mass")


@pytest.mark.parametrize(
    "output, right",
    [
        ("A. liver", True),
        ("the answer is A.", True),
        ("Vitamin A.", True),  # M3D's false positive, kept as published
        ("A. liver B. spleen", True),
        ("A", False),
        ("(A) liver", False),
        ("a. liver", False),
        ("liver", False),
        ("", False),
    ],
)
def test_containment_is_letter_and_full_stop_anywhere(output, right):
    assert contains_letter(output, "A") is right


def test_containment_without_a_true_letter_is_never_right():
    assert not contains_letter("Any sentence.", "")


@pytest.mark.parametrize(
    "output, letter",
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("D)", "D"),
        (" B. spleen\n", "B"),
        ("B.spleen", "B"),
        ("B. the spleen", "B"),
        ("(C) left kidney", "C"),
        ("B spleen", "B"),
        ("spleen", "B"),
        ("left kidney", "C"),
        ("A mass", "D"),  # an option's exact text, not the letter A
    ],
)
def test_strict_reads_one_stated_option(output, letter):
    assert strict_letter(output, CHOICES) == letter


@pytest.mark.parametrize(
    "output",
    [
        "",
        "E",
        "E. something",
        "b. spleen",
        "A liver lesion is seen",  # an article
        "Answer: B.",
        "A. liver B. spleen",
        "A. B. C. D.",
        "A.B.",
        "(A) (B)",
        "A) or B)",
        "A/B",
        "AB",
        "Spleen",
        "the spleen",
        "spleen.",
        "Vitamin A.",
    ],
)
def test_strict_refuses_everything_else(output):
    assert strict_letter(output, CHOICES) == ""


def test_strict_lets_an_option_name_another_letter_in_its_own_text():
    choices = ("hepatitis B.", "hepatitis C")
    assert strict_letter("A. hepatitis B.", choices) == "A"
    assert strict_letter("A. maybe hepatitis B.", choices) == ""


def test_strict_counts_only_the_true_letter():
    assert strictly_correct("B. spleen", "B", CHOICES)
    assert not strictly_correct("B. spleen", "A", CHOICES)
    assert not strictly_correct("", "", ())
    assert not strictly_correct("", "A", ("", "liver"))


def test_strict_keeps_every_letter_when_choices_repeat():
    assert strict_letter("C. NA", ("liver", "NA", "NA", "spleen")) == "C"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("A", ""),
        ("(A)", ""),
        ("A. liver", ""),
        ("A liver", ""),
        ("a. liver", "none of the choices"),
        ("Liver", ""),
        ("B. spleen, since it is large", ""),
        ("A mass", ""),  # an option's own text, not the letter A
        ("C. left kidney", ""),
        ("A. spleen", "letter and text disagree"),
        ("A spleen", "letter and text disagree"),
        ("D. LIVER.", "letter and text disagree"),
        ("A. livery", "none of the choices"),
        ("A. heart", "none of the choices"),
        ("E. liver", "none of the choices"),
        ("the heart", "none of the choices"),
        ("", "none of the choices"),
    ],
)
def test_an_answer_whose_letter_and_text_disagree_or_that_is_no_choice_is_told(output, said):
    assert disagreement(output, CHOICES) == said


def test_a_text_that_begins_another_option_is_that_of_the_longer_one():
    choices = ("left", "left lung")
    assert disagreement("B. left lung", choices) == "" and disagreement("A. left", choices) == ""
    assert disagreement("A. left lung", choices) == "letter and text disagree"
