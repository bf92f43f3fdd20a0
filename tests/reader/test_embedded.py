"""The embedded reader: what it says about itself, that it reads phantoms, and what it refuses on scans of patients."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tghmoe_jax
from configs import evaluate as evaluate_config
from tests.scans import ct_fixtures as ct
from tghmoe_jax import digests, evaluate, predict
from tghmoe_jax.bases import base
from tghmoe_jax.drawn import phantom
from tghmoe_jax.drawn.cache import seeds_of
from tghmoe_jax.drawn.phantom_report import parse_findings
from tghmoe_jax.drawn.phantom_text import make_question
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import DISCLAIMER
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.training import run_folder

PLANE = ("--question", "Which plane is this?", "--choices", "axial|coronal|sagittal|oblique")


@pytest.fixture(scope="module")
def reader() -> Reader:
    return tghmoe_jax.load()


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> list[tuple[Path, phantom.Truth]]:
    """Axial test phantoms with lesions as NIfTI files: predict sees every scan in axial slices."""
    folder = tmp_path_factory.mktemp("phantoms")
    seeds = seeds_of("test", 10_000, 0)[5000:]  # not among the volumes of the scores in the manifest
    wanted = (seed for seed in seeds if (truth := phantom.plan(seed).truth).plane == "axial" and truth.lesions)
    files = []
    for seed, _ in zip(wanted, range(20), strict=False):
        drawn = phantom.draw(seed)
        file = ct.write_nifti(folder / f"{seed}.nii.gz", drawn.hu, ct.axes_of(drawn.truth.spacing_mm))
        files.append((file, drawn.truth))
    return files


def answered(capsys, volume, *flags) -> dict:
    """The JSON object of the command without --checkpoint."""
    assert predict.main(["--volume", str(volume), *flags, "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert err == "" and record["checkpoint"]["name"] == "embedded" and record["disclaimer"] == DISCLAIMER
    assert record["warnings"][0].startswith("domain phantom: the reader embedded in the package")
    ct.nothing_secret(out)
    return record


def test_it_is_examined_on_phantoms_that_are_kept_below_runs():
    """Its own config names a folder of the machine it was trained on, which git would not ignore here."""
    wanted = evaluate_config.get_config("bench")
    data = evaluate.data_of(wanted, run_folder.read_config(run_folder.EMBEDDED))
    assert (data["name"], data["root"], data["text_length"]) == ("phantom", "runs/data", 80)
    wanted.data.update({"root": "elsewhere", "text_length": 90})
    data = evaluate.data_of(wanted, run_folder.read_config(run_folder.EMBEDDED))
    assert (data["root"], data["text_length"]) == ("elsewhere", 90)


def test_a_run_is_examined_as_it_recorded(tmp_path, monkeypatch):
    """... on the devices that are here; with --items on as many, without the long studies."""
    asked = []
    monkeypatch.setattr(evaluate, "run", lambda config, target: asked.append((config, Path(target))))
    for more in ([], ["--items", "4"]):
        assert evaluate.main(["run", "embedded", "--to", str(tmp_path / str(len(more))), *more]) == 0
    (whole, first), (short, second) = asked
    assert (first.name, second.name) == ("0", "2")
    recorded = run_folder.read_config(run_folder.EMBEDDED)
    assert whole.eval.to_dict() == recorded["eval"] and whole.eval.transfer > 0
    assert short.eval.to_dict() == whole.eval.to_dict() | {"items": 4, "batch": 4, "transfer": 0, "adversarial": 0}
    for config in (whole, short):
        assert config.init_from == "embedded" and config.mesh.to_dict() == {"data": -1, "fsdp": 1, "expert": 1}
        assert evaluate.data_of(config, recorded) == recorded["data"] | {"root": "runs/data"}


@pytest.mark.parametrize(("flags", "said"), [
    (["--items", "1"], "--items 1 is too small to shuffle volumes"),
    (["--to", "taken/scores"], "--to taken/scores cannot be written"),
    ([], "saw no volumes or pictures"),
])  # fmt: skip
def test_what_cannot_be_examined_is_one_sentence(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    run = "embedded"
    if not flags:
        run = shutil.copytree(run_folder.EMBEDDED, tmp_path / "text", ignore=shutil.ignore_patterns("*.safetensors"))
        (run / "model.safetensors").touch()
        config = run_folder.read_config(run)
        text = config["data"] | {"name": "scenes", "slices": 0}
        (run / "config.json").write_text(json.dumps(config | {"data": text}))
        digests.write(run, digests.of_files(run, digests.files(run)))
    assert evaluate.main(["run", str(run), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_its_files_are_small_and_name_no_machine():
    files = [file for folder in (run_folder.EMBEDDED, base.EMBEDDED) for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 24e6
    for file in files:
        if file.name in ("config.json", "manifest.json"):
            assert not any(word in file.read_text() for word in ("/home", "/tmp", "/work", "/root")), file


def test_its_manifest_holds_what_the_answer_rests_on(reader):
    manifest = reader.run.manifest
    assert manifest["domain"] == "phantom" and manifest["digest"] == reader.run.digest
    assert set(manifest["input_ranges"]) == {"spacing_mm", "slices", "field_of_view_mm", "hu"}
    scores = manifest["scores"]
    assert set(scores) == {"metrics.json", "second_style/metrics.json", "adversarial.json"}
    assert 0 < scores["metrics.json"]["control/section_shuffled_closed_accuracy"] < 1
    assert reader.model.cfg.tasks == ("report", "vqa") and reader.groups == 2


def test_it_answers_about_phantoms_it_never_saw(reader, phantoms):
    """Well below its scores and well above chance (0.25), for a handful of volumes."""
    rng = np.random.default_rng(0)
    hits, blind = [], []
    for file, truth in phantoms:
        asked = make_question(truth, "closed", rng, ("phase", "organ", "abnormality")[len(hits) % 3])
        answer = reader.ask(file, asked.question, asked.choices)
        hits.append(answer.text == asked.target)
        blind.append(answer.blind_text == asked.target)
        assert answer.task == "vqa" and answer.task_probabilities["vqa"] > 0.9
        assert len(answer.warnings) == 1, answer.warnings  # its own domain: nothing lies outside the ranges
    assert np.mean(hits) >= 0.7 and np.mean(blind) <= 0.55


def test_a_report_on_a_phantom_states_its_findings_when_it_is_allowed(reader, phantoms):
    states = [
        parse_findings(reader.report(file, allow_out_of_domain=True).text) & truth.triples
        for file, truth in phantoms[:8]
    ]
    assert sum(map(bool, states)) >= 4
    with pytest.raises(UserError, match="--allow-out-of-domain"):
        reader.report(phantoms[0][0])


def test_a_generated_scan_outside_the_ranges_is_answered_with_every_warning(tmp_path, capsys):
    scan = ct.write_nifti(tmp_path / f"{ct.SECRET}.nii.gz", ct.patient())
    record = answered(capsys, scan, *PLANE)
    heads = {text.split(":")[0] for text in record["warnings"]}
    assert heads == {"domain phantom", "spacing", "slices", "field of view", "HU"}
    assert len(record["option_likelihoods"]) == 4 and isinstance(record["blind_text"], str)
    assert sum(record["task_probabilities"].values()) == pytest.approx(1, abs=1e-3)


def test_the_answer_of_the_terminal_names_the_reader(tmp_path, capsys):
    scan = ct.write_nifti(tmp_path / "scan.nii.gz", ct.patient())
    assert predict.main(["--volume", str(scan), *PLANE]) == 0
    out = capsys.readouterr().out
    assert "checkpoint  embedded " in out and "no --checkpoint was named" in out and out.endswith(DISCLAIMER + "\n")


@ct.needs_real
@pytest.mark.parametrize("name", ["abdomen_pelvis_3mm.nii.gz", "dicom_abdomen"])
def test_a_real_scan_is_answered_with_warnings_and_gets_no_report(name, capsys):
    record = answered(capsys, ct.REAL / name, *PLANE)
    assert any(text.startswith("spacing") for text in record["warnings"])
    assert answered(capsys, ct.REAL / name, "--question", "Which phase is this?", "--task", "vqa")["task"] == "vqa"
    asked = ["--question", "Write a report for this CT."]
    for flags in (["--report"], ["--question", "Which phase is this?", "--task", "report"], asked):
        assert predict.main(["--volume", str(ct.REAL / name), *flags]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "no scan of a patient" in err and "--allow-out-of-domain" in err
    written = answered(capsys, ct.REAL / name, "--report", "--allow-out-of-domain")
    assert written["task"] == "report"


def test_confidence_stands_beside_answers_about_what_it_was_calibrated_on_alone(phantoms, capsys, tmp_path):
    volume, truth = phantoms[0]
    allowed = ("--allow-out-of-domain",)
    for more, value in (((), None), (allowed, float)):
        record = answered(capsys, volume, *PLANE, *more)
        sure = record["confidence"]
        if value is None:
            assert sure["value"] is None and "no scan of a patient" in sure["why"]
            assert record["confident_enough"] is None  # nothing was asked for
        else:
            assert 0 < sure["value"] < 1 and 0 <= sure["validation_right"] <= sure["validation_items"] > 9
            low, high = sure["validation_ci95"]
            assert 0 <= low <= sure["validation_right"] / sure["validation_items"] <= high <= 1
    open_question = ("--question", "Which plane is this?", *allowed)
    assert 0 < answered(capsys, volume, *open_question)["confidence"]["value"] < 1
    far = ct.write_nifti(tmp_path / "far.nii.gz", phantom.draw(truth.seed).hu, ct.axes_of((40.0, 9.0, 9.0)))
    for more, said in ((allowed, False), ((), True)):
        why = answered(capsys, far, *PLANE, *more)["confidence"]["why"]
        assert "outside the ranges" in why and ("no scan of a patient" in why) == said
        assert "--allow-out-of-domain" not in why  # which would give no confidence here


def test_an_answer_that_is_not_sure_enough_is_withheld(phantoms, capsys):
    volume, _ = phantoms[0]
    asked = ["--volume", str(volume), *PLANE, "--allow-out-of-domain", "--min-accuracy"]
    assert predict.main([*asked, "0.5"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(("A.", "B.", "C.", "D.")) and "confidence  0." in said and "validation questions" in said
    assert predict.main([*asked, "0.99999"]) == 0
    assert capsys.readouterr().out.startswith("not confident enough: ")
    assert predict.main(["--volume", str(volume), *PLANE, "--min-accuracy", "0.5"]) == 0  # of the wrong domain
    assert capsys.readouterr().out.startswith("not confident enough: embedded has seen drawn phantoms")
    for wrong in ("0", "1.5", "nan"):
        assert predict.main([*asked, wrong]) == 2
    capsys.readouterr()
    assert predict.main(["--volume", str(volume), "--report", "--min-accuracy", "0.9"]) == 2
    assert "--min-accuracy belongs to --question" in capsys.readouterr().err
