"""The regex language of what trains, at which rate, and what decays: full matches on canonical names."""

import pytest

from configs import common
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import rules

SCANNED = "vision/scan_1_2_1/block_1/moe/experts/fc1/kernel"  # blocks 1 and 2
ALTERNATING = "decoder/scan_0_2_2/block_1/attn/q/kernel"  # blocks 1 and 3
PATHS = ["vision/cls", "vision/block_0/mlp/fc1/kernel", SCANNED, ALTERNATING, "decoder/final_norm/scale"]


def chosen(*patterns) -> set[str]:
    return {path for path, trains in rules.trainable(PATHS, patterns).items() if trains}


def test_a_leaf_trains_if_any_pattern_matches_its_whole_name():
    assert chosen() == set()
    assert chosen(".*") == set(PATHS)
    assert chosen(r"vision/.*") == set(PATHS[:3])
    assert chosen(r"vision/cls", r"decoder/final_norm/.*") == {"vision/cls", "decoder/final_norm/scale"}
    assert rules.trainable(PATHS, (r"vision/cls",)).keys() == set(PATHS)
    with pytest.raises(UserError, match=r"'final_norm', which matches no parameter; correct or remove it"):
        chosen("final_norm")  # not the whole name


def test_a_stacked_leaf_is_named_by_its_blocks():
    assert chosen(r"vision/block_[12]/.*") == {SCANNED}
    assert chosen(r"decoder/block_(1|3)/.*") == {ALTERNATING}
    assert chosen(r"vision/block_\d+/moe/.*") == {SCANNED}
    with pytest.raises(UserError, match="matches no parameter"):
        chosen(r"vision/scan_.*")


@pytest.mark.parametrize("pattern", [r"vision/block_1/.*", r"decoder/block_3/.*"])
def test_a_pattern_that_splits_a_scanned_run_is_refused_with_its_flag(pattern):
    with pytest.raises(UserError, match="--config.trainable: .*name all of them or none"):
        chosen(pattern)


def test_a_pattern_that_matches_nothing_is_named_with_its_flag():
    with pytest.raises(UserError, match=r"--config.trainable holds the pattern 'encoder/\.\*'"):
        chosen("encoder/.*", ".*")


def test_the_first_rule_that_matches_gives_the_value():
    found = rules.first_match(PATHS, [(r".*/scale", 0.5), (r"decoder/.*", 2.0), (r".*cls", 0.0)], 1.0, "x")
    assert found == {
        "vision/cls": 0.0, "vision/block_0/mlp/fc1/kernel": 1.0, SCANNED: 1.0, ALTERNATING: 2.0,
        "decoder/final_norm/scale": 0.5,
    }  # fmt: skip
    with pytest.raises(UserError, match="--config.optimizer.rate_rules"):
        rules.first_match(PATHS, [(r"vision/block_1/.*", 0.5)], 1.0, "optimizer.rate_rules")


def test_stage2_leaves_the_shared_features_of_the_tower_as_they_are():
    trains = rules.trainable([*PATHS, "task_router/head/kernel", "connector/fc1/bias"], common.STAGE2_TRAINABLE)
    assert {path for path in trains if not trains[path]} == {"vision/cls", "vision/block_0/mlp/fc1/kernel"}
