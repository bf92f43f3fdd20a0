"""20 steps of each stage on a mesh of simulated devices; saves losses and the first step's gradients to a file.

    python -m tests.devices.training_on_meshes OUT MESH... [--process I --of N --port P]

MESH is data,fsdp,expert, as 2,2,2, and a transport after a colon where it is not the default: 2,2,2:gather. With several
processes each holds 8 / N of the devices. A process of its own, started by test_training_on_meshes.py: the number of
devices is fixed before the first computation.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from configs import stage1, stage2
from tests import tiny
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.training import program

STEPS, ROWS, SLICES, EXPERTS = 20, 16, 4, 8


def config_of(stage: int, transport: str = "all_to_all", experts: int = EXPERTS):
    """Stage 1 or 2 for the model of tests/tiny.py: two 2D layers, two 3D layers with experts, and slots for everyone."""
    config = (stage1 if stage == 1 else stage2).get_config()
    config.model.update({"patch_depth": 1, "attn3d_layers": (2, 3), "aux_findings": False})
    config.model.depth_rope.rotary_dim = 8
    config.model.tgh.update({
        "layers": (2, 3), "experts": experts, "hidden": 16, "dispatch": "ragged", "transport": transport,
        "capacity_factor": float(experts),
    })  # fmt: skip
    config.data.update({"slices": SLICES, "size": 16, "text_length": tiny.LENGTH})
    config.data.mixture.update({"report": 1, "open": 0, "closed": 1, "binding": 0})
    config.train.update({"steps": STEPS, "batch": ROWS})
    config.optimizer.update({"name": "adamw", "rate": 3e-2, "eps": 1e-2, "clip": 1e3})
    return config


def program_of(config, mesh) -> program.Program:
    spec = program.batch_spec(config, mesh)
    cfg = model_config.build(
        tiny.CONFIG, config.model.to_dict(), prefix_length=tiny.PREFIX, group_shares=spec.task_shares
    )
    return program.build(config, MLLM(cfg), spec, mesh)


def recording(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with the last gradients in its state."""
    record = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, s, p: (g, g))
    return optax.chain(record, tx)


def put(value: np.ndarray, sharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def batch_of(one: program.Program, step: int) -> dict[str, jax.Array]:
    """Padded slices and texts of several lengths; tasks alternate."""
    rng = np.random.default_rng(step)
    real, lengths = rng.integers(2, SLICES + 1, ROWS), rng.integers(11, tiny.LENGTH + 1, ROWS)
    whole = tiny.batch(rows=ROWS, slices=SLICES, seed=step, real=real.tolist(), lengths=lengths.tolist())
    whole = tiny.microbatches(whole, 1)
    return {key: put(whole[key].astype(s.dtype), s.sharding) for key, s in one.batch_shapes().items()}


def start(one: program.Program):
    """The state of step 0 from the random weights of tests/tiny.py, each part put where it lies."""
    weights = tiny.params(one.model)
    return one.state({path: put(weights[path].astype(s.dtype), one.shardings[path]) for path, s in one.shapes.items()})


def train(stage: int, mesh, transport: str) -> dict[str, np.ndarray]:
    one = program_of(config_of(stage, transport), mesh)
    one = dataclasses.replace(one, tx=recording(one.tx))
    state, step = start(one), one.step()
    found, losses = {}, []
    for number in range(STEPS):
        state, scalars = step(state, batch_of(one, number))
        losses.append([float(scalars["loss"]), float(scalars["dropped"])])
        if number == 0:
            whole = multihost_utils.process_allgather(state.opt[0], tiled=True)
            found |= {f"gradient {path}": np.asarray(leaf) for path, leaf in whole.items()}
            found |= {
                f"share {path}": np.array([leaf.addressable_shards[0].data.nbytes, leaf.nbytes])
                for tree in (state.params, {"opt/" + k: v for k, v in state.opt[0].items()}) for path, leaf in tree.items()
            }  # fmt: skip
    return found | {"losses": np.array(losses)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("meshes", nargs="+")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--port", default="0")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8 // args.of)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    if args.of > 1:
        jax.distributed.initialize(f"localhost:{args.port}", args.of, args.process)
    found = {}
    for name in args.meshes:
        sizes, _, transport = name.partition(":")
        data, fsdp, expert = map(int, sizes.split(","))
        mesh = make_mesh(data, fsdp, expert, jax.devices()[: data * fsdp * expert], EXPERTS)
        with jax.set_mesh(mesh):
            for stage in (1, 2):
                result = train(stage, mesh, transport or "all_to_all")
                found |= {f"{name}/{stage}/{key}": value for key, value in result.items()}
    if args.process == 0:
        np.savez(args.out, **found)


if __name__ == "__main__":
    main()
