"""Time and memory from a scan file to the model's input, beside SimpleITK's resampler in the same run; then how many
prepared volumes a second grain feeds (see `feed`).

    python -m benchmarks.data [--runs 5] [--workers 2] [--seconds 20] [--folder DIR]

Writes a drawn scan of 512 x 512 x 300 voxels (int16, with the noise of a CT, so that it packs about 2 to 1 as real
scans do) as .nii.gz, then makes 32 slices of 336 x 336 pixels from it, each time in a new process bound to one core
with one thread. `growth` is the peak of resident memory over that of the same process after its imports, in multiples
of the raw volume (157 MB).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.measure import busy, cores, peak_memory

SHAPE = (512, 512, 300)  # columns, rows, slices, as NIfTI stores them
SPACING = (0.75, 0.75, 1.0)
SLICES, SIZE = 32, 336
RAW = int(np.prod(SHAPE)) * 2
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
                                     "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")}  # fmt: skip


def write(path: Path, shape: tuple[int, int, int] = SHAPE) -> None:
    """A body with lungs and a spine; noise of 25 HU inside, 8 HU in air, blurred in plane as a kernel leaves it."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:2]), indexing="ij")
    scan = np.empty(shape, np.int16)
    for z in range(shape[2]):
        hu = np.full(shape[:2], -1000.0)
        body = (x / 0.9) ** 2 + (y / 0.7) ** 2 < 1
        hu[body] = 40 + 20 * np.sin(z / 30)
        for side in (-0.4, 0.4):
            hu[((x - side) / 0.3) ** 2 + (y / 0.45) ** 2 < (z / shape[2])] = -850
        hu[x**2 + (y - 0.5) ** 2 < 0.01] = 600
        noise = rng.normal(size=shape[:2])
        noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (1, 1), (0, 1))) / 2
        scan[..., z] = np.clip(np.rint(hu + noise * np.where(body, 25, 8)), -1024, 3071)
    image = nib.Nifti1Image(scan, np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0]))
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def ours(path: Path):
    """This project's way, windows and all."""
    from tghmoe_jax.scans.reading import read_volume
    from tghmoe_jax.scans.slices import prepare_slices

    yield
    return prepare_slices(read_volume(path), SLICES, SIZE).slices[..., 0].astype(float)


def itk(path: Path):
    """SimpleITK: read, resample to the same grid and window; linear, first as it is, so not anti-aliased."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    yield
    image = sitk.ReadImage(str(path))
    return _itk_resampled(sitk, image)


def itk_smoothed(path: Path):
    """SimpleITK with what anti-aliasing needs: a Gaussian of half the target's step along each axis, then linear."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    yield
    image = sitk.ReadImage(str(path), sitk.sitkFloat32)
    steps = [n * d / m for n, d, m in zip(SHAPE, SPACING, (SIZE, SIZE, SLICES), strict=True)]
    return _itk_resampled(sitk, sitk.SmoothingRecursiveGaussian(image, [step / 2 for step in steps]))


def _itk_resampled(sitk, image):
    counts = (SIZE, SIZE, SLICES)
    spacing = [n * d / m for n, d, m in zip(image.GetSize(), image.GetSpacing(), counts, strict=True)]
    first = [(new / old - 1) / 2 for new, old in zip(spacing, image.GetSpacing(), strict=True)]
    grid = sitk.Resample(
        image, counts, sitk.Transform(), sitk.sitkLinear, image.TransformContinuousIndexToPhysicalPoint(first),
        spacing, image.GetDirection(), -1000.0, sitk.sitkFloat32,
    )  # fmt: skip
    out = sitk.GetArrayFromImage(grid)
    return [np.clip((out - low) * (255 / width), 0, 255) for low, width in ((-1350, 1500), (-160, 400), (-500, 1800))][
        0
    ]


WAYS = {"ours": ours, "SimpleITK, linear": itk, "SimpleITK, Gaussian and linear": itk_smoothed}


def once(way: str, path: Path, save: Path) -> None:
    """One run in this process; prints seconds, bytes of growth and the checks' picture as JSON."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    steps = WAYS[way](path)
    next(steps)  # imports
    idle, begun = peak_memory(), time.perf_counter()
    busy = time.process_time()
    try:
        next(steps)
    except StopIteration as stop:
        array = np.asarray(stop.value)
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    growth = peak_memory() - idle
    np.save(save, array.astype(np.float32))
    print(json.dumps({"seconds": seconds, "cpu": busy, "growth": growth / RAW}))


def main() -> None:
    """All ways in turn, several times, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes that feed")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each way to feed")
    parser.add_argument("--folder", help="where 300 MB may be written")
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        once(args.once[0], *map(Path, args.once[1:]))
        return
    from benchmarks import feed  # not in the processes that are measured

    print(f"{cores()} cores, {busy():.0%} busy before the start", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        path = Path(name) / "scan.nii.gz"
        write(path)
        print(f"{RAW / 1e6:.0f} MB of voxels in {path.stat().st_size / 1e6:.0f} MB; median of {args.runs} (best)")
        print(f"{'':<32} {'seconds':>14} {'CPU seconds':>14} {'growth x raw':>14}")
        results: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(args.runs):
            for index, way in enumerate(WAYS):
                command = [sys.executable, "-m", "benchmarks.data", "--once", way, str(path), f"{name}/{index}.npy"]
                text = subprocess.run(command, env={**os.environ, **ONE_THREAD}, check=True, capture_output=True).stdout
                results[way].append(json.loads(text))
        for way, runs in results.items():
            columns = [[run[key] for run in runs] for key in ("seconds", "cpu", "growth")]
            print(f"{way:<32} " + " ".join(f"{statistics.median(c):7.2f} ({min(c):4.2f})" for c in columns))
        grids = [np.load(f"{name}/{index}.npy") for index in range(len(WAYS))]
        for way, grid in list(zip(WAYS, grids, strict=True))[1:]:
            off = np.abs(grid - grids[0])
            print(f"grey levels of the lung window from ours: {way}: mean {off.mean():.2f}, 99 % within "
                  f"{np.percentile(off, 99):.1f}")  # fmt: skip
        feed.table(Path(name), args.workers, args.seconds)


if __name__ == "__main__":
    main()
