"""Patch features to visual tokens: depth pooling, 2x2 merge, newlines, global view, two-layer MLP (model-spec 4.5).

Axis legend: B batch, D slab, V view (a depth group or the global view), P patch, C width, L visual tokens, W decoder
width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from tghmoe_jax.models.config import Model
from tghmoe_jax.models.decoder import RMSNorm
from tghmoe_jax.models.router import masked_mean
from tghmoe_jax.ops.platform import over_batch


def merge_patches(x: jax.Array, grid: int, merge: int) -> jax.Array:
    """(..., H * grid, C) -> (..., H/m, grid/m, m^2 C), H rows of `grid` patches.

    For m = 2 a cell joins (dy, dx) = (0,0), (0,1), (1,0), (1,1).
    """
    lead, width, side = x.shape[:-2], x.shape[-1], grid // merge
    x = x.reshape(*lead, -1, merge, side, merge, width)
    return jnp.moveaxis(x, -4, -3).reshape(*lead, -1, side, merge * merge * width)


def tile_crops(x: jax.Array, crops: tuple[int, int], grid: int) -> jax.Array:
    """Crops (B, rows * columns, grid^2, C), row by row -> one map (B, 1, rows * grid * columns * grid, C)."""
    rows, columns = crops
    x = x.reshape(x.shape[0], rows, columns, grid, grid, x.shape[-1])
    return jnp.moveaxis(x, 2, 3).reshape(x.shape[0], 1, -1, x.shape[-1])


def pool_depth(x: jax.Array, slab_mask: jax.Array, pool: int) -> tuple[jax.Array, jax.Array]:
    """Masked mean of each `pool` neighbouring slabs; the last group is the mean of the remainder (I24).

    (B, D, P, C), (B, D) -> (B, ceil(D / pool), P, C) and the mask of groups with a real slab.
    """
    pad = -x.shape[1] % pool
    x = jnp.pad(x, [(0, 0), (0, pad), (0, 0), (0, 0)])
    slab_mask = jnp.pad(slab_mask, [(0, 0), (0, pad)])
    groups = x.shape[1] // pool
    x = x.reshape(x.shape[0], groups, pool, *x.shape[2:])
    mask = slab_mask.reshape(slab_mask.shape[0], groups, pool)
    return masked_mean(x, mask, axis=2), jnp.any(mask, axis=-1)


def cells_to_tokens(cells: jax.Array, flat: bool) -> jax.Array:
    """bool (B, V, R, C, A) over the merged cells of every view -> (B, L, A) over the visual tokens of the connector.

    A cell of the global view stands for its whole column; a separator for nothing less than all cells.
    """
    if flat:
        return cells.reshape(cells.shape[0], -1, cells.shape[-1])
    everywhere = jnp.all(cells, axis=(1, 2, 3), keepdims=True)

    def rows(views):
        newline = jnp.broadcast_to(everywhere, (*views.shape[:3], 1, views.shape[-1]))
        return jnp.concatenate([views, newline], axis=3).reshape(views.shape[0], -1, views.shape[-1])

    seen = rows(jnp.any(cells, axis=1, keepdims=True))
    return jnp.concatenate([rows(cells), everywhere[:, 0, 0], seen], axis=1)


class Connector(nn.Module):
    """Separators and projector are the base's; nothing is new, so a single slab gives exactly its 2D tokens (I3)."""

    cfg: Model

    @nn.compact
    def __call__(
        self, features: jax.Array, slab_mask: jax.Array, crops: tuple[int, int] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """features (B, D, P, C), slab_mask bool (B, D) -> tokens (B, L, W) and their mask bool (B, L).

        With `crops` (rows, columns) the features are those of a 2D picture: its global view, then its crops.
        """
        projector, pool, flat = self.cfg.projector, self.cfg.volume.spatial_pool, self.cfg.flat
        width = self.cfg.decoder.width
        param_dtype, dtype = jnp.dtype(self.cfg.param_dtype), features.dtype
        mean, joined = projector.kind == "mean_norm", projector.merge**2
        merged = features.shape[-1] * (1 if mean else joined)
        init = nn.initializers.normal(0.02)
        if projector.separators == "newlines":
            sub_newline = self.param("sub_newline", init, (merged,), param_dtype).astype(dtype)
            glb_newline = self.param("glb_newline", init, (merged,), param_dtype).astype(dtype)
        grid, batch = self.cfg.tower.grid, features.shape[0]

        def rows(views: jax.Array, grid: int = grid) -> jax.Array:
            """(B, V, P, C) -> (B, V * tokens, m^2 C), each row closed by a newline unless flat."""
            x = merge_patches(views, grid, projector.merge)
            if mean:
                x = x.reshape(*x.shape[:-1], joined, merged).mean(axis=-2)
            if pool > 1:
                side = x.shape[2] // pool
                x = x.reshape(*x.shape[:2], side, pool, side, pool, merged).mean(axis=(3, 5))
            if not flat:
                x = jnp.concatenate([x, jnp.broadcast_to(sub_newline, (*x.shape[:3], 1, merged))], axis=3)
            return x.reshape(batch, -1, merged)

        if crops is None:
            pooled, group_mask = pool_depth(features, slab_mask, self.cfg.volume.depth_pool)
            x = rows(pooled)
        else:
            x = rows(tile_crops(features[:, 1:], crops, grid), crops[1] * grid)
            features, slab_mask = features[:, :1], slab_mask[:, :1]
            group_mask = slab_mask
        mask = jnp.repeat(group_mask, x.shape[1] // group_mask.shape[1], axis=1)
        if not flat:
            view = rows(masked_mean(features, slab_mask, axis=1)[:, None])
            x = jnp.concatenate([x, jnp.broadcast_to(glb_newline, (batch, 1, merged)), view], axis=1)
            seen = jnp.any(slab_mask, axis=1, keepdims=True)
            mask = jnp.concatenate([mask, jnp.broadcast_to(seen, (batch, 1 + view.shape[1]))], axis=1)
        kw = {"dtype": dtype, "param_dtype": param_dtype, "use_bias": projector.bias}
        if mean:
            x = RMSNorm(projector.eps, param_dtype, zero_centred=True, name="norm")(x)
            return over_batch(nn.Dense(width, name="proj", **kw)(x)), mask
        x = nn.gelu(over_batch(nn.Dense(width, name="fc1", **kw)(x)), approximate=False)
        return over_batch(nn.Dense(width, name="fc2", **kw)(x)), mask
