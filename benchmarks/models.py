"""This project's models over weights given as canonical leaves, as the cases run them; no torch is imported here."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from benchmarks.measure import ROOT
from tghmoe_jax.bases.base import describe
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import generation, leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.tools import flops
from tghmoe_jax.training import loading
from tghmoe_jax.training.command_line import parse
from tghmoe_jax.weights import adapt

CLIP_SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
LLAMA_SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


def experiment(file: str) -> ConfigDict:
    """The config of an experiment, `stage1.py[:preset]`, as the commands read it."""
    return parse(["", f"--config={ROOT / 'configs' / file}"])[0]


def ours(
    config: Mapping, leaves: Mapping[str, np.ndarray], size: int, prefix: int = 4, dtype: str = "float32", **changes
) -> tuple[MLLM, dict]:
    """This project's model, as it answers, and its variables; `changes` are keys of config.model.

    2D attention and dense FFNs only, and patches of one slice, unless they say otherwise.
    """
    section = experiment("stage1.py").model.to_dict()
    section |= {"patch_depth": 1, "attn3d_layers": (), "dtype": dtype} | changes
    section["tgh"] |= {"layers": ()}
    vision = config["vision_config"]
    section["depth_rope"] |= {"rotary_dim": min(64, vision["hidden_size"] // vision["num_attention_heads"])}
    model = generation.inference(MLLM(model_config.build(describe(config), section, prefix_length=prefix)))
    shapes = loading.param_shapes(model, {"slices": 8, "size": size, "text_length": prefix + 8})
    wanted = leaf_names.canonical_shapes({path: shape.shape for path, shape in shapes.items()})
    loaded, report = adapt.assemble(wanted, leaves)
    loaded |= {name: np.zeros(wanted[name], np.float32) for name in report.of("new")}  # the task router: not run
    flat = leaf_names.from_canonical(list(shapes), loaded)
    flat = {path: jax.device_put(flat[path].astype(shapes[path].dtype)) for path in shapes}
    return model, {"params": traverse_util.unflatten_dict(flat, sep="/")}


def compiled_tower(model: MLLM, variables: dict, slices: np.ndarray) -> Callable[[np.ndarray], jax.Array]:
    """Slices float32 (B, S, H, W, 3) in 0..1, shaped as those given -> patch features (B, D, P, C), waited for."""

    def run(variables, slices):
        rows, count = slices.shape[:2]
        t, group = np.zeros((rows, model.cfg.tgh.hidden), np.float32), np.zeros(rows, np.int32)
        mask = np.ones((rows, count), bool)
        return model.apply(variables, method=lambda m: m.vision(slices, mask, t, group)[0])

    compiled = jax.jit(run).lower(variables, slices).compile()
    return lambda slices: jax.block_until_ready(compiled(variables, slices))


def tower_flops(model, slices: int) -> float:
    """Useful FLOPs of the tower alone (see tghmoe_jax/tools/flops.py)."""
    cfg, v, volume = model.cfg, model.cfg.tower, model.cfg.volume
    tokens = cfg.slabs(slices) * v.tokens
    total = 2.0 * (tokens - cfg.slabs(slices)) * volume.patch_depth * v.patch_size**2 * 3 * v.width
    for layer in range(v.executed):
        total += 2.0 * tokens * (4 * v.width**2 + 2 * v.width * v.ffn)
        kind = volume.attn3d_kind if layer in volume.attn3d_layers else "2d"
        pairs = flops.vision_pairs(cfg, kind, cfg.slabs(slices), "plain")[0]
        total += 4.0 * v.width * pairs
    return total
