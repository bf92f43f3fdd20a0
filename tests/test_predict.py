"""The whole command `python -m tghmoe_jax.predict`, on a tiny random run and on generated and real scans."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict
from PIL import Image

import tghmoe_jax
from configs import common, pretrain2d
from tests.scans import ct_fixtures as ct
from tghmoe_jax import predict, writing
from tghmoe_jax.bases.base import EMBEDDED, describe
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.drawn.scenes import ScenesSource
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import DISCLAIMER, routing_plot
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.reader import opening
from tghmoe_jax.reader import reader as reading
from tghmoe_jax.samples import pipeline, prompts
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.scan import range_warnings
from tghmoe_jax.scans.slices import prepare_slices
from tghmoe_jax.training import checkpoints, loading, run_folder
from tghmoe_jax.training.step import TrainState

QUESTION = "Which plane is this?"
CHOICES = "axial|coronal|sagittal|oblique"
KEYS = {
    "text", "task", "task_probabilities", "blind_text", "expert_load", "warnings", "disclaimer", "checkpoint",
    "seconds",
}  # fmt: skip
# Ranges that the generated patient fits in once prepared: 12 slices 3 mm apart, a square of 66 mm.
RANGES = {
    "spacing_mm": [[2.9, 3.1], [1.9, 2.1], [1.9, 2.1]], "slices": [12, 12], "field_of_view_mm": [60, 70],
    "hu": [-1024, 1300],
}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A character a token, so that whatever a random model generates can be printed and compared."""
    special = ["<unk>", "<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"]
    names = [*special, "\n", *map(chr, range(32, 127))]
    bpe = tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def write_run(folder: Path, domain: str, groups: int, layers: tuple[int, ...] = (1, 2)) -> Path:
    """A run as training leaves it, with random parameters."""
    base = pretrain2d.BASE | {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 102,
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
            "image_size": 32, "patch_size": 8,
        },
    }  # fmt: skip
    config = ConfigDict(common.get_config().to_dict())
    config.data.update({"name": domain, "slices": 16, "size": 32, "text_length": 112})
    config.model.attn3d_layers = (1, 2)
    config.model.depth_rope.rotary_dim = 8
    config.model.tgh.update({"layers": layers, "groups": groups, "hidden": 24})
    config.eval.update({"new_tokens": 12, "answer_tokens": 8})
    write_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    tokenizer = Tokenizer.from_folder(folder.parent / f"{folder.name}-tokenizer", CHAT)
    prefix = prompts.encode(tokenizer, "", None).prefix_len
    model = MLLM(model_config.build(describe(base), config.model.to_dict(), ((5,), (6, 7)), prefix))
    rng = np.random.default_rng(1)
    shapes = loading.param_shapes(model, config.data).items()
    values = {path: rng.normal(path.endswith("scale"), 0.15, leaf.shape) for path, leaf in shapes}
    params = {path: jnp.asarray(values[path], leaf.dtype) for path, leaf in shapes}
    state = TrainState(jnp.int32(7), params, {}, [jnp.zeros(1)])
    run_folder.write_description(
        folder, config, base, folder.parent / f"{folder.name}-tokenizer", "", {"domain": domain, "input_ranges": RANGES}
    )
    store = checkpoints.Checkpoints(folder, 1)
    store.save(state, iter(grain.MapDataset.range(1).to_iter_dataset()))
    store.close()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def stage2(folder) -> Path:
    """Two groups of experts, trained on phantoms as far as it says."""
    return write_run(folder / "stage2", "phantom", 2)


@pytest.fixture(scope="module")
def clinical(folder, stage2) -> Path:
    """The same parameters, of a run on real scans."""
    copy = shutil.copytree(stage2, folder / "clinical")
    (copy / "manifest.json").write_text(json.dumps({"domain": "m3d", "input_ranges": RANGES}))
    return copy


@pytest.fixture(scope="module")
def stage1(folder) -> Path:
    """One group of experts, and no manifest."""
    run = write_run(folder / "stage1", "phantom", 1)
    (run / "manifest.json").unlink()
    return run


