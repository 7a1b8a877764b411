"""Which channel each element of a value belongs to, through everything that moves elements.

The channels of a value are an int64 tensor of the value's rank, of size 1 along every dimension
that the channel does not depend on; an element is the number of the channel, or NEUTRAL where no
scale and no shift applies. So a permutation of channels, a shuffle, a slice or a concatenation is
the same operation on this small tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normsurgery.graph.flow import permutation
from normsurgery.graph.nodes import (
    argument,
    arguments,
    inputs_of,
    operator,
    outputs_of,
    shape,
    tensor,
)

NEUTRAL = -1
Shape = tuple[int, ...]


def along_axis(sizes: Shape, axis: int) -> Tensor:
    """Channel i is index i of `axis`."""
    return torch.arange(sizes[axis]).reshape(_only(len(sizes), axis % len(sizes), sizes[axis]))


def vector(channels: Tensor, axis: int) -> Tensor | None:
    """The channels as a vector along `axis`, or None where they depend on another axis too."""
    axis %= channels.dim()
    others = [size for place, size in enumerate(channels.shape) if place != axis]
    return channels.reshape(-1) if all(size == 1 for size in others) else None


def varies(channels: Tensor, axis: int) -> bool:
    return channels.shape[axis] != 1


def reshaped(channels: Tensor, before: Shape, after: Shape) -> Tensor | None:
    """The channels of `value.reshape(after)`, where the value has the shape `before`."""
    if 0 in before:
        return None
    sizes: list[int] = []
    target: list[int] = []
    for old, new in _groups(before, after):
        needed = any(channels.shape[axis] != 1 for axis in old)
        sizes += [before[axis] if needed else 1 for axis in old]
        target += [after[axis] if needed else 1 for axis in new]
    return squeezed(channels.expand(sizes).reshape(target))


def squeezed(channels: Tensor) -> Tensor:
    """Without the dimensions that the channel does not depend on (they keep size 1)."""
    for axis, size in enumerate(channels.shape):
        first = channels.narrow(axis, 0, 1)
        if size > 1 and bool((channels == first).all()):
            channels = first
    return channels


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """The axes of two shapes in the smallest groups that hold the same number of elements."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        left = right = 1
        while True:
            if left <= right and i < len(before) and (not old or left != right):
                left *= before[i]
                old.append(i)
                i += 1
            elif j < len(after) and (not new or left != right):
                right *= after[j]
                new.append(j)
                j += 1
            else:
                break
            if left == right and old and new:
                break
        groups.append((old, new))
    return groups


def _only(rank: int, axis: int, size: int) -> list[int]:
    return [size if place == axis else 1 for place in range(rank)]


# --- one node ---------------------------------------------------------------------------------

SAME = frozenset(
    f"aten::{name}"
    for name in ("alias", "clone", "contiguous", "detach", "lift_fresh", "positive", "_to_copy")
)
RESHAPES = frozenset(
    f"aten::{name}"
    for name in (
        "_reshape_alias",
        "_reshape_copy",
        "_unsafe_view",
        "flatten",
        "reshape",
        "squeeze",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    )
)
PERMUTES = frozenset({"aten::t", "aten::transpose", "aten::permute"})
SLICES = frozenset({"aten::slice", "aten::select", "aten::split", "aten::split_with_sizes",
                    "aten::chunk", "aten::unbind", "aten::narrow"})  # fmt: skip


REPEATS = frozenset({"aten::expand", "aten::repeat"})


def moves(node: fx.Node) -> bool:
    """Whether the node only moves, drops or repeats the elements of its first input."""
    known = SAME | RESHAPES | PERMUTES | SLICES | REPEATS | {"aten::channel_shuffle"}
    return bool(inputs_of(node)) and (operator(node) in known or _restrides(node))


def _restrides(node: fx.Node) -> bool:
    """`as_strided` that changes nothing but the strides of dimensions of size one."""
    if operator(node) != "aten::as_strided":
        return False
    source = inputs_of(node)[0]
    if shape(source) != shape(outputs_of(node)[0]):
        return False
    pairs = zip(shape(source), tensor(source).stride(), arguments(node)[2], strict=True)
    return all(size == 1 or old == new for size, old, new in pairs)


