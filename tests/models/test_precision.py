"""bfloat16 activations and parameters, as at full scale: what stays float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny


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
