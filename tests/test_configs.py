"""The resolved configs as text, so that every change of a default shows as a diff.

    python -m tests.test_configs

writes the snapshots in tests/golden anew.
"""

import json
from pathlib import Path

import pytest

from configs import (
    ablations,
    common,
    data_ct_rate,
    data_m3d,
    data_manifest,
    evaluate,
    finetune,
    pretrain2d,
    simple,
    stage1,
    stage2,
)
from tghmoe_jax.training.run_folder import check_config, flatten

GOLDEN = Path(__file__).resolve().parent / "golden"
CONFIGS = {
    "pretrain2d": (pretrain2d, ""), "stage1": (stage1, ""), "stage2": (stage2, ""), "evaluate": (evaluate, ""),
    "stage1-bench": (stage1, "bench"), "stage2-bench": (stage2, "bench"), "evaluate-bench": (evaluate, "bench"),
    "evaluate-phi3v": (evaluate, "phi3v"), "simple": (simple, ""), "simple-bench": (simple, "bench"),
    "stage1-phi3v": (stage1, "phi3v"), "stage2-phi3v": (stage2, "phi3v"),
    "finetune": (finetune, ""), "finetune-lora-16": (finetune, "lora=16"), "finetune-phi3v": (finetune, "phi3v"),
    "finetune-phi3v-lora-16-l4-1": (finetune, "phi3v,lora=16,pod=l4-1"),
    "data_m3d": (data_m3d, None), "data_ct_rate": (data_ct_rate, None), "data_manifest": (data_manifest, None),
    "ablations": (ablations, ""), "ablations-baseline-m3d": (ablations, "baseline=m3d"),
    "stage1-phi3v-patch_depth-1": (stage1, "phi3v,patch_depth=1"),
    **{f"stage1-phi3v-{pod}": (stage1, f"phi3v,pod={pod}") for pod in common.PODS},
    "stage1-medgemma": (stage1, "medgemma"), "stage2-medgemma": (stage2, "medgemma"),
    "finetune-medgemma-lora-16": (finetune, "medgemma,lora=16"), "evaluate-medgemma": (evaluate, "medgemma"),
    **{f"stage1-medgemma-{pod}": (stage1, f"medgemma,pod={pod}") for pod in common.MEDGEMMA_PODS},
}  # fmt: skip


def of(module, arg):
    """A config file's config; one that takes no colon argument has None."""
    return module.get_config() if arg is None else module.get_config(arg)


def resolved(name: str) -> str:
    """One line a key: `train.steps = 600`."""
    module, arg = CONFIGS[name]
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in sorted(flatten(of(module, arg)).items()))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_resolves_to_its_snapshot(name):
    """After a wanted change: python -m tests.test_configs"""
    assert resolved(name) == (GOLDEN / f"{name}.txt").read_text(), "run `python -m tests.test_configs` if this is meant"


def test_no_snapshot_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_experiment_has_the_keys_of_common_and_numbers_with_a_meaning(name):
    module, arg = CONFIGS[name]
    config = of(module, arg)
    added = {"base_config", "trainable"}
    keys = {key for key in flatten(config) if key.split(".")[0] not in added}
    assert keys == {key for key in flatten(common.get_config()) if key.split(".")[0] not in added}
    check_config(config)


def test_stage2_differs_from_stage1_in_start_groups_and_what_trains_only():
    for arg in ("", "bench", "phi3v", "medgemma"):
        one, two = (flatten(module.get_config(arg)) for module in (stage1, stage2))
        differ = {key for key in one | two if one.get(key) != two.get(key)}
        assert {"init_from", "model.tgh.groups", "trainable"} <= differ
        assert all(key.split(".")[0] not in ("data", "model") or key == "model.tgh.groups" for key in differ), differ


@pytest.mark.parametrize("arg", ["phi4v", "patch_height=1", "patch_depth", "patch_depth=", "phi3v;patch_depth=1"])
def test_an_unknown_colon_argument_is_an_error_that_lists_the_known_ones(arg):
    for module in (stage1, stage2):
        with pytest.raises(ValueError, match="is unknown; use bench, phi3v, medgemma, patch_depth="):
            module.get_config(arg)


@pytest.mark.parametrize(
    ("arg", "told"), [("phi3v,pod=v9-8", "use one of v5e-64"), ("pod=v5e-64", "give phi3v,pod=v5e-64 or medgemma,pod")]
)
def test_a_pod_is_one_of_those_that_full_scale_was_compiled_for(arg, told):
    for module in (stage1, stage2):
        with pytest.raises(ValueError, match=told):
            module.get_config(arg)


@pytest.mark.parametrize("preset", common.FULL_SCALE)
def test_pods_differ_in_where_and_how_a_batch_is_computed_only(preset):
    pods = {"phi3v": common.PODS, "medgemma": common.MEDGEMMA_PODS}[preset]
    one, *others = (flatten(stage2.get_config(f"{preset},pod={pod}")) for pod in pods)
    for other in others:
        differ = {key for key in one if one[key] != other[key]}
        assert differ <= {"mesh.data", "mesh.fsdp", "mesh.expert", "train.accumulate", "model.remat", "eval.batch"}


def test_fine_tuning_has_as_many_rows_in_a_part_as_a_stage_on_the_pod():
    for pod in ("h100-8", "h100-1", "l4-1"):
        tuned, stage = (one.get_config(f"phi3v,pod={pod}").train for one in (finetune, stage2))
        assert tuned.batch / tuned.accumulate == stage.batch / stage.accumulate


def test_colon_arguments_are_typed():
    assert stage1.get_config("patch_depth=2").model.patch_depth == 2
    full = stage2.get_config("phi3v,patch_depth=1")
    assert (full.model.patch_depth, full.model.depth_pool, full.model.tgh.groups) == (1, 4, 2)
    with pytest.raises(ValueError, match="invalid literal"):
        stage1.get_config("patch_depth=two")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for known in GOLDEN.glob("*.txt"):
        known.unlink()
    for name in CONFIGS:
        (GOLDEN / f"{name}.txt").write_text(resolved(name))
