"""The tiny Phi-3-V of tests/bases."""

from tests.bases.conftest import checkpoint, config  # noqa: F401
