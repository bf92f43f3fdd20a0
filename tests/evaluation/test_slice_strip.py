"""Pictures of a case: the window that shows its finding, sharp slices with their numbers, and the patient's sides."""

import io

import numpy as np
import pytest
from PIL import Image

from tghmoe_jax.drawn.phantom import DIRECTIONS
from tghmoe_jax.drawn.phantom_source import PhantomSource
from tghmoe_jax.evaluation import slice_strip
from tghmoe_jax.scans.slices import CHANNELS

WINDOWS = CHANNELS["windows3"]


def picture(slices, mask=None, sides=None):
    mask = np.ones(len(slices), bool) if mask is None else mask
    png, shown = slice_strip.strip(slices, mask, sides)
    return np.asarray(Image.open(io.BytesIO(png))), shown


@pytest.mark.parametrize(
    "texts, windows",
    [
        (["a lung nodule"], ["lung"]),
        (["Pneumothorax on the left"], ["lung"]),
        (["a rib fracture"], ["bone"]),
        (["a pleural effusion"], ["mediastinum"]),
        (["free air, pneumoperitoneum"], ["mediastinum"]),
        (["liver cyst", "kidney stone"], ["mediastinum", "bone"]),
        (["lung nodule", "nodule in the right lung"], ["lung"]),
        ([], ["mediastinum"]),
    ],
)
def test_the_window_is_that_of_the_finding(texts, windows):
    assert [WINDOWS[channel] for channel in slice_strip.windows_of(texts, WINDOWS)] == windows


def test_channels_without_that_window_show_the_next_best():
    wide, soft, brain = range(3)
    names = CHANNELS["medgemma"]
    assert slice_strip.windows_of(["lung nodule"], names) == [wide]
    assert slice_strip.windows_of(["subdural haemorrhage"], names) == [brain]
    assert slice_strip.windows_of(["liver cyst"], names) == slice_strip.windows_of([""], names) == [soft]
    assert slice_strip.windows_of(["brain tumour"], WINDOWS) == [1] == slice_strip.windows_of(["lung"], ())


@pytest.mark.parametrize("size", [8, 64, 128, 300, 512])
def test_small_slices_are_enlarged_without_blur_and_large_ones_fit(size):
    slices = np.zeros((3, size, size), np.uint8)
    slices[:, ::2] = 255
    drawn, shown = picture(slices)
    tile = (drawn.shape[0] - slice_strip.GAP, drawn.shape[1] // 3 - slice_strip.GAP)
    assert shown == "3 of 3 slices" and tile[0] == tile[1] <= 2 * slice_strip.TILE
    if size <= 2 * slice_strip.TILE:
        assert set(np.unique(drawn[tile[0] // 2 : tile[0], : tile[1]])) == {0, 255}


def test_a_case_shows_its_real_slices_in_order_first_and_last_among_them():
    slices = np.broadcast_to(np.arange(60, dtype=np.uint8)[:, None, None] * 4, (60, 64, 64))
    drawn, shown = picture(slices, np.arange(60) < 50)
    pitch = 128 + slice_strip.GAP
    assert shown == "16 of 50 slices" and drawn.shape == (2 * pitch, 8 * pitch)
    levels = [int(drawn[y * pitch + 100, x * pitch + 64]) for y in range(2) for x in range(8)]
    assert levels == sorted(set(levels)) and (levels[0], levels[-1]) == (0, 4 * 49)


def test_letters_stand_at_the_edges_only_where_the_sides_are_known():
    slices = np.zeros((1, 64, 64), np.uint8)
    plain, lettered = picture(slices)[0], picture(slices, sides=("R", "L"))[0]
    changed = np.argwhere(plain != lettered)
    assert len(changed) and (abs(changed[:, 0] - 64) < 12).all()
    assert (
        ((changed[:, 1] < 16) | (changed[:, 1] > 112)).all()
        and (changed[:, 1] < 16).any()
        and (changed[:, 1] > 112).any()
    )


def test_the_sides_of_a_phantom_are_those_of_its_plane(tmp_path):
    """A lesion of the right side lies in the half that bears R; sagittal slices have front and back."""
    source = PhantomSource(tmp_path, "test", 40, grid=(8, 32, 32))
    seen = set()
    for i, truth in enumerate(source.truths):
        seen.add(truth.plane)
        assert source.sides(i) == (("A", "P") if truth.plane == "sagittal" else ("R", "L"))
        for lesion in truth.lesions:
            if (
                truth.plane != "sagittal"
                and lesion.place.startswith(("left", "right"))
                and abs(lesion.centre[2] - 15.5) > 6
            ):
                assert (lesion.centre[2] < 15.5) == lesion.place.startswith("right")
    assert seen == set(DIRECTIONS)
    low, high = source.lesions_mm
    sizes = [lesion.size_mm for truth in source.truths for lesion in truth.lesions]
    assert low == min(sizes) and high == max(sizes)
