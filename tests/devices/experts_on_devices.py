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


def exchange(rows, out, start, size, at, expected, *, axis_name):
    """What `jax.lax.ragged_all_to_all` does, by a gather: XLA has that exchange for TPU alone.

    Rows start[d] .. start[d] + size[d] go to device d and lie there from at[d] on; expected[d] rows come from d.
    """
    me = jax.lax.axis_index(axis_name)
    rows = jax.lax.all_gather(rows, axis_name)  # (D, M, ...)
    start, size, at = (jax.lax.all_gather(a, axis_name)[:, me] for a in (start, size, at))
    place = jnp.arange(out.shape[0])
    hit = (place >= at[:, None]) & (place < (at + size)[:, None])  # (D, places)
    device = jnp.argmax(hit, axis=0)
    found = rows[device, jnp.clip(start[device] + place - at[device], 0, rows.shape[1] - 1)]
    return jnp.where(jnp.any(hit, axis=0)[:, None], found, out)


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


def through_every_group(transport: str, groups: int, experts: int, shares: tuple[float, ...]) -> dict:
    """A layer with task_input `none` on 8 devices of the expert axis, against all experts on one device."""

    def outcome(mesh, **options):
        cfg = dataclasses.replace(
            tiny.tgh(groups=groups), experts=experts, task_input="none", capacity_factor=8.0, group_shares=shares,
            **options,
        )  # fmt: skip
        layer = MoE(cfg, groups, experts, min(TOP_K, experts), 8, "quick_gelu", jnp.dtype("float32"))
        with jax.set_mesh(mesh):
            params = jax.jit(layer.init)(jax.random.key(0), *batch)

            def total(params, u):
                y, stats = layer.apply(params, u, *batch[1:])
                return jnp.sum(y * cotangent), (y, stats)

            found, (y, stats) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, batch[0])
        return jax.device_get((y, found)), float(stats.dropped)

    draws = np.random.default_rng(3)
    cotangent, u = draws.standard_normal((2, 16, TOKENS, 8)).astype(np.float32)
    valid = draws.random((16, TOKENS)) > 0.2
    batch = (u, valid, draws.standard_normal((16, 5)).astype(np.float32), np.arange(16, dtype=np.int32) % groups)
    found, dropped = outcome(make_mesh(1, 1, 8, experts=experts), transport=transport)
    expected, _ = outcome(make_mesh(1, 1, 1, jax.devices()[:1], experts=experts), dispatch="dense")
    distance = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), found, expected)
    return {"dropped": dropped, "distance": jax.tree.leaves(distance)}


def main() -> None:
    jax.lax.ragged_all_to_all = exchange
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
    report["every group"] = {
        f"{transport} {groups} x {experts} {shares}": through_every_group(transport, groups, experts, shares)
        for transport in ("all_to_all", "gather")
        for groups, experts, shares in [(2, 4, ()), (2, 4, (0.75, 0.25)), (4, 4, ()), (8, 1, ())]
    }
    report["partners"] = {str(sizes): partners(*sizes) for sizes in [(1, 1, 8), (2, 1, 4), (2, 2, 2)]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
