"""Expert FFNs over rows sorted by expert, a tile of one expert's rows after the other: what a CPU computes.

A CPU has no grouped product: XLA's `ragged_dot` multiplies by every expert there. Loops of as many tiles as an expert
has rows waste no more than the end of its last tile, and a tile's hidden values stay in cache.

Axis legend: M rows, X experts, C width, F hidden width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

TILES = (512, 128)  # rows: large ones first, small ones for what is left; multiples of the last


def slack(rows: int) -> int:
    """Rows of zeros that must follow `rows` sorted rows, for the last tile to end in."""
    return min(TILES[-1], rows)


def _over_tiles(start, count, rows: int, body: Callable, carry):
    """carry after body(carry, at, size) for tiles that cover the rows start..start + count."""
    left = count
    for size in TILES[:-1] if rows >= TILES[0] else ():
        whole = left // size
        carry = jax.lax.fori_loop(0, whole, lambda i, c, s=start, n=size: body(c, s + i * n, n), carry)
        start, left = start + whole * size, left - whole * size
    size = min(TILES[-1], rows // 2)  # of rows with their slack
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
            found = (x.T @ d_before, jnp.sum(d_before, axis=0), h.T @ dy, jnp.sum(dy, axis=0))
            return d_rows, jax.tree.map(jnp.add, total, type(total)(*found))

        zeros = jax.tree.map(jnp.zeros_like, own)
        d_rows, gradient = _over_tiles(starts[e], counts[e], rows.shape[0], body, (d_rows, zeros))
        gradients.append(gradient)
    return d_rows, None, jax.tree.map(lambda *ones: jnp.stack(ones), *gradients)


tiled_ffn.defvjp(_forward, _backward)
