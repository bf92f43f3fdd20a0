"""The same arithmetic as this project's model, written plainly in torch with SDPA; the cases are compared with it.

Parameters are named as the canonical leaves (tghmoe_jax/models/leaf_names.py): `vision.block_3.attn.q.weight` is
`vision/block_3/attn/q/kernel`, so `load` needs no table. Every slice and every slab is taken to be real, as it is in
the data drawn here, so that no mask of keys is needed and SDPA takes its fast path.

Axis legend: B batch, D slab, T token, C width, N heads, H head size, G groups, E experts, K choices.
"""

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tghmoe_jax.bases.phi3v import CLIP_MEAN, CLIP_STD
from tghmoe_jax.models.config import Model


def leaf_name(name: str, module: nn.Module) -> str:
    """The canonical leaf of a parameter; of an expert, the leaf that holds them all."""
    path, _, kind = name.replace(".", "/").rpartition("/")
    if kind == "weight":
        owner = module.get_submodule(path.replace("/", "."))
        kinds = {nn.Linear: "kernel", nn.Embedding: "embedding", nn.LayerNorm: "scale", nn.RMSNorm: "scale"}
        kind = kinds[type(owner)]
    return f"{re.sub(r'/experts/[0-9]+/', '/experts/', path)}/{kind}".lstrip("/")


def load(module: nn.Module, leaves: Mapping[str, np.ndarray], prefix: str = "") -> nn.Module:
    """Every parameter from its leaf. KeyError names one that is not there."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            leaf = np.asarray(leaves[prefix + leaf_name(name, module)], np.float32)
            if expert := re.search(r"\.experts\.(\d+)\.", name):
                leaf = leaf.reshape(-1, *leaf.shape[2:])[int(expert[1])]
            if name.endswith("weight") and parameter.ndim == 2 and not name.endswith("embed.weight"):
                leaf = leaf.reshape(parameter.shape[1], parameter.shape[0]).T
            parameter.copy_(torch.from_numpy(np.array(leaf.reshape(parameter.shape))))
    return module


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first r features of x (B, N, T, H), in the half layout, by cos and sin (T, r/2)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def angles(positions: int, base: float, rotary: int, repeat: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (positions * repeat, rotary / 2)."""
    angle = torch.arange(positions).float()[:, None] * base ** (-torch.arange(0, rotary, 2).float() / rotary)
    return tuple(f(angle).repeat_interleave(repeat, dim=0) for f in (torch.cos, torch.sin))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, size: int, bias: bool):
        super().__init__()
        self.size, self.grouped = size, heads != kv_heads
        self.q = nn.Linear(width, heads * size, bias=bias)
        self.k, self.v = (nn.Linear(width, kv_heads * size, bias=bias) for _ in "kv")
        self.out = nn.Linear(heads * size, width, bias=bias)

    def forward(self, x: torch.Tensor, turn=None, causal: bool = False) -> torch.Tensor:
        """x (B, T, C); `turn` is (cos, sin) or None."""
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """CLIP's FFN, which is an expert too."""

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class Kernel(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(shape))


class Router(nn.Module):
    def __init__(self, groups: int, width: int, hidden: int, experts: int):
        super().__init__()
        self.x, self.t = Kernel(groups, width, experts), Kernel(groups, hidden, experts)


