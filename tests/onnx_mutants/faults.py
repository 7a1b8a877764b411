"""What can go wrong at one node of an exported graph.

A fault is a function of a graph (a copy, changed in place), one of its nodes and a random state. It
returns the names of the nodes that a right blame may give, or None where it does not apply. That is
the changed node itself; where a node was removed, those that read its result; where nodes were put
in, those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from onnx_mutants.graphs import Graph

Blamed = frozenset[str]
Fault = Callable[[Graph, NodeProto, np.random.Generator], Blamed | None]

OFF = 1 + 2.0**-10
NORMS = {
    "LayerNormalization",
    "RMSNormalization",
    "BatchNormalization",
    "InstanceNormalization",
    "GroupNormalization",
}
MATMULS = {"MatMul", "Gemm", "Conv"}


@dataclass(frozen=True)
class Mutant:
    """A graph with one fault.

    fault: its name. operator: of the node it sits on ("" none). blamed: names of the nodes that a
    right blame may give, empty where the fault sits on no node. late: in the second half of the
    graph.
    """

    graph: str
    fault: str
    operator: str
    blamed: Blamed
    late: bool
    model: onnx.ModelProto

    @property
    def label(self) -> str:
        where = ",".join(sorted(self.blamed)) or "no node"
        return f"{self.graph}: {self.fault} at {where}"


def _it(node: NodeProto) -> Blamed:
    return frozenset({node.name})


# --- norms ----------------------------------------------------------------------------------------


def _epsilon(factor: float) -> Fault:
    def fault(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
        if node.op_type in NORMS:
            epsilon = graph.attribute(node, "epsilon")
            graph.set_attribute(node, "epsilon", (1e-5 if epsilon is None else epsilon) * factor)
            return _it(node)
        if node.op_type != "Add":
            return None
        for place, name in enumerate(node.input):
            value = graph.constant(name)
            if value is not None and value.size == 1 and 0 < float(value.flatten()[0]) < 1e-3:
                graph.set_constant(node, place, value * factor)
                return _it(node)
        return None

    return fault


def _bias_dropped(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type not in {"LayerNormalization", "Gemm", "Conv"} or len(node.input) < 3:
        return None
    del node.input[2]
    return _it(node)


def _scale_and_bias_swapped(
    graph: Graph, node: NodeProto, random: np.random.Generator
) -> Blamed | None:
    if node.op_type not in NORMS or len(node.input) < 3:
        return None
    node.input[1], node.input[2] = node.input[2], node.input[1]
    return _it(node)


def _rolled(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    """One of the vectors of a norm, shifted by one channel."""
    places = [i for i, name in enumerate(node.input) if i and graph.constant(name) is not None]
    if node.op_type not in NORMS or not places:
        return None
    place = int(random.choice(places))
    value = graph.constant(node.input[place])
    assert value is not None
    graph.set_constant(node, place, np.roll(value, 1))
    return _it(node)


def _axes_of_mean(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    """A mean over the axis before."""
    if node.op_type != "ReduceMean" or len(node.input) < 2:
        return None
    axes = graph.constant(node.input[1])
    if axes is None or axes.tolist() != [-1]:
        return None
    graph.set_constant(node, 1, np.array([-2]))
    return _it(node)


def _root_dropped(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type != "Sqrt":
        return None
    return frozenset(graph.bypass(node, node.input[0]))


# --- matrices -------------------------------------------------------------------------------------


def _weight(graph: Graph, node: NodeProto) -> np.ndarray | None:
    if node.op_type not in MATMULS | NORMS or len(node.input) < 2:
        return None
    value = graph.constant(node.input[1])
    return value if value is not None and value.dtype.kind == "f" else None


def _element_off(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    weight = _weight(graph, node)
    if weight is None:
        return None
    changed = weight.copy()
    place = np.unravel_index(int(random.integers(weight.size)), weight.shape)
    changed[place] = changed[place] * OFF
    graph.set_constant(node, 1, changed)
    return _it(node)


def _weight_off(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    weight = _weight(graph, node)
    if weight is None:
        return None
    graph.set_constant(node, 1, weight * OFF)
    return _it(node)


def _weight_in_half(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    weight = _weight(graph, node)
    if weight is None or weight.dtype != np.float32:
        return None
    graph.set_constant(node, 1, weight.astype(np.float16))
    return _it(node)


def _transposed(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    weight = _weight(graph, node)
    square = weight is not None and weight.ndim == 2 and weight.shape[0] == weight.shape[1]
    if not square or node.op_type not in {"MatMul", "Gemm"}:
        return None
    assert weight is not None
    graph.set_constant(node, 1, weight.T)
    return _it(node)


def _channels_swapped(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    """Two slices of a weight along its first axis."""
    weight = _weight(graph, node)
    if weight is None or node.op_type in NORMS or weight.shape[0] < 2:
        return None
    first, second = random.choice(weight.shape[0], 2, replace=False)
    changed = weight.copy()
    changed[[first, second]] = changed[[second, first]]
    graph.set_constant(node, 1, changed)
    return _it(node)


def _alpha(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type != "Gemm":
        return None
    graph.set_attribute(node, "alpha", float(graph.attribute(node, "alpha") or 1.0) * OFF)
    return _it(node)


def _attention_scale(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type != "Attention" or graph.attribute(node, "scale") is None:
        return None
    graph.set_attribute(node, "scale", graph.attribute(node, "scale") * 1.25)
    return _it(node)


def _mask_dropped(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type != "Attention" or len(node.input) < 4 or not node.input[3]:
        return None
    node.input[3] = ""
    while node.input and not node.input[-1]:
        del node.input[-1]
    return _it(node)


# --- casts ----------------------------------------------------------------------------------------


def _through_half(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    """The first input of a matrix product or a norm goes through half precision and back."""
    if node.op_type not in MATMULS | NORMS | {"Attention"}:
        return None
    name = node.input[0]
    there = onnx.helper.make_node(
        "Cast", [name], [f"{name}_half"], name=f"{node.name}_to_half", to=TensorProto.FLOAT16
    )
    back = onnx.helper.make_node(
        "Cast", [f"{name}_half"], [f"{name}_back"], name=f"{node.name}_back", to=TensorProto.FLOAT
    )
    node.input[0] = f"{name}_back"
    graph.insert_before(node, [there, back])
    return frozenset({there.name, back.name})


def _through_bool(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    """A Cast to floating point that first asks whether the value is zero."""
    if node.op_type != "Cast" or graph.attribute(node, "to") not in (1, 10):
        return None
    name = node.input[0]
    there = onnx.helper.make_node(
        "Cast", [name], [f"{name}_bool"], name=f"{node.name}_to_bool", to=TensorProto.BOOL
    )
    node.input[0] = f"{name}_bool"
    graph.insert_before(node, [there])
    return frozenset({there.name, node.name})


# --- the rest -------------------------------------------------------------------------------------


def _outputs_swapped(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type != "Split" or len(node.output) < 2:
        return None
    node.output[0], node.output[1] = node.output[1], node.output[0]
    return _it(node)


def _softmax_axis(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type != "Softmax":
        return None
    graph.set_attribute(node, "axis", -2)
    return _it(node)


def _permutation(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    """The last two axes of a Transpose the other way round."""
    perm = graph.attribute(node, "perm")
    if node.op_type != "Transpose" or perm is None:
        return None
    perm = list(perm)
    perm[-1], perm[-2] = perm[-2], perm[-1]
    graph.set_attribute(node, "perm", perm)
    return _it(node)


def _operands_swapped(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type not in {"Sub", "Div", "Pow"}:
        return None
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return _it(node)


def _factor_off(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    """The constant of a product, off by 2^-10."""
    if node.op_type not in {"Mul", "Div"}:
        return None
    for place, name in enumerate(node.input):
        value = graph.constant(name)
        if value is not None and value.dtype.kind == "f":
            graph.set_constant(node, place, value * OFF)
            return _it(node)
    return None


def _residual_lost(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    """One of two computed terms of a sum is left out."""
    computed = [name for name in node.input if graph.producer(name) is not None]
    if node.op_type != "Add" or len(computed) < 2:
        return None
    if any(name in graph.outputs for name in node.output):
        return None
    return frozenset(graph.bypass(node, computed[0]))


def _activation_lost(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type not in {"Relu", "Tanh", "Neg"}:
        return None
    return frozenset(graph.bypass(node, node.input[0]))


def _other_operator(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    others = {"Sin": "Cos", "Cos": "Sin", "Sigmoid": "Tanh", "MaxPool": "AveragePool"}
    if node.op_type not in others:
        return None
    kept = [a for a in node.attribute if a.name not in {"storage_order", "dilations"}]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.op_type = others[node.op_type]
    return _it(node)


def _interleaved(graph: Graph, node: NodeProto, random: np.random.Generator) -> Blamed | None:
    if node.op_type != "RotaryEmbedding":
        return None
    graph.set_attribute(node, "interleaved", 1 - int(graph.attribute(node, "interleaved") or 0))
    return _it(node)


# The first part is of norms, matrix products and casts, from which most are drawn.
FAULTS: dict[str, Fault] = {
    "epsilon times 10": _epsilon(10.0),
    "epsilon times 0.1": _epsilon(0.1),
    "epsilon times 1.5": _epsilon(1.5),
    "bias dropped": _bias_dropped,
    "scale and bias swapped": _scale_and_bias_swapped,
    "vector of a norm shifted": _rolled,
    "mean over another axis": _axes_of_mean,
    "square root dropped": _root_dropped,
    "one element off by 2^-10": _element_off,
    "weight off by 2^-10": _weight_off,
    "weight rounded to half": _weight_in_half,
    "weight transposed": _transposed,
    "two channels swapped": _channels_swapped,
    "alpha off by 2^-10": _alpha,
    "attention scale": _attention_scale,
    "attention mask dropped": _mask_dropped,
    "cast to half and back": _through_half,
    "cast through bool": _through_bool,
    "outputs of a split swapped": _outputs_swapped,
    "softmax over another axis": _softmax_axis,
    "permutation": _permutation,
    "operands swapped": _operands_swapped,
    "factor off by 2^-10": _factor_off,
    "residual lost": _residual_lost,
    "activation lost": _activation_lost,
    "another operator": _other_operator,
    "rotary halves interleaved": _interleaved,
}


def plant(
    name: str, graph: str, model: onnx.ModelProto, index: int, random: np.random.Generator
) -> Mutant | None:
    """The fault `name` at node `index` of a copy of `model`; None where it does not apply."""
    copied = Graph(model)
    node = copied.nodes[index]
    operator, late = node.op_type, 2 * index >= len(model.graph.node)
    blamed = FAULTS[name](copied, node, random)
    if not blamed:
        return None
    copied.drop_unused()
    return Mutant(graph, name, operator, blamed, late, copied.model)


def swap_graph_outputs(graph: str, model: onnx.ModelProto) -> Mutant:
    """The first two outputs of a graph under each other's name: a fault that sits on no node."""
    copied = Graph(model)
    first, second = copied.outputs[:2]
    other = {first: second, second: first}
    for node in copied.nodes:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = other.get(name, name)
    return Mutant(graph, "two outputs swapped", "", frozenset(), True, copied.model)


