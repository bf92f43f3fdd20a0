"""`evaluate pack`: a folder that scores as the run did, names no path, and is whole."""

import hashlib
import json
import subprocess

import pytest

from tests.evaluation.test_score_files import keyed
from tghmoe_jax import evaluate
from tghmoe_jax.evaluation import DISCLAIMER, outputs
from tghmoe_jax.evaluation.protocols import score

NAMES = {"closed", "open", "report"}
FILES = {"items.jsonl", "scores.json", "metrics.json", "manifest.json", "config.json", "README.md", "SHA256SUMS"}


@pytest.fixture
def run(tmp_path):
    """A run of two evaluations; the later one counts."""
    folder = tmp_path / "home" / "alice" / "stage2"
    for step in ("8", "40"):
        to = folder / "eval" / step
        outputs.write_predictions(to, keyed())
        outputs.write_json(to / "metrics.json", score(keyed()))
        (to / "report.html").write_text("slices of patients")
    manifest = {"checkpoint": {"name": "/home/alice/stage2", "step": 40}, "data": {"name": "manifest"}}
    outputs.write_json(folder / "eval" / "40" / "manifest.json", manifest)
    root = "/home/alice/data/a,/home/alice/data/b"
    config = {"init_from": "gs://alice/runs/stage1", "data": {"root": root, "name": "m3d"}, "base": "runs/base"}
    outputs.write_json(folder / "config.json", config)
    return folder


def packed(run, tmp_path):
    assert evaluate.main(["pack", str(run), "--to", str(tmp_path / "packed")]) == 0
    return tmp_path / "packed"


def test_the_packed_predictions_score_as_the_pack_says_and_as_the_run_did(run, tmp_path, capsys):
    folder = packed(run, tmp_path)
    assert {path.name for path in folder.iterdir()} == FILES | {f"predictions_{kind}.csv" for kind in NAMES}
    capsys.readouterr()
    assert evaluate.main(["score", str(folder), "--json"]) == 0
    scores = json.loads((folder / "scores.json").read_text())
    assert json.loads(capsys.readouterr().out) == scores
    metrics = json.loads((folder / "metrics.json").read_text())
    assert scores == {key: value for key, value in metrics.items() if value is not None}
    card = (folder / "README.md").read_text()
    assert DISCLAIMER in card and "evaluate score" in card and "has other values" not in card


def test_items_name_what_was_asked_with_the_digest_of_each(run, tmp_path):
    lines = (packed(run, tmp_path) / "items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    asked = [one for kind in ("closed", "open", "report") for one in keyed()[kind]]
    assert [item["key"] for item in items] == [one.key for one in asked] and len(set(lines)) == len(lines)
    assert {item["split"] for item in items} == {"test"}
    text = "\0".join((asked[0].prompt, asked[0].letter, asked[0].answer))
    assert items[0]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_no_path_of_the_machine_and_no_picture_is_packed(run, tmp_path):
    folder = packed(run, tmp_path)
    assert not any("alice" in path.read_text() or "patients" in path.read_text() for path in folder.iterdir())
    assert json.loads((folder / "config.json").read_text()) == {
        "init_from": "stage1", "data": {"root": "a,b", "name": "m3d"}, "base": "runs/base",
    }  # fmt: skip


def test_the_checksums_are_those_of_every_file(run, tmp_path):
    folder = packed(run, tmp_path)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder).returncode == 0
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == len(list(folder.iterdir())) - 1
    (folder / "predictions_open.csv").write_text("changed")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode != 0


def test_the_card_names_scores_that_the_run_wrote_otherwise(run, tmp_path):
    file = run / "eval" / "40" / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"closed/accuracy": 0.123}))
    assert "has other values, for instance of an older version: closed/accuracy\n" in (
        (packed(run, tmp_path) / "README.md").read_text()
    )


def test_a_folder_of_predictions_alone_is_packed_too(run, tmp_path):
    folder = packed(run / "eval" / "8", tmp_path)
    assert not (folder / "config.json").exists() and (folder / "scores.json").exists()
    assert json.loads((folder / "items.jsonl").read_text().splitlines()[0])["split"] is None


def test_nothing_is_replaced_and_nothing_is_packed_from_nothing(run, tmp_path, capsys):
    folder = packed(run, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for argv, said in (
        ([str(run), "--to", str(folder)], "exists; name a new folder"),
        ([str(tmp_path / "nowhere")], "nor a run that was evaluated"),
    ):
        assert evaluate.main(["pack", *argv]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_a_trained_run_packs_with_the_scores_that_it_wrote(tiny_stage2, tmp_path):
    folder = packed(tiny_stage2, tmp_path)
    assert "has other values" not in (folder / "README.md").read_text()
    assert str(tiny_stage2.parent) not in (folder / "config.json").read_text()
