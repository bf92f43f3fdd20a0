"""A 2D vision tower over a volume: 3D patches, 2D attention below, attention over all slabs above, TGH-MoE FFNs.

Axis legend: B batch, D slab (a slice where patch_depth is 1), S slice, T token of a slab (class token and patches), P
patch, C width, N head, H head size.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.config import MAX_DEPTH, Model, Volume3D
from tghmoe_jax.models.tgh_moe import MoE, MoEStats
from tghmoe_jax.ops import rope
from tghmoe_jax.ops.activations import ACTIVATIONS
from tghmoe_jax.ops.attention import Mask, attention
from tghmoe_jax.ops.platform import over_batch
from tghmoe_jax.ops.products import flat_dot_general


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What one block is: its attention (`2d` or the kind of 3D attention) and its FFN's (groups, experts, top_k) parts.

    `token` and `task` are None or (G, E, K); with both None the FFN is the base's dense one.
    """

    attn: str
    token: tuple[int, int, int] | None = None
    task: tuple[int, int, int] | None = None


def block_specs(cfg: Model) -> list[BlockSpec]:
    """One spec per executed block, from the layer lists and the topology (model-spec 4.4)."""
    t, v = cfg.tgh, cfg.volume
    specs = []
    for i in range(cfg.tower.executed):
        token = task = None
        if t.topology == "nested" and i in t.layers:
            token = (t.groups, t.experts, t.top_k)
        elif t.topology == "stacked":
            token = (1, t.experts, t.top_k) if i in t.layers else None
            task = (t.groups, 1, 1) if i in t.task_layers else None
        elif t.topology == "parallel" and i in t.layers:
            token, task = (1, t.experts, t.top_k), (t.groups, 1, 1)
        if token == (1, 1, 1):  # I11: one expert of one group is the dense FFN
            token = None
        specs.append(BlockSpec(v.attn3d_kind if i in v.attn3d_layers else "2d", token, task))
    return specs


class BlockContext(NamedTuple):
    """What every block reads: slab_mask bool (B, D), cos and sin (B, D, r/2), t (B, R), group int (B,)."""

    slab_mask: jax.Array
    cos: jax.Array
    sin: jax.Array
    t: jax.Array
    group: jax.Array


