"""Nodes that give the right result on these inputs, and would not on harder ones.

An eps that is wrong by little, or gone, shows only where a variance is tiny, which deep in a model
no input of the model may bring about. So whatever is written otherwise than in the reference is
fed, alone, with the reference's values made small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from normsurgery.blaming.narrowing import region
from normsurgery.blaming.setting import Setting
from normsurgery.blaming.sweep import Sweep
from normsurgery.blaming.views import Values, View
from normsurgery.errors import NormsurgeryError
from normsurgery.verifying.judge import Verdict, judge
from normsurgery.verifying.shaking import moved

SCALES = (1e-2, 1e-4, 0.0)
_MOST_NODES = 30  # a larger region is no way of writing one operation


@dataclass(frozen=True)
class Alone:
    """value: what came out wrong. nodes: positions of those that made it. scale: what the
    reference's values were multiplied with."""

    value: str
    nodes: tuple[int, ...]
    verdict: Verdict
    scale: float


def wrong_alone(setting: Setting, swept: Sweep) -> Alone | None:
    """The first value, in graph order, that is right in every case and wrong on smaller numbers."""
    for value in swept.close():
        found = _wrong(setting, swept, value)
        if found is not None:
            return found
    return None


def _wrong(setting: Setting, swept: Sweep, value: str) -> Alone | None:
    graph, other = setting.graph, setting.reference.graph
    expected = swept.pairs[value]
    if other is None or expected not in other.producer or value not in graph.producer:
        return None
    mine = region(setting, swept, graph.producer[value])
    read = {name for index in mine for name in graph.computed(index)}
    inner = {name for index in mine for name in graph.nodes[index].output}
    given = {name: swept.pairs[name] for name in sorted(read - inner) if name in swept.pairs}
    theirs = _between(other, expected, set(given.values()))
    if theirs is None or len(given) < len(read - inner):
        return None
    if _numbers(graph, mine) == _numbers(other, theirs):
        return None
    for scale in SCALES:
        verdict = _verdict(setting, value, expected, mine, theirs, given, scale)
        if verdict is not None and verdict.passed is False:
            return Alone(value, tuple(mine), verdict, scale)
    return None


def _between(graph: View, value: str, given: set[str]) -> list[int] | None:
    """The nodes that make `value` of `given`, in order; None if they need anything else."""
    found: set[int] = set()
    waiting = [graph.producer[value]]
    while waiting:
        position = waiting.pop()
        if position in found:
            continue
        found.add(position)
        for name in graph.computed(position):
            if name in given:
                continue
            if name not in graph.producer or len(found) > _MOST_NODES:
                return None
            waiting.append(graph.producer[name])
    return sorted(found)


def _numbers(graph: View, nodes: Iterable[int]) -> list[float]:
    """The single floating numbers that nodes hold: constants of one element, and attributes."""
    found = []
    for position in nodes:
        values = [graph.constants.get(name) for name in graph.reads(position)]
        found += [
            float(v) for v in values if v is not None and v.is_floating_point() and v.numel() == 1
        ]
        found += [v for v in graph.attributes(position).values() if isinstance(v, float)]
    return sorted(found)


def _verdict(
    setting: Setting,
    value: str,
    expected: str,
    mine: list[int],
    theirs: list[int],
    given: dict[str, str],
    scale: float,
) -> Verdict | None:
    graph, other = setting.graph, setting.reference.graph
    assert other is not None
    case = setting.reference.cases[0]
    values = {new: _scaled(case[old], scale) for new, old in given.items()}
    renamed = {old: values[new] for new, old in given.items()}
    try:
        found = _made(graph, mine, values)[value]
        truth = _made(other, theirs, renamed)[expected]
        generator = torch.Generator().manual_seed(setting.seed)
        shaken = {name: _shaken(tensor, generator) for name, tensor in renamed.items()}
        rounded = _made(other, theirs, shaken)[expected]
    except (NormsurgeryError, KeyError):
        return None
    dtype = graph.dtype(value)
    precision = dtype if dtype is not None and dtype.is_floating_point else None
    return judge(found, truth, None, rounded, precision)


def _made(graph: View, nodes: Iterable[int], given: Values) -> Values:
    values = {**graph.constants, **given}
    for position in nodes:
        values.update(graph.run_node(position, values))
    return values


def _scaled(value: Tensor, scale: float) -> Tensor:
    return value * scale if value.is_floating_point() else value


def _shaken(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    return moved(value, torch.finfo(torch.float32).eps / 2, generator)
