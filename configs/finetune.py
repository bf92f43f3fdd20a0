"""Fine-tuning on own scans: from a finished stage 2 to a hospital's manifest (docs/own-data.md).

    python -m tghmoe_jax.main --config configs/finetune.py --config.data.root=runs/data/own

starts from `runs/stage2` (--config.init_from=RUN names another, `embedded` the reader inside the package) and trains
what stage 2 trains; `:lora=16` trains low-rank updates of the decoder instead of all of it. `:phi3v` and `:medgemma`
are the full scale, from `runs/stage2-phi3v` and `runs/stage2-medgemma`, and `:phi3v,lora=16,pod=l4-1` fits one card of
24 GB (docs/scale.md). From a converted base without stages, run stage
1 and 2 on the same data instead: configs/stage1.py:phi3v --config.base=DIR --config.data.name=manifest.
"""

from configs import common


def get_config(arg: str | None = None):
    a = common.parse_arg(arg, patch_depth=0, lora=0, pod="")
    c = common.get_config()
    c.trainable = common.STAGE2_TRAINABLE
    common.lora(c, a["lora"])
    c.init_from = "runs/stage2" + (f"-{a['preset']}" if a["preset"] else "")
    if full_scale := common.FULL_SCALE.get(a["preset"]):
        c = full_scale(c, a["patch_depth"] or 2, a["pod"])
        parts = max(1, c.train.accumulate * 64 // c.train.batch)  # of as many rows as on the pod's 256
        c.train.update({"steps": 2000, "batch": 64, "accumulate": parts})
    else:
        c.eval.new_tokens = 200  # a report of some 70 words of the embedded tokeniser
        c.model.patch_depth = a["patch_depth"] or c.model.patch_depth
        c.train.steps = 400
        c.optimizer.rate = 5e-4  # a quarter of a stage's: little data, and what is known should stay
    c.model.tgh.groups = len(c.model.tasks)
    c.model.aux_findings = False  # own data has no such labels
    c.data.update(
        {"name": "manifest", "root": "runs/data/own", "manifest": "", "text_length": max(256, c.data.text_length)}
    )
    return c
