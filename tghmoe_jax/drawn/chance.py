"""The random choices of all synthetic data."""

import numpy as np


def pick(rng: np.random.Generator, options):
    """One of the options, each equally likely."""
    return options[int(rng.integers(len(options)))]


def shuffled(rng: np.random.Generator, options: list[str]) -> tuple[str, ...]:
    """The options in random order."""
    return tuple(options[i] for i in rng.permutation(len(options)))
