"""How tokens reach experts that live on other devices: three transports behind `apply_sharded_experts`.

`all_to_all` gives every (device, expert) pair a fixed number of slots: two exchanges of static size, and what finds no
slot is dropped and counted. `gather` shows all tokens of the axis to every device and adds up what their experts say:
exact, and the oracle of the others. `ragged` exchanges exactly the rows there are, into a buffer of fixed size, and
multiplies them by a grouped product (ops/grouped.py); XLA has this exchange for TPU alone.

A sample's tokens only ever need the experts of its own task's group. Where groups lie on an axis of their own,
`all_to_all` therefore deals whole samples to their group's devices first, once each and without a spare slot, since the
loader gives every device a fixed number of samples of each task; the exchange of routed tokens, K times as large and
with spare slots, then stays among the devices of one group. Where tokens go through every group (task_input `none`),
no dealing of samples helps: they are exchanged over both axes at once.

All of it runs inside a `jax.shard_map`. Experts are numbered as they are placed: device d of the axes holds experts
d * L .. (d + 1) * L - 1, and D * L stands for a token that goes nowhere.

Axis legend: B samples of a device, T tokens of a sample, N = B * T, K choices per token, D devices of the axes, L
experts of a device, C width, S slots, Q devices of the group axis.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from tghmoe_jax.ops.choices import TRANSPORTS
from tghmoe_jax.ops.experts import ExpertWeights, apply_experts, combine, ffn, gather_rows, ranks, sources


def apply_sharded_experts(
    x: jax.Array,
    choice: jax.Array,
    gate: jax.Array,
    weights: ExpertWeights,
    activation: Callable[[jax.Array], jax.Array],
    axes: tuple[str, ...],
    transport: str,
    capacity_factor: float = 1.25,
    shares: Sequence[float] = (),
    grouped: str = "auto",
    one_group: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Sum over the K choices of gate * FFN_choice(x), for experts spread over the mesh axes `axes`.

    x (B, T, C), choice int (B, T, K) in 0..D*L, gate (B, T, K): this device's samples; weights (L, ...): this device's
    experts. Of two axes the first is that of the groups; `one_group` says that a sample's choices all lie in one part
    of it (pairs that do not are dropped and counted). `shares` (D * L,) is the part of all pairs that each expert
    should get (default: equal parts). Returns y (B, T, C) in x's dtype and a number of pairs dropped, int32, whose sum
    over the devices is that of all. `grouped`: the product of `apply_experts`. ValueError for an unknown transport.
    """
    gate = gate.astype(x.dtype)
    weights = ExpertWeights(*(w.astype(x.dtype) for w in weights))
    experts = jax.lax.axis_size(axes) * weights.fc1.shape[0]
    shares = shares or [1 / experts] * experts
    if transport == "all_to_all" and len(axes) == 2 and one_group:
        return _by_group(x, choice, gate, weights, activation, axes, capacity_factor, shares)
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, choice, gate))
    if transport == "all_to_all":
        y, dropped = _all_to_all(*flat, weights, activation, axes, capacity_factor, shares)
    elif transport == "gather":
        y, dropped = _gather(*flat, weights, activation, axes, grouped), jnp.int32(0)
    elif transport == "ragged":
        y, dropped = _ragged(*flat, weights, activation, axes, capacity_factor, shares, grouped)
    else:
        raise ValueError(f"transport {transport!r} is not one of {', '.join(TRANSPORTS)}")
    return y.reshape(x.shape), dropped


