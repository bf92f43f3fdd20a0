"""State and the train step: microbatches are scanned where there are several, gradients exist only for what trains.
What a step reports stays on the devices for some steps (`Reports`).

Leaves are kept flat, {leaf path: array}, split into trained and frozen.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tghmoe_jax.models.mllm import MLLM, Batch, variables
from tghmoe_jax.training import losses, optimizer

Flat = dict[str, jax.Array]


class TrainState(NamedTuple):
    """step int32 (); trained and frozen leaves; the optimiser's state over the trained ones."""

    step: jax.Array
    trained: Flat
    frozen: Flat
    opt: Any

    @property
    def params(self) -> Flat:
        return {**self.trained, **self.frozen}


def depth_scale(model: MLLM, step: jax.Array) -> jax.Array | None:
    """The depth rotation's scale at a step: a linear ramp where depth_rope.ramp_steps is set (model-spec 4.3)."""
    r = model.cfg.volume.depth_rope
    if not r.ramp_steps:
        return None
    share = jnp.minimum(step / r.ramp_steps, 1.0)
    return r.scale_init + (r.scale - r.scale_init) * share


def _finite(leaf: jax.Array) -> jax.Array:
    """bool (): by the sum of squares, which the norm of the gradients needs too."""
    return jnp.isfinite(jnp.sum(jnp.square(leaf)))


def make_step(
    model: MLLM, weights: losses.LossWeights, tx: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch [A, R, ...]) -> (state, scalars). Pure; jit it with donated state.

    In training every sample is routed to its true task's group (teacher forcing, model-spec 4.6); a group that no
    sample of the step belongs to keeps its values and moments. A step whose loss, gradient or update is not finite
    changes nothing but the number of the step. Among the scalars, `bad` is 1 for such a step, and `bad_leaves` bool
    (trained leaves in the order of their paths) says whose gradient is not finite, or else whose update.
    """
    prefix, groups = model.cfg.prefix_length, model.cfg.tgh.groups

    def loss_fn(trained, frozen, batch, total_weight, shares, scale):
        group = batch["task"] if groups > 1 else jnp.zeros_like(batch["task"])
        output = model.apply(variables({**trained, **frozen}), batch, group, scale, score=True)
        return losses.loss(output, batch, weights, prefix, total_weight, shares)

    def step(state: TrainState, batch: Batch):
        shares = batch["task"].shape[0]
        total_weight = jnp.sum(losses.answer_weights(batch, weights, prefix))
        scale = depth_scale(model, state.step)

        def gradients(micro):
            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            return grad_fn(state.trained, state.frozen, micro, total_weight, shares, scale)

        if shares == 1:  # a loop of one would still fill the sums with zeros first
            (value, parts), grads = gradients(jax.tree.map(lambda x: x[0], batch))
        else:
            shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], batch))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            add = lambda total, micro: (jax.tree.map(jnp.add, total, gradients(micro)), None)  # noqa: E731
            ((value, parts), grads), _ = jax.lax.scan(add, zeros, batch)

        updates, opt = tx.update(grads, state.opt, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        if groups > 1 and model.cfg.tgh.task_input != "none":
            present = jnp.zeros((groups,), bool).at[batch["task"].reshape(-1)].set(True)
            trained, opt = optimizer.keep_absent_groups((trained, opt), (state.trained, state.opt), present)
        norm = optax.tree.norm(grads)
        bad_grads, bad_updates = (
            jnp.stack([~_finite(tree[path]) for path in sorted(tree)]) for tree in (grads, updates)
        )
        bad_leaves = jnp.where(jnp.any(bad_grads), bad_grads, bad_updates)  # clipping spreads a NaN to all updates
        good = jnp.isfinite(value) & jnp.isfinite(norm) & ~jnp.any(bad_leaves)
        trained, opt = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (trained, opt), (state.trained, state.opt)
        )
        scalars = {"loss": value, "grad_norm": norm, **losses.summarise(parts, model.cfg.tasks)}
        scalars |= {"bad": 1 - good.astype(jnp.int32), "bad_leaves": bad_leaves}
        return TrainState(state.step + 1, trained, state.frozen, opt), scalars

    return step


class Reports:
    """The scalars of finished steps, fetched from the devices for several of them at once.

    The host waits for the step before the newest alone, so that a step is always there for the devices to go on with.
    `take(step, scalars on the host, time.perf_counter() at the step's end)` gets each of them, in order.
    """

    _MOST, _SECONDS = 10, 2.0  # steps that wait at most; slow ones are shown when they end

    def __init__(self, take: Callable[[int, dict, float], None]):
        self._take, self._fetched = take, time.perf_counter()
        self._waiting: list[tuple[int, dict[str, jax.Array]]] = []
        self._ended: list[float] = []  # of all that wait but the newest

    def add(self, step: int, scalars: dict[str, jax.Array]) -> bool:
        """Whether earlier ones were fetched."""
        if self._waiting:
            jax.block_until_ready(self._waiting[-1][1])
            self._ended.append(time.perf_counter())
        self._waiting.append((step, scalars))
        due = len(self._waiting) > self._MOST or time.perf_counter() - self._fetched >= self._SECONDS
        if due := due and len(self._waiting) > 1:
            self._fetch(len(self._waiting) - 1)
        return due

    def fetch_all(self) -> None:
        """Waits for the newest step too. Nothing may be saved before."""
        if self._waiting:
            jax.block_until_ready(self._waiting[-1][1])
            self._ended.append(time.perf_counter())
            self._fetch(len(self._waiting))

    def _fetch(self, number: int) -> None:
        steps, ended = self._waiting[:number], self._ended[:number]
        self._waiting, self._ended = self._waiting[number:], self._ended[number:]
        for (step, _), scalars, end in zip(steps, jax.device_get([one for _, one in steps]), ended, strict=True):
            self._take(step, scalars, end)
        self._fetched = time.perf_counter()
