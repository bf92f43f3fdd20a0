"""Checks a new machine in ten minutes: each fast path against its oracle, on this hardware.

    python -m tghmoe_jax.selfcheck [--json]

Attention, the experts' grouped products, their transports over all devices, decoding with a cache, and the donated
training step are compared with plain implementations, values and gradients; each fast path is timed. Accelerators are
given the sizes of Phi-3-V, a CPU small ones. Of several hosts each checks its own devices. Exit codes: 0 all pass, 1
something does not.

Axis legend: B batch, T token, N head, H head size, C width, F hidden width, X experts, K choices.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tghmoe_jax.errors import CommandParser, command
from tghmoe_jax.models import generation
from tghmoe_jax.models.mllm import MLLM, variables
from tghmoe_jax.ops.activations import quick_gelu
from tghmoe_jax.ops.attention import Mask, attention
from tghmoe_jax.ops.experts import ExpertWeights, apply_experts
from tghmoe_jax.ops.platform import platform
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.tools import flops
from tghmoe_jax.tools.chips import chip_of
from tghmoe_jax.training import loading, program

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the distance over the oracle's norm


@dataclasses.dataclass(frozen=True)
class Check:
    """One fast path: the largest relative distance found, what is allowed, and its time (0: not timed).

    flops: useful ones of one device, for MFU where the chip's peak is known.
    """

    name: str
    distances: dict[str, float]
    tolerance: float
    seconds: float = 0.0
    flops: float = 0.0

    @property
    def passed(self) -> bool:
        return all(distance <= self.tolerance for distance in self.distances.values())  # NaN does not pass


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of the work of Phi-3-V is checked: the whole width on accelerators, less on a CPU."""

    dtype: str
    rows: int
    slab: int  # tokens of a slab
    slabs: int
    text: int  # positions of the decoder
    vision: tuple[int, int]  # N, H
    decoder: tuple[int, int]
    experts: tuple[int, int, int]  # T, C, F


FULL = Sizes("bfloat16", 2, 577, 16, 1917, (16, 64), (32, 96), (9232, 1024, 4096))
SMALL = Sizes("float32", 2, 65, 4, 150, (2, 16), (2, 24), (260, 32, 64))


