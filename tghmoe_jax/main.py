"""Trains or evaluates what a config says.

    python -m tghmoe_jax.main --config configs/stage1.py [--workdir runs/stage1] [--config.train.steps=100]

--workdir defaults to runs/<config stem>[-<preset>]. Exit codes: 0 done, 2 something the user can mend (one sentence on
stderr; --debug adds the traceback).
"""

import os
import sys
from pathlib import Path

# The C++ logs of XLA would drown the progress line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from absl import flags
from ml_collections import config_flags

from tghmoe_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file, e.g. configs/stage1.py[:preset,key=value].")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; default runs/<config stem>[-<preset>].")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
CPU_DEVICES = 2  # data-parallel host devices: a small CPU runs a step about 1.5 times faster on two than on one


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    argv = sys.argv if argv is None else argv
    debug = "--debug" in argv
    try:
        config, workdir = parse(argv)
        prepare_jax()
        from tghmoe_jax import train  # after the devices are set up

        train.run(config, workdir)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str]):
    """The resolved config and the workdir. UserError for an unknown flag, config key, colon argument or file."""
    spec = next(
        (a.partition("=")[2] or argv[i + 1 : i + 2] for i, a in enumerate(argv) if a.split("=")[0] == "--config"), ""
    )
    spec = spec if isinstance(spec, str) else "".join(spec)
    file, _, arg = spec.partition(":")
    if not spec:
        raise UserError("--config is missing; name an experiment, for example --config configs/stage1.py.")
    if not Path(file).is_file():
        raise UserError(f"--config {file} does not exist; run from the project's root or give the file's path.")
    sys.path.insert(0, str(Path(file).resolve().parent.parent))  # configs import configs.common
    # ml_collections would resolve `eval.items` to ConfigDict's own method, so this key is read here.
    items = [a.partition("=")[2] for a in argv if a.startswith("--config.eval.items=")]
    argv = [a for a in argv if not a.startswith("--config.eval.items=")]
    sys.argv = argv  # config_flags looks there for the overrides
    try:
        left = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"{_one_line(error)}; see --help for the flags and the config file for its keys.") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--config {spec}: {_one_line(error)}.") from error
    if len(left) > 1:
        raise UserError(f"the argument {left[1]!r} is not a flag; use --config.KEY=VALUE to set a key.")
    config = _CONFIG.value
    if items:
        if not items[-1].isdigit() or int(items[-1]) < 2:
            raise UserError(f"--config.eval.items={items[-1]} must be a whole number of at least 2.")
        config.eval["items"] = int(items[-1])
    preset = next((part for part in arg.split(",") if part and "=" not in part), "")
    workdir = _WORKDIR.value or f"runs/{Path(file).stem}" + (f"-{preset}" if preset else "")
    return config, workdir


def prepare_jax() -> None:
    """Several host devices where there is no accelerator, and a persistent compilation cache."""
    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and "xla_force_host_platform" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        jax.config.update("jax_num_cpu_devices", min(CPU_DEVICES, os.cpu_count() or 1))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
