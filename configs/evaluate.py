"""Evaluation alone, of a run that exists.

    python -m tghmoe_jax.main --config configs/evaluate.py --config.init_from=runs/stage2

Model and data are the run's own; the scores go to --workdir (default runs/evaluate).
"""

from configs import common


def get_config(arg: str | None = None):
    common.parse_arg(arg)
    c = common.get_config()
    c.mode = "evaluate"
    c.init_from = "runs/stage2"
    return c
