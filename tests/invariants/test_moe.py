"""I9 to I17: what must hold of TGH-MoE at upcycling, under its dispatches, in its losses and between its groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.bases.family_fixtures import FAMILIES
from tghmoe_jax.bases import phi3v
from tghmoe_jax.bases.base import load_base, save_base
from tghmoe_jax.models.router import TokenRouting
from tghmoe_jax.models.tgh_moe import MoE, moe_stats
from tghmoe_jax.ops.activations import quick_gelu
from tghmoe_jax.training import losses
from tghmoe_jax.weights import adapt

B, T, C, F, R, E, G = 3, 7, 6, 10, 5, 4, 2
GROUP = np.array([0, 1, 1], np.int32)


# ---- one layer -------------------------------------------------------------------------------------------------------


def inputs(seed=0):
    """u (B, T, C), valid (B, T), t (B, R), group (B,)."""
    rng = np.random.default_rng(seed)
    u, t = rng.standard_normal((B, T, C)).astype(np.float32), rng.standard_normal((B, R)).astype(np.float32)
    return u, np.arange(T) < np.array([[T], [T - 2], [T]]), t, GROUP


def layer_params(seed=0, equal_experts=False):
    rng = np.random.default_rng(seed)

    def expert(*shape):
        lead = (1, 1) if equal_experts else (G, E)
        return np.broadcast_to(rng.standard_normal((*lead, *shape)), (G, E, *shape)).astype(np.float32)

    router = lambda n: {"kernel": rng.standard_normal((G, n, E)).astype(np.float32)}  # noqa: E731
    return {
        "experts": {
            "fc1": {"kernel": expert(C, F), "bias": expert(F)},
            "fc2": {"kernel": expert(F, C), "bias": expert(C)},
        },
        "router": {"x": router(C), "t": router(R)},
    }


def apply_layer(params, inputs, top_k=2, dispatch="ragged", task_input="text"):
    cfg = tiny.tgh(
        groups=G, experts=E, top_k=top_k, dispatch=dispatch, capacity_factor=float(G * E),
        task_input=task_input, group_shares=(0.75, 0.25),
    )  # fmt: skip
    return MoE(cfg, G, E, top_k, F, "quick_gelu", jnp.float32).apply({"params": params}, *inputs)


layer = tiny.jit(apply_layer, static_argnames=("top_k", "dispatch", "task_input"))


def dense_ffn(params, u):
    e = params["experts"]
    hidden = quick_gelu(u @ e["fc1"]["kernel"][0, 0] + e["fc1"]["bias"][0, 0])
    return hidden @ e["fc2"]["kernel"][0, 0] + e["fc2"]["bias"][0, 0]


@pytest.mark.parametrize(("top_k", "equal"), [(2, True), (3, True), (E, True), (1, False)])
def test_equal_experts_are_the_dense_ffn_where_gates_sum_to_one(top_k, equal):
    """I9: for any router weights, since gates are renormalised; k = 1 keeps its gate."""
    given = inputs()
    u, valid = given[:2]
    for seed in range(3):
        params = layer_params(seed, equal_experts=True)
        y, expected = np.asarray(layer(params, given, top_k)[0]), np.asarray(dense_ffn(params, u))
        if equal:
            tiny.close(y[valid], expected[valid])
        else:
            assert tiny.distance(y[valid], expected[valid]) > 0.2
        assert not np.any(y[~valid])


@pytest.mark.parametrize("top_k", [1, 2])
def test_permuting_experts_with_their_router_columns_changes_nothing(top_k):
    """I10: in every group by its own permutation."""
    params, given = layer_params(1), inputs(1)
    y, stats = layer(params, given, top_k)
    order = np.array([[2, 0, 3, 1], [1, 3, 2, 0]])
    permuted = {
        "experts": jax.tree.map(lambda a: np.stack([a[g][order[g]] for g in range(G)]), params["experts"]),
        "router": jax.tree.map(lambda a: np.stack([a[g][:, order[g]] for g in range(G)]), params["router"]),
    }
    moved, moved_stats = layer(permuted, given, top_k)
    tiny.close(moved, y)
    tiny.close(moved_stats.load, np.take_along_axis(np.asarray(stats.load), order, axis=1))
    tiny.close([moved_stats.balance, moved_stats.z], [stats.balance, stats.z])
    half = permuted | {"router": params["router"]}
    assert tiny.distance(layer(half, given, top_k)[0], y) > 0.5


def test_dispatches_agree_in_values_and_gradients_of_a_routed_layer():
    """I12: dense-masked, grouped-matmul and capacity with room for every token."""
    params, given = layer_params(2), inputs(2)
    cotangent = np.random.default_rng(0).standard_normal((B, T, C)).astype(np.float32)

    def gradients(dispatch):
        def total(params, u):
            y, stats = apply_layer(params, (u, *given[1:]), dispatch=dispatch)
            return jnp.sum(y * cotangent) + stats.balance, (y, stats.dropped, stats.load)

        return tiny.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, given[0])

    dense = gradients("dense")
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(dense[1]))
    for dispatch in ("ragged", "capacity"):
        found = gradients(dispatch)
        assert found[0][1][1] == 0
        jax.tree.map(tiny.close, found, dense)


@pytest.mark.parametrize("dispatch", ["ragged", "capacity"])
def test_without_guidance_every_group_answers_and_their_mean_counts(dispatch):
    params, (u, valid, t, group) = layer_params(3), inputs(3)
    forced = [layer(params, (u, valid, t, np.full_like(group, g))) for g in range(G)]
    y, stats = layer(params, (u, valid, t, group), dispatch=dispatch, task_input="none")
    tiny.close(y, sum(np.asarray(one[0]) for one in forced) / G)
    tiny.close(stats.load, sum(np.asarray(one[1].load) for one in forced))
    assert stats.dropped == 0 and tiny.distance(forced[0][0], forced[1][0]) > 0.5
    tiny.close(stats.balance, np.mean([one[1].balance for one in forced]))


# ---- losses ----------------------------------------------------------------------------------------------------------


def routing(logits, top_k) -> TokenRouting:
    probabilities = jax.nn.softmax(logits, axis=-1)
    gate, choice = jax.lax.top_k(probabilities, top_k)
    return TokenRouting(choice, gate, probabilities, logits)


@functools.partial(tiny.jit, static_argnums=2)
def stats_of(routing, valid, groups):
    return moe_stats(routing, valid, GROUP, groups, jnp.int32(0))


def test_balance_loss_is_one_when_uniform_and_e_when_collapsed():
    """I15: uniform probabilities give 1 for any choices; all tokens to one expert with probability one give E."""
    valid = np.ones((B, T), bool)
    uniform = routing(jnp.zeros((B, T, E)), 2)
    assert stats_of(uniform, valid, G).balance == pytest.approx(1)
    spread = jnp.broadcast_to(jnp.arange(T)[None, :, None] % E, (B, T, 1))
    assert stats_of(uniform._replace(choice=spread), valid, G).balance == pytest.approx(1)
    collapsed = routing(jnp.zeros((B, T, E)).at[..., 1].set(50.0), 1)
    assert stats_of(collapsed, valid, G).balance == pytest.approx(E)


def test_balance_loss_follows_its_formula_over_valid_tokens_of_each_group():
    """I15: E sum_e f_e P_e with f summing to one, averaged over the groups present; so is mean lse(s)^2."""
    logits = np.random.default_rng(0).standard_normal((B, T, E)).astype(np.float32) * 2
    valid = inputs()[1]
    one = routing(logits, 2)
    stats = stats_of(one, valid, 3)  # group 2 is absent
    balance, z = [], []
    for g in (0, 1):
        rows = (GROUP == g)[:, None] & valid
        f = np.bincount(np.asarray(one.choice)[rows].ravel(), minlength=E) / (2 * rows.sum())
        assert f.sum() == pytest.approx(1)
        tiny.close(np.asarray(stats.load[g]), f * 2 * rows.sum())
        balance.append(E * np.sum(f * np.asarray(one.probabilities)[rows].mean(axis=0)))
        z.append(np.mean(np.log(np.exp(logits[rows]).sum(-1)) ** 2))
    assert stats.balance == pytest.approx(np.mean(balance), rel=1e-5)
    assert stats.z == pytest.approx(np.mean(z), rel=1e-5)
    assert not np.any(stats.load[2]) and stats.load.sum() == 2 * valid.sum()


def test_no_gradient_flows_through_the_expert_shares():
    """I15: the gradient of the balance loss is that with f held constant."""
    logits = np.random.default_rng(1).standard_normal((B, T, E)).astype(np.float32)
    valid = np.ones((B, T), bool)
    f = np.stack([np.asarray(stats_of(routing(logits, 2), valid, G).load[g]) for g in range(G)])
    f = f / f.sum(axis=1, keepdims=True)

    def loss(logits):
        return moe_stats(routing(logits, 2), valid, GROUP, G, jnp.int32(0)).balance

    def by_hand(logits):
        p = jax.nn.softmax(logits, axis=-1)
        return sum(E * jnp.sum(f[g] * p[GROUP == g].mean(axis=(0, 1))) for g in range(G)) / G

    tiny.close(tiny.jit(jax.grad(loss))(logits), tiny.jit(jax.grad(by_hand))(logits), atol=1e-7)

    def through_gates(gate):
        return moe_stats(routing(logits, 2)._replace(gate=gate), valid, GROUP, G, jnp.int32(0)).balance

    assert not np.any(tiny.jit(jax.grad(through_gates))(routing(logits, 2).gate))


# ---- the whole model -------------------------------------------------------------------------------------------------


def base_leaves() -> dict[str, np.ndarray]:
    return {name: tiny.leaf(name, shape, 0) for name, shape in phi3v.FAMILY.shapes(tiny.CONFIG).items()}


@pytest.mark.parametrize("topology", ["nested", "stacked", "parallel"])
def test_one_expert_of_one_group_takes_the_dense_code_path(topology):
    """I11: E = k = T = 1 has the dense model's leaves and computes it (a task FFN of one group stays a task FFN)."""
    model = tiny.model(tgh={"topology": topology, "experts": 1, "top_k": 1})
    moe = [name for name in tiny.canonical(model) if "/moe/" in name]
    assert not moe
    if topology != "parallel":
        assert set(tiny.shapes(model)) == set(tiny.shapes(tiny.model(tgh={"layers": ()})))


