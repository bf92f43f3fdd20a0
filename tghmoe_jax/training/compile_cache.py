"""Compiled programs are kept between processes, so that the second start of a model does not compile it again."""

import contextlib
import hashlib
import importlib.util
import os
import platform
from pathlib import Path

import jax

from tghmoe_jax.weights import storage

MAX_BYTES = 4 << 30  # the programs used longest ago are deleted beyond it


def folder() -> Path:
    """`$XDG_CACHE_HOME/tghmoe_jax/programs-<processor>`, by default in `~/.cache`.

    The name holds a digest of the processor's instruction set: a home that several machines share must not give one of
    them a program that it cannot run.
    """
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.is_file() else []
    kind = next((line for line in lines if line.startswith(("flags", "Features"))), platform.node())
    return storage.cache_home() / f"programs-{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"


def keep() -> None:
    """Called by commands before they compile. jax's own JAX_COMPILATION_CACHE_DIR goes first; set and empty: no cache.

    Where the folder cannot be made or is another user's, nothing is kept: what lies in it is run.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and place.stat().st_uid != os.getuid():
            return
        jax.config.update("jax_compilation_cache_dir", str(place))
        if importlib.util.find_spec("filelock"):  # which jax needs to delete what is old
            jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
