"""The whole process of `python -m tghmoe_jax.predict` on a volume file: the second one (ours) against the first (peer).

The first process of a turn finds no compiled programs: what the command keeps for later lies under a new
XDG_CACHE_HOME, and nothing else is set. The second asks a question of another length. Time to the first token is that
of a process that is asked for one token; the full report is as long as the run's evaluation lets it be. The files that
Python and the libraries read are warm, and so are matplotlib's fonts.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import data
from benchmarks.measure import ROOT, Row, seconds

BOUND = 0.4
SHORT = "Which plane is this?"
LONG = "Is there a lung nodule in the left lung, or is there an effusion, and which of the two is seen in more slices?"
SMALL_SHAPE = (48, 48, 12)
ONE_TOKEN = ("--new-tokens=1",)


def run(small: bool, runs: int) -> list[Row]:
    kinds = {"first token": (("--question", SHORT, *ONE_TOKEN), ("--question", LONG, *ONE_TOKEN))}
    if not small:
        report = ("--report", "--allow-out-of-domain")
        kinds["full report"] = (report, report)
    times = {kind: ([], []) for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        volume = Path(folder) / "scan.nii.gz"
        data.write(volume, SMALL_SHAPE if small else data.SHAPE)
        if not small:
            predict(folder, "unmeasured", volume, kinds["first token"][0])
        for turn in range(runs):
            for kind, (first, second) in kinds.items():
                cache = f"{kind} {turn}"
                times[kind][1].append(seconds(lambda c=cache, a=first: predict(folder, c, volume, a)))
                times[kind][0].append(seconds(lambda c=cache, a=second: predict(folder, c, volume, a)))
    megabytes = {"voxels": list(SMALL_SHAPE if small else data.SHAPE)}
    return [Row(f"{kind}, second process over first", *both, BOUND if kind == "first token" else None, notes=megabytes)
            for kind, both in times.items()]  # fmt: skip


def predict(folder: str, cache: str, volume: Path, arguments: tuple[str, ...]) -> None:
    """One process, whose caches are those of earlier ones with the same `cache`."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"XDG_CACHE_HOME": f"{folder}/{cache}", "MPLCONFIGDIR": f"{folder}/matplotlib"}
    command = [sys.executable, "-m", "tghmoe_jax.predict", "--volume", str(volume), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: pipeline: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
