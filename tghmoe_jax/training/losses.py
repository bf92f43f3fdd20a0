"""The training loss L = L_LM + a_lb L_lb + a_z L_z + l_task CE(z, task) [+ a_aux BCE] (model-spec 4.4).

Axis legend: B batch, T token, V vocabulary, L auxiliary label.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tghmoe_jax.models.mllm import Batch, Output


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms; `task` weights the answer tokens of each task, in the order of the model's tasks;
    `first_token` the first token of every answer on top (the letter of a closed question)."""

    task: tuple[float, ...]
    first_token: float = 1.0
    balance: float = 0.01
    z: float = 0.0
    router: float = 0.1
    aux: float = 0.0


def answer_weights(batch: Batch, weights: LossWeights, prefix_length: int) -> jax.Array:
    """float32 (..., T - prefix - 1): the weight of each predicted token; zero outside the answer."""
    mask = batch["loss_mask"][..., prefix_length:].astype(jnp.float32)
    first = mask[..., 1:] * (1 - mask[..., :-1])
    of_task = jnp.asarray(weights.task, jnp.float32)[batch["task"]][..., None]
    return (mask[..., 1:] + (weights.first_token - 1) * first) * of_task


def loss(
    output: Output, batch: Batch, weights: LossWeights, prefix_length: int, total_weight: jax.Array, shares: int
) -> tuple[jax.Array, dict[str, Any]]:
    """This microbatch's share of the step's loss, so that shares simply add up.

    `total_weight` is the summed answer weight of all `shares` microbatches of the step: the LM loss is normalised by
    real answer tokens, not by a mean of means. Other terms are means over the microbatch divided by `shares`.
    Returns the scalar loss and summable parts.
    """
    token_weight = answer_weights(batch, weights, prefix_length)
    nll = -output.scores.log_p * token_weight
    lm = jnp.sum(nll) / jnp.maximum(total_weight, 1e-6)
    member = jax.nn.one_hot(batch["task"], len(weights.task))  # (B, tasks)
    right = output.scores.best & (token_weight > 0)
    parts = {
        "lm": lm,
        "task_nll": jnp.einsum("bk,bt->k", member, nll),  # weighted sums and weights: divided once a step
        "task_weight": jnp.einsum("bk,bt->k", member, token_weight),
        "task_right": jnp.einsum("bk,bt->k", member, right.astype(jnp.float32)),
        "task_tokens": jnp.einsum("bk,bt->k", member, (token_weight > 0).astype(jnp.float32)),
    }
    total = lm
    stats = [s for s in output.encoded.stats.values() if s.load.shape[-1] > 1]
    if stats:
        for key in ("balance", "z", "dropped", "entropy"):
            parts[key] = sum(getattr(s, key) for s in stats) / (len(stats) * shares)
        parts["load"] = jnp.stack([s.load for s in stats])  # (layers, G, E)
        total = total + weights.balance * parts["balance"] + weights.z * parts["z"]
    if output.encoded.task_logits is not None:
        log_p = jax.nn.log_softmax(output.encoded.task_logits, axis=-1)
        parts["router"] = -jnp.mean(jnp.sum(log_p * member, axis=-1)) / shares
        hit = jnp.argmax(log_p, axis=-1) == batch["task"]
        parts["router_accuracy"] = jnp.mean(hit.astype(jnp.float32)) / shares
        total = total + weights.router * parts["router"]
    if output.aux_logits is not None and weights.aux:
        logits, labels = output.aux_logits, batch["aux"]
        bce = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        parts["aux"] = jnp.mean(jnp.where(labels < 0, 0.0, bce)) / shares  # -1: not known
        total = total + weights.aux * parts["aux"]
    return total, parts


def summarise(parts: dict[str, Any], tasks: tuple[str, ...]) -> dict[str, jax.Array]:
    """Scalars for the log from the summed parts of one step."""
    plain = ("lm", "balance", "z", "dropped", "entropy", "router", "router_accuracy", "aux")
    result = {key: parts[key] for key in plain if key in parts}
    for i, task in enumerate(tasks):
        result[f"lm_{task}"] = parts["task_nll"][i] / jnp.maximum(parts["task_weight"][i], 1e-6)
        result[f"token_accuracy_{task}"] = parts["task_right"][i] / jnp.maximum(parts["task_tokens"][i], 1)
    if "load" in parts:
        share = load_shares(parts["load"])
        result["moe/load_max_over_mean"] = jnp.nanmax(share) * share.shape[-1]
        result["moe/load_min_share"] = jnp.nanmin(share)
    return result


def load_shares(load: jax.Array) -> jax.Array:
    """Share of each expert within its group, (layers, G, E); NaN for a group without tokens."""
    total = jnp.sum(load, axis=-1, keepdims=True)
    return jnp.where(total > 0, load / jnp.maximum(total, 1), jnp.nan)
