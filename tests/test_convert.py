"""The whole command `python -m tghmoe_jax.convert`: the 2D model of a run becomes a base folder that loads back."""

import json
import shutil
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import pretrain2d, stage1
from tests import tiny_run
from tghmoe_jax import convert, digests, train
from tghmoe_jax.bases import llava, phi3v
from tghmoe_jax.bases.base import EMBEDDED, load_base, tokenizer_of
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names, mllm
from tghmoe_jax.samples.tokenizer import FILES, Tokenizer
from tghmoe_jax.training import checkpoints, loading, model_card, program, run_folder, stored
from tghmoe_jax.training.step import TrainState
from tghmoe_jax.weights import storage


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of configs/pretrain2d.py as training leaves it, with random parameters, and these {leaf path: array}."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    config = pretrain2d.get_config()
    config.data.size = tiny_run.SIZE
    config.model.depth_rope.rotary_dim = 8
    names, tokenizer = ("shape:disc", "place:upper left:disc"), Tokenizer.from_folder(EMBEDDED, CHAT)
    model = program.build_model(config, tiny_run.BASE, names, tokenizer, ())
    rng = np.random.default_rng(0)
    shapes = loading.param_shapes(model, config.data)
    params = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    run_folder.write_description(folder, config, tiny_run.BASE, EMBEDDED, "", {})
    store = checkpoints.Checkpoints(folder, 1)
    state = TrainState(jnp.int32(5), {path: jnp.asarray(leaf) for path, leaf in params.items()}, {}, [jnp.zeros(1)])
    store.save(state, iter(grain.MapDataset.range(1).to_iter_dataset()))
    store.close()
    return folder, leaf_names.to_canonical(params)


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
    assert {file.name for file in (tmp_path / "base").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", digests.FILE, *FILES
    }  # fmt: skip
    for name in FILES:
        assert (tmp_path / "base" / name).read_bytes() == (EMBEDDED / name).read_bytes()
    config = pretrain2d.get_config()
    config.base, config.base_config, config.init_from = str(tmp_path / "base"), {}, ""
    config.data.size, config.data.slices = tiny_run.SIZE, 8
    config.model.update({"patch_depth": 4, "attn3d_layers": (1, 2)})
    config.model.depth_rope.rotary_dim = 8
    config.model.tgh.layers = (1,)
    origin = train.load_origin(config)
    model = program.build_model(config, origin.config, (), tokenizer_of(origin.tokenizer, origin.config), ())
    shapes = loading.param_shapes(model, config.data)
    _, fresh, report = train.assemble(origin, shapes, "average")
    assert not report.ignored and report.of("inflated") == ["vision/patch/kernel"]
    assert all("router/" in path for path in fresh)


def test_a_run_that_is_converted_twice_gives_the_same_bytes(pretrained, tmp_path):
    for name in ("one", "two", "two"):
        call(pretrained[0], tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# ------------------------------------------------------------------------------------- bases of Hugging Face


def phi3v_folder(folder):
    """The embedded base in several shards, with an alias and a buffer that some files carry."""
    tensors = {name: np.asarray(tensor) for name, tensor in storage.read_tensors(EMBEDDED).items()}
    extra = {phi3v.ALIAS[0]: tensors[phi3v.ALIAS[1]], phi3v.TOWER + "embeddings.position_ids": np.arange(65)[None]}
    storage.write_tensors(folder, tensors | extra, max_shard_bytes=500_000)
    for name in ("config.json", *FILES):
        shutil.copyfile(EMBEDDED / name, folder / name)
    return folder, tensors


def llava_folder(folder):
    """A small random LLaVA with a Llama text part and the embedded tokeniser, under the hub's names."""
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}  # fmt: skip
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 1023,
        "text_config": text, "vision_config": tiny_run.BASE["vision_config"] | {"model_type": "clip_vision_model"},
    }  # fmt: skip
    rng = np.random.default_rng(0)
    rows = llava.entries(llava.flatten(config))
    tensors = {
        llava.NAMES.named(row.name, "G1"): rng.standard_normal(row.torch_shape).astype(ml_dtypes.bfloat16)
        for row in rows
    }
    storage.write_tensors(folder, tensors, max_shard_bytes=50_000)
    (folder / "config.json").write_text(json.dumps(config))
    for name in FILES:
        shutil.copyfile(EMBEDDED / name, folder / name)
    return folder, tensors


