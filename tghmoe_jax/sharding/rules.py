"""Where each parameter lives: one list of (regex, PartitionSpec) that matches every leaf exactly once.

Patterns match canonical names in full; a stacked leaf gets one more, unsharded, leading axis. `fsdp` shards the widest
dimension of large matrices. `expert` shards the flattened (group, expert) dimensions of TGH-MoE weights: the experts of
every group where it divides their number, whole groups where it divides those, and where the mesh has an axis `group`
(sharding/mesh.py) the groups over that one and the experts of a group over `expert`.
"""

import re

from jax.sharding import PartitionSpec as P

EXPERTS = "experts"  # stands for the two leading dimensions (G, E) of an expert leaf
_EXPERT = r"vision/block_\d+/(moe|task_ffn)/experts"

RULES: tuple[tuple[str, P], ...] = (
    (_EXPERT + r"/fc1/kernel", P(EXPERTS, None, "fsdp")),
    (_EXPERT + r"/fc2/kernel", P(EXPERTS, "fsdp", None)),
    (_EXPERT + r"/fc[12]/bias", P(EXPERTS, None)),
    (r"(vision|decoder)/block_\d+/attn/[qkv]/kernel", P("fsdp", None, None)),
    (r"(vision|decoder)/block_\d+/attn/out/kernel", P(None, None, "fsdp")),
    (r"(vision/block_\d+/mlp|connector)/fc1/kernel|decoder/block_\d+/mlp/(gate|up)/kernel", P(None, "fsdp")),
    (r"connector/proj/kernel", P(None, "fsdp")),
    (r"(vision/block_\d+/mlp|connector)/fc2/kernel|decoder/block_\d+/mlp/down/kernel", P("fsdp", None)),
    (r"decoder/embed/embedding", P("fsdp", None)),
    (r"decoder/lm_head/kernel", P(None, "fsdp")),
    # Small: whole on every device.
    (r"vision/(cls|pos|depth_pos|patch/(kernel|bias)|(pre_ln|post_ln)/(scale|bias))", P()),
    (r"vision/block_\d+/(ln[12]/(scale|bias)|mix|moe/router/[xt]/kernel)", P()),
    (r"vision/block_\d+/(attn/([qkv]|out)|mlp/fc[12])/bias|decoder/block_\d+/attn/[qkv]/bias", P()),
    (r"connector/((sub|glb)_newline|fc[12]/bias|norm/scale)|aux_head/(scale|bias)", P()),
    (r"decoder/(block_\d+/((attn|mlp)(_post)?_norm|attn/[qk]_norm)|final_norm)/scale", P()),
    (r"decoder/block_\d+/(attn|mlp)/\w+/lora_[ab]", P()),
    (r"task_router/((image_)?(ln|proj)|head)/(scale|bias|kernel)", P()),
)  # fmt: skip


def rule_of(name: str) -> P:
    """The rule of a canonical name. ValueError where none matches, or more than one."""
    found = [(pattern, rule) for pattern, rule in RULES if re.fullmatch(pattern, name)]
    if len(found) != 1:
        how = "no rule" if not found else "the rules " + " and ".join(repr(pattern) for pattern, _ in found)
        raise ValueError(f"the parameter {name} is matched by {how} of sharding/rules.py, and must be by exactly one")
    return found[0][1]


def spec(canonical: str, stacked: bool, shape: tuple[int, ...], mesh_shape: dict[str, int]) -> P:
    """PartitionSpec of a leaf of `shape`; mesh axes of size 1 are left out.

    Where `fsdp` does not divide the rule's dimension (SigLIP's FFN has 4,304 columns), it shards the widest free one
    that it divides. ValueError names the leaf and the axis where a rule misses or doubles it, or where an axis divides
    no dimension.
    """
    lead = 1 if stacked else 0
    names: list[str | None] = [None] * lead
    for part in rule_of(canonical):
        if part == EXPERTS:
            names += experts_spec(canonical, shape[lead], shape[lead + 1], mesh_shape)
        else:
            names.append(part)
    kept = [name if name and mesh_shape.get(name, 1) > 1 else None for name in names]
    for place, (size, name) in enumerate(zip(shape, kept, strict=False)):
        if not name or size % mesh_shape[name] == 0:
            continue
        kept += [None] * (len(shape) - len(kept))
        free = [i for i in range(lead, len(shape)) if kept[i] is None and shape[i] % mesh_shape[name] == 0]
        if name != "fsdp" or not free:
            raise ValueError(f"mesh.{name}={mesh_shape[name]} does not divide the dimension {size} of {canonical}")
        kept[place], kept[max(free, key=lambda i: shape[i])] = None, name
        break
    return P(*kept) if any(kept) else P()


def experts_spec(canonical: str, groups: int, experts: int, mesh_shape: dict[str, int]) -> tuple[str | None, ...]:
    """The axes of an expert leaf's dimensions (G, E). ValueError where they do not divide them."""
    inner, outer = mesh_shape.get("expert", 1), mesh_shape.get("group", 1)
    if experts % inner == 0 and groups % outer == 0:
        return ("group" if outer > 1 else None), "expert"
    if outer == 1 and groups % inner == 0:
        return "expert", None
    raise ValueError(
        f"mesh.expert={inner * outer} does not divide the {groups} x {experts} (groups x experts) of {canonical}"
    )


def expert_specs(fc1: tuple[int, ...], fc1_bias, fc2, fc2_bias, mesh_shape: dict[str, int]) -> list[P]:
    """The specs, of full length, of unstacked expert leaves of these shapes (G, E, ...)."""
    leaves = {"fc1/kernel": fc1, "fc1/bias": fc1_bias, "fc2/kernel": fc2, "fc2/bias": fc2_bias}
    found = [spec(f"vision/block_0/moe/experts/{leaf}", False, shape, mesh_shape) for leaf, shape in leaves.items()]
    return [P(*one, *[None] * (len(shape) - len(one))) for one, shape in zip(found, leaves.values(), strict=True)]
