"""Stacked and parallel experts: their layers and their upcycling without change; what each switch of routing does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests import tiny
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.models.router import TokenRouter
from tghmoe_jax.models.vit3d import BlockSpec, block_specs

B, T, C, R, E, G = 3, 5, 6, 4, 4, 2


def topology(name: str, **tgh) -> MLLM:
    layers = {"layers": (2,), "task_layers": (3,)} if name == "stacked" else {"layers": tiny.ALL}
    build = tiny.model if name == "stacked" else tiny.uniform
    return build(tgh={"topology": name, **layers, **tgh})


def test_each_topology_puts_its_experts_where_the_specification_says():
    token, shared, task = (2, 4, 2), (1, 4, 2), (2, 1, 1)
    specs = {name: block_specs(topology(name, groups=2).cfg) for name in ("nested", "stacked", "parallel")}
    assert specs["nested"] == [BlockSpec("joint", token, None)] * 4
    assert specs["parallel"] == [BlockSpec("joint", shared, task)] * 4
    dense = BlockSpec("2d")
    assert specs["stacked"] == [dense, dense, BlockSpec("joint", shared, None), BlockSpec("joint", None, task)]


@pytest.mark.parametrize("name", ["stacked", "parallel"])
def test_upcycling_leaves_the_dense_features_unchanged(name):
    """Token experts and task FFN both equal the dense FFN, whatever routers and mixing share."""
    model = topology(name)
    dense = tiny.model(attn3d_layers=model.cfg.volume.attn3d_layers, tgh={"layers": ()})
    source = tiny.canonical(dense)
    batch = tiny.batch(real=[4, 3])
    expected = tiny.features(dense, tiny.params(dense), batch)
    new = [r"vision/block_\d+/(moe|task_ffn)/router/[xt]/kernel", r"vision/block_\d+/mix"]
    found, valid, _ = tiny.tower(model, tiny.adapted(model, source, new), batch)
    tiny.close(np.asarray(found)[np.asarray(valid)], expected[np.asarray(valid)])


def test_the_mixing_share_of_parallel_experts_starts_at_one_half_and_learns():
    """At zero neither part would get a gradient (model-spec 4.4)."""
    model = topology("parallel", groups=2)
    batch = tiny.batch(slices=2)
    params = tiny.params(model)

    def total(params):
        return jnp.mean(tiny.apply(model, params, batch, batch["task"]).encoded.tokens ** 2)

    slopes = tiny.jit(jax.grad(total))(params)
    mix = next(path for path in params if path.endswith("/mix"))
    assert np.all(slopes[mix] != 0)
    for part in ("/moe/experts/", "/task_ffn/experts/", "/moe/router/"):
        assert all(np.any(slopes[path]) for path in params if part in path)

    @tiny.jit
    def start():
        tree = model.init(jax.random.key(0), tiny.batch(rows=1, slices=1))["params"]
        return traverse_util.flatten_dict(tree, sep="/")[mix]

    assert np.all(start() == 0.5)


def test_stacked_and_parallel_tasks_share_token_experts_and_own_their_task_ffn():
    for name in ("stacked", "parallel"):
        model = topology(name, groups=2)
        shapes = {path: leaf.shape for path, leaf in tiny.canonical(model).items()}
        moe = {shape[0] for path, shape in shapes.items() if "/moe/" in path}
        task = {shape[:2] for path, shape in shapes.items() if "/task_ffn/" in path}
        assert moe == {1} and task == {(2, 1)}
        assert not any("/task_ffn/router/" in path for path in shapes)  # one expert needs no router


@pytest.mark.parametrize("name", ["stacked", "parallel"])
def test_groups_of_a_task_ffn_change_only_their_own_tasks_features(name):
    model = topology(name, groups=2)
    params, batch = tiny.params(model), tiny.batch()
    before = tiny.features(model, params, batch, [0, 1])
    changed = dict(params)
    for path, leaf in params.items():
        if "/task_ffn/experts/fc2/kernel" in path:
            axis = 1 if "scan_" in path else 0
            changed[path] = leaf * np.array([1, 2]).reshape((1,) * axis + (2,) + (1,) * (leaf.ndim - axis - 1))
    after = tiny.features(model, changed, batch, [0, 1])
    assert np.array_equal(after[0], before[0]) and tiny.distance(after[1], before[1]) > 0.05


# ---- gates and inputs of the token router ----------------------------------------------------------------------------


@functools.partial(tiny.jit, static_argnames=("top_k", "token_input"))
def token_router(u, t, top_k=2, token_input="image_text"):
    cfg = tiny.tgh(token_input=token_input)
    params = {name: {"kernel": jnp.asarray(tiny.leaf(f"router/{name}/kernel", (G, size, E), 1))}
              for name, size in (("x", C), ("t", R))}  # fmt: skip
    kept = {"image": "x", "text": "t"}.get(cfg.token_input)
    params = params if kept is None else {kept: params[kept]}
    router = TokenRouter(cfg, G, E, top_k)
    return router.apply({"params": params}, u, t, jnp.array([0, 1, 1]))


def tokens(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, T, C)).astype(np.float32), rng.standard_normal((B, R)).astype(np.float32)


def test_gates_are_renormalised_probabilities_but_for_a_single_choice():
    u, t = tokens()
    plain = token_router(u, t)
    probabilities = np.asarray(jax.nn.softmax(plain.logits))
    best = np.sort(probabilities, axis=-1)[..., :-3:-1]
    tiny.close(plain.gate, best / best.sum(-1, keepdims=True), atol=1e-6)
    single = token_router(u, t, top_k=1)
    tiny.close(single.gate[..., 0], probabilities.max(-1), atol=1e-6)  # k = 1 keeps its probability (model-spec 0)


def test_token_routers_read_the_image_the_text_or_both():
    (u, t), (u2, t2) = tokens(0), tokens(1)
    for kind, image_matters, text_matters in [
        ("image", True, False), ("text", False, True), ("image_text", True, True)
    ]:  # fmt: skip
        read = functools.partial(token_router, token_input=kind)
        logits = read(u, t).logits
        assert (tiny.distance(read(u2, t).logits, logits) > 0.1) == image_matters
        assert (tiny.distance(read(u, t2).logits, logits) > 0.1) == text_matters
        assert (np.ptp(np.asarray(logits), axis=1).max() > 0.1) == image_matters  # text alone: one choice a sample


# ---- input of the task router ----------------------------------------------------------------------------------------


def route(model, params, batch):
    return np.asarray(model.apply(tiny.tree(params), batch, method=MLLM.route))


@pytest.mark.parametrize(
    ("kind", "image_matters", "text_matters"),
    [("text", False, True), ("image", True, False), ("image_text", True, True)],
)
def test_task_routers_read_the_text_the_image_or_both(kind, image_matters, text_matters):
    model = tiny.uniform({"groups": 2, "task_input": kind})
    params, batch = tiny.params(model), tiny.batch(real=[4, 2])
    logits = route(model, params, batch)
    image = batch | {"slices": 255 - batch["slices"][:, ::-1]}
    text = batch | {"tokens": (batch["tokens"] + 5) % tiny.VOCAB}
    assert (tiny.distance(route(model, params, image), logits) > 0.02) == image_matters
    assert (tiny.distance(route(model, params, text), logits) > 0.02) == text_matters
    noise = batch["slices"].copy()
    noise[1, 2:] = 255
    tiny.close(route(model, params, batch | {"slices": noise}), logits, atol=1e-6)  # padding changes nothing (I7)
    floats = batch | {"slices": batch["slices"].astype(np.float32) / 255}
    tiny.close(route(model, params, floats), logits, atol=1e-5)


def test_oracle_routing_follows_the_label_and_random_routing_neither_label_nor_router():
    """Ablations of model-spec 4.8: where no group is forced, `oracle` takes the task, `random` a coin per prompt."""
    batch = tiny.batch(rows=16, slices=1) | {"image_visible": np.ones(16, bool)}

    def picked(kind, batch):
        model = tiny.uniform({"groups": 2, "task_input": kind})

        @tiny.jit
        def run(params, batch):
            return model.apply(tiny.tree(params), batch, method=MLLM.encode).group

        return np.asarray(run(tiny.params(model), batch))

    assert np.array_equal(picked("oracle", batch), batch["task"])
    coin = picked("random", batch)
    assert 3 < coin.sum() < 13
    assert np.array_equal(picked("random", batch | {"task": 1 - batch["task"]}), coin)
    order = np.random.default_rng(0).permutation(16)
    assert np.array_equal(picked("random", tiny.take(batch, order)), coin[order])
    assert not np.array_equal(coin, picked("text", batch))
