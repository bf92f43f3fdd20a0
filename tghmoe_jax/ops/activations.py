"""The activations of towers, experts and decoders by name: one function each, so that compiled programs are shared."""

import jax


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI CLIP's."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact one, by the error function."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """SigLIP's and Gemma's."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": jax.nn.silu}
