"""Many scans with one model against a call of `predict` each: answers a minute, memory, and the file after kills.

    python -m benchmarks.many_scans FOLDER [--scans 200] [--calls 8] [--kills 3]

Draws axial phantoms as NIfTI files into FOLDER, one in ten of them bad, and asks the embedded reader three questions of
each. Programs are compiled before anything is timed. Prints one JSON object.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from tghmoe_jax.drawn import phantom
from tghmoe_jax.drawn.cache import seeds_of

QUESTIONS = (
    "Which plane is this? Choices: A. axial B. coronal C. sagittal D. oblique",
    "Which contrast phase is this?",
    "Is there an abnormality?",
)
AXES = np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]], float)  # of an array of slices, rows and columns


def write(file: Path, array: np.ndarray, spacing: tuple[float, ...]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = AXES * np.array(spacing)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(file)


def spoil(file: Path, how: int) -> None:
    """Makes a scan bad in one of ten ways."""
    image, content = nib.load(file), file.read_bytes()
    array, affine = np.asarray(image.dataobj), image.affine
    if how < 6:
        changed = (b"", content[: len(content) // 2], b"no scan", content[::-1], content[:-9], content[:400])[how]
        return file.write_bytes(changed) and None
    if how == 6:
        return file.unlink()
    arrays = {7: array[:1], 8: np.full(array.shape, np.nan, np.float32), 9: (array > 0).astype(np.float32)}
    nib.Nifti1Image(arrays[how], affine).to_filename(file)
    return None


def draw(folder: Path, count: int) -> Path:
    """`count` scans and a list of them, every tenth of them bad."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:04d}.nii.gz" for i in range(count)]
    seeds = (seed for seed in seeds_of("test", 10_000, 0) if phantom.plan(seed).truth.plane == "axial")
    for i, (name, seed) in enumerate(zip(names, seeds, strict=False)):
        drawn = phantom.draw(seed)
        write(folder / name, drawn.hu, drawn.truth.spacing_mm)
        if i % 10 == 9:
            spoil(folder / name, i // 10 % 10)
    (folder / "questions.txt").write_text("\n".join(QUESTIONS) + "\n")
    for part in sorted({8, min(50, count), count}):
        lines = "".join(f"{name},scan {i}\n" for i, name in enumerate(names[:part]))
        (folder / f"list-{part}.csv").write_text(f"volume,id\n{lines}")
    return folder


def command(*flags: object) -> list[str]:
    return [sys.executable, "-m", "tghmoe_jax.predict", *map(str, flags)]


def listed(folder: Path, count: int, to: str) -> list[str]:
    return command("--list", folder / f"list-{count}.csv", "--questions", folder / "questions.txt", "--to", folder / to)


class Cost(NamedTuple):
    """Of a command and its workers: seconds on the clock and of processors, and the peak MiB of one process."""

    seconds: float
    processor: float
    mib: float


def timed(arguments: list[str]) -> Cost:
    begun = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    cost = Cost(time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
    print(" ".join(arguments[3:5]), cost, file=sys.stderr, flush=True)
    return cost


def killed(arguments: list[str], times: int, whole: float) -> list[float]:
    """Kills the command after a random time, as often as asked, then lets it finish."""
    rng, after = random.Random(0), []
    for _ in range(times):
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            after.append(round(rng.uniform(0.25, 0.6) * whole, 1))
            process.wait(after[-1])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    timed(arguments)
    return after


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scans", type=int, default=200)
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--no-warm", dest="warm", action="store_false", help="the programs are compiled already")
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    folder, scans = draw(args.folder, args.scans), args.scans
    few = min(50, scans)
    for old in folder.glob("*answers.csv*"):
        old.unlink()

    def called(i: int) -> Cost:
        question, _, choices = QUESTIONS[i % len(QUESTIONS)].partition(" Choices: ")
        more = ["--choices", "axial|coronal|sagittal|oblique"] if choices else []
        return timed(command("--volume", folder / f"{i % 8:04d}.nii.gz", "--question", question, *more))

    if args.warm:
        timed(listed(folder, 8, "first-answers.csv"))
        called(0), called(1)
    whole = timed(listed(folder, scans, "answers.csv"))
    call = Cost(*np.mean([called(i) for i in range(args.calls)], axis=0))
    part = timed(listed(folder, few, "few-answers.csv"))
    after = killed(listed(folder, scans, "killed-answers.csv"), args.kills, whole.seconds)
    answers = (scans - scans // 10) * len(QUESTIONS)
    same = all(
        (folder / f"answers.csv{end}").read_bytes() == (folder / f"killed-answers.csv{end}").read_bytes()
        for end in ("", ".json")
    )
    print(json.dumps({
        "scans": scans, "bad": scans // 10, "questions": len(QUESTIONS), "answers": answers,
        "calls_of_predict": args.calls, "seconds": round(whole.seconds, 1), "seconds_a_call": round(call.seconds, 1),
        "answers_a_minute": {"list": round(60 * answers / whole.seconds, 1), "calls": round(60 / call.seconds, 1)},
        "times_as_many": round(answers * call.seconds / whole.seconds, 1),
        "processor_seconds_an_answer": {"list": round(whole.processor / answers, 2), "calls": round(call.processor, 2)},
        "peak_mib": {few: round(part.mib), scans: round(whole.mib)},
        "killed_after_seconds": after, "same_bytes_after_kills": same, "cores": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
