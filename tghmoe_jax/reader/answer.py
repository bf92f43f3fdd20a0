"""One answer: what a model says to one request, and what its reader must know as well."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import DISCLAIMER, evidence_plot, routing_plot
from tghmoe_jax.evaluation.evidence_plot import Evidence
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.reader.evidence import Falls
from tghmoe_jax.scans.scan import Scan


def no_load() -> np.ndarray:
    """The load of a request whose volume was not shown."""
    return np.zeros((0, 0, 0), np.float32)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says to one request.

    text: '' where only options were ranked. group: the expert group used, and task its name. task_probabilities
    {task: float} of the router, None with one group. likelihoods float32 (O,): mean log-likelihood per token of each of
    `options`. load float32 (layers, G, E): (token, choice) pairs sent to each expert. tokens_per_second: of generation
    alone. The rest is filled for a single scan or picture: blind_text is the answer to the same question without the
    volume; seconds: reading and answering, compilation included. falls and evidence, where asked for: what the answer
    rests on, in the model's grid and in the scan.
    """

    text: str = ""
    group: int = 0
    task: str = ""
    task_probabilities: dict[str, float] | None = None
    options: tuple[str, ...] = ()
    likelihoods: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    load: np.ndarray = dataclasses.field(default_factory=no_load, repr=False)
    tokens_per_second: float = 0.0
    blind_text: str = ""
    warnings: tuple[str, ...] = ()
    checkpoint: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    disclaimer: str = DISCLAIMER
    routing: RoutingMap | None = dataclasses.field(default=None, repr=False)
    scan: Scan | None = dataclasses.field(default=None, repr=False)
    falls: Falls | None = dataclasses.field(default=None, repr=False)
    evidence: Evidence | None = dataclasses.field(default=None, repr=False)

    @property
    def option_likelihoods(self) -> dict[str, float] | None:
        """{option: in 0..1}, the geometric mean over its tokens of their probabilities; None without options."""
        if not self.options:
            return None
        return {o: round(float(np.exp(value)), 6) for o, value in zip(self.options, self.likelihoods, strict=True)}

    @property
    def expert_load(self) -> dict[int, list[float]]:
        """{layer: share of each expert of the group used}."""
        pairs = zip(self.routing.layers, self.routing.load, strict=True) if self.routing else ()
        return {layer: [round(float(share), 4) for share in load] for layer, load in pairs}

    def to_json(self) -> dict[str, Any]:
        """The keys of `predict --json`."""
        names = ("text", "task", "task_probabilities", "option_likelihoods", "blind_text", "expert_load", "warnings",
                 "disclaimer", "checkpoint", "seconds", "tokens_per_second")  # fmt: skip
        record = {name: getattr(self, name) for name in names} | {"warnings": list(self.warnings)}
        if self.task_probabilities:
            record["task_probabilities"] = {task: round(share, 4) for task, share in self.task_probabilities.items()}
        if self.option_likelihoods is None:
            del record["option_likelihoods"]
        if self.evidence is not None:
            record["evidence"] = self.evidence.to_json()
        return record

    def __str__(self) -> str:
        """Text for a terminal: the answer, the warnings, where it comes from, the disclaimer."""
        details = []
        if self.option_likelihoods:
            ranked = sorted(self.option_likelihoods.items(), key=lambda item: -item[1])
            details.append("options     " + ", ".join(f"{option} {value:.3f}" for option, value in ranked))
        if self.checkpoint:  # of a run: a 2D base has neither experts nor a blind answer
            details += self._details()
        return printable("\n\n".join(filter(None, [self.text or "(no text)", "\n".join(details), self.disclaimer])))

    def _details(self) -> list[str]:
        shares = self.task_probabilities or {}
        routed = f" (router: {', '.join(f'{task} {share:.2f}' for task, share in shares.items())})" if shares else ""
        loads = (f"layer {layer}: {' '.join(f'{x:.2f}' for x in load)}" for layer, load in self.expert_load.items())
        return [
            f"task        {self.task}{routed}",
            "experts     " + ("; ".join(loads) or "none"),
            f"no volume   {self.blind_text or '(no text)'}",
            *([f"evidence    {self.evidence}"] if self.evidence else []),
            *(f"warning     {text}" for text in self.warnings),
            f"checkpoint  {self.checkpoint['name']} {self.checkpoint['digest']}, {self.seconds:.1f} s, "
            f"{self.tokens_per_second:.0f} tokens/s",
        ]

    def draw_routing(self, path: str | Path) -> None:
        """Writes the picture of `routing` as PNG. UserError where no layer has several experts."""
        if not self.routing or not self.routing.layers:
            name = self.checkpoint.get("name", "a 2D base")
            raise UserError(f"--routing has nothing to show: {name} has no experts; leave it out.")
        routing_plot.draw(path, self.routing, *self.scan.slices(), self._checkpoint_name)

    def draw_evidence(self, path: str | Path) -> None:
        """Writes the picture of `evidence` as PNG. UserError where it was not asked for."""
        if self.evidence is None:
            raise UserError("the answer has no evidence; ask with evidence=True.")
        evidence_plot.draw(path, self.evidence, self._checkpoint_name)

    @property
    def _checkpoint_name(self) -> str:
        return f"{self.checkpoint['name']} {self.checkpoint['digest']}"


def printable(text: str) -> str:
    """Text for a terminal: generated bytes may form its commands."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
