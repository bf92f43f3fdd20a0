"""Rotary position embedding in the half layout (pairs i, i + r/2).

Axis legend: B batch, T token, N head, H head size, r rotary width.
"""

import jax
import jax.numpy as jnp


def tables(positions: jax.Array, inverse_frequencies: jax.Array, magnitude: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines float32 (B, T, r/2) of positions (B, T) times inverse frequencies (r/2,).

    `magnitude` multiplies both (the su/longrope attention factor, model-spec 2.4).
    """
    angle = positions.astype(jnp.float32)[..., None] * inverse_frequencies
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first r = 2 * cos.shape[-1] features of x (B, T, N, H); the rest pass through. Keeps x's dtype."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :].astype(x.dtype), sin[:, :, None, :].astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
