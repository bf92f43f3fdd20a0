"""The whole command `python -m tghmoe_jax.convert`: the 2D model of a run becomes a base folder that loads back."""

import json
import shutil
import subprocess
import sys

import grain
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import pretrain2d
from tests import tiny_run
from tghmoe_jax import convert, train
from tghmoe_jax.data.tokenizer import FILES, Tokenizer
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import layout
from tghmoe_jax.training import checkpoints, loading, runs
from tghmoe_jax.training.step import TrainState
from tghmoe_jax.weights.base import EMBEDDED, load_base


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of configs/pretrain2d.py as training leaves it, with random parameters, and these {leaf path: array}."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    config = pretrain2d.get_config()
    config.data.size = tiny_run.SIZE
    config.model.depth_rope.rotary_dim = 8
    names, tokenizer = ("shape:disc", "place:upper left:disc"), Tokenizer.from_folder(EMBEDDED)
    model = train.build_model(config, tiny_run.BASE, names, tokenizer, ())
    rng = np.random.default_rng(0)
    shapes = loading.param_shapes(model, config.data)
    params = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    runs.write_description(folder, config, tiny_run.BASE, EMBEDDED, "", {})
    store = checkpoints.Checkpoints(folder, 1)
    state = TrainState(jnp.int32(5), {path: jnp.asarray(leaf) for path, leaf in params.items()}, {}, [jnp.zeros(1)])
    store.save(state, iter(grain.MapDataset.range(1).to_iter_dataset()))
    store.close()
    return folder, layout.to_canonical(params)


def call(source, target, *flags: str) -> int:
    return convert.main(["--from", str(source), "--to", str(target), *flags])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_base_loads_back_with_the_parameters_of_the_run(pretrained, tmp_path, capsys, dtype):
    run, params = pretrained
    flags = [] if dtype == "bfloat16" else ["--dtype", dtype]
    assert call(run, tmp_path / "base", *flags) == 0
    assert "step 5" in capsys.readouterr().out
    base = load_base(tmp_path / "base")
    assert base.config == tiny_run.BASE | {"torch_dtype": dtype}
    new = {name for name in params if name.startswith(("task_router/", "aux_head/"))}
    assert base.params.keys() == params.keys() - new
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype])
    for name, leaf in base.params.items():
        expected = params[name][0] if name == "vision/patch/kernel" else params[name]  # the depth axis of length 1
        assert np.array_equal(np.asarray(leaf), expected.astype(kind)), name


def test_the_folder_is_a_base_for_stage1_with_every_tensor_accounted_for(pretrained, tmp_path):
    run, params = pretrained
    call(run, tmp_path / "base")
    assert {file.name for file in (tmp_path / "base").iterdir()} == {"config.json", "model.safetensors", *FILES}
    for name in FILES:
        assert (tmp_path / "base" / name).read_bytes() == (EMBEDDED / name).read_bytes()
    config = pretrain2d.get_config()
    config.base, config.base_config, config.init_from = str(tmp_path / "base"), {}, ""
    config.data.size, config.data.slices = tiny_run.SIZE, 8
    config.model.update({"patch_depth": 4, "attn3d_layers": (1, 2)})
    config.model.depth_rope.rotary_dim = 8
    config.model.tgh.layers = (1,)
    origin = train.load_origin(config)
    model = train.build_model(config, origin.config, (), Tokenizer.from_folder(origin.tokenizer), ())
    shapes = loading.param_shapes(model, config.data)
    _, fresh, report = train.assemble(origin, shapes, "average")
    assert not report.ignored and report.of("inflated") == ["vision/patch/kernel"]
    assert all("router/" in path for path in fresh)


