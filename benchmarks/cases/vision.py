"""CLIP ViT-L/14-336 over eight slices, a forward pass: against Hugging Face's tower, and with joint 3D attention in the
upper half against the same arithmetic in plain torch. Same weights and slices; fp32 counts, bf16 is reported beside.
"""

import jax.numpy as jnp
import numpy as np

from benchmarks import models, port
from benchmarks.measure import Row, alternate, better, must_agree, prepare_torch
from benchmarks.torch_peers import Tower, load
from tghmoe_jax.bases.phi3v import CLIP_L_336, CLIP_MEAN, CLIP_STD

SLICES = 8
BOUNDS = {"2D": 1.0, "mixed 2D/3D": 1.0}
# Of the largest difference over the spread of the features; in bf16, whose tail is long, of the typical one.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def run(small: bool, runs: int) -> list[Row]:
    torch = prepare_torch(small)
    vision = models.CLIP_SMALL if small else CLIP_L_336
    slices = 2 if small else SLICES
    size, layers = vision["image_size"], vision["num_hidden_layers"]
    peer = port.llava_peer(vision, models.LLAMA_SMALL)
    config, leaves = port.ported(peer)
    clip = peer.model.vision_tower
    images = np.random.default_rng(0).random((1, slices, size, size, 3), np.float32)
    pixels = torch.from_numpy((images[0] - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).permute(0, 3, 1, 2)
    pixels = pixels.contiguous()

    rows = []
    for kind, bound in BOUNDS.items():
        joint = () if kind == "2D" else tuple(range(layers // 2, layers))
        for dtype in ("float32", "bfloat16"):
            model, variables = models.ours(config, leaves, size, dtype=dtype, attn3d_layers=joint)
            tower, torch_type = models.compiled_tower(model, variables, images), getattr(torch, dtype)
            if kind == "2D":
                plain, given = clip.to(torch_type), pixels.to(torch_type)
                features = lambda run, given=given: run(given).last_hidden_state[None, :, 1:]  # noqa: E731
            else:
                plain, given = load(Tower(model.cfg), leaves, "vision/").eval().to(torch_type), torch.from_numpy(images)
                features = lambda run, given=given: run(given)[0]  # noqa: E731
            with torch.inference_mode():
                ways = {"eager": lambda run=features, module=plain: run(module)}
                if not small:
                    compiled = torch.compile(plain)
                    ways["torch.compile"] = lambda run=features, module=compiled: run(module)
                name, way, tried = better(ways)
                found = jnp.asarray(tower(images), jnp.float32)
                distance = must_agree(
                    f"vision {kind} {dtype}", found, way().float().numpy(), TOLERANCE[dtype],
                    typical=dtype == "bfloat16",
                )  # fmt: skip
                ours, theirs = alternate(lambda tower=tower: tower(images), way, runs)
            rows.append(Row(
                f"{kind}, {dtype}", ours, theirs, bound if dtype == "float32" else None,
                work=[(models.tower_flops(model, slices), 0.0)] if dtype == "float32" else (),
                notes={"difference": distance, "peer": name, "tried": tried},
            ))  # fmt: skip
    return rows
