"""Examinations of a reader that knows every answer: what is asked, what each control takes away, what is left out."""

import csv
import json
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tiny
from tghmoe_jax import evaluate
from tghmoe_jax.bases.base import EMBEDDED
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation.protocols import CONTROLS
from tghmoe_jax.reader import examination
from tghmoe_jax.reader.answer import Answer, no_load
from tghmoe_jax.samples.questions import Question
from tghmoe_jax.samples.tasks import TASK_OF
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.studies import hard_questions

PLANES = ("axial", "coronal", "sagittal")


class Files:
    """Nine volumes of five cases, whose slices show their number; volume 3 is broken, and one question is too long."""

    weights, made_up, aux_names = (), {}, ()

    def __len__(self):
        return 9

    def counts(self, kind):
        return (len(self),) if kind in ("closed", "open", "report") else (0,)

    def item(self, kind, index, rng):
        text = f"What does volume {index} show?" + " Look well." * (40 * (kind == "open" and index == 5))
        choices = PLANES if kind == "closed" else ()
        return index, Question(TASK_OF[kind], kind, "plane", text, choices, PLANES[index % 3])

    def slices(self, index):
        if index == 3:
            raise UserError("scan3.nii.gz is cut off; copy it again.")
        return np.full((4, 8, 8, 3), index, np.uint8), np.ones(4, bool)

    def slice_spacing(self, index):
        return 1.0

    def question(self, index, kind, rng, type=None):
        raise AssertionError("questions of files are given")

    def case(self, index):
        return index // 2

    def key(self, index):
        return f"scan{index}.nii.gz"

    def group(self, index):
        return "chest" if index < 5 else "abdomen"

    def digest(self):
        return ""

    def findings(self, index):
        return frozenset()

    def sides(self, index):
        return "R", "L"

    aux = aux_cells = input_ranges = question


class Oracle:
    """Is right about the volume that a question is about, with the experts of its task; says nothing otherwise."""

    def __init__(self, errs=False):
        cfg = tiny.model(tgh={"groups": 2}).cfg
        self.model, self.tasks, self.groups = types.SimpleNamespace(cfg=cfg), cfg.tasks, cfg.tgh.groups
        self.tokenizer, self.text_length = Tokenizer.from_folder(EMBEDDED, CHAT), 80
        self.run, self.checkpoint, self.errs, self.asked = None, None, errs, []

    def answer(self, source, requests, new_tokens):
        self.asked += requests
        return [self._answer(source, request) for request in requests]

    def _answer(self, source, request):
        if request.options:
            options = request.options
            return Answer(
                options=options, likelihoods=np.array([-float(o != request.question.answer) for o in options])
            )
        own = self.tasks.index(request.question.task)
        group = (own + self.errs) % 2 if request.group is None else request.group
        seen = request.visible and f"volume {source.slices(request.volume)[0].max()} " in request.question.question
        knows = group == own and (seen or not isinstance(source, Files))
        return Answer(request.question.target if knows else "", group, load=no_load())

    def route(self, source, asked):
        right = np.array([self.tasks.index(question.task) for _, question in asked], int)
        return np.eye(2)[(right + self.errs) % 2]


def config(**changes) -> ConfigDict:
    """What an examination reads of a config."""
    data = {"name": "manifest", "drop_leaks": "none", "channels": "windows3"}
    asked = {"items": 9, "seed": 1, "controls": CONTROLS, "new_tokens": 4, "answer_tokens": 4, "adversarial": 3}
    return ConfigDict({"data": data, "eval": asked, "max_bad_fraction": 0.1} | changes)


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """The metrics of the files, the folder of the scores, what was reported, and the reader."""
    folder, said, reader = tmp_path_factory.mktemp("examined"), [], Oracle()
    metrics = examination.examine(reader, Files(), Files(), config(), folder, said.append)
    return metrics, folder, said, reader


def test_who_knows_all_scores_all_and_nothing_under_a_control(examined):
    metrics, folder, _, _ = examined
    assert metrics == json.loads((folder / "metrics.json").read_text())
    for key in ("closed/accuracy", "closed/accuracy_strict", "closed/ranked_accuracy", "open/bleu1", "report/bleu1"):
        assert metrics[key] == 1, key
    for control in CONTROLS:
        assert metrics[f"control/{control}_closed_accuracy"] == 0, control
    assert metrics["router/task_accuracy"] == 1 and metrics["router/keyword_accuracy"] < 1
    assert metrics["router/task_accuracy_unseen_wording"] is None  # files have one wording


