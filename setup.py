"""Ships configs/ and tasks inside the package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=["matformer_jax*"]), "matformer_jax.configs"],
  package_dir={"matformer_jax.configs": "configs"},
  package_data={"matformer_jax.harness": ["tasks/*.yaml"]},
)
