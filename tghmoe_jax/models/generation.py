"""Greedy decoding and option likelihoods, jit-compiled once per shape.

Axis legend: B batch, L visual token, N new token, O options.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import traverse_util

from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.decoder import Cache
from tghmoe_jax.models.mllm import MLLM, Batch, EncodedVolume
from tghmoe_jax.ops.platform import platform


def inference(model: MLLM) -> MLLM:
    """The same model with dropless experts and no rematerialisation: answers do not depend on the batch (I21).

    Its parameters are kept as they are used, since nothing trains.
    """
    cfg = model.cfg.with_tgh(dispatch="ragged", transport="gather")
    return MLLM(dataclasses.replace(cfg, remat="none", param_dtype=cfg.dtype))


@partial(jax.jit, static_argnums=0)
def encode(model: MLLM, variables, batch: Batch, group: jax.Array | None) -> EncodedVolume:
    """Visual tokens and routing; `group` (B,) forces the expert group, None lets the prompt pick it."""
    return model.apply(variables, batch, group, method=MLLM.encode)


@partial(jax.jit, static_argnums=(0, 3))
def encode_picture(model: MLLM, variables, batch: Batch, crops: tuple[int, int] | None) -> tuple[jax.Array, jax.Array]:
    """Visual tokens and mask of a picture, for a 2D base (`MLLM.encode_picture`)."""
    return model.apply(variables, batch, crops, method=MLLM.encode_picture)


@partial(jax.jit, static_argnums=0)
def route(model: MLLM, variables, batch: Batch) -> jax.Array | None:
    """Task logits (B, tasks) from the prompts alone."""
    return model.apply(variables, batch, method=MLLM.route)


@partial(jax.jit, static_argnums=0)
def blank(model: MLLM, variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Visual tokens of a volume that is not looked at: zeros, none visible."""
    return model.apply(variables, batch, method=MLLM.blank)


@partial(jax.jit, static_argnums=(0, 5, 6))
def generate(
    model: MLLM, variables, batch: Batch, visual: jax.Array, visual_mask: jax.Array, new_tokens: int,
    stop_ids: tuple[int, ...],
) -> jax.Array:  # fmt: skip
    """Greedy continuation int32 (B, new_tokens), -1 from each sample's stop token on.

    `batch` holds prompts without answers. Decoding ends when every sample has stopped.
    """
    logits, cache = model.apply(variables, batch, visual, visual_mask, new_tokens, method=MLLM.prefill)
    planned = cache.valid.shape[1]
    if platform() == "cpu":
        model, variables, cache = unrolled(model, variables, cache)
    stops = jnp.asarray(stop_ids)

    def take(step, logits, done, out):
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        done = done | jnp.any(token[:, None] == stops, axis=1)
        return token, done, out.at[:, step].set(jnp.where(done, -1, token))

    def more(carry):
        step, _, _, done, _ = carry
        return (step < new_tokens) & ~jnp.all(done)

    def one(carry):
        step, token, cache, done, out = carry
        logits, cache = model.apply(variables, token, cache, planned, method=MLLM.decode)
        token, done, out = take(step, logits, done, out)
        return step + 1, token, cache, done, out

    rows = logits.shape[0]
    token, done, out = take(0, logits, jnp.zeros(rows, bool), jnp.full((rows, new_tokens), -1, jnp.int32))
    return jax.lax.while_loop(more, one, (jnp.int32(1), token, cache, done, out))[-1]


def unrolled(model: MLLM, variables, cache: Cache) -> tuple[MLLM, dict, Cache]:
    """The same decoder with a leaf and a cache a layer, for steps that read every weight for a few tokens.

    A loop over stacked leaves copies each layer's weights and cache out of the stack before it uses them on a CPU,
    which takes longer than the step itself. An axis of one sample is left out of the cache: XLA drops it from the
    products, and would write a cache that has it twice, from copies.
    """
    flat = traverse_util.flatten_dict(variables["params"]["decoder"], sep="/")
    leaves = traverse_util.unflatten_dict(leaf_names.to_canonical(flat), sep="/")
    k, v = (kept[:, 0] if kept.shape[1] == 1 else kept for kept in (cache.k, cache.v))
    cache = cache._replace(k=tuple(k), v=tuple(v))
    return MLLM(dataclasses.replace(model.cfg, scan_decoder=False)), {"params": {"decoder": leaves}}, cache


@partial(jax.jit, static_argnums=0)
def answer_likelihood(model: MLLM, variables, batch: Batch, visual: jax.Array, visual_mask: jax.Array) -> jax.Array:
    """Mean log-likelihood per answer token, float32 (B,), of the targets that `loss_mask` marks."""
    start = model.cfg.prefix_length + 1
    scores = model.apply(variables, batch, visual, visual_mask, method=MLLM.text_scores)
    weight = batch["loss_mask"][:, start:].astype(jnp.float32)
    total = jnp.sum(scores.log_p * weight, axis=-1)
    return total / jnp.maximum(jnp.sum(weight, axis=-1), 1)


@partial(jax.jit, static_argnums=(0, 6))
def next_likelihood(
    model: MLLM, variables, batch: Batch, visual: jax.Array, visual_mask: jax.Array, ids: jax.Array, new_tokens: int
) -> jax.Array:
    """Log-likelihood float32 (B, O) of each of `ids` (O,) as the token after the text, as `generate` sees it."""
    logits, _ = model.apply(variables, batch, visual, visual_mask, new_tokens, method=MLLM.prefill)
    return jax.nn.log_softmax(logits)[:, ids]
