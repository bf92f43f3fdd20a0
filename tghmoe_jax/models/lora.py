"""Low-rank updates of the decoder's projections (LoRA, arXiv 2106.09685): y = x W + (alpha / rank) (x A) B."""

import math
import re

import jax
import jax.numpy as jnp
from flax import linen as nn

from tghmoe_jax.models.config import Lora
from tghmoe_jax.ops.products import flat_dot_general


def projection(lora: Lora, place: str, features: int | tuple[int, ...], axes: int = 1, **kw) -> nn.Module:
    """The projection at `place` of a decoder block (as `attn/q`), with a low-rank update where `lora` says so.

    `axes` last axes of the input are contracted; `kw` goes to `nn.DenseGeneral`. Names of the leaves do not change.
    """
    kw = kw | {"dot_general": flat_dot_general}
    name = place.rpartition("/")[2]
    axis = tuple(range(-axes, 0)) if axes > 1 else -1
    if lora.rank and re.fullmatch(lora.targets, place):
        return LowRank(features, axis=axis, rank=lora.rank, scale=lora.alpha / lora.rank, name=name, **kw)
    return nn.DenseGeneral(features, axis=axis, name=name, **kw)


class LowRank(nn.DenseGeneral):
    """A DenseGeneral with leaves `lora_a` (in, rank) and `lora_b` (rank, *features); B starts at zero."""

    rank: int = 1
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        axes = len(self.axis) if isinstance(self.axis, tuple) else 1
        features = self.features if isinstance(self.features, tuple) else (self.features,)
        flat = x.reshape(*x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :]))
        a = self.param("lora_a", nn.initializers.lecun_normal(), (flat.shape[-1], self.rank), self.param_dtype)
        b = self.param("lora_b", nn.initializers.zeros, (self.rank, *features), self.param_dtype)
        return y + self.scale * jnp.tensordot(flat @ a.astype(x.dtype), b.astype(x.dtype), 1)
