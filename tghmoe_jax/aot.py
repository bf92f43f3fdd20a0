"""Compiles a config's step for a TPU topology that is not there: `python -m tghmoe_jax.aot` (see tools/aot.py)."""

import sys

from tghmoe_jax.errors import command
from tghmoe_jax.tools.aot import main

if __name__ == "__main__":
    sys.exit(command(main))
