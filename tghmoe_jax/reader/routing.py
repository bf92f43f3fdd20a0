"""How an encoded batch was routed, read back from the tower's statistics.

Axis legend: B batch, G groups, E experts.
"""

import numpy as np

from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.sharding import arrays


def probabilities(logits) -> np.ndarray:
    """The softmax of a task router's logits (..., tasks) on the host, in float64."""
    logits = arrays.to_host(logits).astype(np.float64)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))  # importing scipy's softmax takes 0.2 s of a start
    return shares / shares.sum(axis=-1, keepdims=True)


def expert_load(encoded, groups: int) -> np.ndarray:
    """float32 (B, layers, G, E): pairs a sample sent to each expert of its group; one-expert layers left out."""
    stats = [s for _, s in sorted(encoded.stats.items()) if s.load.shape[-1] > 1]
    used = arrays.to_host(encoded.group)
    if not stats:
        return np.zeros((len(used), 0, groups, 1), np.float32)
    per_sample = np.stack([arrays.to_host(s.sample_load) for s in stats], axis=1)  # (B, layers, E)
    size = stats[0].load.shape[0]
    load = np.zeros((*per_sample.shape[:2], size, per_sample.shape[-1]), np.float32)
    load[np.arange(len(used)), :, used % size] = per_sample
    return load


def routing_of(encoded, row: int, cfg, slice_mask: np.ndarray) -> RoutingMap:
    """How sample `row` of an encoded batch was routed; slice_mask bool (N,) are its real slices."""
    layers = tuple(layer for layer, s in sorted(encoded.stats.items()) if s.load.shape[-1] > 1)
    pairs = expert_load(encoded, cfg.tgh.groups)[row].sum(axis=1)  # (layers, E)
    slabs, side, depth = cfg.slabs(len(slice_mask)), cfg.tower.grid, cfg.volume.patch_depth
    real = np.pad(slice_mask, (0, slabs * depth - len(slice_mask)))
    winner = np.zeros((len(layers), slabs, side, side), np.int32)
    for i, layer in enumerate(layers):  # (T,) of slabs with their class token -> patches
        first = arrays.to_host(encoded.stats[layer].winner)[row].reshape(slabs, -1)[:, int(cfg.tower.class_token) :]
        winner[i] = first.reshape(slabs, side, side)
    winner[:, ~real.reshape(slabs, depth).any(axis=1)] = -1
    load = pairs / np.maximum(pairs.sum(axis=-1, keepdims=True), 1)
    task = cfg.tasks[int(arrays.to_host(encoded.group)[row])] if cfg.tgh.groups > 1 else "shared"
    return RoutingMap(task, None, layers, load, winner)
