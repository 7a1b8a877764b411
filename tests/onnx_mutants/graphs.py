"""A copy of an ONNX model that is easy to change, and what it takes to change it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper


class Graph:
    """A copy of `model`: `nodes` in order, `constants` by name, changed in place; `model` again.

    What the file says of inner shapes is dropped, since a changed graph may have others.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        del self.model.graph.value_info[:]

    @property
    def nodes(self) -> Any:
        return self.model.graph.node

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self.model.graph.output]

    def index(self, node: NodeProto) -> int:
        return next(i for i, other in enumerate(self.nodes) if other is node)

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initialiser or of the output of a Constant node."""
        for value in self.model.graph.initializer:
            if value.name == name:
                return numpy_helper.to_array(value)
        for node in self.nodes:
            if node.op_type == "Constant" and name in node.output:
                return numpy_helper.to_array(node.attribute[0].t)
        return None

    def readers(self, name: str) -> list[NodeProto]:
        return [node for node in self.nodes if name in node.input]

    def producer(self, name: str) -> NodeProto | None:
        return next((node for node in self.nodes if name in node.output), None)

    def set_constant(self, node: NodeProto, place: int, value: np.ndarray) -> None:
        """Give one input of one node its own new initialiser; other readers keep the old one."""
        old = self.constant(node.input[place])
        assert old is not None
        name = f"{node.input[place]}_of_{node.name}_{place}"
        self.model.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(value).astype(old.dtype), name)
        )
        node.input[place] = name

    def drop_unused(self) -> None:
        """Remove the initialisers that nothing reads."""
        read = {name for node in self.nodes for name in node.input} | set(self.outputs)
        kept = [value for value in self.model.graph.initializer if value.name in read]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(kept)

    def bypass(self, node: NodeProto, source: str) -> list[str]:
        """Remove `node`; whoever read its output reads `source`. Names of those readers."""
        output = node.output[0]
        readers = self.readers(output)
        for reader in readers:
            for place, name in enumerate(reader.input):
                if name == output:
                    reader.input[place] = source
        self.nodes.remove(node)
        return [reader.name for reader in readers]

    def insert_before(self, node: NodeProto, new: Iterable[NodeProto]) -> None:
        self.insert(self.index(node), new)

    def insert(self, index: int, new: Iterable[NodeProto]) -> None:
        for offset, item in enumerate(new):
            self.nodes.insert(index + offset, item)

    def attribute(self, node: NodeProto, name: str) -> Any:
        for attribute in node.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        return None

    def set_attribute(self, node: NodeProto, name: str, value: Any) -> None:
        for attribute in node.attribute:
            if attribute.name == name:
                attribute.CopyFrom(onnx.helper.make_attribute(name, value))
                return
        node.attribute.append(onnx.helper.make_attribute(name, value))
