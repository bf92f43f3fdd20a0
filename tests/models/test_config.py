"""Sizes from a base's config.json and an experiment: what is refused, what is counted, and the full-scale recipes."""

import dataclasses
import json
import math

import pytest

from configs import common, stage1, stage2
from tests import tiny
from tghmoe_jax.bases.base import describe
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.training import loading, run_folder

PHI3V_PARAMETERS = 4_146_621_440  # of the published checkpoint
FFN = 8_393_728  # one copy of CLIP-L's FFN
PATCH = 14 * 14 * 3 * 1024
CLIP_L = {key: value for key, value in tiny.CONFIG.items() if key != "vision_config"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attn3d_layers": (3, 4)}, r"model.attn3d_layers names layers \[4\], .* layers 0 to 3; leave the others out"),
        ({"attn3d_layers": (12, 13)}, r"model.attn3d_layers .* such as :phi3v needs a base of full size"),
        ({"tgh": {"layers": (-1, 2)}}, r"model.tgh.layers names layers \[-1\]"),
        ({"tgh": {"topology": "stacked", "layers": (1,), "task_layers": (9,)}}, "model.tgh.task_layers"),
        ({"tgh": {"topology": "stacked", "layers": (1, 2), "task_layers": (2,)}}, "model.tgh.task_layers must share"),
        ({"tgh": {"groups": 3}}, "model.tgh.groups=3 must be 1 or the number of tasks, 2"),
        ({"tgh": {"top_k": 5}}, "model.tgh.top_k=5 must lie between 1 and the 4 experts"),
        ({"tgh": {"top_k": 0}}, "model.tgh.top_k=0"),
        ({"tgh": {"topology": "flat"}}, "model.tgh.topology=flat is unknown; use one of nested"),
        ({"tgh": {"dispatch": "hash"}}, "model.tgh.dispatch=hash"),
        ({"tgh": {"token_input": "audio"}}, "model.tgh.token_input=audio"),
        ({"tgh": {"task_input": "audio"}}, "model.tgh.task_input=audio"),
        ({"attn3d_kind": "axial"}, "model.attn3d_kind=axial"),
        ({"depth_embed": "learned"}, "model.depth_embed=learned"),
        ({"depth_rope": {"unit": "cm"}}, "model.depth_rope.unit=cm"),
        ({"depth_rope": {"rotary_dim": 14}}, "model.depth_rope.rotary_dim=14 must be even and at most the head"),
        ({"depth_rope": {"rotary_dim": 5}}, "model.depth_rope.rotary_dim=5"),
        ({"layout": "glb_sub"}, "model.layout=glb_sub"),
        ({"remat": "some"}, "model.remat=some"),
        ({"attention": "flash"}, "model.attention=flash"),
        ({"rope_factor": "middle"}, "model.rope_factor=middle"),
        ({"dtype": "float16"}, "model.dtype=float16"),
        ({"param_dtype": "int8"}, "model.param_dtype=int8"),
        ({"spatial_pool": 3}, "model.spatial_pool=3 must divide the 4-patch grid"),
        ({"spatial_pool": 0}, "model.spatial_pool=0 must be at least 1"),
        ({"depth_pool": 0}, "model.depth_pool=0 must be at least 1"),
        ({"patch_depth": 0}, "model.patch_depth=0 must be at least 1"),
        ({"tgh": {"experts": 0, "top_k": 0}}, "model.tgh.experts=0 must be at least 1"),
        ({"attn3d_window": -1}, "model.attn3d_window=-1 must be at least 0"),
    ],
)
def test_a_combination_without_meaning_is_refused_with_its_flag(changes, named):
    with pytest.raises(UserError, match=f"^--config.{named}"):
        tiny.model(**changes)


@pytest.mark.parametrize(
    ("slices", "depth", "pool", "tokens"),
    [(32, 2, 2, 1405), (32, 1, 4, 1405), (32, 1, 1, 5149), (32, 1, 2, 2653), (32, 1, 8, 781), (1, 1, 4, 313),
     (33, 2, 2, 156 * 9 + 157)],
)  # fmt: skip
def test_visual_tokens_of_phi3v_follow_the_specified_counts(slices, depth, pool, tokens):
    assert tiny.model(CLIP_L, patch_depth=depth, depth_pool=pool).cfg.visual_tokens(slices) == tokens


