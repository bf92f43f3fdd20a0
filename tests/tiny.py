"""A tiny model with weights of sensible scale, and one compiled function per model, shared by the model's tests.

Weights are drawn per canonical name: models of different attention, depth or experts share every leaf they both have.
Axis legend: B batch, S slice, T text token.
"""

import functools
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import common
from tests.tiny_run import COMPILER_OPTIONS
from tghmoe_jax.bases import phi3v
from tghmoe_jax.bases.base import EMBEDDED, describe, load_base, save_base
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.training import optimizer, rules
from tghmoe_jax.training.losses import LossWeights
from tghmoe_jax.training.step import TrainState, make_step
from tghmoe_jax.weights import adapt

PREFIX, LENGTH, VOCAB, FRAME = 3, 14, 64, (9, 8, 7)
CONFIG = {
    "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
        "patch_size": 4, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
    },
}  # fmt: skip
LM_ONLY = LossWeights(task=(1.0, 1.0), balance=0.0, z=0.0, router=0.0)
WEIGHTS = LossWeights(task=(1.0, 3.0), balance=0.01, z=0.001, router=0.1)


@pytest.fixture(autouse=True, scope="module")
def exact_and_quick():
    """Full float32 products; everything, eager operations too, compiled without most optimisations."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.default_matmul_precision("highest"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def model(base: dict = CONFIG, tgh: dict | None = None, depth_rope: dict | None = None, **changes) -> MLLM:
    """Two 2D layers, two 3D layers with experts, depth-1 patches, all dropless; `changes` are keys of config.model."""
    return MLLM(model_config.build(describe(base), section(tgh, depth_rope, **changes), (), PREFIX, FRAME))


def section(tgh: dict | None = None, depth_rope: dict | None = None, **changes) -> dict:
    """The `model` section of such a model."""
    found = common.get_config().model.to_dict()
    found |= {"patch_depth": 1, "attn3d_layers": (2, 3), **changes}
    found["tgh"] |= {"layers": (2, 3), "dispatch": "ragged", "hidden": 16} | (tgh or {})
    found["depth_rope"] |= {"rotary_dim": 8} | (depth_rope or {})
    return found


def tgh(**changes) -> model_config.TGH:
    """Of a single layer: dropless, the config's own values but for the changes."""
    return model_config.TGH(**common.get_config().model.tgh.to_dict() | {"dispatch": "ragged"} | changes)


def model_2d(**changes) -> MLLM:
    """The same tower with 2D attention and dense FFNs only."""
    return model(attn3d_layers=(), tgh={"layers": ()}, **changes)


ALL = (0, 1, 2, 3)


def uniform(tgh: dict | None = None, **changes) -> MLLM:
    """3D attention and experts in every executed layer: one scanned block, the quickest to differentiate."""
    return model(tgh={"layers": ALL} | (tgh or {}), attn3d_layers=ALL, **changes)


@functools.cache
def shapes(model: MLLM) -> dict[str, tuple[int, ...]]:
    """{leaf path: shape}."""
    tree = jax.eval_shape(model.init, jax.random.key(0), batch(rows=1, slices=4, size=model.cfg.tower.image_size))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree["params"], sep="/").items()}


def leaf(name: str, shape: tuple[int, ...], seed: int, zero_centred: bool = False) -> np.ndarray:
    """Random float32 weights of one canonical leaf, large enough that every part of the model moves the result.

    zero_centred: of a base whose RMSNorms add one (Gemma), and whose embeddings are scaled.
    """
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    if zero_centred and name == "decoder/embed/embedding":
        return 0.1 * noise
    if name.endswith("/scale") and zero_centred and name.startswith(("decoder/", "connector/norm")):
        return 0.3 * noise
    if name.endswith("/scale"):
        return 1 + 0.3 * noise
    if name.endswith("/bias"):
        return 0.2 * noise
    if name.endswith("/kernel"):
        if "patch" in name:
            fan_in = np.prod(shape[:-1])
        elif "/experts/" in name or "/router/" in name:
            fan_in = shape[-2]
        else:
            fan_in = np.prod(shape[:2]) if name.endswith("out/kernel") else shape[0]
        return 1.5 * noise / np.float32(np.sqrt(fan_in))
    return np.float32(0.5) * np.abs(noise) if name.endswith("mix") else noise


def canonical(model: MLLM, seed: int = 0) -> dict[str, np.ndarray]:
    wanted = leaf_names.canonical_shapes(shapes(model))
    return {name: leaf(name, shape, seed, model.cfg.decoder.zero_centred_norms) for name, shape in wanted.items()}


