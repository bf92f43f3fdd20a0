"""The FFN of a vision block as experts: a group per task, experts in the group (model-spec 4.4).

Axis legend: B batch, T token (D * (1 + patches) flattened), C width, F hidden width, G groups, E experts, K choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tghmoe_jax.models.config import TGH
from tghmoe_jax.models.router import Routing, TokenRouter
from tghmoe_jax.ops.experts import ExpertWeights, apply_experts
from tghmoe_jax.ops.platform import batch_axes


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
    """Leaves fc1 (G, E, C, F), fc2 (G, E, F, C) with biases, flattened to G * E experts for the dispatch."""

    groups: int
    experts: int
    ffn: int
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, width: int) -> ExpertWeights:
        lead = (self.groups, self.experts)
        fc1, fc1_bias = _Linear(lead, width, self.ffn, self.param_dtype, name="fc1")()
        fc2, fc2_bias = _Linear(lead, self.ffn, width, self.param_dtype, name="fc2")()
        return ExpertWeights(*(w.reshape(-1, *w.shape[2:]) for w in (fc1, fc1_bias, fc2, fc2_bias)))


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
        """u (B, T, C), valid bool (B, T), t (B, R), group int (B,) below G -> y (B, T, C) and the layer's MoEStats."""
        batch, tokens, width = u.shape
        weights = Experts(self.groups, self.experts, self.ffn, self.param_dtype, name="experts")(width)
        if self.experts > 1:
            router = TokenRouter(self.cfg, self.groups, self.experts, self.top_k, name="router")
            routing = router(u, t, group)
        else:
            one = jnp.ones((batch, tokens, 1), jnp.float32)
            routing = Routing(jnp.zeros((batch, tokens, 1), jnp.int32), one, one, one)
        flat_choice = group[:, None, None] * self.experts + routing.choice
        # Padding goes nowhere: it takes no slot and counts in no statistic.
        flat_choice = jnp.where(valid[..., None], flat_choice, self.groups * self.experts)
        gate = jnp.where(valid[..., None], routing.gate, 0)
        y, dropped = dispatch_over_data(self.cfg, u, flat_choice, gate, weights, self.groups)
        stats = moe_stats(routing, valid, group, self.groups, dropped)
        return y, stats


def dispatch_over_data(cfg: TGH, u, choice, gate, weights: ExpertWeights, groups: int) -> tuple[jax.Array, jax.Array]:
    """Runs the dispatch on each data shard's own tokens, so that sorting and slots stay on the device.

    u (B, T, C), choice and gate (B, T, K). Outside a mesh, or where only one device holds data, this is a plain call.
    Slots follow the groups' shares of a batch, which the loader keeps fixed on every device.
    """
    experts = weights.fc1.shape[0] // groups
    group_shares = cfg.group_shares if len(cfg.group_shares) == groups else [1 / groups] * groups
    shares = [share / experts for share in group_shares for _ in range(experts)]

    def local(u, choice, gate, weights):
        flat = (u.reshape(-1, u.shape[-1]), choice.reshape(-1, choice.shape[-1]), gate.reshape(-1, gate.shape[-1]))
        y, dropped = apply_experts(*flat, weights, quick_gelu, cfg.dispatch, cfg.capacity_factor, shares)
        return y.reshape(u.shape), dropped[None]

    if axes := batch_axes(u.shape[0]):
        rows, whole = jax.P(axes), jax.P()
        y, dropped = jax.shard_map(
            local, in_specs=(rows, rows, rows, whole), out_specs=(rows, rows), check_vma=False
        )(u, choice, gate, weights)  # fmt: skip
    else:
        y, dropped = local(u, choice, gate, weights)
    return y, jnp.sum(dropped)


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
