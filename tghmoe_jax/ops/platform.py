"""The platform that a function is compiled for, and the axes that split a batch, both from the current mesh."""

import math

import jax
from jax.sharding import AxisType


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the current mesh's devices, else of the default backend.

    A program that is compiled for a TPU on a machine without one has only its mesh to go by.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def batch_axes(rows: int) -> tuple[str, ...]:
    """The axes of the current mesh that `rows` samples are split over: all, or as many of the first as divide them.

    Empty outside a mesh, and inside a shard_map, where the rows are one device's already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind is AxisType.Manual for kind in mesh.axis_types):
        return ()
    axes = list(mesh.axis_names)
    while axes and rows % math.prod(mesh.shape[axis] for axis in axes):
        axes.pop()
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def over_batch(x: jax.Array) -> jax.Array:
    """x (B, ...) held to lie over the mesh by its samples, and its gradient too; x itself where no axis divides them.

    Left alone, XLA lets activations follow the weights that `fsdp` splits, and moves them back and forth.
    """
    axes = batch_axes(x.shape[0])
    return jax.lax.with_sharding_constraint(x, jax.P(axes)) if axes else x