def test_a_model_of_one_expert_exports_as_its_base(tmp_path):
    """I11: imported at patch depth 1, written back and read again, every tensor is bitwise the base's."""
    base = tiny.base(tmp_path / "base")
    model = tiny.model(base.config, tgh={"experts": 1, "top_k": 1})
    leaves = adapt.assemble({name: leaf.shape for name, leaf in tiny.canonical(model).items()}, base.params)[0]
    save_base(tmp_path / "again", leaves, base.config, dtype=None)
    again = load_base(tmp_path / "again").params
    assert set(again) == set(base.params)
    assert all(np.asarray(again[n]).tobytes() == np.asarray(base.params[n]).tobytes() for n in again)


def stage_1(topology="nested", base=tiny.CONFIG):
    if topology == "stacked":
        return tiny.model(tgh={"topology": topology, "task_layers": (3,), "layers": (2,)})
    return tiny.uniform({"topology": topology}, base=base)


def stage_2(topology="nested", base=tiny.CONFIG, **tgh):
    model = stage_1(topology, base)
    return model.clone(cfg=model.cfg.with_tgh(groups=2, **tgh))


@pytest.mark.parametrize(
    ("topology", "family"),
    [("nested", "phi3_v"), ("stacked", "phi3_v"), ("parallel", "phi3_v"), ("nested", "gemma3"),
     ("nested", "siglip_qwen2")],
)  # fmt: skip
def test_stage2_at_init_equals_stage1_for_every_task(topology, family):
    """I13: whatever the experts of stage 1 have become, and whatever the group."""
    first, second = (stage(topology, FAMILIES[family]) for stage in (stage_1, stage_2))
    leaves, batch = tiny.canonical(first), tiny.batch()
    params = tiny.adapted(second, leaves, adapt.NEW_FROM_STAGE1)
    expected = tiny.features(first, tiny.params(first), batch)
    for group in ([0, 0], [1, 1], [1, 0]):
        tiny.close(tiny.features(second, params, batch, group), expected)


