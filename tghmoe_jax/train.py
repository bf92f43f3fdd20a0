"""The one training loop, for the 2D base and for both stages. It reads from top to bottom.

Invariant of the loop: checkpoint, validate or evaluate, next batch, step. The saved iterator therefore matches the
saved step, and a killed run resumes with exactly the losses of an unbroken one; an evaluation that was cut short is
done again. A checkpoint is written while the run goes on; what steps report is fetched for several of them, and before
it is saved.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from tghmoe_jax import evaluate
from tghmoe_jax.bases.base import EMBEDDED, flattened, load_base, tokenizer_of
from tghmoe_jax.datasets.sources import DRAWN, aux_names, make_source
from tghmoe_jax.errors import PREEMPTED, UserError
from tghmoe_jax.models import leaf_names
from tghmoe_jax.reader.examination import test_sources
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.samples import pipeline
from tghmoe_jax.samples.augment import Augment
from tghmoe_jax.samples.questions import ItemSource
from tghmoe_jax.sharding import arrays
from tghmoe_jax.tools import chips, flops
from tghmoe_jax.training import (
    checkpoints,
    domain,
    guard,
    heap,
    hosts,
    loading,
    memory,
    owner,
    reporting,
    run_folder,
    selection,
    stopping,
    stored,
)
from tghmoe_jax.training.program import Program, batch_sharding, batch_spec, build, build_model
from tghmoe_jax.training.step import Reports, TrainState
from tghmoe_jax.weights import adapt


def run(config: ConfigDict, workdir: str) -> int:
    """Trains (or, with mode=evaluate, only evaluates) what `config` says and leaves its files in `workdir`.

    Returns 0, or `PREEMPTED` where a signal ended the run early with its state saved. UserError for anything the
    user can fix, before anything is written.
    """
    run_folder.check_config(config)
    if config.mode not in ("train", "evaluate"):
        raise UserError(f"--config.mode={config.mode} is unknown; use train or evaluate.")
    if config.mode == "train":
        run_folder.check_workdir(config, workdir)
    check_hosts(config, workdir)
    with contextlib.ExitStack() as closing:
        hold = closing.enter_context(owner.Hold(workdir, "--workdir")) if hosts.first() else None
        if config.mode == "train":
            return train(config, workdir, hold)
        stopping.stop_at_once()
        evaluate.run(config, workdir)
    return 0


def train(config: ConfigDict, workdir: str, hold: owner.Hold | None) -> int:
    """`run` of mode=train in a folder that `hold` keeps for this process (None in all but the first)."""
    # ---- data and sizes -------------------------------------------------------------------------------------------
    resumes = hosts.as_first_sees(bool(stored.steps(stored.folder_of(workdir))))
    origin = recorded_origin(workdir) if resumes else load_origin(config)
    tokenizer = tokenizer_of(origin.tokenizer, origin.config)
    mesh = evaluate.open_mesh(config, config.model.tgh.experts)
    spec = batch_spec(config, mesh)
    names = aux_names(config.data)
    model = build_model(config, origin.config, names, tokenizer, spec.task_shares)
    program = build(config, model, spec, mesh)  # before data are drawn or read: here a wrong config ends
    source = make_source(config.data, "train", config.data.volumes)
    if config.eval.every and config.data.name not in DRAWN:
        test_sources(config)  # a set without a test item would fail after the last step only
    if config.eval.every > 0 and config.data.name not in DRAWN:
        make_source(config.data, "validation", config.eval["items"])
    sharding = batch_sharding(mesh)
    columns = arrays.local_indices(sharding, (spec.microbatches, spec.columns), axis=1)
    batches = pipeline.train_iterator(
        source, tokenizer, spec, config.train.seed, config.train.steps, columns,
        cell=model.cfg.cell if model.cfg.aux_labels else None, workers=config.data.workers,
        augment=Augment(**config.data.augment),
    )  # fmt: skip
    pipeline.check_text(source, tokenizer, spec, config.train.seed, bad=config.max_bad_fraction)

    # ---- state ----------------------------------------------------------------------------------------------------
    if resumes:  # shapes and shardings are enough: no base is read, and no second state is made
        state, fresh, report = program.state_shapes(), set(), "parameters: of the checkpoint (params.txt: their origin)"
    else:
        loaded, fresh, report = assemble(origin, program.shapes, config.model.inflation)
        state = initial_state(program, loaded, fresh)
        del loaded
        guard.refuse_not_finite(state.params, config.init_from or config.base)

    # ---- what will run --------------------------------------------------------------------------------------------
    workdir = epath.Path(workdir)
    table = reporting.parameter_table(parameter_rows(program, fresh))
    devices = f"{jax.device_count()} {jax.default_backend()} devices"
    devices += f" of {jax.process_count()} processes" if hosts.several() else ""
    if hosts.first():
        left_out = filter(None, [getattr(source, "left_out", "")])
        print(config, table, report, *left_out, f"mesh {dict(mesh.shape)} on {devices}", sep="\n\n", flush=True)
    store = checkpoints.Checkpoints(workdir, config.checkpoint.keep)
    if resumes:
        state = store.restore(state, batches)
        guard.refuse_not_finite(state.params, str(workdir))
        if hosts.first():
            ended = f" of {config.train.steps}: no step is left" if state.step >= config.train.steps else ""
            print(f"continued from step {int(state.step)}{ended}", flush=True)
            before = run_folder.record_steps(workdir, int(state.step), config.train.steps)
            if before != config.train.steps:
                print(
                    f"the schedule of the learning rate now ends at step {config.train.steps} (was {before}); "
                    "rates from here on follow the new schedule",
                    flush=True,
                )
    elif hosts.first():
        manifest = reporting.manifest(
            seeds={"train": config.train.seed, "eval": config.eval.seed},
            data={"name": config.data.name, "volumes": len(source)}
            | ({"sha256": source.digest()} if isinstance(source, ItemSource) else {}),
            base={"base": base_of(config), "init_from": config.init_from},
            devices=jax.devices(),
        )
        manifest["parameters"] = flops.parameters(model.cfg, program.shapes, program.trains)
        manifest |= {"domain": config.data.name, "input_ranges": source.input_ranges()}
        if config.init_from:
            parent = run_folder.find(config.init_from, "--config.init_from")
            manifest |= domain.inherited(parent, stored.newest_step(parent))
        run_folder.write_description(workdir, config, origin.config, origin.tokenizer, table, manifest)

    # ---- the loop -------------------------------------------------------------------------------------------------
    step_fn = program.step(recall=True)
    chip = chips.chip_of(jax.devices()[0])
    log = reporting.RunLog(
        workdir, config.train.steps, start_step=int(state.step), samples_per_step=config.train.batch,
        flops_per_step=useful_flops(program, config), peak=chip.peak * mesh.size if chip else 0.0,
        enabled=hosts.first(),
    )  # fmt: skip

    bad = pipeline.BadItems(config.max_bad_fraction, log.say)
    made = pipeline.TrainBatches(source, tokenizer, spec, config.train.seed, range(spec.columns))

    def items(step: int) -> list[dict[str, str]]:
        name = source.key if isinstance(source, ItemSource) else f"{config.data.name} {{}}".format
        asked = made.used(step - 1, {}, [])
        return [{"volume": name(index), "task": q.task, "question": q.prompt} for index, q in asked]

    watch = guard.Guard(
        workdir, config.train.bad_steps, list(state.trained), items, log.say, int(state.step), hosts.first()
    )

    def take(step: int, scalars: dict[str, np.ndarray], ended: float) -> None:
        log.record(step, {key: value for key, value in scalars.items() if key != "bad_leaves"}, ended)
        watch.note(step, scalars)

    reports = Reports(take)

    there = (selection.read(workdir), stored.steps(stored.folder_of(workdir))) if hosts.first() else ()
    there = json.loads(hosts.exchange(json.dumps(there))[0])
    choice = selection.Selection(workdir, config.eval.best, config.eval.patience, *there)
    store.best = choice.best

    def read_with(params: dict[str, jax.Array]) -> Reader:
        return Reader(model, tokenizer, params, config.data.text_length, config.eval.batch)

    def validate_now() -> None:
        metrics = evaluate.validate(read_with(state.params), config, workdir / "validation" / str(step), log.say)
        log.scalars(step, {f"validation/{key}": value for key, value in metrics.items()})
        if choice.note(step, metrics, hosts.first()):
            store.best = step
        shown = metrics.get(config.eval.best)
        value = "null" if shown is None else f"{shown:.4f}"
        log.say(f"validation of step {step}: {config.eval.best} {value}; the best so far is step {choice.best}")

    def evaluate_now() -> None:
        """Asks the test split, once: of the best checkpoint, or else of the last step."""
        chosen = step if choice.best is None else choice.best
        reader = read_with(store.best_params(state))
        log.scalars(step, evaluate.evaluate_all(reader, config, workdir / "eval" / str(chosen), log.say, str(workdir)))

    first = step = int(state.step)
    # A run that was stopped or killed before its evaluation was done runs it now.
    asked = workdir / "eval" / str(first if choice.best is None else choice.best) / "metrics.json"
    owed = hosts.as_first_sees(first > 0 and not asked.is_file())
    with contextlib.ExitStack() as closing:
        closing.callback(store.close)
        closing.callback(log.close)
        stop = closing.enter_context(stopping.Stop())
        while True:
            stopped = stop.at()
            validates = config.eval.every > 0 and step > choice.validated and step % config.eval.every == 0
            finished = step >= config.train.steps or choice.exhausted
            if stopped or finished or (step > first and (validates or step % config.checkpoint.every == 0)):
                reports.fetch_all()  # a step that ends the run is known before anything is saved
                log.flush()
                if hold:
                    hold.check()
                store.save(state, batches, healthy=not watch.in_a_row)
            evaluates = finished and config.eval.every and (step > first or owed)
            if (validates or evaluates) and not stopped:
                with stop.breaking():
                    if hosts.several():  # which a signal ends at once, if it was not there before
                        store.finish()
                        if stopped := stop.at():
                            break
                    if validates:
                        validate_now()
                        heap.leave_fragments()
                    elif evaluates:
                        evaluate_now()
                if validates or (stop.asked and not hosts.several()):
                    continue  # there may be nothing left to do, or a signal to heed
            if stopped or finished:
                break
            batch = next(batches)
            bad.note(batch.pop("skipped", ()), batch["task"].size)
            batch = arrays.from_local(batch, sharding, 1, spec.columns, columns)
            if step == first:
                step_fn = memory.fitting("train", step_fn, state, batch, warn=log.say)
                heap.leave_fragments()
            state, scalars = step_fn(state, batch)
            step += 1
            if reports.add(step, scalars):
                store.look()
        store.finish()
        if stopped:
            log.say(f"stopped by {stop.name} after step {step}, which is saved; the same command resumes the run.")
    return PREEMPTED if stopped else 0


# ---- pieces ---------------------------------------------------------------------


def check_hosts(config: ConfigDict, workdir: str) -> None:
    """UserError where the processes of a run do not have the same code, config, workdir, base and data."""
    if not hosts.several():
        return
    parts = {"the code": hosts.code_version(), "the config": hosts.config_digest(run_folder.flatten(config))}
    if config.base and config.base != "embedded":
        parts[f"--config.base={config.base}"] = hosts.identity(config.base)
    if config.init_from and config.init_from != "embedded":
        parts[f"--config.init_from={config.init_from}"] = hosts.identity(config.init_from)
    if config.data.name not in DRAWN:  # what is drawn is kept by each host for itself
        for root in str(config.data.root).split(","):
            parts[f"--config.data.root={root.strip()}"] = hosts.identity(root.strip())
        if config.data.manifest:
            parts[f"--config.data.manifest={config.data.manifest}"] = hosts.identity(config.data.manifest)
    hosts.check(parts, workdir)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run's parameters come from: canonical leaves, the base's config.json, its tokeniser, what may be new."""

    params: dict[str, np.ndarray]
    config: dict[str, Any]
    tokenizer: epath.PathLike
    new: tuple[str, ...]


