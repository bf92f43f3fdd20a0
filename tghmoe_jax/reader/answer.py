"""One answer: the model's text for one request, and what a person who reads it must know."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import DISCLAIMER, closed, evidence_plot, routing_plot
from tghmoe_jax.evaluation.evidence_plot import Evidence
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.evaluation.statistics import wilson
from tghmoe_jax.reader.evidence import Falls
from tghmoe_jax.scans.scan import Scan

LIKELIHOODS = "of each option alone, per token, with the options not shown: they do not add up to 1"


def no_load() -> np.ndarray:
    """The load of a request whose volume was not shown."""
    return np.zeros((0, 0, 0), np.float32)


@dataclasses.dataclass(frozen=True)
class Confidence:
    """How often answers like this one were right on validation questions: `right` of `items` of about this `value`.

    value: None where no number is given, and `why`. min_accuracy: what was asked for, None for nothing; `least` the
    confidence from which on validation answers reached it, None where none did.
    """

    value: float | None = None
    right: int = 0
    items: int = 0
    why: str = ""
    min_accuracy: float | None = None
    least: float | None = None

    @property
    def enough(self) -> bool:
        """Whether the answer reaches the accuracy that was asked for."""
        if self.min_accuracy is None:
            return True
        return self.value is not None and self.least is not None and self.value >= self.least

    def to_json(self) -> dict[str, Any]:
        if self.value is None:
            return {"value": None, "why": self.why}
        low, high = wilson(self.right, self.items)
        record = {"value": round(self.value, 4), "validation_right": self.right, "validation_items": self.items}
        return record | {"validation_ci95": [round(low, 3), round(high, 3)]}

    def __str__(self) -> str:
        if self.value is None:
            return f"none: {self.why}"
        low, high = wilson(self.right, self.items)
        shown = f"{self.value:.2f}" if self.value < 0.99 else f"{self.value:.3f}"  # 1.00 would be a promise
        return (
            f"{shown} (right in {self.right / self.items:.0%} [{100 * low:.0f}, {100 * high:.0f}] of "
            f"{self.items} validation questions answered with about this confidence)"
        )

    def refusal(self) -> str:
        """What stands in place of an answer that is not sure enough."""
        if self.value is None:
            return f"not confident enough: {self.why}"
        if self.least is None:
            return f"not confident enough: no validation answers were right in {self.min_accuracy:.0%}"
        return (
            f"not confident enough: {self.value:.2f}, where answers from {self.least:.2f} on were right in "
            f"{self.min_accuracy:.0%} of the validation questions"
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says to one request.

    text: '' where only options were ranked. group: the expert group used, and task its name. task_probabilities
    {task: float} of the router, None with one group. likelihoods float32 (O,): mean log-likelihood per token of each of
    `options`. load float32 (layers, G, E): (token, choice) pairs sent to each expert. cut: whether the text
    ends at its limit. The rest is filled for a single scan or picture: blind_text is the answer to the same question
    without the volume; confidence None where the kind of question has none; seconds: reading and answering, compilation
    included. falls and evidence, where asked for: what the answer rests on, in the model's grid and in the scan.
    """

    text: str = ""
    group: int = 0
    task: str = ""
    task_probabilities: dict[str, float] | None = None
    options: tuple[str, ...] = ()
    likelihoods: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    load: np.ndarray = dataclasses.field(default_factory=no_load, repr=False)
    cut: bool = False
    blind_text: str = ""
    confidence: Confidence | None = None
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

    def faults(self, choices: Sequence[str], new_tokens: int) -> list[str]:
        """Warnings of a text that is incomplete, or no choice where it should be one."""
        found = []
        if self.cut:
            found.append(
                f"length: the text ends at the limit of {new_tokens} tokens, so its end is missing (--new-tokens)"
            )
        if choices and (fault := closed.disagreement(self.text, choices)):
            fault = "its letter and its text disagree" if fault.startswith("letter") else "it is none of the choices"
            found.append(f"answer: {fault}, so count it as no answer (the likelihoods of the options stand beside it)")
        return found

    def to_json(self) -> dict[str, Any]:
        """The keys of `predict --json`."""
        names = ("text", "task", "task_probabilities", "option_likelihoods", "blind_text", "expert_load", "warnings",
                 "disclaimer", "checkpoint", "seconds")  # fmt: skip
        record = {name: getattr(self, name) for name in names} | {"warnings": list(self.warnings)}
        if self.task_probabilities:
            record["task_probabilities"] = {task: round(share, 4) for task, share in self.task_probabilities.items()}
        if self.option_likelihoods is None:
            del record["option_likelihoods"]
        else:
            record["option_likelihoods_are"] = LIKELIHOODS
        if self.confidence:
            asked = self.confidence.min_accuracy is not None
            record["confidence"] = self.confidence.to_json()
            record["confident_enough"] = self.confidence.enough if asked else None
        if self.evidence is not None:
            record["evidence"] = self.evidence.to_json()
        return record

    def __str__(self) -> str:
        """Text for a terminal: the answer, the warnings, where it comes from, the disclaimer."""
        details = []
        if self.option_likelihoods:
            ranked = sorted(self.option_likelihoods.items(), key=lambda item: -item[1])
            details.append("options     " + ", ".join(f"{option} {value:.3f}" for option, value in ranked))
            details.append(f"            ({LIKELIHOODS})")
        details += [f"warning     {text}" for text in self.warnings]
        if self.checkpoint:  # of a run: a 2D base has neither experts nor a blind answer
            details += self._details()
        sure = self.confidence is None or self.confidence.enough
        said = self.text or "(no text)" if sure else self.confidence.refusal()
        return printable("\n\n".join(filter(None, [said, "\n".join(details), self.disclaimer])))

    def _details(self) -> list[str]:
        shares = self.task_probabilities or {}
        routed = f" (router: {', '.join(f'{task} {share:.2f}' for task, share in shares.items())})" if shares else ""
        loads = (f"layer {layer}: {' '.join(f'{x:.2f}' for x in load)}" for layer, load in self.expert_load.items())
        return [
            *([f"confidence  {self.confidence}"] if self.confidence else []),
            f"task        {self.task}{routed}",
            "experts     " + ("; ".join(loads) or "none"),
            f"no volume   {self.blind_text or '(no text)'}",
            *([f"evidence    {self.evidence}"] if self.evidence else []),
            f"checkpoint  {self.checkpoint['name']} {self.checkpoint['digest']}, {self.seconds:.1f} s",
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
