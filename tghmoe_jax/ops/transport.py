"""How tokens reach experts that live on other devices: three transports behind `apply_sharded_experts`.

`all_to_all` gives every (device, expert) pair a fixed number of slots: two exchanges of static size, and what finds no
slot is dropped and counted. `gather` shows all tokens of the axis to every device and adds up what their experts say:
exact, and the oracle of the others. `ragged` (TPU) exchanges exactly the rows there are, into a buffer of fixed size,
and multiplies them by a grouped product (ops/grouped.py).

All of it runs inside a `jax.shard_map`. Experts are numbered as they are placed: device d of the axis holds experts
d * L .. (d + 1) * L - 1, and D * L stands for a token that goes nowhere.

Axis legend: N tokens of a device, K choices per token, D devices of the axis, L experts of a device, C width, S slots.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from tghmoe_jax.ops.experts import ExpertWeights, _combine, _ffn, _gather_rows, _ranks, apply_experts
from tghmoe_jax.ops.platform import platform

TRANSPORTS = ("all_to_all", "gather", "ragged")
Axis = str | tuple[str, ...]


def apply_sharded_experts(
    x: jax.Array,
    choice: jax.Array,
    gate: jax.Array,
    weights: ExpertWeights,
    activation: Callable[[jax.Array], jax.Array],
    axis: Axis,
    transport: str,
    capacity_factor: float = 1.25,
    shares: Sequence[float] = (),
    grouped: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Sum over the K choices of gate * FFN_choice(x), for experts spread over the mesh axis (or axes) `axis`.

    x (N, C), choice int (N, K) in 0..D*L, gate (N, K): this device's tokens; weights (L, ...): this device's experts.
    `shares` (D * L,) is the part of all pairs that each expert should get (default: equal parts). Returns y (N, C) in
    x's dtype and the number of this device's pairs that were dropped, int32. `grouped`: the product of
    `apply_experts`. ValueError for an unknown transport.
    """
    gate = gate.astype(x.dtype)
    weights = ExpertWeights(*(w.astype(x.dtype) for w in weights))
    experts = jax.lax.axis_size(axis) * weights.fc1.shape[0]
    shares = shares or [1 / experts] * experts
    if transport == "all_to_all":
        return _all_to_all(x, choice, gate, weights, activation, axis, capacity_factor, shares)
    if transport == "gather":
        return _gather(x, choice, gate, weights, activation, axis, grouped), jnp.int32(0)
    if transport == "ragged":
        return _ragged(x, choice, gate, weights, activation, axis, capacity_factor, shares, grouped)
    raise ValueError(f"transport {transport!r} is not one of {', '.join(TRANSPORTS)}")


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
    _, rank = _ranks(flat, devices * local)
    kept = rank < jnp.array(slots * devices + [0])[flat]
    first = [device * width + start[place] for device in range(devices) for place in range(local)]
    slot = jnp.where(kept, jnp.array([*first, nowhere])[flat] + rank, nowhere)
    rows = _gather_rows(x, flat, slot, nowhere, choice.shape[1]).reshape(devices, width, -1)
    rows = jax.lax.all_to_all(rows, axis, 0, 0)  # (D, S, C): of every device, the rows for this one's experts
    out = []
    for place in range(local):
        mine = rows[:, start[place] : start[place + 1]]
        out.append(_ffn(mine.reshape(-1, mine.shape[-1]), weights, place, activation).reshape(mine.shape))
    back = jax.lax.all_to_all(jnp.concatenate(out, axis=1), axis, 0, 0)
    dropped = jnp.sum((flat < devices * local) & ~kept).astype(jnp.int32)
    return _combine(back.reshape(nowhere, -1), slot, gate, choice.shape), dropped


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
    counts, rank = _ranks(flat, experts)
    start = jnp.cumsum(counts) - counts
    slot = jnp.where(flat < experts, jnp.append(start, 0)[flat] + rank, pairs)
    rows = _gather_rows(x, flat, slot, pairs, choice.shape[1])
    owner = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(pairs), side="right") % local

    wanted = jax.lax.all_gather(counts.reshape(devices, local).sum(axis=1).astype(jnp.int32), axis)  # (from, to)
    there = jnp.minimum(jnp.cumsum(wanted, axis=0) - wanted, room)  # where a part begins at its receiver
    here = jnp.cumsum(wanted, axis=1) - wanted  # and at its sender
    sent = jnp.clip(room - there, 0, wanted)
    forth = (here[me], sent[me], there[me], sent[:, me])
    back = (there[:, me], sent[:, me], here[:, me], sent[me])
    received = _exchange(rows, jnp.zeros((room, x.shape[1]), x.dtype), *forth, axis)
    own = _exchange(owner.astype(jnp.int32)[:, None], jnp.full((room, 1), local, jnp.int32), *forth, axis)
    ones = jnp.ones((room, 1), x.dtype)
    y, _ = apply_experts(received, own, ones, weights, activation, "ragged", grouped=grouped)
    y = _exchange(y, jnp.zeros_like(rows), *back, axis)
    return _combine(y, slot, gate, choice.shape), jnp.sum(wanted[me] - sent[me])


def _exchange(rows, out, start, size, at, expected, axis):
    """`jax.lax.ragged_all_to_all`, which XLA has for TPU alone; elsewhere the same by a gather, for tests.

    Rows start[d] .. start[d] + size[d] go to device d and lie there from at[d] on; expected[d] rows come from d.
    """
    if platform() == "tpu":
        return jax.lax.ragged_all_to_all(rows, out, start, size, at, expected, axis_name=axis)
    me = jax.lax.axis_index(axis)
    rows = jax.lax.all_gather(rows, axis)  # (D, M, ...)
    start, size, at = (jax.lax.all_gather(a, axis)[:, me] for a in (start, size, at))
    place = jnp.arange(out.shape[0])
    hit = (place >= at[:, None]) & (place < (at + size)[:, None])  # (D, places)
    device = jnp.argmax(hit, axis=0)
    found = rows[device, jnp.clip(start[device] + place - at[device], 0, rows.shape[1] - 1)]
    return jnp.where(jnp.any(hit, axis=0)[:, None], found, out)
