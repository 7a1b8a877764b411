"""The structure of a random model, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

CONVOLUTIONS = tuple(f"{kind}{d}d" for kind in ("conv", "convtranspose") for d in (1, 2, 3))
LINEAR_LAYERS = (*CONVOLUTIONS, "linear", "embedding")
STATISTICS = ("batchnorm", "syncbatchnorm", "frozenbatchnorm", "instancenorm_statistics")
PER_SAMPLE = ("groupnorm", "instancenorm", "layernorm", "rmsnorm", "rmsnorm_hand", "rmsnorm_one")
BATCH = ("batchnorm_no_statistics", "batchnorm_train")
NORMS = (*STATISTICS, *PER_SAMPLE, *BATCH)


@dataclass(frozen=True)
class Layer:
    """Something with tensors, held by the model.

    lines: the statements that build it. settings: what it computes with.
    functional: its tensors are the owner's own, under `name_role`; else `name.role`.
    home: the block that holds it, or "" for the model itself.
    """

    name: str
    kind: str
    lines: tuple[str, ...]
    roles: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    functional: bool = False
    home: str = ""

    def tensor(self, role: str) -> str:
        """The state_dict name of one of its tensors, whether it has that one or not."""
        prefix = f"{self.home}." if self.home else ""
        return f"{prefix}{self.name}{'_' if self.functional else '.'}{role}"

    @property
    def path(self) -> str:
        return f"{self.home}.{self.name}" if self.home else self.name


@dataclass(frozen=True)
class Node:
    """One value: `name = code`, where {0}, {1}, ... in code are the inputs.

    when: "" always, "batch" if the batch is larger than one, "flag" if a flag is given. Otherwise
        the value is that of the first input.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    code: str
    layer: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    when: str = ""


@dataclass(frozen=True)
class Program:
    """A model: layers by name, nodes in order, and which values it returns.

    shape: of the input without the batch; ids: it holds token ids below `vocabulary`.
    ties: tensor name -> the name of the tensor that it is. hooks: layer -> "double" or "look".
    block: the nodes that form a module of their own, as a range. form: "class" or "sequential".
    """

    seed: int
    shape: tuple[int, ...]
    ids: bool
    layers: Mapping[str, Layer]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    ties: Mapping[str, str]
    hooks: Mapping[str, str]
    hazards: frozenset[str]
    block: tuple[int, int] | None = None
    form: str = "class"
    dtype: str = "float64"
    vocabulary: int = 11

    @cached_property
    def norms(self) -> tuple[str, ...]:
        called = {node.layer for node in self.nodes}
        return tuple(n for n, layer in self.layers.items() if layer.kind in NORMS and n in called)

    def layers_of(self, node: Node) -> set[str]:
        """The layers that a node names."""
        named = {node.layer, *re.findall(r"self\.(\w+)", node.code)}
        return named & set(self.layers)

    @property
    def takes_flag(self) -> bool:
        return any(node.when == "flag" for node in self.nodes)

    def tensor(self, layer: str, role: str) -> str:
        """The name under which a tensor of a layer is known, ties resolved."""
        name = self.layers[layer].tensor(role)
        return self.ties.get(name, name)
