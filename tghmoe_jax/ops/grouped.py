"""Grouped matrix products: rows sorted by expert, each times its own expert's matrix.

On TPU it is the megablox kernel of jax.experimental.pallas, whose backward pass is grouped too: XLA's `ragged_dot`
compiles its weight gradient there to a dense product over all experts (design.md 7). Elsewhere it is `ragged_dot`,
where ops/tiled.py is not asked.

Axis legend: M rows, X experts, K in, N out.
"""

import functools

import jax
import jax.numpy as jnp

from tghmoe_jax.ops.platform import platform

_TILES = (512, 1024, 1024)  # rows, in, out of a step of the kernel on TPU
_TILES_INTERPRETED = (8, 128, 128)  # the least that the kernel's layout allows, for tests on a CPU
_BACKENDS = ("auto", "ragged_dot", "megablox")


def tiles() -> tuple[int, int, int]:
    """(rows, in, out) of one step of the kernel on the current platform."""
    return _TILES if platform() == "tpu" else _TILES_INTERPRETED


def padded_rows(rows: int) -> int:
    """The least number of rows, at least `rows`, that the kernel's tiles divide."""
    return -(-rows // tiles()[0]) * tiles()[0]


def grouped_matmul(rows: jax.Array, weights: jax.Array, counts: jax.Array, backend: str = "auto") -> jax.Array:
    """rows (M, K), of which the first counts[0] belong to expert 0 and so on, times weights (X, K, N) -> (M, N).

    counts int (X,) sum to at most M, a multiple of `padded_rows` under `megablox`; rows past their sum give zeros and
    have no gradient. ValueError for an unknown backend.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"grouped matmul backend {backend!r} is not one of {', '.join(_BACKENDS)}")
    if backend == "auto":
        backend = "megablox" if platform() == "tpu" else "ragged_dot"
    counts = counts.astype(jnp.int32)
    if backend == "ragged_dot":
        return jax.lax.ragged_dot(rows, weights, counts)
    # The kernel never writes the rows past the last group: what lies there is arbitrary, NaN too.
    real = (jnp.arange(rows.shape[0]) < jnp.sum(counts))[:, None]
    return jnp.where(real, _megablox(platform() != "tpu", rows, weights, counts), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _megablox(interpret: bool, rows, weights, counts):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # takes long to import

    return gmm(rows, weights, counts, rows.dtype, tiles(), interpret=interpret)


def _forward(interpret, rows, weights, counts):
    return _megablox(interpret, rows, weights, counts), (rows, weights, counts)


def _backward(interpret, kept, cotangent):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    rows, weights, counts = kept
    tm, tk, tn = tiles()
    back = gmm(cotangent, weights, counts, rows.dtype, (tm, tn, tk), transpose_rhs=True, interpret=interpret)
    real = (jnp.arange(rows.shape[0]) < jnp.sum(counts))[:, None]
    gradient = tgmm(rows.swapaxes(0, 1), cotangent, counts, weights.dtype, tiles(), interpret=interpret)
    return jnp.where(real, back, 0), gradient, None


_megablox.defvjp(_forward, _backward)