def test_a_broken_volume_and_a_long_question_are_left_out_and_named(examined):
    _, folder, said, _ = examined
    keys = {}
    for kind in ("closed", "open", "report"):
        with open(folder / f"predictions_{kind}.csv", encoding="utf-8", newline="") as lines:
            keys[kind] = {row["Key"] for row in csv.DictReader(lines)}
    every = {f"scan{i}.nii.gz" for i in range(9)}
    assert keys == {kind: every - {"scan3.nii.gz"} for kind in ("closed", "report")} | {
        "open": every - {"scan3.nii.gz", "scan5.nii.gz"}
    }
    assert "skipped scan3.nii.gz: scan3.nii.gz is cut off; copy it again." in said
    assert any(text.startswith("skipped scan5.nii.gz: a question is longer than") for text in said)
    with pytest.raises(UserError, match="4 of .* items cannot be used"):
        examination.examine(Oracle(), Files(), Files(), config(max_bad_fraction=0.03), folder, said.append)


def test_controls_show_another_patient_and_every_blind_prompt_once(examined):
    requests = [request for request in examined[3].asked if not request.options]
    blind = [request.question.prompt for request in requests if not request.visible]
    assert len(blind) == len(set(blind)) == 8 + 8
    shown = [(int(r.question.question.split()[3]), r.volume) for r in requests if r.visible and r.group is None]
    own, other = [[pair for pair in shown if (pair[0] == pair[1]) is same] for same in (True, False)]
    assert len(own) == 8 + 7 + 8
    assert sum(a // 2 != b // 2 for a, b in other) >= 16 and 3 not in {volume for _, volume in shown}


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> ConfigDict:
    """The config of an examination on phantoms, asked in one hard way of the many."""
    monkeypatch.setattr(hard_questions, "HARD_WORDINGS", ("typos",))
    data = {"name": "phantom", "root": str(tmp_path), "slices": 8, "size": 32, "channels": "windows3"}
    return config(data=data | {"drop_leaks": "none"})


def weighed(ways: dict, errs: bool) -> None:
    """What predicted routing scores is what true routing scores where the router is right, and else the other's."""
    assert ways.keys() == {"seen", "unseen", "typos"}
    for way, scores in ways.items():
        assert {scores[f"router/{kind}"] for kind in ("closed", "open", "report")} == {float(not errs)}, way
        for score in ("closed/accuracy", "report/finding_f1"):
            assert scores[f"{score}/predicted"] == scores[f"{score}/{'wrong' if errs else 'oracle'}"], way
        assert (scores["closed/accuracy/oracle"], scores["closed/accuracy/wrong"]) == (1, 0), way
    assert ways["seen"]["keyword/vqa"] == ways["seen"]["keyword/report"] == 1


def test_hard_questions_weigh_right_and_wrong_experts_by_the_router(drawn):
    reader = Oracle(errs=True)
    weighed(hard_questions.hard_questions(reader, drawn, lambda text: None), errs=True)
    assert reader.text_length == 80


def test_a_long_evaluation_adds_the_other_styles_and_the_hard_ways(drawn, tmp_path):
    drawn.eval.update({"items": 3, "transfer": 2})
    said = []
    metrics = evaluate.evaluate_all(Oracle(), drawn, tmp_path / "eval", said.append)
    assert metrics == json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["report/finding_f1"] == metrics["router/task_accuracy_unseen_wording"] == 1
    weighed(json.loads((tmp_path / "eval" / "adversarial.json").read_text()), errs=False)
    for style in ("second", "third"):
        assert json.loads((tmp_path / "eval" / f"{style}_style" / "manifest.json").read_text())["items"]["closed"] == 2
        assert f"the {style} drawing style, never trained on:" in said


def test_a_drawn_set_has_two_wordings(drawn):
    seen, unseen = examination.test_sources(drawn)
    asked = [source.question(0, "report", np.random.default_rng(0)).question for source in (seen, unseen)]
    assert seen is not unseen and seen.truths == unseen.truths and asked[0] != asked[1]


def test_confidence_is_calibrated_on_validation_items_and_stands_beside_the_answers(tmp_path, monkeypatch):
    class More(Files):
        """Forty questions a kind, about the volumes that are not broken."""

        def counts(self, kind):
            return (40,) if kind != "report" else (0,)

        def item(self, kind, index, rng):
            return super().item(kind, (0, 1, 2, 4, 6, 7, 8)[index % 7], rng)

    splits = []
    monkeypatch.setattr(examination, "make_source", lambda data, split, *_: splits.append(split) or More())
    asked = config(**{"eval": dict(config().eval) | {"calibration": 40, "items": 40, "controls": ()}})
    found = examination.calibrate(Oracle(), asked, lambda text: None)
    assert splits == ["validation"] and set(found) == {"closed", "open"} and found["closed"].items == 40
    metrics = examination.examine(Oracle(), More(), More(), asked, tmp_path, lambda text: None, found)
    assert metrics["closed/calibration_error"] < 0.1 and metrics["open/calibration_error"] < 0.1
    with open(tmp_path / "predictions_closed.csv", newline="", encoding="utf-8") as lines:
        assert all(0.8 < float(row["Confidence"]) < 1 for row in csv.DictReader(lines))
    nothing = dict(asked.eval) | {"calibration": 5}
    assert examination.calibrate(Oracle(), config(eval=nothing), lambda text: None) == {}
