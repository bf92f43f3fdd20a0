"""The language model of a base: embeddings and a mask in, hidden states out.

Vision is any module that returns tokens.

Axis legend: B batch, T token, S cache slot, W width, N query heads, K key/value heads, H head size, V vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.config import Model, Rope
from tghmoe_jax.models.lora import projection
from tghmoe_jax.models.vit3d import rematerialised
from tghmoe_jax.ops import rope
from tghmoe_jax.ops.activations import ACTIVATIONS
from tghmoe_jax.ops.attention import Mask, attention
from tghmoe_jax.ops.platform import over_batch


class Cache(NamedTuple):
    """Keys and values (layers, B, K, S, H), already rotated, of unrolled layers a tuple of (B, K, S, H) or, for one
    sample, (K, S, H); valid bool (B, S); index int32 (): the next free slot, a Python 0 in a cache that `empty_cache`
    has just made."""

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    valid: jax.Array
    index: jax.Array | int


def empty_cache(cfg: Model, batch: int, slots: int) -> Cache:
    d = cfg.decoder
    shape = (d.layers, batch, d.kv_heads, slots, d.head_size)
    zeros = jnp.zeros(shape, jnp.dtype(cfg.dtype))
    return Cache(zeros, zeros, jnp.zeros((batch, slots), bool), 0)


Kind = tuple[int, int] | jax.Array  # of a layer: the numbers of its table and its window in the config's lists
NO_WINDOW = 1 << 30
MOST_LOGITS = 1 << 24  # numbers a sample that `scores` holds at once: 64 MiB of float32


class Scores(NamedTuple):
    """Of target tokens: log-likelihood float32 (B, T), and bool (B, T) whether no other token is more likely."""

    log_p: jax.Array
    best: jax.Array


def score(logits: jax.Array, targets: jax.Array) -> Scores:
    """logits float32 (B, T, V), targets int (B, T)."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return Scores(picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets)


def score_chunk(vocab: int) -> int:
    """Positions of a sample whose logits `LanguageModel.scores` holds at once: all of them unless `vocab` is large."""
    return max(1, MOST_LOGITS // vocab)


class LayerContext(NamedTuple):
    """What every layer reads: cos and sin (R, B, T, H/2) of the R `Decoder.ropes`, the mask but for the window, and
    the first cache slot to write."""

    cos: jax.Array
    sin: jax.Array
    mask: Mask
    start: jax.Array | int


class RMSNorm(nn.Module):
    """x * rsqrt(mean x^2 + eps) in float32, cast, times scale (Phi-3's order); zero-centred: times 1 + scale, then cast
    (Gemma's)."""

    eps: float
    param_dtype: jnp.dtype
    zero_centred: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.zero_centred:
            return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


def rms_norm(cfg: Model, name: str | None = None) -> RMSNorm:
    d = cfg.decoder
    return RMSNorm(d.eps, jnp.dtype(cfg.param_dtype), d.zero_centred_norms, name=name)


class SelfAttention(nn.Module):
    """Grouped-query attention with RoPE; writes into the cache slots it is given. Only q, k and v may have biases."""

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array, cache, kind: Kind, ctx: LayerContext):
        """x (B, T, W); cache None or (k, v) of this layer, written from slot ctx.start on. Returns y and (k, v)."""
        d = self.cfg.decoder
        kw = {"use_bias": False, "dtype": x.dtype, "param_dtype": jnp.dtype(self.cfg.param_dtype)}
        biased, lora = kw | {"use_bias": d.qkv_bias}, self.cfg.lora
        q = projection(lora, "attn/q", (d.heads, d.head_size), **biased)(x)
        k = projection(lora, "attn/k", (d.kv_heads, d.head_size), **biased)(x)
        v = projection(lora, "attn/v", (d.kv_heads, d.head_size), **biased)(x)
        if d.qk_norm:
            q, k = rms_norm(self.cfg, "q_norm")(q), rms_norm(self.cfg, "k_norm")(k)
        cos, sin = (one[0] if len(d.ropes) == 1 else one[kind[0]] for one in (ctx.cos, ctx.sin))
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        if cache is not None:
            stored = (*cache[0].shape[:-2], -1, d.head_size)  # as the cache has it, with T in the place of S
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(kept, new.swapaxes(1, 2).reshape(stored), ctx.start, axis=-2)
                for kept, new in zip(cache, (k, v), strict=True)
            )
            k, v = (kept.reshape(len(x), d.kv_heads, -1, d.head_size).swapaxes(1, 2) for kept in cache)
        mask = ctx.mask
        if d.windows != (0,):
            mask = dataclasses.replace(mask, reach=jnp.array([one or NO_WINDOW for one in d.windows])[kind[1]])
        out = attention(q, k, v, mask, self.cfg.attention, scale=d.query_scale)
        out = projection(lora, "attn/out", d.width, axes=2, **kw)(out)
        return out, cache


