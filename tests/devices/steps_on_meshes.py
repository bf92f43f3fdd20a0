"""Two training steps on one device and on meshes of simulated ones; prints what differs as JSON.

A process of its own, started by test_sharding.py: the number of devices is fixed before the first computation.
"""

import functools
import json

import jax
import numpy as np

from tests import tiny
from tghmoe_jax import train
from tghmoe_jax.models import layout
from tghmoe_jax.sharding.mesh import AXES
from tghmoe_jax.training import program

MESHES = {"fsdp": (1, 2, 1), "data_expert": (2, 1, 2)}  # data, fsdp, expert


def two_steps(model, params, batch, mesh=None):
    """Scalars of the second step, the leaves after it, and how the leaves lie."""
    put = lambda x, spec: x if mesh is None else jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731
    # A large eps keeps Adam's step proportional to the gradient: rounding stays rounding.
    state, step = tiny.start(model, params, (".*",), eps=1.0, rate=1.0)
    if mesh is not None:
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}
        shardings = program.param_shardings(shapes, mesh)
        place = functools.partial(jax.tree_util.tree_map_with_path, lambda path, leaf: jax.device_put(
            leaf, next((shardings[k.key] for k in path if getattr(k, "key", None) in shardings),
                       jax.NamedSharding(mesh, jax.P()))))  # fmt: skip
        state = place(state)
    step = tiny.jit(step)
    for _ in range(2):
        state, scalars = step(state, {key: put(value, jax.P(None, "data")) for key, value in batch.items()})
    specs = {path: str(leaf.sharding.spec) if mesh is not None else "" for path, leaf in state.trained.items()}
    return jax.tree.map(np.asarray, scalars), {p: np.asarray(leaf) for p, leaf in state.trained.items()}, specs


def placed_on_two() -> dict:
    """A stacked leaf that two devices share: the parts that were read for it, and whether it came out whole."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    layers = [np.arange(8.0).reshape(4, 2) + 10 * i for i in range(3)]
    canonical = {f"decoder/block_{i}/mlp/up/kernel": layer for i, layer in enumerate(layers)}
    path = f"decoder/{layout.scan_name(0, 3, 1)}/block_0/mlp/up/kernel"
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    leaf = train.placed(path, canonical, sharding, np.dtype(np.float32))
    return {
        "parts": [list(shard.data.shape) for shard in leaf.addressable_shards],
        "whole": bool(np.array_equal(leaf, layers)),
    }


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    model = tiny.uniform({"groups": 2})
    params = tiny.params(model)
    batch = tiny.microbatches(tiny.batch(rows=4, real=[4, 4, 3, 4]), 1)
    scalars, leaves, _ = two_steps(model, params, batch)
    report = {"devices": jax.device_count(), "loss": float(scalars["loss"])}
    report["moved"] = min(
        float(np.abs(leaf - params[path]).max()) for path, leaf in leaves.items()
        if not path.startswith(("vision/block_4", "vision/post_ln"))
    )  # fmt: skip
    for name, sizes in MESHES.items():
        devices = jax.devices()[: int(np.prod(sizes))]
        mesh = jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)
        with jax.set_mesh(mesh):
            found, after, specs = two_steps(model, params, batch, mesh)
        report[name] = {
            "scalars": {key: float(np.abs(found[key] - scalars[key])) for key in scalars},
            "leaves": max(float(np.abs(after[path] - leaf).max()) for path, leaf in leaves.items()),
            "fsdp": sum("fsdp" in spec for spec in specs.values()),
            "expert": sum("expert" in spec for spec in specs.values()),
        }
    report["placed"] = placed_on_two()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
