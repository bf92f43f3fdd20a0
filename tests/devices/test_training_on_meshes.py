"""Both stages on every mesh of 8 devices, and on 2 processes of 4, follow the run on a single device."""

import re
import socket

import numpy as np
import pytest

from tests.devices.conftest import run_module, start_module

MESHES = ("8,1,1", "2,2,2", "1,2,4", "1,1,8", "2,2,2:gather")
MODULE = "tests.devices.training_on_meshes"
# A key's bias adds the same to every score of a query: without a rotation its gradient is zero but for rounding.
ZERO = re.compile(r"gradient vision/(scan_0_\d_\d/block_[01]|block_[01])/attn/k/bias")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def found(folder):
    """{mesh/stage/what: array} of all meshes in one process."""
    run_module(MODULE, str(folder / "one.npz"), "1,1,1", *MESHES, "--checkpoints", str(folder / "run"))
    return dict(np.load(folder / "one.npz"))


@pytest.fixture(scope="module")
def of_two_processes(folder, found):
    """The same of 2 processes with 4 devices each, which start from the checkpoint that one process wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    arguments = (str(folder / "two.npz"), "2,2,2", "--checkpoints", str(folder / "run"), "--of", "2", "--port", port)
    processes = [start_module(MODULE, *arguments, "--process", str(i)) for i in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    return dict(np.load(folder / "two.npz"))


def of(found: dict, mesh: str, stage: int, kind: str) -> dict:
    start = f"{mesh}/{stage}/"
    return {k.removeprefix(start): v for k, v in found.items() if k.startswith(start + kind)}


def check_like_one_device(found: dict, mesh: str, single: dict, stage: int) -> None:
    losses, expected = (of(one, name, stage, "losses")["losses"] for one, name in ((found, mesh), (single, "1,1,1")))
    assert len(losses) == 20 and expected[-1, 0] < 0.9 * expected[0, 0], "it learns, so that errors would grow"
    np.testing.assert_allclose(losses[:, 0], expected[:, 0], rtol=1e-4)
    assert not losses[:, 1].any(), "nothing is dropped"
    gradients, oracle = of(found, mesh, stage, "gradient"), of(single, "1,1,1", stage, "gradient")
    assert gradients.keys() == oracle.keys() and len(oracle) > 20
    for path, gradient in oracle.items():
        if not ZERO.match(path):
            distance = np.abs(gradients[path] - gradient).max()
            assert distance <= 1e-4 * np.abs(gradient).max() + 1e-9, (path, distance)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_gradients_on_a_mesh_are_those_of_one_device(found, mesh, stage):
    check_like_one_device(found, mesh, found, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_of_4_devices_train_like_one_device(found, of_two_processes, stage):
    check_like_one_device(of_two_processes, "2,2,2", found, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_holds_its_share_of_the_experts_and_of_their_moments(found, mesh, stage):
    """From the arrays: 1/|expert| of every expert leaf's bytes, and of a kernel's 1/|fsdp| of that."""
    _, fsdp, expert = map(int, mesh.partition(":")[0].split(","))
    leaves = of(found, mesh, stage, "share")
    experts = {path: held / whole for path, (held, whole) in leaves.items() if "/experts/" in path}
    assert len(experts) == 3 * 4  # parameters and two moments of four leaves
    for path, share in experts.items():
        assert share == 1 / expert / (fsdp if path.endswith("kernel") else 1), path
    kernels = [held / whole for path, (held, whole) in leaves.items() if "/mlp/" in path and path.endswith("kernel")]
    assert kernels and set(kernels) == {1 / fsdp}
    if stage == 2:
        frozen = [path for path in leaves if "/opt" not in path and "/attn/" in path]
        assert frozen and not any(path.replace("share ", "share opt/") in leaves for path in frozen)


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "4"])
def test_a_checkpoint_of_2x2x2_restores_on_fewer_devices(found, devices):
    assert_restored(found, devices)


@pytest.mark.slow
def test_a_checkpoint_of_2x2x2_restores_on_two_processes(of_two_processes):
    assert_restored(of_two_processes, "8")


def assert_restored(found: dict, devices: str) -> None:
    assert found[f"restored/{devices}/leaves"] > 60
    assert found[f"restored/{devices}/differ"] == 0, "every parameter and moment is equal, bit for bit"
    assert found[f"restored/{devices}/step"] == 3
    np.testing.assert_array_equal(found[f"restored/{devices}/next"], found[f"restored/{devices}/expected_next"])


@pytest.mark.slow
def test_a_leaf_of_a_base_is_read_in_the_parts_of_its_devices(found):
    assert found["placed/whole"] and found["placed/parts"].tolist() == [[3, 2, 2], [3, 2, 2]]
