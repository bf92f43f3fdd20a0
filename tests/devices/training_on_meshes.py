"""20 steps of each stage on meshes of simulated devices; saves losses and the first step's gradients to a file.

    python -m tests.devices.training_on_meshes OUT MESH... [--checkpoints DIR] [--process I --of N --port P]

MESH is data,fsdp,expert, as 2,2,2, and a transport after a colon where it is not the default: 2,2,2:gather. Each of
several processes holds 8 / N of the devices. One process writes a checkpoint of the mesh 2,2,2 to DIR and restores it
on 1 and on 4 devices; several restore it on theirs. A process of its own, started by test_training_on_meshes.py: the
number of devices is fixed before the first computation.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from configs import stage1, stage2
from tests import tiny
from tghmoe_jax import train as train_loop
from tghmoe_jax.bases.base import describe
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.training import checkpoints, program

STEPS, ROWS, SLICES, EXPERTS = 20, 16, 4, 8


def config_of(stage: int, transport: str = "all_to_all", experts: int = EXPERTS):
    """Stage 1 or 2 for the model of tests/tiny.py: two 2D layers, two 3D layers with experts, slots for all."""
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
        describe(tiny.CONFIG), config.model.to_dict(), prefix_length=tiny.PREFIX, group_shares=spec.task_shares
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
            held = state.params | {f"opt/{i}/{path}": leaf for i, (path, leaf) in enumerate(moments(state.opt[1]))}
            found |= {
                f"share {path}": np.array([leaf.addressable_shards[0].data.nbytes, leaf.nbytes])
                for path, leaf in held.items()
            }
    return found | {"losses": np.array(losses)}


def moments(opt) -> list[tuple[str, jax.Array]]:
    """(leaf path, array) of what an optimiser keeps of each parameter."""
    keyed = jax.tree_util.tree_leaves_with_path(opt)
    return [(path[-1].key, leaf) for path, leaf in keyed if isinstance(path[-1], jax.tree_util.DictKey)]


def batches():
    """Batches of one process each, as a pure function of the step."""
    data = grain.MapDataset.range(STEPS).map(lambda step: {"tokens": tiny.batch(rows=2, seed=int(step))["tokens"]})
    return iter(data.to_iter_dataset())


def some_state(mesh):
    """A state of stage 2 at step 3 whose moments are not zero."""
    state = start(program_of(config_of(2), mesh))
    rng = np.random.default_rng(0)
    opt = jax.tree.map(lambda x: put(rng.standard_normal(x.shape).astype(x.dtype), x.sharding), state.opt)
    return state._replace(step=put(np.int32(3), state.step.sharding), opt=opt)


def write(folder: Path, mesh) -> None:
    """A checkpoint after three batches, and everything that it must give back."""
    state, iterator = some_state(mesh), batches()
    for _ in range(3):
        next(iterator)
    store = checkpoints.Checkpoints(folder, keep=1)
    store.save(state, iterator)
    store.close()
    leaves = {f"leaf {i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(folder / "expected.npz", next=next(iterator)["tokens"], **leaves)


def restore(folder: Path, mesh) -> dict[str, np.ndarray]:
    """How many leaves of the checkpoint differ on another mesh, and the batch that comes next."""
    empty = start(program_of(config_of(2), mesh))
    empty = jax.tree.map(lambda leaf: put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), empty)
    iterator = batches()
    store = checkpoints.Checkpoints(folder, keep=1)
    state = store.restore(empty, iterator)
    store.close()
    expected = dict(np.load(folder / "expected.npz"))
    leaves = [multihost_utils.process_allgather(leaf, tiled=True) for leaf in jax.tree.leaves(state)]
    differ = sum(not np.array_equal(leaf, expected[f"leaf {i}"]) for i, leaf in enumerate(leaves))
    same = all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(empty), strict=True))
    found = {"leaves": len(leaves), "differ": differ + (not same), "step": int(state.step)}
    return found | {"next": next(iterator)["tokens"], "expected_next": expected["next"]}


def placed_on_two() -> dict[str, np.ndarray]:
    """A stacked leaf that two devices share: the parts that were read for it, and whether it came out whole."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    layers = [np.arange(8.0).reshape(4, 2) + 10 * i for i in range(3)]
    canonical = {f"decoder/block_{i}/mlp/up/kernel": layer for i, layer in enumerate(layers)}
    path = f"decoder/{leaf_names.scan_name(0, 3, 1)}/block_0/mlp/up/kernel"
    leaf = train_loop.placed(path, canonical, jax.NamedSharding(mesh, jax.P(None, "fsdp")), np.dtype(np.float32))
    parts = np.array([shard.data.shape for shard in leaf.addressable_shards])
    return {"placed/parts": parts, "placed/whole": np.array_equal(leaf, layers)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("meshes", nargs="*")
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--port", default="0")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8 // args.of)
    jax.config.update("jax_enable_compilation_cache", False)  # read from it, these steps of 8 CPU devices deadlock
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
    if args.checkpoints:
        if args.of == 1:
            mesh = make_mesh(2, 2, 2)
            with jax.set_mesh(mesh):
                write(args.checkpoints, mesh)
            found |= placed_on_two()
        for sizes in [(1, 1, 1), (1, 2, 2)] if args.of == 1 else [(2, 2, 2)]:
            count = math.prod(sizes)
            mesh = make_mesh(*sizes, jax.devices()[:count])
            with jax.set_mesh(mesh):
                result = restore(args.checkpoints, mesh)
            found |= {f"restored/{count}/{key}": value for key, value in result.items()}
    if args.process == 0:
        np.savez(args.out, **found)


if __name__ == "__main__":
    main()