@pytest.fixture(scope="module")
def scan(folder) -> Path:
    return ct.write_nifti(folder / f"{ct.SECRET}.nii.gz", *stored(ct.patient()))


def stored(hu: np.ndarray, order=(2, 1, 0), flips=(True, True, False)):
    """Array, axes and origin of a scan as NIfTI files usually store it."""
    return ct.turned(hu, ct.axes_of(), ct.ORIGIN, order, flips)


def ask(run, volume, *flags: str) -> list[str]:
    return ["--checkpoint", str(run), "--volume", str(volume), *flags]


def answered(capsys, *args) -> dict:
    """The JSON object that the command prints, after the checks that every answer must pass."""
    assert predict.main(ask(*args, "--json")) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert err == ""
    ranked = {"option_likelihoods", "option_likelihoods_are"}
    assert set(record) - {"evidence"} in (KEYS, KEYS | ranked)
    assert record["disclaimer"] == DISCLAIMER and "not for clinical use" in DISCLAIMER
    assert record["seconds"] > 0
    ct.nothing_secret(out)
    return record


def refused(capsys, argv: list[str]) -> str:
    """The one sentence with which the command ends, exit code 2."""
    assert predict.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.endswith(".\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


# ------------------------------------------------------------------------------------------------------- answering


def test_a_question_is_answered_with_the_keys_of_the_design(stage2, scan, capsys):
    record = answered(capsys, stage2, scan, "--question", QUESTION)
    assert record["task"] in ("report", "vqa")
    assert sum(record["task_probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert record["checkpoint"] == {"name": "stage2", "digest": loading.load_run(stage2, "").digest}
    assert set(record["expert_load"]) == {"1", "2"}
    assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in record["expert_load"].values())
    assert isinstance(record["blind_text"], str) and record["blind_text"] != record["text"]
    assert [text.split(":")[0] for text in record["warnings"]][:1] == ["domain phantom"]


def test_choices_are_ranked_and_may_be_repeated_or_joined(stage2, scan, capsys):
    joined = answered(capsys, stage2, scan, "--question", QUESTION, "--choices", CHOICES)
    parts = [flag for option in CHOICES.split("|") for flag in ("--choices", option)]
    repeated = answered(capsys, stage2, scan, "--question", QUESTION, *parts)
    likelihoods = joined["option_likelihoods"]
    assert list(likelihoods) == CHOICES.split("|") and all(0 < value < 1 for value in likelihoods.values())
    assert len(set(likelihoods.values())) == 4
    assert joined["text"] == repeated["text"] and likelihoods == repeated["option_likelihoods"]


def test_likelihoods_are_those_of_the_teacher_forced_model(stage2, scan):
    """One option scored here from the plain forward pass, its template and stop tokens included."""
    reader = tghmoe_jax.load(stage2)
    answer = reader.ask(scan, QUESTION, ("axial", "coronal"))
    batch = batch_of(reader, scan, "coronal")
    group = np.array([reader.tasks.index(answer.task)], np.int32)
    output = jax.jit(reader.model.apply)(reader.variables, batch, group)
    start = reader.model.cfg.prefix_length + 1
    logs = np.asarray(jax.nn.log_softmax(output.logits))[0]
    marked = np.flatnonzero(batch["loss_mask"][0, start:])
    picked = [logs[i, batch["tokens"][0, start + i]] for i in marked]
    assert answer.option_likelihoods["coronal"] == pytest.approx(float(np.exp(np.mean(picked))), rel=1e-3, abs=2e-6)


def test_a_report_is_written_where_the_domain_allows_it(clinical, scan, capsys):
    record = answered(capsys, clinical, scan, "--report")
    assert record["task"] == "report"
    assert [text.split(":")[0] for text in record["warnings"]] == ["domain m3d", "length"]


def test_a_checkpoint_of_phantoms_reports_on_a_scan_only_when_allowed(stage2, scan, capsys):
    for flags in (["--report"], ["--question", QUESTION, "--task", "report"]):
        assert "--allow-out-of-domain" in refused(capsys, ask(stage2, scan, *flags))
    record = answered(capsys, stage2, scan, "--report", "--allow-out-of-domain")
    assert record["task"] == "report" and record["warnings"][0].startswith("domain phantom")
    with pytest.raises(UserError, match="is refused"):
        tghmoe_jax.load(stage2).report(scan)


@pytest.mark.parametrize("flags", [
    ["--report"], ["--question", QUESTION, "--task", "report"], ["--question", "Write the report of this CT."],
])  # fmt: skip
def test_a_report_is_refused_before_the_model_is_read(stage2, scan, capsys, monkeypatch, flags):
    monkeypatch.setattr(predict, "load", None)
    said = refused(capsys, ask(stage2, scan, *flags))
    assert "is refused because the checkpoint stage2 has seen drawn phantoms" in said and "--allow-out-of" in said


def test_a_question_that_the_router_calls_a_report_is_answered_by_other_experts(stage2, clinical, scan):
    phantom, real = tghmoe_jax.load(stage2), tghmoe_jax.load(clinical)
    routed = {
        text: real.ask(scan, text) for text in (QUESTION, "Any mass?", "How old?", "Where is it?", "a", "0 0 0 0")
    }
    reports = [text for text, answer in routed.items() if answer.task == "report"]
    assert reports, "the random router sends none of the questions to report: choose another seed or question"
    answer = phantom.ask(scan, reports[0])
    assert answer.task == "vqa" and "refused on real scans" in " ".join(answer.warnings)
    assert answer.task_probabilities == routed[reports[0]].task_probabilities
    assert phantom.ask(scan, reports[0], allow_out_of_domain=True).text == routed[reports[0]].text


def test_task_forces_the_experts_and_leaves_the_router_in_view(clinical, scan, capsys):
    flags = (clinical, scan, "--question", QUESTION, "--task")
    report, vqa = (answered(capsys, *flags, task) for task in ("report", "vqa"))
    assert (report["task"], vqa["task"]) == ("report", "vqa")
    assert report["task_probabilities"] == vqa["task_probabilities"]
    assert report["expert_load"] != vqa["expert_load"]


def test_a_stage1_run_answers_without_a_task_router_and_says_that_it_stores_no_ranges(stage1, scan, capsys):
    record = answered(capsys, stage1, scan, "--question", QUESTION)
    assert record["task"] == "vqa" and record["task_probabilities"] is None
    assert [text.split(":")[0] for text in record["warnings"]][:2] == ["domain phantom", "ranges"]


def test_new_tokens_bounds_the_answer(clinical, scan):
    reader = tghmoe_jax.load(clinical)
    short, long = (reader.report(scan, new_tokens=n).text for n in (3, 12))
    assert len(short) <= 3 and long.startswith(short)


def test_a_text_that_ends_at_its_limit_says_so_and_another_does_not(clinical, scan, monkeypatch):
    reader = tghmoe_jax.load(clinical)
    answer = reader.report(scan, new_tokens=3)
    assert answer.cut and "length: the text ends at the limit of 3 tokens" in answer.warnings[-1]
    ids = jnp.array([[40, -1, -1]])
    monkeypatch.setattr(reader, "_generate", lambda *_: ids)
    whole = reader.report(scan, new_tokens=3)
    assert not whole.cut and not any(text.startswith("length") for text in whole.warnings)


@pytest.mark.parametrize(("text", "note"), [
    ("A. axial", ""), ("B. axial", "its letter and its text disagree"), ("a cat", "it is none of the choices"),
])  # fmt: skip
def test_an_answer_that_is_no_choice_is_flagged_beside_likelihoods_that_do_not_add_up(
    stage2, scan, monkeypatch, capsys, text, note
):
    vocabulary = [*[""] * 6, "\n", *map(chr, range(32, 127))]
    ids = jnp.array([[vocabulary.index(character) for character in text] + [-1]])
    monkeypatch.setattr(reading.Reader, "_generate", lambda *_: ids)
    record = answered(capsys, stage2, scan, "--question", QUESTION, "--choices", "axial|coronal")
    notes = [text for text in record["warnings"] if text.startswith("answer: ")]
    assert record["text"] == text and len(notes) == bool(note) and note in "".join(notes)
    assert record["option_likelihoods_are"].endswith("they do not add up to 1")


def test_a_report_asked_for_in_other_words_has_the_room_of_a_report(clinical, scan, monkeypatch):
    reader, rooms = tghmoe_jax.load(clinical), []
    generate = reader._generate
    monkeypatch.setattr(reader, "_generate", lambda *args: rooms.append(args[-1]) or generate(*args))
    for task in ("report", "vqa", None):
        reader.ask(scan, "Indication: cough. Write the report of this CT.", task=task)
    assert rooms == [12, 12, 8, 8, 8, 8]  # each answer and its blind one


def test_text_for_people_shows_warnings_and_the_disclaimer(stage2, scan, capsys):
    assert predict.main(ask(stage2, scan, "--question", QUESTION, "--choices", CHOICES)) == 0
    out = capsys.readouterr().out
    ct.nothing_secret(out)
    assert out.endswith(DISCLAIMER + "\n") and "domain phantom" in out and "coronal 0." in out
    assert all(character.isprintable() or character == "\n" for character in out)


def test_the_python_interface_gives_what_the_command_gives(stage2, scan, capsys):
    record = answered(capsys, stage2, scan, "--question", QUESTION)
    answer = tghmoe_jax.load(str(stage2)).ask(scan, QUESTION)
    assert (answer.text, answer.task, list(answer.warnings)) == (record["text"], record["task"], record["warnings"])
    assert answer.routing.layers == (1, 2)
    assert json.loads(json.dumps(answer.to_json()))["expert_load"] == record["expert_load"]


def test_a_scan_that_was_read_is_asked_about_again_by_readers_of_its_input_alone(stage2, scan, monkeypatch):
    reader = tghmoe_jax.load(stage2)
    named, read = reader.ask(scan, QUESTION), reader.read(scan)
    monkeypatch.setattr(type(reader), "read", None)
    again = reader.ask(read, QUESTION)
    assert (again.text, again.warnings) == (named.text, named.warnings)
    with pytest.raises(UserError, match="belong to reading"):
        reader.ask(read, QUESTION, series=1)
    reader.run.config["data"]["channels"] = "repeat:lung"
    with pytest.raises(UserError, match="read for another input than that of stage2"):
        reader.ask(read, QUESTION)


def test_the_python_interface_keeps_compiled_programs(stage2, monkeypatch):
    kept = []
    monkeypatch.setattr(opening.compile_cache, "keep", lambda: kept.append(True))
    tghmoe_jax.load(stage2)
    assert kept


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tghmoe_jax.predict", "--checkpoint", "absent", "--volume", "absent", "--report"],
        cwd=Path(tghmoe_jax.__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --checkpoint=absent is not a finished run")


# ----------------------------------------------------------------------------------------------------- model input


def batch_of(reader, path: Path, target: str | None = None) -> dict[str, np.ndarray]:
    """The model's input for the question about a scan."""
    rows = [(0, QUESTION, target, "vqa")]
    return pipeline.collate(reader.read(path), rows, reader.tokenizer, reader.text_length, reader.tasks)


def same_input(reader, one: Path, other: Path) -> None:
    """Every array of the model's batch is the same, bit for bit."""
    a, b = (batch_of(reader, path) for path in (one, other))
    assert a.keys() == b.keys() and a["slices"].any()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_dicom_and_nifti_of_one_series_give_identical_model_inputs(stage2, scan, tmp_path):
    same_input(tghmoe_jax.load(stage2), scan, ct.write_dicom(tmp_path / "series"))


@pytest.mark.parametrize("order, flips", [((2, 1, 0), (False, True, True)), ((0, 2, 1), (True, False, True))])
def test_stored_orientation_does_not_change_the_model_input(stage2, scan, tmp_path, order, flips):
    turned = ct.write_nifti(tmp_path / "turned.nii", *stored(ct.patient(), order, flips))
    same_input(tghmoe_jax.load(stage2), scan, turned)


def test_rescale_is_applied_exactly_once_on_the_way_to_the_model(stage2, scan, tmp_path):
    scaled = ct.write_dicom(tmp_path / "scaled", slope=0.5, intercept=-1024.0)
    same_input(tghmoe_jax.load(stage2), scan, scaled)
    hu = tghmoe_jax.load(stage2).read(scan).prepared.hu_range
    assert hu[0] == -1000 and 700 < hu[1] < 1200


def test_the_stored_digest_names_the_parameters(stage1, stage2, clinical):
    digests = [loading.load_run(run, "").digest for run in (stage1, stage2, clinical)]
    assert digests[1] == digests[2] != digests[0] and all(len(digest) == 16 for digest in digests)


# -------------------------------------------------------------------------------------------------------- warnings


SPACING = "spacing: after resampling for the model,"


def test_each_property_outside_the_stored_ranges_is_named(scan):
    prepared = prepare_slices(read_volume(scan), 16, 32)
    assert range_warnings(prepared, RANGES) == []
    for key, wrong, words in (
        ("spacing_mm", [[13, 18], [1, 3], [1, 3]], [f"{SPACING} slices are apart by 3 mm, outside the 13 to 18 mm"]),
        ("spacing_mm", [[1, 5], [4, 5], [4, 5]], [f"{SPACING} pixels are apart by 2.062 mm"]),
        ("slices", [16, 16], ["slices: a number of 12, outside the 16 of"]),
        ("field_of_view_mm", [350, 400], ["field of view: a side of 66 mm"]),
        ("hu", [-500, 500], ["HU: a lowest value of -1000 HU", "HU: a highest value of"]),
    ):
        found = range_warnings(prepared, RANGES | {key: wrong})
        assert len(found) == len(words) and all(a.startswith(b) for a, b in zip(found, words, strict=True)), found


def test_a_volume_without_units_orientation_or_spacing_is_answered_with_warnings(stage2, tmp_path):
    levels = np.random.default_rng(0).random((1, 16, 32, 32)).astype(np.float32)
    np.save(tmp_path / "volume.npy", levels, allow_pickle=False)
    scan = tghmoe_jax.load(stage2).read(tmp_path / "volume.npy")
    assert [text.split(":")[0] for text in scan.warnings][:3] == ["units", "orientation", "spacing"]


# --------------------------------------------------------------------------------------------------------- routing


def test_the_routing_picture_is_written_and_says_what_it_is(stage2, scan, tmp_path):
    target = tmp_path / "routing.png"
    assert predict.main(ask(stage2, scan, "--question", QUESTION, "--routing", str(target))) == 0
    with Image.open(target) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        note = picture.info["Description"]
    assert "not explanation" in note and DISCLAIMER in note
    ct.nothing_secret(target.read_bytes().decode("latin-1"))
    assert [path.name for path in tmp_path.iterdir()] == ["routing.png"]


def test_the_evidence_of_an_answer_is_drawn_and_printed(stage2, scan, tmp_path, capsys):
    target = tmp_path / "evidence.png"
    flags = "--question", QUESTION, "--choices", CHOICES, "--evidence", str(target)
    record = answered(capsys, stage2, scan, *flags)
    plain = answered(capsys, stage2, scan, *flags[:4])
    same = KEYS - {"seconds", "tokens_per_second"}
    assert "evidence" not in plain and all(record[key] == plain[key] for key in same)
    found = record["evidence"]
    assert found["answer"] in CHOICES.split("|") and found["decoder_rows"] == 16
    assert [slab["slices"] for slab in found["slabs"]] == [[1, 4], [5, 8], [9, 12]]  # of the file; the fourth is masked
    assert found["region"]["slices"] == max(found["slabs"], key=lambda slab: slab["strength"])["slices"]
    assert len(found["region"]["centre_mm"]) == 3 and found["frame"].startswith("LPS")
    with Image.open(target) as picture:
        note = picture.info["Description"]
    assert "not that the answer is right" in note and DISCLAIMER in note
    ct.nothing_secret(target.read_bytes().decode("latin-1"))


def test_the_picture_carries_caption_and_disclaimer_and_each_expert(stage2, scan):
    answer = tghmoe_jax.load(stage2).ask(scan, QUESTION)
    figure = routing_plot._figure(answer.routing, *answer.scan.slices(), "stage2 0123")
    written = [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]
    joined = " ".join(written)
    assert "Routing, not explanation" in joined and DISCLAIMER in joined and "stage2 0123" in joined
    assert set("0123") <= set(written) and "layer 1: expert load" in written and ct.SECRET not in joined


def test_winners_and_load_agree_with_the_slices_seen(stage2, scan):
    routing = tghmoe_jax.load(stage2).ask(scan, QUESTION).routing
    assert routing.winner.shape == (2, 4, 4, 4) and routing.load.shape == (2, 4)
    assert (routing.winner[:, 3] == -1).all(), "the fourth slab holds no slice of a scan of twelve"
    assert ((routing.winner[:, :3] >= 0) & (routing.winner[:, :3] < 4)).all()
    for layer, winner in enumerate(routing.winner):  # a patch's first choice counts in the load
        assert all(routing.load[layer, e] > 0 for e in np.unique(winner[:3]))


def test_a_model_without_experts_has_no_picture(stage2, scan, tmp_path):
    answer = tghmoe_jax.load(stage2).ask(scan, QUESTION)
    none = dataclasses.replace(answer.routing, layers=(), load=np.zeros((0, 1)))
    with pytest.raises(UserError, match="--routing has nothing to show"):
        dataclasses.replace(answer, routing=none).draw_routing(tmp_path / "routing.png")
    assert list(tmp_path.iterdir()) == [] and dataclasses.replace(answer, routing=none).expert_load == {}


def test_a_picture_that_fails_leaves_nothing_behind(stage2, scan, tmp_path, monkeypatch):
    answer = tghmoe_jax.load(stage2).ask(scan, QUESTION)
    (tmp_path / "old.png").write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(writing.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        answer.draw_routing(tmp_path / "old.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_file_of_the_user_is_never_overwritten(tmp_path, capsys):
    for name in ("routing.png", "routing.png.part"):
        (tmp_path / name).write_bytes(b"mine")
    asked = ["--volume", "scan.nii", "--question", "a", "--routing", str(tmp_path / "routing.png")]
    assert predict.main(asked) == 2 and "exists and is never overwritten" in capsys.readouterr().err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"] * 2


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--question", "a", "--quest", "b"], "--quest"),
        (["--question", "a", "--unknown=1"], "--unknown"),
        (["--question", "a", "extra"], "extra"),
        ([], "--question"),
        (["--question", "a", "--report"], "either"),
        (["--question", " "], "--question is empty"),
        (["--question", "a" * 300], "shorten"),
        (["--question", "a", "--choices", "one"], "--choices"),
        (["--question", "a", "--choices", "one|one"], "--choices"),
        (["--question", "a", "--choices", "one|"], "--choices"),
        (["--question", "a", "--choices", "1|2|3|4|5"], "--choices"),
        (["--report", "--choices", "a|b"], "--choices"),
        (["--report", "--task", "vqa"], "--task"),
        (["--question", "a", "--task", "poem"], "--task"),
        (["--question", "a", "--series", "0"], "--series"),
        (["--question", "a", "--series", "x"], "--series"),
        (["--question", "a", "--series", "1"], "--series"),
        (["--question", "a", "--new-tokens", "0"], "--new-tokens"),
        (["--question", "a", "--new-tokens", "9999999"], "--new-tokens"),
        (["--question", "a", "--routing", "routing.jpg"], "--routing"),
        (["--question", "a", "--routing", "absent/routing.png"], "--routing"),
        (["--question", "a", "--evidence", "evidence.jpg"], "--evidence"),
    ],
)
def test_a_wrong_flag_is_one_sentence_that_names_it(clinical, scan, capsys, flags, words):
    assert words in refused(capsys, ask(clinical, scan, *flags))


def test_a_flag_that_is_missing_is_named(stage2, capsys):
    assert "--volume" in refused(capsys, ["--checkpoint", str(stage2), "--report"])
    picture = ["--base", "embedded", "--image", "a.png", "--question", "a"]
    assert "--evidence belongs to --volume" in refused(capsys, [*picture, "--evidence", "a.png"])
    assert "--question TEXT or --report" in refused(capsys, ["--checkpoint", str(stage2), "--volume", "x"])


def test_a_task_chooses_nothing_in_a_stage1_run(stage1, scan, capsys):
    assert "one group" in refused(capsys, ask(stage1, scan, "--question", "a", "--task", "vqa"))


def bad_4d(folder):
    return ct.write_nifti(folder / "4d.nii", np.stack([ct.patient()] * 2, -1))


def bad_constant(folder):
    return ct.write_nifti(folder / "constant.nii", np.full((12, 32, 32), 40, np.int16))


def bad_nan(folder):
    array = ct.patient().astype(np.float32)
    array[3, 3, 3] = np.nan
    return ct.write_nifti(folder / "nan.nii", array)


def bad_empty(folder):
    (folder / "empty.nii").write_bytes(b"")
    return folder / "empty.nii"


def bad_kind(folder):
    (folder / "scan.txt").write_text("no scan")
    return folder / "scan.txt"


def bad_two_series(folder):
    for series in (1, 2):
        ct.write_dicom(folder / "two", series=series)
    return folder / "two"


def bad_missing_slice(folder):
    ct.save(ct.dicom_slices(folder / "gap", ct.patient()), skip=(5,))
    return folder / "gap"


def bad_no_pixels(folder):
    slices = ct.dicom_slices(folder / "bare", ct.patient())
    for ds in slices:
        del ds.PixelData
    ct.save(slices)
    return folder / "bare"


def bad_absent(folder):
    return folder / "absent.nii.gz"


@pytest.mark.parametrize(
    "make",
    [
        bad_4d, bad_constant, bad_nan, bad_empty, bad_kind, bad_two_series, bad_missing_slice, bad_no_pixels,
        bad_absent,
    ],
)  # fmt: skip
def test_a_bad_volume_is_one_sentence_and_leaves_no_picture(stage2, tmp_path, capsys, make):
    path = make(tmp_path)
    target = tmp_path / "routing.png"
    text = refused(capsys, ask(stage2, path, "--question", QUESTION, "--routing", str(target)))
    assert str(path) in text and not target.exists()
    ct.nothing_secret(text)


def test_a_series_is_chosen_by_its_number(stage2, tmp_path, capsys):
    folder = bad_two_series(tmp_path)
    assert answered(capsys, stage2, folder, "--question", QUESTION, "--series", "2")["text"] is not None
    assert "--series 3" in refused(capsys, ask(stage2, folder, "--question", QUESTION, "--series", "3"))


def test_what_a_reader_notes_stands_beside_the_answer(capsys, stage2, tmp_path):
    folder = ct.write_dicom(tmp_path / "study")
    sorted(folder.iterdir())[-1].write_bytes(b"")  # at one end, where no gap shows
    texts = answered(capsys, stage2, folder, "--question", QUESTION)["warnings"]
    assert any(text.startswith("files: 1 of 12 passed over") for text in texts)


def test_values_that_do_not_look_like_hu_are_read_where_the_user_says_so(capsys, stage2, tmp_path):
    path = ct.write_nifti(tmp_path / "scan.nii", ct.patient() - np.int16(1024))
    assert "--assume-hu" in refused(capsys, ask(stage2, path, "--question", QUESTION))
    texts = answered(capsys, stage2, path, "--question", QUESTION, "--assume-hu")["warnings"]
    assert any(text.startswith("rescale: ") and "as you said" in text for text in texts)


def test_a_folder_that_is_no_run_or_a_damaged_one_is_named(stage2, scan, tmp_path, capsys):
    assert "is not a finished run" in refused(capsys, ask(tmp_path, scan, "--report"))
    for name, spoil in (
        ("empty", lambda run: [shutil.rmtree(step) for step in (run / "checkpoints").iterdir()]),
        ("cut", lambda run: shutil.rmtree(next((run / "checkpoints").glob("*/params")))),
        ("other", lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace(
            '"hidden": 24', '"hidden": 20'))),
    ):  # fmt: skip
        run = shutil.copytree(stage2, tmp_path / name)
        spoil(run)
        assert str(run) in refused(capsys, ask(run, scan, "--question", "a"))


def test_debug_shows_the_traceback(stage2, scan, capsys):
    assert predict.main(ask(stage2, scan, "--question", "", "--debug")) == 2
    assert "Traceback" in (shown := capsys.readouterr().err) and "\nerror: --question is empty" in shown


# --------------------------------------------------------------------------------------------- a 2D base, unadapted


def test_the_embedded_base_answers_about_pictures_it_never_saw(tmp_path, capsys):
    source, hits = ScenesSource("test", 12), 0
    for i in range(12):
        Image.fromarray(source.slices(i)[0][0]).save(tmp_path / "picture.png")
        asked = source.question(i, "closed", np.random.default_rng(i))
        argv = ["--base", "embedded", "--image", str(tmp_path / "picture.png"), "--question", asked.prompt, "--json"]
        assert predict.main(argv) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["disclaimer"] == DISCLAIMER
        hits += record["text"] == asked.target
    assert hits >= 8  # 0.9 of such questions are answered; chance is 0.25


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--base", "embedded", "--question", "a"], "belong together"),
        (["--image", "x.png", "--question", "a"], "belong together"),
        (["--base", "embedded", "--image", "x.png", "--question", "a", "--volume", "s.nii"], "--volume belongs"),
        (["--base", "embedded", "--image", "absent.png", "--question", "a"], "--image absent.png does not exist"),
        (["--base", "embedded", "--image", "x.png", "--question", "a", "--checkpoint", "r"], "--checkpoint belongs"),
        (["--base", "absent", "--image", "absent.png", "--question", "a"], "--base=absent"),
        (["--question", "a"], "--volume is missing"),
    ],
)
def test_a_wrong_request_about_a_picture_is_one_sentence(flags, said, capsys):
    assert said in refused(capsys, flags)


