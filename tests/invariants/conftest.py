"""The settings of tests/tiny.py for every test of this folder."""

from tests.tiny import exact_and_quick  # noqa: F401
