"""Compiled programs are kept between processes, so that the second start of a model does not compile it again.

What was traced for them is kept beside them (`recall`).
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax._src import compilation_cache

from tghmoe_jax import writing
from tghmoe_jax.weights import storage

MAX_BYTES = 4 << 30  # the programs used longest ago are deleted beyond it
_MOST_RECALLED = 500  # files of `recall`; those used longest ago are deleted beyond it
_SKEW = 60.0  # seconds that the clocks of two machines may differ, and that a program takes to be written


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
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not jax.config.jax_compilation_cache_dir:
        with contextlib.suppress(OSError, RuntimeError):  # no home
            _keep_in(folder())
    place = jax.config.jax_compilation_cache_dir
    if place and "://" not in place:
        with contextlib.suppress(OSError):
            _drop_damaged(Path(place))


def _keep_in(place: Path) -> None:
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and place.stat().st_uid != os.getuid():
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    if importlib.util.find_spec("filelock"):  # which jax needs to delete what is old
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _drop_damaged(place: Path) -> None:
    """Removes programs that were cut short: jax would warn of them at every start and never replace them.

    Each is unpacked once, at the first start after it was written.
    """
    looked, now = place / ".looked", time.time()
    since = looked.stat().st_mtime if looked.exists() else 0.0
    dated = jax.config.jax_compilation_cache_max_size != -1  # then jax asks each for the time of its last use
    for file in place.glob("*-cache"):
        whole = not dated or file.with_name(file.name.removesuffix("-cache") + "-atime").exists()
        if whole and file.stat().st_mtime < since:
            continue
        try:
            compilation_cache.decompress_executable(file.read_bytes())
        except Exception:  # zlib's, or zstd's of three packages
            whole = False
        if not whole:
            file.unlink(missing_ok=True)
    looked.touch()
    os.utime(looked, (now - _SKEW, now - _SKEW))


def keeps() -> bool:
    """Whether `recall` has a folder to keep anything in."""
    place = jax.config.jax_compilation_cache_dir
    return bool(place) and "://" not in place


def keeps_traced() -> bool:
    """Whether `recall_traced` may be used. It was tried on CPUs, where results are the same bit for bit, and in one
    process; else each process traces its own."""
    alone = jax.default_backend() == "cpu" and jax.process_count() == 1
    return alone and keeps() and importlib.util.find_spec("flatbuffers") is not None


def recall(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, or gave an earlier process under the same name; what is damaged is made again.

    `name` says all that the bytes depend on except the code of this package and the versions under it, which count too.
    """
    if not keeps():
        return make()
    place = Path(jax.config.jax_compilation_cache_dir)
    file = place / f"{hashlib.sha256(json.dumps([name, _code()]).encode()).hexdigest()[:32]}-recalled"
    with contextlib.suppress(OSError):
        found = file.read_bytes()
        if hashlib.sha256(found[32:]).digest() == found[:32]:
            os.utime(file)
            return found[32:]
    made = make()
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        writing.write(file, hashlib.sha256(made).digest() + made)
        for old in sorted(place.glob("*-recalled"), key=os.path.getmtime)[:-_MOST_RECALLED]:
            old.unlink()
    return made


def recall_traced(name: str, function: Callable, *arguments) -> Callable:
    """A jitted function of trees of arrays, as an earlier process traced it for arguments of these shapes.

    `name` as for `recall`; shapes and shardings of the arguments and the precision of products count by themselves.
    """
    from jax import export  # needs a package that only this takes

    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype), str(getattr(leaf, "sharding", ""))), arguments)
    precision = jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64
    try:
        made = recall(f"{name} {shapes} {precision}", lambda: bytes(export.export(function)(*arguments).serialize()))
        return export.deserialize(made).call
    except Exception:  # what cannot be kept; if `function` itself is at fault, it is raised where that is called
        return function


@functools.cache
def _code() -> str:
    """A digest of this package's files and of the versions that a traced program depends on."""
    whole = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")]
    return f"{whole.hexdigest()} {platform.python_version()} {' '.join(versions)}"
