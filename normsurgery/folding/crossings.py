"""What a scale and a shift per channel cross: one rule per kind of operator, for both directions.

A rule says which channels the output has, from those of the input, and back; why a shift stops
there, where it does; and what a shift is multiplied by on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from normsurgery.flow.flow import permutation
from normsurgery.flow.nodes import (
    argument,
    arguments,
    inputs_of,
    operator,
    outputs_of,
    shape,
    tensor,
)
from normsurgery.flow.operators import Kind, kind_of
from normsurgery.folding.channels import (
    NEUTRAL,
    along_axis,
    repeated,
    reshaped,
    squeezed,
    unrepeated,
    varies,
)
from normsurgery.folding.checks import Check
from normsurgery.folding.ground import Affine, Ground, Refused

# The channels of one side, from those of the other and the output in question; None where one
# element would need two channels.
Move = Callable[[Tensor, fx.Node], Tensor | None]


@dataclass(frozen=True)
class Crossing:
    """How an operation hands on a scale and a shift per channel of its one input that has them.

    after, before: the channels of an output from those of the source, and back. mixes: what it does
    where there are none. stops_shift: why only a scale crosses; "" where a shift does too.
    factor, added: numbers that the operation multiplies with, and adds then.
    """

    source: fx.Node
    after: Move
    before: Move
    mixes: str = "mixes the channels with others"
    stops_shift: str = ""
    factor: float = 1.0
    added: float = 0.0


def crossing(node: fx.Node) -> Crossing | None:
    """None where the operation hands nothing on, or not in this form."""
    rule = _RULES.get(kind_of(node))
    return rule(node, inputs_of(node)[0]) if rule is not None and inputs_of(node) else None


def crossings(node: fx.Node) -> tuple[Crossing, ...]:
    """One for each value that the operation hands on; several where it puts them side by side."""
    if kind_of(node) is Kind.JOIN:
        return tuple(_joined(node))
    found = crossing(node)
    return () if found is None else (found,)


def moves(node: fx.Node) -> bool:
    """Whether the node only moves, drops or repeats the elements of its first input."""
    return kind_of(node) in _MOVES and crossing(node) is not None


def rearranged(node: fx.Node) -> Crossing | None:
    """The crossing of a node that moves elements, or takes them from elsewhere; None of others."""
    return crossing(node) if kind_of(node) in _MOVES | {Kind.GATHER} else None


def picks(node: fx.Node) -> bool:
    """Whether the node hands on a part of its input, or several."""
    return kind_of(node) is Kind.SLICE and operator(node) != _SHUFFLE


def why_not(node: fx.Node) -> Check:
    """The check that a node fails through which nothing can be handed on."""
    return Check.NON_LINEAR if kind_of(node) in _NON_LINEAR else Check.UNKNOWN


def whole_before(node: fx.Node, channels: Tensor) -> Tensor | None:
    """The channels of all of what a node slices along another axis than theirs; None elsewhere."""
    if not picks(node):
        return None
    rank = len(shape(inputs_of(node)[0]))
    full = channels if channels.dim() == rank else channels.unsqueeze(_axis(node, rank))
    return None if varies(full, _axis(node, rank)) else full


def require_shift_crosses(ground: Ground, found: Crossing, node: fx.Node, affine: Affine) -> None:
    """Raises Refused where there is a shift, and it stops at the node."""
    if affine.shift is not None and found.stops_shift:
        raise Refused(Check.ZERO_PADDING, f"{ground.path(node)} {found.stops_shift}")


# --- one kind each --------------------------------------------------------------------------------


def _same(node: fx.Node, source: fx.Node) -> Crossing:
    return Crossing(source, lambda channels, _: channels, lambda channels, _: channels)


def _reshape(node: fx.Node, source: fx.Node) -> Crossing:
    before = shape(source)
    return Crossing(
        source,
        lambda channels, output: reshaped(channels, before, shape(output)),
        lambda channels, output: reshaped(channels, shape(output), before),
    )


def _permute(node: fx.Node, source: fx.Node) -> Crossing | None:
    order = permutation(node, len(shape(source)))
    if order is None:
        return None
    back = [order.index(axis) for axis in range(len(order))]
    return Crossing(
        source,
        lambda channels, _: channels.permute(order),
        lambda channels, _: channels.permute(back),
    )


def _repeat(node: fx.Node, source: fx.Node) -> Crossing:
    before = shape(source)
    return Crossing(
        source,
        lambda channels, output: repeated(channels, before, shape(output)),
        lambda channels, output: unrepeated(channels, before, shape(output)),
    )


def _restride(node: fx.Node, source: fx.Node) -> Crossing | None:
    """Only where nothing changes but the strides of dimensions of size one."""
    if shape(source) != shape(outputs_of(node)[0]):
        return None
    sizes = zip(shape(source), tensor(source).stride(), arguments(node)[2], strict=True)
    same = all(size == 1 or old == new for size, old, new in sizes)
    return _same(node, source) if same else None


def _slice(node: fx.Node, source: fx.Node) -> Crossing:
    """The node itself, run on the channels, or on the numbers of the elements."""
    before = shape(source)
    axis = _axis(node, len(before))

    def after(channels: Tensor, output: fx.Node) -> Tensor:
        return squeezed(_run(node, _sized(channels, axis, before[axis]), output))

    def back(channels: Tensor, output: fx.Node) -> Tensor:
        """Elements of the input that do not reach the output are NEUTRAL."""
        places = _run(node, along_axis(before, axis), output)
        # A selected dimension is gone from the output, and the channels do not depend on it.
        full = channels if channels.dim() == len(before) else channels.unsqueeze(axis)
        sizes = list(full.shape)
        sizes[axis] = before[axis]
        found = torch.full(sizes, NEUTRAL)
        found.index_copy_(axis, places.reshape(-1), _sized(full, axis, places.numel()))
        return squeezed(found)

    return Crossing(source, after, back)


_SHUFFLE = "aten::channel_shuffle"
_AXIS_SECOND = ("aten::slice", "aten::select", "aten::unbind", "aten::narrow")


def _axis(node: fx.Node, rank: int) -> int:
    """The axis that a slicing node works on."""
    if operator(node) == _SHUFFLE:
        return 1
    return int(argument(node, 1 if operator(node) in _AXIS_SECOND else 2, "dim", 0)) % rank


def _run(node: fx.Node, numbers: Tensor, output: fx.Node) -> Tensor:
    function: Any = node.target
    result: Tensor | Sequence[Tensor] = function(numbers, *node.args[1:], **node.kwargs)
    if isinstance(result, Tensor):
        return result
    return list(result)[outputs_of(node).index(output)]


def _sized(channels: Tensor, axis: int, size: int) -> Tensor:
    sizes = list(channels.shape)
    sizes[axis] = size
    return channels.expand(sizes)


def _joined(node: fx.Node) -> Iterator[Crossing]:
    whole = shape(outputs_of(node)[0])
    axis, start = int(argument(node, 1, "dim", 0)) % len(whole), 0
    for part in inputs_of(node):
        if 0 not in shape(part):
            yield _part(part, axis, start, whole[axis])
            start += shape(part)[axis]


def _part(source: fx.Node, axis: int, start: int, whole: int) -> Crossing:
    """What stands from `start` on; what stands beside it is NEUTRAL to it."""
    size = shape(source)[axis]

    def after(channels: Tensor, _: fx.Node) -> Tensor:
        sizes = list(channels.shape)
        sizes[axis] = whole
        found = torch.full(sizes, NEUTRAL)
        found.narrow(axis, start, size).copy_(_sized(channels, axis, size))
        return squeezed(found)

    def back(channels: Tensor, _: fx.Node) -> Tensor:
        own = channels.narrow(axis, start, size) if varies(channels, axis) else channels
        return squeezed(own)

    return Crossing(source, after, back)


def _average(node: fx.Node, source: fx.Node) -> Crossing:
    rank = len(shape(source))
    axes = _averaged(node, rank)

    def after(channels: Tensor, output: fx.Node) -> Tensor | None:
        if any(varies(channels, axis) for axis in axes):
            return None
        if len(shape(output)) == rank:
            return channels
        return channels.reshape([n for axis, n in enumerate(channels.shape) if axis not in axes])

    def back(channels: Tensor, output: fx.Node) -> Tensor | None:
        if channels.dim() == rank:
            return None if any(varies(channels, axis) for axis in axes) else channels
        sizes = iter(channels.shape)
        return channels.reshape([1 if axis in axes else next(sizes) for axis in range(rank)])

    uneven = "" if _evenly(node) else "averages zeros in at the border"
    return Crossing(source, after, back, "averages over the channels", uneven)


def _averaged(node: fx.Node, rank: int) -> set[int]:
    """The axes over which a node takes means."""
    if operator(node) != "aten::mean":
        return set(range(2, rank))
    dims = argument(node, 1, "dim", None)
    return {int(axis) % rank for axis in dims} if dims else set(range(rank))


def _evenly(node: fx.Node) -> bool:
    """Whether the weights of every mean sum to one, so that a shift stays a shift."""
    if not operator(node).startswith("aten::avg_pool"):
        return True
    padding = argument(node, 3, "padding") or ()
    counts_zeros = argument(node, 5, "count_include_pad", True)
    return argument(node, 6, "divisor_override") is None and not (any(padding) and counts_zeros)


def _pad(node: fx.Node, source: fx.Node) -> Crossing:
    constant = operator(node) == "aten::constant_pad_nd"
    amounts = argument(node, 1, "pad" if constant or operator(node) == "pad" else "padding")
    rank = len(shape(source))
    axes = {rank - 1 - place // 2 for place, amount in enumerate(amounts) if amount}
    stops = "pads with a constant" if constant and axes else ""
    return Crossing(source, _without(axes), _without(axes), "pads the channels", stops)


def _gather(node: fx.Node, source: fx.Node) -> Crossing | None:
    rank = len(shape(source))
    if len(shape(outputs_of(node)[0])) != rank:
        return None
    axes = _gathered(node, rank)
    return Crossing(source, _without(axes), _without(axes), "gathers channels")


def _gathered(node: fx.Node, rank: int) -> set[int]:
    """The axes along which a node takes elements from elsewhere."""
    if operator(node) == "aten::index_select":
        return {int(arguments(node)[1]) % rank}
    if operator(node) in ("aten::roll", "aten::flip"):
        place = 2 if operator(node) == "aten::roll" else 1
        dims = argument(node, place, "dims", [])
        return {int(axis) % rank for axis in dims or range(rank)}
    # One index in front: a gather of rows, or of what a mask of one dimension picks.
    indices = arguments(node)[1]
    rows = len(indices) == 1 and indices[0] is not None and tensor(indices[0]).dim() == 1
    return {0} if rows else set(range(rank))


def _without(axes: Collection[int]) -> Move:
    """The channels as they are, where they do not run along these axes."""
    return lambda channels, _: None if any(varies(channels, axis) for axis in axes) else channels


def _mask(node: fx.Node, source: fx.Node) -> Crossing | None:
    """A scale leaves the zeros that are filled in what they are."""
    zeros = not isinstance(arguments(node)[2], fx.Node) and arguments(node)[2] == 0
    if not zeros or shape(outputs_of(node)[0]) != shape(source):
        return None
    return replace(_same(node, source), stops_shift="fills in zeros")


def _times(node: fx.Node, source: fx.Node) -> Crossing | None:
    """A product with a number."""
    number = _number(node)
    if len(inputs_of(node)) != 1 or not number:
        return None
    return Crossing(source, _without(()), _without(()), factor=number)


def _plus(node: fx.Node, source: fx.Node) -> Crossing | None:
    """A sum with a number."""
    other = argument(node, 1, "other")
    alpha = node.kwargs.get("alpha", argument(node, 2, "alpha", 1))
    numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in (other, alpha))
    if len(inputs_of(node)) != 1 or not numbers:
        return None
    if operator(node) == "aten::rsub":
        return Crossing(source, _without(()), _without(()), factor=-alpha, added=other)
    added = alpha * other * (-1.0 if operator(node) == "aten::sub" else 1.0)
    return Crossing(source, _without(()), _without(()), added=added)


def _number(node: fx.Node) -> float | None:
    """The number that a node multiplies its one tensor with; None where it is no plain number."""
    if operator(node) == "aten::neg":
        return -1.0
    other = argument(node, 1, "other")
    if isinstance(other, bool) or not isinstance(other, (int, float)):
        return None
    if operator(node) == "aten::mul":
        return float(other)
    rounded = node.kwargs.get("rounding_mode") is not None
    return None if rounded or other == 0 else 1.0 / float(other)


Rule = Callable[[fx.Node, fx.Node], Crossing | None]
_RULES: Mapping[Kind | None, Rule] = {
    Kind.SAME: _same,
    Kind.RESHAPE: _reshape,
    Kind.PERMUTE: _permute,
    Kind.REPEAT: _repeat,
    Kind.RESTRIDE: _restride,
    Kind.SLICE: _slice,
    Kind.AVERAGE: _average,
    Kind.PAD: _pad,
    Kind.GATHER: _gather,
    Kind.MASK: _mask,
    Kind.SCALE: _times,
    Kind.ADD: _plus,
}
_MOVES = frozenset({Kind.SAME, Kind.RESHAPE, Kind.PERMUTE, Kind.REPEAT, Kind.RESTRIDE, Kind.SLICE})
_NON_LINEAR = frozenset({Kind.NORM, Kind.POWER, Kind.ACTIVATION, Kind.NON_LINEAR})
