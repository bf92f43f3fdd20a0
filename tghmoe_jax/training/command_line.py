"""Reads `--config FILE[:preset,key=value] --config.KEY=VALUE` of any command that takes an experiment."""

import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from tghmoe_jax.errors import UserError

# Where `configs` lies: in an installed package, or beside the package in a clone.
_EXPERIMENTS = (Path(__file__).parent.parent / "experiments", Path(__file__).parent.parent.parent)


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The flags of one command line: a set of their own, since the keys of a config become flags too."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Experiment, e.g. configs/stage1.py or stage1[:preset,key=value]; --config.KEY=VALUE: a key.",
        flag_values=values, sys_argv=argv,
    )  # fmt: skip
    flags.DEFINE_string("workdir", "", "Folder of the run; default runs/<config stem>[-<preset>].", flag_values=values)
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=values)
    return values


def parse(argv: list[str]):
    """The resolved config and the workdir. UserError for an unknown flag, config key, colon argument or file."""
    spec = next(iter(take(argv, "--config")[1]), "")
    file, _, arg = spec.partition(":")
    if not spec:
        raise UserError("--config is missing; name an experiment, for example --config configs/stage1.py.")
    file = experiment(file)
    spec = ":".join([file, *spec.split(":", 1)[1:]])
    argv = [argv[0], f"--config={spec}", *take(argv[1:], "--config")[0]]
    # ml_collections would resolve `eval.items` to ConfigDict's own method, so this key is read here.
    argv, items = take(argv, "--config.eval.items")
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


def experiment(name: str) -> str:
    """The path of the experiment file that `--config` names, from where `configs.common` can be imported.

    `stage1` and `configs/stage1.py` mean the file in the current folder, else the one that comes with the package.
    """
    own = Path(name).with_suffix(".py") if "/" in name or name.endswith(".py") else Path("configs", f"{name}.py")
    shipped = next((place for place in _EXPERIMENTS if (place / "configs" / "common.py").is_file()), _EXPERIMENTS[0])
    places = [Path(name), own, *([shipped / own] if own.parent == Path("configs") else [])]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        known = ", ".join(sorted(one.stem for one in (shipped / "configs").glob("*.py") if one.stem != "common"))
        raise UserError(f"--config {name} does not exist; give the path of a file, or one of {known}.")
    sys.path.insert(0, str(file.resolve().parent.parent))
    sys.path.append(str(shipped))  # a file elsewhere may import configs.common as well
    return str(file)


def take(argv: list[str], flag: str) -> tuple[list[str], list[str]]:
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
