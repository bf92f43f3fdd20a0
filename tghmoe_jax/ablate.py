"""Trains and compares the rows of configs/ablations.py: `python -m tghmoe_jax.ablate` (see studies/ablate.py)."""

import sys

from tghmoe_jax.errors import run_command
from tghmoe_jax.studies.ablate import main
from tghmoe_jax.training import heap

if __name__ == "__main__":
    heap.keep_freed_memory()
    sys.exit(run_command(main))
