"""Full scale's ways to save memory: bfloat16, of which some parts are kept out, and logits for a part of the tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tghmoe_jax.models import decoder


@pytest.mark.parametrize("dispatch", ["ragged", "capacity"])
def test_under_bf16_routers_losses_and_logits_stay_float32(dispatch):
    model = tiny.uniform({"groups": 2, "dispatch": dispatch}, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    exact = tiny.uniform({"groups": 2})
    batch, params = tiny.batch(slices=2), tiny.params(model)
    half = {path: jnp.asarray(leaf, jnp.float32 if "router" in path else jnp.bfloat16) for path, leaf in params.items()}
    output = tiny.forward(model, half, batch, batch["task"])
    assert output.logits.dtype == jnp.float32 and output.encoded.tokens.dtype == jnp.bfloat16
    assert output.encoded.task_logits.dtype == jnp.float32
    for stats in output.encoded.stats.values():
        assert stats.balance.dtype == stats.z.dtype == stats.entropy.dtype == jnp.float32
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in (output.logits, output.encoded.tokens))
    if dispatch == "ragged":
        expected = tiny.forward(exact, params, batch, batch["task"]).encoded.task_logits
        tiny.close(output.encoded.task_logits, expected, atol=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_scores_in_parts_of_the_text_are_those_of_the_whole(tied, monkeypatch):
    """Values and gradients; 7 tokens in parts of 3, the last of which is filled up."""
    cfg = tiny.model_2d().cfg
    head = decoder.LanguageModel(
        dataclasses.replace(cfg, scan_decoder=False, decoder=dataclasses.replace(cfg.decoder, tied=tied))
    )
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 7, cfg.decoder.width)).astype(np.float32)
    targets, weight = rng.integers(0, tiny.VOCAB, (2, 7)), rng.standard_normal((2, 7))
    table = {"embed": {"embedding": rng.standard_normal((tiny.VOCAB, cfg.decoder.width))}}
    params = table if tied else table | {"lm_head": {"kernel": table["embed"]["embedding"].T}}

    def value(params, hidden):
        found = head.apply({"params": params}, hidden, targets, method=head.scores)
        return jnp.sum(found.log_p * weight), found

    best = np.argmax(head.apply({"params": params}, hidden, method=head.logits), axis=-1)
    targets[:, ::2] = best[:, ::2]
    whole = jax.value_and_grad(value, (0, 1), has_aux=True)(params, hidden)
    assert whole[0][1].best[:, ::2].all() and not whole[0][1].best[:, 1::2].all()
    monkeypatch.setattr(decoder, "MOST_LOGITS", 3 * tiny.VOCAB)
    jaxpr = str(jax.make_jaxpr(value)(params, hidden))
    assert f"f32[2,3,{tiny.VOCAB}]" in jaxpr and f"f32[2,7,{tiny.VOCAB}]" not in jaxpr
    jax.tree.map(tiny.close, jax.value_and_grad(value, (0, 1), has_aux=True)(params, hidden), whole)
