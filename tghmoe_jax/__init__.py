"""Text-guided hierarchical mixture-of-experts for 3D CT, in JAX."""

import glob
import importlib.util
import os
import signal
import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # one of the commands is about to import its modules: Ctrl-C shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _leave_tpu_out() -> None:
    """Where libtpu is installed, as `aot` needs it, but no TPU is, jax would search for one for a minute, in six lines.

    Called before jax is imported. Where jax has a plug-in for other devices, nothing is changed.
    """
    told = any(name == "JAX_PLATFORMS" or name.startswith("TPU_") for name in os.environ)
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    find = importlib.util.find_spec
    if not told and not chips and find("libtpu") and not find("jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"


_leave_tpu_out()


def __getattr__(name: str):
    if name == "load":
        from tghmoe_jax.reader.opening import load

        return load
    raise AttributeError(f"module 'tghmoe_jax' has no attribute {name!r}")
