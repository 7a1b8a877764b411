"""The nodes that are linear in their input, with their weights as named tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from normsurgery.flow.flow import Operand
from normsurgery.flow.nodes import (
    arguments,
    inputs_of,
    is_constant,
    operator,
    outputs_of,
    shape,
)
from normsurgery.flow.operators import CONVOLUTION, LAYER_ARGUMENTS
from normsurgery.folding.checks import Check
from normsurgery.folding.crossings import moves
from normsurgery.folding.ground import Ground, Refused


@dataclass(frozen=True)
class Layer:
    """A node that is linear in its input, with its weight and bias as named tensors.

    into, out: the axes of the weight along which the input's and the output's channels run.
    channel_axis: the axis of input and output that holds them. groups: as in an Edit, for the side
    that has them (into of a convolution, out of a transposed one). late_bias: the bias that torch
    adds in an operation of its own.
    """

    node: fx.Node
    input: fx.Node
    weight: Operand
    bias: Operand | None
    into: int
    out: int
    channel_axis: int
    groups: int
    transposed: bool = False
    late_bias: Operand | None = None


def is_layer(ground: Ground, node: fx.Node) -> bool:
    """Whether the node multiplies its input with a constant weight."""
    places = LAYER_ARGUMENTS.get(operator(node))
    if places is None or operator(node) == CONVOLUTION:
        return places is not None
    x, weight = (_input(node, place) for place in places[:2])
    return x is not None and weight is not None and is_constant(weight)


def layer(ground: Ground, node: fx.Node) -> Layer:
    """The node as a Layer. Raises Refused where its weight is no plain named tensor."""
    return _convolution(ground, node) if operator(node) == CONVOLUTION else _product(ground, node)


def _convolution(ground: Ground, node: fx.Node) -> Layer:
    x, weight, bias = (_input(node, place) for place in range(3))
    assert x is not None and weight is not None
    operand = whole_operand(ground, node, weight)
    transposed, groups = bool(arguments(node)[6]), int(arguments(node)[8])
    into, out = (0, 1) if transposed else (1, 0)
    return Layer(
        node,
        x,
        operand,
        None if bias is None else whole_operand(ground, node, bias),
        into,
        out,
        1,
        groups,
        transposed,
    )


def _product(ground: Ground, node: fx.Node) -> Layer:
    places = LAYER_ARGUMENTS[operator(node)]
    x, weight, bias = (None if place is None else _input(node, place) for place in places)
    assert x is not None and weight is not None
    operand = _unsliced(ground, node, weight)
    into, out = operand.axes[-2], operand.axes[-1]
    if operator(node) == "aten::linear":
        into, out = out, into
    if into is None or out is None:
        raise Refused(Check.COMPUTED_WEIGHT, f"the weight of {ground.path(node)} is a vector")
    if operator(node) == "aten::addmm" and (
        node.kwargs.get("beta", 1),
        node.kwargs.get("alpha", 1),
    ) != (
        1,
        1,
    ):
        raise Refused(Check.UNKNOWN, f"{ground.path(node)} weighs its bias")
    found = None if bias is None else whole_operand(ground, node, bias)
    late = None if bias is not None else _late_bias(ground, node, operand)
    return Layer(node, x, operand, found, into, out, -1, 1, late_bias=late)


def _late_bias(ground: Ground, node: fx.Node, weight: Operand) -> Operand | None:
    """The bias that is added to the product in an operation of its own."""
    module = ground.child_of(node, weight)
    bias = None if module is None else module._parameters.get("bias")
    if module is not None and bias is not None:
        path = ground.flow.path(module)
        return Operand(f"{path}.bias" if path else "bias", bias, (0,))
    (value,) = outputs_of(node)
    while len(readers := ground.flow.readers(value)) == 1 and moves(readers[0]):
        (value, *_) = outputs_of(readers[0])
    if len(readers) != 1 or operator(readers[0]) != "aten::add" or len(inputs_of(readers[0])) != 2:
        return None
    (other,) = (v for v in inputs_of(readers[0]) if v is not value)
    operand = ground.flow.operand(other)
    features = weight.tensor.shape[weight.axes[-1] or 0]
    fits = operand is not None and tuple(operand.tensor.shape) == (features,) and not operand.part
    return operand if fits and shape(value)[-1] == features else None


def _input(node: fx.Node, place: int) -> fx.Node | None:
    given = node.args[place] if len(node.args) > place else None
    return given if isinstance(given, fx.Node) else None


def _unsliced(ground: Ground, node: fx.Node, value: fx.Node) -> Operand:
    operand = ground.weight(value, node)
    if operand.part:
        raise Refused(Check.COMPUTED_WEIGHT, f"{ground.path(node)} reads a part of {operand.name}")
    return operand


def whole_operand(ground: Ground, node: fx.Node, value: fx.Node) -> Operand:
    """The named tensor itself, neither a part of it nor another view. Raises Refused."""
    operand = _unsliced(ground, node, value)
    if operand.axes != tuple(range(operand.tensor.dim())):
        raise Refused(Check.COMPUTED_WEIGHT, f"{operand.name} is reshaped for {ground.path(node)}")
    return operand
