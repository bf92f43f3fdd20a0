"""Kills a tiny run again and again, or asks it to stop, and compares its result with an uninterrupted run.

    python -m benchmarks.kills [--kills 200] [--signals KILL,TERM,INT] [--processes 1] [--minutes M]

Each process is hit by one of the signals at a drawn moment of a phase: start, drawing of volumes, restore, step, save
or evaluation. The same command then goes on, is hit again, and after `--chain` hits it runs to its end. What must hold:

    KILL          every checkpoint can be read; losses, parameters and evaluation files are bitwise those of the
                  unbroken run; no process and no hidden folder is left
    TERM, INT     the same, and every process ends within 30 s with exit code 75 (0 where it was done) and no traceback;
                  of two processes one is asked (both at the start, where they have not met), and both end at one step
"""

import argparse
import collections
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tghmoe_jax.errors import PREEMPTED
from tghmoe_jax.training import stored
from tghmoe_jax.training.reporting import deterministic, read_metrics

ROOT = Path(__file__).resolve().parent.parent
HEAD = re.compile(rb'(?s)<dl class="head">.*?</dl>')  # of report.html: date, command and folder
LIMIT = 30.0  # seconds that a spot machine leaves
PLAN = (  # a run often ends after six or seven
    "start", "drawing", "save", "restore", "evaluation", "step", "restore", "evaluation", "save", "step",
)  # fmt: skip
STEPS = 8
FLAGS = {
    "init_from": "", "data.name": "phantom", "data.volumes": 240, "data.slices": 8, "data.size": 32,
    "data.text_length": 96, "base_config.hidden_size": 32, "base_config.num_hidden_layers": 1,
    "base_config.num_attention_heads": 2, "base_config.num_key_value_heads": 2, "base_config.intermediate_size": 48,
    "base_config.vision_config.hidden_size": 16, "base_config.vision_config.num_hidden_layers": 2,
    "base_config.vision_config.num_attention_heads": 2, "base_config.vision_config.intermediate_size": 32,
    "base_config.vision_config.image_size": 32, "model.patch_depth": 8, "model.depth_rope.rotary_dim": 8,
    "model.tgh.layers": "0", "model.tgh.hidden": 16, "train.steps": STEPS, "train.batch": 16, "optimizer.name": "adamw",
    "checkpoint.every": 2, "eval.every": 4, "eval.items": 8, "eval.calibration": 20, "eval.batch": 8,
    "eval.new_tokens": 4, "eval.answer_tokens": 4, "eval.controls": "()",
}  # fmt: skip
# The command itself, which tells when it begins a phase.
TOLD = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts background processes deaf to it
print("@ start", flush=True)
from tghmoe_jax import errors
run = errors.run_command
def told(place, name, phase):
    call = getattr(place, name)
    def calling(*args, **kw):
        print("@", phase, flush=True)
        return call(*args, **kw)
    setattr(place, name, calling)
def tell(main):
    from tghmoe_jax import evaluate
    from tghmoe_jax.drawn import cache
    from tghmoe_jax.training import checkpoints, reporting, stored
    told(cache, "_begin", "drawing")
    told(checkpoints.Checkpoints, "restore", "restore")
    told(checkpoints.Checkpoints, "save", "save")
    told(reporting.RunLog, "record", "step")
    told(evaluate, "evaluate_all", "evaluation")
    return main()
