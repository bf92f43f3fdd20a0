"""CLIP's vision tower over a volume: 3D patches, 2D attention below, attention over all slabs above, TGH-MoE FFNs.

Axis legend: B batch, D slab (a slice where patch_depth is 1), S slice, T token of a slab (CLS + patches), P patch,
C width, N head, H head size.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.config import Model, Vision
from tghmoe_jax.models.tgh_moe import MoE, MoEStats, quick_gelu
from tghmoe_jax.ops import rope
from tghmoe_jax.ops.attention import Mask, attention
from tghmoe_jax.ops.platform import over_batch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What one block is: its attention (`2d` or the kind of 3D attention) and its FFN's (groups, experts, top_k) parts.

    `token` and `task` are None or (G, E, K); with both None the FFN is CLIP's dense one.
    """

    attn: str
    token: tuple[int, int, int] | None = None
    task: tuple[int, int, int] | None = None


def block_specs(cfg: Model) -> list[BlockSpec]:
    """One spec per executed block, from the layer lists and the topology (model-spec 4.4)."""
    t, v = cfg.tgh, cfg.vision
    specs = []
    for i in range(v.executed):
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


class Context(NamedTuple):
    """What every block reads: slab_mask bool (B, D), cos and sin (B, D, r/2), t (B, R), group int (B,)."""

    slab_mask: jax.Array
    cos: jax.Array
    sin: jax.Array
    t: jax.Array
    group: jax.Array


class Attention(nn.Module):
    """CLIP attention with biases; the same weights serve 2D and 3D."""

    cfg: Model
    kind: str

    def setup(self):
        v = self.cfg.vision
        kw = {"dtype": jnp.dtype(self.cfg.dtype), "param_dtype": jnp.dtype(self.cfg.param_dtype)}
        heads = (v.heads, v.width // v.heads)
        self.q, self.k, self.v = (nn.DenseGeneral(heads, **kw) for _ in "qkv")
        self.out = nn.DenseGeneral(v.width, axis=(-2, -1), **kw)

    def __call__(self, x: jax.Array, ctx: Context, kind: str | None = None) -> jax.Array:
        """x (B, D, T, C) -> (B, D, T, C); `kind` overrides the module's own."""
        v, kind = self.cfg.vision, kind or self.kind
        batch, slabs, tokens, width = x.shape
        heads = (v.heads, width // v.heads)
        q, k, value = self.q(x), self.k(x), self.v(x)  # (B, D, T, N, H)
        if kind != "2d" and v.depth_embed == "rope" and v.depth_rope.enabled:
            spread = lambda a: jnp.repeat(a, tokens, axis=1)  # noqa: E731  (B, D, r/2) -> (B, D * T, r/2)
            cos, sin = spread(ctx.cos), spread(ctx.sin)
            turn = lambda a: rope.rotate(a.reshape(batch, slabs * tokens, *heads), cos, sin).reshape(a.shape)  # noqa: E731
            q, k = turn(q), turn(k)
        return self.out(self._attend(kind, q, k, value, ctx))

    def _attend(self, kind: str, q, k, value, ctx: Context) -> jax.Array:
        batch, slabs, tokens, *heads = q.shape
        backend = self.cfg.attention
        if kind == "2d":
            flat = lambda a: a.reshape(batch * slabs, tokens, *heads)  # noqa: E731
            return attention(flat(q), flat(k), flat(value), backend=backend).reshape(q.shape)
        if kind == "depth_axial":  # the same place in every slab
            flat = lambda a: a.swapaxes(1, 2).reshape(batch * tokens, slabs, *heads)  # noqa: E731
            mask = Mask(key_valid=jnp.repeat(ctx.slab_mask, tokens, axis=0))
            out = attention(flat(q), flat(k), flat(value), mask, backend)
            return out.reshape(batch, tokens, slabs, *heads).swapaxes(1, 2)
        flat = lambda a: a.reshape(batch, slabs * tokens, *heads)  # noqa: E731
        mask = Mask(key_valid=jnp.repeat(ctx.slab_mask, tokens, axis=1))
        if kind == "window":
            mask = dataclasses.replace(mask, slice_tokens=tokens, window=self.cfg.vision.attn3d_window)
        return attention(flat(q), flat(k), flat(value), mask, backend).reshape(q.shape)


class Mlp(nn.Module):
    """CLIP's FFN: fc2(quick_gelu(fc1 x))."""

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = {"dtype": x.dtype, "param_dtype": jnp.dtype(self.cfg.param_dtype)}
        hidden = quick_gelu(nn.Dense(self.cfg.vision.ffn, name="fc1", **kw)(x))
        return nn.Dense(x.shape[-1], name="fc2", **kw)(hidden)


class Block(nn.Module):
    """Pre-norm CLIP block whose attention may be 3D and whose FFN may be TGH-MoE."""

    cfg: Model
    spec: BlockSpec

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, MoEStats | None]:
        """x (B, D, T, C) -> the same shape, and the statistics of the block's token experts."""
        cfg, spec = self.cfg, self.spec
        norm = lambda name: nn.LayerNorm(  # noqa: E731
            epsilon=cfg.vision.eps, use_fast_variance=False, dtype=x.dtype,
            param_dtype=jnp.dtype(cfg.param_dtype), name=name,
        )  # fmt: skip
        if spec.attn == "divided":  # over depth, then within the slab, with the same weights (TimeSformer order)
            shared, ln1 = Attention(cfg, "divided", name="attn"), norm("ln1")
            x = x + shared(ln1(x), ctx, "depth_axial")
            x = x + shared(ln1(x), ctx, "2d")
        else:
            x = x + Attention(cfg, spec.attn, name="attn")(norm("ln1")(x), ctx)
        u = norm("ln2")(x)
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
        return MoE(self.cfg.tgh, *size, ffn=self.cfg.vision.ffn, param_dtype=jnp.dtype(self.cfg.param_dtype), name=name)


class Period(nn.Module):
    """The repeated pattern of a scanned run."""

    cfg: Model
    start: int
    specs: tuple[BlockSpec, ...]

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context):
        stats = []
        for offset, spec in enumerate(self.specs):
            x, one = Block(self.cfg, spec, name=f"block_{self.start + offset}")(x, ctx)
            stats.append(one)
        return x, tuple(stats)


REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


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
        """
        v = self.cfg.vision
        x, slab_mask = self._embed(slices, slice_mask)
        batch, slabs = slab_mask.shape
        index = jnp.broadcast_to(jnp.arange(slabs), (batch, slabs)) if depth_index is None else depth_index
        cos, sin = depth_tables(v, index, slice_spacing, depth_scale)
        ctx = Context(slab_mask, cos, sin, t, group)
        specs = block_specs(self.cfg)
        first3d = min(v.attn3d_layers, default=None)
        stats: dict[int, Any] = {}
        for start, repeats, period in leaf_names.segments(specs):
            # Before the first 3D layer, or before the run that scans it together with 2D ones.
            if v.depth_embed == "learned_zero_init" and first3d is not None and start + repeats * period > first3d:
                table = self.param("depth_pos", nn.initializers.zeros, (v.max_depth, v.width), jnp.float32)
                x, first3d = x + table[:slabs].astype(x.dtype)[None, :, None, :], None
            part = tuple(specs[start : start + period])
            remat = lambda m: m if self.cfg.remat == "none" else nn.remat(m, policy=REMAT[self.cfg.remat])  # noqa: E731
            if repeats == 1:
                x, one = remat(Block)(self.cfg, part[0], name=f"block_{start}")(x, ctx)
                if one is not None:
                    stats[start] = one
                continue
            scanned = nn.scan(
                remat(Period), variable_axes={"params": 0}, split_rngs={"params": True, "router": True},
                in_axes=nn.broadcast, length=repeats,
            )(self.cfg, start, part, name=leaf_names.scan_name(start, repeats, period))  # fmt: skip
            x, many = scanned(x, ctx)
            for offset, one in enumerate(many):
                if one is not None:
                    for r in range(repeats):
                        stats[start + offset + r * period] = jax.tree.map(lambda a, r=r: a[r], one)
        self._unused(x, ctx)
        return x[:, :, 1:], slab_mask, stats

    def _embed(self, slices, slice_mask):
        """3D patchify: every masked slice is overwritten by the last real one, so that padding never leaks."""
        v = self.cfg.vision
        dtype, param_dtype = jnp.dtype(self.cfg.dtype), jnp.dtype(self.cfg.param_dtype)
        batch, count, height, width, _ = slices.shape
        pad = -count % v.patch_depth
        slices = jnp.pad(slices, [(0, 0), (0, pad)] + [(0, 0)] * 3)
        slice_mask = jnp.pad(slice_mask, [(0, 0), (0, pad)])
        number = jnp.arange(count + pad)
        last = jnp.max(jnp.where(slice_mask, number, 0), axis=1, keepdims=True)
        source = jnp.where(slice_mask, number, last)
        slices = jnp.take_along_axis(slices, source[:, :, None, None, None], axis=1)
        if slices.dtype == jnp.uint8:
            slices = slices.astype(jnp.float32) / 255
        pixels = ((slices - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).astype(dtype)

        slabs = (count + pad) // v.patch_depth
        slab_mask = jnp.any(slice_mask.reshape(batch, slabs, v.patch_depth), axis=-1)
        grid, p = v.grid, v.patch_size
        pixels = pixels.reshape(batch, slabs, v.patch_depth, grid, p, grid, p, 3)
        pixels = pixels.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, slabs, grid * grid, -1)
        init = nn.initializers.normal(0.02)
        kernel = PatchKernel((v.patch_depth, p, p, 3, v.width), param_dtype, name="patch")()
        patches = pixels @ kernel.astype(dtype).reshape(-1, v.width)
        cls = self.param("cls", init, (v.width,), param_dtype).astype(dtype)
        pos = self.param("pos", nn.initializers.normal(0.3), (grid * grid + 1, v.width), param_dtype).astype(dtype)
        cls = jnp.broadcast_to(cls, (batch, slabs, 1, v.width))
        x = jnp.concatenate([cls, patches], axis=2) + pos
        norm = nn.LayerNorm(epsilon=v.eps, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, name="pre_ln")
        return over_batch(norm(x)), slab_mask

    def _unused(self, x, ctx):
        """Blocks above the feature layer and the post-norm: kept for export, never executed (I27)."""
        if not self.is_initializing():
            return
        v = self.cfg.vision
        for i in range(v.executed, v.layers):
            x, _ = Block(self.cfg, BlockSpec("2d"), name=f"block_{i}")(x, ctx)
        nn.LayerNorm(epsilon=v.eps, param_dtype=jnp.dtype(self.cfg.param_dtype), name="post_ln")(x)


class PatchKernel(nn.Module):
    """The patch embedding's kernel (pd, p, p, 3, C), inflated from the base's (p, p, 3, C) (model-spec 0)."""

    shape: tuple[int, ...]
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.normal(0.02), self.shape, self.param_dtype)


def depth_tables(v: Vision, index: jax.Array, slice_spacing, scale) -> tuple[jax.Array, jax.Array]:
    """cos, sin (B, D, r/2) of phi_j(z) = s * pos(z) * base^(-2j/r) (model-spec 4.3) for slab indices (B, D)."""
    r = v.depth_rope
    position = index.astype(jnp.float32)
    if r.unit == "mm":
        if slice_spacing is None:
            raise ValueError("depth_rope.unit=mm needs the slice spacing of every sample")
        position = position * (slice_spacing[:, None] * v.patch_depth / r.reference_mm)
    scale = r.scale if scale is None else scale
    frequency = r.base ** (-np.arange(0, r.rotary_dim, 2, dtype=np.float32) / r.rotary_dim)
    return rope.tables(position * scale, jnp.asarray(frequency))
