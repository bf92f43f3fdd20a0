"""All commands: `tghmoe COMMAND ...` is `python -m tghmoe_jax.<its module> ...`; `tghmoe` alone lists them."""

import runpy
import sys

COMMANDS = {  # name: module, what it does
    "predict": ("predict", "ask about one scan, or write a report about it"),
    "app": ("app", "a local page: look at a scan, ask, see on which part the answer depends"),
    "prepare": ("prepare", "read a data set once and store it in shards; check a manifest"),
    "train": ("main", "train or evaluate what a config says"),
    "evaluate": ("evaluate", "score a run or prediction files; compare two systems"),
    "convert": ("convert", "convert models from and to their published form; export a run"),
    "verify": ("verify", "compare the digests of checkpoints and exported models"),
    "aot": ("aot", "compile for a TPU topology without a TPU: does the step fit, what does it cost"),
    "selfcheck": ("selfcheck", "compare every fast path with plain arithmetic on this machine"),
    "ablate": ("ablate", "train and compare the rows of an ablation"),
}


def listed() -> str:
    """The commands, one a line."""
    rows = (f"  {name:11}{what} (python -m tghmoe_jax.{module})" for name, (module, what) in COMMANDS.items())
    return "\n".join(["usage: tghmoe COMMAND [flags]; each command takes --help", "", *rows])


def main() -> None:
    """Runs the command that the process was given; it ends the process itself."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(listed())
    elif name not in COMMANDS:
        print(f"error: {name!r} is not a command; use one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"tghmoe {name}", *rest]
        runpy.run_module(f"tghmoe_jax.{COMMANDS[name][0]}", run_name="__main__")


if __name__ == "__main__":
    main()
