"""Evaluation alone, of a run that exists.

    python -m tghmoe_jax.main --config configs/evaluate.py --config.init_from=runs/stage2

Model and data are the run's own, unless --config.data.name and --config.data.root name another test set, or
--config.data.drop_leaks=test leaves out of it what training shares; the scores go to --workdir (default runs/evaluate).
`:bench` asks as much as the bench stages do; --config.init_from=embedded names the reader inside the package.
"""

from configs import common


def get_config(arg: str | None = None):
    c = common.get_config()
    if common.parse_arg(arg)["preset"] == "bench":
        c = common.bench(c)
    c.mode = "evaluate"
    c.init_from = "runs/stage2"
    c.data.update({"name": "", "root": ""})  # the run's own
    return c