@command
def main(argv: list[str]) -> int:
    """Runs the checks, prints a table, and returns the exit code."""
    parser = CommandParser(prog="python -m tghmoe_jax.selfcheck", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found = []
    for check in checks(SMALL if platform() == "cpu" else FULL):
        found.append(check)
        if not args.json:
            print(line(check), flush=True)
    device = jax.local_devices()[0]
    passed = all(check.passed for check in found)
    if args.json:
        rows = [dataclasses.asdict(c) | {"passed": c.passed, "mfu": mfu(c)} for c in found]
        result = {"device": device.device_kind, "devices": jax.local_device_count(), "passed": passed, "checks": rows}
        print(json.dumps(result, indent=1))
    else:
        failed = sum(not check.passed for check in found)
        verdict = "all pass" if passed else f"{failed} of {len(found)} FAIL: do not trust this machine with a run"
        print(f"{jax.local_device_count()} x {device.device_kind}: {verdict}")
    return 0 if passed else 1


def checks(sizes: Sizes) -> Iterator[Check]:
    """Every check in turn."""
    rng = np.random.default_rng(0)
    (n, h), (dn, dh) = sizes.vision, sizes.decoder
    volume, valid = sizes.slab * sizes.slabs, np.ones((sizes.rows, sizes.slab * sizes.slabs), bool)
    valid[0, -sizes.slab :] = False  # a padded slab
    text = np.ones((sizes.rows, sizes.text), bool)
    text[0, -9:] = False
    yield check_attention("attention within a slab", rng, sizes, sizes.slabs * sizes.rows, sizes.slab, n, h, Mask())
    yield check_attention("attention over a volume", rng, sizes, sizes.rows, volume, n, h, Mask(key_valid=valid))
    window = Mask(key_valid=valid, slice_tokens=sizes.slab, window=1)
    yield check_attention("attention in a window", rng, sizes, sizes.rows, volume, n, h, window)
    causal = Mask(key_valid=text, causal=True)
    yield check_attention("attention of the decoder", rng, sizes, sizes.rows, sizes.text, dn, dh, causal)
    yield from check_experts(rng, sizes)
    yield from check_reader()


# ---- operations ------------------------------------------------------------------------------------------------------


def compare(name: str, sizes: Sizes, fast: Callable, oracle: Callable, inputs: dict, useful: float) -> Check:
    """Values and gradients of fast(inputs) in the compute dtype against oracle(inputs) in full float32."""
    shape = jax.eval_shape(oracle, inputs)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape.shape), jnp.float32)

    def both(function, precision=None):
        def total(inputs):
            out = function(inputs).astype(jnp.float32)
            return jnp.sum(out * cotangent), out

        with jax.default_matmul_precision(precision):
            return jax.jit(jax.grad(total, has_aux=True))

    narrow = jax.tree.map(lambda x: x.astype(sizes.dtype), inputs)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)  # the same numbers, so that only arithmetic differs
    with jax.default_matmul_precision("highest"):
        expected_gradient, expected = both(oracle, "highest")(wide)
    run = both(fast)
    gradient, found = run(narrow)
    distances = {"value": distance(found, expected)}
    distances |= {f"d {key}": distance(gradient[key], expected_gradient[key]) for key in gradient}
    return Check(name, distances, TOLERANCE[sizes.dtype], seconds(run, narrow), useful)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def check_attention(name, rng, sizes: Sizes, batch: int, length: int, heads: int, size: int, mask: Mask) -> Check:
    backend = {"tpu": "splash", "gpu": "cudnn"}.get(platform(), "blocked")
    block = 24 if backend == "blocked" else 0  # several blocks, the last of them filled up
    qkv = {key: normal(rng, batch, length, heads, size) for key in "qkv"}
    window = (mask.slice_tokens, mask.window) if mask.slice_tokens else None
    pairs, _, _ = flops.attention_pairs(length, length, "plain", mask.causal, window)
    useful = 3 * 4.0 * pairs * size * heads * batch  # forward once, backward twice
    seen = mask.key_valid
    # A query in padding may see no key at all, and nobody reads it.
    keep = 1.0 if seen is None else jnp.asarray(seen, jnp.float32)[:, :, None, None]
    # All scores of a volume in float32 would fill a chip, so there the blocked arithmetic that a CPU has checked.
    oracle = "plain" if backend == "blocked" else "blocked"
    return compare(
        f"{name} ({backend})", sizes, lambda x: keep * attention(**x, mask=mask, backend=backend, block=block),
        lambda x: keep * attention(**x, mask=mask, backend=oracle), qkv, useful,
    )  # fmt: skip