@functools.partial(tiny.jit, static_argnums=0)
def gradient(model, params, batch):
    """Gradient of the LM loss alone, every sample in its task's group."""

    def total(params):
        group = batch["task"] if model.cfg.tgh.groups > 1 else 0 * batch["task"]
        output = tiny.apply(model, params, batch, group, score=True)
        weight = jnp.sum(losses.answer_weights(batch, tiny.LM_ONLY, tiny.PREFIX))
        return losses.loss(output, batch, tiny.LM_ONLY, tiny.PREFIX, weight, 1)[0]

    return jax.grad(total)(params)


def routers(gradients):
    return {path: np.asarray(g) for path, g in gradients.items() if "/moe/router/" in path}


def experts(gradients):
    return {path: np.asarray(g) for path, g in gradients.items() if "/moe/experts/" in path}


def test_at_upcycling_the_lm_loss_moves_experts_but_not_token_routers():
    """I14: gates that sum to one over equal experts leave the routers without gradient, up to rounding."""
    model = tiny.uniform()
    found = gradient(model, tiny.adapted(model, base_leaves()), tiny.batch())
    size = max(np.abs(g).max() for g in experts(found).values())
    assert size > 1e-3 and len(routers(found)) == 2
    assert max(np.abs(g).max() for g in routers(found).values()) < 1e-7 * size


