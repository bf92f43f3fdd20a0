"""Every attention backend against an oracle in float64 numpy, with every mask it knows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tghmoe_jax.ops import rope
from tghmoe_jax.ops import splash as splash_kernels
from tghmoe_jax.ops.attention import Mask, _choose, attention
from tghmoe_jax.ops.choices import splash_blocks


def oracle(q, k, v, mask: Mask) -> np.ndarray:
    """One query at a time: softmax over the keys it may see; NaN where it may see none."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out, start = np.zeros(q.shape), int(mask.query_start or 0)
    share = q.shape[2] // k.shape[2]
    for b, i, n in np.ndindex(q.shape[:3]):
        seen = np.ones(k.shape[1], bool)
        if mask.key_valid is not None:
            seen &= np.asarray(mask.key_valid[b])
        if mask.causal:
            before = np.arange(k.shape[1]) <= start + i
            if mask.blocks is not None and mask.blocks[b, start + i] >= 0:
                before |= mask.blocks[b] == mask.blocks[b, start + i]
            seen &= before
        if mask.reach:
            at = np.arange(start + i + k.shape[1]) if mask.positions is None else mask.positions[b]
            seen &= at[: k.shape[1]] > at[start + i] - mask.reach
        if mask.slice_tokens:
            slices = np.arange(k.shape[1]) // mask.slice_tokens
            seen &= np.abs(slices - i // mask.slice_tokens) <= mask.window
        keys, values = k[b, :, n // share], v[b, :, n // share]
        if not seen.any():
            out[b, i, n] = np.nan
            continue
        scores = keys[seen] @ q[b, i, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, i, n] = weights @ values[seen] / weights.sum()
    return out


run = functools.partial(tiny.jit, static_argnames=("backend", "block"))(attention)


def draw(rng, batch, queries, keys, kv_heads, groups, size):
    shape = {"q": (batch, queries, kv_heads * groups, size), "k": (batch, keys, kv_heads, size)}
    shape["v"] = shape["k"]
    return {name: (2 * rng.standard_normal(s)).astype(np.float32) for name, s in shape.items()}


def masks(rng, batch, queries, keys, parts: set[str]) -> Mask:
    mask = Mask()
    if "valid" in parts:
        mask = dataclasses.replace(mask, key_valid=rng.random((batch, keys)) < 0.6)
    if "causal" in parts:
        start = np.int32(rng.integers(0, keys)) if rng.random() < 0.7 else None
        mask = dataclasses.replace(mask, causal=True, query_start=start)
    if "window" in parts:
        mask = dataclasses.replace(mask, slice_tokens=2, window=int(rng.integers(0, 3)))
    return mask


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 2), st.integers(1, 3),
    st.sampled_from([2, 4]), st.integers(1, 4), st.sets(st.sampled_from(["valid", "causal", "window"])),
    st.integers(0, 9),
)  # fmt: skip
def test_both_backends_equal_the_oracle_for_any_shape_and_mask(
    batch, queries, keys, kv_heads, groups, size, block, parts, seed
):
    rng = np.random.default_rng(seed)
    qkv = draw(rng, batch, queries, keys, kv_heads, groups, size)
    mask = masks(rng, batch, queries, keys, parts)
    expected = oracle(**qkv, mask=mask)
    for backend in ("plain", "blocked"):
        found = run(**qkv, mask=mask, backend=backend, block=block)
        assert found.shape == qkv["q"].shape and found.dtype == np.float32
        assert np.isfinite(found).all()  # also where a query sees no key
        sees = np.isfinite(expected)
        np.testing.assert_allclose(found[sees], expected[sees], rtol=1e-4, atol=1e-5, err_msg=backend)


BLOCKS = np.array(
    [[-1, 0, 0, 0, 0, 0, -1, -1, 1, 1, 1, -1, -1], [-1, -1, 0, 0, -1, 1, 1, 1, 1, 1, 1, -1, -1]], np.int32
)
GAPS = np.array([[1] * 13, [1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1]], bool)  # padding inside the second row


