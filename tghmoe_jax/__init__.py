"""Text-guided hierarchical mixture-of-experts for 3D CT, in JAX."""

import signal
import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # one of the commands is about to import its modules: Ctrl-C shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str):
    if name == "load":
        from tghmoe_jax.reader.opening import load

        return load
    raise AttributeError(f"module 'tghmoe_jax' has no attribute {name!r}")