def test_a_single_choice_moves_token_routers_at_upcycling():
    """I14, the other way: the gate of k = 1 is not renormalised, so equal experts still leave routers a gradient."""
    params, given = layer_params(3, equal_experts=True), inputs(3)

    def slope(top_k):
        """Relative to the experts' gradient: rounding grows with it, and differs between processors."""
        found = tiny.jit(jax.grad(lambda p: jnp.sum(apply_layer(p, given, top_k=top_k)[0] ** 2)))(params)
        size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found["experts"]))
        return np.abs(found["router"]["x"]["kernel"]).max() / size

    assert slope(1) > 1e-2 > 1e-6 > slope(2)


@pytest.fixture(scope="module")
def one_task():
    """A stage-2 model, its weights with groups that differ, and a batch of task 1 only."""
    model = stage_2()
    return model, tiny.params(model), tiny.batch() | {"task": np.array([1, 1], np.int32)}


def test_a_batch_of_one_task_leaves_no_gradient_in_other_groups(one_task):
    """I16: exactly zero in group 0, something in every leaf of group 1."""
    found = gradient(*one_task)
    leaves = experts(found) | routers(found)
    assert len(leaves) == 6
    for path, g in leaves.items():
        assert g.shape[:2] == (4, 2)  # stacked over the layers, then groups
        assert not np.any(g[:, 0]), path
        assert np.all(np.any(g[:, 1].reshape(4, -1), axis=1)), path


def test_changing_other_groups_changes_no_output(one_task):
    """I17: hard routing uses exactly one group, to the last bit; the used group does matter."""
    model, params, batch = one_task
    group = np.array([1, 0], np.int32)
    before = tiny.features(model, params, batch, group)
    for row, other in ((0, 0), (1, 1)):
        changed = {path: leaf.copy() if "/moe/" in path else leaf for path, leaf in params.items()}
        for path, leaf in changed.items():
            if "/moe/" in path:
                leaf[:, other] = np.nan
        found = tiny.features(model, changed, batch, group)
        assert np.array_equal(found[row], before[row])
        assert not np.isfinite(found[1 - row]).all()
