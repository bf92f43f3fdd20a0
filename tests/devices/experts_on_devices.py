"""Each transport on 4 devices, and on 2 x 4, against all experts on one; prints what differs as JSON.

A process of its own, started by test_transports.py: the number of devices is fixed before the first computation.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from tests.ops.test_experts import draw
from tghmoe_jax.models.tgh_moe import MoE
from tghmoe_jax.ops.experts import ExpertWeights, apply_experts
from tghmoe_jax.ops.transport import apply_sharded_experts
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.sharding.rules import spec
from tghmoe_jax.tools.collectives import replica_groups

SAMPLES, TOKENS, EXPERTS, TOP_K = 4, 3, 16, 2  # samples of a device, tokens of a sample, experts of all devices
CASES = {  # name: (transport, grouped product, capacity factor)
    "all_to_all": ("all_to_all", "auto", 8.0),
    "gather": ("gather", "auto", 1.0),
    "ragged": ("ragged", "auto", 8.0),
    "ragged, megablox": ("ragged", "megablox", 8.0),
    "all_to_all, full": ("all_to_all", "auto", 0.9),
    "ragged, full": ("ragged", "auto", 0.5),
}


def sharded(mesh, case, x, choice, gate, weights):
    """y and the number of dropped pairs."""
    transport, grouped, factor = case
    rows = jax.P(mesh.axis_names)

    def local(x, choice, gate, weights):
        y, dropped = apply_sharded_experts(
            x, choice, gate, weights, jnp.tanh, mesh.axis_names, transport, factor, grouped=grouped
        )
        return y, dropped[None]

    y, dropped = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 4, out_specs=(rows, rows), check_vma=False)(
        x, choice, gate, weights
    )
    return y, jnp.sum(dropped)


def case_of(samples: int, groups: int):
    """x (B, T, C), choice and gate (B, T, K), weights: alternate samples choose among the experts of one group."""
    x, choice, gate, _ = draw(7, samples * TOKENS, EXPERTS // groups, TOP_K, padding=0.2)
    weights = draw(9, 1, EXPERTS, TOP_K)[3]
    x, choice, gate = (a.reshape(samples, TOKENS, -1) for a in (x, choice, gate))
    moved = choice + EXPERTS // groups * (np.arange(samples) % groups)[:, None, None]
    return x, np.where(choice == EXPERTS // groups, EXPERTS, moved), gate, weights


def on_one_device(x, choice, gate, weights, **how):
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, choice, gate))
    y, dropped = apply_experts(*flat, weights, **how)
    return y.reshape(x.shape), dropped


def gradients(function, cotangent, choice):
    """(y, dropped, gradients by x, gate and the weights)."""

    @jax.jit
    def run(x, gate, weights):
        def total(x, gate, weights):
            y, dropped = function(x, choice, gate, weights)
            return jnp.sum(y * cotangent), (y, dropped)

        found, (y, dropped) = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(x, gate, weights)
        return {"y": y, "x": found[0], "gate": found[1]} | found[2]._asdict(), dropped

    return run


def partners(data: int, fsdp: int, expert: int) -> list[list[int]]:
    """The sets of devices that exchange tokens in a layer of 2 groups of 4 experts, forward and backward."""
    mesh = make_mesh(data, fsdp, expert, experts=4)
    layer = MoE(tiny.tgh(groups=2), 2, 4, 2, 8, "quick_gelu", jnp.dtype("float32"))
    batch = (np.zeros((16, 3, 4), np.float32), np.ones((16, 3), bool), np.zeros((16, 5), np.float32))
    batch = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*batch, np.arange(16, dtype=np.int32) % 2)]
    params = jax.eval_shape(layer.init, jax.random.key(0), *batch)
    rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names))

    def place(path, leaf):
        name = "vision/block_0/moe/" + "/".join(k.key for k in path[1:])
        return jax.NamedSharding(mesh, spec(name, False, leaf.shape, dict(mesh.shape)))

    total = lambda params, *batch: jnp.sum(layer.apply(params, *batch)[0] ** 2)  # noqa: E731
    placed = jax.tree_util.tree_map_with_path(place, params)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(total, argnums=(0, 1)), in_shardings=(placed, *[rows] * 4), out_shardings=(placed, rows))
        return sorted(map(list, replica_groups(run.lower(params, *batch).compile().as_text(), ("all-to-all",))))


def without_a_group() -> dict:
    """A layer of 2 groups of 4 experts whose samples go to both groups, on 8 devices that split both: distances from
    the layer on one device with every expert computed for every token."""
    cfg = dataclasses.replace(tiny.tgh(groups=2), task_input="none", transport="all_to_all", capacity_factor=4.0)
    layer = MoE(cfg, 2, 4, 2, 8, "quick_gelu", jnp.dtype("float32"))
    oracle = layer.clone(cfg=dataclasses.replace(cfg, dispatch="dense"))
    rng = np.random.default_rng(3)
    u, t = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 3, 4), (16, 5)))
    rest = (np.arange(48).reshape(16, 3) % 7 > 0, t, np.arange(16, dtype=np.int32) % 2)
    params = layer.init(jax.random.key(0), u, *rest)

    def run(layer):
        def total(params, u):
            y, stats = layer.apply(params, u, *rest)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), (y, stats.dropped)

        gradients, (y, dropped) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, u)
        return [np.asarray(leaf) for leaf in jax.tree.leaves((y, gradients))], float(dropped)

    expected, _ = run(oracle)
    mesh = make_mesh(1, 1, 8, experts=4)
    assert dict(mesh.shape)["group"] == 2
    with jax.set_mesh(mesh):
        found, dropped = run(layer)
    distances = [float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)]
    return {"distance": max(distances), "least": min(float(np.abs(a).max()) for a in expected), "dropped": dropped}


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    report = {}
    for name, sizes in {"expert": (4,), "group_expert": (2, 4)}.items():
        devices = jax.devices()[: int(np.prod(sizes))]
        axes = ("group", "expert")[-len(sizes) :]
        mesh = jax.make_mesh(sizes, axes, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
        x, choice, gate, weights = case_of(SAMPLES * len(devices), groups=len(sizes))
        cotangent = np.random.default_rng(8).standard_normal(x.shape).astype(np.float32)
        oracle = functools.partial(on_one_device, activation=jnp.tanh, dispatch="dense")
        expected, _ = gradients(oracle, cotangent, choice)(x, gate, ExpertWeights(*map(jnp.asarray, weights)))
        for case, arguments in CASES.items():
            run = gradients(functools.partial(sharded, mesh, arguments), cotangent, choice)
            found, dropped = run(x, gate, ExpertWeights(*map(jnp.asarray, weights)))
            whole = np.abs(np.asarray(found["y"]) - expected["y"]).max(axis=-1) < 1e-4
            report[f"{name}: {case}"] = {
                "dropped": int(dropped), "pairs": int(np.sum(choice < EXPERTS)), "whole": float(whole.mean()),
                "finite": all(bool(np.isfinite(leaf).all()) for leaf in found.values()),
                "distance": {key: float(np.abs(found[key] - expected[key]).max()) for key in expected},
            }  # fmt: skip
        report[f"{name}: least"] = min(float(np.abs(leaf).max()) for leaf in expected.values())
    report["without a group"] = without_a_group()
    report["partners"] = {str(sizes): partners(*sizes) for sizes in [(1, 1, 8), (2, 1, 4), (2, 2, 2)]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
