"""Canonical names and their scanned view: splitting layers into runs, there and back again, rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tghmoe_jax.models import leaf_names


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ("", []),
        ("a", [(0, 1, 1)]),
        ("ab", [(0, 1, 1), (1, 1, 1)]),
        ("aaa", [(0, 3, 1)]),
        ("aabbb", [(0, 2, 1), (2, 3, 1)]),
        ("ababab", [(0, 3, 2)]),
        ("aabab", [(0, 2, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)]),
        ("a" * 12 + "bcbcbcbcbcb", [(0, 12, 1), (12, 5, 2), (22, 1, 1)]),  # Phi-3-V: 2D, then experts every second
        ("abcabc", [(0, 2, 3)]),
    ],
)
def test_equal_layers_and_short_patterns_are_scanned(specs, expected):
    assert leaf_names.segments(list(specs)) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=14))
def test_runs_cover_every_layer_once_and_repeat_one_pattern(specs):
    covered = []
    for start, repeats, period in leaf_names.segments(specs):
        pattern = specs[start : start + period]
        assert specs[start : start + repeats * period] == pattern * repeats
        covered += range(start, start + repeats * period)
        assert period == 1 or repeats > 1
    assert covered == list(range(len(specs)))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(2, 4), st.integers(1, 3), st.integers(0, 2), st.integers(0, 9))
def test_stacked_leaves_come_back_from_canonical_names(start, repeats, period, offset, seed):
    block = start + offset % period
    path = f"vision/{leaf_names.scan_name(start, repeats, period)}/block_{block}/mlp/fc1/kernel"
    flat = {path: np.random.default_rng(seed).standard_normal((repeats, 2, 3)), "vision/cls": np.ones(4)}
    canonical = leaf_names.to_canonical(flat)
    names = [f"vision/block_{block + r * period}/mlp/fc1/kernel" for r in range(repeats)]
    assert list(canonical) == [*names, "vision/cls"]
    assert all(np.array_equal(canonical[name], one) for name, one in zip(names, flat[path], strict=True))
    again = leaf_names.from_canonical(list(flat), canonical)
    assert all(np.array_equal(again[p], flat[p]) for p in flat) and list(again) == list(flat)
    shapes = leaf_names.canonical_shapes({p: leaf.shape for p, leaf in flat.items()})
    assert shapes == {name: leaf.shape for name, leaf in canonical.items()}


def test_a_missing_layer_is_named():
    with pytest.raises(KeyError, match="block_3/x"):
        leaf_names.from_canonical(["v/scan_2_2_1/block_2/x"], {"v/block_2/x": np.ones(1)})


def test_rules_speak_canonical_names_and_may_not_split_a_scanned_run():
    path = "vision/scan_2_3_2/block_3/moe/router/x/kernel"
    assert leaf_names.canonical_names(path) == [f"vision/block_{i}/moe/router/x/kernel" for i in (3, 5, 7)]
    assert leaf_names.is_stacked(path) and not leaf_names.is_stacked("vision/block_3/moe/router/x/kernel")
    assert leaf_names.matches(r"vision/block_[357]/moe/.*", path)
    assert not leaf_names.matches(r"vision/block_[246]/moe/.*", path)
    assert not leaf_names.matches(r"vision/block_3", path)  # only full matches count
    with pytest.raises(ValueError, match="only some layers of vision/scan_2_3_2"):
        leaf_names.matches(r"vision/block_[35]/.*", path)


def test_every_canonical_leaf_of_a_model_appears_once_and_comes_back():
    model = tiny.model(attn3d_layers=(1, 3), tgh={"layers": (1, 3), "groups": 2})
    assert any("scan_0_2_2/block_1/moe" in path for path in tiny.shapes(model))
    params = tiny.params(model)
    names = [name for path in params for name in leaf_names.canonical_names(path)]
    assert len(names) == len(set(names))
    assert {f"vision/block_{i}/ln1/scale" for i in range(5)} <= set(names)
    again = tiny.stacked(model, tiny.to_canonical(params))
    assert all(np.array_equal(again[path], params[path]) for path in params)