def stacked(model: MLLM, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{leaf path: array} as the training state holds them, from canonical leaves."""
    return leaf_names.from_canonical(list(shapes(model)), leaves)


def to_canonical(params) -> dict[str, np.ndarray]:
    """{canonical name: array on the host}."""
    return leaf_names.to_canonical({path: np.asarray(leaf) for path, leaf in params.items()})


def params(model: MLLM, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights {leaf path: array}."""
    return stacked(model, canonical(model, seed))


def adapted(model: MLLM, source: dict[str, np.ndarray], new=adapt.NEW_FROM_BASE, seed: int = 0, inflation="average"):
    """Weights of `model` from canonical leaves by the project's own rules; what is new is random."""
    wanted = leaf_names.canonical_shapes(shapes(model))
    found, report = adapt.assemble(wanted, source, new, inflation=inflation)
    return stacked(model, found | {name: leaf(name, wanted[name], seed) for name in report.of("new")})


# ---- inputs ----------------------------------------------------------------------------------------------------------


def volumes(rows: int, slices: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """uint8 (B, S, size, size, 3): smooth blobs and noise, different in every slice."""
    rng = np.random.default_rng([seed, 1])
    coarse = rng.integers(0, 200, (rows, slices, 4, 4, 3)).repeat(size // 4, axis=2).repeat(size // 4, axis=3)
    return (coarse + rng.integers(0, 56, (rows, slices, size, size, 3))).astype(np.uint8)


def batch(
    rows: int = 2, slices: int = 4, size: int = 16, seed: int = 0, real: list[int] | None = None,
    lengths: list[int] | None = None, length: int = LENGTH, vocab: int = VOCAB,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A batch as samples/pipeline.py makes it: `real` slices and `lengths` text tokens of each row, right-padded.

    After the prefix: one separator, the question, one separator and an answer of four tokens; tasks alternate.
    """
    rng = np.random.default_rng([seed, 2])
    real, lengths = np.asarray(real or [slices] * rows), np.asarray(lengths or [length] * rows)
    at = np.arange(length)
    token_mask = at < lengths[:, None]
    tokens = np.where(token_mask, rng.integers(3, vocab, (rows, length)), 0).astype(np.int32)
    tokens[:, :PREFIX] = 1 + np.arange(PREFIX)
    answer = token_mask & (at >= lengths[:, None] - 4)
    return {
        "slices": volumes(rows, slices, size, seed),
        "slice_mask": np.arange(slices) < real[:, None],
        "slice_spacing": np.ones(rows, np.float32),
        "tokens": tokens,
        "token_mask": token_mask,
        "question_mask": token_mask & (at > PREFIX) & (at < lengths[:, None] - 5),
        "loss_mask": answer,
        "task": (np.arange(rows) % 2).astype(np.int32),
        "aux": np.zeros((rows, 1), np.float32),
        "image_visible": np.ones(rows, bool),
    }


def take(batch: dict[str, np.ndarray], rows) -> dict[str, np.ndarray]:
    """The batch of some rows, in their order."""
    return {key: value[np.asarray(rows)] for key, value in batch.items()}


# ---- running ---------------------------------------------------------------------------------------------------------


def tree(params: dict) -> dict:
    return {"params": traverse_util.unflatten_dict(dict(params), sep="/")}


def jit(function, **kw):
    """jax.jit, but compiled faster: compiling is what takes the time in these tests."""
    return jax.jit(function, compiler_options=COMPILER_OPTIONS, **kw)


def apply(model: MLLM, params, batch, group=None, depth_scale=None, score=False):
    """`MLLM.__call__`: an Output. `group` None lets the prompt decide."""
    return model.apply(tree(params), batch, group, depth_scale, score)


forward = jit(apply, static_argnums=0)


@functools.partial(jit, static_argnums=0)
def _tower(model: MLLM, params, batch, group, depth_scale, depth_index):
    def run(m: MLLM):
        t = m.task_router.prompt_vector(m.decoder.embeddings(batch["tokens"]), batch["question_mask"])
        return m.vision(
            batch["slices"], batch["slice_mask"], t, group, batch["slice_spacing"], depth_scale, depth_index
        )

    return model.apply(tree(params), method=run)


def tower(model: MLLM, params, batch, group=None, depth_scale: float = 1.0, depth_index=None):
    """Features (B, D, P, C), slab mask (B, D) and MoE statistics; by default group 0 and slabs numbered from 0."""
    rows = len(batch["tokens"])
    if depth_index is None:
        depth_index = np.tile(np.arange(model.cfg.slabs(batch["slices"].shape[1])), (rows, 1))
    group = np.zeros(rows, np.int32) if group is None else np.asarray(group, np.int32)
    return _tower(model, params, batch, group, np.float32(depth_scale), np.asarray(depth_index, np.int32))


def features(*args, **kw) -> np.ndarray:
    """The tower's features alone."""
    return np.asarray(tower(*args, **kw)[0])


def start(model: MLLM, params, trainable, steps: int = 4, **optimiser) -> tuple[TrainState, Callable]:
    """The initial state of a training, and its step, not yet compiled; the rate of step 0 is zero.

    By default with Adam, which leaves rounding small where Muon would orthogonalise it.
    """
    cfg = common.get_config().optimizer
    cfg.update({"name": "adamw", "rate": 1e-2, "warmup": 0.0, **optimiser})
    trains = rules.trainable(params, trainable)
    tx = optimizer.build(cfg, steps, [path for path in params if trains[path]])
    params = {path: jnp.asarray(leaf) for path, leaf in params.items()}
    trained = {path: params[path] for path in params if trains[path]}
    frozen = {path: params[path] for path in params if not trains[path]}
    return TrainState(jnp.int32(0), trained, frozen, jit(tx.init)(trained)), make_step(model, WEIGHTS, tx)


def microbatches(batch: dict[str, np.ndarray], count: int = 2) -> dict[str, np.ndarray]:
    """[B, ...] -> [A, R, ...]."""
    return {key: value.reshape(count, -1, *value.shape[1:]) for key, value in batch.items()}


def close(found, expected, atol: float = 2e-4) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=atol)


def distance(found, expected) -> float:
    return float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())


# ---- a base on disk --------------------------------------------------------------------------------------------------


def base(folder: Path, config: dict = CONFIG):
    """The embedded base where the package holds its weights, else a random one written to `folder` and read back."""
    if config is CONFIG and (EMBEDDED / "model.safetensors").is_file():
        return load_base("embedded")
    random = {name: leaf(name, shape, 0) for name, shape in phi3v.FAMILY.shapes(config).items()}
    save_base(folder, random, config, dtype="float32")
    return load_base(folder)
