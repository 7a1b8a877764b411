"""What a graph computes, in float64, by onnx's own reference operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Arrays = Mapping[str, np.ndarray]

HALF = TensorProto.FLOAT16
SINGLE = TensorProto.FLOAT
DOUBLE = TensorProto.DOUBLE


class LayerNormalization(OpRun):
    """Over all axes from `axis` on, in the type of the input whatever `stash_type` says."""

    def _run(
        self,
        x: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray | None = None,
        axis: int = -1,
        epsilon: float = 1e-5,
        stash_type: int = 1,
    ) -> tuple[np.ndarray, ...]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        centred = x - x.mean(axes, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon) * scale
        return ((y if bias is None else y + bias).astype(x.dtype),)


class RMSNormalization(OpRun):
    def _run(
        self,
        x: np.ndarray,
        scale: np.ndarray,
        axis: int = -1,
        epsilon: float = 1e-5,
        stash_type: int = 1,
    ) -> tuple[np.ndarray, ...]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        y = x / np.sqrt((x**2).mean(axes, keepdims=True) + epsilon) * scale
        return (y.astype(x.dtype),)


def evaluate(
    model: onnx.ModelProto, feeds: Arrays, *, lift: bool = True, inner: bool = False
) -> dict[str, np.ndarray]:
    """Outputs (with `inner` all values) of `model` by name.

    With `lift` every float32 is a float64; in a graph of half precision every half is one too. A
    Cast to half precision in a float32 graph rounds, as it would anywhere. Without `lift` every
    operator works and rounds in the types that the file says, as a device does that has no wider
    ones.
    """
    model = lifted(model) if lift else model
    if lift:
        feeds = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in feeds.items()}
    names = [value.name for value in model.graph.output]
    if inner:
        names = [name for node in model.graph.node for name in node.output if name]
    evaluator = ReferenceEvaluator(model, new_ops=[LayerNormalization, RMSNormalization])
    with np.errstate(all="ignore"):
        results = evaluator.run(names, dict(feeds))
    return dict(zip(names, results, strict=True))


def lifted(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` with every float32 a float64."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    graph = copied.graph
    halves = any(value.data_type == HALF for value in graph.initializer)
    from_types = {SINGLE, HALF} if halves else {SINGLE}
    for value in graph.initializer:
        if value.data_type in from_types:
            value.CopyFrom(_double(value))
    for port in (*graph.input, *graph.output):
        if port.type.tensor_type.elem_type in from_types:
            port.type.tensor_type.elem_type = DOUBLE
    del graph.value_info[:]
    for node in graph.node:
        for attribute in list(node.attribute):
            _lift_attribute(node, attribute, from_types)
    return copied


def _double(value: TensorProto) -> TensorProto:
    array = np.asarray(numpy_helper.to_array(value), dtype=np.float64)
    return numpy_helper.from_array(array, value.name)


def _lift_attribute(node: onnx.NodeProto, attribute: AttributeProto, types: set[int]) -> None:
    if attribute.type == AttributeProto.GRAPH:
        raise NotImplementedError(f"{node.name} ({node.op_type}) holds a graph")
    if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in types:
        attribute.t.CopyFrom(_double(attribute.t))
    if attribute.name in ("to", "dtype") and attribute.i in types:
        attribute.i = DOUBLE
    if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
        values: Any = attribute.f if attribute.name == "value_float" else list(attribute.floats)
        tensor = numpy_helper.from_array(np.asarray(values, dtype=np.float64))
        node.attribute.remove(attribute)
        node.attribute.append(onnx.helper.make_attribute("value", tensor))
