"""A step of the embedded model as `main` takes it, at its real batch and optimiser, against a plain torch module.

Stage 1 with dense FFNs in all layers, stage 1 with its experts (a loop over experts on the other side, which drops what
exceeds a capacity just as this project does), and stage 2 from the embedded reader. The losses of the first steps of
both, from the same weights on the same batch, must agree: the optimiser is compared with them.
"""

import dataclasses
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import models
from benchmarks.measure import Row, alternate, better, must_agree, prepare_torch
from tghmoe_jax import evaluate, train
from tghmoe_jax.bases.base import tokenizer_of
from tghmoe_jax.datasets.sources import make_source
from tghmoe_jax.models import leaf_names
from tghmoe_jax.samples import pipeline
from tghmoe_jax.sharding import arrays
from tghmoe_jax.sharding.mesh import simulate_devices
from tghmoe_jax.tools import flops
from tghmoe_jax.training import heap, memory, optimizer
from tghmoe_jax.training.program import Program, batch_spec, build, build_model
from tghmoe_jax.training.step import TrainState

# (name, stage, with experts, bound)
ROWS = (("stage 1, dense", 1, False, 1.0), ("stage 1, MoE", 1, True, 1.0), ("stage 2, MoE", 2, True, 1.0))
STEPS = 3  # whose losses are compared
TOLERANCE = (1e-4, 1e-3, 1e-2)  # of each: rounding grows, and may send a token to another expert
VOLUMES = 32
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 1024, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    "vision_config": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
        "patch_size": 8,
    },
}  # fmt: skip


@dataclasses.dataclass
class Training:
    """A program with its state and one batch [A, R, ...], on the devices and on the host."""

    config: ConfigDict
    program: Program
    state: TrainState
    batch: dict
    host_batch: dict[str, np.ndarray]


def prepared(stage: int, experts: bool, small: bool, volumes: str) -> Training:
    """What `train.run` has made before its first step; `volumes` is a folder for the drawn ones."""
    config = models.experiment(f"stage{stage}.py")
    config.data.update({"root": volumes, "volumes": VOLUMES})
    config.init_from = "embedded" if stage == 2 else ""
    if small:
        config.base, config.init_from, config.base_config = "", "", ConfigDict(SMALL)
        config.data.update({"slices": 8, "size": 32})
        config.model.update({"patch_depth": 2, "attn3d_layers": (0,)})
        config.model.tgh.update({"layers": (0,), "hidden": 24})
        config.model.depth_rope.rotary_dim = 8
    if not experts:
        config.model.tgh.layers = ()
    simulate_devices()
    origin = train.load_origin(config)
    origin = dataclasses.replace(origin, new=(*origin.new, r"aux_head/.+"))  # which the embedded reader has no more
    tokenizer = tokenizer_of(origin.tokenizer, origin.config)
    mesh = evaluate.open_mesh(config, config.model.tgh.experts)
    spec = batch_spec(config, mesh)
    source = make_source(config.data, "train", config.data.volumes)
    model = build_model(config, origin.config, source.aux_names, tokenizer, spec.task_shares)
    program = build(config, model, spec, mesh)
    loaded, fresh, _ = train.assemble(origin, program.shapes, config.model.inflation)
    columns = range(spec.columns)
    batch = pipeline.TrainBatches(source, tokenizer, spec, config.train.seed, columns, model.cfg.cell).map(0)
    placed = arrays.from_local(batch, program.batch_sharding, 1, spec.columns, columns)
    return Training(config, program, train.initial_state(program, loaded, fresh), placed, batch)


def run(small: bool, runs: int) -> list[Row]:
    heap.keep_freed_memory()  # before torch starts threads
    prepare_torch(small)
    rows = []
    with tempfile.TemporaryDirectory() as volumes:
        for name, stage, experts, bound in ROWS[::2] if small else ROWS:  # small: those that share least
            training = prepared(stage, experts, small, volumes)
            own = leaf_names.to_canonical({path: np.asarray(leaf) for path, leaf in training.state.params.items()})
            ours, theirs = our_step(training), Peer(training, own)
            losses = [(ours(), theirs.step()) for _ in range(STEPS)]
            off = [must_agree(f"loss of step {i}, {name}", *pair, TOLERANCE[i]) for i, pair in enumerate(losses)]
            ways = {"eager": theirs.step}
            if not small:
                ways["torch.compile"] = theirs.compiled_step
            best, way, tried = better(ways)
            heap.leave_fragments()  # of torch's compiler, which no run has in its process
            times = alternate(ours, way, runs)
            cfg, program = training.program.model.cfg, training.program
            work = flops.train_sample(
                cfg, program.shapes, program.trains, training.config.data.slices, training.config.data.text_length,
                "plain",
            )  # fmt: skip
            rows.append(Row(
                name, *times, bound, work=[(work.useful * training.config.train.batch, 0.0)],
                notes={"losses": losses, "difference": off, "peer": best, "tried": tried,
                       "devices": training.program.mesh.size},
            ))  # fmt: skip
    return rows


def our_step(training: Training) -> Callable[[], float]:
    """One step after another from the state, which is donated; each gives its loss. Compiled as `train` does."""
    step, held = training.program.step(recall=True), [training.state]
    step = memory.fitting("train", step, training.state, training.batch)
    heap.leave_fragments()

    def one() -> float:
        held[0], scalars = step(held[0], training.batch)
        jax.block_until_ready(held[0])
        return float(scalars["loss"])

    return one


class Peer:
    """The same training in torch."""

    def __init__(self, training: Training, leaves: dict[str, np.ndarray]):
        import torch  # not in the processes of `compile`, which take a step alone

        from benchmarks import torch_mllm
        from benchmarks.torch_peers import leaf_name, load

        program, self.cfg = training.program, training.config.optimizer
        self.model = torch_mllm.Mllm(program.model.cfg, program.mesh.size, program.weights)
        load(self.model, leaves)
        self.batch = {key: torch.from_numpy(value[0]) for key, value in training.host_batch.items()}
        assert self.batch["slice_mask"].all() and self.batch["image_visible"].all()  # the peer has no mask of slices
        self.batch["tokens"], self.batch["task"] = (self.batch[key].long() for key in ("tokens", "task"))
        trains = {name: on for path, on in program.trains.items() for name in leaf_names.canonical_names(path)}
        matrices, rest = [], []
        for name, parameter in self.model.named_parameters():
            leaf = leaf_name(name, self.model)
            parameter.requires_grad_(trains[leaf])
            if trains[leaf]:
                matrix = any(leaf_names.matches(pattern, leaf) for pattern, _ in optimizer.MATRICES)
                (matrices if matrix else rest).append(parameter)
        self.muon, self.trained = torch_mllm.Muon(matrices), [*matrices, *rest]
        self.adam = torch.optim.Adam(rest, betas=(self.cfg.b1, self.cfg.b2), eps=self.cfg.eps, fused=True)
        self.rate = optimizer.schedule(self.cfg, training.config.train.steps)
        self.clip = lambda: torch.nn.utils.clip_grad_norm_(self.trained, self.cfg.clip)
        self.compiled = torch.compile(self.model)
        self.steps = 0

    def step(self) -> float:
        return self._step(self.model)

    def compiled_step(self) -> float:
        return self._step(self.compiled)

    def _step(self, model) -> float:
        loss = model(self.batch)
        loss.backward()
        self.clip()
        rate = float(self.rate(self.steps))
        self.adam.param_groups[0]["lr"] = rate
        self.muon.step(rate)
        self.adam.step()
        for parameter in self.trained:
            parameter.grad = None
        self.steps += 1
        return loss.item()
