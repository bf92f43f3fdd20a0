"""The rest of the model in plain torch, its training loss and its optimiser: the peer of the case `train_step`.

Axis legend: B batch, T token, W decoder width, L visual token, V view, A auxiliary label.
"""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torch_peers import Attention, Tower, angles
from tghmoe_jax.models.config import Model
from tghmoe_jax.models.mllm import AuxHead as OurAuxHead
from tghmoe_jax.training.losses import LossWeights
from tghmoe_jax.training.optimizer import ADAM_RMS

Batch = dict[str, torch.Tensor]


class GatedMlp(nn.Module):
    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, ffn, bias=False) for _ in "gu")
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderBlock(nn.Module):
    def __init__(self, cfg: Model):
        super().__init__()
        d = cfg.decoder
        self.attn_norm, self.mlp_norm = (nn.RMSNorm(d.width, eps=d.eps) for _ in "am")
        self.attn = Attention(d.width, d.heads, d.kv_heads, d.head_size, bias=False)
        self.mlp = GatedMlp(d.width, d.ffn)

    def forward(self, x: torch.Tensor, turn) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), turn, causal=True)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, cfg: Model):
        super().__init__()
        d = self.cfg = cfg.decoder
        self.embed = nn.Embedding(d.vocab, d.width)
        for layer in range(d.layers):
            setattr(self, f"block_{layer}", DecoderBlock(cfg))
        self.final_norm, self.lm_head = nn.RMSNorm(d.width, eps=d.eps), nn.Linear(d.width, d.vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, W), all of it valid but for what pads its end -> the last hidden states."""
        turn = angles(x.shape[1], self.cfg.ropes[0].theta, self.cfg.head_size)
        for layer in range(self.cfg.layers):
            x = getattr(self, f"block_{layer}")(x, turn)
        return self.final_norm(x)


class Connector(nn.Module):
    """2 x 2 patches joined, a newline after each row, the views of all slabs, a separator, and their mean."""

    def __init__(self, cfg: Model):
        super().__init__()
        width, self.grid = 4 * cfg.tower.width, cfg.tower.grid
        self.sub_newline, self.glb_newline = (nn.Parameter(torch.empty(width)) for _ in "sg")
        self.fc1, self.fc2 = nn.Linear(width, cfg.decoder.width), nn.Linear(cfg.decoder.width, cfg.decoder.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, D, P, C) -> (B, L, W)."""
        x = torch.cat([self.rows(x), self.glb_newline.expand(len(x), 1, -1), self.rows(x.mean(1, keepdim=True))], dim=1)
        return self.fc2(F.gelu(self.fc1(x)))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        batch, views, _, width = x.shape
        side = self.grid // 2
        x = x.view(batch, views, side, 2, side, 2, width).transpose(3, 4).reshape(batch, views, side, side, 4 * width)
        return torch.cat([x, self.sub_newline.expand(batch, views, side, 1, -1)], dim=3).flatten(1, 3)


class TaskRouter(nn.Module):
    def __init__(self, cfg: Model):
        super().__init__()
        self.ln, self.proj = nn.LayerNorm(cfg.decoder.width), nn.Linear(cfg.decoder.width, cfg.tgh.hidden)
        if cfg.tgh.groups > 1:
            self.head = nn.Linear(cfg.tgh.hidden, len(cfg.tasks))


