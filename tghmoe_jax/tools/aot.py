"""Compiles the real step of a config for TPUs or GPUs that this machine does not have, and reports its needs.

    python -m tghmoe_jax.aot --config configs/stage1.py:phi3v,pod=v5e-64 --topology v5e:8x8
        [--mesh data=1,fsdp=16,expert=4] [--step train|decode|evaluate] [--samples 625000 --mfu 0.35] [--json]
    python -m tghmoe_jax.aot --config configs/finetune.py:phi3v,pod=l4-1 --topology l4:1

Nothing is downloaded or materialised: the step is built from shapes alone and compiled on a plain CPU machine, by
libtpu (requirements-tpu.txt) or by JAX's plugin for CUDA (requirements-gpu.txt). Exit codes: 0 it fits, 2 it does not,
or another fault the user can fix (one sentence).
"""

import collections
import dataclasses
import importlib.util
import json
import math
import os
import re
import time
from typing import Any

# Before jax is imported: a TPU machine would give its own chips, and libtpu would ask the network for its metadata.
os.environ.update({"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
os.environ.update({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"})  # else it complains
os.environ.update(dict.fromkeys(("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"), "3"))

import jax
import jax.numpy as jnp
import tokenizers
from jax.experimental import topologies
from ml_collections import ConfigDict

from tghmoe_jax.bases.base import EMBEDDED, chat_of, flattened, load_config, tokenizer_of
from tghmoe_jax.datasets.sources import aux_names
from tghmoe_jax.errors import CommandParser, UserError, command
from tghmoe_jax.models import generation
from tghmoe_jax.models.mllm import MLLM, variables
from tghmoe_jax.samples.tokenizer import FILES, Tokenizer
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.tools import flops
from tghmoe_jax.tools.chips import CHIPS, Chip, Gpu, target_config
from tghmoe_jax.tools.collectives import Collective, collectives
from tghmoe_jax.training import loading, program, run_folder
from tghmoe_jax.training.command_line import parse
from tghmoe_jax.training.memory import does_not_fit, gib, too_big

STEPS = ("train", "decode", "evaluate")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One function compiled for the topology: bytes a chip and collectives of one run."""

    name: str
    seconds: float
    arguments: int
    temporaries: int
    outputs: int
    donated: int
    code: int
    given: int  # arrays of the arguments whose memory the results take over
    collectives: dict[str, Collective]
    fused: dict[str, int]  # calls of cuDNN's attention in the program's text, of which one in a loop counts once

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs - self.donated + self.code


@command
def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser(
        prog="python -m tghmoe_jax.aot", description=__doc__.split("\n")[0], allow_abbrev=False,
        epilog="--config FILE[:preset,key=value] and --config.KEY=VALUE as for tghmoe_jax.main",
    )  # fmt: skip
    parser.add_argument(
        "--topology", required=True, help="chip and grid, such as v5e:8x8, or GPU and number, such as h100:8"
    )
    parser.add_argument("--mesh", default="", help="data=..,fsdp=..,expert=.. instead of the config's")
    parser.add_argument("--step", choices=STEPS, default="train", help="what is compiled; default train")
    parser.add_argument("--samples", type=int, default=625_000, help="number of samples for the chip-hours")
    parser.add_argument("--mfu", type=float, default=0.35, help="model FLOPs utilisation for the chip-hours")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, rest = parser.parse_known_args(argv)
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu} must lie between 0 and 1.")
    if args.samples < 1:
        raise UserError(f"--samples {args.samples} must be at least 1.")
    config, _ = parse(["aot", *rest])
    config.mesh.update(mesh_sizes(args.mesh))
    report = examine(config, args.topology, args.step, args.samples, args.mfu)
    print(json.dumps(report, indent=1) if args.json else text(report))
    return 0


def mesh_sizes(value: str) -> dict[str, int]:
    """`data=1,fsdp=16` -> {"data": 1, "fsdp": 16}. UserError for anything else."""
    sizes = {}
    for part in filter(None, value.split(",")):
        key, _, size = part.partition("=")
        if key not in ("data", "fsdp", "expert") or not re.fullmatch(r"-1|\d+", size):
            raise UserError(f"--mesh {value} is not a mesh; give data=..,fsdp=..,expert=.. with whole numbers or -1.")
        sizes[key] = int(size)
    return sizes


def examine(config: ConfigDict, topology: str, step: str, samples: int, mfu: float) -> dict[str, Any]:
    """The report on one step of `config` on `topology`. UserError where it does not fit, or cannot be compiled."""
    run_folder.check_config(config)
    chip, devices = open_topology(topology)
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.expert, devices, config.model.tgh.experts)
    except ValueError as error:
        raise UserError(f"--mesh: {error} of {topology}; change data, fsdp or expert.") from error
    base, tokenizer = base_of(config)
    spec = program.batch_spec(config, mesh)
    aux = aux_names(config.data) if config.model.aux_findings else ()
    model = program.build_model(config, base, aux, tokenizer, spec.task_shares)
    whole = program.build(config, model, spec, mesh)
    # Abstract: the mesh names the chips to compile for; no array is placed on them.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if step == "train":
            compiled = [build("train", chip, whole.step(), whole.state_shapes(), whole.batch_shapes())]
        else:
            compiled = reading(config, model, whole, tokenizer, step, chip)
    return report_of(config, topology, step, chip, whole, compiled, samples, mfu)


def open_topology(name: str) -> tuple[Chip, list]:
    """The chip and the devices of `v5e:8x8` or `h100:8`. UserError where there is none such, or no compiler for it."""
    kind, _, grid = name.partition(":")
    chip = CHIPS.get(kind)
    if not re.fullmatch(r"[1-9]\d*" if isinstance(chip, Gpu) else r"\d+(x\d+){1,2}", grid if chip else ""):
        tpus, gpus = ([key for key, one in CHIPS.items() if isinstance(one, Gpu) == gpu] for gpu in (False, True))
        raise UserError(
            f"--topology {name} is unknown; give a chip of {', '.join(tpus)} and its grid, as v5e:8x8, or a GPU of "
            f"{', '.join(gpus)} and their number, as h100:8."
        )
    if isinstance(chip, Gpu):
        compiler, told = "cuda", {"target_config": target_config(chip), "topology": f"1x1x{grid}"}
    else:
        compiler, told = "tpu", {"topology_name": name}
        told |= {"chips_per_host_bounds": (1, 1, 1)} if grid == "1x1" else {}
    try:
        return chip, topologies.get_topology_desc(platform=compiler, **told).devices
    except Exception as error:  # jaxlib raises RuntimeErrors of its own kinds
        what = " ".join(str(error).split())[:200]
        if compiler == "cuda":
            raise UserError(
                f"JAX's plugin for CUDA cannot be loaded ({what}); pip install -r requirements-gpu.txt."
            ) from error
        if importlib.util.find_spec("libtpu") is None or "libtpu" in what or "PJRT" in what:
            raise UserError(f"libtpu cannot be loaded ({what}); pip install -r requirements-tpu.txt.") from error
        raise UserError(f"--topology {name} does not exist ({what}); name one that Cloud TPU offers.") from error


def base_of(config: ConfigDict) -> tuple[dict[str, Any], Tokenizer]:
    """The sizes of the base, and a tokeniser: a base's own where it is there, else those that the config states."""
    if config.base:
        base, folder = load_config(config.base), EMBEDDED if config.base == "embedded" else config.base
    elif config.base_config:
        base = flattened(config.base_config.to_dict())
        return base, stand_in_tokenizer(base)
    else:
        run = run_folder.find(config.init_from, "--config.init_from")
        base, folder = run_folder.read_base_config(run), run_folder.model_folder(run)
    return base, tokenizer_of(folder, base)


def stand_in_tokenizer(base: dict[str, Any]) -> Tokenizer:
    """The embedded tokeniser with the special tokens of the base's family, for a model that nobody asks."""
    chat = chat_of(base)
    extended = tokenizers.Tokenizer.from_file(str(EMBEDDED / FILES[0]))
    extended.add_special_tokens([token for token in (chat.bos, chat.eos, *chat.special) if token])
    return Tokenizer(extended.to_str(), {}, chat)


def build(name: str, chip: Chip, function, *arguments) -> Compiled:
    """Lowers and compiles a jitted function for shapes and static arguments.

    UserError says by how much it does not fit and what to change.
    """
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile()
    except Exception as error:
        if needed := too_big(str(error)):
            raise UserError(does_not_fit(name, needed, chip.hbm)) from error
        raise
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    given = re.search(r"input_output_alias=\{(.*?)\}, entry", hlo.partition("\n")[0])
    result = Compiled(
        name, time.perf_counter() - start, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        memory.output_size_in_bytes, memory.alias_size_in_bytes, memory.generated_code_size_in_bytes,
        given[1].count("-alias)") if given else 0, collectives(hlo),
        dict(collections.Counter(re.findall(r'custom_call_target="__cudnn\$(\w+)"', hlo))),
    )  # fmt: skip
    if result.peak > chip.hbm:  # the compiler sometimes accepts such a program
        raise UserError(does_not_fit(name, result.peak, chip.hbm))
    return result


def placed(s: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)


def reading(config, model: MLLM, whole: program.Program, tokenizer: Tokenizer, step: str, chip: Chip) -> list[Compiled]:
    """The functions that answer questions (see reader/reader.py), with parameters as `loading.load_run` gives them."""
    model = generation.inference(model)
    rows = config.eval.batch + -config.eval.batch % whole.spec.devices
    spread = jax.NamedSharding(whole.mesh, jax.P(whole.batch_sharding.spec[1]))
    flat = loading.param_shapes(model, config.data)
    params = variables({path: placed(s, whole.shardings[path]) for path, s in flat.items()})
    batch = {key: placed(s, spread) for key, s in loading.batch_shapes(config.data, rows).items()}
    seen = model.cfg.visual_tokens(config.data.slices)
    visual = jax.ShapeDtypeStruct((rows, seen, model.cfg.decoder.width), jnp.dtype(model.cfg.dtype), sharding=spread)
    mask = jax.ShapeDtypeStruct((rows, seen), bool, sharding=spread)

    def call(name, function, *args):
        return build(name, chip, function, model, *args)

    answer = (params, batch, visual, mask)
    generate = call("decode", generation.generate, *answer, config.eval.new_tokens, tuple(tokenizer.stop_ids))
    if step == "decode":
        return [generate]
    return [
        call("encode", generation.encode, params, batch, None),
        call("rank", generation.answer_likelihood, *answer), generate,
    ]  # fmt: skip


# ---- the report ------------------------------------------------------------------------------------------------------


def report_of(config, topology, step, chip: Chip, whole: program.Program, compiled, samples, mfu) -> dict[str, Any]:
    """Everything as plain numbers: bytes and seconds, a chip and a step unless the key says otherwise."""
    cfg, mesh, chips = whole.model.cfg, whole.mesh, whole.mesh.size
    leaves = jax.tree.leaves(whole.state_shapes())
    state = sum(map(shard_bytes, leaves))
    largest = max(compiled, key=lambda c: c.peak)
    sent = sum(c.sent for one in compiled for c in one.collectives.values())
    work, moved, tokens = work_of(config, whole, step, "cudnn" if isinstance(chip, Gpu) else "splash")
    parts = {"compute": work.executed / chip.peak, "hbm": moved / chip.hbm_bandwidth, "ici": sent / chip.ici_bandwidth}
    seconds = max(parts.values())
    report = {
        "topology": topology, "step": step, "chips": chips, "mesh": dict(mesh.shape), "slices": config.data.slices,
        "image_positions": cfg.image_positions(config.data.slices),
        "batch": config.train.batch if step == "train" else config.eval.batch,
        "accumulate": config.train.accumulate, "remat": cfg.remat, "attn3d_kind": cfg.volume.attn3d_kind,
        "parameters": flops.parameters(cfg, whole.shapes, whole.trains),
        "bytes": {
            "arguments": largest.arguments, "temporaries": largest.temporaries, "donated": largest.donated,
            "state": state, "code": largest.code, "peak": largest.peak, "hbm": round(chip.hbm),
            "spare": round(chip.hbm - largest.peak), "spare_share": 1 - largest.peak / chip.hbm,
        },
        "donated": {"leaves": largest.given, "of": len(leaves) if step == "train" else 0},
        "collectives": {
            one.name: {kind: dataclasses.asdict(c) for kind, c in one.collectives.items()} for one in compiled
        },
        "cudnn": {one.name: one.fused for one in compiled}, "experts": expert_shards(whole),
        "flops": {"useful": work.useful, "executed": work.executed},
        "roofline": {**parts, "seconds": seconds, "mfu_bound": work.useful / (chip.peak * seconds)},
        "compile_seconds": {one.name: round(one.seconds, 1) for one in compiled},
    }  # fmt: skip
    if step == "train":
        of_sample = work.useful * chips / config.train.batch
        hours = of_sample / (chip.peak * mfu) / 3600
        bound = seconds * chips / config.train.batch / 3600
        for key, number in (("samples", samples), ("recipe", config.train.steps * config.train.batch)):
            report[key] = {
                "number": number, "mfu": mfu, "chip_hours": number * hours, "chip_hours_at_roofline": number * bound,
            }  # fmt: skip
    else:
        report["new_tokens"] = tokens
    return report


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes that one chip holds of an array."""
    return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))


def work_of(config, whole: program.Program, step: str, attention: str) -> tuple[flops.Flops, float, int]:
    """FLOPs of a chip, the least bytes it moves to and from HBM, and new tokens of a sample.

    Least bytes of a train step: the state once in and once out, and for every microbatch the used weights in the
    compute dtype forward, backward (for inputs and for weights) and once more where layers are rematerialised. Of a
    decode step: every weight and the filled cache for every new token.
    """
    cfg, slices, length = whole.model.cfg, config.data.slices, config.data.text_length
    mesh, chips = whole.mesh, whole.mesh.size
    spread = mesh.shape["expert"] * mesh.shape.get("group", 1) > 1
    width = jnp.dtype(cfg.dtype).itemsize
    size = flops.parameters(cfg, whole.shapes, whole.trains)
    if step == "train":
        one = flops.train_sample(cfg, whole.shapes, whole.trains, slices, length, attention, spread)
        state = sum(shard_bytes(s) for s in jax.tree.leaves(whole.state_shapes()))
        passes = 3 + (cfg.remat == "full")
        return (
            one * (config.train.batch / chips),
            2 * state + config.train.accumulate * passes * size["active"] * width,
            0,
        )
    rows, d, new = config.eval.batch / chips, cfg.decoder, config.eval.new_tokens
    forward = flops.forward_sample(cfg, whole.shapes, slices, length, attention, spread)
    cached = cfg.image_positions(slices) + length
    token = flops.decode_token(cfg, whole.shapes, cached + new // 2)
    cache = 2 * (cached + new // 2) * d.kv_heads * d.head_size * d.layers * width
    moved = (new + 1) * size["active"] * width + new * rows * cache
    return forward * rows + token * (rows * new), moved, new


def expert_shards(whole: program.Program) -> dict[str, Any]:
    """How the expert weights lie: PartitionSpec of the first kernel, its shards, and bytes of all experts a chip."""
    found = {path: s for path, s in whole.shapes.items() if "/experts/" in path}
    if not found:
        return {"leaves": 0}
    kernel = next(path for path in found if path.endswith("fc1/kernel"))
    sharding = whole.shardings[kernel]
    leaves = [placed(s, whole.shardings[path]) for path, s in found.items()]
    return {
        "leaves": len(found), "spec": str(sharding.spec), "chip_bytes": sum(map(shard_bytes, leaves)),
        "total_bytes": sum(s.size * s.dtype.itemsize for s in found.values()),
    }  # fmt: skip


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    b, p, r, d = report["bytes"], report["parameters"], report["roofline"], report["donated"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['step']} step on {report['topology']}: {report['chips']} chips, mesh {mesh}",
        f"batch {report['batch']}, accumulate {report['accumulate']}, {report['slices']} slices, "
        f"remat {report['remat']}, {report['attn3d_kind']} attention",
        f"parameters: {p['total'] / 1e9:.3f} G, {p['trained'] / 1e9:.3f} G trained, {p['active'] / 1e9:.3f} G active",
        f"GiB a chip: arguments {gib(b['arguments'])}, temporaries {gib(b['temporaries'])}, peak {gib(b['peak'])} of "
        f"{gib(b['hbm'])}, spare {gib(b['spare'])} ({b['spare_share']:.0%})",
    ]
    for name, found in report["collectives"].items():
        listed = [f"{c['count']} x {kind} ({gib(c['bytes'])} GiB)" for kind, c in found.items()]
        lines.append(f"collectives of {name}, a run: {', '.join(listed) or 'none'}")
    for name, found in report["cudnn"].items():
        if found:
            listed = ", ".join(f"{count} x {kind}" for kind, count in found.items())
            lines.append(f"cuDNN's attention in {name}, a loop once: {listed}")
    e = report["experts"]
    if e["leaves"]:
        lines.append(f"experts: {gib(e['chip_bytes'])} GiB a chip of {gib(e['total_bytes'])}, {e['spec']}")
    f = report["flops"]
    lines += [
        f"TFLOPs a chip: {f['useful'] / 1e12:.1f} useful, {f['executed'] / 1e12:.1f} executed",
        f"roofline: compute {r['compute']:.3f} s, HBM {r['hbm']:.3f} s, interconnect {r['ici']:.3f} s; MFU at most "
        f"{r['mfu_bound']:.0%}",
    ]
    if "samples" in report:
        lines.append(
            f"donated: {d['leaves']} of {d['of']} leaves of the state, {gib(b['donated'])} GiB in the chip's tiles, "
            f"{gib(b['state'])} without their padding"
        )
        for key, named in (("samples", "samples"), ("recipe", "samples, all steps of this config")):
            s = report[key]
            lines.append(
                f"{s['number']:,} {named}: {s['chip_hours']:,.0f} chip-hours at an MFU of {s['mfu']:.0%}, "
                f"{s['chip_hours_at_roofline']:,.0f} at the roofline"
            )
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["compile_seconds"].items())
    return "\n".join([*lines, f"time to compile: {took}"])
