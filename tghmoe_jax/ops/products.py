"""The product of a dense layer, on matrices."""

import math

import jax


def flat_dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None, preferred_element_type=None
) -> jax.Array:
    """`jax.lax.dot_general` of the last axes of x (..., *in) and the first of a kernel (*in, *out): (..., *out).

    For the `dot_general` of Flax's dense layers. Both sides are made matrices first: with more axes XLA's CPU compiler
    copies the gradient of the output, element by element, to transpose it for the gradient of the kernel.
    ValueError where other axes are contracted, or batched.
    """
    (axes, kernel_axes), batched = dimension_numbers
    count = len(axes)
    if any(batched) or list(axes) != list(range(x.ndim - count, x.ndim)) or list(kernel_axes) != list(range(count)):
        raise ValueError(f"{dimension_numbers} are not the last axes of x and the first of a kernel")
    size = math.prod(kernel.shape[:count])
    y = jax.lax.dot_general(
        x.reshape(-1, size), kernel.reshape(size, -1), (((1,), (0,)), ((), ())), precision, preferred_element_type
    )
    return y.reshape(*x.shape[: x.ndim - count], *kernel.shape[count:])
