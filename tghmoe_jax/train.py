"""The one training loop, for the 2D base and for both stages. It reads from top to bottom.

Invariant of the loop: evaluate, checkpoint, next batch, step. The saved iterator therefore matches the saved step, and
a killed run goes on with the very losses of an unbroken one.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from tghmoe_jax import evaluate
from tghmoe_jax.data import pipeline
from tghmoe_jax.data.augment import Augment
from tghmoe_jax.data.samples import ItemSource
from tghmoe_jax.data.sources import make_source
from tghmoe_jax.data.tokenizer import Tokenizer
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import flops, layout
from tghmoe_jax.training import checkpoints, loading, reporting, runs
from tghmoe_jax.training.program import Program, batch_spec, build, build_model
from tghmoe_jax.training.step import TrainState
from tghmoe_jax.weights import adapt
from tghmoe_jax.weights.base import EMBEDDED, load_base


def run(config: ConfigDict, workdir: str) -> None:
    """Trains (or, with mode=evaluate, only evaluates) what `config` says and leaves its files in `workdir`.

    UserError for anything the user can mend, before anything is written.
    """
    runs.check_config(config)
    if config.mode == "evaluate":
        return evaluate.run(config, workdir)
    if config.mode != "train":
        raise UserError(f"--config.mode={config.mode} is unknown; use train or evaluate.")
    runs.check_workdir(config, workdir)

    # ---- data and sizes -------------------------------------------------------------------------------------------
    origin = load_origin(config)
    tokenizer = Tokenizer.from_folder(origin.tokenizer)
    mesh = evaluate.open_mesh(config)
    spec = batch_spec(config, mesh)
    build_model(config, origin.config, (), tokenizer, spec.task_shares)  # its errors come before data are drawn
    source = make_source(config.data, "train", config.data.volumes)
    model = build_model(config, origin.config, source.aux_names, tokenizer, spec.task_shares)
    batches = pipeline.train_iterator(
        source, tokenizer, spec, config.train.seed, config.train.steps, jax.process_index(), jax.process_count(),
        cell=model.cfg.cell if model.cfg.aux_labels else None, workers=config.data.workers,
        augment=Augment(**config.data.augment),
    )  # fmt: skip
    pipeline.check_text(source, tokenizer, spec, config.train.seed, bad=config.max_bad_fraction)

    # ---- shapes, shardings, state ---------------------------------------------------------------------------------
    program = build(config, model, spec, mesh)
    loaded, fresh, report = assemble(origin, program.shapes, config.model.inflation)
    state = initial_state(program, loaded, fresh)
    del loaded

    # ---- what will run --------------------------------------------------------------------------------------------
    workdir = Path(workdir)
    table = reporting.parameter_table(parameter_rows(program, fresh))
    print(
        config,
        table,
        report,
        f"mesh {dict(mesh.shape)} on {jax.device_count()} {jax.default_backend()} devices",
        sep="\n\n",
    )
    store = checkpoints.Checkpoints(workdir, config.checkpoint.keep)
    if store.latest() is not None:
        state = store.restore(state, batches)
        print(f"continued from step {int(state.step)}")
    elif jax.process_index() == 0:
        manifest = reporting.manifest(
            seeds={"train": config.train.seed, "eval": config.eval.seed},
            data={"name": config.data.name, "volumes": len(source)}
            | ({"sha256": source.digest()} if isinstance(source, ItemSource) else {}),
            base={"base": base_of(config), "init_from": config.init_from},
            devices=jax.devices(),
        )
        manifest["parameters"] = flops.parameters(model.cfg, program.shapes, program.trains)
        manifest |= {"domain": config.data.name, "input_ranges": source.input_ranges()}
        runs.write_description(workdir, config, origin.config, origin.tokenizer, table, manifest)

    # ---- the loop -------------------------------------------------------------------------------------------------
    step_fn, sharding = program.step(), program.batch_sharding
    log = reporting.RunLog(
        workdir, config.train.steps, start_step=int(state.step), samples_per_step=config.train.batch,
        enabled=jax.process_index() == 0,
    )  # fmt: skip

    bad = pipeline.BadItems(config.max_bad_fraction, log.say)

    def evaluate_now() -> None:
        reader = evaluate.Reader(model, tokenizer, state.params, config.data.text_length, config.eval.batch)
        metrics = evaluate.evaluate_all(reader, config, workdir / "eval" / str(step), log.say)
        log.scalars(step, metrics)

    first = step = int(state.step)
    while True:
        finished = step >= config.train.steps
        if (
            config.eval.every
            and step > first
            and (finished or (config.eval.every > 0 and step % config.eval.every == 0))
        ):
            evaluate_now()
        if finished or (step > first and step % config.checkpoint.every == 0):
            store.save(state, batches)
        if finished:
            break
        batch = next(batches)
        try:
            bad.note(batch.pop("skipped", ()), batch["task"].size)
        except UserError:
            log.close()
            store.close()
            raise
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
        state, scalars = step_fn(state, batch)
        step += 1
        log.record(step, scalars)
    log.close()
    store.close()


# ---- pieces ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run's parameters come from: canonical leaves, the base's config.json, its tokeniser, what may be new."""

    params: dict[str, np.ndarray]
    config: dict[str, Any]
    tokenizer: Path
    new: tuple[str, ...]


