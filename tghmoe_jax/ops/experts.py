"""Expert FFNs applied to routed tokens: three dispatches that agree wherever nothing is dropped (I12).

`dense` computes every expert and masks (the oracle); `capacity` gives each expert a fixed number of slots and drops
what does not fit; `ragged` sorts tokens by expert and drops none: by grouped matrix products (ops/grouped.py), on a CPU
or GPU by loops over tiles (ops/tiled.py). How tokens reach experts on other devices is ops/transport.py's.

Axis legend: N tokens, K choices per token, X experts of all groups (G * E flattened), C width, F hidden width, S slots.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tghmoe_jax.ops.choices import DISPATCHES
from tghmoe_jax.ops.grouped import grouped_matmul, padded_rows
from tghmoe_jax.ops.platform import platform
from tghmoe_jax.ops.tiled import slack, tiled_ffn


class ExpertWeights(NamedTuple):
    """FFN leaves with all experts on the leading axis: (X, C, F), (X, F), (X, F, C), (X, C)."""

    fc1: jax.Array
    fc1_bias: jax.Array
    fc2: jax.Array
    fc2_bias: jax.Array


def apply_experts(
    x: jax.Array,
    choice: jax.Array,
    gate: jax.Array,
    weights: ExpertWeights,
    activation: Callable[[jax.Array], jax.Array],
    dispatch: str,
    capacity_factor: float = 1.25,
    shares: Sequence[float] = (),
    grouped: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Sum over the K choices of gate * FFN_choice(x).

    x (N, C); choice int (N, K) in 0..X-1, or X for a token that goes nowhere (padding); gate (N, K). Under `capacity`,
    expert x has capacity_factor * N * K * shares[x] slots, where `shares` (X,) is the part of all pairs that it should
    get (default 1/X each). `grouped` is the backend of `ragged`'s products (ops/grouped.py). Returns y (N, C) in x's
    dtype and the number of dropped (token, choice) pairs, int32. ValueError for an unknown dispatch.
    """
    gate = gate.astype(x.dtype)
    weights = ExpertWeights(*(w.astype(x.dtype) for w in weights))
    if dispatch == "dense":
        return _dense(x, choice, gate, weights, activation), jnp.int32(0)
    if dispatch == "capacity":
        experts = weights.fc1.shape[0]
        shares = shares or [1 / experts] * experts
        tokens, pairs = x.shape[0], choice.size  # a token sends at most one pair to an expert
        slots = [min(tokens, math.ceil(capacity_factor * pairs * share - 1e-6)) for share in shares]
        return _capacity(x, choice, gate, weights, activation, slots)
    if dispatch == "ragged":
        return _ragged(x, choice, gate, weights, activation, grouped), jnp.int32(0)
    raise ValueError(f"dispatch {dispatch!r} is not one of {', '.join(DISPATCHES)}")


def ffn(x, weights: ExpertWeights, expert: int, activation):
    hidden = activation(x @ weights.fc1[expert] + weights.fc1_bias[expert])
    return hidden @ weights.fc2[expert] + weights.fc2_bias[expert]


def _dense(x, choice, gate, weights, activation):
    y = jnp.zeros_like(x)
    for expert in range(weights.fc1.shape[0]):  # a loop: XLA's CPU batched product is half as fast
        share = jnp.sum(jnp.where(choice == expert, gate, 0), axis=-1, keepdims=True)
        y = y + share * ffn(x, weights, expert, activation)
    return y


def ranks(flat: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Counts (X,) and each pair's rank within its expert, in token order, for flat choices (N * K,)."""
    if platform() == "tpu":  # where sorting takes long, to compile too
        own = (flat[:, None] == jnp.arange(experts + 1)).astype(jnp.int32)
        before = jnp.cumsum(own, axis=0)
        return before[-1, :experts], jnp.sum(own * before, axis=1) - 1
    counts = jnp.bincount(flat, length=experts + 1)
    order = jnp.argsort(flat, stable=True)
    position = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.shape[0], dtype=flat.dtype))
    return counts[:experts], position - (jnp.cumsum(counts) - counts)[flat].astype(flat.dtype)


