"""Writes a run as safetensors: its 2D model as a Phi-3-V folder, or the whole 3D model as a run without training state.

    python -m tghmoe_jax.convert --from runs/pretrain2d --to DIR
    python -m tghmoe_jax.convert --from runs/stage2 --to DIR --export

The first folder (published names, config.json, tokeniser) serves --config.base=DIR; a run with patch_depth above 1 or
with experts has no 2D form and is refused. The second serves predict --checkpoint DIR and --config.init_from=DIR.
"""

import argparse
import shutil
import sys
from pathlib import Path

from tghmoe_jax.data import tokenizer
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import checkpoints, exported, runs
from tghmoe_jax.weights.base import save_base


class _Parser(argparse.ArgumentParser):
    """Reports faults as UserError instead of printing the usage."""

    def error(self, message: str):
        raise UserError(f"{message.rstrip('.')}; see --help for the flags.")


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, converts, and returns the exit code."""
    parser = _Parser(
        prog="python -m tghmoe_jax.convert", allow_abbrev=False, description=__doc__.split("\n")[0]
    )  # fmt: skip
    parser.add_argument("--from", dest="source", required=True, help="folder of a run")
    parser.add_argument("--to", required=True, help="folder to write")
    parser.add_argument("--export", action="store_true", help="write the whole model instead of its 2D base")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    try:
        args = parser.parse_args(argv)
        if Path(args.to).exists() and not Path(args.to).is_dir():
            raise UserError(f"--to {args.to} is a file; name a folder.")
        run = runs.find(args.source, "--from")
        if args.export:
            if run.resolve() == Path(args.to).resolve():
                raise UserError(f"--to {args.to} is the run itself; name another folder.")
            params, step = checkpoints.load_params(run)
            files = exported.write(run, params, step, Path(args.to), args.dtype)
            print(f"step {step} of {args.source} -> {', '.join(str(f) for f in files)}")
            return 0
        model = runs.read_config(run)["model"]
        if model["patch_depth"] > 1 or model["tgh"]["layers"]:
            raise UserError(
                f"--from={args.source} is a 3D model (patch_depth {model['patch_depth']}, "
                f"{len(model['tgh']['layers'])} layers with experts), which has no 2D form; name a run of "
                "configs/pretrain2d.py, or add --export."
            )
        params, step = checkpoints.load_params(run)
        files = save_base(args.to, params, runs.read_base_config(run), args.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in tokenizer.FILES:
        source, target = runs.model_folder(run) / name, Path(args.to) / name
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
    print(f"step {step} of {args.source} -> {', '.join(str(f) for f in files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