def load_origin(config: ConfigDict) -> Origin:
    """A run to start from, or a 2D base, or nothing (random initialisation)."""
    if config.init_from:
        folder = run_folder.find(config.init_from, "--config.init_from")
        params, _ = stored.load_merged(folder)  # the stage's own low-rank leaves are new
        base_config, files = run_folder.read_base_config(folder), run_folder.model_folder(folder)
        return Origin(not_fresh(params, config), base_config, files, (*adapt.NEW_FROM_STAGE1, *config.fresh))
    if config.base:
        base = load_base(config.base, lazy=True)
        new = (*adapt.NEW_FROM_BASE, *config.fresh)
        return Origin(not_fresh(base.params, config), base.config, base.folder, new)
    if not config.base_config:
        raise UserError(
            "--config.base is empty and --config.base_config gives no sizes; name the folder of a 2D model."
        )
    return Origin({}, flattened(config.base_config.to_dict()), EMBEDDED, (".+",))


def not_fresh(params: Mapping[str, np.ndarray], config: ConfigDict) -> Mapping[str, np.ndarray]:
    """The canonical leaves that `config.fresh` does not name."""
    if not config.fresh:
        return params
    try:
        fresh = [re.compile(one) for one in config.fresh]
    except re.error as error:
        raise UserError(
            f"--config.fresh holds {error.pattern!r}, which is not a regex ({error.msg}); correct it."
        ) from error
    return {name: leaf for name, leaf in params.items() if not any(one.fullmatch(name) for one in fresh)}


