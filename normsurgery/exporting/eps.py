"""Every eps of a traced program, and where the written graph has it.

An eps is small, and so is what its absence does to random inputs: a norm without it is right on
N(0, 1) and NaN on a row of zeros. So it is looked for by name and place, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from normsurgery.exporting.annotating import shared_by
from normsurgery.exporting.facts import EpsFact
from normsurgery.exporting.places import module_of, place_of
from normsurgery.exporting.refusals import constant_nodes, operations
from normsurgery.onnxfile.reading import all_nodes

AT_EXPORT = "computed when it was exported"  # a norm of weights alone: what it gives is a constant
AS_ZERO = "0 in the type of the graph, as in torch"

_ADDED = ("aten.add.", "aten.add_.", "aten.clamp_min.", "aten.clamp.", "aten.maximum.")
_MOMENTS = (
    "aten.var.",
    "aten.var_mean.",
    "aten.std.",
    "aten.std_mean.",
    "aten.linalg_vector_norm.",
    "aten.norm.",
)
_SQUARES = ("aten.square.", "aten.abs.")
_SUMS = ("aten.mean.", "aten.sum.")
_SAME = (  # operations behind which a moment is still a moment, of the same elements
    "aten.to.",
    "aten._to_copy.",
    "aten.view.",
    "aten.reshape.",
    "aten.unsqueeze.",
    "aten.squeeze.",
    "aten.expand.",
    "aten.expand_as.",
    "aten.sqrt.",
    "aten.rsqrt.",
    "aten.reciprocal.",
    "aten.pow.",
    "aten.contiguous.",
    "aten.clone.",
    "aten.detach.",
    "aten.alias.",
    "aten.permute.",
    "aten.transpose.",
    "aten.type_as.",
    "aten.mul.Scalar",
    "aten.div.Scalar",
)
_HANDED_ON = (  # how a constant tensor of the code comes into a trace
    "aten.lift_fresh",
    "aten.detach",
    "aten.alias.",
    "aten.clone.",
    "aten.to.",
    "aten._to_copy.",
    "aten.view.",
    "aten.reshape.",
)
_DEFAULT_EPSILON = 1e-5  # of every ONNX norm that has the attribute
_HOLDING = frozenset({"Add", "Sub", "Max", "Clip"})  # operators that take an eps as a constant


@dataclass(frozen=True)
class _Traced:
    """One eps of the program. constant: nothing that the user gives reaches it."""

    node: fx.Node
    site: str
    module: str
    eps: float
    constant: bool


def find_eps(program: ExportedProgram, written: onnx.ModelProto) -> tuple[EpsFact, ...]:
    """Every eps other than 0 of the traced program, each with the ONNX node that holds it.

    An eps is the argument of that name of a norm operator, or a number that is added to a variance,
    a mean of squares or a norm, or bounds one from below. Norms that are the same computation share
    a node. `node` is "" where the written graph, searched in the same module, has no such value.
    """
    holders = _Holders(written)
    return tuple(
        EpsFact(traced.site, traced.eps, _held(traced, holders)) for traced in _traced(program)
    )


def _held(traced: _Traced, holders: _Holders) -> str:
    node = holders.take(traced.module, traced.eps)
    if node:
        return node
    if traced.constant:
        return AT_EXPORT
    value = traced.node.meta.get("val")
    dtype = value.dtype if isinstance(value, Tensor) else torch.float64
    is_sum = not _is_norm(traced.node)
    return AS_ZERO if is_sum and _rounded(traced.eps, dtype) == 0 else ""


def _rounded(value: float, dtype: torch.dtype) -> float:
    return (
        float(torch.tensor(value, dtype=torch.float64).to(dtype))
        if dtype.is_floating_point
        else value
    )


class _Holders:
    """The constants of a written graph that may be an eps, each to be taken once."""

    def __init__(self, written: onnx.ModelProto) -> None:
        self.left: dict[str, list[tuple[str, frozenset[float]]]] = {}
        scalars = _scalars(written)
        for node in all_nodes(written):
            values = frozenset(_values(node, scalars))
            if values:
                for module in shared_by(node):
                    self.left.setdefault(module, []).append((node.name, values))

    def take(self, module: str, eps: float) -> str:
        """The name of a node of that module that holds the value, in the type it is kept in."""
        wanted = {eps, *(_rounded(eps, dtype) for dtype in _KEPT)} - {0.0}
        nodes = self.left.get(module, [])
        for index, (name, values) in enumerate(nodes):
            if wanted & values:
                del nodes[index]
                return name
        return ""


_KEPT = (torch.float32, torch.float16, torch.bfloat16)


def _scalars(written: onnx.ModelProto) -> dict[str, float]:
    """Floating constants of one element, by name."""
    found: dict[str, float] = {}
    tensors = {tensor.name: tensor for tensor in written.graph.initializer}
    for node in all_nodes(written):
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                tensors[node.output[0]] = attribute.t
            if attribute.name == "value_float":
                found[node.output[0]] = attribute.f
    for name, tensor in tensors.items():
        if np.prod(tensor.dims, dtype=int) == 1 and tensor.data_type in _FLOATING:
            found[name] = float(onnx.numpy_helper.to_array(tensor).astype(np.float64).item())
    return found


_FLOATING = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    }
)


def _values(node: onnx.NodeProto, scalars: Mapping[str, float]) -> Iterator[float]:
    for attribute in node.attribute:
        if attribute.name == "epsilon":
            yield attribute.f
    if node.op_type.endswith("Normalization") and not any(
        attribute.name == "epsilon" for attribute in node.attribute
    ):
        yield float(np.float32(_DEFAULT_EPSILON))
    if node.op_type in _HOLDING:
        yield from (scalars[name] for name in node.input if name in scalars)


def _traced(program: ExportedProgram) -> list[_Traced]:
    constants = constant_nodes(program)
    found: list[_Traced] = []
    for node in operations(program):
        eps = _eps_of(node, program)
        if eps is None or eps == 0:
            continue
        module = module_of(node)
        found.append(_Traced(node, module or place_of(node), module, eps, node in constants))
    return found


def _eps_of(node: fx.Node, program: ExportedProgram) -> float | None:
    if _is_norm(node):
        return _argument(node)
    if str(node.target).startswith(_ADDED):
        return _added(node, program)
    return None


def _is_norm(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return (
        schema is not None
        and "norm" in schema.name
        and any(argument.name == "eps" for argument in schema.arguments)
    )


def _argument(node: fx.Node) -> float | None:
    """What a norm operator was given as eps; None as torch's rms_norm reads it."""
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == "eps":
            value = node.kwargs.get("eps", argument.default_value)
            value = node.args[index] if index < len(node.args) else value
            return _machine_eps(node) if value is None else float(value)  # type: ignore[arg-type]
    return None


