"""A TGH-MoE layer at the width of ViT-L, top-2 of 4 experts, forward and backward, against two dense FFNs in JAX.

The two FFNs are the ideal: as many products as the chosen experts ask for, with no routing, sorting or padding. All
experts are copies of one FFN, as upcycling makes them, and so are the two: outputs and gradients are then equal, while
a random router sends tokens to all experts. (`benchmarks.moe_layer` counts what the same layer executes on a TPU pod.)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models
from benchmarks.measure import Row, alternate, must_agree
from tghmoe_jax.models.config import TGH
from tghmoe_jax.models.tgh_moe import MoE
from tghmoe_jax.ops.activations import quick_gelu

BOUND = 1.2
# Of the dispatches, that of the full-scale preset is bounded; capacity computes a fixed number of slots more.
ROWS = (
    ("1 group, ragged", 1, "ragged", BOUND),
    ("2 groups, ragged", 2, "ragged", BOUND),
    ("1 group, capacity", 1, "capacity", None),
)
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Sizes:
    rows: int = 8
    tokens: int = 576  # of each row: 4,608 in all
    width: int = 1024
    ffn: int = 4096


SMALL = Sizes(2, 192, 16, 32)


def run(small: bool, runs: int) -> list[Row]:
    sizes = SMALL if small else Sizes()
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    u, cotangent = (normal(sizes.rows, sizes.tokens, sizes.width) for _ in "uc")
    one = {
        "fc1": {"kernel": normal(sizes.width, sizes.ffn) * sizes.width**-0.5, "bias": 0.1 * normal(sizes.ffn)},
        "fc2": {"kernel": normal(sizes.ffn, sizes.width) * sizes.ffn**-0.5, "bias": 0.1 * normal(sizes.width)},
    }
    pair = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    ideal = jax.jit(lambda params: both_ways(dense, params, u, cotangent))

    rows = []
    for name, groups, dispatch, bound in ROWS:
        cfg = TGH(**models.experiment("stage1.py").model.tgh.to_dict() | {
            "groups": groups, "dispatch": dispatch, "capacity_factor": 1.25, "hidden": 32})  # fmt: skip
        layer = MoE(cfg, groups, cfg.experts, cfg.top_k, sizes.ffn, "quick_gelu", jnp.dtype("float32"))
        valid, t = jnp.ones(u.shape[:2], bool), normal(sizes.rows, cfg.hidden)
        group = jnp.arange(sizes.rows) % groups
        params = layer.init(jax.random.key(0), u[:, :2], valid[:, :2], t, group)["params"]
        shape = (groups, cfg.experts)
        params["experts"] = jax.tree.map(lambda leaf, shape=shape: jnp.tile(leaf, (*shape, *[1] * leaf.ndim)), one)

        @jax.jit
        def ours(params, layer=layer, valid=valid, t=t, group=group):
            return both_ways(lambda p, u: layer.apply({"params": p}, u, valid, t, group)[0], params, u, cotangent)

        off = compared(name, ours(params), ideal(pair))
        times = alternate(
            lambda f=ours, p=params: jax.block_until_ready(f(p)), lambda: jax.block_until_ready(ideal(pair)), runs
        )
        chosen = sizes.rows * sizes.tokens * cfg.top_k
        rows.append(Row(
            name, *times, bound, work=[(3 * 4.0 * chosen * sizes.width * sizes.ffn, 0.0)],
            notes={"difference": off, "tokens": sizes.rows * sizes.tokens, "width": sizes.width},
        ))  # fmt: skip
    return rows


def both_ways(function, params, u, cotangent):
    """Output, and the gradients of parameters and input."""
    y, pull = jax.vjp(function, params, u)
    return y, *pull(cotangent)


def dense(params, u):
    """The mean of two FFNs; leaves (2, ...)."""
    y = 0
    for i in range(2):
        fc1, fc2 = ({key: leaf[i] for key, leaf in params[name].items()} for name in ("fc1", "fc2"))
        y += 0.5 * (quick_gelu(u @ fc1["kernel"] + fc1["bias"]) @ fc2["kernel"] + fc2["bias"])
    return y


def compared(name: str, ours, ideal) -> dict[str, float]:
    """Distances of outputs and gradients; those of all experts together are those of both FFNs together.

    Where a capacity drops tokens they differ: the sizes here leave room for all of them.
    """
    found = {"output": (ours[0], ideal[0]), "input": (ours[2], ideal[2])}
    for leaf in ("fc1", "fc2"):
        for kind in ("kernel", "bias"):
            found[f"{leaf} {kind}"] = ours[1]["experts"][leaf][kind].sum((0, 1)), ideal[1][leaf][kind].sum(0)
    return {part: must_agree(f"{name}, {part}", *both, TOLERANCE) for part, both in found.items()}
