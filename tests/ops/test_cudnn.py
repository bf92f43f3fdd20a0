"""The fused attention of NVIDIA GPUs without one: what the kernel is asked for, and that it accepts it.

The kernel's own checks of shapes run when a function is traced, and its calls are lowered for CUDA on any machine. For
the numbers JAX's plain implementation of the same call takes its place.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stage1
from tests import tiny
from tests.ops.test_attention import BLOCKS, GAPS, draw
from tghmoe_jax.ops import attention as module
from tghmoe_jax.ops.attention import Mask, attention
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.tools import aot
from tghmoe_jax.training import program


@pytest.fixture
def version(monkeypatch):
    """Of the library, which is installed with CUDA alone."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 92800)


MASKS = {  # queries, keys, mask
    "slab": (577, 577, Mask()),
    "volume": (1731, 1731, Mask(key_valid=np.ones((2, 1731), bool))),
    "window": (1731, 1731, Mask(key_valid=np.ones((2, 1731), bool), slice_tokens=577, window=1)),
    "decoder": (1917, 1917, Mask(key_valid=np.ones((2, 1917), bool), causal=True)),
    "prefill": (1661, 1917, Mask(key_valid=np.ones((2, 1917), bool), causal=True)),
    "gemma": (2069, 2069, Mask(key_valid=np.ones((2, 2069), bool), causal=True, blocks=np.zeros((2, 2069), np.int32),
                               positions=np.zeros((2, 2069), np.int32), reach=1024)),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKS)
def test_the_kernel_accepts_odd_lengths_in_both_directions(case, version):
    queries, keys, mask = MASKS[case]
    q, k = (jax.ShapeDtypeStruct((2, length, 2, 96), jnp.bfloat16) for length in (queries, keys))
    total = jax.grad(lambda q, k, v, m: attention(q, k, v, m, "cudnn").astype(jnp.float32).sum(), (0, 1, 2))
    text = jax.jit(total).trace(q, k, k, mask).lower(lowering_platforms=("cuda",)).as_text()
    called = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    if case in ("window", "gemma"):  # masks that no length tells
        called = {name.replace("fmha", "fmhaScaleBias") for name in called}
    assert set(re.findall(r"__cudnn\$\w+", text)) == called


@pytest.mark.parametrize("size, dtype", [(256, "bfloat16"), (100, "bfloat16"), (96, "float32")])
def test_what_the_kernel_does_not_know_is_computed_in_blocks(size, dtype):
    q = jax.ShapeDtypeStruct((2, 300, 2, size), dtype)
    jaxprs = {name: str(jax.make_jaxpr(functools.partial(attention, backend=name))(q, q, q)) for name in
              ("cudnn", "blocked")}  # fmt: skip
    assert jaxprs["cudnn"] == jaxprs["blocked"]


@pytest.mark.parametrize("preset, backward", [
    ("phi3v", 5),  # of the decoder, and of runs of the tower's layers
    pytest.param("medgemma", 4, marks=pytest.mark.slow),  # heads of 256 in the decoder, which goes in blocks
])  # fmt: skip
def test_the_step_of_a_full_scale_recipe_is_lowered_with_the_kernel(preset, backward, version):
    config = stage1.get_config(preset)
    config.mesh.update({"fsdp": 1})
    config.train.batch = 4
    mesh = make_mesh(1, 1, 1, jax.devices()[:1], config.model.tgh.experts)
    spec = program.batch_spec(config, mesh)
    base, tokenizer = aot.base_of(config)
    model = program.build_model(config, base, (), tokenizer, spec.task_shares)
    whole = program.build(config, model, spec, mesh)
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=gpu)):
        traced = whole.step().trace(whole.state_shapes(), whole.batch_shapes())
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"@__cudnn\$fmhaSoftmaxBackward\b", text)) == backward
    assert len(re.findall(r"@__cudnn\$fmhaSoftmax\b", text)) == 2 * backward  # once more where layers are recomputed
    assert "fmhaScaleBias" not in text
    assert "ragged_dot" not in text  # which XLA computes for every expert there, and copies the rows for each


HOLES = np.random.default_rng(3).random((2, 13)) < 0.6
EQUAL = {
    "padding": (13, 13, Mask()),
    "valid": (13, 13, Mask(key_valid=HOLES)),
    "fewer queries": (4, 13, Mask(key_valid=HOLES)),
    "causal": (13, 13, Mask(causal=True)),
    "causal valid": (13, 13, Mask(key_valid=HOLES, causal=True)),
    "prefill": (9, 13, Mask(key_valid=HOLES, causal=True)),
    "cache": (3, 13, Mask(key_valid=HOLES | (np.arange(13) < 1), causal=True, query_start=np.int32(6))),
    "window": (13, 13, Mask(key_valid=HOLES, slice_tokens=3, window=1)),
    "gemma": (13, 13, Mask(GAPS, None, True, BLOCKS, np.cumsum(GAPS, axis=1).astype(np.int32) - 1, reach=6)),
}


@pytest.mark.parametrize("case", EQUAL)
def test_padded_lengths_and_moved_keys_change_no_value_and_no_gradient(case, monkeypatch):
    fused = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **kw: fused(*a, **kw))
    monkeypatch.setattr(module, "cudnn_takes", lambda dtype, size: True)
    queries, keys, mask = EQUAL[case]
    rng = np.random.default_rng(12)
    qkv = draw(rng, 2, queries, keys, 2, 2, 4)
    cotangent = rng.standard_normal(qkv["q"].shape).astype(np.float32)
    visible = module._visible(mask, jnp.arange(queries), jnp.arange(keys))
    if visible is not None:  # queries that see nothing, and of a causal mask those that are padding, say nothing
        seeing = np.broadcast_to(visible, (2, 1, 1, queries, keys))[:, 0, 0].any(-1)
        if mask.causal and mask.query_start is None and mask.key_valid is not None:
            seeing = seeing & mask.key_valid[:, :queries]
        cotangent *= seeing[:, :, None, None]

    def run(backend):
        def total(qkv):
            out = attention(**qkv, mask=mask, backend=backend) * (cotangent != 0)
            return jnp.sum(out * cotangent), out

        gradient, out = tiny.jit(jax.grad(total, has_aux=True))(qkv)
        return {"out": out, **gradient}

    found = run("cudnn")
    for name, expected in run("plain").items():
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_sample_without_any_valid_key_is_finite(monkeypatch):
    fused = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **kw: fused(*a, **kw))
    qkv = {name: jnp.asarray(x, jnp.bfloat16) for name, x in draw(np.random.default_rng(2), 2, 5, 5, 1, 1, 8).items()}
    for causal in (False, True):
        mask = Mask(key_valid=np.arange(10).reshape(2, 5) < 5, causal=causal)
        out = tiny.jit(functools.partial(attention, backend="cudnn"))(**qkv, mask=mask)
        assert np.isfinite(np.asarray(out, np.float32)).all()