class GatedMlp(nn.Module):
    """down(activation(gate x) * up x)."""

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, lora = self.cfg.decoder, self.cfg.lora
        kw = {"use_bias": False, "dtype": x.dtype, "param_dtype": jnp.dtype(self.cfg.param_dtype)}
        gate, up = (projection(lora, f"mlp/{name}", d.ffn, **kw)(x) for name in ("gate", "up"))
        return projection(lora, "mlp/down", d.width, **kw)(ACTIVATIONS[d.activation](gate) * up)


class DecoderBlock(nn.Module):
    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array, cache, kind: Kind, ctx: LayerContext):
        """x (B, T, W) -> the same shape, and the layer's cache."""
        post = self.cfg.decoder.post_norms
        y, cache = SelfAttention(self.cfg, name="attn")(rms_norm(self.cfg, "attn_norm")(x), cache, kind, ctx)
        x = over_batch(x + (rms_norm(self.cfg, "attn_post_norm")(y) if post else y))
        y = GatedMlp(self.cfg, name="mlp")(rms_norm(self.cfg, "mlp_norm")(x))
        return over_batch(x + (rms_norm(self.cfg, "mlp_post_norm")(y) if post else y)), cache


class ScannedBlock(nn.Module):
    """The body of the loop over layers; its child is named as the canonical tree names the first layer."""

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array, cache, kind: Kind, ctx: LayerContext):
        return DecoderBlock(self.cfg, name="block_0")(x, cache, kind, ctx)


