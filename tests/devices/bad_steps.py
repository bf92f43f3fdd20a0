"""Steps with a NaN or Inf in batch, gradient or rate, on a mesh; prints what such a step changed, as JSON.

    python -m tests.devices.bad_steps DEVICES...

A process of its own, started by test_bad_steps.py: the number of devices is fixed before the first computation.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.devices.training_on_meshes import batch_of, config_of, program_of, put, start
from tghmoe_jax.sharding.mesh import make_mesh

WHERE = ("gradient", "rate", "batch")
VALUES = (np.nan, np.inf, -np.inf)


def poisoned(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` whose state holds what is added to the first gradient, and what every update is multiplied with."""

    def init(params):
        return {"gradient": jnp.float32(0), "rate": jnp.float32(1), "own": tx.init(params)}

    def update(grads, state, params):
        first = min(grads)
        grads = {**grads, first: grads[first] + state["gradient"]}
        updates, own = tx.update(grads, state["own"], params)
        return jax.tree.map(lambda u: u * state["rate"], updates), {**state, "own": own}

    return optax.GradientTransformation(init, update)


def spoil(where: str, value: float, state, batch):
    """State and batch with the value put where it is to be."""
    if where == "batch":
        bad = np.asarray(batch["slice_spacing"]).copy()
        bad[0, -1] = value
        place = getattr(batch["slice_spacing"], "sharding", None)
        return state, {**batch, "slice_spacing": jax.device_put(bad, place)}
    leaf = state.opt[where]
    return state._replace(opt={**state.opt, where: jax.device_put(np.float32(value), leaf.sharding)}), batch


def bits(state) -> list[bytes]:
    """Of parameters and moments."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.trained, state.frozen, state.opt["own"]))]


def after_each(state, step, batches, copy) -> list[dict]:
    """For each fault: what a step of it changed, between a healthy step before and one after.

    `copy` gives a state anew, since a step may donate it. The last entry compares with a run without the faults.
    """
    state, _ = step(copy(state), batches[0])
    found, clean = [], copy(state)
    for where in WHERE:
        for value in VALUES:
            before = bits(state)
            bad_state, bad_batch = spoil(where, value, copy(state), batches[1])
            after, scalars = step(bad_state, bad_batch)
            own = {**after.opt, "gradient": state.opt["gradient"], "rate": state.opt["rate"]}
            found.append({
                "where": where, "value": str(value), "same": bits(after) == before, "bad": int(scalars["bad"]),
                "leaves": int(scalars["bad_leaves"].sum()), "of": len(after.trained), "step": int(after.step),
            })  # fmt: skip
            state = after._replace(opt=own)
    number = int(state.step)
    state, scalars = step(state, batches[2])
    clean, _ = step(clean._replace(step=jax.device_put(np.int32(number), clean.step.sharding)), batches[2])
    return [*found, {"healthy": int(scalars["bad"]) == 0, "equal": bits(state) == bits(clean) != before}]


def on_mesh(devices: int) -> list[dict]:
    config = config_of(2)
    config.model.depth_rope.unit = "mm"  # the spacing of the slices takes part
    mesh = make_mesh(1, max(1, devices // 4), min(devices, 4), jax.devices()[:devices], 8)
    with jax.set_mesh(mesh):
        one = program_of(config, mesh)
        one = dataclasses.replace(one, tx=poisoned(one.tx))
        copy = lambda state: jax.tree.map(lambda x: put(np.asarray(x).copy(), x.sharding), state)  # noqa: E731
        return after_each(start(one), one.step(), [batch_of(one, i) for i in range(3)], copy)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_compilation_cache", False)  # read from it, this step of 8 CPU devices deadlocks
    print(json.dumps({devices: on_mesh(int(devices)) for devices in sys.argv[1:]}))


if __name__ == "__main__":
    main()
