"""From a value that is wrong to the very node that makes it so."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normsurgery.blaming.reference import TRACED
from normsurgery.blaming.setting import Setting
from normsurgery.blaming.sweep import Sweep
from normsurgery.blaming.views import Values
from normsurgery.errors import NormsurgeryError
from normsurgery.verifying.alignment import same_value

_MOST_TRIED = 64
_DEPTH = 12  # operations that one rewriting spreads over, at most


@dataclass(frozen=True)
class Culprit:
    """node: position in the graph. value: its output that is wrong. expected: what the reference
    calls that; "" where it has no such value. added: the source has no such operation. between:
    operation of the reference (its output) that is missing before the node."""

    node: int
    value: str
    expected: str
    added: bool = False
    missing: str = ""


def narrow(setting: Setting, swept: Sweep, value: str) -> Culprit:
    """The node that makes `value` wrong: its own, or one before it that stands for nothing in the
    reference."""
    return _narrow(setting, swept, value, swept.pairs[value], _DEPTH)


def _narrow(setting: Setting, swept: Sweep, value: str, expected: str, depth: int) -> Culprit:
    graph = setting.graph
    position = graph.producer[value]
    here = Culprit(position, value, expected)
    loose = [name for name in graph.computed(position) if name not in swept.pairs]
    for name in loose:
        if name in graph.producer and _is_added(setting, swept, position, value, expected, name):
            return Culprit(graph.producer[name], name, "", added=True)
    if not loose:
        misnamed = _misnamed(setting, swept, position, value, expected)
        if misnamed is not None:
            return misnamed
        return _by_wiring(setting, swept, here, _wanted(setting, position, expected))
    for name in loose if depth else ():
        if name not in graph.producer:
            continue
        for other in _possible(setting, swept, expected, name):
            if _gives(setting, swept, position, value, expected, {name: other}):
                return _narrow(setting, swept, name, other, depth - 1)
    return _in_region(setting, swept, here) or here


def _wanted(setting: Setting, position: int, expected: str) -> dict[str, str]:
    """Input of a node -> what the node of the reference reads there, where both are of one kind."""
    other = setting.reference.graph
    producer = setting.reference.producer(expected)
    graph = setting.graph
    if other is None or producer is None:
        return {}
    if producer.op_type != graph.nodes[position].op_type:
        return {}
    return {
        mine: theirs
        for mine, theirs in zip(graph.reads(position), producer.input, strict=False)
        if mine and theirs and mine not in graph.constants and theirs not in other.constants
    }


def _misnamed(
    setting: Setting, swept: Sweep, position: int, value: str, expected: str
) -> Culprit | None:
    """Whoever gives another value under the name of the one that the node should read."""
    graph = setting.graph
    for mine in graph.computed(position):
        for named in (mine, f"{TRACED}{mine}"):
            known = mine in graph.producer and named in setting.reference.cases[0]
            if not known or _same(setting, swept.pairs[mine], named):
                continue
            if _gives(setting, swept, position, value, expected, {mine: named}):
                return Culprit(graph.producer[mine], mine, named)
    return None


def _possible(setting: Setting, swept: Sweep, expected: str, name: str) -> Iterator[str]:
    """Values of the reference that `name` may be meant to be: those that `expected` is made of,
    then all of its shape that nothing in the graph stands for yet."""
    other = setting.reference.graph
    producer = setting.reference.producer(expected)
    if other is not None and producer is not None:
        yield from (n for n in producer.input if n and n not in other.constants)
    made = swept.made[0].get(name)
    if made is None:
        return
    paired = set(swept.pairs.values())
    case = setting.reference.cases[0]
    alike = (n for n, v in case.items() if n not in paired and v.shape == made.shape)
    yield from itertools.islice(alike, _MOST_TRIED)


def _by_wiring(setting: Setting, swept: Sweep, here: Culprit, wanted: dict[str, str]) -> Culprit:
    """The node reads another value than it should: its own fault, unless that value goes by the
    name of the right one; then the fault is with whoever gave it the name."""
    graph = setting.graph
    for mine, theirs in wanted.items():
        if _same(setting, swept.pairs[mine], theirs):
            continue
        if mine == theirs and mine in graph.producer:
            return Culprit(graph.producer[mine], mine, theirs)
        if _skips(setting, swept.pairs[mine], theirs):
            return Culprit(here.node, here.value, here.expected, missing=theirs)
    return here


def with_what_is_missing(setting: Setting, swept: Sweep, culprit: Culprit) -> Culprit:
    """The same, told of an operation that the reference has before the node and that changes the
    values of these inputs too little to be seen."""
    for mine, theirs in _wanted(setting, culprit.node, culprit.expected).items():
        read = swept.pairs.get(mine, theirs)
        if read != theirs and _skips(setting, read, theirs):
            return replace(culprit, missing=theirs)
    return culprit


def _skips(setting: Setting, read: str, wanted: str) -> bool:
    """Whether the reference makes `wanted` of `read` in one operation."""
    producer = setting.reference.producer(wanted)
    return producer is not None and any(_same(setting, name, read) for name in producer.input)


def _same(setting: Setting, first: str, second: str) -> bool:
    if first == second:
        return True
    return all(
        first in case and second in case and same_value(case[first], case[second])
        for case in setting.reference.cases
    )


def _is_added(
    setting: Setting, swept: Sweep, position: int, value: str, expected: str, name: str
) -> bool:
    """Whether all is well if the node reads what `name` is made of in the place of `name`."""
    graph = setting.graph
    return any(
        _gives(setting, swept, position, value, expected, {name: swept.pairs[before]})
        for before in graph.computed(graph.producer[name])
        if before in swept.pairs
    )


def _gives(
    setting: Setting, swept: Sweep, position: int, value: str, expected: str, read: dict[str, str]
) -> bool:
    """Whether a node makes the expected value of the reference's values `read`."""
    for corrected, case in zip(swept.corrected, setting.reference.cases, strict=True):
        if any(theirs not in case for theirs in read.values()):
            return False
        values: Values = {**corrected, **{mine: case[theirs] for mine, theirs in read.items()}}
        try:
            made = setting.graph.run_node(position, values)[value]
        except (NormsurgeryError, KeyError):
            return False
        dtype = setting.graph.dtype(value) or torch.float32
        if not same_value(made, case[expected], dtype):
            return False
    return True


def _in_region(setting: Setting, swept: Sweep, here: Culprit) -> Culprit | None:
    """Of the nodes that only together stand for something: the first that reads a constant which
    the source does not have anywhere."""
    graph = setting.graph
    known = setting.reference.numbers_in_use()
    for position in region(setting, swept, here.node):
        for name in graph.reads(position):
            constant = graph.constants.get(name)
            if constant is None or constant.numel() != 1 or not constant.is_floating_point():
                continue
            if float(constant) not in known:
                node = graph.nodes[position]
                return Culprit(position, node.output[0], "")
    return None


def region(setting: Setting, swept: Sweep, position: int) -> list[int]:
    """The nodes before `position`, and itself, whose values stand for nothing in the reference."""
    graph = setting.graph
    found, waiting = {position}, [position]
    while waiting:
        for name in graph.computed(waiting.pop()):
            maker = graph.producer.get(name)
            if name not in swept.pairs and maker is not None and maker not in found:
                found.add(maker)
                waiting.append(maker)
    return sorted(found)
