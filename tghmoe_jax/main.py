"""Trains or evaluates what a config says.

    python -m tghmoe_jax.main --config configs/stage1.py [--workdir runs/stage1] [--config.train.steps=100]

--workdir defaults to runs/<config stem>[-<preset>]. Several processes find each other by the environment of TPU VMs,
GKE and Slurm, or by --coordinator, --process and --processes (docs/hosts.md). Exit codes, the same for every process:
0 done; 2 something the user can mend (one sentence on stderr; --debug adds the traceback); 75 stopped by SIGTERM with
its state saved, to go on with the same command.
"""

import contextlib
import os
import re
import sys
import traceback
from pathlib import Path

# The C++ logs of XLA would drown the progress line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from tghmoe_jax.errors import UserError
from tghmoe_jax.training import hosts

_PLACE = {
    "coordinator": "HOST:PORT of process 0, where several processes are not found by themselves.",
    "process": "Number of this process, from 0.",
    "processes": "How many processes the run has; 1: this one alone, whatever the environment says.",
    "wait": f"Seconds that processes wait for each other at the start; default {hosts.WAIT}.",
}
CPU_DEVICES = 2  # data-parallel host devices: a small CPU runs a step about 1.5 times faster on two than on one


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h"} & set(argv):
        print(__doc__, define_flags(argv).get_help(), sep="\n")
        return 0
    try:
        argv, place = _place(argv)
        prepare_jax()
        hosts.start(place)  # before all that can fail, so that a fault is said once
        config, workdir = parse(argv)
        from tghmoe_jax import train  # after the devices are set up

        return train.run(config, workdir)
    except UserError as error:
        trace = traceback.format_exc() if "--debug" in argv else ""
        return hosts.fail(f"error: {error}", 2, trace)
    except Exception as error:
        if not hosts.several():
            raise
        return hosts.unexpected(error)


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The flags of one command line: a set of their own, since the keys of a config become flags too."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Experiment file, e.g. configs/stage1.py[:preset,key=value]; --config.KEY=VALUE sets a key.",
        flag_values=values, sys_argv=argv,
    )  # fmt: skip
    flags.DEFINE_string("workdir", "", "Folder of the run; default runs/<config stem>[-<preset>].", flag_values=values)
    for name, text in _PLACE.items():
        flags.DEFINE_string(name, "", text, flag_values=values)
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=values)
    return values


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
    argv, items = _take(argv, "--config.eval.items")
    values, plain = define_flags(argv), define_flags([argv[0], f"--config={spec}"])
    try:
        plain([argv[0], f"--config={spec}"])
    except Exception as error:  # whatever the user's config file raises
        raise UserError(f"--config {spec}: {_one_line(error)}; see that file for what it takes.") from error
    try:
        left = values(argv)
    except flags.Error as error:
        raise UserError(f"{_one_line(error)}; see --help for the flags and {file} for its keys.") from error
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{_unknown_key(error, argv)}; see {file} for the keys.") from error
    if len(left) > 1:
        raise UserError(f"the argument {left[1]!r} is not a flag; use --config.KEY=VALUE to set a key.")
    config = values.config
    _check_tuples(config, plain.config)
    if items:
        if not items[-1].isdigit() or int(items[-1]) < 2:
            raise UserError(f"--config.eval.items={items[-1]} must be a whole number of at least 2.")
        config.eval["items"] = int(items[-1])
    preset = next((part for part in arg.split(",") if part and "=" not in part), "")
    workdir = values.workdir or f"runs/{Path(file).stem}" + (f"-{preset}" if preset else "")
    return config, workdir


def prepare_jax() -> None:
    """Several host devices where there is no accelerator."""
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform" in os.environ.get("XLA_FLAGS", "")
    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and not chosen:
        with contextlib.suppress(RuntimeError):  # a caller that has used jax already keeps its devices
            jax.config.update("jax_num_cpu_devices", min(CPU_DEVICES, os.cpu_count() or 1))


def _place(argv: list[str]) -> tuple[list[str], hosts.Place]:
    """The command line without the flags of `_PLACE`, and what they say: needed before a config is read."""
    given = {}
    for name in _PLACE:
        argv, values = _take(argv, f"--{name}")
        given[name] = values[-1] if values else ""
    return argv, hosts.Place.of(**given)


def _take(argv: list[str], flag: str) -> tuple[list[str], list[str]]:
    """The command line without `flag`, and the values it was given as `flag=value` or `flag value`."""
    rest, values, following = [], [], False
    for arg in argv:
        if following or arg.startswith(flag + "="):
            values.append(arg if following else arg.partition("=")[2])
            following = False
        elif arg == flag:
            following = True
        else:
            rest.append(arg)
    return rest, values + [""] * following


def _check_tuples(config, reference, prefix: str = "--config.") -> None:
    """UserError for a list whose items are of another type than the config file's: ml_collections takes any."""
    for key, old in reference.items():
        if isinstance(old, ConfigDict):
            _check_tuples(config[key], old, f"{prefix}{key}.")
        elif isinstance(old, tuple) and old:
            kinds = {type(item) for item in old} | ({int} if isinstance(old[0], float) else set())
            if wrong := [item for item in config[key] if type(item) not in kinds]:
                raise UserError(f"{prefix}{key} holds {wrong[0]!r}; give a list of {type(old[0]).__name__}, as a,b,c.")


def _unknown_key(error: Exception, argv: list[str]) -> str:
    """Which --config.KEY of the command line does not exist, with the guess of ml_collections."""
    text = str(error.args[0] if error.args else error)
    names = re.findall(r"\w+", text)
    keys = [arg.split("=")[0] for arg in argv if arg.startswith("--config.")]
    key = next((key for key in keys if names and names[0] in key.split(".")), None)
    guess = re.search(r'Did you mean "([^"]+)"', text)
    hint = f" (did you mean {guess[1]}?)" if guess else ""
    return f"{key} is unknown{hint}" if key else f"--config: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    """What an error says, without the traceback that ml_collections writes into the text of a config's own error."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()).rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
