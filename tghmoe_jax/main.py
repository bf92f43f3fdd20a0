"""Trains or evaluates what a config says.

    python -m tghmoe_jax.main --config configs/stage1.py [--workdir runs/stage1] [--config.train.steps=100]

--workdir defaults to runs/<config stem>[-<preset>]. Exit codes: 0 done, 2 something the user can mend (one sentence on
stderr; --debug adds the traceback).
"""

import contextlib
import os
import sys
import traceback

# The C++ logs of XLA would drown the progress line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

from tghmoe_jax.errors import UserError
from tghmoe_jax.training.command_line import define_flags, parse

CPU_DEVICES = 2  # data-parallel host devices: a small CPU runs a step about 1.5 times faster on two than on one


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h"} & set(argv):
        print(__doc__, define_flags(argv).get_help(), sep="\n")
        return 0
    try:
        config, workdir = parse(argv)
        prepare_jax()
        from tghmoe_jax import train  # after the devices are set up

        train.run(config, workdir)
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare_jax() -> None:
    """Several host devices where there is no accelerator."""
    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and "xla_force_host_platform" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        with contextlib.suppress(RuntimeError):  # a caller that has used jax already keeps its devices
            jax.config.update("jax_num_cpu_devices", min(CPU_DEVICES, os.cpu_count() or 1))


if __name__ == "__main__":
    sys.exit(main())