class AuxHead(nn.Module):
    """A label is stated by a visual token along its words (tghmoe_jax/models/mllm.py, AuxHead)."""

    def __init__(self, cfg: Model):
        super().__init__()
        labels = len(cfg.aux_labels)
        self.scale, self.bias = nn.Parameter(torch.empty(2, labels)), nn.Parameter(torch.empty(labels))
        longest = max(map(len, cfg.aux_labels))
        ids = torch.tensor([[*label, *[-1] * (longest - len(label))] for label in cfg.aux_labels])
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, tokens: torch.Tensor, cells: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """tokens (B, L, W); cells bool (B, V, R, C, A); table: word embeddings -> logits (B, A)."""
        phrases = (table.detach()[self.ids.clamp(min=0)] * (self.ids >= 0)[..., None]).sum(1)
        unit = lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()  # noqa: E731
        cosine = unit(tokens) @ unit(phrases).T
        confined = self.tokens_of(cells)
        confined = torch.where(confined.any(1, keepdim=True), confined, True)
        sharp = OurAuxHead.SHARP
        soft = torch.where(confined, sharp * cosine, -1e4).logsumexp(1) / sharp
        return OurAuxHead.GAIN * (self.scale[0] * cosine.mean(1) + F.softplus(self.scale[1]) * soft + self.bias)

    @staticmethod
    def tokens_of(cells: torch.Tensor) -> torch.Tensor:
        """The visual tokens (B, L, A) of cells; separators stand for all cells, the last view for whole columns."""
        everywhere = cells.all(3, keepdim=True).all(2, keepdim=True).all(1, keepdim=True)

        def rows(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, everywhere.expand(-1, x.shape[1], x.shape[2], 1, -1)], dim=3).flatten(1, 3)

        return torch.cat([rows(cells), everywhere[:, 0, 0], rows(cells.any(1, keepdim=True))], dim=1)


class Mllm(nn.Module):
    """The whole model with its training loss; what the first layers above the feature layer hold is left out."""

    def __init__(self, cfg: Model, parts: int, weights: LossWeights):
        super().__init__()
        self.cfg, self.weights = cfg, weights
        self.vision, self.connector, self.decoder = Tower(cfg, parts), Connector(cfg), Decoder(cfg)
        self.task_router, self.aux_head = TaskRouter(cfg), AuxHead(cfg)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The training loss () of a batch with the keys of samples/pipeline.py, each [R, ...]."""
        cfg, w, prefix = self.cfg, self.weights, self.cfg.prefix_length
        tokens, task = batch["tokens"], batch["task"]
        text = self.decoder.embed(tokens)
        asked = batch["question_mask"][..., None]
        question = (text.detach() * asked).sum(1) / asked.sum(1).clamp(min=1)
        router = self.task_router
        t = F.gelu(router.proj(router.ln(question)))
        group = task if cfg.tgh.groups > 1 else torch.zeros_like(task)
        features, losses = self.vision(batch["slices"].float() / 255, t, group)
        visual = self.connector(features)
        hidden = self.decoder(torch.cat([text[:, :prefix], visual, text[:, prefix:]], dim=1))
        logits = self.decoder.lm_head(hidden[:, prefix + visual.shape[1] : -1])

        mask = batch["loss_mask"][:, prefix:].float()
        weight = mask[:, 1:] + (w.first_token - 1) * mask[:, 1:] * (1 - mask[:, :-1])
        weight = weight * torch.tensor(w.task)[task][:, None]
        nll = F.cross_entropy(logits.transpose(1, 2), tokens[:, prefix + 1 :], reduction="none")
        total = (nll * weight).sum() / weight.sum()
        if losses:
            balance, z = torch.stack(losses).mean(0)
            total = total + w.balance * balance + w.z * z
        if cfg.tgh.groups > 1:
            total = total + w.router * F.cross_entropy(router.head(t), task)
        stated = self.aux_head(visual, batch["aux_cells"], self.decoder.embed.weight)
        return total + w.aux * F.binary_cross_entropy_with_logits(stated, batch["aux"])


class Muon:
    """Muon with Nesterov momentum in fp32, as optax has it; matrices of one shape are orthogonalised together.

    torch.optim.Muon takes them one by one and rounds to bf16.
    """

    COEFFICIENTS, BETA = (3.4445, -4.7750, 2.0315), 0.95

    def __init__(self, parameters: list[nn.Parameter]):
        shapes = {p.shape for p in parameters}
        self.groups = [[p for p in parameters if p.shape == shape] for shape in sorted(shapes)]
        self.momenta = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.steps += 1
        a, b, c = self.COEFFICIENTS
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            g = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
            momentum.lerp_(g, 1 - self.BETA)
            x = momentum * (self.BETA / (1 - self.BETA ** (self.steps + 1)))
            x.add_(g, alpha=(1 - self.BETA) / (1 - self.BETA**self.steps))
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-8)
            for _ in range(5):
                square = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
            scale = -rate * ADAM_RMS * max(x.shape[1:]) ** 0.5
            torch._foreach_add_(group, list((x.mT if tall else x).unbind()), alpha=scale)