def lose_upcast(graph: str, model: onnx.ModelProto) -> list[Mutant]:
    """Every norm of a half precision graph that is computed in float32, one at a time in half.

    From the Cast up to the Cast back every constant becomes half, and both casts go.
    """
    made = []
    for index, node in enumerate(model.graph.node):
        copied = Graph(model)
        changed = _in_half(copied, copied.nodes[index]) if node.op_type == "Cast" else None
        if changed:
            copied.drop_unused()
            late = 2 * index >= len(model.graph.node)
            made.append(Mutant(graph, "cast lost", "Cast", changed, late, copied.model))
    return made


def _in_half(graph: Graph, cast: NodeProto) -> Blamed | None:
    if graph.attribute(cast, "to") != TensorProto.FLOAT:
        return None
    region, ends = _region(graph, cast.output[0])
    if not any(node.op_type == "ReduceMean" or node.op_type in NORMS for node in region):
        return None
    for node in region:
        for place, name in enumerate(node.input):
            value: Any = graph.constant(name)
            if value is not None and value.dtype == np.float32:
                constant = f"{name}_half_of_{node.name}"
                half = onnx.numpy_helper.from_array(value.astype(np.float16), constant)
                graph.model.graph.initializer.append(half)
                node.input[place] = constant
    graph.bypass(cast, cast.input[0])
    for end in ends:
        graph.bypass(end, end.input[0])
    return frozenset(node.name for node in region)


def _region(graph: Graph, value: str) -> tuple[list[NodeProto], list[NodeProto]]:
    """What is computed from `value` before the Casts to half, and those."""
    region: list[NodeProto] = []
    ends: list[NodeProto] = []
    values = {value}
    for node in graph.nodes:
        if not values & set(node.input):
            continue
        if node.op_type == "Cast":
            ends.append(node)
        else:
            region.append(node)
            values |= set(node.output)
    return region, ends
