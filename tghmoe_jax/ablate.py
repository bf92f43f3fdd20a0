"""Trains and compares the rows of configs/ablations.py: `python -m tghmoe_jax.ablate` (see studies/ablate.py)."""

import sys

from tghmoe_jax.errors import run_command
from tghmoe_jax.studies.ablate import main

if __name__ == "__main__":
    sys.exit(run_command(main))
