"""Biases for layers that are calls in a graph the user holds: which take one, and giving it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_ATEN = torch.ops.aten
# All of them are called with (input, weight, bias, ...).
_WITH_BIAS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        _ATEN.linear.default,
        _ATEN.conv1d.default,
        _ATEN.conv2d.default,
        _ATEN.conv3d.default,
        _ATEN.conv_transpose1d.default,
        _ATEN.conv_transpose2d.input,
        _ATEN.conv_transpose3d.input,
        _ATEN.convolution.default,
    }
)


def bias_name(weight: str) -> str:
    """The name of a new bias beside a weight: `fc.bias` for `fc.weight`, `w_bias` for `w`."""
    path, _, last = weight.rpartition(".")
    name = "bias" if last == "weight" else f"{last}_bias"
    return f"{path}.{name}" if path else name


def weight_without_bias(node: fx.Node) -> fx.Node | None:
    """The node of the weight of a call that could have a bias and has none; else None."""
    if node.op != "call_function" or node.target not in _WITH_BIAS:
        return None
    weight, bias = _argument(node, 1, "weight"), _argument(node, 2, "bias")
    return weight if bias is None and isinstance(weight, fx.Node) else None


def give_bias(node: fx.Node, bias: fx.Node) -> None:
    """Call it with this bias."""
    if "bias" in node.kwargs:
        node.update_kwarg("bias", bias)
    elif len(node.args) == 1:  # the weight is given by name
        node.kwargs = {**node.kwargs, "bias": bias}
    else:
        node.args = (*node.args[:2], bias, *node.args[3:])


def give_biases(owner: fx.GraphModule, biases: Sequence[tuple[Tensor, str]]) -> None:
    """Let every call without a bias that reads one of the weights have the bias beside it.

    biases: (weight, name of a parameter of `owner`). The graph that it had stays as it is.
    """
    names = {id(weight): name for weight, name in biases}
    graph, _ = editable(owner)
    for node, weight in _without_bias(owner, graph):
        if id(weight) in names:
            with graph.inserting_before(node):
                give_bias(node, graph.get_attr(names[id(weight)]))
    graph.lint()
    owner.graph = graph


def editable(graph_module: fx.GraphModule) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A copy of its graph, and the nodes in it by the names that they have in the old one.

    An edit is made on it and then put in its place: the old one is what an undo puts back.
    """
    graph = copy.deepcopy(graph_module.graph)
    graph.owning_module = graph_module
    pairs = zip(graph_module.graph.nodes, graph.nodes, strict=True)
    return graph, {old.name: new for old, new in pairs}


def _without_bias(owner: fx.GraphModule, graph: fx.Graph) -> Iterator[tuple[fx.Node, Tensor]]:
    for node in list(graph.nodes):
        weight = weight_without_bias(node)
        if weight is not None and (tensor := read_by(owner, weight)) is not None:
            yield node, tensor


def read_by(owner: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The tensor of the owner that a node reads; None where it reads none."""
    if node.op != "get_attr":
        return None
    path, _, name = str(node.target).rpartition(".")
    held = getattr(owner.get_submodule(path), name, None)
    return held if isinstance(held, Tensor) else None


def _argument(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)
