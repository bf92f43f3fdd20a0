"""A third task is one `Task` and one line that registers it: data, batches, scores, files and pages follow."""

import csv
import json

import numpy as np
import pytest

from tests.evaluation.test_html_report import Source as Slices
from tghmoe_jax.bases.base import EMBEDDED
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.datasets.file_source import FileSource
from tghmoe_jax.datasets.manifest import check_manifest
from tghmoe_jax.drawn.phantom_source import PhantomSource
from tghmoe_jax.drawn.scenes import ScenesSource
from tghmoe_jax.evaluation import comparison, files, html_report, outputs, protocols, provenance
from tghmoe_jax.evaluation import metrics as registry
from tghmoe_jax.evaluation.metrics import Metric
from tghmoe_jax.reader.examination import kinds_of
from tghmoe_jax.samples import pipeline, tasks
from tghmoe_jax.samples.questions import Question
from tghmoe_jax.samples.tasks import Columns, Task
from tghmoe_jax.samples.tokenizer import Tokenizer

TRIAGE = Task(
    "triage",
    ("triage",),
    request="How urgent is this scan?",
    columns={"triage": Columns(("Question", "Level", "Level Pred"), truth="Level", output="Level Pred", order=3)},
    scores={"triage/accuracy": "triage_accuracy"},
)
ACCURACY = Metric("accuracy", "triage", lambda ones: [one.output == one.answer for one in ones], column="Right")


@pytest.fixture(autouse=True)
def triage():
    kept = [(table, table.copy()) for table in (tasks.TASKS, tasks.TASK_OF, tasks.COLUMNS, registry.METRICS)]
    kinds = list(tasks.KINDS)
    tasks.register(TRIAGE)
    registry.register(ACCURACY)
    yield
    for table, before in kept:
        table.clear()
        table.update(before)
    tasks.KINDS[:] = kinds


class Source(Slices):
    aux_names = ()

    def slice_spacing(self, index):
        return 1.0

    def __len__(self):
        return 4

    def question(self, index, kind, rng, type=None):
        return Question(tasks.TASK_OF[kind], kind, "", TRIAGE.request, (), ("urgent", "routine")[index % 2])


def run(wrong=()):
    asked = [Source().question(i, "triage", None) for i in range(4)]
    found = [
        protocols.Prediction.of(i, q, "?" if i in wrong else q.answer, task_predicted="triage")
        for i, q in enumerate(asked)
    ]
    blind = [protocols.Prediction.of(i, q, "routine") for i, q in enumerate(asked)]
    return {"triage": found, "control/blind_triage": blind}


def test_a_third_task_is_drawn_into_batches():
    mixture = pipeline.mixture_of({"report": 1, "triage": 1})
    assert mixture == (("report", 1), ("triage", 1))
    names = tuple(tasks.TASKS)
    spec = pipeline.BatchSpec(4, 1, 1, 128, mixture, names)
    assert spec.task_shares == (0.5, 0, 0.5)
    batch = next(pipeline.train_iterator(Source(), Tokenizer.from_folder(EMBEDDED, CHAT), spec, seed=0, steps=1))
    assert np.array_equal(batch["task"], [[0, 2, 0, 2]])
    assert batch["loss_mask"].any(axis=-1).all()


def test_a_third_task_is_read_from_files(tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).random((1, 8, 32, 32), np.float32))
    line = {"task": "triage", "answer": "urgent", "split": "train"}
    lines = [line | {"volume": f"{n}.npy", "question": ("", "Is it urgent?")[n % 2]} for n in range(4)]
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    report = check_manifest(path)
    assert report.problems == () and report.text().splitlines()[0].split()[-1] == "triage"
    data = {"name": "manifest", "root": str(tmp_path), "manifest": str(path), "slices": 8, "size": 32}
    source = FileSource(data | {"channels": "windows3"}, "train")
    assert source.counts("triage") == (4,) and source.counts("report") == source.counts("open") == (0,)
    rng = np.random.default_rng(0)
    asked = [source.item("triage", n, rng)[1] for n in range(2)]
    assert [(one.task, one.kind, one.question) for one in asked] == [
        ("triage", "triage", TRIAGE.request), ("triage", "triage", "Is it urgent?"),
    ]  # fmt: skip
    spec = pipeline.BatchSpec(4, 1, 1, 128, (("triage", 1),), tuple(tasks.TASKS))
    batch = next(pipeline.train_iterator(source, Tokenizer.from_folder(EMBEDDED, CHAT), spec, seed=0, steps=1))
    assert np.array_equal(batch["task"], [[2, 2, 2, 2]])
    path.write_text(json.dumps(lines[1] | {"choices": ["urgent", "routine"]}) + "\n")
    assert [one.reason for one in check_manifest(path).problems] == ["the task triage has no choices."]


def test_a_third_task_is_scored_written_read_compared_and_shown(tmp_path):
    own = run(wrong=[2])
    scores = protocols.score(own)
    assert scores["triage/accuracy"] == 0.75 and scores["triage/accuracy_few_units"] == 4
    assert scores["control/blind_triage_accuracy"] == 0.5 and scores["router/task_accuracy"] == 1
    (path,) = outputs.write_predictions(tmp_path, own)
    assert path.name == "predictions_triage.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["Right"] for row in rows] == ["1.0", "1.0", "0.0", "1.0"]
    again = files.read_run(tmp_path)
    assert protocols.score(again)["triage/accuracy"] == 0.75
    assert protocols.score(again)["control/blind_triage_accuracy"] == 0.5
    assert comparison.compare(again, run())["triage/accuracy"]["difference"] == 0.25
    assert provenance.manifest(own)["items"]["triage"] == 4
    assert "triage/accuracy" in outputs.table(scores, own)
    html_report.write(tmp_path / "report.html", scores, own, Slices(), tuple(tasks.TASKS))
    page = (tmp_path / "report.html").read_text()
    assert "triage/accuracy" in page and "sent to triage" in page and "Triage: sample cases" in page


def test_only_kinds_that_model_and_source_know_are_asked():
    assert kinds_of(Source(), ("report", "vqa", "triage")) == ["closed", "open", "report", "triage"]
    assert kinds_of(Source(), ("report", "triage")) == ["report", "triage"]
    for drawn in (PhantomSource, ScenesSource):
        assert kinds_of(drawn, ("report", "vqa", "triage")) == ["closed", "open", "report"]


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        tasks.register(TRIAGE)
