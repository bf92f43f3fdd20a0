"""The device mesh: axes `data`, `fsdp`, `expert`; -1 takes what is left.

Where `expert` is larger than the experts of one group, it is split in two: `group`, over which the task groups lie, and
`expert` within each. Hard task routing then keeps the exchange of tokens among a group's own devices
(ops/transport.py).
"""

import contextlib
import math
import os
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "expert")
CPU_DEVICES = 2  # data-parallel host devices: a small CPU runs a step about 1.5 times faster on two than on one


def make_mesh(
    data: int = -1, fsdp: int = 1, expert: int = 1, devices: Sequence | None = None, experts: int = 0
) -> jax.sharding.Mesh:
    """A mesh over all devices, or those given; `experts` of one group (0: never split `expert`).

    ValueError where the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, expert]
    devices = list(jax.devices() if devices is None else devices)
    if sizes.count(-1) > 1:
        raise ValueError("only one of mesh.data, mesh.fsdp, mesh.expert can be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(s for s in sizes if s != -1) != len(devices) or -1 in sizes:
        raise ValueError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.expert={expert} does not give {len(devices)} devices"
        )
    axes = AXES
    if experts > 1 and sizes[2] > experts:
        inner = math.gcd(sizes[2], experts)
        sizes, axes = [*sizes[:2], sizes[2] // inner, inner], (*AXES[:2], "group", "expert")
    # A TPU's grid may have no axis of just this size: then one of them is split, as jax.make_mesh does on v5e only.
    grid = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def simulate_devices() -> None:
    """Several host devices where there is no accelerator."""
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform" in os.environ.get("XLA_FLAGS", "")
    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and not chosen:
        with contextlib.suppress(RuntimeError):  # a caller that has used jax already keeps its devices
            jax.config.update("jax_num_cpu_devices", min(CPU_DEVICES, os.cpu_count() or 1))