def _by_group(x, choice, gate, weights, activation, axes, capacity_factor, shares):
    """Samples to their group's devices, tokens to their experts among those, and both back."""
    outer, inner = axes
    samples, parts = x.shape[0], jax.lax.axis_size(outer)
    experts = jax.lax.axis_size(inner) * weights.fc1.shape[0]  # of one part
    nowhere = parts * experts
    of_part = [sum(shares[q * experts : (q + 1) * experts]) for q in range(parts)]
    room = min(samples, math.ceil(max(of_part) * samples - 1e-6))
    part = jnp.min(choice, axis=(1, 2)) // experts  # (B,); Q for a sample that is all padding
    _, rank = ranks(part, parts)
    kept = rank < jnp.array([room] * parts + [0])[part]
    slot = jnp.where(kept, part * room + rank, parts * room)
    source = sources(slot, parts * room)

    def dealt(a):
        rows = gather_rows(a.reshape(samples, -1), slot, source, 1).reshape(parts, room, *a.shape[1:])
        return jax.lax.all_to_all(rows, outer, 0, 0).reshape(-1, a.shape[-1])

    own = dealt(choice - nowhere) + nowhere  # an empty slot holds zeros
    own = own - jax.lax.axis_index(outer) * experts
    own = jnp.where((own >= 0) & (own < experts), own, experts)
    busiest = [max(shares[place::experts]) * samples / room for place in range(experts)]
    y, dropped = _all_to_all(dealt(x), own, dealt(gate), weights, activation, inner, capacity_factor, busiest)
    y = jax.lax.all_to_all(y.reshape(parts, room, -1), outer, 0, 0).reshape(parts * room, -1)
    y = combine(y, slot, source, jnp.ones((samples, 1), x.dtype)).reshape(x.shape)
    there = kept[:, None, None] & (choice // experts == part[:, None, None])
    missed = jnp.sum((choice < nowhere) & ~there).astype(jnp.int32)
    return y, dropped + missed


def _all_to_all(x, choice, gate, weights, activation, axis, capacity_factor, shares):
    devices, local = jax.lax.axis_size(axis), weights.fc1.shape[0]
    tokens, pairs = x.shape[0], choice.size
    # Parts of an exchange are equal, so a slot count holds for the same place on every device.
    slots = [
        min(tokens, math.ceil(capacity_factor * pairs * max(shares[place::local]) - 1e-6)) for place in range(local)
    ]
    start = [sum(slots[:place]) for place in range(local + 1)]
    width, nowhere = start[-1], devices * start[-1]
    flat = choice.reshape(-1)
    _, rank = ranks(flat, devices * local)
    kept = rank < jnp.array(slots * devices + [0])[flat]
    first = [device * width + start[place] for device in range(devices) for place in range(local)]
    slot = jnp.where(kept, jnp.array([*first, nowhere])[flat] + rank, nowhere)
    source = sources(slot, nowhere)
    rows = gather_rows(x, slot, source, choice.shape[1]).reshape(devices, width, -1)
    rows = jax.lax.all_to_all(rows, axis, 0, 0)  # (D, S, C): of every device, the rows for this one's experts
    out = []
    for place in range(local):
        mine = rows[:, start[place] : start[place + 1]]
        out.append(ffn(mine.reshape(-1, mine.shape[-1]), weights, place, activation).reshape(mine.shape))
    back = jax.lax.all_to_all(jnp.concatenate(out, axis=1), axis, 0, 0)
    dropped = jnp.sum((flat < devices * local) & ~kept).astype(jnp.int32)
    return combine(back.reshape(nowhere, -1), slot, source, gate), dropped


def _gather(x, choice, gate, weights, activation, axis, grouped):
    local = weights.fc1.shape[0]
    x, choice, gate = (jax.lax.all_gather(a, axis, tiled=True) for a in (x, choice, gate))
    own = choice - jax.lax.axis_index(axis) * local
    own = jnp.where((own >= 0) & (own < local), own, local)
    y, _ = apply_experts(x, own, gate, weights, activation, "ragged", grouped=grouped)
    return jax.lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)


def _ragged(x, choice, gate, weights, activation, axis, capacity_factor, shares, grouped):
    devices, local, me = jax.lax.axis_size(axis), weights.fc1.shape[0], jax.lax.axis_index(axis)
    pairs, experts = choice.size, devices * local
    busiest = max(sum(shares[d * local : (d + 1) * local]) for d in range(devices))
    room = devices * min(pairs, math.ceil(capacity_factor * pairs * busiest - 1e-6))
    flat = choice.reshape(-1)
    counts, rank = ranks(flat, experts)
    start = jnp.cumsum(counts) - counts
    slot = jnp.where(flat < experts, jnp.append(start, 0)[flat] + rank, pairs)
    source = sources(slot, pairs)
    rows = gather_rows(x, slot, source, choice.shape[1])
    owner = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(pairs), side="right") % local

    wanted = jax.lax.all_gather(counts.reshape(devices, local).sum(axis=1).astype(jnp.int32), axis)  # (from, to)
    there = jnp.minimum(jnp.cumsum(wanted, axis=0) - wanted, room)  # where a part begins at its receiver
    here = jnp.cumsum(wanted, axis=1) - wanted  # and at its sender
    sent = jnp.clip(room - there, 0, wanted)
    forth = (here[me], sent[me], there[me], sent[:, me])
    back = (there[:, me], sent[:, me], here[:, me], sent[me])
    exchange = functools.partial(jax.lax.ragged_all_to_all, axis_name=axis)
    received = exchange(rows, jnp.zeros((room, x.shape[1]), x.dtype), *forth)
    own = exchange(owner.astype(jnp.int32)[:, None], jnp.full((room, 1), local, jnp.int32), *forth)
    ones = jnp.ones((room, 1), x.dtype)
    y, _ = apply_experts(received, own, ones, weights, activation, "ragged", grouped=grouped)
    y = exchange(y, jnp.zeros_like(rows), *back)
    return combine(y, slot, source, gate), jnp.sum(wanted[me] - sent[me])
