"""Training on data sets of files through the real command: each published layout, own scans, and broken volumes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import stage1
from tests import tiny_run
from tests.datasets import dataset_fixtures
from tghmoe_jax import digests, prepare
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.datasets.sources import make_source
from tghmoe_jax.samples import pipeline
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.training.reporting import deterministic, read_metrics

SEPARATORS = "\u2028\u2029\u0085"
TEXT = "--config.data.text_length=200"


def generated(folder: Path, name: str) -> dict[str, str]:
    """The `data` keys of a data set of this layout that is generated in `folder`, which is new."""
    return getattr(dataset_fixtures, f"write_{name}")(folder)


def flags(data: dict[str, str]) -> list[str]:
    return [f"--config.data.{key}={value}" for key, value in data.items()]


def predictions(run: Path, kind: str) -> list[dict[str, str]]:
    (file,) = run.glob(f"eval/*/predictions_{kind}.csv")
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def own(tiny_folder) -> dict[str, str]:
    """A prepared manifest of ten volumes in three splits; its reports hold what some programs take for line ends."""
    root = tiny_folder / "own_raw"
    root.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(10):
        np.save(root / f"{i}.npy", rng.random((1, 8, 32, 32), np.float32))
        line = {"volume": f"{i}.npy", "case": f"{i}", "split": ("train", "train", "train", "validation", "test")[i % 5]}
        rows.append(line | {"question": "Which side?", "answer": "left", "choices": ["left", "right"]})
        rows.append(line | {"question": "Is it large?", "answer": "yes"})
        rows.append(line | {"question": "", "answer": f"A finding{SEPARATORS[i % 3]}of {i} mm.", "task": "report"})
    dataset_fixtures.write_lines(root / "manifest.jsonl", rows)
    to = tiny_folder / "own"
    sizes = [f"--config.data.slices={tiny_run.SLICES}", f"--config.data.size={tiny_run.SIZE}", "--workers=1"]
    config = f"--config={tiny_run.ROOT / 'configs' / 'data_manifest.py'}"
    assert prepare.main([config, f"--config.data.root={root}", f"--to={to}", *sizes]) == 0
    return {"name": "manifest", "root": str(to), "manifest": ""}


@pytest.mark.parametrize("name", ["m3d", "ct_rate", "deeptumorvqa", "3d_rad", "llava", "labelmap", "manifest"])
def test_each_data_set_gives_a_first_batch(tiny_folder, tmp_path, name):
    data = ConfigDict(stage1.get_config().data)
    data.update(generated(tmp_path, name) | {"slices": tiny_run.SLICES, "size": tiny_run.SIZE, "text_length": 200})
    source, tokenizer = make_source(data, "train", 0), Tokenizer.from_folder(tiny_folder / "base", CHAT)
    mixture = tuple((kind, 1) for kind in ("report", "open", "closed") if sum(source.counts(kind)))
    spec = pipeline.BatchSpec(2 * len(mixture), 1, 1, 200, mixture, ("report", "vqa"))
    batch = next(pipeline.train_iterator(source, tokenizer, spec, 0, 1))
    assert batch["slices"].shape == (1, spec.rows, tiny_run.SLICES, tiny_run.SIZE, tiny_run.SIZE, 3)
    assert batch["slices"].any(axis=(2, 3, 4, 5)).all() and batch["slice_mask"].any(axis=2).all()
    assert batch["loss_mask"].any(axis=2).all() and batch["question_mask"].any(axis=2).all()
    assert set(batch["task"].ravel()) == {int(kind != "report") for kind, _ in mixture}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m3d", "labelmap"])
def test_training_runs_on_a_data_set(tiny_folder, tmp_path, name):
    run = tiny_run.trained(
        tiny_folder, "stage1.py", f"on_{name}", *flags(generated(tmp_path, name)), TEXT, "--config.train.steps=2",
        "--config.eval.every=0", "--config.max_bad_fraction=0.5",
    )  # fmt: skip
    losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl")]
    assert len(losses) == 2 and np.isfinite(losses).all()
    recorded = json.loads((run / "manifest.json").read_text())
    assert recorded["domain"] == name and len(recorded["data"]["sha256"]) == 64


@pytest.fixture(scope="module")
def finetuned(tiny_folder, tiny_stage2, own) -> Path:
    """A stage 2 that went on with the prepared set, by the recipe for own data."""
    return tiny_run.trained(
        tiny_folder, "finetune.py", "finetuned", f"--config.init_from={tiny_stage2}", *flags(own), TEXT,
        "--config.train.steps=3", "--config.checkpoint.every=2", "--config.eval.items=5",
    )  # fmt: skip


@pytest.mark.slow
def test_own_scans_are_trained_on_and_asked_their_own_test_questions_once(finetuned):
    closed, opened, reports = (predictions(finetuned, kind) for kind in ("closed", "open", "report"))
    assert [len(rows) for rows in (closed, opened, reports)] == [2, 2, 2]
    assert [row["Volume"] for row in closed] == ["0", "1"] and {row["Question"] for row in opened} == {"Is it large?"}
    assert {row["Question"] for row in reports} == {"Write a report for this CT."}
    assert [row["Ground Truth"] for row in reports] == ["A finding\u2029of 4 mm.", "A finding\u2028of 9 mm."]
    scores = tiny_run.metrics(finetuned)
    assert scores["closed/accuracy"] is not None and scores["control/shuffled_closed_accuracy"] is not None
    for key in ("report/finding_f1", "control/section_shuffled_closed_accuracy", "router/task_accuracy_unseen_wording"):
        assert scores[key] is None, key
    ranges = json.loads((finetuned / "manifest.json").read_text())["input_ranges"]
    assert ranges == {"slices": [tiny_run.SLICES] * 2}


@pytest.mark.slow
def test_a_run_on_files_is_gone_on_with_and_scored_again(tiny_folder, finetuned):
    before = tiny_run.metrics(finetuned)
    again = tiny_run.trained(
        tiny_folder, "evaluate.py", "scored", f"--config.init_from={finetuned}", "--config.data.root=",
        "--config.eval.items=5",
    )  # fmt: skip
    assert tiny_run.metrics(again) == before
    short = tiny_run.command(
        tiny_folder, "evaluate.py", "short", f"--config.init_from={finetuned}", "--config.data.root=",
        "--config.data.text_length=4", "--config.max_bad_fraction=0",
    )  # fmt: skip
    assert short.returncode == 2 and "longer than --config.data.text_length" in short.stderr  # the flag is heard


def test_a_set_without_a_test_item_is_refused_before_it_is_trained_on(tiny_folder, own):
    lines = (tiny_folder / "own_raw" / "manifest.jsonl").read_text().split("\n")
    (tiny_folder / "own_raw" / "train.jsonl").write_text("".join(f"{line}\n" for line in lines if '"train"' in line))
    data = flags({"name": "manifest", "root": str(tiny_folder / "own_raw"), "manifest": "train.jsonl"})
    done = tiny_run.command(tiny_folder, "stage1.py", "untested", *tiny_run.options(tiny_folder), *data, TEXT)
    assert done.returncode == 2 and "train with --config.eval.every=0" in done.stderr
    assert not (tiny_folder / "untested").exists()


@pytest.mark.slow
def test_low_rank_updates_start_from_a_stage2_or_a_base(tiny_folder, tiny_stage2, own):
    """And worker processes give the very batches of a thread."""

    def losses(name: str, *more: str) -> list[dict]:
        short = (*flags(own), TEXT, "--config.train.steps=2", "--config.eval.every=0")
        run = tiny_run.trained(tiny_folder, "finetune.py:lora=2", name, *short, *more)
        return [deterministic(record) for record in read_metrics(run / "metrics.jsonl")]

    one = losses("finetune_lora", f"--config.init_from={tiny_stage2}")
    assert len(one) == 2
    assert one == losses("finetune_lora_workers", f"--config.init_from={tiny_stage2}", "--config.data.workers=1")
    of_base = losses("finetune_lora_base", "--config.init_from=")
    assert len(of_base) == 2 and all(np.isfinite(record["loss"]) for record in of_base) and of_base != one


def broken(own: dict[str, str], folder: Path) -> dict[str, str]:
    """A copy of the set with one training volume's record damaged."""
    root = folder / "broken"
    for file in Path(own["root"]).rglob("*"):
        if file.is_file():
            (root / file.relative_to(own["root"])).parent.mkdir(parents=True, exist_ok=True)
            (root / file.relative_to(own["root"])).write_bytes(file.read_bytes())
    index = root / "volumes" / "00000.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[1]["crc32"] ^= 1
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    digests.write(root, digests.of_files(root, digests.files(root)))  # else the set is refused when it is opened
    return own | {"root": str(root)}


@pytest.mark.slow
def test_a_broken_volume_is_named_once_and_replaced(tiny_folder, own, tmp_path):
    data = broken(own, tmp_path)
    options = (*tiny_run.options(tiny_folder), *flags(data), TEXT, "--config.train.steps=2", "--config.eval.every=0")
    done = tiny_run.command(tiny_folder, "stage1.py", tmp_path / "run", *options, "--config.max_bad_fraction=0.4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("skipped 1.npy: ") + done.stderr.count("skipped 1.npy: ") == 1
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    done = tiny_run.command(tiny_folder, "stage1.py", tmp_path / "strict", *options, "--config.max_bad_fraction=0")
    assert done.returncode == 2
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("error: ") and "items cannot be used" in sentence and "max_bad_fraction=0.0" in sentence
