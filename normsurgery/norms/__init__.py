"""The norms of this package: one file each, which holds everything about its norm."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

# In the order in which `normsurgery norms` lists them.
NAMES = (
    "batchnorm",
    "layernorm",
    "layernorm2d",
    "layernorm_chw",
    "groupnorm",
    "instancenorm",
    "rmsnorm",
    "l2norm",
    "affine",
    "gatedrmsnorm",
    "batchrenorm",
    "powernorm",
    "identity",
    "randomaggregation",
    "neuronwise",
    "weightstandardization",
    "dyt",
    "evonorm-s0",
    "localresponsenorm",
)


class Row(NamedTuple):
    """What a norm's spec says of it in literals."""

    summary: str
    attach: str = "norm"
    also: tuple[str, ...] = ()


def file_of(name: str) -> Path:
    return Path(__file__).with_name(name.replace("-", "_") + ".py")


@cache
def row(name: str) -> Row:
    """Read from the source of the norm's `NORM = NormSpec(...)`, which would import torch."""
    for statement in ast.parse(file_of(name).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "NORM":
            assert isinstance(statement.value, ast.Call)
            said = {k.arg: k.value for k in statement.value.keywords if k.arg in Row._fields}
            return Row(**{str(field): ast.literal_eval(said[field]) for field in said})
    raise LookupError(f"{file_of(name)} defines no NORM")
