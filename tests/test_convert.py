"""The whole command `python -m tghmoe_jax.convert`: the 2D model of a run becomes a base folder that loads back."""

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


# ------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *args) -> str:
    assert call(*args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith(".\n"), err
    return err


def test_a_3d_run_with_experts_has_no_2d_form(tiny_stage1, tmp_path, capsys):
    text = refused(capsys, tiny_stage1, tmp_path / "base")
    assert str(tiny_stage1) in text and "2D" in text and len(text) < 400
    assert not (tmp_path / "base").exists()


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