def test_a_run_that_is_converted_twice_gives_the_same_bytes(pretrained, tmp_path):
    for name in ("one", "two", "two"):
        call(pretrained[0], tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# ------------------------------------------------------------------------------------------------ the whole model


def test_an_exported_run_is_read_as_the_run_itself(tiny_stage2, tmp_path, capsys):
    assert call(tiny_stage2, tmp_path / "whole", "--export", "--dtype", "float32") == 0
    assert "model.safetensors" in capsys.readouterr().out
    files = {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert files == {"config.json", "manifest.json", "model.safetensors", "model/config.json",
                     *(f"model/{name}" for name in FILES)}  # fmt: skip
    run, whole = loading.load_run(tiny_stage2, ""), loading.load_run(tmp_path / "whole", "")
    assert (whole.step, whole.config, whole.model) == (run.step, run.config, run.model)
    assert run.params.keys() == whole.params.keys()
    assert all(np.array_equal(run.params[path], whole.params[path]) for path in run.params)


def test_the_manifest_of_an_exported_run_holds_what_predict_must_say(tiny_stage2, tmp_path):
    call(tiny_stage2, tmp_path / "whole", "--export")
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert manifest["domain"] == "phantom" and set(manifest["input_ranges"]) == {
        "spacing_mm", "slices", "field_of_view_mm", "hu"
    }  # fmt: skip
    assert manifest["scores"]["metrics.json"] == tiny_run.metrics(tiny_stage2)
    assert manifest["digest"] == loading.load_run(tmp_path / "whole", "").digest
    assert manifest["step"] == tiny_run.STEPS and manifest["dtype"] == "bfloat16"


def test_exporting_again_changes_nothing_and_a_stage_starts_from_it(tiny_stage2, tmp_path):
    call(tiny_stage2, tmp_path / "one", "--export")
    call(tmp_path / "one", tmp_path / "two", "--export")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    rounded, _ = checkpoints.load_params(tmp_path / "one")
    for name, leaf in checkpoints.load_params(tiny_stage2)[0].items():
        if not name.startswith("aux_head/"):
            assert np.array_equal(rounded[name], leaf.astype(ml_dtypes.bfloat16)), name
    config = pretrain2d.get_config()
    config.init_from = str(tmp_path / "one")
    assert train.load_origin(config).params.keys() == rounded.keys()


def test_an_altered_exported_run_is_refused(tiny_stage2, tmp_path):
    call(tiny_stage2, tmp_path / "whole", "--export")
    file = tmp_path / "whole" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit of the last parameter
    file.write_bytes(data)
    with pytest.raises(UserError, match="other parameters than its manifest"):
        loading.load_run(tmp_path / "whole", "")


# ------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *args) -> str:
    assert call(*args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith(".\n"), err
    return err


def test_a_3d_run_with_experts_has_no_2d_form(tiny_stage1, tmp_path, capsys):
    text = refused(capsys, tiny_stage1, tmp_path / "base")
    assert str(tiny_stage1) in text and "2D" in text and len(text) < 400
    assert "--export" in text and not (tmp_path / "base").exists()
    assert "the run itself" in refused(capsys, tiny_stage1, tiny_stage1, "--export")


def test_what_is_no_run_or_holds_no_checkpoint_is_named(pretrained, tmp_path, capsys):
    assert "--from=" in refused(capsys, tmp_path / "absent", tmp_path / "base")
    run = shutil.copytree(pretrained[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "5" / "params")
    assert "cannot be read" in refused(capsys, run, tmp_path / "base")
    shutil.rmtree(run / "checkpoints" / "5")
    assert "holds no checkpoint" in refused(capsys, run, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_wrong_flag_is_one_sentence(pretrained, tmp_path, capsys):
    assert "--dtype" in refused(capsys, pretrained[0], tmp_path / "base", "--dtype", "int8")
    assert "--too" in refused(capsys, pretrained[0], tmp_path / "base", "--too", "x")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(capsys, pretrained[0], tmp_path / "file")


def test_the_command_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tghmoe_jax.convert", "--from", "absent", "--to", str(tmp_path / "base")],
        cwd=tiny_run.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: --from=absent is not a finished run")