def check_experts(rng, sizes: Sizes) -> Iterator[Check]:
    """Each dispatch against computing every expert for every token; balanced routing, so that none is dropped."""
    (tokens, width, hidden), experts, top_k = sizes.experts, 8, 2
    base = np.arange(tokens) % experts
    choice = jnp.asarray(np.stack([base, (base + 1 + np.arange(tokens) // experts % (experts - 1)) % experts], 1))
    inputs = {
        "x": normal(rng, tokens, width),
        "gate": jax.nn.softmax(normal(rng, tokens, top_k)),
        "fc1": normal(rng, experts, width, hidden) / width**0.5,
        "fc1_bias": normal(rng, experts, hidden) / 9,
        "fc2": normal(rng, experts, hidden, width) / hidden**0.5,
        "fc2_bias": normal(rng, experts, width) / 9,
    }

    def run(dispatch):
        def experts_of(inputs):
            weights = ExpertWeights(*(inputs[key] for key in ExpertWeights._fields))
            y, _ = apply_experts(inputs["x"], choice, inputs["gate"], weights, quick_gelu, dispatch, 1.25)
            return y

        return experts_of

    useful = 3 * 4.0 * tokens * top_k * width * hidden
    for dispatch in ("ragged", "capacity"):
        yield compare(f"experts, {dispatch} products", sizes, run(dispatch), run("dense"), inputs, useful)


# ---- the whole model -------------------------------------------------------------------------------------------------


def check_reader() -> Iterator[Check]:
    """Decoding and training of the embedded reader, on all devices where one of them is the oracle."""
    loaded = loading.load_run("embedded", "selfcheck")
    model = generation.inference(loaded.model)
    batch = random_batch(loading.batch_shapes(loaded.config["data"], 2), model, seed=2)
    with jax.default_matmul_precision("highest"):
        yield check_decoding(model, loaded.params, batch)
    yield check_step(loaded)


def random_batch(shapes: dict, model: MLLM, seed: int) -> dict[str, np.ndarray]:
    """A batch of these shapes [..., R, T]: noise to look at, text of different lengths that ends in an answer."""
    rng = np.random.default_rng(seed)
    batch = {key: np.ones(s.shape, s.dtype) for key, s in shapes.items()}
    batch["slices"] = rng.integers(0, 255, shapes["slices"].shape, np.uint8)
    batch["tokens"] = rng.integers(5, 500, shapes["tokens"].shape).astype(np.int32)
    length = shapes["tokens"].shape[-1]
    ends = length - rng.integers(0, 5, (*shapes["task"].shape, 1))
    place, prefix = np.arange(length), model.cfg.prefix_length
    batch["token_mask"] = place < ends
    batch["loss_mask"] = batch["token_mask"] & (place >= ends - 6)
    batch["question_mask"] = (place > prefix) & (place < ends - 7)
    batch["task"] = (np.arange(shapes["task"].size) % len(model.cfg.tasks)).reshape(shapes["task"].shape)
    return batch


def check_decoding(model: MLLM, params: dict, batch: dict) -> Check:
    """Logits of prefill and of every decoded token against one forward pass over the whole text."""
    leaves, new = variables(jax.device_put(params)), 6  # answer tokens
    start = int(np.min(batch["token_mask"].sum(-1))) - new  # of the answer, the same in every row
    encoded = generation.encode(model, leaves, batch, jnp.zeros(len(batch["task"]), jnp.int32))
    whole = jax.jit(lambda *a: model.apply(leaves, *a, method=MLLM.text_logits))
    expected = whole(batch, encoded.tokens, encoded.mask)
    prompt = batch | {"token_mask": np.broadcast_to(np.arange(batch["tokens"].shape[1]) < start, batch["tokens"].shape)}
    prefill = jax.jit(lambda *a: model.apply(leaves, *a, new, method=MLLM.prefill))
    logits, cache = prefill(prompt, encoded.tokens, encoded.mask)
    slots = cache.valid.shape[1]
    decode = jax.jit(lambda token, cache: model.apply(leaves, token, cache, slots, method=MLLM.decode))
    worst, at = 0.0, start - model.cfg.prefix_length - 1  # of `expected`, the position that predicts the answer
    for step in range(new):
        worst = max(worst, distance(logits, expected[:, at + step]))
        logits, cache = decode(jnp.asarray(batch["tokens"][:, start + step]), cache)
    one = seconds(decode, jnp.asarray(batch["tokens"][:, 0]), cache)
    return Check("decoding with a cache", {"logits": worst}, 1e-3, one)


def check_step(loaded: loading.LoadedRun) -> Check:
    """Two donated steps of stage 2 as it is trained, on all devices, against the same arithmetic written out on one.

    The oracle computes every expert for every token and every score, and keeps every activation. What is compared is
    the loss of both steps and how far the first moved the parameters.
    """
    config = ConfigDict(loaded.config)
    config.model.aux_findings = False
    config.train.accumulate = 2
    config.optimizer.name, config.optimizer.eps = "adamw", 1e-3  # a step in proportion to the gradient
    config.train.batch = 2 * jax.local_device_count() * sum(config.data.mixture.values())
    slow = {"remat": "none", "attention": "plain", "tgh": {"dispatch": "dense"}}
    groups, experts = loaded.model.cfg.tgh.groups, loaded.model.cfg.tgh.experts
    room = {"transport": "all_to_all", "capacity_factor": float(groups * experts)}  # so that nothing is dropped
    fast = {"remat": "full", "attention": "auto", "tgh": {"dispatch": "ragged", **room}}
    expected = run_steps(loaded, config, slow, jax.local_devices()[:1])
    found = run_steps(loaded, config, fast, jax.local_devices())
    distances = {
        "loss": distance(found.losses, expected.losses), "update": distance(found.moved, expected.moved),
        "not donated": float(not found.donated),
    }  # fmt: skip
    mesh = " x ".join(map(str, found.mesh))
    return Check(f"donated training step on {mesh} devices", distances, 1e-3, found.seconds, found.flops)


@dataclasses.dataclass(frozen=True)
class Steps:
    """What two steps did: both losses, the movement of all trained parameters in one vector, FLOPs of a device."""

    mesh: tuple[int, ...]
    losses: np.ndarray
    moved: np.ndarray
    donated: bool
    seconds: float
    flops: float


def run_steps(loaded: loading.LoadedRun, config: ConfigDict, way: dict, devices: list) -> Steps:
    """Two steps of the run's own parameters, the model's arithmetic changed to `way`, on a mesh of these devices."""
    cfg = loaded.model.cfg.with_tgh(**way["tgh"])
    model = MLLM(dataclasses.replace(cfg, aux_labels=(), **{key: way[key] for key in ("remat", "attention")}))
    mesh = make_mesh(-1, 1, 2 if len(devices) % 2 == 0 else 1, devices)
    # In full float32, so that what differs is the program and not a TPU's way to multiply.
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        one = program.build(config, model, program.batch_spec(config, mesh), mesh)
        placed = {
            p: jax.device_put(np.asarray(loaded.params[p], s.dtype), one.shardings[p]) for p, s in one.shapes.items()
        }
        state, step, shapes = one.state(placed), one.step(), one.batch_shapes()
        before = {p: np.asarray(leaf, np.float64) for p, leaf in state.trained.items()}
        drawn = random_batch(shapes, model, seed=3)
        batch = {key: jax.device_put(value, shapes[key].sharding) for key, value in drawn.items()}
        old = state
        state, first = step(old, batch)
        donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(old.trained))
        moved = np.concatenate([(np.asarray(state.trained[p], np.float64) - before[p]).ravel() for p in sorted(before)])
        start = time.perf_counter()
        state, second = jax.block_until_ready(step(state, batch))
        spent = time.perf_counter() - start
    text, slices = config.data.text_length, config.data.slices
    sample = flops.train_sample(model.cfg, one.shapes, one.trains, slices, text, "splash")
    losses = np.array([first["loss"], second["loss"]])
    return Steps(mesh.axis_sizes, losses, moved, donated, spent, sample.useful * config.train.batch / len(devices))


# ---- measuring -------------------------------------------------------------------------------------------------------


def distance(found, expected) -> float:
    """|found - expected| / |expected| in the Euclidean norm."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def seconds(function: Callable, *args) -> float:
    """Median time of five runs of a function that is compiled already."""
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def mfu(check: Check) -> float | None:
    """Useful FLOP/s over the chip's peak; None where that is not known."""
    chip = chip_of(jax.local_devices()[0])
    return check.flops / check.seconds / chip.peak if chip and check.flops and check.seconds else None


def line(check: Check) -> str:
    """One row of the table."""
    worst = max(check.distances, key=lambda key: check.distances[key])
    speed = f"{check.seconds * 1e3:9.2f} ms" if check.seconds else " " * 12
    if check.flops and check.seconds:
        share = mfu(check)
        speed += f" {check.flops / check.seconds / 1e12:8.3f} TFLOP/s" + (f" {share:4.0%} MFU" if share else "")
    verdict = "pass" if check.passed else "FAIL"
    return f"{verdict}  {check.name:44} {check.distances[worst]:.1e} <= {check.tolerance:.0e} ({worst}) {speed}"
