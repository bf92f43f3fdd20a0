"""Arrays of a mesh whose devices belong to several processes: each process gives and reads what it can.

With one process these are plain puts and reads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Host arrays, the same on every process, as arrays of the mesh; each process sends only its devices' parts."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__), tree)


def local_indices(sharding: jax.sharding.Sharding, shape: Sequence[int], axis: int) -> list[int]:
    """The indices along `axis` of an array of `shape` that the devices of this process hold, ascending."""
    parts = {
        index[axis].indices(shape[axis]) for index in sharding.addressable_devices_indices_map(tuple(shape)).values()
    }
    return sorted({i for part in parts for i in range(*part)})


def from_local(
    tree: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, axis: int, length: int, own: Sequence[int]
) -> dict[str, jax.Array]:
    """Arrays of the mesh from each process's own indices along `axis`, of which the whole has `length`.

    `own` is `local_indices` of this process: entry i of a local array's `axis` is entry own[i] of the whole.
    """
    place_of = {index: i for i, index in enumerate(own)}

    def whole(local: np.ndarray) -> jax.Array:
        shape = (*local.shape[:axis], length, *local.shape[axis + 1 :])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[axis].indices(length)
            rows = slice(place_of[start], place_of[start] + stop - start)  # what one device holds is consecutive
            return local[(*index[:axis], rows, *index[axis + 1 :])]

        return jax.make_array_from_callback(shape, sharding, part)

    return {key: whole(value) for key, value in tree.items()}


def to_host(tree: Any) -> Any:
    """numpy arrays of a tree of arrays, whole on every process. All processes must ask for the same ones, in order."""

    def one(x) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)
