"""The kernel of grouped products, interpreted, against one product at a time: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tghmoe_jax.ops.grouped import grouped_matmul, padded_rows

CASES = [(6, 10, (5, 0, 9, 3)), (130, 136, (8, 16, 1)), (6, 10, (0, 0, 0)), (6, 10, (0, 24))]


def oracle(rows, weights, counts, cotangent):
    """float64 y, and the gradients of sum(y * cotangent) by rows and weights."""
    rows, weights, cotangent = (np.asarray(a, np.float64) for a in (rows, weights, cotangent))
    y, d_rows, d_weights = np.zeros(cotangent.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    ends = np.cumsum(counts)
    for expert, (end, count) in enumerate(zip(ends, counts, strict=True)):
        part = slice(end - count, end)
        y[part] = rows[part] @ weights[expert]
        d_rows[part] = cotangent[part] @ weights[expert].T
        d_weights[expert] = rows[part].T @ cotangent[part]
    return y, d_rows, d_weights


@pytest.mark.parametrize("backend", ["megablox", "ragged_dot"])
@pytest.mark.parametrize(("width", "out", "counts"), CASES)
def test_values_and_gradients_equal_one_product_at_a_time(backend, width, out, counts):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    size = padded_rows(sum(counts) + 9)  # whole tiles of nobody, too
    rows, weights, cotangent = normal(size, width), normal(len(counts), width, out), normal(size, out)
    rows[sum(counts) :] = np.nan if backend == "megablox" else 0  # what nobody owns is never read

    def total(rows, weights):
        y = grouped_matmul(rows, weights, jnp.asarray(counts), backend)
        return jnp.sum(y * cotangent), y

    found, y = tiny.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(rows, weights)
    for one, expected in zip((y, *found), oracle(rows, weights, counts, cotangent), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'dot' is not one of auto, ragged_dot, megablox"):
        grouped_matmul(jnp.zeros((8, 2)), jnp.zeros((1, 2, 2)), jnp.array([8]), "dot")
