"""What the parity tests share: our 2D model over an imported base, its inputs, and weights for a peer."""

import functools
import re

import jax
import numpy as np
import torch
from flax import traverse_util

from configs.common import get_config
from tghmoe_jax.bases.base import LoadedBase, describe
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.weights import adapt

# The tower of every peer: four blocks over 4 x 4 patches.
VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 28,
    "patch_size": 7, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip


def randomised(module: torch.nn.Module, seed: int = 0, zero_centred: str = "nowhere") -> torch.nn.Module:
    """Weights large enough that every part of the model moves the result.

    zero_centred: a regex for the norms whose weights are added to one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight") and not re.search(zero_centred, name)
            parameter.copy_(1 + 0.2 * noise if norm else 0.2 * noise)
    return module.eval()


def our_model(
    base: LoadedBase, prefix: int, frame=(), size: int = 28, facts=None, layout: str = "sub_glb_3d", resized=False
):  # fmt: skip
    """The base without any 3D part, as a function of (method, *arguments, static=()); every tensor of it is used.

    `facts` stand in for those of its config; `resized`: its positions are interpolated.
    """
    section = get_config().model
    section.update({"patch_depth": 1, "attn3d_layers": (), "layout": layout})
    section.tgh.layers = ()
    section.depth_rope.rotary_dim = 8
    model = MLLM(model_config.build(facts or describe(base.config), section.to_dict(), (), prefix, frame))
    tree = jax.eval_shape(model.init, jax.random.key(0), batch_of(np.zeros((1, size, size, 3), np.float32), [[1] * 8]))
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree["params"], sep="/").items()}
    loaded, report = adapt.assemble(leaf_names.canonical_shapes(shapes), base.params)
    assert all(path.startswith("task_router/") for path in report.of("new")) and not report.ignored
    assert report.of("interpolated") == (["vision/pos"] if resized else [])
    loaded |= {path: np.zeros(shapes[path], np.float32) for path in report.of("new")}
    params = traverse_util.unflatten_dict(leaf_names.from_canonical(list(shapes), loaded), sep="/")

    @functools.cache
    def compiled(method, static):
        return jax.jit(lambda params, *args: model.apply({"params": params}, *args, *static, method=method))

    return lambda method, *args, static=(): compiled(method, static)(params, *args)


def batch_of(images: np.ndarray, tokens) -> dict:
    """One-slice volumes (B, H, W, 3) in 0..1 with their prompts (B, T)."""
    tokens = np.asarray(tokens, np.int32)
    return {
        "slices": images[:, None], "slice_mask": np.ones((len(images), 1), bool), "tokens": tokens,
        "token_mask": np.ones(tokens.shape, bool), "question_mask": np.ones(tokens.shape, bool),
    }  # fmt: skip
