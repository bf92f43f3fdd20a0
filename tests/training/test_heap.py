"""The heap of a training process on a CPU: freed memory is there for the next step, and no step searches fragments."""

import os
import platform
import subprocess
import sys
import types

import pytest

from tests import tiny_run
from tghmoe_jax.training import heap

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets options of glibc's malloc")

# Prints the pages that the kernel gave in 20 executions of a program with buffers of 32 and 64 MiB, after 10 others.
STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from tghmoe_jax.training import heap
if sys.argv[1:]:
    getattr(heap, sys.argv[1])()
program = jax.jit(lambda x: abs(jnp.fft.fft(jnp.outer(x, x))).sum())
for step in range(30):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(jnp.arange(2048.0) + step).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# Frees every second of 20,000 pieces of 1 KiB to 1 MiB, and prints how many of 2,000 new ones lie between the others.
PIECES = """
import ctypes, random, sys
from tghmoe_jax.training import heap
if sys.argv[1:] != ["leave_fragments"]:
    heap.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
drawn = random.Random(0)
sizes = [2 ** drawn.randint(10, 20) + drawn.randint(0, 999) for _ in range(20_000)]
made = [libc.malloc(size) for size in sizes]
for piece in made[::2]:
    libc.free(piece)
if sys.argv[1:]:
    heap.leave_fragments()
print(sum(libc.malloc(size) < max(made) for size in sizes[:2_000]))
flags = [line for line in open("/proc/self/smaps") if line.startswith("VmFlags")]
print(sum(" hg" in line for line in flags))
"""


# A command, and what malloc says of its heaps at the end.
HEAPS = """
import atexit, ctypes, runpy, sys
libc = ctypes.CDLL(None)
atexit.register(lambda: libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stderr")))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def printed(code: str, *call: str) -> list[int]:
    own = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny_run.ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *call], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@glibc
def test_memory_that_a_step_frees_is_kept_for_the_next():
    [kept], [given_back] = printed(STEPS, "keep_freed_memory"), printed(STEPS)
    assert kept < given_back / 2


@glibc
@pytest.mark.parametrize("module", ["main", "evaluate", "ablate"])
def test_the_threads_of_a_command_have_no_heaps_of_their_own(module):
    own = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny_run.ROOT)}
    code = [sys.executable, "-c", HEAPS, f"tghmoe_jax.{module}", "--help"]
    done = subprocess.run(code, env=own, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("<heap nr=") == 1, done.stderr[-2000:]


@glibc
def test_what_compiling_left_free_is_not_searched_again():
    between, large = printed(PIECES)
    assert between > 1_900 and large, "as malloc does it, with large pages asked for from the start"
    between, large = printed(PIECES, "keep_freed_memory", "leave_fragments")
    assert between == 0 and large
    between, large = printed(PIECES, "leave_fragments")
    assert between > 1_500 and not large, "nothing is done in a process that did not begin so"


@pytest.mark.parametrize(("platforms", "touched"), [("", False), ("tpu", False), ("cpu", True)])
def test_the_heaps_of_a_host_with_an_accelerator_are_left_alone(platforms, touched, monkeypatch):
    called = []

    def function(*given):
        called.append(given)
        return 0

    names = ("mallopt", "malloc", "free", "sbrk", "madvise", "malloc_trim")
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(heap.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: types.SimpleNamespace(**dict.fromkeys(names, function)))
    heap.keep_freed_memory()
    heap.leave_fragments()
    assert bool(called) == touched


def test_nothing_is_done_where_malloc_has_no_such_options(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: types.SimpleNamespace())
    heap.keep_freed_memory()
    heap.leave_fragments()