def sources(slot: jax.Array, slots: int) -> jax.Array:
    """The pair in each of `slots` slots, or N * K in an empty one, for the slot of each pair (N * K,)."""
    pairs = slot.shape[0]
    return jnp.full((slots + 1,), pairs, jnp.int32).at[slot].set(jnp.arange(pairs, dtype=jnp.int32))[:-1]


def _rows_at(rows, index):
    """rows[index], and zeros for the index past the end."""
    return jnp.concatenate([rows, jnp.zeros_like(rows[:1])])[index]


# Both know where each row came from and went to, so each serves the other's backward pass: no scatter, slow on TPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gather_rows(x, slot, source, choices):
    """Rows of x (N, C) placed into the slots of `source`; empty slots hold zeros."""
    return _rows_at(x, source // choices)


def _gather_rows_backward(choices, kept, cotangent):
    slot, source = kept
    back = _rows_at(cotangent, slot)
    return jnp.sum(back.reshape(-1, choices, back.shape[-1]), axis=1), None, None


gather_rows.defvjp(
    lambda x, slot, source, choices: (gather_rows(x, slot, source, choices), (slot, source)), _gather_rows_backward
)


@jax.custom_vjp
def combine(rows, slot, source, gate):
    """Sum over the K choices of gate (N, K) times rows (S, C) read at slot (N * K,); past the end are zeros."""
    return jnp.sum(_rows_at(rows, slot).reshape(*gate.shape, -1) * gate[..., None], axis=1)


def _combine_backward(kept, cotangent):
    rows, slot, source, gate = kept
    share = jnp.append(gate.reshape(-1), jnp.zeros((), gate.dtype))[source]
    d_rows = share[:, None] * _rows_at(cotangent, source // gate.shape[1])
    d_gate = jnp.sum(_rows_at(rows, slot).reshape(*gate.shape, -1) * cotangent[:, None], axis=-1)
    return d_rows, None, None, d_gate


combine.defvjp(
    lambda rows, slot, source, gate: (combine(rows, slot, source, gate), (rows, slot, source, gate)), _combine_backward
)


def _capacity(x, choice, gate, weights, activation, slots: list[int]):
    experts = weights.fc1.shape[0]
    flat = choice.reshape(-1)
    _, rank = ranks(flat, experts)
    start = [sum(slots[:e]) for e in range(experts + 1)]
    kept = rank < jnp.array([*slots, 0])[flat]
    slot = jnp.where(kept, jnp.array(start)[flat] + rank, start[-1])
    source = sources(slot, start[-1])
    rows = gather_rows(x, slot, source, choice.shape[1])
    out = jnp.concatenate([ffn(rows[start[e] : start[e + 1]], weights, e, activation) for e in range(experts)])
    dropped = jnp.sum((flat < experts) & ~kept).astype(jnp.int32)
    return combine(out, slot, source, gate), dropped


def _ragged(x, choice, gate, weights, activation, grouped):
    """Tokens sorted by expert, and each expert's FFN on its own rows: by loops, on a TPU by grouped products."""
    pairs = choice.size
    flat = choice.reshape(-1)
    counts, rank = ranks(flat, weights.fc1.shape[0])
    loops = platform() != "tpu" and grouped == "auto"
    size = pairs + slack(pairs) if loops else padded_rows(pairs)
    slot = jnp.where(flat < counts.shape[0], jnp.append(jnp.cumsum(counts) - counts, 0)[flat] + rank, size)
    source = sources(slot, size)
    rows = gather_rows(x, slot, source, choice.shape[1])
    if loops:
        return combine(tiled_ffn(activation, rows, counts, weights), slot, source, gate)
    return combine(grouped_ffn(rows, counts, weights, activation, grouped), slot, source, gate)


def grouped_ffn(rows, counts, weights: ExpertWeights, activation, backend: str = "auto"):
    """The FFN of each row's expert: rows (M, C) sorted by expert, counts int (X,); rows past their sum give zeros."""
    owner = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(rows.shape[0]), side="right")
    own = jax.nn.one_hot(owner, counts.shape[0], dtype=rows.dtype)  # (M, X); a product, since its gradient is one too
    hidden = grouped_matmul(rows, weights.fc1, counts, backend) + own @ weights.fc1_bias
    return grouped_matmul(activation(hidden), weights.fc2, counts, backend) + own @ weights.fc2_bias
