"""Operations of a full-width TGH-MoE layer on a TPU pod, forward and backward, divided by those it needs.

    python -m benchmarks.moe_layer --topology v5e:8x8 [--expert 4] [--groups 2] [--transport all_to_all|gather|ragged]

The layer alone is compiled for a topology that is not there (see tghmoe_jax.aot), not under a scan, so that XLA's count
is that of everything it runs. Kernels are counted from their tiles, for a routing that is balanced: XLA takes them for
whole buffers. Samples of both tasks lie on every chip, two of 16 slabs each (`--slabs`). Prints a JSON object.
"""

import argparse
import json
import re
import sys

from tghmoe_jax.tools import aot  # first: it keeps jax from the chips of this machine

import jax  # isort: skip
import jax.numpy as jnp

from benchmarks import models
from tghmoe_jax.errors import UserError
from tghmoe_jax.models.config import TGH
from tghmoe_jax.models.tgh_moe import MoE
from tghmoe_jax.ops.grouped import tiles
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.sharding.rules import spec
from tghmoe_jax.tools.collectives import replica_groups

WIDTH, FFN, SLAB, EXPERTS, TOP_K, ROWS = 1024, 4096, 577, 4, 2, 2  # tokens of a slab, samples of a chip


def examine(topology: str, expert: int = 4, groups: int = 2, transport: str = "all_to_all", slabs: int = 16) -> dict:
    """FLOPs of a chip and who exchanges tokens. UserError or ValueError for what does not fit."""
    _, devices = aot.open_topology(topology)
    mesh = make_mesh(1, -1, expert, devices, EXPERTS)
    cfg = TGH(**models.experiment("stage1.py").model.tgh.to_dict() | {
        "groups": groups, "experts": EXPERTS, "top_k": TOP_K, "transport": transport, "dispatch": "ragged",
        "capacity_factor": 1.25})  # fmt: skip
    layer = MoE(cfg, groups, EXPERTS, TOP_K, FFN, "quick_gelu", jnp.dtype("float32"))
    batch, tokens = ROWS * mesh.size, slabs * SLAB
    shape = lambda s, dtype, p: jax.ShapeDtypeStruct(s, dtype, sharding=jax.NamedSharding(mesh, p))  # noqa: E731
    rows = jax.P(mesh.axis_names)
    u = shape((batch, tokens, WIDTH), jnp.bfloat16, rows)
    rest = (
        shape((batch, tokens), bool, rows), shape((batch, cfg.hidden), jnp.float32, rows),
        shape((batch,), jnp.int32, rows),
    )  # fmt: skip
    plain = jax.eval_shape(layer.init, jax.random.key(0), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (u, *rest)))

    def placed(path, leaf):
        name = "vision/block_0/moe/" + "/".join(k.key for k in path[1:])
        return shape(leaf.shape, leaf.dtype, spec(name, False, leaf.shape, dict(mesh.shape)))

    params = jax.tree_util.tree_map_with_path(placed, plain)

    def run(params, u, cotangent, *rest):
        y, pull = jax.vjp(lambda params, u: layer.apply(params, u, *rest)[0], params, u)
        return y, pull(cotangent)

    like = jax.tree.map(lambda s: s.sharding, (u, (params, u)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(run, out_shardings=like).lower(params, u, u, *rest).compile()
        tile = tiles()[0]
    hlo, pairs = compiled.as_text(), ROWS * tokens * TOP_K
    executed = compiled.cost_analysis()["flops"]
    kernels = [buffer_rows(line) for line in hlo.splitlines() if re.search(r"%t?gmm\S* = .*custom-call", line)]
    local = groups * EXPERTS // expert
    real = (-(-pairs // tile) + local - 1) * tile
    executed += sum(2.0 * WIDTH * FFN * (real - whole) for whole in kernels)
    ideal = 3 * 4.0 * pairs * WIDTH * FFN
    return {
        "topology": topology, "mesh": dict(mesh.shape), "groups": groups, "transport": transport, "slabs": slabs,
        "ideal": ideal, "executed": executed, "ratio": executed / ideal, "kernels": len(kernels),
        "all_to_all_groups": sorted(map(list, replica_groups(hlo, ("all-to-all", "ragged-all-to-all")))),
    }  # fmt: skip


def buffer_rows(line: str) -> int:
    """Rows of the buffer of a kernel's line: the dimension of its operands that is no width of the layer."""
    sizes = {int(size) for shape in re.findall(r"\w+\[(\d+,\d+)\]", line) for size in shape.split(",")}
    return max(sizes - {WIDTH, FFN})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_layer", description=__doc__.split("\n")[0])
    parser.add_argument("--topology", required=True)
    parser.add_argument("--expert", type=int, default=4)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--transport", default="all_to_all")
    parser.add_argument("--slabs", type=int, default=16, help="slabs of a sample")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(examine(**vars(args))))
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
