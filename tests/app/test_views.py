"""Pictures and overlays lie where their boxes are."""

import io

import nibabel as nib
import numpy as np
from PIL import Image

from tghmoe_jax.app import kept, views
from tghmoe_jax.app.examples import phantom
from tghmoe_jax.evaluation.evidence_plot import Box, Evidence
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.scans.scan import scan_of
from tghmoe_jax.scans.volume import Volume


def test_the_picture_that_is_kept_has_its_box_where_the_region_is():
    array = np.full((8, 40, 60), -1000, np.float32)
    array[3, 10:20, 30:45] = 300  # white in the slice that is shown
    volume = Volume(array, "HU", (3.0, 2.0, 1.0), "LPS", None, (), (), np.eye(4))
    box = Box(np.array([[2.0, 5.0], [10, 20], [30, 45]]), 1.0, 1.0, 1.0, (0, 0, 0), (1, 1, 1))
    picture = views.picture_of(Evidence("a", 1.0, (box,), (box,), 8, volume))
    image = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    assert image.shape == (240, 180, 3)  # 80 x 60 mm
    red = np.argwhere((image[..., 0] > 200) & (image[..., 1] < 100))
    white = np.argwhere((image > 200).all(axis=-1))
    assert np.abs(red.min(axis=0) - [60, 90]).max() <= 1 and np.abs(red.max(axis=0) - [119, 134]).max() <= 1
    assert np.abs(white.mean(axis=0) - red.mean(axis=0)).max() < 2
    row = dict.fromkeys(("question", "refusal", "sure"), "") | {
        "number": 1, "report": True, "choices": [], "text": "a", "task": "vqa", "task_probabilities": None,
        "blind_text": "", "warnings": [], "checkpoint": {"name": "n", "digest": "d"}, "seconds": 1.0, "parts": {},
    }  # fmt: skip
    page = kept.to_html([(row, picture)])
    assert 'src="data:image/png;base64,' in page and "http" not in page and "parts" not in kept.to_json([(row, None)])


def test_expert_patches_fill_the_scan_without_gaps():
    volume = phantom("pelvis")
    scan = scan_of(volume, {"slices": 16, "size": 64, "channels": "windows3"}, None, keep=True)
    winner = np.arange(2 * 4 * 8 * 8).reshape(2, 4, 8, 8) % 4
    parts = views.expert_parts(RoutingMap("vqa", None, (2, 4), np.full((2, 4), 0.25), winner), scan, volume)
    for axis, edges in enumerate(parts["edges"]):
        edges = np.array(edges)
        assert edges[0, 0] == 0 and edges[-1, 1] == volume.array.shape[axis]
        assert np.allclose(edges[1:, 0], edges[:-1, 1])
    assert views.expert_parts(RoutingMap("vqa", None, (), np.zeros((0, 4)), winner[:0]), scan, volume) is None


def test_a_scan_that_is_sent_as_a_whole_keeps_values_and_places():
    volume = phantom("chest")
    length, parts = views.nifti_parts(volume)
    data = b"".join(parts)
    image = nib.Nifti1Image.from_bytes(data)
    assert len(data) == length
    found = np.asarray(image.dataobj)
    assert found.dtype == np.int16 and np.array_equal(found.transpose(2, 1, 0), volume.array)
    lps = volume.affine @ [5, 6, 7, 1]
    assert np.allclose(image.affine @ [7, 6, 5, 1], lps * [-1, -1, 1, 1], atol=1e-3)
    assert bytes(image.header["descrip"]).strip(b"\0") == b""
