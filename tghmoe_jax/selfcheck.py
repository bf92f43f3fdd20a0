"""Compares each fast path with its oracle here: `python -m tghmoe_jax.selfcheck` (see tools/selfcheck.py)."""

import sys

from tghmoe_jax.errors import run_command
from tghmoe_jax.tools.selfcheck import main

if __name__ == "__main__":
    sys.exit(run_command(main))
