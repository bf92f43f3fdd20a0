"""Drawn patients: CT-like volumes that differ as real ones do, with known truth from a seed, in Hounsfield units.

Axis legend: D slices, H rows, W columns. Nothing here is patient data. Body, position, contrast, scanner and field vary
widely (docs/volumes.md has the ranges); any organ in view can be ill anywhere; a drain holds facts that no single slice
shows. Everything of a volume but its voxels is planned first, which is cheap.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from tghmoe_jax.drawn.canvas import Canvas, Frame
from tghmoe_jax.drawn.chance import pick
from tghmoe_jax.drawn.patient_body import Patient, make_patient
from tghmoe_jax.drawn.patient_drain import Drain, draw_drain, plan_drain
from tghmoe_jax.drawn.patient_lesions import draw_lesion, size_range
from tghmoe_jax.drawn.patient_organs import draw_organs
from tghmoe_jax.drawn.patient_pairs import (
    APART_MM,
    APART_SLICES,
    PAIR_TYPES,
    Outlook,
    choose_pair,
    phrases_of,
)
from tghmoe_jax.drawn.patient_places import View, view_of
from tghmoe_jax.drawn.patient_scanner import Scanner, blurred, field_of, lay_on_table, make_scanner, scan, seen
from tghmoe_jax.drawn.patient_trunk import draw_trunk
from tghmoe_jax.drawn.phantom import DIRECTIONS, PLANES, Phantom, Truth
from tghmoe_jax.drawn.phantom_anatomy import PHASES
from tghmoe_jax.drawn.phantom_lesions import SECTIONS, Lesion

GENERATOR = 1  # counts up with every change that alters a volume or its truth; part of the cache's name
MOST_LESIONS = 3
FEWEST_ORGANS = 4  # in view: three ill ones and another to name
FIELD_MM = (250.0, 500.0)  # log-uniform
COVERAGE_MM = {"axial": (60.0, 420.0), "oblique": (60.0, 300.0), "coronal": (60.0, 200.0), "sagittal": (60.0, 280.0)}
CENTRE_MM = {"chest": (90.0, 215.0), "abdomen": (-95.0, 55.0), "pelvis": (-265.0, -130.0)}  # z of the nominal body
ENDS_MM = (-420.0, 370.0)  # z of the nominal body beyond which a scan shows no more than it must
SHIFT_MM, TURN, TILT = 25.0, np.radians(15), np.radians(6)
PLACE_TRIES = 30  # of a place that is apart from other lesions and that a slice hits, before any will do
HIT = 0.3  # of a lesion's size: how far its centre may lie from a slice
TRIES = 40  # of a field that shows enough organs, before another patient is taken


@dataclasses.dataclass(frozen=True)
class PatientTruth(Truth):
    """Everything known of a volume.

    `places` holds the places in view of each organ in view; `pairs`, for each type of question that compares two
    lesions, the two kinds that it names and its answer, where the volume has such a question.
    """

    sex: str
    drain: Drain | None
    places: dict[str, tuple[str, ...]]
    pairs: dict[str, tuple[str, str, str]]

    @classmethod
    def from_json(cls, row: dict) -> "PatientTruth":
        """The inverse of `dataclasses.asdict`, from one line of truth.jsonl."""
        lists = {name: {key: tuple(value) for key, value in row[name].items()} for name in ("places", "pairs")}
        return super().from_json({**row, "drain": Drain.from_json(row["drain"]), **lists})

    @property
    def heights_mm(self) -> tuple[float, ...]:
        """How high the centre of each lesion lies above voxel (0, 0, 0), in mm along the patient's z."""
        up = np.array(DIRECTIONS[self.plane])[:, 2] * self.spacing_mm
        return tuple(float(np.dot(lesion.centre, up)) for lesion in self.lesions)


@dataclasses.dataclass(frozen=True)
class PatientPlan:
    """A volume before it is drawn; `placed` are the (lesion, centre in the nominal body)."""

    truth: PatientTruth
    patient: Patient
    scanner: Scanner
    frame: Frame
    placed: list[tuple[Lesion, np.ndarray]]