def test_spatial_pooling_by_two_at_pool_four_gives_288_patch_tokens():
    assert tiny.model(CLIP_L, depth_pool=4, spatial_pool=2, layout="flat").cfg.visual_tokens(32) == 288


@pytest.mark.parametrize("depth", [0, 1, 2])  # 0: the preset's own default
@pytest.mark.parametrize("stage", [stage1, stage2])
def test_full_scale_recipes_build_and_hold_every_parameter_of_phi3v(stage, depth):
    """Shapes only: 4.1466e9 of the base, 3 more FFN copies in six layers for stage 1 and 7 for stage 2."""
    c = stage.get_config("phi3v" + (f",patch_depth={depth}" if depth else ""))
    model = MLLM(model_config.build(describe(c.base_config.to_dict()), c.model.to_dict()))
    assert model.cfg.visual_tokens(c.data.slices) == 1405
    shapes = loading.param_shapes(model, c.data.to_dict())
    sizes = {path: math.prod(leaf.shape) for path, leaf in shapes.items()}
    groups = 1 if stage is stage1 else 2
    new = sum(n for path, n in sizes.items() if "/router/" in path or path.startswith("task_router/"))
    routers = 6 * groups * (1024 + 256) * 4
    prompt = 2 * 3072 + 3072 * 256 + 256 + (256 * 2 + 2 if groups == 2 else 0)
    assert new == routers + prompt
    copies = 6 * (4 * groups - 1) * FFN
    inflated = (model.cfg.volume.patch_depth - 1) * PATCH
    assert sum(sizes.values()) - new == PHI3V_PARAMETERS + copies + inflated
    assert model.cfg.volume.patch_depth == (depth or 2)
    names = {name for path in shapes for name in leaf_names.canonical_names(path)}
    assert {f"vision/block_{i}/moe/experts/fc1/kernel" for i in (12, 14, 16, 18, 20, 22)} <= names
    assert "vision/block_23/mlp/fc1/kernel" in names  # kept for export, never executed


def test_sizes_come_from_the_bases_config_and_clip_l_where_it_is_silent():
    model = tiny.model(CLIP_L)
    assert (model.cfg.tower.width, model.cfg.tower.layers, model.cfg.tower.grid) == (1024, 24, 24)
    scaling = {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}
    cfg = tiny.model(tiny.CONFIG | scaling | {"max_position_embeddings": 131072}).cfg
    decoder, (rope,) = cfg.decoder, cfg.decoder.ropes
    assert (decoder.kv_heads, decoder.head_size) == (2, 8)
    assert cfg.rope_factors(rope, 4096) == (1.0,) * 4 and cfg.rope_factors(rope, 4097) == (2.0,) * 4
    assert rope.magnitude == pytest.approx(1.1902381)


def recorded(**changes):
    """The model section of a run of an earlier version."""
    section = common.get_config().model.to_dict() | {"newline": True, "global_view": True}
    section["tgh"] |= {"gate": "renormalised"}
    del section["lora"], section["tgh"]["transport"]
    for key, value in changes.items():
        *above, name = key.split("__")
        (section[above[0]] if above else section)[name] = value
    return section


def test_a_run_of_an_earlier_version_reads_in_todays_form(tmp_path):
    old = recorded()
    assert model_config.current(old) == common.get_config().model.to_dict()
    assert "newline" in old, "what is given stays as it is"
    (tmp_path / "config.json").write_text(json.dumps(common.get_config().to_dict() | {"model": old}))
    assert run_folder.read_config(tmp_path)["model"].keys() == common.get_config().model.to_dict().keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"newline": False}, "model.newline=False"), ({"global_view": False}, "model.global_view=False"),
     ({"tgh__gate": "sigmoid"}, "model.tgh.gate=sigmoid")],
)  # fmt: skip
def test_a_run_with_a_removed_choice_is_refused_with_its_key(tmp_path, changes, named):
    (tmp_path / "config.json").write_text(json.dumps(common.get_config().to_dict() | {"model": recorded(**changes)}))
    with pytest.raises(UserError, match=f"trained with {named}, which this version does not compute"):
        run_folder.read_config(tmp_path)


def test_a_base_without_separators_is_flat_whatever_the_layout_says():
    base = describe(tiny.CONFIG)
    bare = dataclasses.replace(base, projector=dataclasses.replace(base.projector, separators="none"))
    section = tiny.section(layout="sub_glb_3d")
    assert model_config.build(bare, section).flat and not model_config.build(base, section).flat
