"""A run's checkpoints: parameters, optimiser, step and data iterator in one atomic orbax unit.

Parameters are an item of their own, so that predict and the next stage read them alone. The checkpoint comes before the
evaluation of its step and before the next batch: the saved iterator matches the saved step.
"""

import contextlib
import json
import logging
import re
import shutil
import sys
import uuid
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from tghmoe_jax import digests
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names
from tghmoe_jax.sharding import arrays
from tghmoe_jax.training import exported, hosts, run_folder
from tghmoe_jax.training.step import TrainState
from tghmoe_jax.weights import adapt, storage

FOLDER = "checkpoints"
_NO_DIGESTS = f"{digests.FILE} is missing"
_DECLARED = "digests"  # in the metadata of a checkpoint: it was written with digests
_DAMAGE = (OSError, ValueError, LookupError, TypeError)  # what orbax and tensorstore raise for incomplete files


class Checkpoints:
    """Saves and restores the training state of one run folder."""

    def __init__(self, workdir: epath.PathLike, keep: int):
        self._keep = keep
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        self._workdir = epath.Path(workdir)
        self._manager = ocp.CheckpointManager(folder_of(workdir), options=options)

    def save(self, state: TrainState, iterator: grain.DatasetIterator, healthy: bool = True) -> None:
        """Writes the checkpoint of the state's step, then its digests.

        Older ones go after that, if the last step was a healthy one.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        try:
            with _quiet():
                self._write(step, state, iterator)
        except (OSError, ValueError) as error:
            if not (why := _of_disk(error)):
                raise
            if hosts.first():  # a part of a checkpoint takes room and is of no use
                for left in (self._folder(step), *self._folder(step).parent.glob(f"{step}.orbax-checkpoint-tmp*")):
                    shutil.rmtree(left, ignore_errors=True)
            before = next((f"; that of step {old} is whole" for old in steps(self._manager.directory)), "")
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self._manager.directory} ({why}){before}; make "
                "room there, and the same command goes on."
            ) from error
        for old in sorted(self._manager.all_steps())[: -self._keep] if healthy else ():
            self._manager.delete(old)

    def _write(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> None:
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(_nest(state.params)),
                opt=ocp.args.PyTreeSave(_listed(state.opt)),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
            custom_metadata={_DECLARED: "sha256"},
        )
        _write_digests(self._folder(step))

    def restore(self, state: TrainState, iterator: grain.DatasetIterator, say=print) -> TrainState:
        """The newest whole checkpoint as `state`, whose leaves need a shape, dtype and sharding alone.

        `iterator` is moved to the next batch.

        Damaged ones that are newer are named (`say`) and moved to `damaged/` of the run's folder. UserError where none
        is whole: then nothing is moved.
        """
        damaged: dict[int, list[str]] = {}
        for step in (found := steps(self._manager.directory)):
            damaged[step] = _problems(self._folder(step))
            if not damaged[step] and (restored := self._try(step, state, iterator, damaged)):
                return self._set_aside(damaged, step, say) or restored
        # A process that ended before it had written the digests leaves a checkpoint that is whole: the last resort.
        for step in (step for step in found if damaged[step] == [_NO_DIGESTS]):
            if restored := self._try(step, state, iterator, damaged):
                if hosts.first():
                    say(
                        f"the checkpoint of step {step} is taken without digests: the process that wrote it ended "
                        "before them"
                    )
                return self._set_aside(damaged, step, say) or restored
        raise UserError(
            f"no checkpoint of {self._manager.directory} is whole ({found[0]}: {digests.told(damaged[found[0]])}); "
            "copy the run again, or delete its folder to train anew."
        )

    def _try(self, step: int, state: TrainState, iterator, damaged: dict[int, list[str]]) -> TrainState | None:
        """The state of a step; None, and an entry of `damaged`, where one without digests cannot be read."""
        try:
            return self._read(step, state, iterator)
        except _DAMAGE as error:
            line = " ".join(str(error).split())[:200].rstrip(".")
            if digests.read(self._folder(step)) is not None:
                raise UserError(
                    f"{self._folder(step)} is whole but cannot be restored ({line}); use the version of the program "
                    "that wrote it."
                ) from error
            damaged[step] = [f"it cannot be read: {line}"]
            return None

    def _folder(self, step: int) -> epath.Path:
        return epath.Path(self._manager.directory) / str(step)

    def _set_aside(self, damaged: dict[int, list[str]], step: int, say) -> None:
        """Moves those that are newer than `step`."""
        for other in (other for other in damaged if other > step):
            target = self._workdir / "damaged" / f"checkpoint-{other}-{uuid.uuid4().hex[:8]}"
            if hosts.first():
                target.parent.mkdir(parents=True, exist_ok=True)
                self._folder(other).rename(target)
                say(f"the checkpoint of step {other} is damaged ({digests.told(damaged[other])}); it is now {target}")
        if len(damaged) > 1:
            hosts.exchange("moved")
            self._manager.reload()

    def _read(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        arguments = ocp.args.Composite(
            params=_restore_args(_nest(state.params)),
            opt=_restore_args(_listed(state.opt)),
        )
        restored = self._manager.restore(step, args=arguments)
        _continue(iterator, self._folder(step) / "data")
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


@contextlib.contextmanager
def _quiet():
    """Threads and callbacks of orbax print a traceback of their own for a fault of the disk, some after it was raised:
    after such a fault, with which the process ends, it stays quiet."""
    loggers = {one: one.level for one in map(logging.getLogger, ("absl", "asyncio"))}
    hooks = sys.excepthook, sys.unraisablehook
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    sys.excepthook = sys.unraisablehook = lambda *error: None
    of_disk = False
    try:
        yield
    except (OSError, ValueError) as error:
        of_disk = bool(_of_disk(error))
        raise
    finally:
        if not of_disk:
            sys.excepthook, sys.unraisablehook = hooks
            for one, level in loggers.items():
                one.setLevel(level)


def _of_disk(error: Exception) -> str:
    """Why a disk refused, as the system says it, from what orbax or tensorstore raises; empty for another error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"([^:]+) \[os_error_code", str(error))
    return found[1].strip() if found else ""


