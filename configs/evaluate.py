"""Evaluation alone, of a run that exists.

    python -m tghmoe_jax.main --config configs/evaluate.py --config.init_from=runs/stage2

Model and data are the run's own, unless --config.data.name and --config.data.root name another test set,
--config.data.text_length lets its questions be longer, or --config.data.drop_leaks=test leaves out of it what training
shares; the scores go to --workdir (default runs/evaluate). `:bench`, `:phi3v` and `:medgemma` ask as much as the stages
of these presets do; --config.init_from=embedded names the reader inside the package.
"""

from configs import common


def get_config(arg: str | None = None):
    c = common.get_config()
    preset = common.parse_arg(arg)["preset"]
    if preset == "bench":
        c = common.bench(c)
    elif preset in common.FULL_SCALE:
        c.eval.update(common.FULL_EVAL)
    c.mode = "evaluate"
    c.init_from = "runs/stage2"
    c.data.update({"name": "", "root": "", "text_length": 0})  # the run's own
    return c