errors.run_command = lambda main, code: run(lambda: tell(main), code)
runpy.run_module("tghmoe_jax.main", run_name="__main__", alter_sys=True)
"""


class Host:
    """One process of the command; `marks` holds (phase, time) of what it has begun."""

    def __init__(self, folder: Path, run: Path, more: list[str]):
        flags = [f"--config={ROOT / 'configs' / 'pretrain2d.py'}", f"--config.data.root={run}-data"]
        flags += [f"--config.{key}={value}" for key, value in FLAGS.items()]
        own = {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }  # fmt: skip
        self.marks: list[tuple[str, float]] = []
        self.said: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TOLD, *flags, f"--workdir={run}", *more], cwd=folder, env=os.environ | own,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            with self._news:
                if line.startswith("@ "):
                    self.marks.append((line[2:].strip(), time.monotonic()))
                else:
                    self.said.append(line)
                self._news.notify_all()
        with self._news:
            self.marks.append(("end", time.monotonic()))
            self._news.notify_all()

    def reaches(self, phase: str, occurrence: int) -> bool:
        """Waits until the process begins a phase for the n-th time; False where it ends before."""
        with self._news:
            self._news.wait_for(lambda: self._count(phase) >= occurrence or self._count("end"))
            return self._count(phase) >= occurrence and not self._count("end")

    def _count(self, phase: str) -> int:
        return sum(one == phase for one, _ in self.marks)

    def ends(self) -> int:
        code = self.process.wait()
        self._listener.join()
        return code

    @property
    def text(self) -> str:
        return "".join(self.said)


def begin(folder: Path, run: Path, processes: int) -> list[Host]:
    if processes == 1:
        return [Host(folder, run, [])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    return [Host(folder, run, [address, f"--process={i}", f"--processes={processes}"]) for i in range(processes)]


def results(run: Path) -> dict:
    """All that must be that of the unbroken run, in bits."""
    params, step = stored.load_params(run)
    files = (path for path in (run / "eval").rglob("*") if path.is_file())
    return {
        "losses": [deterministic(record) for record in read_metrics(run / "metrics.jsonl")],
        "parameters": (step, {name: leaf.tobytes() for name, leaf in params.items()}),
        "scores": {str(file.relative_to(run)): HEAD.sub(b"", file.read_bytes()) for file in files},
    }


def left(run: Path) -> list[str]:
    """Hidden folders of drawing, and processes that name the run's folders."""
    found = [path.name for path in Path(f"{run}-data").glob(".*")]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run).encode() in entry.read_bytes():
                found.append(f"process {entry.parent.name}")
        except OSError:  # it has ended
            continue
    return found


def untouched(folder: Path, processes: int) -> tuple[dict, dict[str, float]]:
    """The results of a run that nobody kills, and how long its phases take at least, in seconds."""
    hosts = begin(folder, folder / "unbroken", processes)
    if any([host.ends() for host in hosts]):
        raise RuntimeError(hosts[0].text[-3000:])
    lengths = collections.defaultdict(list)
    for (phase, at), (_, end) in zip(hosts[0].marks, hosts[0].marks[1:], strict=False):
        lengths[phase].append(end - at)
    lengths["restore"] = [0.3]  # an unbroken run restores nothing
    return results(folder / "unbroken"), {phase: min(several) for phase, several in lengths.items()}


def hit(hosts: list[Host], phase: str, occurrence: int, length: float, name: str, rng: random.Random) -> dict | None:
    """Hits the processes at a moment of a phase; None where they ended before. {phase, signal, seconds, ...}."""
    if not hosts[0].reaches(phase, occurrence):
        return None
    time.sleep(rng.uniform(0, length))
    number = getattr(signal, f"SIG{name}")
    targets = hosts if number == signal.SIGKILL or phase == "start" else [rng.choice(hosts)]
    for host in rng.sample(targets, len(targets)):
        host.process.send_signal(number)
    begun = time.monotonic()
    codes = [host.ends() for host in hosts]
    seconds, text = time.monotonic() - begun, "".join(host.text for host in hosts)
    faults = [] if number == signal.SIGKILL or "Traceback" not in text else ["traceback"]
    if number != signal.SIGKILL:
        # Before the first line of the command is run, a signal ends the interpreter itself.
        allowed = {0, PREEMPTED} | ({-number} if phase == "start" else set())
        faults += ["late"] * (seconds > LIMIT) + ["exit code"] * (not set(codes) <= allowed)
        faults += ["different codes"] * (len(set(codes)) > 1)
    return {"phase": phase, "signal": name, "seconds": seconds, "codes": codes, "faults": faults, "text": text[-3000:]}


