"""A dense layer's product on matrices is jax's own product, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tghmoe_jax.ops.products import flat_dot_general

# (axes of x before those contracted, contracted, axes of the output)
SHAPES = [((5,), (3,), (4,)), ((2, 3, 4), (6,), (2, 5)), ((2, 3), (2, 4), (7,)), ((), (6,), (2,)), ((2, 0), (3,), (4,))]


def numbers(outer, inner, x):
    return (tuple(range(len(outer), len(x.shape))), tuple(range(len(inner)))), ((), ())


@pytest.mark.parametrize(("outer", "inner", "out"), SHAPES)
def test_it_is_the_product_of_jax_with_its_gradients(outer, inner, out):
    drawn = np.random.default_rng(0)
    x = jnp.asarray(drawn.normal(size=(*outer, *inner)), jnp.float32)
    kernel = jnp.asarray(drawn.normal(size=(*inner, *out)), jnp.float32)
    weights = jnp.asarray(drawn.normal(size=(*outer, *out)), jnp.float32)

    def weighted(product, x, kernel):
        y = product(x, kernel, numbers(outer, inner, x))
        return jnp.sum(y * weights), y

    ours, theirs = (
        jax.value_and_grad(functools.partial(weighted, product), (0, 1), has_aux=True)(x, kernel)
        for product in (flat_dot_general, jax.lax.dot_general)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_a_half_precision_product_keeps_the_type_that_is_asked_for():
    x = jnp.ones((2, 3), jnp.bfloat16)
    y = flat_dot_general(x, x.T, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32 and (y == 3).all()


@pytest.mark.parametrize("wrong", [(((0,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((1,), (0,)), ((0,), (1,)))])
def test_other_products_are_refused(wrong):
    with pytest.raises(ValueError, match="last axes of x"):
        flat_dot_general(jnp.ones((3, 3)), jnp.ones((3, 3)), wrong)
