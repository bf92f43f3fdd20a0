"""Both attention backends against an oracle in float64 numpy, with every mask they know."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tghmoe_jax.ops import rope
from tghmoe_jax.ops.attention import Mask, attention


def oracle(q, k, v, mask: Mask) -> np.ndarray:
    """One query at a time: softmax over the keys it may see; the plain mean of all values where it may see none."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    share = q.shape[2] // k.shape[2]
    for b, i, n in np.ndindex(q.shape[:3]):
        seen = np.ones(k.shape[1], bool)
        if mask.key_valid is not None:
            seen &= np.asarray(mask.key_valid[b])
        if mask.query_slot is not None:
            seen &= np.asarray(mask.key_slot) <= np.asarray(mask.query_slot)[i]
        if mask.query_slice is not None:
            seen &= np.abs(np.asarray(mask.key_slice) - np.asarray(mask.query_slice)[i]) <= mask.window
        keys, values = k[b, :, n // share], v[b, :, n // share]
        if not seen.any():
            out[b, i, n] = values.mean(axis=0)
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
        slots = np.sort(rng.integers(0, keys, queries)).astype(np.int32)
        mask = dataclasses.replace(mask, query_slot=slots, key_slot=np.arange(keys, dtype=np.int32))
    if "window" in parts:
        mask = dataclasses.replace(
            mask, query_slice=np.arange(queries, dtype=np.int32) // 2, key_slice=np.arange(keys, dtype=np.int32) // 2,
            window=int(rng.integers(0, 3)),
        )  # fmt: skip
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
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=backend)


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


def test_the_automatic_choice_is_blocked_for_large_scores_and_equal():
    """2 heads x 1500 x 1500 scores are 18 MB: over the cache limit, so `auto` takes blocks."""
    qkv = draw(np.random.default_rng(4), 1, 1500, 1500, 2, 1, 4)
    auto = lambda qkv: attention(**qkv, backend="auto")  # noqa: E731
    assert "while" in str(jax.make_jaxpr(auto)(qkv)) or "scan" in str(jax.make_jaxpr(auto)(qkv))
    np.testing.assert_allclose(auto(qkv), attention(**qkv, backend="plain"), rtol=1e-4, atol=1e-5)


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