def trouble(text: str) -> list[str]:
    """What a resumed run must not say."""
    return [word for word in ("damaged", "Traceback", "Error reading", "Error writing") if word in text]


def ended(run: Path, hosts: list[Host], unbroken: dict) -> list[str]:
    """What is wrong with a run that has come to its end."""
    codes = [host.ends() for host in hosts]
    if any(codes):
        return [f"exit codes {codes}: {hosts[0].text[-3000:]}"]
    found = results(run)
    faults = [f"different {part}" for part in unbroken if found[part] != unbroken[part]]
    limit = time.monotonic() + LIMIT
    while (more := left(run)) and time.monotonic() < limit:
        time.sleep(0.1)
    return faults + [f"left over: {one}" for one in more]


def campaign(
    kills: int, signals: list[str], processes: int, chain: int, seed: int, folder: Path, minutes: float = math.inf
) -> tuple[list[dict], list[dict]]:
    """(a record for each hit, a record for each run that came to its end)."""
    unbroken, lengths = untouched(folder, processes)
    limit = time.monotonic() + 60 * minutes
    rng, hits, runs = random.Random(seed), [], []  # noqa: S311
    while len(hits) < kills and time.monotonic() < limit:
        run = folder / f"run-{len(runs)}"
        since = len(hits)
        while True:
            hosts = begin(folder, run, processes)
            if len(hits) >= min(kills, since + chain) or time.monotonic() > limit:
                break
            phase = PLAN[(len(hits) - since) % len(PLAN)]
            occurrence = 1 if phase in ("start", "restore") else rng.choice((1, 1, 2))  # a process does these once
            found = hit(hosts, phase, occurrence, lengths[phase], rng.choice(signals), rng)
            if found is None:
                break
            hits.append(found | {"faults": found["faults"] + trouble(found["text"])})
            if hits[-1]["faults"]:
                print(f"{found['signal']} in {phase}: {hits[-1]['faults']} {found['codes']}\n{found['text']}")
            if not any(found["codes"]):  # it was done when the signal came
                break
        faults = ended(run, hosts, unbroken)
        faults += trouble("".join(host.text for host in hosts))
        runs.append({"hits": len(hits) - since, "faults": faults})
        print(f"{run.name}: {runs[-1]['hits']} hits, {'; '.join(faults) or 'as the unbroken run'}", flush=True)
        for made in (run, Path(f"{run}-data")):
            shutil.rmtree(made, ignore_errors=True)
    return hits, runs


def table(hits: list[dict], runs: list[dict]) -> str:
    signals = list(dict.fromkeys(one["signal"] for one in hits))
    lines = [f"| phase | {' | '.join(signals)} | faults | longest end, s |", "|---" * (len(signals) + 3) + "|"]
    for phase in dict.fromkeys(PLAN):
        own = [one for one in hits if one["phase"] == phase]
        counts = [str(sum(one["signal"] == name for one in own)) for name in signals]
        faults = collections.Counter(fault for one in own for fault in one["faults"])
        longest = max((one["seconds"] for one in own), default=0.0)
        lines.append(f"| {' | '.join([phase, *counts])} | {json.dumps(faults) if faults else 0} | {longest:.1f} |")
    bad = sum(bool(one["faults"]) for one in runs)
    return "\n".join([*lines, f"{len(hits)} hits; {len(runs)} runs came to their end, {bad} of them with faults"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", default="KILL", help="a list of KILL, TERM and INT")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--chain", type=int, default=20, help="hits before a run may end")
    parser.add_argument("--minutes", type=float, default=math.inf, help="hits nothing after so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    signals = args.signals.split(",")
    with tempfile.TemporaryDirectory() as folder:
        hits, runs = campaign(args.kills, signals, args.processes, args.chain, args.seed, Path(folder), args.minutes)
    print(table(hits, runs))
    return int(any(one["faults"] for one in hits + runs))


if __name__ == "__main__":
    sys.exit(main())
