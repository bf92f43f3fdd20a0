"""A training step before any array exists: sizes, shapes, shardings, optimiser and the compiled function.

`train` fills these shapes and runs the step; `aot` compiles the very same step for a pod that is not there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from tghmoe_jax.bases import base as bases
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.samples import pipeline, prompts
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.sharding import arrays
from tghmoe_jax.training import compile_cache, loading, losses, optimizer, rules
from tghmoe_jax.training.step import TrainState, make_step

Shapes = dict[str, jax.ShapeDtypeStruct]


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Of every array [A, R, ...] of a batch: the rows of a microbatch lie spread over all devices."""
    return jax.NamedSharding(mesh, jax.P(None, mesh.axis_names))


def batch_spec(config: ConfigDict, mesh: jax.sharding.Mesh) -> pipeline.BatchSpec:
    """The shape and mixture of the config's batches on this mesh. UserError where they do not divide."""
    return pipeline.BatchSpec(
        rows=config.train.batch, microbatches=config.train.accumulate, devices=mesh.size,
        text_length=config.data.text_length, mixture=pipeline.mixture_of(config.data.mixture),
        tasks=tuple(config.model.tasks),
    )  # fmt: skip


def build_model(
    config: ConfigDict, base_config: Mapping[str, Any], aux_names: tuple[str, ...], tokenizer: Tokenizer, task_shares
) -> MLLM:
    """The model of a config over a base of these sizes. UserError where they do not fit each other.

    The auxiliary head reads a label's name, `kind:word:word`, as the words after its kind.
    """
    phrases = [name.partition(":")[2].replace(":", " ") for name in aux_names]
    aux = tuple(tuple(tokenizer.encode(phrase)) for phrase in phrases) if config.model.aux_findings else ()
    cfg = model_config.build(
        bases.describe(base_config, config.data.size), config.model.to_dict(), aux, group_shares=task_shares,
        **prompts.around_image(tokenizer),
    )  # fmt: skip
    if tokenizer.vocab_size > cfg.decoder.vocab:
        raise UserError(
            f"the tokeniser has {tokenizer.vocab_size} tokens and the base model only {cfg.decoder.vocab}; use the "
            "tokeniser files of the same base (--config.base, --config.base_config.vocab_size)."
        )
    slices = config.data.slices
    positions = config.data.text_length + (cfg.image_positions(slices) if slices else 0)
    if positions > cfg.decoder.max_positions:
        raise UserError(
            f"a sample takes {positions} positions and the base has {cfg.decoder.max_positions}; lower "
            "--config.data.text_length or raise --config.model.depth_pool or --config.model.spatial_pool."
        )
    return MLLM(cfg)


