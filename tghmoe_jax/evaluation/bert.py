"""BERTScore from a model folder on this machine, by the library `bert_score`; nothing is downloaded.

M3D's numbers take roberta-large at layer 17 without baseline rescaling: give that folder and that layer.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from tghmoe_jax import untrusted
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import provenance
from tghmoe_jax.evaluation.metrics import METRICS
from tghmoe_jax.evaluation.protocols import Prediction, Run

LAYERS = 17  # of roberta-large, which the library takes for English


@dataclasses.dataclass(frozen=True)
class BertModel:
    """A BERTScore model: its folder and the layer whose outputs are compared. UserError without such a model."""

    folder: Path
    layers: int = LAYERS

    def __post_init__(self):
        try:
            config = self.config
            depth, _ = int(config["num_hidden_layers"]), int(config["max_position_embeddings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--bert-model {self.folder} holds no model with a config.json; name a model's folder on this machine."
            ) from error
        if not any(self.folder.glob("*.safetensors")):  # pickled weights are never loaded
            raise UserError(f"--bert-model {self.folder} holds no safetensors weights; convert it to safetensors.")
        if "auto_map" in config:
            raise UserError(f"--bert-model {self.folder} needs custom code, which is never run; name another model.")
        if not 1 <= self.layers <= depth:
            raise UserError(f"--bert-layers {self.layers} must lie in 1 to {depth}, the layers of {self.folder}.")

    @property
    def config(self) -> dict:
        """The model's own config.json."""
        return untrusted.read_json(self.folder / "config.json", {})

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, in the order of their file names."""
        return provenance.digest(*sorted(self.folder.glob("*.safetensors")))


def add(runs: Mapping[str, Run], model: BertModel) -> dict[str, dict[str, list[Prediction]]]:
    """The runs with `bert_f1` filled in for open questions and reports; an empty output or reference scores 0."""
    try:
        from bert_score import BERTScorer
    except ImportError as error:
        raise UserError("--bert-model needs bert_score and torch; run `pip install bert-score torch`.") from error
    scorer = BERTScorer(model_type=str(model.folder.resolve()), num_layers=model.layers, device="cpu")
    # A tokeniser without a stated length would not truncate; RoBERTa reserves two positions.
    tokenizer = scorer._tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config["max_position_embeddings"] - 2)
    scored = {}
    for name, run in runs.items():
        scored[name] = dict(run)
        for kind in (kind for kind, name in METRICS if name == "bert_f1"):
            ones = list(run.get(kind, ()))
            pairs = [(one.output.strip(), one.answer.strip()) for one in ones]
            real = list(dict.fromkeys(pair for pair in pairs if all(pair)))
            values = scorer.score(*map(list, zip(*real, strict=True)))[2].tolist() if real else []
            known = dict(zip(real, values, strict=True))
            if ones:
                scored[name][kind] = [
                    dataclasses.replace(one, bert_f1=float(known.get(pair, 0.0)))
                    for one, pair in zip(ones, pairs, strict=True)
                ]
    return scored
