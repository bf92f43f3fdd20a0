"""Expert FFNs over rows sorted by expert, one tile of one expert's rows at a time: used on CPUs and GPUs.

Neither has a grouped product: XLA's `ragged_dot` multiplies by every expert there, and on a GPU it holds a copy of the
rows for each. Loops of as many tiles as an expert has rows waste no more than the end of its last tile, and a tile's
hidden values stay in a CPU's cache.

Axis legend: M rows, X experts, C width, F hidden width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tghmoe_jax.ops.platform import platform

TILES = (512, 128)  # rows: large ones first, small ones for what is left; multiples of the last
GPU_TILES = (4096, 512)  # that fill a GPU for longer than it takes to begin the next one


def tiles() -> tuple[int, int]:
    return GPU_TILES if platform() == "gpu" else TILES


def slack(rows: int) -> int:
    """Rows of zeros that must follow `rows` sorted rows, for the last tile to end in."""
    return min(tiles()[-1], rows)


def _over_tiles(start, count, rows: int, body: Callable, carry):
    """carry after body(carry, at, size) for tiles that cover the rows start..start + count."""
    left = count
    large, small = tiles()
    if rows >= large:
        whole = left // large
        carry = jax.lax.fori_loop(0, whole, lambda i, c, s=start: body(c, s + i * large, large), carry)
        start, left = start + whole * large, left - whole * large
    size = min(small, rows // 2)  # of rows with their slack
    return jax.lax.fori_loop(0, -(-left // size), lambda i, c: body(c, start + i * size, size), carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_ffn(activation, rows, counts, weights):
    """rows (M, C) sorted by expert, counts int (X,), weights as `ops.experts.ExpertWeights` -> (M, C).

    M holds `slack` rows more than the counts can sum to. What is returned for rows past the counts' sum is arbitrary.
    """
    return _forward(activation, rows, counts, weights, keep=False)[0]


def _forward(activation, rows, counts, weights, keep=True):
    # The end of an expert's last tile belongs to the next one, which overwrites it.
    starts = jnp.cumsum(counts) - counts
    out = jnp.zeros_like(rows)
    hidden = jnp.zeros((rows.shape[0], weights.fc1.shape[-1]) if keep else (), rows.dtype)
    for e in range(weights.fc1.shape[0]):
        fc1, bias1, fc2, bias2 = (leaf[e] for leaf in weights)

        def body(carry, at, size, fc1=fc1, bias1=bias1, fc2=fc2, bias2=bias2):
            out, hidden = carry
            before = jax.lax.dynamic_slice_in_dim(rows, at, size) @ fc1 + bias1
            y = activation(before) @ fc2 + bias2
            out = jax.lax.dynamic_update_slice_in_dim(out, y, at, 0)
            return out, jax.lax.dynamic_update_slice_in_dim(hidden, before, at, 0) if keep else hidden

        out, hidden = _over_tiles(starts[e], counts[e], rows.shape[0], body, (out, hidden))
    return out, (rows, hidden, counts, weights)


def _backward(activation, kept, cotangent):
    rows, hidden, counts, weights = kept
    starts = jnp.cumsum(counts) - counts
    d_rows, gradients = jnp.zeros_like(rows), []
    for e in range(weights.fc1.shape[0]):
        fc1, _, fc2, _ = own = type(weights)(*(leaf[e] for leaf in weights))
        end = starts[e] + counts[e]

        def body(carry, at, size, fc1=fc1, fc2=fc2, end=end):
            d_rows, total = carry
            x, before, dy = (jax.lax.dynamic_slice_in_dim(a, at, size) for a in (rows, hidden, cotangent))
            dy = jnp.where((at + jnp.arange(size) < end)[:, None], dy, 0)
            h, pull = jax.vjp(activation, before)
            (d_before,) = pull(dy @ fc2.T)
            d_rows = jax.lax.dynamic_update_slice_in_dim(d_rows, d_before @ fc1.T, at, 0)
            product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
            total_of = functools.partial(jnp.sum, axis=0, dtype=jnp.float32)
            found = (product(x.T, d_before), total_of(d_before), product(h.T, dy), total_of(dy))
            return d_rows, jax.tree.map(jnp.add, total, type(total)(*found))

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), own)
        d_rows, gradient = _over_tiles(starts[e], counts[e], rows.shape[0], body, (d_rows, zeros))
        gradients.append(jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), gradient, own))
    return d_rows, None, jax.tree.map(lambda *ones: jnp.stack(ones), *gradients)


tiled_ffn.defvjp(_forward, _backward)
