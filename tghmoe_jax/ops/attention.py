"""Softmax attention with one interface and several backends.

`plain` materialises all scores and is fastest while they stay in cache; `blocked` maps over a few heads at a time and
over blocks of their queries, meets only the keys that a block may see, and recomputes scores in the backward pass, so
that neither memory nor cache traffic grows with the square of the length (design.md 7). `splash` is the sparse flash
attention of jax.experimental.pallas on TPU, forward and backward, which skips the blocks that a causal or window mask
hides; `cudnn` is the fused attention of an NVIDIA GPU (not yet run on one), for heads of at most 128 in a multiple of 8
and in bfloat16 or float16: all else that is asked of it is computed by `blocked`. `auto` picks by platform and by the
size of the score block, which are static.

Axis legend: B batch, Q query token, K key token, N query head, V key/value head, G its query heads (N / V), H head
size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tghmoe_jax.ops.choices import BACKENDS, splash_blocks
from tghmoe_jax.ops.platform import batch_axes, platform

_PLAIN_BYTES = 16 << 20  # scores of this size still live in the last-level cache of a small CPU
_BLOCK_BYTES = 3 << 20  # of the scores of a block: they stay in the caches of a CPU's core
_DEVICE_BLOCK_BYTES = 256 << 20  # on an accelerator, which a loop over small blocks would leave idle
_CAUSAL_PARTS = 8  # into which blocks of queries are put by the keys that they meet; each is compiled
_MASKED = -1e30  # finite: a row without any valid key gives a uniform average, never NaN
SPLASH_LEAST = 256  # shorter sequences would be mostly padding


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key_valid", "query_start", "blocks", "positions", "reach"),
    meta_fields=("causal", "slice_tokens", "window"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may see; every part is optional and they are combined by `and`.

    key_valid bool (B, K). causal: query i is key query_start + i and sees the keys up to itself; query_start int () is
    None for 0, which is then known at compile time. blocks int (B, K): queries see later keys of their own block too,
    -1 being none. reach int (): a query sees no key that is `reach` or more positions before it; positions int (B, K)
    are those of the keys (default: their index). slice_tokens > 0: tokens i belong to slice i // slice_tokens, and a
    query sees the keys of slices at most `window` away.
    """

    key_valid: jax.Array | None = None
    query_start: jax.Array | None = None
    causal: bool = False
    blocks: jax.Array | None = None
    positions: jax.Array | None = None
    slice_tokens: int = 0
    window: int = 0
    reach: jax.Array | int | None = None


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask | None = None, backend: str = "auto", block: int = 0,
    scale: float | None = None,
) -> jax.Array:  # fmt: skip
    """Softmax(scale q k^T) v with softmax in float32; `scale` is 1 / sqrt(H) by default.

    q (B, Q, N, H); k, v (B, K, V, H) with N a multiple of V (grouped-query attention). Returns (B, Q, N, H) in q's
    dtype. `block`: the most queries (under `splash` of keys too) of a block; 0: chosen. A query that may see
    no key gets a finite result that depends on the backend; so does, under `cudnn` and a causal mask, one whose own key
    is not valid. ValueError for an unknown backend, and for a mask that the one named does not know.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    mask = mask or Mask()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto":
        backend = _choose(q, k, mask)
    if backend == "splash":
        return _splash(q, k, v, mask, block, scale)
    if backend == "cudnn" and q.shape[1] > 1 and cudnn_takes(q.dtype, q.shape[-1]):
        return _over_devices(functools.partial(_cudnn, scale=scale), q, k, v, mask)
    batch, queries, heads, size = q.shape
    # Heads lead, so that both products are plain batched matrix products.
    q = (q * scale).reshape(batch, queries, k.shape[2], -1, size).transpose(0, 2, 3, 1, 4)  # (B, V, G, Q, H)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (B, V, K, H)
    if backend == "plain" or queries == 1:
        out = _weighted(q, k, v, _visible(mask, jnp.arange(queries), jnp.arange(k.shape[2])))
    else:
        out = _over_devices(functools.partial(_blocked, block=block), q, k, v, mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, size)


def _choose(q, k, mask: Mask) -> str:
    """The backend of `auto`. A kernel takes causal masks only where their start is known at compile time."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    known = mask.query_start is None and min(queries, keys) >= SPLASH_LEAST
    if known and platform() == "tpu" and mask.blocks is None and mask.reach is None:
        return "splash"
    if known and platform() == "gpu" and cudnn_takes(q.dtype, q.shape[-1]) and not mask.slice_tokens:
        return "cudnn"  # of a window over slices it would compute, and read the mask of, all pairs
    return "plain" if 4 * batch * heads * keys * queries <= _PLAIN_BYTES else "blocked"


# ---- plain and blocked -----------------------------------------------------------------------------------------------


