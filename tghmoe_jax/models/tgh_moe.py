"""The FFN of a vision block as experts: a group per task, experts in the group (model-spec 4.4).

Axis legend: B batch, T token (D * (1 + patches) flattened), C width, F hidden width, G groups, E experts, K choices.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tghmoe_jax.models.config import TGH
from tghmoe_jax.models.router import Routing, TokenRouter
from tghmoe_jax.ops.experts import ExpertWeights, apply_experts
from tghmoe_jax.ops.platform import batch_axes
from tghmoe_jax.ops.transport import apply_sharded_experts
from tghmoe_jax.sharding.rules import expert_specs


class MoEStats(NamedTuple):
    """Health and losses of one MoE layer, over the valid tokens of the whole (global) microbatch.

    balance and z: float32 losses L_lb, L_z. load float32 (G, E): (token, choice) pairs sent to each expert.
    dropped float32: share of pairs that found no slot. entropy float32: mean router entropy in nats.
    winner int32 (B, T): the first choice of every token; sample_load float32 (B, E): pairs of each sample.
    """

    balance: jax.Array
    z: jax.Array
    load: jax.Array
    dropped: jax.Array
    entropy: jax.Array
    winner: jax.Array
    sample_load: jax.Array


def quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


class Experts(nn.Module):
    """Leaves fc1 (G, E, C, F), fc2 (G, E, F, C) with biases."""

    groups: int
    experts: int
    ffn: int
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, width: int) -> ExpertWeights:
        lead = (self.groups, self.experts)
        fc1, fc1_bias = _Linear(lead, width, self.ffn, self.param_dtype, name="fc1")()
        fc2, fc2_bias = _Linear(lead, self.ffn, width, self.param_dtype, name="fc2")()
        return ExpertWeights(fc1, fc1_bias, fc2, fc2_bias)


class _Linear(nn.Module):
    lead: tuple[int, ...]
    fan_in: int
    fan_out: int
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self):
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1)
        kernel = self.param("kernel", init, (*self.lead, self.fan_in, self.fan_out), self.param_dtype)
        return kernel, self.param("bias", nn.initializers.zeros, (*self.lead, self.fan_out), self.param_dtype)


class MoE(nn.Module):
    """`groups` groups of `experts` experts with hard groups and top-k tokens; E = 1 needs no router."""

    cfg: TGH
    groups: int
    experts: int
    top_k: int
    ffn: int
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, u: jax.Array, valid: jax.Array, t: jax.Array, group: jax.Array) -> tuple[jax.Array, MoEStats]:
        """u (B, T, C), valid bool (B, T), t (B, R), group int (B,) below G -> y (B, T, C) and the layer's MoEStats.

        With task_input `none` no group is picked: every token goes through all of them and y is their mean.
        """
        batch, tokens, width = u.shape
        weights = Experts(self.groups, self.experts, self.ffn, self.param_dtype, name="experts")(width)
        if self.experts > 1:
            router = TokenRouter(self.cfg, self.groups, self.experts, self.top_k, name="router")
        else:
            one = jnp.ones((batch, tokens, 1), jnp.float32)
            router = lambda *_: Routing(jnp.zeros((batch, tokens, 1), jnp.int32), one, one, one)  # noqa: E731
        every = self.cfg.task_input == "none"
        groups = [jnp.full_like(group, g) for g in range(self.groups)] if every else [group]
        routings = [router(u, t, one) for one in groups]
        pairs = list(zip(groups, routings, strict=True))
        flat_choice = jnp.concatenate([g[:, None, None] * self.experts + r.choice for g, r in pairs], axis=-1)
        # Padding goes nowhere: it takes no slot and counts in no statistic.
        flat_choice = jnp.where(valid[..., None], flat_choice, self.groups * self.experts)
        gate = jnp.concatenate([r.gate for r in routings], axis=-1) / len(groups)
        gate = jnp.where(valid[..., None], gate, 0)
        y, dropped = dispatch_over_mesh(self.cfg, u, flat_choice, gate, weights)
        stats = [moe_stats(r, valid, g, self.groups, dropped / len(groups)) for g, r in pairs]
        if not every:
            return y, stats[0]
        load = sum(one.load for one in stats)
        mean = jax.tree.map(lambda *ones: sum(ones) / len(ones), *(one._replace(winner=0) for one in stats))
        return y, mean._replace(winner=stats[0].winner, load=load)


def dispatch_over_mesh(cfg: TGH, u, choice, gate, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
    """Runs the dispatch on each device's own tokens, so that sorting and slots stay there; experts stay where they lie.

    u (B, T, C), choice and gate (B, T, K); weights (G, E, ...). Outside a mesh, or where only one device holds data,
    this is a plain call. Where tokens and experts both lie over the mesh's expert axes, the transport of the config
    carries tokens to experts; else the experts' weights are gathered. Slots follow the groups' shares of a batch, which
    the loader keeps fixed on every device. Returns y (B, T, C) and the number of dropped pairs.
    """
    groups, experts = weights.fc1.shape[:2]
    by_task = len(cfg.group_shares) == groups and cfg.task_input != "none"
    group_shares = cfg.group_shares if by_task else [1 / groups] * groups
    shares = [share / experts for share in group_shares for _ in range(experts)]
    rows_over = batch_axes(u.shape[0])
    weights = ExpertWeights(*(w.astype(u.dtype) for w in weights))  # before they travel
    if not rows_over:
        y, dropped = apply_experts(
            *_flat(u, choice, gate), _flat_experts(weights), quick_gelu, cfg.dispatch, cfg.capacity_factor, shares
        )
        return y.reshape(u.shape), dropped
    mesh_shape = dict(jax.sharding.get_abstract_mesh().shape)
    specs = ExpertWeights(*expert_specs(*(w.shape for w in weights), mesh_shape))
    axes = tuple(axis for axis in specs.fc1[:2] if axis)
    travels = bool(axes) and set(axes) <= set(rows_over)
    order = placed_order(groups, experts, specs.fc1[:2], mesh_shape)
    number = jnp.asarray([*np.argsort(order), groups * experts], jnp.int32)  # of each expert, as it is placed

    def local(u, choice, gate, weights):
        whole = ("fsdp",) if travels else ("fsdp", *axes)
        parts = (_gathered(w, spec, whole) for w, spec in zip(weights, specs, strict=True))
        weights = _flat_experts(ExpertWeights(*parts))
        if travels:
            y, dropped = apply_sharded_experts(
                u, number[choice], gate, weights, quick_gelu, axes, cfg.transport, cfg.capacity_factor,
                [shares[i] for i in order], one_group=cfg.task_input != "none",
            )  # fmt: skip
        else:
            y, dropped = apply_experts(
                *_flat(u, choice, gate), weights, quick_gelu, cfg.dispatch, cfg.capacity_factor, shares
            )
        return y.reshape(u.shape), dropped[None]

    rows = jax.P(rows_over)
    y, dropped = jax.shard_map(
        local, in_specs=(rows, rows, rows, specs), out_specs=(rows, rows), check_vma=False
    )(u, choice, gate, weights)  # fmt: skip
    return y, jnp.sum(dropped)


def _flat(*arrays):
    """(B, T, ...) -> (B * T, ...)."""
    return [a.reshape(-1, a.shape[-1]) for a in arrays]


def _flat_experts(weights: ExpertWeights) -> ExpertWeights:
    """(G, E, ...) -> (G * E, ...)."""
    return ExpertWeights(*(w.reshape(-1, *w.shape[2:]) for w in weights))


def _gathered(w, spec, axes):
    """A device's part of a leaf made whole along `axes`."""
    for dimension, axis in enumerate(spec):
        if axis in axes:
            w = jax.lax.all_gather(w, axis, axis=dimension, tiled=True)
    return w


