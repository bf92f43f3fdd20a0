"""A third style of drawn CT, made for tests alone: no model is trained on it.

It shares names and truth with the other styles, but no anatomy and no drawing code. Organs are outlines by level and
sweeps along splines (`phantom3_shapes`), the ribs and the shoulder blade are patterns on the surface of the chest, and
the small bowel is a channel of a gyroid. The anatomy (`phantom3_tables`) comes from textbooks and from the look of real
CT. Sides and places are those of `phantom3_seats`.
"""

import dataclasses

import numpy as np

from tghmoe_jax.drawn.chance import pick
from tghmoe_jax.drawn.phantom import LESION_COUNTS, PLANES, Phantom, Truth
from tghmoe_jax.drawn.phantom3_anatomy import paint
from tghmoe_jax.drawn.phantom3_body import Figure, Person
from tghmoe_jax.drawn.phantom3_lesions import Finding, paint_lesion
from tghmoe_jax.drawn.phantom3_painter import Painter
from tghmoe_jax.drawn.phantom3_scan import FieldOfView, finish, lay_table
from tghmoe_jax.drawn.phantom3_seats import LARGEST, PLACES, SMALLEST, seats
from tghmoe_jax.drawn.phantom_anatomy import PHASES
from tghmoe_jax.drawn.phantom_lesions import ORGANS_BY_SECTION, SECTIONS, Lesion, kind_of, kinds_of
from tghmoe_jax.errors import UserError

GRID = (16, 64, 64)
_PATIENTS, _TRIES = 64, 60  # how many patients, and scans of each, are tried before the grid is given up


@dataclasses.dataclass(frozen=True)
class Composition:
    """All that decides a volume: the truth, the patient, the scan, and the lesions in the frame of the atlas."""

    truth: Truth
    patient: Person
    scan: FieldOfView
    findings: tuple[Finding, ...]


def plan(seed: int, grid: tuple[int, int, int] = GRID) -> Truth:
    """The truth of a volume without its voxels; the same arguments always give the same truth."""
    return compose(seed, grid).truth


def draw(seed: int, grid: tuple[int, int, int] = GRID) -> Phantom:
    """Draw the volume of a seed: int16 HU (D, H, W) with its truth. The same arguments always give the same volume."""
    composition = compose(seed, grid)
    return Phantom(render(composition), composition.truth)


def compose(seed: int, grid: tuple[int, int, int] = GRID) -> Composition:
    """Choose patient, scan and lesions of a volume.

    Raises UserError where the grid is so coarse that no lesion could be seen.
    """
    rng = np.random.default_rng([seed, 3])
    section, plane, phase = pick(rng, SECTIONS), pick(rng, PLANES), pick(rng, PHASES)
    count = int(rng.choice(len(LESION_COUNTS), p=LESION_COUNTS))
    organs = rng.choice(ORGANS_BY_SECTION[section], count, replace=False)
    kinds = [pick(rng, kinds_of(section, organ)).phrase for organ in organs]
    noise_hu = float(np.exp(rng.uniform(np.log(4), np.log(12))))
    female = bool(rng.random() < 0.5)
    if {"breast", "ovary"} & set(organs):
        female = True
    elif "artery" in organs:
        female = False
    for attempt in range(_PATIENTS):
        if attempt % 8 == 0:  # places that no scan could show are given up
            places = [int(rng.integers(len(PLACES))) for _ in kinds]
        patient = Person.make(rng, int(rng.integers(1 << 31)), female)
        body = Figure(patient)
        options = [_option(kind, place, section, body, rng) for kind, place in zip(kinds, places, strict=True)]
        for _ in range(_TRIES if all(len(option.points) for option in options) else 0):
            scan = FieldOfView.make(rng, section, plane, grid, patient)
            findings = _settle(options, patient, scan, rng)
            if findings is not None:
                lesions = tuple(_lesion(f, section, patient, scan) for f in findings)
                truth = Truth(seed, section, plane, phase, scan.spacing, noise_hu, lesions)
                return Composition(truth, patient, scan, tuple(findings))
    raise UserError(f"the grid {grid} is too coarse to show lesions; take more voxels, such as {GRID}")


