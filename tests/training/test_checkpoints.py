"""Checkpoints: everything of a run in one atomic unit, the parameters readable alone, damage named in one sentence."""

import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from tghmoe_jax.errors import UserError
from tghmoe_jax.training import checkpoints
from tghmoe_jax.training.step import TrainState

# A restore that fails leaves threads of orbax behind, which find its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STACKED = "decoder/scan_1_2_1/block_1/mlp/up/kernel"  # blocks 1 and 2


def leaves(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "connector/fc1/kernel": normal(3, 2), STACKED: normal(2, 4, 3), "vision/cls": normal(5),
        "vision/patch/kernel": normal(2, 2, 3).astype(jnp.bfloat16),
    }  # fmt: skip


def state(step: int, seed: int = 0) -> TrainState:
    """Two leaves train; moments and a counter belong to them."""
    params = leaves(seed)
    trained = {path: params[path] for path in ("connector/fc1/kernel", STACKED)}
    tx = optax.chain(optax.scale_by_adam(), optax.scale(-0.1))
    opt = jax.tree.map(lambda x: x + seed, tx.init(trained))
    frozen = {path: params[path] for path in params if path not in trained}
    return TrainState(jnp.int32(step), trained, frozen, opt)


def numbers(consumed: int = 0):
    iterator = iter(grain.MapDataset.range(100).to_iter_dataset())
    for _ in range(consumed):
        next(iterator)
    return iterator


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Checkpoints of steps 2 and 4, of which the second has other values."""
    folder = tmp_path_factory.mktemp("run")
    store = checkpoints.Checkpoints(folder, keep=2)
    assert store.latest() is None
    for step in (1, 2, 4):
        store.save(state(step, seed=step), numbers(step))
    store.close()
    return folder


@pytest.fixture
def run(written, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(written, tmp_path / "run")


def test_a_run_goes_on_from_its_latest_state_and_the_very_next_batch(run):
    store = checkpoints.Checkpoints(run, keep=2)
    iterator = numbers(50)
    restored = store.restore(state(0, seed=9), iterator)
    store.close()
    expected = state(4, seed=4)
    assert int(restored.step) == 4 and bits(restored) == bits(expected)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    assert restored.trained.keys() == expected.trained.keys() and restored.frozen.keys() == expected.frozen.keys()
    assert restored.params["vision/patch/kernel"].dtype == jnp.bfloat16
    assert next(iterator) == 4


def test_only_the_newest_are_kept_and_a_step_is_written_once(run):
    names = lambda: {path.name for path in (run / "checkpoints").iterdir()}  # noqa: E731
    assert names() == {"2", "4"}
    store = checkpoints.Checkpoints(run, keep=2)
    store.save(state(4, seed=7), numbers(1))
    assert bits(checkpoints.load_params(run)[0]["vision/cls"]) == bits(leaves(4)["vision/cls"])
    store.save(state(6, seed=6), numbers(6))
    store.close()
    assert names() == {"4", "6"}


def test_parameters_alone_are_read_under_their_canonical_names(run):
    params, step = checkpoints.load_params(run)
    expected = leaves(4)
    assert step == 4 and set(params) == {
        "connector/fc1/kernel", "vision/cls", "vision/patch/kernel", "decoder/block_1/mlp/up/kernel",
        "decoder/block_2/mlp/up/kernel",
    }  # fmt: skip
    assert all(isinstance(leaf, np.ndarray) for leaf in params.values())
    assert params["vision/patch/kernel"].dtype == ml_dtypes.bfloat16
    for block in (1, 2):
        assert np.array_equal(params[f"decoder/block_{block}/mlp/up/kernel"], expected[STACKED][block - 1])
    assert bits(params["vision/patch/kernel"]) == bits(expected["vision/patch/kernel"])


def test_parameters_need_neither_moments_nor_data(run):
    for item in ("opt", "data"):
        shutil.rmtree(run / "checkpoints" / "4" / item)
    assert checkpoints.load_params(run)[1] == 4


def test_a_checkpoint_that_was_being_written_is_not_seen(run):
    """As orbax leaves it when the process is killed: under its temporary name."""
    half = shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "6.orbax-checkpoint-tmp")
    shutil.rmtree(half / "params")
    store = checkpoints.Checkpoints(run, keep=2)
    assert store.latest() == 4
    assert int(store.restore(state(0), numbers()).step) == 4
    store.close()
    assert checkpoints.load_params(run)[1] == 4


@pytest.mark.parametrize("spoil", ["folder", "steps"])
def test_a_run_without_a_checkpoint_is_named(run, spoil):
    shutil.rmtree(run / "checkpoints")
    if spoil == "steps":
        (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint; train it first, or name a finished run") as error:
        checkpoints.load_params(run)
    assert str(run) in str(error.value)


def empty(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def cut(folder: Path) -> None:
    """Half of each file of data, as a broken copy leaves it."""
    for file in folder.glob("**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [empty, cut, shutil.rmtree])
def test_damage_is_one_sentence_with_a_mend(run, damage):
    damage(run / "checkpoints" / "4" / "params")
    with pytest.raises(UserError, match="cannot be read; copy it again, or name another") as error:
        checkpoints.load_params(run)
    assert str(run) in str(error.value)
    store = checkpoints.Checkpoints(run, keep=2)
    with pytest.raises(UserError, match=r"checkpoints/4 cannot be read; delete that folder to resume from") as error:
        store.restore(state(0), numbers())
    store.close()
    shutil.rmtree(run / "checkpoints" / "4")  # the remedy it names
    store = checkpoints.Checkpoints(run, keep=2)
    assert int(store.restore(state(0), numbers()).step) == 2
    store.close()


def test_parameters_that_are_not_finite_are_refused_to_all_that_read_them(tmp_path):
    bad = state(1)
    bad = bad._replace(frozen=bad.frozen | {"vision/cls": jnp.array([1, jnp.inf, 2, 3, 4], jnp.float32)})
    store = checkpoints.Checkpoints(tmp_path, keep=1)
    store.save(bad, numbers(1))
    store.close()
    with pytest.raises(UserError, match="NaN or infinite parameters .first vision/cls; its training diverged"):
        checkpoints.load_params(tmp_path)


def test_a_checkpoint_takes_no_older_ones_place_after_a_bad_step(run):
    store = checkpoints.Checkpoints(run, keep=1)
    names = lambda: {path.name for path in (run / "checkpoints").iterdir()}  # noqa: E731
    store.save(state(6), numbers(6), healthy=False)
    assert names() == {"2", "4", "6"}
    store.save(state(8), numbers(8))
    store.close()
    assert names() == {"8"}