@dataclasses.dataclass(frozen=True)
class Program:
    """What one config trains on one mesh. Leaves are keyed by leaf path; `shapes` hold the dtype each is kept in."""

    model: MLLM
    spec: pipeline.BatchSpec
    mesh: jax.sharding.Mesh
    shapes: Shapes
    shardings: dict[str, jax.NamedSharding]
    trains: dict[str, bool]
    tx: optax.GradientTransformation
    weights: losses.LossWeights
    data: Mapping[str, Any]
    seed: int
    settings: str  # of the optimiser: what `tx` was made of

    @property
    def batch_sharding(self) -> jax.NamedSharding:
        """Of every array [A, R, ...] of a batch."""
        return batch_sharding(self.mesh)

    def state_shapes(self) -> TrainState:
        """The training state with a sharding in every leaf; the optimiser's moments lie as their parameters do."""
        whole = jax.NamedSharding(self.mesh, jax.P())
        placed = {
            path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self.shardings[path])
            for path, s in self.shapes.items()
        }
        trained = {path: s for path, s in placed.items() if self.trains[path]}

        def like_its_parameter(key_path, leaf):
            path = optimizer.leaf_path(key_path)
            same = path in trained and trained[path].shape == leaf.shape
            sharding = trained[path].sharding if same else whole
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        opt = jax.tree_util.tree_map_with_path(like_its_parameter, jax.eval_shape(self.tx.init, trained))
        frozen = {path: s for path, s in placed.items() if not self.trains[path]}
        return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), trained, frozen, opt)

    def state(self, leaves: dict[str, jax.Array]) -> TrainState:
        """The state of step 0 from leaves that lie where they should."""
        like = jax.tree.map(lambda s: s.sharding, self.state_shapes())
        trained = {path: leaves[path] for path in like.trained}
        opt = jax.jit(self.tx.init, out_shardings=like.opt)(trained)
        frozen = {path: leaves[path] for path in like.frozen}
        return TrainState(arrays.place(np.int32(0), like.step), trained, frozen, opt)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """One global batch [A, R, ...] as samples/pipeline.py makes it."""
        micro, cfg = self.spec.microbatches, self.model.cfg
        shapes = loading.batch_shapes(self.data, self.spec.rows // micro)
        (rows,) = shapes["task"].shape
        if labels := len(cfg.aux_labels):
            side, views = cfg.view_side, cfg.views(self.data["slices"])
            shapes["aux"] = jax.ShapeDtypeStruct((rows, labels), jnp.float32)
            shapes["aux_cells"] = jax.ShapeDtypeStruct((rows, views, side, side, labels), bool)
        return {
            key: jax.ShapeDtypeStruct((micro, *s.shape), s.dtype, sharding=self.batch_sharding)
            for key, s in shapes.items()
        }

    def step(self, recall: bool = False):
        """The jitted (state, batch) -> (state, scalars); the state given is donated.

        `recall` takes over what an earlier process traced, where that is possible (`compile_cache.recall_traced`).
        """
        step = make_step(self.model, self.weights, self.tx)
        shardings = jax.tree.map(lambda s: s.sharding, self.state_shapes())
        placed = {
            "in_shardings": (shardings, self.batch_sharding),
            "out_shardings": (shardings, jax.NamedSharding(self.mesh, jax.P())),
        }
        if recall and compile_cache.keeps_traced():
            step = self._recalled(jax.jit(step, **placed))
        return jax.jit(step, donate_argnums=0, **placed)

    def _recalled(self, step):
        """The same step; a tree of classes cannot be kept, so the state is kept as the list of its leaves."""
        leaves, tree = jax.tree.flatten(self.state_shapes())

        @jax.jit
        def flat(leaves, batch):
            state, scalars = step(tree.unflatten(leaves), batch)
            return jax.tree.leaves(state), scalars

        name = f"step of {self.model} {self.weights} {self.settings} {sorted(self.trains.items())}"
        with jax.set_mesh(self.mesh):
            traced = compile_cache.recall_traced(name, flat, leaves, self.batch_shapes())

        def recalled(state, batch):
            leaves, scalars = traced(jax.tree.leaves(state), batch)
            return tree.unflatten(leaves), scalars

        return recalled


def build(config: ConfigDict, model: MLLM, spec: pipeline.BatchSpec, mesh: jax.sharding.Mesh) -> Program:
    """The program of a config.

    UserError for a pattern that matches nothing, an unknown optimiser, or a transport that the devices lack.
    """
    if model.cfg.tgh.transport == "ragged" and mesh.devices.flat[0].platform != "tpu":
        raise UserError("--config.model.tgh.transport=ragged needs a TPU; use all_to_all or gather on other devices.")
    shapes = loading.param_shapes(model, config.data)
    trains = rules.trainable(shapes, config.trainable)
    tx = optimizer.build(config.optimizer, config.train.steps, [path for path in shapes if trains[path]])
    weights = losses.LossWeights(
        task=tuple(config.loss.task), first_token=config.loss.first_token, balance=config.loss.balance,
        z=config.loss.z, router=config.loss.router,
        aux=config.loss.aux if model.cfg.aux_labels else 0.0,
    )  # fmt: skip
    return Program(
        model, spec, mesh, kept(model, shapes, trains, config.data), loading.param_shardings(shapes, mesh), trains, tx,
        weights, config.data, config.train.seed, f"{config.optimizer.to_json()} {config.train.steps}",
    )  # fmt: skip


def kept(model: MLLM, shapes: Shapes, trains: Mapping[str, bool], data: Mapping[str, Any]) -> Shapes:
    """The dtype that each leaf is kept in: what trains in its own (the master copy), what is frozen as it is used.

    Leaves that are float32 whatever the model's dtype, as the routers are, stay so.
    """
    used = loading.param_shapes(MLLM(dataclasses.replace(model.cfg, param_dtype=model.cfg.dtype)), data)
    return {path: shape if trains[path] else used[path] for path, shape in shapes.items()}
