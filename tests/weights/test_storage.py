"""Safetensors folders: round trips, shards, and every way a folder can be broken."""

import json
import math
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tghmoe_jax.errors import UserError
from tghmoe_jax.weights.storage import INDEX, SINGLE, n_bytes, read_tensors, write_tensors

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
ARRAYS = st.tuples(
    st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**32 - 1), st.booleans()
)


def random_array(dtype, shape, seed, transposed):
    bits = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * np.dtype(dtype).itemsize, np.uint8)
    array = np.frombuffer(bits.tobytes(), dtype).reshape(shape)
    return array.T if transposed else array


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text("abc/._é", min_size=1), ARRAYS, min_size=1, max_size=6), st.integers(1, 200))
def test_what_is_written_is_read_back_bit_for_bit(drawn, limit):
    tensors = {name: random_array(*spec) for name, spec in drawn.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(folder, tensors, max_shard_bytes=limit)
        found = read_tensors(folder)
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].shape == tensor.shape
            assert np.asarray(found[name]).dtype == found[name].dtype == tensor.dtype
            assert np.asarray(found[name]).tobytes() == tensor.tobytes()


@pytest.fixture
def sharded(tmp_path):
    write_tensors(tmp_path, {f"t{i}": np.full((4, 4), i, np.float32) for i in range(5)}, max_shard_bytes=128)
    return tmp_path


def test_shards_keep_to_the_limit_and_replace_an_earlier_write(sharded):
    files = sorted(file.name for file in sharded.iterdir())
    assert files == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == 320 and len(index["weight_map"]) == 5
    assert all(n_bytes(tensor) == 64 for tensor in read_tensors(sharded).values())
    write_tensors(sharded, {"only": np.zeros(3, np.float32)})
    assert [file.name for file in sharded.iterdir()] == [SINGLE]
    assert list(read_tensors(sharded)) == ["only"]


def test_lazy_tensors_can_be_written_over_their_own_folder(sharded):
    write_tensors(sharded, read_tensors(sharded))
    assert np.array_equal(read_tensors(sharded)["t3"], np.full((4, 4), 3, np.float32))


def test_a_failed_write_leaves_the_folder_as_it_was(sharded):
    class Lazy:
        shape, dtype = (4, 4), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise OSError("disk gone")

    before = {file.name: file.read_bytes() for file in sharded.iterdir()}
    with pytest.raises(OSError, match="disk gone"):
        write_tensors(sharded, {"a": np.zeros((4, 4), np.float32), "b": Lazy()}, max_shard_bytes=64)
    assert {file.name: file.read_bytes() for file in sharded.iterdir()} == before


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors"):
        read_tensors(sharded)


@pytest.mark.parametrize("size", [0, 7, 40, 150])
def test_a_truncated_file_is_named(sharded, size):
    file = sharded / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="model-00001-of-00003.safetensors is not a complete safetensors file"):
        read_tensors(sharded)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_may_not_leave_its_folder(sharded, name):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"t0": name}}))
    with pytest.raises(UserError, match="outside its folder"):
        read_tensors(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(UserError, match="not a safetensors index"):
        read_tensors(sharded)


def test_an_index_that_promises_more_than_its_shards_hold(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="ghost"):
        read_tensors(sharded)


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        read_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match="pickled weights .*pytorch_model.bin.*safe_serialization"):
        read_tensors(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_tensors(tmp_path / "absent")
    with pytest.raises(UserError, match="local disk"):
        write_tensors("gs://bucket/model", {"a": np.zeros(3, np.float32)})


def test_other_number_formats_are_refused(tmp_path):
    write_tensors(tmp_path, {"a": np.zeros(3, np.float64)})
    with pytest.raises(UserError, match="F64"):
        read_tensors(Path(tmp_path))