def _machine_eps(node: fx.Node) -> float:
    value = node.meta.get("val")
    double = isinstance(value, Tensor) and value.dtype == torch.float64
    return torch.finfo(torch.float64 if double else torch.float32).eps


def _added(node: fx.Node, program: ExportedProgram) -> float | None:
    """The number that is added to a second moment or a norm, or that bounds it from below."""
    first, *others = node.args
    others = [*others, *(node.kwargs.get(key) for key in ("other", "min"))]
    if _is_clamp(node):
        others = others[:1] if others[:1] != [None] else others[-1:]
    for moment, number in ((first, other) for other in others if other is not None):
        for one, two in ((moment, number), (number, moment)):
            value = _number(two, program)
            if value is not None and isinstance(one, fx.Node) and _is_moment(one):
                return value
    return None


def _is_clamp(node: fx.Node) -> bool:
    return str(node.target).startswith("aten.clamp")


def _number(value: Any, program: ExportedProgram) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    while isinstance(value, fx.Node) and str(value.target).startswith(_HANDED_ON):
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.op != "placeholder":
        return None
    signature = program.graph_signature
    name = signature.inputs_to_buffers.get(value.name)
    name = name or signature.inputs_to_lifted_tensor_constants.get(value.name)
    tensor = program.state_dict.get(name, program.constants.get(name)) if name else None
    if isinstance(tensor, Tensor) and tensor.numel() == 1 and tensor.is_floating_point():
        return float(tensor)
    return None


def _is_moment(node: fx.Node) -> bool:
    """Whether a node is a variance, a mean or sum of squares, or a norm, or the root of one."""
    name = str(node.target)
    if name.startswith(_MOMENTS):
        return True
    if name == "<built-in function getitem>":
        return bool(node.args[1] == 0) and _first_is(node, _is_moment)
    if name.startswith(_SUMS):
        return _first_is(node, _is_square)
    return name.startswith(_SAME) and _first_is(node, _is_moment)


def _is_square(node: fx.Node) -> bool:
    name = str(node.target)
    if name.startswith("aten.pow."):
        return len(node.args) > 1 and node.args[1] in (2, 2.0)
    if name.startswith("aten.mul."):
        return node.args[0] is node.args[1]
    if name.startswith(_SQUARES):
        return True
    return name.startswith(_SAME) and _first_is(node, _is_square)


def _first_is(node: fx.Node, asked: Any) -> bool:
    first = node.args[0] if node.args else None
    return isinstance(first, fx.Node) and bool(asked(first))