def plan(seed: int, grid: tuple[int, int, int] = (16, 64, 64), plane: str = "") -> PatientPlan:
    """Everything of one seed's volume but its voxels; without a `plane` it is drawn too."""
    rng = _stream(seed, 0)
    section, drawn, phase = (pick(rng, names) for names in (SECTIONS, PLANES, PHASES))
    plane = plane or drawn
    patient, scanner, frame, spacing, view = _setting(section, plane, phase, grid, rng)
    rng = _stream(seed, 1)  # what follows does not depend on how often a field was drawn
    placed = _place(patient, frame, view, spacing, rng)
    lesions = tuple(lesion for lesion, _ in placed)
    drain = plan_drain(plane, grid, scanner.high, rng)
    known = (seed, section, plane, phase, spacing, scanner.noise_hu, lesions, patient.sex, drain, view.places)
    truth = PatientTruth(*known, pairs={})
    pairs = _pairs(truth, view, _stream(seed, 2))
    return PatientPlan(dataclasses.replace(truth, pairs=pairs), patient, scanner, frame, placed)


def draw(
    seed: int, grid: tuple[int, int, int] = (16, 64, 64), plane: str = "", structures: Sequence[str] = ()
) -> Phantom:
    """Draws the volume of one seed; the same seed, grid and plane always give the same volume.

    `structures` are those that its labels name, all that the drawing marks (`labelled.STRUCTURES`), or none.
    """
    planned = plan(seed, grid, plane)
    truth, scanner = planned.truth, planned.scanner
    canvas = Canvas(planned.frame, truth.spacing_mm[1], structures)
    torso = draw_trunk(canvas, planned.patient, _stream(seed, 3))
    draw_organs(torso)
    for number, (lesion, centre) in enumerate(planned.placed):
        draw_lesion(torso, lesion, centre, truth.noise_hu, _stream(seed, 10 + number))
    rng = _stream(seed, 4)
    if scanner.table_mm is not None:
        _lay_down(canvas, planned, rng)
    canvas.hu = blurred(canvas.hu, scanner.thick, (0,))
    if truth.drain:
        draw_drain(canvas, truth.drain, truth.spacing_mm[1], rng)
    if canvas.labels is not None:
        canvas.labels[:, ~field_of(scanner, grid[1:])] = 0
    return Phantom(scan(canvas.hu, scanner, _stream(seed, 5)), truth, canvas.labels)


def _stream(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng((20310, seed, number))


def _setting(
    section: str, plane: str, phase: str, grid: tuple[int, int, int], rng: np.random.Generator
) -> tuple[Patient, Scanner, Frame, tuple, View]:
    """A patient, a scanner and a field that shows enough organs."""
    while True:
        patient = make_patient(phase, rng)
        for _ in range(TRIES):
            scanner = make_scanner(plane, grid[2], rng)
            frame, spacing = _frame(patient, section, plane, grid, rng)
            view = view_of(patient, frame, functools.partial(seen, scanner, grid), rng)
            if len(view.points) >= FEWEST_ORGANS:
                return patient, scanner, frame, spacing, view


def _frame(patient: Patient, section: str, plane: str, grid, rng: np.random.Generator) -> tuple[Frame, tuple]:
    """A field about the middle of a section, in which the body lies shifted, turned and tilted."""
    field, coverage = (float(np.exp(rng.uniform(*np.log(limits)))) for limits in (FIELD_MM, COVERAGE_MM[plane]))
    spacing = (round(coverage / grid[0], 2), *(round(field / n, 2) for n in grid[1:]))
    steps = np.array(DIRECTIONS[plane], np.float64).T * spacing
    extent = np.abs(steps) @ np.array(grid)  # mm along x, y, z
    low, high = CENTRE_MM[section]
    half = extent[2] / 2 / patient.scale[2]
    middle = np.clip(rng.uniform(low, high), min(ENDS_MM[0] + half, high), max(ENDS_MM[1] - half, low))
    turn, tilt = rng.uniform(-TURN, TURN), rng.uniform(-TILT, TILT)
    body = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]]
    )
    centre = np.array([0.0, 4.0, middle]) * patient.scale
    shift = np.array([*rng.uniform(-SHIFT_MM, SHIFT_MM, 2), 0])
    if plane in ("coronal", "sagittal"):  # the slices lie anywhere in the body that has room for them
        axis = 1 if plane == "coronal" else 0
        room = max(0.0, (110, 65)[axis == 1] * patient.scale[axis] - coverage / 2)
        shift[axis] = rng.uniform(-1, 1) * max(room, 15)
    if rng.random() < 0.15:  # off centre, so that the body is cut
        axis = int(rng.integers(2))
        if steps[axis, 0] == 0:
            shift[axis] += rng.choice((-1, 1)) * rng.uniform(0.1, 0.28) * field
    origin = centre + body.T @ (shift - steps @ ((np.array(grid) - 1) / 2))
    return Frame(tuple(grid), origin, body.T @ steps, patient.scale, patient.warp), spacing