@pytest.mark.parametrize("backend", ["plain", "blocked"])
@pytest.mark.parametrize("queries, start", [(13, None), (13, 0), (4, 7), (1, 12)])  # whole, prefill, and into a cache
@pytest.mark.parametrize("reach", [None, 3, 6])  # shorter and longer than a block
@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_images_see_themselves_in_both_directions_within_the_sliding_window(backend, queries, start, reach, blocks):
    """Gemma 3's rule: (causal or of one image) and not farther back than the window, counted in positions."""
    qkv = draw(np.random.default_rng(4), 2, queries, 13, 2, 2, 4)
    positions = np.cumsum(GAPS, axis=1).astype(np.int32) - 1
    for at in (None, positions) if reach else (None,):
        mask = Mask(key_valid=GAPS, query_start=start if start is None else np.int32(start), causal=True,
                    blocks=blocks, positions=at, reach=reach)  # fmt: skip
        expected = oracle(**qkv, mask=mask)
        sees = np.isfinite(expected)
        found = run(**qkv, mask=mask, backend=backend, block=3)
        np.testing.assert_allclose(found[sees], expected[sees], rtol=1e-4, atol=1e-5)


def test_splash_refuses_blocks_and_sliding_windows_and_auto_does_without_it(monkeypatch):
    qkv = draw(np.random.default_rng(5), 2, 13, 13, 1, 1, 4)
    for mask in (Mask(causal=True, blocks=BLOCKS), Mask(causal=True, reach=3)):
        with pytest.raises(ValueError, match="splash backend knows no image blocks and no sliding windows"):
            attention(**qkv, mask=mask, backend="splash")
    monkeypatch.setattr("tghmoe_jax.ops.attention.platform", lambda: "tpu")
    long = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.float32)
    assert _choose(long, long, Mask(causal=True)) == "splash"
    assert _choose(long, long, Mask(causal=True, reach=3)) in ("plain", "blocked")


def test_scores_are_scaled_by_the_scale_that_is_given():
    qkv = draw(np.random.default_rng(6), 1, 5, 5, 1, 2, 4)
    for backend in ("plain", "blocked"):
        doubled = attention(**qkv | {"q": 2 * qkv["q"]}, backend=backend)
        np.testing.assert_allclose(attention(**qkv, backend=backend, scale=1.0), doubled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [set(), {"valid"}, {"causal", "valid"}, {"window", "valid"}])
