"""Carries models in and out, tensor by tensor: 2D bases of Hugging Face, this project's bases, and trained runs.

    python -m tghmoe_jax.convert --from SOURCE --to TARGET [--export] [--dtype bfloat16]

    --from HF_DIR --to DIR                  a 2D model under canonical names, for --config.base=DIR
    --from DIR --to HF_DIR --export         such a base back under its published names
    --from runs/pretrain2d --to DIR         the 2D model of a run under its published names
    --from runs/stage2 --to DIR --export    a whole run without its training state

The last folder serves predict --checkpoint DIR and --config.init_from=DIR. A run with patch_depth above 1 or with
experts has no 2D form and is refused without --export.
"""

import math
import sys
from pathlib import Path

from tghmoe_jax import digests, writing
from tghmoe_jax.bases.base import CONVERTED, FAMILIES, load_base, save_base, save_converted
from tghmoe_jax.errors import CommandParser, UserError, command, run_command
from tghmoe_jax.samples import tokenizer
from tghmoe_jax.training import exported, run_folder, stored
from tghmoe_jax.weights import storage

# What the tokeniser and the pictures of a 2D model need besides the weights; copied where the base has it.
_COPIED = (
    *tokenizer.FILES, "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",  # how pictures are cut
    "generation_config.json",  # how text is sampled
)  # fmt: skip


def from_run(source: str, target: Path, dtype: str, whole: bool) -> str:
    """Writes a run's 2D model or all of it; returns what to print."""
    run = run_folder.find(source, "--from")
    if whole:
        params, step = stored.load_merged(run)
        files = exported.write(run, params, step, target, dtype)
        return f"step {step} of {source} -> {', '.join(map(str, files))}"
    model = run_folder.read_config(run)["model"]
    if model["patch_depth"] > 1 or model["tgh"]["layers"]:
        raise UserError(
            f"--from={source} is a 3D model (patch_depth {model['patch_depth']}, {len(model['tgh']['layers'])} layers "
            "with experts), which has no 2D form; name a run of configs/pretrain2d.py, or add --export."
        )
    params, step = stored.load_merged(run)
    files = save_base(target, params, run_folder.read_base_config(run), dtype)
    _complete(target, run_folder.model_folder(run))
    return f"step {step} of {source} -> {', '.join(map(str, files))}"


def _complete(target: Path, source: Path) -> None:
    """Copies what belongs to a 2D model besides its weights, and writes the digests of all."""
    storage.copy_files(_COPIED, source, target)
    found = digests.of_files(target, digests.files(target))
    digests.write(target, found)


def from_base(source: str, target: Path, dtype: str | None, published: bool) -> str:
    """Writes a 2D base under canonical or published names; returns what to print."""
    base = load_base(source, lazy=True, flag="--from")
    if published != bool(base.config.get(CONVERTED)):
        raise UserError(
            f"--from={source} {'already has its published names' if published else 'is already converted'}; "
            f"{'leave --export out' if published else 'add --export to get its published names back'}."
        )
    if published:
        files = save_base(target, base.params, base.config, dtype)
    else:
        files = save_converted(target, base, dtype)
    _complete(target, base.folder)
    stored = storage.read_tensors(base.folder)
    names = base.params if published else FAMILIES[base.family].to_checkpoint(base.params, base.config)

    def count(tensors) -> int:
        return sum(math.prod(tensor.shape) for tensor in tensors.values())

    lines = [
        f"{base.family}: {len(stored)} tensors in {source}",
        f"reused   {len(names):>6} tensors {count(base.params) / 1e6:>12.3f} M parameters",
        f"ignored  {len(stored) - len(names):>6} tensors {(count(stored) - count(base.params)) / 1e6:>12.3f} M",
        f"new      {0:>6} tensors {0:>12.3f} M (experts, routers and 3D parts are new when a stage starts)",
        f"-> {', '.join(map(str, files))}",
    ]
    return "\n".join(lines)


@command
def main(argv: list[str]) -> int:
    """Parses the command line, converts, and returns the exit code."""
    parser = CommandParser(prog="python -m tghmoe_jax.convert", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="source", required=True, help="folder of a run or of a 2D model")
    parser.add_argument("--to", required=True, help="folder to write")
    parser.add_argument("--export", action="store_true", help="published names of a base, or a run as one model")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: a base's own, bfloat16 for a run"
    )
    args = parser.parse_args(argv)
    source, target = Path(args.source), Path(args.to)
    if target.exists() and not target.is_dir():
        raise UserError(f"--to {args.to} is a file; name a folder.")
    if target.exists() and source.resolve() == target.resolve():
        raise UserError(f"--to {args.to} is the folder that is read; name another.")
    if (target / "checkpoints").is_dir():
        raise UserError(f"--to {args.to} holds a run, which would be overwritten; name another folder.")
    writing.refuse_links(target, (run_folder.MODEL,), "--to")
    try:
        if (source / "config.json").is_file() and not (source / run_folder.MODEL).is_dir():
            print(from_base(args.source, target, args.dtype, args.export))
        else:
            print(from_run(args.source, target, args.dtype or "bfloat16", args.export))
    except OSError as error:  # a target that cannot be written, a full disk
        raise UserError(f"--to {args.to} cannot be written ({error.strerror or error}); name another.") from error
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
