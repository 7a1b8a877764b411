"""All metadata is in pyproject.toml; it cannot say "find these packages, and map this one"."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["normsurgery", "normsurgery.*"]), "normsurgery.cli"])