@pytest.mark.parametrize("make", [phi3v_folder, llava_folder])
def test_a_base_is_converted_and_exported_again_bit_for_bit(make, tmp_path, capsys):
    source, tensors = make(tmp_path / "hub")
    assert call(source, tmp_path / "converted") == 0
    out = capsys.readouterr().out
    ignored = len(storage.read_tensors(source)) - len(tensors)
    assert f"reused   {len(tensors):>6} tensors" in out and f"ignored  {ignored:>6} tensors" in out
    names = set(storage.read_tensors(tmp_path / "converted"))
    assert {"vision/cls", "decoder/block_1/attn/q/kernel", "connector/fc1/kernel"} <= names
    assert all((tmp_path / "converted" / name).read_bytes() == (source / name).read_bytes() for name in FILES)
    plain, converted = load_base(source), load_base(tmp_path / "converted")
    assert plain.params.keys() == converted.params.keys() and converted.family == plain.family
    assert all(plain.params[name].tobytes() == converted.params[name].tobytes() for name in plain.params)

    assert call(tmp_path / "converted", tmp_path / "again", "--export") == 0
    again = storage.read_tensors(tmp_path / "again")
    assert again.keys() == tensors.keys()
    assert all(np.asarray(again[name]).tobytes() == tensors[name].tobytes() for name in tensors)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("make", [phi3v_folder, llava_folder])
