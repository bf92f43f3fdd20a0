"""The decoder of Phi-3, Llama, Mistral and Qwen2: embeddings and a mask in, hidden states out.

Vision is any module that returns tokens.

Axis legend: B batch, T token, S cache slot, W width, N query heads, K key/value heads, H head size, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.config import Model
from tghmoe_jax.models.lora import projection
from tghmoe_jax.models.vit3d import REMAT
from tghmoe_jax.ops import rope
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


class RMSNorm(nn.Module):
    """x * rsqrt(mean x^2 + eps) in float32, cast, times scale (Phi-3's order)."""

    eps: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with RoPE; writes into the cache slots it is given. Only q, k and v may have biases."""

    cfg: Model

    @nn.compact
    def __call__(self, x, cos, sin, mask: Mask, cache, start):
        """x (B, T, W); cache None or (k, v) of this layer, written at slots start..start+T. Returns y and (k, v)."""
        d = self.cfg.decoder
        kw = {"use_bias": False, "dtype": x.dtype, "param_dtype": jnp.dtype(self.cfg.param_dtype)}
        biased, lora = kw | {"use_bias": d.qkv_bias}, self.cfg.lora
        q = projection(lora, "attn/q", (d.heads, d.head_size), **biased)(x)
        k = projection(lora, "attn/k", (d.kv_heads, d.head_size), **biased)(x)
        v = projection(lora, "attn/v", (d.kv_heads, d.head_size), **biased)(x)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        if cache is not None:
            stored = (*cache[0].shape[:-2], -1, d.head_size)  # as the cache has it, with T in the place of S
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(kept, new.swapaxes(1, 2).reshape(stored), start, axis=-2)
                for kept, new in zip(cache, (k, v), strict=True)
            )
            k, v = (kept.reshape(len(x), d.kv_heads, -1, d.head_size).swapaxes(1, 2) for kept in cache)
        out = attention(q, k, v, mask, self.cfg.attention)
        out = projection(lora, "attn/out", d.width, axes=2, **kw)(out)
        return out, cache


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x)."""

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, lora = self.cfg.decoder, self.cfg.lora
        kw = {"use_bias": False, "dtype": x.dtype, "param_dtype": jnp.dtype(self.cfg.param_dtype)}
        gate, up = (projection(lora, f"mlp/{name}", d.ffn, **kw)(x) for name in ("gate", "up"))
        return projection(lora, "mlp/down", d.width, **kw)(nn.silu(gate) * up)


class DecoderBlock(nn.Module):
    cfg: Model

    @nn.compact
    def __call__(self, x, cache, cos, sin, mask: Mask, start):
        norm = lambda name: RMSNorm(self.cfg.decoder.eps, jnp.dtype(self.cfg.param_dtype), name=name)  # noqa: E731
        y, cache = SelfAttention(self.cfg, name="attn")(norm("attn_norm")(x), cos, sin, mask, cache, start)
        x = over_batch(x + y)
        return over_batch(x + GatedMlp(self.cfg, name="mlp")(norm("mlp_norm")(x))), cache


class DecoderPeriod(nn.Module):
    """The scanned layer; its child is named as the canonical tree names block 0."""

    cfg: Model

    @nn.compact
    def __call__(self, x, cache, cos, sin, mask: Mask, start):
        return DecoderBlock(self.cfg, name="block_0")(x, cache, cos, sin, mask, start)


class Decoder(nn.Module):
    """Embedding table, blocks (one scanned loop unless the config unrolls them), final norm, head unless tied."""

    cfg: Model

    def setup(self):
        d, param_dtype = self.cfg.decoder, jnp.dtype(self.cfg.param_dtype)
        self.embed = nn.Embed(d.vocab, d.width, param_dtype=param_dtype, embedding_init=nn.initializers.normal(0.5))
        body = DecoderPeriod if self.cfg.remat == "none" else nn.remat(DecoderPeriod, policy=REMAT[self.cfg.remat])
        if self.cfg.scan_decoder:
            self.layers = nn.scan(
                body, variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast), out_axes=0, length=d.layers,
            )(self.cfg, name=leaf_names.scan_name(0, d.layers, 1))  # fmt: skip
        else:
            self.blocks = [DecoderBlock(self.cfg, name=f"block_{i}") for i in range(d.layers)]
        self.final_norm = RMSNorm(d.eps, param_dtype)
        if not d.tied:
            self.lm_head = nn.Dense(d.vocab, use_bias=False, dtype=jnp.dtype(self.cfg.dtype), param_dtype=param_dtype)

    def embeddings(self, tokens: jax.Array) -> jax.Array:
        """int (B, T) -> (B, T, W)."""
        return self.embed(tokens).astype(jnp.dtype(self.cfg.dtype))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 (..., V)."""
        if self.cfg.decoder.tied:
            return (hidden @ self.embed.embedding.astype(hidden.dtype).T).astype(jnp.float32)
        return over_batch(self.lm_head(hidden).astype(jnp.float32))

    def __call__(
        self, x: jax.Array, valid: jax.Array, planned_length: int, cache: Cache | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        """Final hidden states of x (B, T, W), causal over valid bool (B, T), so padding changes nothing.

        Positions are cumsum(valid) - 1 unless given; `planned_length` (prompt and new tokens) picks the RoPE regime,
        statically. With a cache, x fills the next T slots. Returns (B, T, W) and the filled cache.
        """
        length = x.shape[1]
        if cache is None:
            positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0) if positions is None else positions
            mask, start = Mask(key_valid=valid, causal=True), 0
            layer_cache = None
        else:
            start = cache.index
            filled = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, start, axis=1)
            if positions is None:
                positions = jnp.maximum(jnp.sum(cache.valid, axis=1, keepdims=True) + jnp.cumsum(valid, axis=1) - 1, 0)
            fresh = isinstance(start, int) and start == 0  # then the mask is known at compile time
            mask = Mask(key_valid=filled, causal=True, query_start=None if fresh else start)
            layer_cache = (cache.k, cache.v)
        cos, sin = rope_tables(self.cfg, positions, planned_length)
        x = over_batch(x)
        if self.cfg.scan_decoder:
            x, layer_cache = self.layers(x, layer_cache, cos, sin, mask, start)
        else:
            filling = []
            for block, one in zip(self.blocks, zip(*layer_cache, strict=True), strict=True):
                x, one = block(x, one, cos, sin, mask, start)
                filling.append(one)
            layer_cache = zip(*filling, strict=True)
        if cache is not None:
            cache = Cache(*layer_cache, filled, cache.index + length)
        return over_batch(self.final_norm(x)), cache


def rope_tables(cfg: Model, positions: jax.Array, planned_length: int) -> tuple[jax.Array, jax.Array]:
    """cos, sin (B, T, H/2) with the su/longrope factors of `planned_length`'s regime (model-spec 2.4)."""
    d = cfg.decoder
    inverse = d.rope_theta ** (-np.arange(0, d.head_size, 2, dtype=np.float32) / d.head_size)
    factors = d.factors(planned_length)
    if factors:
        inverse = inverse / np.asarray(factors, np.float32)
    return rope.tables(positions, jnp.asarray(inverse), d.rope_magnitude)
