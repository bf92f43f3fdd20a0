"""What a command sets for its process before jax starts: memory that a step frees is there for the next."""

import os
import platform
import subprocess
import sys
import types

import pytest

from tests import tiny_run
from tghmoe_jax.sharding import mesh

# Prints the pages that the kernel gave in 20 executions of a program with buffers of 32 and 64 MiB, after 10 others.
CODE = """
import resource, sys
import jax, jax.numpy as jnp
from tghmoe_jax.sharding import mesh
getattr(mesh, sys.argv[1])()
program = jax.jit(lambda x: abs(jnp.fft.fft(jnp.outer(x, x))).sum())
for step in range(30):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(jnp.arange(2048.0) + step).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(call: str) -> int:
    own = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny_run.ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE, call], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets options of glibc's malloc")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    assert pages("keep_freed_memory") < pages("simulate_devices") / 2, "which gets them all again"


@pytest.mark.parametrize(("platforms", "touched"), [("", False), ("tpu", False), ("cpu", True)])
def test_the_heaps_of_a_host_with_an_accelerator_are_left_alone(platforms, touched, monkeypatch):
    called = []
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(mesh.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(mesh.ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=lambda *pair: called.append(pair)))
    mesh.keep_freed_memory()
    assert bool(called) == touched