class LanguageModel(nn.Module):
    """Embedding table, blocks (in one loop unless the config unrolls them), final norm, and a head where it is not tied
    to the table."""

    cfg: Model

    def setup(self):
        d, param_dtype = self.cfg.decoder, jnp.dtype(self.cfg.param_dtype)
        self.embed = nn.Embed(d.vocab, d.width, param_dtype=param_dtype, embedding_init=nn.initializers.normal(0.5))
        if self.cfg.scan_decoder:
            scanned = nn.scan(
                rematerialised(self.cfg, ScannedBlock), variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast), out_axes=0, length=d.layers,
            )  # fmt: skip
            self.loop = scanned(self.cfg, name=leaf_names.scan_name(0, d.layers, 1))
        else:
            self.blocks = [DecoderBlock(self.cfg, name=f"block_{i}") for i in range(d.layers)]
        self.final_norm = rms_norm(self.cfg)
        if not d.tied:
            self.lm_head = nn.Dense(d.vocab, use_bias=False, dtype=jnp.dtype(self.cfg.dtype), param_dtype=param_dtype)

    def _run(self, x: jax.Array, cache, ctx: LayerContext):
        """All layers; cache None, or keys and values as `Cache` holds them."""
        d = self.cfg.decoder
        kinds = [(d.ropes.index(layer.rope), d.windows.index(layer.window)) for layer in d.blocks]
        if self.cfg.scan_decoder:
            return self.loop(x, cache, np.array(kinds), ctx)
        filled = []
        for block, one, kind in zip(self.blocks, zip(*cache, strict=True), kinds, strict=True):
            x, one = block(x, one, kind, ctx)
            filled.append(one)
        return x, tuple(zip(*filled, strict=True))

    def embeddings(self, tokens: jax.Array) -> jax.Array:
        """int (B, T) -> (B, T, W)."""
        x = self.embed(tokens)
        if self.cfg.decoder.embed_scale != 1:
            x = x * jnp.asarray(self.cfg.decoder.embed_scale, x.dtype)  # rounded as the table is
        return x.astype(jnp.dtype(self.cfg.dtype))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 (..., V)."""
        if self.cfg.decoder.tied:
            logits = hidden @ self.embed.embedding.astype(hidden.dtype).T
        else:
            logits = self.lm_head(hidden)
        return over_batch(logits.astype(jnp.float32))

    def scores(self, hidden: jax.Array, targets: jax.Array) -> Scores:
        """hidden (B, T, W), targets int (B, T). Logits exist for `score_chunk` positions at a time, backward too: over
        the 262,208 tokens of Gemma 3 those of one answer of 512 tokens take 0.5 GiB."""
        length = targets.shape[1]
        chunk = score_chunk(self.cfg.decoder.vocab)
        if length <= chunk:
            return score(self.logits(hidden), targets)
        pad = [(0, 0), (0, -length % chunk)]
        hidden, targets = jnp.pad(hidden, [*pad, (0, 0)]), jnp.pad(targets, pad)
        parts = [x.reshape(x.shape[0], -1, chunk, *x.shape[2:]) for x in (hidden, targets)]
        scan = nn.scan(
            nn.remat(lambda self, _, hidden, targets: (None, score(self.logits(hidden), targets)), prevent_cse=False),
            variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1,
        )  # fmt: skip
        _, found = scan(self, None, *parts)
        return Scores(*(x.reshape(x.shape[0], -1)[:, :length] for x in found))

    def __call__(
        self, x: jax.Array, valid: jax.Array, planned_length: int, cache: Cache | None = None,
        positions: jax.Array | None = None, blocks: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        """Final hidden states of x (B, T, W), causal over valid bool (B, T), so padding changes nothing.

        Positions are cumsum(valid) - 1 unless given; `planned_length` (prompt and new tokens) picks the RoPE regime,
        statically. blocks int (B, T): tokens that see each other in both directions, -1 for none; with a cache, of
        what fills it first. With a cache, x fills the next T slots. Returns (B, T, W) and the filled cache.
        """
        length = x.shape[1]
        if cache is None:
            start, filled = 0, valid
            positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0) if positions is None else positions
        else:
            start = cache.index
            filled = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, start, axis=1)
            if positions is None:
                positions = jnp.maximum(jnp.sum(cache.valid, axis=1, keepdims=True) + jnp.cumsum(valid, axis=1) - 1, 0)
            if blocks is not None:
                blocks = jnp.pad(blocks, [(0, 0), (0, filled.shape[1] - length)], constant_values=-1)
        fresh = isinstance(start, int) and start == 0  # then the mask is known at compile time
        d = self.cfg.decoder
        slots = jnp.cumsum(filled, axis=1) - 1 if d.windows != (0,) else None  # positions of the keys
        mask = Mask(key_valid=filled, causal=True, query_start=None if fresh else start, blocks=blocks, positions=slots)
        tables = [rope_tables(self.cfg, one, positions, planned_length) for one in d.ropes]
        cos, sin = (jnp.stack(parts) for parts in zip(*tables, strict=True))
        layer_cache = None if cache is None else (cache.k, cache.v)
        x, layer_cache = self._run(over_batch(x), layer_cache, LayerContext(cos, sin, mask, start))
        if cache is not None:
            cache = Cache(*layer_cache, filled, cache.index + length)
        return over_batch(self.final_norm(x)), cache


def rope_tables(cfg: Model, table: Rope, positions: jax.Array, planned_length: int) -> tuple[jax.Array, jax.Array]:
    """cos, sin (B, T, H/2) with the factors of `planned_length`'s regime (model-spec 2.4)."""
    size = cfg.decoder.head_size
    inverse = table.theta ** (-np.arange(0, size, 2, dtype=np.float32) / size)
    factors = cfg.rope_factors(table, planned_length)
    if factors:
        inverse = inverse / np.asarray(factors, np.float32)
    return rope.tables(positions, jnp.asarray(inverse), table.magnitude)
