"""Low-rank updates of the decoder: nothing at first, merged without a difference, trained alone."""

import jax
import numpy as np
import pytest

from configs import stage1, stage2
from tests import tiny
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names
from tghmoe_jax.training import rules
from tghmoe_jax.weights import adapt

ALL = "attn/(q|k|v|out)|mlp/(gate|up|down)"
LORA = {"rank": 3, "alpha": 6.0, "targets": ALL}


def test_without_a_rank_there_is_nothing_new():
    assert not [name for name in tiny.canonical(tiny.model()) if "lora" in name]


@pytest.mark.parametrize("targets", ["attn/(q|v)", "mlp/down", ALL])
def test_the_targets_say_which_projections_get_leaves(targets):
    names = tiny.canonical(tiny.model(lora=LORA | {"targets": targets}))
    held = {name.split("/", 2)[2].rpartition("/")[0] for name in names if name.endswith("lora_a")}
    assert held == {"attn/(q|v)": {"attn/q", "attn/v"}, "mlp/down": {"mlp/down"}}.get(
        targets, {"attn/q", "attn/k", "attn/v", "attn/out", "mlp/gate", "mlp/up", "mlp/down"}
    )


@pytest.mark.parametrize("targets", ["(", "self_attn.q_proj", ""])
def test_targets_that_match_nothing_are_refused(targets):
    with pytest.raises(UserError, match="model.lora.targets"):
        tiny.model(lora=LORA | {"targets": targets})


def leaves(seed: int, **fixed) -> tuple:
    """A model with low-rank updates everywhere, random leaves, and the plain model."""
    model = tiny.model(lora=LORA)
    canonical = tiny.canonical(model, seed)
    for name in canonical:
        if "lora" in name:
            canonical[name] = canonical[name] * np.float32(fixed.get(name[-1], 0.2))
    return model, canonical, tiny.model()


def test_a_new_update_changes_nothing():
    model, canonical, plain = leaves(0, b=0.0)
    rest = {name: leaf for name, leaf in canonical.items() if "lora" not in name}
    batch = tiny.batch()
    with jax.disable_jit():  # two compiled programs may round differently; the operations themselves may not
        expected = tiny.forward(plain, tiny.stacked(plain, rest), batch)
        found = tiny.forward(model, tiny.stacked(model, canonical), batch)
    np.testing.assert_array_equal(found.logits, expected.logits)


def test_merging_gives_equal_outputs():
    model, canonical, plain = leaves(0)
    merged = adapt.merge_lora(canonical, LORA["rank"], LORA["alpha"])
    assert set(merged) == set(tiny.canonical(plain))
    batch = tiny.batch()
    found = tiny.forward(plain, tiny.stacked(plain, merged), batch).logits
    expected = tiny.forward(model, tiny.stacked(model, canonical), batch).logits
    tiny.close(found, expected, atol=1e-4)
    rest = {name: leaf for name, leaf in canonical.items() if "lora" not in name}
    unlike = tiny.forward(plain, tiny.stacked(plain, rest), batch).logits
    assert np.abs(np.asarray(unlike) - np.asarray(expected)).max() > 0.1  # the update does something


@pytest.mark.parametrize("module", [stage1, stage2])
def test_with_the_colon_argument_only_updates_of_the_decoder_train(module):
    config = module.get_config("lora=4")
    assert config.model.lora.rank == 4
    model = tiny.model(lora=config.model.lora.to_dict())
    trains = rules.trainable(tiny.shapes(model), [p for p in config.trainable if p.startswith("decoder")])
    names = {name for path, on in trains.items() if on for name in leaf_names.canonical_names(path)}
    assert names and all("lora" in name for name in names)
    assert module.get_config().model.lora.rank == 0


def test_a_stage_takes_low_rank_leaves_from_nowhere_or_from_the_stage_before():
    model, canonical, plain = leaves(0)
    wanted = leaf_names.canonical_shapes(tiny.shapes(model))
    base = {name: leaf for name, leaf in canonical.items() if "lora" not in name}
    for new in (adapt.NEW_FROM_BASE, adapt.NEW_FROM_STAGE1):
        _, report = adapt.assemble(wanted, base, new)
        assert sorted(report.of("new")) == sorted(name for name in canonical if "lora" in name)
        _, report = adapt.assemble(wanted, canonical, new)
        assert not report.of("new")
