"""Seconds from the start of a process to the end of the embedded model's first training step, with a filled persistent
compilation cache (ours) and without any (peer).

    python -m benchmarks.cases.compile VOLUMES [--small]

is such a process; VOLUMES is a folder for the drawn volumes. Each imports, reads its volumes, loads the base, traces,
compiles the step or reads it compiled, and takes it. jax's defaults say which programs are kept.
"""

import argparse
import os
import subprocess
import sys
import tempfile

from benchmarks.measure import ROOT, Row, alternate, seconds
from tghmoe_jax.training import heap

BOUND = 0.35


def run(small: bool, runs: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "benchmarks.cases.compile",
            f"{folder}/volumes",
            *(["--small"] if small else []),
        ]
        os.mkdir(f"{folder}/volumes")

        def process(**environment: str) -> None:
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"error: compile: {(done.stderr.strip() or 'killed').splitlines()[-1]}")

        cache = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        filling = seconds(lambda: process(**cache))  # draws the volumes too, and warms the files of the libraries
        times = alternate(lambda: process(**cache), lambda: process(JAX_ENABLE_COMPILATION_CACHE="false"), runs, False)
        kept = len(os.listdir(f"{folder}/cache")) if os.path.isdir(f"{folder}/cache") else 0
        notes = {"seconds_to_fill": filling, "files_in_cache": kept}
        return [Row("first step of stage 1, cache or none", *times, BOUND, notes=notes)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.compile", description=__doc__.split("\n")[0])
    parser.add_argument("volumes")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    heap.keep_freed_memory()
    from benchmarks.cases.train_step import our_step, prepared

    loss = our_step(prepared(1, not args.small, args.small, args.volumes))()
    print(f"loss {loss:.4f}")


if __name__ == "__main__":
    main()
