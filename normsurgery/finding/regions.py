"""An expression in a forward that is a norm: the stretch of operations that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.finding.candidates import NotProven, small_numbers, tried
from normsurgery.finding.events import Event
from normsurgery.finding.proof import Proof
from normsurgery.flow.nodes import (
    arguments,
    frames,
    inputs_of,
    is_constant,
    name_of,
    operations_between,
    operator,
    outputs_of,
    position,
    shape,
    tensor,
    users_of,
)
from normsurgery.flow.operators import SAME_NUMBERS, kind_of
from normsurgery.numerics.precision import lifted


@dataclass(frozen=True)
class Region:
    """The operations of a formula from the value it normalises to the value it makes."""

    input: fx.Node
    output: fx.Node
    operations: tuple[fx.Node, ...]
    proof: Proof


def prove_region(event: Event, module: nn.Module) -> Region:
    """The longest stretch of operations around the event that is a registered norm.

    Raises NotProven with the reason where there is none.
    """
    reason = "no registered norm has this formula"
    for start in _starts(event):
        for output in reversed(_outputs(event)):
            try:
                region = _region(start, output, module)
            except NotProven as error:
                reason = str(error)
                continue
            if region is not None:
                return region
    raise NotProven(reason)


def _starts(event: Event) -> list[fx.Node]:
    """What may be the normalised value, earliest first: each input, then its views and casts.

    x comes before x - mean(x), of which a layer norm of x is an RMS norm.
    """
    found: list[fx.Node] = []
    first = position(event.operations[0])
    for start in (event.input, *event.other_inputs):
        queue = [start]
        while queue:
            found.append(queue.pop(0))
            for node in users_of(found[-1]):
                if kind_of(node) in SAME_NUMBERS and outputs_of(node) and position(node) < first:
                    queue.append(outputs_of(node)[0])
    return found


def _region(start: fx.Node, output: fx.Node, module: nn.Module) -> Region | None:
    operations = operations_between(start, output)
    if operations is None:
        raise NotProven("its output depends on another input as well")
    if shape(output) != shape(start):
        return None
    tensors = _tensors_read(operations)
    run = _region_run(start, output, operations)
    proof = tried(run, shape(start), tensors, small_numbers(operations, module), (False,))
    return Region(start, output, operations, proof) if proof is not None else None


def _outputs(event: Event) -> list[fx.Node]:
    """The event's output, and what scaling, shifting and casting by constants make of it."""
    chain = [event.output]
    while True:
        reading = users_of(chain[-1])
        if len(reading) != 1 or not outputs_of(reading[0]) or not _extends(reading[0]):
            return chain
        if not _same_forward(reading[0], event):
            return chain
        chain.append(outputs_of(reading[0])[0])


def _extends(node: fx.Node) -> bool:
    name = operator(node)
    if kind_of(node) in SAME_NUMBERS:
        return True
    varying = [value for value in inputs_of(node) if not is_constant(value)]
    arithmetic = name in ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::addcmul")
    return arithmetic and len(varying) == 1


def _same_forward(node: fx.Node, event: Event) -> bool:
    if not frames(node) or not event.frames:
        return not frames(node) and not event.frames
    return frames(node)[0].module is event.frames[0].module


def _tensors_read(operations: Sequence[fx.Node]) -> dict[str, Tensor]:
    """The named floating tensors that the operations read."""
    read = (value for node in operations for value in inputs_of(node) if value.op == "get_attr")
    named = {name: tensor(value) for value in read if (name := name_of(value)) is not None}
    return {name: held for name, held in named.items() if held.is_floating_point()}


def _region_run(
    start: fx.Node, output: fx.Node, operations: tuple[fx.Node, ...]
) -> Callable[[Tensor, Mapping[str, Tensor], bool], Tensor]:
    def run(x: Tensor, values: Mapping[str, Tensor], training: bool) -> Tensor:
        known: dict[fx.Node, Tensor] = {start: x.clone()}

        def back(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
            if leaf in known:
                return known[leaf]
            name, held = name_of(leaf), tensor(leaf)
            if name is not None and name in values:
                return values[name]
            return held.double() if held.is_floating_point() else held

        with torch.no_grad(), lifted():
            for node in operations:
                target: Any = node.target
                args, kwargs = tree_map(back, (arguments(node), dict(node.kwargs)))
                result = target(*args, **kwargs)
                made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
                known.update(zip(outputs_of(node), made, strict=True))
        return known[output]

    return run
