"""What a graph is held against: every value of its source, in float64, over several inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from onnx import NodeProto

from normsurgery.blaming.views import Values, View
from normsurgery.onnxfile.reading import Origin, origin

TRACED = "%"  # before the name of a value that the traced source has and its ONNX form has not


@dataclass
class Reference:
    """The source as it should have been written.

    graph: its ONNX form; None where there is none that can be trusted. cases: for each input, its
        values by name, and those of the traced source (under TRACED) behind them.
    inputs: names of the values that are fed, in order. outputs: names of what it returns, in order.
    """

    graph: View | None
    cases: Sequence[Values]
    inputs: list[str]
    outputs: list[str]
    origins: dict[str, Origin] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    by_key: dict[object, list[int]] = field(default_factory=dict)
    by_operator: dict[str, list[int]] = field(default_factory=dict)
    _numbers: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.graph is None:
            return
        for position, node in enumerate(self.graph.nodes):
            self.by_operator.setdefault(node.op_type, []).append(position)
            key = self.key(self.graph, position, self._read(self.graph, position))
            same = self.by_key.setdefault(key, [])
            first = self.graph.nodes[same[0]] if same else node
            same.append(position)
            for name, other in zip(node.output, first.output, strict=False):
                self._numbers[name] = other

    def _read(self, graph: View, position: int) -> list[object]:
        return [
            graph.digest(name) if name in graph.constants else self._numbers.get(name, name)
            for name in graph.reads(position)
        ]

    def key(self, graph: View, position: int, read: Sequence[object]) -> object:
        """The same for nodes that compute the same: operator, attributes and what they read."""
        node = graph.nodes[position]
        attributes = sorted(
            (name, repr(value)) for name, value in graph.attributes(position).items()
        )
        domain = "" if node.domain == "ai.onnx" else node.domain
        return (domain, node.op_type, tuple(attributes), tuple(read))

    def numbers(self) -> dict[str, object]:
        """Value -> the first value that is computed in the same way."""
        return self._numbers

    def producer(self, name: str) -> NodeProto | None:
        if self.graph is None or name not in self.graph.producer:
            return None
        return self.graph.nodes[self.graph.producer[name]]

    def origin_of(self, name: str) -> Origin:
        """Where a value comes from, as the reference knows it."""
        node = self.producer(name)
        if node is not None and origin(node) != Origin():
            return origin(node)
        return self.origins.get(name.removeprefix(TRACED), Origin())

    def numbers_in_use(self) -> set[float]:
        """Every single floating number that the source computes with, as the nearest float32 too.

        Of the ONNX form: constants of one element, and attributes.
        """
        if self.graph is None:
            return set()
        values = self.graph.constants.values()
        found = {float(v) for v in values if v.is_floating_point() and v.numel() == 1}
        for position in range(len(self.graph.nodes)):
            given = self.graph.attributes(position).values()
            found |= {value for value in given if isinstance(value, float)}
        return found | {float(torch.tensor(value, dtype=torch.float32)) for value in found}

    def dtype(self, name: str) -> torch.dtype | None:
        """The type that the source computes a value in, as far as it is known."""
        if name in self.dtypes:
            return self.dtypes[name]
        return None if self.graph is None else self.graph.dtype(name)
