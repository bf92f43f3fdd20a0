"""Puts `configs` into the package, as `tghmoe_jax.experiments.configs`; everything else stands in pyproject.toml.

The folder above holds nothing else, so that it can be put on `sys.path`, where experiments find `configs.common`.
"""

from setuptools import find_packages, setup

INSTALLED = "tghmoe_jax.experiments.configs"

setup(packages=[*find_packages(include=["tghmoe_jax*"]), INSTALLED], package_dir={INSTALLED: "configs"})
