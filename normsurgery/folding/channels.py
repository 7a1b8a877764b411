"""Which channel each element of a value belongs to, through everything that moves elements.

The channels of a value are an int64 tensor of the value's rank, of size 1 along every dimension
that the channel does not depend on; an element is the number of the channel, or NEUTRAL where no
scale and no shift applies. So a permutation of channels, a shuffle, a slice or a concatenation is
the same operation on this small tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def repeated(channels: Tensor, before: Shape, after: Shape) -> Tensor | None:
    """The channels of a value that is expanded or repeated from `before` to `after`."""
    inserted = len(after) - len(before)
    if any(channels.shape[a] != 1 and before[a] != after[a + inserted] for a in range(len(before))):
        return None
    return channels.reshape([1] * inserted + list(channels.shape))


def unrepeated(channels: Tensor, before: Shape, after: Shape) -> Tensor | None:
    """The channels of what a value was expanded or repeated from."""
    inserted = len(after) - len(before)
    for axis in range(len(after)):
        repeated = axis < inserted or before[axis - inserted] != after[axis]
        if repeated and channels.shape[axis] != 1:
            return None
    return channels.reshape(channels.shape[inserted:])