def _visible(mask: Mask, place: jax.Array, key: jax.Array):
    """bool broadcastable to (B, V, G, Q, K) for the queries at `place` (Q,) and the keys at `key` (K,), or None where
    all is visible. `mask.key_valid` is of these keys, its blocks and positions are of all."""
    parts = []
    start = 0 if mask.query_start is None else mask.query_start
    if mask.key_valid is not None:
        parts.append(mask.key_valid[:, None, None, None, :])
    if mask.causal:
        seen = (key <= start + place[:, None])[None]
        if mask.blocks is not None:
            own = jnp.take(mask.blocks, start + place, axis=1)[:, :, None]
            seen = seen | ((own == jnp.take(mask.blocks, key, axis=1)[:, None]) & (own >= 0))
        parts.append(seen[:, None, None])
    if mask.reach is not None:
        if mask.positions is None:
            near = (key > start + place[:, None] - mask.reach)[None]
        else:
            first = jnp.take(mask.positions, start + place, axis=1) - mask.reach
            near = jnp.take(mask.positions, key, axis=1)[:, None] > first[:, :, None]
        parts.append(near[:, None, None])
    if mask.slice_tokens:
        apart = jnp.abs(key // mask.slice_tokens - (place // mask.slice_tokens)[:, None])
        parts.append((apart <= mask.window)[None, None, None])
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _weighted(q, k, v, visible):
    """Sums of v (B, V, K, H) by the softmax of q (B, V, G, Q, H) k^T, like q.

    The weights are normalised after the second product, on H columns instead of K.
    """
    shape = q.shape
    q = q.reshape(*shape[:2], -1, shape[-1])
    scores = jnp.einsum("bvqh,bvkh->bvqk", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(*shape[:-1], -1)
    if visible is not None:
        scores = jnp.where(visible, scores, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype).reshape(*q.shape[:-1], -1), v).reshape(shape)
    return out / total.astype(v.dtype)


def _blocked(q, k, v, mask: Mask, block: int):
    """`_weighted` in blocks, each of some heads and some of their queries against the span of keys that these may see.

    Whole heads share a block where their scores are few: on a CPU about twice as fast as blocks of few queries of all
    heads. q (B, V, G, Q, H); k and v (B, V, K, H).
    """
    batch, heads, groups, queries, size = q.shape
    if mask.causal and mask.query_start is None:  # later keys are never seen
        k, v = k[:, :, :queries], v[:, :, :queries]
    keys = k.shape[2]
    a_query = 4 * groups * keys
    most_bytes = _BLOCK_BYTES if platform() == "cpu" else _DEVICE_BLOCK_BYTES
    block = min(queries, block or max(64, most_bytes // a_query))
    # No block lies across units, each of which meets the same keys: of a window, whole slices.
    unit = mask.slice_tokens * max(1, block // mask.slice_tokens) if mask.slice_tokens else queries
    units, split = -(-queries // unit), -(-unit // block)
    block = -(-unit // split)
    most = max(1, most_bytes // (a_query * block))
    together = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)  # heads of one sample

    def in_blocks(x):  # (B, V, ...) -> (B * V / together, 1, together, ...)
        return x.reshape(-1, 1, together, *x.shape[2:])

    def pad(x, axis, length):
        return jnp.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)], mode="edge")

    q = pad(q, 3, units * unit).reshape(batch, heads, groups, units, unit, size)
    q = pad(q, 4, split * block).reshape(batch, heads, groups, units * split, block, size)

    def for_heads(x):  # (B, K) -> (B * V / together, 1, K)
        return None if x is None else jnp.repeat(x[:, None, :keys], heads // together, axis=1).reshape(-1, 1, keys)

    arrays = {name: for_heads(getattr(mask, name)) for name in ("key_valid", "blocks", "positions")}

    def some_heads(part):
        q, k, v, arrays = part
        valid = arrays["key_valid"]

        def one(low, span, part):
            q, number = part
            begin = number // split * unit
            place = begin + jnp.minimum(number % split * block + jnp.arange(block), unit - 1)
            place = jnp.minimum(place, queries - 1)
            first = low(begin)

            def cut(x, axis):
                return x if span == keys else jax.lax.dynamic_slice_in_dim(x, first, span, axis)

            here = dataclasses.replace(mask, **arrays | {"key_valid": None if valid is None else cut(valid, 1)})
            return _weighted(q, cut(k, 2), cut(v, 2), _visible(here, place, first + jnp.arange(span)))

        blocks = jnp.moveaxis(q, 3, 0)  # (units * split, 1, together, G, block, H)
        done = [
            jax.lax.map(jax.checkpoint(functools.partial(one, low, span)), (blocks[a:b], jnp.arange(a, b)))
            for a, b, low, span in _spans(mask, units * split, block, unit, keys)
        ]
        return jnp.moveaxis(jnp.concatenate(done), 0, 3)

    out = jax.lax.map(some_heads, (in_blocks(q), in_blocks(k), in_blocks(v), arrays))
    out = out.reshape(batch, heads, groups, units, split * block, size)[..., :unit, :]
    return out.reshape(batch, heads, groups, units * unit, size)[:, :, :, :queries]


def _spans(mask: Mask, count: int, block: int, unit: int, keys: int):
    """[(a, b, first key of the unit that begins at a query, number of keys)] for the blocks a..b of queries."""
    if mask.slice_tokens:
        reach = mask.window * mask.slice_tokens
        span = min(keys, unit + 2 * reach)
        return [(0, count, lambda begin: jnp.clip(begin - reach, 0, keys - span), span)]
    if mask.causal and mask.query_start is None and mask.blocks is None:
        ends = sorted({-(-count * part // _CAUSAL_PARTS) for part in range(1, _CAUSAL_PARTS + 1)})
        return [(a, b, lambda _: 0, min(keys, b * block)) for a, b in zip([0, *ends], ends, strict=False)]
    return [(0, count, lambda _: 0, keys)]


def _over_devices(function, q, k, v, mask: Mask):
    """function(q, k, v, mask) of each device on its own samples."""
    axes = batch_axes(q.shape[0])
    if not axes:
        return function(q, k, v, mask)
    rows, whole = jax.P(axes), jax.P()
    spec = dataclasses.replace(
        mask, **{name: None if getattr(mask, name) is None else whole for name in ("query_start", "reach")},
        **{name: None if getattr(mask, name) is None else rows for name in ("key_valid", "blocks", "positions")},
    )  # fmt: skip
    return jax.shard_map(function, in_specs=(rows, rows, rows, spec), out_specs=rows, check_vma=False)(q, k, v, mask)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _splash(q, k, v, mask: Mask, block: int, scale: float):
    """Each device runs the kernel on its own samples; invalid keys and padding are segment 0, all queries segment 1."""
    if mask.query_start is not None:
        raise ValueError("the splash backend needs the start of a causal mask at compile time")
    if mask.blocks is not None or mask.reach is not None:
        raise ValueError("the splash backend knows no image blocks and no sliding windows; use auto or blocked")
    batch, queries, heads, _ = q.shape
    from tghmoe_jax.ops import splash  # its packages take long to import, and only this backend needs them

    keys = k.shape[1]
    interpret = platform() != "tpu"
    valid = jnp.ones((batch, keys), bool) if mask.key_valid is None else mask.key_valid

    def local(q, k, v, own: Mask):
        kernel = splash.kernel(heads, queries, keys, mask.causal, mask.slice_tokens, mask.window, block, interpret)

        def heads_first(x, length):
            return jnp.pad(x.transpose(0, 2, 1, 3), [(0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)])

        q_length, k_length = splash_blocks(queries, block)[1], splash_blocks(keys, block)[1]
        segments = splash.SegmentIds(
            jnp.ones((q.shape[0], q_length), jnp.int32),
            jnp.pad(own.key_valid.astype(jnp.int32), [(0, 0), (0, k_length - keys)]),
        )
        out = jax.vmap(kernel)(heads_first(q * scale, q_length), heads_first(k, k_length),
                               heads_first(v, k_length), segments)  # fmt: skip
        return out[:, :, :queries].transpose(0, 2, 1, 3)

    return _over_devices(local, q, k, v, Mask(key_valid=valid))


def cudnn_takes(dtype: jnp.dtype, size: int) -> bool:
    """Whether NVIDIA's kernel knows the dtype and the head size on every GPU, and not on some."""
    return dtype in (jnp.bfloat16, jnp.float16) and size <= 128 and size % 8 == 0


def _cudnn(q, k, v, mask: Mask, scale: float):
    """NVIDIA's fused kernel on the samples of one device.

    Valid keys are told by their number: they are moved to the front, and with a causal mask the queries too, all in
    their order. Every other mask is an array (B or 1, 1, Q, K), which the kernel reads as a bias, in training of even
    lengths only: odd ones get a row of padding.
    """
    queries, valid = q.shape[1], mask.key_valid
    if mask.causal and mask.query_start is None:  # later keys are never seen
        k, v, valid = k[:, :queries], v[:, :queries], None if valid is None else valid[:, :queries]
    keys = k.shape[1]
    told, back = {}, None
    simple = mask.query_start is mask.blocks is mask.reach is None and not mask.slice_tokens
    if simple and not (mask.causal and queries > keys):
        told["is_causal"] = mask.causal
        if valid is not None:
            order = jnp.argsort(~valid, axis=1, stable=True)
            k, v = _take(k, order), _take(v, order)
            if mask.causal:
                q, back = _take(q, order), jnp.argsort(order, axis=1)
        if valid is not None or queries % 2 or keys % 2:
            seen = jnp.full(len(q), keys) if valid is None else jnp.maximum(jnp.sum(valid, axis=1), 1)
            seeing = seen if mask.causal else jnp.full(len(q), queries)
            told["query_seq_lengths"], told["key_value_seq_lengths"] = seeing.astype("int32"), seen.astype("int32")
    else:
        mask = dataclasses.replace(mask, key_valid=valid)
        visible = _visible(mask, jnp.arange(queries), jnp.arange(keys))[:, :, 0]  # (B or 1, 1, Q or 1, K)
        visible = jnp.broadcast_to(visible, (len(visible), 1, queries, keys))
        told["mask"] = jnp.pad(visible, [(0, 0), (0, 0), (0, queries % 2), (0, keys % 2)])
    q, k, v = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **told)[:, :queries]
    return out if back is None else _take(out, back)


def _take(x, order):
    """The rows of x (B, T, ...) in the order (B, T) of a permutation."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds", unique_indices=True))(x, order)
