"""A run's checkpoints: parameters, optimiser, step and data iterator in one atomic orbax unit.

Parameters are an item of their own, so that predict and the next stage read them alone. The checkpoint comes before the
evaluation of its step and before the next batch: the saved iterator matches the saved step.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
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
from tghmoe_jax.sharding import arrays
from tghmoe_jax.training import hosts, selection, stored
from tghmoe_jax.training.step import TrainState

_COMMITTED = ("_CHECKPOINT_METADATA", "commit_success.txt")  # what orbax writes last of all
_UNFINISHED = ".orbax-checkpoint-tmp"
_LONGEST = 3600  # seconds that a save may take


class Checkpoints:
    """Saves and restores the training state of one run folder. A save goes on in threads while the run trains.

    The checkpoint of step `best` stays whatever its age.
    """

    best: int | None = None

    def __init__(self, workdir: epath.PathLike, keep: int):
        self._keep, self._workdir, self._place = keep, epath.Path(workdir), stored.folder_of(workdir)
        self._writing: tuple[int, bool] | None = None  # the step, and whether older ones may go after it
        stored.ignore_closed_loops()
        # orbax calls back in the first process, when all have written and before the folder gets its name.
        background = ocp.options.AsyncOptions(timeout_secs=_LONGEST, post_finalization_callback=self._add_digests)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=background)

    def save(self, state: TrainState, iterator: grain.DatasetIterator, healthy: bool = True) -> None:
        """Begins the checkpoint of the state's step; a step that takes over the state's memory may follow at once.

        The one before is finished first. Older ones go when this one is whole, if the last step was a healthy one.
        UserError where the disk of either refuses.
        """
        self.finish()
        step = int(state.step)
        if hosts.as_first_sees(self._folder(step).exists()):
            return
        self._writing, self._quiet = (step, healthy), _quiet()
        with self._told():
            self._orbax.save(
                self._folder(step),
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(_nest(state.params)),
                    opt=ocp.args.PyTreeSave(_listed(state.opt)),
                    data=grain.checkpoint.CheckpointSave(iterator),
                ),
                custom_metadata={stored.DECLARED: "sha256"},
            )

    def look(self) -> None:
        """Raises what went wrong with the save that goes on, and does the rest where its files are written."""
        if self._writing:
            with self._told():
                self._orbax.check_for_errors()
            if (self._folder(self._writing[0]) / _COMMITTED[1]).exists():
                self.finish()

    def finish(self) -> None:
        """Waits until the checkpoint that is being written is whole. UserError where the disk refuses it."""
        if not self._writing:
            return
        with self._told():
            self._orbax.wait_until_finished()
        (step, healthy), self._writing = self._writing, None
        self._quiet.close()
        if hosts.first():
            with contextlib.suppress(OSError):  # it is whole without these two
                digests.write(
                    self._folder(step),
                    digests.read(self._folder(step)) | digests.of_files(self._folder(step), _COMMITTED),
                )
            for old in stored.steps(self._place)[self._keep :] if healthy else ():
                if old != self.best:
                    self._folder(old).rmtree()

    @contextlib.contextmanager
    def _told(self):
        """Within it, a fault of the disk becomes one sentence, and what was written of the checkpoint goes."""
        try:
            yield
        except (OSError, ValueError) as error:
            (step, _), self._writing = self._writing, None
            if not (why := _of_disk(error)):
                self._quiet.close()
                raise
            if hosts.first():  # a part of a checkpoint takes room and is of no use
                for left in (self._folder(step), self._folder(step, _UNFINISHED)):
                    shutil.rmtree(left, ignore_errors=True)
            before = next((f"; that of step {old} is whole" for old in stored.steps(self._place)), "")
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self._place} ({why}){before}; make room there, "
                "and the same command continues the run."
            ) from error

    def _add_digests(self) -> None:
        """Of all files but the two that orbax still changes, which must be there: whole only with its digests."""
        step, _ = self._writing
        folder = self._folder(step, _UNFINISHED)
        folder = folder if folder.exists() else self._folder(step)  # an object store renames nothing
        found = digests.of_files(folder, (name for name in digests.files(folder) if name not in _COMMITTED))
        if unread := [name for name, digest in found.items() if not digest]:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / unread[0]))
        digests.write(folder, found | dict.fromkeys(_COMMITTED, ""))

    def restore(self, state: TrainState, iterator: grain.DatasetIterator, say=print) -> TrainState:
        """The newest whole checkpoint as `state`, whose leaves need a shape, dtype and sharding alone.

        `iterator` is moved to the next batch.

        Damaged ones that are newer are named (`say`) and moved to `damaged/` of the run's folder. UserError where none
        is whole: then nothing is moved.
        """
        damaged: dict[int, list[str]] = {}
        for step in (found := stored.steps(self._place)):
            damaged[step] = _problems(self._folder(step))
            if not damaged[step] and (restored := self._try(step, state, iterator, damaged)):
                return self._set_aside(damaged, step, say) or restored
        # A process that ended before it had written the digests leaves a checkpoint that is whole: the last resort.
        for step in (step for step in found if damaged[step] == [stored.NO_DIGESTS]):
            if restored := self._try(step, state, iterator, damaged):
                if hosts.first():
                    say(
                        f"the checkpoint of step {step} is taken without digests: the process that wrote it ended "
                        "before them"
                    )
                return self._set_aside(damaged, step, say) or restored
        raise UserError(
            f"no checkpoint of {self._place} is whole ({found[0]}: {digests.told(damaged[found[0]])}); "
            "copy the run again, or delete its folder to train anew."
        )

    def best_params(self, state: TrainState) -> dict[str, jax.Array]:
        """The parameters of step `best`, placed as those of `state` are. UserError where they are damaged."""
        self.finish()
        if self.best in (None, int(state.step)):
            return state.params
        if wrong := _problems(self._folder(self.best)):
            raise UserError(
                f"the best checkpoint, that of step {self.best}, is damaged ({digests.told(wrong)}); delete "
                f"{self._workdir / selection.FILE}, and the same command evaluates the newest."
            )
        reader = ocp.PyTreeCheckpointHandler()
        tree = reader.restore(self._folder(self.best) / "params", args=_restore_args(_nest(state.params)))
        reader.close()
        return traverse_util.flatten_dict(tree, sep="/")

    def _try(self, step: int, state: TrainState, iterator, damaged: dict[int, list[str]]) -> TrainState | None:
        """The state of a step; None, and an entry of `damaged`, where one without digests cannot be read."""
        try:
            return self._read(step, state, iterator)
        except stored.DAMAGE as error:
            line = " ".join(str(error).split())[:200].rstrip(".")
            if digests.read(self._folder(step)) is not None:
                raise UserError(
                    f"{self._folder(step)} is whole but cannot be restored ({line}); use the version of the program "
                    "that wrote it."
                ) from error
            damaged[step] = [f"it cannot be read: {line}"]
            return None

    def _folder(self, step: int, suffix: str = "") -> epath.Path:
        return self._place / f"{step}{suffix}"

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

    def _read(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        # Of what is read only about one leaf is held twice; orbax refuses a leaf of just its limit.
        largest = max(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state)
        )
        reader = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=(largest + 1) / 1e9)
        wanted = {"params": _nest(state.params), "opt": _listed(state.opt)}
        restored = {
            item: reader.restore(self._folder(step) / item, args=_restore_args(tree)) for item, tree in wanted.items()
        }
        reader.close()
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
        """Finishes what is being written, whatever it takes; `finish` has told what could go wrong."""
        with contextlib.suppress(OSError, ValueError):
            self.finish()
        self._orbax.close()


def _quiet() -> contextlib.ExitStack:
    """Hushes the tracebacks that orbax logs, some of them after it raised, until what this returns is closed."""
    before = contextlib.ExitStack()
    for one in map(logging.getLogger, ("absl", "asyncio")):
        before.callback(one.setLevel, one.level)
        one.setLevel(logging.CRITICAL)
    return before


def _of_disk(error: Exception) -> str:
    """Why a disk refused, as the system says it, from what orbax or tensorstore raises; empty for another error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"([^:]+) \[os_error_code", str(error))
    return found[1].strip() if found else ""


def _problems(folder: epath.Path) -> list[str]:
    """What is wrong with a checkpoint, the same on every process; each hashes its share."""
    share = (jax.process_index(), jax.process_count())
    if hosts.first():
        digests.tell_absence(folder)
    own = stored.undeclared(folder) or digests.problems(folder, share=share)
    return list(dict.fromkeys(one for part in hosts.exchange(json.dumps(own)) for one in json.loads(part)))


def _continue(iterator: grain.DatasetIterator, folder: epath.Path) -> None:
    """Moves the iterator to the next batch of a checkpoint that any number of processes wrote.

    grain keeps a file for each process with the number of steps taken, which is the same in all of them.
    """
    own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    file = own if own.exists() else sorted(folder.glob("process_0-of-*.json"))[0]
    iterator.set_state(json.loads(file.read_text()))
    iterator.start_prefetch()


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
