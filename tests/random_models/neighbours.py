"""The layers on either side of a norm."""

from __future__ import annotations

from dataclasses import dataclass

from .program import LINEAR_LAYERS, Program


@dataclass(frozen=True)
class Neighbours:
    """The layers on one side of a norm, and the values between: what may move."""

    layers: frozenset[str]
    between: frozenset[str]


def holds_weights(program: Program, name: str, norm: str) -> bool:
    """Whether a layer has tensors that a norm could be folded into.

    A layer in train mode is left alone.
    """
    if not name or name == norm:
        return False
    layer = program.layers[name]
    if layer.kind == "batchnorm_train":
        return False
    return layer.kind in LINEAR_LAYERS or bool({"weight", "bias"} & set(layer.roles))


def before(program: Program, norm: str) -> Neighbours:
    """The layers that the norm's input comes from, and all values from them to the norm."""
    nodes = {node.name: node for node in program.nodes}
    todo = [node.inputs[0] for node in program.nodes if node.layer == norm]
    layers, between = set(), set()
    while todo:
        name = todo.pop()
        if name in between or name not in nodes:
            continue
        between.add(name)
        node = nodes[name]
        if holds_weights(program, node.layer, norm):
            layers.add(node.layer)
            todo.extend(node.inputs if node.when else ())
        else:
            todo.extend(node.inputs)
    return Neighbours(frozenset(layers - set(program.hooks)), frozenset(between))


def after(program: Program, norm: str) -> Neighbours:
    """The layers that read the norm's output, and all values from the norm to them.

    A norm that reads another is none of them: it may itself go into the other.
    """
    layers: set[str] = set()
    between: set[str] = set()
    for node in program.nodes:
        if node.layer == norm:
            between.add(node.name)
        elif between & set(node.inputs):
            if node.layer and program.layers[node.layer].kind in LINEAR_LAYERS:
                layers.add(node.layer)
            else:
                between.add(node.name)
    return Neighbours(frozenset(layers - set(program.hooks)), frozenset(between))
