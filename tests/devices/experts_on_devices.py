"""Each transport on 4 devices, and on 2 x 4, against all experts on one; prints what differs as JSON.

A process of its own, started by test_transports.py: the number of devices is fixed before the first computation.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from tests.ops.test_experts import draw
from tghmoe_jax.ops.experts import ExpertWeights, apply_experts
from tghmoe_jax.ops.transport import apply_sharded_experts

TOKENS, EXPERTS, TOP_K = 11, 16, 2  # of a device; of all devices
CASES = {  # name: (transport, grouped product, capacity factor)
    "all_to_all": ("all_to_all", "auto", 8.0),
    "gather": ("gather", "auto", 1.0),
    "ragged": ("ragged", "auto", 8.0),
    "ragged, megablox": ("ragged", "megablox", 8.0),
    "all_to_all, full": ("all_to_all", "auto", 1.0),
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


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    report = {}
    for name, sizes in {"expert": (4,), "group_expert": (2, 4)}.items():
        devices = jax.devices()[: int(np.prod(sizes))]
        axes = ("group", "expert")[-len(sizes) :]
        mesh = jax.make_mesh(sizes, axes, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
        x, choice, gate, weights = draw(7, TOKENS * len(devices), EXPERTS, TOP_K, padding=0.2)
        cotangent = np.random.default_rng(8).standard_normal(x.shape).astype(np.float32)
        oracle = functools.partial(apply_experts, activation=jnp.tanh, dispatch="dense")
        expected, _ = gradients(oracle, cotangent, choice)(x, gate, ExpertWeights(*map(jnp.asarray, weights)))
        for case, arguments in CASES.items():
            run = gradients(functools.partial(sharded, mesh, arguments), cotangent, choice)
            found, dropped = run(x, gate, ExpertWeights(*map(jnp.asarray, weights)))
            whole = np.abs(np.asarray(found["y"]) - expected["y"]).max(axis=1) < 1e-4
            report[f"{name}: {case}"] = {
                "dropped": int(dropped), "pairs": int(np.sum(choice < EXPERTS)), "whole": float(whole.mean()),
                "finite": all(bool(np.isfinite(leaf).all()) for leaf in found.values()),
                "distance": {key: float(np.abs(found[key] - expected[key]).max()) for key in expected},
            }  # fmt: skip
        report[f"{name}: least"] = min(float(np.abs(leaf).max()) for leaf in expected.values())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