def placed_order(groups: int, experts: int, spec: tuple, mesh_shape: Mapping[str, int]) -> list[int]:
    """The flattened experts in the order in which the devices of `spec`'s axes (of G, of E) hold them."""
    outer, inner = (mesh_shape.get(axis, 1) for axis in spec)
    ids = np.arange(groups * experts).reshape(outer, groups // outer, inner, experts // inner)
    return ids.transpose(0, 2, 1, 3).reshape(-1).tolist()


def moe_stats(routing: Routing, valid: jax.Array, group: jax.Array, groups: int, dropped: jax.Array) -> MoEStats:
    """Losses per group, averaged over groups present: L_lb = E sum_e f_e P_e (1 at uniform), L_z = mean lse(s)^2."""
    experts = routing.probabilities.shape[-1]
    top_k = routing.choice.shape[-1]
    weight = valid.astype(jnp.float32)
    chosen = jnp.sum(jax.nn.one_hot(routing.choice, experts), axis=2) * weight[..., None]  # (B, T, E)
    sample_load = jnp.sum(chosen, axis=1)
    member = jax.nn.one_hot(group, groups)  # (B, G)
    load = jnp.einsum("bg,be->ge", member, sample_load)
    tokens = jnp.einsum("bg,bt->g", member, weight)
    present = (tokens > 0).astype(jnp.float32)
    count = jnp.maximum(tokens, 1)[:, None]
    f = jax.lax.stop_gradient(load / (count * top_k))
    p = jnp.einsum("bg,bte,bt->ge", member, routing.probabilities, weight) / count
    over_groups = lambda x: jnp.sum(x * present) / jnp.maximum(jnp.sum(present), 1)  # noqa: E731
    z = jnp.einsum("bg,bt->g", member, jax.nn.logsumexp(routing.logits, axis=-1) ** 2 * weight) / count[:, 0]
    probabilities = routing.probabilities
    entropy = -jnp.sum(probabilities * jnp.log(jnp.maximum(probabilities, 1e-9)), axis=-1)
    return MoEStats(
        balance=over_groups(experts * jnp.sum(f * p, axis=-1)),
        z=over_groups(z),
        load=load,
        dropped=dropped / jnp.maximum(jnp.sum(load), 1),
        entropy=jnp.sum(entropy * weight) / jnp.maximum(jnp.sum(weight), 1),
        winner=routing.choice[..., 0],
        sample_load=sample_load,
    )
