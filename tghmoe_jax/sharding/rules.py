"""Where each parameter lives: one list of (regex, PartitionSpec), first match wins, the last rule takes the rest.

Patterns match canonical names; a stacked leaf gets one more, unsharded, leading axis. `expert` shards the expert
dimension of TGH-MoE weights, `fsdp` the widest dimension of large matrices.
"""

import re

from jax.sharding import PartitionSpec as P

RULES: tuple[tuple[str, P], ...] = (
    (r"vision/block_\d+/(moe|task_ffn)/experts/fc1/kernel", P(None, "expert", None, "fsdp")),
    (r"vision/block_\d+/(moe|task_ffn)/experts/fc2/kernel", P(None, "expert", "fsdp", None)),
    (r"vision/block_\d+/(moe|task_ffn)/experts/fc[12]/bias", P(None, "expert", None)),
    (r".*/attn/[qkv]/kernel", P("fsdp", None, None)),
    (r".*/attn/out/kernel", P(None, None, "fsdp")),
    (r".*/(fc1|gate|up)/kernel", P(None, "fsdp")),
    (r".*/(fc2|down)/kernel", P("fsdp", None)),
    (r"decoder/embed/embedding", P("fsdp", None)),
    (r"decoder/lm_head/kernel", P(None, "fsdp")),
    (r".*", P()),
)


def spec(canonical: str, stacked: bool, shape: tuple[int, ...], mesh_shape: dict[str, int]) -> P:
    """PartitionSpec of a leaf. An axis of size 1, or one that does not divide its dimension, is left unsharded."""
    rule = next(rule for pattern, rule in RULES if re.fullmatch(pattern, canonical))
    names = ([None] if stacked else []) + list(rule)
    kept = [
        name if name and mesh_shape[name] > 1 and shape[axis] % mesh_shape[name] == 0 else None
        for axis, name in enumerate(names)
    ]
    return P(*kept) if any(kept) else P()
