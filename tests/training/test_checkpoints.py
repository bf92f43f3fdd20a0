"""Checkpoints: everything of a run in one atomic unit, the parameters readable alone, damage named in one sentence."""

import asyncio
import json
import logging
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.serialization import serialization

from tghmoe_jax import digests
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import checkpoints, stored
from tghmoe_jax.training.step import TrainState

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
    assert bits(stored.load_params(run)[0]["vision/cls"]) == bits(leaves(4)["vision/cls"])
    store.save(state(6, seed=6), numbers(6))
    store.close()
    assert names() == {"4", "6"}


def test_parameters_alone_are_read_under_their_canonical_names(run):
    params, step = stored.load_params(run)
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
    assert stored.load_params(run)[1] == 4


def test_a_checkpoint_that_was_being_written_is_not_seen(run):
    """As orbax leaves it when the process is killed: under its temporary name."""
    half = shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "6.orbax-checkpoint-tmp")
    shutil.rmtree(half / "params")
    store = checkpoints.Checkpoints(run, keep=2)
    assert int(store.restore(state(0), numbers()).step) == 4
    store.close()
    assert stored.load_params(run)[1] == 4


@pytest.mark.parametrize("spoil", ["folder", "steps"])
def test_a_run_without_a_checkpoint_is_named(run, spoil):
    shutil.rmtree(run / "checkpoints")
    if spoil == "steps":
        (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint; train it first, or name a finished run") as error:
        stored.load_params(run)
    assert str(run) in str(error.value)


def empty(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def cut(folder: Path) -> None:
    """Half of each file of data, as a broken copy leaves it."""
    for file in folder.glob("**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(folder: Path) -> None:
    """One bit of the largest file."""
    file = max((one for one in folder.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def foreign(folder: Path) -> None:
    (folder / "d" / "0" / "more").mkdir(parents=True)
    (folder / "d" / "0" / "more" / "file").write_text("")


def undigested(checkpoint: Path) -> None:
    """As an earlier version wrote it."""
    (checkpoint / digests.FILE).unlink()
    file = checkpoint / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": {}}))


def resumed(run: Path) -> tuple[TrainState, list[str]]:
    """The state that a run goes on from, and what it says."""
    said, store = [], checkpoints.Checkpoints(run, keep=2)
    try:
        return store.restore(state(0), numbers(), said.append), said
    finally:
        store.close()


OLD = [(damage, True) for damage in (empty, cut, shutil.rmtree)]  # without digests a flip may go unnoticed


@pytest.mark.parametrize(
    ("damage", "old"), [*((damage, False) for damage in (empty, cut, flip, foreign, shutil.rmtree)), *OLD]
)
def test_damage_is_named_set_aside_and_the_run_goes_on_from_the_checkpoint_before(run, damage, old):
    newest = run / "checkpoints" / "4"
    if old:
        undigested(newest)
    damage(newest / "params")
    with pytest.raises(UserError, match=r"damaged \(|cannot be read; copy it again, or name another") as error:
        stored.load_params(run)
    assert str(run) in str(error.value)
    before = {path.name: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    restored, said = resumed(run)
    assert bits(restored) == bits(state(2, seed=2))
    assert len(said) == 1 and said[0].startswith("the checkpoint of step 4 is damaged (")
    (aside,) = (run / "damaged").iterdir()
    assert {path.name: path.read_bytes() for path in aside.rglob("*") if path.is_file()} == before
    assert resumed(run)[1] == []
    store = checkpoints.Checkpoints(run, keep=2)
    store.save(state(4, seed=7), numbers(4))  # its step is free again
    store.close()
    assert bits(resumed(run)[0]) == bits(state(4, seed=7))


@pytest.mark.parametrize(
    "item", ["params", "opt", "data", "_CHECKPOINT_METADATA", "commit_success.txt", "digests.json"]
)
def test_every_file_of_a_checkpoint_belongs_to_it(run, item):
    path = run / "checkpoints" / "4" / item
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    restored, said = resumed(run)
    assert int(restored.step) == 2 and len(said) == 1 and item in said[0] and "missing" in said[0]


def test_where_no_checkpoint_is_whole_nothing_is_moved(run):
    for step in ("2", "4"):
        cut(run / "checkpoints" / step / "opt")
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole \(4: opt/.* has changed.*; copy the run"):
        resumed(run)
    assert sorted(run.rglob("*")) == before


def test_a_checkpoint_without_digests_is_read_with_one_line(run, capsys):
    for step in ("2", "4"):
        undigested(run / "checkpoints" / step)
    assert bits(resumed(run)[0]) == bits(state(4, seed=4)) and stored.load_params(run)[1] == 4
    out, err = capsys.readouterr()
    assert err.count("\n") == 2 and err.count("4 has no digests (an earlier version wrote it)") == 2


def test_a_process_that_ends_before_the_digests_loses_nothing(run):
    (run / "checkpoints" / "4" / digests.FILE).unlink()
    shutil.rmtree(run / "checkpoints" / "2")
    restored, said = resumed(run)
    assert bits(restored) == bits(state(4, seed=4))
    assert said == ["the checkpoint of step 4 is taken without digests: the process that wrote it ended before them"]


def test_parameters_that_are_not_finite_are_refused_to_all_that_read_them(tmp_path):
    bad = state(1)
    bad = bad._replace(frozen=bad.frozen | {"vision/cls": jnp.array([1, jnp.inf, 2, 3, 4], jnp.float32)})
    store = checkpoints.Checkpoints(tmp_path, keep=1)
    store.save(bad, numbers(1))
    store.close()
    with pytest.raises(UserError, match="NaN or infinite parameters .first vision/cls; its training diverged"):
        stored.load_params(tmp_path)


def test_a_checkpoint_takes_no_older_ones_place_after_a_bad_step(run):
    store = checkpoints.Checkpoints(run, keep=1)
    names = lambda: {path.name for path in (run / "checkpoints").iterdir()}  # noqa: E731
    store.save(state(6), numbers(6), healthy=False)
    store.finish()
    assert names() == {"2", "4", "6"}
    store.save(state(8), numbers(8))
    store.close()
    assert names() == {"8"}


TENSORSTORE = "RESOURCE_EXHAUSTED: Failed to write 8 bytes to file 7: No space left on device [os_error_code='28']"


def fails(monkeypatch, error: Exception) -> None:
    """The digests of every checkpoint from here on cannot be written."""

    def write(*args):
        raise error

    monkeypatch.setattr(digests, "write", write)


def ends_unseen(store: checkpoints.Checkpoints) -> None:
    """Until the threads of a save have ended, well or not."""
    store._orbax._async_manager._thread.join()


@pytest.mark.parametrize("end", ["look", "finish", "save"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError(TENSORSTORE)])
def test_a_full_disk_is_one_sentence_and_older_checkpoints_stay(run, error, end, monkeypatch):
    store = checkpoints.Checkpoints(run, keep=2)
    store.save(state(60), numbers(6))
    store.finish()
    fails(monkeypatch, error)
    store.save(state(6), numbers(6))
    ends_unseen(store)
    with pytest.raises(
        UserError, match=r"step 6 cannot .* \(No space left on device\); that of step 60 is whole; make"
    ):
        {"look": store.look, "finish": store.finish, "save": lambda: store.save(state(7), numbers(7))}[end]()
    store.close()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "60"]
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_files_that_end_after_one_of_them_failed_print_no_traceback(monkeypatch):
    """What tensorstore tells a loop that orbax has closed is not reported; any other fault is."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: reported.append(str(raised.exc_value)))

    def end_after_the_loop() -> None:
        promise, future = serialization.ts.Promise.new()

        async def read():
            await future

        loop = asyncio.new_event_loop()
        loop.run_until_complete(asyncio.wait([loop.create_task(read())], timeout=0.01))
        loop.close()
        promise.set_result(0)

    end_after_the_loop()
    assert reported == ["Event loop is closed"]
    stored.ignore_closed_loops.__wrapped__()
    end_after_the_loop()
    sys.unraisablehook(SimpleNamespace(exc_value=ValueError("another")))
    assert reported == ["Event loop is closed", "another"]


def test_another_fault_of_saving_is_not_hidden(run, monkeypatch):
    level, store = logging.getLogger("absl").level, checkpoints.Checkpoints(run, keep=2)
    fails(monkeypatch, ValueError("a mistake"))
    store.save(state(6), numbers(6))
    with pytest.raises(ValueError, match="a mistake"):
        store.finish()
    store.close()
    assert logging.getLogger("absl").level == level


def test_the_next_step_may_take_over_the_state_before_it_is_written(run, monkeypatch):
    gate, write = threading.Event(), serialization.async_serialize_from_host

    async def held(*args, **kw):
        await asyncio.to_thread(gate.wait)
        await write(*args, **kw)

    monkeypatch.setattr(serialization, "async_serialize_from_host", held)
    store, before, iterator = checkpoints.Checkpoints(run, keep=2), state(6, seed=6), numbers(6)
    expected = bits(jax.tree.map(jnp.copy, before))
    store.save(before, iterator)
    store.look()
    next(iterator)
    after = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(before)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.trained))
    assert stored.steps(run / "checkpoints") == [4, 2]
    gate.set()
    ends_unseen(store)
    store.look()
    assert stored.steps(run / "checkpoints") == [6, 4]
    store.close()
    store, iterator = checkpoints.Checkpoints(run, keep=2), numbers()
    assert bits(store.restore(state(0), iterator)) == expected and next(iterator) == 6
    store.close()


def test_a_kill_between_name_and_last_digests_leaves_a_whole_checkpoint(run):
    """Of the two files that orbax writes last the digests come a moment later; both must be there all the same."""
    newest = run / "checkpoints" / "4"
    found = digests.read(newest)
    last = {"_CHECKPOINT_METADATA": "", "commit_success.txt": ""}
    assert last.keys() < found.keys() and all(found.values())
    digests.write(newest, found | last)
    assert bits(resumed(run)[0]) == bits(state(4, seed=4)) and resumed(run)[1] == []
    (newest / "commit_success.txt").unlink()
    assert "commit_success.txt is missing" in resumed(run)[1][0]


def test_shapes_and_shardings_are_enough_to_restore(run):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    store = checkpoints.Checkpoints(run, keep=2)
    assert bits(store.restore(like, numbers())) == bits(state(4, seed=4))
    store.close()
