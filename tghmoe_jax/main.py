"""Trains or evaluates what a config says.

    python -m tghmoe_jax.main --config configs/stage1.py [--workdir runs/stage1] [--config.train.steps=100]

--workdir defaults to runs/<config stem>[-<preset>]. Exit codes: 0 done, 2 something the user can mend (one sentence on
stderr; --debug adds the traceback).
"""

import os
import sys
import traceback

# The C++ logs of XLA would drown the progress line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tghmoe_jax.errors import UserError
from tghmoe_jax.sharding.mesh import simulate_devices
from tghmoe_jax.training.command_line import define_flags, parse


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h"} & set(argv):
        print(__doc__, define_flags(argv).get_help(), sep="\n")
        return 0
    try:
        config, workdir = parse(argv)
        simulate_devices()
        from tghmoe_jax import train  # after the devices are set up

        train.run(config, workdir)
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
