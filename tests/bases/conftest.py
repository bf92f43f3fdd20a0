"""The tiny Phi-3-V checkpoint of these tests."""

from tests.bases.checkpoint_fixtures import checkpoint, config  # noqa: F401
