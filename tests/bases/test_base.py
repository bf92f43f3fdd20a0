"""A base folder: detected, complete, written back, and its faults named with their flag."""

import json

import ml_dtypes
import numpy as np
import pytest

from tghmoe_jax.bases import phi3v
from tghmoe_jax.bases.base import load_base, save_base
from tghmoe_jax.errors import UserError
from tghmoe_jax.weights.storage import read_tensors, write_tensors


@pytest.fixture
def folder(tmp_path, config, checkpoint):
    write_tensors(tmp_path, checkpoint, max_shard_bytes=5000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_base_is_loaded_and_written_back_bit_for_bit(folder, config, checkpoint, tmp_path_factory):
    base = load_base(folder)
    assert (base.family, base.config) == ("phi3_v", config)
    again = tmp_path_factory.mktemp("again")
    save_base(again, base.params, base.config, dtype=None, max_shard_bytes=5000)
    written = read_tensors(again)
    assert set(written) == set(checkpoint)
    assert all(np.asarray(written[name]).tobytes() == checkpoint[name].tobytes() for name in checkpoint)
    assert json.loads((again / "config.json").read_text()) == config


def test_a_model_of_patch_depth_1_is_saved_as_its_2d_base_in_bf16(folder, config, checkpoint, tmp_path_factory):
    flat = phi3v.FAMILY.to_flax(checkpoint, config)
    trained = flat | {
        "vision/patch/kernel": flat["vision/patch/kernel"][None],
        "task_router/proj/bias": np.zeros(256, np.float32),
        "aux_head/bias": np.zeros(3, np.float32),
    }
    target = tmp_path_factory.mktemp("bf16")
    save_base(target, trained, config)
    base = load_base(target)
    assert base.config == config | {"torch_dtype": "bfloat16"}
    assert list(base.params) == list(flat)
    assert all(np.array_equal(base.params[path], flat[path].astype(ml_dtypes.bfloat16)) for path in flat)


def test_nothing_is_written_where_the_model_is_not_2d(config, checkpoint, tmp_path):
    flat = phi3v.FAMILY.to_flax(checkpoint, config) | {"vision/block_0/moe/experts/fc1/bias": np.zeros((1, 4, 20))}
    with pytest.raises(UserError, match="unknown vision/block_0/moe/experts/fc1/bias"):
        save_base(tmp_path / "new", flat, config)
    assert not (tmp_path / "new").exists()


def test_the_nested_config_of_the_port_is_flattened(folder, config):
    nested = {key: config[key] for key in ("architectures", "model_type", "vision_config")}
    nested["text_config"] = {key: config[key] for key in config if key not in nested} | {"model_type": "phi3"}
    (folder / "config.json").write_text(json.dumps(nested))
    assert load_base(folder).config == config


def replace_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def changed(**keys):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | keys)
    )


def other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (replace_config("{"), "is not valid JSON"),
        (replace_config("[1]"), "is a list, not an object"),
        (replace_config('{"architectures": ["GPT2LMHeadModel"]}'), "GPT2LMHeadModel; use one of Phi3VForCausalLM"),
        (replace_config('{"model_type": "phi3_v"}'), "lacks a number for hidden_size, intermediate_size"),
        (replace_config('{"model_type": "phi3_v", "rope_scaling": "su"}'), "rope_scaling is .su., not an object"),
        (changed(hidden_size="24"), "hidden_size is .24., not a whole number"),
        (changed(num_key_value_heads="2"), "num_key_value_heads is .2., not a whole number"),
        (changed(vision_config="clip"), "vision_config is .clip., not an object"),
        (changed(num_attention_heads=0), "num_attention_heads is 0, not a whole number"),
        (replace_config('{"model_type": "llava", "text_config": "llama"}'), "text_config is .llama., not an object"),
        (replace_config('{"model_type": "llava"}'), "cannot be ported"),
        (other_sizes, r"gate_up_proj.weight has shape \(80, 24\), not \(82, 24\)"),
        (lambda folder: write_tensors(folder, {"a": np.zeros(1, np.float32)}), "no tensor is named like"),
        (lambda folder: next(folder.glob("model-00001-*")).write_bytes(b""), "not a complete safetensors"),
    ],
)
def test_every_fault_names_the_flag_and_the_fix(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        load_base(folder)
    assert str(error.value).startswith(f"--config.base={folder}") and "; " in str(error.value)
