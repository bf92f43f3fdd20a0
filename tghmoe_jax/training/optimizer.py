"""AdamW or Muon on what trains, with per-leaf rates, and updates masked for expert groups that a step did not see."""

import collections
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names
from tghmoe_jax.training import rules

Flat = dict[str, jax.Array]

# The weight matrices that Muon orthogonalises: their axes in and out, the others (layers, groups, experts) are batched.
# Embeddings, the output head, routers, norms and biases are left to Adam.
MATRICES = (
    (r"vision/patch/kernel", MuonDimensionNumbers((-5, -4, -3, -2), -1)),
    (r".*/attn/[qkv]/kernel", MuonDimensionNumbers(-3, (-2, -1))),
    (r".*/attn/out/kernel", MuonDimensionNumbers((-3, -2), -1)),
    (r".*/(fc1|fc2|gate|up|down)/kernel", MuonDimensionNumbers(-2, -1)),
)
# What Muon does to matrices (N, R, C) after their momentum.
ITERATIONS = scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=MuonDimensionNumbers(1, 2))
ADAM_RMS = 0.2  # scales Muon's updates to the size of Adam's (arXiv 2502.16982), so that one rate serves both


def schedule(cfg, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` (a share of all steps), then cosine to `final` times the peak rate."""
    warmup = max(1, int(cfg.warmup * steps))
    return optax.warmup_cosine_decay_schedule(
        cfg.rate / warmup, cfg.rate, warmup, max(steps, warmup + 1), cfg.rate * cfg.final
    )


def build(cfg, steps: int, paths: list[str]) -> optax.GradientTransformation:
    """cfg holds name, rate, warmup, final, b1, b2, eps, clip, decay, decay_rules, rate_rules (see configs/common.py).

    The norm is clipped over the trained leaves only: frozen ones are not even differentiated. UserError for an unknown
    name.
    """
    if cfg.name not in ("adamw", "muon"):
        raise UserError(f"--config.optimizer.name={cfg.name} is unknown; use adamw or muon.")
    scale = rules.first_match(paths, [tuple(r) for r in cfg.rate_rules], 1.0, "optimizer.rate_rules")
    decays = rules.first_match(paths, [tuple(r) for r in cfg.decay_rules], 1.0, "optimizer.decay_rules")
    per_leaf = optax.stateless(lambda updates, _: {path: u * scale[path] for path, u in updates.items()})
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        scale_by_muon_and_adam(cfg, paths) if cfg.name == "muon" else adam(cfg),
        optax.add_decayed_weights(cfg.decay, mask={path: decays[path] > 0 for path in paths}),
        per_leaf,
        optax.scale_by_learning_rate(schedule(cfg, steps)),
    )


def adam(cfg) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)


def scale_by_muon_and_adam(cfg, paths: list[str]) -> optax.GradientTransformation:
    """Muon on the leaves of MATRICES, Adam on the others."""
    axes = {p: next((found for pattern, found in MATRICES if leaf_names.matches(pattern, p)), None) for p in paths}
    matrices = [path for path in paths if axes[path]]

    def of(updates):
        return {p: axes[p] or optax.MaskedNode() for p in updates}

    shared = optax.stateless(lambda updates, _: updates | orthogonal({p: (updates[p], axes[p]) for p in matrices}))
    muon = optax.chain(scale_by_muon(ns_steps=0, weight_dimension_numbers=of), shared)  # 0: momentum and norm alone
    return optax.partition({"muon": muon, "adam": adam(cfg)}, {p: "muon" if axes[p] else "adam" for p in paths})


def orthogonal(updates: Mapping[str, tuple[jax.Array, MuonDimensionNumbers]]) -> Flat:
    """{path: (update, its axes)} -> {path: nearly orthogonal matrices}, of the size of Adam's updates.

    The iterations of optax's Muon. Where every device holds all parameters, matrices of one shape are stacked and each
    device makes its part of the stack: leaf by leaf, each would make all of them. On a mesh that splits parameters a
    leaf stays alone, where its parts lie.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and mesh.size > mesh.shape["data"]
    stacks: dict[tuple, list] = collections.defaultdict(list)
    for path, (update, axes) in updates.items():
        ins, outs = (tuple(a % update.ndim for a in np.atleast_1d(side)) for side in axes)
        order = (*(a for a in range(update.ndim) if a not in ins + outs), *ins, *outs)
        turned = update.transpose(order)
        rows, columns = (math.prod(update.shape[a] for a in side) for side in (ins, outs))
        flat = turned.reshape(-1, rows, columns)
        key = (min(rows, columns), max(rows, columns), path if split else None)
        stacks[key].append((path, flat, rows > columns, turned.shape, order))
    result = {}
    for (_, most, _), stack in stacks.items():
        x = jnp.concatenate([flat.swapaxes(1, 2) if tall else flat for _, flat, tall, _, _ in stack])
        x = _iterated(x, 1 if split or mesh.empty else mesh.size) * (ADAM_RMS * math.sqrt(most))
        ends = np.cumsum([len(flat) for _, flat, _, _, _ in stack])
        for (path, _, tall, shape, order), part in zip(stack, jnp.split(x, ends[:-1]), strict=True):
            part = part.swapaxes(1, 2) if tall else part
            result[path] = part.reshape(shape).transpose(np.argsort(order))
    return result


def _iterated(x: jax.Array, devices: int) -> jax.Array:
    """x (N, R, C) -> its matrices made nearly orthogonal, shared by so many devices and then held by all."""
    if devices == 1:
        return ITERATIONS.update(x, ITERATIONS.init(x))[0]
    axes = jax.sharding.get_abstract_mesh().axis_names
    place = jax.lax.with_sharding_constraint
    whole = place(jnp.pad(x, [(0, -len(x) % devices), (0, 0), (0, 0)]), jax.P())  # or the momentum is split as well
    return place(_iterated(place(whole, jax.P(axes)), 1), jax.P())[: len(x)]


def leaf_path(key_path) -> str | None:
    """The leaf path among the keys to an entry of a state: the innermost, since an optimiser may keep dicts itself."""
    return next((k.key for k in reversed(key_path) if isinstance(k, jax.tree_util.DictKey)), None)


def group_axis(path: str) -> int | None:
    """The axis of the expert groups of a TGH-MoE leaf, or None for a leaf that belongs to no group."""
    if "/moe/" not in path and "/task_ffn/" not in path:
        return None
    return 1 if leaf_names.is_stacked(path) else 0


def keep_absent_groups(new, old, present: jax.Array):
    """Takes each group's slice of `new` where the group was present, else of `old` (model-spec 0, absent groups).

    new and old: trees whose leaves lie under dict keys that are leaf paths (parameters, or optimiser moments);
    present bool (G,).
    """

    def choose(key_path, fresh, stale):
        path = leaf_path(key_path)
        axis = group_axis(path) if path else None
        if axis is None or fresh.shape[axis] != present.shape[0]:
            return fresh
        shape = [1] * fresh.ndim
        shape[axis] = present.shape[0]
        return jnp.where(present.reshape(shape), fresh, stale)

    return jax.tree_util.tree_map_with_path(choose, new, old)
