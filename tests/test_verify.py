"""The command that compares files with their digests."""

import json
import os
import shutil

import pytest

from benchmarks import damage
from tghmoe_jax import digests, verify
from tghmoe_jax.datasets import prepared
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import run_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return damage.write_run(tmp_path_factory.mktemp("verify") / "run")


def test_a_run_has_a_line_for_each_checkpoint_and_damage_is_named(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    assert verify.main([str(run), "embedded"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and all(": whole, " in line for line in out)
    file = next((run / "checkpoints" / "2" / "opt" / "d").iterdir())
    file.write_bytes(b"x" + file.read_bytes()[1:])
    (run / "checkpoints" / "2" / "more").write_text("")
    assert verify.main([str(run)]) == 2
    newest, older = capsys.readouterr().out.splitlines()
    assert ": whole, " in newest
    assert f"damaged: more does not belong there, opt/d/{file.name} has changed" in older
    assert verify.main([str(run / "checkpoints" / "4")]) == 0


def test_an_exported_model_may_have_another_card_and_nothing_else(tmp_path, capsys):
    model = shutil.copytree(run_folder.EMBEDDED, tmp_path / "model")
    (model / "README.md").write_text("My own words.")
    (model / ".gitattributes").write_text("")
    assert verify.main([str(model)]) == 0
    (model / digests.FILE).write_text("{}")
    assert verify.main([str(model)]) == 2 and "digests.json is not whole" in capsys.readouterr().out
    (model / digests.FILE).unlink()
    assert verify.main([str(model)]) == 2 and "digests.json is missing" in capsys.readouterr().out


def test_a_prepared_set_and_drawn_caches_have_a_line_each(tmp_path, capsys):
    folder = damage.write_set(tmp_path / "raw", tmp_path / "set")
    damage.draw(tmp_path / "data")
    assert verify.main([str(folder), str(tmp_path / "data")]) == 0
    assert [line.split(": ")[1][:6] for line in capsys.readouterr().out.splitlines()] == ["whole,"] * 3
    (folder / digests.FILE).unlink()
    assert verify.main([str(folder)]) == 2 and "digests.json is missing" in capsys.readouterr().out
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({key: card[key] for key in card if key != "digests"}))
    assert verify.main([str(folder)]) == 0 and "no digests (an earlier version wrote it)" in capsys.readouterr().out
    assert prepared.PreparedSet(folder).rows, "it is read as before"
    (cache, _) = (tmp_path / "data").iterdir()
    os.truncate(cache / "volumes.npy", 300)
    assert verify.main([str(cache)]) == 2 and "damaged: volumes.npy has changed" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["nowhere"], [], ["--what"]])
def test_what_is_no_model_is_one_sentence(argv, tmp_path, capsys):
    assert verify.main([*argv, *([str(tmp_path)] if argv == ["nowhere"] else [])]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("key, value", [("domain", "phantpm"), ("input_ranges", {"slices": [16, 18]}), ("step", "x")])
def test_what_a_run_says_of_its_training_data_is_covered(key, value, run, tmp_path, capsys):
    """One flipped bit of the domain would lift the refusal of reports on patients' scans."""
    run = shutil.copytree(run, tmp_path / "run")
    honest = run_folder.sealed({"domain": "phantom", "input_ranges": {"slices": [16, 16]}, "step": 4})
    (run / "manifest.json").write_text(json.dumps(honest))
    assert verify.main([str(run)]) == 0 and run_folder.read_manifest(run) == honest
    (run / "manifest.json").write_text(json.dumps(honest | {key: value}))
    assert verify.main([str(run)]) == 2 and "manifest.json" in capsys.readouterr().out
    with pytest.raises(UserError, match=key):
        run_folder.read_manifest(run)
