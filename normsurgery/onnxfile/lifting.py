"""An ONNX graph with every lower floating type replaced by float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, NodeProto, TensorProto

from normsurgery.onnxfile.formulas.pointwise import LOWER

Array = np.ndarray[Any, Any]
LOWER_NAMES = frozenset({"float32", "float16", "bfloat16"})
# Integer attributes that name a type, and the operators that fall back to float32 without one.
_TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_datatype", "stash_type", "softmax_precision", "precision"}
)
_FLOAT32_UNLESS_TOLD = {
    "BlackmanWindow": "output_datatype",
    "HammingWindow": "output_datatype",
    "HannWindow": "output_datatype",
    "MelWeightMatrix": "output_datatype",
    "SequenceEmpty": "dtype",
}


def lifted_array(value: Array) -> Array:
    """The same values in float64 where they are of a lower floating type, exactly."""
    return value.astype(np.float64) if value.dtype.name in LOWER_NAMES else value


def without_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the bodies of its functions in the place of their calls."""
    return onnx.inliner.inline_local_functions(proto) if proto.functions else proto


def lifted_graph(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model, which has no functions, in float64, and the initializers of its main graph.

    The initializers are arrays rather than part of the model, which may so be larger than 2 GB.
    Values keep their names. The given model is left as it is.
    """
    graph = proto.graph
    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    light.graph.name = graph.name
    light.graph.node.extend(graph.node)
    light.graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in graph.output)
    constants = {t.name: lifted_array(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    names = dict.fromkeys([*(value.name for value in graph.input), *constants])
    light.graph.input.extend(onnx.ValueInfoProto(name=name) for name in names)
    for node in light.graph.node:
        lift_node(node)
    return light, constants


def lift_node(node: NodeProto) -> None:
    """Lift, in place, every type and tensor among the attributes of a node and its subgraphs."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            _lift_tensor(attribute.t)
        elif attribute.type == AttributeProto.GRAPH:
            _lift_subgraph(attribute.g)
        elif _names_a_type(node, attribute) and attribute.i in LOWER:
            attribute.i = TensorProto.DOUBLE
    _lift_defaults(node)


def _names_a_type(node: NodeProto, attribute: AttributeProto) -> bool:
    return attribute.name in _TYPE_ATTRIBUTES and node.op_type != "BitCast"


def _lift_defaults(node: NodeProto) -> None:
    given = {attribute.name for attribute in node.attribute}
    name = _FLOAT32_UNLESS_TOLD.get(node.op_type, "")
    if name and name not in given:
        node.attribute.append(onnx.helper.make_attribute(name, TensorProto.DOUBLE))
    if node.op_type == "ConstantOfShape" and not given:
        zero = onnx.numpy_helper.from_array(np.zeros(1))
        node.attribute.append(onnx.helper.make_attribute("value", zero))
    if node.op_type == "Constant":
        for attribute in list(node.attribute):
            if attribute.name in ("value_float", "value_floats") and not attribute.ref_attr_name:
                many = attribute.type == AttributeProto.FLOATS
                value = np.array(attribute.floats if many else attribute.f, np.float64)
                node.attribute.remove(attribute)
                tensor = onnx.numpy_helper.from_array(value)
                node.attribute.append(onnx.helper.make_attribute("value", tensor))


def _lift_subgraph(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _lift_tensor(tensor)
    for node in graph.node:
        lift_node(node)


def _lift_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in LOWER:
        value = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
