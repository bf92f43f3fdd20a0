"""A run's checkpoints: parameters, optimiser, step and data iterator in one atomic orbax unit.

Parameters are an item of their own, so that predict and the next stage read them alone. Evaluation comes before the
checkpoint of its step, the checkpoint before the next batch is taken: the saved iterator matches the saved step.
"""

import json
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names
from tghmoe_jax.sharding import arrays
from tghmoe_jax.training import exported, run_folder
from tghmoe_jax.training.step import TrainState
from tghmoe_jax.weights import adapt

FOLDER = "checkpoints"
_DAMAGE = (OSError, ValueError, LookupError, TypeError)  # what orbax and tensorstore raise for incomplete files


class Checkpoints:
    """Saves and restores the training state of one run folder."""

    def __init__(self, workdir: epath.PathLike, keep: int):
        self._keep = keep
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder_of(workdir), options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, iterator: grain.DatasetIterator, healthy: bool = True) -> None:
        """Writes the checkpoint of the state's step; then older ones go, if the last step was a healthy one."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(_nest(state.params)),
                opt=ocp.args.PyTreeSave(_listed(state.opt)),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
        )
        for old in sorted(self._manager.all_steps())[: -self._keep] if healthy else ():
            self._manager.delete(old)

    def restore(self, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """The latest checkpoint with `state`'s shapes and shardings; `iterator` is moved to the next batch."""
        step = self.latest()
        arguments = ocp.args.Composite(
            params=_restore_args(_nest(state.params)),
            opt=_restore_args(_listed(state.opt)),
        )
        try:
            restored = self._manager.restore(step, args=arguments)
            _continue(iterator, epath.Path(self._manager.directory) / str(step) / "data")
        except _DAMAGE as error:
            raise UserError(
                f"{self._manager.directory / str(step)} cannot be read; delete that folder to resume from the "
                "checkpoint before it."
            ) from error
        flat = traverse_util.flatten_dict(restored["params"], sep="/")
        opt = jax.tree.unflatten(jax.tree.structure(state.opt), [restored["opt"][k] for k in _keys(state.opt)])
        put = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), flat, dict(state.params))
        return TrainState(
            arrays.place(np.int32(step), state.step.sharding),
            {path: put[path] for path in state.trained},
            {path: put[path] for path in state.frozen},
            jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), opt, state.opt),
        )

    def close(self) -> None:
        self._manager.close()


def _continue(iterator: grain.DatasetIterator, folder: epath.Path) -> None:
    """Moves the iterator to the next batch of a checkpoint that any number of processes wrote.

    grain keeps a file for each process with the number of steps taken, which is the same in all of them.
    """
    own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    file = own if own.exists() else sorted(folder.glob("process_0-of-*.json"))[0]
    iterator.set_state(json.loads(file.read_text()))
    iterator.start_prefetch()


def folder_of(run: epath.PathLike) -> epath.Path:
    """Where a run's checkpoints lie: an absolute path, as orbax requires, or a URL."""
    place = epath.Path(run)
    return (place if "://" in str(run) else place.resolve()) / FOLDER


def load_params(run: epath.PathLike) -> tuple[dict[str, np.ndarray], int]:
    """Canonical parameters and the step of a run's latest checkpoint, or of an exported run, on the host.

    UserError where `run` holds no checkpoint, a damaged one, or parameters that are not finite.
    """
    params, step = exported.read(epath.Path(run)) if exported.is_exported(epath.Path(run)) else _newest(run)
    if wrong := [name for name, leaf in params.items() if not np.isfinite(leaf.astype(np.float32)).all()]:
        raise UserError(
            f"{run} holds NaN or infinite parameters (first {wrong[0]}; its training diverged); name another run."
        )
    return params, step


def _newest(run: epath.PathLike) -> tuple[dict[str, np.ndarray], int]:
    """`load_params` of a run with checkpoints."""
    folder = folder_of(run)
    step = max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=None) if folder.is_dir() else None
    if step is None:
        raise UserError(f"{run} holds no checkpoint; train it first, or name a finished run.")
    item = folder / str(step) / "params"
    reader = ocp.PyTreeCheckpointHandler()  # a Checkpointer would warn that an item has no metadata of its own
    try:
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(item).tree)
        tree = reader.restore(item, args=ocp.args.PyTreeRestore(restore_args=arguments))
    except _DAMAGE as error:
        raise UserError(f"{run} holds a checkpoint that cannot be read; copy it again, or name another.") from error
    reader.close()
    return leaf_names.to_canonical(traverse_util.flatten_dict(tree, sep="/")), step


def load_merged(run: epath.PathLike) -> tuple[dict[str, np.ndarray], int]:
    """`load_params` with low-rank updates of the decoder added to its kernels: what leaves a run, or starts another."""
    params, step = load_params(run)
    lora = run_folder.read_config(run)["model"].get("lora", {})  # runs of earlier versions have none
    return (adapt.merge_lora(params, lora["rank"], lora["alpha"]) if lora.get("rank") else params), step


def _nest(flat: dict[str, Any]) -> dict:
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def _keys(tree) -> list[str]:
    return [str(i) for i in range(len(jax.tree.leaves(tree)))]


def _listed(tree) -> dict[str, Any]:
    """The optimiser's leaves by number: its own classes need not be known to read them back."""
    return dict(zip(_keys(tree), jax.tree.leaves(tree), strict=True))


def _restore_args(tree):
    arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), tree)
    return ocp.args.PyTreeRestore(tree, restore_args=arguments)
