"""I12: the three dispatches agree wherever nothing is dropped, and against one token at a time in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tghmoe_jax.ops.experts import DISPATCHES, ExpertWeights, apply_experts

C, F = 6, 10


def draw(seed, tokens, experts, top_k, padding=0.0):
    """x (N, C), choice (N, K) of distinct experts or X for padding, gate (N, K), weights."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    choice = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    choice[rng.random(tokens) < padding] = experts
    weights = ExpertWeights(normal(experts, C, F), normal(experts, F), normal(experts, F, C), normal(experts, C))
    return normal(tokens, C), choice, rng.random((tokens, top_k)).astype(np.float32), weights


def oracle(x, choice, gate, weights, slots=None):
    """float64 (N, C) and the number of dropped pairs; expert e takes the first slots[e] pairs in token order."""
    y, used, dropped = np.zeros(x.shape), [0] * len(weights.fc1), 0
    for n, k in np.ndindex(choice.shape):
        e = choice[n, k]
        if e == len(used):
            continue
        used[e] += 1
        if slots is not None and used[e] > slots[e]:
            dropped += 1
            continue
        fc1, b1, fc2, b2 = (np.asarray(w[e], np.float64) for w in weights)
        y[n] += gate[n, k] * (np.tanh(x[n] @ fc1 + b1) @ fc2 + b2)
    return y, dropped


@functools.partial(tiny.jit, static_argnames=("dispatch", "factor", "shares"))
def run(x, choice, gate, weights, dispatch, factor=1.25, shares=()):
    return apply_experts(x, choice, gate, weights, jnp.tanh, dispatch, factor, shares)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_every_dispatch_equals_one_token_at_a_time(tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    case = draw(data.draw(st.integers(0, 99)), tokens, experts, top_k, padding=data.draw(st.sampled_from([0, 0.5, 1])))
    expected, _ = oracle(*case)
    for dispatch in DISPATCHES:
        y, dropped = run(*case, dispatch=dispatch, factor=float(experts))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4, err_msg=dispatch)
        assert dropped == 0


@pytest.mark.parametrize("tokens", [9, 170, 1500])  # an expert has part of a tile, several small, and large ones too
def test_values_and_gradients_of_all_dispatches_agree(tokens):
    case = draw(1, tokens, experts=4, top_k=2, padding=0.2)
    cotangent = np.random.default_rng(2).standard_normal((tokens, C)).astype(np.float32)

    def gradients(dispatch):
        def total(x, gate, weights):
            y, _ = apply_experts(x, case[1], gate, weights, jnp.tanh, dispatch, capacity_factor=4.0)
            return jnp.sum(y * cotangent)

        return tiny.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(case[0], case[2], case[3])

    dense = gradients("dense")
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(dense))
    for dispatch in ("ragged", "capacity"):
        for found, expected in zip(jax.tree.leaves(gradients(dispatch)), jax.tree.leaves(dense), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4, err_msg=dispatch)


@pytest.mark.parametrize(
    ("factor", "shares", "slots"),
    [(0.5, (), (3, 3, 3, 3)), (0.05, (), (1, 1, 1, 1)), (1.0, (0.1, 0.2, 0.1, 0.6), (2, 4, 2, 10)),
     (0.5, (0.5, 0.5, 0.0, 0.0), (5, 5, 0, 0))],
)  # fmt: skip
def test_capacity_drops_exactly_the_pairs_that_find_no_slot(factor, shares, slots):
    """20 pairs over 4 experts: ceil(factor * 20 * share) slots each, never more than the 10 tokens."""
    case = draw(3, 10, experts=4, top_k=2)
    expected, dropped = oracle(*case, slots=slots)
    y, counted = run(*case, dispatch="capacity", factor=factor, shares=shares)
    assert counted == dropped > 0
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_padding_goes_nowhere_and_takes_no_slot(dispatch):
    """Real tokens come last: with slots for them only, they still all find one."""
    x, choice, gate, weights = draw(4, 12, experts=4, top_k=1)
    choice[:] = np.arange(12)[:, None] % 4
    choice[:8] = 4
    factor = 4 / 12  # one slot an expert
    y, dropped = run(x, choice, gate, weights, dispatch=dispatch, factor=factor)
    assert dropped == 0 and not np.any(y[:8])
    np.testing.assert_allclose(y, oracle(x, choice, gate, weights)[0], rtol=1e-4, atol=1e-4)
    other = x.copy()
    other[:8] = 1e3
    assert np.array_equal(run(other, choice, gate, weights, dispatch=dispatch, factor=factor)[0], y)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_padding_has_no_gradient(dispatch):
    x, choice, gate, weights = jax.tree.map(jnp.asarray, draw(5, 6, experts=2, top_k=2))
    choice = choice.at[3:].set(2)
    total = lambda x, gate: jnp.sum(apply_experts(x, choice, gate, weights, jnp.tanh, dispatch, 2.0)[0])  # noqa: E731
    dx, dgate = tiny.jit(jax.grad(total, argnums=(0, 1)))(x, gate)
    assert not np.any(dx[3:]) and not np.any(dgate[3:]) and np.all(np.any(dx[:3], axis=1))


def test_a_batch_of_padding_only_gives_zeros():
    case = draw(6, 5, experts=3, top_k=2, padding=1.1)
    for dispatch in DISPATCHES:
        y, dropped = run(*case, dispatch=dispatch)
        assert not np.any(y) and dropped == 0


def test_an_unknown_dispatch_is_named():
    with pytest.raises(ValueError, match="'hash' is not one of dense, capacity, ragged"):
        apply_experts(*draw(0, 2, 2, 1), jnp.tanh, "hash")


def test_the_tiles_of_a_gpu_give_the_values_and_gradients_of_the_dense_dispatch(monkeypatch):
    monkeypatch.setattr("tghmoe_jax.ops.tiled.platform", lambda: "gpu")
    monkeypatch.setattr("tghmoe_jax.ops.tiled.GPU_TILES", (8, 3))
    x, choice, gate, weights = draw(4, 40, 3, 2, padding=0.1)
    cotangent = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)

    def total(arrays, dispatch):
        y, _ = apply_experts(arrays[0], choice, gate, arrays[1], jnp.tanh, dispatch)
        return jnp.sum(y * cotangent), y

    found, expected = (
        tiny.jit(jax.grad(functools.partial(total, dispatch=dispatch), has_aux=True))((x, weights))
        for dispatch in ("ragged", "dense")
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