def _place(patient: Patient, frame: Frame, view: View, spacing, rng: np.random.Generator) -> list:
    """No to three lesions in different organs; every organ in view, kind and place in view is equally likely."""
    organs, placed = list(view.points), []
    chosen = rng.permutation(len(organs))[: rng.integers(MOST_LESIONS + 1)]
    for organ in (organs[number] for number in chosen):
        phrase = pick(rng, phrases_of(organ))
        size = float(np.exp(rng.uniform(*np.log(size_range(phrase, spacing[1], spacing[0])))))
        for _ in range(PLACE_TRIES):
            place = pick(rng, list(view.points[organ]))
            number = int(rng.integers(len(view.points[organ][place])))
            point, slice_ = view.points[organ][place][number], view.index[organ][place][number][0]
            gaps = [(np.linalg.norm((point - at) * patient.scale), other.size_mm) for other, at in placed]
            apart = all(gap > 0.5 * (size + other) for gap, other in gaps)
            if apart and abs(slice_ - round(slice_)) * spacing[0] <= HIT * size:
                break
        if organ == "pleura":  # the middle of what fills the edge of the lung
            lung = patient.lung(int(np.sign(point[0]))).centre
            point = point + 0.12 * size * (lung - point) / np.linalg.norm(lung - point)
        side = place.split()[0] if place.startswith(("right", "left")) else "left"
        centre = tuple(round(float(v), 2) for v in frame.position(point))
        lesion = phrase.split()[-1]
        placed.append((Lesion(phrase, lesion, organ, side, place, round(size, 1), centre), point))
    return placed


def _pairs(truth: PatientTruth, view: View, rng: np.random.Generator) -> dict:
    up = np.array(DIRECTIONS[truth.plane])[:, 2] * truth.spacing_mm
    heights = {}
    for organ, places in view.index.items():  # a lesion is as likely in each place
        heights[organ] = np.concatenate([index[np.arange(24) % len(index)] for index in places.values()]) @ up
    kinds = [phrase for organ in view.points for phrase in phrases_of(organ)]
    sizes = {phrase: size_range(phrase, truth.spacing_mm[1], truth.spacing_mm[0]) for phrase in kinds}
    outlook = Outlook(view.places, heights, sizes, max(APART_MM, APART_SLICES * truth.spacing_mm[0]))
    tried = {type: choose_pair(type, list(truth.lesions), list(truth.heights_mm), outlook, rng) for type in PAIR_TYPES}
    return {type: pair for type, pair in tried.items() if pair}


def _lay_down(canvas: Canvas, planned: PatientPlan, rng: np.random.Generator) -> None:
    """The table stands straight however the patient lies on it."""
    truth, frame, patient = planned.truth, planned.frame, planned.patient
    steps = np.array(DIRECTIONS[truth.plane], np.float64).T * truth.spacing_mm
    turn = steps @ np.linalg.inv(frame.steps)
    index = np.ogrid[tuple(slice(0, n) for n in frame.grid)]
    x, y = (sum(steps[c, a] * index[a] for a in range(3)) + (turn @ frame.origin)[c] for c in (0, 1))
    _, back, _ = patient.wall(np.zeros(1, np.float32))
    behind = y - back[0] * patient.scale[1] - patient.fat_mm - planned.scanner.table_mm
    lay_on_table(canvas.hu, behind.astype(np.float32), x.astype(np.float32), rng)