def load_origin(config: ConfigDict) -> Origin:
    """A run to start from, or a 2D base, or nothing (random initialisation)."""
    if config.init_from:
        folder = runs.find(config.init_from, "--config.init_from")
        params, _ = checkpoints.load_merged(folder)  # the stage's own low-rank leaves are new
        return Origin(params, runs.read_base_config(folder), runs.model_folder(folder), adapt.NEW_FROM_STAGE1)
    if config.base:
        base = load_base(config.base, lazy=True)
        try:
            fresh = [re.compile(one) for one in config.fresh]
        except re.error as error:
            raise UserError(
                f"--config.fresh holds {error.pattern!r}, which is no regex ({error.msg}); correct it."
            ) from error
        params = {name: leaf for name, leaf in base.params.items() if not any(one.fullmatch(name) for one in fresh)}
        return Origin(params, base.config, Path(base.folder), (*adapt.NEW_FROM_BASE, *config.fresh))
    if not config.base_config:
        raise UserError(
            "--config.base is empty and --config.base_config gives no sizes; name the folder of a 2D model."
        )
    return Origin({}, config.base_config.to_dict(), EMBEDDED, (".+",))


def base_of(config: ConfigDict) -> str:
    """The 2D base at the beginning of a run's line of stages, as its own manifest names it."""
    if not config.init_from:
        return config.base
    parent = runs.read_manifest(runs.find(config.init_from, "--config.init_from")).get("base") or {}
    return parent.get("base") or "unknown"


def assemble(origin: Origin, shapes: dict[str, jax.ShapeDtypeStruct], inflation: str):
    """Canonical leaves that the origin fills (lazy where it is), the leaf paths left to initialise, and the report."""
    wanted = layout.canonical_shapes({path: s.shape for path, s in shapes.items()})
    # The auxiliary head of a run on drawn data reads labels that other data do not have.
    canonical, report = adapt.assemble(wanted, origin.params, origin.new, (r"aux_head/.+",), inflation)
    fresh = {path for path in shapes if layout.canonical_names(path)[0] not in canonical}
    return canonical, fresh, report


def initial_state(program: Program, loaded, fresh: set[str]) -> TrainState:
    """New leaves are initialised where they live; loaded ones are put there, part by part (see `placed`)."""
    batch, shapes, shardings = loading.dummy_batch(program.data), program.shapes, program.shardings

    def new_leaves():
        flat = traverse_util.flatten_dict(program.model.init(jax.random.key(program.seed), batch)["params"], sep="/")
        return {path: flat[path].astype(shapes[path].dtype) for path in fresh}

    leaves = jax.jit(new_leaves, out_shardings={path: shardings[path] for path in fresh})()
    for path in (path for path in shapes if path not in fresh):
        leaves[path] = placed(path, loaded, shardings[path], shapes[path].dtype)
    return program.state(leaves)


def placed(path: str, canonical, sharding: jax.NamedSharding, dtype) -> jax.Array:
    """The leaf at `path` on its devices; of a base on disk the host holds one part and one canonical leaf at a time."""
    names = layout.canonical_names(path)
    stacked = layout.is_stacked(path)
    shape = tuple(canonical[names[0]].shape)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return np.asarray(canonical[names[0]])[index].astype(dtype)
        rows = range(*index[0].indices(len(names)))
        return np.stack([np.asarray(canonical[names[row]])[index[1:]].astype(dtype) for row in rows])

    return jax.make_array_from_callback((len(names), *shape) if stacked else shape, sharding, part)


def parameter_rows(program: Program, fresh: set[str]) -> list[reporting.ParameterRow]:
    """One row per canonical leaf."""
    rows = []
    for path, leaf in program.shapes.items():
        status = "frozen" if not program.trains[path] else "new" if path in fresh else "trained"
        shape = leaf.shape[1:] if layout.is_stacked(path) else leaf.shape
        spec = str(program.shardings[path].spec)
        rows += [reporting.ParameterRow(name, shape, status, spec) for name in layout.canonical_names(path)]
    return rows
