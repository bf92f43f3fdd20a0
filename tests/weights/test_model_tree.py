"""The rules fit the trees that the model modules really have, for every topology and at full size; shapes only."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import common
from tests.bases.test_llava import LLAVA_1_5
from tghmoe_jax.bases import llava, phi3v
from tghmoe_jax.bases.base import describe
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.weights import adapt


def fakes(shapes) -> dict[str, np.ndarray]:
    """Arrays of these shapes that take no memory."""
    return {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}


def tree(base_config, section, slices=4) -> dict[str, tuple[int, ...]]:
    """Canonical shapes of the 3D model."""
    model = MLLM(model_config.build(describe(base_config), section.to_dict()))
    size = model.cfg.tower.image_size
    batch = {
        "slices": np.zeros((1, slices, size, size, 3), np.uint8), "slice_mask": np.ones((1, slices), bool),
        "tokens": np.zeros((1, 8), np.int32), "token_mask": np.ones((1, 8), bool),
        "question_mask": np.ones((1, 8), bool),
    }  # fmt: skip
    flat = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), batch)["params"], sep="/")
    return leaf_names.canonical_shapes({path: leaf.shape for path, leaf in flat.items()})


def stages(section):
    """The same experiment with one group and with one group per task."""
    first, second = section.copy_and_resolve_references(), section.copy_and_resolve_references()
    first.tgh.groups, second.tgh.groups = 1, 2
    return first, second


@pytest.mark.parametrize(
    ("topology", "layers", "task_layers", "experts", "upcycled", "split"),
    [
        ("nested", (0, 1), (), 4, 8, 12),  # experts and token routers of both layers
        ("nested", (1,), (), 1, 0, 0),  # dense in stage 1 (I11): upcycled by stage 2
        ("stacked", (0,), (1,), 4, 8, 4),
        ("parallel", (0, 1), (), 4, 16, 8),
    ],
)
def test_base_to_stage_1_to_stage_2(config, topology, layers, task_layers, experts, upcycled, split):
    section = common.get_config().model
    section.update({"patch_depth": 2, "attn3d_layers": (1,), "depth_embed": "learned_zero_init"})
    section.depth_rope.rotary_dim = 4
    section.tgh.update({"topology": topology, "layers": layers, "task_layers": task_layers, "experts": experts,
                        "top_k": min(2, experts)})  # fmt: skip
    first, second = (tree(config, one) for one in stages(section))
    base = fakes(phi3v.FAMILY.shapes(config))
    loaded, report = adapt.assemble(first, base)
    assert len(report.of("upcycled")) == upcycled
    assert report.of("inflated") == ["vision/patch/kernel"]
    assert {path: leaf.shape for path, leaf in loaded.items()} == {path: first[path] for path in loaded}
    loaded, report = adapt.assemble(second, fakes(first), adapt.NEW_FROM_STAGE1)
    assert len(report.of("copied per task")) == split
    assert all(path.startswith("task_router/head/") for path in report.of("new"))
    assert {path: leaf.shape for path, leaf in loaded.items()} == {path: second[path] for path in loaded}


def test_every_parameter_of_the_full_size_phi3v_is_reused():
    config = common.phi3v(common.get_config(), patch_depth=1)
    base_config = config.base_config.to_dict()
    config.model.tgh.layers = ()
    shapes = phi3v.FAMILY.shapes(base_config)
    _, report = adapt.assemble(tree(base_config, config.model, slices=1), fakes(shapes))
    assert set(report.of("reused") + report.of("inflated")) == set(shapes)
    assert report.parameters["reused"] + report.parameters["inflated"] == 4_146_621_440


def test_every_parameter_of_the_full_size_llava_is_reused():
    config = common.phi3v(common.get_config(), patch_depth=1)
    config.model.tgh.layers = ()
    flat = llava.flatten(LLAVA_1_5)
    shapes = llava.FAMILY.shapes(flat)
    _, report = adapt.assemble(tree(flat, config.model, slices=1), fakes(shapes))
    assert set(report.of("reused") + report.of("inflated")) == set(shapes)
    assert report.parameters["reused"] + report.parameters["inflated"] == 7_063_427_072
