"""Compiles a config's step for a TPU that this machine does not have: `python -m tghmoe_jax.aot` (see tools/aot.py)."""

import sys

from tghmoe_jax.errors import run_command
from tghmoe_jax.tools.aot import main

if __name__ == "__main__":
    sys.exit(run_command(main))
