"""The parameters of a run, read without its training state: to answer with the run or to start from it.

orbax is imported where a checkpoint is read; an exported run needs none of it.
"""

import functools
import sys

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from tghmoe_jax import digests, untrusted
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names
from tghmoe_jax.training import exported, run_folder, selection
from tghmoe_jax.weights import adapt

FOLDER = "checkpoints"
NO_DIGESTS = f"{digests.FILE} is missing"
DECLARED = "digests"  # in the metadata of a checkpoint: it was written with digests
DAMAGE = (OSError, ValueError, LookupError, TypeError)  # what orbax and tensorstore raise for incomplete files


def folder_of(run: epath.PathLike) -> epath.Path:
    """Where a run's checkpoints lie: an absolute path, as orbax requires, or a URL."""
    place = epath.Path(run)
    return (place if "://" in str(run) else place.resolve()) / FOLDER


def steps(folder: epath.PathLike) -> list[int]:
    """The steps of a run's checkpoints, the newest first, whole or not."""
    folder = epath.Path(folder)
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True) if folder.is_dir() else []


def newest_step(run: epath.PathLike) -> int:
    """The step of the parameters that a finished run, or an exported one, stands for; 0 where it holds none."""
    return chosen_step(run) or run_folder.read_manifest(run).get("step", 0)


def chosen_step(run: epath.PathLike) -> int | None:
    """The step of a run's best checkpoint where validations chose one, else of its newest; None without one."""
    kept = steps(folder_of(run))
    best = selection.read(run).get("best")
    return best if best in kept else next(iter(kept), None)


def load_params(run: epath.PathLike) -> tuple[dict[str, np.ndarray], int]:
    """Canonical parameters and the step of a run's best or latest checkpoint, or of an exported run, on the host.

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
    if (step := chosen_step(run)) is None:
        raise UserError(f"{run} holds no checkpoint; train it first, or name a finished run.")
    folder = folder / str(step)
    digests.tell_absence(folder)
    if wrong := undeclared(folder) or digests.problems(folder, _belongs_to_params):
        raise UserError(
            f"{folder} is damaged ({digests.told(wrong)}); copy the run again, name another, or resume it, which goes "
            "on from the checkpoint before."
        )
    import orbax.checkpoint as ocp  # takes a second

    ignore_closed_loops()
    item = folder / "params"
    reader = ocp.PyTreeCheckpointHandler()  # a Checkpointer would warn that an item has no metadata of its own
    try:
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(item).tree)
        tree = reader.restore(item, args=ocp.args.PyTreeRestore(restore_args=arguments))
    except DAMAGE as error:
        raise UserError(f"{run} holds a checkpoint that cannot be read; copy it again, or name another.") from error
    reader.close()
    return leaf_names.to_canonical(traverse_util.flatten_dict(tree, sep="/")), step


def load_merged(run: epath.PathLike) -> tuple[dict[str, np.ndarray], int]:
    """`load_params` with low-rank updates of the decoder added to its kernels: what leaves a run, or starts another."""
    params, step = load_params(run)
    lora = run_folder.read_config(run)["model"].get("lora", {})  # runs of earlier versions have none
    return (adapt.merge_lora(params, lora["rank"], lora["alpha"]) if lora.get("rank") else params), step


def undeclared(folder: epath.Path) -> list[str]:
    """A problem where a checkpoint's digests have gone; one of an earlier version never had any."""
    if (folder / digests.FILE).exists():
        return []
    try:
        kind = {"custom_metadata": ({}, None)}
        declared = untrusted.read_json(folder / "_CHECKPOINT_METADATA", kind)["custom_metadata"]
    except (UserError, LookupError):
        return ["_CHECKPOINT_METADATA is missing or not whole"]
    if declared and DECLARED in declared:
        return [NO_DIGESTS]
    return []


def _belongs_to_params(name: str) -> bool:
    return "/" not in name or name.startswith("params/")


@functools.cache
def ignore_closed_loops() -> None:
    """From here on, nothing is reported of an event loop that is closed.

    Where orbax cannot read or write one file it closes its loop, to which tensorstore then tells the end of every
    other file, each with a traceback.
    """
    report = sys.unraisablehook

    def report_others(raised) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            report(raised)

    sys.unraisablehook = report_others