def test_a_tokeniser_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    folder = shutil.copytree(EMBEDDED, tmp_path / "base", ignore=shutil.ignore_patterns("digests.json"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["onemore"] = 1024
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    argv = ["--base", str(folder), "--image", str(tmp_path / "picture.png"), "--question", "a"]
    assert "the tokeniser has 1025 tokens" in refused(capsys, argv)


@pytest.mark.parametrize("text", ["{", "[1]", '{"num_crops": null}', '{"num_crops": 0}', '{"num_crops": "many"}'])
def test_a_strange_preprocessor_file_and_too_long_an_answer_are_one_sentence(tmp_path, text, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    argv = ["--image", str(tmp_path / "picture.png"), "--question", "a"]
    folder = shutil.copytree(EMBEDDED, tmp_path / "base", ignore=shutil.ignore_patterns("digests.json"))
    (folder / "preprocessor_config.json").write_text(text)
    assert "preprocessor_config.json" in refused(capsys, ["--base", str(folder), *argv])
    long = refused(capsys, ["--base", "embedded", *argv, "--new-tokens", "2000000000"])
    assert "--new-tokens 2000000000 must lie between 1 and" in long


# ------------------------------------------------------------------------------------------------------ real scans


@ct.needs_real
@pytest.mark.parametrize("name", ["abdomen_pelvis_3mm.nii.gz", "dicom_abdomen"])
def test_a_real_scan_is_answered(stage2, capsys, name):
    record = answered(capsys, stage2, ct.REAL / name, "--question", QUESTION, "--choices", CHOICES)
    assert record["warnings"][0].startswith("domain phantom") and len(record["option_likelihoods"]) == 4


@ct.needs_real
def test_a_real_dicom_series_written_as_nifti_gives_the_identical_model_input(stage2, tmp_path):
    volume = read_volume(ct.REAL / "dicom_abdomen")
    axes = ct.axes_of(volume.spacing_mm)
    written = ct.write_nifti(tmp_path / "series.nii.gz", volume.array.astype(np.int16), axes)
    flipped = ct.turned(volume.array.astype(np.int16), axes, ct.ORIGIN, (2, 0, 1), (True, False, True))
    reader = tghmoe_jax.load(stage2)
    same_input(reader, ct.REAL / "dicom_abdomen", written)
    same_input(reader, written, ct.write_nifti(tmp_path / "flipped.nii.gz", *flipped))