def recorded_origin(workdir: epath.PathLike) -> Origin:
    """Of a run that goes on: the sizes and the tokeniser that it recorded, and no parameters."""
    return Origin({}, run_folder.read_base_config(workdir), run_folder.model_folder(workdir), ())


def base_of(config: ConfigDict) -> str:
    """The 2D base at the beginning of a run's line of stages, as its own manifest names it."""
    if not config.init_from:
        return config.base
    parent = run_folder.read_manifest(run_folder.find(config.init_from, "--config.init_from")).get("base") or {}
    return parent.get("base") or "unknown"


def assemble(origin: Origin, shapes: dict[str, jax.ShapeDtypeStruct], inflation: str):
    """Canonical leaves that the origin fills (lazy where it is), the leaf paths left to initialise, and the report."""
    wanted = leaf_names.canonical_shapes({path: s.shape for path, s in shapes.items()})
    # The auxiliary head of a run on drawn data reads labels that other data do not have.
    canonical, report = adapt.assemble(wanted, origin.params, origin.new, (r"aux_head/.+",), inflation)
    fresh = {path for path in shapes if leaf_names.canonical_names(path)[0] not in canonical}
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
    names = leaf_names.canonical_names(path)
    stacked = leaf_names.is_stacked(path)
    shape = tuple(canonical[names[0]].shape)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return np.asarray(canonical[names[0]])[index].astype(dtype)
        rows = range(*index[0].indices(len(names)))
        return np.stack([np.asarray(canonical[names[row]])[index[1:]].astype(dtype) for row in rows])

    return jax.make_array_from_callback((len(names), *shape) if stacked else shape, sharding, part)


def useful_flops(program: Program, config: ConfigDict) -> float:
    """Of a step, on all devices; what a backend repeats is not among them."""
    sizes = config.data.slices, config.data.text_length
    one = flops.train_sample(program.model.cfg, program.shapes, program.trains, *sizes, "plain")
    return one.useful * config.train.batch


def parameter_rows(program: Program, fresh: set[str]) -> list[reporting.ParameterRow]:
    """One row per canonical leaf."""
    rows = []
    for path, leaf in program.shapes.items():
        status = "frozen" if not program.trains[path] else "new" if path in fresh else "trained"
        shape = leaf.shape[1:] if leaf_names.is_stacked(path) else leaf.shape
        spec = str(program.shardings[path].spec)
        rows += [reporting.ParameterRow(name, shape, status, spec) for name in leaf_names.canonical_names(path)]
    return rows
