"""One sentence on what a node does otherwise than the source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnx import NodeProto
from torch import Tensor

from normsurgery.blaming.narrowing import Culprit
from normsurgery.blaming.reference import TRACED
from normsurgery.blaming.setting import Setting
from normsurgery.blaming.sweep import Sweep

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum", "Mean"})


def difference(setting: Setting, swept: Sweep, culprit: Culprit) -> str:
    """What differs between a node and the one that the reference has in its place; "" unknown."""
    graph, reference = setting.graph, setting.reference
    node = graph.nodes[culprit.node]
    if culprit.added:
        return f"the source has no such {node.op_type} there"
    if culprit.missing:
        producer = reference.producer(culprit.missing)
        assert producer is not None
        return f"{producer.op_type} ({producer.name}) of the source is missing before it"
    other = reference.producer(culprit.expected)
    if other is None:
        return _against_traced(setting, culprit)
    if other.op_type != node.op_type:
        return _other_operator(setting, culprit, other)
    found = [*_attributes(setting, culprit.node, culprit.expected)]
    found += _inputs(setting, swept, culprit.node, other)
    reordered = list(node.output) != list(other.output) and set(node.output) == set(other.output)
    if not found and reordered:
        found.append("its outputs are in another order")
    return "; ".join(found)


def _other_operator(setting: Setting, culprit: Culprit, other: NodeProto) -> str:
    """Another operator may be right, and hold a number that the source has nowhere."""
    graph = setting.graph
    node = graph.nodes[culprit.node]
    numbers = {
        name: value
        for name, value in graph.attributes(culprit.node).items()
        if isinstance(value, float)
    }
    known = setting.reference.numbers_in_use()
    strange = [f"{name} {_told(value)}" for name, value in numbers.items() if value not in known]
    text = f"it is {_a(node.op_type)}, the source has {_a(other.op_type)}"
    return f"{text}; {', '.join(strange)} is no number of the source" if strange else text


def _against_traced(setting: Setting, culprit: Culprit) -> str:
    """The traced operation, where the reference has no ONNX form."""
    node = setting.graph.nodes[culprit.node]
    attributes = setting.graph.attributes(culprit.node)
    constants = [
        f"{float(setting.graph.constants[name]):.6g}"
        for name in setting.graph.reads(culprit.node)
        if name in setting.graph.constants and setting.graph.constants[name].numel() == 1
    ]
    said = [f"{name} {value}" for name, value in attributes.items() if name == "epsilon"]
    said += [f"reads the constant {value}" for value in constants]
    expected = culprit.expected.removeprefix(TRACED)
    where = f", which should be {expected} of the traced source" if expected else ""
    return f"{node.op_type}{where}" + (f": {', '.join(said)}" if said else "")


def _attributes(setting: Setting, position: int, expected: str) -> Iterator[str]:
    other = setting.reference.graph
    assert other is not None
    mine = setting.graph.attributes(position)
    theirs = other.attributes(other.producer[expected])
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            yield f"{name} {_told(mine.get(name))}, the source has {_told(theirs.get(name))}"


def _inputs(setting: Setting, swept: Sweep, position: int, other: NodeProto) -> Iterator[str]:
    graph, reference = setting.graph, setting.reference
    assert reference.graph is not None
    mine, theirs = graph.reads(position), list(other.input)
    while theirs and not theirs[-1]:
        theirs.pop()
    if other.op_type in COMMUTATIVE:
        mine = sorted(mine, key=lambda name: name in graph.constants)
        constants = reference.graph.constants
        theirs = sorted(theirs, key=lambda name: name in constants)
    named = [swept.pairs.get(name, name) for name in mine]
    if len(mine) > 1 and named != theirs and sorted(named) == sorted(theirs):
        yield f"its inputs are in another order: {', '.join(mine)}"
        return
    for place in range(max(len(mine), len(theirs))):
        old = theirs[place] if place < len(theirs) else ""
        new = mine[place] if place < len(mine) else ""
        if not new or not old:
            if new or old:
                yield f"input {place} is {new or 'missing'}, the source has {old or 'none'}"
        elif new in graph.constants and old in reference.graph.constants:
            if graph.digest(new) != reference.graph.digest(old):
                yield _constants(new, graph.constants[new], reference.graph.constants[old])
        elif named[place] != old:
            yield f"it reads {new}, the source {old}"


def _constants(name: str, mine: Tensor, theirs: Tensor) -> str:
    if mine.numel() == theirs.numel() == 1 and mine.item() != theirs.item():
        return f"{name} {_told(mine.item())}, the source has {_told(theirs.item())}"
    if mine.shape != theirs.shape:
        return f"{name} has shape {list(mine.shape)}, the source {list(theirs.shape)}"
    wrong = (mine != theirs).flatten()
    index = int((mine.double() - theirs.double()).abs().flatten().argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(index), mine.shape)]
    values = (mine.flatten()[index].item(), theirs.flatten()[index].item())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements of {name} differ, the most at {where}: "
        f"{values[0]:.9g}, the source has {values[1]:.9g}"
    )


def _told(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _a(operator: str) -> str:
    return f"{'an' if operator[0] in 'AEIOU' else 'a'} {operator}"
