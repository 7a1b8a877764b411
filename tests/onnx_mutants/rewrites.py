"""The same graphs written in another way: what a verifier must pass.

Every rewrite changes a copy of a graph in place and returns how many nodes it changed, so that a
test sees that it changed some.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from onnx_mutants.graphs import Graph

Rewrite = Callable[[Graph], int]


def rewrite(name: str, model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """A copy of `model` rewritten, and how many nodes were changed."""
    graph = Graph(model)
    count = REWRITES[name](graph)
    graph.drop_unused()
    return graph.model, count


def _renamed(graph: Graph) -> int:
    """Other names for every node, inner value and initialiser, and nothing said about origins."""
    kept = {value.name for value in (*graph.model.graph.input, *graph.model.graph.output)}
    names: dict[str, str] = {"": ""}

    def new(name: str) -> str:
        return name if name in kept else names.setdefault(name, f"v{len(names)}")

    for value in graph.model.graph.initializer:
        value.name = new(value.name)
    for number, node in enumerate(graph.nodes):
        node.name = f"n{number}"
        del node.metadata_props[:]
        for side in (node.input, node.output):
            for place, name in enumerate(side):
                side[place] = new(name)
    return len(graph.nodes)


def _divided(graph: Graph) -> int:
    """x * 2^k as x / 2^-k, which is exact."""
    count = 0
    for node in graph.nodes:
        for place, name in enumerate(node.input):
            value = graph.constant(name) if node.op_type == "Mul" else None
            if value is None or not _is_power_of_two(value):
                continue
            graph.set_constant(node, place, 1 / value)
            if place == 0:
                node.input[0], node.input[1] = node.input[1], node.input[0]
            node.op_type = "Div"
            count += 1
    return count


def _is_power_of_two(value: np.ndarray) -> bool:
    return value.dtype.kind == "f" and bool(np.all(np.frexp(np.abs(value))[0] == 0.5))


def _gemm_written_out(graph: Graph) -> int:
    """Gemm as MatMul and Add."""
    found = [node for node in graph.nodes if node.op_type == "Gemm" and len(node.input) == 3]
    for node in found:
        product = f"{node.output[0]}_product"
        weight = node.input[1]
        before = []
        if graph.attribute(node, "transB"):
            weight = f"{weight}_of_{node.name}_t"
            before = [_node("Transpose", [node.input[1]], weight, perm=[1, 0])]
        matmul = _node("MatMul", [node.input[0], weight], product)
        add = _node("Add", [product, node.input[2]], node.output[0])
        index = graph.index(node)
        graph.nodes.remove(node)
        graph.insert(index, [*before, matmul, add])
    return len(found)


def _constants_as_nodes(graph: Graph) -> int:
    """Every initialiser as a Constant node."""
    values = list(graph.model.graph.initializer)
    del graph.model.graph.initializer[:]
    nodes = [
        helper.make_node("Constant", [], [value.name], name=f"constant_{number}", value=value)
        for number, value in enumerate(values)
    ]
    graph.insert(0, nodes)
    return len(nodes)


def _reordered(graph: Graph) -> int:
    """Another topological order, drawn from a fixed seed."""
    random = np.random.default_rng(3)
    waiting = list(graph.nodes)
    old = [node.name for node in waiting]
    made = {out for node in waiting for out in node.output}
    order: list[NodeProto] = []
    known: set[str] = set()
    while waiting:
        ready = [n for n in waiting if all(name in known or name not in made for name in n.input)]
        node = ready[int(random.integers(len(ready)))]
        waiting = [other for other in waiting if other is not node]
        order.append(node)
        known |= set(node.output)
    copies = []
    for node in order:
        copied = NodeProto()
        copied.CopyFrom(node)
        copies.append(copied)
    del graph.nodes[:]
    graph.nodes.extend(copies)
    return sum(a != b.name for a, b in zip(old, copies, strict=True))


def _identities(graph: Graph) -> int:
    """An Identity before every matrix product and norm."""
    found = [n for n in graph.nodes if n.op_type in {"MatMul", "Gemm", "Conv"} | set(_WRITTEN_OUT)]
    for number, node in enumerate(found):
        copied = f"{node.input[0]}_same_{number}"
        same = _node("Identity", [node.input[0]], copied)
        node.input[0] = copied
        graph.insert_before(node, [same])
    return len(found)


def _norms_written_out(graph: Graph) -> int:
    """LayerNormalization and RMSNormalization of the last axis in single steps, centred."""
    found = [node for node in graph.nodes if node.op_type in _WRITTEN_OUT]
    found = [node for node in found if graph.attribute(node, "axis") in (None, -1)]
    axes = numpy_helper.from_array(np.array([-1]), "last_axis")
    graph.model.graph.initializer.append(axes)
    for node in found:
        steps = _WRITTEN_OUT[node.op_type](graph, node)
        index = graph.index(node)
        graph.nodes.remove(node)
        graph.insert(index, steps)
    return len(found)


def _layernorm_steps(graph: Graph, node: NodeProto) -> list[NodeProto]:
    x, out = node.input[0], node.output[0]
    mean = _node("ReduceMean", [x, "last_axis"], f"{out}_mean", keepdims=1)
    centred = _node("Sub", [x, f"{out}_mean"], f"{out}_centred")
    return [mean, centred, *_scaled(graph, node, f"{out}_centred")]


def _rmsnorm_steps(graph: Graph, node: NodeProto) -> list[NodeProto]:
    return _scaled(graph, node, node.input[0])


def _scaled(graph: Graph, node: NodeProto, centred: str) -> list[NodeProto]:
    out, epsilon = node.output[0], graph.attribute(node, "epsilon")
    value = np.array(1e-5 if epsilon is None else epsilon, dtype=np.float32)
    constant = numpy_helper.from_array(value, f"{out}_epsilon")
    graph.model.graph.initializer.append(constant)
    has_bias = len(node.input) > 2 and bool(node.input[2])
    scaled = f"{out}_scaled" if has_bias else out
    steps = [
        _node("Mul", [centred, centred], f"{out}_square"),
        _node("ReduceMean", [f"{out}_square", "last_axis"], f"{out}_variance", keepdims=1),
        _node("Add", [f"{out}_variance", f"{out}_epsilon"], f"{out}_safe"),
        _node("Sqrt", [f"{out}_safe"], f"{out}_root"),
        _node("Div", [centred, f"{out}_root"], f"{out}_plain"),
        _node("Mul", [f"{out}_plain", node.input[1]], scaled),
    ]
    return [*steps, _node("Add", [scaled, node.input[2]], out)] if has_bias else steps


_WRITTEN_OUT = {"LayerNormalization": _layernorm_steps, "RMSNormalization": _rmsnorm_steps}


def _batchnorm_as_affine(graph: Graph) -> int:
    """BatchNormalization as one multiplication and one addition."""
    found = [node for node in graph.nodes if node.op_type == "BatchNormalization"]
    for node in found:
        values = [graph.constant(name) for name in node.input[1:]]
        scale, bias, mean, variance = (np.asarray(value, dtype=np.float64) for value in values)
        factor = scale / np.sqrt(variance + graph.attribute(node, "epsilon"))
        out = node.output[0]
        for label, vector in (("factor", factor), ("shift", bias - mean * factor)):
            value = vector.astype(np.float32)[:, None, None]
            constant = numpy_helper.from_array(value, f"{out}_{label}")
            graph.model.graph.initializer.append(constant)
        index = graph.index(node)
        steps = [
            _node("Mul", [node.input[0], f"{out}_factor"], f"{out}_scaled"),
            _node("Add", [f"{out}_scaled", f"{out}_shift"], out),
        ]
        graph.nodes.remove(node)
        graph.insert(index, steps)
    return len(found)


def _commuted(graph: Graph) -> int:
    found = [node for node in graph.nodes if node.op_type in {"Add", "Mul"}]
    for node in found:
        node.input[0], node.input[1] = node.input[1], node.input[0]
    return len(found)


def _unused(graph: Graph) -> int:
    """A node whose result nobody reads, after every matrix product."""
    found = [node for node in graph.nodes if node.op_type in {"MatMul", "Gemm", "Conv"}]
    for number, node in enumerate(found):
        extra = _node("Exp", [node.output[0]], f"unused_{number}")
        graph.insert(graph.index(node) + 1, [extra])
    return len(found)


def _turned_twice(graph: Graph) -> int:
    """Two Transposes that undo each other, after every addition of a tensor of rank 3 or more."""
    found = [node for node in graph.nodes if node.op_type in {"Conv", "LayerNormalization"}]
    for node in found:
        perm = [1, 0, 2, 3] if node.op_type == "Conv" else [1, 0, 2]
        out = node.output[0]
        node.output[0] = f"{out}_before"
        steps = [
            _node("Transpose", [f"{out}_before"], f"{out}_turned", perm=perm),
            _node("Transpose", [f"{out}_turned"], out, perm=perm),
        ]
        graph.insert(graph.index(node) + 1, steps)
    return len(found)


def _own_constants(graph: Graph) -> int:
    """Every reader of a shared initialiser gets its own copy."""
    count = 0
    shared = {value.name for value in graph.model.graph.initializer}
    for node in list(graph.nodes):
        for place, name in enumerate(node.input):
            if name in shared and len(graph.readers(name)) > 1:
                value = graph.constant(name)
                assert value is not None
                graph.set_constant(node, place, value)
                count += 1
    return count


def _relu_as_maximum(graph: Graph) -> int:
    found = [node for node in graph.nodes if node.op_type == "Relu"]
    zero = numpy_helper.from_array(np.array(0, dtype=np.float32), "nothing")
    graph.model.graph.initializer.append(zero)
    for node in found:
        node.op_type = "Max"
        node.input.append("nothing")
    return len(found)


def _node(operator: str, inputs: list[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(operator, inputs, [output], name=f"new_{output}", **attributes)


REWRITES: dict[str, Rewrite] = {
    "other names": _renamed,
    "divided by a power of two": _divided,
    "gemm written out": _gemm_written_out,
    "constants as nodes": _constants_as_nodes,
    "another order": _reordered,
    "identities": _identities,
    "norms written out": _norms_written_out,
    "batch norm as affine": _batchnorm_as_affine,
    "operands commuted": _commuted,
    "unused nodes": _unused,
    "turned twice": _turned_twice,
    "own constants": _own_constants,
    "relu as maximum": _relu_as_maximum,
}
