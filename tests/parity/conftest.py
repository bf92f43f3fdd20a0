"""Exact products on both sides, and the pictures that both are asked about."""

import jax
import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((2, 28, 28, 3), np.float32)
