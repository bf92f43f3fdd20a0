"""The kernel of the `splash` backend of ops/attention.py: sparse flash attention of jax.experimental.pallas on TPU."""

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    BlockSizes,
    SegmentIds,
    make_splash_mha,
)

from tghmoe_jax.ops.choices import splash_blocks

__all__ = ["SegmentIds", "kernel"]


class _Window(splash_attention_mask._ComputableMask):
    """Slices at most `window` apart, computed inside the kernel: as an array it would have Q x K entries.

    The kernel hands over what `q_sequence` holds of its queries, here their slice; rows of padding take the last one.
    """

    def __init__(self, shape: tuple[int, int], tokens: int, window: int, queries: int):
        def visible(q_slice, key):
            return (key >= (q_slice - window) * tokens) & (key < (q_slice + window + 1) * tokens)

        super().__init__(shape, visible)
        self.q_sequence = (np.minimum(np.arange(shape[0]), queries - 1) // tokens).astype(np.int32)
        self.key = (shape, tokens, window, queries)

    def __eq__(self, other):
        return isinstance(other, _Window) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


def kernel(
    heads: int, queries: int, keys: int, causal: bool, slice_tokens: int, window: int, block: int, interpret: bool
):  # fmt: skip
    """The kernel for unpadded lengths, made in the trace that uses it: its arrays may be of that trace.

    The visible blocks of a mask, which take seconds to find where it is long, are kept by the kernel's own module.
    """
    (bq, q_length), (bk, k_length) = splash_blocks(queries, block), splash_blocks(keys, block)
    shape = (q_length, k_length)
    parts = [splash_attention_mask.CausalMask(shape)] if causal else []
    if slice_tokens:
        parts.append(_Window(shape, slice_tokens, window, queries))
    if len(parts) > 1:
        raise ValueError("the splash backend takes a causal mask or a window, not both")
    whole = parts[0] if parts else splash_attention_mask.FullMask(shape)
    sizes = BlockSizes(block_q=bq, block_kv=bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk)
    return make_splash_mha(
        splash_attention_mask.MultiHeadMask([whole] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
