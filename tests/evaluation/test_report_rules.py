"""Findings of English reports by rules: their error rate on sentences, the ladder, diversity and recall of the rare."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.test_protocols import report
from tghmoe_jax.evaluation.findings import stated
from tghmoe_jax.evaluation.protocols import Prediction, kind_scores
from tghmoe_jax.samples.questions import Question

SENTENCES = Path(__file__).parent / "radiology_sentences.txt"


def annotated(half):
    """(sentence, findings) of a half of the file."""
    text = SENTENCES.read_text().split("# development\n")[1]
    lines = text.split("# held out\n")[half == "held out"].splitlines()
    return [(sentence.strip(), annotation(right)) for sentence, _, right in (line.partition("|") for line in lines)]


def annotation(text):
    found = set()
    for part in filter(None, map(str.strip, text.split(";"))):
        words = part.split()
        lobe = words.pop() if words[-1] in ("upper", "middle", "lower") else ""
        side = words.pop() if words[-1] in ("right", "left", "both") else ""
        found |= {(" ".join(words), one, lobe) for one in (("right", "left") if side == "both" else (side,))}
    return found


def wrong(half, step):
    """How many sentences have another set of findings, cut to their first `step` parts."""

    def cut(found):
        return {one[:step] for one in found}

    return sum(cut(stated(sentence)) != cut(true) for sentence, true in annotated(half))


def test_the_error_rate_is_the_one_that_docs_state():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert len(annotated("development")) == len(annotated("held out")) == 100
    assert [wrong("development", step) for step in (1, 2, 3)] == [0, 0, 0]
    names, sides, lobes = (wrong("held out", step) for step in (1, 2, 3))
    page = " ".join(page.split())
    assert f"Of the 100 held-out sentences, {lobes} have an error" in page
    assert f"{names} in a name, {sides} in a name or side, {lobes} in a name, side or lobe" in page


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("No nodule. A nodule in the left upper lobe.", {("lung nodule", "left", "upper")}),
        ("Bilateral pleural effusions.", {("pleural effusion", "right", ""), ("pleural effusion", "left", "")}),
        ("No evidence of consolidation in the right lower lobe.", set()),
        ("Possible nodule in the right lower lobe.", set()),
        ("Is there a nodule?", set()),
        ("", set()),
    ],
)
def test_negation_uncertainty_and_sides(text, found):
    assert stated(text) == found


SIDES, LOBES = st.sampled_from(["right", "left"]), st.sampled_from(["upper", "lower"])
NAMES = st.sampled_from(["consolidation", "atelectasis", "bronchiectasis", "emphysema", "fibrosis"])


@given(st.lists(st.tuples(NAMES, SIDES, LOBES), max_size=5))
def test_sentences_of_a_template_give_their_findings_back_and_denied_ones_nothing(truth):
    text = " ".join(f"There is {name} in the {side} {lobe} lobe." for name, side, lobe in truth)
    assert stated(text) == set(truth)
    assert stated(text.upper()) == set(truth)
    assert stated(text.replace("There is", "There is no")) == set()


@given(st.text(max_size=300))
def test_any_text_is_read(text):
    assert all(len(one) == 3 for one in stated(text))


def test_a_long_text_is_read_in_bounded_time():
    stated("plaque calcified right nodule " * 4000)  # a pattern that backtracks would not end


def scores(pairs):
    ones = [Prediction.of(i, asked(true), said) for i, (true, said) in enumerate(pairs)]
    found = kind_scores({"report": ones}, resamples=0)
    return {key.removeprefix("report/"): one.value for key, one in found.items() if key.startswith("report/")}


def asked(answer):

    return Question("report", "report", "report", "", (), answer)


RIGHT = "There is a nodule in the right upper lobe."


def test_the_ladder_counts_the_name_then_its_side_then_its_lobe():
    said = [RIGHT, "A nodule in the right lower lobe.", "A nodule in the left upper lobe.", "Emphysema.", ""]
    found = scores([(RIGHT, one) for one in said])
    names = 5 + 4  # true and stated
    expected = [2 * 3 / names, 2 * 2 / names, 2 * 1 / names]
    assert [found[f"ladder_{step}"] for step in ("present", "side", "lobe")] == pytest.approx(expected)
    assert scores([("Normal.", "Normal.")])["ladder_present"] is None


def test_diversity_equals_plain_counts():
    rng = np.random.default_rng(0)
    texts = ["Normal chest.", "normal  CHEST.", RIGHT, "Emphysema.", "Cardiomegaly.", ""]
    said = [texts[i] for i in rng.choice(len(texts), 40, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05])]
    plain = [" ".join(text.lower().split()) for text in said]
    found = scores([(RIGHT, text) for text in said])
    assert found["distinct"] == pytest.approx(len(set(plain)) / 40)
    assert found["most_frequent"] == pytest.approx(max(map(plain.count, plain)) / 40)
    assert found["all_normal"] == pytest.approx(plain.count("normal chest.") / 40)
    assert found["all_normal_true"] == 0.0
    for few, share in ((texts[:4], 1 / 2), (["a", "b", "c", "d"], 1 / 4), (["a", "a", "b", "b"], 1 / 2)):
        assert scores([(RIGHT, text) for text in few])["most_frequent"] == share  # one text, however many tie


def test_recall_of_rare_findings_falls_where_reports_collapse_to_the_frequent():
    true = ["Emphysema."] * 4 + ["Atelectasis."] * 4 + ["Cardiomegaly.", "Emphysema. Pneumothorax."]
    found = scores([(text, "Emphysema. Atelectasis.") for text in true])
    assert (found["recall_rare"], found["recall_frequent"]) == (0.0, 1.0)
    again = scores([(text, text) for text in true])
    assert (again["recall_rare"], again["recall_frequent"]) == (1.0, 1.0)


def test_findings_that_a_data_set_knows_take_the_place_of_the_rules():
    stone, cyst = ("stone", "kidney", "left"), ("cyst", "ovary", "right")
    ones = [report(0, "text", [stone, cyst], [stone]), report(1, "text", [stone], [])]
    found = kind_scores({"report": ones}, resamples=0)
    assert found["report/ladder_present"].value == found["report/ladder_lobe"].value == pytest.approx(2 / 4)
    assert found["report/recall_rare"].value == 0.0 and found["report/recall_frequent"].value == 0.5
    assert found["report/all_normal"].value == 0.5 and found["report/all_normal_true"].value == 0.0
    unknown = [dataclasses.replace(one, findings_stated=None) for one in ones]  # a control that was read from a file
    assert kind_scores({"report": unknown}, resamples=0)["report/all_normal"].value is None
