"""Each parameter lies where its rule says; what does not fit is refused in a sentence."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tghmoe_jax.sharding import rules
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.sharding.rules import spec


def test_fsdp_takes_another_dimension_where_it_does_not_divide_its_own():
    """SigLIP's FFN of 4,304 on 32 devices: the input's 1,152 are split, in experts too."""
    axes = {"data": 1, "fsdp": 32, "expert": 2}
    assert spec("vision/block_0/mlp/fc1/kernel", True, (2, 1152, 4304), axes) == P(None, "fsdp", None)
    assert spec("vision/block_0/mlp/fc2/kernel", False, (4304, 1152), axes) == P(None, "fsdp")
    experts = "vision/block_2/moe/experts"
    assert spec(f"{experts}/fc1/kernel", False, (1, 4, 1152, 4304), axes) == P(None, "expert", "fsdp", None)
    assert spec(f"{experts}/fc1/kernel", False, (1, 4, 1152, 4304), axes | {"fsdp": 16})[-1] == "fsdp"


@pytest.mark.parametrize(
    ("name", "stacked", "shape", "expected"),
    [
        ("vision/block_2/moe/experts/fc1/kernel", False, (2, 4, 24, 32), P(None, "expert", None, "fsdp")),
        ("vision/block_2/moe/experts/fc2/kernel", True, (4, 2, 4, 32, 24), P(None, None, "expert", "fsdp", None)),
        ("vision/block_2/moe/experts/fc1/bias", False, (2, 4, 32), P(None, "expert", None)),
        (
            "vision/block_3/task_ffn/experts/fc1/kernel",
            False,
            (2, 1, 24, 32),
            P("expert", None, None, "fsdp"),
        ),  # groups
        ("vision/block_0/attn/q/kernel", False, (24, 2, 12), P("fsdp", None, None)),
        ("decoder/block_0/attn/out/kernel", True, (2, 4, 8, 32), P(None, None, None, "fsdp")),
        ("decoder/embed/embedding", False, (64, 32), P("fsdp", None)),
        ("vision/block_2/moe/router/x/kernel", False, (2, 24, 4), P()),
        ("connector/fc1/kernel", False, (96, 32), P(None, "fsdp")),
    ],
)
def test_each_leaf_is_sharded_by_its_rule(name, stacked, shape, expected):
    assert spec(name, stacked, shape, {"data": 2, "fsdp": 2, "expert": 2}) == expected
    assert spec(name, stacked, shape, {"data": 8, "fsdp": 1, "expert": 1}) == P()


@pytest.mark.parametrize(
    ("name", "shape", "axes", "message"),
    [
        ("decoder/block_0/mlp/up/kernel", (7, 33), {"fsdp": 2}, "mesh.fsdp=2 does not divide the dimension 33"),
        ("vision/block_2/moe/experts/fc1/bias", (2, 4, 8), {"expert": 3}, "mesh.expert=3 does not divide the 2 x 4 "),
        ("vision/block_2/moe/experts/fc1/bias", (1, 4, 8), {"group": 2, "expert": 4}, "mesh.expert=8 does not divide"),
        ("vision/block_2/extra/kernel", (4, 4), {}, "vision/block_2/extra/kernel is matched by no rule"),
    ],
)
def test_an_axis_that_does_not_divide_and_a_leaf_without_a_rule_are_named(name, shape, axes, message):
    with pytest.raises(ValueError, match=message):
        spec(name, False, shape, {"data": 1, "fsdp": 1, "expert": 1} | axes)


def test_a_leaf_that_two_rules_match_is_named(monkeypatch):
    monkeypatch.setattr(rules, "RULES", (*rules.RULES, (r"connector/.*", P())))
    with pytest.raises(ValueError, match=r"connector/fc1/kernel is matched by the rules .* and 'connector/\.\*'"):
        spec("connector/fc1/kernel", False, (4, 4), {"fsdp": 1})


def test_groups_lie_on_an_axis_of_their_own_where_the_experts_of_one_do_not_fill_the_axis():
    name, mesh_shape = "vision/block_2/moe/experts/fc1/kernel", {"fsdp": 2, "group": 2, "expert": 4}
    assert spec(name, True, (3, 2, 4, 24, 32), mesh_shape) == P(None, "group", "expert", None, "fsdp")
    one = jax.devices()[:1]
    assert dict(make_mesh(1, 1, 1, one, experts=4).shape) == {"data": 1, "fsdp": 1, "expert": 1}


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    count = jax.device_count()
    assert dict(make_mesh().shape) == {"data": count, "fsdp": 1, "expert": 1}
    with pytest.raises(ValueError, match=f"does not give {count} devices"):
        make_mesh(data=count + 1)
    with pytest.raises(ValueError, match=f"does not give {count} devices"):
        make_mesh(data=-1, fsdp=3 * count)
    with pytest.raises(ValueError, match="only one of"):
        make_mesh(data=-1, fsdp=-1)