class Attention(nn.Module):
    """Attention with biases within a slab (`2d`) or over slabs; the same weights serve both."""

    cfg: Model
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, ctx: BlockContext) -> jax.Array:
        """x (B, D, T, C) -> (B, D, T, C)."""
        tower, volume = self.cfg.tower, self.cfg.volume
        batch, slabs, tokens, width = x.shape
        heads = (tower.heads, width // tower.heads)
        kw = {"dtype": jnp.dtype(self.cfg.dtype), "param_dtype": jnp.dtype(self.cfg.param_dtype)}
        kw["dot_general"] = flat_dot_general
        q, k, v = (nn.DenseGeneral(heads, name=name, **kw)(x) for name in "qkv")  # (B, D, T, N, H)
        if self.kind == "2d":
            q, k, v = (a.reshape(batch * slabs, tokens, *heads) for a in (q, k, v))
            mask = Mask()
        else:
            q, k, v = (a.reshape(batch, slabs * tokens, *heads) for a in (q, k, v))
            if volume.depth_embed == "rope" and volume.depth_rope.enabled:
                cos, sin = (jnp.repeat(a, tokens, axis=1) for a in (ctx.cos, ctx.sin))  # (B, D * T, r/2)
                q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
            mask = Mask(key_valid=jnp.repeat(ctx.slab_mask, tokens, axis=1))
            if self.kind == "window":
                mask = dataclasses.replace(mask, slice_tokens=tokens, window=volume.attn3d_window)
        out = attention(q, k, v, mask, self.cfg.attention).reshape(batch, slabs, tokens, *heads)
        return nn.DenseGeneral(width, axis=(-2, -1), name="out", **kw)(out)


def layer_norm(cfg: Model, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=cfg.tower.eps, use_fast_variance=False, dtype=jnp.dtype(cfg.dtype),
        param_dtype=jnp.dtype(cfg.param_dtype), name=name,
    )  # fmt: skip


class Mlp(nn.Module):
    """The base's FFN: fc2(activation(fc1 x))."""

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = {"dtype": x.dtype, "param_dtype": jnp.dtype(self.cfg.param_dtype), "dot_general": flat_dot_general}
        tower = self.cfg.tower
        hidden = ACTIVATIONS[tower.activation](nn.Dense(tower.ffn, name="fc1", **kw)(x))
        return nn.Dense(x.shape[-1], name="fc2", **kw)(hidden)


class Block(nn.Module):
    """Pre-norm block whose attention may be 3D and whose FFN may be TGH-MoE."""

    cfg: Model
    spec: BlockSpec

    @nn.compact
    def __call__(self, x: jax.Array, ctx: BlockContext) -> tuple[jax.Array, MoEStats | None]:
        """x (B, D, T, C) -> the same shape, and the statistics of the block's token experts."""
        cfg, spec = self.cfg, self.spec
        x = x + Attention(cfg, spec.attn, name="attn")(layer_norm(cfg, "ln1")(x), ctx)
        u = layer_norm(cfg, "ln2")(x)
        if spec.token is None and spec.task is None:
            return over_batch(x + Mlp(cfg, name="mlp")(u)), None

        batch, slabs, tokens, width = u.shape
        flat = u.reshape(batch, slabs * tokens, width)
        valid = jnp.repeat(ctx.slab_mask, tokens, axis=1)
        y, stats = jnp.zeros_like(flat), None
        if spec.token is not None:
            y, stats = self._experts("moe", spec.token)(flat, valid, ctx.t, ctx.group % spec.token[0])
        if spec.task is not None:
            task, _ = self._experts("task_ffn", spec.task)(flat, valid, ctx.t, ctx.group % spec.task[0])
            if spec.token is None:
                y = task
            else:  # one half: at zero neither part would get a gradient
                share = self.param("mix", nn.initializers.constant(0.5), (), jnp.float32).astype(y.dtype)
                y = (1 - share) * y + share * task
        return over_batch(x + y.reshape(x.shape)), stats

    def _experts(self, name: str, size: tuple[int, int, int]) -> MoE:
        tower, param_dtype = self.cfg.tower, jnp.dtype(self.cfg.param_dtype)
        return MoE(self.cfg.tgh, *size, tower.ffn, tower.activation, param_dtype, name=name)


class Period(nn.Module):
    """The repeated pattern of a scanned run. Each block is rematerialised for itself: backward holds one at a time."""

    cfg: Model
    start: int
    specs: tuple[BlockSpec, ...]

    @nn.compact
    def __call__(self, x: jax.Array, ctx: BlockContext):
        stats = []
        for offset, spec in enumerate(self.specs):
            x, one = rematerialised(self.cfg, Block)(self.cfg, spec, name=f"block_{self.start + offset}")(x, ctx)
            stats.append(one)
        return x, tuple(stats)


REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rematerialised(cfg: Model, module: type[nn.Module]) -> type[nn.Module]:
    """The module as the config's `remat` says."""
    return module if cfg.remat == "none" else nn.remat(module, policy=REMAT[cfg.remat])


class ViT3D(nn.Module):
    """Slices to patch features of the executed top block."""

    cfg: Model

    @nn.compact
    def __call__(
        self, slices: jax.Array, slice_mask: jax.Array, t: jax.Array, group: jax.Array,
        slice_spacing: jax.Array | None = None, depth_scale: jax.Array | float | None = None,
        depth_index: jax.Array | None = None,
    ):  # fmt: skip
        """Features of the patches, the slab mask, and the statistics of each MoE layer.

        slices uint8 or float in 0..1 (B, S, H, W, 3); slice_mask bool (B, S); t float32 (B, R); group int (B,);
        slice_spacing float32 (B,) in mm (used by depth_rope.unit mm); depth_scale overrides the rotation's scale;
        depth_index (B, D) overrides the slab positions. Returns (B, D, P, C), bool (B, D), {layer: MoEStats}.
        UserError for more slabs than there are learned depth positions.
        """
        volume = self.cfg.volume
        x, slab_mask = self._embed(slices, slice_mask)
        batch, slabs = slab_mask.shape
        if volume.depth_embed == "learned_zero_init" and slabs > MAX_DEPTH:
            raise UserError(
                f"{slabs} slabs are more than the {MAX_DEPTH} learned depth positions; raise "
                "--config.model.patch_depth, lower --config.data.slices, or take --config.model.depth_embed=rope."
            )
        index = jnp.broadcast_to(jnp.arange(slabs), (batch, slabs)) if depth_index is None else depth_index
        cos, sin = depth_tables(volume, index, slice_spacing, depth_scale)
        ctx = BlockContext(slab_mask, cos, sin, t, group)
        specs = block_specs(self.cfg)
        first3d = min(volume.attn3d_layers, default=None)
        stats: dict[int, Any] = {}
        for start, repeats, period in leaf_names.segments(specs):
            # Before the first 3D layer, or before the run that scans it together with 2D ones.
            if volume.depth_embed == "learned_zero_init" and first3d is not None and start + repeats * period > first3d:
                table = self.param("depth_pos", nn.initializers.zeros, (MAX_DEPTH, x.shape[-1]), jnp.float32)
                x, first3d = x + table[:slabs].astype(x.dtype)[None, :, None, :], None
            part = tuple(specs[start : start + period])
            if repeats == 1:
                x, one = rematerialised(self.cfg, Block)(self.cfg, part[0], name=f"block_{start}")(x, ctx)
                if one is not None:
                    stats[start] = one
                continue
            scanned = nn.scan(
                Period, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=repeats
            )(self.cfg, start, part, name=leaf_names.scan_name(start, repeats, period))  # fmt: skip
            x, many = scanned(x, ctx)
            for offset, one in enumerate(many):
                if one is not None:
                    for r in range(repeats):
                        stats[start + offset + r * period] = jax.tree.map(lambda a, r=r: a[r], one)
        self._unused(x, ctx)
        if self.cfg.tower.post_norm:
            x = layer_norm(self.cfg, "post_ln")(x)
        return x[:, :, int(self.cfg.tower.class_token) :], slab_mask, stats

    def _embed(self, slices, slice_mask):
        """3D patchify: every masked slice is overwritten by the last real one, so that padding never leaks."""
        tower, depth = self.cfg.tower, self.cfg.volume.patch_depth
        dtype, param_dtype = jnp.dtype(self.cfg.dtype), jnp.dtype(self.cfg.param_dtype)
        batch, count, height, width, _ = slices.shape
        pad = -count % depth
        slices = jnp.pad(slices, [(0, 0), (0, pad)] + [(0, 0)] * 3)
        slice_mask = jnp.pad(slice_mask, [(0, 0), (0, pad)])
        number = jnp.arange(count + pad)
        last = jnp.max(jnp.where(slice_mask, number, 0), axis=1, keepdims=True)
        source = jnp.where(slice_mask, number, last)
        slices = jnp.take_along_axis(slices, source[:, :, None, None, None], axis=1)
        if slices.dtype == jnp.uint8:
            slices = slices.astype(jnp.float32) / 255
        pixels = ((slices - np.float32(tower.mean)) / np.float32(tower.std)).astype(dtype)

        slabs = (count + pad) // depth
        slab_mask = jnp.any(slice_mask.reshape(batch, slabs, depth), axis=-1)
        grid, p = tower.grid, tower.patch_size
        pixels = pixels[:, :, : grid * p, : grid * p]  # what is left of a side is not seen, as in the base
        pixels = pixels.reshape(batch, slabs, depth, grid, p, grid, p, 3)
        pixels = pixels.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, slabs, grid * grid, -1)
        init = nn.initializers.normal(0.02)
        x = PatchEmbedding((depth, p, p, 3, tower.width), tower.patch_bias, param_dtype, name="patch")(pixels)
        if tower.class_token:
            cls = self.param("cls", init, (tower.width,), param_dtype).astype(dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (batch, slabs, 1, tower.width)), x], axis=2)
        x = x + self.param("pos", nn.initializers.normal(0.3), (tower.tokens, tower.width), param_dtype).astype(dtype)
        if tower.pre_norm:
            x = layer_norm(self.cfg, "pre_ln")(x)
        return over_batch(x), slab_mask

    def _unused(self, x, ctx):
        """Blocks above the feature layer and an unused post-norm: kept for export, never executed (I27)."""
        if not self.is_initializing():
            return
        for i in range(self.cfg.tower.executed, self.cfg.tower.layers):
            x, _ = Block(self.cfg, BlockSpec("2d"), name=f"block_{i}")(x, ctx)
        if not self.cfg.tower.post_norm:
            layer_norm(self.cfg, "post_ln")(x)