def test_blocked_gradients_equal_plain_gradients(parts):
    rng = np.random.default_rng(1)
    qkv = draw(rng, 2, 11, 11, 2, 2, 4)
    mask = masks(rng, 2, 11, 11, parts)
    cotangent = rng.standard_normal(qkv["q"].shape).astype(np.float32)

    def gradients(backend):
        def total(qkv):
            return jnp.sum(attention(**qkv, mask=mask, backend=backend, block=4) * cotangent)

        return tiny.jit(jax.grad(total))(qkv)

    plain, blocked = gradients("plain"), gradients("blocked")
    for name in qkv:
        assert np.abs(plain[name]).max() > 1e-2
        np.testing.assert_allclose(blocked[name], plain[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("backend", ["plain", "blocked"])
def test_rows_without_any_valid_key_are_finite_with_finite_gradients(backend):
    qkv = draw(np.random.default_rng(2), 2, 5, 6, 1, 2, 4)
    mask = Mask(key_valid=np.array([[True] * 6, [False] * 6]))

    def total(qkv):
        return jnp.sum(attention(**qkv, mask=mask, backend=backend, block=2) ** 2)

    value, gradient = tiny.jit(jax.value_and_grad(total))(qkv)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient.values())


@pytest.mark.parametrize("backend", ["plain", "blocked"])
def test_masked_keys_change_nothing_to_the_last_bit(backend):
    rng = np.random.default_rng(3)
    qkv = draw(rng, 2, 7, 7, 2, 1, 4)
    mask = Mask(key_valid=np.arange(7) < np.array([[4], [6]]))
    before = run(**qkv, mask=mask, backend=backend, block=3)
    for name in "kv":
        qkv[name] = np.where(mask.key_valid[:, :, None, None], qkv[name], 1e3)
    assert np.array_equal(run(**qkv, mask=mask, backend=backend, block=3), before)


@pytest.mark.parametrize("block", [3, 6, 13])
@pytest.mark.parametrize("mask, sees", [
    (Mask(slice_tokens=6, window=1), lambda i, j: abs(i // 6 - j // 6) <= 1),
    (Mask(causal=True), lambda i, j: j <= i),
])  # fmt: skip
def test_blocks_never_touch_keys_that_none_of_their_queries_may_see(mask, sees, block):
    """A NaN among the last keys reaches, as 0 * NaN, what computes and masks it; the first blocks do not compute it."""
    rng = np.random.default_rng(9)
    qkv = draw(rng, 2, 40, 40, 2, 2, 4)
    clean = run(**qkv, mask=mask, backend="blocked", block=block)
    for name in "kv":
        qkv[name][:, 36:] = np.nan
    out = run(**qkv, mask=mask, backend="blocked", block=block)
    far = 13 if mask.causal else 18  # queries of blocks that end well before the last keys
    assert not any(sees(i, j) for i in range(far) for j in range(36, 40))
    assert np.array_equal(out[:, :far], clean[:, :far]) and np.isnan(out[:, 36:]).all()


def test_blocks_of_heads_that_fit_together_equal_plain():
    """Of 6 heads of 300 x 300 scores four would fit a block: three share one, so that both blocks are alike."""
    qkv = draw(np.random.default_rng(10), 2, 300, 300, 6, 2, 4)
    mask = Mask(key_valid=np.random.default_rng(11).random((2, 300)) < 0.8)
    found = attention(**qkv, mask=mask, backend="blocked")
    np.testing.assert_allclose(found, attention(**qkv, mask=mask, backend="plain"), rtol=1e-4, atol=1e-5)


def test_the_automatic_choice_is_blocked_for_large_scores_and_equal():
    """2 heads x 1500 x 1500 scores are 18 MB: over the cache limit, so `auto` takes blocks."""
    qkv = draw(np.random.default_rng(4), 1, 1500, 1500, 2, 1, 4)
    steps = str(jax.make_jaxpr(functools.partial(attention, backend="auto"))(**qkv))
    assert "while" in steps or "scan" in steps
    np.testing.assert_allclose(
        attention(**qkv, backend="auto"), attention(**qkv, backend="plain"), rtol=1e-4, atol=1e-5
    )


SPLASH = {  # queries, keys, mask: several blocks of 128, with padding of both; a query that sees nothing is left out
    "padding": (150, 150, {}),
    "valid": (150, 150, {"valid"}),
    "causal": (200, 200, {"causal"}),
    "prefill": (130, 270, {"causal", "valid"}),  # fewer prompt tokens than slots of the cache
    "window": (210, 210, {"window", "valid"}),
}


@pytest.mark.parametrize("case", SPLASH)
def test_the_splash_kernel_equals_plain_attention_in_values_and_gradients(case):
    """The Pallas kernel of TPUs, interpreted; `plain` is held against the oracle above."""
    queries, keys, parts = SPLASH[case]
    rng = np.random.default_rng(6)
    qkv = draw(rng, 2, queries, keys, 2, 2, 8)
    valid = rng.random((2, keys)) < 0.7
    valid[:, ::30] = True  # every window of 30 tokens, and every causal row, sees a key
    mask = Mask(
        key_valid=valid if "valid" in parts else None, causal="causal" in parts,
        slice_tokens=30 if "window" in parts else 0, window=1,
    )  # fmt: skip
    cotangent = rng.standard_normal(qkv["q"].shape).astype(np.float32)

    def run(backend):
        def total(qkv):
            out = attention(**qkv, mask=mask, backend=backend, block=128)
            return jnp.sum(out * cotangent), out

        gradient, out = tiny.jit(jax.grad(total, has_aux=True))(qkv)
        return {"out": out, **gradient}

    plain, splash = run("plain"), run("splash")
    for name, expected in plain.items():
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(splash[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


class Layer(nn.Module):
    """A residual attention, as flax scans it."""

    backend: str

    @nn.compact
    def __call__(self, x, _):
        x = x * self.param("scale", nn.initializers.ones, ())
        return x + attention(x, x, x, Mask(causal=True), self.backend, block=128), None


@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.remat])
def test_the_splash_kernel_serves_layers_that_are_scanned_and_rematerialised(wrap):
    """The arrays of its mask belong to the trace of the layer, whatever kind of trace that is."""
    x = draw(np.random.default_rng(8), 1, 130, 130, 1, 1, 8)["q"]

    def gradient(backend):
        layers = nn.scan(wrap(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(backend)
        return tiny.jit(jax.grad(lambda p, x: jnp.sum(layers.apply(p, x, None)[0] ** 2)))(
            {"params": {"scale": jnp.ones(2)}}, x
        )["params"]["scale"]

    np.testing.assert_allclose(gradient("splash"), gradient("plain"), rtol=1e-4)


def test_the_splash_window_visits_near_blocks_only():
    """Of 8 x 8 blocks a window of one slice leaves the three diagonals: the others are never computed."""
    kernel = splash_kernels.kernel(1, 1024, 1024, False, 128, 1, 128, True)
    assert kernel.fwd_mask_info.block_mask.shape[-1] == 3  # the grid's columns shrink to the widest row
    assert np.count_nonzero(kernel.fwd_mask_info.block_mask) == 3 * 8 - 2


@pytest.mark.parametrize(
    "length, block, padded", [(577, 640, 640), (1917, 640, 1920), (9232, 640, 9600), (90, 128, 128)]
)
def test_lengths_are_padded_to_blocks_of_128_lanes(length, block, padded):
    assert splash_blocks(length) == (block, padded) and padded % block == 0 and block % 128 == 0


def test_the_splash_kernel_refuses_masks_it_cannot_know():
    qkv = draw(np.random.default_rng(7), 1, 130, 130, 1, 1, 8)
    with pytest.raises(ValueError, match="at compile time"):
        attention(**qkv, mask=Mask(causal=True, query_start=np.int32(1)), backend="splash")
    with pytest.raises(ValueError, match="not both"):
        attention(**qkv, mask=Mask(causal=True, slice_tokens=2), backend="splash")


@pytest.mark.parametrize("kind, dtype, queries, expected", [
    ("tpu", "float32", 577, "splash"), ("tpu", "bfloat16", 1917, "splash"), ("tpu", "bfloat16", 16, "plain"),
    ("gpu", "bfloat16", 577, "cudnn"), ("gpu", "float32", 577, "plain"), ("cpu", "bfloat16", 577, "plain"),
])  # fmt: skip
def test_the_automatic_choice_follows_the_devices_of_the_mesh(kind, dtype, queries, expected):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=kind)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    q = jax.ShapeDtypeStruct((1, queries, 2, 64), jnp.dtype(dtype))
    with jax.sharding.use_abstract_mesh(mesh):
        assert _choose(q, q, Mask()) == expected
        assert _choose(q, q, Mask(slice_tokens=577, window=1)) == (expected if kind == "tpu" else "plain")
        assert _choose(q, q, Mask(causal=True, query_start=jnp.int32(3))) in ("plain", "blocked")


def test_an_unknown_backend_is_named():
    qkv = draw(np.random.default_rng(5), 1, 2, 2, 1, 1, 2)
    with pytest.raises(ValueError, match="'flash' is not one of"):
        attention(**qkv, backend="flash")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.floats(-50, 50), st.integers(0, 9))
def test_rope_scores_depend_on_position_differences_only_and_keep_lengths(half, shift, seed):
    """I5 at the level of the operation: rotating both sides by the same angle leaves q . k unchanged."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 1, 3, 1, 2 * half + 2)).astype(np.float32)
    position = rng.uniform(0, 9, (1, 3)).astype(np.float32)
    frequency = (100.0 ** -(np.arange(half) / half)).astype(np.float32)

    def scores(shift):
        cos, sin = tiny.jit(rope.tables)(position + np.float32(shift), frequency)
        q, k = rope.rotate(x, cos, sin), rope.rotate(y, cos, sin)
        assert np.array_equal(q[..., 2 * half :], x[..., 2 * half :])
        np.testing.assert_allclose(np.linalg.norm(q, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
        return np.einsum("btnh,bsnh->ts", q, k)

    np.testing.assert_allclose(scores(shift), scores(0.0), rtol=1e-3, atol=1e-4)


def test_rope_turns_pair_i_with_i_plus_half_by_position_times_frequency():
    cos, sin = rope.tables(np.full((1, 1), 3.0), np.array([0.5, 0.1], np.float32), magnitude=2.0)
    x = np.array([1.0, 0.0, 0.0, 1.0, 7.0], np.float32).reshape(1, 1, 1, 5)
    expected = [2 * np.cos(1.5), -2 * np.sin(0.3), 2 * np.sin(1.5), 2 * np.cos(0.3), 7.0]
    np.testing.assert_allclose(rope.rotate(x, cos, sin).ravel(), expected, rtol=1e-6)
