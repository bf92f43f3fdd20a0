"""The two routers: the prompt picks a task's group once per sample, tokens pick experts inside it (model-spec 4.4).

All router arithmetic is float32. Axis legend: B batch, T token, C width, R prompt-vector width, G groups, E experts,
K choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tghmoe_jax.models.config import TGH


class TokenRouting(NamedTuple):
    """choice int32 (B, T, K) in 0..E-1; gate float32 (B, T, K); probabilities and logits float32 (B, T, E)."""

    choice: jax.Array
    gate: jax.Array
    probabilities: jax.Array
    logits: jax.Array


def masked_mean(x: jax.Array, mask: jax.Array, axis: int) -> jax.Array:
    """Mean of x over `axis` where mask (broadcastable once expanded to x's rank) is true; zeros where nothing is."""
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)).astype(x.dtype)
    return jnp.sum(x * mask, axis=axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


class TaskRouter(nn.Module):
    """Prompt vector t = GELU(W_t LN(mean_n e_n)) and, with several groups, the task logits z = W_c t + b."""

    cfg: TGH
    tasks: int

    def setup(self):
        self.ln = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
        self.proj = nn.Dense(self.cfg.hidden)
        if self.cfg.groups > 1:
            self.head = nn.Dense(self.tasks, kernel_init=nn.initializers.normal(0.02))
            if "image" in self.cfg.task_input:
                self.image_ln = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
                self.image_proj = nn.Dense(self.cfg.hidden)

    def prompt_vector(self, embeddings: jax.Array, question_mask: jax.Array) -> jax.Array:
        """t float32 (B, R) from question embeddings (B, T, W), no gradient into them, and question_mask bool (B, T)."""
        mean = masked_mean(jax.lax.stop_gradient(embeddings).astype(jnp.float32), question_mask, axis=1)
        return nn.gelu(self.proj(self.ln(mean)), approximate=False)

    def task_logits(self, t: jax.Array, coarse: jax.Array) -> jax.Array:
        """z float32 (B, tasks). `coarse` (B, X): of `MLLM.coarse_view`, read where task_input says so."""
        parts = [t] if "text" in self.cfg.task_input or "image" not in self.cfg.task_input else []
        if "image" in self.cfg.task_input:
            image = self.image_proj(self.image_ln(jax.lax.stop_gradient(coarse).astype(jnp.float32)))
            parts.append(nn.gelu(image, approximate=False))
        return self.head(jnp.concatenate(parts, axis=-1))


class TokenRouter(nn.Module):
    """Linear router on [u ; t] with one weight set per group: s = Wx_g u + Wt_g t, top-k of softmax(s)."""

    cfg: TGH
    groups: int
    experts: int
    top_k: int

    @nn.compact
    def __call__(self, u: jax.Array, t: jax.Array, group: jax.Array) -> TokenRouting:
        """u (B, T, C); t float32 (B, R); group int (B,). Returns the routing of every token."""
        cfg = self.cfg
        u = u.astype(jnp.float32)
        logits = jnp.zeros((*u.shape[:2], self.experts), jnp.float32)
        if cfg.token_input != "text":
            # Not zero: ties would send every token to the same experts.
            kernel = Kernel((self.groups, u.shape[-1], self.experts), nn.initializers.normal(0.02), name="x")()
            logits = logits + jnp.einsum("btc,bce->bte", u, kernel[group])
        if cfg.token_input != "image":
            init = nn.initializers.normal(0.02) if cfg.token_input == "text" else nn.initializers.zeros
            kernel = Kernel((self.groups, t.shape[-1], self.experts), init, name="t")()
            logits = logits + jnp.einsum("br,bre->be", t, kernel[group])[:, None, :]
        scores = jax.nn.softmax(logits, axis=-1)
        gate, choice = jax.lax.top_k(scores, self.top_k)
        # A renormalised gate of one choice would be constant and leave the router without gradient (model-spec 0).
        if self.top_k > 1:
            gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
        return TokenRouting(choice, gate, scores, logits)


class Kernel(nn.Module):
    """A bare float32 kernel, so that the leaf is called `<name>/kernel` as in model-spec 4.4."""

    shape: tuple[int, ...]
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", self.init, self.shape, jnp.float32)