@dataclasses.dataclass(frozen=True)
class _Option:
    """Where a lesion can lie in one place of its organ: `points` (N, 3) of the atlas, the same points of the scanner's
    frame (`where`), and the largest size (N,) each holds, all in mm.
    """

    kind: str
    place: str
    points: np.ndarray
    where: np.ndarray
    holds: np.ndarray


def _option(kind: str, place: int, section: str, body: Figure, rng: np.random.Generator) -> _Option:
    """The seats of a lesion in one of the places of its organ."""
    found = seats(kind, section, body, rng)
    points, holds = found.points[found.places == place], found.holds[found.places == place]
    return _Option(kind, found.names[place], points, body.patient.to_scanner(points), holds)


def _settle(options: list[_Option], patient: Person, scan: FieldOfView, rng) -> list[Finding] | None:
    """Put each lesion somewhere in the scan; None where one finds no room."""
    findings: list[Finding] = []
    for option in options:
        finding = _seat(option, findings, patient, scan, rng)
        if finding is None:
            return None
        findings.append(finding)
    return findings


def _seat(option: _Option, others: list[Finding], patient: Person, scan: FieldOfView, rng) -> Finding | None:
    slice_mm, _, pixel = scan.spacing
    smallest = max(10.0, 1.8 * pixel, 0.7 * slice_mm, SMALLEST.get(option.kind, 0.0))
    holds = np.minimum(np.minimum(option.holds, 2 * scan.room(option.where)), LARGEST)
    for other in others:
        gap = np.linalg.norm((option.points - other.spot) * patient.scale, axis=1)
        holds = np.minimum(holds, 2 * gap - other.size - 6)
    at = scan.to_index(option.where)[:, 0]
    holds[np.abs(at - np.rint(at)) > 0.25] = 0  # one slice must pass near the middle of a lesion
    usable = holds >= smallest
    if not usable.any():
        return None
    size = float(np.exp(rng.uniform(np.log(smallest), np.log(holds[usable].max()))))
    usable = np.flatnonzero(holds >= size)
    spot = option.points[rng.choice(usable)]
    return Finding(option.kind, option.place, size, tuple(float(c) for c in spot))


def _lesion(f: Finding, section: str, patient: Person, scan: FieldOfView) -> Lesion:
    kind = kind_of(f.kind, section)
    side = "left" if kind.side_is_fixed else f.place.split()[0]
    centre = scan.to_index(patient.to_scanner([f.spot]))[0]
    return Lesion(f.kind, kind.lesion, kind.organ, side, f.place, f.size, tuple(float(c) for c in centre))


def render(composition: Composition, without: int | None = None) -> np.ndarray:
    """The voxels of a composition: int16 HU (D, H, W). `without` is the index of a lesion to leave out."""
    truth, patient, scan = composition.truth, composition.patient, composition.scan
    (x, y, z), level, scanned = scan.points(patient)
    scale = float(np.prod(patient.scale)) ** (1 / 3)
    p = Painter(Figure(patient), truth.phase, (x, y, z), scan.fine, 0.9 * scan.spacing[2] / scale)
    volume = float(np.prod(scan.spacing)) * scan.thick / scan.parts
    paint(p, volume / scale**3, lambda q: scan.to_fine(scan.to_index(patient.to_scanner(q))))
    for i, finding in enumerate(composition.findings):
        if i != without:
            paint_lesion(p, finding, np.random.default_rng([truth.seed, 4, i]))
    hu = np.full(len(x), -1000, np.float32)
    hu[p.at] = p.hu
    lay_table(hu, p.full_skin, x * np.float32(patient.scale[0]), level)
    hu = finish(hu, p.full_skin < 0, scan, truth.noise_hu, np.random.default_rng([truth.seed, 5]))
    middle = scanned.reshape(scan.grid[0], scan.parts, *scan.grid[1:])[:, scan.parts // 2]
    hu[~middle] = -1024
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