def forwards(node: fx.Node, channels: Tensor, output: fx.Node) -> Tensor | None:
    """The channels of an output of a node that `moves`, from those of its input."""
    before, after = shape(inputs_of(node)[0]), shape(output)
    if operator(node) in SAME or operator(node) == "aten::as_strided":
        return channels
    if operator(node) in RESHAPES:
        return reshaped(channels, before, after)
    if operator(node) in PERMUTES:
        order = permutation(node, len(before))
        return None if order is None else channels.permute(order)
    if operator(node) in REPEATS:
        return _repeated(channels, before, after)
    return _replayed(node, channels, before, output)


def backwards(node: fx.Node, channels: Tensor, output: fx.Node) -> Tensor | None:
    """The channels of the input of a node that `moves`, from those of one of its outputs.

    Elements of the input that do not reach the output are NEUTRAL. None where one element of the
    input would need two channels.
    """
    before, after = shape(inputs_of(node)[0]), shape(output)
    if operator(node) in SAME or operator(node) == "aten::as_strided":
        return channels
    if operator(node) in RESHAPES:
        return reshaped(channels, after, before)
    if operator(node) in PERMUTES:
        order = permutation(node, len(before))
        if order is None:
            return None
        return channels.permute([order.index(axis) for axis in range(len(order))])
    if operator(node) in REPEATS:
        return _unrepeated(channels, before, after)
    return _scattered(node, channels, before, output)


def whole_before(node: fx.Node, channels: Tensor) -> Tensor | None:
    """The channels of all of what a node slices along another axis than theirs; None elsewhere."""
    if operator(node) not in SLICES:
        return None
    rank = len(shape(inputs_of(node)[0]))
    axis = _axis(node, rank)
    full = channels if channels.dim() == rank else channels.unsqueeze(axis)
    return None if varies(full, axis) else full


def _replayed(node: fx.Node, channels: Tensor, before: Shape, output: fx.Node) -> Tensor:
    """The node itself, run on the channels; only the axis it works on is written out."""
    return squeezed(_run(node, _written_out(node, channels, before), output))


def _scattered(node: fx.Node, channels: Tensor, before: Shape, output: fx.Node) -> Tensor:
    """Run on the numbers of the elements, the node tells where each element of the output was."""
    axis = _axis(node, len(before))
    places = _run(node, along_axis(before, axis), output)
    # A selected dimension is gone from the output, and the channels do not depend on it.
    full = channels if channels.dim() == len(before) else channels.unsqueeze(axis)
    sizes = list(full.shape)
    sizes[axis] = before[axis]
    found = torch.full(sizes, NEUTRAL)
    found.index_copy_(axis, places.reshape(-1), _sized(full, axis, places.numel()))
    return squeezed(found)


def _sized(channels: Tensor, axis: int, size: int) -> Tensor:
    sizes = list(channels.shape)
    sizes[axis] = size
    return channels.expand(sizes)


def _axis(node: fx.Node, rank: int) -> int:
    """The axis that a slicing node works on."""
    if operator(node) == "aten::channel_shuffle":
        return 1
    place = (
        1
        if operator(node) in ("aten::slice", "aten::select", "aten::unbind", "aten::narrow")
        else 2
    )
    return int(argument(node, place, "dim", 0)) % rank


def _written_out(node: fx.Node, channels: Tensor, before: Shape) -> Tensor:
    axis = _axis(node, len(before))
    return _sized(channels, axis, before[axis])


def _run(node: fx.Node, numbers: Tensor, output: fx.Node) -> Tensor:
    function: Any = node.target
    result: Tensor | Sequence[Tensor] = function(numbers, *node.args[1:], **node.kwargs)
    if isinstance(result, Tensor):
        return result
    return list(result)[outputs_of(node).index(output)]


def _repeated(channels: Tensor, before: Shape, after: Shape) -> Tensor | None:
    inserted = len(after) - len(before)
    if any(channels.shape[a] != 1 and before[a] != after[a + inserted] for a in range(len(before))):
        return None
    return channels.reshape([1] * inserted + list(channels.shape))


def _unrepeated(channels: Tensor, before: Shape, after: Shape) -> Tensor | None:
    inserted = len(after) - len(before)
    for axis in range(len(after)):
        repeated = axis < inserted or before[axis - inserted] != after[axis]
        if repeated and channels.shape[axis] != 1:
            return None
    return channels.reshape(channels.shape[inserted:])