class MoE(nn.Module):
    """A loop over experts, as MoE-LLaVA and Mixtral have it: each takes its tokens and adds to what they get.

    Where the config gives experts a capacity, what is over it is dropped, in each of the `parts` that this project
    spreads a batch over.
    """

    def __init__(self, cfg: Model, parts: int):
        super().__init__()
        t, v = cfg.tgh, cfg.tower
        self.cfg, self.parts = t, parts
        self.router = Router(t.groups, v.width, t.hidden, t.experts)
        self.experts = nn.ModuleList(Mlp(v.width, v.ffn) for _ in range(t.groups * t.experts))

    def forward(self, u: torch.Tensor, t: torch.Tensor, group: torch.Tensor):
        """u (B, T, C), t (B, R), group (B,) -> y and the layer's losses (balance, z)."""
        cfg, width = self.cfg, u.shape[-1]
        logits = torch.bmm(u, self.router.x.kernel[group])
        logits = logits + torch.bmm(t[:, None], self.router.t.kernel[group])
        probabilities = logits.softmax(-1)
        gate, choice = probabilities.topk(cfg.top_k, dim=-1)
        gate = (gate / gate.sum(-1, keepdim=True)).flatten()
        flat, own = u.reshape(-1, width), (group[:, None, None] * cfg.experts + choice).reshape(self.parts, -1)
        by_task = len(cfg.group_shares) == cfg.groups
        shares = cfg.group_shares if by_task else [1 / cfg.groups] * cfg.groups
        y = torch.zeros_like(flat)
        for expert, ffn in enumerate(self.experts):
            mine = own == expert
            if cfg.dispatch == "capacity":
                share = cfg.capacity_factor * own.shape[1] * shares[expert // cfg.experts] / cfg.experts
                mine = mine & (mine.cumsum(1) <= min(own.shape[1] // cfg.top_k, math.ceil(share - 1e-6)))
            (pair,) = mine.flatten().nonzero(as_tuple=True)
            if len(pair):
                token = pair // cfg.top_k
                y = y.index_add(0, token, gate[pair, None] * ffn(flat[token]))
        return y.view_as(u), self.losses(logits, probabilities, choice, group)

    def losses(self, logits, probabilities, choice, group):
        """Load balance and z, each a mean over groups."""
        cfg, found = self.cfg, []
        chosen = F.one_hot(choice, cfg.experts).sum(2).float()
        for g in group.unique():
            f = chosen[group == g].mean((0, 1)) / cfg.top_k
            balance = cfg.experts * (f * probabilities[group == g].mean((0, 1))).sum()
            found.append(torch.stack([balance, (logits[group == g].logsumexp(-1) ** 2).mean()]))
        return torch.stack(found).mean(0)


class VisionBlock(nn.Module):
    def __init__(self, cfg: Model, layer: int, parts: int):
        super().__init__()
        v = cfg.tower
        self.ln1, self.ln2 = (nn.LayerNorm(v.width, eps=v.eps) for _ in "12")
        self.attn = Attention(v.width, v.heads, v.heads, v.width // v.heads, bias=True)
        self.joint, self.sparse = layer in cfg.volume.attn3d_layers, layer in cfg.tgh.layers
        if self.sparse:
            self.moe = MoE(cfg, parts)
        else:
            self.mlp = Mlp(v.width, v.ffn)

    def forward(self, x: torch.Tensor, turn, t, group):
        """x (B, D, T, C) -> the same, and the losses of its experts or None."""
        batch, slabs, tokens, width = x.shape
        shape = (batch, slabs * tokens, width) if self.joint else (batch * slabs, tokens, width)
        x = x + self.attn(self.ln1(x).view(shape), turn if self.joint else None).view(x.shape)
        if not self.sparse:
            return x + self.mlp(self.ln2(x)), None
        y, losses = self.moe(self.ln2(x).flatten(1, 2), t, group)
        return x + y.view(x.shape), losses


class Tower(nn.Module):
    """CLIP over slabs, 2D and joint 3D attention, with experts where the config has them."""

    def __init__(self, cfg: Model, parts: int = 1):
        super().__init__()
        v, self.cfg = cfg.tower, cfg
        self.cls, self.pos = nn.Parameter(torch.empty(v.width)), nn.Parameter(torch.empty(v.grid**2 + 1, v.width))
        self.patch = nn.Linear(cfg.volume.patch_depth * v.patch_size**2 * 3, v.width, bias=False)
        self.pre_ln = nn.LayerNorm(v.width, eps=v.eps)
        for layer in range(v.executed):
            setattr(self, f"block_{layer}", VisionBlock(cfg, layer, parts))
        self.register_buffer("mean", torch.tensor(CLIP_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD), persistent=False)

    def forward(self, slices: torch.Tensor, t=None, group=None):
        """slices (B, S, H, W, 3) in 0..1 -> features (B, D, P, C), and the losses of each layer's experts."""
        v, depth, (batch, count) = self.cfg.tower, self.cfg.volume.patch_depth, slices.shape[:2]
        slabs, p = count // depth, v.patch_size
        x = ((slices - self.mean) / self.std).to(self.patch.weight.dtype)
        x = x.view(batch, slabs, depth, v.grid, p, v.grid, p, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
        x = self.patch(x.reshape(batch, slabs, v.grid**2, -1))
        x = self.pre_ln(torch.cat([self.cls.expand(batch, slabs, 1, -1), x], dim=2) + self.pos)
        r = self.cfg.volume.depth_rope
        turn = [a.to(x.dtype) for a in angles(slabs, r.base, r.rotary_dim, v.grid**2 + 1)]
        losses = []
        for layer in range(v.executed):
            x, one = getattr(self, f"block_{layer}")(x, turn, t, group)
            losses += [] if one is None else [one]
        return x[:, :, 1:], losses
