"""The device mesh: axes `data`, `fsdp`, `expert`; -1 takes what is left."""

import math

import jax

AXES = ("data", "fsdp", "expert")


def make_mesh(data: int = -1, fsdp: int = 1, expert: int = 1) -> jax.sharding.Mesh:
    """A mesh over all devices. ValueError where the sizes do not multiply to the number of devices."""
    sizes = [data, fsdp, expert]
    devices = jax.device_count()
    if sizes.count(-1) > 1:
        raise ValueError("only one of mesh.data, mesh.fsdp, mesh.expert can be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(s for s in sizes if s != -1) != devices or -1 in sizes:
        raise ValueError(f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.expert={expert} does not give {devices} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
