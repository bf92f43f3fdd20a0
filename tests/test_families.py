"""A tiny base of each family that is not the embedded one's, through the real commands: both stages, fine-tuning with
low-rank updates, evaluation, a question about a scan and about a picture, export and conversion.
"""

import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny_run
from tests.bases.family_fixtures import WRITERS
from tghmoe_jax import convert, evaluate, predict
from tghmoe_jax.training.reporting import read_metrics
from tghmoe_jax.weights import storage


@pytest.fixture(scope="module", params=WRITERS)
def folder(request, tmp_path_factory):
    """A folder with a tiny base of the family in `base`, and a volume and a picture to ask about."""
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder / "base", tiny_run.SIZE)
    Image.new("RGB", (40, 30), (90, 200, 30)).save(folder / "picture.png")
    np.save(folder / "scan.npy", np.random.default_rng(0).random((1, 8, 32, 32), np.float32))
    return folder


@pytest.mark.slow
def test_a_family_goes_through_every_command(folder, capsys):
    more = ["--config.data.text_length=200", "--config.eval.every=0"]
    tiny_run.trained(folder, "stage1.py", "stage1", *more)
    tiny_run.trained(folder, "stage2.py", "stage2", f"--config.init_from={folder / 'stage1'}", *more)
    start = f"--config.init_from={folder / 'stage2'}"
    tuned = tiny_run.trained(
        folder, "finetune.py:lora=2", "tuned", start, *more, "--config.data.name=phantom",
        f"--config.data.root={folder / 'data'}", "--config.train.steps=4",
    )  # fmt: skip
    for run in ("stage1", "stage2", "tuned"):
        losses = [record["loss"] for record in read_metrics(folder / run / "metrics.jsonl")]
        assert np.isfinite(losses).all() and len(losses) == (4 if run == "tuned" else tiny_run.STEPS)
    done = tiny_run.command(folder, "evaluate.py", folder / "scored", start, "--config.eval.items=5")
    assert done.returncode == 0, done.stderr[-3000:]
    assert tiny_run.metrics(folder / "scored")["closed/accuracy"] is not None

    asked = ["--question", "Which side is the lesion on?", "--json", "--new-tokens", "3"]
    for run in (tuned, folder / "stage2"):
        code = predict.main(["--checkpoint", str(run), "--volume", str(folder / "scan.npy"), *asked])
        answer = json.loads(capsys.readouterr().out)
        assert code == 0 and "not for clinical use" in json.dumps(answer).lower()
    code = predict.main(["--base", str(folder / "base"), "--image", str(folder / "picture.png"), *asked])
    assert code == 0 and json.loads(capsys.readouterr().out)["text"] is not None

    examined = ["run", str(folder / "stage2"), "--items", "4", "--to"]
    slices = ["--base", str(folder / "base"), "--protocol", "slices"]
    assert evaluate.main([*examined, str(folder / "ours")]) == 0
    code = evaluate.main([*examined, str(folder / "unadapted"), *slices])
    if folder.name.startswith("siglip"):
        assert code == 2 and "takes one image a prompt" in capsys.readouterr().err
    else:
        assert code == 0
        (ours,), (unadapted,) = ((folder / name).glob("eval/*") for name in ("ours", "unadapted"))
        scores = json.loads((unadapted / "metrics.json").read_text())
        assert scores["closed/ranked_accuracy"] is not None and scores["control/blind_closed_accuracy"] is not None
        assert json.loads((unadapted / "manifest.json").read_text())["checkpoint"] == {"name": "base, slices"}
        assert evaluate.main(["compare", str(ours), str(unadapted)]) == 0

    assert convert.main(["--from", str(folder / "stage2"), "--to", str(folder / "model"), "--export"]) == 0
    assert predict.main(["--checkpoint", str(folder / "model"), "--volume", str(folder / "scan.npy"), *asked]) == 0
    assert convert.main(["--from", str(folder / "base"), "--to", str(folder / "canonical")]) == 0
    assert convert.main(["--from", str(folder / "canonical"), "--to", str(folder / "again"), "--export"]) == 0
    before, after = (storage.read_tensors(folder / name) for name in ("base", "again"))
    assert before.keys() == after.keys()
    assert all(np.asarray(after[name]).tobytes() == np.asarray(leaf).tobytes() for name, leaf in before.items())