def steps(folder: epath.PathLike) -> list[int]:
    """The steps of a run's checkpoints, the newest first, whole or not."""
    folder = epath.Path(folder)
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True) if folder.is_dir() else []


def _write_digests(folder: epath.Path) -> None:
    """Each process hashes a share of the files that the first one sees, which the system still holds in memory."""
    names = json.loads(hosts.exchange(json.dumps(digests.files(folder) if hosts.first() else []))[0])
    share = names[jax.process_index() :: jax.process_count()]
    parts = hosts.exchange(json.dumps(digests.of_files(folder, share)))
    if hosts.first():
        found = {name: digest for part in parts for name, digest in json.loads(part).items()}
        unseen = [name for name, digest in found.items() if not digest]  # by a host whose view of the disk is older
        text = digests.text(found | digests.of_files(folder, unseen))
        storage.write_text(folder / digests.FILE, text)


def _problems(folder: epath.Path) -> list[str]:
    """What is wrong with a checkpoint, the same on every process; each hashes its share."""
    share = (jax.process_index(), jax.process_count())
    if hosts.first():
        digests.tell_absence(folder)
    own = undeclared(folder) or digests.problems(folder, share=share)
    return list(dict.fromkeys(one for part in hosts.exchange(json.dumps(own)) for one in json.loads(part)))


def undeclared(folder: epath.Path) -> list[str]:
    """A problem where a checkpoint's digests have gone; one of an earlier version never had any."""
    if (folder / digests.FILE).exists():
        return []
    try:
        declared = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    except (OSError, ValueError, LookupError, TypeError):
        return ["_CHECKPOINT_METADATA is missing or not whole"]
    if declared and _DECLARED in declared:
        return [_NO_DIGESTS]
    return []


def _belongs_to_params(name: str) -> bool:
    return "/" not in name or name.startswith("params/")


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
    if not (found := steps(folder)):
        raise UserError(f"{run} holds no checkpoint; train it first, or name a finished run.")
    step = found[0]
    folder = folder / str(step)
    digests.tell_absence(folder)
    if wrong := undeclared(folder) or digests.problems(folder, _belongs_to_params):
        raise UserError(
            f"{folder} is damaged ({digests.told(wrong)}); copy the run again, name another, or resume it, which goes "
            "on from the checkpoint before."
        )
    item = folder / "params"
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