class PatchEmbedding(nn.Module):
    """x (..., pd * p * p * 3) times a kernel (pd, p, p, 3, C), inflated from the base's (p, p, 3, C) (model-spec 0)."""

    shape: tuple[int, ...]
    use_bias: bool
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(0.02), self.shape, self.param_dtype)
        kernel = kernel.astype(x.dtype).reshape(-1, self.shape[-1])
        x = flat_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, self.shape[-1:], self.param_dtype).astype(x.dtype)
        return x


def depth_tables(volume: Volume3D, index: jax.Array, slice_spacing, scale) -> tuple[jax.Array, jax.Array]:
    """cos, sin (B, D, r/2) of phi_j(z) = s * pos(z) * base^(-2j/r) (model-spec 4.3) for slab indices (B, D)."""
    r = volume.depth_rope
    position = index.astype(jnp.float32)
    if r.unit == "mm":
        if slice_spacing is None:
            raise ValueError("depth_rope.unit=mm needs the slice spacing of every sample")
        position = position * (slice_spacing[:, None] * volume.patch_depth / r.reference_mm)
    scale = r.scale if scale is None else scale
    frequency = r.base ** (-np.arange(0, r.rotary_dim, 2, dtype=np.float32) / r.rotary_dim)
    return rope.tables(position * scale, jnp.asarray(frequency))