def test_a_converted_base_serves_a_stage_of_3d_training(make, tmp_path):
    source, _ = make(tmp_path / "hub")
    call(source, tmp_path / "converted", "--dtype", "float32")
    config = stage1.get_config()
    config.base = str(tmp_path / "converted")
    origin = train.load_origin(config)
    config.data.size = origin.config["vision_config"]["image_size"]
    config.model.attn3d_layers, config.model.tgh.layers = (1, 2), (2,)
    config.model.depth_rope.rotary_dim = 8
    model = program.build_model(config, origin.config, (), tokenizer_of(origin.tokenizer, origin.config), ())
    _, fresh, report = train.assemble(origin, loading.param_shapes(model, config.data), "average")
    assert not report.ignored and all("router/" in path for path in fresh)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: next(folder.glob("model-00002-*")).write_bytes(b"x" * 40), "not a complete safetensors"),
        (lambda folder: next(folder.glob("model-00002-*")).unlink(), "lacks the shards"),
        (lambda folder: (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}'), "GPT2LMHead"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    ],
)
def test_a_damaged_base_leaves_the_target_as_it_was(damage, said, tmp_path, capsys):
    source, _ = phi3v_folder(tmp_path / "hub")
    damage(source)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("kept")
    assert said in refused(capsys, source, tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["mine"]


def test_export_goes_with_a_converted_base_only(tmp_path, capsys):
    source, _ = phi3v_folder(tmp_path / "hub")
    assert "leave --export out" in refused(capsys, source, tmp_path / "x", "--export")
    call(source, tmp_path / "converted")
    capsys.readouterr()
    assert "add --export" in refused(capsys, tmp_path / "converted", tmp_path / "x")


# ------------------------------------------------------------------------------------------------ the whole model


def test_an_exported_run_is_read_as_the_run_itself(tiny_stage2, tmp_path, capsys):
    assert call(tiny_stage2, tmp_path / "whole", "--export", "--dtype", "float32") == 0
    assert "model.safetensors" in capsys.readouterr().out
    files = {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert files == {"config.json", "manifest.json", "model.safetensors", "README.md", "digests.json",
                     "model/config.json", *(f"model/{name}" for name in FILES)}  # fmt: skip
    run, whole = loading.load_run(tiny_stage2, ""), loading.load_run(tmp_path / "whole", "")
    assert (whole.step, whole.model) == (run.step, run.model)
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
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "Not for clinical use" in card and manifest["digest"] in card and "Domain: phantom" in card
    assert "Base model: folder base, licence unknown" in card and "phantom, licence Apache-2.0" in card
    assert "Leaks between training and test data: none, by seed" in card
    for key in ("closed/accuracy", "report/finding_f1"):
        (line,) = (line for line in card.splitlines() if line.startswith(f"| {key} |"))
        assert f"{tiny_run.metrics(tiny_stage2)[key]:.3f}" in line and len(line.split("|")) == 9
    for name in ("README.md", "manifest.json", "config.json"):
        assert str(tmp_path.parent) not in (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize(
    ("dropped", "said"), [("none", "not known to the run; leaks.csv"), ("train", "the items of the train split")]
)
def test_a_card_says_of_leaks_what_the_run_knows(dropped, said):
    manifest = {"base": {"base": "embedded"}, "step": 1, "digest": "0" * 16, "dtype": "float32"}
    config = {"data": {"name": "manifest", "drop_leaks": dropped}, "train": {"batch": 1}}
    (line,) = (one for one in model_card.card(manifest, config).splitlines() if one.startswith("- Leaks"))
    assert said in line


def test_exporting_again_changes_nothing_and_a_stage_starts_from_it(tiny_stage2, tmp_path):
    call(tiny_stage2, tmp_path / "one", "--export")
    call(tmp_path / "one", tmp_path / "two", "--export")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    rounded, _ = stored.load_params(tmp_path / "one")
    for name, leaf in stored.load_params(tiny_stage2)[0].items():
        if not name.startswith("aux_head/"):
            assert np.array_equal(rounded[name], leaf.astype(ml_dtypes.bfloat16)), name
    config = pretrain2d.get_config()
    config.init_from = str(tmp_path / "one")
    assert train.load_origin(config).params.keys() == rounded.keys()


def test_a_run_made_outside_a_checkout_is_exported_and_no_name_grows(tiny_stage2, tmp_path):
    run = shutil.copytree(tiny_stage2, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"git": None}))
    assert call(run, tmp_path / "one", "--export") == call(tmp_path / "one", tmp_path / "two", "--export") == 0
    bases = [json.loads((tmp_path / name / "manifest.json").read_text())["base"] for name in ("one", "two")]
    assert bases[0] == bases[1] and bases[0]["base"] == "folder base" and bases[0]["init_from"] == "folder stage1"
    assert "code unknown" in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.parametrize("keys", [{"attention_factor": 1.5}, {"factor": 4.0}, {}])
def test_conversion_keeps_the_magnitude_of_the_rope(keys, tmp_path):
    source, _ = phi3v_folder(tmp_path / "hub")
    config = json.loads((source / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    lists = {"short_factor": [1.0] * (head // 2), "long_factor": [2.0] * (head // 2)}
    config |= {"rope_scaling": {"type": "su", **lists, **keys}, "max_position_embeddings": 131072}
    (source / "config.json").write_text(json.dumps(config))
    call(source, tmp_path / "converted")
    call(tmp_path / "converted", tmp_path / "again", "--export")
    found = [load_base(tmp_path / name).config["rope_magnitude"] for name in ("hub", "converted", "again")]
    assert found[0] == found[1] == found[2] > 1
    assert found[0] == 1.5 or "attention_factor" not in keys


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny_stage1, tiny_stage2, tmp_path, capsys):
    run = shutil.copytree(tiny_stage1, tmp_path / "run")
    before = (run / "config.json").read_bytes()
    assert "holds a run" in refused(capsys, tiny_stage2, run, "--export")
    assert (run / "config.json").read_bytes() == before and not (run / "model.safetensors").exists()
    call(tiny_stage2, tmp_path / "whole", "--export")
    with pytest.raises(UserError, match="holds an exported model"):
        run_folder.check_workdir(stage1.get_config(), tmp_path / "whole")


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"step": "latest"}', "{}"])
def test_a_manifest_that_is_none_is_one_sentence(tiny_stage2, tmp_path, text, capsys):
    call(tiny_stage2, tmp_path / "whole", "--export")
    (tmp_path / "whole" / "manifest.json").write_text(text)
    capsys.readouterr()
    assert "manifest.json" in refused(capsys, tmp_path / "whole", tmp_path / "again", "--export")


def test_a_target_that_cannot_be_written_is_one_sentence(tiny_stage2, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, tiny_stage2, tmp_path / "file" / "below", "--export")


@pytest.mark.slow
def test_low_rank_updates_train_alone_and_are_merged_by_the_export(tiny_folder, tmp_path):
    """The decoder's own weights stay those of the base; the exported model gives the run's logits without leaves."""
    flags = ("--config.train.steps=2", "--config.eval.every=0", "--config.optimizer.rate=0.05")
    run = tiny_run.trained(tiny_folder, "stage1.py:lora=2", "lora", *flags)
    before, after = load_base(tiny_folder / "base").params, stored.load_params(run)[0]
    for name, leaf in before.items():
        if name.startswith("decoder/"):
            assert np.array_equal(after[name], leaf.astype(np.float32)), name
    moved = [name for name in after if name.endswith("lora_b")]
    assert len(moved) == 4 and all(np.abs(after[name]).max() > 0 for name in moved)

    call(run, tmp_path / "whole", "--export", "--dtype", "float32")
    one, two = loading.load_run(run, ""), loading.load_run(tmp_path / "whole", "")
    assert one.model.cfg.lora.rank == 2 and two.model.cfg.lora.rank == 0
    assert not [path for path in two.params if "lora" in path]
    batch = loading.dummy_batch(one.config["data"], rows=1)
    batch["tokens"] = np.random.default_rng(0).integers(3, 1000, batch["tokens"].shape).astype(np.int32)
    logits = [
        jax.jit(loaded.model.apply)(mllm.variables(loaded.params), batch, np.zeros(1, np.int32)).logits
        for loaded in (one, two)
    ]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_an_altered_exported_run_is_refused(tiny_stage2, tmp_path):
    call(tiny_stage2, tmp_path / "whole", "--export")
    file = tmp_path / "whole" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit of the last parameter
    file.write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors has changed since it was written; copy"):
        loading.load_run(tmp_path / "whole", "")


def test_the_parameters_are_those_of_the_manifest_whatever_the_digests_say(tiny_stage2, tmp_path):
    """As in an export of an earlier version, which has no digests."""
    call(tiny_stage2, tmp_path / "whole", "--export")
    (tmp_path / "whole" / digests.FILE).unlink()
    with pytest.raises(UserError, match="is damaged .digests.json is missing.; copy it again"):
        loading.load_run(tmp_path / "whole", "")
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    manifest.pop("files")
    (tmp_path / "whole" / "manifest.json").write_text(json.dumps(manifest))
    assert loading.load_run(tmp_path / "whole", "").digest == manifest["digest"]
    (tmp_path / "whole" / "manifest.json").write_text(json.dumps(manifest | {"digest": "0" * 16}))
    with pytest.raises(UserError, match="does not hold the parameters that manifest.json names"):
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
    assert "the folder that is read" in refused(capsys, tiny_stage1, tiny_stage1, "--export")


def test_what_is_no_run_or_holds_no_checkpoint_is_named(pretrained, tmp_path, capsys):
    assert "--from=" in refused(capsys, tmp_path / "absent", tmp_path / "base")
    run = shutil.copytree(pretrained[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "5" / "params")
    assert "5 is damaged (params/" in refused(capsys, run, tmp_path / "base")
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
