"""Trains or evaluates what a config says.

    python -m tghmoe_jax.main --config configs/stage1.py [--workdir runs/stage1] [--config.train.steps=100]

--workdir defaults to runs/<config stem>[-<preset>]. Several processes find each other by the environment of TPU VMs,
GKE and Slurm, or by --coordinator, --process and --processes (docs/hosts.md). Exit codes, the same for every process:
0 done; 2 something the user can fix (one sentence on stderr; --debug adds the traceback); 65 the training diverged
(train.bad_steps); 75 stopped by SIGTERM or Ctrl-C with its state saved, or before the first step; the same command
resumes it. A second signal ends it at once.
"""

import os
import sys
import traceback

from tghmoe_jax.errors import PREEMPTED, Stopped, UserError, end_at_once, of_disk, run_command
from tghmoe_jax.training import heap

if __name__ == "__main__":
    heap.keep_freed_memory()
    end_at_once(PREEMPTED)  # while modules are imported
# The C++ logs of XLA would drown the progress line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tghmoe_jax import terminal
from tghmoe_jax.sharding.mesh import simulate_devices
from tghmoe_jax.training import compile_cache, hosts
from tghmoe_jax.training.command_line import define_flags, parse, take

_PLACE = {
    "coordinator": "HOST:PORT of process 0, if processes cannot find each other by themselves.",
    "process": "Number of this process, from 0.",
    "processes": "How many processes the run has; 1: this one alone, and the environment is ignored.",
    "wait": f"Seconds that processes wait for each other at the start; default {hosts.WAIT}.",
}


@terminal.shielded()
def main(argv: list[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h"} & set(argv):
        own = "".join(f"\n  --{name}: {text}" for name, text in _PLACE.items())
        print(__doc__, define_flags(argv).get_help() + own, sep="\n")
        return 0
    workdir = "the run's folder"
    try:
        argv, place = _place(argv)
        simulate_devices()
        compile_cache.keep()
        hosts.start(place)  # before all that can fail, so that a fault is reported once
        config, workdir = parse(argv)
        from tghmoe_jax import train  # after the devices are set up

        return train.run(config, workdir)
    except UserError as error:
        trace = traceback.format_exc() if "--debug" in argv else ""
        return hosts.fail(f"error: {error}", error.code, trace)
    except Stopped as stopped:
        if not hosts.several():
            raise
        return hosts.fail(f"error: {stopped}", PREEMPTED)
    except Exception as error:
        if sentence := of_disk(error, f"a file in {workdir}"):
            return hosts.fail(f"error: {sentence}", 2, traceback.format_exc() if "--debug" in argv else "")
        if not hosts.several():
            raise
        return hosts.unexpected(error)


def _place(argv: list[str]) -> tuple[list[str], hosts.Place]:
    """The command line without the flags of `_PLACE`, and their values, which are needed before a config is read."""
    given = {}
    for name in _PLACE:
        argv, values = take(argv, f"--{name}")
        given[name] = values[-1] if values else ""
    return argv, hosts.Place.of(**given)


if __name__ == "__main__":
    sys.exit(run_command(main, PREEMPTED))
