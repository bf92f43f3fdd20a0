"""Where parameters live: every leaf of the tiny and of the full-size model has one rule, and every spec divides."""

import math
import re

import pytest
from jax.sharding import PartitionSpec as P

from configs import pretrain2d, stage1, stage2
from tests import tiny
from tests.bases.family_fixtures import FAMILIES
from tghmoe_jax.bases.base import describe
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.sharding.rules import RULES, spec
from tghmoe_jax.training.loading import param_shapes

AXES = [{"data": 1, "fsdp": 1, "expert": 1}, {"data": 2, "fsdp": 4, "expert": 2}, {"data": 1, "fsdp": 1, "expert": 4}]


def tree(config, base) -> dict[str, tuple[int, ...]]:
    """{leaf path: shape} of a config's model."""
    model = MLLM(model_config.build(describe(base), config.model.to_dict(), aux_labels=((5,), (6, 7), (8,))))
    return {path: leaf.shape for path, leaf in param_shapes(model, config.data).items()}


@pytest.fixture(scope="module", params=["tiny", "tiny stage 2", "phi3v", "phi3v stage 2"])
def shapes(request):
    stage = stage2 if "stage 2" in request.param else stage1
    full = stage.get_config("phi3v")
    if "tiny" in request.param:
        return tree(stage.get_config(), pretrain2d.BASE)
    return tree(full, full.base_config.to_dict())


def rule_of(name: str) -> int:
    (found,) = (i for i, (pattern, _) in enumerate(RULES) if re.fullmatch(pattern, name))
    return found


def specs(shapes, axes):
    for path, shape in shapes.items():
        names = leaf_names.canonical_names(path)
        assert len({rule_of(name) for name in names}) == 1, f"the blocks of {path} fall under different rules"
        yield path, shape, spec(names[0], leaf_names.is_stacked(path), shape, axes)


@pytest.mark.parametrize("axes", AXES)
def test_every_leaf_has_a_rule_and_every_axis_divides_its_dimension(shapes, axes):
    assert len(shapes) > 40
    for path, shape, found in specs(shapes, axes):
        assert len(found) <= len(shape), path
        for size, name in zip(shape, found, strict=False):
            assert name is None or size % axes[name] == 0, path
        assert not (leaf_names.is_stacked(path) and len(found) and found[0]), f"{path}: layers are never split"
        used = [name for name in found if name]
        assert len(used) == len(set(used)), path


def test_experts_and_only_they_live_on_the_expert_axis(shapes):
    axes = {"data": 1, "fsdp": 1, "expert": 2}
    experts = 0
    for path, shape, found in specs(shapes, axes):
        if "/experts/" in path:
            experts += 1
            axis = 2 if leaf_names.is_stacked(path) else 1
            assert found[axis] == "expert" and shape[axis] == 4, path
        else:
            assert found == P(), path
    assert experts >= 4


def test_large_matrices_are_split_over_fsdp(shapes):
    axes = {"data": 1, "fsdp": 2, "expert": 1}
    whole = {path for path, _, found in specs(shapes, axes) if found == P()}
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    split = sum(size for path, size in sizes.items() if path not in whole)
    assert split > 0.9 * sum(sizes.values()), sorted(whole, key=sizes.get)[-3:]
    assert not any(path.endswith(("bias", "scale")) and "/experts/" not in path for path in sizes if path not in whole)


def test_every_leaf_of_every_kind_of_model_has_exactly_one_rule_and_no_rule_is_dead():
    group = {"groups": 2}
    kinds = [
        tiny.model(tgh=group | {"topology": "stacked", "task_layers": (1,), "layers": (2,)}),
        tiny.model(tgh=group | {"topology": "parallel", "task_input": "image_text"}, depth_embed="learned_zero_init"),
        tiny.model(base=FAMILIES["gemma3"]),
        tiny.model(base=tiny.CONFIG | {"qkv_bias": True}, lora={"rank": 2, "alpha": 2.0, "targets": ".*"}),
    ]
    names = {name for model in kinds for name in leaf_names.canonical_shapes(tiny.shapes(model))}
    names |= {name for path in tree(stage2.get_config(), pretrain2d.BASE) for name in leaf_names.canonical_names(path)}
    assert {rule_of(name) for name in names} == set(range(len(RULES)))
