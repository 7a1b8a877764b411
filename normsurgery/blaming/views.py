"""An ONNX graph as blame looks at it: nodes one by one, what they read, what they are."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto
from torch import Tensor

from normsurgery.errors import NormsurgeryError
from normsurgery.onnxfile.float64 import Float64Graph
from normsurgery.onnxfile.reading import value_types

Values = dict[str, Tensor]
ONLY_THE_AUTHOR = frozenset({"stash_type"})  # says in which type a kernel may work, no meaning


class View:
    """The main graph of a model in float64.

    nodes: in graph order, without Constants. constants: initializers and Constants, in float64
        where they are floating. producer: value -> position in `nodes`.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = Float64Graph(proto)
        self.proto = proto
        self.constants: Values = dict(graph.constants)
        self._steps = []
        for step in graph.steps:
            if step.node.op_type == "Constant":
                self.constants.update(step.run({}))
            else:
                self._steps.append(step)
        self.nodes: list[NodeProto] = [step.node for step in self._steps]
        self.producer = {
            name: index for index, node in enumerate(self.nodes) for name in node.output if name
        }
        self.outputs = [value.name for value in proto.graph.output]
        self.inputs = [v.name for v in proto.graph.input if v.name not in self.constants]
        self._types = value_types(proto)
        self._versions = {entry.domain: entry.version for entry in proto.opset_import}
        self._digests: dict[str, tuple[object, ...]] = {}

    @cached_property
    def readers(self) -> dict[str, list[int]]:
        """Value -> positions of the nodes that read it."""
        found: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.input):
                found.setdefault(name, []).append(index)
        return found

    def run_node(self, index: int, values: Mapping[str, Tensor]) -> Values:
        """What one node makes of `values`, in float64. Raises NormsurgeryError if it does not."""
        return self._steps[index].run(values)

    def run(self, fed: Mapping[str, Tensor], instead: Mapping[str, Tensor] | None = None) -> Values:
        """Every value of one run, floating ones in float64.

        instead: values that take the place of what nodes compute. Values of nodes that fail, and
        whatever depends on them, are left out.
        """
        values: Values = {**self.constants, **fed}
        instead = instead or {}
        for index, node in enumerate(self.nodes):
            if any(name not in instead for name in node.output if name):
                with contextlib.suppress(NormsurgeryError, KeyError):
                    values.update(self.run_node(index, values))
            values.update({name: instead[name] for name in node.output if name in instead})
        return values

    def dtype(self, name: str) -> torch.dtype | None:
        """The type a value has in the file, as far as it is known."""
        port = self._types.get(name)
        return None if port is None else port.dtype

    def reads(self, index: int) -> list[str]:
        """The inputs of a node; "" for one left out, but not at the end."""
        names = list(self.nodes[index].input)
        while names and not names[-1]:
            names.pop()
        return names

    def computed(self, index: int) -> list[str]:
        """The inputs of a node that are no constants."""
        return [name for name in self.reads(index) if name and name not in self.constants]

    def digest(self, name: str) -> tuple[object, ...]:
        """What a constant is, whatever it is called."""
        if name not in self._digests:
            value = self.constants[name].contiguous()
            content = hashlib.blake2b(value.numpy().tobytes(), digest_size=16).hexdigest()
            self._digests[name] = (tuple(value.shape), str(value.dtype), content)
        return self._digests[name]

    def attributes(self, index: int) -> dict[str, Any]:
        """The attributes of a node, with the defaults that ONNX gives to those left out."""
        node = self.nodes[index]
        given = {a.name: _plain(a) for a in node.attribute if a.name not in ONLY_THE_AUTHOR}
        return {**self._defaults(node), **given}

    def _defaults(self, node: NodeProto) -> dict[str, Any]:
        version = self._versions.get(node.domain, self._versions.get("", 1))
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            return {}
        return {
            name: _plain(attribute.default_value)
            for name, attribute in schema.attributes.items()
            if attribute.default_value.name and name not in ONLY_THE_AUTHOR
        }


def _plain(attribute: onnx.AttributeProto) -> Any:
    """The value of an attribute as something that can be compared and printed."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value).tolist()
    if isinstance(value, float):
        return _shortest(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (int, str)):
        return value
    if hasattr(value, "SerializeToString"):
        return value.SerializeToString(deterministic=True)
    items = [v.SerializeToString() if hasattr(v, "SerializeToString") else v for v in value]
    return [_shortest(v) if isinstance(v, float) else v for v in items]


def _shortest(value: float) -> float:
    """The number that was meant: attributes are float32, and 1e-5 read back is 9.9999997e-06."""
    return float(str(np.float32(value)))
