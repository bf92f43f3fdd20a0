"""AdamW on what trains, with per-leaf rates, and updates masked for expert groups that a step did not see."""

import jax
import jax.numpy as jnp
import optax

from tghmoe_jax.models import layout
from tghmoe_jax.training import rules

Flat = dict[str, jax.Array]


def schedule(cfg, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` (a share of all steps), then cosine to `final` times the peak rate."""
    warmup = max(1, int(cfg.warmup * steps))
    return optax.warmup_cosine_decay_schedule(
        cfg.rate / warmup, cfg.rate, warmup, max(steps, warmup + 1), cfg.rate * cfg.final
    )


def build(cfg, steps: int, paths: list[str]) -> optax.GradientTransformation:
    """cfg holds rate, warmup, final, b1, b2, eps, clip, decay, decay_rules and rate_rules (see configs/common.py).

    The norm is clipped over the trained leaves only: frozen ones are not even differentiated.
    """
    scale = rules.first_match(paths, [tuple(r) for r in cfg.rate_rules], 1.0, "optimizer.rate_rules")
    decays = rules.first_match(paths, [tuple(r) for r in cfg.decay_rules], 1.0, "optimizer.decay_rules")
    per_leaf = optax.stateless(lambda updates, _: {path: u * scale[path] for path, u in updates.items()})
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.decay, mask={path: decays[path] > 0 for path in paths}),
        per_leaf,
        optax.scale_by_learning_rate(schedule(cfg, steps)),
    )


def group_axis(path: str) -> int | None:
    """The axis of the expert groups of a TGH-MoE leaf, or None for a leaf that belongs to no group."""
    if "/moe/" not in path and "/task_ffn/" not in path:
        return None
    return 1 if layout.is_stacked(path) else 0


def keep_absent_groups(new, old, present: jax.Array):
    """Takes each group's slice of `new` where the group was present, else of `old` (model-spec 0, absent groups).

    new and old: trees whose leaves lie under dict keys that are leaf paths (parameters, or optimiser moments);
    present bool (G,).
    """

    def choose(key_path, fresh, stale):
        path = next((k.key for k in key_path if isinstance(k, jax.tree_util.DictKey)), None)
        axis = group_axis(path) if path else None
        if axis is None or fresh.shape[axis] != present.shape[0]:
            return fresh
        shape = [1] * fresh.ndim
        shape[axis] = present.shape[0]
        return jnp.where(present.reshape(shape), fresh, stale)

    return jax.tree_util.tree_map_with_path(choose, new, old)
