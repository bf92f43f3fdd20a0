"""Arrays of a mesh from what each process holds; one process stands for the whole, several are in test_hosts.py."""

import jax
import numpy as np
import pytest

from tghmoe_jax.sharding import arrays
from tghmoe_jax.sharding.mesh import make_mesh


@pytest.fixture(scope="module")
def sharding():
    return jax.NamedSharding(make_mesh(), jax.P(None, ("data", "fsdp", "expert")))


def test_one_process_holds_every_index(sharding):
    rows = 4 * jax.device_count()
    assert arrays.local_indices(sharding, (2, rows), axis=1) == list(range(rows))


def test_rows_arrive_where_their_indices_say(sharding):
    rows = 4 * jax.device_count()
    whole = {"a": np.arange(2 * rows * 3).reshape(2, rows, 3), "b": np.arange(2 * rows).reshape(2, rows)}
    made = arrays.from_local(whole, sharding, 1, rows, range(rows))
    placed = arrays.place(whole, sharding)
    for key, value in arrays.to_host(made).items():
        assert made[key].sharding == placed[key].sharding == sharding
        assert np.array_equal(value, whole[key]) and np.array_equal(value, arrays.to_host(placed[key]))
    # Where the devices of a process hold rows in an order of their own, only the map from index to place matters.
    own = np.random.default_rng(0).permutation(rows // 4).repeat(4) * 4 + np.tile(np.arange(4), rows // 4)
    shuffled = {key: value[:, own] for key, value in whole.items()}
    made = arrays.from_local(shuffled, sharding, 1, rows, own)
    assert all(np.array_equal(arrays.to_host(made[key]), whole[key]) for key in whole)
